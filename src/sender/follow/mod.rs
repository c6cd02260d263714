//! Following files: finds them, recognises them, and gives each one a stream.

mod memory;
mod recognising;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::task::{JoinSet, block_in_place};
use tracing::{error, info, warn};
use uuid::Uuid;

use recognising::{Undecided, family};

use super::Context;
use super::link::Mailbox;
use super::rows::Attributes;
use super::stream::{End, Ended, Flags, Parts, Stream, file_origin};
use crate::config::{Input, Start};
use crate::descriptors;
use crate::record::{Framing, Prefix, escape_path};
use crate::source::files::discovery::{Hints, SWEEP_INTERVAL, Sweep, has_wildcard, sweep};
use crate::source::files::fingerprint::{PREFIX_BYTES_MAX, prefix};
use crate::source::files::recognition::{Decision, Found};
use crate::source::files::siblings::is_rotated_name;
use crate::source::files::survey::SurveyError;
use crate::source::files::tail::{Inode, OpenError, Tail};
use crate::spool::Throttle;
use crate::state::{Entry, Progress, Stamp};

/// Hints in quick succession are answered by one sweep.
const HINTS_SETTLE: Duration = Duration::from_millis(20);

/// How often rows learn that their files are still there.
const SEEN_INTERVAL: Duration = Duration::from_secs(3600);

/// An archive beside its original is compared with it again after so long.
const ARCHIVE_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Follows the files of all sources.
pub struct Follower {
    context: Arc<Context>,
    sources: Vec<FileSource>,
    streams: HashMap<Uuid, Held>,
    /// Files without a stream, since everything of them is receipted.
    resting: HashMap<Inode, Resting>,
    /// Runs of those that the current sweep met as they were left.
    at_rest: HashSet<Uuid>,
    /// Files that hold what another one holds: decided anew in each sweep.
    copies: HashMap<Inode, Waiting>,
    complaints: HashMap<PathBuf, String>,
    /// Patterns of which it was said that nothing matches them.
    unmatched: HashSet<String>,
    /// Ranges of runs whose file was lost: reported unless they turn up in the next sweep.
    missing: HashMap<Uuid, Ended>,
    /// Runs that are sent from their copy in the state directory.
    kept: HashSet<Uuid>,
    tasks: JoinSet<Ended>,
    runs: HashMap<tokio::task::Id, Uuid>,
    /// When rows learnt last that their files are there.
    seen_at: Option<Instant>,
    /// No sweep has looked for known runs yet.
    first: bool,
    /// No sweep has looked for all of them yet.
    vanished_unknown: bool,
    /// How many files are taken up in the next sweep: fewer after one that needed too many
    /// descriptors.
    batch: usize,
    /// Files wait for their turn; has been said.
    crowded: Throttle,
    failed: bool,
}

struct FileSource {
    attributes: Arc<Attributes>,
    pattern: String,
    literal: Option<PathBuf>,
    rotated: Vec<String>,
    follow_symlinks: bool,
}

/// A stream that runs.
struct Held {
    mailbox: Arc<Mailbox>,
    flags: Arc<Flags>,
    inode: Inode,
    path: PathBuf,
    stamp: Option<Stamp>,
    file: Weak<File>,
}

impl Held {
    /// What its first bytes are by now, whatever its name.
    fn prefix(&self) -> Option<Prefix> {
        let mut first = [0; PREFIX_BYTES_MAX];
        let read = self.file.upgrade()?.read_at(&mut first, 0).ok()?;
        Some(prefix(&first[..read]))
    }

    fn look(&self) {
        self.flags.look.store(true, Ordering::Relaxed);
        self.mailbox.wake.notify_one();
    }

    /// Its file has this name now.
    fn renamed(&mut self, path: &Path) {
        if self.path != path {
            self.path = path.to_owned();
            self.flags.renamed(path);
            self.look();
        }
    }
}

/// A copy.
struct Waiting {
    stamp: Stamp,
    /// `None` for one that is decided anew in the next sweep.
    decided_at: Option<Instant>,
}

impl Waiting {
    /// To compare an archive is to unpack it: that is not done in each sweep.
    fn is_decided(&self, stamp: Stamp) -> bool {
        self.stamp == stamp && self.decided_at.is_some_and(|at| at.elapsed() < ARCHIVE_AGAIN_AFTER)
    }
}

