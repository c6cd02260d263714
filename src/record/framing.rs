//! How a run of bytes becomes records: a pure function of the bytes, never of when they came.
//!
//! Sender and receiver run this same code; if a boundary depended on timing or configuration, a
//! line sent again would get another offset and so another id (I3).

use memchr::{memchr, memrchr};
use serde::{Deserialize, Serialize};

/// The longest payload of one record, in bytes; a longer line is cut at multiples of this.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// Bytes before the key of a spool record: length u32, CRC32C u32, time u64, key length u16.
pub const SPOOL_HEADER_BYTES: usize = 18;

/// The longest key of a spool record, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// A segment's kind of framing; it stands in the row and never changes there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Framing {
    /// Records end at their newline.
    Lines {
        /// Version of these rules: 1.
        version: u32,
        /// Longest payload in bytes before a cut.
        limit: u32,
    },
    /// Records as the spool stores them, little-endian: length u32 of the payload, CRC32C u32 of
    /// all that follows it, time u64 (milliseconds since 1970), key length u16, key, payload.
    Spool {
        /// Version of these rules: 1.
        version: u32,
    },
}

impl Framing {
    /// Lines by today's rules.
    pub const LINES: Framing = Framing::Lines { version: 1, limit: RECORD_BYTES_MAX as u32 };
    /// Spool records by today's rules.
    pub const SPOOL: Framing = Framing::Spool { version: 1 };

    /// Whether this build knows these rules; a receiver refuses a segment of unknown ones.
    pub fn is_known(self) -> bool {
        match self {
            Framing::Lines { version, limit } => {
                version == 1 && (1..=RECORD_BYTES_MAX as u32).contains(&limit)
            }
            Framing::Spool { version } => version == 1,
        }
    }

    /// How many of `bytes`, which start at a record's start, are whole records.
    pub fn whole(self, bytes: &[u8]) -> Whole {
        match self {
            Framing::Lines { limit, .. } => whole_lines(bytes, limit as usize),
            Framing::Spool { .. } => whole_spool_records(bytes),
        }
    }

    /// Splits a frame into its records. `offset` is that of `bytes[0]` in the segment;
    /// `continues` says that the first record goes on from one that was cut.
    pub fn records(self, bytes: &[u8], offset: u64, continues: bool) -> Records<'_> {
        Records { framing: self, bytes, at: 0, offset, continues }
    }
}

/// What [`Framing::whole`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whole {
    /// The first so many bytes are whole records; more than 0.
    Bytes(usize),
    /// Not one whole record: at least so many bytes are needed to know more.
    Needs(usize),
    /// A spool record whose checksum or length is wrong starts here.
    Corrupt,
}

fn whole_lines(bytes: &[u8], limit: usize) -> Whole {
    if let Some(newline) = memrchr(b'\n', bytes) {
        return Whole::Bytes(newline + 1);
    }
    match nul_run(bytes) {
        0 if bytes.len() > limit => Whole::Bytes(limit),
        0 => Whole::Needs(limit + 1),
        length => Whole::Bytes(length),
    }
}

fn whole_spool_records(bytes: &[u8]) -> Whole {
    let mut at = 0;
    loop {
        match spool_record(&bytes[at..]) {
            SpoolRecord::Whole { length, .. } => at += length,
            _ if at > 0 => return Whole::Bytes(at),
            SpoolRecord::Needs(length) => return Whole::Needs(length),
            SpoolRecord::Corrupt => return Whole::Corrupt,
        }
    }
}

fn nul_run(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len())
}

/// What kind of record it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordKind {
    /// Becomes a document.
    Line,
    /// An empty line or a run of NUL bytes: `skipped`.
    Skipped,
    /// A spool record whose checksum is wrong: `parked`, so that its bytes can be looked at.
    Corrupt,
}

/// One record of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// Offset of the record's first byte in its segment.
    pub offset: u64,
    /// How many bytes it takes there, newline or header included.
    pub length: usize,
    /// Its bytes: without LF, with CR.
    pub payload: &'a [u8],
    /// What it is.
    pub kind: RecordKind,
    /// It goes on from a record that was cut.
    pub continues: bool,
    /// It was cut: its line goes on in the next record.
    pub cut: bool,
    /// Spool only: when it arrived, or the time of origin that came with the key, in milliseconds.
    pub time: Option<u64>,
    /// Spool only: the key that makes a repeat the same document; empty where there is none.
    pub key: &'a [u8],
}

