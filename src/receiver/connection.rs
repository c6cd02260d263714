//! One connection: a task that drives a [`Session`] over a socket.
//!
//! Reading, writing, waiting for memory and the heartbeat never wait for each other: while the
//! destination stalls, pings and receipts go on (design of the protocol, keep-alive).

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::gate::Accepted;
use super::instances::Presence;
use super::metrics::Meter;
use super::session::{Session, Taken, Violation};
use super::{CLOSE_TIMEOUT, Receiver};
use crate::destination::{Frame, Inbox, Reply};
use crate::protocol::{Control, Drain, Receipt, Run, Verdict};
use crate::record::Day;
use crate::tokens::Tokens;
use crate::transport::{
    Beat, Heartbeat, Incoming, Outgoing, Socket, SocketError, SocketReceiver, SocketSender, close,
    hang_up,
};

/// Messages on their way to the writing half.
pub(super) const WRITES_MAX: usize = 64;

/// Messages that wait for those; beyond it nothing is read and no receipt taken (I7).
const BACKLOG_MAX: usize = 256;

/// A frame smaller than this is copied, so that it does not keep a whole read buffer alive.
const COPY_BELOW_BYTES: usize = 32 << 10;

/// Receipts are cut into messages of about this size.
const RECEIPT_BYTES: usize = 32 << 10;

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// The sender closed.
    Closed { code: u16, reason: String },
    /// The connection is gone; nobody is there to close to.
    Lost(SocketError),
    /// Nothing came in for too long.
    Dead,
    /// The sender broke a rule.
    Violation(Violation),
    /// This side has a reason of its own.
    Ours { code: u16, reason: &'static str },
}

impl From<Violation> for End {
    fn from(violation: Violation) -> End {
        End::Violation(violation)
    }
}

impl From<SocketError> for End {
    fn from(error: SocketError) -> End {
        match error.close_code() {
            Some(code) => End::Violation(Violation::new(code, error.to_string())),
            None => End::Lost(error),
        }
    }
}

/// How a connection ended, for a side that may dial again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// Receipts had gone out: the sender works.
    AfterReceipts,
    /// None had.
    Early,
    /// One side wants no more of it: a token ended, another took over, or a key was not proven.
    SentAway,
}

/// Serves a sender until it is gone.
pub(super) async fn serve(receiver: Arc<Receiver>, accepted: Accepted, socket: Socket) -> Ended {
    let _counted = receiver.sessions.token();
    let heartbeat = socket.heartbeat();
    let (sender, incoming) = socket.split();
    let (writes, written) = mpsc::channel(WRITES_MAX);
    let name = accepted.sender.name.clone();
    let peer = accepted.peer.clone();
    let receipted = Arc::new(AtomicBool::new(false));
    let mut connection = Connection {
        session: Session::new(
            accepted.sender.clone(),
            accepted.challenge.clone(),
            Arc::clone(&receiver.terms),
        ),
        tokens: receiver.tokens.clone(),
        hello_until: Instant::now() + receiver.hello_timeout,
        meter: receiver.metrics.connected(&accepted.sender.name),
        receiver,
        accepted,
        incoming,
        heartbeat,
        inbox: Arc::default(),
        receipts: VecDeque::new(),
        backlog: VecDeque::new(),
        leaving: None,
        aside: None,
        drain_until: None,
        presence: None,
        receipted: Arc::clone(&receipted),
    };
    let driving = async move { (connection.drive(&writes).await, connection.incoming) };
    let end = until_the_end(&name, &peer, driving, write(sender, written)).await;
    match end {
        End::Closed { code: close::POLICY, .. } => Ended::SentAway,
        // Dialled again at once, it would do the same again.
        End::Violation(Violation { is_unproven: true, .. }) => Ended::SentAway,
        _ if receipted.load(Ordering::Relaxed) => Ended::AfterReceipts,
        _ => Ended::Early,
    }
}

