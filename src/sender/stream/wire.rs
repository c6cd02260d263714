//! What a stream says to the receiver, and what it hears: frames out, letters in.

use std::io;
use std::panic::resume_unwind;
use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;
use tokio::task::JoinError;
use tracing::{debug, error, warn};

use super::{DECLARE_AGAIN_AFTER, DISK_RETRY, End, Refusal, Step, Stream};
use crate::protocol::{
    Control, FRAME_BYTES_MAX, FRAME_BYTES_TARGET, Open, Receipt, RefusalCode, Refused, Verdict,
};
use crate::record::Day;
use crate::sender::link::{Letter, Link};
use crate::sender::origin::{Framed, Read, Request};
use crate::sender::receipts::Line;
use crate::sender::rows::complete;
use crate::sender::window::{Finished, Next};
use crate::transport::Outgoing;

/// Who has no more than this to send takes no turn: far less than a frame, so that many may.
const MUCH_BYTES: u64 = 32 << 10;

/// How long a read keeps its turn: a disk that hangs, or an archive that is unpacked from its start, holds
/// up no other stream.
const TURN_MAX: Duration = Duration::from_secs(1);

enum Permits<'a> {
    Granted(Granted<'a>),
    Interrupted,
    LinkGone,
    Ends(End),
}

/// What a frame needs.
struct Granted<'a> {
    /// Given back once the frame is on its way.
    turn: Option<SemaphorePermit<'a>>,
    frame: SemaphorePermit<'a>,
    credit: SemaphorePermit<'a>,
}

impl Stream {
    /// Reads one frame and sends it.
    pub(super) async fn send(&mut self, link: &Link, number: usize, next: Next) -> Step {
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
            want: self.paced(segment.want).min(FRAME_BYTES_MAX),
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
        let Granted { mut turn, frame, mut credit } =
            match self.permits(link, number, &request).await {
                Permits::Granted(granted) => granted,
                Permits::Interrupted => return Step::Goes,
                Permits::LinkGone => return Step::LinkGone,
                Permits::Ends(end) => return Step::Ends(end),
            };
        let read = {
            let read = self.read(request.clone());
            tokio::pin!(read);
            match tokio::time::timeout(TURN_MAX, &mut read).await {
                Ok(read) => read,
                Err(_) => {
                    drop(turn.take());
                    read.await
                }
            }
        };
        match read {
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
                let path = self.segments[number].entry.row.whence();
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

    /// On a thin line a usual frame is at most a second's worth, so that a stop, a ping or another
    /// stream need not wait for long.
    fn paced(&self, want: usize) -> usize {
        match self.context.config.rate_limit {
            Some(limit) if want == FRAME_BYTES_TARGET => want.min(limit as usize),
            _ => want,
        }
    }

    /// Waits for a frame's credit, reading letters and looking at the file meanwhile. That may take as
    /// long as the destination is away, so that a stop interrupts it, and whatever makes the request
    /// another one; a file that only grows keeps its place, or one that is written all the time would
    /// never come to the front.
    async fn permits<'a>(
        &mut self,
        link: &'a Link,
        number: usize,
        request: &Request,
    ) -> Permits<'a> {
        let (want, has_much) = (request.want, self.has_much(request));
        let acquire = async {
            let turn = match has_much {
                true => Some(link.turns.acquire().await.ok()?),
                false => None,
            };
            let frame = link.frames.acquire().await.ok()?;
            let credit = link.credit.acquire_many(want as u32).await.ok()?;
            Some(Granted { turn, frame, credit })
        };
        tokio::pin!(acquire);
        let stopping = self.context.stopping.clone();
        let (id, end) = (self.segments[number].id(), self.segments[number].entry.row.end);
        loop {
            tokio::select! {
                biased;
                () = link.closed.cancelled() => return Permits::LinkGone,
                () = stopping.cancelled() => return Permits::Interrupted,
                granted = &mut acquire => {
                    return granted.map_or(Permits::LinkGone, Permits::Granted);
                }
                () = link.draining.cancelled() => return Permits::Interrupted,
                () = self.mailbox.wake.notified() => {
                    self.read_letters_on(link).await;
                    if let Some(end) = self.look().await {
                        return Permits::Ends(end);
                    }
                    let is_same = self.segments.get(number).is_some_and(|segment| {
                        segment.id() == id && segment.entry.row.end == end && !segment.refused
                    });
                    if !is_same {
                        return Permits::Interrupted;
                    }
                }
            }
        }
    }

