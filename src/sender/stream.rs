//! One stream: reads a run of bytes, sends it segment by segment, moves positions by receipts.
//!
//! A stream is a task. It may be dropped at any await point: whatever is not receipted is read and
//! sent again by the next one.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::Context;
use super::kept::Kept;
use super::link::{Letter, Link, Mailbox};
use super::origin::{FileOrigin, Framed, Origin, Read, Request, fingerprint_or_short};
use super::receipts::Line;
use super::rows::{Attributes, Opening, complete, suits};
use super::window::{Finished, Next, Window};
use crate::protocol::{
    Control, FRAME_BYTES_MAX, FRAME_BYTES_TARGET, Open, Receipt, Refused, Verdict,
};
use crate::record::{Framing, SegmentId, escape_path};
use crate::source::files::fingerprint::{fingerprint, prefix};
use crate::source::files::tail::Tail;
use crate::state::{Entry, Fingerprint, Place, Progress};
use crate::transport::Outgoing;

/// A file that was renamed and succeeded, and has not changed for so long, is finished: its last
/// line will not get its newline any more.
pub const FINISHED_AFTER: Duration = Duration::from_secs(60);

/// A finished file is let go after so long without a change.
const LET_GO_AFTER: Duration = Duration::from_secs(600);

/// A file that nobody writes is let go after so long; its next change brings it back.
const REST_AFTER: Duration = Duration::from_secs(3600);

/// How far the frontier may be ahead of the position (I7).
const AHEAD_MAX: u64 = 128 << 20;

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
    /// Size and time of the last change of its file.
    pub stamp: Option<(u64, (i64, i64))>,
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
    /// There may be bytes that were not read yet.
    ready: bool,
    /// The file's size when it was last looked at on the newest row's day.
    size_seen: Option<u64>,
    changed_at: Instant,
    /// A disk operation failed: not before this instant again.
    retry_at: Option<Instant>,
    failed: bool,
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
    /// How many bytes the next read asks for.
    want: usize,
}

impl Segment {
    fn new(entry: Entry, progress: Progress, origin: &mut Origin) -> io::Result<Segment> {
        let position = progress.position.max(entry.row.start);
        let window = Window::new(position, entry.row.end);
        let before = origin.before(position)?;
        let want = FRAME_BYTES_TARGET;
        Ok(Segment { entry, window, progress, before, handle: None, refused: false, want })
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
    /// Makes the rows fit today's file and configuration, durably. Blocking.
    pub fn attach(parts: Parts) -> io::Result<Stream> {
        let Parts { context, attributes, run, mut origin, mut known, until, start, kept } = parts;
        known.sort_by_key(|(entry, _)| (entry.row.start, entry.row.segment));
        let mut segments = VecDeque::new();
        let mut changed = Vec::new();
        let mut dropped = Vec::new();
        for (mut entry, mut progress) in known {
            if let Some(until) = until {
                if entry.row.start >= until {
                    dropped.push(entry.row.segment);
                    continue;
                }
                let end = until.max(progress.position);
                entry.row.end = Some(entry.row.end.map_or(end, |known| known.min(end)));
                changed.push(entry.clone());
            }
            if let Origin::File(file) = &origin {
                progress.place = place(&file.tail);
            }
            if let (Origin::Kept(_), Some(kept)) = (&origin, entry.kept_from) {
                // The copy lacks what was receipted when it was made, whatever was saved since.
                let at = kept.min(entry.row.end.unwrap_or(kept));
                if at > progress.position {
                    progress.advance(fingerprint_at(&mut origin, at)?);
                }
            }
            if entry.row.end.is_some_and(|end| progress.position >= end) {
                dropped.push(entry.row.segment);
                continue;
            }
            let end = entry.row.end;
            // What is behind a lost tail cannot be read any more.
            if until.is_some_and(|until| end.is_some_and(|end| end > until)) {
                dropped.push(entry.row.segment);
                continue;
            }
            segments.push_back(Segment::new(entry, progress, &mut origin)?);
        }
        let size_seen = match &origin {
            Origin::File(file) if !file.tail.is_compressed() => Some(file.tail.size()?),
            _ => None,
        };
        let mut stream = Stream {
            context,
            attributes,
            run,
            origin: Some(Box::new(origin)),
            segments,
            mailbox: Arc::default(),
            flags: Arc::default(),
            kept,
            ready: true,
            size_seen,
            changed_at: Instant::now(),
            retry_at: None,
            failed: false,
        };
        changed.retain(|entry| !dropped.contains(&entry.row.segment));
        let newest_is_open =
            stream.segments.back().is_some_and(|segment| segment.window.end().is_none());
        let kept = matches!(stream.origin.as_deref(), Some(Origin::Kept(_)));
        if newest_is_open || (kept && !stream.segments.is_empty()) {
            stream.context.state.commit(&changed.iter().collect::<Vec<_>>(), &dropped)?;
            stream.follow_configuration()?;
        } else {
            let start = until
                .or_else(|| stream.segments.back().and_then(|segment| segment.window.end()))
                .unwrap_or(start);
            stream.open_row(start, changed, dropped, None)?;
        }
        for segment in &stream.segments {
            stream.context.state.set_progress(segment.id(), segment.progress.clone());
        }
        Ok(stream)
    }

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
        let front = self.segments.front();
        let position = front.map_or(0, |segment| segment.window.position());
        let frontier = self.segments.back().map_or(0, |segment| segment.window.frontier());
        let path = front.map(|segment| segment.entry.row.path.clone()).unwrap_or_default();
        let stamp = match self.origin.as_deref() {
            Some(Origin::File(file)) => file.tail.stamp().ok(),
            _ => None,
        };
        if end == End::Done {
            self.forget().await;
        }
        let seen = frontier.max(self.size_seen.unwrap_or(0));
        Ended { run: self.run, end, path, position, seen, stamp }
    }

