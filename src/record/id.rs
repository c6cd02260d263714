//! Document ids: 24 bytes that name one record of one segment of one sender, for ever.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::framing::{KEY_BYTES_MAX, Record};

/// A segment ends before this offset, because an id has 5 bytes for it.
pub const OFFSET_MAX: u64 = 1 << 40;

/// The last offset at which a segment, and so a frame, may end.
pub const END_MAX: u64 = OFFSET_MAX - 1;

/// Names a segment: a UUIDv7 minted when its row opens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentId(pub Uuid);

impl SegmentId {
    /// A fresh id, in order of time.
    pub fn mint() -> SegmentId {
        SegmentId(Uuid::now_v7())
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a sender: a UUID minted with its first token, kept over rotation and renaming.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SenderId(pub Uuid);

impl SenderId {
    /// A fresh random id.
    pub fn mint() -> SenderId {
        SenderId(Uuid::now_v7())
    }
}

impl fmt::Display for SenderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the document ids of a segment have in common: computed once per segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdPrefix {
    sender: SenderId,
    bytes: [u8; 14],
}

impl IdPrefix {
    /// Bytes 0–5 of the segment's UUIDv7 (its milliseconds), then the first 8 bytes of
    /// SHA-256(sender id ‖ segment id).
    ///
    /// The sender id is the authenticated one, so that no sender can name another's documents (I4).
    pub fn new(sender: SenderId, segment: SegmentId) -> IdPrefix {
        let mut hasher = Sha256::new();
        hasher.update(sender.0.as_bytes());
        hasher.update(segment.0.as_bytes());
        let digest = hasher.finalize();
        let mut bytes = [0; 14];
        bytes[..6].copy_from_slice(&segment.0.as_bytes()[..6]);
        bytes[6..].copy_from_slice(&digest[..8]);
        IdPrefix { sender, bytes }
    }

    /// The id of a record of the segment: by its key where it has one, else by its place.
    #[inline]
    pub fn of(&self, record: &Record<'_>) -> DocumentId {
        match record.key {
            b"" => self.id(record.offset, record.payload),
            key => DocumentId::keyed(self.sender, key, record.time.unwrap_or(0), record.payload),
        }
    }

    /// The id of the record without a key that starts at `offset` and holds `payload` (without LF, with CR).
    pub fn id(&self, offset: u64, payload: &[u8]) -> DocumentId {
        debug_assert!(offset < OFFSET_MAX);
        let mut bytes = [0; 24];
        bytes[..14].copy_from_slice(&self.bytes);
        bytes[14..19].copy_from_slice(&offset.to_be_bytes()[3..]);
        bytes[19..].copy_from_slice(&xxh3_64(payload).to_be_bytes()[3..]);
        DocumentId(bytes)
    }
}

/// A document id; its text form is 32 characters of base64url (RFC 4648 §5, no padding).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentId(pub [u8; 24]);

impl DocumentId {
    /// Length of the text form in bytes.
    pub const TEXT_LEN: usize = 32;

    /// The id of a record that carries a key and a time of origin: the first 24 bytes of
    /// SHA-256(sender id ‖ key length, u16 ‖ key ‖ time, u64 in ms ‖ payload), big-endian.
    ///
    /// Neither segment nor offset is in it, so that a client's repeat is the same document (I3);
    /// the payload is, so that a key used twice hides no line (I4).
    pub fn keyed(sender: SenderId, key: &[u8], time_ms: u64, payload: &[u8]) -> DocumentId {
        debug_assert!(key.len() <= KEY_BYTES_MAX);
        let mut hasher = Sha256::new();
        hasher.update(sender.0.as_bytes());
        hasher.update((key.len() as u16).to_be_bytes());
        hasher.update(key);
        hasher.update(time_ms.to_be_bytes());
        hasher.update(payload);
        DocumentId::truncated(&hasher.finalize())
    }

    fn truncated(digest: &[u8]) -> DocumentId {
        let mut bytes = [0; 24];
        bytes.copy_from_slice(&digest[..24]);
        DocumentId(bytes)
    }

    /// The text form, without an allocation.
    pub fn text(&self) -> [u8; DocumentId::TEXT_LEN] {
        const ALPHABET: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut text = [0; DocumentId::TEXT_LEN];
        for (group, out) in self.0.chunks_exact(3).zip(text.chunks_exact_mut(4)) {
            let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
            out[0] = ALPHABET[(bits >> 18) as usize & 63];
            out[1] = ALPHABET[(bits >> 12) as usize & 63];
            out[2] = ALPHABET[(bits >> 6) as usize & 63];
            out[3] = ALPHABET[bits as usize & 63];
        }
        text
    }

    /// Reads the text form; `None` when it is not one.
    pub fn parse(text: &str) -> Option<DocumentId> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        Some(DocumentId(bytes.try_into().ok()?))
    }

    /// The id of piece `number` (from 1) of a parked line that was cut: the first 24 bytes of
    /// SHA-256(id ‖ number, u32 big-endian).
    pub fn piece(&self, number: u32) -> DocumentId {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        hasher.update(number.to_be_bytes());
        DocumentId::truncated(&hasher.finalize())
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text();
        f.write_str(std::str::from_utf8(&text).expect("the alphabet is ASCII"))
    }
}

impl fmt::Debug for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix() -> IdPrefix {
        let sender = SenderId("01890a5d-ac96-774b-bcce-b302099a8057".parse().expect("uuid"));
        let segment = SegmentId("0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506".parse().expect("uuid"));
        IdPrefix::new(sender, segment)
    }

