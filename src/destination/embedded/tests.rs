//! What the store promises: nothing receipted that is not committed, nothing stored twice.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::sync::Semaphore;

use crate::destination::{Inbox, Reply};
use crate::parse::Segment;
use crate::protocol::{DayBounds, Receipt, Run};
use crate::record::framing::encode_spool_record;
use crate::record::{
    DocumentId, Format, Framing, IndexRule, Prefix, Row, SegmentId, SenderId, TypeName,
};

use super::retention::used_bytes;
use super::writer::Line;
use super::*;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Makes a store at `path` that holds these lines and documents in index `test`.
pub(crate) fn store_documents(path: &Path, lines: impl IntoIterator<Item = (Vec<u8>, String)>) {
    let mut store = open(path);
    let segment = segment(Framing::LINES);
    let mut batch = store.writer.begin().expect("a transaction");
    let mut open = batch.open(&segment, segment.row.day).expect("a segment");
    for (offset, (payload, document)) in (0..).zip(lines) {
        let id = segment.ids.id(offset, &payload);
        let document = document.as_bytes();
        let line = Line { id, offset, payload: &payload, document, read_at: 0, arrived: 0 };
        let verdict = batch.line(&mut open, &line).expect("an insert");
        assert_eq!(verdict, Ok(Verdict::Stored));
    }
    batch.close(&open).expect("an update");
    batch.commit().expect("a commit");
}

fn config(path: &Path) -> EmbeddedConfig {
    EmbeddedConfig { file: path.to_owned(), keep_days: None, keep_bytes: None }
}

fn open(path: &Path) -> Store {
    Store::open(&config(path)).expect("a store")
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn segment(framing: Framing) -> Segment {
    let row = Row {
        segment: SegmentId::mint(),
        source: "app".to_owned(),
        path: "/var/log/app.log".to_owned(),
        host: "web1".to_owned(),
        device: 0,
        inode: 0,
        start: 0,
        end: None,
        cuts: Vec::new(),
        day: "2026-11-21".parse().expect("a day"),
        type_name: TypeName::default(),
        tags: Vec::new(),
        labels: Default::default(),
        framing,
        format: Format::Raw,
        timezone: "UTC".to_owned(),
        sender: None,
        rule: None,
        first_bytes: Prefix::default(),
    };
    Segment::new(row, SenderId::mint(), "web1".to_owned(), "test".to_owned())
}

/// One segment, and the inbox for its receipts.
pub(in crate::destination) struct Peer {
    pub(in crate::destination) segment: Arc<Segment>,
    inbox: Arc<Inbox>,
}

impl Peer {
    pub(in crate::destination) fn new(framing: Framing) -> Peer {
        Peer { segment: Arc::new(segment(framing)), inbox: Arc::default() }
    }

    /// Makes it a segment of another one's sender.
    pub(in crate::destination) fn of_sender(&mut self, other: &Peer) {
        let (row, sender) = (self.segment.row.clone(), other.segment.sender);
        self.segment = Arc::new(Segment::new(row, sender, "web1".to_owned(), "test".to_owned()));
    }

    pub(in crate::destination) fn frame(&self, offset: u64, records: impl Into<Bytes>) -> Frame {
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("a permit");
        Frame {
            segment: Arc::clone(&self.segment),
            offset,
            read_at: now_ms(),
            continues: false,
            days: DayBounds { from: self.segment.row.day, to: self.segment.row.day.plus(2) },
            records: records.into(),
            reply: Reply::new(Arc::clone(&self.inbox), 1),
            memory: permit,
        }
    }

    /// Writes one frame alone and takes its receipt.
    fn write(&self, store: &mut Store, offset: u64, records: impl Into<Bytes>) -> Receipt {
        store.write(self.frame(offset, records), &Queue::default());
        let mut receipts = self.inbox.try_take();
        assert_eq!(receipts.len(), 1, "one receipt per frame");
        receipts.pop_front().expect("a receipt")
    }
}

fn run(to: u64, lines: u64, verdict: Verdict) -> Run {
    Run { to, lines, verdict }
}

fn count(connection: &Connection, table: &str) -> i64 {
    let statement = format!("SELECT count(*) FROM {table}");
    connection.query_row(&statement, [], |row| row.get(0)).expect("a count")
}

fn matches(connection: &Connection, word: &str) -> i64 {
    let statement = "SELECT count(*) FROM words WHERE words MATCH ?1";
    connection.query_row(statement, [word], |row| row.get(0)).expect("a count")
}

#[test]
fn a_line_sent_again_is_already_there() {
    let folder = folder();
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&folder.path().join("store"));
    let receipt = peer.write(&mut store, 0, "one\ntwo\n\n");
    let expected = [run(8, 2, Verdict::Stored), run(9, 1, Verdict::Skipped)];
    assert_eq!((receipt.from, receipt.to), (0, 9));
    assert_eq!(receipt.runs, expected);
    let receipt = peer.write(&mut store, 4, "two\n\nthree\n");
    let expected =
        [run(8, 1, Verdict::Already), run(9, 1, Verdict::Skipped), run(15, 1, Verdict::Stored)];
    assert_eq!(receipt.runs, expected);
    assert_eq!(count(&store.writer.connection, "lines"), 3);
    assert_eq!(matches(&store.writer.connection, "two"), 1);
}

