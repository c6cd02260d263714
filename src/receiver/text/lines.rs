//! The receiver's side of `waybill.text.v1` without I/O: messages in, batches and answers out.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tracing::{info, warn};

use super::envelope::Line;
use super::origin::Origin;
use crate::destination::OutsideDays;
use crate::parse::Segment;
use crate::protocol::{DayBounds, FRAME_BYTES_MAX, FRAME_BYTES_TARGET, Receipt, Verdict};
use crate::receiver::session::{Sender, Terms};
use crate::record::framing::{SPOOL_HEADER_BYTES, encode_spool_record};
use crate::record::{Day, DocumentId, Format, Framing, OFFSET_MAX, Prefix, Row, SegmentId};

/// How many lines of one connection may be without an answer.
const LINES_MAX: usize = 4096;

/// What a row calls the source of such lines.
const SOURCE: &str = "text";

/// One connection's lines, from their messages to their answers.
#[derive(Debug)]
pub(super) struct Lines {
    sender: Sender,
    origin: Origin,
    terms: Arc<Terms>,
    current: Current,
    /// Records that no batch was made of yet: the last ones of the current segment.
    records: Vec<u8>,
    /// What came before them and could not be joined with them.
    closed: VecDeque<Batch>,
    /// All lines without an answer, in the order of their messages.
    waiting: VecDeque<Waiting>,
    /// Bytes of records without a verdict.
    bytes: u64,
    refused: u64,
}

/// The segment that takes lines.
#[derive(Debug)]
struct Current {
    /// One more than that of the segment before.
    handle: u32,
    segment: Arc<Segment>,
    /// Days that a time of origin may have; fixed with the segment.
    days: DayBounds,
    /// Where its next record starts.
    end: u64,
}

/// Whole records of one segment, for one frame.
#[derive(Debug)]
pub(super) struct Batch {
    pub handle: u32,
    pub offset: u64,
    pub segment: Arc<Segment>,
    pub days: DayBounds,
    pub records: Bytes,
}

#[derive(Debug)]
struct Waiting {
    handle: u32,
    /// Of its record; for a message that made none, of the next one.
    offset: u64,
    bytes: u64,
    /// `None` where there is no document to name.
    name: Option<Name>,
    outcome: Option<Outcome>,
}

/// What an answer names, once the line is in the destination.
#[derive(Debug)]
struct Name {
    segment: Arc<Segment>,
    id: DocumentId,
    day: Day,
}

#[derive(Debug)]
enum Outcome {
    /// As the destination has it.
    Verdict(Verdict),
    /// It was not handed to the destination.
    Refused(String),
}

/// What a client reads.
#[derive(Serialize)]
struct Answer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<Cow<'a, str>>,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after_ms: Option<u64>,
}

impl Lines {
    pub fn new(sender: Sender, origin: Origin, terms: Arc<Terms>, today: Day) -> Lines {
        info!(
            sender = sender.name,
            r#type = origin.type_name.as_str(),
            host = origin.host,
            "text client connected"
        );
        let current = Current::open(0, &sender, &origin, &terms, today);
        Lines {
            sender,
            origin,
            terms,
            current,
            records: Vec::new(),
            closed: VecDeque::new(),
            waiting: VecDeque::new(),
            bytes: 0,
            refused: 0,
        }
    }

    /// Whether another message may be read.
    pub fn has_room(&self) -> bool {
        // One largest frame always fits into the credit.
        self.waiting.len() < LINES_MAX
            && (self.bytes == 0 || self.bytes + FRAME_BYTES_MAX as u64 <= self.terms.credit)
    }

    /// Whether every message has its answer.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// A message, at a time in milliseconds since 1970.
    pub fn take(&mut self, message: &str, now: u64) {
        let line = match Line::read(message) {
            Ok(line) if line.is_empty() => {
                return self.answered(Outcome::Verdict(Verdict::Skipped));
            }
            Ok(line) => line,
            Err(reason) => return self.refuse(reason),
        };
        let bytes = (SPOOL_HEADER_BYTES + line.key.len() + line.payload.len()) as u64;
        self.make_room(bytes, Day::of_millis(now));
        let Current { handle, ref segment, days, end: offset } = self.current;
        let (payload, row_day) = (line.payload.as_bytes(), segment.row.day);
        let time = line.time.unwrap_or(now);
        let (id, day) = match line.key.as_bytes() {
            b"" => (segment.ids.id(offset, payload), row_day),
            key => {
                let id = DocumentId::keyed(self.sender.id, key, time, payload);
                (id, Day::of_millis(time))
            }
        };
        if day != row_day && !days.contains(day) {
            return self.refuse(OutsideDays { day, bounds: days }.to_string());
        }
        let name = Some(Name { segment: Arc::clone(segment), id, day });
        self.waiting.push_back(Waiting { handle, offset, bytes, name, outcome: None });
        self.bytes += bytes;
        self.current.end += bytes;
        encode_spool_record(&mut self.records, time, line.key.as_bytes(), payload);
    }

