//! Files: nothing lost and nothing twice, whatever stands in them and whichever pattern names them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use super::support::servers::{Elasticsearch, wait_until};
use super::support::waybill::{Bench, PATIENCE, lines, numbered};

#[test]
fn a_file_is_sent_once_and_a_second_run_sends_nothing() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 10_000));
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_eq!(bench.messages().len(), 10_000);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.append("app.log", "one more\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_eq!(bench.messages().len(), 10_001);
}

#[test]
fn a_last_line_without_a_newline_waits_and_once_sends_it() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "one\ntwo");
    let mut sender = bench.sender(&receiver, &["app.log", "other.log"]);
    bench.wait_for_lines(1);
    bench.write("other.log", "later\n");
    bench.wait_for_lines(2);
    bench.assert_lines(["one", "later"].map(String::from));
    assert!(sender.stop().success());
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(["one", "two", "later"].map(String::from));
    // What comes after the cut is a record of its own, and marked.
    bench.append("app.log", " and more\nthree\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(["one", "two", " and more", "three", "later"].map(String::from));
    let stored = bench.stored();
    let flags = |message: &str| {
        let line = stored.iter().find(|line| line["message"] == message).expect("stored");
        line["log"]["flags"].clone()
    };
    assert_eq!(flags(" and more"), json!(["continues"]));
    assert_eq!(flags("three"), Value::Null);
}

#[test]
fn odd_bytes_lose_no_line() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let long: String = (0..1_250_000).map(|number| format!("{number:07}\u{20}")).collect();
    let mut text = b"crlf\r\n\n\r\n\0\0\0\0after nul\n\xff\xfe\n".to_vec();
    text.extend_from_slice(long.as_bytes());
    text.extend_from_slice(b"\n\0\0\0\0\0\0");
    bench.write("app.log", &text);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.append("app.log", "\0\0last\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.send_once(&receiver, &["app.log"]).ok();
    let stored = bench.stored();
    let text = |line: &Value| line["message"].as_str().unwrap_or_default().to_owned();
    let parts: Vec<&Value> = stored.iter().filter(|line| text(line).len() > 1000).collect();
    assert_eq!(parts.len(), 10, "10,000,000 bytes in parts of 1 MiB");
    assert_eq!(parts.iter().map(|line| text(line)).collect::<String>(), long);
    assert_eq!(parts[0]["log"]["flags"], json!(["cut"]));
    assert_eq!(parts[5]["log"]["flags"], json!(["continues", "cut"]));
    assert_eq!(parts[9]["log"]["flags"], json!(["continues"]));
    let others: Vec<String> = stored.iter().map(text).filter(|text| text.len() <= 1000).collect();
    assert_eq!(others.len(), 4, "{others:?}");
    assert!(others[0].starts_with("crlf"));
    assert_eq!(others[1], "after nul");
    assert_eq!(others[3], "last");
}

#[test]
fn start_end_passes_over_only_what_is_there_at_the_first_run() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/a.log", "old\n");
    let arguments = ["logs/*.log", "--start", "end"];
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("passed over");
    bench.append("logs/a.log", "new\n");
    bench.write("logs/b.log", "first of b\n");
    bench.wait_for_lines(2);
    assert!(sender.stop().success());
    bench.write("logs/c.log", "first of c\n");
    bench.append("logs/a.log", "newer\n");
    bench.send_once(&receiver, &arguments).ok();
    bench.assert_lines(["new", "newer", "first of b", "first of c"].map(String::from));
}

#[test]
fn start_end_is_spent_at_a_first_run_that_finds_no_file() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    fs::create_dir(bench.path("logs")).expect("a folder");
    let arguments = ["logs/*.log", "--start", "end"];
    // It swept before it connected.
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("connected");
    assert!(sender.stop().success());
    bench.write("logs/a.log", "first\n");
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("following");
    bench.append("logs/a.log", "second\n");
    wait_until("the second line is stored", PATIENCE, || {
        bench.messages().contains(&"second".to_owned())
    });
    assert!(sender.stop().success());
    bench.assert_lines(["first", "second"].map(String::from));
}

#[test]
fn a_symbolic_link_is_refused_unless_allowed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let target = bench.write("secret", "one\n");
    symlink(target, bench.path("app.log")).expect("a link");
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("symbolic link"), "{}", refused.stderr);
    bench.assert_lines([]);
    bench.send_once(&receiver, &["app.log", "--follow-symlinks"]).ok();
    bench.assert_lines(["one".to_owned()]);
}

#[test]
fn a_file_that_two_patterns_name_is_sent_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/a.log", lines("line", 100));
    bench.send_once(&receiver, &["logs/*.log", "logs/a.*"]).ok();
    bench.assert_lines(numbered("line", 100));
    // Under another pattern alone it is still the same file.
    bench.append("logs/a.log", "more\n");
    bench.send_once(&receiver, &["logs/a.*"]).ok();
    bench.send_once(&receiver, &["logs/a.log"]).ok();
    bench.assert_lines(numbered("line", 100).chain(["more".to_owned()]));
}

#[test]
fn a_pattern_matches_files_and_folders_that_come_later() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["logs/*/app.log"]);
    sender.wait_for_log("connected");
    bench.write("logs/one/app.log", "one\n");
    bench.wait_for_lines(1);
    bench.write("logs/two/app.log", "two\n");
    bench.wait_for_lines(2);
    assert!(sender.stop().success());
    bench.assert_lines(["one", "two"].map(String::from));
}

pub fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text).expect("gzip");
    encoder.finish().expect("gzip")
}

