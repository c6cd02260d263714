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
use crate::record::{Day, DocumentId, Framing, Record, RecordKind};

use super::answer::Answers;
use super::bulk::{Body, Sealed};
use super::target::{Target, Targets};
use super::verdict::{Attempt, Fate, Pause};

/// Neighbouring records of one frame that went through the same.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    pub(super) frame: Arc<Frame>,
    /// The index of its first record; of all, once [`Stretch::split`] was called.
    pub(super) target: Arc<Target>,
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
    pub(super) fn whole(frame: Frame, targets: &Targets) -> Stretch {
        let to = u32::try_from(frame.records.len());
        let to = to.expect("a frame has at most FRAME_BYTES_MAX bytes");
        let continues = frame.continues;
        let target = targets.get(&frame.segment.index);
        let frame = Arc::new(frame);
        let attempt = Attempt::FIRST;
        let stretch = Stretch { frame, target, from: 0, to, continues, attempt };
        stretch.aimed(targets)
    }

    /// Cuts it before its first record of another index and gives back the rest. Only records with
    /// keys can differ in that, and only the spool has keys.
    pub(super) fn split(&mut self, targets: &Targets) -> Option<Stretch> {
        if !self.may_have_keys() {
            return None;
        }
        let mut at = self.from;
        let mut day = None;
        let mut rest = None;
        for record in self.records() {
            let its_day = self.day_of(&record);
            if *day.get_or_insert(its_day) != its_day {
                rest = Some(Stretch { from: at, continues: record.continues, ..self.clone() });
                break;
            }
            at += record.length as u32;
        }
        self.to = at;
        rest.map(|rest| rest.aimed(targets))
    }

    /// With the index of its first record as target.
    fn aimed(mut self, targets: &Targets) -> Stretch {
        if self.may_have_keys() {
            let day = self.records().next().map(|record| self.day_of(&record));
            let day = day.unwrap_or(self.frame.segment.row.day);
            self.target = targets.get(&self.frame.segment.index_on(day));
        }
        self
    }

    /// What is parked for its day has no index; it goes along with those of the row.
    fn day_of(&self, record: &Record<'_>) -> Day {
        self.frame.day_of(record).unwrap_or(self.frame.segment.row.day)
    }

    fn may_have_keys(&self) -> bool {
        matches!(self.frame.segment.row.framing, Framing::Spool { .. })
    }

    /// Its records.
    pub(super) fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let frame = &self.frame;
        let bytes = &frame.records[self.from as usize..self.to as usize];
        let offset = self.offset(self.from);
        frame.segment.row.framing.records(bytes, offset, self.continues)
    }

    /// The id of its first record's document.
    pub(super) fn first_id(&self) -> Option<DocumentId> {
        self.records().next().map(|record| self.frame.segment.ids.of(&record))
    }

    /// Why its first record, whose day is not accepted, is parked.
    fn outside_days(&self) -> Arc<str> {
        let first = self.records().next().and_then(|record| self.frame.day_of(&record).err());
        Arc::from(first.map(|error| error.to_string()).unwrap_or_default())
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

    /// Sends all of it back to its sender, since there is no room or no answer for now.
    pub(super) fn defer(&self, reason: &str, after: Duration) {
        self.answer(Verdict::Deferred { reason: reason.to_owned(), after, index: None });
    }

    /// Sends all of it back to its sender, since this index refuses it.
    pub(super) fn defer_for(&self, index: &Target, reason: &str, after: Duration) {
        let index = Some(index.name.to_string());
        self.answer(Verdict::Deferred { reason: reason.to_owned(), after, index });
    }

    fn answer_counted(&self, lines: u64, verdict: Verdict) {
        let (from, to) = (self.offset(self.from), self.offset(self.to));
        self.frame.reply.send_one(from, to, lines, verdict);
    }

    /// Where a byte of the frame lies in the segment.
    fn offset(&self, at: u32) -> u64 {
        self.frame.offset + u64::from(at)
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
    kind: EntryKind,
    continues: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum EntryKind {
    Document,
    Skipped,
    /// Its checksum in the spool is wrong.
    Corrupt,
    /// Its key's time is on a day that is not accepted.
    OutsideDays,
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
        let frame = Arc::clone(&stretch.frame);
        let segment = &frame.segment;
        let times = FrameTimes::new(frame.read_at, ingested_at);
        let form = stretch.attempt.form;
        let (first_entry, first_document) = (self.entries.len(), self.body.documents());
        self.body.target(&stretch.target.name);
        let mut rest = None;
        let mut at = stretch.from;
        for record in stretch.records() {
            if !self.has_room() {
                rest = Some((at, record.continues));
                break;
            }
            at += record.length as u32;
            let kind = match record.kind {
                RecordKind::Skipped => EntryKind::Skipped,
                RecordKind::Corrupt => EntryKind::Corrupt,
                RecordKind::Line if frame.day_of(&record).is_err() => EntryKind::OutsideDays,
                RecordKind::Line => {
                    let id = segment.ids.of(&record);
                    self.body.create(&id, |out| segment.write_document(&record, &times, form, out));
                    EntryKind::Document
                }
            };
            self.note(kind, record.continues, at, first_entry);
        }
        let rest = rest.map(|(from, continues)| Stretch { from, continues, ..stretch.clone() });
        stretch.to = at;
        if self.entries.len() > first_entry {
            self.parts.push(Part {
                stored_before: stretch.target.view().stored,
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

    fn note(&mut self, kind: EntryKind, continues: bool, to: u32, first_entry: usize) {
        if kind == EntryKind::Skipped
            && self.entries.len() > first_entry
            && let Some(last) = self.entries.last_mut()
            && last.kind == EntryKind::Skipped
        {
            last.to = to;
            last.lines += 1;
            return;
        }
        self.entries.push(Entry { to, lines: 1, kind, continues });
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
                EntryKind::Skipped => Fate::Skipped,
                EntryKind::Corrupt => Fate::Park(Arc::from("corrupt spool record")),
                EntryKind::OutsideDays => {
                    let stretch = Stretch { from, to: entry.to, ..part.stretch.clone() };
                    Fate::Park(stretch.outside_days())
                }
                EntryKind::Document => {
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
                Fate::IndexTrouble(ref reason)
                | Fate::Deferred(ref reason)
                | Fate::Busy(ref reason) => {
                    let after = judge.delay(part, &fate);
                    let waits = matches!(fate, Fate::Busy(_));
                    let index = (!waits).then(|| part.stretch.target.name.to_string());
                    let reason = reason.to_string();
                    sorter.close(entry, Verdict::Deferred { reason, after, index });
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
                    && Arc::ptr_eq(&last.frame, &self.stretch.frame)
                    && Arc::ptr_eq(&last.target, &self.stretch.target) =>
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
        self.stretch.frame.reply.send(from, self.runs.drain(..));
    }

    fn finish(mut self) {
        self.send();
    }
}
