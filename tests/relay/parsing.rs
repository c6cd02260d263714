//! Lines become fields: from the file through both programs into the store, and found there.

use std::fs::File;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::support::store::run;
use crate::support::waybill::{Bench, waybill};

/// The document of each line of a file, in order.
fn documents(text: &str, arguments: &[&str]) -> Vec<Value> {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", text);
    let mut all = vec!["app.log", "--timezone", "UTC"];
    all.extend_from_slice(arguments);
    bench.send_once(&receiver, &all).ok();
    bench.stored()
}

#[test]
fn nginx_json_becomes_typed_fields() {
    let line = r#"{"date":"2026-11-05T07:08:09+01:00","ip":"192.0.2.7","host":"www.example.org","path":"/a?b=c","status":"404","referrer":"-","user_agent":"curl/8","length":153,"generation_time_milli":12,"tenant":"blue"}"#;
    let document = &documents(&format!("{line}\n"), &[])[0];
    assert_eq!(document["@timestamp"], "2026-11-05T06:08:09.000Z");
    assert_eq!(document["source"]["ip"], "192.0.2.7");
    assert_eq!(document["url"]["domain"], "www.example.org");
    assert_eq!(document["url"]["path"], "/a");
    assert_eq!(document["url"]["query"], "b=c");
    assert_eq!(document["http"]["response"]["status_code"], 404);
    assert_eq!(document["http"]["response"]["body"]["bytes"], 153);
    assert_eq!(document["user_agent"]["original"], "curl/8");
    assert_eq!(document["event"]["duration"], 12_000_000);
    assert_eq!(document["json"]["tenant"], "blue");
    assert_eq!(document["log"]["offset"], 0);
}

#[test]
fn syslog_headers_become_fields_and_a_json_message_its_own() {
    let text = concat!(
        "<30>Nov  5 07:08:09 web-1 worker[77]: job done\n",
        "<165>1 2026-11-05T07:08:09.123Z db-1 postgres 4711 ID47 [a@1 k=\"v\"] slow query\n",
        "<190>Nov  5 07:08:09 web-1 nginx: {\"status\":502,\"ip\":\"192.0.2.1\"}\n",
    );
    let documents = documents(text, &[]);
    let old = &documents[0];
    assert_eq!(old["message"], "job done");
    assert_eq!(old["host"]["name"], "web-1");
    assert_eq!(old["process"]["name"], "worker");
    assert_eq!(old["process"]["pid"], 77);
    assert_eq!(old["log"]["syslog"]["facility"]["name"], "daemon");
    assert_eq!(old["log"]["syslog"]["severity"]["code"], 6);
    assert_eq!(old["event"]["original"], "<30>Nov  5 07:08:09 web-1 worker[77]: job done");
    let new = &documents[1];
    assert_eq!(new["message"], "slow query");
    assert_eq!(new["@timestamp"], "2026-11-05T07:08:09.123Z");
    assert_eq!(new["log"]["syslog"]["msgid"], "ID47");
    assert_eq!(new["log"]["syslog"]["structured_data"]["a@1"]["k"], "v");
    let nginx = &documents[2];
    assert_eq!(nginx["http"]["response"]["status_code"], 502);
    assert_eq!(nginx["source"]["ip"], "192.0.2.1");
    assert_eq!(nginx["host"]["name"], "web-1");
}

#[test]
fn the_combined_format_becomes_fields() {
    let line = r#"192.0.2.9 - alice [05/Nov/2026:07:08:09 +0100] "GET /a?b=c HTTP/1.1" 200 512 "https://example.org/" "Mozilla/5.0""#;
    let document = &documents(&format!("{line}\n"), &[])[0];
    assert_eq!(document["@timestamp"], "2026-11-05T06:08:09.000Z");
    assert_eq!(document["source"]["ip"], "192.0.2.9");
    assert_eq!(document["user"]["name"], "alice");
    assert_eq!(document["http"]["request"]["method"], "GET");
    assert_eq!(document["http"]["request"]["referrer"], "https://example.org/");
    assert_eq!(document["http"]["response"]["status_code"], 200);
    assert_eq!(document["http"]["response"]["body"]["bytes"], 512);
    assert_eq!(document["url"]["path"], "/a");
    assert_eq!(document["user_agent"]["original"], "Mozilla/5.0");
}

#[test]
fn the_format_of_a_source_decides_what_is_parsed() {
    let text = "{\"status\":404}\n<30>Nov  5 07:08:09 web-1 worker[77]: job done\n";
    let raw = documents(text, &["--format", "raw"]);
    assert_eq!(raw[0]["message"], "{\"status\":404}");
    assert!(raw[0]["http"].is_null() && raw[1]["process"].is_null(), "{raw:?}");
    let json = documents(text, &["--format", "json"]);
    assert_eq!(json[0]["http"]["response"]["status_code"], 404);
    assert_eq!(json[1]["message"], "<30>Nov  5 07:08:09 web-1 worker[77]: job done");
    let syslog = documents(text, &["--format", "syslog"]);
    assert_eq!(syslog[0]["message"], "{\"status\":404}");
    assert_eq!(syslog[1]["process"]["name"], "worker");
}

