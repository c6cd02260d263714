//! One connection: a task that drives [`Lines`] over a socket.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, sleep_until};

use super::lines::{Batch, Lines};
use super::origin::Origin;
use crate::destination::{Frame, Inbox, Reply};
use crate::protocol::Receipt;
use crate::receiver::Receiver;
use crate::receiver::connection::{End, WRITES_MAX, check_token, until_the_end, write};
use crate::receiver::gate::Accepted;
use crate::receiver::metrics::Meter;
use crate::receiver::session::Violation;
use crate::record::Day;
use crate::tokens::Tokens;
use crate::transport::{
    Beat, Heartbeat, Incoming, Outgoing, Socket, SocketError, SocketReceiver, close,
};

/// Serves a client until it is gone.
pub(in crate::receiver) async fn run(
    receiver: Arc<Receiver>,
    accepted: Accepted,
    origin: Origin,
    socket: Socket,
) {
    let _counted = receiver.sessions.token();
    let heartbeat = socket.heartbeat();
    let (sender, incoming) = socket.split();
    let (writes, written) = mpsc::channel(WRITES_MAX);
    let (client, terms) = (accepted.sender.clone(), Arc::clone(&receiver.terms));
    let name = client.name.clone();
    let peer = accepted.peer.clone();
    let mut connection = Connection {
        lines: Lines::new(client, origin, terms, Day::today()),
        tokens: receiver.tokens.clone(),
        meter: receiver.metrics.connected(&name),
        receiver,
        accepted,
        incoming,
        heartbeat,
        inbox: Arc::default(),
        held: None,
        aside: None,
        read_before: true,
        ending: None,
    };
    let driving = async move { (connection.drive(&writes).await, connection.incoming) };
    until_the_end(&name, &peer, driving, write(sender, written)).await;
}

struct Connection {
    receiver: Arc<Receiver>,
    accepted: Accepted,
    lines: Lines,
    tokens: tokio::sync::watch::Receiver<Arc<Tokens>>,
    incoming: SocketReceiver,
    heartbeat: Heartbeat,
    inbox: Arc<Inbox>,
    meter: Meter,
    /// An answer that the writing half has no room for yet; further ones stay with the lines.
    held: Option<Outgoing>,
    /// A batch that waits for memory; nothing is read meanwhile.
    aside: Option<Aside>,
    /// Whether messages were read at the last look.
    read_before: bool,
    ending: Option<Ending>,
}

struct Aside {
    batch: Batch,
    memory: Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>,
}

/// Nothing more is read; what was read is answered, then the connection ends.
struct Ending {
    end: End,
    until: Instant,
}

/// What woke the connection.
enum Event {
    Message(Option<Result<Incoming, SocketError>>),
    Receipts(VecDeque<Receipt>),
    Memory(OwnedSemaphorePermit),
    Beat(Beat),
    Room,
    TokensChanged,
    Drain,
    Overdue,
}

impl Connection {
    /// Until there is a reason to end. Dropped only when the connection ends anyway.
    async fn drive(&mut self, writes: &mpsc::Sender<Outgoing>) -> End {
        loop {
            self.hand_over(writes);
            if let Some(ending) =
                self.ending.take_if(|_| self.lines.is_idle() && self.held.is_none())
            {
                return ending.end;
            }
            let reads = self.reads();
            if reads && !self.read_before {
                // What the peer sent meanwhile lies unread: that was our silence, not its.
                self.heartbeat.touch();
            }
            self.read_before = reads;
            let event = self.event(reads, writes).await;
            if let Err(end) = self.handle(event, writes) {
                return end;
            }
        }
    }

    /// Full means that nothing is read (I7): too many lines without an answer, or no memory.
    fn reads(&self) -> bool {
        self.ending.is_none() && self.aside.is_none() && self.lines.has_room()
    }

    fn hand_over(&mut self, writes: &mpsc::Sender<Outgoing>) {
        while let Some(message) =
            self.held.take().or_else(|| self.lines.answer().map(Outgoing::Text))
        {
            if let Err(mpsc::error::TrySendError::Full(message)) = writes.try_send(message) {
                self.held = Some(message);
                return;
            }
        }
    }