/// Iterates over a frame's records.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    framing: Framing,
    bytes: &'a [u8],
    at: usize,
    offset: u64,
    continues: bool,
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    #[inline]
    fn next(&mut self) -> Option<Record<'a>> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return None;
        }
        let record = match self.framing {
            Framing::Lines { limit, .. } => self.line(rest, limit as usize),
            Framing::Spool { .. } => self.spooled(rest),
        };
        self.at += record.length;
        self.continues = record.cut;
        Some(record)
    }
}

impl<'a> Records<'a> {
    #[inline]
    fn line(&self, rest: &'a [u8], limit: usize) -> Record<'a> {
        let offset = self.offset + self.at as u64;
        if rest[0] == 0 {
            let length = nul_run(rest);
            let payload = &rest[..length];
            return Record { length, kind: RecordKind::Skipped, ..plain(offset, payload) };
        }
        let searched = &rest[..rest.len().min(limit + 1)];
        match memchr(b'\n', searched) {
            Some(newline) => {
                let payload = &rest[..newline];
                // The end of a line that was cut right before its newline is no line of its own.
                let empty = matches!(payload, b"" | b"\r");
                let kind = if empty { RecordKind::Skipped } else { RecordKind::Line };
                let length = newline + 1;
                Record { length, kind, continues: self.continues, ..plain(offset, payload) }
            }
            None => {
                let payload = &rest[..rest.len().min(limit)];
                Record { cut: true, continues: self.continues, ..plain(offset, payload) }
            }
        }
    }

    fn spooled(&self, rest: &'a [u8]) -> Record<'a> {
        let offset = self.offset + self.at as u64;
        match spool_record(rest) {
            SpoolRecord::Whole { length, time, key, payload } => {
                let empty = matches!(payload, b"" | b"\r");
                let kind = if empty { RecordKind::Skipped } else { RecordKind::Line };
                Record { length, kind, time: Some(time), key, ..plain(offset, payload) }
            }
            // A frame never cuts a record: what cannot be read is one record to the frame's end.
            SpoolRecord::Needs(_) | SpoolRecord::Corrupt => {
                Record { kind: RecordKind::Corrupt, ..plain(offset, rest) }
            }
        }
    }
}

fn plain(offset: u64, payload: &[u8]) -> Record<'_> {
    Record {
        offset,
        length: payload.len(),
        payload,
        kind: RecordKind::Line,
        continues: false,
        cut: false,
        time: None,
        key: b"",
    }
}

/// Appends one spool record to `out`.
///
/// # Panics
///
/// Where the payload is longer than [`RECORD_BYTES_MAX`] or the key than [`KEY_BYTES_MAX`]:
/// whoever spools cuts first.
pub fn encode_spool_record(out: &mut Vec<u8>, time_ms: u64, key: &[u8], payload: &[u8]) {
    assert!(payload.len() <= RECORD_BYTES_MAX && key.len() <= KEY_BYTES_MAX);
    let start = out.len();
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&time_ms.to_le_bytes());
    out.extend_from_slice(&(key.len() as u16).to_le_bytes());
    out.extend_from_slice(key);
    out.extend_from_slice(payload);
    let checksum = spool_checksum(&out[start..]);
    out[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
}

/// What [`spool_record`] found at the start of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpoolRecord<'a> {
    /// A whole record with a right checksum.
    Whole {
        /// Bytes of the whole record.
        length: usize,
        /// Milliseconds since 1970.
        time: u64,
        /// Empty where there is none.
        key: &'a [u8],
        /// The record's bytes.
        payload: &'a [u8],
    },
    /// So many bytes are needed.
    Needs(usize),
    /// A length over the limits or a wrong checksum.
    Corrupt,
}

