//! Who a file is: which known run of bytes goes on in it, or whether it is new.
//!
//! Paths and inodes only propose; bytes decide (see [`super::fingerprint`]). Called whenever a file
//! turns up that no open stream holds, and whenever a stream's file is no longer what it was.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tracing::debug;
use uuid::Uuid;

use super::fingerprint::{Match, first_bytes, matches, prefix};
use super::siblings::{is_rotated_name, is_sibling, siblings};
use super::tail::{Inode, Tail};
use crate::record::{SegmentId, unescape_path};
use crate::state::Progress;

/// A file that changed within this time may still be on its way to be what it will be: a copy
/// that is being made looks like a short file of its own.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// How often siblings are listed anew where they move meanwhile, before it is left to the next
/// sweep.
const LISTINGS_MAX: usize = 10;

/// What is known of a run of bytes.
#[derive(Clone, Debug)]
pub struct Known {
    /// Identity of the run.
    pub run: Uuid,
    /// Number of its source in the configuration; `None` where that is not there any more.
    pub source: Option<usize>,
    /// The longest prefix, all fingerprints (newest first) and the last place of its rows.
    pub progress: Progress,
    /// Its first row: of several runs that fit, the oldest wins.
    pub opened: SegmentId,
}

impl Known {
    fn path(&self) -> PathBuf {
        unescape_path(&self.progress.place.path)
    }

    fn inode(&self) -> Inode {
        Inode { device: self.progress.place.device, inode: self.progress.place.inode }
    }

    fn is_at(&self, tail: &Tail) -> bool {
        self.progress.place.inode == tail.inode().inode || self.path() == tail.path()
    }

    /// Whether its file may be this one: in another source, only the very same file is.
    fn may_be(&self, found: &Found) -> bool {
        self.source == Some(found.source) || self.inode() == found.tail.inode()
    }

    /// When its file was found: its identity was minted with that time.
    fn found_at(&self) -> Option<SystemTime> {
        let (seconds, nanoseconds) = self.run.get_timestamp()?.to_unix();
        Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
    }
}

/// A file that no open stream holds.
#[derive(Debug)]
pub struct Found {
    /// Opened.
    pub tail: Tail,
    /// Number of its source in the configuration.
    pub source: usize,
    /// The source's pattern names it; otherwise it is only a sibling of a known file.
    pub wanted: bool,
}

/// What becomes of a file.
#[derive(Debug)]
pub enum Decision {
    /// A known run goes on in it.
    Continue {
        /// The run.
        run: Uuid,
        /// Its file.
        found: Found,
        /// The file lost its tail: the rows end at this offset and a new one starts there.
        until: Option<u64>,
    },
    /// A new run from its first byte. Where the file is not wanted, it is a rotated generation
    /// that came and went unseen.
    New {
        /// Its file.
        found: Found,
    },
    /// A copy of another run's file (by copytruncate, or an archive in the making): left alone
    /// until it changes or that run has moved on.
    Copy {
        /// The copy.
        found: Found,
    },
    /// Nobody's: a rotated file from before our time.
    Foreign,
}

/// What recognition looks at besides the files.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Runs without an open file.
    pub lost: &'a [Known],
    /// Runs whose file is open.
    pub held: &'a [Known],
    /// Whether a copy may be given time to become whole.
    pub patient: bool,
    /// Whether the machine went down since positions were saved: only then can a file have lost
    /// its tail. Otherwise one that is too short was truncated, whatever it holds now.
    pub rebooted: bool,
}

/// Decides over all files found, and over the rotated siblings that this brings into play.
pub fn recognise(mut found: Vec<Found>, around: Surroundings<'_>) -> io::Result<Vec<Decision>> {
    add_all_siblings(&mut found, around)?;
    let assigned = assign(&mut found, around);
    let mut decisions = Vec::new();
    let mut new = Vec::new();
    for (mut found, assigned) in found.into_iter().zip(assigned) {
        match assigned {
            Assigned::Run { run, until } => {
                decisions.push(Decision::Continue { run, found, until });
            }
            Assigned::Copy => decisions.push(Decision::Copy { found }),
            Assigned::Nothing if is_copy(&mut found.tail, around) => {
                decisions.push(Decision::Copy { found });
            }
            Assigned::Nothing => new.push((found.tail.modified()?, found)),
        }
    }
    // Oldest first: generations are sent in the order in which they were written.
    new.sort_by_key(|(modified, _)| *modified);
    for (modified, found) in new {
        let ours = found.wanted || around.since(found.tail.path()) < Some(modified);
        decisions.push(if ours { Decision::New { found } } else { Decision::Foreign });
    }
    Ok(decisions)
}

#[derive(Clone, Copy)]
enum Assigned {
    Run { run: Uuid, until: Option<u64> },
    Copy,
    Nothing,
}

struct Fit {
    exact: bool,
    same_inode: bool,
    until: Option<u64>,
    file: usize,
    run: usize,
}

