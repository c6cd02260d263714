//! `docs/protocol.md` is true: its messages and bytes are ours, its vectors are what we compute, and a sender written
//! from it alone is understood.

use std::fs;
use std::process::Command;

use bytes::Bytes;
use serde_json::Value;
use waybill::protocol::{
    CHALLENGE_HEADER, Chain, ChainKey, Challenge, Control, DataFrame, FRAME_BYTES_MAX,
    FRAMES_OUTSTANDING_MAX, MESSAGE_BYTES_MAX, SUBPROTOCOL,
};
use waybill::record::framing::{SpoolRecord, spool_record};
use waybill::record::{DocumentId, IdPrefix, IndexRule, SegmentId, SenderId};

use crate::support::servers::{root, skip};
use crate::support::waybill::Bench;

fn document() -> String {
    fs::read_to_string(root().join("docs/protocol.md")).expect("docs/protocol.md")
}

/// The contents of all code blocks with this information string.
fn blocks(text: &str, info: &str) -> Vec<String> {
    let opening = format!("\n```{info}\n");
    let found: Vec<String> = text
        .split(&opening)
        .skip(1)
        .map(|rest| rest.split("\n```").next().unwrap_or_default().to_owned())
        .collect();
    assert!(!found.is_empty(), "no block {info:?}");
    found
}

fn hexadecimal(text: &str) -> Vec<u8> {
    let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
    let pair = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
    digits.chunks(2).map(|digits| pair(digits).expect("hexadecimal")).collect()
}

#[test]
fn every_message_shown_is_one_of_ours_and_says_all_of_it() {
    let examples = blocks(&document(), "json");
    let mut types = Vec::new();
    for example in examples {
        let control =
            Control::decode(&example).unwrap_or_else(|error| panic!("{error}: {example}"));
        let shown: Value = serde_json::from_str(&example).expect("JSON");
        let written: Value = serde_json::from_str(&control.encode()).expect("JSON");
        assert_eq!(shown, written, "{example}");
        types.push(shown["type"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(types, ["hello", "welcome", "open", "refused", "receipt", "credit", "drain"]);
}

#[test]
fn the_frame_and_the_spool_record_shown_are_ours() {
    let text = document();
    let frame = hexadecimal(&blocks(&text, "text frame")[0]);
    let decoded = DataFrame::decode(Bytes::from(frame.clone())).expect("a frame");
    assert_eq!((decoded.handle, decoded.offset, decoded.read_at), (7, 100, 1_763_712_000_000));
    assert!(decoded.flags.resend && !decoded.flags.zstd && !decoded.flags.continues);
    assert_eq!(&decoded.records[..], b"a line\n");
    assert_eq!(decoded.encode(false), frame);

    let record = hexadecimal(&blocks(&text, "text spool")[0]);
    let whole = SpoolRecord::Whole {
        length: record.len(),
        time: 1_763_712_000_123,
        key: b"",
        payload: b"hello",
    };
    assert_eq!(spool_record(&record), whole);
}

#[test]
fn the_vectors_of_document_ids_are_what_we_compute() {
    let text = document();
    let mut checked = 0;
    for row in text.lines().filter(|line| line.starts_with("| `01")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [sender, segment, offset, payload, id] = cells[..] else { panic!("{row}") };
        let code = |cell: &str| cell.trim_matches('`').to_owned();
        let payload = match payload.split_once(" × ") {
            Some((times, byte)) => {
                let times = times.replace(',', "").parse().expect("a number");
                hexadecimal(&code(byte)).repeat(times)
            }
            None => hexadecimal(&code(payload)),
        };
        let sender = SenderId(code(sender).parse().expect("a UUID"));
        let segment = SegmentId(code(segment).parse().expect("a UUID"));
        let offset = offset.parse().expect("an offset");
        assert_eq!(
            IdPrefix::new(sender, segment).id(offset, &payload).to_string(),
            code(id),
            "{row}"
        );
        checked += 1;
    }
    assert!(checked >= 6, "only {checked} vectors found");
    let sender = SenderId("01890a5d-ac96-774b-bcce-b302099a8057".parse().expect("a UUID"));
    let keyed = DocumentId::keyed(sender, b"key", 1_763_714_120_123, b"line");
    let says = format!("key `key`, time 1763714120123 and payload `line` give `{keyed}`");
    assert!(text.contains(&says), "{says}");
}

#[test]
fn the_answer_to_the_challenge_shown_is_ours() {
    let text = document();
    let after = |words: &str| {
        let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("{words}"));
        rest.split('`').next().unwrap_or_default().to_owned()
    };
    let key = ChainKey::parse(&after("With the key `")).expect("a key");
    assert!(text.to_lowercase().contains(CHALLENGE_HEADER));
    let challenge = Challenge::parse(&after("`Waybill-Challenge: ")).expect("a challenge");
    let shown = &blocks(&text, "json chain")[0];
    let chain: Chain = serde_json::from_str(shown).expect("a chain");
    assert!(chain.is_answer(&key, &challenge), "{shown}");
    let last = chain.index.clone().zip(chain.id.clone());
    let ours = Chain::answer(&key, &challenge, last);
    assert_eq!(&serde_json::to_string(&ours).expect("JSON"), shown);
    let code = after("Without a document the\ncode is `");
    assert_eq!(Chain::answer(&key, &challenge, None).mac, code);
}

#[test]
fn the_limits_and_the_index_shown_are_ours() {
    let text = document();
    for number in [FRAME_BYTES_MAX, FRAMES_OUTSTANDING_MAX] {
        assert!(text.contains(&number.to_string()), "{number}");
    }
    let thousands = format!(
        "{},{:03},{:03}",
        MESSAGE_BYTES_MAX / 1_000_000,
        MESSAGE_BYTES_MAX / 1000 % 1000,
        MESSAGE_BYTES_MAX % 1000
    );
    assert!(text.contains(&thousands), "{thousands}");
    assert!(text.contains(SUBPROTOCOL));
    let name = IndexRule::default()
        .name(&"nginx".parse().expect("a type"), "2026-11-21".parse().expect("a day"));
    assert!(text.contains(&format!("`{name}`")), "{name}");
}

#[test]
fn a_sender_written_from_the_document_is_understood_and_repeats_itself_harmlessly() {
    if Command::new("python3").arg("--version").output().is_err() {
        skip("python3 is missing; install it: apt-get install python3");
        return;
    }
    let bench = Bench::new();
    // Before the receiver, which would notice it a second later.
    let token = fs::read_to_string(bench.token("stranger")).expect("a token");
    let receiver = bench.receiver();
    let file = bench.write("app.log", "one\ntwo\n\nfour\r\n");
    let send = || {
        let output = Command::new("python3")
            .arg(root().join("tests/fixtures/minimal_sender.py"))
            .args(["127.0.0.1", &receiver.port().to_string(), token.trim()])
            .arg(&file)
            .arg(bench.path("row.json"))
            .output()
            .expect("python3 runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{error}\n{}", receiver.log());
        said
    };
    let first = send();
    let lines = |verdict: &str, said: &str| -> u64 {
        said.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .flat_map(|receipt| receipt["runs"].as_array().cloned().unwrap_or_default())
            .filter(|run| run["verdict"] == verdict)
            .filter_map(|run| run["lines"].as_u64())
            .sum()
    };
    assert_eq!((lines("stored", &first), lines("skipped", &first)), (3, 1), "{first}");
    let again = send();
    assert_eq!((lines("already", &again), lines("skipped", &again)), (3, 1), "{again}");
    assert_eq!(bench.messages(), ["four", "one", "two"]);
}