/// Drives a connection beside its writing half, then closes it as its end asks. `driving` owns
/// the channel to the writing half, and gives back the reading one.
pub(super) async fn until_the_end(
    name: &str,
    peer: &str,
    driving: impl Future<Output = (End, SocketReceiver)>,
    writing: impl Future<Output = (SocketSender, Result<(), SocketError>)>,
) -> End {
    let mut writing = std::pin::pin!(writing);
    let (end, incoming) = tokio::select! {
        (end, incoming) = driving => (end, Some(incoming)),
        (_, result) = &mut writing => match result {
            Err(error) => (End::Lost(error), None),
            // Not before `driving` has ended.
            Ok(()) => (End::Lost(SocketError::Closed), None),
        },
    };
    match &end {
        End::Closed { code, reason } => {
            info!(sender = name, code, reason, "sender closed")
        }
        End::Lost(error) => info!(sender = name, %peer, %error, "connection lost"),
        End::Dead => info!(sender = name, %peer, "connection dead: nothing came in"),
        End::Violation(Violation { code, reason, is_unproven: true }) => {
            warn!(
                sender = name, %peer, code, reason,
                "refused: the token came without proof of its chain key; a copied token?"
            );
        }
        End::Violation(Violation { code: close::RESTART, reason, .. }) => {
            info!(sender = name, reason, "closing");
        }
        End::Violation(Violation { code, reason, .. }) => {
            warn!(sender = name, %peer, code, reason, "sender broke the protocol");
        }
        End::Ours { code, reason } => info!(sender = name, code, reason, "closing"),
    }
    let (code, reason) = match &end {
        End::Lost(_) | End::Dead => return end,
        End::Closed { .. } => (close::NORMAL, ""),
        End::Violation(violation) => (violation.code, violation.reason.as_str()),
        End::Ours { code, reason } => (*code, *reason),
    };
    if let Some(incoming) = incoming {
        finish(writing, incoming, code, reason).await;
    }
    end
}

/// The close handshake; bytes that still come in are read and dropped, because a socket that is
/// closed with unread bytes is reset, and a reset loses the close frame.
async fn finish(
    writing: impl Future<Output = (SocketSender, Result<(), SocketError>)>,
    mut incoming: SocketReceiver,
    code: u16,
    reason: &str,
) {
    let closing = async {
        let (mut sender, result) = writing.await;
        if result.is_ok()
            && let Err(error) = sender.close(code, reason).await
        {
            debug!(%error, "no close handshake");
        }
        sender
    };
    let reading = async move {
        while let Some(Ok(_)) = incoming.next().await {}
        incoming
    };
    let _ = timeout(CLOSE_TIMEOUT, async {
        let (sender, incoming) = tokio::join!(closing, reading);
        hang_up(sender, incoming).await;
    })
    .await;
}

/// Writes what comes until the channel ends; many messages, one flush.
pub(super) async fn write(
    mut sender: SocketSender,
    mut messages: mpsc::Receiver<Outgoing>,
) -> (SocketSender, Result<(), SocketError>) {
    while let Some(message) = messages.recv().await {
        let mut next = Some(message);
        while let Some(message) = next {
            if let Err(error) = sender.feed(message).await {
                return (sender, Err(error));
            }
            next = messages.try_recv().ok();
        }
        if let Err(error) = sender.flush().await {
            return (sender, Err(error));
        }
    }
    (sender, Ok(()))
}

struct Connection {
    receiver: Arc<Receiver>,
    accepted: Accepted,
    session: Session,
    tokens: tokio::sync::watch::Receiver<Arc<Tokens>>,
    incoming: SocketReceiver,
    heartbeat: Heartbeat,
    inbox: Arc<Inbox>,
    /// Taken from the inbox and cut into messages, but not encoded before there is room for the text.
    receipts: VecDeque<Receipt>,
    meter: Meter,
    /// Answers that the writing half has no room for yet.
    backlog: VecDeque<Outgoing>,
    /// The sender is to connect again once all that it sent is answered; nothing is read meanwhile.
    /// Closed at once, it might meet the same bound again before its first receipt.
    leaving: Option<Violation>,
    /// A frame that waits for memory; nothing is read meanwhile.
    aside: Option<Aside>,
    hello_until: Instant,
    drain_until: Option<Instant>,
    /// From its `hello` on.
    presence: Option<Presence>,
    /// A final receipt went out.
    receipted: Arc<AtomicBool>,
}

struct Aside {
    taken: Taken,
    memory: Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>,
}

/// What woke the connection.
enum Event {
    Message(Option<Result<Incoming, SocketError>>),
    Receipts(VecDeque<Receipt>),
    Memory(OwnedSemaphorePermit),
    Beat(Beat),
    Room,
    TokensChanged,
    HelloOverdue,
    Drain,
    DrainOver,
}

impl Connection {
    /// Until there is a reason to end. Dropped only when the connection ends anyway.
    async fn drive(&mut self, writes: &mpsc::Sender<Outgoing>) -> End {
        loop {
            self.hand_over(writes);
            if self.drain_until.is_some() && self.is_drained() {
                return End::Ours { code: close::GOING_AWAY, reason: "this receiver stops" };
            }
            if self.is_drained()
                && let Some(violation) = self.leaving.take()
            {
                return End::Violation(violation);
            }
            let event = self.event(writes).await;
            if let Err(end) = self.handle(event) {
                return end;
            }
        }
    }

