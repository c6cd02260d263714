//! What recognition is told, and what it is asked about: known runs, where they are, and which
//! rotated files were there before us.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tracing::info;
use uuid::Uuid;

use super::{FileSource, Follower, Held, Resting};
use crate::descriptors;
use crate::record::{Framing, escape_path, unescape_path};
use crate::sender::rows::passed_over;
use crate::source::files::discovery::has_wildcard;
use crate::source::files::recognition::{self, Decision, Found, Known, Surroundings};
use crate::source::files::siblings::base;
use crate::source::files::survey::{Scope, Survey, SurveyError, survey};
use crate::source::files::tail::Inode;
use crate::state::{Entry, Progress, Stamp};

impl Follower {
    /// Decides over the files found, and over all rotated files that this brings into play, but not
    /// over the families that wait for their turn.
    pub(super) fn recognise(
        &mut self,
        found: Vec<Found>,
        waiting: &HashSet<PathBuf>,
    ) -> Result<usize, Undecided> {
        let in_play: HashSet<PathBuf> = found.iter().map(|found| family(&found.path)).collect();
        let absent: HashSet<PathBuf> = waiting.difference(&in_play).cloned().collect();
        let mut all = self.known();
        self.leave_out(&absent, &mut all, &found);
        let scope = self.scope(&all, &found, absent);
        let streaming: HashMap<Inode, Uuid> =
            self.streams.iter().map(|(run, held)| (held.inode, *run)).collect();
        let rests = |inode: Inode, stamp: Stamp| {
            self.resting.get(&inode).is_some_and(|resting| resting.is_as_left(stamp))
        };
        let is_decided = |inode: Inode, stamp: Stamp| {
            self.copies.get(&inode).is_some_and(|copy| copy.is_decided(stamp))
        };
        let is_known = |inode, stamp| {
            streaming.contains_key(&inode) || rests(inode, stamp) || is_decided(inode, stamp)
        };
        let Survey { found, places } =
            survey(found, &scope, descriptors::compared_max(), is_known)?;
        for (inode, (path, stamp)) in &places {
            if let Some(held) = streaming.get(inode).and_then(|run| self.streams.get_mut(run)) {
                held.renamed(path);
            } else if let Some(resting) =
                self.resting.get_mut(inode).filter(|resting| resting.is_as_left(*stamp))
            {
                resting.path.clone_from(path);
                self.at_rest.insert(resting.run);
            }
        }
        self.resting.retain(|_, resting| self.at_rest.contains(&resting.run));
        let (held, lost): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|known| self.is_held(known.run));
        let held: Vec<recognition::Held> = held.into_iter().map(|known| self.held(known)).collect();
        let is_unsurveyed = |number: &usize| {
            self.context.state.is_unsurveyed(&self.sources[*number].attributes.source.name)
        };
        let first_run: Vec<usize> = (0..self.sources.len()).filter(is_unsurveyed).collect();
        // A file that gets shorter while we look was truncated.
        let rebooted = self.first && self.context.state.rebooted();
        let around = Surroundings { lost: &lost, held: &held, first_run: &first_run, rebooted };
        let decisions = recognition::recognise(found, around)?;
        let (passed, decisions): (Vec<_>, Vec<_>) =
            decisions.into_iter().partition(|one| matches!(one, Decision::PassOver { .. }));
        if !first_run.is_empty() {
            self.pass_over(&first_run, passed)?;
        }
        Ok(self.carry_out(decisions))
    }

    /// Leaves runs out of the decision whose file may be one that was not opened for want of
    /// descriptors: nothing must take them for gone, nor follow in their place.
    fn leave_out(&self, absent: &HashSet<PathBuf>, known: &mut Vec<Known>, found: &[Found]) {
        let inodes: HashSet<Inode> = found.iter().map(|found| found.tail.inode()).collect();
        known.retain(|known| {
            let place = &known.progress.place;
            let inode = Inode { device: place.device, inode: place.inode };
            self.is_held(known.run)
                || !absent.contains(&family(&known.path()))
                || inodes.contains(&inode)
        });
    }

    /// The families of all names that are in play. Of those that wait for their turn nothing is
    /// opened, also where one of their files is held: their other runs are left out, and what is
    /// opened would be taken for new.
    fn scope(&self, known: &[Known], found: &[Found], absent: HashSet<PathBuf>) -> Scope {
        let of_runs = known.iter().filter_map(|known| Some((known.path(), known.source?)));
        let of_found = found.iter().map(|found| (found.path.clone(), found.source));
        let mut scope = Scope { bases: of_runs.chain(of_found).collect(), ..Scope::default() };
        for (number, source) in self.sources.iter().enumerate() {
            if !has_wildcard(&source.pattern) {
                scope.bases.push((PathBuf::from(&source.pattern), number));
            }
            scope.rotated.extend(source.rotated.iter().map(|pattern| (pattern.clone(), number)));
        }
        scope.bases.retain(|(path, _)| !absent.contains(&family(path)));
        scope.absent = absent;
        scope
    }

    /// Notes durably, before anything is followed, which rotated files were there before us.
    fn pass_over(&mut self, sources: &[usize], passed: Vec<Decision>) -> io::Result<()> {
        let (mut entries, mut at_rest) = (Vec::new(), Vec::new());
        for decision in passed {
            let Decision::PassOver { mut found } = decision else { continue };
            let path = escape_path(&found.path);
            let attributes = &self.sources[found.source].attributes;
            match passed_over(attributes, &mut found.tail, &found.path) {
                Ok(entry) => {
                    info!(%path, "a rotated file from before the first run: passed over");
                    at_rest.extend(resting(&entry).map(|rests| (found.tail.inode(), rests)));
                    entries.push(entry);
                }
                Err(error) => self.complain(&found.path, format!("cannot be read: {error}"), true),
            }
        }
        let name = |number: &usize| self.sources[*number].attributes.source.name.clone();
        let names = sources.iter().map(name).collect();
        self.context.state.pass_over(names, entries, &[])?;
        self.at_rest.extend(at_rest.iter().map(|(_, resting)| resting.run));
        self.resting.extend(at_rest);
        Ok(())
    }

    /// Where the file of a run in hand is now. That of a kept copy is gone.
    fn held(&self, mut known: Known) -> recognition::Held {
        let named = |held: &Held| {
            let metadata = fs::metadata(&held.path).ok();
            let is_there = metadata.is_some_and(|metadata| Inode::of(&metadata) == held.inode);
            is_there.then(|| held.path.clone())
        };
        let rests = || self.resting.values().find(|resting| resting.run == known.run);
        let at = match self.streams.get(&known.run) {
            Some(held) => named(held),
            None => rests().map(|resting| resting.path.clone()),
        };
        // What came into an empty file is in hand, though its stream has not seen it yet.
        if at.is_none()
            && known.progress.prefix.length == 0
            && let Some(prefix) = self.streams.get(&known.run).and_then(Held::prefix)
        {
            known.progress.prefix = prefix;
        }
        recognition::Held { known, at }
    }

    /// What the state knows of the runs of files.
    fn known(&self) -> Vec<Known> {
        let mut runs: HashMap<Uuid, Known> = HashMap::new();
        for (entry, progress) in self.context.state.entries() {
            if !matches!(entry.row.framing, Framing::Lines { .. }) {
                continue;
            }
            let named = |source: &FileSource| source.attributes.source.name == entry.row.source;
            let source = self.sources.iter().position(named);
            match runs.get_mut(&entry.run) {
                // Entries come oldest first: a later row knows the place better.
                Some(known) => join(&mut known.progress, progress),
                None => {
                    let opened = entry.row.segment;
                    runs.insert(entry.run, Known { run: entry.run, source, progress, opened });
                }
            }
        }
        let mut known: Vec<Known> = runs.into_values().collect();
        known.sort_by_key(|known| known.opened);
        known
    }
}

/// Why nothing is decided in this sweep.
#[derive(Debug, Error)]
pub(super) enum Undecided {
    #[error(transparent)]
    Survey(#[from] SurveyError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The name that a file and its rotated siblings share.
pub(super) fn family(path: &Path) -> PathBuf {
    let base = path.file_name().map_or(&[][..], |name| base(name.as_bytes()));
    path.with_file_name(OsStr::from_bytes(base))
}

fn resting(entry: &Entry) -> Option<Resting> {
    let progress = entry.passed_over.as_ref()?;
    let path = unescape_path(&entry.row.path);
    Some(Resting { stamp: progress.rest?, may_grow: false, run: entry.run, path })
}

/// Joins what two rows of one run know of it.
fn join(older: &mut Progress, newer: Progress) {
    if newer.prefix.length >= older.prefix.length {
        older.prefix = newer.prefix;
    }
    older.position = older.position.max(newer.position);
    older.place = newer.place;
    older.seen_ms = newer.seen_ms;
    older.size = older.size.max(newer.size);
    older.fingerprints.extend(newer.fingerprints);
    older.fingerprints.sort_by_key(|mark| std::cmp::Reverse(mark.offset));
    older.fingerprints.dedup_by_key(|mark| mark.offset);
}
