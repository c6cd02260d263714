//! Posts to `waybill send --http-intake`, as any HTTP client makes them.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::support::documents::prefix;
use super::support::servers::{Elasticsearch, free_port, have, http, root, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, Receiver};

const NDJSON: &str = "application/x-ndjson";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn intake(bench: &Bench, receiver: &Receiver, port: u16) -> Process {
    let address = format!("127.0.0.1:{port}");
    let sender = bench.sender(receiver, &["--http-intake", &address, "--receipts", "receipts"]);
    wait_until("the intake answers", PATIENCE, || {
        http(&address, "GET", "/", "text/plain", b"").is_ok_and(|(status, _)| status == 200)
    });
    sender
}

fn receipts(bench: &Bench) -> Vec<Value> {
    let text = std::fs::read_to_string(bench.path("receipts")).unwrap_or_default();
    let whole = text.lines().filter(|line| line.ends_with('}'));
    whole.map(|line| serde_json::from_str(line).expect("a receipt")).collect()
}

fn wait_for_receipts(bench: &Bench, count: usize) -> Vec<Value> {
    wait_until("receipts are written", PATIENCE, || receipts(bench).len() >= count);
    receipts(bench)
}

/// UNIX seconds with a fraction, as syslog-ng writes `$R_UNIXTIME`.
fn unix_time(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).expect("after 1970");
    format!("{}.{:03}", since.as_secs(), since.subsec_millis())
}

fn object(time: SystemTime, key: &str, line: &str) -> String {
    format!("{{\"line\":\"{line}\",\"key\":\"{key}\",\"time\":\"{}\"}}\n", unix_time(time))
}

#[test]
fn a_post_repeated_after_a_lost_answer_makes_no_second_document() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let now = SystemTime::now();
    let body = object(now, "k1", "one") + &object(now, "k2", "two") + &object(now, "k3", "two");

    let mut sender = intake(&bench, &receiver, port);
    let mut lost = TcpStream::connect(&address).expect("connect");
    let head = format!(
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-type: {NDJSON}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    lost.write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("post");
    let first = wait_for_receipts(&bench, 3);
    sender.kill_hard();
    // The answer is lost with the connection, and the client asks nobody.
    let _ = lost.read(&mut [0]);

    let mut sender = intake(&bench, &receiver, port);
    let (status, _) = http(&address, "POST", "/", NDJSON, body.as_bytes()).expect("answer");
    assert_eq!(status, 200);
    // A restart sends again what it had no durable position for; the post adds its own three.
    wait_until("the repeat is receipted", PATIENCE, || {
        receipts(&bench).iter().filter(|receipt| receipt["verdict"] == "already").count() >= 3
    });
    assert!(sender.stop().success());

    assert_eq!(bench.messages(), ["one", "two", "two"]);
    let ids = |receipts: &[Value]| -> BTreeSet<String> {
        receipts.iter().map(|receipt| receipt["id"].to_string()).collect()
    };
    assert_eq!(ids(&first).len(), 3, "the same line under two keys is two lines (I4)");
    assert_eq!(ids(&receipts(&bench)), ids(&first), "a repeat has the ids of the first");
    let stored = receipts(&bench).iter().filter(|receipt| receipt["verdict"] == "stored").count();
    assert_eq!(stored, 3);
}

