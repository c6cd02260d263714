//! What streams see of the connection to a receiver, and the side that dials it, again and again.
//!
//! Streams see one [`Link`] at a time through a watch channel. A link that breaks costs nothing:
//! every stream sends what has no receipt on the next one.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::connection::{Connections, Ended, Greeted};
use crate::config::{DialConfig, Endpoint};
use crate::protocol::{Receipt, Refused, SUBPROTOCOL, Welcome};
use crate::record::escape_path;
use crate::tls::ClientConfig;
use crate::transport::{ConnectError, Outgoing, Pause, Retry, connect};

/// How long a connection attempt may take, from name to upgrade.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Messages between streams and the socket: enough to keep it busy, few enough to stay small.
const OUTGOING_MAX: usize = 4;

/// A connection on which lines can be sent.
#[derive(Debug)]
pub struct Link {
    /// What the receiver said.
    pub welcome: Welcome,
    /// Uncompressed bytes that may still be sent.
    pub credit: Semaphore,
    /// Frames that may still be sent.
    pub frames: Semaphore,
    /// Whether frames are compressed.
    pub compress: bool,
    /// Cancelled when the connection is gone.
    pub closed: CancellationToken,
    /// The receiver is about to stop: nothing new is sent.
    pub draining: AtomicBool,
    granted: Mutex<u64>,
    outgoing: mpsc::Sender<Outgoing>,
    routes: Mutex<HashMap<u32, Arc<Mailbox>>>,
    next_handle: AtomicU32,
}

/// What a receiver says about a segment.
#[derive(Clone, Debug)]
pub enum Letter {
    /// Verdicts.
    Receipt(Receipt),
    /// It does not take the segment.
    Refused(Refused),
}

/// Letters for one stream. Bounded by what the stream has sent and not seen receipted.
#[derive(Debug, Default)]
pub struct Mailbox {
    letters: Mutex<VecDeque<Letter>>,
    /// Also rung by others who want the stream to look around.
    pub wake: Notify,
}

impl Mailbox {
    /// Takes all letters.
    pub fn take(&self) -> VecDeque<Letter> {
        std::mem::take(&mut *lock(&self.letters))
    }

    fn put(&self, letter: Letter) {
        lock(&self.letters).push_back(letter);
        self.wake.notify_one();
    }
}

impl Link {
    pub fn new(welcome: Welcome, compress: bool) -> (Link, mpsc::Receiver<Outgoing>) {
        let (outgoing, messages) = mpsc::channel(OUTGOING_MAX);
        let credit = welcome.credit.min(CREDIT_MAX);
        let frames = usize::try_from(welcome.limits.frames).unwrap_or(usize::MAX);
        let link = Link {
            credit: Semaphore::new(credit as usize),
            frames: Semaphore::new(frames.clamp(1, Semaphore::MAX_PERMITS)),
            compress: compress && welcome.features.iter().any(|feature| feature == "zstd"),
            closed: CancellationToken::new(),
            draining: AtomicBool::new(false),
            granted: Mutex::new(credit),
            outgoing,
            routes: Mutex::default(),
            next_handle: AtomicU32::new(1),
            welcome,
        };
        (link, messages)
    }

    /// A handle whose letters go into this mailbox.
    pub fn register(&self, mailbox: Arc<Mailbox>) -> u32 {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lock(&self.routes).insert(handle, mailbox);
        handle
    }

    /// Forgets a finished segment.
    pub fn unregister(&self, handle: u32) {
        lock(&self.routes).remove(&handle);
    }

    /// Hands a message to the connection; `false` when it is gone.
    pub async fn send(&self, message: Outgoing) -> bool {
        tokio::select! {
            () = self.closed.cancelled() => false,
            sent = self.outgoing.send(message) => sent.is_ok(),
        }
    }

    /// Whether the receiver still takes new lines.
    pub fn takes_more(&self) -> bool {
        !self.draining.load(Ordering::Relaxed)
    }

    /// Whether nothing awaits a receipt.
    pub fn is_idle(&self) -> bool {
        self.credit.available_permits() as u64 >= *lock(&self.granted)
    }

