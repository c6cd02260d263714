//! One transaction: the lines of all frames that were waiting, committed before any is receipted.
//!
//! Called by the store's thread alone. A verdict that leaves here is true only after
//! [`Batch::commit`] has returned; a batch that is dropped leaves nothing behind (I1).

use std::borrow::Cow;

use jiff::Timestamp;
use rusqlite::{CachedStatement, Connection, ErrorCode, Transaction, TransactionBehavior, params};
use serde::Deserialize;

use crate::destination::Frame;
use crate::parse::{Form, FrameTimes, Segment};
use crate::protocol::{Run, Verdict};
use crate::record::{Day, DocumentId, Record, RecordKind};

/// The connection, and what is remembered from batch to batch.
pub(super) struct Writer {
    pub(super) connection: Connection,
    /// Whether a line that is stored may lie in the dead letter too.
    any_parked: bool,
    /// One document at a time, its memory used again.
    document: Vec<u8>,
}

/// A line on its way into the tables.
pub(super) struct Line<'a> {
    pub(super) id: DocumentId,
    pub(super) offset: u64,
    /// As it came, for the words.
    pub(super) payload: &'a [u8],
    /// One JSON object.
    pub(super) document: &'a [u8],
    /// Milliseconds since 1970, where the document has no time of its own.
    pub(super) read_at: u64,
    /// This machine's clock, likewise: retention goes by it.
    pub(super) arrived: u64,
}

impl Writer {
    pub(super) fn new(connection: Connection) -> rusqlite::Result<Writer> {
        let any_parked =
            connection.query_row("SELECT EXISTS (SELECT 1 FROM parked)", [], |row| row.get(0))?;
        Ok(Writer { connection, any_parked, document: Vec::new() })
    }

    /// Writes a page and syncs it: says whether the store can.
    pub(super) fn probe(&self) -> rusqlite::Result<()> {
        self.connection.execute("UPDATE meta SET value = value", []).map(drop)
    }

    /// Begins a transaction.
    pub(super) fn begin(&mut self) -> rusqlite::Result<Batch<'_>> {
        let connection = &self.connection;
        let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
        Ok(Batch {
            find_line: connection.prepare_cached(
                "SELECT 1 FROM lines JOIN segments ON number = lines.segment \
                 WHERE id = ?1 AND index_name = ?2",
            )?,
            // Of one row: one that may add several has a savepoint of its own, at which the words in
            // memory are written out, line by line.
            insert_line: connection.prepare_cached(
                "INSERT INTO lines (id, time, arrived, segment, offset, document) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?,
            insert_words: connection
                .prepare_cached("INSERT INTO words (rowid, line) VALUES (?1, ?2)")?,
            any_parked: &mut self.any_parked,
            document: &mut self.document,
            transaction,
        })
    }
}

/// An open transaction. Dropping it rolls back.
pub(super) struct Batch<'w> {
    find_line: CachedStatement<'w>,
    insert_line: CachedStatement<'w>,
    insert_words: CachedStatement<'w>,
    any_parked: &'w mut bool,
    document: &'w mut Vec<u8>,
    transaction: Transaction<'w>,
}

/// A segment whose lines are being added: between [`Batch::open`] and [`Batch::close`].
pub(super) struct OpenSegment {
    /// Under which its lines stand.
    number: i64,
    /// The day of its index.
    day: Day,
    /// The name of its index.
    index: String,
    /// The last line that was added, for retention.
    newest: i64,
}

/// What a transaction may still take.
#[derive(Debug)]
pub(super) struct Room {
    /// Of lines and documents.
    pub(super) bytes: usize,
    /// Records of any kind: as many runs as these may have an answer.
    pub(super) lines: usize,
}

impl Room {
    fn take(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.lines = self.lines.saturating_sub(1);
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.bytes == 0 || self.lines == 0
    }
}

/// Neighbouring records with one verdict, joined as they come.
#[derive(Debug, Default)]
pub(super) struct Runs {
    pub(super) runs: Vec<Run>,
    pub(super) lines: u64,
    /// The last record's line goes on in the next one.
    cut: bool,
}

