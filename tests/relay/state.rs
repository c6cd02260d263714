//! The state directory: copied, lost, cloned, shared; and receivers that change meanwhile.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::support::documents::{Cleanup, prefix};
use super::support::servers::{Elasticsearch, wait_until};
use super::support::waybill::{Bench, PATIENCE, lines, numbered};

fn copy(from: &Path, to: &Path) {
    // A file that is replaced meanwhile may make cp complain: what it copied is what counts.
    let _ = Command::new("cp").arg("-r").args([from, to]).output().expect("cp");
    assert!(to.join("rows").exists());
}

#[test]
fn a_million_lines_and_a_copied_state_directory_leave_a_million_documents() {
    const LINES: u64 = 1_000_000;
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let prefix = prefix("million");
    let _cleanup = Cleanup::of(elasticsearch, &prefix);
    let bench = Bench::new();
    let receiver = bench.receiver_into(&elasticsearch.url(), &prefix);
    let text: String = (1..=LINES).map(|number| format!("line {number}\n")).collect();
    bench.write("f", text);
    let arguments = ["f", "--once", "--receipts", "receipts.jsonl"];
    let mut sender = bench.sender(&receiver, &arguments);
    wait_until("the first lines are receipted", PATIENCE, || bench.size_of("receipts.jsonl") > 0);
    copy(&bench.path("state"), &bench.path("copied"));
    assert!(sender.is_running(), "copied while it sends");
    wait_until("the sender ends", 3 * PATIENCE, || !sender.is_running());
    assert!(sender.wait().success());
    assert_eq!(elasticsearch.count(&format!("{prefix}-default-*")), LINES);
    fs::remove_dir_all(bench.path("state")).expect("remove");
    fs::rename(bench.path("copied"), bench.path("state")).expect("rename");
    bench.send_once(&receiver, &["f"]).ok();
    assert_eq!(elasticsearch.count(&format!("{prefix}-default-*")), LINES);
    assert_eq!(elasticsearch.count(&format!("{prefix}-dead")), 0);
}

#[test]
fn a_copy_of_the_state_directory_gives_the_same_ids() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100_000));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(1);
    copy(&bench.path("state"), &bench.path("copied"));
    bench.wait_for_lines(100_000);
    assert!(sender.stop().success());
    fs::remove_dir_all(bench.path("state")).expect("remove");
    fs::rename(bench.path("copied"), bench.path("state")).expect("rename");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", 100_000));
}

#[test]
fn the_state_directory_of_a_running_sender_is_refused() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "one\n");
    let sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(1);
    let finished = bench.send_once(&receiver, &["app.log"]);
    assert!(!finished.status.success());
    assert!(finished.stderr.contains("in use by another waybill send"), "{}", finished.stderr);
    assert!(finished.stderr.contains(&sender.id().to_string()), "{}", finished.stderr);
}

#[test]
fn a_lost_state_directory_costs_duplicates_and_no_line() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 1000));
    bench.send_once(&receiver, &["app.log"]).ok();
    fs::remove_dir_all(bench.path("state")).expect("remove");
    bench.append("app.log", "more\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    let twice = numbered("line", 1000).chain(numbered("line", 1000));
    bench.assert_lines(twice.chain(["more".to_owned()]));
}

/// Torn files of the state, as a crash or a full disk leaves them, cost resends only.
#[test]
fn a_torn_journal_and_torn_positions_lose_no_line() {
    for name in ["rows", "positions"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("line", 1000));
        bench.send_once(&receiver, &["app.log"]).ok();
        let path = bench.path(&format!("state/{name}"));
        let text = fs::read(&path).expect("state");
        fs::write(&path, &text[..text.len() - 7]).expect("tear");
        bench.append("app.log", "more\n");
        bench.send_once(&receiver, &["app.log"]).ok();
        let found = bench.messages();
        for line in numbered("line", 1000).chain(["more".to_owned()]) {
            assert!(found.binary_search(&line).is_ok(), "{line} is lost after a torn {name}");
        }
        if name == "positions" {
            bench.assert_lines(numbered("line", 1000).chain(["more".to_owned()]));
        }
    }
}

