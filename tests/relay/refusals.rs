//! An index that takes nothing, and a line that no index takes: their neighbours go on, and nothing is lost.

use std::fs;

use serde_json::{Value, json};

use crate::support::documents::{age, assert_documents, prefix, receipts, wait_for_documents};
use crate::support::proxy::Proxy;
use crate::support::servers::{Elasticsearch, free_port, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Process, lines, waybill};

const LINES: usize = 500;

#[track_caller]
fn put(node: &Elasticsearch, method: &str, path: &str, body: &Value) {
    let (status, answer) = node.request(method, path, body);
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
}

/// Two files under two types; lines of `bad.log` go to an index that takes nothing until it is mended.
fn waits_while_others_go_on(
    node: &Elasticsearch,
    name: &str,
    spoil: impl FnOnce(&str),
    said: &str,
    mend: impl FnOnce(&str),
) {
    let bench = Bench::new();
    let prefix = prefix(name);
    bench.write("bad.log", lines("bad", LINES));
    let bad = format!("{prefix}-app-{}", age(&bench.path("bad.log")));
    let good = format!("{prefix}-syslog-*");
    bench.write("good.log", lines("good", LINES));
    spoil(&bad);
    let receiver = bench.receiver_into(&node.url(), &prefix);
    let configuration = format!(
        "to = [{:?}]\ntoken_file = \"test.token\"\nstate_dir = \"state\"\nreceipts = \"receipts.jsonl\"\n\
         [[source]]\nfiles = \"bad.log\"\ntype = \"app\"\n\
         [[source]]\nfiles = \"good.log\"\ntype = \"syslog\"\n",
        receiver.url()
    );
    let configuration = bench.write("sender.toml", configuration);
    let mut command = waybill();
    command.arg("send").arg("--config").arg(configuration);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));

    sender.wait_for_log("the receiver cannot store these lines yet");
    sender.wait_for_log(said);
    wait_until("the receiver says so", PATIENCE, || {
        receiver.log().contains("index refuses documents, others go on")
    });
    wait_for_documents(node, &good, LINES);
    // Later lines of the other file too, while those of the bad index wait.
    let more: String = (LINES..2 * LINES).map(|number| format!("good {number}\n")).collect();
    bench.append("good.log", more);
    wait_for_documents(node, &good, 2 * LINES);
    let path = bench.path("bad.log").display().to_string();
    let early = fs::read_to_string(bench.path("receipts.jsonl")).unwrap_or_default();
    assert!(!early.contains(&path), "a false receipt");

    mend(&bad);
    wait_for_documents(node, &bad, LINES);
    assert_documents(node, &bad, "bad", LINES);
    assert_documents(node, &good, "good", 2 * LINES);
    wait_until("a receipt for each line", PATIENCE, || {
        receipts(&bench.path("receipts.jsonl")).len() == 3 * LINES
    });
    assert!(sender.stop().success());
    assert_eq!(node.count(&format!("{prefix}-dead")), 0, "nothing is parked");
}

#[test]
fn a_closed_index_waits_until_it_is_opened() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    waits_while_others_go_on(
        node,
        "closed",
        |index| {
            put(node, "PUT", &format!("/{index}"), &Value::Null);
            put(node, "POST", &format!("/{index}/_close"), &Value::Null);
        },
        "index_closed_exception",
        |index| put(node, "POST", &format!("/{index}/_open"), &Value::Null),
    );
}

fn block(node: &Elasticsearch, index: &str, block: &str, on: bool) {
    let value = if on { json!(true) } else { Value::Null };
    let settings = json!({ format!("index.blocks.{block}"): value });
    put(node, "PUT", &format!("/{index}/_settings"), &settings);
}

#[test]
fn a_read_only_index_waits_until_its_block_is_lifted() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    waits_while_others_go_on(
        node,
        "readonly",
        |index| {
            put(node, "PUT", &format!("/{index}"), &Value::Null);
            block(node, index, "write", true);
        },
        "cluster_block_exception",
        |index| block(node, index, "write", false),
    );
}

/// What a disk that is full does to an index (429 and a block).
#[test]
fn an_index_of_a_full_disk_waits_until_there_is_room() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    waits_while_others_go_on(
        node,
        "fulldisk",
        |index| {
            put(node, "PUT", &format!("/{index}"), &Value::Null);
            block(node, index, "read_only_allow_delete", true);
        },
        "cluster_block_exception",
        |index| block(node, index, "read_only_allow_delete", false),
    );
}

