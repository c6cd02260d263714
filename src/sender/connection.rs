//! One connection with a receiver, whichever side opened it: greeted, used, kept alive, closed.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::chain::{Answerer, ChainKeyError};
use super::link::{Letter, Link, Links};
use super::metrics::Metrics;
use crate::protocol::{Control, Hello, VERSION, Welcome};
use crate::transport::{
    Beat, Heartbeat, Incoming, Outgoing, Socket, SocketError, SocketReceiver, SocketSender, close,
};

/// How long a receiver may take to answer `hello`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a receiver may take to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a WebSocket frame (RFC 6455 §5.2) and a TLS record add to a message, about.
const FRAME_OVERHEAD_BYTES: usize = 36;

/// Makes links of sockets.
pub struct Connections {
    /// Identity of the state directory.
    pub instance: Uuid,
    /// Identity of this process.
    pub run: Uuid,
    /// Compress frames where the receiver can.
    pub compress: bool,
    /// How much all connections write.
    pub pace: Pace,
    /// What answers a receiver's challenge, where there is a chain key.
    pub chain: Option<Answerer>,
    /// Where links are published while they live.
    pub links: watch::Sender<Links>,
    /// Ends everything.
    pub stop: CancellationToken,
    /// Where connections are counted.
    pub metrics: Arc<Metrics>,
}

/// A connection on which both sides have introduced themselves.
pub struct Greeted {
    /// What the receiver said.
    pub welcome: Welcome,
    to_socket: SocketSender,
    from_socket: SocketReceiver,
    heartbeat: Heartbeat,
}

/// A connection whose link is published.
pub struct Open {
    link: Arc<Link>,
    messages: mpsc::Receiver<Outgoing>,
    to_socket: SocketSender,
    from_socket: SocketReceiver,
    heartbeat: Heartbeat,
}

impl Open {
    /// What streams see of it.
    pub fn link(&self) -> Arc<Link> {
        self.link.clone()
    }
}

