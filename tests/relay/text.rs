//! `waybill.text.v1`, spoken by clients that are not ours: Python's `websockets` and Node's `ws`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::clients::{self, Client, feed, node, run};
use crate::support::documents::prefix;
use crate::support::servers::{Elasticsearch, root, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Receiver, lines, unread, waybill};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the end of time")
}

fn keyed(line: &str, key: &str, time: u64) -> String {
    json!({"line": line, "key": key, "time": time}).to_string()
}

fn fixture() -> String {
    fs::read_to_string(root().join("tests/fixtures/text_client.mjs")).expect("the fixture")
}

/// What some answers say under a name, in order.
fn all<'a>(answers: &'a [Value], name: &str) -> Vec<&'a str> {
    answers.iter().map(|answer| answer[name].as_str().unwrap_or_default()).collect()
}

/// The store holds exactly the documents that these answers name, in the indices that they name.
#[track_caller]
fn assert_stored(bench: &Bench, answers: &[Value]) {
    let named = |value: &Value, id: &str, index: &str| {
        let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        (text(id), text(index))
    };
    let answered: BTreeSet<_> = answers.iter().map(|answer| named(answer, "id", "index")).collect();
    let stored: BTreeSet<_> =
        bench.stored().iter().map(|hit| named(hit, "_id", "_index")).collect();
    assert_eq!(answered, stored);
}

/// A code block of docs/protocol.md.
fn page(language: &str) -> String {
    let page = fs::read_to_string(root().join("docs/protocol.md")).expect("docs/protocol.md");
    let (_, block) = page.split_once(&format!("\n```{language}\n")).expect("a block");
    block.split_once("\n```").expect("its end").0.to_owned()
}

// --- The page --------------------------------------------------------------------------------------------------------

#[test]
fn nine_lines_of_python_ship_lines_and_get_their_ids() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    assert_eq!(page("python").lines().count(), 9, "as the README says");
    let script = bench.write("lines.py", page("python"));
    let mut command = Command::new(python);
    command.arg(script).arg(receiver.url() + "?type=nginx").arg(bench.path("test.token"));
    let (answers, ended_well) = run(command, &bench, feed(&lines("line", 50)));
    assert!(ended_well);
    assert_eq!(all(&answers, "verdict"), ["stored"; 50]);
    assert!(all(&answers, "index").iter().all(|index| index.starts_with("waybill-nginx-")));
    assert_stored(&bench, &answers);
    assert_eq!(bench.messages().len(), 50);
}

#[test]
fn ten_lines_of_node_ship_lines_and_get_their_ids() {
    let Some(modules) = clients::node_modules() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let url = receiver.url();
    assert_eq!(page("js").lines().count(), 10, "as the README says");
    let (answers, ended_well) = node(&modules, &bench, &page("js"), &url, feed(&lines("line", 50)));
    assert!(ended_well);
    assert_eq!(all(&answers, "verdict"), ["stored"; 50]);
    assert_stored(&bench, &answers);
    assert_eq!(bench.messages().len(), 50);
}