/// A statement with a savepoint of its own makes FTS5 write out what it has in memory, a segment each time.
#[test]
fn the_words_of_a_transaction_are_written_once() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let peer = Peer::new(Framing::LINES);
    peer.write(&mut store, 0, "one\ntwo\nthree\n");
    let segments = "SELECT count(DISTINCT segid) FROM words_idx";
    let written: i64 =
        store.writer.connection.query_row(segments, [], |row| row.get(0)).expect("a count");
    assert_eq!(written, 1);
}

#[test]
fn a_line_twice_in_one_transaction_is_stored_once() {
    let folder = folder();
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&folder.path().join("store"));
    let queue = Queue::default();
    queue.push(peer.frame(0, "one\n"));
    store.write(peer.frame(0, "one\n"), &queue);
    let verdicts: Vec<Verdict> =
        peer.inbox.try_take().into_iter().map(|receipt| receipt.runs[0].verdict.clone()).collect();
    assert_eq!(verdicts, [Verdict::Stored, Verdict::Already]);
}

/// Frames of short lines with long documents, or of very many lines, must not hold up others.
#[test]
fn a_frame_is_committed_in_parts_and_others_come_between() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let (mut long, other) = (Peer::new(Framing::LINES), Peer::new(Framing::LINES));
    let mut row = long.segment.row.clone();
    row.labels.insert("long".to_owned(), "x".repeat(1_200_000));
    // Lines of two records each: a part that begins with a second one must know it.
    row.framing = Framing::Lines { version: 1, limit: 2 };
    let sender = long.segment.sender;
    long.segment = Arc::new(Segment::new(row, sender, "web1".to_owned(), "test".to_owned()));
    let many = Peer::new(Framing::LINES);
    let queue = Queue::default();
    queue.push(many.frame(0, "\n".repeat(BATCH_LINES) + "x\n"));
    queue.push(other.frame(0, "other\n"));
    store.write(long.frame(0, "abc\n".repeat(9)), &queue);
    let first = long.inbox.try_take();
    assert_eq!(first.len(), 1, "a part");
    // 7 documents are too much: the part ends within the fourth line.
    assert_eq!(first[0].to, 3 * 4 + 2);
    assert!(many.inbox.try_take().is_empty(), "no room was left");
    let mut writes = 0;
    while let Some(frame) = queue.try_pop() {
        store.write(frame, &queue);
        writes += 1;
    }
    assert!(writes >= 3, "{writes}");
    let mut expected = first[0].to;
    for receipt in long.inbox.try_take() {
        assert_eq!(receipt.from, expected);
        expected = receipt.to;
    }
    assert_eq!(expected, 36);
    assert_eq!(other.inbox.try_take()[0].runs, [run(6, 1, Verdict::Stored)]);
    let ends: Vec<u64> = many.inbox.try_take().iter().map(|receipt| receipt.to).collect();
    assert_eq!(ends.last(), Some(&(BATCH_LINES as u64 + 2)), "{ends:?}");
    let connection = &store.writer.connection;
    assert_eq!(count(connection, "lines"), 2 * 9 + 2);
    assert_eq!(count(connection, r#"lines WHERE document LIKE '%["continues"]%'"#), 9);
    // The same as in one frame of their own.
    let again = Peer { segment: Arc::clone(&long.segment), inbox: Arc::default() };
    store.write(again.frame(32, "abc\n"), &queue);
    assert_eq!(again.inbox.try_take()[0].runs, [run(36, 2, Verdict::Already)]);
    assert_eq!(matches(&store.writer.connection, "ab"), 9);
}

/// A position moves over whole frames: written in turns, all of them would be whole only at the end.
#[test]
fn the_rest_of_a_frame_comes_before_its_segments_next_one() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let (many, other) = (Peer::new(Framing::LINES), Peer::new(Framing::LINES));
    let text = "\n".repeat(BATCH_LINES) + "x\n";
    let queue = Queue::default();
    let next = text.len() as u64;
    queue.push(many.frame(next, "y\n"));
    queue.push(other.frame(0, "other\n"));
    store.write(many.frame(0, text), &queue);
    let left: Vec<u64> = std::iter::from_fn(|| queue.try_pop()).map(|frame| frame.offset).collect();
    assert_eq!(left, [BATCH_LINES as u64, 0, next]);
}

