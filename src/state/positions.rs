//! The positions file: how far each segment was receipted, replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::replace_file;
use crate::record::{Prefix, Row, SegmentId};

const NAME: &str = "positions";
const PREVIOUS: &str = "positions.old";

/// How many fingerprints a position keeps.
const FINGERPRINTS_MAX: usize = 16;

/// The bytes before an offset, as a hash: what recognises a file at that offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fingerprint {
    /// An offset at which a frame ended.
    pub offset: u64,
    /// First 8 bytes of SHA-256 over the (at most 64) bytes before it, big-endian.
    pub hash: u64,
}

/// Where a run of bytes was seen last; a proposal, never a proof.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    /// As [`crate::record::escape_path`] writes it.
    pub path: String,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// When the inode was made, in nanoseconds since 1970; 0 where that is not known.
    #[serde(default)]
    pub born: u64,
}

/// How far a segment has come, and how its file is recognised there.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// End of the unbroken prefix of receipts, skips and reported losses.
    pub position: u64,
    /// The file's first bytes, as many as are known by now.
    pub prefix: Prefix,
    /// Newest first; the first one is that of `position`, where `position` is not 0.
    pub fingerprints: Vec<Fingerprint>,
    /// Where the file was seen last.
    pub place: Place,
    /// When it was seen there, in milliseconds since 1970.
    pub seen_ms: u64,
    /// How far its bytes were seen; 0 where that is not known.
    #[serde(default)]
    pub size: u64,
    /// What the file looked like when all of it was receipted: while it looks so, there is nothing
    /// to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Stamp>,
}

/// Size and time of the last change of a file as it is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stamp {
    /// In bytes.
    pub size: u64,
    /// `st_mtime`.
    pub seconds: i64,
    /// Nanoseconds of it.
    pub nanoseconds: i64,
}

impl Stamp {
    /// Of an open file or a path.
    pub fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            size: metadata.size(),
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
        }
    }
}

impl Progress {
    /// What is known of a row of which nothing was receipted, in a file that was made at `born`.
    pub fn at_start(row: &Row, born: u64) -> Progress {
        Progress {
            position: row.start,
            prefix: row.first_bytes.clone(),
            fingerprints: Vec::new(),
            place: Place { path: row.path.clone(), device: row.device, inode: row.inode, born },
            seen_ms: milliseconds(SystemTime::now()),
            size: 0,
            rest: None,
        }
    }

    /// Moves to a newer position. Of the older fingerprints those stay whose distances to it about
    /// double: after a power cut one of them is not far behind whatever the disk kept.
    pub fn advance(&mut self, to: Fingerprint) {
        debug_assert!(to.offset >= self.position, "positions only grow (I2)");
        self.position = to.offset;
        if self.fingerprints.first().is_some_and(|newest| newest.offset == to.offset) {
            return;
        }
        self.fingerprints.insert(0, to);
        if self.fingerprints.len() > FINGERPRINTS_MAX {
            let distance = |at: usize| (to.offset - self.fingerprints[at].offset) as f64;
            // The one whose removal leaves the smallest relative gap between its neighbours; the
            // oldest stays.
            let ratio = |at: &usize| distance(at + 1) / distance(at - 1).max(1.0);
            let victim = (2..self.fingerprints.len() - 1)
                .min_by(|a, b| ratio(a).total_cmp(&ratio(b)))
                .expect("there are more than three");
            self.fingerprints.remove(victim);
        }
    }
}

/// Milliseconds since 1970; 0 for anything earlier.
pub(super) fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct Content {
    /// The kernel's boot_id when they were saved (random(4)).
    #[serde(default)]
    pub boot: String,
    pub segments: BTreeMap<SegmentId, Progress>,
}

/// Reads the positions; where the newest file is unreadable, those before it. No file at all means
/// that everything still there is sent again (I5).
pub(super) fn load(dir: &Path) -> Content {
    for name in [NAME, PREVIOUS] {
        match fs::read(dir.join(name)).map(|bytes| decode(&bytes)) {
            Ok(Some(content)) => return content,
            Ok(None) => warn!(
                file = %dir.join(name).display(),
                "unreadable positions: lines since the ones before are sent again"
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(file = %dir.join(name).display(), %error, "unreadable positions"),
        }
    }
    Content::default()
}

/// Replaces the positions and keeps the ones before.
pub(super) fn save(dir: &Path, segments: &BTreeMap<SegmentId, Progress>) -> io::Result<()> {
    let content = Content { boot: boot_id(), segments: segments.clone() };
    let json = serde_json::to_vec(&content).expect("positions have string keys only");
    let mut bytes = format!("{:08x} ", crc32c::crc32c(&json)).into_bytes();
    bytes.extend_from_slice(&json);
    match fs::rename(dir.join(NAME), dir.join(PREVIOUS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => replace_file(dir, NAME, &bytes),
    }
}

/// Identity of this boot of the machine; empty where the kernel does not tell.
pub(super) fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn decode(bytes: &[u8]) -> Option<Content> {
    let (checksum, json) = bytes.split_first_chunk::<9>()?;
    let checksum = std::str::from_utf8(checksum).ok()?.strip_suffix(' ')?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (crc32c::crc32c(json) == checksum).then(|| serde_json::from_slice(json).ok())?
}