impl Runs {
    fn push(&mut self, to: u64, verdict: Verdict) {
        self.lines += 1;
        match self.runs.last_mut() {
            Some(last) if last.verdict == verdict => {
                last.to = to;
                last.lines += 1;
            }
            _ => self.runs.push(Run { to, lines: 1, verdict }),
        }
    }

    /// What of the frame these do not cover.
    pub(super) fn rest(&self, frame: Frame) -> Option<Frame> {
        let offset = self.runs.last()?.to;
        // Within the frame, whose length is a `usize`.
        let done = (offset - frame.offset) as usize;
        (done < frame.records.len()).then(|| Frame {
            offset,
            continues: self.cut,
            records: frame.records.slice(done..),
            ..frame
        })
    }
}

impl Batch<'_> {
    /// Adds a frame's records, as many as there is room for and at least one. An error is the store's,
    /// never a line's: roll back.
    pub(super) fn frame(
        &mut self,
        frame: &Frame,
        now: u64,
        room: &mut Room,
    ) -> rusqlite::Result<Runs> {
        let segment = &*frame.segment;
        let mut lines = self.open(segment, segment.row.day)?;
        let times = FrameTimes::new(frame.read_at, now);
        let mut document = std::mem::take(self.document);
        let mut runs = Runs::default();
        for record in segment.row.framing.records(&frame.records, frame.offset, frame.continues) {
            let read_at = record.time.unwrap_or(frame.read_at);
            document.clear();
            let verdict = match record.kind {
                RecordKind::Skipped => Verdict::Skipped,
                RecordKind::Corrupt => {
                    self.park(segment, &record, now, "its checksum in the spool is wrong")?
                }
                RecordKind::Line => match frame.day_of(&record) {
                    Err(outside) => self.park(segment, &record, now, &outside.to_string())?,
                    Ok(day) => {
                        if day != lines.day {
                            self.close(&lines)?;
                            lines = self.open(segment, day)?;
                        }
                        segment.write_document(&record, &times, Form::Full, &mut document);
                        let line = Line {
                            id: segment.ids.of(&record),
                            offset: record.offset,
                            payload: record.payload,
                            document: &document,
                            read_at,
                            arrived: now,
                        };
                        match self.line(&mut lines, &line)? {
                            Ok(verdict) => verdict,
                            Err(reason) => self.park(segment, &record, now, &reason)?,
                        }
                    }
                },
            };
            runs.push(record.offset + record.length as u64, verdict);
            runs.cut = record.cut;
            room.take(record.length + document.len());
            if room.is_used_up() {
                break;
            }
        }
        *self.document = document;
        self.close(&lines)?;
        Ok(runs)
    }

    /// Adds a line; `Err` within `Ok` says why this one cannot be stored while others can.
    pub(super) fn line(
        &mut self,
        segment: &mut OpenSegment,
        line: &Line<'_>,
    ) -> rusqlite::Result<Result<Verdict, String>> {
        let (document, time) = match check(line.document, line.read_at) {
            Ok(checked) => checked,
            Err(reason) => return Ok(Err(reason)),
        };
        let text = String::from_utf8_lossy(line.payload);
        let id = &line.id.0[..];
        if self.find_line.exists(params![id, segment.index])? {
            return Ok(Ok(Verdict::Already));
        }
        let inserted = self.insert_line.execute(params![
            id,
            time,
            i64::try_from(line.arrived).unwrap_or(i64::MAX),
            segment.number,
            // An offset is less than 2^40.
            line.offset as i64,
            document
        ]);
        if let Err(error) = inserted {
            return lines_own_fault(error).map(Err);
        }
        let number = self.transaction.last_insert_rowid();
        if let Err(error) = self.insert_words.execute(params![number, &*text]) {
            let reason = lines_own_fault(error)?;
            self.transaction.execute("DELETE FROM lines WHERE line = ?1", [number])?;
            return Ok(Err(reason));
        }
        if *self.any_parked {
            // Stored at last: the dead letter is superseded.
            self.transaction.prepare_cached("DELETE FROM parked WHERE id = ?1")?.execute([id])?;
        }
        segment.newest = number;
        Ok(Ok(Verdict::Stored))
    }

    /// Adds a record to the dead letter under its own id.
    fn park(
        &mut self,
        segment: &Segment,
        record: &Record<'_>,
        arrived: u64,
        reason: &str,
    ) -> rusqlite::Result<Verdict> {
        let id = segment.ids.of(record);
        self.transaction
            .prepare_cached(
                "INSERT INTO parked (id, reason, arrived, sender, source, path, offset, line) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO NOTHING",
            )?
            .execute(params![
                &id.0[..],
                reason,
                i64::try_from(arrived).unwrap_or(i64::MAX),
                &segment.sender.0.as_bytes()[..],
                segment.row.source,
                segment.row.path,
                record.offset as i64,
                record.payload
            ])?;
        // Also right if this batch is rolled back: it only costs a look.
        *self.any_parked = true;
        Ok(Verdict::Parked { reason: reason.to_owned() })
    }

    /// Finds the segment's row for the index of a day, or makes it. It is looked up anew for each frame, because retention
    /// may have deleted it since.
    pub(super) fn open(&mut self, segment: &Segment, day: Day) -> rusqlite::Result<OpenSegment> {
        let index = segment.index_on(day);
        // The update changes nothing but makes RETURNING speak where the row is there.
        let number = self
            .transaction
            .prepare_cached(
                "INSERT INTO segments (segment, sender, index_name, newest) \
                 VALUES (?1, ?2, ?3, 0) \
                 ON CONFLICT DO UPDATE SET newest = newest RETURNING number",
            )?
            .query_row(
                params![
                    &segment.row.segment.0.as_bytes()[..],
                    &segment.sender.0.as_bytes()[..],
                    index
                ],
                |row| row.get(0),
            )?;
        Ok(OpenSegment { number, day, index: index.into(), newest: 0 })
    }

    /// Notes the newest line of the segment.
    pub(super) fn close(&mut self, segment: &OpenSegment) -> rusqlite::Result<()> {
        self.transaction
            .prepare_cached("UPDATE segments SET newest = max(newest, ?2) WHERE number = ?1")?
            .execute([segment.number, segment.newest])
            .map(drop)
    }

    /// Makes all of it durable: when this returns, the verdicts hold.
    pub(super) fn commit(self) -> rusqlite::Result<()> {
        self.transaction.commit()
    }
}