#[test]
fn what_was_receipted_survives_a_kill_and_what_was_not_is_gone() {
    let folder = folder();
    let path = folder.path().join("store");
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&path);
    peer.write(&mut store, 0, "receipted\n");
    let frame = peer.frame(10, "not receipted\n");
    let mut batch = store.writer.begin().expect("a transaction");
    let mut room = Room { bytes: BATCH_BYTES, lines: BATCH_LINES };
    batch.frame(&frame, 0, &mut room).expect("an insert");
    // What a kill at this moment leaves: the files as they are.
    let after = folder.path().join("after");
    fs::copy(&path, &after).expect("a copy");
    fs::copy(folder.path().join("store-wal"), folder.path().join("after-wal")).expect("a copy");
    drop(batch);
    let mut after = open(&after);
    assert_eq!(count(&after.writer.connection, "lines"), 1);
    assert_eq!(after.destination_id(), store.destination_id());
    let receipt = peer.write(&mut after, 0, "receipted\nnot receipted\n");
    assert_eq!(receipt.runs, [run(10, 1, Verdict::Already), run(24, 1, Verdict::Stored)]);
    let receipt = peer.write(&mut store, 10, "not receipted\n");
    assert_eq!(receipt.runs, [run(24, 1, Verdict::Stored)], "a dropped batch leaves nothing");
}

#[test]
fn a_full_disk_defers_whole_frames_and_passes() {
    let folder = folder();
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&folder.path().join("store"));
    peer.write(&mut store, 0, "first\n");
    let limit = |store: &Store, pages: i64| {
        let connection = &store.writer.connection;
        connection.pragma_update(None, "max_page_count", pages).expect("a limit");
    };
    let health = store.health();
    limit(&store, 1);
    let lines: String = (0..2000).map(|n| format!("line number {n}\n")).collect();
    let to = 6 + lines.len() as u64;
    let receipt = peer.write(&mut store, 6, lines.clone());
    assert_eq!((receipt.from, receipt.to, receipt.runs.len()), (6, to, 1));
    let Run { lines: deferred, verdict: Verdict::Deferred { reason, after, index: None }, .. } =
        &receipt.runs[0]
    else {
        panic!("{receipt:?}")
    };
    assert_eq!((*deferred, *after), (2000, RETRY_AFTER));
    assert!(reason.contains("disk is full"), "{reason}");
    assert!(matches!(*health.borrow(), Health::Down { .. }));
    assert_eq!(count(&store.writer.connection, "lines"), 1, "a deferred frame leaves nothing");
    limit(&store, i64::from(u32::MAX) - 1);
    let receipt = peer.write(&mut store, 6, lines);
    assert_eq!(receipt.runs, [run(to, 2000, Verdict::Stored)]);
    assert!(store.failed.is_none());
    assert_eq!(*health.borrow(), Health::Ready);
}

#[test]
fn nothing_is_receipted_while_the_file_is_not_the_one_that_was_opened() {
    type Change = fn(&Path);
    let removed: Change = |path| fs::remove_file(path).expect("removed");
    let replaced: Change = |path| {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy).expect("a copy");
        fs::rename(&copy, path).expect("replaced");
    };
    let without_log: Change =
        |path| fs::remove_file(path.with_extension("sqlite-wal")).expect("removed");
    for change in [removed, replaced, without_log] {
        let folder = folder();
        let path = folder.path().join("store.sqlite");
        let peer = Peer::new(Framing::LINES);
        let mut store = open(&path);
        let receipt = peer.write(&mut store, 0, "first\n");
        assert_eq!(receipt.runs, [run(6, 1, Verdict::Stored)]);
        change(&path);
        let receipt = peer.write(&mut store, 6, "second\n");
        let Verdict::Deferred { reason, .. } = &receipt.runs[0].verdict else {
            panic!("{receipt:?}")
        };
        assert!(reason.contains("deleted, moved or replaced"), "{reason}");
        assert!(matches!(*store.health().borrow(), Health::Down { .. }));
    }
}

