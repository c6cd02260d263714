//! One WebSocket type for both directions and both dialling sides.
//!
//! A payload is never copied on its way in, and once on its way out (into the buffer in which a
//! client must mask it, RFC 6455 §5.3).

use std::fmt;
use std::ops::Deref;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::heartbeat::Heartbeat;
use super::stream::{Activity, Io};
use crate::protocol::{Challenge, MESSAGE_BYTES_MAX};

/// Bytes asked for per read: two TLS records; more would be zeroed in vain before each read.
const READ_BYTES: usize = 32 << 10;

/// Bytes collected before a write without a flush.
const WRITE_BYTES: usize = 64 << 10;

/// The longest reason of a close frame, in bytes (RFC 6455 §5.5 less the code).
const CLOSE_REASON_BYTES_MAX: usize = 123;

/// An open WebSocket.
pub struct Socket {
    stream: WebSocketStream<Io>,
    activity: Activity,
    challenge: Option<Challenge>,
    date: Option<String>,
}

impl Socket {
    /// `read` is what came behind the upgrade's header.
    pub(super) async fn client(io: Io, read: Bytes) -> Socket {
        Socket::open(io, read, Role::Client).await
    }

    pub(super) async fn server(io: Io, read: Bytes) -> Socket {
        Socket::open(io, read, Role::Server).await
    }

    async fn open(io: Io, read: Bytes, role: Role) -> Socket {
        let activity = io.activity();
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BYTES)
            .write_buffer_size(WRITE_BYTES)
            // One message over what is collected, and room for the pongs between (I7).
            .max_write_buffer_size(WRITE_BYTES + MESSAGE_BYTES_MAX + (16 << 10))
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let stream =
            WebSocketStream::from_partially_read(io, read.into(), role, Some(config)).await;
        Socket { stream, activity, challenge: None, date: None }
    }

    pub(super) fn challenged(self, challenge: Option<Challenge>) -> Socket {
        Socket { challenge, ..self }
    }

    pub(super) fn dated(self, date: Option<String>) -> Socket {
        Socket { date, ..self }
    }

    /// The `Date` of the answer to our upgrade, printable; `None` where the peer dialled.
    pub fn date(&self) -> Option<&str> {
        self.date.as_deref()
    }

    /// What the peer's half of the upgrade wants answered, whichever side dialled; `None` where it
    /// asked nothing that we understand.
    pub fn challenge(&self) -> Option<&Challenge> {
        self.challenge.as_ref()
    }

    /// The two halves, for loops that must not wait for each other: a side that stops reading
    /// while it waits to write can block its peer for ever.
    pub fn split(self) -> (SocketSender, SocketReceiver) {
        let (sink, stream) = self.stream.split();
        (SocketSender { sink }, SocketReceiver { stream, closing: false, failed: false })
    }

    /// The clock of this connection.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(self.activity.clone())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").finish_non_exhaustive()
    }
}

/// A message to send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outgoing {
    /// A control message.
    Text(String),
    /// A data frame, at most [`MESSAGE_BYTES_MAX`] bytes.
    Binary(Bytes),
    /// Asks the peer for a sign of life, with at most 125 bytes that its answer repeats; pings are
    /// answered below this layer.
    Ping(Bytes),
}

/// A message that came.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Incoming {
    /// A control message.
    Text(Text),
    /// A data frame.
    Binary(Bytes),
    /// A ping, already being answered.
    Ping,
    /// The answer to a ping, with what that carried: outside bytes.
    Pong(Bytes),
    /// The peer closes; the answer is under way, and nothing comes after it.
    Close {
        /// RFC 6455 §7.4.1; 1005 where the peer gave none.
        code: u16,
        /// The peer's words: outside bytes.
        reason: String,
    },
}

/// Text without a copy; dereferences to `str`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Text(Utf8Bytes);

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.as_str()
    }
}

/// Why a WebSocket ended without a close handshake.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[source] std::io::Error),
    /// It ended without a close frame.
    #[error("the peer went away without closing")]
    Gone,
    /// A message over [`MESSAGE_BYTES_MAX`]: close with 1009.
    #[error("the peer sent a message of {bytes} bytes, allowed are {MESSAGE_BYTES_MAX}")]
    TooBig {
        /// Declared or collected size.
        bytes: usize,
    },
    /// Text that is not UTF-8: close with 1007.
    #[error("the peer sent a text message that is not UTF-8")]
    NotUtf8,
    /// Anything else against RFC 6455: close with 1002.
    #[error("the peer broke the WebSocket protocol: {0}")]
    Protocol(String),
    /// This side had closed already.
    #[error("the connection is closed")]
    Closed,
}

