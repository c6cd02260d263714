//! Several receivers into one Elasticsearch: they may go and come as they like.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::support::documents::{prefix, receipts, wait_for_documents};
use crate::support::proxy::Proxy;
use crate::support::servers::{Elasticsearch, wait_until};
use crate::support::store::run;
use crate::support::waybill::{Bench, PATIENCE, Process, Random, Receiver, lines, waybill};

const FILES: usize = 6;

fn sender(bench: &Bench, receivers: &[Receiver], arguments: &[&str]) -> Process {
    let mut command = bench.send_command(&receivers[0].url(), arguments);
    for receiver in &receivers[1..] {
        command.args(["--to", &receiver.url()]);
    }
    Process::start("sender", command, bench.path("sender.log"))
}

/// Each message is there once: the ids are pure, so that it does not matter who took a line.
#[track_caller]
fn assert_each_once(node: &Elasticsearch, pattern: &str, mut expected: Vec<String>) {
    wait_for_documents(node, pattern, expected.len());
    let documents = node.all_documents(pattern);
    let text = |document: &serde_json::Value| document["message"].as_str().map(str::to_owned);
    let mut messages: Vec<String> = documents.values().filter_map(text).collect();
    messages.sort();
    expected.sort();
    assert!(messages == expected, "not the lines that were written");
}

#[test]
fn three_receivers_one_killed_each_second_for_a_minute() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("three");
    let mut receivers: Vec<Receiver> =
        (0..3).map(|_| bench.receiver_into(&node.url(), &prefix)).collect();
    let files: Vec<String> = (0..FILES).map(|number| format!("app-{number}.log")).collect();
    files.iter().for_each(|file| drop(bench.write(file, "")));
    let arguments: Vec<&str> = files.iter().map(String::as_str).chain(["--balance"]).collect();
    let mut sender = sender(&bench, &receivers, &arguments);
    let mut random = Random::new();
    let mut expected = Vec::new();
    let start = Instant::now();
    let mut round = 0;
    while start.elapsed() < Duration::from_secs(60) {
        for file in &files {
            let text = lines(&format!("{file} {round}"), 50);
            expected.extend(text.lines().map(str::to_owned));
            bench.append(file, text);
        }
        let number = random.below(3) as usize;
        receivers[number].kill_hard();
        std::thread::sleep(Duration::from_millis(500 + random.below(500)));
        receivers[number].start();
        round += 1;
    }
    assert_each_once(node, &format!("{prefix}-default-*"), expected);
    assert!(sender.stop().success());
    let took = |receiver: &Receiver| receiver.log().contains("sender connected");
    assert!(receivers.iter().all(took), "each of them had its share");
}

/// A receiver that is stopped in an orderly way answers what it has, and the next one takes over.
#[test]
fn a_receiver_that_drains_hands_over() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    for balance in [&[][..], &["--balance"]] {
        let bench = Bench::new();
        let prefix = prefix("drain");
        let mut receivers: Vec<Receiver> =
            (0..2).map(|_| bench.receiver_into(&node.url(), &prefix)).collect();
        let arguments: Vec<&str> =
            ["app.log", "--receipts", "receipts.jsonl"].iter().chain(balance).copied().collect();
        bench.write("app.log", "");
        let mut sender = sender(&bench, &receivers, &arguments);
        let receipted = || receipts(&bench.path("receipts.jsonl")).len();
        let mut expected = Vec::new();
        for round in 0..8 {
            let text = lines(&format!("round {round}"), 20_000);
            expected.extend(text.lines().map(str::to_owned));
            let before = bench.size_of("receipts.jsonl");
            bench.append("app.log", text);
            wait_until("some receipts came", PATIENCE, || bench.size_of("receipts.jsonl") > before);
            // In the middle of it: the other one is up.
            assert!(receivers[round % 2].stop().success());
            receivers[round % 2].start();
        }
        wait_until("all is receipted", PATIENCE, || receipted() == expected.len());
        assert!(sender.stop().success());
        // Elasticsearch itself may have been asked twice, where it was slow to answer.
        let whole = |receiver: &Receiver| !receiver.log().contains("before all was answered");
        assert!(receivers.iter().all(whole), "each receiver answered what it had");
        assert_each_once(node, &format!("{prefix}-default-*"), expected);
    }
}

