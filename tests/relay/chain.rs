//! Tokens bound to a key: a copy of the token lets nobody in and is reported, and the sender that was enrolled goes on
//! whatever was lost on either side.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::certificates::nginx_text;
use crate::support::documents::{prefix, wait_for_documents};
use crate::support::servers::{Elasticsearch, Nginx, free_port, wait_until};
use crate::support::store::{assert_lines, assert_slow_retries, run, wait_for_lines};
use crate::support::waybill::{
    Bench, Certificates, Finished, PATIENCE, Process, Random, Receiver, lines, unread, waybill,
};

const REPORTED: &str = "a copied token?";
const NEEDS_KEY: &str = "needs its chain key: give the sender --chain-key-file";
const WRONG_KEY: &str = "not this token's chain key";
const GONE: &str = "has a receipt for is not there";
const THERE: &str = "the last receipted document is there";
const BLIND: &str = "last receipted documents are not looked up";
const ANOTHERS: &str = "has a receipt for is another sender's";

fn token(bench: &Bench, arguments: &[&str]) -> Finished {
    let mut command = waybill();
    command.arg("token").args(arguments).args(["--tokens", "tokens.toml"]);
    command.current_dir(bench.path(""));
    run(command)
}

/// A token for `name` in `NAME.token`, bound to the key in `NAME.key`.
fn enrol(bench: &Bench, name: &str) {
    let key = format!("{name}.key");
    let said = token(bench, &[name, "--chain-key", &key]).ok();
    assert_eq!(said.stdout.lines().count(), 1, "the token alone: {}", said.stdout);
    private(&bench.write(&format!("{name}.token"), said.stdout));
}

fn private(path: &Path) {
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("chmod");
}

fn enrolled() -> Bench {
    let bench = Bench::new();
    enrol(&bench, "test");
    bench
}

const WITH_KEY: [&str; 3] = ["app.log", "--chain-key-file", "test.key"];

fn sender(bench: &Bench, receiver: &Receiver) -> Process {
    bench.sender(receiver, &WITH_KEY)
}

/// Sends with a state directory of its own and the token of the bench, which it has copied.
fn thief(bench: &Bench, receiver: &Receiver, arguments: &[&str]) -> Command {
    bench.write("stolen.log", "never\n");
    let mut command = waybill();
    command.args(["send", "stolen.log", "--to", &receiver.url(), "--token-file", "test.token"]);
    command.args(["--state-dir", "stolen-state"]).args(arguments).current_dir(bench.path(""));
    command
}

fn wait_for_receiver(receiver: &Receiver, text: &str) {
    wait_until(&format!("the receiver says {text:?}"), PATIENCE, || receiver.log().contains(text));
}

