//! From frames to one bulk body, and from its answers back to receipts.
//!
//! Used by a worker, which does the waiting; nothing here does I/O. Every byte of a frame gets
//! exactly one final or deferred verdict, however often its lines are tried.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::destination::Frame;
use crate::parse::FrameTimes;
use crate::protocol::{Run, Verdict};
use crate::record::{DocumentId, Record, RecordKind};

use super::answer::Answers;
use super::bulk::{Body, Sealed};
use super::target::Target;
use super::verdict::{Attempt, Fate, Pause};

/// A frame that lines under way belong to.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) frame: Frame,
    pub(super) target: Arc<Target>,
}

/// Neighbouring records of one frame that went through the same.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    pub(super) hold: Arc<Hold>,
    /// First byte, counted from the frame's.
    pub(super) from: u32,
    /// One past the last byte.
    pub(super) to: u32,
    /// The first record goes on from one that was cut.
    pub(super) continues: bool,
    pub(super) attempt: Attempt,
}

impl Stretch {
    /// All of a frame.
    pub(super) fn whole(frame: Frame, target: Arc<Target>) -> Stretch {
        let to = u32::try_from(frame.records.len());
        let to = to.expect("a frame has at most FRAME_BYTES_MAX bytes");
        let continues = frame.continues;
        let hold = Arc::new(Hold { frame, target });
        Stretch { hold, from: 0, to, continues, attempt: Attempt::FIRST }
    }

    /// Its records.
    pub(super) fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let frame = &self.hold.frame;
        let bytes = &frame.records[self.from as usize..self.to as usize];
        let offset = self.offset(self.from);
        frame.segment.row.framing.records(bytes, offset, self.continues)
    }

    /// The id of its first record's document.
    pub(super) fn first_id(&self) -> Option<DocumentId> {
        let ids = &self.hold.frame.segment.ids;
        self.records().next().map(|record| ids.id(record.offset, record.payload))
    }

    /// Its bytes.
    pub(super) fn len(&self) -> usize {
        (self.to - self.from) as usize
    }

    /// Answers all of it.
    pub(super) fn answer(&self, verdict: Verdict) {
        let lines = self.records().count() as u64;
        self.answer_counted(lines, verdict);
    }

    /// Sends all of it back to its sender.
    pub(super) fn defer(&self, reason: &str, after: Duration) {
        self.answer(Verdict::Deferred { reason: reason.to_owned(), after });
    }

    fn answer_counted(&self, lines: u64, verdict: Verdict) {
        let (from, to) = (self.offset(self.from), self.offset(self.to));
        self.hold.frame.reply.send_one(from, to, lines, verdict);
    }

    /// Where a byte of the frame lies in the segment.
    fn offset(&self, at: u32) -> u64 {
        self.hold.frame.offset + u64::from(at)
    }
}

/// Room for one bulk request, used again for the next.
#[derive(Debug, Default)]
pub(super) struct Room {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    entries: Vec<Entry>,
}

/// A bulk request under construction.
#[derive(Debug)]
pub(super) struct Batch {
    body: Body,
    bytes_max: usize,
    parts: Vec<Part>,
    entries: Vec<Entry>,
}

/// One stretch of a batch.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) stretch: Stretch,
    /// Documents of its index stored before the request.
    pub(super) stored_before: u64,
    entries: Range<usize>,
    /// Its first document in the body.
    first_document: usize,
    documents: usize,
}

impl Part {
    /// Which documents of the batch are its.
    pub(super) fn documents(&self) -> Range<usize> {
        self.first_document..self.first_document + self.documents
    }
}

/// One record, or neighbouring ones that are skipped.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// One past its last byte, counted from the frame's first.
    to: u32,
    lines: u32,
    kind: RecordKind,
    continues: bool,
}

impl Batch {
    /// An empty one, which is full once its body has so many bytes.
    pub(super) fn new(mut room: Room, bytes_max: usize) -> Batch {
        room.entries.clear();
        // Doubling would hold up to twice the memory, and copy it all.
        let spare = bytes_max / 16;
        room.bytes.clear();
        if room.bytes.capacity() > 2 * (bytes_max + spare) {
            // One huge document must not hold memory for ever.
            room.bytes = Vec::new();
        }
        room.bytes.reserve(bytes_max + spare);
        let body = Body::new(room.bytes, room.ends);
        Batch { body, bytes_max, parts: Vec::new(), entries: room.entries }
    }

    /// Whether more fits.
    pub(super) fn has_room(&self) -> bool {
        self.body.len() < self.bytes_max
    }

    /// Writes the documents of a stretch; gives back the part that did not fit. The first record
    /// always fits into an empty batch.
    pub(super) fn add(&mut self, mut stretch: Stretch, ingested_at: u64) -> Option<Stretch> {
        let hold = Arc::clone(&stretch.hold);
        let segment = &hold.frame.segment;
        let times = FrameTimes::new(hold.frame.read_at, ingested_at);
        let form = stretch.attempt.form;
        let (first_entry, first_document) = (self.entries.len(), self.body.documents());
        self.body.target(&hold.target.name);
        let mut rest = None;
        let mut at = stretch.from;
        for record in stretch.records() {
            if !self.has_room() {
                rest = Some((at, record.continues));
                break;
            }
            at += record.length as u32;
            if record.kind == RecordKind::Line {
                let id = segment.ids.id(record.offset, record.payload);
                self.body.create(&id, |out| segment.write_document(&record, &times, form, out));
            }
            self.note(&record, at, first_entry);
        }
        let rest = rest.map(|(from, continues)| Stretch { from, continues, ..stretch.clone() });
        stretch.to = at;
        if self.entries.len() > first_entry {
            self.parts.push(Part {
                stored_before: hold.target.view().stored,
                stretch,
                entries: first_entry..self.entries.len(),
                first_document,
                documents: self.body.documents() - first_document,
            });
        }
        rest
    }

