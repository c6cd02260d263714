//! Whole documents for whole lines.

mod any_bytes;

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};

use super::*;
use crate::record::{Format, Framing, Record, RecordKind, Row, SegmentId, SenderId};

const SENDER: &str = "01890a5d-ac96-774b-bcce-b302099a8057";
const SEGMENT: &str = "0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506";
/// 2026-11-21T07:17:02.500Z and a second later.
const READ_AT: u64 = 1_795_245_422_500;

fn row(format: Format) -> Row {
    Row {
        segment: SegmentId(SEGMENT.parse().expect("a UUID")),
        source: "nginx".to_owned(),
        path: "/var/log/x.log".to_owned(),
        host: "web1".to_owned(),
        device: 1,
        inode: 2,
        start: 0,
        end: None,
        cuts: Vec::new(),
        day: "2026-11-21".parse().expect("a day"),
        type_name: "nginx".parse().expect("a type"),
        tags: vec!["edge".to_owned()],
        labels: [("env".to_owned(), "prod".to_owned())].into(),
        framing: Framing::LINES,
        format,
        timezone: "UTC".to_owned(),
        sender: None,
        rule: None,
        first_bytes: Default::default(),
    }
}

fn segment(row: Row) -> Segment {
    let sender = SenderId(SENDER.parse().expect("a UUID"));
    Segment::new(row, sender, "alice".to_owned(), "waybill-nginx-2026.11.21".to_owned())
}

fn record(payload: &[u8]) -> Record<'_> {
    Record {
        offset: 4096,
        length: payload.len() + 1,
        payload,
        kind: RecordKind::Line,
        continues: false,
        cut: false,
        time: None,
        key: b"",
    }
}

fn bytes_of(segment: &Segment, record: &Record<'_>, form: Form) -> Vec<u8> {
    let mut out = b"before".to_vec();
    segment.write_document(record, &FrameTimes::new(READ_AT, READ_AT + 1000), form, &mut out);
    assert!(out.starts_with(b"before{") && !out.contains(&b'\n'));
    out.split_off(6)
}

/// The document; its keys are checked for duplicates at every level.
fn document_of(segment: &Segment, record: &Record<'_>, form: Form) -> Value {
    let bytes = bytes_of(segment, record, form);
    let text = String::from_utf8(bytes).expect("UTF-8");
    serde_json::from_str::<Unique>(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn document(line: impl AsRef<[u8]>) -> Value {
    document_of(&segment(row(Format::Auto)), &record(line.as_ref()), Form::Full)
}

/// What every document of [`segment`] has, with `more` merged into it.
fn with_envelope(more: Value) -> Value {
    let mut all = json!({
        "@timestamp": "2026-11-21T07:17:02.500Z",
        "event": { "ingested": "2026-11-21T07:17:03.500Z" },
        "host": { "name": "web1" },
        "log": { "file": { "path": "/var/log/x.log" }, "offset": 4096 },
        "labels": { "env": "prod" },
        "tags": ["edge"],
        "ecs": { "version": "8.17.0" },
        "waybill": { "sender": SENDER, "sender_name": "alice", "segment": SEGMENT, "type": "nginx" },
    });
    merge(&mut all, more);
    all
}

fn merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                merge(to.entry(key).or_insert(Value::Null), value);
            }
        }
        (to, from) => *to = from,
    }
}

/// Any JSON, refused where an object has a key twice.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(Unique)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate keys")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Unique, A::Error> {
        while seq.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        let mut keys = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Unique>()?;
            if key.is_empty() || !keys.insert(key.clone()) {
                return Err(serde::de::Error::custom(format!("key {key:?} is empty or twice")));
            }
        }
        Ok(Unique)
    }
}

const NGINX: &str = r#"{"ip":"203.0.113.7","host":"example.com","path":"/a/b?q=1&r=%20","status":"200","referrer":"https://example.org/","user_agent":"Mozilla/5.0 (X11; \"quoted\")","length":1234,"generation_time_milli":12.5,"date":"2026-11-21T08:17:01+01:00"}"#;

