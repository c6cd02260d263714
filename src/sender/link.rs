//! The connection to a receiver: dialled, greeted, kept alive, and dialled again.
//!
//! Streams see one [`Link`] at a time through a watch channel. A link that breaks costs nothing:
//! every stream sends what has no receipt on the next one.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::metrics::Metrics;
use crate::backoff::Backoff;
use crate::config::{Endpoint, SendConfig};
use crate::protocol::{Control, Hello, Receipt, Refused, SUBPROTOCOL, VERSION, Welcome};
use crate::record::escape_path;
use crate::tls::ClientTrust;
use crate::transport::{
    Beat, ConnectError, Heartbeat, Incoming, Outgoing, SocketReceiver, SocketSender, close, connect,
};

/// How long a connection attempt may take, from name to upgrade.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a receiver may take to answer `hello`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

/// Messages between streams and the socket: enough to keep it busy, few enough to stay small.
const OUTGOING_MAX: usize = 4;

/// How fast attempts follow each other after a lost connection.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// How fast they follow each other where only a person can mend what is wrong.
const RETRY_SLOWLY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

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
    fn new(welcome: Welcome, compress: bool) -> (Link, mpsc::Receiver<Outgoing>) {
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

    /// Sets the total credit: a larger one is there at once, a smaller one as receipts come.
    fn grant(&self, bytes: u64) {
        let bytes = bytes.min(CREDIT_MAX);
        let mut granted = lock(&self.granted);
        if bytes >= *granted {
            self.credit.add_permits((bytes - *granted) as usize);
            *granted = bytes;
        } else {
            *granted -= self.credit.forget_permits((*granted - bytes) as usize) as u64;
        }
    }

    fn route(&self, handle: u32, letter: Letter) {
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
            LinkError::Connect(error) => matches!(
                error,
                ConnectError::Token
                    | ConnectError::Endpoint { .. }
                    | ConnectError::Tls { .. }
                    | ConnectError::Refused { status: 401 | 403, .. }
                    | ConnectError::Redirected { .. }
                    | ConnectError::Subprotocol { .. }
            ),
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
            LinkError::Connect(ConnectError::Refused { retry_after, .. }) => *retry_after,
            _ => None,
        }
    }
}

/// Dials until stopped. Publishes each link, and `None` while there is none.
pub struct Dialler {
    /// What to dial, and how.
    pub config: Arc<SendConfig>,
    /// TLS for `wss://` endpoints.
    pub trust: Option<Arc<ClientTrust>>,
    /// Identity of the state directory.
    pub instance: Uuid,
    /// Where links are published.
    pub links: watch::Sender<Option<Arc<Link>>>,
    /// Rung by streams that have something to send.
    pub wanted: Arc<Notify>,
    /// Ends everything.
    pub stop: CancellationToken,
    /// Where connections are counted.
    pub metrics: Arc<Metrics>,
}

/// How a connection ended.
enum Ended {
    /// Receipts had come: the receiver works.
    AfterReceipts,
    /// Nothing had come.
    Early,
    /// Nobody had anything to say for a while.
    Idle,
}

