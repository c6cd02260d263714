//! Who a file is: which known run of bytes goes on in it, or whether it is new.
//!
//! Paths and inodes propose; bytes decide (see [`super::fingerprint`]). Called with every file that
//! no open stream holds, whenever something turned up or went missing. The rules, in this order:
//!
//! 1. A run whose own inode is there and holds its bytes is at home, and stays there.
//! 2. A run without a home goes on in a file with a rotated name that holds its bytes: a copy that
//!    copytruncate made, or an archive. An equal file under the plain name is the next generation,
//!    unless the whole file system may be another one.
//! 3. After a reboot, a home may have lost its tail.
//! 4. An archive beside its plain file, and a copy beside an original at its plain name, wait for
//!    as long as their bytes agree with it. They are decided anew each time.
//! 5. Whatever is left is a run from its first byte: doubt costs duplicates, never lines. Only at a
//!    source's first run are rotated files passed over; that is durable before anything is followed.
//!
//! No clock decides what is sent (times only order what bytes leave open), and no decision depends
//! on which others of the same sweep became durable.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tracing::debug;
use uuid::Uuid;

use super::fingerprint::{FINGERPRINT_BYTES, Match, PREFIX_BYTES_MAX, matches};
use super::siblings::{are_related, has_rotated_name, is_archive_name, is_rotation};
use super::tail::{Inode, OpenError, Tail};
use crate::record::{SegmentId, unescape_path};
use crate::state::Progress;

/// How far two files are compared from an offset on.
const COMPARED_BYTES: usize = 64 << 10;

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
    /// Where its file was seen last.
    pub fn path(&self) -> PathBuf {
        unescape_path(&self.progress.place.path)
    }

    fn inode(&self) -> Inode {
        Inode { device: self.progress.place.device, inode: self.progress.place.inode }
    }

    fn has_inode_of_run(&self, other: &Known) -> bool {
        let (place, other) = (&self.progress.place, &other.progress.place);
        (place.device, place.inode, place.born) == (other.device, other.inode, other.born)
    }

    /// How many bytes of it are known by a hash.
    fn evidence(&self) -> u64 {
        self.progress.position.max(self.progress.prefix.length.into())
    }

    /// The device may be numbered anew at each boot, and a number given to another file: that one
    /// was born later.
    fn has_inode_of(&self, tail: &Tail) -> bool {
        let place = &self.progress.place;
        place.inode == tail.inode().inode
            && (place.born == 0 || tail.born() == 0 || place.born == tail.born())
    }
}

/// A run whose bytes are in hand: its file is open, or rests, or is sent from a kept copy.
#[derive(Clone, Debug)]
pub struct Held {
    /// The run.
    pub known: Known,
    /// Where its file is now; `None` where it has no name that we know.
    pub at: Option<PathBuf>,
}

/// A file that no open stream holds.
#[derive(Debug)]
pub struct Found {
    /// Where it is now: it may have been renamed since it was opened.
    pub path: PathBuf,
    /// Opened.
    pub tail: Tail,
    /// Number of its source in the configuration.
    pub source: usize,
    /// The source's pattern names it; otherwise it is only a sibling of a known file.
    pub wanted: bool,
    /// It lies where the source says that rotated files lie too.
    pub elsewhere: bool,
}

impl Found {
    fn is_related(&self, path: &Path) -> bool {
        are_related(path, &self.path, self.elsewhere)
    }

    /// Under a name that rotation gives, or in a place for rotated files.
    fn is_rotated(&self) -> bool {
        self.elsewhere || has_rotated_name(&self.path)
    }

    /// Under a name, or in a place, that rotation gives to a file of this path.
    fn is_rotated_from(&self, path: &Path) -> bool {
        self.elsewhere || is_rotation(path, &self.path)
    }
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
    /// A copy of another file (by copytruncate, or an archive in the making): left alone while it
    /// agrees with that one.
    Copy {
        /// The copy.
        found: Found,
    },
    /// A rotated file from before the first run of its source: durably passed over.
    PassOver {
        /// The file.
        found: Found,
    },
}

/// What recognition looks at besides the files.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Runs without an open file.
    pub lost: &'a [Known],
    /// Runs whose bytes are in hand.
    pub held: &'a [Held],
    /// Numbers of the sources that are at their first run.
    pub first_run: &'a [usize],
    /// Whether the machine went down since positions were saved: only then can a file have lost
    /// its tail. Otherwise one that is too short was truncated, whatever it holds now.
    pub rebooted: bool,
}

