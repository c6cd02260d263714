//! One transaction: the lines of all frames that were waiting, committed before any is receipted.
//!
//! Called by the store's thread alone. A verdict that leaves here is true only after
//! [`Batch::commit`] has returned; a batch that is dropped leaves nothing behind (I1).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use jiff::Timestamp;
use rusqlite::{CachedStatement, Connection, ErrorCode, Transaction, TransactionBehavior, params};
use serde::Deserialize;
use uuid::Uuid;

use crate::destination::Frame;
use crate::parse::{Form, FrameTimes, Segment};
use crate::protocol::{Run, Verdict};
use crate::record::{DocumentId, Record, RecordKind};

/// Segments whose number is remembered; beyond it the memory starts anew (I7).
const SEGMENTS_MAX: usize = 4096;

/// The connection, and what is remembered from batch to batch.
pub(super) struct Writer {
    pub(super) connection: Connection,
    /// Numbers that are committed in `segments`.
    segments: HashMap<(Uuid, Uuid), i64>,
    /// Whether a line that is stored may lie in the dead letter too.
    any_parked: bool,
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
}

impl Writer {
    pub(super) fn new(connection: Connection) -> rusqlite::Result<Writer> {
        let any_parked =
            connection.query_row("SELECT EXISTS (SELECT 1 FROM parked)", [], |row| row.get(0))?;
        Ok(Writer { connection, segments: HashMap::new(), any_parked, document: Vec::new() })
    }

    /// Begins a transaction.
    pub(super) fn begin(&mut self) -> rusqlite::Result<Batch<'_>> {
        if self.segments.len() >= SEGMENTS_MAX {
            self.segments.clear();
        }
        let connection = &self.connection;
        let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
        Ok(Batch {
            insert_line: connection.prepare_cached(
                "INSERT INTO lines (id, time, segment, offset, document) VALUES (?1, ?2, ?3, ?4, ?5) \
                 ON CONFLICT (id) DO NOTHING",
            )?,
            insert_words: connection
                .prepare_cached("INSERT INTO words (rowid, line) VALUES (?1, ?2)")?,
            newest: HashMap::new(),
            added: HashMap::new(),
            segments: &mut self.segments,
            any_parked: &mut self.any_parked,
            document: &mut self.document,
            transaction,
        })
    }

    /// Forgets numbers that retention may have deleted.
    pub(super) fn forget_segments(&mut self) {
        self.segments.clear();
    }
}

/// An open transaction. Dropping it rolls back.
pub(super) struct Batch<'w> {
    insert_line: CachedStatement<'w>,
    insert_words: CachedStatement<'w>,
    /// Newest time of a line per segment number touched here.
    newest: HashMap<i64, i64>,
    /// Numbers given here, remembered only once they are committed.
    added: HashMap<(Uuid, Uuid), i64>,
    segments: &'w mut HashMap<(Uuid, Uuid), i64>,
    any_parked: &'w mut bool,
    document: &'w mut Vec<u8>,
    transaction: Transaction<'w>,
}

/// Neighbouring records with one verdict, joined as they come.
#[derive(Debug, Default)]
pub(super) struct Runs {
    pub(super) runs: Vec<Run>,
    pub(super) lines: u64,
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
}

