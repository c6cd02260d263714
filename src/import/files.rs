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
use crate::source::files::discovery::{sweep, would_name};
use crate::source::files::siblings::{are_related, is_rotated_name};
use crate::source::files::survey::{Scope, list};
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
    /// It lies where the source says that rotated files lie too.
    elsewhere: bool,
    pub inode: Inode,
    /// As it is stored, in bytes.
    pub stored: u64,
    pub modified: SystemTime,
    /// When it was made, where the file system knows.
    born: Option<SystemTime>,
}

/// What [`find`] found.
pub(super) struct Files {
    /// By path.
    pub candidates: Vec<Candidate>,
    /// Folders that cannot be listed.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

/// What a source that reads files names: a pattern, a file whose very name looks like it, and where
/// rotated files lie.
fn inputs(source: &SourceConfig) -> (&str, Option<&Path>, &[String]) {
    match &source.input {
        Input::Files { pattern, literal, rotated } => (pattern, literal.as_deref(), rotated),
        _ => ("", None, &[]),
    }
}

/// The source that would read this path, or the one that it was rotated from.
pub(super) fn source_of(path: &Path, sources: &[&SourceConfig]) -> Option<usize> {
    let named = |path: &Path| {
        sources.iter().position(|source| {
            let (pattern, literal, _) = inputs(source);
            would_name(pattern, path) || literal == Some(path)
        })
    };
    let rotated =
        |source: &&SourceConfig| inputs(source).2.iter().any(|pattern| would_name(pattern, path));
    named(path).or_else(|| named(&unrotated(path)?)).or_else(|| sources.iter().position(rotated))
}

/// The path before any rotation of it.
fn unrotated(path: &Path) -> Option<PathBuf> {
    is_rotated_name(path.as_os_str().as_bytes()).map(|base| PathBuf::from(OsStr::from_bytes(base)))
}

/// Every file that the sources name now, the rotated siblings of these and of the paths that
/// positions have, and what lies in the sources' places of rotated files.
pub(super) fn find(sources: &[&SourceConfig], positions: &[Position]) -> io::Result<Files> {
    // With its source, whether it is wanted, and whether it lies elsewhere.
    let mut paths: BTreeMap<PathBuf, (usize, bool, bool)> = BTreeMap::new();
    let mut unreadable = Vec::new();
    let mut scope = Scope::default();
    for (number, source) in sources.iter().enumerate() {
        let (pattern, literal, rotated) = inputs(source);
        let swept = sweep(pattern);
        unreadable.extend(swept.unreadable);
        for path in swept.paths.into_iter().chain(literal.map(Path::to_owned)) {
            scope.bases.push((path.clone(), number));
            paths.entry(path).or_insert((number, true, false));
        }
        scope.rotated.extend(rotated.iter().map(|pattern| (pattern.clone(), number)));
    }
    for path in positions.iter().filter_map(|position| position.path.as_ref()) {
        if let Some(number) = source_of(path, sources) {
            scope.bases.push((path.clone(), number));
        }
    }
    for (path, listed) in list(&scope).map_err(io::Error::other)? {
        paths.entry(path).or_insert((listed.source, false, listed.elsewhere));
    }
    let mut candidates = Vec::new();
    for (path, (source, wanted, elsewhere)) in paths {
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
            elsewhere,
            inode: Inode::of(&metadata),
            stored: metadata.len(),
            modified: metadata.modified()?,
            born: metadata.created().ok(),
            path,
        });
    }
    Ok(Files { candidates, unreadable })
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
        are_related(path, &self.path, self.elsewhere)
    }

    /// Whether the position is this file's. Where that is not certain, it is not.
    pub fn has(&self, position: &Position, sources: &[&SourceConfig]) -> Result<bool, OpenError> {
        let path = position.path.as_deref();
        let related = path.is_none_or(|path| self.is_related(path));
        Ok(match &position.identity {
            Identity::Inode { inode, devices } => {
                let same_device = match path {
                    // In one folder is one device, whatever its number was before a boot.
                    Some(path) if path.parent() == self.path.parent() => related,
                    Some(_) => related && devices.contains(&self.inode.device),
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