/// Writes another machine-id(5) into each line of the journal that has one.
fn move_to_another_machine(state: &Path) {
    let path = state.join("rows");
    let journal = fs::read_to_string(&path).expect("journal");
    let mut moved = String::new();
    for line in journal.lines() {
        let (_, json) = line.split_once(' ').expect("CRC32C JSON");
        let mut change: Value = serde_json::from_str(json).expect("a change");
        if change.get("machine").is_some() {
            change["machine"] = "0123456789abcdef0123456789abcdef".into();
        }
        let json = change.to_string();
        moved += &format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
    }
    fs::write(path, moved).expect("journal");
}

#[test]
fn a_clone_of_a_machine_never_uses_the_rows_of_the_other_one() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 1000));
    bench.send_once(&receiver, &["app.log"]).ok();
    copy(&bench.path("state"), &bench.path("clone"));
    // The original and its clone go on with the same text at the same offset: two lines.
    bench.append("app.log", "same text\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    fs::remove_dir_all(bench.path("state")).expect("remove");
    fs::rename(bench.path("clone"), bench.path("state")).expect("rename");
    move_to_another_machine(&bench.path("state"));
    let finished = bench.send_once(&receiver, &["app.log"]).ok();
    assert!(finished.stderr.contains("comes from another machine"), "{}", finished.stderr);
    let finished = bench.send_once(&receiver, &["app.log"]).ok();
    assert!(!finished.stderr.contains("comes from another machine"), "{}", finished.stderr);
    let same = ["same text", "same text"].map(String::from);
    bench.assert_lines(numbered("line", 1000).chain(same));
}

#[test]
fn another_senders_token_renews_the_rows() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    bench.token("other");
    bench.write("app.log", lines("line", 1000));
    bench.send_once(&receiver, &["app.log"]).ok();
    receiver.stop();
    bench.append("app.log", lines("waiting", 10));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("following");
    sender.kill_hard();
    receiver.start();
    fs::copy(bench.path("other.token"), bench.path("test.token")).expect("copy");
    let finished = bench.send_once(&receiver, &["app.log"]).ok();
    assert!(finished.stderr.contains("another sender's"), "{}", finished.stderr);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", 1000).chain(numbered("waiting", 10)));
    for line in bench.stored() {
        let waiting = line["message"].as_str().is_some_and(|text| text.starts_with("waiting"));
        assert_eq!(line["waybill"]["sender_name"], if waiting { "other" } else { "test" });
    }
}

#[test]
fn a_changed_index_rule_is_refused_for_old_lines_and_said_on_both_sides() {
    let bench = Bench::new();
    let receiver_with = |arguments: &[&str]| {
        let store = bench.path("store.sqlite");
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        bench.receiver_with(move |command| {
            command.arg("--store").arg(&store).args(&arguments);
        })
    };
    let mut receiver = receiver_with(&["--index", "old-{type}-{yyyy.MM.dd}"]);
    bench.write("app.log", lines("before", 10));
    bench.send_once(&receiver, &["app.log"]).ok();
    receiver.stop();
    // On their way when the rule changes: their row is the old one.
    bench.append("app.log", lines("waiting", 10));
    let mut changed = receiver_with(&["--index", "new-{type}-{yyyy.MM.dd}"]);
    let mut sender = bench.sender(&changed, &["app.log"]);
    sender.wait_for_log("the receiver refuses these lines");
    sender.wait_for_log("former_index");
    wait_until("the receiver says so too", PATIENCE, || {
        changed.log().contains("segment refused") && changed.log().contains("old-{type}-")
    });
    // New lines go on under the new rule meanwhile.
    bench.append("app.log", lines("after", 10));
    bench.wait_for_lines(20);
    bench.assert_lines(numbered("before", 10).chain(numbered("after", 10)));
    assert!(sender.stop().success());
    let finished = bench.send_once(&changed, &["app.log"]);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    changed.stop();
    let mended = receiver_with(&[
        "--index",
        "new-{type}-{yyyy.MM.dd}",
        "--former-index",
        "old-{type}-{yyyy.MM.dd}",
    ]);
    bench.send_once(&mended, &["app.log"]).ok();
    let all = ["before", "waiting", "after"].into_iter().flat_map(|tag| numbered(tag, 10));
    bench.assert_lines(all);
    for line in bench.stored() {
        let new = line["message"].as_str().is_some_and(|text| text.starts_with("after"));
        let index = line["_index"].as_str().expect("an index");
        assert!(index.starts_with(if new { "new-" } else { "old-" }), "{line}");
    }
}