#[test]
fn the_messages_and_answers_of_the_page_are_true() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut client = Client::connect(&python, &bench, &receiver);
    let messages = page("text message");
    let lines: Vec<&str> = messages.lines().collect();
    let [plain, json, envelope] = lines[..] else { panic!("{messages}") };
    assert_eq!(client.answer_to(plain)["verdict"], "stored");
    assert_eq!(client.answer_to(json)["verdict"], "stored");
    // Its day may lie outside the bounds by now.
    let mut envelope: Value = serde_json::from_str(envelope).expect("JSON");
    envelope["time"] = json!(now_ms());
    assert_eq!(client.answer_to(&envelope.to_string())["verdict"], "stored");
    let mut stored = bench.messages();
    stored.sort();
    assert_eq!(
        stored,
        ["GET /cart failed: error 502", "GET /cart failed: error 502", "a line in JSON is a line"]
    );
    let json = bench.stored().into_iter().find(|hit| hit["log"]["level"] == "info");
    assert!(json.is_some(), "a line in JSON is understood as such");

    let shown: Vec<Value> = page("json answer")
        .lines()
        .map(|line| serde_json::from_str(line).expect("an answer in JSON"))
        .collect();
    let verdicts = ["stored", "already", "parked", "skipped", "deferred", "refused"];
    assert_eq!(all(&shown, "verdict"), verdicts);
    assert_eq!(client.answer_to("")["verdict"], "skipped");
    assert_eq!(client.answer_to(r#"{"line":"a","key":"k"}"#), shown[5]);
    assert_eq!(client.answer_to("\n"), shown[3]);
}

// --- Once, and at least once -----------------------------------------------------------------------------------------

#[test]
fn a_key_and_a_time_make_one_document_also_over_a_kill_of_the_receiver() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let message = keyed("a line", "key", now_ms() - DAY_MS);
    let mut client = Client::connect(&python, &bench, &receiver);
    let first = client.answer_to(&message);
    assert_eq!(first["verdict"], "stored");
    assert_eq!(client.answer_to(&message)["verdict"], "already");
    receiver.restart();
    let mut client = Client::connect(&python, &bench, &receiver);
    let again = client.answer_to(&message);
    assert_eq!(again["verdict"], "already");
    assert_eq!((&again["id"], &again["index"]), (&first["id"], &first["index"]));
    assert_stored(&bench, &[first]);

    // Another line under the same key is another line (I4), and so is the same one without a key.
    let other = keyed("another line", "key", now_ms() - DAY_MS);
    assert_eq!(client.answer_to(&other)["verdict"], "stored");
    let [one, two] = [(); 2].map(|()| client.answer_to("a line"));
    assert_ne!(one["id"], two["id"]);
    assert_eq!(bench.messages(), ["a line", "a line", "a line", "another line"]);
}

#[test]
fn a_key_and_a_time_make_one_document_also_at_a_second_receiver() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let prefix = prefix("text");
    let [first, second] = [(); 2].map(|()| bench.receiver_into(&elasticsearch.url(), &prefix));
    let yesterday = now_ms() - DAY_MS;
    let messages: Vec<String> = (0..50)
        .map(|number| keyed(&format!("line {number}"), &format!("k{number}"), yesterday))
        .collect();
    let ship = |receiver: &Receiver| {
        let mut client = Client::connect(&python, &bench, receiver);
        messages.iter().for_each(|message| client.send(message));
        client.answers(messages.len())
    };
    let (stored, already) = (ship(&first), ship(&second));
    assert_eq!(all(&stored, "verdict"), ["stored"; 50]);
    assert_eq!(all(&already, "verdict"), ["already"; 50]);
    assert_eq!(all(&stored, "id"), all(&already, "id"));
    let mut ids = all(&stored, "id");
    ids.sort_unstable();
    let index = stored[0]["index"].as_str().expect("an index");
    assert_eq!(elasticsearch.all_ids(index), ids, "in the index of the key's day");
    assert_eq!(elasticsearch.count(&format!("{prefix}-*")), 50);
}

/// Node sends without waiting; the receiver is killed in the middle, and everything is sent again.
#[test]
fn lines_with_keys_survive_a_kill_in_the_middle_and_each_is_stored_once() {
    const LINES: usize = 20_000;
    let Some(modules) = clients::node_modules() else { return };
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let now = now_ms();
    let messages = |from, to| -> String {
        let line = |number| keyed(&format!("line {number}"), &format!("run-{number}"), now) + "\n";
        (from..to).map(line).collect()
    };
    let (url, script) = (receiver.url(), fixture());
    let first = node(&modules, &bench, &script, &url, |input| {
        feed(&messages(0, LINES - 1000))(input);
        bench.wait_for_lines(100);
        // Some lines are in its hands, and some will be that it never reads.
        receiver.process().freeze();
        feed(&messages(LINES - 1000, LINES))(input);
        wait_until("lines are on the wire", PATIENCE, || unread(receiver.port()) > 0);
        receiver.kill_hard();
    });
    assert!(!first.1 && first.0.len() < LINES, "the kill fell in the middle");
    receiver.start();
    let (answers, ended_well) = node(&modules, &bench, &script, &url, feed(&messages(0, LINES)));
    assert!(ended_well);
    assert_eq!(answers.len(), LINES);
    // What was answered before the kill is stored (I1), and answers come in the order of their messages.
    assert_eq!(all(&first.0, "id"), all(&answers[..first.0.len()], "id"));
    let repeated = &answers[..first.0.len()];
    assert!(repeated.iter().all(|answer| answer["verdict"] == "already"));
    bench.assert_lines((0..LINES).map(|number| format!("line {number}")));
    assert_stored(&bench, &answers);
}

