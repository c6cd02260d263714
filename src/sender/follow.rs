//! Following files: finds them, recognises them, and gives each one a stream.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::task::{JoinSet, block_in_place};
use tracing::{error, info, warn};
use uuid::{NoContext, Timestamp, Uuid};

use super::Context;
use super::kept::{self, Kept};
use super::link::Mailbox;
use super::origin::Origin;
use super::rows::Attributes;
use super::stream::{End, Ended, Flags, Parts, Stream, file_origin};
use crate::config::{Input, Start};
use crate::record::{Framing, escape_path};
use crate::source::files::discovery::{Hints, SWEEP_INTERVAL, has_wildcard, sweep};
use crate::source::files::recognition::{Decision, Found, Known, Surroundings, recognise};
use crate::source::files::siblings::is_rotated_name;
use crate::source::files::tail::{Inode, OpenError, Tail};
use crate::state::{Entry, Progress};

/// Hints in quick succession are answered by one sweep.
const HINTS_SETTLE: Duration = Duration::from_millis(20);

/// How often rows learn that their files are still there.
const SEEN_INTERVAL: Duration = Duration::from_secs(3600);

/// A copy is looked at again after so long.
const COPY_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Follows the files of all sources.
pub struct Follower {
    context: Arc<Context>,
    sources: Vec<FileSource>,
    streams: HashMap<Uuid, Held>,
    /// Files without a stream, since everything of them is receipted, and their runs.
    resting: HashMap<Inode, (Stamp, Uuid)>,
    /// Those of them that the current sweep met as they were left.
    at_rest: HashSet<Uuid>,
    copies: HashMap<Inode, (Stamp, Instant)>,
    complaints: HashMap<PathBuf, String>,
    /// Ranges of runs whose file was lost: reported unless they turn up in the next sweep.
    missing: HashMap<Uuid, Ended>,
    /// Runs that are sent from their copy in the state directory.
    kept: HashSet<Uuid>,
    tasks: JoinSet<Ended>,
    runs: HashMap<tokio::task::Id, Uuid>,
    /// When rows learnt last that their files are there.
    seen_at: Option<Instant>,
    /// No sweep is over yet.
    first: bool,
    failed: bool,
}

struct FileSource {
    attributes: Arc<Attributes>,
    pattern: String,
    follow_symlinks: bool,
}

/// A stream that runs.
struct Held {
    mailbox: Arc<Mailbox>,
    flags: Arc<Flags>,
    inode: Inode,
    path: PathBuf,
    stamp: Option<Stamp>,
}

impl Held {
    fn look(&self) {
        self.flags.look.store(true, Ordering::Relaxed);
        self.mailbox.wake.notify_one();
    }
}

/// What one sweep has seen.
#[derive(Default)]
struct Seen {
    paths: HashMap<PathBuf, Inode>,
    held: HashMap<Inode, Uuid>,
    inodes: HashSet<Inode>,
    found: Vec<Found>,
}