#[test]
fn a_file_that_was_moved_and_put_back_is_written_on() {
    let folder = folder();
    let path = folder.path().join("store.sqlite");
    let away = folder.path().join("away.sqlite");
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&path);
    fs::rename(&path, &away).expect("moved");
    // Nothing comes in, and it is noticed all the same.
    store.look();
    assert!(matches!(*store.health().borrow(), Health::Down { .. }));
    assert!(!peer.write(&mut store, 0, "line\n").runs[0].verdict.is_final());
    fs::rename(&away, &path).expect("put back");
    assert_eq!(peer.write(&mut store, 0, "line\n").runs, [run(5, 1, Verdict::Stored)]);
    assert_eq!(*store.health().borrow(), Health::Ready);
    store.failed = Instant::now().checked_sub(PROBE_AFTER);
    store.look();
    assert!(store.failed.is_none(), "it tries by itself");
}

#[test]
fn a_corrupt_record_is_parked_with_its_bytes() {
    let folder = folder();
    let peer = Peer::new(Framing::SPOOL);
    let mut store = open(&folder.path().join("store"));
    let mut records = Vec::new();
    encode_spool_record(&mut records, 5, b"", b"good");
    let good = records.len() as u64;
    encode_spool_record(&mut records, 5, b"", b"bad");
    *records.last_mut().expect("a byte") ^= 1;
    let bad = records[good as usize..].to_vec();
    let to = records.len() as u64;
    let receipt = peer.write(&mut store, 0, records);
    assert_eq!(receipt.runs[0], run(good, 1, Verdict::Stored));
    assert!(matches!(receipt.runs[1].verdict, Verdict::Parked { .. }));
    assert_eq!(receipt.runs[1].to, to);
    let id = peer.segment.ids.id(good, &bad);
    let (reason, line): (String, Vec<u8>) = store
        .writer
        .connection
        .query_row("SELECT reason, line FROM parked WHERE id = ?1", [&id.0[..]], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .expect("the parked line");
    assert!(reason.contains("checksum"), "{reason}");
    assert_eq!(line, bad);
}

#[test]
fn a_document_that_would_break_searches_is_refused_and_its_neighbours_are_not() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let segment = segment(Framing::LINES);
    let mut batch = store.writer.begin().expect("a transaction");
    let mut open = batch.open(&segment, segment.row.day).expect("a segment");
    let mut insert = |offset: u64, document: &[u8]| {
        let id = segment.ids.id(offset, b"x");
        let line = Line { id, offset, payload: b"x", document, read_at: 7, arrived: 0 };
        batch.line(&mut open, &line).expect("the store works")
    };
    for broken in [&b""[..], b"{", b"[1]", b"{} {}", b"{\"a\":\"\xff\"}", b"{\"@timestamp\":1}"] {
        assert!(insert(1, broken).is_err(), "{}", broken.escape_ascii());
    }
    assert_eq!(insert(1, b"{}"), Ok(Verdict::Stored), "a neighbour, and the line once it is whole");
    assert_eq!(insert(2, b"{\"@timestamp\":\"1970-01-01T00:00:09Z\"}"), Ok(Verdict::Stored));
    assert_eq!(insert(3, b"{\"@timestamp\":\"no time\"}"), Ok(Verdict::Stored));
    batch.commit().expect("a commit");
    let connection = &store.writer.connection;
    let mut times = connection.prepare("SELECT time FROM lines ORDER BY line").expect("SQL");
    let times: Vec<i64> =
        times.query_map([], |row| row.get(0)).expect("SQL").collect::<Result<_, _>>().expect("SQL");
    assert_eq!(times, [7, 9000, 7], "the document's own time, else when it was read");
}

#[test]
fn a_line_that_is_stored_at_last_leaves_the_dead_letter() {
    let folder = folder();
    let path = folder.path().join("store");
    let peer = Peer::new(Framing::LINES);
    let id = peer.segment.ids.id(0, b"line");
    {
        let store = open(&path);
        let statement = "INSERT INTO parked VALUES (?1, 'reason', 1, x'', 's', 'p', 0, x'')";
        store.writer.connection.execute(statement, [&id.0[..]]).expect("a parked line");
    }
    let mut store = open(&path);
    let receipt = peer.write(&mut store, 0, "line\n");
    assert_eq!(receipt.runs, [run(5, 1, Verdict::Stored)]);
    assert_eq!(count(&store.writer.connection, "parked"), 0);
}

