//! The files on this machine that a position may belong to, and which of them it does.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::{Identity, Position};
use crate::config::{Input, SourceConfig};
use crate::source::files::discovery::{names, sweep};
use crate::source::files::recognition::are_siblings;
use crate::source::files::siblings::{is_rotated_name, siblings};
use crate::source::files::tail::{Inode, OpenError, Tail};

/// How many first bytes a shipper may have taken its fingerprint from.
const CONTENT_BYTES_MAX: usize = 4096;

/// How coarse the times in a registry may be.
const TIMES_DIFFER_BY: Duration = Duration::from_secs(1);

/// A file that a source names, or a rotated sibling of one.
#[derive(Debug)]
pub(super) struct Candidate {
    pub path: PathBuf,
    /// Number of the source.
    pub source: usize,
    /// The source's pattern names it; otherwise it is only a sibling.
    pub wanted: bool,
    pub inode: Inode,
    /// As it is stored, in bytes.
    pub stored: u64,
    pub modified: SystemTime,
    /// When it was made, where the file system knows.
    born: Option<SystemTime>,
}

/// The pattern of a source that reads files.
fn pattern(source: &SourceConfig) -> &str {
    match &source.input {
        Input::Files { pattern } => pattern,
        _ => "",
    }
}

/// The source that would read this path, or the one that it was rotated from.
pub(super) fn source_of(path: &Path, sources: &[&SourceConfig]) -> Option<usize> {
    let named = |path: &Path| sources.iter().position(|source| names(pattern(source), path));
    named(path).or_else(|| named(&unrotated(path)?))
}

/// The path before any rotation of it.
fn unrotated(path: &Path) -> Option<PathBuf> {
    is_rotated_name(path.as_os_str().as_bytes()).map(|base| PathBuf::from(OsStr::from_bytes(base)))
}

/// Every file that the sources name now, and the rotated siblings of these and of the paths that
/// positions have; by path.
pub(super) fn find(
    sources: &[&SourceConfig],
    positions: &[Position],
) -> io::Result<Vec<Candidate>> {
    let mut paths: BTreeMap<PathBuf, (usize, bool)> = BTreeMap::new();
    for (number, source) in sources.iter().enumerate() {
        for path in sweep(pattern(source)) {
            paths.entry(path).or_insert((number, true));
        }
    }
    let mut families: BTreeMap<PathBuf, usize> =
        paths.iter().map(|(path, (number, _))| (path.clone(), *number)).collect();
    for path in positions.iter().filter_map(|position| position.path.as_ref()) {
        if let Some(number) = source_of(path, sources) {
            families.entry(path.clone()).or_insert(number);
            if let Some(base) = unrotated(path) {
                families.entry(base).or_insert(number);
            }
        }
    }
    for (path, number) in families {
        for sibling in siblings(&path)? {
            paths.entry(sibling).or_insert((number, false));
        }
        // The family's own name, where only a position has it.
        paths.entry(path).or_insert((number, false));
    }
    let mut candidates = Vec::new();
    for (path, (source, wanted)) in paths {
        let follow = sources[source].follow_symlinks;
        let metadata = if follow { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
        let metadata = match metadata {
            Ok(metadata) if metadata.is_dir() => continue,
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        candidates.push(Candidate {
            source,
            wanted,
            inode: Inode::of(&metadata),
            stored: metadata.len(),
            modified: metadata.modified()?,
            born: metadata.created().ok(),
            path,
        });
    }
    Ok(candidates)
}

impl Candidate {
    /// Opens it as a sender would.
    pub fn open(&self, sources: &[&SourceConfig]) -> Result<Tail, OpenError> {
        let tail = Tail::open(&self.path, sources[self.source].follow_symlinks)?;
        if tail.inode() != self.inode {
            return Err(OpenError::Gone);
        }
        Ok(tail)
    }

    /// Whether it is of the family of this path: there, or rotated from or to it.
    pub fn is_related(&self, path: &Path) -> bool {
        self.path == path || are_siblings(path, &self.path)
    }

    /// Whether the position is this file's. Where that is not certain, it is not.
    pub fn has(&self, position: &Position, sources: &[&SourceConfig]) -> Result<bool, OpenError> {
        let path = position.path.as_deref();
        let related = path.is_none_or(|path| self.is_related(path));
        Ok(match &position.identity {
            Identity::Inode { inode, devices } => {
                let same_device = match path {
                    // In one folder is one device, whatever its number was before a boot.
                    Some(_) => related,
                    None => devices.contains(&self.inode.device),
                };
                self.inode.inode == *inode && same_device && !self.is_younger(position)
            }
            Identity::Path => path == Some(&*self.path) && !self.is_younger(position),
            Identity::Content(hash) => related && has_content(&mut self.open(sources)?, hash)?,
            Identity::Unknown(_) => false,
        })
    }

    /// Made after the position was changed last: its inode or path was another file's then.
    pub fn is_younger(&self, position: &Position) -> bool {
        self.born.is_some_and(|born| born > position.changed + TIMES_DIFFER_BY)
    }
}

/// Whether some number of first bytes has this fingerprint. How many Filebeat takes is configured
/// (1024 unless it is, 64 at least); of a file that has fewer, newer versions take the hash of all
/// of them in hexadecimal.
fn has_content(tail: &mut Tail, hash: &str) -> io::Result<bool> {
    let mut first = vec![0; CONTENT_BYTES_MAX];
    let read = tail.read_at(0, &mut first)?;
    let (mut bytes, mut text) = (Sha256::new(), Sha256::new());
    for byte in &first[..read] {
        bytes.update([*byte]);
        text.update(format!("{byte:02x}"));
        if [&bytes, &text].iter().any(|digest| hexadecimal(&(*digest).clone().finalize()) == hash) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
