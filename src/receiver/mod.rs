//! From the transport to the destination, and receipts back.
//!
//! `command::receive` starts it with a bound listener, senders to dial, and a queue whose other end a
//! destination empties. It must never pass on a frame whose sender, type, day or index rule was not checked
//! (I4, I8), nor hold more than its bytes (I7), nor make up a verdict (I1).

mod chain;
mod connection;
mod dial;
mod gate;
mod health;
mod instances;
mod metrics;
mod outstanding;
mod session;
mod text;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

pub use dial::Dial;
pub use gate::Accepted;
pub use metrics::Metrics;

use crate::config::ReceiveConfig;
use crate::destination::{Frame, Lookup, Profile, Queue};
use crate::protocol::FRAME_BYTES_MAX;
use crate::record::escape_path;
use crate::shutdown::Shutdown;
use crate::stamp::Stamp;
use crate::tokens::{self, Tokens, TokensError};
use crate::transport::{Answer, Handler, Listener, Request, Socket};
use chain::Claims;
use gate::{Slots, Speaks};
use health::Health;
use instances::Instances;
use session::Terms;

/// How long a sender has for its `hello`.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connections have beyond the drain for their close handshakes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A receiver: what all its connections share.
#[derive(Debug)]
pub struct Receiver {
    terms: Arc<Terms>,
    trust_client_headers: bool,
    tokens_file: PathBuf,
    tokens: tokio::sync::watch::Receiver<Arc<Tokens>>,
    tokens_changed: tokio::sync::watch::Sender<Arc<Tokens>>,
    /// The tokens file as it was when a token was looked for in vain.
    tokens_missed: Mutex<Option<Stamp>>,
    queue: Arc<Queue>,
    /// One permit per byte of frames between their arrival and the end of their work.
    memory: Arc<Semaphore>,
    memory_bytes_max: usize,
    slots: Slots,
    instances: Instances,
    claims: Claims,
    health: Health,
    /// Connections that are being served.
    sessions: TaskTracker,
    shutdown: Shutdown,
    drain_timeout: Duration,
    hello_timeout: Duration,
    tokens_interval: Duration,
    metrics: Arc<Metrics>,
}

impl Receiver {
    /// Reads the tokens file; `destination` is what empties `queue`, and `lookup` reads it.
    pub fn new(
        config: &ReceiveConfig,
        destination: &Profile,
        lookup: Lookup,
        queue: Arc<Queue>,
        shutdown: Shutdown,
        metrics: Arc<Metrics>,
    ) -> Result<Receiver, TokensError> {
        let tokens = Tokens::load(&config.tokens)?;
        if tokens.entries().is_empty() {
            warn!(file = %escape_path(&config.tokens), "no tokens: nobody may send until `waybill token` mints one");
        }
        let (tokens_changed, tokens) = tokio::sync::watch::channel(Arc::new(tokens));
        // One largest frame must fit, or its connection would wait for ever.
        let memory_bytes_max = usize::try_from(config.memory_bytes_max)
            .unwrap_or(usize::MAX)
            .clamp(FRAME_BYTES_MAX, Semaphore::MAX_PERMITS);
        Ok(Receiver {
            terms: Arc::new(Terms {
                rule: config.rule.clone(),
                former_rules: config.former_rules.clone(),
                days: config.days,
                credit: config.credit.max(FRAME_BYTES_MAX as u64),
                destination: destination.id,
            }),
            trust_client_headers: config.trust_client_headers,
            tokens_file: config.tokens.clone(),
            tokens,
            tokens_changed,
            tokens_missed: Mutex::default(),
            queue,
            memory: Arc::new(Semaphore::new(memory_bytes_max)),
            memory_bytes_max,
            slots: Slots::default(),
            instances: Instances::default(),
            claims: Claims::new(lookup),
            health: Health::new(destination.health.clone()),
            sessions: TaskTracker::new(),
            shutdown,
            drain_timeout: config.drain_timeout,
            hello_timeout: HELLO_TIMEOUT,
            tokens_interval: tokens::watch::INTERVAL,
            metrics,
        })
    }

    /// What empties the queue is this one, opened anew.
    pub fn reopened(&mut self, destination: &Profile) {
        Arc::make_mut(&mut self.terms).destination = destination.id;
        self.health = Health::new(destination.health.clone());
    }

    /// Reads the tokens file at once if it has changed since a token was looked for in vain: what was
    /// minted a moment ago is good. Whether it was read.
    fn look_at_tokens(&self) -> bool {
        let stamp = Stamp::of(&self.tokens_file);
        let mut missed = self.tokens_missed.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *missed != stamp;
        if changed {
            *missed = stamp;
            tokens::watch::reload(&self.tokens_file, &self.tokens_changed);
        }
        changed
    }

    /// Serves until the shutdown, then drains: senders that come are told 503 (or wait for the
    /// successor of a part that ends alone), those that are there get the receipts of what they
    /// sent, within the drain timeout.
    pub async fn run(self, listener: Option<Listener>, dials: Vec<Dial>) {
        let receiver = Arc::new(self);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(tokens::watch::run(
            receiver.tokens_file.clone(),
            receiver.tokens_changed.clone(),
            receiver.tokens_interval,
            stop.clone(),
        ));
        let accepting = stop.child_token();
        receiver.metrics.set_receiver(&receiver, listener.as_ref());
        let (handler, accepted, until) = (Arc::clone(&receiver), tasks.clone(), accepting.clone());
        let listening = tokio::spawn(async move {
            if let Some(listener) = listener {
                listener.run(handler, accepted, until).await;
            }
        });
        for dial in dials {
            tasks.spawn(dial.run(Arc::clone(&receiver)));
        }
        receiver.shutdown.requested().await;
        if receiver.shutdown.ends_alone() {
            accepting.cancel();
        }
        info!(connections = receiver.sessions.len(), "draining");
        receiver.sessions.close();
        let limit = receiver.drain_timeout + CLOSE_TIMEOUT;
        if tokio::time::timeout(limit, receiver.sessions.wait()).await.is_err() {
            warn!(connections = receiver.sessions.len(), "connections did not end in time");
        }
        stop.cancel();
        // The address is free when this returns.
        if let Err(error) = listening.await {
            error!(%error, "the listener ended unexpectedly");
        }
    }

    /// Why no line can be stored now; `None` where it can.
    fn not_ready(&self) -> Option<&'static str> {
        if self.shutdown.is_requested() {
            return Some("draining");
        }
        let ready = self.health.is_ready(self.memory_in_use());
        (!ready).then_some("the destination does not answer")
    }

    /// Hands a frame to the destination.
    fn hand_on(&self, frame: Frame) {
        let held = self.memory_bytes_max - self.memory.available_permits();
        if held == frame.memory.num_permits() {
            self.health.note();
        }
        self.queue.push(frame);
    }

    fn memory_in_use(&self) -> bool {
        self.memory.available_permits() < self.memory_bytes_max
    }
}

impl Handler for Receiver {
    type Session = Accepted;

    fn answer(&self, request: &Request) -> Answer<Accepted> {
        gate::answer(self, request)
    }

    async fn serve(self: Arc<Self>, accepted: Accepted, socket: Socket) {
        match accepted.speaks.clone() {
            Speaks::Frames => drop(connection::serve(self, accepted, socket).await),
            Speaks::Lines(origin) => text::run(self, accepted, origin, socket).await,
        }
    }
}

#[cfg(test)]
mod tests;
