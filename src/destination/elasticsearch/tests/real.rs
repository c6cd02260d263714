//! Against a real server, named by `WAYBILL_TEST_ELASTICSEARCH`; each test uses indices of its own.

use super::*;

/// Where the server is; `None` is a visible skip.
fn server() -> Option<String> {
    let url = std::env::var("WAYBILL_TEST_ELASTICSEARCH").ok().filter(|url| !url.is_empty());
    if url.is_none() {
        eprintln!("skipped: WAYBILL_TEST_ELASTICSEARCH names no server");
    }
    url
}

/// A name that no other run has used.
fn fresh(name: &str) -> String {
    format!("waybill-test-{name}-{}", SegmentId::mint())
}

async fn put(client: &Client, path: &str, body: Value) {
    client.json(reqwest::Method::PUT, path, Some(&body)).await.expect("a test's preparation");
}

async fn post(client: &Client, path: &str) -> Value {
    client.json(reqwest::Method::POST, path, None).await.expect("a test's preparation")
}

/// The `_source` of a document.
async fn source(client: &Client, index: &str, id: &str) -> Value {
    let path = format!("/{index}/_doc/{id}");
    let document = client.json(reqwest::Method::GET, &path, None).await.expect("the document");
    document["_source"].clone()
}

#[tokio::test]
async fn setup_runs_twice_and_lines_are_stored_typed_and_found() {
    let Some(url) = server() else { return };
    let name = fresh("typed");
    let dead_letter_index = fresh("dead");
    let config = ElasticsearchConfig { dead_letter_index, ..config(&[&url]) };
    let rule = crate::record::IndexRule::parse(&name).expect("a rule");
    for _ in 0..2 {
        setup(&config, &rule).await.expect("set up");
    }
    let bench = Bench::start(&config);
    let long = "x".repeat(1 << 20);
    let line =
        r#"{"ip":"192.0.2.1","status":404,"n":1.5,"word":"w","flag":true,"message":"hello"}"#;
    let sent = bench.send(&lines(&name), format!("{line}\n{long}\n\n"));
    let id = sent.id(0);
    use Verdict::{Skipped, Stored};
    assert_eq!(sent.verdicts().await, [Stored, Stored, Skipped]);
    bench.end().await;
    let client = Client::new(&config).expect("a client");
    post(&client, &format!("/{name}/_refresh")).await;
    let query = json!({ "query": { "bool": { "filter": [
        { "term": { "source.ip": "192.0.2.0/24" } },
        { "range": { "http.response.status_code": { "gte": 400 } } },
        { "term": { "json.word": "w" } },
        { "term": { "json.flag": "true" } },
        { "range": { "json.n": { "gt": 1 } } },
        { "match": { "message": "hello" } },
    ] } } });
    let found = client.search(&format!("{name}*"), query).await.expect("an answer");
    assert_eq!(found["hits"]["hits"][0]["_id"], id, "{found}");
    assert_eq!(found["hits"]["total"]["value"], 1);
}

#[tokio::test]
async fn a_line_that_is_there_is_already() {
    let Some(url) = server() else { return };
    let bench = Bench::start(&config(&[&url]));
    let segment = lines(&fresh("again"));
    let text = "1\n2\n3\n";
    assert_eq!(bench.send(&segment, text).verdicts().await, vec![Verdict::Stored; 3]);
    assert_eq!(bench.send(&segment, text).verdicts().await, vec![Verdict::Already; 3]);
    bench.end().await;
}

#[tokio::test]
async fn indices_in_trouble_are_deferred_and_others_go_on() {
    let Some(url) = server() else { return };
    let bench = Bench::start(&config(&[&url]));
    let client = Client::new(&config(&[&url])).expect("a client");
    let [closed, read_only, real, alias] = ["closed", "read-only", "real", "alias"].map(fresh);
    for index in [&closed, &read_only] {
        put(&client, &format!("/{index}"), json!({})).await;
    }
    post(&client, &format!("/{closed}/_close")).await;
    put(&client, &format!("/{read_only}/_settings"), json!({ "index.blocks.write": true })).await;
    put(&client, &format!("/{real}"), json!({ "aliases": { (alias.clone()): {} } })).await;
    let all = [&closed, &read_only, &alias, &fresh("open")]
        .map(|index| bench.send(&lines(index), "1\n2\n"));
    let [closed, read_only, alias, open] = all;
    assert_eq!(open.verdicts().await, vec![Verdict::Stored; 2]);
    for (sent, why) in [(closed, "closed"), (read_only, "blocked"), (alias, "is an alias")] {
        let verdicts = sent.verdicts().await;
        assert!(verdicts.iter().all(|verdict| is_deferred(verdict, why)), "{verdicts:?}");
    }
    bench.end().await;
    post(&client, &format!("/{real}/_refresh")).await;
    let none = client.search(&real, json!({})).await.expect("an answer");
    assert_eq!(none["hits"]["total"]["value"], 0, "nothing is written through an alias");
}

#[tokio::test]
async fn what_breaks_the_mapping_is_stored_reduced_else_parked() {
    let Some(url) = server() else { return };
    let config = ElasticsearchConfig { dead_letter_index: fresh("dead"), ..config(&[&url]) };
    let client = Client::new(&config).expect("a client");
    let (mixed, words) = (fresh("mixed"), fresh("words"));
    let number = json!({ "properties": { "json": { "properties": { "n": { "type": "long" } } } } });
    put(&client, &format!("/{mixed}"), json!({ "mappings": number })).await;
    // A message of more than 32,766 bytes cannot be one term, in any form.
    let term = json!({ "properties": { "message": { "type": "keyword" } } });
    put(&client, &format!("/{words}"), json!({ "mappings": term })).await;
    let bench = Bench::start(&config);
    let sent = bench.send(&lines(&mixed), "{\"n\":1}\n{\"n\":\"word\"}\n{\"n\":2}\n");
    let reduced = sent.id(1);
    assert_eq!(sent.verdicts().await, vec![Verdict::Stored; 3]);
    let document = source(&client, &mixed, &reduced).await;
    assert_eq!(document["message"], r#"{"n":"word"}"#);
    let long = "é".repeat(20_000);
    let sent = bench.send(&lines(&words), format!("1\n{long}\n3\n"));
    let parked = sent.id(1);
    let verdicts = sent.verdicts().await;
    assert_eq!((&verdicts[0], &verdicts[2]), (&Verdict::Stored, &Verdict::Stored));
    assert!(is_parked(&verdicts[1], ""), "{verdicts:?}");
    bench.end().await;
    let letter = source(&client, &config.dead_letter_index, &parked).await;
    assert_eq!(letter["line"], long);
}