fn nginx_fields() -> Value {
    json!({
        "@timestamp": "2026-11-21T07:17:01.000Z",
        "message": NGINX,
        "event": { "duration": 12_500_000 },
        "source": { "ip": "203.0.113.7" },
        "url": { "domain": "example.com", "path": "/a/b", "query": "q=1&r=%20" },
        "http": {
            "request": { "referrer": "https://example.org/" },
            "response": { "status_code": 200, "body": { "bytes": 1234 } },
        },
        "user_agent": { "original": "Mozilla/5.0 (X11; \"quoted\")" },
    })
}

fn with(mut left: Value, right: Value) -> Value {
    merge(&mut left, right);
    left
}

#[test]
fn a_raw_line_is_its_message() {
    let expected = with_envelope(json!({ "message": "hello \"world\" \\ \u{1}\u{7f}é" }));
    assert_eq!(document("hello \"world\" \\ \u{1}\u{7f}é"), expected);
    assert_eq!(document("hello \"world\" \\ \u{1}\u{7f}é\r"), expected, "CRLF");
}

#[test]
fn the_nginx_json_of_the_readme_becomes_typed_fields() {
    assert_eq!(document(NGINX), with_envelope(nginx_fields()));
}

#[test]
fn nginx_json_over_syslog_is_the_same_with_a_header() {
    let syslog = json!({
        "priority": 190,
        "facility": { "code": 23, "name": "local7" },
        "severity": { "code": 6, "name": "informational" },
        "appname": "nginx",
    });
    let line = format!("<190>Nov 21 07:17:01 front nginx: {NGINX}");
    let header = json!({
        "event": { "original": line },
        "host": { "name": "front" },
        "process": { "name": "nginx" },
        "log": { "syslog": with(syslog.clone(), json!({ "hostname": "front" })) },
    });
    assert_eq!(document(&line), with_envelope(with(nginx_fields(), header)));

    // `nohostname`: the host is the sender's.
    let line = format!("<190>Nov 21 07:17:01 nginx: {NGINX}");
    let header = json!({
        "event": { "original": line },
        "process": { "name": "nginx" },
        "log": { "syslog": syslog },
    });
    assert_eq!(document(&line), with_envelope(with(nginx_fields(), header)));
}

#[test]
fn the_examples_of_rfc_5424() {
    let line = "<34>1 2003-10-11T22:14:15.003Z mymachine.example.com su - ID47 - \u{feff}'su root' failed for lonvick on /dev/pts/8";
    assert_eq!(
        document(line),
        with_envelope(json!({
            "@timestamp": "2003-10-11T22:14:15.003Z",
            "message": "'su root' failed for lonvick on /dev/pts/8",
            "event": { "original": line },
            "host": { "name": "mymachine.example.com" },
            "process": { "name": "su" },
            "log": { "syslog": {
                "priority": 34,
                "facility": { "code": 4, "name": "auth" },
                "severity": { "code": 2, "name": "critical" },
                "version": "1",
                "hostname": "mymachine.example.com",
                "appname": "su",
                "msgid": "ID47",
            } },
        }))
    );

    let line = r#"<165>1 2003-08-24T05:14:15.000003-07:00 192.0.2.1 myproc 8710 - - %% It's time to make the do-nuts."#;
    let made = document(line);
    assert_eq!(made["@timestamp"], "2003-08-24T12:14:15.000Z");
    assert_eq!(made["process"], json!({ "name": "myproc", "pid": 8710 }));
    assert_eq!(made["log"]["syslog"]["procid"], "8710");

    let line = r#"<165>1 2003-10-11T22:14:15.003Z mymachine.example.com evntslog - ID47 [exampleSDID@32473 iut="3" eventSource="Application" eventID="1011"][examplePriority@32473 class="high"]"#;
    let made = document(line);
    assert_eq!(made["message"], "");
    assert_eq!(
        made["log"]["syslog"]["structured_data"],
        json!({
            "exampleSDID@32473": { "iut": "3", "eventSource": "Application", "eventID": "1011" },
            "examplePriority@32473": { "class": "high" },
        })
    );

    let made = document("<165>1 - - - - - -");
    assert_eq!(made["@timestamp"], "2026-11-21T07:17:02.500Z");
    assert_eq!(made["host"]["name"], "web1");
    assert_eq!(document("<165>1 yesterday h a p m - x")["message"], "<165>1 yesterday h a p m - x");
}

