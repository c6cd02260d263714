//! Making rows: what a new segment's row says, and when an old one no longer fits.

use uuid::Uuid;

use crate::config::SourceConfig;
use crate::protocol::Welcome;
use crate::record::{Day, Framing, Prefix, Row, SegmentId};
use crate::source::files::tail::Inode;
use crate::state::Entry;

/// What the configuration and this host say about every new row of a source.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// The source.
    pub source: SourceConfig,
    /// This host's name.
    pub host: String,
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
    /// First byte.
    pub start: u64,
    /// UTC day of the last change.
    pub day: Day,
    /// How bytes become records.
    pub framing: Framing,
    /// The file's first bytes.
    pub first_bytes: Prefix,
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
            destination: None,
            kept_from: None,
            kept_short_of: None,
            passed_over: None,
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
}

/// Fills in what only `welcome` can tell; what is there already stays.
pub fn complete(entry: &mut Entry, welcome: &Welcome) {
    entry.row.sender.get_or_insert(welcome.sender);
    entry.row.rule.get_or_insert_with(|| welcome.rule.clone());
    if entry.destination.is_none() {
        entry.destination = welcome.destination;
    }
}

/// Whether new lines under this row would go where this receiver puts new lines.
pub fn suits(entry: &Entry, welcome: &Welcome) -> bool {
    let same_rule = entry.row.rule.as_ref().is_none_or(|rule| *rule == welcome.rule);
    let same_destination = match (entry.destination, welcome.destination) {
        (Some(ours), Some(theirs)) => ours == theirs,
        _ => true,
    };
    same_rule && same_destination
}