impl SocketError {
    /// The close code that tells the peer (RFC 6455 §7.4.1); `None` where nobody listens any more.
    pub fn close_code(&self) -> Option<u16> {
        match self {
            SocketError::TooBig { .. } => Some(super::close::TOO_BIG),
            SocketError::NotUtf8 => Some(super::close::BAD_DATA),
            SocketError::Protocol(_) => Some(super::close::PROTOCOL),
            SocketError::Broken(_) | SocketError::Gone | SocketError::Closed => None,
        }
    }
}

impl From<WsError> for SocketError {
    fn from(error: WsError) -> SocketError {
        match error {
            WsError::Io(error) => SocketError::Broken(error),
            WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => SocketError::Gone,
            WsError::Capacity(CapacityError::MessageTooLong { size, .. }) => {
                SocketError::TooBig { bytes: size }
            }
            WsError::Utf8(_) => SocketError::NotUtf8,
            WsError::ConnectionClosed
            | WsError::AlreadyClosed
            | WsError::Protocol(ProtocolError::SendAfterClosing) => SocketError::Closed,
            error => SocketError::Protocol(error.to_string()),
        }
    }
}

/// The writing half.
#[derive(Debug)]
pub struct SocketSender {
    sink: SplitSink<WebSocketStream<Io>, Message>,
}

impl SocketSender {
    /// Hands over one message without a flush; waits while the connection takes no more. Dropping
    /// the future may lose the message, never a part of it.
    pub async fn feed(&mut self, message: Outgoing) -> Result<(), SocketError> {
        let message = match message {
            Outgoing::Text(text) => Message::Text(text.into()),
            Outgoing::Binary(bytes) => Message::Binary(bytes),
            Outgoing::Ping(bytes) => Message::Ping(bytes),
        };
        Ok(self.sink.feed(message).await?)
    }

    /// Waits until all that was fed is with the operating system. Dropping the future loses
    /// nothing.
    pub async fn flush(&mut self) -> Result<(), SocketError> {
        Ok(self.sink.flush().await?)
    }

    /// Sends a close frame. The connection is to be dropped once the reading half has ended, or
    /// after a while where the peer does not answer. `reason` is cut to what a close frame holds.
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<(), SocketError> {
        let reason = &reason[..reason.floor_char_boundary(CLOSE_REASON_BYTES_MAX)];
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        match self.sink.send(Message::Close(Some(frame))).await {
            Ok(()) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The reading half.
#[derive(Debug)]
pub struct SocketReceiver {
    stream: SplitStream<WebSocketStream<Io>>,
    /// The peer's close frame came: how the connection ends after it says nothing more.
    closing: bool,
    /// An error came: what follows it cannot be read any more.
    failed: bool,
}

/// Ends a connection behind its close frame. Where reading failed, bytes are still coming in: they
/// are read and dropped until the peer ends too, because a socket that is closed with unread bytes
/// is reset, and a reset takes with it what the peer has not read yet.
pub async fn hang_up(sender: SocketSender, receiver: SocketReceiver) {
    if !receiver.failed {
        return;
    }
    let Ok(mut stream) = receiver.stream.reunite(sender.sink) else { return };
    let io = stream.get_mut();
    let mut dropped = vec![0; READ_BYTES];
    if io.shutdown().await.is_ok() {
        while io.read(&mut dropped).await.is_ok_and(|bytes| bytes > 0) {}
    }
}

impl SocketReceiver {
    /// The next message; `None` after a close handshake. An error is the last thing that comes.
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Incoming, SocketError>> {
        loop {
            let message = match self.stream.next().await? {
                Ok(message) => message,
                Err(_) if self.closing => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error.into()));
                }
            };
            self.closing |= message.is_close();
            return Some(Ok(match message {
                Message::Text(text) => Incoming::Text(Text(text)),
                Message::Binary(bytes) => Incoming::Binary(bytes),
                Message::Ping(_) => Incoming::Ping,
                Message::Pong(bytes) => Incoming::Pong(bytes),
                Message::Close(Some(frame)) => {
                    let reason = frame.reason.as_str().to_owned();
                    Incoming::Close { code: frame.code.into(), reason }
                }
                Message::Close(None) => {
                    Incoming::Close { code: super::close::NO_CODE, reason: String::new() }
                }
                // Only ever written, never read.
                Message::Frame(_) => continue,
            }));
        }
    }
}
