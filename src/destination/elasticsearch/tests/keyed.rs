//! Records with a key: named by it, in the index of their own day.

use super::*;
use crate::record::framing::encode_spool_record;
use crate::record::{DocumentId, IndexRule};

/// 2026-11-21T00:00:00Z, the row's day.
const TODAY: u64 = 1_795_219_200_000;
const TOMORROW: u64 = TODAY + 24 * 60 * 60 * 1000;
const LONG_AGO: u64 = 1_000_000_000_000;

fn spooled() -> Arc<Segment> {
    let rule = IndexRule::default();
    let segment = segment("waybill-default-2026.11.21", Framing::SPOOL);
    let mut segment = Arc::into_inner(segment).expect("the only one");
    segment.row.rule = Some(rule);
    Arc::new(segment)
}

fn records(records: &[(u64, &str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (time, key, payload) in records {
        encode_spool_record(&mut bytes, *time, key.as_bytes(), payload.as_bytes());
    }
    bytes
}

#[tokio::test]
async fn the_time_of_a_key_gives_the_index_and_days_out_of_bounds_make_none() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let segment = spooled();
    let sent = bench.send(
        &segment,
        records(&[
            (TODAY, "k1", "a"),
            (TOMORROW, "k2", "b"),
            (LONG_AGO, "k3", "c"),
            (TODAY, "k4", "d"),
            // Without a key the time is only when it came.
            (LONG_AGO, "", "e"),
        ]),
    );
    let unkeyed = sent.id(4);
    let id = |key: &str, time, payload: &str| {
        DocumentId::keyed(segment.sender, key.as_bytes(), time, payload.as_bytes()).to_string()
    };
    let verdicts = sent.verdicts().await;
    bench.end().await;
    assert!(is_parked(&verdicts[2], "2001-09-09, outside 2026-11-21 to 2026-11-22"));
    let stored = verdicts.iter().filter(|verdict| **verdict == Verdict::Stored).count();
    assert_eq!(stored, 4, "{verdicts:?}");
    let mut documents: Vec<_> = server.bulks().iter().flat_map(Request::documents).collect();
    documents.sort();
    let today = "waybill-default-2026.11.21".to_owned();
    let mut expected = vec![
        (today.clone(), id("k1", TODAY, "a")),
        ("waybill-default-2026.11.22".to_owned(), id("k2", TOMORROW, "b")),
        ("dead".to_owned(), id("k3", LONG_AGO, "c")),
        (today.clone(), id("k4", TODAY, "d")),
        (today, unkeyed),
    ];
    expected.sort();
    assert_eq!(documents, expected);
}

#[tokio::test]
async fn a_bad_index_of_one_day_holds_up_no_other_day_of_the_frame() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "waybill-default-2026.11.22" => error(index, 403, "cluster_block_exception"),
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let segment = spooled();
    let body = records(&[(TODAY, "k1", "a"), (TOMORROW, "k2", "b"), (TODAY, "k3", "c")]);
    for _ in 0..2 {
        // The second time the index is known to be in trouble.
        let verdicts = bench.send(&segment, body.clone()).verdicts().await;
        assert_eq!((&verdicts[0], &verdicts[2]), (&Verdict::Stored, &Verdict::Stored));
        assert!(is_deferred(&verdicts[1], "cluster_block"), "{verdicts:?}");
    }
    bench.end().await;
}
