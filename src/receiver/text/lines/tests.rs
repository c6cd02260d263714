//! [`Lines`] with a destination in the test.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::protocol::Run;
use crate::record::{IndexRule, SenderId};

/// 2026-11-21T08:00:00Z.
const NOW: u64 = 1_795_248_000_000;
const DAY: u64 = 86_400_000;
const CREDIT: u64 = 4 << 20;

fn sender() -> Sender {
    let id = SenderId("01890a5d-ac96-774b-bcce-b302099a8057".parse().expect("a UUID"));
    Sender { id, name: "web-1".to_owned(), types: vec!["nginx".parse().expect("a type")] }
}

fn lines() -> Lines {
    let terms = Terms {
        rule: IndexRule::default(),
        former_rules: Vec::new(),
        days: (-400, 2),
        credit: CREDIT,
        destination: None,
    };
    let origin = Origin::read(None, &sender()).expect("the only type");
    Lines::new(sender(), origin, Arc::new(terms), Day::of_millis(NOW))
}

fn keyed(line: &str, key: &str, time: u64) -> String {
    json!({"line": line, "key": key, "time": time}).to_string()
}

/// One verdict for a whole batch.
fn settle(lines: &mut Lines, batch: &Batch, verdict: Verdict) {
    let to = batch.offset + batch.records.len() as u64;
    let runs = vec![Run { to, lines: 0, verdict }];
    lines.settle(&Receipt { handle: batch.handle, from: batch.offset, to, runs });
}

fn batches(lines: &mut Lines) -> Vec<Batch> {
    std::iter::from_fn(|| lines.batch(true)).collect()
}

fn answers(lines: &mut Lines) -> Vec<Value> {
    let text = std::iter::from_fn(|| lines.answer());
    text.map(|text| serde_json::from_str(&text).expect("JSON")).collect()
}

fn verdicts(lines: &mut Lines) -> Vec<String> {
    let verdict = |answer: &Value| answer["verdict"].as_str().expect("a verdict").to_owned();
    answers(lines).iter().map(verdict).collect()
}