/// A file that needs no stream while it looks like this.
struct Resting {
    stamp: Stamp,
    /// With `--once`, it had its stream: what it has grown since is for the next start.
    may_grow: bool,
    run: Uuid,
    path: PathBuf,
}

impl Resting {
    fn is_as_left(&self, stamp: Stamp) -> bool {
        self.stamp == stamp || (self.may_grow && self.stamp.size <= stamp.size)
    }
}

/// What one sweep has seen.
#[derive(Default)]
struct Seen {
    paths: HashMap<PathBuf, Inode>,
    held: HashMap<Inode, Uuid>,
    inodes: HashSet<Inode>,
    found: Vec<Found>,
    /// Their families.
    families: HashSet<PathBuf>,
    /// Families of files for which there is no descriptor now.
    waiting: HashSet<PathBuf>,
    /// Files that no pattern names, and that are not where they rested.
    moved: bool,
}

impl Follower {
    /// For the file sources among `sources`.
    pub fn new(context: Arc<Context>, sources: &[Arc<Attributes>]) -> Follower {
        let file_source = |attributes: &Arc<Attributes>| match &attributes.source.input {
            Input::Files { pattern, literal, rotated } => Some(FileSource {
                attributes: attributes.clone(),
                pattern: pattern.clone(),
                literal: literal.clone(),
                rotated: rotated.clone(),
                follow_symlinks: attributes.source.follow_symlinks,
            }),
            _ => None,
        };
        Follower {
            sources: sources.iter().filter_map(file_source).collect(),
            streams: HashMap::new(),
            resting: HashMap::new(),
            at_rest: HashSet::new(),
            copies: HashMap::new(),
            complaints: HashMap::new(),
            unmatched: HashSet::new(),
            missing: HashMap::new(),
            kept: HashSet::new(),
            tasks: JoinSet::new(),
            runs: HashMap::new(),
            seen_at: None,
            first: true,
            vanished_unknown: true,
            batch: usize::MAX,
            crowded: Throttle::default(),
            failed: false,
            context,
        }
    }

