//! One stream: reads a run of bytes, sends it segment by segment, moves positions by receipts.
//!
//! A stream is a task. It may be dropped at any await point: whatever is not receipted is read and
//! sent again by the next one.

mod file;
mod rows;
mod wire;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, warn};
use uuid::Uuid;

use super::Context;
use super::chain::Lasts;
use super::kept::Kept;
use super::link::{Link, Mailbox};
use super::metrics::Counters;
use super::origin::{FileOrigin, Origin};
use super::rows::Attributes;
use super::window::{Next, Window};
use crate::metrics::Lag;
use crate::protocol::FRAME_BYTES_TARGET;
use crate::record::{SegmentId, escape_path};
use crate::source::files::fingerprint::prefix;
use crate::source::files::tail::{Inode, Tail};
use crate::state::{Entry, Place, Progress, Stamp};

/// A file that was renamed and succeeded, and has not changed for so long, is finished: its last
/// line will not get its newline any more.
pub const FINISHED_AFTER: Duration = Duration::from_secs(60);

/// A finished file is let go after so long without a change.
const LET_GO_AFTER: Duration = Duration::from_secs(600);

/// A file that nobody writes is let go after so long; its next change brings it back.
const REST_AFTER: Duration = Duration::from_secs(3600);

/// The same while other files wait for its descriptor.
const REST_SOON: Duration = Duration::from_secs(2);

/// How far the frontier may be ahead of the position (I7).
const AHEAD_MAX: u64 = 128 << 20;

/// How soon a segment that was refused for its day is declared anew, and the refusal said again:
/// clocks are mended while a connection lasts.
const DECLARE_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// How soon a failed disk operation is tried again.
const DISK_RETRY: Duration = Duration::from_secs(2);

/// What the follower and a stream tell each other, besides letters.
#[derive(Debug, Default)]
pub struct Flags {
    /// Something may have changed: look at size, day and names.
    pub look: AtomicBool,
    /// The file is not at its path any more.
    pub moved: AtomicBool,
    /// Another file has taken its place, or its name is a rotated one.
    pub succeeded: AtomicBool,
    path: Mutex<Option<String>>,
}

impl Flags {
    /// The file has this name now.
    pub fn renamed(&self, path: &Path) {
        *self.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(escape_path(path));
    }

    fn take_path(&self) -> Option<String> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Everything is receipted and nothing more is expected for now. The file is closed.
    Rests,
    /// The file or spool segment is gone and everything receipted.
    Done,
    /// The file is no longer what it was.
    Lost,
    /// Some lines cannot be receipted by this receiver (only with `--once`).
    Failed,
    /// The sender stops.
    Stopped,
}

/// The last words of a stream.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its run.
    pub run: Uuid,
    /// Why it ended.
    pub end: End,
    /// Its file, for messages.
    pub path: String,
    /// Where its receipted prefix ended.
    pub position: u64,
    /// How far bytes were seen.
    pub seen: u64,
    /// What its file looked like when it rested.
    pub stamp: Option<Stamp>,
    /// Of its source.
    pub counters: Arc<Counters>,
}

/// See the module.
pub struct Stream {
    context: Arc<Context>,
    attributes: Arc<Attributes>,
    run: Uuid,
    /// `None` only while a read is under way.
    origin: Option<Box<Origin>>,
    /// Oldest first; only the last one has no end.
    segments: VecDeque<Segment>,
    mailbox: Arc<Mailbox>,
    flags: Arc<Flags>,
    kept: Option<Kept>,
    /// The one in use.
    link: Option<Arc<Link>>,
    /// Nothing new is sent on it: another one is to be used once all is receipted here.
    leaves: bool,
    /// There may be bytes that were not read yet.
    ready: bool,
    /// The file's size when it was last looked at on the newest row's day.
    size_seen: Option<u64>,
    /// With `--once`: where the file ended when it was taken up. What comes behind that is for the
    /// next start, or a file that is written all the time would never be done.
    enough: Option<u64>,
    /// When the file changed last, as far as it was seen.
    changed_at: Instant,
    /// The last read met a last line without its newline, which waits.
    unfinished: bool,
    /// A disk operation failed: not before this instant again.
    retry_at: Option<Instant>,
    failed: bool,
    /// What follows in the file cannot be sent; has been said.
    is_past_end: bool,
    lag: Arc<Lag>,
    /// An index refuses lines, and since then nothing else came through.
    refusal: Option<Refusal>,
}

