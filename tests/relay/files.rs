//! Files: nothing lost and nothing twice, whatever stands in them and whichever pattern names them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::{Value, json};

use super::support::documents::{Cleanup, prefix};
use super::support::servers::{Elasticsearch, have, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, lines, numbered};

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
    assert_eq!(others, ["crlf", "after nul", "\u{fffd}\u{fffd}", "last"]);
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
fn a_changed_host_name_holds_from_the_next_line_on() {
    if !have("unshare", "util-linux") || !have("hostname", "hostname") {
        return;
    }
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("before", 5));
    let sender_on = |host: &str| {
        let inner = bench.send_command(&receiver.url(), &["app.log"]);
        let mut command = Command::new("unshare");
        command.args(["--uts", "sh", "-c", "hostname \"$0\" && exec \"$@\"", host]);
        command.arg(inner.get_program()).args(inner.get_args()).current_dir(bench.path(""));
        Process::start("sender", command, bench.path("sender.log"))
    };
    let mut sender = sender_on("old");
    sender.wait_for_log("following");
    sender.kill_hard();
    let mut sender = sender_on("new");
    sender.wait_for_log("continued=true");
    receiver.start();
    bench.append("app.log", lines("after", 5));
    bench.wait_for_lines(10);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("before", 5).chain(numbered("after", 5)));
    for line in bench.stored() {
        let is_before = line["message"].as_str().is_some_and(|text| text.starts_with("before"));
        assert_eq!(line["host"]["name"], if is_before { "old" } else { "new" }, "{line}");
    }
}

#[test]
fn a_change_of_format_and_time_zone_holds_from_the_next_line_on() {
    let json = "{\"message\":\"hello\"}";
    let bsd = "Jan  2 13:04:05 web1 app: text";
    let part =
        |line: &Value, path: &str| line.pointer(path).and_then(Value::as_str).map(str::to_owned);
    for (flag, [old, new], line, path, [was, is]) in [
        ("--format", ["raw", "json"], json, "/message", [json, "hello"]),
        ("--timezone", ["Asia/Tokyo", "UTC"], bsd, "/@timestamp", ["T04:04:05", "T13:04:05"]),
    ] {
        let bench = Bench::new();
        let mut receiver = bench.receiver();
        receiver.stop();
        bench.write("app.log", format!("{line}\n"));
        let mut sender = bench.sender(&receiver, &["app.log", flag, old]);
        sender.wait_for_log("following");
        sender.kill_hard();
        let mut sender = bench.sender(&receiver, &["app.log", flag, new]);
        sender.wait_for_log("continued=true");
        receiver.start();
        bench.append("app.log", format!("{line}\n"));
        bench.wait_for_lines(2);
        assert!(sender.stop().success());
        let stored = bench.stored();
        let found: Vec<String> = stored.iter().filter_map(|line| part(line, path)).collect();
        assert_eq!(found.len(), 2, "{stored:?}");
        assert!(found[0].contains(was) && found[1].contains(is), "{flag}: {found:?}");
    }
}

/// What was there when another store answered goes out under the old segment; lines after that get one of their own.
#[test]
fn another_store_gets_another_segment() {
    let bench = Bench::new();
    let segment_of_line = |(number, store): (usize, &str)| {
        let path = bench.path(store);
        let receiver = bench.receiver_with(move |command| {
            command.arg("--store").arg(&path);
        });
        bench.append("app.log", format!("line {number}\n"));
        let receipts = format!("{number}.jsonl");
        bench.send_once(&receiver, &["app.log", "--receipts", &receipts]).ok();
        let text = fs::read_to_string(bench.path(&receipts)).expect("receipts");
        let receipt: Value = serde_json::from_str(&text).expect("one line, one receipt");
        // Sender and segment are the first 14 bytes of an id.
        receipt["id"].as_str().expect("an id")[..18].to_owned()
    };
    let stores = ["one", "one", "other", "other", "other"];
    let segments: Vec<String> = stores.into_iter().enumerate().map(segment_of_line).collect();
    assert!(segments[..3].iter().all(|segment| *segment == segments[0]), "{segments:?}");
    assert_ne!(segments[2], segments[3]);
    assert_eq!(segments[3], segments[4]);
}