/// RFC 3164 has no year: the one nearest to the day of the file is meant, whatever today is.
#[test]
fn a_year_that_the_line_lacks_is_the_one_nearest_to_the_files_day() {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    // The last turn of the year that lies far enough in the past for every day of today.
    let year = now.year();
    let new_year: jiff::Timestamp =
        format!("{year}-01-01T12:00:00Z").parse().expect("a time of this year");
    if new_year > jiff::Timestamp::now() {
        // On the first of January itself there is no second file day; the next day has it.
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let file = bench.write(
        "app.log",
        "<30>Dec 31 23:59:59 web-1 worker: before\n<30>Jan  1 00:00:01 web-1 worker: after\n",
    );
    let seconds = u64::try_from(new_year.as_second()).expect("after 1970");
    let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let open = File::options().write(true).open(&file).expect("the file");
    open.set_modified(changed).expect("set");
    bench.send_once(&receiver, &["app.log", "--timezone", "UTC"]).ok();
    let stored = bench.stored();
    assert_eq!(stored[0]["@timestamp"], format!("{}-12-31T23:59:59.000Z", year - 1));
    assert_eq!(stored[1]["@timestamp"], format!("{year}-01-01T00:00:01.000Z"));
}

#[test]
fn times_without_a_zone_are_of_the_zone_that_the_source_names() {
    let line = "<30>Jul  5 12:00:00 web-1 worker: summer\n";
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", line);
    bench.send_once(&receiver, &["app.log", "--timezone", "Europe/Berlin"]).ok();
    let time = bench.stored()[0]["@timestamp"].as_str().expect("a time").to_owned();
    assert!(time.ends_with("-07-05T10:00:00.000Z"), "{time}");
}

#[test]
fn type_tags_and_labels_of_a_source_are_in_each_document() {
    let arguments =
        ["--type", "nginx", "--tag", "edge", "--tag", "fra", "--label", "environment=production"];
    let document = &documents("a line\n", &arguments)[0];
    assert_eq!(document["tags"], serde_json::json!(["edge", "fra"]));
    assert_eq!(document["labels"]["environment"], "production");
    assert_eq!(document["waybill"]["type"], "nginx");
    assert_eq!(document["waybill"]["sender_name"], "test");
}

/// The embedded store answers the same questions as Elasticsearch.
#[test]
fn the_embedded_store_is_searched_by_words_phrases_fields_and_time() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut text = String::new();
    for number in 0..100 {
        text.push_str(&format!(
            "{{\"date\":\"2026-11-20T10:00:00Z\",\"status\":{},\"shop\":\"berlin\"}}\n",
            200 + number % 2
        ));
        text.push_str(&format!("<30>Nov 20 10:00:01 web-1 worker[77]: job {number} done\n"));
    }
    bench.write("app.log", text);
    bench.send_once(&receiver, &["app.log", "--timezone", "UTC"]).ok();
    let search = |arguments: &[&str]| {
        let mut command = waybill();
        command.arg("search").arg("--store").arg(bench.path("store.sqlite")).args(arguments);
        run(command)
    };
    let found = |arguments: &[&str]| {
        let mut all = vec!["--json", "--limit", "1000"];
        all.extend_from_slice(arguments);
        search(&all).stdout.lines().count()
    };
    assert_eq!(found(&[]), 200);
    assert_eq!(found(&["done"]), 100);
    assert_eq!(found(&["\"job 3 done\""]), 1);
    assert_eq!(found(&["\"done 3 job\""]), 0);
    assert_eq!(found(&["done", "3", "job"]), 1);
    assert_eq!(found(&["http.response.status_code:201"]), 50);
    assert_eq!(found(&["json.shop:berlin -http.response.status_code:201"]), 50);
    assert_eq!(found(&["--", "-done"]), 100);
    assert_eq!(found(&["process.pid:77"]), 100);
    assert_eq!(
        found(&["--after", "2026-11-20T10:00:00Z", "--before", "2026-11-20T10:00:01Z"]),
        100
    );
    let limited = search(&["done", "--limit", "3"]).ok();
    assert_eq!(limited.stdout.lines().count(), 3);
    assert!(limited.stderr.contains("100"), "it says how many there are: {}", limited.stderr);
    assert_eq!(search(&["nosuchword"]).status.code(), Some(1));
    assert_eq!(search(&["\"open"]).status.code(), Some(2));
}

/// A logged byte never acts on the terminal.
#[test]
fn control_characters_of_a_line_are_shown_and_not_obeyed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", b"evil \x1b[2J\x07 \xff line\r\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    for json in [true, false] {
        let mut command = waybill();
        command.args(["search", "evil", "--store"]).arg(bench.path("store.sqlite"));
        if json {
            command.arg("--json");
        }
        let found = run(command).ok().stdout;
        assert_eq!(found.lines().count(), 1, "{found:?}");
        assert!(!found.trim_end().chars().any(char::is_control), "{found:?}");
    }
}
