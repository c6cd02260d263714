//! `waybill setup`: what it prints is what it puts, and what it puts for one index rule leaves that of another alone.

use serde_json::{Value, json};

use crate::support::documents::{Cleanup, age, prefix, receipts};
use crate::support::servers::Elasticsearch;
use crate::support::store::run;
use crate::support::waybill::{Bench, Finished, waybill};

/// `waybill setup` for the rule and the dead letter of a prefix.
fn setup(prefix: &str, arguments: &[&str]) -> Finished {
    let mut command = waybill();
    command.args(["setup", "--index", &format!("{prefix}-{{type}}-{{yyyy.MM.dd}}")]);
    command.args(["--dead-letter-index", &format!("{prefix}-dead")]).args(arguments);
    run(command).ok()
}

/// Paths and bodies of the requests that are printed for a console.
fn requests(printed: &str) -> Vec<(String, Value)> {
    let request = |text: &str| {
        let (head, body) = text.split_once('\n').expect("a head and a body");
        let path = head.strip_prefix("PUT ").expect("PUT").to_owned();
        (path, serde_json::from_str(body).expect("JSON"))
    };
    printed.split("\n\n").map(request).collect()
}

/// What the node holds at a path, but for what differs each time that an index is made.
#[track_caller]
fn stored(node: &Elasticsearch, path: &str) -> Value {
    let (status, mut answer) = node.request("GET", path, &Value::Null);
    assert_eq!(status, 200, "{path}: {answer}");
    if let Some(settings) = answer.pointer_mut(&format!("{path}/settings/index")) {
        let settings = settings.as_object_mut().expect("settings");
        for key in ["uuid", "creation_date"] {
            assert!(settings.remove(key).is_some(), "{path}: no {key}");
        }
    }
    // Elasticsearch 9 keeps the times with a template.
    if let Some(template) = answer.pointer_mut("/index_templates/0/index_template") {
        let template = template.as_object_mut().expect("a template");
        template.retain(|key, _| !key.ends_with("_date_millis"));
    }
    answer
}

/// An administrator's requests and `setup` itself leave the same behind.
pub fn what_is_printed_is_what_is_put(node: &Elasticsearch, prefix: &str) {
    let printed = requests(&setup(prefix, &["--print"]).stdout);
    let paths: Vec<&str> = printed.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths.len(), 3, "{paths:?}");
    for (path, body) in &printed {
        let (status, answer) = node.request("PUT", path, body);
        assert_eq!(status, 200, "PUT {path}: {answer}");
    }
    let by_hand: Vec<Value> = paths.iter().map(|path| stored(node, path)).collect();
    for path in &paths {
        assert_eq!(node.request("DELETE", path, &Value::Null).0, 200, "DELETE {path}");
        assert_eq!(node.request("GET", path, &Value::Null).0, 404, "GET {path}");
    }
    for time in ["once", "twice"] {
        setup(prefix, &["--elasticsearch", &node.url()]);
        let by_setup: Vec<Value> = paths.iter().map(|path| stored(node, path)).collect();
        assert_eq!(by_setup, by_hand, "{time}");
    }
    let (_, templates) = node.request("GET", "/_index_template", &Value::Null);
    let templates = templates["index_templates"].as_array().expect("templates").clone();
    let ours = |template: &&Value| template["name"].as_str().is_some_and(|n| n.contains(prefix));
    assert_eq!(templates.iter().filter(ours).count(), 2, "and nothing else");
}

#[test]
fn what_is_printed_needs_no_server_and_is_what_setup_puts() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let prefix = prefix("printed");
    let _cleanup = Cleanup::of(node, &prefix);
    what_is_printed_is_what_is_put(node, &prefix);
}

#[test]
fn two_rules_on_one_cluster_keep_their_templates() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    // The wildcard of the first covers all that the second can make, its dead letter too.
    let wide = prefix("rules");
    let _cleanup = Cleanup::of(node, &wide);
    let narrow = format!("{wide}-eu");
    for rule in [&wide, &narrow, &wide] {
        let said = setup(rule, &["--elasticsearch", &node.url()]).stderr;
        assert!(said.contains(&format!("/_index_template/waybill-{rule}-~-~ is there")), "{said}");
    }
    let mut priorities = Vec::new();
    for rule in [&wide, &narrow] {
        for (path, pattern) in [
            (format!("waybill-{rule}-~-~"), format!("{rule}-*-*")),
            (format!("waybill-dead-letter-{rule}-dead"), format!("{rule}-dead")),
        ] {
            let found = stored(node, &format!("/_index_template/{path}"));
            let template = &found["index_templates"][0]["index_template"];
            assert_eq!(template["index_patterns"], json!([pattern]));
            priorities.push(template["priority"].as_u64().expect("a number"));
        }
    }
    assert!(priorities[2] > priorities[0] && priorities[3] > priorities[2], "{priorities:?}");
    // Each index is made by the template that is meant for it.
    for (index, field) in [
        (format!("{wide}-app-2026.11.21"), "message"),
        (format!("{narrow}-app-2026.11.21"), "message"),
        (format!("{wide}-dead"), "reason"),
        (format!("{narrow}-dead"), "reason"),
    ] {
        node.request("PUT", &format!("/{index}"), &json!({}));
        let found = stored(node, &format!("/{index}"));
        let mappings = &found[&index]["mappings"];
        assert_eq!(mappings["dynamic"], "false", "{index}");
        assert_eq!(mappings["properties"][field]["type"], "text", "{index}");
    }
}

/// Under the template fields have their types, and a line of 1 MiB fits.
#[test]
fn lines_are_stored_typed_and_found() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let prefix = prefix("typed");
    let _cleanup = Cleanup::of(node, &prefix);
    setup(&prefix, &["--elasticsearch", &node.url()]);
    let bench = Bench::new();
    let line =
        r#"{"ip":"192.0.2.1","status":404,"n":1.5,"word":"w","flag":true,"message":"hello"}"#;
    bench.write("app.log", format!("{line}\n{}\n", "x".repeat(1 << 20)));
    let index = format!("{prefix}-default-{}", age(&bench.path("app.log")));
    let receiver = bench.receiver_into(&node.url(), &prefix);
    bench.send_once(&receiver, &["app.log", "--receipts", "receipts.jsonl"]).ok();
    let verdicts = receipts(&bench.path("receipts.jsonl"));
    assert_eq!(verdicts.values().collect::<Vec<_>>(), ["stored", "stored"]);
    assert_eq!(node.count(&index), 2);
    let query = json!({ "query": { "bool": { "filter": [
        { "term": { "source.ip": "192.0.2.0/24" } },
        { "range": { "http.response.status_code": { "gte": 400 } } },
        { "term": { "json.word": "w" } },
        { "term": { "json.flag": "true" } },
        { "range": { "json.n": { "gt": 1 } } },
        { "match": { "message": "hello" } },
    ] } } });
    let (status, found) = node.request("POST", &format!("/{index}/_search"), &query);
    assert_eq!((status, &found["hits"]["total"]["value"]), (200, &json!(1)), "{found}");
    let id = found["hits"]["hits"][0]["_id"].as_str().expect("an id");
    assert!(verdicts.contains_key(id), "{found}");
}