/// A document's own time, the only field that the store reads.
#[derive(Deserialize)]
struct Stamp<'a> {
    #[serde(rename = "@timestamp", borrow)]
    timestamp: Option<Cow<'a, str>>,
}

/// The document as text and its time. It must be one JSON object: a search that reads a field
/// reads it in every line, and one broken document would fail all searches.
fn check(document: &[u8], read_at: u64) -> Result<(&str, i64), String> {
    let unreadable = |error: &dyn std::fmt::Display| format!("its document is no JSON: {error}");
    let text = std::str::from_utf8(document).map_err(|error| unreadable(&error))?;
    let stamp: Stamp<'_> = serde_json::from_str(text).map_err(|error| unreadable(&error))?;
    let time = stamp
        .timestamp
        .and_then(|text| text.parse::<Timestamp>().ok())
        .map_or(i64::try_from(read_at).unwrap_or(i64::MAX), Timestamp::as_millisecond);
    Ok((text, time))
}

/// The reason where SQLite refused this line and would take another; else the error itself.
fn lines_own_fault(error: rusqlite::Error) -> rusqlite::Result<String> {
    match error.sqlite_error_code() {
        Some(ErrorCode::TooBig | ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch) => {
            Ok(format!("the store refused it: {error}"))
        }
        _ => Err(error),
    }
}