/// Decides over all files. New files come last, in the order in which they must become durable:
/// rotated ones first, the oldest first, so that none is taken for a copy of its successor later.
pub fn recognise(mut found: Vec<Found>, around: Surroundings<'_>) -> io::Result<Vec<Decision>> {
    let assigned = assign(&mut found, around);
    let mut originals: Vec<Original<'_>> = around.held.iter().filter_map(Original::held).collect();
    let mut decisions = Vec::new();
    let mut rest = Vec::new();
    for (found, assigned) in found.into_iter().zip(assigned) {
        match assigned {
            Some(Assigned::Run { run, until }) => {
                originals.push(Original { at: found.path.clone(), known: Some(run) });
                decisions.push(Decision::Continue { run: run.run, found, until });
            }
            Some(Assigned::Archive) => decisions.push(Decision::Copy { found }),
            None => rest.push((found.tail.modified()?, found)),
        }
    }
    // A file before its archive: whoever stays behind is the copy.
    rest.sort_by_key(|(modified, found)| (found.tail.is_compressed(), *modified));
    let mut new = Vec::new();
    for (modified, mut found) in rest {
        if originals.iter().any(|original| original.has_copy(&mut found)) {
            // An archive may be in the making from it.
            originals.push(Original { at: found.path.clone(), known: None });
            decisions.push(Decision::Copy { found });
        } else {
            originals.push(Original { at: found.path.clone(), known: None });
            new.push((found.is_rotated(), modified, found));
        }
    }
    new.sort_by_key(|(rotated, modified, _)| (!*rotated, *modified));
    for (_, _, found) in new {
        let is_foreign = !found.wanted && around.first_run.contains(&found.source);
        decisions.push(match is_foreign {
            true => Decision::PassOver { found },
            false => Decision::New { found },
        });
    }
    Ok(decisions)
}

#[derive(Clone, Copy)]
enum Assigned<'a> {
    Run {
        run: &'a Known,
        until: Option<u64>,
    },
    /// Of a run in hand whose file is gone.
    Archive,
}

/// How a file may be a run's; the better one first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Home,
    Rotated,
    Moved,
    Shortened,
}

/// A run and a file that may be its own.
#[derive(Clone, Copy)]
struct Pair {
    fit: Fit,
    run: usize,
    file: usize,
    until: Option<u64>,
}

/// Pairs files with lost runs, and archives with runs in hand whose file is gone.
fn assign<'a>(found: &mut [Found], around: Surroundings<'a>) -> Vec<Option<Assigned<'a>>> {
    let nameless = around.held.iter().filter(|held| held.at.is_none());
    let runs: Vec<&Known> = around.lost.iter().chain(nameless.map(|held| &held.known)).collect();
    let mut pairs = Vec::new();
    for (run, known) in runs.iter().enumerate() {
        // Truncated: whoever took its place has its inode.
        let has_inode = |found: &Found| known.has_inode_of(&found.tail);
        let inode_is_there = found.iter().any(has_inode)
            || around.held.iter().any(|held| held.known.has_inode_of_run(known));
        for (file, found) in found.iter_mut().enumerate() {
            let fit = if run < around.lost.len() {
                fit(found, known, inode_is_there, around.rebooted)
            } else {
                Ok(is_archive_of_gone(found, known).then_some((Fit::Rotated, None)))
            };
            match fit {
                Ok(Some((fit, until))) => pairs.push(Pair { fit, run, file, until }),
                Ok(None) => {}
                // An archive that is being written, a disk that fails: looked at again later.
                Err(error) => {
                    debug!(path = %found.path.display(), %error, "cannot be compared yet");
                }
            }
        }
    }
    // An archive beside its plain file is nobody's.
    let plain = found.iter().map(|found| found.path.clone());
    let plain: Vec<PathBuf> =
        plain.chain(around.held.iter().filter_map(|held| held.at.clone())).collect();
    let is_beside: Vec<bool> =
        found.iter_mut().map(|found| plain.iter().any(|at| is_archive_of(found, at))).collect();
    pairs.retain(|pair| pair.fit == Fit::Home || !is_beside[pair.file]);
    let truncated: Vec<bool> =
        (0..runs.len()).map(|run| was_truncated(found, &runs, run, &pairs)).collect();
    pairs.retain(|pair| pair.fit != Fit::Home || !truncated[pair.run]);
    // An inode that was used again is its last run's. Elsewhere the run goes first of which most
    // bytes are known, since a first line fits many files; and the oldest run to the oldest file.
    let modified: Vec<Option<SystemTime>> =
        found.iter().map(|found| found.tail.modified().ok()).collect();
    pairs.sort_by_key(|pair| {
        let known = runs[pair.run];
        let tail = &found[pair.file].tail;
        let newest = (pair.fit == Fit::Home).then_some(Reverse(known.opened));
        let same_device = known.inode().device == tail.inode().device;
        let rank = (pair.fit, !same_device, newest, Reverse(known.evidence()));
        (rank, known.opened, modified[pair.file], tail.is_compressed(), pair.file)
    });
    let mut assigned = vec![None; found.len()];
    let mut taken = vec![false; runs.len()];
    for Pair { run, file, until, .. } in pairs {
        if assigned[file].is_none() && !taken[run] {
            taken[run] = true;
            assigned[file] = Some(match around.lost.get(run) {
                Some(run) => Assigned::Run { run, until },
                None => Assigned::Archive,
            });
        }
    }
    assigned
}