/// Why there is no understanding.
#[derive(Debug, Error)]
pub enum GreetError {
    /// The receiver's challenge cannot be answered.
    #[error(transparent)]
    ChainKey(#[from] ChainKeyError),
    /// The receiver does not want this sender.
    #[error("the receiver closed with code {code}: {reason:?}")]
    Closed {
        /// RFC 6455 §7.4.1.
        code: u16,
        /// In its words: what mends it, as a rule.
        reason: String,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl GreetError {
    /// Whether trying again is of no use before a person mends something.
    pub fn needs_a_person(&self) -> bool {
        matches!(self, GreetError::ChainKey(_) | GreetError::Closed { code: close::POLICY, .. })
    }
}

impl From<SocketError> for GreetError {
    fn from(error: SocketError) -> GreetError {
        GreetError::Failed(error.to_string())
    }
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Receipts had come: the receiver works.
    AfterReceipts,
    /// Nothing had come.
    Early,
    /// Nobody had anything to say for a while.
    Idle,
}

/// Why this side closes: a code of RFC 6455 §7.4.1, and a word for the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Close {
    /// The code.
    pub code: u16,
    /// The word.
    pub reason: &'static str,
}

impl Connections {
    /// Says `hello` to `receiver` and hears `welcome`.
    pub async fn greet(&self, receiver: &str, socket: Socket) -> Result<Greeted, GreetError> {
        let chain = match &self.chain {
            Some(chain) => chain.answer(receiver, socket.challenge()).await?,
            None => None,
        };
        let heartbeat = socket.heartbeat();
        let (mut to_socket, mut from_socket) = socket.split();
        let hello = Control::Hello(Hello {
            version: VERSION,
            features: vec!["zstd".to_owned()],
            instance: self.instance,
            run: Some(self.run),
            agent: concat!("waybill/", env!("CARGO_PKG_VERSION")).to_owned(),
            chain,
        });
        let greeting = greet(&mut to_socket, &mut from_socket, hello);
        match tokio::time::timeout(WELCOME_TIMEOUT, greeting).await {
            Ok(welcome) => Ok(Greeted { welcome: welcome?, to_socket, from_socket, heartbeat }),
            Err(_) => Err(GreetError::Failed("the receiver did not answer hello".to_owned())),
        }
    }

    /// Publishes the link to `receiver`, which is to be served at once.
    pub fn open(&self, receiver: String, greeted: Greeted) -> Open {
        let Greeted { welcome, to_socket, from_socket, heartbeat } = greeted;
        let (link, messages) = Link::new(receiver, welcome, self.compress);
        let link = Arc::new(link);
        self.metrics.connections.add(1);
        self.publish(|links| links.add(link.clone()));
        Open { link, messages, to_socket, from_socket, heartbeat }
    }

    /// Serves one connection until it ends, or is closed: on a stop, when `close` says so, and when
    /// nothing was outstanding for as long as `idle_close` says.
    pub async fn serve(
        &self,
        open: Open,
        idle_close: Option<Duration>,
        close: impl Future<Output = Close>,
    ) -> Ended {
        let Open { link, messages, to_socket, from_socket, heartbeat } = open;
        let close = async {
            let close = tokio::select! {
                () = self.stop.cancelled() => {
                    Close { code: close::GOING_AWAY, reason: "the sender stops" }
                }
                close = close => close,
            };
            self.retract(&link);
            close
        };
        let ended = tokio::select! {
            ended = receive(&link, from_socket) => ended,
            () = transmit(to_socket, messages, heartbeat, &self.pace, close) => Ended::Early,
            () = idle(&link, idle_close) => Ended::Idle,
        };
        self.retract(&link);
        ended
    }

    fn retract(&self, link: &Link) {
        self.publish(|links| links.remove(link));
        link.closed.cancel();
    }

    fn publish(&self, change: impl FnOnce(&mut Links)) {
        self.links.send_modify(|links| {
            change(links);
            self.metrics.connected.store(links.count(), Ordering::Relaxed);
        });
    }
}

async fn receive(link: &Link, mut socket: SocketReceiver) -> Ended {
    let mut receipted = false;
    loop {
        let message = match socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => {
                warn!(%error, "connection lost");
                break;
            }
            None => {
                info!("connection closed");
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
                    link.draining.cancel();
                }
                Ok(other) => debug!(?other, "message out of place"),
                // A newer receiver may say more than we understand.
                Err(error) => debug!(%error, "message not understood"),
            },
            Incoming::Close { code, reason } => {
                if matches!(code, close::NORMAL | close::GOING_AWAY | close::RESTART) {
                    info!(code, reason, "connection closed");
                } else {
                    warn!(code, reason, "the receiver closed the connection");
                }
                break;
            }
            Incoming::Binary(_) => debug!("binary message out of place"),
            Incoming::Ping | Incoming::Pong(_) => {}
        }
    }
    if receipted { Ended::AfterReceipts } else { Ended::Early }
}

/// Ends when nothing was outstanding for so long.
async fn idle(link: &Link, patience: Option<Duration>) {
    let Some(patience) = patience else { return std::future::pending().await };
    let mut idle_since = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(250).min(patience)).await;
        if !link.is_idle() {
            idle_since = Instant::now();
        } else if idle_since.elapsed() >= patience {
            return;
        }
    }
}