impl Batch<'_> {
    /// Adds a frame's records. An error is the store's, never a line's: roll back.
    pub(super) fn frame(&mut self, frame: &Frame, now: u64) -> rusqlite::Result<Runs> {
        let segment = &*frame.segment;
        let number = self.segment(segment)?;
        let times = FrameTimes { read_at: frame.read_at, ingested_at: now };
        let mut document = std::mem::take(self.document);
        let mut runs = Runs::default();
        for record in segment.row.framing.records(&frame.records, frame.offset, frame.continues) {
            let read_at = record.time.unwrap_or(frame.read_at);
            let verdict = match record.kind {
                RecordKind::Skipped => Verdict::Skipped,
                RecordKind::Corrupt => {
                    self.park(segment, &record, read_at, "its checksum in the spool is wrong")?
                }
                RecordKind::Line => {
                    document.clear();
                    segment.write_document(&record, &times, Form::Full, &mut document);
                    let line = Line {
                        id: segment.ids.id(record.offset, record.payload),
                        offset: record.offset,
                        payload: record.payload,
                        document: &document,
                        read_at,
                    };
                    match self.line(number, &line)? {
                        Ok(verdict) => verdict,
                        Err(reason) => self.park(segment, &record, read_at, &reason)?,
                    }
                }
            };
            runs.push(record.offset + record.length as u64, verdict);
        }
        *self.document = document;
        Ok(runs)
    }

    /// Adds a line; `Err` within `Ok` says why this one cannot be stored while others can.
    pub(super) fn line(
        &mut self,
        segment: i64,
        line: &Line<'_>,
    ) -> rusqlite::Result<Result<Verdict, String>> {
        let (document, time) = match check(line.document, line.read_at) {
            Ok(checked) => checked,
            Err(reason) => return Ok(Err(reason)),
        };
        let text = String::from_utf8_lossy(line.payload);
        let id = &line.id.0[..];
        let inserted = self.insert_line.execute(params![
            id,
            time,
            segment,
            // An offset is less than 2^40.
            line.offset as i64,
            document
        ]);
        match inserted {
            Ok(0) => return Ok(Ok(Verdict::Already)),
            Ok(_) => {}
            Err(error) => return lines_own_fault(error).map(Err),
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
        let newest = self.newest.entry(segment).or_insert(time);
        *newest = time.max(*newest);
        Ok(Ok(Verdict::Stored))
    }

    /// Adds a record to the dead letter under its own id.
    fn park(
        &mut self,
        segment: &Segment,
        record: &Record<'_>,
        time: u64,
        reason: &str,
    ) -> rusqlite::Result<Verdict> {
        let id = segment.ids.id(record.offset, record.payload);
        self.transaction
            .prepare_cached(
                "INSERT INTO parked (id, reason, time, sender, source, path, offset, line) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO NOTHING",
            )?
            .execute(params![
                &id.0[..],
                reason,
                i64::try_from(time).unwrap_or(i64::MAX),
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

    /// The number under which a segment's lines stand.
    pub(super) fn segment(&mut self, segment: &Segment) -> rusqlite::Result<i64> {
        let key = (segment.row.segment.0, segment.sender.0);
        if let Some(number) = self.segments.get(&key) {
            return Ok(*number);
        }
        match self.added.entry(key) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(new) => {
                // The update changes nothing but makes RETURNING speak where the row is there.
                let number = self
                    .transaction
                    .prepare_cached(
                        "INSERT INTO segments (segment, sender, index_name, newest) VALUES (?1, ?2, ?3, ?4) \
                         ON CONFLICT DO UPDATE SET newest = newest RETURNING number",
                    )?
                    .query_row(
                        params![
                            &key.0.as_bytes()[..],
                            &key.1.as_bytes()[..],
                            segment.index,
                            i64::MIN
                        ],
                        |row| row.get(0),
                    )?;
                Ok(*new.insert(number))
            }
        }
    }

    /// Makes all of it durable: when this returns, the verdicts hold.
    pub(super) fn commit(self) -> rusqlite::Result<()> {
        {
            let mut update = self
                .transaction
                .prepare_cached("UPDATE segments SET newest = max(newest, ?2) WHERE number = ?1")?;
            for (number, newest) in &self.newest {
                update.execute([number, newest])?;
            }
        }
        // Statements in use would keep the transaction from ending.
        drop(self.insert_line);
        drop(self.insert_words);
        self.transaction.commit()?;
        self.segments.extend(self.added);
        Ok(())
    }
}

/// A document's own time, the only field that the store reads.
#[derive(Deserialize)]
struct Stamp<'a> {
    #[serde(rename = "@timestamp", borrow)]
    timestamp: Option<std::borrow::Cow<'a, str>>,
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