#[test]
fn syslog_files_without_a_priority() {
    for line in [
        "Nov 21 07:17:01 db1 sshd[4242]: Accepted publickey",
        "2026-11-21T07:17:01+00:00 db1 sshd[4242]: Accepted publickey",
    ] {
        assert_eq!(
            document(line),
            with_envelope(json!({
                "@timestamp": "2026-11-21T07:17:01.000Z",
                "message": "Accepted publickey",
                "event": { "original": line },
                "host": { "name": "db1" },
                "process": { "name": "sshd", "pid": 4242 },
                "log": { "syslog": { "hostname": "db1", "appname": "sshd", "procid": "4242" } },
            }))
        );
    }
    let line = "2026-11-21 07:17:01,250 WARNING root: disk";
    let expected = json!({ "@timestamp": "2026-11-21T07:17:01.250Z", "message": line });
    assert_eq!(document(line), with_envelope(expected));
}

#[test]
fn december_lines_in_a_january_file_are_of_the_year_before() {
    let january = Row { day: "2026-01-01".parse().expect("a day"), ..row(Format::Auto) };
    let line = b"Dec 31 23:59:59 db1 app: x";
    let made = document_of(&segment(january), &record(line), Form::Full);
    assert_eq!(made["@timestamp"], "2025-12-31T23:59:59.000Z");
}

#[test]
fn times_without_a_zone_are_in_that_of_the_row() {
    let line = b"Nov 21 07:17:01 db1 app: x";
    let fixed = Row { timezone: "Etc/GMT-3".to_owned(), ..row(Format::Auto) };
    let made = document_of(&segment(fixed), &record(line), Form::Full);
    if made["tags"] == json!(["edge"]) {
        assert_eq!(made["@timestamp"], "2026-11-21T04:17:01.000Z");
    }
    let unknown = Row { timezone: "Nowhere/Nothing".to_owned(), ..row(Format::Auto) };
    let made = document_of(&segment(unknown), &record(line), Form::Full);
    assert_eq!(made["@timestamp"], "2026-11-21T07:17:01.000Z");
    assert_eq!(made["tags"], json!(["edge", "waybill_timezone_unknown"]));
}