#[test]
fn compressed_on_the_wire_is_the_same_at_the_other_end() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 20_000));
    let through = Counted::start(receiver.port());
    let url = format!("ws://127.0.0.1:{}/", through.port);
    let mut command = bench.send_command(&url, &["app.log", "--once", "--compress"]);
    assert!(command.output().expect("waybill send").status.success());
    let sent = through.bytes.load(Ordering::Relaxed);
    assert!(sent > 0 && sent < bench.size_of("app.log") / 2, "{sent} bytes");
    bench.assert_lines(numbered("line", 20_000));
}

/// Passes connections on and counts what the clients say.
struct Counted {
    port: u16,
    bytes: Arc<AtomicU64>,
}

impl Counted {
    fn start(to: u16) -> Counted {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = bytes.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(("127.0.0.1", to)).expect("the receiver");
                let (mut up, mut down) =
                    (client.try_clone().expect("a handle"), server.try_clone().expect("a handle"));
                let counter = counter.clone();
                thread::spawn(move || {
                    let mut piece = [0; 16 << 10];
                    while let Ok(length @ 1..) = up.read(&mut piece) {
                        counter.fetch_add(length as u64, Ordering::Relaxed);
                        if (&server).write_all(&piece[..length]).is_err() {
                            break;
                        }
                    }
                    let _ = server.shutdown(Shutdown::Write);
                });
                thread::spawn(move || {
                    let _ = io::copy(&mut down, &mut &client);
                    let _ = client.shutdown(Shutdown::Write);
                });
            }
        });
        Counted { port, bytes }
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
    let prefix = prefix("parked-line");
    let _cleanup = Cleanup::of(elasticsearch, &prefix);
    // Numbers only: a line of letters is refused in full and in reduced form.
    let template = json!({
        "index_patterns": [format!("{prefix}-default-*")],
        "priority": 500,
        "template": {"mappings": {"properties": {"message": {"type": "long"}}}},
    });
    let path = format!("/_index_template/{prefix}");
    let (status, answer) = elasticsearch.request("PUT", &path, &template);
    assert_eq!(status, 200, "{answer}");
    let bench = Bench::new();
    let receiver = bench.receiver_into(&elasticsearch.url(), &prefix);
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
    assert_eq!(elasticsearch.count(&format!("{prefix}-default-*")), 100_000);
    assert_eq!(elasticsearch.count(&format!("{prefix}-dead")), 1);
}

/// Ids hold 40 bits of an offset. A file that went on behind them had its sender connect for ever.
#[test]
fn a_file_past_1_tib_is_named_and_holds_up_nobody() {
    const END: u64 = (1 << 40) - 1;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let big = File::create_new(bench.path("big.log")).expect("a file");
    big.set_len(END - 5000).expect("a hole");
    bench.append("big.log", "passed over\n");
    bench.write("neighbour.log", "passed over\n");
    let arguments = ["big.log", "neighbour.log", "--start", "end"];
    let mut sender = bench.sender(&receiver, &arguments);
    wait_until("both are followed", PATIENCE, || sender.log().matches(" following").count() == 2);
    let mut expected = Vec::new();
    let mut size = bench.size_of("big.log");
    for number in 0..2000 {
        let line = format!("big {number}");
        bench.append("big.log", format!("{line}\n"));
        size += line.len() as u64 + 1;
        if size <= END {
            expected.push(line);
        }
    }
    assert!((100..1000).contains(&expected.len()), "some end before, some behind");
    sender.wait_for_log("not sent: the file goes on past 1 TiB");
    bench.append("neighbour.log", lines("neighbour", 1000));
    bench.append("big.log", lines("more", 10));
    bench.wait_for_lines(expected.len() + 1000);
    // Its successor is followed as any other file.
    fs::rename(bench.path("big.log"), bench.path("big.log.1")).expect("rename");
    bench.write("big.log", lines("successor", 1000));
    expected.extend(["neighbour", "successor"].into_iter().flat_map(|tag| numbered(tag, 1000)));
    bench.wait_for_lines(expected.len());
    assert!(sender.stop().success());
    let log = sender.log();
    assert_eq!(log.matches(" connected").count(), 1, "{log}");
    assert_eq!(log.matches("not sent:").count(), 1, "{log}");
    assert!(
        log.lines().any(|line| line.contains("not sent:") && line.contains("big.log")),
        "{log}"
    );
    let finished = bench.send_once(&receiver, &arguments);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    bench.assert_lines(expected);
}