    /// Follows until stopped, or, with `--once`, until everything there is receipted. `false`
    /// where some lines could not be.
    pub async fn run(mut self) -> bool {
        block_in_place(|| {
            self.take_up_copies();
            self.take_up_resting();
        });
        let mut hints = Hints::new();
        while !self.context.stopping.is_cancelled() {
            let started = block_in_place(|| self.sweep(&mut hints));
            let is_crowded = self.context.crowded.load(Ordering::Relaxed);
            if self.context.config.once && self.tasks.is_empty() && started == 0 && !is_crowded {
                break;
            }
            let stopping = self.context.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => break,
                () = hints.changed() => tokio::time::sleep(HINTS_SETTLE).await,
                () = tokio::time::sleep(SWEEP_INTERVAL) => {}
                Some(ended) = self.tasks.join_next() => self.ended(ended),
            }
            while let Some(ended) = self.tasks.try_join_next() {
                self.ended(ended);
            }
        }
        while let Some(ended) = self.tasks.join_next().await {
            self.ended(ended);
        }
        !self.failed
    }

    fn ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // Its rows are as they were: the next sweep recognises the file anew.
                error!(%error, "a stream ended unexpectedly and is started again");
                if let Some(run) = self.runs.remove(&error.id()) {
                    self.streams.remove(&run);
                    self.kept.remove(&run);
                }
                return;
            }
        };
        self.runs.retain(|_, run| *run != ended.run);
        self.kept.remove(&ended.run);
        let held = self.streams.remove(&ended.run);
        match ended.end {
            End::Rests | End::Failed => {
                self.failed |= ended.end == End::Failed;
                if let (Some(held), Some(stamp)) = (held, ended.stamp) {
                    let (run, path, may_grow) = (ended.run, held.path, self.context.config.once);
                    let resting = Resting { stamp, may_grow, run, path };
                    self.resting.insert(held.inode, resting);
                }
            }
            End::Lost => {
                // It may go on in one of them.
                self.copies.values_mut().for_each(|copy| copy.decided_at = None);
                self.missing.insert(ended.run, ended);
            }
            End::Done | End::Stopped => {}
        }
    }

    /// Looks at all patterns and all followed files; returns how many streams it started.
    fn sweep(&mut self, hints: &mut Hints) -> usize {
        self.at_rest.clear();
        let mut seen = Seen {
            held: self.streams.iter().map(|(run, held)| (held.inode, *run)).collect(),
            ..Seen::default()
        };
        for number in 0..self.sources.len() {
            let pattern = self.sources[number].pattern.clone();
            if let Some(folder) = watched_folder(&pattern) {
                hints.watch(folder);
            }
            let swept = self.sources[number].sweep();
            let nothing = swept.paths.iter().all(|path| path.is_dir());
            if nothing && swept.unreadable.is_empty() {
                self.complain_of_nothing(&pattern);
            }
            for (folder, error) in swept.unreadable {
                self.complain_of_folder(&pattern, &folder, error);
            }
            for path in swept.paths {
                if let Some(folder) = path.parent() {
                    hints.watch(folder);
                }
                if !seen.paths.contains_key(&path) {
                    self.visit(number, path, &mut seen);
                }
            }
        }
        self.look_at_resting(&mut seen);
        self.look_at_held(&seen.paths);
        let is_due = self.first
            || seen.moved
            || !seen.found.is_empty()
            || !self.missing.is_empty()
            || self.copies.values().any(|copy| !copy.is_decided(copy.stamp))
            || self.is_noting_due();
        let mut started = 0;
        if is_due {
            let number = seen.found.len();
            started = match self.recognise(seen.found, &seen.waiting) {
                Ok(started) => started,
                Err(Undecided::Survey(SurveyError::Crowded)) => {
                    self.take_up_fewer(number);
                    return 0;
                }
                Err(error) => {
                    self.failed |= self.context.config.once;
                    warn!(%error, "files could not be compared: it is tried again");
                    return 0;
                }
            };
            self.first = false;
            self.batch = usize::MAX;
            // A file that waits may be the one that is missed.
            if seen.waiting.is_empty() {
                self.report_missing();
                if std::mem::take(&mut self.vanished_unknown) {
                    self.report_vanished();
                }
            }
        }
        self.crowd(!seen.waiting.is_empty());
        // Also where nothing was found: what comes later was not there at the first run.
        self.mark_followed();
        self.note_seen();
        started
    }

    /// Whether somebody has this run's bytes in hand, so that no other file can be its own.
    fn is_held(&self, run: Uuid) -> bool {
        self.streams.contains_key(&run) || self.at_rest.contains(&run) || self.kept.contains(&run)
    }

    /// Files that rest where no pattern names them are looked at where they were.
    fn look_at_resting(&mut self, seen: &mut Seen) {
        for (inode, resting) in &self.resting {
            if self.at_rest.contains(&resting.run) {
                continue;
            }
            let metadata = fs::metadata(&resting.path);
            let is_there = metadata.is_ok_and(|metadata| {
                Inode::of(&metadata) == *inode && resting.is_as_left(Stamp::of(&metadata))
            });
            if is_there {
                self.at_rest.insert(resting.run);
            } else {
                seen.moved = true;
            }
        }
    }

    /// One path that a pattern names.
    fn visit(&mut self, number: usize, path: PathBuf, seen: &mut Seen) {
        let follow = self.sources[number].follow_symlinks;
        let metadata = if follow { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
        let metadata = match metadata {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.complain(&path, "is not there yet: waiting for it".to_owned(), false);
            }
            Err(error) => {
                return self.complain(&path, OpenError::from(error).to_string(), true);
            }
        };
        // What a pattern merely brushes is no mistake.
        if metadata.is_dir() && has_wildcard(&self.sources[number].pattern) {
            return;
        }
        let (inode, stamp) = (Inode::of(&metadata), Stamp::of(&metadata));
        seen.paths.insert(path.clone(), inode);
        if let Some(held) = seen.held.get(&inode).and_then(|run| self.streams.get_mut(run)) {
            // Renamed within the pattern, or simply still there.
            held.renamed(&path);
            return;
        }
        let rests = self.resting.get_mut(&inode).filter(|resting| resting.is_as_left(stamp));
        if let Some(resting) = rests {
            resting.path = path;
            self.at_rest.insert(resting.run);
            return;
        }
        let is_decided = self.copies.get(&inode).is_some_and(|copy| copy.is_decided(stamp));
        if is_decided {
            return;
        }
        let family = family(&path);
        // One that shares its family with another is needed to tell them apart.
        if !self.has_room(seen.found.len()) && !seen.families.contains(&family) {
            seen.waiting.insert(family);
            return;
        }
        if !seen.inodes.insert(inode) {
            return;
        }
        match Tail::open(&path, follow) {
            Ok(tail) => {
                seen.families.insert(family);
                let (path, source) = (path.clone(), number);
                seen.found.push(Found { path, tail, source, wanted: true, elsewhere: false });
            }
            Err(OpenError::Gone) => {}
            Err(error) => {
                let waits = matches!(error, OpenError::Exhausted(_));
                if waits {
                    seen.waiting.insert(family);
                }
                self.complain(&path, error.to_string(), !waits);
            }
        }
    }

    /// Whether one more file may be followed.
    fn has_room(&self, found: usize) -> bool {
        found < self.batch && self.tasks.len() + found < descriptors::followed_max()
    }

    /// Notes whether files wait for want of descriptors: then quiet ones are let go soon.
    fn crowd(&mut self, is_crowded: bool) {
        let was_crowded = self.context.crowded.swap(is_crowded, Ordering::Relaxed);
        if !is_crowded {
            return;
        }
        if self.crowded.count().is_some() {
            warn!(
                followed = self.tasks.len(),
                "there are more files than may be open: they are followed in turns; {}",
                descriptors::ADVICE
            );
        }
        if !was_crowded {
            self.streams.values().for_each(Held::look);
        }
    }

    /// Rotated files beside those found were too many to be open at a time.
    fn take_up_fewer(&mut self, found: usize) {
        let once = self.context.config.once;
        let gives_up = once && self.batch == 1 && self.tasks.is_empty();
        self.failed |= gives_up;
        self.batch = (found / 2).max(1);
        self.crowd(true);
        if gives_up {
            self.context.crowded.store(false, Ordering::Relaxed);
        }
    }

    /// A folder that cannot be listed. A pattern that names it finds nothing; one that merely
    /// brushes it on its way down goes on elsewhere.
    fn complain_of_folder(&mut self, pattern: &str, folder: &Path, error: io::Error) {
        let named = watched_folder(pattern) == Some(folder);
        self.complain(folder, OpenError::from(error).to_string(), named);
    }

    /// Says, once, that a pattern names no file: it may be mistyped.
    fn complain_of_nothing(&mut self, pattern: &str) {
        if !self.unmatched.insert(pattern.to_owned()) {
            return;
        }
        if self.context.config.once {
            warn!(pattern, "no file matches this pattern: nothing is sent for it");
        } else {
            info!(pattern, "no file matches this pattern yet: files that come are followed");
        }
    }

    /// Says what is wrong with a path, once.
    fn complain(&mut self, path: &Path, what: String, serious: bool) {
        if self.complaints.get(path) == Some(&what) {
            return;
        }
        if serious {
            self.failed |= self.context.config.once;
            warn!(path = %escape_path(path), "{what}");
        } else {
            self.failed |= self.context.config.once && !path.exists();
            info!(path = %escape_path(path), "{what}");
        }
        self.complaints.insert(path.to_owned(), what);
    }

    /// Tells each stream whether its file changed or moved.
    fn look_at_held(&mut self, present: &HashMap<PathBuf, Inode>) {
        for held in self.streams.values_mut() {
            let metadata = fs::metadata(&held.path).ok();
            let at_path = metadata.as_ref().map(Inode::of).or(present.get(&held.path).copied());
            let moved = at_path != Some(held.inode);
            let rotated_name = is_rotated_name(held.path.as_os_str().as_bytes())
                .is_some_and(|base| Path::new(std::ffi::OsStr::from_bytes(base)).exists());
            let succeeded = (moved && at_path.is_some()) || rotated_name;
            let was_succeeded = held.flags.succeeded.swap(succeeded, Ordering::Relaxed);
            let was_moved = held.flags.moved.swap(moved, Ordering::Relaxed);
            let stamp = metadata.filter(|_| !moved).as_ref().map(Stamp::of);
            // Where a moved file is now is not known: its stream looks at the descriptor itself.
            if moved || was_moved || succeeded != was_succeeded || stamp != held.stamp {
                held.stamp = stamp;
                held.look();
            }
        }
    }

    fn carry_out(&mut self, decisions: Vec<Decision>) -> usize {
        let mut started = 0;
        let mut copies = std::mem::take(&mut self.copies);
        for decision in decisions {
            let (found, run, until, start) = match decision {
                Decision::Continue { run, found, until } => (found, run, until, 0),
                Decision::New { mut found } => {
                    if !found.wanted {
                        info!(path = %escape_path(&found.path),
                            "a rotated generation that came and went unseen");
                    }
                    let start = match self.first_offset(&mut found) {
                        Ok(start) => start,
                        Err(error) => {
                            self.complain(&found.path, error.to_string(), true);
                            continue;
                        }
                    };
                    (found, Uuid::now_v7(), None, start)
                }
                Decision::Copy { found } => {
                    let inode = found.tail.inode();
                    if copies.remove(&inode).is_none() {
                        info!(path = %escape_path(&found.path), "holds what another file holds: \
                            it waits until that one is gone or their bytes differ");
                    }
                    let decided_at = found.tail.is_compressed().then(Instant::now);
                    if let Ok(stamp) = found.tail.stamp() {
                        self.copies.insert(inode, Waiting { stamp, decided_at });
                    }
                    continue;
                }
                Decision::PassOver { .. } => continue,
            };
            let path = found.path.clone();
            match self.attach(found, run, until, start) {
                Ok(()) => started += 1,
                Err(error) => self.complain(&path, format!("cannot be followed: {error}"), true),
            }
        }
        // Those that it was not their turn to be decided.
        copies.retain(|_, copy| copy.is_decided(copy.stamp));
        self.copies.extend(copies);
        started
    }

    fn attach(
        &mut self,
        found: Found,
        run: Uuid,
        until: Option<u64>,
        start: u64,
    ) -> io::Result<()> {
        let (path, inode, file) = (found.path, found.tail.inode(), found.tail.stored());
        let parts = Parts {
            context: self.context.clone(),
            attributes: self.sources[found.source].attributes.clone(),
            run,
            origin: file_origin(found.tail)?,
            known: rows_of(&self.context, run),
            until,
            start,
            kept: None,
        };
        let continued = !parts.known.is_empty();
        let stream = Stream::attach(parts)?;
        if let Some(until) = until {
            warn!(path = %escape_path(&path), offset = until,
                "the file lost its end, as after a power cut: reading goes on from there");
        }
        info!(path = %escape_path(&path), continued, backlog = stream.backlog(), "following");
        self.context.total_bytes.fetch_add(stream.backlog(), Ordering::Relaxed);
        self.complaints.remove(&path);
        self.missing.remove(&run);
        self.resting.remove(&inode);
        let (mailbox, flags) = (stream.mailbox(), stream.flags());
        flags.renamed(&path);
        self.streams.insert(run, Held { mailbox, flags, inode, path, stamp: None, file });
        let task = self.tasks.spawn(stream.run());
        self.runs.insert(task.id(), run);
        Ok(())
    }

    /// Where a new file starts: at its first byte, but for what `start = end` passes over.
    fn first_offset(&self, found: &mut Found) -> io::Result<u64> {
        let source = &self.sources[found.source].attributes.source;
        if source.start == Start::Beginning
            || !found.wanted
            || !self.context.state.is_first_run(&source.name)
            || found.tail.is_compressed()
        {
            return Ok(0);
        }
        let size = found.tail.size()?;
        let start = found.tail.last_boundary(0, size)?;
        info!(path = %escape_path(found.tail.path()), bytes = start,
            "passed over, because of start = \"end\" at this source's first run");
        Ok(start)
    }
}

impl FileSource {
    /// What its pattern names now, and the file whose very name looks like the pattern.
    fn sweep(&self) -> Sweep {
        let mut swept = sweep(&self.pattern);
        let literal = self.literal.iter().filter(|path| path.symlink_metadata().is_ok());
        swept.paths.extend(literal.cloned());
        swept
    }

    fn is_of(&self, entry: &Entry) -> bool {
        matches!(entry.row.framing, Framing::Lines { .. })
            && self.attributes.source.name == entry.row.source
    }
}

/// The rows of a run, with their progress.
pub fn rows_of(context: &Context, run: Uuid) -> Vec<(Entry, Progress)> {
    context.state.entries().into_iter().filter(|(entry, _)| entry.run == run).collect()
}

/// The folder of a pattern's first part without wildcards.
fn watched_folder(pattern: &str) -> Option<&Path> {
    let literal = &pattern[..pattern.find(['*', '?', '[']).unwrap_or(pattern.len())];
    Path::new(&literal[..=literal.rfind('/')?]).into()
}