    /// No more: the body to send, and what is needed to understand its answers.
    pub(super) fn seal(self) -> (Sealed, Sent) {
        (self.body.seal(), Sent { parts: self.parts, entries: self.entries })
    }

    fn note(&mut self, record: &Record<'_>, to: u32, first_entry: usize) {
        if record.kind == RecordKind::Skipped
            && self.entries.len() > first_entry
            && let Some(last) = self.entries.last_mut()
            && last.kind == RecordKind::Skipped
        {
            last.to = to;
            last.lines += 1;
            return;
        }
        let entry = Entry { to, lines: 1, kind: record.kind, continues: record.continues };
        self.entries.push(entry);
    }
}

/// The records of a batch that was sent.
#[derive(Debug)]
pub(super) struct Sent {
    parts: Vec<Part>,
    entries: Vec<Entry>,
}

/// Lines that have no verdict yet, and what comes next for them.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Next {
    /// Another attempt.
    Again(Attempt, Pause),
    /// The dead letter.
    Park(Arc<str>),
}

/// What the worker knows beyond the batch.
pub(super) trait Judge {
    /// What the answer to a document means; `single` is the document's record alone.
    fn fate(&mut self, part: &Part, document: usize, single: impl FnOnce() -> Stretch) -> Fate;

    /// When a sender should try again.
    fn delay(&mut self, part: &Part, fate: &Fate) -> Duration;
}

impl Sent {
    /// The stretches that were sent.
    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Sends receipts for all that has a verdict, and returns the rest in order.
    pub(super) fn settle(&self, answers: &Answers, judge: &mut impl Judge) -> Vec<(Stretch, Next)> {
        let mut open = Vec::new();
        for part in &self.parts {
            let plain = part.documents == part.entries.len();
            if plain && matches!(answers, Answers::AllStored(_)) {
                part.stretch.answer_counted(part.documents as u64, Verdict::Stored);
            } else {
                self.settle_part(part, judge, &mut open);
            }
        }
        open
    }

    fn settle_part(&self, part: &Part, judge: &mut impl Judge, open: &mut Vec<(Stretch, Next)>) {
        let mut sorter = Sorter::new(&part.stretch, open);
        let mut document = part.first_document;
        let mut from = part.stretch.from;
        for entry in &self.entries[part.entries.clone()] {
            let fate = match entry.kind {
                RecordKind::Skipped => Fate::Skipped,
                RecordKind::Corrupt => Fate::Park(Arc::from("corrupt spool record")),
                RecordKind::Line => {
                    document += 1;
                    judge.fate(part, document - 1, || {
                        let continues = entry.continues;
                        Stretch { from, to: entry.to, continues, ..part.stretch.clone() }
                    })
                }
            };
            match fate {
                Fate::Stored => sorter.close(entry, Verdict::Stored),
                Fate::Already => sorter.close(entry, Verdict::Already),
                Fate::Skipped => sorter.close(entry, Verdict::Skipped),
                Fate::Again(attempt, pause) => sorter.keep(entry, Next::Again(attempt, pause)),
                Fate::Park(reason) => sorter.keep(entry, Next::Park(reason)),
                Fate::IndexTrouble(ref reason) | Fate::Deferred(ref reason) => {
                    let after = judge.delay(part, &fate);
                    sorter.close(entry, Verdict::Deferred { reason: reason.to_string(), after });
                }
            }
            from = entry.to;
        }
        sorter.finish();
    }

    /// Gives the buffers back.
    pub(super) fn recycle(self, body: Sealed) -> Room {
        let (bytes, ends) = body.recycle();
        Room { bytes, ends, entries: self.entries }
    }
}

/// Joins neighbouring records: closed ones to receipts, open ones to stretches.
struct Sorter<'a> {
    stretch: &'a Stretch,
    /// Where the next record starts.
    at: u32,
    /// Where the runs start.
    closed_from: u32,
    runs: Vec<Run>,
    open: &'a mut Vec<(Stretch, Next)>,
}

impl<'a> Sorter<'a> {
    fn new(stretch: &'a Stretch, open: &'a mut Vec<(Stretch, Next)>) -> Sorter<'a> {
        let from = stretch.from;
        Sorter { stretch, at: from, closed_from: from, runs: Vec::new(), open }
    }

    fn close(&mut self, entry: &Entry, verdict: Verdict) {
        let (to, lines) = (self.stretch.offset(entry.to), u64::from(entry.lines));
        match self.runs.last_mut() {
            Some(last) if last.verdict == verdict => {
                last.to = to;
                last.lines += lines;
            }
            _ => self.runs.push(Run { to, lines, verdict }),
        }
        self.at = entry.to;
    }

    fn keep(&mut self, entry: &Entry, next: Next) {
        self.send();
        match self.open.last_mut() {
            Some((last, same))
                if *same == next
                    && last.to == self.at
                    && Arc::ptr_eq(&last.hold, &self.stretch.hold) =>
            {
                last.to = entry.to;
            }
            _ => {
                let (from, to, continues) = (self.at, entry.to, entry.continues);
                let stretch = Stretch { from, to, continues, ..self.stretch.clone() };
                self.open.push((stretch, next));
            }
        }
        self.at = entry.to;
        self.closed_from = entry.to;
    }

    fn send(&mut self) {
        let from = self.stretch.offset(self.closed_from);
        self.stretch.hold.frame.reply.send(from, self.runs.drain(..));
    }

    fn finish(mut self) {
        self.send();
    }
}