/// `lines` lines that arrived one per hour from the start of 1970, in a segment of their own per day.
fn hourly(store: &mut Store, lines: u64) {
    let mut batch = store.writer.begin().expect("a transaction");
    for first in (0..lines).step_by(24) {
        let segment = segment(Framing::LINES);
        let mut open = batch.open(&segment, segment.row.day).expect("a segment");
        for hour in first..lines.min(first + 24) {
            let payload = format!("hour{hour} {}", "filler ".repeat(20));
            // The later a line arrives, the older it says it is.
            let time = jiff::Timestamp::from_second(1 << 33).expect("a time")
                - jiff::SignedDuration::from_hours(hour as i64);
            let document = format!("{{\"@timestamp\":\"{time}\",\"message\":\"{payload}\"}}");
            let line = Line {
                id: segment.ids.id(hour, payload.as_bytes()),
                offset: hour,
                payload: payload.as_bytes(),
                document: document.as_bytes(),
                read_at: 0,
                arrived: hour * 3_600_000,
            };
            assert_eq!(batch.line(&mut open, &line).expect("an insert"), Ok(Verdict::Stored));
        }
        batch.close(&open).expect("an update");
    }
    batch.commit().expect("a commit");
}

/// As it is a week after the opening.
fn keep(store: &Store, days: Option<u32>, bytes: Option<u64>, now: u64) -> usize {
    let config = EmbeddedConfig { keep_days: days, keep_bytes: bytes, ..config(&store.path) };
    let moment = Instant::now() + Duration::from_secs(7 * 24 * 3600);
    deleted_at(store, &mut Retention::new(&config), now, moment)
}

fn deleted_at(store: &Store, retention: &mut Retention, now: u64, moment: Instant) -> usize {
    let mut deleted = 0;
    while let Step::Deleted(some) =
        retention.step(&store.writer.connection, now, moment).expect("a deletion")
    {
        deleted += some;
    }
    deleted
}

#[test]
fn keep_days_deletes_what_is_older_and_nothing_else() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    hourly(&mut store, 100 * 24);
    let connection = &store.writer.connection;
    assert_eq!(keep(&store, None, None, 100 * DAY_MS), 0, "without a bound nothing goes");
    assert_eq!(keep(&store, Some(40), None, 100 * DAY_MS), 60 * 24);
    assert_eq!(count(connection, "lines"), 40 * 24);
    assert_eq!(matches(connection, "hour0") + matches(connection, "hour1439"), 0);
    assert_eq!(matches(connection, "hour1440"), 1);
    assert_eq!(count(connection, "segments"), 40, "segments go with their last line");
}

#[test]
fn a_clock_that_is_ahead_for_a_while_deletes_a_day_for_each_hour() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    hourly(&mut store, 30 * 24);
    let config = EmbeddedConfig { keep_days: Some(30), ..config(&store.path) };
    let mut retention = Retention::new(&config);
    let opened = Instant::now();
    let mut at = |days: u64, hours: u64| {
        let moment = opened + Duration::from_secs(hours * 3600);
        deleted_at(&store, &mut retention, days * DAY_MS, moment)
    };
    assert_eq!(at(30, 0) + at(31, 24), 24, "a day later the first day goes");
    // 40 days ahead at once.
    assert_eq!(at(71, 24), 0);
    assert_eq!(at(71, 25), 24);
    assert_eq!(at(31, 26) + at(32, 48), 0, "the clock is right again");
    assert_eq!(at(33, 72), 24);
}

#[test]
fn lines_of_a_clock_that_began_in_1970_hold_up_nobody() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    hourly(&mut store, 31 * 24);
    let asked = "UPDATE lines SET arrived = arrived + ?1 WHERE arrived >= ?2";
    let days = |days: i64| days * DAY_MS as i64;
    store.writer.connection.execute(asked, [days(20_000), days(1)]).expect("an update");
    let config = EmbeddedConfig { keep_days: Some(10), ..config(&store.path) };
    let mut retention = Retention::new(&config);
    let opened = Instant::now();
    let mut at = |hours: u64| {
        let moment = opened + Duration::from_secs(hours * 3600);
        deleted_at(&store, &mut retention, 20_031 * DAY_MS, moment)
    };
    assert_eq!(at(1), 24, "the day of 1970");
    assert_eq!((2..=48).map(&mut at).sum::<usize>(), 20 * 24);
    assert_eq!(count(&store.writer.connection, "lines"), 10 * 24);
}