    /// Whether there is more to send than a few lines, as far as that is known.
    fn has_much(&self, request: &Request) -> bool {
        self.end().is_none_or(|end| end > request.from + MUCH_BYTES)
    }

    async fn read(&mut self, request: Request) -> io::Result<Read> {
        let Some(mut origin) = self.origin.take() else {
            return Err(io::Error::other("a read was interrupted"));
        };
        let read = tokio::task::spawn_blocking(move || {
            let read = origin.read(&request);
            (origin, read)
        });
        let (origin, read) = match read.await.map_err(JoinError::try_into_panic) {
            Ok(read) => read,
            // The origin is gone with the read: the stream ends too, and is started anew.
            Err(Ok(panic)) => resume_unwind(panic),
            Err(Err(cancelled)) => return Err(io::Error::other(cancelled)),
        };
        self.origin = Some(origin);
        read
    }

    /// Books a frame as on its way.
    fn sent(&mut self, number: usize, request: &Request, framed: &Framed) {
        let keep_records = self.context.receipts.is_some();
        let counters = &self.attributes.counters;
        let length = framed.records.len() as u64;
        counters.sent_bytes.add(length);
        let segment = &mut self.segments[number];
        if request.resend {
            counters.resent_bytes.add(length);
            segment.window.sent_again(request.from, framed.to);
            return;
        }
        let records = if keep_records { framed.records.clone() } else { Default::default() };
        if self.context.config.chain_key_file.is_some() {
            segment.lasts.sent(&segment.entry.row, request.from, framed);
        }
        segment.window.sent_new(framed.to, framed.fingerprint, records, framed.continues);
        segment.before.clone_from(&framed.before);
        segment.want = FRAME_BYTES_TARGET;
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
                debug!(path = %self.segments[number].entry.row.whence(), from, to, "NUL bytes skipped");
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
            Read::PastEndMax => {
                self.report_past_end(number);
                self.failed = true;
                self.ready = false;
            }
            Read::Partial(length) => {
                let finished = length > 0 && newest && self.is_finished();
                self.unfinished = length > 0 && !finished;
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

    /// The file grew past what a segment can hold, and no offset behind that has an id (I4). The
    /// stream stays, so that the file is followed to its rotation as any other.
    fn report_past_end(&mut self, number: usize) {
        if std::mem::replace(&mut self.is_past_end, true) {
            return;
        }
        let segment = &self.segments[number];
        error!(path = %segment.entry.row.whence(), from = segment.window.frontier(),
            "not sent: the file goes on past 1 TiB (2^40 bytes), where lines have no ids; rotate \
             it, and what its successor holds is sent");
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

    pub(super) fn report_loss(&self, number: usize, from: u64, to: u64, why: &str) {
        let row = &self.segments[number].entry.row;
        error!(path = %row.whence(), segment = %row.segment, from, to, bytes = to - from, "lost: {why}");
        self.attributes.counters.lost_bytes.add(to - from);
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

    /// Has segments that were refused for their day declared anew under fresh handles: at once under
    /// a row of another day where the former lies ahead of what the clock says now, else when it is
    /// time.
    pub(super) async fn declare_again(&mut self, link: &Link) {
        if self.is_stopping() || self.leaves {
            return;
        }
        for number in 0..self.segments.len() {
            let Some(at) = self.segments[number].declare_at else { continue };
            let handle = self.segments[number].handle;
            let goes_back = match self.take_back_day(number, link).await {
                Ok(goes_back) => goes_back,
                Err(error) => {
                    warn!(%error, "a refused day cannot be replaced: it is tried again");
                    self.segments[number].declare_at = Some(Instant::now() + DISK_RETRY);
                    continue;
                }
            };
            if !goes_back && at > Instant::now() {
                continue;
            }
            if let Some(handle) = handle {
                link.unregister(handle, 0, 0);
            }
            let segment = &mut self.segments[number];
            segment.handle = None;
            segment.refused = false;
            segment.declare_at = None;
        }
    }

    pub(super) async fn read_letters_on(&mut self, link: &Link) {
        let letters = self.mailbox.take();
        if letters.is_empty() {
            return;
        }
        for letter in letters {
            match letter {
                Letter::Receipt(receipt) => self.receipt(link, &receipt).await,
                Letter::Refused(refused) => self.refused(link, &refused).await,
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
        let (row, position) = (&segment.entry.row, segment.window.position());
        if let Some(last) = segment.lasts.receipted(row, receipt, position, &link.receiver) {
            self.context.state.note_last_receipted(last);
        }
        let counters = &self.attributes.counters;
        counters.count(&counted);
        if counted.lines() > 0 {
            self.refusal = None;
        }
        for run in &receipt.runs {
            match &run.verdict {
                Verdict::Parked { reason } => warn!(
                    path = %segment.entry.row.whence(), before = run.to, lines = run.lines, reason,
                    "parked: the lines lie in the dead letter under their own ids"
                ),
                Verdict::Deferred { reason, after, index } => {
                    counters.deferred.add(run.lines);
                    self.context.deferrals.say(segment.entry.row.whence(), reason, *after);
                    // A stale receipt changes nothing.
                    if let Some(index) = index.as_ref().filter(|_| counted.credit > 0) {
                        let until = Instant::now();
                        let since = self.refusal.as_ref().map_or(until, |refusal| refusal.since);
                        let (index, reason) = (index.clone(), reason.clone());
                        self.refusal = Some(Refusal { index, reason, since, until });
                    }
                }
                _ => {}
            }
        }
        let bytes: u64 = finished.iter().map(|finished| finished.to - finished.from).sum();
        self.attributes.counters.receipted_bytes.add(bytes);
        self.write_receipts(receipt.handle, finished).await;
    }

    async fn write_receipts(&self, handle: u32, finished: Vec<Finished>) {
        let Some(receipts) = &self.context.receipts else { return };
        let Some(segment) = self.segments.iter().find(|s| s.handle == Some(handle)) else { return };
        for finished in finished.into_iter().filter(|finished| !finished.runs.is_empty()) {
            receipts.write(Line { row: segment.entry.row.clone(), finished }).await;
        }
    }

    async fn refused(&mut self, link: &Link, refused: &Refused) {
        let handle = Some(refused.handle);
        let Some(number) = self.segments.iter().position(|s| s.handle == handle) else { return };
        let segment = &mut self.segments[number];
        // Its frames are dropped unread: their credit comes back.
        let (credit, frames) = segment.window.outstanding();
        link.credit.add_permits(credit as usize);
        link.frames.add_permits(frames as usize);
        segment.window.disconnected();
        if std::mem::replace(&mut segment.refused, true) {
            return;
        }
        let day = segment.entry.row.day;
        // What was too old at the welcome, and is no recent day here, waits for a person, not for a clock.
        if refused.code == RefusalCode::Day
            && day >= link.welcome.days.from.min(Day::today().plus(-1))
        {
            segment.declare_at = Some(Instant::now() + DECLARE_AGAIN_AFTER);
        }
        let advice = match (refused.code, segment.untried) {
            (RefusalCode::Type, true) => {
                "; or give another type here (--type) and start again, which sends these lines under it"
            }
            (RefusalCode::Type, false) => "; these lines keep the type under which they began",
            _ => "",
        };
        error!(path = %segment.entry.row.whence(), segment = %segment.entry.row.segment,
            code = %refused.code, "the receiver refuses these lines: {}{advice}", refused.reason);
        if !segment.untried || segment.entry.refused {
            return;
        }
        let entry = segment.entry.as_refused();
        match self.commit(vec![entry.clone()], Vec::new()).await {
            Ok(()) => self.segments[number].entry = entry,
            // Then it keeps what it was declared with.
            Err(error) => warn!(%error, "the state directory cannot be written"),
        }
    }
}