/// The commands in syslog-ng/README.md, as they stand but for the port.
#[test]
fn the_curl_lines_of_the_readme_store_what_they_say() {
    if !have("curl", "curl") {
        return;
    }
    let text = std::fs::read_to_string(root().join("syslog-ng/README.md")).expect("the README");
    let blocks: Vec<&str> = text.split("\n```sh\n").skip(1).collect();
    let [block] = blocks[..] else { panic!("one block of commands, not {}", blocks.len()) };
    let commands = block.split("\n```").next().expect("an end");
    assert_eq!(commands.matches("curl ").count(), 2, "{commands}");
    assert!(commands.contains("127.0.0.1:8514"), "{commands}");

    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let mut sender = intake(&bench, &receiver, port);
    bench.write("lines.txt", "one\ntwo\n");
    // A day that the receiver takes, whenever this runs.
    let today = jiff::Timestamp::now().strftime("%Y-%m-%dT").to_string();
    assert!(commands.contains("\"2026-11-21T"), "{commands}");
    let script = commands
        .replace("8514", &port.to_string())
        .replace("2026-11-21T", &today)
        .replace("curl ", "curl -sS --fail-with-body ");
    // Twice: the line with a key and a time is stored once, those without twice.
    for round in 1..=2 {
        let output = Command::new("sh")
            .args(["-e", "-c", &script])
            .current_dir(bench.path(""))
            .output()
            .expect("sh");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        wait_for_receipts(&bench, 3 * round);
    }
    assert!(sender.stop().success());
    assert_eq!(bench.messages(), ["hello", "one", "one", "two", "two"]);
    let hello = bench.stored().into_iter().find(|hit| hit["message"] == "hello").expect("stored");
    assert_eq!(hello["@timestamp"], format!("{today}10:00:00.250Z"));
}

#[test]
fn lines_without_keys_are_at_least_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let mut sender = intake(&bench, &receiver, port);
    let address = format!("127.0.0.1:{port}");
    for _ in 0..2 {
        let answer = http(&address, "POST", "/any/path?x", "text/plain", b"one\n\ntwo");
        assert_eq!(answer.expect("answer").0, 200);
    }
    wait_for_receipts(&bench, 4);
    assert!(sender.stop().success());
    assert_eq!(bench.messages(), ["one", "one", "two", "two"]);
}

#[test]
fn a_key_has_the_index_of_its_own_day_in_elasticsearch() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("intake");
    let receiver = bench.receiver_into(&elasticsearch.url(), &prefix);
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let now = SystemTime::now();
    let long_ago = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let mut body = String::new();
    for number in 0..300 {
        let time = [now, now - DAY, now - 2 * DAY][number % 3];
        body += &object(time, &format!("k{number}"), &format!("line {number}"));
    }
    body += &object(long_ago, "old", "from another century");

    let mut sender = intake(&bench, &receiver, port);
    assert_eq!(http(&address, "POST", "/", NDJSON, body.as_bytes()).expect("answer").0, 200);
    wait_for_receipts(&bench, 301);
    sender.kill_hard();
    let mut sender = intake(&bench, &receiver, port);
    assert_eq!(http(&address, "POST", "/", NDJSON, body.as_bytes()).expect("answer").0, 200);
    let receipts = wait_for_receipts(&bench, 602);
    assert!(sender.stop().success());

    let mut named: BTreeSet<(String, String)> = BTreeSet::new();
    for receipt in receipts.iter().filter(|receipt| receipt["verdict"] != "parked") {
        let text = |key: &str| receipt[key].as_str().expect(key).to_owned();
        named.insert((text("index"), text("id")));
    }
    assert_eq!(named.len(), 300, "each line has one id in one index");
    let indices: BTreeSet<&String> = named.iter().map(|(index, _)| index).collect();
    assert_eq!(indices.len(), 3, "{indices:?}");
    for index in indices {
        let mut expected: Vec<String> =
            named.iter().filter(|(of, _)| of == index).map(|(_, id)| id.clone()).collect();
        expected.sort();
        assert_eq!(elasticsearch.all_ids(index), expected, "{index} is as its receipts say");
    }
    assert_eq!(elasticsearch.count(&format!("{prefix}-default-*")), 300);
    assert_eq!(elasticsearch.count(&format!("{prefix}-dead")), 1);
    let parked = receipts.iter().find(|receipt| receipt["verdict"] == "parked").expect("parked");
    let reason = parked["reason"].as_str().expect("a reason");
    assert!(reason.contains("2001-09-09"), "{reason}");
}