impl Dialler {
    /// Runs until stopped. With `--once`, an error that only a person can mend ends it: a script
    /// must not wait for one.
    pub async fn run(self) -> Result<(), LinkError> {
        let mut retry = Backoff::new(RETRY.0, RETRY.1);
        let mut retry_slowly = Backoff::new(RETRY_SLOWLY.0, RETRY_SLOWLY.1);
        let mut failures = 0;
        loop {
            let endpoint = &self.config.to[failures % self.config.to.len()];
            let connected = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                connected = self.connect(endpoint) => connected,
            };
            let delay = match connected {
                Ok((halves, heartbeat, welcome)) => {
                    failures = 0;
                    info!(receiver = %endpoint.url, name = ?welcome.name, sender = %welcome.sender,
                        "connected");
                    self.metrics.connections.add(1);
                    match self.serve(halves, heartbeat, welcome).await {
                        Ended::Idle => {
                            info!("closed the idle connection");
                            tokio::select! {
                                () = self.stop.cancelled() => return Ok(()),
                                () = self.wanted.notified() => Duration::ZERO,
                            }
                        }
                        Ended::AfterReceipts => {
                            retry.reset();
                            retry_slowly.reset();
                            retry.delay()
                        }
                        Ended::Early => retry.delay(),
                    }
                }
                Err(error) => {
                    self.metrics.connection_failures.add(1);
                    if self.config.once && error.ends_once() {
                        return Err(error);
                    }
                    let slowly = error.needs_a_person();
                    let delay = match error.retry_after() {
                        Some(delay) => delay.min(RETRY_SLOWLY.1),
                        None if slowly => retry_slowly.delay(),
                        None => retry.delay(),
                    };
                    failures += 1;
                    // The first failures at once, lasting ones now and then.
                    if slowly || failures.is_power_of_two() {
                        let retry_in = Duration::from_millis(delay.as_millis() as u64);
                        warn!(receiver = %endpoint.url, ?retry_in, "{error}");
                    }
                    delay
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Dials, says `hello` and hears `welcome`.
    async fn connect(
        &self,
        endpoint: &Endpoint,
    ) -> Result<((SocketSender, SocketReceiver), Heartbeat, Welcome), LinkError> {
        let path = &self.config.token_file;
        let token = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| LinkError::TokenFile { path: escape_path(path), source })?;
        let tls = self.trust.as_ref().filter(|_| endpoint.tls).map(|trust| trust.config());
        let socket = connect(endpoint, tls, token.trim(), SUBPROTOCOL, CONNECT_TIMEOUT).await?;
        let heartbeat = socket.heartbeat();
        let mut halves = socket.split();
        let hello = Control::Hello(Hello {
            version: VERSION,
            features: vec!["zstd".to_owned()],
            instance: self.instance,
            agent: concat!("waybill/", env!("CARGO_PKG_VERSION")).to_owned(),
        });
        match tokio::time::timeout(WELCOME_TIMEOUT, greet(&mut halves, hello)).await {
            Ok(Ok(welcome)) => Ok((halves, heartbeat, welcome)),
            Ok(Err(reason)) => Err(LinkError::Greeting(reason)),
            Err(_) => Err(LinkError::Greeting("the receiver did not answer hello".to_owned())),
        }
    }

    /// Serves one connection until it ends.
    async fn serve(
        &self,
        (to_socket, from_socket): (SocketSender, SocketReceiver),
        heartbeat: Heartbeat,
        welcome: Welcome,
    ) -> Ended {
        let (link, messages) = Link::new(welcome, self.config.compress);
        let link = Arc::new(link);
        self.metrics.connected.store(true, Ordering::Relaxed);
        self.links.send_replace(Some(link.clone()));
        let ended = tokio::select! {
            ended = self.receive(&link, from_socket) => ended,
            () = transmit(to_socket, messages, heartbeat, self.stop.clone()) => Ended::Early,
            () = self.idle(&link) => Ended::Idle,
        };
        self.metrics.connected.store(false, Ordering::Relaxed);
        self.links.send_replace(None);
        link.closed.cancel();
        ended
    }

    async fn receive(&self, link: &Link, mut socket: SocketReceiver) -> Ended {
        let mut receipted = false;
        loop {
            let message = match socket.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    warn!(%error, "connection lost");
                    break;
                }
                None => {
                    info!("the receiver closed the connection");
                    break;
                }
            };
            match message {
                Incoming::Text(text) => match Control::decode(&text) {
                    Ok(Control::Receipt(receipt)) => {
                        receipted = true;
                        link.route(receipt.handle, Letter::Receipt(receipt));
                    }
                    Ok(Control::Refused(refused)) => {
                        link.route(refused.handle, Letter::Refused(refused));
                    }
                    Ok(Control::Credit { bytes }) => link.grant(bytes),
                    Ok(Control::Drain(drain)) => {
                        info!(within = ?drain.within, "the receiver is about to stop");
                        link.draining.store(true, Ordering::Relaxed);
                    }
                    Ok(other) => debug!(?other, "message out of place"),
                    // A newer receiver may say more than we understand.
                    Err(error) => debug!(%error, "message not understood"),
                },
                Incoming::Close { code, reason } => {
                    if matches!(code, close::NORMAL | close::GOING_AWAY | close::RESTART) {
                        info!(code, ?reason, "the receiver closed the connection");
                    } else {
                        warn!(code, ?reason, "the receiver closed the connection");
                    }
                    break;
                }
                Incoming::Binary(_) => debug!("binary message out of place"),
                Incoming::Ping | Incoming::Pong => {}
            }
        }
        if receipted { Ended::AfterReceipts } else { Ended::Early }
    }

    /// Ends when nothing was outstanding for as long as the configuration says.
    async fn idle(&self, link: &Link) {
        let Some(patience) = self.config.idle_close else { return std::future::pending().await };
        let is_idle = || link.credit.available_permits() as u64 >= *lock(&link.granted);
        let mut idle_since = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(Duration::from_millis(250).min(patience)).await;
            if !is_idle() {
                idle_since = tokio::time::Instant::now();
            } else if idle_since.elapsed() >= patience {
                return;
            }
        }
    }
}

async fn greet(
    (to_socket, from_socket): &mut (SocketSender, SocketReceiver),
    hello: Control,
) -> Result<Welcome, String> {
    let said = match to_socket.feed(Outgoing::Text(hello.encode())).await {
        Ok(()) => to_socket.flush().await,
        Err(error) => Err(error),
    };
    said.map_err(|error| error.to_string())?;
    loop {
        match from_socket.next().await {
            Some(Ok(Incoming::Text(text))) => {
                return match Control::decode(&text) {
                    Ok(Control::Welcome(welcome)) if welcome.version.abs_diff(VERSION) <= 1 => {
                        Ok(welcome)
                    }
                    Ok(Control::Welcome(welcome)) => Err(format!(
                        "the receiver speaks version {} and this is version {VERSION}: update the \
                         older side",
                        welcome.version
                    )),
                    _ => Err("the receiver answered hello with something else".to_owned()),
                };
            }
            Some(Ok(Incoming::Close { code, reason })) => {
                return Err(format!("the receiver closed with code {code}: {reason:?}"));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the receiver closed the connection".to_owned()),
        }
    }
}

/// Writes messages and pings; ends when the connection is dead or, having said so, on a stop.
async fn transmit(
    mut socket: SocketSender,
    mut messages: mpsc::Receiver<Outgoing>,
    mut heartbeat: Heartbeat,
    stop: CancellationToken,
) {
    loop {
        let message = tokio::select! {
            message = messages.recv() => match message {
                Some(message) => message,
                None => return,
            },
            beat = heartbeat.next() => match beat {
                Beat::Ping => Outgoing::Ping,
                Beat::Dead => {
                    warn!("connection lost: the receiver was silent for too long");
                    return;
                }
            },
            () = stop.cancelled() => {
                let _ = socket.close(close::GOING_AWAY, "the sender stops").await;
                return;
            }
        };
        let mut sent = socket.feed(message).await;
        // All that is there goes out with one flush.
        while sent.is_ok()
            && let Ok(message) = messages.try_recv()
        {
            sent = socket.feed(message).await;
        }
        if let Err(error) = match sent {
            Ok(()) => socket.flush().await,
            Err(error) => Err(error),
        } {
            warn!(%error, "connection lost");
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
