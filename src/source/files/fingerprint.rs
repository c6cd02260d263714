//! Recognising a file by its bytes: its first ones, and those before a position.

use std::fmt::Write as _;
use std::io;

use sha2::{Digest, Sha256};

use super::tail::{Inode, Tail};
use crate::record::Prefix;
use crate::state::{Fingerprint, Progress};

/// How many first bytes recognise a file.
pub const PREFIX_BYTES_MAX: usize = 1024;

/// How many bytes before a position recognise it.
pub const FINGERPRINT_BYTES: usize = 64;

/// The fingerprint at `offset`, from the bytes that end there (any number; the last 64 count).
/// Near the start of the run fewer exist.
pub fn fingerprint(offset: u64, before: &[u8]) -> Fingerprint {
    let wanted = usize::try_from(offset).unwrap_or(usize::MAX).min(FINGERPRINT_BYTES);
    debug_assert!(before.len() >= wanted);
    let digest = Sha256::digest(&before[before.len() - wanted..]);
    let mut hash = [0; 8];
    hash.copy_from_slice(&digest[..8]);
    Fingerprint { offset, hash: u64::from_be_bytes(hash) }
}

/// The prefix that these first bytes (at most 1 KiB count) make.
pub fn prefix(first: &[u8]) -> Prefix {
    let first = &first[..first.len().min(PREFIX_BYTES_MAX)];
    if first.is_empty() {
        return Prefix::default();
    }
    let mut hash = String::with_capacity(64);
    for byte in Sha256::digest(first) {
        let _ = write!(hash, "{byte:02x}");
    }
    Prefix { length: first.len() as u32, hash }
}

/// Reads a file's first bytes, as many as there are, at most 1 KiB.
pub fn first_bytes(tail: &mut Tail) -> io::Result<Vec<u8>> {
    let mut first = vec![0; PREFIX_BYTES_MAX];
    let read = tail.read_at(0, &mut first)?;
    first.truncate(read);
    Ok(first)
}

/// How well a file fits what is known of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Match {
    /// First bytes and the bytes before the position agree.
    Whole,
    /// The first bytes agree, but the file holds what is known only up to this older fingerprint:
    /// its tail was lost, as after a power cut.
    Until(u64),
    /// Another file.
    None,
}

/// Compares a file with what is known of a run.
///
/// An empty prefix knows nothing of the content: then, and only then, the inode decides.
pub fn matches(tail: &mut Tail, known: &Progress) -> io::Result<Match> {
    if known.prefix.length == 0 && known.fingerprints.is_empty() {
        let inode = Inode { device: known.place.device, inode: known.place.inode };
        return Ok(if tail.inode() == inode { Match::Whole } else { Match::None });
    }
    let mut first = vec![0; known.prefix.length as usize];
    let read = tail.read_at(0, &mut first)?;
    if read < first.len() || prefix(&first) != known.prefix {
        return Ok(Match::None);
    }
    for (number, known) in known.fingerprints.iter().enumerate() {
        if agrees(tail, known)? {
            return Ok(if number == 0 { Match::Whole } else { Match::Until(known.offset) });
        }
    }
    Ok(if known.fingerprints.is_empty() { Match::Whole } else { Match::None })
}

/// Whether the bytes before the fingerprint's offset are those that it was taken from.
pub fn agrees(tail: &mut Tail, known: &Fingerprint) -> io::Result<bool> {
    let start = known.offset.saturating_sub(FINGERPRINT_BYTES as u64);
    let mut before = vec![0; (known.offset - start) as usize];
    let read = tail.read_at(start, &mut before)?;
    Ok(read == before.len() && fingerprint(known.offset, &before) == *known)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::state::Place;

    fn open(path: &Path, text: &[u8]) -> Tail {
        fs::write(path, text).expect("write");
        Tail::open(path, false).expect("open")
    }

    fn known(text: &[u8], positions: &[usize], inode: u64) -> Progress {
        let mut known = Progress {
            prefix: prefix(text),
            place: Place { inode, ..Place::default() },
            ..Progress::default()
        };
        for &position in positions {
            known.advance(fingerprint(position as u64, &text[..position]));
        }
        known
    }

    #[test]
    fn first_bytes_and_the_bytes_before_the_position_decide() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let text: Vec<u8> = (0..500).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
        let known = known(&text, &[1000, 2000, 3000], 0);

        assert_eq!(matches(&mut open(&path, &text), &known).expect("read"), Match::Whole);
        let mut longer = text.clone();
        longer.extend_from_slice(b"more\n");
        assert_eq!(matches(&mut open(&path, &longer), &known).expect("read"), Match::Whole);
        // Another generation with the same header, grown past the position.
        let mut other = text[..1500].to_vec();
        other.extend(std::iter::repeat_n(b'y', 5000));
        assert_eq!(matches(&mut open(&path, &other), &known).expect("read"), Match::Until(1000));
        // A tail lost in a power cut.
        assert_eq!(
            matches(&mut open(&path, &text[..2500]), &known).expect("read"),
            Match::Until(2000)
        );
        assert_eq!(matches(&mut open(&path, b"new\n"), &known).expect("read"), Match::None);
        let mut changed = text.clone();
        changed[5] = b'!';
        assert_eq!(matches(&mut open(&path, &changed), &known).expect("read"), Match::None);
    }

    #[test]
    fn an_empty_prefix_matches_by_inode_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut tail = open(&dir.path().join("file"), b"text\n");
        let mut nothing = known(b"", &[], 0);
        assert_eq!(matches(&mut tail, &nothing).expect("read"), Match::None);
        nothing.place.device = tail.inode().device;
        nothing.place.inode = tail.inode().inode;
        assert_eq!(matches(&mut tail, &nothing).expect("read"), Match::Whole);
    }
}