/// Reads the spool record at the start of `bytes`.
pub fn spool_record(bytes: &[u8]) -> SpoolRecord<'_> {
    let Some((header, _)) = bytes.split_first_chunk::<SPOOL_HEADER_BYTES>() else {
        return SpoolRecord::Needs(SPOOL_HEADER_BYTES);
    };
    let payload_length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let checksum = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let key_length = usize::from(u16::from_le_bytes([header[16], header[17]]));
    if payload_length > RECORD_BYTES_MAX || key_length > KEY_BYTES_MAX {
        return SpoolRecord::Corrupt;
    }
    let length = SPOOL_HEADER_BYTES + key_length + payload_length;
    let Some(record) = bytes.get(..length) else {
        return SpoolRecord::Needs(length);
    };
    if spool_checksum(record) != checksum {
        return SpoolRecord::Corrupt;
    }
    let mut time = [0; 8];
    time.copy_from_slice(&header[8..16]);
    let (key, payload) = record[SPOOL_HEADER_BYTES..].split_at(key_length);
    SpoolRecord::Whole { length, time: u64::from_le_bytes(time), key, payload }
}

/// CRC32C over the length and all that follows the checksum, so that a flipped length shows too.
fn spool_checksum(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[..4]), &record[8..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: Framing = Framing::Lines { version: 1, limit: 4 };

    fn split(framing: Framing, bytes: &[u8]) -> Vec<(u64, &[u8], RecordKind, bool, bool)> {
        framing
            .records(bytes, 0, false)
            .map(|r| (r.offset, r.payload, r.kind, r.continues, r.cut))
            .collect()
    }

    #[test]
    fn lines_keep_cr_and_skip_what_is_empty() {
        use RecordKind::{Line, Skipped};
        assert_eq!(
            split(Framing::LINES, b"a\r\n\n\r\n\0\0b\nend"),
            [
                (0, &b"a\r"[..], Line, false, false),
                (3, b"", Skipped, false, false),
                (4, b"\r", Skipped, false, false),
                (6, b"\0\0", Skipped, false, false),
                (8, b"b", Line, false, false),
                (10, b"end", Line, false, true),
            ]
        );
    }

    #[test]
    fn long_lines_are_cut_at_multiples_of_the_limit() {
        use RecordKind::Line;
        assert_eq!(
            split(SMALL, b"abcdefghij\nabcd\n"),
            [
                (0, &b"abcd"[..], Line, false, true),
                (4, b"efgh", Line, true, true),
                (8, b"ij", Line, true, false),
                (11, b"abcd", Line, false, false),
            ]
        );
    }

    #[test]
    fn whole_says_what_a_frame_may_hold() {
        assert_eq!(SMALL.whole(b"ab\ncd"), Whole::Bytes(3));
        assert_eq!(SMALL.whole(b"ab"), Whole::Needs(5));
        assert_eq!(SMALL.whole(b"abcde"), Whole::Bytes(4));
        assert_eq!(SMALL.whole(b"\0\0\0\0\0\0a"), Whole::Bytes(6));
    }

    #[test]
    fn a_flipped_bit_in_the_spool_shows() {
        let mut bytes = Vec::new();
        encode_spool_record(&mut bytes, 5, b"key", b"payload");
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(
                !matches!(spool_record(&broken), SpoolRecord::Whole { .. }),
                "flipped byte {at}"
            );
        }
        assert_eq!(Framing::SPOOL.whole(&bytes), Whole::Bytes(bytes.len()));
        assert_eq!(Framing::SPOOL.whole(&bytes[..20]), Whole::Needs(bytes.len()));
    }

    proptest! {
        /// Wherever a frame ends at a whole record, the records are those of one long run (I3).
        #[test]
        fn records_do_not_depend_on_frames(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(0), Just(b'x'), Just(b'\r')], 1..200),
            chunk in 5_usize..40,
        ) {
            let whole: Vec<_> = split(SMALL, &bytes)
                .into_iter().map(|(offset, payload, kind, ..)| (offset, payload.to_vec(), kind)).collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < bytes.len() {
                let end = (at + chunk).min(bytes.len());
                let length = match SMALL.whole(&bytes[at..end]) {
                    Whole::Bytes(length) => length,
                    _ => end - at,
                };
                for record in SMALL.records(&bytes[at..at + length], at as u64, false) {
                    pieces.push((record.offset, record.payload.to_vec(), record.kind));
                }
                at += length;
            }
            // A NUL run may be met in two pieces; both are skipped, so no id depends on it.
            let lines = |all: Vec<(u64, Vec<u8>, RecordKind)>| -> Vec<_> {
                all.into_iter().filter(|(.., kind)| *kind == RecordKind::Line).collect()
            };
            prop_assert_eq!(lines(whole), lines(pieces));
        }
    }
}