async fn greet(
    to_socket: &mut SocketSender,
    from_socket: &mut SocketReceiver,
    hello: Control,
) -> Result<Welcome, GreetError> {
    to_socket.feed(Outgoing::Text(hello.encode())).await?;
    to_socket.flush().await?;
    let failed = |text: &str| Err(GreetError::Failed(text.to_owned()));
    loop {
        match from_socket.next().await {
            Some(Ok(Incoming::Text(text))) => {
                return match Control::decode(&text) {
                    Ok(Control::Welcome(welcome)) if welcome.version.abs_diff(VERSION) <= 1 => {
                        Ok(welcome)
                    }
                    Ok(Control::Welcome(welcome)) => failed(&format!(
                        "the receiver speaks version {} and this is version {VERSION}: update the \
                         older side",
                        welcome.version
                    )),
                    _ => failed("the receiver answered hello with something else"),
                };
            }
            Some(Ok(Incoming::Close { code, reason })) => {
                return Err(GreetError::Closed { code, reason });
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => return failed("the receiver closed the connection"),
        }
    }
}

/// Writes messages and pings; ends when the connection is dead or, having said so, on a close. A
/// write that goes nowhere holds up neither.
async fn transmit(
    mut socket: SocketSender,
    mut messages: mpsc::Receiver<Outgoing>,
    mut heartbeat: Heartbeat,
    pace: &Pace,
    close: impl Future<Output = Close>,
) {
    let mut close = pin!(close);
    let closing = loop {
        let next = async {
            pace.ready().await;
            messages.recv().await
        };
        let message = tokio::select! {
            message = next => match message {
                Some(message) => message,
                None => return,
            },
            beat = heartbeat.next() => match beat {
                Beat::Ping => Outgoing::Ping(Bytes::new()),
                Beat::Dead => return warn!("connection lost: the receiver was silent for too long"),
            },
            close = &mut close => break close,
        };
        let written = tokio::select! {
            written = write(&mut socket, message, &mut messages, pace) => written,
            () = dead(&mut heartbeat) => {
                return warn!("connection lost: the receiver was silent for too long");
            }
            close = &mut close => break close,
        };
        if let Err(error) = written {
            return warn!(%error, "connection lost");
        }
    };
    // The reading half ends with the peer's answer. Before that the connection must not be
    // dropped: with unread bytes it is reset, and a reset loses the close frame.
    let farewell = async {
        let _ = socket.close(closing.code, closing.reason).await;
        std::future::pending::<()>().await;
    };
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, farewell).await;
}

/// Sends what is there with one flush.
async fn write(
    socket: &mut SocketSender,
    message: Outgoing,
    messages: &mut mpsc::Receiver<Outgoing>,
    pace: &Pace,
) -> Result<(), SocketError> {
    pace.spend(&message);
    socket.feed(message).await?;
    while pace.is_ready()
        && let Ok(message) = messages.try_recv()
    {
        pace.spend(&message);
        socket.feed(message).await?;
    }
    socket.flush().await
}

/// Spreads over time what all connections write together. Pings do not wait for it.
pub struct Pace {
    /// Bytes per second.
    limit: Option<u64>,
    /// When what was written is paid for.
    ready_at: Mutex<Instant>,
}

impl Pace {
    /// At most so many bytes per second.
    pub fn new(limit: Option<u64>) -> Pace {
        Pace { limit, ready_at: Mutex::new(Instant::now()) }
    }

    /// Waits until something may be written. Dropping the future loses nothing.
    async fn ready(&self) {
        while !self.is_ready() {
            // Another connection may write meanwhile.
            let ready_at = *self.ready_at();
            tokio::time::sleep_until(ready_at).await;
        }
    }

    fn is_ready(&self) -> bool {
        self.limit.is_none() || *self.ready_at() <= Instant::now()
    }

    fn spend(&self, message: &Outgoing) {
        let Some(limit) = self.limit else { return };
        let bytes = match message {
            Outgoing::Text(text) => text.len(),
            Outgoing::Binary(bytes) => bytes.len(),
            Outgoing::Ping(_) => 0,
        };
        let cost = Duration::from_secs_f64((bytes + FRAME_OVERHEAD_BYTES) as f64 / limit as f64);
        let mut ready_at = self.ready_at();
        *ready_at = Instant::now().max(*ready_at) + cost;
    }

    fn ready_at(&self) -> MutexGuard<'_, Instant> {
        self.ready_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who takes nothing needs no ping.
async fn dead(heartbeat: &mut Heartbeat) {
    while heartbeat.next().await != Beat::Dead {}
}