    /// Every future here may be dropped without a loss.
    async fn event(&mut self, reads: bool, writes: &mpsc::Sender<Outgoing>) -> Event {
        let until = self.ending.as_ref().map(|ending| ending.until);
        let (tokens, shutdown) = (&mut self.tokens, &self.receiver.shutdown);
        tokio::select! {
            message = self.incoming.next(), if reads => Event::Message(message),
            receipts = self.inbox.take() => Event::Receipts(receipts),
            memory = memory(&mut self.aside) => Event::Memory(memory),
            beat = self.heartbeat.next() => Event::Beat(beat),
            _ = writes.reserve(), if self.held.is_some() => Event::Room,
            Ok(()) = tokens.changed() => Event::TokensChanged,
            () = shutdown.requested(), if until.is_none() => Event::Drain,
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                Event::Overdue
            }
        }
    }

    fn handle(&mut self, event: Event, writes: &mpsc::Sender<Outgoing>) -> Result<(), End> {
        match event {
            Event::Message(message) => {
                let read = self.messages(message);
                self.forward(true);
                read?;
            }
            Event::Receipts(receipts) => self.receipts(&receipts),
            Event::Memory(memory) => {
                if let Some(aside) = self.aside.take() {
                    self.hand_on(aside.batch, memory);
                    self.forward(true);
                }
            }
            // A client that takes nothing needs no further ping to take.
            Event::Beat(Beat::Ping) => drop(writes.try_send(Outgoing::Ping(Bytes::new()))),
            // While it waits for its answers, the silence is ours.
            Event::Beat(Beat::Dead) if !self.read_before && self.held.is_none() => {
                self.heartbeat.touch();
            }
            Event::Beat(Beat::Dead) => return Err(End::Dead),
            Event::Room => {}
            Event::TokensChanged => check_token(&self.receiver, &self.accepted)?,
            Event::Drain => {
                let reason = "this receiver stops";
                self.end_with(End::Ours { code: close::GOING_AWAY, reason });
            }
            Event::Overdue => {
                let reason = "this receiver stops before all was answered";
                return Err(match self.ending.take().map(|ending| ending.end) {
                    Some(End::Violation(violation)) => End::Violation(violation),
                    _ => End::Ours { code: close::GOING_AWAY, reason },
                });
            }
        }
        Ok(())
    }

    /// A message, and those that have come with it: they share a frame.
    fn messages(&mut self, message: Option<Result<Incoming, SocketError>>) -> Result<(), End> {
        let mut next = Some(message);
        while let Some(message) = next {
            match message {
                None => return Err(End::Lost(SocketError::Closed)),
                Some(Ok(message)) => self.message(message)?,
                Some(Err(error)) => match End::from(error) {
                    // The lines before it are still answered (I6).
                    end @ End::Violation(_) => self.end_with(end),
                    end => return Err(end),
                },
            }
            self.forward(false);
            next = self.reads().then(|| self.incoming.next().now_or_never()).flatten();
        }
        Ok(())
    }

    fn message(&mut self, message: Incoming) -> Result<(), End> {
        match message {
            Incoming::Text(text) => {
                let now = Timestamp::now().as_millisecond();
                self.lines.take(&text, u64::try_from(now).unwrap_or_default());
            }
            Incoming::Binary(_) => {
                let reason = "a line is a text message";
                self.end_with(End::Violation(Violation::new(close::UNSUPPORTED, reason)));
            }
            Incoming::Ping | Incoming::Pong(_) => {}
            Incoming::Close { code, reason } => return Err(End::Closed { code, reason }),
        }
        Ok(())
    }

    /// Reads no more, answers what was read, then ends so.
    fn end_with(&mut self, end: End) {
        let until = Instant::now() + self.receiver.drain_timeout;
        self.ending = Some(Ending { end, until });
    }

    /// Hands lines to the destination as far as memory goes; with `all`, also a batch that could
    /// still grow.
    fn forward(&mut self, all: bool) {
        while self.aside.is_none()
            && let Some(batch) = self.lines.batch(all)
        {
            let bytes = u32::try_from(batch.records.len()).unwrap_or(u32::MAX);
            let memory = Arc::clone(&self.receiver.memory);
            match Arc::clone(&memory).try_acquire_many_owned(bytes) {
                Ok(memory) => self.hand_on(batch, memory),
                Err(_) => {
                    let memory = Box::pin(memory.acquire_many_owned(bytes));
                    self.aside = Some(Aside { batch, memory });
                }
            }
        }
    }

    fn hand_on(&self, batch: Batch, memory: OwnedSemaphorePermit) {
        let Batch { handle, offset, segment, days, records } = batch;
        self.meter.received(records.len() as u64, false);
        let now = Timestamp::now().as_millisecond();
        self.receiver.hand_on(Frame {
            segment,
            offset,
            // Each record has a time of its own.
            read_at: u64::try_from(now).unwrap_or_default(),
            continues: false,
            days,
            records,
            reply: Reply::new(Arc::clone(&self.inbox), handle),
            memory,
        });
    }

    fn receipts(&mut self, receipts: &VecDeque<Receipt>) {
        for receipt in receipts {
            self.lines.settle(receipt);
            self.meter.answered(receipt);
            if receipt.runs.iter().any(|run| run.verdict.is_final()) {
                self.receiver.health.note();
            }
        }
    }
}

/// The memory for the batch aside; never, where there is none.
async fn memory(aside: &mut Option<Aside>) -> OwnedSemaphorePermit {
    match aside {
        None => std::future::pending().await,
        Some(aside) => (&mut aside.memory).await.expect("the semaphore is never closed"),
    }
}