#[test]
fn an_alias_takes_nothing_until_it_is_an_index() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    waits_while_others_go_on(
        node,
        "alias",
        |index| {
            put(node, "PUT", &format!("/real-{index}"), &Value::Null);
            put(node, "PUT", &format!("/real-{index}/_alias/{index}"), &Value::Null);
        },
        "is an alias",
        |index| {
            assert_eq!(node.count(&format!("real-{index}")), 0);
            put(node, "DELETE", &format!("/real-{index}/_alias/{index}"), &Value::Null);
        },
    );
}

/// Elasticsearch's published artefacts have no data streams; OpenSearch's have.
#[test]
fn a_data_stream_takes_nothing_until_it_is_an_index() {
    let Some(node) = Elasticsearch::start("opensearch-2.19") else {
        return;
    };
    waits_while_others_go_on(
        &node,
        "stream",
        |index| {
            let template = json!({
                "index_patterns": [index], "data_stream": {}, "priority": 500,
                "template": { "settings": { "number_of_replicas": 0 } }
            });
            put(&node, "PUT", "/_index_template/stream", &template);
            put(&node, "PUT", &format!("/_data_stream/{index}"), &Value::Null);
        },
        "is a data stream",
        |index| {
            assert_eq!(node.count(index), 0);
            put(&node, "DELETE", &format!("/_data_stream/{index}"), &Value::Null);
            put(&node, "DELETE", "/_index_template/stream", &Value::Null);
        },
    );
}

/// A field that does not fit its mapping: the line is stored all the same, its fields as one string, with a tag.
#[test]
fn a_line_that_breaks_the_mapping_is_stored_in_reduced_form() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("mapping");
    let mut text = String::new();
    for number in 0..100 {
        text.push_str(&format!("{{\"n\":{number},\"message\":\"fine {number}\"}}\n"));
    }
    text.push_str("{\"n\":{\"nested\":true},\"message\":\"odd one\"}\n");
    bench.write("app.log", text);
    let index = format!("{prefix}-default-{}", age(&bench.path("app.log")));
    let mapping = json!({ "mappings": { "properties": {
        "json": { "properties": { "n": { "type": "long" } } } } } });
    put(node, "PUT", &format!("/{index}"), &mapping);
    let receiver = bench.receiver_into(&node.url(), &prefix);
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_eq!(node.count(&index), 101);
    assert_eq!(node.count(&format!("{prefix}-dead")), 0);
    let documents = node.all_documents(&index);
    let odd = documents
        .values()
        .find(|document| document.to_string().contains("odd one"))
        .expect("the odd line is stored");
    assert!(odd["json"]["n"].is_null(), "{odd}");
    assert!(odd.to_string().contains("nested"), "its fields are kept: {odd}");
    assert!(odd["tags"].as_array().is_some_and(|tags| !tags.is_empty()), "{odd}");
}

/// Refused in reduced form too: the dead letter has it under its own id, its neighbours are stored, and a script learns
/// of it.
#[test]
fn a_line_that_no_form_makes_fit_is_parked_and_its_neighbours_are_stored() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("parked");
    let numbers: String = (0..100).map(|number| format!("{number}\n")).collect();
    bench.write("app.log", format!("{numbers}a word\n{numbers}"));
    let index = format!("{prefix}-default-{}", age(&bench.path("app.log")));
    let mapping = json!({ "mappings": { "properties": { "message": { "type": "long" } } } });
    put(node, "PUT", &format!("/{index}"), &mapping);
    let receiver = bench.receiver_into(&node.url(), &prefix);
    let arguments = ["app.log", "--format", "raw", "--receipts", "receipts.jsonl"];
    let sent = bench.send_once(&receiver, &arguments);
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    assert!(sent.stderr.contains("parked"), "{}", sent.stderr);
    assert_eq!(node.count(&index), 200);

    let verdicts = receipts(&bench.path("receipts.jsonl"));
    assert_eq!(verdicts.len(), 201);
    let parked: Vec<&String> =
        verdicts.iter().filter(|(_, verdict)| *verdict == "parked").map(|(id, _)| id).collect();
    let dead = node.all_documents(&format!("{prefix}-dead"));
    assert_eq!(dead.keys().collect::<Vec<_>>(), parked);
    let letter = dead.values().next().expect("one dead letter");
    assert_eq!(letter["line"], "a word");
    assert_eq!(letter["index"], index);
    assert!(letter["reason"].as_str().is_some_and(|reason| reason.contains("message")), "{letter}");

    // It has its receipt: the next run has nothing to do, and succeeds.
    bench.send_once(&receiver, &arguments).ok();
    assert_eq!(node.count(&format!("{prefix}-dead")), 1);
}