    /// Afterwards there is either a backlog or no receipt that waits.
    fn hand_over(&mut self, writes: &mpsc::Sender<Outgoing>) {
        loop {
            while let Some(message) = self.backlog.pop_front() {
                if let Err(mpsc::error::TrySendError::Full(message)) = writes.try_send(message) {
                    self.backlog.push_front(message);
                    return;
                }
            }
            let Some(receipt) = self.receipts.pop_front() else { return };
            self.receipt(receipt);
        }
    }

    /// Every future here may be dropped without a loss.
    async fn event(&mut self, writes: &mpsc::Sender<Outgoing>) -> Event {
        let says_hello = self.session.identity().is_none();
        let draining = self.drain_until;
        let reads = self.backlog.len() < BACKLOG_MAX && !self.holds_off();
        let (tokens, shutdown) = (&mut self.tokens, &self.receiver.shutdown);
        tokio::select! {
            message = self.incoming.next(), if reads => {
                Event::Message(message)
            }
            receipts = self.inbox.take(), if self.receipts.is_empty() => Event::Receipts(receipts),
            memory = memory(&mut self.aside) => Event::Memory(memory),
            beat = self.heartbeat.next() => Event::Beat(beat),
            _ = writes.reserve(), if !self.backlog.is_empty() => Event::Room,
            Ok(()) = tokens.changed() => Event::TokensChanged,
            () = sleep_until(self.hello_until), if says_hello => Event::HelloOverdue,
            () = shutdown.requested(), if draining.is_none() => Event::Drain,
            () = sleep_until(draining.unwrap_or_else(Instant::now)), if draining.is_some() => {
                Event::DrainOver
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Message(None) => return Err(End::Lost(SocketError::Closed)),
            Event::Message(Some(message)) => self.message(message?)?,
            Event::Receipts(receipts) => self.receipts(receipts),
            Event::Memory(memory) => {
                if let Some(aside) = self.aside.take() {
                    // What the peer sent meanwhile lies unread: that was our silence, not its.
                    self.heartbeat.touch();
                    self.push(aside.taken, memory);
                }
            }
            // A sender that takes nothing needs no further ping to take.
            Event::Beat(Beat::Ping) if self.backlog.len() >= BACKLOG_MAX => {}
            Event::Beat(Beat::Ping) => self.ping(),
            // Its silence is ours, unless it takes nothing either.
            Event::Beat(Beat::Dead) if self.holds_off() && self.backlog.is_empty() => {
                self.heartbeat.touch();
            }
            Event::Beat(Beat::Dead) => return Err(End::Dead),
            // It takes what it is sent: a sign of life while nothing of it is read.
            Event::Room if self.holds_off() => self.heartbeat.touch(),
            Event::Room => {}
            Event::TokensChanged => check_token(&self.receiver, &self.accepted)?,
            Event::HelloOverdue => {
                return Err(Violation::new(close::POLICY, "said nothing").into());
            }
            Event::Drain => {
                let within = self.receiver.drain_timeout;
                self.drain_until = Some(Instant::now() + within);
                self.send(&Control::Drain(Drain { within }));
            }
            Event::DrainOver => {
                let reason = "this receiver stops before all was answered";
                return Err(End::Ours { code: close::GOING_AWAY, reason });
            }
        }
        Ok(())
    }

    fn message(&mut self, message: Incoming) -> Result<(), End> {
        match message {
            Incoming::Text(text) => {
                let answer = match self.session.text(&text, Day::today()) {
                    Err(violation) if violation.code == close::RESTART => {
                        self.leaving = Some(violation);
                        return Ok(());
                    }
                    answer => answer?,
                };
                if let Some(answer) = answer {
                    self.send(&answer);
                }
                if self.presence.is_none()
                    && let Some(identity) = self.session.identity()
                {
                    let instances = &self.receiver.instances;
                    self.presence = Some(instances.enter(&self.accepted.sender, identity));
                    if identity.run.is_some() {
                        self.ping();
                    }
                    self.compare();
                }
            }
            Incoming::Binary(bytes) => {
                if let Some(taken) = self.session.binary(bytes, Day::today())? {
                    self.take(taken);
                }
            }
            Incoming::Pong(question) => {
                if let Some(presence) = &self.presence {
                    presence.answered(&question);
                }
            }
            Incoming::Ping => {}
            Incoming::Close { code, reason } => return Err(End::Closed { code, reason }),
        }
        Ok(())
    }

    fn ping(&mut self) {
        let question = self.presence.as_ref().map(Presence::question);
        self.backlog.push_back(Outgoing::Ping(question.unwrap_or_default()));
    }

    /// Looks for the document that the sender says it has a receipt for, in a task of its own: the
    /// connection does not wait for the destination.
    fn compare(&mut self) {
        let Some(claim) = self.session.take_claim() else { return };
        let (receiver, sender) = (Arc::clone(&self.receiver), self.accepted.sender.clone());
        tokio::spawn(async move { receiver.claims.check(&sender, &claim).await });
    }

    /// Waits for memory only where there is none right now.
    fn take(&mut self, taken: Taken) {
        let bytes = u32::try_from(taken.frame.records.len()).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.receiver.memory);
        match Arc::clone(&memory).try_acquire_many_owned(bytes) {
            Ok(memory) => self.push(taken, memory),
            Err(_) => {
                let memory = Box::pin(memory.acquire_many_owned(bytes));
                self.aside = Some(Aside { taken, memory });
            }
        }
    }