#[test]
fn answers_come_in_the_order_of_their_messages() {
    let mut lines = lines();
    lines.take("one", NOW);
    let one = batches(&mut lines).remove(0);
    lines.take("", NOW);
    lines.take(r#"{"line":"a","key":"k"}"#, NOW);
    lines.take("two", NOW);
    let two = batches(&mut lines).remove(0);
    lines.take("three", NOW);
    settle(&mut lines, &two, Verdict::Stored);
    assert!(answers(&mut lines).is_empty(), "the first has no verdict");
    settle(&mut lines, &one, Verdict::Parked { reason: "mapping".to_owned() });
    let answers = answers(&mut lines);
    let id =
        |batch: &Batch, payload: &[u8]| batch.segment.ids.id(batch.offset, payload).to_string();
    let index = "waybill-nginx-2026.11.21";
    assert_eq!(
        answers,
        [
            json!({"id": id(&one, b"one"), "index": index, "verdict": "parked", "reason": "mapping"}),
            json!({"verdict": "skipped"}),
            json!({"verdict": "refused",
                "reason": "a key needs a time: the day of the index is that of the time"}),
            json!({"id": id(&two, b"two"), "index": index, "verdict": "stored"}),
        ]
    );
    assert!(!lines.is_idle(), "the third is on its way");
}

#[test]
fn what_is_deferred_names_no_document() {
    let mut lines = lines();
    lines.take("one", NOW);
    let batch = batches(&mut lines).remove(0);
    let after = Duration::from_millis(1500);
    settle(
        &mut lines,
        &batch,
        Verdict::Deferred { reason: "closed".to_owned(), after, index: None },
    );
    let expected = json!({"verdict": "deferred", "reason": "closed", "after_ms": 1500});
    assert_eq!(answers(&mut lines), [expected]);
    assert!(lines.is_idle());
}

#[test]
fn the_row_is_one_that_a_sender_could_have_made() {
    let mut lines = lines();
    lines.take("one", NOW);
    let batch = batches(&mut lines).remove(0);
    let row = &batch.segment.row;
    assert_eq!((row.host.as_str(), row.type_name.as_str()), ("web-1", "nginx"));
    assert_eq!((row.framing, row.day), (Framing::SPOOL, Day::of_millis(NOW)));
    assert_eq!((row.sender, &row.rule), (Some(sender().id), &Some(IndexRule::default())));
    let record = row.framing.records(&batch.records, batch.offset, false).next().expect("one");
    assert_eq!((record.payload, record.time, record.key), (&b"one"[..], Some(NOW), &b""[..]));
    assert_ne!(self::lines().current.segment.row.segment, row.segment, "each has its own");
}

#[test]
fn a_key_and_its_time_give_id_and_index_whatever_the_connection() {
    let yesterday = NOW - DAY;
    let answer = |before: &str| {
        let mut lines = lines();
        lines.take(before, NOW);
        lines.take(&keyed("line", "key", yesterday), NOW);
        let batch = batches(&mut lines).remove(0);
        let records = batch.segment.row.framing.records(&batch.records, batch.offset, false);
        let last = records.last().expect("a record");
        let id = batch.segment.ids.of(&last).to_string();
        settle(&mut lines, &batch, Verdict::Stored);
        assert_eq!(answers(&mut lines).pop().expect("an answer")["id"], id, "as stored");
        (id, batch.segment.index_on(Day::of_millis(yesterday)).into_owned())
    };
    let (id, index) = answer("one");
    assert_eq!(index, "waybill-nginx-2026.11.20");
    assert_eq!((id, index), answer("another"));
}

#[test]
fn a_time_outside_the_days_is_refused_and_its_neighbours_go_on() {
    let mut lines = lines();
    lines.take("one", NOW);
    lines.take(&keyed("old", "k", NOW - 401 * DAY), NOW);
    lines.take(&keyed("new", "k", NOW + 3 * DAY), NOW);
    lines.take(r#"{"line":"without a key","time":5}"#, NOW);
    for batch in batches(&mut lines) {
        settle(&mut lines, &batch, Verdict::Stored);
    }
    let answers = answers(&mut lines);
    let verdicts: Vec<&Value> = answers.iter().map(|answer| &answer["verdict"]).collect();
    assert_eq!(verdicts, ["stored", "refused", "refused", "stored"]);
    assert!(answers[1]["reason"].as_str().is_some_and(|why| why.contains("2025-10-16")));
}

#[test]
fn a_day_and_a_segment_that_is_full_open_the_next_one() {
    let mut lines = lines();
    lines.take("one", NOW);
    lines.take("two", NOW + DAY);
    let [first, second] = &batches(&mut lines)[..] else { panic!("two batches") };
    assert_eq!((first.handle, second.handle, second.offset), (0, 1, 0));
    assert_eq!(second.segment.row.day, Day::of_millis(NOW + DAY));
    assert_ne!(first.segment.row.segment, second.segment.row.segment);
    settle(&mut lines, second, Verdict::Stored);
    settle(&mut lines, first, Verdict::Stored);
    assert_eq!(verdicts(&mut lines).len(), 2);

    // The last record that ends before 2^40, and the next.
    let record = (SPOOL_HEADER_BYTES + 3) as u64;
    lines.current.end = OFFSET_MAX - record;
    lines.take("end", NOW + DAY);
    lines.take("new", NOW + DAY);
    let [first, second] = &batches(&mut lines)[..] else { panic!("two batches") };
    assert_eq!((first.handle, first.offset), (1, OFFSET_MAX - record));
    assert_eq!((second.handle, second.offset), (2, 0));
}

#[test]
fn lines_and_bytes_without_an_answer_are_bounded() {
    let mut few = lines();
    let long = "x".repeat(1 << 20);
    while few.has_room() {
        few.take(&long, NOW);
        assert!(few.bytes <= CREDIT, "{}", few.bytes);
    }
    for batch in batches(&mut few) {
        settle(&mut few, &batch, Verdict::Stored);
    }
    assert!(few.has_room(), "the bytes are in the destination");

    let mut many = lines();
    while many.has_room() {
        many.take("", NOW);
    }
    assert_eq!(many.waiting.len(), LINES_MAX);
    assert!(many.answer().is_some());
    assert!(many.has_room());
}

#[test]
fn one_largest_line_fits_into_the_smallest_credit() {
    let mut lines = lines();
    let terms = Terms { credit: FRAME_BYTES_MAX as u64, ..(*lines.terms).clone() };
    lines.terms = Arc::new(terms);
    assert!(lines.has_room());
    let longest = "x".repeat(crate::record::RECORD_BYTES_MAX);
    let key = "k".repeat(crate::record::framing::KEY_BYTES_MAX);
    lines.take(&keyed(&longest, &key, NOW), NOW);
    let batch = batches(&mut lines).remove(0);
    assert!(batch.records.len() <= FRAME_BYTES_MAX);
    assert!(!lines.has_room());
}

proptest! {
    /// Whatever the sizes and the order of receipts: whole batches, every message answered once,
    /// in order, with the id that the destination computes.
    #[test]
    fn every_message_has_one_answer(
        sizes in proptest::collection::vec(prop_oneof![0_usize..50, 0_usize..300_000], 1..60),
        take_at in 1_usize..10,
        order in any::<u64>(),
    ) {
        let mut lines = lines();
        let mut sent = Vec::new();
        let mut taken = Vec::new();
        for (number, size) in sizes.iter().enumerate() {
            let text = format!("{number}{}", "x".repeat(*size));
            lines.take(&text, NOW);
            taken.extend(lines.batch(false));
            if number % take_at == 0 {
                taken.extend(batches(&mut lines));
            }
            sent.push(text);
        }
        taken.extend(batches(&mut lines));
        let mut ids = Vec::new();
        let mut receipts = Vec::new();
        for batch in &taken {
            prop_assert!(batch.records.len() <= FRAME_BYTES_MAX);
            let records = batch.segment.row.framing.records(&batch.records, batch.offset, false);
            for record in records {
                prop_assert_eq!(record.kind, crate::record::RecordKind::Line);
                prop_assert_eq!(record.payload, sent[ids.len()].as_bytes());
                ids.push(batch.segment.ids.of(&record).to_string());
                let to = record.offset + record.length as u64;
                let runs = vec![Run { to, lines: 1, verdict: Verdict::Stored }];
                receipts.push(Receipt { handle: batch.handle, from: record.offset, to, runs });
            }
        }
        prop_assert_eq!(ids.len(), sent.len());
        receipts.sort_by_key(|receipt| receipt.from.wrapping_mul(order | 1));
        let mut answered = Vec::new();
        for receipt in &receipts {
            lines.settle(receipt);
            answered.extend(answers(&mut lines).iter().map(|a| a["id"].as_str().unwrap_or_default().to_owned()));
        }
        prop_assert_eq!(answered, ids);
        prop_assert!(lines.is_idle() && lines.bytes == 0);
    }
}