/// A script does not wait for a person: what one index refuses whole fails the run and keeps its place, the other file
/// is sent, and the next run has only the rest to do.
#[test]
fn once_gives_up_on_an_index_whose_mapping_refuses_every_line() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("gaveup");
    bench.write("bad.log", lines("bad", LINES));
    bench.write("good.log", lines("good", LINES));
    let bad = format!("{prefix}-app-{}", age(&bench.path("bad.log")));
    let mapping = json!({ "mappings": { "properties": { "message": { "type": "long" } } } });
    put(node, "PUT", &format!("/{bad}"), &mapping);
    let receiver = bench.receiver_into(&node.url(), &prefix);
    let configuration = format!(
        "to = [{:?}]\ntoken_file = \"test.token\"\nstate_dir = \"state\"\nonce_timeout = \"1s\"\n\
         [[source]]\nfiles = \"bad.log\"\ntype = \"app\"\n\
         [[source]]\nfiles = \"good.log\"\ntype = \"syslog\"\n",
        receiver.url()
    );
    let configuration = bench.write("sender.toml", configuration);
    let once = || {
        let mut command = waybill();
        command.args(["send", "--once", "--config"]).arg(&configuration);
        Process::start("sender", command, bench.path("sender.log"))
    };
    let mut sender = once();
    assert_eq!(sender.wait().code(), Some(1), "{}", sender.log());
    let log = sender.log();
    let said = log.lines().find(|line| line.contains("gave up")).expect("it says so");
    for what in ["ERROR", "bad.log", &format!("index={bad}"), "message", "position=0"] {
        assert!(said.contains(what), "no {what} in {said}");
    }
    assert_eq!(node.count(&format!("{prefix}-dead")), 0, "nothing is parked");
    assert_eq!(node.count(&bad), 0);
    assert_documents(node, &format!("{prefix}-syslog-*"), "good", LINES);

    put(node, "DELETE", &format!("/{bad}"), &Value::Null);
    assert!(once().wait().success());
    assert_documents(node, &bad, "bad", LINES);
    assert_documents(node, &format!("{prefix}-syslog-*"), "good", LINES);
}

/// What is only away comes back by itself: no timeout ends the wait for it.
#[test]
fn once_waits_for_an_absent_receiver_and_for_an_absent_elasticsearch() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let (port, prefix) = (free_port(), prefix("awaited"));
    let mut receiver = bench.receiver_into(&format!("http://127.0.0.1:{port}"), &prefix);
    receiver.stop();
    bench.write("app.log", lines("line", LINES));
    let mut sender = bench.sender(&receiver, &["app.log", "--once", "--once-timeout", "0s"]);
    sender.wait_for_log("does not answer");
    receiver.start();
    sender.wait_for_log("connected");
    wait_until("the receiver says that Elasticsearch is away", PATIENCE, || {
        receiver.log().contains("Elasticsearch takes no documents")
    });
    assert!(sender.is_running());
    let _proxy = Proxy::start_at(port, node.host_port(), &[]);
    assert!(sender.wait().success());
    assert_documents(node, &format!("{prefix}-default-*"), "line", LINES);
}

/// An index rule that changed while lines were on their way: the receiver says which line its configuration needs, and
/// with it they arrive where they belong.
#[test]
fn an_index_rule_that_changed_holds_up_old_lines_until_it_is_listed() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("rule");
    bench.write("app.log", lines("line", LINES));
    // The row is completed by the first welcome, while this index takes nothing.
    let index = format!("{prefix}-default-{}", age(&bench.path("app.log")));
    put(node, "PUT", &format!("/{index}"), &Value::Null);
    block(node, &index, "write", true);
    let receiver = bench.receiver_into(&node.url(), &prefix);
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("cluster_block_exception");
    assert!(sender.stop().success());
    drop(receiver);
    block(node, &index, "write", false);

    let (url, new) = (node.url(), format!("{prefix}-new-{{type}}"));
    let arguments = move |former: Option<String>| {
        let (url, new) = (url.clone(), new.clone());
        move |command: &mut std::process::Command| {
            command.args(["--elasticsearch", &url, "--index", &new]);
            if let Some(former) = &former {
                command.args(["--former-index", former]);
            }
        }
    };
    let receiver = bench.receiver_with(arguments(None));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("former_index = [");
    assert!(sender.stop().success());
    drop(receiver);

    let old = format!("{prefix}-{{type}}-{{yyyy.MM.dd}}");
    let receiver = bench.receiver_with(arguments(Some(old)));
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_documents(node, &index, "line", LINES);
}
