//! Crashes: SIGKILL at any instant, of any process, and no line is lost or doubled.

use std::fs;
use std::time::Duration;

use super::support::servers::{Elasticsearch, wait_until};
use super::support::waybill::{Bench, PATIENCE, Random, lines, numbered, unread};

#[test]
fn the_sender_is_killed_again_and_again() {
    const LINES: usize = 300_000;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut random = Random::new();
    bench.write("app.log", lines("line", LINES));
    for _ in 0..10 {
        let mut sender = bench.sender(&receiver, &["app.log"]);
        sender.wait_for_log(" following");
        std::thread::sleep(Duration::from_millis(random.below(300)));
        sender.kill_hard();
    }
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", LINES));
}

/// Lines that come one by one make frames shorter than a fingerprint.
#[test]
fn short_frames_are_sent_again_when_the_receiver_dies() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["app.log"]);
    for number in 0..20 {
        // It accepts bytes and answers none of them.
        receiver.process().freeze();
        bench.append("app.log", format!("line {number}\n"));
        wait_until("a line is on the wire", PATIENCE, || unread(receiver.port()) > 0);
        receiver.restart();
        bench.wait_for_lines(number + 1);
    }
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 20));
}

/// Sender, receiver and Elasticsearch are killed at random instants within one run.
#[test]
fn twenty_kills_of_sender_receiver_and_elasticsearch() {
    const LINES: usize = 1_000_000;
    const KILLS: usize = 20;
    let Some(elasticsearch) = Elasticsearch::start("8.17") else { return };
    let bench = Bench::new();
    let mut random = Random::new();
    let mut receiver = bench.receiver_into(&elasticsearch.url(), "kills");
    bench.write("app.log", "");
    let arguments = ["app.log", "--receipts", "receipts.jsonl"];
    let mut sender = bench.sender(&receiver, &arguments);
    let receipted = || bench.size_of("receipts.jsonl");
    for kill in 0..KILLS {
        // The kills are spread over the run: a part of the lines each, under way at the kill.
        let (from, to) = (LINES * kill / KILLS, LINES * (kill + 1) / KILLS);
        let before = receipted();
        let text: String = (from..to).map(|number| format!("line {number}\n")).collect();
        bench.append("app.log", text);
        if random.below(4) > 0 {
            wait_until("some receipts came", PATIENCE, || receipted() > before);
        }
        std::thread::sleep(Duration::from_millis(random.below(200)));
        // Three kills are Elasticsearch's, which is slow to start; the others fall at random.
        match kill {
            3 | 10 | 17 => {
                elasticsearch.kill_hard();
                elasticsearch.restart();
            }
            _ if random.below(2) == 0 => receiver.restart(),
            _ => {
                sender.kill_hard();
                sender = bench.sender(&receiver, &arguments);
            }
        }
    }
    wait_until("every line is stored", 3 * PATIENCE, || {
        elasticsearch.count("kills-default-*") >= LINES as u64
    });
    assert!(sender.stop().success());
    let finished = bench.send_once(&receiver, &["app.log"]);
    finished.ok();
    assert_eq!(elasticsearch.count("kills-default-*"), LINES as u64);
    assert_eq!(elasticsearch.count("kills-dead"), 0);
    let documents = elasticsearch.all_documents("kills-default-*");
    let mut messages: Vec<String> = documents
        .values()
        .map(|document| document["message"].as_str().expect("a message").to_owned())
        .collect();
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), LINES, "each line once");
}

#[test]
fn a_signal_stops_reading_drains_and_saves_and_ends_with_0() {
    // More than may be under way: some 30 MB.
    const LINES: usize = 2_000_000;
    for signal in ["-TERM", "-INT"] {
        let bench = Bench::new();
        let mut receiver = bench.receiver();
        let arguments = ["app.log", "--receipts", "receipts.jsonl", "--drain-timeout", "1h"];
        bench.write("app.log", "");
        let mut sender = bench.sender(&receiver, &arguments);
        sender.wait_for_log(" connected");
        receiver.process().freeze();
        bench.append("app.log", lines("line", LINES));
        wait_until("lines are on the wire", PATIENCE, || unread(receiver.port()) > 100_000);
        sender.signal(signal);
        sender.wait_for_log("stopping");
        receiver.process().signal("-CONT");
        assert_eq!(sender.wait().code(), Some(0));
        assert!(!sender.log().contains("without some receipts"), "{}", sender.log());
        let receipts = || fs::read_to_string(bench.path("receipts.jsonl")).expect("receipts");
        let drained = receipts().lines().count();
        assert!((1..LINES).contains(&drained), "{drained}");
        // Everything on its way was receipted, and the positions are saved: nothing is sent twice.
        bench.send_once(&receiver, &["app.log", "--receipts", "receipts.jsonl"]).ok();
        let receipts = receipts();
        assert_eq!(receipts.lines().count(), LINES);
        assert!(!receipts.contains("already"));
    }
}

#[test]
fn a_drain_is_bounded_and_a_second_signal_ends_it_at_once() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    bench.write("app.log", "one\n");
    let mut sender = bench.sender(&receiver, &["app.log", "--drain-timeout", "1h"]);
    bench.wait_for_lines(1);
    receiver.process().freeze();
    // Some of it is on the wire, without a receipt.
    bench.append("app.log", lines("line", 200_000));
    wait_until("lines are on the wire", PATIENCE, || unread(receiver.port()) > 100_000);
    sender.signal("-TERM");
    sender.wait_for_log("stopping");
    assert!(sender.is_running(), "it waits for receipts");
    sender.signal("-TERM");
    assert_eq!(sender.wait().code(), Some(1));
    receiver.process().signal("-CONT");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", 200_000).chain(["one".to_owned()]));
    // A bounded one ends by itself.
    let mut sender = bench.sender(&receiver, &["app.log", "--drain-timeout", "100ms"]);
    sender.wait_for_log(" connected");
    receiver.process().freeze();
    bench.append("app.log", lines("late", 200_000));
    wait_until("lines are on the wire", PATIENCE, || unread(receiver.port()) > 100_000);
    assert!(sender.stop().success());
    assert!(sender.log().contains("stopping without some receipts"), "{}", sender.log());
    receiver.process().signal("-CONT");
    bench.send_once(&receiver, &["app.log"]).ok();
    let (early, late) = (numbered("line", 200_000), numbered("late", 200_000));
    bench.assert_lines(early.chain(late).chain(["one".to_owned()]));
}