/// Lines that go back and forth because their index refuses them.
struct Refusal {
    index: String,
    reason: String,
    /// The first time, and the latest.
    since: Instant,
    until: Instant,
}

struct Segment {
    entry: Entry,
    window: Window,
    progress: Progress,
    /// The last (at most 64) bytes before the frontier.
    before: Vec<u8>,
    /// On the current link.
    handle: Option<u32>,
    refused: bool,
    /// Refused for its day: it is declared anew then, on the same link.
    declare_at: Option<Instant>,
    /// No receiver can have accepted it: each that it was declared to refused it.
    untried: bool,
    /// How many bytes the next read asks for.
    want: usize,
    /// Kept where there is a chain key.
    lasts: Lasts,
}

impl Segment {
    fn new(entry: Entry, progress: Progress, origin: &mut Origin) -> io::Result<Segment> {
        let position = progress.position.max(entry.row.start);
        let window = Window::new(position, entry.row.end);
        let before = origin.before(position)?;
        let want = FRAME_BYTES_TARGET;
        Ok(Segment {
            // It is completed, durably, before it is declared for the first time.
            untried: entry.row.sender.is_none(),
            entry,
            window,
            progress,
            before,
            handle: None,
            refused: false,
            declare_at: None,
            want,
            lasts: Lasts::default(),
        })
    }

    fn id(&self) -> SegmentId {
        self.entry.row.segment
    }
}

/// What a stream is made of.
pub struct Parts {
    /// Shared by all streams.
    pub context: Arc<Context>,
    /// Of its source.
    pub attributes: Arc<Attributes>,
    /// Its run.
    pub run: Uuid,
    /// What it reads.
    pub origin: Origin,
    /// Known rows of the run, oldest first; may be empty.
    pub known: Vec<(Entry, Progress)>,
    /// The file lost its tail: what was known behind this offset is void.
    pub until: Option<u64>,
    /// Where the first row of an unknown run starts.
    pub start: u64,
    /// The copy in the state directory, where the file was deleted.
    pub kept: Option<Kept>,
}

impl Stream {
    /// Where letters for this stream go.
    pub fn mailbox(&self) -> Arc<Mailbox> {
        self.mailbox.clone()
    }

    /// What the follower tells this stream.
    pub fn flags(&self) -> Arc<Flags> {
        self.flags.clone()
    }

    /// Bytes between the position and the end, as far as that is known.
    pub fn backlog(&self) -> u64 {
        let size = match self.origin.as_deref() {
            Some(Origin::File(file)) => file.tail.size().unwrap_or(0),
            _ => 0,
        };
        let position = self.segments.front().map_or(0, |segment| segment.window.position());
        if size == u64::MAX { 0 } else { size.saturating_sub(position) }
    }

    /// Runs until the run is finished, lost, or the sender stops.
    pub async fn run(mut self) -> Ended {
        let end = self.run_to_end().await;
        self.note_progress();
        let stamp = match self.origin.as_deref() {
            // It is left alone until it changes.
            Some(Origin::File(file))
                if end == End::Failed || self.is_past_end || self.context.config.once =>
            {
                file.tail.stamp().ok()
            }
            _ => self.rest_stamp(),
        };
        let front = self.segments.front();
        let position = front.map_or(0, |segment| segment.window.position());
        let frontier = self.segments.back().map_or(0, |segment| segment.window.frontier());
        let path = front.map(|segment| segment.entry.row.path.clone()).unwrap_or_default();
        if end == End::Done {
            self.forget().await;
        }
        let seen = frontier.max(self.size_seen.unwrap_or(0));
        // What is lost is reported as such.
        let is_over = matches!(end, End::Done | End::Lost);
        let left = match self.end() {
            _ if is_over => 0,
            Some(_) => self.reach().saturating_sub(position),
            None => self.backlog().max(1),
        };
        self.context.note_left(self.run, left);
        let counters = self.attributes.counters.clone();
        Ended { run: self.run, end, path, position, seen, stamp, counters }
    }