    /// A batch that no further line can join; with `all`, also one that could grow.
    pub fn batch(&mut self, all: bool) -> Option<Batch> {
        if all && self.closed.is_empty() {
            self.close();
        }
        self.closed.pop_front()
    }

    /// Verdicts of a batch or of a part of one.
    pub fn settle(&mut self, receipt: &Receipt) {
        let from = (receipt.handle, receipt.from);
        let mut at = self.waiting.partition_point(|line| (line.handle, line.offset) < from);
        for run in &receipt.runs {
            while let Some(line) = self.waiting.get_mut(at)
                && (line.handle, line.offset) < (receipt.handle, run.to)
            {
                if line.outcome.is_none() {
                    self.bytes -= line.bytes;
                    line.outcome = Some(Outcome::Verdict(run.verdict.clone()));
                }
                at += 1;
            }
        }
    }

    /// The next answer: to the oldest line without one, once its verdict is there.
    pub fn answer(&mut self) -> Option<String> {
        self.waiting.front()?.outcome.as_ref()?;
        self.waiting.pop_front().as_ref().and_then(Waiting::answer)
    }

    fn refuse(&mut self, reason: String) {
        if self.refused == 0 {
            warn!(sender = self.sender.name, reason, "a line is refused, and its client is told");
        }
        self.refused += 1;
        self.answered(Outcome::Refused(reason));
    }

    /// A message without a record still waits for the answers before it.
    fn answered(&mut self, outcome: Outcome) {
        let (handle, offset) = (self.current.handle, self.current.end);
        let outcome = Some(outcome);
        self.waiting.push_back(Waiting { handle, offset, bytes: 0, name: None, outcome });
    }

    /// Makes room for a record of so many bytes: in a segment of today, and in a batch.
    fn make_room(&mut self, bytes: u64, today: Day) {
        let Current { handle, ref segment, end, .. } = self.current;
        if segment.row.day != today || end + bytes > OFFSET_MAX {
            self.close();
            let (sender, origin, terms) = (&self.sender, &self.origin, &self.terms);
            self.current = Current::open(handle + 1, sender, origin, terms, today);
        } else if self.records.len() as u64 + bytes > FRAME_BYTES_TARGET as u64 {
            self.close();
        }
    }

    /// Moves the records into a batch.
    fn close(&mut self) {
        if self.records.is_empty() {
            return;
        }
        let Current { handle, ref segment, days, end } = self.current;
        // Without spare capacity: what is counted is what is held.
        let records = Bytes::from(std::mem::take(&mut self.records).into_boxed_slice());
        let offset = end - records.len() as u64;
        let segment = Arc::clone(segment);
        self.closed.push_back(Batch { handle, offset, segment, days, records });
    }
}

impl Current {
    /// Opens the row that a sender would have made.
    fn open(handle: u32, sender: &Sender, origin: &Origin, terms: &Terms, today: Day) -> Current {
        let row = Row {
            segment: SegmentId::mint(),
            source: SOURCE.to_owned(),
            path: String::new(),
            host: origin.host.clone(),
            device: 0,
            inode: 0,
            start: 0,
            end: None,
            cuts: Vec::new(),
            day: today,
            type_name: origin.type_name.clone(),
            tags: origin.tags.clone(),
            labels: BTreeMap::new(),
            framing: Framing::SPOOL,
            format: Format::Auto,
            timezone: "UTC".to_owned(),
            sender: Some(sender.id),
            rule: Some(terms.rule.clone()),
            first_bytes: Prefix::default(),
        };
        let index = terms.rule.name(&row.type_name, today);
        let segment = Arc::new(Segment::new(row, sender.id, sender.name.clone(), index));
        Current { handle, segment, days: terms.day_bounds(today), end: 0 }
    }
}

impl Waiting {
    /// `None` where there is no outcome yet.
    fn answer(&self) -> Option<String> {
        let outcome = self.outcome.as_ref()?;
        let (verdict, reason, after) = match outcome {
            Outcome::Refused(reason) => ("refused", Some(reason), None),
            Outcome::Verdict(Verdict::Stored) => ("stored", None, None),
            Outcome::Verdict(Verdict::Already) => ("already", None, None),
            Outcome::Verdict(Verdict::Skipped) => ("skipped", None, None),
            Outcome::Verdict(Verdict::Parked { reason }) => ("parked", Some(reason), None),
            Outcome::Verdict(Verdict::Deferred { reason, after, .. }) => {
                ("deferred", Some(reason), Some(*after))
            }
        };
        // A line that is deferred has no document, and without a key it gets another id next time.
        let held = matches!(outcome, Outcome::Verdict(verdict) if verdict.is_final());
        let name = self.name.as_ref().filter(|_| held);
        let id = name.map(|name| name.id.text());
        let answer = Answer {
            id: id.as_ref().and_then(|id| std::str::from_utf8(id).ok()),
            index: name.map(|name| name.segment.index_on(name.day)),
            verdict,
            reason: reason.map(String::as_str),
            after_ms: after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
        };
        Some(serde_json::to_string(&answer).expect("an answer has string keys only"))
    }
}

#[cfg(test)]
mod tests;