// --- Backpressure ----------------------------------------------------------------------------------------------------

/// The receiver stops reading, so that its memory stays bounded, and goes on when its answers are read.
#[test]
fn a_client_that_sends_without_reading_is_not_read_either() {
    const LINES: usize = 150_000;
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut client = Client::connect(&python, &bench, &receiver);
    client.tell(json!({"number": LINES, "tag": "line"}));
    let (mut before, mut same) = (0, 0);
    wait_until("the receiver reads no more", PATIENCE, || {
        let now = unread(receiver.port());
        same = if now > 0 && now == before { same + 1 } else { 0 };
        before = now;
        same >= 20
    });
    let taken = bench.stored().len();
    assert!(taken < LINES, "all were taken, though nobody reads the answers");
    // Others are served meanwhile.
    let mut other = Client::connect(&python, &bench, &receiver);
    assert_eq!(other.answer_to("another client")["verdict"], "stored");

    let answers = client.answers(LINES);
    assert!(answers.iter().all(|answer| answer["verdict"] == "stored"));
    let ids: BTreeSet<&str> = all(&answers, "id").into_iter().collect();
    assert_eq!(ids.len(), LINES);
    bench.wait_for_lines(LINES + 1);
}

// --- Refusals --------------------------------------------------------------------------------------------------------

#[test]
fn a_handshake_that_is_wrong_says_why() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    for (query, status, why) in [
        ("?type=billing", 403, "\"billing\" is not listed with this token"),
        ("?tpye=nginx", 400, "\"tpye\" is not known here"),
        ("?tag=", 400, "tag must be"),
    ] {
        let client = Client::dial(&python, &bench, &(receiver.url() + query));
        let said = client.hear();
        assert_eq!(said["status"], status, "{said}");
        assert!(said["body"].as_str().is_some_and(|body| body.contains(why)), "{said}");
    }
    bench.write("test.token", "waybill_this-is-not-it\n");
    let client = Client::dial(&python, &bench, &(receiver.url() + "?type=billing"));
    assert_eq!(client.hear()["status"], 401, "a stranger learns nothing of types");
}

#[test]
fn the_url_says_type_host_and_tags() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let url = receiver.url() + "any/path?type=nginx&host=web%2D1.example&tag=edge&tag=two+words";
    let mut client = Client::dial(&python, &bench, &url);
    client.hear();
    let time = now_ms();
    client.send(&json!({"line": "first", "time": time}).to_string());
    client.send("<34>Nov 21 08:46:48 elsewhere su: second");
    assert_eq!(all(&client.answers(2), "verdict"), ["stored"; 2]);
    let [first, second] = &bench.stored()[..] else { panic!("two lines") };
    assert_eq!(first["host"]["name"], "web-1.example");
    assert_eq!(second["host"]["name"], "elsewhere", "the line's own header");
    assert_eq!(first["tags"], json!(["edge", "two words"]));
    assert_eq!(first["waybill"]["type"], "nginx");
    let stamp: jiff::Timestamp =
        first["@timestamp"].as_str().expect("a time").parse().expect("RFC 3339");
    assert_eq!(stamp.as_millisecond(), i64::try_from(time).expect("a time"));

    let mut client = Client::connect(&python, &bench, &receiver);
    client.answer_to("third");
    assert_eq!(bench.stored().iter().filter(|hit| hit["host"]["name"] == "test").count(), 1);
}

#[test]
fn a_message_that_is_refused_holds_up_nobody() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut client = Client::connect(&python, &bench, &receiver);
    client.send("one");
    client.send(&keyed("old", "k", now_ms() - 500 * DAY_MS));
    client.send(&keyed("new", "k", now_ms() + 10 * DAY_MS));
    client.tell(json!({"size": (1 << 20) + 1}));
    client.send(r#"{"line":"a","key":7,"time":1}"#);
    client.send("");
    client.send("two\nlines\n");
    client.tell(json!({"size": 1 << 20}));
    let answers = client.answers(8);
    assert_eq!(
        all(&answers, "verdict"),
        ["stored", "refused", "refused", "refused", "refused", "skipped", "stored", "stored"]
    );
    for (at, why) in [
        (1, "outside"),
        (2, "check the client's clock"),
        (3, "1048577 bytes"),
        (4, "the key must be a string"),
    ] {
        let reason = answers[at]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(why), "{}", answers[at]);
        assert!(answers[at].get("id").is_none(), "{}", answers[at]);
    }
    assert_eq!(bench.messages(), ["one".to_owned(), "two\nlines".to_owned(), "x".repeat(1 << 20)]);
}