    /// What the file looks like, if all that it holds by now is receipted.
    fn rest_stamp(&self) -> Option<Stamp> {
        let Some(Origin::File(file)) = self.origin.as_deref() else { return None };
        let stamp = file.tail.stamp().ok()?;
        let size = if file.tail.is_compressed() { file.tail.size().ok()? } else { stamp.size };
        let window = &self.segments.back()?.window;
        let is_whole = self.segments.len() == 1 && window.position() == size;
        is_whole.then_some(stamp)
    }

    async fn run_to_end(&mut self) -> End {
        let mut links = self.context.links.clone();
        loop {
            let link = loop {
                let link = links.borrow_and_update().choose(self.run).cloned();
                if let Some(link) = link {
                    break link;
                }
                if let Some(end) = self.look().await {
                    return end;
                }
                tokio::select! {
                    () = self.context.stopping.cancelled() => return End::Stopped,
                    _ = links.changed() => {}
                    () = self.mailbox.wake.notified() => self.context.wanted.notify_one(),
                }
            };
            self.link = Some(link.clone());
            let end = self.session(&link).await;
            if matches!(end, None | Some(End::Stopped)) {
                // Receipts that came just before the end count: else their lines are sent again.
                self.read_letters_on(&link).await;
            }
            self.link = None;
            self.note_progress();
            self.leave(&link);
            match end {
                Some(end) => return end,
                None => self.disconnected(),
            }
        }
    }

    /// A stream that ends while its link lives leaves what the receiver still has of it to the link.
    fn leave(&mut self, link: &Link) {
        for segment in &self.segments {
            if let Some(handle) = segment.handle {
                let (bytes, frames) = segment.window.outstanding();
                link.unregister(handle, bytes, frames as usize);
            }
        }
        for letter in self.mailbox.take() {
            link.route(letter.handle(), letter);
        }
    }

    fn disconnected(&mut self) {
        let _ = self.mailbox.take();
        for segment in &mut self.segments {
            segment.window.disconnected();
            segment.untried &= segment.handle.is_none() || segment.refused;
            segment.handle = None;
            segment.refused = false;
            segment.declare_at = None;
        }
    }