    #[test]
    fn text_is_base64url_of_the_bytes() {
        let id = prefix().id(0x12_3456_789a, b"hello");
        assert_eq!(id.to_string(), URL_SAFE_NO_PAD.encode(id.0));
        assert_eq!(DocumentId::parse(&id.to_string()), Some(id));
        assert_eq!(DocumentId::parse("short"), None);
    }

    #[test]
    fn every_part_of_the_identity_changes_the_id() {
        let id = prefix().id(7, b"line");
        assert_ne!(id, prefix().id(8, b"line"), "offset");
        assert_ne!(id, prefix().id(7, b"line\r"), "payload");
        let sender = SenderId::mint();
        let segment = SegmentId("0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506".parse().expect("uuid"));
        assert_ne!(id, IdPrefix::new(sender, segment).id(7, b"line"), "sender (I4)");
    }

    #[test]
    fn a_keyed_id_is_the_hash_that_the_protocol_names() {
        let sender = SenderId("01890a5d-ac96-774b-bcce-b302099a8057".parse().expect("uuid"));
        let bytes = [
            sender.0.as_bytes().as_slice(),
            &[0, 3],
            b"key",
            &1_763_714_120_123_u64.to_be_bytes(),
            b"line",
        ]
        .concat();
        let id = DocumentId::keyed(sender, b"key", 1_763_714_120_123, b"line");
        assert_eq!(id.0, Sha256::digest(&bytes)[..24]);
        assert_eq!(id.to_string(), "MUl5jpZEwGZIdDY3vdUD12145F_Co943");
    }

    #[test]
    fn a_keyed_record_has_one_id_in_every_segment_and_place() {
        let sender = SenderId::mint();
        let record = |offset, key| Record {
            offset,
            length: 0,
            payload: b"line",
            kind: crate::record::RecordKind::Line,
            continues: false,
            cut: false,
            time: Some(5),
            key,
        };
        let [a, b] = [(); 2].map(|()| IdPrefix::new(sender, SegmentId::mint()));
        assert_eq!(a.of(&record(0, b"key")), b.of(&record(77, b"key")), "a repeat (I3)");
        assert_ne!(a.of(&record(0, b"key")), a.of(&record(0, b"kez")), "another key");
        assert_ne!(a.of(&record(0, b"")), b.of(&record(0, b"")), "without a key, by its place");
        assert_ne!(
            DocumentId::keyed(sender, b"key", 5, b"line"),
            DocumentId::keyed(SenderId::mint(), b"key", 5, b"line"),
            "another sender (I4)"
        );
    }

    #[test]
    fn pieces_differ_from_each_other_and_from_the_whole() {
        let id = prefix().id(0, b"long");
        assert_ne!(id.piece(1), id);
        assert_ne!(id.piece(1), id.piece(2));
    }
}
