//! Posts over HTTP on loopback, such as syslog-ng's `http()` destination sends.
//!
//! A post is answered 200 only after all of its lines are synced in the spool, and 503 when they
//! are not; never with anything else, since syslog-ng drops a batch at some other codes and turns
//! in circles at the rest. For the same reason nothing depends on method or path: whoever reaches
//! this port may ask (an empty body: is there room?) or hand over lines. After a 503 or no answer
//! the client posts the whole body again; a line with a key is then the same document, one without
//! may be there twice.
//!
//! Bodies are spooled as they are read, so that none is too large. What is no readable request
//! gets hyper's own answer before it comes here: 400, 414 for the URL's length, 431 for the head's.

mod record;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, ORIGIN, RETRY_AFTER,
};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::record::{Flaw, Form, Posted, piece_key};
use super::framer::Framer;
use super::room::Room;
use super::socket::{BindError, SourceError, now_ms};
use crate::record::RECORD_BYTES_MAX;
use crate::spool::{Spool, Throttle};

/// Connections served at a time at most, each with at most one longest record and one read in memory;
/// further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;

/// Pause after a failed accept: out of descriptors stays so for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// How long a post waits for room in the spool, each time it needs some. Short: syslog-ng's thread
/// waits with it, and holds the batch itself after a 503.
const ROOM_WAIT: Duration = Duration::from_secs(2);

/// How long a post waits for its sync before the disk is taken for broken.
const SYNC_WAIT: Duration = Duration::from_secs(10);

/// How long a peer may take for a request's head, or sit idle between two; then, for the next
/// piece of a body.
const PEER_WAIT: Duration = Duration::from_secs(60);

/// How long the rest of a body that is not taken is read, so that the peer sees the answer.
const DISCARD_WAIT: Duration = Duration::from_secs(5);

/// How long a stop waits for answers that are on their way.
const STOP_WAIT: Duration = Duration::from_secs(5);

/// What a 503 suggests, in seconds.
const RETRY_SECONDS: &str = "2";

/// A bound address, before its first connection is accepted.
#[derive(Debug)]
pub struct HttpIntake {
    listener: StdListener,
    address: SocketAddr,
}

impl HttpIntake {
    /// Binds `address`. Whether it may be other than loopback was checked with the configuration.
    ///
    /// # Errors
    ///
    /// Where the address is in use or not this machine's.
    pub fn bind(address: SocketAddr) -> Result<HttpIntake, BindError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::AddressInUse { address },
            _ => BindError::Address { address, source },
        };
        let listener = StdListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, "listening for HTTP posts");
        Ok(HttpIntake { listener, address })
    }

    /// Spools what is posted until the stop, and syncs it. Posts that are being read at the stop
    /// are answered 503.
    ///
    /// # Errors
    ///
    /// Where the listener cannot be polled, or the spool closes before all is synced.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
    ) -> Result<(), SourceError> {
        let address = self.address;
        let listener = TcpListener::from_std(self.listener)
            .map_err(|source| SourceError::Read { from: address.to_string(), source })?;
        let server = Arc::new(Server {
            address,
            spool: spool.clone(),
            shutdown,
            refused: Throttle::default(),
            flawed: Throttle::default(),
        });
        let connections = TaskTracker::new();
        server.accept(&listener, &connections).await;
        drop(listener);
        connections.close();
        connections.wait().await;
        Ok(spool.flush().await?)
    }
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    spool: Arc<Spool>,
    shutdown: CancellationToken,
    refused: Throttle,
    flawed: Throttle,
}

/// Why a post is not taken, or not all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum Held {
    #[error(
        "the spool takes no more: it is full until receipts make room, or its disk refuses writes"
    )]
    Full,
    #[error("the spool's disk does not take the lines")]
    Disk,
    #[error("waybill is stopping")]
    Stopping,
    #[error("a web page has no business here")]
    WebPage,
    #[error("a body with Content-Encoding cannot be read: post it uncompressed")]
    Encoded,
    #[error("the body stopped before its end")]
    Silent,
}