#[test]
fn a_line_of_a_clock_that_was_ahead_holds_up_nobody() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    hourly(&mut store, 10 * 24);
    let ahead = "UPDATE lines SET arrived = arrived + ?1 WHERE line IN \
                 (SELECT line FROM lines ORDER BY line LIMIT 3 OFFSET 5)";
    store.writer.connection.execute(ahead, [1000 * DAY_MS as i64]).expect("an update");
    assert_eq!(keep(&store, Some(4), None, 10 * DAY_MS), 6 * 24);
    // The newest may have arrived just now.
    let ahead =
        "UPDATE lines SET arrived = arrived + ?1 WHERE line = (SELECT max(line) FROM lines)";
    store.writer.connection.execute(ahead, [1000 * DAY_MS as i64]).expect("an update");
    assert_eq!(keep(&store, Some(4), None, 100 * DAY_MS), 4 * 24 - 1);
}

#[test]
fn a_segment_that_retention_deleted_comes_back_with_its_next_line() {
    let folder = folder();
    let path = folder.path().join("store");
    let peer = Peer::new(Framing::LINES);
    let mut store = open(&path);
    peer.write(&mut store, 0, "old\n");
    // As retention leaves it when a newer line has gone too, here or in another process.
    store.writer.connection.execute_batch("DELETE FROM lines; DELETE FROM segments").expect("SQL");
    peer.write(&mut store, 4, "new\n");
    let all = "SELECT count(*) FROM lines JOIN segments ON number = lines.segment";
    let found: i64 = store.writer.connection.query_row(all, [], |row| row.get(0)).expect("a count");
    assert_eq!(found, 1);
}

#[test]
fn keep_bytes_deletes_the_oldest_until_the_rest_fits() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    hourly(&mut store, 20_000);
    let connection = &store.writer.connection;
    let before = used_bytes(connection).expect("a size");
    let deleted = keep(&store, None, Some(before / 2), 0);
    let after = used_bytes(connection).expect("a size");
    assert!(after <= before / 2, "{before} {after}");
    assert!(deleted < 15_000, "no more than needed goes: {deleted} of 20000");
    let oldest: i64 = connection
        .query_row("SELECT min(arrived) FROM lines", [], |row| row.get(0))
        .expect("lines are left");
    assert_eq!(oldest, deleted as i64 * 3_600_000, "the oldest go first");
}

#[test]
fn a_line_of_the_year_9999_goes_before_those_that_came_after_it() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let (attacker, victim) = (Peer::new(Framing::LINES), Peer::new(Framing::LINES));
    let late: String = (0..2000)
        .map(|n| format!("{{\"@timestamp\":\"9999-12-30T00:00:00Z\",\"message\":\"late{n}\"}}\n"))
        .collect();
    attacker.write(&mut store, 0, late);
    let before = used_bytes(&store.writer.connection).expect("a size");
    let lines: String = (0..2000).map(|n| format!("honest {n}\n")).collect();
    victim.write(&mut store, 0, lines);
    assert!(keep(&store, None, Some(before), 0) > 0);
    let connection = &store.writer.connection;
    assert_eq!(matches(connection, "honest"), 2000, "what came last stays");
    assert!(count(connection, "lines") < 4000);
}