/// What stat(2) says of a file that matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp { size: metadata.size(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl Follower {
    /// For the file sources among `sources`.
    pub fn new(context: Arc<Context>, sources: &[Arc<Attributes>]) -> Follower {
        let file_source = |attributes: &Arc<Attributes>| match &attributes.source.input {
            Input::Files { pattern } => Some(FileSource {
                attributes: attributes.clone(),
                pattern: pattern.clone(),
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
            missing: HashMap::new(),
            kept: HashSet::new(),
            tasks: JoinSet::new(),
            runs: HashMap::new(),
            seen_at: None,
            first: true,
            failed: false,
            context,
        }
    }

    /// Follows until stopped, or, with `--once`, until everything there is receipted. `false`
    /// where some lines could not be.
    pub async fn run(mut self) -> bool {
        block_in_place(|| self.take_up_copies());
        let mut hints = Hints::new();
        let once = self.context.config.once;
        let mut patient = true;
        while !self.context.stopping.is_cancelled() {
            let new = block_in_place(|| self.sweep(&mut hints, patient));
            if once && self.tasks.is_empty() && new == 0 {
                if !patient {
                    break;
                }
                // Whoever is still taken for a copy in the making is what it is by now.
                patient = false;
                self.copies.clear();
                continue;
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
                    let (size, modified) = stamp;
                    self.resting.insert(held.inode, (Stamp { size, modified }, ended.run));
                }
            }
            End::Lost => {
                self.missing.insert(ended.run, ended);
            }
            End::Done | End::Stopped => {}
        }
    }

    /// Looks at all patterns and all followed files; returns how many streams it started.
    fn sweep(&mut self, hints: &mut Hints, patient: bool) -> usize {
        let started = SystemTime::now();
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
            for path in sweep(&pattern) {
                if let Some(folder) = path.parent() {
                    hints.watch(folder);
                }
                if !seen.paths.contains_key(&path) {
                    self.visit(number, path, &mut seen);
                }
            }
        }
        self.look_at_held(&seen.paths);
        let found = seen.found;
        // A file that gets shorter while we look was truncated.
        let rebooted = std::mem::take(&mut self.first) && self.context.state.rebooted();
        let mut streams = 0;
        if !found.is_empty() || !self.missing.is_empty() {
            let (held, lost): (Vec<_>, Vec<_>) =
                self.known().into_iter().partition(|known| self.is_held(known));
            let held: Vec<Known> =
                held.into_iter().map(|known| self.without_stale_place(known)).collect();
            let around = Surroundings { lost: &lost, held: &held, patient, rebooted };
            match recognise(found, around) {
                Ok(decisions) => streams = self.carry_out(decisions, started),
                Err(error) => {
                    warn!(%error, "files could not be compared: it is tried again");
                    return 0;
                }
            }
            self.report_missing();
        }
        // Also where nothing was found: what comes later was not there at the first run.
        self.mark_followed();
        self.note_seen();
        streams
    }

    /// Whether somebody has this run's bytes in hand, so that no other file can be its own.
    fn is_held(&self, known: &Known) -> bool {
        self.streams.contains_key(&known.run)
            || self.at_rest.contains(&known.run)
            || self.kept.contains(&known.run)
    }

    /// The file of a kept copy is gone and its inode may be another's by now.
    fn without_stale_place(&self, mut known: Known) -> Known {
        if !self.streams.contains_key(&known.run) && self.kept.contains(&known.run) {
            (known.progress.place.device, known.progress.place.inode) = (0, 0);
        }
        known
    }

    /// Tells the state which files are there, so that it can forget the others in the end.
    fn note_seen(&mut self) {
        if self.seen_at.is_some_and(|at| at.elapsed() < SEEN_INTERVAL) {
            return;
        }
        let present = self.streams.keys().chain(&self.at_rest).copied();
        match self.context.state.saw(&present.collect::<BTreeSet<Uuid>>()) {
            Ok(()) => self.seen_at = Some(Instant::now()),
            Err(error) => warn!(%error, "the state directory cannot be written"),
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
            Err(error) => return self.complain(&path, format!("cannot be read: {error}"), true),
        };
        // What a pattern merely brushes is no mistake.
        if metadata.is_dir() && has_wildcard(&self.sources[number].pattern) {
            return;
        }
        let (inode, stamp) = (Inode::of(&metadata), Stamp::of(&metadata));
        seen.paths.insert(path.clone(), inode);
        if let Some(held) = seen.held.get(&inode).and_then(|run| self.streams.get_mut(run)) {
            // Renamed within the pattern, or simply still there.
            held.path = path;
            return;
        }
        let rests = self.resting.get(&inode).filter(|(known, _)| *known == stamp);
        if let Some((_, run)) = rests {
            self.at_rest.insert(*run);
            return;
        }
        let is_known = self
            .copies
            .get(&inode)
            .is_some_and(|(known, at)| *known == stamp && at.elapsed() < COPY_AGAIN_AFTER)
            || !seen.inodes.insert(inode);
        if is_known {
            return;
        }
        match Tail::open(&path, follow) {
            Ok(tail) => {
                self.complaints.remove(&path);
                seen.found.push(Found { tail, source: number, wanted: true });
            }
            Err(OpenError::Gone) => {}
            Err(error) => self.complain(&path, error.to_string(), true),
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
            held.flags.succeeded.store(succeeded, Ordering::Relaxed);
            let was_moved = held.flags.moved.swap(moved, Ordering::Relaxed);
            let stamp = metadata.filter(|_| !moved).as_ref().map(Stamp::of);
            // Where a moved file is now is not known: its stream looks at the descriptor itself.
            if moved || was_moved || stamp != held.stamp {
                held.stamp = stamp;
                held.look();
            }
        }
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

    fn carry_out(&mut self, decisions: Vec<Decision>, swept_at: SystemTime) -> usize {
        let mut started = 0;
        for decision in decisions {
            let (found, run, until, start) = match decision {
                Decision::Continue { run, found, until } => (found, run, until, 0),
                Decision::New { mut found } => {
                    if !found.wanted {
                        info!(path = %escape_path(found.tail.path()),
                            "a rotated generation that came and went unseen");
                    }
                    let start = match self.first_offset(&mut found) {
                        Ok(start) => start,
                        Err(error) => {
                            self.complain(found.tail.path(), error.to_string(), true);
                            continue;
                        }
                    };
                    (found, mint_run(swept_at), None, start)
                }
                Decision::Copy { found } => {
                    if let Ok(metadata) = fs::metadata(found.tail.path()) {
                        let seen = (Stamp::of(&metadata), Instant::now());
                        self.copies.insert(found.tail.inode(), seen);
                    }
                    continue;
                }
                Decision::Foreign => continue,
            };
            let path = found.tail.path().to_owned();
            match self.attach(found, run, until, start) {
                Ok(()) => started += 1,
                Err(error) => self.complain(&path, format!("cannot be followed: {error}"), true),
            }
        }
        started
    }

    fn attach(
        &mut self,
        found: Found,
        run: Uuid,
        until: Option<u64>,
        start: u64,
    ) -> io::Result<()> {
        let (path, inode) = (found.tail.path().to_owned(), found.tail.inode());
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
        self.missing.remove(&run);
        self.resting.remove(&inode);
        self.copies.remove(&inode);
        let (mailbox, flags) = (stream.mailbox(), stream.flags());
        self.streams.insert(run, Held { mailbox, flags, inode, path, stamp: None });
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

    /// `start = end` is spent once the rows of its first run are durable.
    fn mark_followed(&self) {
        for source in &self.sources {
            let name = &source.attributes.source.name;
            if let Err(error) = self.context.state.mark_followed(name) {
                warn!(%error, "the state directory cannot be written");
            }
        }
    }

    /// A run that turned up nowhere lost what was not receipted (I9).
    fn report_missing(&mut self) {
        for (_, ended) in self.missing.drain() {
            if ended.seen > ended.position {
                error!(path = %ended.path, from = ended.position, to = ended.seen,
                    bytes = ended.seen - ended.position,
                    "lost: the file was truncated or replaced before these bytes were receipted");
                ended.counters.lost_bytes.add(ended.seen - ended.position);
            }
        }
    }

    /// Streams for the copies of files that were deleted before they were receipted.
    fn take_up_copies(&mut self) {
        let mut runs: HashMap<Uuid, (u64, String)> = HashMap::new();
        for (entry, _) in self.context.state.entries() {
            if let Some(from) = entry.kept_from {
                runs.insert(entry.run, (from, entry.row.source.clone()));
            }
        }
        let named: Vec<(Uuid, u64)> = runs.iter().map(|(run, (from, _))| (*run, *from)).collect();
        kept::sweep(self.context.state.dir(), &named);
        for (run, (from, source)) in runs {
            let of_source = |known: &&FileSource| known.attributes.source.name == source;
            let Some(source) = self.sources.iter().find(of_source) else { continue };
            let opened = Kept::open(self.context.state.dir(), run, from);
            let started = opened.and_then(|(kept, origin)| {
                let size = kept.length();
                self.context.kept_bytes.fetch_add(size, Ordering::Relaxed);
                self.context.total_bytes.fetch_add(size, Ordering::Relaxed);
                Stream::attach(Parts {
                    context: self.context.clone(),
                    attributes: source.attributes.clone(),
                    run,
                    origin: Origin::Kept(origin),
                    known: rows_of(&self.context, run),
                    until: None,
                    start: from,
                    kept: Some(kept),
                })
            });
            match started {
                Ok(stream) => {
                    stream.report_short_copy();
                    self.kept.insert(run);
                    let task = self.tasks.spawn(stream.run());
                    self.runs.insert(task.id(), run);
                }
                Err(error) => {
                    error!(%run, %error, "lost: the copy of a deleted file is unreadable")
                }
            }
        }
    }
}

/// The identity of a file that was found by a sweep which began at this time: what changes later
/// and is nobody's came after it.
fn mint_run(swept_at: SystemTime) -> Uuid {
    let since = swept_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, nanoseconds) = (since.as_secs(), since.subsec_nanos());
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, nanoseconds))
}

/// The rows of a run, with their progress.
pub fn rows_of(context: &Context, run: Uuid) -> Vec<(Entry, Progress)> {
    context.state.entries().into_iter().filter(|(entry, _)| entry.run == run).collect()
}

/// Joins what two rows of one run know of it.
fn join(older: &mut Progress, newer: Progress) {
    if newer.prefix.length >= older.prefix.length {
        older.prefix = newer.prefix;
    }
    older.position = older.position.max(newer.position);
    older.place = newer.place;
    older.seen_ms = newer.seen_ms;
    older.fingerprints.extend(newer.fingerprints);
    older.fingerprints.sort_by_key(|mark| std::cmp::Reverse(mark.offset));
    older.fingerprints.dedup_by_key(|mark| mark.offset);
}

/// The folder of a pattern's first part without wildcards.
fn watched_folder(pattern: &str) -> Option<&Path> {
    let literal = &pattern[..pattern.find(['*', '?', '[']).unwrap_or(pattern.len())];
    Path::new(&literal[..=literal.rfind('/')?]).into()
}