// --- The end ---------------------------------------------------------------------------------------------------------

/// What ends a connection comes behind the answers to the lines before it.
#[test]
fn a_message_that_ends_the_connection_does_not_take_its_neighbours_along() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    for (number, (command, code)) in
        [(json!({"binary": "a line"}), 1003), (json!({"size": 2 << 20}), 1009)]
            .into_iter()
            .enumerate()
    {
        let mut client = Client::connect(&python, &bench, &receiver);
        client.tell(json!({"number": 1000, "tag": format!("run {number} line")}));
        let first = client.answers(1);
        client.tell(command);
        let mut answers = first;
        client.tell(json!({"receive": 2000}));
        let closed = loop {
            let said = client.hear();
            if said.get("closed").is_some() {
                break said;
            }
            answers.push(said);
        };
        assert_eq!(closed["closed"], code, "{closed}");
        assert!(answers.iter().all(|answer| answer["verdict"] == "stored"));
        let stored: BTreeSet<String> = bench
            .stored()
            .iter()
            .filter(|hit| {
                hit["message"]
                    .as_str()
                    .is_some_and(|text| text.starts_with(&format!("run {number} ")))
            })
            .map(|hit| hit["_id"].as_str().expect("an id").to_owned())
            .collect();
        let answered: BTreeSet<String> =
            all(&answers, "id").into_iter().map(str::to_owned).collect();
        assert_eq!(answered, stored, "what is stored is answered, and nothing else");
    }
}

#[test]
fn a_receiver_that_stops_answers_what_it_has_read() {
    const LINES: usize = 200_000;
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let mut idle = Client::connect(&python, &bench, &receiver);
    let mut client = Client::connect(&python, &bench, &receiver);
    client.tell(json!({"number": LINES, "tag": "line"}));
    let mut answers = client.answers(100);
    client.tell(json!({"receive": LINES}));
    receiver.process().signal("-TERM");
    let closed = loop {
        let said = client.hear();
        if said.get("closed").is_some() {
            break said;
        }
        answers.push(said);
    };
    assert_eq!(closed["closed"], 1001, "{closed}");
    assert_eq!(idle.closed(), (1001, "this receiver stops".to_owned()));
    assert!(receiver.process().wait().success());
    assert!(answers.len() < LINES, "it stopped in the middle");
    assert_stored(&bench, &answers);
    assert_eq!(bench.stored().len(), answers.len());
}

#[test]
fn a_token_that_is_revoked_ends_its_connection() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut client = Client::connect(&python, &bench, &receiver);
    assert_eq!(client.answer_to("one")["verdict"], "stored");
    let mut revoke = waybill();
    revoke.args(["token", "test", "--revoke", "--tokens"]).arg(bench.path("tokens.toml"));
    assert!(revoke.status().expect("waybill token").success());
    let (code, reason) = client.closed();
    assert_eq!(code, 1008);
    assert!(reason.contains("revoked"), "{reason}");
}

#[test]
fn a_store_that_cannot_write_defers_and_names_no_document() {
    let Some(python) = clients::python() else { return };
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut client = Client::connect(&python, &bench, &receiver);
    let lock = rusqlite::Connection::open(bench.path("store.sqlite")).expect("the store");
    lock.execute_batch("BEGIN IMMEDIATE").expect("its lock");
    let deferred = client.answer_to("one");
    assert_eq!(deferred["verdict"], "deferred", "{deferred}");
    assert!(deferred["after_ms"].as_u64().is_some_and(|after| after > 0), "{deferred}");
    assert!(deferred["reason"].as_str().is_some_and(|why| why.contains("lock")), "{deferred}");
    assert!(deferred.get("id").is_none(), "{deferred}");
    lock.execute_batch("ROLLBACK").expect("its lock");
    assert_eq!(client.answer_to("one")["verdict"], "stored");
    assert_eq!(bench.messages(), ["one"]);
}
