//! Making rows: what a new segment's row says, and when an old one no longer fits.

use std::io;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::metrics::Counters;
use super::origin::FileOrigin;
use super::stream::place;
use crate::config::SourceConfig;
use crate::protocol::Welcome;
use crate::record::{Day, END_MAX, Framing, Prefix, Row, SegmentId, escape_path};
use crate::source::files::fingerprint::{FINGERPRINT_BYTES, fingerprint, first_bytes, prefix};
use crate::source::files::tail::{Inode, Tail};
use crate::state::{Entry, Progress};

/// What the configuration and this host say about every new row of a source.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// The source.
    pub source: SourceConfig,
    /// This host's name.
    pub host: String,
    /// What is counted of the source.
    pub counters: Arc<Counters>,
}

/// Where a new row starts.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The run of bytes that it is a stretch of.
    pub run: Uuid,
    /// As [`crate::record::escape_path`] writes it.
    pub path: String,
    /// The file's inode; `None` for a spool.
    pub inode: Option<Inode>,
    /// As in [`crate::state::Place::born`]; 0 for a spool.
    pub born: u64,
    /// First byte.
    pub start: u64,
    /// UTC day of the last change.
    pub day: Day,
    /// How bytes become records.
    pub framing: Framing,
    /// The file's first bytes.
    pub first_bytes: Prefix,
}

impl Opening {
    /// In a file, as it is now.
    pub fn in_file(run: Uuid, file: &FileOrigin, start: u64) -> io::Result<Opening> {
        Ok(Opening {
            run,
            path: escape_path(file.tail.path()),
            inode: Some(file.tail.inode()),
            born: file.tail.born(),
            start,
            day: file.tail.day()?,
            framing: Framing::LINES,
            first_bytes: prefix(file.first()),
        })
    }
}

/// What is known of a file's row that opens behind these bytes: the last 64 before its start, or all
/// where there are fewer.
pub fn progress_at_start(row: &Row, tail: &Tail, before: &[u8]) -> Progress {
    let mut progress = Progress::at_start(row, tail.born());
    progress.place = place(tail);
    if row.start > 0 {
        progress.advance(fingerprint(row.start, before));
    }
    progress
}

/// The row of a file of which nothing is sent but what comes after now. An archive does not grow;
/// how long it is would be known only after it was unpacked.
pub fn passed_over(attributes: &Attributes, tail: &mut Tail, path: &Path) -> io::Result<Entry> {
    let stamp = tail.stamp()?;
    let compressed = tail.is_compressed();
    let start = if compressed { 0 } else { stamp.size.min(END_MAX) };
    let mut entry = attributes.open(
        Opening {
            run: Uuid::now_v7(),
            path: escape_path(path),
            inode: Some(tail.inode()),
            born: tail.born(),
            start,
            day: tail.day()?,
            framing: Framing::LINES,
            first_bytes: prefix(&first_bytes(tail)?),
        },
        None,
    );
    let from = start.saturating_sub(FINGERPRINT_BYTES as u64);
    let mut before = Vec::new();
    tail.append_at(from, (start - from) as usize, &mut before)?;
    let mut progress = progress_at_start(&entry.row, tail, &before);
    progress.place.path.clone_from(&entry.row.path);
    (progress.size, progress.rest) = (start, Some(stamp));
    entry.passed_over = Some(Box::new(progress));
    Ok(entry)
}

impl Attributes {
    /// A new row under a new segment id, completed where a receiver is known.
    pub fn open(&self, opening: Opening, welcome: Option<&Welcome>) -> Entry {
        let inode = opening.inode.unwrap_or(Inode { device: 0, inode: 0 });
        let source = &self.source;
        let row = Row {
            segment: SegmentId::mint(),
            source: source.name.clone(),
            path: opening.path,
            host: self.host.clone(),
            device: inode.device,
            inode: inode.inode,
            start: opening.start,
            end: None,
            cuts: Vec::new(),
            day: opening.day,
            type_name: source.type_name.clone(),
            tags: source.tags.clone(),
            labels: source.labels.clone(),
            framing: opening.framing,
            format: source.format,
            timezone: source.timezone.clone(),
            sender: None,
            rule: None,
            first_bytes: opening.first_bytes,
        };
        let mut entry = Entry {
            row,
            run: opening.run,
            born: opening.born,
            destination: None,
            kept_from: None,
            kept_short_of: None,
            passed_over: None,
            refused: false,
        };
        if let Some(welcome) = welcome {
            complete(&mut entry, welcome);
        }
        entry
    }

    /// Whether a row still says what a new one would say: otherwise it ends, and a new one opens.
    pub fn agree(&self, row: &Row) -> bool {
        let source = &self.source;
        row.source == source.name
            && row.host == self.host
            && row.type_name == source.type_name
            && row.tags == source.tags
            && row.labels == source.labels
            && row.format == source.format
            && row.timezone == source.timezone
    }

    /// A refused row anew from `start` on, under another id, with what the configuration says now.
    pub fn replaced(&self, refused: &Entry, start: u64) -> Entry {
        let source = &self.source;
        let mut entry = refused.renewed(start);
        entry.row.source.clone_from(&source.name);
        entry.row.host.clone_from(&self.host);
        entry.row.type_name.clone_from(&source.type_name);
        entry.row.tags.clone_from(&source.tags);
        entry.row.labels.clone_from(&source.labels);
        entry.row.format = source.format;
        entry.row.timezone.clone_from(&source.timezone);
        entry
    }
}

/// Fills in what only `welcome` can tell; what is there already stays. From now on a receiver may
/// accept the row.
pub fn complete(entry: &mut Entry, welcome: &Welcome) {
    entry.refused = false;
    entry.row.sender.get_or_insert(welcome.sender);
    entry.row.rule.get_or_insert_with(|| welcome.rule.clone());
    if entry.destination.is_none() {
        entry.destination = welcome.destination;
    }
}

/// Why new lines of a row would not lie beside its earlier ones at this receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Misfit {
    /// Its indices have other names.
    Rule,
    /// It writes into another store.
    Destination,
}

/// `None` where new lines of the row may go to this receiver.
pub fn misfit(entry: &Entry, welcome: &Welcome) -> Option<Misfit> {
    let same_rule = entry.row.rule.as_ref().is_none_or(|rule| *rule == welcome.rule);
    let same_destination = match (entry.destination, welcome.destination) {
        (Some(ours), Some(theirs)) => ours == theirs,
        _ => true,
    };
    match (same_rule, same_destination) {
        (true, true) => None,
        (false, _) => Some(Misfit::Rule),
        (true, false) => Some(Misfit::Destination),
    }
}
