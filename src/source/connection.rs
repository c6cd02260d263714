//! One peer's connection, read to its end; Unix, TCP or TLS make no difference to the reader.
//!
//! Called by the stream listeners. A peer counts a line as delivered when its `write` returns, so
//! that a stop first asks it to end and then reads what it wrote; only a peer that goes on writing
//! all the same is cut off, and that is said.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::Shutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;

use super::framer::Framer;
use super::socket::Intake;
use crate::tls::{Acceptor, ServerStream};

/// How long a peer has for its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a stop waits for a peer to end: one that follows the protocol does at once.
const FAREWELL: Duration = Duration::from_secs(1);

/// Most that is read of one peer after the stop, in bytes: more than a receive buffer holds, so
/// that only what was written later is cut off.
const FAREWELL_BYTES_MAX: usize = 64 << 20;

/// A peer that vanished without a word is noticed after two minutes, and no longer counts among
/// the connections.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// A connection that was accepted.
pub(super) enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream, SocketAddr),
}

/// What a peer's log lines name.
struct Names<'a> {
    socket: &'a str,
    peer: String,
}

/// Bytes of a peer, and how to ask it for no more.
trait Connection: AsyncRead + Send + Unpin {
    /// Tells the peer to end. What it wrote before is still there to be read.
    fn refuse(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Connection for UnixStream {
    /// Its next write fails; reading meets the end behind what it wrote.
    async fn refuse(&mut self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self, Shutdown::Read)?)
    }
}

impl Connection for TcpStream {
    /// FIN. There is no way to refuse what is on its way already, so that the peer must end it:
    /// syslog daemons watch for the end, and send the rest of their queue to the next connection.
    async fn refuse(&mut self) -> io::Result<()> {
        self.shutdown().await
    }
}

impl Connection for ServerStream<TcpStream> {
    /// `close_notify` (RFC 5425 §4.4), then FIN.
    async fn refuse(&mut self) -> io::Result<()> {
        self.shutdown().await
    }
}

impl Accepted {
    /// Reads the connection to its end, or after the stop to what was written before it; with TLS
    /// once the handshake is done.
    pub async fn serve(self, socket: &str, tls: Option<&Acceptor>, intake: &Intake) {
        let (stream, address) = match self {
            Accepted::Unix(stream) => {
                return read(stream, &Names { socket, peer: "local".to_owned() }, intake).await;
            }
            Accepted::Tcp(stream, address) => (stream, address),
        };
        let names = Names { socket, peer: address.to_string() };
        if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE) {
            tracing::debug!(socket, peer = names.peer, %error, "the peer was gone already");
        }
        let Some(acceptor) = tls else {
            return read(stream, &names, intake).await;
        };
        // Nothing was taken of a peer that is dropped in its handshake, and it sees that.
        let handshake = tokio::select! {
            () = intake.shutdown.cancelled() => return,
            handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => {
                handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            }
        };
        match handshake {
            Ok(stream) => read(stream, &names, intake).await,
            // Balancers and scanners look whether somebody listens, all day.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                tracing::debug!(socket, peer = names.peer, "the peer left before its handshake");
            }
            Err(error) => tracing::warn!(
                socket, peer = names.peer, %error,
                "no TLS connection: let the peer speak TLS and trust this certificate",
            ),
        }
    }
}

async fn read(mut connection: impl Connection, names: &Names<'_>, intake: &Intake) {
    let Names { socket, peer } = names;
    let mut framer = Framer::detecting();
    // Once stopping: until when the peer may end, and how much is read of it.
    let mut farewell: Option<(Instant, usize)> = None;
    'connection: loop {
        if farewell.is_none() {
            intake.room().await;
        }
        let until = farewell.map(|(until, _)| until);
        // A read that is dropped here has taken nothing (tokio documents it as cancel safe). What
        // is there is taken first, however late it is.
        let read = tokio::select! {
            biased;
            () = intake.shutdown.cancelled(), if farewell.is_none() => {
                farewell = Some((Instant::now() + FAREWELL, FAREWELL_BYTES_MAX));
                refuse(&mut connection, names).await;
                continue;
            }
            read = connection.read_buf(framer.space()) => read,
            () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                tracing::info!(socket, peer, "the peer did not end its connection: it is closed");
                break;
            }
        };
        match read {
            Ok(0) => break,
            Ok(count) => {
                if let Some((_, rest)) = &mut farewell {
                    *rest = rest.saturating_sub(count);
                }
            }
            // TLS without its last word is as common as harmless: an unfinished record is kept.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => {
                tracing::warn!(socket, peer, %error, "a connection broke");
                break;
            }
        }
        loop {
            match framer.next() {
                Ok(Some(record)) => intake.append(&record).await,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(
                        socket, peer, %error,
                        "connection closed: mend the peer's framing, or let it end lines by newline",
                    );
                    break 'connection;
                }
            }
        }
        if farewell.is_some_and(|(_, rest)| rest == 0) {
            tracing::warn!(
                socket,
                peer,
                "the peer goes on writing after the end of its connection: what it writes now is lost",
            );
            break;
        }
    }
    intake.append(&framer.finish()).await;
    if farewell.is_none() {
        refuse(&mut connection, names).await;
    }
}

async fn refuse(connection: &mut impl Connection, Names { socket, peer }: &Names<'_>) {
    // TLS has a last word to write, for which a peer may leave no room.
    let refused = tokio::time::timeout(FAREWELL, connection.refuse()).await;
    if let Ok(Err(error)) = refused {
        tracing::debug!(socket, peer, %error, "the peer was gone already");
    }
}