    fn push(&mut self, taken: Taken, memory: OwnedSemaphorePermit) {
        let Taken { segment, days, frame } = taken;
        self.meter.received(frame.records.len() as u64, frame.flags.resend);
        let records = match frame.records.len() {
            0..COPY_BELOW_BYTES => Bytes::copy_from_slice(&frame.records),
            _ => frame.records,
        };
        self.receiver.hand_on(Frame {
            segment,
            offset: frame.offset,
            read_at: frame.read_at,
            continues: frame.flags.continues,
            days,
            records,
            reply: Reply::new(Arc::clone(&self.inbox), frame.handle),
            memory,
        });
    }

    fn receipts(&mut self, receipts: VecDeque<Receipt>) {
        for receipt in &receipts {
            self.meter.answered(receipt);
        }
        let mut runs = receipts.iter().flat_map(|receipt| &receipt.runs);
        if runs.any(|run| run.verdict.is_final()) {
            self.receiver.health.note();
            self.receipted.store(true, Ordering::Relaxed);
        }
        self.receipts = receipts.into_iter().flat_map(parts).collect();
    }

    fn receipt(&mut self, receipt: Receipt) {
        let held_off = self.session.is_full();
        self.session.settle(&receipt);
        if held_off && !self.session.is_full() {
            self.heartbeat.touch();
        }
        self.send(&Control::Receipt(receipt));
    }

    /// Whether nothing is read because of what came before.
    fn holds_off(&self) -> bool {
        self.aside.is_some() || self.leaving.is_some() || self.session.is_full()
    }

    fn send(&mut self, message: &Control) {
        self.backlog.push_back(Outgoing::Text(message.encode()));
    }

    fn is_drained(&self) -> bool {
        self.session.is_idle() && self.receipts.is_empty() && self.backlog.is_empty()
    }
}

/// A token that was revoked, replaced or has expired ends its connections; one whose entry says
/// something else now makes its sender connect again. So does the entry of a sender that was
/// dialled.
pub(super) fn check_token(receiver: &Receiver, accepted: &Accepted) -> Result<(), End> {
    let tokens = Arc::clone(&receiver.tokens.borrow());
    match accepted.entry(&tokens, Timestamp::now()) {
        None => {
            let reason = "the token was revoked, replaced or has expired";
            Err(End::Ours { code: close::POLICY, reason })
        }
        Some(entry) if !accepted.is_of(entry) => {
            let reason = "the entry of this token changed: connect again";
            Err(End::Ours { code: close::RESTART, reason })
        }
        Some(_) => Ok(()),
    }
}

/// The memory for the frame aside; never, where there is none.
async fn memory(aside: &mut Option<Aside>) -> OwnedSemaphorePermit {
    match aside {
        None => std::future::pending().await,
        Some(aside) => (&mut aside.memory).await.expect("the semaphore is never closed"),
    }
}

/// Cuts a receipt of very many runs, so that no message grows past what a sender takes.
fn parts(receipt: Receipt) -> impl Iterator<Item = Receipt> {
    let Receipt { handle, mut from, runs, .. } = receipt;
    let mut runs = runs.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut part = vec![runs.next()?];
        let mut bytes = size(&part[0]);
        while let Some(run) = runs.next_if(|run| bytes + size(run) <= RECEIPT_BYTES) {
            bytes += size(&run);
            part.push(run);
        }
        let to = part.last().map_or(from, |run| run.to);
        let receipt = Receipt { handle, from, to, runs: part };
        from = to;
        Some(receipt)
    })
}

/// Upper bound of a run's text: numbers and names, and texts with every byte escaped.
fn size(run: &Run) -> usize {
    let texts = match &run.verdict {
        Verdict::Parked { reason } => reason.len(),
        Verdict::Deferred { reason, index, .. } => {
            reason.len() + index.as_ref().map_or(0, String::len)
        }
        Verdict::Stored | Verdict::Already | Verdict::Skipped => 0,
    };
    128 + 6 * texts
}
