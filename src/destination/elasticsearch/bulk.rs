//! The body of one bulk request, written straight into one buffer.
//!
//! Called by the batch builder for lines and by the dead letter for parked ones. Which bytes belong
//! to which document is remembered, so that a body can be cut in halves without being built again.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::record::DocumentId;

use super::answer::Expected;

/// Documents under construction.
#[derive(Debug)]
pub(super) struct Body {
    bytes: Vec<u8>,
    /// Where each document ends in `bytes`.
    ends: Vec<u32>,
    /// Neighbouring documents of one index, in order.
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Run {
    index: Arc<str>,
    first: usize,
    /// `{"create":{"_index":"…","_id":"`, the same for all of them.
    action: Vec<u8>,
}

impl Body {
    /// An empty body over buffers that are used again.
    pub(super) fn new(mut bytes: Vec<u8>, mut ends: Vec<u32>) -> Body {
        bytes.clear();
        ends.clear();
        Body { bytes, ends, runs: Vec::new() }
    }

    /// The documents that follow go to this index.
    pub(super) fn target(&mut self, index: &Arc<str>) {
        if self.runs.last().is_some_and(|run| run.index == *index) {
            return;
        }
        let mut action = br#"{"create":{"_index":"#.to_vec();
        write_string(&mut action, index);
        action.extend_from_slice(br#","_id":""#);
        self.runs.push(Run { index: Arc::clone(index), first: self.ends.len(), action });
    }

    /// Adds a document, which `write` appends as one line without its newline.
    ///
    /// # Panics
    ///
    /// Where no [`Body::target`] came before.
    #[inline]
    pub(super) fn create(&mut self, id: &DocumentId, write: impl FnOnce(&mut Vec<u8>)) {
        let run = self.runs.last().expect("an index is named before its documents");
        self.bytes.extend_from_slice(&run.action);
        self.bytes.extend_from_slice(&id.text());
        self.bytes.extend_from_slice(b"\"}}\n");
        write(&mut self.bytes);
        self.bytes.push(b'\n');
        let end = u32::try_from(self.bytes.len());
        self.ends.push(end.expect("a body is one document over its limit of some MB at most"));
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Documents so far.
    pub(super) fn documents(&self) -> usize {
        self.ends.len()
    }

    /// No more documents: the body can be sent.
    pub(super) fn seal(self) -> Sealed {
        Sealed { bytes: Bytes::from(self.bytes), ends: self.ends, runs: self.runs }
    }
}

/// A body that is complete.
#[derive(Debug)]
pub(super) struct Sealed {
    bytes: Bytes,
    ends: Vec<u32>,
    runs: Vec<Run>,
}

impl Sealed {
    /// How many documents it has.
    pub(super) fn documents(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of some of its documents; nothing is copied.
    pub(super) fn slice(&self, documents: Range<usize>) -> Bytes {
        let from = match documents.start {
            0 => 0,
            first => self.ends[first - 1] as usize,
        };
        let to = match documents.end {
            0 => 0,
            end => self.ends[end - 1] as usize,
        };
        self.bytes.slice(from..to)
    }

    /// Which answers the documents of a range should get.
    pub(super) fn expected(&self, documents: Range<usize>) -> Vec<Expected<'_>> {
        let ends = self.runs[1..].iter().map(|run| run.first).chain([self.ends.len()]);
        self.runs
            .iter()
            .zip(ends)
            .filter_map(|(run, end)| {
                let from = run.first.max(documents.start);
                let count = end.min(documents.end).saturating_sub(from);
                (count > 0).then_some(Expected { index: &run.index, count })
            })
            .collect()
    }

    /// Gives the buffers back for the next body. Where the HTTP client has not let go of the bytes
    /// yet, a fresh buffer is cheaper than waiting.
    pub(super) fn recycle(mut self) -> (Vec<u8>, Vec<u32>) {
        if !self.bytes.is_unique() {
            return (Vec::new(), self.ends);
        }
        // Emptied first, so that nothing is moved on the way back.
        self.bytes.truncate(0);
        (Vec::from(self.bytes), self.ends)
    }
}

/// Appends a JSON string with its quotes.
pub(super) fn write_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("a Vec takes all bytes, and a string is always JSON");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(indices: &[&str]) -> Sealed {
        let mut body = Body::new(Vec::new(), Vec::new());
        for (number, index) in indices.iter().enumerate() {
            body.target(&Arc::from(*index));
            body.create(&DocumentId([number as u8; 24]), |out| {
                out.extend_from_slice(format!(r#"{{"n":{number}}}"#).as_bytes());
            });
        }
        body.seal()
    }

    #[test]
    fn a_body_is_action_and_document_lines() {
        let id = DocumentId([0; 24]);
        let expected =
            format!("{{\"create\":{{\"_index\":\"a\",\"_id\":\"{id}\"}}}}\n{{\"n\":0}}\n");
        assert_eq!(body(&["a"]).slice(0..1), expected.as_bytes());
    }

    #[test]
    fn slices_follow_documents_and_indices() {
        let body = body(&["a", "a", "b", "a"]);
        let whole = [body.slice(0..2), body.slice(2..4)].concat();
        assert_eq!(body.slice(0..4), whole);
        let expected = |range| {
            let runs = body.expected(range);
            runs.iter().map(|run| (run.index, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(expected(0..4), [("a", 2), ("b", 1), ("a", 1)]);
        assert_eq!(expected(1..3), [("a", 1), ("b", 1)]);
        assert_eq!(expected(3..4), [("a", 1)]);
    }

    #[test]
    fn buffers_come_back_once_nobody_holds_the_bytes() {
        let sealed = body(&["a"]);
        let held = sealed.slice(0..1);
        assert_eq!(sealed.recycle().0.capacity(), 0);
        drop(held);
        let mut bytes = Vec::with_capacity(1 << 20);
        bytes.push(b'x');
        let mut body = Body::new(bytes, Vec::new());
        body.target(&Arc::from("a"));
        body.create(&DocumentId([0; 24]), |_| {});
        let (bytes, _) = body.seal().recycle();
        assert_eq!((bytes.len(), bytes.capacity()), (0, 1 << 20));
    }
}