#[test]
fn a_copied_token_is_refused_and_reported_while_the_enrolled_sender_goes_on() {
    let bench = enrolled();
    bench.write("app.log", lines("line", 100));
    let store = bench.path("store.sqlite");
    let mut receiver = bench.receiver_with(move |command| {
        command.arg("--store").arg(&store).args(["--log-level", "debug"]);
    });
    let mut honest = sender(&bench, &receiver);
    wait_for_lines(&bench, 100);

    let refused = run_once(thief(&bench, &receiver, &[]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("1008") && refused.stderr.contains(NEEDS_KEY),
        "{}",
        refused.stderr
    );
    enrol(&bench, "other");
    let refused = run_once(thief(&bench, &receiver, &["--chain-key-file", "other.key"]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains(WRONG_KEY), "{}", refused.stderr);
    let log = receiver.log();
    let reported: Vec<&str> = log.lines().filter(|line| line.contains(REPORTED)).collect();
    assert_eq!(reported.len(), 2, "{log}");
    assert!(
        reported.iter().all(|line| line.contains("WARN") && line.contains("\"test\"")),
        "{log}"
    );
    assert!(!log.contains("two instances"), "it was let in: {log}");

    let patient = Process::start("thief", thief(&bench, &receiver, &[]), bench.path("thief.log"));
    patient.wait_for_log(NEEDS_KEY);
    assert_slow_retries(&patient.log(), NEEDS_KEY);

    bench.append("app.log", (100..200).map(|n| format!("line {n}\n")).collect::<String>());
    wait_for_lines(&bench, 200);
    // A new connection of the enrolled one, and a new process.
    receiver.restart();
    bench.append("app.log", "line 200\n");
    wait_for_lines(&bench, 201);
    assert!(honest.stop().success());
    bench.append("app.log", "line 201\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    assert_lines(&bench, "line", 202);
    wait_until("both claims are looked up", PATIENCE, || {
        receiver.log().matches(THERE).count() == 2
    });
    assert!(!receiver.log().contains("has a receipt for"), "{}", receiver.log());
}

fn run_once(mut command: Command) -> Finished {
    command.arg("--once");
    run(command)
}

#[test]
fn either_side_is_killed_and_nobody_is_locked_out() {
    const LINES: usize = 100_000;
    const KILLS: usize = 8;
    let bench = enrolled();
    let mut receiver = bench.receiver();
    let mut random = Random::new();
    bench.write("app.log", "");
    let arguments = ["app.log", "--chain-key-file", "test.key", "--receipts", "receipts.jsonl"];
    let mut honest = bench.sender(&receiver, &arguments);
    for kill in 0..KILLS {
        let (from, to) = (LINES * kill / KILLS, LINES * (kill + 1) / KILLS);
        let before = bench.size_of("receipts.jsonl");
        bench.append("app.log", (from..to).map(|n| format!("line {n}\n")).collect::<String>());
        wait_until("some receipts came", PATIENCE, || bench.size_of("receipts.jsonl") > before);
        std::thread::sleep(Duration::from_millis(random.below(50)));
        if kill % 2 == 0 {
            receiver.restart();
        } else {
            honest.kill_hard();
            honest = bench.sender(&receiver, &arguments);
        }
    }
    wait_until("every line", PATIENCE, || bench.stored().len() >= LINES);
    assert!(honest.stop().success());
    assert_lines(&bench, "line", LINES);
    let log = receiver.log();
    assert!(!log.contains(REPORTED) && !log.contains("has a receipt for"), "{log}");
}

#[test]
fn a_receipt_that_was_lost_on_the_way_and_a_state_from_a_backup_lock_nobody_out() {
    let bench = enrolled();
    let mut receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    bench.send_once(&receiver, &WITH_KEY).ok();
    copy(&bench.path("state"), &bench.path("backup"));

    // Lines are stored, and the sender dies before it reads a receipt for them.
    let mut honest = sender(&bench, &receiver);
    honest.wait_for_log("connected");
    receiver.process().signal("-STOP");
    bench.append("app.log", (100..200).map(|n| format!("line {n}\n")).collect::<String>());
    wait_until("lines are on the wire", PATIENCE, || unread(receiver.port()) > 0);
    honest.signal("-STOP");
    receiver.process().signal("-CONT");
    wait_for_lines(&bench, 200);
    honest.kill_hard();
    let mut again = bench.send_command(&receiver.url(), &WITH_KEY);
    again.args(["--once", "--receipts", "-"]);
    let receipts = run(again).ok().stdout;
    assert_eq!(receipts.matches("\"already\"").count(), 100, "no receipt had come: {receipts}");
    assert_lines(&bench, "line", 200);

    // An older state: it knows of fewer receipts than were sent.
    bench.append("app.log", "line 200\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    fs::remove_dir_all(bench.path("state")).expect("removed");
    copy(&bench.path("backup"), &bench.path("state"));
    bench.send_once(&receiver, &WITH_KEY).ok();
    assert_lines(&bench, "line", 201);

    // None at all.
    fs::remove_dir_all(bench.path("state")).expect("removed");
    bench.write("new.log", "line 201\n");
    bench.send_once(&receiver, &["new.log", "--chain-key-file", "test.key"]).ok();
    assert_lines(&bench, "line", 202);
    let log = receiver.log();
    assert!(!log.contains(REPORTED) && !log.contains("has a receipt for"), "{log}");
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().expect("cp");
    assert!(status.success());
}

/// Neither the token nor the sender changes, only the entry and the files of the key.
#[test]
fn a_key_may_come_and_go_while_both_run() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    let plain = bench.sender(&receiver, &["app.log"]);
    wait_for_lines(&bench, 100);
    enrol(&bench, "other");
    let key = fs::read_to_string(bench.path("other.key")).expect("a key");
    let tokens = fs::read_to_string(bench.path("tokens.toml")).expect("tokens");
    let created = tokens.find("created = ").expect("an entry");
    let chained =
        format!("{}chain_key = {:?}\n{}", &tokens[..created], key.trim(), &tokens[created..]);
    bench.write("tokens.toml", chained);
    plain.wait_for_log("the entry of this token changed");
    plain.wait_for_log(NEEDS_KEY);
    drop(plain);

    // A file that is not the key yet, and is mended without a restart.
    bench.write("test.key", fs::read(bench.path("other.key")).expect("a key"));
    private(&bench.path("test.key"));
    let mut honest = sender(&bench, &receiver);
    bench.append("app.log", "line 100\n");
    wait_for_lines(&bench, 101);
    bench.write("test.key", "not a key\n");
    enrol(&bench, "third");
    let again = token(&bench, &["test", "--rotate"]).ok().stdout;
    honest.wait_for_log("the token was revoked, replaced");
    bench.write("test.token", again);
    honest.wait_for_log("test.key: it must hold 44 characters");
    bench.write("test.key", key);
    bench.append("app.log", "line 101\n");
    wait_for_lines(&bench, 102);
    assert!(honest.stop().success());

    // Without it, the token is enough.
    let again = token(&bench, &["test", "--rotate", "--no-chain-key"]).ok().stdout;
    bench.write("test.token", again);
    wait_until("the token is taken over", PATIENCE, || {
        bench.send_once(&receiver, &["app.log"]).status.success()
    });
    let list = token(&bench, &["--list"]).ok().stdout;
    let chained: Vec<bool> = list.lines().map(|line| line.ends_with("chained")).collect();
    assert_eq!(chained, [false, true, true], "{list}");
    assert_lines(&bench, "line", 102);
}

#[test]
fn a_bad_key_file_is_a_configuration_error_and_the_files_are_private() {
    let bench = enrolled();
    let mode = |name: &str| {
        fs::metadata(bench.path(name)).expect("it is there").permissions().mode() & 0o777
    };
    assert_eq!((mode("test.key"), mode("tokens.toml")), (0o600, 0o600));
    let again = token(&bench, &["web-2", "--chain-key", "test.key"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(again.stderr.contains("no chain key is written over"), "{}", again.stderr);

    bench.write("app.log", "a line\n");
    let receiver = bench.receiver();
    for (text, says) in [("short\n", "44 characters"), ("", "is empty")] {
        bench.write("bad.key", text);
        for command in [vec!["send"], vec!["check", "send"]] {
            let mut check = waybill();
            check.args(&command).args([
                "app.log",
                "--to",
                &receiver.url(),
                "--token-file",
                "test.token",
            ]);
            check.args(["--chain-key-file", "bad.key", "--state-dir", "state"]);
            let refused = run({
                check.current_dir(bench.path(""));
                check
            });
            let said = refused.stdout + &refused.stderr;
            let code = if command.len() == 1 { 78 } else { 1 };
            assert_eq!(refused.status.code(), Some(code), "{said}");
            assert!(said.contains("bad.key") && said.contains(says), "{said}");
        }
    }
    let mut check = waybill();
    check.args(["check", "send"]).args(WITH_KEY).args(["--to", &receiver.url()]);
    check.args(["--token-file", "test.token", "--state-dir", "state"]).current_dir(bench.path(""));
    fs::set_permissions(bench.path("test.key"), PermissionsExt::from_mode(0o644)).expect("chmod");
    let said = run(check).ok().stdout;
    assert!(said.contains("every user can read") && said.contains("test.key"), "{said}");
}

/// The status line and the header, in lower case, of an upgrade by hand.
fn upgrade(bench: &Bench, receiver: &Receiver, subprotocol: &str) -> String {
    let token = fs::read_to_string(bench.path("test.token")).expect("the token");
    let mut stream = TcpStream::connect(("127.0.0.1", receiver.port())).expect("connect");
    let request = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {subprotocol}\r\nAuthorization: Bearer {}\r\n\r\n",
        token.trim()
    );
    stream.write_all(request.as_bytes()).expect("write");
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("read") == 1 {
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"HTTP/1.1 101") {
        stream.read_to_end(&mut answer).expect("the reason");
    }
    String::from_utf8_lossy(&answer).to_lowercase()
}

#[test]
fn each_upgrade_has_a_challenge_of_its_own_and_text_cannot_answer_one() {
    let bench = enrolled();
    let receiver = bench.receiver();
    let challenge = || {
        let answer = upgrade(&bench, &receiver, "waybill.v1");
        let header = answer.lines().find_map(|line| line.strip_prefix("waybill-challenge: "));
        header.unwrap_or_else(|| panic!("{answer}")).to_owned()
    };
    let (one, other) = (challenge(), challenge());
    assert_eq!(one.len(), 44);
    assert_ne!(one, other);
    let refused = upgrade(&bench, &receiver, "waybill.text.v1");
    assert!(refused.starts_with("http/1.1 403"), "{refused}");
    assert!(refused.contains("chain key") && refused.contains("--no-chain-key"), "{refused}");
}

#[test]
fn challenge_and_answer_pass_the_shipped_nginx() {
    let bench = enrolled();
    let folder = bench.path("");
    Certificates::make(&folder);
    let port = free_port();
    let Some(_nginx) = Nginx::start(&nginx_text(&folder, port)) else { return };
    let mut receive = waybill();
    receive.args(["receive", "--listen", "unix:receive.sock", "--tokens", "tokens.toml"]);
    receive.args(["--store", "store.sqlite"]).current_dir(&folder);
    let receiver = Process::start("receiver", receive, bench.path("receiver.log"));
    receiver.wait_for_log(" listening");
    bench.write("app.log", "line 0\n");
    let url = format!("wss://localhost:{port}/");
    let once = |arguments: &[&str]| {
        let mut command = bench.send_command(&url, &["app.log", "--once", "--ca", "ca.pem"]);
        command.args(arguments);
        run(command)
    };
    let refused = once(&[]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains(NEEDS_KEY), "{}", refused.stderr);
    once(&["--chain-key-file", "test.key"]).ok();
    assert_lines(&bench, "line", 1);
}

#[test]
fn a_receiver_that_dials_wants_the_key_too() {
    let bench = enrolled();
    Certificates::make(&bench.path(""));
    let mut guest = waybill();
    guest.args(["token", "central", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    private(&bench.write("central.token", run(guest).ok().stdout));
    let port = free_port();
    let mut receive = waybill();
    receive.args(["receive", "--tokens", "tokens.toml", "--store", "store.sqlite"]);
    receive.args(["--token-file", "central.token", "--ca", "ca.pem"]);
    receive.args(["--dial", &format!("test=wss://localhost:{port}/")]);
    receive.current_dir(bench.path(""));
    let start = |key: &[&str]| {
        let mut send = waybill();
        send.args(["send", "app.log", "--listen", &format!("127.0.0.1:{port}")]).args(key);
        send.args(["--tls-cert", "server.pem", "--tls-key", "server.key"]);
        send.args(["--tokens", "receivers.toml", "--state-dir", "state"]);
        send.current_dir(bench.path(""));
        let sender = Process::start("sender", send, bench.path("sender.log"));
        sender.wait_for_log("listening for a receiver");
        sender
    };
    bench.write("app.log", lines("line", 100));
    // Who has the certificate and not the key is somebody else.
    let mut without = start(&[]);
    let receiver = Process::start("receiver", receive, bench.path("receiver.log"));
    without.wait_for_log(NEEDS_KEY);
    receiver.wait_for_log(REPORTED);
    assert!(bench.messages().is_empty());
    without.kill_hard();
    let mut honest = start(&["--chain-key-file", "test.key"]);
    wait_for_lines(&bench, 100);
    assert!(honest.stop().success());
    // It knows its last receipt by now.
    bench.append("app.log", "line 100\n");
    let mut honest = start(&["--chain-key-file", "test.key"]);
    wait_for_lines(&bench, 101);
    assert!(honest.stop().success());
    assert_lines(&bench, "line", 101);
    assert_eq!(receiver.log().matches(REPORTED).count(), 1, "{}", receiver.log());
    assert!(!receiver.log().contains("has a receipt for"), "{}", receiver.log());
}

#[test]
fn a_document_that_is_gone_from_the_store_or_is_anothers_is_reported() {
    let bench = enrolled();
    enrol(&bench, "other");
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 10));
    bench.send_once(&receiver, &WITH_KEY).ok();
    // The same state under another token.
    let mut other = waybill();
    other.args(["send", "app.log", "--once", "--to", &receiver.url(), "--state-dir", "state"]);
    other.args(["--token-file", "other.token", "--chain-key-file", "other.key"]);
    other.current_dir(bench.path(""));
    run(other).ok();
    wait_for_receiver(&receiver, ANOTHERS);
    bench.append("app.log", "line 10\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    assert!(!receiver.log().contains(GONE), "{}", receiver.log());

    let last = bench.stored().into_iter().find(|hit| hit["message"] == "line 10").expect("stored");
    let store = rusqlite::Connection::open(bench.path("store.sqlite")).expect("the store");
    store.busy_timeout(PATIENCE).expect("a timeout");
    store.execute("DELETE FROM lines", []).expect("deleted");
    bench.append("app.log", "line 11\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    wait_for_receiver(&receiver, GONE);
    let log = receiver.log();
    let line = log.lines().find(|line| line.contains(GONE)).expect("it was said");
    for part in ["_id", "_index"] {
        assert!(line.contains(last[part].as_str().expect("text")), "{part} in {line}");
    }
    assert!(line.contains("WARN") && line.contains("retention"), "{line}");
    assert_eq!(bench.messages(), ["line 11"], "reported, not refused");
}

/// Two lines one after another, so that the second connection names the document of the first.
fn two_lines(bench: &Bench, receiver: &Receiver) {
    for number in 0..2 {
        bench.append("app.log", format!("line {number}\n"));
        bench.send_once(receiver, &WITH_KEY).ok();
    }
}

#[test]
fn a_document_that_is_gone_from_elasticsearch_is_reported() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = enrolled();
    let prefix = prefix("chain");
    let pattern = format!("{prefix}-default-*");
    let receiver = into(&bench, &node.url(), &prefix);
    two_lines(&bench, &receiver);
    wait_for_receiver(&receiver, THERE);
    wait_for_documents(node, &pattern, 2);
    let documents = node.all_documents(&pattern);
    let last = documents.iter().find(|(_, document)| document["message"] == "line 1");
    let id = last.expect("stored").0;
    let (_, indices) = node.request("GET", &format!("/{pattern}/_settings"), &Value::Null);
    let index = indices.as_object().and_then(|all| all.keys().next()).expect("an index");
    let (status, answer) = node.request("DELETE", &format!("/{index}/_doc/{id}"), &Value::Null);
    assert_eq!(status, 200, "{answer}");
    bench.append("app.log", "line 2\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    wait_for_receiver(&receiver, GONE);
    let log = receiver.log();
    let line = log.lines().find(|line| line.contains(GONE)).expect("it was said");
    assert!(line.contains(id) && line.contains(index) && line.contains("WARN"), "{line}");

    let (status, answer) = node.request("DELETE", &format!("/{index}"), &Value::Null);
    assert_eq!(status, 200, "{answer}");
    bench.append("app.log", "line 3\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    wait_until("the index is missed", PATIENCE, || receiver.log().matches(GONE).count() == 2);
}

/// A receiver into Elasticsearch that says what it looks for.
fn into(bench: &Bench, url: &str, prefix: &str) -> Receiver {
    let (url, prefix) = (url.to_owned(), prefix.to_owned());
    bench.receiver_with(move |command| {
        command.args(["--elasticsearch", &url, "--log-level", "debug"]);
        command.args(["--index", &format!("{prefix}-{{type}}-{{yyyy.MM.dd}}")]);
        command.args(["--dead-letter-index", &format!("{prefix}-dead")]);
    })
}

#[test]
fn a_key_that_may_only_write_asks_in_vain_and_holds_up_nothing() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let (bench, port) = (enrolled(), free_port());
    let prefix = prefix("blind");
    let writes_only = format!(
        "events {{}}\nhttp {{\n access_log off;\n server {{\n listen 127.0.0.1:{port};\n \
         location ~ /_doc/ {{ return 403; }}\n \
         location / {{ proxy_pass http://{}; proxy_http_version 1.1; }}\n }}\n}}\n",
        node.host_port(),
    );
    let Some(_nginx) = Nginx::start(&writes_only) else { return };
    let receiver = into(&bench, &format!("http://127.0.0.1:{port}"), &prefix);
    two_lines(&bench, &receiver);
    wait_for_receiver(&receiver, BLIND);
    bench.append("app.log", "line 2\n");
    bench.send_once(&receiver, &WITH_KEY).ok();
    wait_for_documents(node, &format!("{prefix}-default-*"), 3);
    let log = receiver.log();
    assert_eq!(log.matches(BLIND).count(), 1, "{log}");
    assert!(!log.contains(THERE) && !log.contains("has a receipt for"), "{log}");
}