#[test]
fn a_store_of_an_older_format_is_refused() {
    let folder = folder();
    let path = folder.path().join("store");
    drop(open(&path));
    let connection = Connection::open(&path).expect("a database");
    connection.pragma_update(None, "user_version", 1).expect("a version");
    drop(connection);
    for error in [Store::open(&config(&path)).err(), open_reader(&path).err()] {
        let error = error.expect("too old");
        assert!(matches!(error, StoreError::Older { found: 1, .. }), "{error}");
    }
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_alone() {
    let folder = folder();
    let text = folder.path().join("text");
    fs::write(&text, "some log line\n".repeat(1000)).expect("a file");
    let other = folder.path().join("other");
    let connection = Connection::open(&other).expect("a database");
    connection.execute_batch("CREATE TABLE theirs (x)").expect("a table");
    drop(connection);
    for path in [&text, &other] {
        let before = fs::read(path).expect("a file");
        for error in [Store::open(&config(path)).err(), open_reader(path).err()] {
            let error = error.expect("no store");
            assert!(matches!(error, StoreError::NotAStore(_)), "{error}");
        }
        assert_eq!(fs::read(path).expect("a file"), before);
    }
    for error in [
        Store::open(&config(folder.path())).err(),
        open_reader(folder.path()).err(),
        look(folder.path()).err(),
    ] {
        assert!(matches!(error, Some(StoreError::Folder(_))), "{error:?}");
    }
    let missing = open_reader(&folder.path().join("missing"));
    assert!(matches!(missing, Err(StoreError::Missing(_))));
    let error = Store::open(&config(&text.join("store"))).err().expect("its folder is a file");
    assert!(matches!(error, StoreError::Create { .. }), "{error}");
}

#[test]
fn a_look_at_a_store_makes_nothing() {
    let folder = folder();
    let path = folder.path().join("store");
    let files = || fs::read_dir(folder.path()).expect("a folder").count();
    look(&path).expect("a store can be made");
    fs::write(&path, "").expect("a file");
    look(&path).expect("it can become one");
    drop(open(&path));
    assert_eq!(files(), 1);
    look(&path).expect("a store");
    assert_eq!(files(), 1);
    let store = open(&path);
    look(&path).expect("a store in use");
    drop(store);
    fs::write(&path, "some log line\n").expect("a file");
    let error = look(&path).expect_err("no store");
    assert!(matches!(error, StoreError::NotAStore(_)), "{error}");
}

#[test]
fn a_newer_store_is_refused() {
    let folder = folder();
    let path = folder.path().join("store");
    drop(open(&path));
    let connection = Connection::open(&path).expect("a database");
    connection.pragma_update(None, "user_version", 99).expect("a version");
    drop(connection);
    for error in [Store::open(&config(&path)).err(), open_reader(&path).err()] {
        let error = error.expect("too new");
        assert!(matches!(error, StoreError::Newer { found: 99, .. }), "{error}");
    }
}

#[test]
fn a_damaged_store_says_so_at_the_start() {
    let folder = folder();
    let path = folder.path().join("store");
    let mut store = open(&path);
    hourly(&mut store, 5000);
    drop(store);
    let mut bytes = fs::read(&path).expect("the store");
    let half = bytes.len() / 2;
    bytes[8192..].fill(0x5a);
    fs::write(&path, &bytes[..half]).expect("damage");
    let error = Store::open(&config(&path)).err().expect("damaged");
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("move the file"), "{error}");
}

