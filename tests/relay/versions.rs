//! The same run against each server that is supported: set up, sent, sent again, read back, found.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::setup::what_is_printed_is_what_is_put;
use crate::support::documents::receipts;
use crate::support::servers::Elasticsearch;
use crate::support::store::run;
use crate::support::waybill::{Bench, Finished, waybill};

const LINES: usize = 20_000;

/// One node at a time: each takes a gigabyte.
static ONE: Mutex<()> = Mutex::new(());

/// A mixture: plain lines, nginx's JSON and RFC 3164, and what is found in each.
fn mixed(count: usize) -> String {
    (0..count)
        .map(|number| match number % 4 {
            0 | 1 => format!("plain line {number}\n"),
            2 => format!(
                "{{\"date\":\"2026-11-20T10:00:00+00:00\",\"ip\":\"192.0.2.{}\",\"host\":\"www.example.org\",\
                 \"path\":\"/page/{number}?q=1\",\"status\":{},\"length\":{number},\"user_agent\":\"curl/8\",\
                 \"generation_time_milli\":7,\"shop\":\"berlin\"}}\n",
                number % 250,
                if number % 100 == 2 { 502 } else { 200 },
            ),
            _ => format!("<30>Nov 20 10:00:01 web-1 worker[77]: job {number} done\n"),
        })
        .collect()
}

fn search(node: &Elasticsearch, arguments: &[&str]) -> Finished {
    let mut command = waybill();
    command.arg("search").args(["--elasticsearch", &node.url()]);
    command.args(["--index", "v-{type}-{yyyy.MM.dd}"]).args(arguments);
    run(command)
}

/// The documents that a search finds.
#[track_caller]
fn found(node: &Elasticsearch, arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["--json", "--limit", "10000"];
    all.extend_from_slice(arguments);
    let finished = search(node, &all);
    assert!(matches!(finished.status.code(), Some(0 | 1)), "{}", finished.stderr);
    finished.stdout.lines().map(|line| serde_json::from_str(line).expect("a document")).collect()
}

fn whole_run(version: &str) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(node) = Elasticsearch::start(version) else {
        return;
    };
    let bench = Bench::new();
    let mut setup: Command = waybill();
    setup.args(["setup", "--elasticsearch", &node.url(), "--dead-letter-index", "v-dead"]);
    setup.args(["--index", "v-{type}-{yyyy.MM.dd}"]);
    run(setup).ok();
    crate::check::cluster(&node, "v-{type}-{yyyy.MM.dd}", "v-dead");

    let receiver = bench.receiver_into(&node.url(), "v");
    let arguments = ["app.log", "--receipts", "receipts.jsonl", "--timezone", "UTC"];
    let text = mixed(LINES);
    let first = text.lines().take(10).map(|line| format!("{line}\n")).collect::<String>();
    bench.write("app.log", &first);
    bench.send_once(&receiver, &arguments).ok();
    copy(&bench.path("state"), &bench.path("early"));
    bench.append("app.log", &text[first.len()..]);
    bench.send_once(&receiver, &arguments).ok();
    let pattern = "v-default-*";
    assert_eq!(node.count(pattern), LINES as u64);

    // Read back: every receipt is a document, and every document a line.
    let documents = node.all_documents(pattern);
    let verdicts = receipts(&bench.path("receipts.jsonl"));
    assert!(documents.keys().eq(verdicts.keys()), "receipts and documents differ");
    assert!(verdicts.values().all(|verdict| verdict == "stored"));
    let written: BTreeSet<&str> = text.lines().collect();
    let read: BTreeSet<&str> = documents
        .values()
        .map(|document| {
            let original = document["event"]["original"].as_str();
            original.or(document["message"].as_str()).expect("a line")
        })
        .collect();
    assert!(written == read, "the documents are not the lines");

    // Sent again from a state that is older: the same ids, so that each is there already.
    fs::remove_dir_all(bench.path("state")).expect("removed");
    fs::rename(bench.path("early"), bench.path("state")).expect("renamed");
    fs::remove_file(bench.path("receipts.jsonl")).expect("removed");
    bench.send_once(&receiver, &arguments).ok();
    assert_eq!(node.count(pattern), LINES as u64);
    let verdicts = receipts(&bench.path("receipts.jsonl"));
    assert_eq!(verdicts.len(), LINES - 10);
    assert!(verdicts.values().all(|verdict| verdict == "already"), "{verdicts:?}");
    assert!(verdicts.keys().all(|id| documents.contains_key(id)));
    assert_eq!(node.count("v-dead"), 0);

    searches(&node);
    what_is_printed_is_what_is_put(&node, "printed");
}

/// Words, a phrase, fields of each type, a range of time, and the limit.
fn searches(node: &Elasticsearch) {
    assert_eq!(found(node, &["plain"]).len(), LINES / 2);
    assert_eq!(found(node, &["\"job 3 done\""]).len(), 1);
    assert_eq!(found(node, &["\"done 3 job\""]).len(), 0);
    assert_eq!(found(node, &["done 3 job"]).len(), 1, "words in any order");
    assert_eq!(found(node, &["http.response.status_code:502"]).len(), LINES / 100);
    assert_eq!(
        found(node, &["json.shop:berlin -http.response.status_code:502"]).len(),
        LINES / 4 - LINES / 100
    );
    assert_eq!(found(node, &["source.ip:192.0.2.2"]).len(), LINES / 500);
    let limited = search(node, &["--json", "--limit", "3", "process.name:worker"]).ok();
    assert_eq!(limited.stdout.lines().count(), 3);
    assert_eq!(found(node, &["process.pid:77", "--before", "2026-11-20T10:00:01Z"]).len(), 0);
    let range = ["--after", "2026-11-20T10:00:00Z", "--before", "2026-11-20T10:00:01Z"];
    assert_eq!(found(node, &range).len(), LINES / 4, "nginx's lines alone are of that second");
    let one = &found(node, &["url.path:/page/6"])[0];
    assert_eq!(one["http"]["response"]["body"]["bytes"], 6);
    assert_eq!(one["event"]["duration"], 7_000_000);
    let nothing = search(node, &["nosuchword"]);
    assert_eq!(nothing.status.code(), Some(1), "as grep does");
    let person = search(node, &["\"job 3 done\""]).ok();
    assert!(
        person.stdout.contains("web-1") && person.stdout.contains("job 3 done"),
        "{}",
        person.stdout
    );
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.expect("cp").success());
}

#[test]
fn elasticsearch_7_17() {
    whole_run("7.17");
}

#[test]
fn elasticsearch_8_17() {
    whole_run("8.17");
}

#[test]
fn elasticsearch_9_2() {
    whole_run("9.2");
}

#[test]
fn opensearch_2_19() {
    whole_run("opensearch-2.19");
}

#[test]
fn opensearch_3_8() {
    whole_run("opensearch-3.8");
}