/// Its Elasticsearch keeps it waiting for answers. Meanwhile the next receiver is there, before the first has closed, and
/// takes the lines of whatever waits for no answer; what does wait follows with its answers.
#[test]
fn lines_flow_to_the_next_receiver_while_one_drains() {
    const CLOSED: &str = "connection closed";
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("pause");
    let slow = Proxy::start(node.host_port(), &[]);
    let (url, index) = (slow.url(), format!("{prefix}-{{type}}-{{yyyy.MM.dd}}"));
    let draining = bench.receiver_with(move |command| {
        command.args(["--elasticsearch", &url, "--index", &index, "--drain-timeout", "10m"]);
    });
    let mut receivers = [draining, bench.receiver_into(&node.url(), &prefix)];
    let files = ["held.log", "free.log"];
    files.iter().for_each(|file| drop(bench.write(file, "")));
    let mut sender = sender(&bench, &receivers, &files);
    let pattern = format!("{prefix}-default-*");
    let mut expected = Vec::new();
    let mut write = |file: &str| {
        let line = format!("{file} {}", expected.len());
        bench.append(file, format!("{line}\n"));
        expected.push(line);
    };
    files.iter().for_each(|file| write(file));
    wait_for_documents(node, &pattern, 2);
    slow.hold();
    write("held.log");
    wait_until("the first receiver waits", PATIENCE, || slow.held() > 0);
    receivers[0].process().signal("-TERM");
    let followed = format!("connected receiver={}", receivers[1].url());
    sender.wait_for_log(&followed);
    // One after the other, until some of them have come through.
    wait_until("lines go through the other", PATIENCE, || {
        files.iter().for_each(|file| write(file));
        node.count(&pattern) > 10
    });
    assert!(!sender.log().contains(CLOSED), "{}", sender.log());
    slow.release();
    assert!(receivers[0].process().wait().success());
    sender.wait_for_log(CLOSED);
    let log = sender.log();
    let at = |text: &str| log.find(text).unwrap_or_else(|| panic!("no {text:?} in {log}"));
    assert!(at(&followed) < at(CLOSED), "{log}");
    assert_each_once(node, &pattern, expected);
    assert!(sender.stop().success());
}

/// With `--balance` a file stays with its receiver, and each receiver has its share of the files.
#[test]
fn balance_gives_each_file_to_one_receiver() {
    // All of them at one receiver: once in 2^39.
    const FILES: usize = 40;
    let bench = Bench::new();
    let stores = [0, 1].map(|number| bench.path(&format!("store-{number}.sqlite")));
    let mut receivers = stores.clone().map(|store| {
        bench.receiver_with(move |command| {
            command.arg("--store").arg(&store);
        })
    });
    let mut sender = sender(&bench, &receivers, &["app-*.log", "--balance"]);
    wait_until("both are connected", PATIENCE, || sender.log().matches(" connected").count() == 2);
    let stored = |store: &PathBuf| -> Vec<String> {
        let mut command = waybill();
        command.args(["search", "--json", "--limit", "10000", "--store"]).arg(store);
        let path = |line: &str| {
            let hit: serde_json::Value = serde_json::from_str(line).expect("a document");
            hit["log"]["file"]["path"].as_str().expect("a path").to_owned()
        };
        run(command).stdout.lines().map(path).collect()
    };
    for round in 1..=3 {
        for number in 0..FILES {
            bench.append(&format!("app-{number}.log"), lines(&format!("round {round}"), 5));
        }
        wait_until("all is stored", PATIENCE, || {
            stores.iter().map(|store| stored(store).len()).sum::<usize>() == round * FILES * 5
        });
    }
    let [first, second] = stores.map(|store| BTreeSet::from_iter(stored(&store)));
    assert!(first.is_disjoint(&second), "{first:?} {second:?}");
    assert!(!first.is_empty() && !second.is_empty(), "{} and {}", first.len(), second.len());
    assert_eq!(first.len() + second.len(), FILES);
    // Where one is gone its files lie in both stores from then on.
    assert!(!sender.log().contains("into another store"), "{}", sender.log());
    receivers[0].stop();
    for number in 0..FILES {
        bench.append(&format!("app-{number}.log"), "late\n");
    }
    sender.wait_for_log("the receiver writes into another store than the one before");
    assert!(sender.stop().success());
}

/// Without `--balance` the first that answers is used, and the others while it is away.
#[test]
fn the_first_receiver_that_answers_is_used() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("failover");
    let mut receivers: Vec<Receiver> =
        (0..2).map(|_| bench.receiver_into(&node.url(), &prefix)).collect();
    let pattern = format!("{prefix}-default-*");
    receivers[0].kill_hard();
    bench.write("app.log", lines("first", 100));
    let mut sender = sender(&bench, &receivers, &["app.log"]);
    wait_for_documents(node, &pattern, 100);
    receivers[0].start();
    receivers[1].kill_hard();
    bench.append("app.log", lines("second", 100));
    wait_for_documents(node, &pattern, 200);
    assert!(sender.stop().success());
    assert!(receivers[0].log().contains("sender connected"));
    let expected = lines("first", 100) + &lines("second", 100);
    assert_each_once(node, &pattern, expected.lines().map(str::to_owned).collect());
}