/// Pairs files with lost runs: whole matches first, then the run's own inode, then the oldest run.
fn assign(found: &mut [Found], around: Surroundings<'_>) -> Vec<Assigned> {
    let lost = around.lost;
    let mut fits = Vec::new();
    for (file, found) in found.iter_mut().enumerate() {
        for (run, known) in lost.iter().enumerate() {
            if !known.may_be(found) {
                continue;
            }
            let same_inode = known.progress.place.inode == found.tail.inode().inode;
            let fit = |exact, until| Fit { exact, same_inode, until, file, run };
            match matches(&mut found.tail, &known.progress) {
                Ok(Match::Whole) => fits.push(fit(true, None)),
                // Lost in a power cut, which leaves the file where it was. A short copy elsewhere
                // is no continuation.
                Ok(Match::Until(offset)) if around.rebooted && known.is_at(&found.tail) => {
                    fits.push(fit(false, Some(offset)));
                }
                Ok(_) => {}
                // An archive that is being written, a disk that fails: looked at again later.
                Err(error) => {
                    debug!(path = %found.tail.path().display(), %error, "cannot be compared yet");
                }
            }
        }
    }
    fits.sort_by_key(|fit| (!fit.exact, !fit.same_inode, lost[fit.run].opened, fit.file));
    let mut assigned = vec![Assigned::Nothing; found.len()];
    let mut taken = vec![false; lost.len()];
    for fit in fits {
        let Assigned::Nothing = assigned[fit.file] else { continue };
        if !taken[fit.run] {
            taken[fit.run] = true;
            assigned[fit.file] = Assigned::Run { run: lost[fit.run].run, until: fit.until };
        } else if fit.exact {
            assigned[fit.file] = Assigned::Copy;
        }
    }
    assigned
}

impl Surroundings<'_> {
    /// A rotated sibling of this name that nobody knows is a generation that we missed, if it
    /// changed after this: after the newest generation that we know was found. (Saved times will
    /// not do: between a save and a crash a generation may come and go.)
    fn since(&self, path: &Path) -> Option<SystemTime> {
        let related = |known: &&Known| known.path() == path || are_siblings(&known.path(), path);
        self.lost.iter().chain(self.held).filter(related).filter_map(Known::found_at).max()
    }
}

/// Rotated siblings come into play where a known run's place is taken by a file that nobody knows,
/// or where its file is gone.
///
/// A rotation while we look renames a file from a name that we have not opened yet to one that we
/// have: the names are listed again afterwards, until nothing has moved.
fn add_all_siblings(found: &mut Vec<Found>, around: Surroundings<'_>) -> io::Result<()> {
    let is_taken = |known: &&Known| found.iter().any(|found| found.tail.path() == known.path());
    let taken = around.held.iter().filter(is_taken);
    let mut paths: Vec<(PathBuf, usize)> = around
        .lost
        .iter()
        .chain(taken)
        .filter_map(|known| Some((known.path(), known.source?)))
        .filter(|(path, _)| path.is_absolute())
        .collect();
    paths.sort();
    paths.dedup_by(|a, b| a.0 == b.0);
    let mut inodes: Vec<Inode> = found.iter().map(|found| found.tail.inode()).collect();
    inodes.extend(around.held.iter().map(Known::inode));
    let wanted = found.len();
    for _ in 0..LISTINGS_MAX {
        let before = list_siblings(&paths)?;
        for (path, source, _) in &before {
            let Ok(tail) = Tail::open(path, false) else { continue };
            let is_known = found.iter().any(|found| found.tail.inode() == tail.inode());
            if !is_known && !inodes.contains(&tail.inode()) {
                found.push(Found { tail, source: *source, wanted: false });
            }
        }
        if list_siblings(&paths)? == before {
            return Ok(());
        }
        found.truncate(wanted);
    }
    Err(io::Error::other("files are renamed faster than they can be opened"))
}

/// Known paths and their siblings, with sources and inodes. (A known path with a rotated name is
/// one that no pattern may name.)
fn list_siblings(paths: &[(PathBuf, usize)]) -> io::Result<Vec<(PathBuf, usize, Option<Inode>)>> {
    let mut listed = Vec::new();
    for (path, source) in paths {
        let itself = is_rotated_name(path.as_os_str().as_bytes()).map(|_| path.clone());
        for sibling in itself.into_iter().chain(siblings(path)?) {
            let inode = sibling.symlink_metadata().ok().as_ref().map(Inode::of);
            listed.push((sibling, *source, inode));
        }
    }
    listed.sort();
    listed.dedup_by(|a, b| a.0 == b.0);
    Ok(listed)
}

/// Whether a file holds the bytes of a run whose file is open, under a rotated name of it.
fn is_copy(tail: &mut Tail, around: Surroundings<'_>) -> bool {
    let age =
        tail.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
    let in_the_making = around.patient && age.is_none_or(|age| age < SETTLED_AFTER);
    // Rotation copies to a rotated name, never back: what has the plain name is a new generation,
    // even where its first lines are those of the one before.
    is_rotated_name(tail.path().as_os_str().as_bytes()).is_some()
        && around.held.iter().any(|known| {
            if known.progress.prefix.length == 0 || !are_siblings(&known.path(), tail.path()) {
                return false;
            }
            let whole = matches!(matches(tail, &known.progress), Ok(Match::Whole));
            whole || (in_the_making && may_become(tail, known))
        })
}

/// Whether a file's first bytes, as far as they go, do not contradict those of a run.
fn may_become(tail: &mut Tail, known: &Known) -> bool {
    match first_bytes(tail) {
        Ok(first) if first.len() < known.progress.prefix.length as usize => true,
        Ok(first) => {
            prefix(&first[..known.progress.prefix.length as usize]) == known.progress.prefix
        }
        Err(_) => true,
    }
}

/// Whether rotation makes one of these paths from the other, or both from a third.
pub fn are_siblings(a: &Path, b: &Path) -> bool {
    match (a.file_name(), b.file_name()) {
        (Some(a_name), Some(b_name)) if a.parent() == b.parent() => {
            is_sibling(a_name.as_bytes(), b_name.as_bytes())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