/// Whether, and how, a run may go on in a file; also where a lost tail begins.
fn fit(
    found: &mut Found,
    known: &Known,
    inode_is_there: bool,
    rebooted: bool,
) -> io::Result<Option<(Fit, Option<u64>)>> {
    let same_inode = known.has_inode_of(&found.tail);
    // In another source, only the very same file is the run's.
    let same_device = known.inode().device == found.tail.inode().device;
    if known.source != Some(found.source) && !(same_inode && (same_device || rebooted)) {
        return Ok(None);
    }
    let same_path = known.path() == found.path;
    let related = found.is_related(&known.path());
    if !same_inode && !related {
        return Ok(None);
    }
    let shrank = same_inode
        && !rebooted
        && !found.tail.is_compressed()
        && found.tail.size()? < known.progress.size;
    Ok(match matches(&mut found.tail, &known.progress)? {
        Match::Whole if same_inode && !shrank => Some((Fit::Home, None)),
        Match::Whole if same_inode => None,
        Match::Whole if found.is_rotated_from(&known.path()) => {
            // A plain file is a copy only of one that was truncated, or an archive unpacked.
            let is_plausible = found.tail.is_compressed()
                || inode_is_there
                || is_archive_name(&known.path(), &found.path);
            is_plausible.then_some((Fit::Rotated, None))
        }
        // Restored or moved to another disk. A first line alone proves nothing.
        Match::Whole => {
            let is_proof = known.progress.prefix.length as usize == PREFIX_BYTES_MAX;
            (same_path && is_proof && (rebooted || !same_device)).then_some((Fit::Moved, None))
        }
        // Lost in a power cut, which leaves the file where it was. A short copy elsewhere is no
        // continuation.
        Match::Until(offset) if rebooted && (same_inode || same_path) => {
            Some((Fit::Shortened, Some(offset)))
        }
        Match::Until(_) | Match::None => None,
    })
}

/// Whether a run's own inode was truncated and holds the same first bytes again: then its copy
/// under a rotated name, which is no other run's, holds other bytes behind the position. (A copy that somebody made of a file that goes on is a beginning of it.)
fn was_truncated(found: &mut [Found], runs: &[&Known], run: usize, pairs: &[Pair]) -> bool {
    let is_home = |pair: &&Pair| pair.fit == Fit::Home && pair.run == run;
    let home = pairs.iter().find(is_home).map(|pair| pair.file);
    let Some(home) = home.filter(|home| !found[*home].is_rotated()) else { return false };
    let evidence = runs[run].evidence();
    let is_anothers = |file| {
        pairs.iter().any(|pair| {
            pair.file == file
                && pair.run != run
                && (pair.fit == Fit::Home || runs[pair.run].evidence() > evidence)
        })
    };
    let from = runs[run].progress.position;
    let mut copies = pairs.iter().filter(|pair| {
        if pair.run != run || pair.fit != Fit::Rotated || is_anothers(pair.file) {
            return false;
        }
        let Ok([home, copy]) = found.get_disjoint_mut([home, pair.file]) else { return false };
        matches!(begins_with(&mut home.tail, &mut copy.tail, from), Ok(false))
    });
    // Each predecessor without a file accounts for one.
    let is_at_home = |run| pairs.iter().any(|pair| pair.fit == Fit::Home && pair.run == run);
    let is_predecessors = |pair: &&Pair| {
        pair.fit == Fit::Rotated
            && !is_at_home(pair.run)
            && is_predecessor(runs[pair.run], runs[run])
    };
    let predecessors: BTreeSet<usize> =
        pairs.iter().filter(is_predecessors).map(|pair| pair.run).collect();
    copies.nth(predecessors.len()).is_some()
}

