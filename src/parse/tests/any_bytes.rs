//! What must hold whatever the bytes are.

use proptest::prelude::*;

use super::*;

/// Pieces of the forms that are parsed, joined at random: far more likely than random bytes to get
/// deep into a parser.
fn lines() -> impl Strategy<Value = Vec<u8>> {
    let tokens: Vec<&'static [u8]> = vec![
        b"<190>",
        b"<34>1 ",
        b"<",
        b"Nov 21 07:17:01",
        b"Feb 29 07:17:01 ",
        b"2026-11-21T07:17:01.5Z",
        b"2026/11/21 07:17:01 ",
        b"[error] 1#2: ",
        b" ",
        b"-",
        b"- - ",
        b"host ",
        b"app[12]: ",
        b"app:",
        b"[21/Nov/2026:07:17:01 +0000] ",
        b"\"GET /a?b HTTP/1.1\" ",
        b"200 12 ",
        b"10.0.0.1",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"a\":",
        b"\"a.b\":",
        b"\"\":",
        b"\"ip\":",
        b"\"date\":",
        b"\"path\":",
        b"\"request\":",
        b"\"status\":",
        b"\"message\":",
        b"\"json\":",
        b"\"_rest\":",
        b",",
        b"1",
        b"1e999",
        b"-0.5",
        b"null",
        b"\"\\ud800\"",
        b"\"10.0.0.1\"",
        b"\"\\u0000?\"",
        b"\"/x?y\"",
        b"\"GET /a HTTP/1\"",
        b"{\"a\":{\"a\":1,\"a\":2}}",
        b"[id a=\"b\" a=\"c\"]",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xc3\xa9",
        b"\r",
        b"\0",
    ];
    let token = proptest::sample::select(tokens).prop_map(<[u8]>::to_vec);
    let noise = proptest::collection::vec(any::<u8>(), 0..8);
    let loose = proptest::collection::vec(prop_oneof![12 => token, 1 => noise], 0..24);
    let value = proptest::sample::select(vec![
        "1",
        "1e999",
        "\"x\"",
        "\"\\ud800\"",
        "{\"a\":1,\"a\":2}",
        "{\"a.b\":{\"\":[{}]}}",
        "[1,[2]]",
        "null",
        "\"2026-11-21 07:17:01\"",
        "\"/a?b\\u0001\"",
        "\"GET / HTTP/2\"",
        "\"::1\"",
        "1795245421",
    ]);
    let key = proptest::sample::select(vec![
        "a",
        "b",
        "a.b",
        "a_b",
        "",
        "_rest",
        "ip",
        "status",
        "path",
        "uri",
        "args",
        "request",
        "date",
        "time",
        "message",
        "level",
        "request_time",
        "\\u0061",
        "\\ud800",
        "x\\n",
    ]);
    let members = proptest::collection::vec((key, value), 0..12).prop_map(|members| {
        let members: Vec<_> = members.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
        format!("{{{}}}", members.join(",")).into_bytes()
    });
    let front =
        proptest::sample::select(vec!["", "<190>Nov 21 07:17:01 nginx: ", "<1>1 - h a 1 - - "]);
    let json = (front, members).prop_map(|(front, json)| [front.as_bytes(), &json].concat());
    let good = proptest::sample::select(vec![
        NGINX,
        "<190>Nov 21 07:17:01 h nginx[1]: {\"a\":1}",
        "<34>1 2003-10-11T22:14:15.003Z h su 1 ID47 [a b=\"c\"] x",
        "Nov 21 07:17:01 h app[1]: x",
        "198.51.100.9 - b [21/Nov/2026:08:17:01 +0100] \"GET /x?y=1 HTTP/1.1\" 404 153 \"-\" \"c\"",
        "2026/11/21 07:17:01 [error] 123#7: *5 open()",
    ]);
    let changes = proptest::collection::vec((any::<usize>(), "\\PC|[\"\\\\<>{}:]"), 0..4);
    let changed = (good, changes).prop_map(|(good, changes)| {
        let mut line = good.as_bytes().to_vec();
        for (at, text) in changes {
            let at = at % line.len();
            line.splice(at..=at, text.bytes());
        }
        line
    });
    prop_oneof![loose.prop_map(|pieces| pieces.concat()), json, changed]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// I8: whatever the bytes, there is a document, and it is one that a destination can read.
    #[test]
    fn any_bytes_make_a_valid_document(line in lines(), continues: bool, cut: bool) {
        for format in [Format::Auto, Format::Json, Format::Syslog, Format::Raw] {
            for form in [Form::Full, Form::Reduced] {
                let record = Record { continues, cut, ..record(&line) };
                let made = document_of(&segment(row(format)), &record, form);
                prop_assert_eq!(&made["waybill"]["segment"], SEGMENT);
                prop_assert_eq!(&made["log"]["offset"], 4096);
                prop_assert!(made["message"].is_string());
            }
        }
    }
}