    /// Sends over one link until it breaks (`None`) or the stream ends.
    async fn session(&mut self, link: &Link) -> Option<End> {
        let mut links = self.context.links.clone();
        while let Err(error) = self.complete(link).await {
            warn!(%error, "the state directory cannot be written: nothing is sent before it can");
            tokio::select! {
                () = link.closed.cancelled() => return None,
                () = self.context.stopping.cancelled() => return Some(End::Stopped),
                () = tokio::time::sleep(DISK_RETRY) => {}
            }
        }
        loop {
            self.leaves = match links.borrow_and_update().choose(self.run) {
                Some(other) => !std::ptr::eq(&**other, link),
                None => link.draining.is_cancelled(),
            };
            self.read_letters_on(link).await;
            if let Some(end) = self.look().await {
                return Some(end);
            }
            self.drop_finished().await;
            self.declare_again(link).await;
            self.ready &= !self.has_enough();
            if link.closed.is_cancelled() {
                return None;
            }
            if let Some(end) = self.ended() {
                return Some(end);
            }
            if self.leaves && !self.in_flight() {
                return None;
            }
            // Time alone can have finished the file.
            self.ready |= self.unfinished && self.is_finished();
            match self.next_work() {
                Work::Send { number, next } => match self.send(link, number, next).await {
                    Step::Goes => {}
                    Step::LinkGone => return None,
                    Step::Ends(end) => return Some(end),
                },
                Work::Wait(until) => {
                    if let Some(end) = self.gives_up(link) {
                        return Some(end);
                    }
                    let due = async {
                        match until {
                            Some(until) => tokio::time::sleep_until(until.into()).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = link.closed.cancelled() => return None,
                        () = self.context.ending.cancelled() => return Some(End::Stopped),
                        () = self.context.stopping.cancelled(), if !self.is_stopping() => {}
                        () = self.mailbox.wake.notified() => {}
                        _ = links.changed() => {}
                        () = link.draining.cancelled(), if !self.leaves => {}
                        () = due => {}
                    }
                }
            }
        }
    }

    fn rest_after(&self) -> Duration {
        if self.context.crowded.load(Ordering::Relaxed) { REST_SOON } else { REST_AFTER }
    }

    fn is_stopping(&self) -> bool {
        self.context.stopping.is_cancelled()
    }

    /// What to do next on this link.
    fn next_work(&self) -> Work {
        let now = Instant::now();
        if self.is_stopping() || self.leaves {
            return Work::Wait(None);
        }
        let mut due: Option<Instant> = None;
        let mut sooner = |at: Option<Instant>| {
            if let Some(at) = at {
                due = Some(due.map_or(at, |due| due.min(at)));
            }
        };
        if self.retry_at.is_some_and(|at| at > now) {
            return Work::Wait(self.retry_at);
        }
        let newest = self.segments.len() - 1;
        for (number, segment) in self.segments.iter().enumerate() {
            if segment.refused {
                sooner(segment.declare_at);
                continue;
            }
            let next = segment.window.next(now);
            let deferred = segment.window.next_due();
            sooner(deferred);
            let allowed = match next {
                Next::Again { .. } => true,
                Next::Nothing => false,
                // A deferred range holds up its own segment, so that windows stay small.
                Next::New { from } => {
                    deferred.is_none()
                        && (number < newest || self.ready)
                        && from - segment.window.position() < AHEAD_MAX
                }
            };
            if allowed {
                return Work::Send { number, next };
            }
        }
        if !self.ready && self.flags.succeeded.load(Ordering::Relaxed) {
            sooner(Some(self.changed_at + FINISHED_AFTER).filter(|at| *at > now));
            sooner(Some(self.changed_at + LET_GO_AFTER).filter(|at| *at > now));
        }
        sooner(Some(self.changed_at + self.rest_after()).filter(|at| *at > now));
        Work::Wait(due)
    }

    /// Whether all that is to be sent of a file with `--once` is on its way. What no name leads
    /// to is read to its end: no later start finds it.
    fn has_enough(&self) -> bool {
        let frontier = self.segments.back().map_or(0, |segment| segment.window.frontier());
        match self.origin.as_deref() {
            Some(Origin::File(file)) if self.enough.is_some_and(|enough| frontier >= enough) => {
                file.tail.links().is_ok_and(|links| links > 0)
            }
            _ => false,
        }
    }

    /// Where the run ends, as far as that is known.
    fn end(&self) -> Option<u64> {
        match self.origin.as_deref() {
            Some(Origin::Spool { spool, segment }) => spool.end_of(*segment),
            Some(Origin::Kept(_)) => self.kept.as_ref().map(Kept::until),
            // Of a compressed file it is not known before it is read.
            Some(Origin::File(file)) if file.tail.is_compressed() => None,
            Some(Origin::File(_)) | None => self.size_seen,
        }
    }

    /// How far the run is known to reach.
    fn reach(&self) -> u64 {
        let frontier = self.segments.back().map_or(0, |segment| segment.window.frontier());
        self.end().unwrap_or(0).max(frontier)
    }

    /// Tells the metrics how far the run reaches, and how far it is receipted.
    fn note_lag(&self) {
        let position = self.segments.front().map_or(0, |segment| segment.window.position());
        self.lag.set(self.reach(), position, Instant::now());
    }

    /// Tells the state how far every segment has come.
    fn note_progress(&mut self) {
        self.note_lag();
        let first = match self.origin.as_deref() {
            Some(Origin::File(file)) => Some(prefix(file.first())),
            _ => None,
        };
        let path = self.flags.take_path();
        let size = self.size_seen;
        let rest = self.rest_stamp();
        for segment in &mut self.segments {
            let anchor = segment.window.take_anchor();
            let longer = first.as_ref().filter(|f| f.length > segment.progress.prefix.length);
            let grown = size.filter(|size| *size != segment.progress.size);
            let is_same = anchor.is_none() && longer.is_none() && grown.is_none();
            if is_same && path.is_none() && rest == segment.progress.rest {
                continue;
            }
            segment.progress.rest = rest;
            if let Some(path) = &path {
                segment.progress.place.path.clone_from(path);
            }
            if let Some(size) = grown {
                segment.progress.size = size;
            }
            if let Some(anchor) = anchor {
                segment.progress.advance(anchor);
            }
            if let Some(first) = longer {
                segment.progress.prefix = first.clone();
            }
            segment.progress.seen_ms = super::origin::now_ms();
            self.context.state.set_progress(segment.id(), segment.progress.clone());
        }
    }

    /// Whether frames await their receipts.
    fn in_flight(&self) -> bool {
        self.segments.iter().any(|segment| segment.window.outstanding().1 > 0)
    }

    /// Whether the stream has come to an end.
    fn ended(&mut self) -> Option<End> {
        if self.is_stopping() && !self.in_flight() {
            return Some(End::Stopped);
        }
        let refused = self.segments.iter().any(|segment| segment.refused);
        let idle = |segment: &Segment| segment.refused || segment.window.is_idle();
        if !self.segments.iter().all(idle) {
            return None;
        }
        let once = self.context.config.once;
        if once && (refused || self.failed) {
            return Some(End::Failed);
        }
        if self.ready || refused || self.segments.len() > 1 {
            return None;
        }
        let unchanged = self.changed_at.elapsed();
        match self.origin.as_deref() {
            Some(Origin::Spool { .. }) => {
                self.segments.back().filter(|s| s.window.is_finished()).map(|_| End::Done)
            }
            Some(Origin::Kept(_)) => Some(End::Done),
            Some(Origin::File(file)) => {
                let gone = file.tail.links().is_ok_and(|links| links == 0);
                let succeeded = self.flags.succeeded.load(Ordering::Relaxed);
                if gone && unchanged >= FINISHED_AFTER {
                    return Some(End::Done);
                }
                // Nobody would come back for a last line that waits for its file to be renamed.
                let idle = unchanged >= self.rest_after() && !self.unfinished;
                let rests = once
                    || file.tail.is_compressed()
                    || (succeeded && unchanged >= LET_GO_AFTER)
                    || idle;
                rests.then_some(if gone { End::Done } else { End::Rests })
            }
            None => None,
        }
    }

    /// With `--once`: whether all that is left waits for an index that refuses it, and has for
    /// longer than a script should wait for a person. Judged where there is nothing to send now.
    fn gives_up(&self, link: &Link) -> Option<End> {
        let Refusal { index, reason, since, until } = self.refusal.as_ref()?;
        let config = &self.context.config;
        let settled = |segment: &Segment| {
            segment.refused || segment.window.is_idle() || segment.window.is_deferred()
        };
        if !config.once
            || self.is_stopping()
            || !link.takes_more()
            || until.duration_since(*since) < config.once_timeout
            || !self.segments.iter().all(settled)
        {
            return None;
        }
        let front = self.segments.front()?;
        error!(path = %front.entry.row.whence(), position = front.window.position(), %index, reason,
            "gave up: the index refuses lines; mend it, and the next run sends them again");
        Some(End::Failed)
    }
}

enum Work {
    Send { number: usize, next: Next },
    Wait(Option<Instant>),
}

enum Step {
    Goes,
    LinkGone,
    Ends(End),
}

/// Where a file is now.
pub fn place(tail: &Tail) -> Place {
    let Inode { device, inode } = tail.inode();
    Place { path: escape_path(tail.path()), device, inode, born: tail.born() }
}

/// Takes a file that was recognised.
pub fn file_origin(tail: Tail) -> io::Result<Origin> {
    FileOrigin::new(tail).map(Origin::File)
}
