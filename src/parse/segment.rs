//! What all documents of a segment share, prepared once.

use crate::record::{IdPrefix, Record, Row, SenderId};

/// A segment as the receiver knows it: its row, and what follows from it for every document.
#[derive(Debug)]
pub struct Segment {
    /// As it came with `open`.
    pub row: Row,
    /// The authenticated sender.
    pub sender: SenderId,
    /// The sender's name in the tokens file.
    pub sender_name: String,
    /// Index of all its documents.
    pub index: String,
    /// First part of all its document ids.
    pub ids: IdPrefix,
}

impl Segment {
    /// Prepares a segment of an authenticated sender; `index` is what the row's rule makes of it.
    pub fn new(row: Row, sender: SenderId, sender_name: String, index: String) -> Segment {
        let ids = IdPrefix::new(sender, row.segment);
        Segment { row, sender, sender_name, index, ids }
    }

    /// Appends the document of one record to `out`: one JSON object without a newline.
    pub fn write_document(
        &self,
        _record: &Record<'_>,
        _times: &FrameTimes,
        _form: Form,
        _out: &mut Vec<u8>,
    ) {
    }
}

/// The two clocks of a frame, in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct FrameTimes {
    /// When the sender read it: `@timestamp` of a line that has none of its own.
    pub read_at: u64,
    /// When the receiver wrote it: `event.ingested`.
    pub ingested_at: u64,
}

/// How much of a line becomes fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Parsed, all fields.
    Full,
    /// After the destination refused the full form: the line as one string, and a tag.
    Reduced,
}