/// Whether a run's file had the other one's name before it, was another file, and no more is known
/// of the other: what fits both under a rotated name is the earlier one's.
fn is_predecessor(known: &Known, other: &Known) -> bool {
    known.opened < other.opened
        && known.path() == other.path()
        && known.inode() != other.inode()
        && known.evidence() == other.evidence()
}

/// Whether this is an archive of all that is known of a run whose file is gone.
fn is_archive_of_gone(found: &mut Found, known: &Known) -> bool {
    found.tail.is_compressed()
        && known.progress.prefix.length > 0
        && found.is_related(&known.path())
        && matches!(matches(&mut found.tail, &known.progress), Ok(Match::Whole))
}

/// Whether this is the archive, whole or in the making, of the file at this path. One that was there
/// a moment ago and is gone was compressed meanwhile: the next sweep, which knows that, decides.
fn is_archive_of(found: &mut Found, at: &Path) -> bool {
    found.tail.is_compressed()
        && is_archive_name(&found.path, at)
        && (is_beginning(found, at) || !at.exists())
}

/// A copy that cannot be read yet is in the making. What cannot be compared for want of descriptors
/// waits as a copy does.
fn is_beginning(found: &mut Found, at: &Path) -> bool {
    let mut original = match Tail::open(at, true) {
        Ok(original) => original,
        Err(error) => return matches!(error, OpenError::Exhausted(_)),
    };
    begins_with(&mut original, &mut found.tail, 0).unwrap_or(true)
}

/// A file of which another one may be a copy.
struct Original<'a> {
    at: PathBuf,
    /// `None` for one that is new in this sweep.
    known: Option<&'a Known>,
}

impl<'a> Original<'a> {
    fn held(held: &'a Held) -> Option<Original<'a>> {
        Some(Original { at: held.at.clone()?, known: Some(&held.known) })
    }

    fn has_copy(&self, found: &mut Found) -> bool {
        let at = &self.at;
        if is_archive_of(found, at) {
            return true;
        }
        if !found.tail.is_compressed() && is_archive_name(at, &found.path) {
            return is_beginning(found, at);
        }
        let Some(known) = self.known else { return false };
        if !found.is_related(at) || !found.is_rotated_from(at) {
            return false;
        }
        // Rotation copies from the plain name to a rotated one, never back. Where the original was
        // there before, no generation can have come from its name since: only copies do.
        let is_plain_name = !has_rotated_name(at);
        if found.tail.is_compressed() {
            return is_plain_name && was_cut_off(known, at, found);
        }
        (is_plain_name && is_beginning(found, at)) || was_cut_off(known, at, found)
    }
}

/// Whether the file of a run in hand was truncated, and this is the copy made before: the run's
/// stream is about to notice, and then goes on in the copy.
fn was_cut_off(known: &Known, at: &Path, found: &mut Found) -> bool {
    let mut original = match Tail::open(at, true) {
        Ok(original) => original,
        Err(error) => return matches!(error, OpenError::Exhausted(_)),
    };
    let is_whole = |tail: &mut Tail| matches!(matches(tail, &known.progress), Ok(Match::Whole));
    let is_short = original.size().is_ok_and(|size| size < known.progress.size);
    (is_short || !is_whole(&mut original)) && is_whole(&mut found.tail)
}

/// Whether all bytes of `copy` are the first ones of `original`, as far as some from `from` on and
/// the last ones show it.
fn begins_with(original: &mut Tail, copy: &mut Tail, from: u64) -> io::Result<bool> {
    let mut copied = Vec::new();
    copy.append_at(from, COMPARED_BYTES, &mut copied)?;
    if !agrees(original, from, &copied)? {
        return Ok(false);
    }
    if copy.is_compressed() {
        return Ok(true);
    }
    let last = copy.size()?.saturating_sub(FINGERPRINT_BYTES as u64);
    copied.clear();
    copy.append_at(last, FINGERPRINT_BYTES, &mut copied)?;
    agrees(original, last, &copied)
}

fn agrees(original: &mut Tail, from: u64, bytes: &[u8]) -> io::Result<bool> {
    let mut here = Vec::new();
    original.append_at(from, bytes.len(), &mut here)?;
    Ok(here == bytes)
}

#[cfg(test)]
mod tests;