    async fn run_to_end(&mut self) -> End {
        let mut links = self.context.links.clone();
        loop {
            let link = loop {
                let link = links.borrow_and_update().clone();
                if let Some(link) = link.filter(|link| !link.closed.is_cancelled()) {
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
            let end = self.session(&link).await;
            self.note_progress();
            self.return_credit(&link);
            match end {
                Some(end) => return end,
                None => self.disconnected(),
            }
        }
    }

    /// A stream that ends while its link lives leaves no credit behind: nobody would return it.
    fn return_credit(&mut self, link: &Link) {
        for segment in &self.segments {
            if let Some(handle) = segment.handle {
                link.unregister(handle);
            }
            let (credit, frames) = segment.window.outstanding();
            link.credit.add_permits(credit as usize);
            link.frames.add_permits(frames as usize);
        }
    }

    /// Everything of this run is receipted and its bytes are gone. Of a spool, so are its rows;
    /// those of a file stay, since the same bytes may turn up again, compressed by a rotation.
    async fn forget(&mut self) {
        let is_spool = matches!(self.origin.as_deref(), Some(Origin::Spool { .. }));
        let (mut freed, mut ids) = (Vec::new(), Vec::new());
        for segment in &self.segments {
            match is_spool {
                true => ids.push(segment.id()),
                false if segment.entry.kept_from.is_some() => freed.push(Entry {
                    kept_from: None,
                    kept_short_of: None,
                    ..segment.entry.clone()
                }),
                false => {}
            }
        }
        if !(freed.is_empty() && ids.is_empty())
            && let Err(error) = self.commit(freed, ids).await
        {
            warn!(%error, "the state directory cannot be written: finished rows stay for now");
            return;
        }
        if let Some(kept) = self.kept.take()
            && let Err(error) = kept.remove(&self.context)
        {
            warn!(%error, "the copy of a deleted file stays for now");
        }
        if let Some(Origin::Spool { spool, segment }) = self.origin.as_deref()
            && let Err(error) = spool.release(*segment, u64::MAX)
        {
            warn!(%error, "a finished spool file stays for now");
        }
    }

    fn disconnected(&mut self) {
        let _ = self.mailbox.take();
        for segment in &mut self.segments {
            segment.window.disconnected();
            segment.handle = None;
            segment.refused = false;
        }
    }

    /// Sends over one link until it breaks (`None`) or the stream ends.
    async fn session(&mut self, link: &Link) -> Option<End> {
        while let Err(error) = self.complete(link).await {
            warn!(%error, "the state directory cannot be written: nothing is sent before it can");
            tokio::select! {
                () = link.closed.cancelled() => return None,
                () = self.context.stopping.cancelled() => return Some(End::Stopped),
                () = tokio::time::sleep(DISK_RETRY) => {}
            }
        }
        loop {
            self.read_letters_on(link).await;
            if let Some(end) = self.look().await {
                return Some(end);
            }
            self.drop_finished().await;
            if link.closed.is_cancelled() {
                return None;
            }
            if let Some(end) = self.ended() {
                return Some(end);
            }
            match self.next_work(link) {
                Work::Send { number, next } => match self.send(link, number, next).await {
                    Step::Goes => {}
                    Step::LinkGone => return None,
                    Step::Ends(end) => return Some(end),
                },
                Work::Wait(until) => {
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
                        () = due => {}
                    }
                }
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.context.stopping.is_cancelled()
    }

    /// What to do next on this link.
    fn next_work(&self, link: &Link) -> Work {
        let now = Instant::now();
        if self.is_stopping() {
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
                        && link.takes_more()
                }
            };
            if allowed {
                return Work::Send { number, next };
            }
        }
        // Time alone can make a file finished.
        if !self.ready && self.flags.succeeded.load(Ordering::Relaxed) {
            sooner(Some(self.changed_at + FINISHED_AFTER).filter(|at| *at > now));
            sooner(Some(self.changed_at + LET_GO_AFTER).filter(|at| *at > now));
        }
        sooner(Some(self.changed_at + REST_AFTER).filter(|at| *at > now));
        Work::Wait(due)
    }

    /// Reads one frame and sends it.
    async fn send(&mut self, link: &Link, number: usize, next: Next) -> Step {
        match self.open_on(link, number).await {
            Ok(true) => {}
            Ok(false) => return Step::LinkGone,
            Err(error) => {
                warn!(%error, "the state directory cannot be written: it is tried again");
                self.retry_at = Some(Instant::now() + DISK_RETRY);
                return Step::Goes;
            }
        }
        let segment = &self.segments[number];
        let row = &segment.entry.row;
        let mut request = Request {
            from: segment.window.frontier(),
            to: row.end,
            want: segment.want.min(FRAME_BYTES_MAX),
            frontier: segment.window.frontier(),
            before: segment.before.clone(),
            expect: None,
            framing: row.framing,
            handle: segment.handle.unwrap_or_default(),
            resend: false,
            compress: link.compress,
        };
        match next {
            Next::Again { from, to, fingerprint } => {
                request.from = from;
                request.to = Some(to);
                request.want = (to - from) as usize;
                request.expect = fingerprint;
                request.resend = true;
            }
            _ => {
                let cut = row.cuts.iter().copied().find(|cut| *cut > request.from);
                request.to = [request.to, cut].into_iter().flatten().min();
            }
        }
        let (frame, mut credit) = match self.permits(link, request.want).await {
            Permits::Granted { frame, credit } => (frame, credit),
            Permits::Interrupted => return Step::Goes,
            Permits::LinkGone => return Step::LinkGone,
        };
        match self.read(request.clone()).await {
            Ok(Read::Framed(framed)) => {
                if let Err(error) = self.learn_first_bytes(number).await {
                    warn!(%error, "the state directory cannot be written: nothing is sent before it can");
                    self.retry_at = Some(Instant::now() + DISK_RETRY);
                    return Step::Goes;
                }
                match credit.split(framed.records.len()) {
                    Some(used) => used.forget(),
                    None => credit.forget(),
                }
                frame.forget();
                self.sent(number, &request, &framed);
                if link.send(Outgoing::Binary(framed.message)).await {
                    Step::Goes
                } else {
                    Step::LinkGone
                }
            }
            Ok(other) => self.nothing_to_send(number, &request, other).await,
            Err(error) => {
                let path = &self.segments[number].entry.row.path;
                warn!(%path, %error, "cannot be read: it is tried again");
                self.failed = true;
                self.retry_at = Some(Instant::now() + DISK_RETRY);
                if self.context.config.once {
                    // What was read of it is still receipted; a script must not wait for a person.
                    self.ready = false;
                }
                Step::Goes
            }
        }
    }

    /// Waits for a frame's credit, reading letters meanwhile. That may take as long as the
    /// destination is away, so that a stop and a change of the file interrupt it.
    async fn permits<'a>(&mut self, link: &'a Link, want: usize) -> Permits<'a> {
        let acquire = async {
            let frame = link.frames.acquire().await.ok()?;
            let credit = link.credit.acquire_many(want as u32).await.ok()?;
            Some((frame, credit))
        };
        tokio::pin!(acquire);
        let stopping = self.context.stopping.clone();
        loop {
            tokio::select! {
                biased;
                () = link.closed.cancelled() => return Permits::LinkGone,
                () = stopping.cancelled() => return Permits::Interrupted,
                permits = &mut acquire => return match permits {
                    Some((frame, credit)) => Permits::Granted { frame, credit },
                    None => Permits::LinkGone,
                },
                () = self.mailbox.wake.notified() => {
                    self.read_letters_on(link).await;
                    if self.flags.look.load(Ordering::Relaxed) {
                        return Permits::Interrupted;
                    }
                }
            }
        }
    }

    async fn read(&mut self, request: Request) -> io::Result<Read> {
        let Some(mut origin) = self.origin.take() else {
            return Err(io::Error::other("a read was interrupted"));
        };
        let read = tokio::task::spawn_blocking(move || {
            let read = origin.read(&request);
            (origin, read)
        });
        let (origin, read) = read.await.map_err(io::Error::other)?;
        self.origin = Some(origin);
        read
    }

    /// A file that was empty when its row opened can be recognised by its inode alone, which a
    /// rotation that compresses does not keep: its first bytes are durable before they are sent.
    async fn learn_first_bytes(&mut self, number: usize) -> io::Result<()> {
        let Some(Origin::File(file)) = self.origin.as_deref() else { return Ok(()) };
        let segment = &self.segments[number];
        if segment.entry.row.first_bytes.length > 0 {
            return Ok(());
        }
        let mut entry = segment.entry.clone();
        entry.row.first_bytes = prefix(file.first());
        self.commit(vec![entry.clone()], Vec::new()).await?;
        let segment = &mut self.segments[number];
        segment.progress.prefix = entry.row.first_bytes.clone();
        segment.entry = entry;
        Ok(())
    }

    /// Books a frame as on its way.
    fn sent(&mut self, number: usize, request: &Request, framed: &Framed) {
        let keep_records = self.context.receipts.is_some();
        let totals = &self.context.totals;
        let length = framed.records.len() as u64;
        totals.sent_bytes.fetch_add(length, Ordering::Relaxed);
        let segment = &mut self.segments[number];
        if request.resend {
            totals.resent_bytes.fetch_add(length, Ordering::Relaxed);
            segment.window.sent_again(request.from, framed.to);
            return;
        }
        let records = if keep_records { framed.records.clone() } else { Default::default() };
        segment.window.sent_new(framed.to, framed.fingerprint, records, framed.continues);
        segment.before.clone_from(&framed.before);
        segment.want = FRAME_BYTES_TARGET;
        self.changed_at = Instant::now();
        self.failed = false;
    }

    /// A read that gave nothing to send.
    async fn nothing_to_send(&mut self, number: usize, request: &Request, read: Read) -> Step {
        let newest = number + 1 == self.segments.len();
        let from = request.from;
        match read {
            Read::Framed(_) => {}
            Read::Disagrees => return Step::Ends(End::Lost),
            Read::Needs(bytes) => self.segments[number].want = bytes,
            Read::Nul { to } => {
                debug!(path = %self.segments[number].entry.row.path, from, to, "NUL bytes skipped");
                self.pass_over(number, to).await;
            }
            Read::Lost { to } => {
                self.report_loss(number, from, to, "damaged in the spool");
                self.pass_over(number, to).await;
            }
            Read::End => {
                if self.segments[number].window.end().is_none() {
                    self.segments[number].window.set_end(from);
                }
                self.ready = false;
            }
            Read::Partial(length) => {
                let finished = length > 0 && newest && self.is_finished().await;
                if finished {
                    if let Err(error) = self.cut(number, from + length).await {
                        warn!(%error, "the state directory cannot be written");
                        self.retry_at = Some(Instant::now() + DISK_RETRY);
                    }
                } else if !newest {
                    // An ended row whose bytes are gone: the file is not what it was.
                    return Step::Ends(End::Lost);
                } else {
                    self.ready = false;
                }
            }
        }
        Step::Goes
    }

    /// Moves over bytes that become no document.
    async fn pass_over(&mut self, number: usize, to: u64) {
        let before = match &mut self.origin {
            Some(origin) => origin.before(to).unwrap_or_default(),
            None => Vec::new(),
        };
        let segment = &mut self.segments[number];
        segment.window.skip(to, None);
        segment.before = before;
        self.note_progress();
    }

    fn report_loss(&self, number: usize, from: u64, to: u64, why: &str) {
        let row = &self.segments[number].entry.row;
        error!(path = %row.path, segment = %row.segment, from, to, bytes = to - from, "lost: {why}");
        self.context.totals.lost_bytes.fetch_add(to - from, Ordering::Relaxed);
    }

    /// Whether the last line will not get its newline any more.
    async fn is_finished(&self) -> bool {
        if self.context.config.once {
            return true;
        }
        match self.origin.as_deref() {
            Some(Origin::File(file)) if file.tail.is_compressed() => true,
            Some(Origin::File(file)) => {
                let left = self.flags.succeeded.load(Ordering::Relaxed)
                    || file.tail.links().is_ok_and(|links| links == 0);
                left && self.changed_at.elapsed() >= FINISHED_AFTER
            }
            Some(Origin::Kept(_)) => true,
            _ => false,
        }
    }

    /// Records, durably, that the last line ends here without a newline.
    async fn cut(&mut self, number: usize, at: u64) -> io::Result<()> {
        let mut entry = self.segments[number].entry.clone();
        info!(path = %entry.row.path, offset = at, "last line without a newline");
        entry.row.cuts.push(at);
        self.commit(vec![entry.clone()], Vec::new()).await?;
        self.segments[number].entry = entry;
        Ok(())
    }

    async fn commit(&self, changed: Vec<Entry>, dropped: Vec<SegmentId>) -> io::Result<()> {
        let state = self.context.state.clone();
        let commit = move || state.commit(&changed.iter().collect::<Vec<_>>(), &dropped);
        tokio::task::spawn_blocking(commit).await.map_err(io::Error::other)?
    }

    async fn read_letters_on(&mut self, link: &Link) {
        let letters = self.mailbox.take();
        if letters.is_empty() {
            return;
        }
        for letter in letters {
            match letter {
                Letter::Receipt(receipt) => self.receipt(link, &receipt).await,
                Letter::Refused(refused) => self.refused(link, &refused),
            }
        }
        self.note_progress();
    }

    async fn receipt(&mut self, link: &Link, receipt: &Receipt) {
        let handle = Some(receipt.handle);
        let Some(segment) = self.segments.iter_mut().find(|s| s.handle == handle) else { return };
        let mut finished = Vec::new();
        let counted = segment.window.receipt(receipt, Instant::now(), &mut |f| finished.push(f));
        link.credit.add_permits(counted.credit as usize);
        link.frames.add_permits(counted.frames as usize);
        self.context.totals.count(&counted);
        for run in &receipt.runs {
            match &run.verdict {
                Verdict::Parked { reason } => warn!(
                    path = %segment.entry.row.path, before = run.to, lines = run.lines, ?reason,
                    "parked: the lines lie in the dead letter under their own ids"
                ),
                Verdict::Deferred { reason, after } => {
                    self.context.deferrals.say(&segment.entry.row.path, reason, *after)
                }
                _ => {}
            }
        }
        let bytes: u64 = finished.iter().map(|finished| finished.to - finished.from).sum();
        self.context.totals.receipted_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.write_receipts(receipt.handle, finished).await;
    }

    async fn write_receipts(&self, handle: u32, finished: Vec<Finished>) {
        let Some(receipts) = &self.context.receipts else { return };
        let Some(segment) = self.segments.iter().find(|s| s.handle == Some(handle)) else { return };
        for finished in finished.into_iter().filter(|finished| !finished.runs.is_empty()) {
            receipts.write(Line { row: segment.entry.row.clone(), finished }).await;
        }
    }

    fn refused(&mut self, link: &Link, refused: &Refused) {
        let handle = Some(refused.handle);
        let Some(segment) = self.segments.iter_mut().find(|s| s.handle == handle) else { return };
        if !segment.refused {
            error!(path = %segment.entry.row.path, segment = %segment.entry.row.segment,
                code = ?refused.code, "the receiver refuses these lines: {}",
                refused.reason.escape_debug());
        }
        // Its frames are dropped unread: their credit comes back.
        let (credit, frames) = segment.window.outstanding();
        link.credit.add_permits(credit as usize);
        link.frames.add_permits(frames as usize);
        segment.window.disconnected();
        segment.refused = true;
    }

    /// Tells the state how far every segment has come.
    fn note_progress(&mut self) {
        let first = match self.origin.as_deref() {
            Some(Origin::File(file)) => Some(prefix(file.first())),
            _ => None,
        };
        for segment in &mut self.segments {
            let anchor = segment.window.take_anchor();
            let longer = first.as_ref().filter(|f| f.length > segment.progress.prefix.length);
            if anchor.is_none() && longer.is_none() {
                continue;
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

    /// Looks at size, day and names, where somebody said that they may have changed.
    async fn look(&mut self) -> Option<End> {
        if !self.flags.look.swap(false, Ordering::Relaxed) {
            return None;
        }
        self.ready = true;
        self.retry_at = None;
        if !matches!(self.origin.as_deref(), Some(Origin::File(_))) {
            return None;
        }
        match self.look_at_file().await {
            Ok(end) => end,
            Err(error) => {
                warn!(%error, "looking at a followed file failed: it is tried again");
                None
            }
        }
    }

    async fn look_at_file(&mut self) -> io::Result<Option<End>> {
        let newest = self.segments.back().expect("a stream has a segment");
        let (frontier, row_day) = (newest.window.frontier(), newest.entry.row.day);
        let Some(Origin::File(file)) = self.origin.as_deref_mut() else { return Ok(None) };
        let size = file.tail.size()?;
        if size < frontier {
            return Ok(Some(End::Lost));
        }
        if !file.tail.is_compressed() && file.tail.day()? > row_day && size > frontier {
            // What was there when the day was still the row's belongs to the row.
            let until = self.size_seen.unwrap_or(size).clamp(frontier, size);
            let boundary = file.tail.last_boundary(frontier, until)?;
            self.split(boundary).await?;
        }
        if self.size_seen != Some(size) {
            self.changed_at = Instant::now();
        }
        self.size_seen = Some(size);
        if self.flags.moved.load(Ordering::Relaxed) {
            self.keep(size)?;
        }
        Ok(None)
    }

    /// Copies what is not receipted of a file without a name.
    fn keep(&mut self, size: u64) -> io::Result<()> {
        let Some(Origin::File(file)) = self.origin.as_deref_mut() else { return Ok(()) };
        if file.tail.links()? > 0 || file.tail.is_compressed() {
            return Ok(());
        }
        let position = self.segments.front().map_or(size, |segment| segment.window.position());
        if position >= size {
            return Ok(());
        }
        if self.kept.is_none() {
            self.kept = Some(Kept::create(&self.context, self.run, position)?);
        }
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let complete = kept.copy(&self.context, &mut file.tail, size)?;
        let (from, until) = (kept.position(), kept.until());
        let short_of = (!complete).then_some(size);
        let marked: Vec<Entry> = self
            .segments
            .iter()
            .map(|segment| Entry {
                kept_from: Some(from),
                kept_short_of: short_of,
                ..segment.entry.clone()
            })
            .collect();
        if self.segments.iter().zip(&marked).all(|(segment, marked)| segment.entry == *marked) {
            return Ok(());
        }
        self.context.state.commit(&marked.iter().collect::<Vec<_>>(), &[])?;
        let path = &marked[0].row.path;
        if self.segments.iter().all(|segment| segment.entry.kept_from.is_none()) {
            info!(%path, position, size, "deleted before it was receipted: a copy is kept");
        }
        if !complete {
            warn!(%path, from = until, to = size, "the budget for copies is full: these bytes are \
                lost if this process ends before they are receipted; raise --kept-bytes-max");
        }
        for (segment, marked) in self.segments.iter_mut().zip(marked) {
            segment.entry = marked;
        }
        Ok(())
    }

    /// What the copy of a deleted file lacks is lost: the process that could read it ended (I9).
    pub fn report_short_copy(&self) {
        let Some(until) = self.kept.as_ref().map(Kept::until) else { return };
        let short_of = self.segments.iter().filter_map(|s| s.entry.kept_short_of).max();
        let position = self.segments.front().map_or(0, |segment| segment.window.position());
        let from = until.max(position);
        if let Some(to) = short_of.filter(|to| *to > from) {
            self.report_loss(0, from, to, "the budget for copies of deleted files was full");
        }
    }

    /// Where the newest row no longer says what a new one would say, it ends at the last record
    /// boundary.
    fn follow_configuration(&mut self) -> io::Result<()> {
        let newest = self.segments.back().expect("a stream has a segment");
        // Nothing new comes into the copy of a deleted file.
        let kept = matches!(self.origin.as_deref(), Some(Origin::Kept(_)));
        if kept || self.attributes.agree(&newest.entry.row) {
            return Ok(());
        }
        let boundary = self.boundary()?;
        self.split_now(boundary, None)
    }

    /// The last record boundary in the run at this moment.
    fn boundary(&mut self) -> io::Result<u64> {
        let newest = self.segments.back().expect("a stream has a segment");
        let frontier = newest.window.frontier();
        match self.origin.as_deref_mut() {
            Some(Origin::File(file)) if !file.tail.is_compressed() => {
                let size = file.tail.size()?;
                file.tail.last_boundary(frontier, size.max(frontier))
            }
            Some(Origin::Spool { spool, segment }) => {
                let mark = spool.watermark();
                Ok(if mark.segment == *segment { mark.offset.max(frontier) } else { frontier })
            }
            _ => Ok(frontier),
        }
    }

    async fn split(&mut self, at: u64) -> io::Result<()> {
        let link = self.context.links.borrow().clone();
        self.split_now(at, link.as_deref())
    }

    /// Ends the newest row at a boundary and opens the next one there, in one durable write.
    fn split_now(&mut self, at: u64, link: Option<&Link>) -> io::Result<()> {
        let newest = self.segments.back_mut().expect("a stream has a segment");
        let mut ended = newest.entry.clone();
        ended.row.end = Some(at);
        let empty = at == ended.row.start && newest.window.frontier() == at;
        let id = newest.id();
        let (changed, dropped) =
            if empty { (vec![], vec![id]) } else { (vec![ended.clone()], vec![]) };
        self.open_row(at, changed, dropped, link)?;
        let number = self.segments.len() - 2;
        if empty {
            self.segments.remove(number);
        } else {
            let segment = &mut self.segments[number];
            segment.entry = ended;
            segment.window.set_end(at);
        }
        Ok(())
    }

    /// Opens a row at `start`, together with other changes, in one durable write.
    fn open_row(
        &mut self,
        start: u64,
        mut changed: Vec<Entry>,
        dropped: Vec<SegmentId>,
        link: Option<&Link>,
    ) -> io::Result<()> {
        let origin = self.origin.as_deref_mut().expect("no read is under way");
        let opening = match origin {
            Origin::File(file) => Opening {
                run: self.run,
                path: escape_path(file.tail.path()),
                inode: Some(file.tail.inode()),
                start,
                day: file.tail.day()?,
                framing: Framing::LINES,
                first_bytes: prefix(file.first()),
            },
            _ => Opening {
                run: self.run,
                path: self.context.path_of(&self.attributes.source),
                inode: None,
                start,
                day: crate::record::Day::today(),
                framing: Framing::SPOOL,
                first_bytes: Default::default(),
            },
        };
        let entry = self.attributes.open(opening, link.map(|link| &link.welcome));
        let mut progress = Progress::at_start(&entry.row);
        let segment_before = origin.before(start)?;
        if start > 0 && matches!(origin, Origin::File(_)) {
            progress.advance(fingerprint(start, &segment_before));
        }
        let mut segment = Segment::new(entry.clone(), progress, origin)?;
        segment.before = segment_before;
        changed.push(entry);
        self.context.state.commit(&changed.iter().collect::<Vec<_>>(), &dropped)?;
        self.context.state.set_progress(segment.id(), segment.progress.clone());
        self.segments.push_back(segment);
        Ok(())
    }

    /// Fits the rows to a receiver: completes what only it can tell, renews what belongs to
    /// another sender, and ends the newest row where new lines would go elsewhere.
    async fn complete(&mut self, link: &Link) -> io::Result<()> {
        let welcome = &link.welcome;
        let mut changed = Vec::new();
        let mut dropped = Vec::new();
        for segment in &mut self.segments {
            let foreign = segment.entry.row.sender.is_some_and(|sender| sender != welcome.sender);
            let mut entry = segment.entry.clone();
            if foreign {
                warn!(path = %entry.row.path, "the token is another sender's: what was sent under \
                    the old one and has no receipt is sent anew");
                dropped.push(segment.id());
                entry = entry.renewed(segment.window.position());
            }
            complete(&mut entry, welcome);
            if entry != segment.entry {
                changed.push((segment.id(), entry));
            }
        }
        if !changed.is_empty() {
            let entries = changed.iter().map(|(_, entry)| entry.clone()).collect();
            self.commit(entries, dropped).await?;
        }
        let origin = self.origin.as_deref_mut().expect("no read is under way");
        for (id, entry) in changed {
            let Some(segment) = self.segments.iter_mut().find(|s| s.id() == id) else { continue };
            if entry.row.segment == id {
                segment.entry = entry;
            } else {
                let progress =
                    Progress { position: segment.window.position(), ..segment.progress.clone() };
                *segment = Segment::new(entry, progress, origin)?;
                self.context.state.set_progress(segment.id(), segment.progress.clone());
            }
        }
        let newest = self.segments.back().expect("a stream has a segment");
        let kept = matches!(self.origin.as_deref(), Some(Origin::Kept(_)));
        if !kept && !suits(&newest.entry, welcome) && newest.window.end().is_none() {
            let boundary = self.boundary()?;
            info!(offset = boundary, "the receiver names indices in another way now: a new row");
            self.split_now(boundary, Some(link))?;
        }
        Ok(())
    }

    /// Declares a segment on this link, once; `false` when the link is gone.
    async fn open_on(&mut self, link: &Link, number: usize) -> io::Result<bool> {
        let segment = &mut self.segments[number];
        if segment.handle.is_some() {
            return Ok(true);
        }
        // A split may have opened this row before the link was there.
        if segment.entry.row.sender.is_none() || segment.entry.row.rule.is_none() {
            let mut entry = segment.entry.clone();
            complete(&mut entry, &link.welcome);
            self.commit(vec![entry.clone()], Vec::new()).await?;
            self.segments[number].entry = entry;
        }
        let segment = &mut self.segments[number];
        let handle = link.register(self.mailbox.clone());
        segment.handle = Some(handle);
        let open = Control::Open(Box::new(Open { handle, row: segment.entry.row.clone() }));
        Ok(link.send(Outgoing::Text(open.encode())).await)
    }

    /// Forgets rows whose end is receipted, except the newest.
    async fn drop_finished(&mut self) {
        while self.segments.len() > 1
            && self.segments.front().is_some_and(|segment| segment.window.is_finished())
        {
            let segment = self.segments.pop_front().expect("there is one");
            let link = self.context.links.borrow().clone();
            if let (Some(link), Some(handle)) = (link, segment.handle) {
                link.unregister(handle);
            }
            if let Err(error) = self.commit(Vec::new(), vec![segment.id()]).await {
                // Its row stays on disk, finished: the next start drops it.
                debug!(%error, "a finished row stays for now");
            }
        }
    }

    /// Whether the stream has come to an end.
    fn ended(&mut self) -> Option<End> {
        let in_flight = self.segments.iter().any(|segment| segment.window.outstanding().1 > 0);
        if self.is_stopping() && !in_flight {
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
                let rests = once
                    || file.tail.is_compressed()
                    || (succeeded && unchanged >= LET_GO_AFTER)
                    || unchanged >= REST_AFTER;
                rests.then_some(if gone { End::Done } else { End::Rests })
            }
            None => None,
        }
    }
}

/// What recognises an offset of a copy; where the copy lacks its bytes, nothing does.
fn fingerprint_at(origin: &mut Origin, offset: u64) -> io::Result<Fingerprint> {
    let before = origin.before(offset)?;
    Ok(fingerprint_or_short(offset, &before))
}

enum Work {
    Send { number: usize, next: Next },
    Wait(Option<Instant>),
}

enum Permits<'a> {
    Granted { frame: SemaphorePermit<'a>, credit: SemaphorePermit<'a> },
    Interrupted,
    LinkGone,
}

enum Step {
    Goes,
    LinkGone,
    Ends(End),
}

/// Where a file is now.
pub fn place(tail: &Tail) -> Place {
    Place { path: escape_path(tail.path()), device: tail.inode().device, inode: tail.inode().inode }
}

/// Takes a file that was recognised.
pub fn file_origin(tail: Tail) -> io::Result<Origin> {
    FileOrigin::new(tail).map(Origin::File)
}