#[test]
fn compressed_files_are_sent_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("plain", 100));
    bench.write("app.log.1.gz", gzip(lines("gzip", 20_000).as_bytes()));
    let zstd = zstd::bulk::compress(lines("zstd", 100).as_bytes(), 1).expect("zstd");
    bench.write("app.log.2.zst", zstd);
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(lines("xz", 100).as_bytes()).expect("xz");
    xz.write_all(b"no newline").expect("xz");
    bench.write("app.log.3.xz", xz.finish().expect("xz"));
    for _ in 0..2 {
        bench.send_once(&receiver, &["app.log*"]).ok();
    }
    let all = [("plain", 100), ("gzip", 20_000), ("zstd", 100), ("xz", 100)];
    let all = all.into_iter().flat_map(|(tag, count)| numbered(tag, count));
    bench.assert_lines(all.chain(["no newline".to_owned()]));
}

#[test]
fn a_broken_archive_fails_and_holds_up_nobody() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let whole = gzip(lines("broken", 50_000).as_bytes());
    bench.write("a.log.gz", &whole[..whole.len() / 2]);
    bench.write("b.log", "good\n");
    let finished = bench.send_once(&receiver, &["a.log.gz", "b.log"]);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    assert!(finished.stderr.contains("a.log.gz"), "{}", finished.stderr);
    assert!(bench.messages().contains(&"good".to_owned()));
    // Whole at last: every line, once.
    bench.write("a.log.gz", &whole);
    bench.send_once(&receiver, &["a.log.gz", "b.log"]).ok();
    bench.assert_lines(numbered("broken", 50_000).chain(["good".to_owned()]));
}

#[test]
fn a_change_of_type_and_labels_holds_from_the_next_line_on() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("before", 5));
    let mut sender = bench.sender(&receiver, &["app.log", "--type", "app", "--label", "a=1"]);
    sender.wait_for_log("following");
    sender.kill_hard();
    bench.append("app.log", "unfinished");
    let mut sender = bench.sender(&receiver, &["app.log", "--type", "nginx", "--label", "a=2"]);
    sender.wait_for_log("continued=true");
    receiver.start();
    bench.append("app.log", " line\nafter\n");
    bench.wait_for_lines(7);
    assert!(sender.stop().success());
    let expected = numbered("before", 5).chain(["unfinished line", "after"].map(String::from));
    bench.assert_lines(expected);
    for line in bench.stored() {
        let (kind, label) = match line["message"].as_str() {
            Some(text) if text.starts_with("before") => ("app", "1"),
            _ => ("nginx", "2"),
        };
        assert_eq!(line["waybill"]["type"], kind, "{line}");
        assert_eq!(line["labels"]["a"], label, "{line}");
    }
}

#[test]
fn receipts_name_every_line_once_in_order_with_its_stored_id() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("a.log", lines("line", 20_000) + "\n\nlast\n");
    bench.write("b.log", lines("other", 100));
    bench.send_once(&receiver, &["a.log", "b.log", "--receipts", "receipts.jsonl"]).ok();
    let text = fs::read_to_string(bench.path("receipts.jsonl")).expect("receipts");
    let receipts: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a receipt")).collect();
    assert_eq!(receipts.len(), 20_101);
    for name in ["a.log", "b.log"] {
        let path = bench.path(name).display().to_string();
        let offsets: Vec<u64> = receipts
            .iter()
            .filter(|receipt| receipt["path"] == path.as_str())
            .map(|receipt| receipt["offset"].as_u64().expect("an offset"))
            .collect();
        assert!(offsets.is_sorted_by(|a, b| a < b), "{name}");
    }
    assert!(receipts.iter().all(|receipt| receipt["verdict"] == "stored"));
    let id = |value: &Value, key: &str| value[key].as_str().expect("an id").to_owned();
    let mut named: Vec<_> =
        receipts.iter().map(|receipt| (id(receipt, "id"), id(receipt, "index"))).collect();
    let mut stored: Vec<_> =
        bench.stored().iter().map(|line| (id(line, "_id"), id(line, "_index"))).collect();
    named.sort();
    stored.sort();
    assert_eq!(named, stored);
}

#[test]
fn a_parked_line_is_receipted_as_such_and_fails_the_run() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    // Numbers only: a line of letters is refused in full and in reduced form.
    let template = json!({
        "index_patterns": ["parked-line-default-*"],
        "priority": 500,
        "template": {"mappings": {"properties": {"message": {"type": "long"}}}},
    });
    let (status, answer) = elasticsearch.request("PUT", "/_index_template/parked-line", &template);
    assert_eq!(status, 200, "{answer}");
    let bench = Bench::new();
    let receiver = bench.receiver_into(&elasticsearch.url(), "parked-line");
    // Other lines are stored afterwards: so it is the line's fault, not the index's.
    let numbers: String = (1..100_000).map(|number| format!("{number}\n")).collect();
    bench.write("app.log", format!("0\nbad\n{numbers}"));
    let finished = bench.send_once(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    let text = fs::read_to_string(bench.path("receipts.jsonl")).expect("receipts");
    let verdicts: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a receipt")["verdict"].clone())
        .collect();
    assert_eq!(verdicts[..3], ["stored", "parked", "stored"]);
    assert_eq!(verdicts.len(), 100_001);
    assert_eq!(verdicts.iter().filter(|verdict| **verdict == "stored").count(), 100_000);
    assert_eq!(elasticsearch.count("parked-line-default-*"), 100_000);
    assert_eq!(elasticsearch.count("parked-line-dead"), 1);
}