    /// Sets the total credit: a larger one is there at once, a smaller one as receipts come.
    pub fn grant(&self, bytes: u64) {
        let bytes = bytes.min(CREDIT_MAX);
        let mut granted = lock(&self.granted);
        if bytes >= *granted {
            self.credit.add_permits((bytes - *granted) as usize);
            *granted = bytes;
        } else {
            *granted -= self.credit.forget_permits((*granted - bytes) as usize) as u64;
        }
    }

    /// Hands a letter to the stream that it is for.
    pub fn route(&self, handle: u32, letter: Letter) {
        match lock(&self.routes).get(&handle) {
            Some(mailbox) => mailbox.put(letter),
            None => debug!(handle, "letter for a segment that is finished"),
        }
    }
}

/// More credit than a sender makes use of; bounds what it keeps in its windows (I7).
const CREDIT_MAX: u64 = 64 << 20;

/// Why there is no link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The token cannot be read.
    #[error("token file {path}: {source}; mint a token at the receiver with `waybill token NAME`")]
    TokenFile {
        /// As configured.
        path: String,
        /// From the operating system.
        source: std::io::Error,
    },
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Connected, and no understanding.
    #[error("{0}")]
    Greeting(String),
}

impl LinkError {
    /// Whether trying again is of no use before a person mends something.
    fn needs_a_person(&self) -> bool {
        match self {
            LinkError::TokenFile { .. } => true,
            LinkError::Connect(error) => error.needs_a_person(),
            LinkError::Greeting(_) => false,
        }
    }

    /// Whether a script had better hear of it than wait: what answers there is no receiver.
    fn ends_once(&self) -> bool {
        let elsewhere = matches!(self, LinkError::Connect(ConnectError::NotWaybill { .. }));
        elsewhere || self.needs_a_person()
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            LinkError::Connect(error) => error.retry_after(),
            _ => None,
        }
    }
}

/// Dials until stopped.
pub struct Dialler {
    /// What to dial, and how.
    pub config: DialConfig,
    /// TLS for `wss://` endpoints.
    pub tls: Option<Arc<ClientConfig>>,
    /// What to do with a connection.
    pub connections: Connections,
    /// Rung by streams that have something to send.
    pub wanted: Arc<Notify>,
    /// An error that only a person can mend is the end: a script must not wait for one.
    pub once: bool,
}

impl Dialler {
    /// Runs until stopped, or until an error where `once` says so.
    pub async fn run(self) -> Result<(), LinkError> {
        let stop = &self.connections.stop;
        let mut retry = Retry::new();
        loop {
            let endpoint = &self.config.to[retry.failures() % self.config.to.len()];
            let connected = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                connected = self.connect(endpoint) => connected,
            };
            let delay = match connected {
                Ok(greeted) => {
                    retry.connected();
                    let welcome = &greeted.welcome;
                    info!(receiver = %endpoint.url, name = ?welcome.name, sender = %welcome.sender,
                        "connected");
                    let idle_close = self.config.idle_close;
                    match self.connections.serve(greeted, idle_close, std::future::pending()).await
                    {
                        Ended::Idle => {
                            info!("closed the idle connection");
                            tokio::select! {
                                () = stop.cancelled() => return Ok(()),
                                () = self.wanted.notified() => Duration::ZERO,
                            }
                        }
                        Ended::AfterReceipts => retry.ended(true),
                        Ended::Early => retry.ended(false),
                    }
                }
                Err(error) => {
                    if self.once && error.ends_once() {
                        return Err(error);
                    }
                    let slowly = error.needs_a_person();
                    let Pause { delay, tell } = retry.failed(slowly, error.retry_after());
                    if tell {
                        warn!(receiver = %endpoint.url, retry_in = ?delay, "{error}");
                    }
                    delay
                }
            };
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Dials, says `hello` and hears `welcome`.
    async fn connect(&self, endpoint: &Endpoint) -> Result<Greeted, LinkError> {
        let path = &self.config.token_file;
        let token = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| LinkError::TokenFile { path: escape_path(path), source })?;
        let tls = self.tls.clone().filter(|_| endpoint.tls);
        let socket = connect(endpoint, tls, token.trim(), SUBPROTOCOL, CONNECT_TIMEOUT).await?;
        self.connections.greet(socket).await.map_err(LinkError::Greeting)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
