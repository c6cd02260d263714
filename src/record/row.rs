//! A segment's row: everything that its ids, its index and its parse depend on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Day, Framing, IndexRule, SegmentId, SenderId, TypeName};

/// Tags, and labels, of one source at most.
pub const TAGS_MAX: usize = 64;

/// Bytes of a source's tags and labels, at most.
pub const TAGS_BYTES_MAX: usize = 4 << 10;

/// Bytes of a row that each of its documents repeats, at most: tags and labels, names and the path.
pub const REPEATED_BYTES_MAX: usize = 12 << 10;

/// The durable description of a segment.
///
/// It is on disk before the segment's first line is sent, and `open` is built from it, never from
/// today's configuration. What only `welcome` can tell (`sender`, `rule`) completes it once; after
/// that nothing changes but `end` and `cuts`, unless it was refused wherever it was declared.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Minted when the row opened.
    pub segment: SegmentId,
    /// The name of the source in the configuration.
    pub source: String,
    /// The file's path when the row opened, as [`super::escape_path`] writes it; empty for stdin.
    pub path: String,
    /// The name of the host on which the sender runs.
    pub host: String,
    /// `st_dev` of the file; 0 where there is none.
    #[serde(default)]
    pub device: u64,
    /// `st_ino` of the file; 0 where there is none.
    #[serde(default)]
    pub inode: u64,
    /// Where the segment starts, in (decompressed) bytes.
    pub start: u64,
    /// Where it ends, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<u64>,
    /// Offsets at which a last line without a newline was cut and sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cuts: Vec<u64>,
    /// The UTC day of the file's last change when the row opened.
    pub day: Day,
    /// Part of the index name.
    #[serde(rename = "type")]
    pub type_name: TypeName,
    /// Copied into each document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Copied into each document.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How its bytes become records.
    pub framing: Framing,
    /// How a record is parsed.
    #[serde(default)]
    pub format: Format,
    /// The zone of timestamps that name none: an IANA name or `UTC`.
    #[serde(default = "utc")]
    pub timezone: String,
    /// The authenticated sender, known after the first `welcome`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender: Option<SenderId>,
    /// The receiver's index rule at the first `welcome`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<IndexRule>,
    /// The file's first bytes when the row opened.
    #[serde(default)]
    pub first_bytes: Prefix,
}

impl Row {
    /// Where its lines come from, for a person: the path, or the source's name where there is none.
    pub fn whence(&self) -> &str {
        if self.path.is_empty() { &self.source } else { &self.path }
    }

    /// Bytes that each document of the segment repeats.
    pub fn repeated_bytes(&self) -> usize {
        let names = self.source.len() + self.path.len() + self.host.len();
        names + bytes_of_tags(&self.tags, &self.labels)
    }
}

/// Bytes of tags and of keys and values of labels.
pub fn bytes_of_tags(tags: &[String], labels: &BTreeMap<String, String>) -> usize {
    let tags: usize = tags.iter().map(String::len).sum();
    let labels: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    tags + labels
}

fn utc() -> String {
    "UTC".to_owned()
}

/// A file's first bytes: how many are known (at most 1 KiB) and their SHA-256 in hexadecimal.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Prefix {
    /// Number of bytes hashed, 0 to 1024.
    pub length: u32,
    /// SHA-256 of them in lower-case hexadecimal; empty where `length` is 0.
    pub hash: String,
}

/// How a record's bytes are understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By its first bytes: JSON object, syslog header, combined access log, else raw.
    #[default]
    Auto,
    /// A JSON object per line; other lines are raw.
    Json,
    /// RFC 3164 or RFC 5424; other lines are raw.
    Syslog,
    /// The whole line is the message.
    Raw,
}