impl Server {
    async fn accept(self: &Arc<Self>, listener: &TcpListener, connections: &TaskTracker) {
        let room = Room::new(&self.address.to_string(), CONNECTIONS_MAX);
        loop {
            // Neither loses anything when it is dropped (tokio documents both as cancel safe).
            let next = async {
                let permits = room.take().await;
                (permits, listener.accept().await)
            };
            let (permits, accepted) = tokio::select! {
                () = self.shutdown.cancelled() => return,
                next = next => next,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = self.clone();
                    connections.spawn(async move {
                        server.serve(stream).await;
                        drop(permits);
                    });
                }
                Err(error) => {
                    room.failed(&error);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(&self, stream: TcpStream) {
        // Failing here only costs time.
        let _ = stream.set_nodelay(true);
        let service =
            service_fn(|request| async move { Ok::<_, Infallible>(self.answer(request).await) });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PEER_WAIT)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match timeout(STOP_WAIT, connection).await {
                    Ok(ended) => ended,
                    // Without an answer the client posts again.
                    Err(_) => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(address = %self.address, %error, "a connection ended early");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, mut body) = request.into_parts();
        let taken = match unwelcome(&head.headers) {
            Some(held) => Err(held),
            None => self.take(Form::of(text(&head.headers, CONTENT_TYPE)), &mut body).await,
        };
        match taken {
            Ok(lines) => Response::new(Full::from(format!("{lines} lines are on disk\n"))),
            Err(held) => {
                if let Some(times) = self.refused.count() {
                    tracing::warn!(
                        address = %self.address, times,
                        "post answered 503, its client keeps it: {held}",
                    );
                }
                self.discard(body).await;
                let mut response = Response::new(Full::from(format!("{held}\n")));
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                let headers = response.headers_mut();
                headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_SECONDS));
                if held == Held::Silent {
                    headers.insert(CONNECTION, HeaderValue::from_static("close"));
                }
                response
            }
        }
    }

    /// Spools a body and syncs it; says how many lines it had.
    async fn take(&self, form: Form, body: &mut Incoming) -> Result<u64, Held> {
        // Looked at first, so that a full spool does not take the head of each attempt.
        self.unless_stopped(ROOM_WAIT, self.spool.room(), Held::Full).await?;
        let mut framer = Framer::lines();
        let mut lines = 0;
        while let Some(frame) = self.unless_stopped(PEER_WAIT, body.frame(), Held::Silent).await? {
            let Ok(frame) = frame else {
                // The peer is gone. Its last line may be half of one, and it will post it again.
                return Err(Held::Silent);
            };
            let Ok(mut bytes) = frame.into_data() else { continue };
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(RECORD_BYTES_MAX));
                framer.space().extend_from_slice(&piece);
                // Lines are never misframed.
                while let Ok(Some(line)) = framer.next() {
                    lines += self.append(Posted::read(&line, form)).await?;
                }
            }
        }
        let last = framer.finish();
        if !last.is_empty() {
            lines += self.append(Posted::read(&last, form)).await?;
        }
        match timeout(SYNC_WAIT, self.spool.flush()).await {
            Ok(Ok(())) => Ok(lines),
            Ok(Err(_)) | Err(_) => Err(Held::Disk),
        }
    }

    /// Appends a line, cut into records of the longest length; 1 where there was one.
    async fn append(&self, posted: Posted<'_>) -> Result<u64, Held> {
        if let Some(flaw) = posted.flaw {
            self.note(flaw);
        }
        if matches!(&*posted.payload, b"" | b"\r") {
            return Ok(0);
        }
        let time = posted.time.unwrap_or_else(now_ms);
        for (number, piece) in (0..).zip(posted.payload.chunks(RECORD_BYTES_MAX)) {
            let key = piece_key(&posted.key, number);
            if !self.spool.try_append(time, &key, piece) {
                let append = self.spool.append(time, &key, piece);
                self.unless_stopped(ROOM_WAIT, append, Held::Full).await?;
            }
        }
        Ok(1)
    }

    /// Waits for something; a stop or the end of `patience` ends that. What is dropped then has
    /// done nothing: a read's bytes are not answered for, and an append is whole or not at all.
    async fn unless_stopped<T>(
        &self,
        patience: Duration,
        waited_for: impl Future<Output = T>,
        held: Held,
    ) -> Result<T, Held> {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Err(Held::Stopping),
            done = timeout(patience, waited_for) => done.map_err(|_| held),
        }
    }

    async fn discard(&self, mut body: Incoming) {
        let rest = async { while let Some(Ok(_)) = body.frame().await {} };
        // Where it is longer, hyper closes the connection under it.
        let _ = timeout(DISCARD_WAIT, rest).await;
    }

    fn note(&self, flaw: Flaw) {
        if let Some(times) = self.flawed.count() {
            tracing::warn!(
                address = %self.address, times,
                "lines are stored without a key, and twice when they are posted twice: {}",
                flaw.as_str(),
            );
        }
    }
}

/// A request that cannot be taken whatever its body holds.
///
/// Any web page may make a browser post text to loopback; only browsers send `Origin`.
fn unwelcome(headers: &HeaderMap) -> Option<Held> {
    if headers.contains_key(ORIGIN) {
        return Some(Held::WebPage);
    }
    match headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"" | b"identity") => None,
        Some(_) => Some(Held::Encoded),
    }
}

fn text(headers: &HeaderMap, name: hyper::header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}
