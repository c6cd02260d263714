//! The spool's files: their names, and where in them good records lie.
//!
//! A name is `SEGMENT-OFFSET.spool`, the offset of its first byte in 16 hexadecimal digits. An
//! empty `SEGMENT-OFFSET.end` says that the segment ends there whatever its last file holds.
//!
//! No synced watermark is kept on disk, because none is needed. Every file but a segment's last
//! was synced whole before the next was made. In the last one, bytes behind the watermark may be
//! missing or torn, but they were never sent, so that no id depends on them. A good record is
//! therefore kept wherever it lies (it did arrive, and its checksum covers all of it), what is bad
//! between good ones is a loss to be reported, and what is bad to the end is cut off.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::record::SegmentId;
use crate::record::framing::{
    Framing, KEY_BYTES_MAX, RECORD_BYTES_MAX, SPOOL_HEADER_BYTES, SpoolRecord, Whole, spool_record,
};

/// The longest record, in bytes.
pub(super) const WHOLE_RECORD_BYTES_MAX: usize =
    SPOOL_HEADER_BYTES + KEY_BYTES_MAX + RECORD_BYTES_MAX;

/// Bytes checksummed in search of the next good record before the rest of a file is given up: a
/// hostile payload could otherwise make the search quadratic.
const SEARCH_BYTES_MAX: u64 = 1 << 30;

/// What a name in a spool directory means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Records.
    Records,
    /// The segment's end.
    End,
}

pub(super) fn file_name(segment: SegmentId, offset: u64, kind: Kind) -> String {
    let extension = match kind {
        Kind::Records => "spool",
        Kind::End => "end",
    };
    format!("{segment}-{offset:016x}.{extension}")
}

pub(super) fn parse_name(name: &str) -> Option<(SegmentId, u64, Kind)> {
    let (stem, extension) = name.rsplit_once('.')?;
    let kind = match extension {
        "spool" => Kind::Records,
        "end" => Kind::End,
        _ => return None,
    };
    let (segment, offset) = stem.rsplit_once('-')?;
    let segment = SegmentId(segment.parse().ok()?);
    let offset = u64::from_str_radix(offset, 16).ok()?;
    (file_name(segment, offset, kind) == name).then_some((segment, offset, kind))
}

/// Makes a directory (and its parents) that only its owner enters, durably.
pub(super) fn make_directory(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_directory(parent)?;
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        return sync_directory(parent);
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Makes names durable that were just given in `dir`.
pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes an empty file whose name is durable when this returns.
pub(super) fn create(dir: &Path, name: &str) -> io::Result<(File, PathBuf)> {
    let path = dir.join(name);
    let file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    if let Err(error) = sync_directory(dir) {
        // Another attempt makes it anew; an empty file left behind is removed at the next start.
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    Ok((file, path))
}

/// Unlinks; a file that is gone already is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where the good records of a segment's last file end, at most `length` bytes from its start.
pub(super) fn good_end(file: &File, length: u64) -> io::Result<u64> {
    let mut window = Vec::new();
    let mut at = 0;
    while at < length {
        read_window(file, at, length, &mut window)?;
        match Framing::SPOOL.whole(&window) {
            Whole::Bytes(bytes) => at += bytes as u64,
            Whole::Needs(_) | Whole::Corrupt => {
                let next = next_good(file, at, length)?;
                if next == length {
                    return Ok(at);
                }
                at = next;
            }
        }
    }
    Ok(length)
}

/// The start of the first good record behind the bad one at `at`; `length` where there is none.
pub(super) fn next_good(file: &File, at: u64, length: u64) -> io::Result<u64> {
    let mut search = Search { left: SEARCH_BYTES_MAX };
    let mut window = Vec::new();
    let mut from = at;
    loop {
        read_window(file, from, length, &mut window)?;
        let last = from + window.len() as u64 == length;
        if from == at {
            // A torn record, or a length that grew. Its payload may look like anything, so only
            // records that lead exactly to the file's end are believed.
            if let SpoolRecord::Needs(_) = spool_record(&window) {
                return Ok(at + search.chain(&window) as u64);
            }
            // The usual damage is in the payload. A damaged length may as well lead over whole
            // records to the start of another.
            if let Some(neighbour) = search.neighbour(&window) {
                return Ok(at + search.chain(&window[..neighbour]) as u64);
            }
        }
        let starts = if last { window.len() } else { window.len() - WHOLE_RECORD_BYTES_MAX };
        let first = usize::from(from == at);
        match search.first(&window, first..starts) {
            Found::At(start) => return Ok(from + start as u64),
            Found::GivenUp => return Ok(length),
            Found::Nothing if last => return Ok(length),
            Found::Nothing => from += starts as u64,
        }
    }
}

/// Reads two longest records' worth of bytes, or what there is up to `length`.
fn read_window(file: &File, at: u64, length: u64, window: &mut Vec<u8>) -> io::Result<()> {
    let size = (length - at).min(2 * WHOLE_RECORD_BYTES_MAX as u64) as usize;
    window.resize(size, 0);
    file.read_exact_at(window, at)
}

enum Found {
    At(usize),
    Nothing,
    GivenUp,
}

struct Search {
    left: u64,
}

impl Search {
    /// Where a damaged record ends by its own length, if another or nothing stands there.
    fn neighbour(&mut self, window: &[u8]) -> Option<usize> {
        let length = claimed_length(window)?;
        let rest = window.get(length..)?;
        (rest.is_empty() || self.is_good(rest)).then_some(length)
    }

    fn first(&mut self, window: &[u8], starts: std::ops::Range<usize>) -> Found {
        for start in starts {
            if self.is_good(&window[start..]) {
                return Found::At(start);
            }
            if self.left == 0 {
                return Found::GivenUp;
            }
        }
        Found::Nothing
    }

    /// The first start from which good records lead exactly to the end of `window`; its length
    /// where there is none.
    fn chain(&mut self, window: &[u8]) -> usize {
        for start in 1..window.len() {
            if self.is_good(&window[start..]) {
                let rest = &window[start..];
                self.left = self.left.saturating_sub(rest.len() as u64);
                if Framing::SPOOL.whole(rest) == Whole::Bytes(rest.len()) {
                    return start;
                }
            }
            if self.left == 0 {
                break;
            }
        }
        window.len()
    }

    fn is_good(&mut self, bytes: &[u8]) -> bool {
        let Some(length) = claimed_length(bytes).filter(|&length| length <= bytes.len()) else {
            return false;
        };
        self.left = self.left.saturating_sub(length as u64);
        matches!(spool_record(bytes), SpoolRecord::Whole { .. })
    }
}

/// Length of the record that a header announces; `None` where it is over the limits.
fn claimed_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<SPOOL_HEADER_BYTES>()?;
    let payload = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let key = usize::from(u16::from_le_bytes([header[16], header[17]]));
    (payload <= RECORD_BYTES_MAX && key <= KEY_BYTES_MAX)
        .then_some(SPOOL_HEADER_BYTES + key + payload)
}