#[test]
fn the_destination_id_is_minted_once_per_store() {
    let folder = folder();
    let path = folder.path().join("made/where/missing/store");
    let id = open(&path).destination_id();
    assert_eq!(open(&path).destination_id(), id);
    assert_ne!(open(&folder.path().join("other")).destination_id(), id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_queue_is_emptied_while_a_reader_reads() {
    let folder = folder();
    let path = folder.path().join("store");
    let store = open(&path);
    let queue = Arc::new(Queue::default());
    let peer = Peer::new(Framing::LINES);
    let mut offset = 0;
    for number in 0..50 {
        let lines: String = (0..100).map(|n| format!("frame {number} line {n}\n")).collect();
        let length = lines.len() as u64;
        queue.push(peer.frame(offset, lines));
        offset += length;
    }
    // A reader that stands in the middle of a search must neither stop the writer nor see a half.
    let reader = open_reader(&path).expect("a reader");
    reader.execute_batch("BEGIN").expect("a transaction");
    assert_eq!(count(&reader, "lines"), 0);
    queue.close();
    store.run(Arc::clone(&queue), CancellationToken::new()).await;
    let receipts = peer.inbox.try_take();
    let lines: u64 = receipts.iter().flat_map(|receipt| &receipt.runs).map(|run| run.lines).sum();
    assert_eq!((receipts.len(), lines), (50, 5000));
    assert_eq!(receipts.back().expect("a receipt").to, offset);
    assert_eq!(count(&reader, "lines"), 0, "the state at its beginning");
    reader.execute_batch("COMMIT").expect("an end");
    assert_eq!(count(&reader, "lines"), 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_work_deletes_what_became_too_old() {
    let folder = folder();
    let path = folder.path().join("store");
    let mut store =
        Store::open(&EmbeddedConfig { keep_days: Some(1), ..config(&path) }).expect("a store");
    hourly(&mut store, 5000);
    // As it is a year after the opening.
    let moment = Instant::now() + Duration::from_secs(365 * 24 * 3600);
    let first = store.retention.step(&store.writer.connection, now_ms(), moment);
    assert!(matches!(first, Ok(Step::Deleted(1000))), "{first:?}");
    let queue = Arc::new(Queue::default());
    queue.close();
    store.run(queue, CancellationToken::new()).await;
    assert_eq!(count(&open_reader(&path).expect("a reader"), "lines"), 0);
}

proptest! {
    // Each case makes a store.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_bytes_are_answered_and_read_back(frames in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 1..200), 1..5)) {
        let folder = folder();
        let peer = Peer::new(Framing::LINES);
        let mut store = open(&folder.path().join("store"));
        let mut offset = 0;
        for mut records in frames {
            records.push(b'\n');
            let to = offset + records.len() as u64;
            let receipt = peer.write(&mut store, offset, records);
            prop_assert_eq!((receipt.from, receipt.to), (offset, to));
            prop_assert!(receipt.runs.iter().all(|run| run.verdict.is_final()));
            offset = to;
        }
        let connection = &store.writer.connection;
        prop_assert_eq!(count(connection, "lines"), count(connection, "(SELECT DISTINCT id FROM lines)"));
        let mut ids = connection.prepare("SELECT id FROM lines").expect("SQL");
        let ids = ids.query_map([], |row| row.get::<_, [u8; 24]>(0).map(DocumentId)).expect("SQL");
        prop_assert!(ids.collect::<Result<Vec<_>, _>>().is_ok());
    }
}

/// The store's answer to a key that came under two types must not name an index without it.
#[test]
fn a_key_in_two_indices_is_a_line_in_each() {
    let folder = folder();
    let mut store = open(&folder.path().join("store"));
    let mut records = Vec::new();
    encode_spool_record(&mut records, DAY_MS * 20_778, b"key", b"line");
    let mut peer = Peer::new(Framing::SPOOL);
    let mut verdicts = Vec::new();
    for index in ["one", "two", "one"] {
        let row = Row { segment: SegmentId::mint(), ..peer.segment.row.clone() };
        let sender = peer.segment.sender;
        peer.segment = Arc::new(Segment::new(row, sender, "web1".to_owned(), index.to_owned()));
        verdicts.push(peer.write(&mut store, 0, records.clone()).runs.remove(0).verdict);
    }
    assert_eq!(verdicts, [Verdict::Stored, Verdict::Stored, Verdict::Already]);
    assert_eq!(count(&store.writer.connection, "lines"), 2);
}

#[test]
fn a_keyed_line_posted_again_is_one_line_in_the_index_of_its_day() {
    let folder = folder();
    let path = folder.path().join("store.sqlite");
    let mut store = open(&path);
    let day = DAY_MS * 20_778;
    let mut records = Vec::new();
    for (time, key) in [(day, "k1"), (day + DAY_MS, "k2"), (0, "k3")] {
        encode_spool_record(&mut records, time, key.as_bytes(), b"line");
    }
    let mut peer = Peer::new(Framing::SPOOL);
    let mut segment = segment(Framing::SPOOL);
    segment.row.rule = Some(IndexRule::default());
    peer.segment = Arc::new(segment);
    let first = peer.write(&mut store, 0, records.clone());
    // Another segment of the same sender: a client's repeat after a restart.
    let row = Row { segment: SegmentId::mint(), ..peer.segment.row.clone() };
    let again = Segment::new(row, peer.segment.sender, "web1".to_owned(), "test".to_owned());
    peer.segment = Arc::new(again);
    let second = peer.write(&mut store, 77, records);
    use Verdict::{Already, Stored};
    let finals = |receipt: &Receipt| -> Vec<(Verdict, u64)> {
        receipt.runs.iter().map(|run| (run.verdict.clone(), run.lines)).collect()
    };
    assert_eq!(finals(&first)[0], (Stored, 2));
    assert_eq!(finals(&second)[0], (Already, 2));
    assert!(
        matches!(&finals(&first)[1].0, Verdict::Parked { reason } if reason.contains("1970-01-01"))
    );
    let names: Vec<String> = store
        .writer
        .connection
        .prepare(
            "SELECT s.index_name FROM lines l JOIN segments s ON s.number = l.segment ORDER BY 1",
        )
        .and_then(|mut names| names.query_map([], |row| row.get(0))?.collect())
        .expect("SQL");
    assert_eq!(names, ["test", "waybill-default-2026.11.22"]);
}