#[test]
fn access_logs_become_typed_fields() {
    let line = r#"198.51.100.9 - bob [21/Nov/2026:08:17:01 +0100] "GET /x?y=1 HTTP/1.1" 404 153 "-" "curl/8 \"a\"" "-""#;
    assert_eq!(
        document(line),
        with_envelope(json!({
            "@timestamp": "2026-11-21T07:17:01.000Z",
            "message": line,
            "source": { "ip": "198.51.100.9" },
            "user": { "name": "bob" },
            "url": { "original": "/x?y=1", "path": "/x", "query": "y=1" },
            "http": {
                "version": "1.1",
                "request": { "method": "GET" },
                "response": { "status_code": 404, "body": { "bytes": 153 } },
            },
            "user_agent": { "original": r#"curl/8 \"a\""# },
        }))
    );
    let made = document(r#"proxy.local - - [21/Nov/2026:08:17:01 +0100] "\x16\x03" 400 -"#);
    assert_eq!(made["source"], json!({ "address": "proxy.local" }));
    assert_eq!(made["http"], json!({ "response": { "status_code": 400 } }));
    for raw in
        ["a - - [21/Nov/2026:08:17:01 +0100] x", "a - - [99/Nov/2026:08:17:01 +0100] \"x\" 1 1"]
    {
        assert_eq!(document(raw), with_envelope(json!({ "message": raw })));
    }
}

#[test]
fn nginx_error_logs_have_a_level() {
    let line = "2026/11/21 07:17:01 [error] 123#7: *5 open() failed, client: 10.0.0.1";
    assert_eq!(
        document(line),
        with_envelope(json!({
            "@timestamp": "2026-11-21T07:17:01.000Z",
            "message": "*5 open() failed, client: 10.0.0.1",
            "event": { "original": line },
            "log": { "level": "error" },
            "process": { "pid": 123 },
        }))
    );
    // As nginx sends them to a socket.
    let sent = format!("<187>Nov 21 07:17:01 nginx: {line}");
    let made = document(&sent);
    assert_eq!(made["@timestamp"], "2026-11-21T07:17:01.000Z");
    assert_eq!(made["message"], "*5 open() failed, client: 10.0.0.1");
    assert_eq!(made["event"]["original"], sent.as_str());
    assert_eq!(made["log"]["level"], "error");
    assert_eq!(made["process"], json!({ "name": "nginx", "pid": 123 }));
    // syslog-ng tells the zone, which counts.
    let made = document(format!("<187>1 2026-11-21T08:17:01+01:00 web1 nginx - - - {line}"));
    assert_eq!(made["@timestamp"], "2026-11-21T07:17:01.000Z");
    assert_eq!(made["log"]["level"], "error");
}

#[test]
fn what_does_not_fit_its_field_stays_under_json() {
    let line = r#"{"ip":"-","status":"abc","path":"","length":-1,"date":"soon","referrer":"-","generation_time_milli":"x","host":{"a":1},"message":7,"bytes_sent":9223372036854775808}"#;
    assert_eq!(
        document(line),
        with_envelope(json!({
            "message": line,
            "json": serde_json::from_str::<Value>(line).expect("JSON"),
        }))
    );
}

#[test]
fn no_key_of_a_line_reaches_what_is_ours() {
    let line = r#"{"@timestamp":"not a date","waybill":{"sender":"x"},"log":{"offset":1},"host":{"name":"x"},"_id":"x","tags":["x"],"labels":{"env":"x"},"event":{"ingested":"x"},"ecs":1,"message":"hello","json":{"a":1}}"#;
    let mut json: Value = serde_json::from_str(line).expect("JSON");
    json.as_object_mut().expect("an object").remove("message");
    assert_eq!(
        document(line),
        with_envelope(json!({ "message": "hello", "event": { "original": line }, "json": json }))
    );
}

#[test]
fn a_known_key_that_comes_twice_is_kept_once_and_nothing_is_lost() {
    let made = document(r#"{"ip":"10.0.0.1","ip":"10.0.0.2","ip":"10.0.0.3","remote_addr":"::1"}"#);
    assert_eq!(made["source"], json!({ "ip": "10.0.0.1" }));
    assert_eq!(
        made["json"],
        json!({ "ip": "10.0.0.2", "remote_addr": "::1", "_rest": r#"{"ip":"10.0.0.3"}"# })
    );
}

#[test]
fn huge_nested_json_is_bounded() {
    let wide: String = (0..5000).map(|n| format!(r#""k{n}":{{"a":{n}}},"#)).collect();
    let deep = format!("{}1{}", r#"{"d":"#.repeat(90), "}".repeat(90));
    let line = format!(r#"{{"deep":{deep},{wide}"end":[{}1]}}"#, "1,".repeat(2000));
    let made = document(&line);
    let json = made["json"].as_object().expect("an object");
    assert!(json.len() <= 101, "{}", json.len());
    assert!(json["deep"]["d"]["d"]["d"]["d"].is_string(), "{:?}", json["deep"]);
    let rest: Value = serde_json::from_str(json["_rest"].as_str().expect("text")).expect("JSON");
    assert_eq!(rest["k4999"], json!({ "a": 4999 }));
    let end = document(format!(r#"{{"end":[{}1]}}"#, "1,".repeat(2000)));
    assert!(end["json"]["end"].is_string());
}

#[test]
fn invalid_utf8_is_kept_losslessly() {
    assert_eq!(
        document(b"caf\xe9 \xff\r"),
        with_envelope(json!({
            "message": "caf\u{fffd} \u{fffd}",
            "tags": ["edge", "invalid_utf8"],
            "waybill": { "bytes": "Y2Fm6SD/DQ==" },
        }))
    );
    let made = document(b"<13>Nov 21 07:17:01 db1 app: caf\xe9");
    assert_eq!(made["message"], "caf\u{fffd}");
    assert_eq!(made["host"]["name"], "db1");
}

#[test]
fn parts_of_a_cut_line_say_so() {
    let auto = segment(row(Format::Auto));
    let part = |line, continues, cut| {
        let record = Record { continues, cut, ..record(line) };
        document_of(&auto, &record, Form::Full)
    };
    let raw = |message: &str, flags: Value| {
        with_envelope(json!({ "message": message, "log": { "flags": flags } }))
    };
    assert_eq!(part(b"{\"a\":1", false, true), raw("{\"a\":1", json!(["cut"])));
    assert_eq!(
        part(b"{\"a\":1}", true, false),
        raw("{\"a\":1}", json!(["continues"])),
        "no header"
    );
    assert_eq!(part(b"x", true, true), raw("x", json!(["continues", "cut"])));
    // The last line of a file without a newline may be whole.
    assert_eq!(part(b"{\"a\":1}", false, true)["json"], json!({ "a": 1 }));
}

#[test]
fn the_reduced_form_has_nothing_that_the_line_chose() {
    let made = document_of(&segment(row(Format::Auto)), &record(NGINX.as_bytes()), Form::Reduced);
    let expected = json!({ "message": NGINX, "tags": ["edge", "waybill_reduced"] });
    assert_eq!(made, with_envelope(expected));
}

#[test]
fn a_spooled_line_without_a_time_has_that_of_its_arrival() {
    let auto = segment(row(Format::Auto));
    let spooled = Record { time: Some(READ_AT - 500), ..record(b"x") };
    assert_eq!(document_of(&auto, &spooled, Form::Full)["@timestamp"], "2026-11-21T07:17:02.000Z");
    let own = Record { time: Some(READ_AT), ..record(NGINX.as_bytes()) };
    assert_eq!(document_of(&auto, &own, Form::Full)["@timestamp"], "2026-11-21T07:17:01.000Z");
    let absurd = Record { time: Some(u64::MAX), ..record(b"x") };
    assert_eq!(document_of(&auto, &absurd, Form::Full)["@timestamp"], "9999-12-31T23:59:59.999Z");
}

#[test]
fn a_format_that_is_named_is_the_only_one() {
    let made = |format, line: &str| {
        document_of(&segment(row(format)), &record(line.as_bytes()), Form::Full)
    };
    let syslog = "<13>Nov 21 07:17:01 db1 app: x";
    let access = r#"10.0.0.1 - - [21/Nov/2026:08:17:01 +0100] "GET / HTTP/1.1" 200 1"#;
    for (format, line) in [
        (Format::Raw, NGINX),
        (Format::Raw, syslog),
        (Format::Raw, access),
        (Format::Json, syslog),
        (Format::Json, "{\"a\""),
        (Format::Syslog, NGINX),
        (Format::Syslog, access),
    ] {
        let raw = with_envelope(json!({ "message": line }));
        assert_eq!(made(format, line), raw, "{format:?} {line}");
    }
    assert_eq!(made(Format::Json, NGINX), document(NGINX));
    assert_eq!(made(Format::Syslog, syslog), document(syslog));
    assert_eq!(made(Format::Syslog, "Nov 21 07:17:01 db1 no tag")["host"]["name"], "db1");
}

#[test]
fn what_a_row_says_cannot_break_a_document() {
    let odd = Row {
        path: String::new(),
        host: String::new(),
        tags: vec!["a\"\n".to_owned()],
        labels: [("a.b", "1"), ("a_b", "2"), ("", "3"), ("a", "4")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..row(Format::Auto)
    };
    let made = document_of(&segment(odd), &record(b"x"), Form::Full);
    assert_eq!(made["labels"], json!({ "_": "3", "a": "4", "a_b": "1" }));
    assert_eq!(made["tags"], json!(["a\"\n"]));
    assert_eq!(made["log"], json!({ "offset": 4096 }));
    assert_eq!(made.get("host"), None);
    let bare = Row { tags: Vec::new(), labels: Default::default(), ..row(Format::Auto) };
    let made = document_of(&segment(bare), &record(b"x"), Form::Full);
    assert_eq!((made.get("tags"), made.get("labels")), (None, None));
}
