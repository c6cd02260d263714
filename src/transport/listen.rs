//! Listening: bind, accept, TLS, HTTP upgrade. What happens before a peer is known is bounded in
//! time, in bytes and in number (I7).

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming as Body;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::SocketType;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Timeout;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::request::{Answer, Handler, Peer, Refuse, Request};
use super::socket::Socket;
use super::stream::{Io, Stream};
use crate::config::Listen;
use crate::descriptors;
use crate::inherited::{self, Passed};
use crate::protocol::{CHALLENGE_HEADER, Challenge, TYPES_HEADER};
use crate::tls::{self, ServerCertificate};

/// How long a peer has from its first byte to its upgrade.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How many peers may be within their handshake at most; further ones wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 128;

/// The largest header of a request, in bytes.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// Bytes that are read in vain of a peer whose TLS handshake failed.
const REFUSED_BYTES: u64 = 64 << 10;

/// Pause after an accept that failed, which is as a rule for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who may connect to a Unix socket: its owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Why a listener cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// Somebody listens there.
    #[error("{address} is in use by another process: stop it, or choose another address")]
    InUse {
        /// As configured.
        address: String,
    },
    /// A port below 1024, or a folder, that this user may not use.
    #[error(
        "{address} may not be bound by this user: choose a port above 1023 or a folder of its own, or grant CAP_NET_BIND_SERVICE"
    )]
    Denied {
        /// As configured.
        address: String,
    },
    /// The path holds something that is not a socket.
    #[error("{0} exists and is no socket: move it away, or choose another path")]
    NotASocket(PathBuf),
    /// A service manager bound it, and not as we need it.
    #[error(
        "{address}: the service manager passed a socket of another type: its unit needs ListenStream="
    )]
    PassedType {
        /// As configured.
        address: String,
    },
    /// Anything else.
    #[error(
        "{address} cannot be bound: {source}; is the address this machine's, and its folder there?"
    )]
    Other {
        /// As configured.
        address: String,
        /// From the operating system.
        source: io::Error,
    },
}

impl BindError {
    fn new(address: String, source: io::Error) -> BindError {
        match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { address },
            io::ErrorKind::PermissionDenied => BindError::Denied { address },
            _ => BindError::Other { address, source },
        }
    }
}

/// A bound address; clones share it, and it is free again when the last one is gone.
#[derive(Clone, Debug)]
pub struct Listener {
    socket: Arc<Bound>,
    tls: Option<Arc<ServerCertificate>>,
    /// [`HANDSHAKE_TIMEOUT`], but in tests.
    pub(super) handshake_timeout: Duration,
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// Held for its `Drop`, too.
        file: SocketFile,
    },
}

/// The file of a Unix socket; removed with the listener if it is still its own.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// `None` where a service manager bound it and keeps it.
    inode: Option<u64>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|file| Some(file.ino()) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Binds, or takes the Unix socket that a service manager passed. One left behind by a process
    /// that is gone is replaced.
    pub fn bind(
        listen: &Listen,
        tls: Option<Arc<ServerCertificate>>,
    ) -> Result<Listener, BindError> {
        let socket = match listen {
            Listen::Tcp(address) => {
                bind_tcp(*address).map_err(|error| BindError::new(address.to_string(), error))?
            }
            Listen::Unix(path) => bind_unix(path)?,
        };
        Ok(Listener { socket: Arc::new(socket), tls, handshake_timeout: HANDSHAKE_TIMEOUT })
    }

    /// The same address with another certificate, or with none.
    pub fn with_tls(&self, tls: Option<Arc<ServerCertificate>>) -> Listener {
        Listener { tls, ..self.clone() }
    }

    /// The certificate that it shows.
    pub fn certificate(&self) -> Option<&Arc<ServerCertificate>> {
        self.tls.as_ref()
    }

    /// The address as bound, with the real port where 0 was asked for; `None` for a Unix socket.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &*self.socket {
            Bound::Tcp(listener) => listener.local_addr().ok(),
            Bound::Unix { .. } => None,
        }
    }

    /// The address for people: `HOST:PORT` or `unix:PATH`.
    pub fn address(&self) -> String {
        match &*self.socket {
            Bound::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.to_string(),
                Err(error) => format!("an address that cannot be told ({error})"),
            },
            Bound::Unix { file, .. } => format!("unix:{}", file.path.display()),
        }
    }

    /// Accepts until `stop`; every accepted peer is served in a task of `tracker`. Sockets that
    /// are being served are not touched by `stop`.
    pub async fn run<H: Handler>(
        self,
        handler: Arc<H>,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) {
        tokio::select! {
            () = self.accept_until(handler, tracker, stop) => {}
            () = tls::watch(self.tls.as_deref()) => {}
        }
    }

    async fn accept_until<H: Handler>(
        &self,
        handler: Arc<H>,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) {
        let room = Room::new();
        let mut failing = false;
        loop {
            let permits = tokio::select! {
                () = stop.cancelled() => return,
                permits = room.take() => permits,
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    failing = false;
                    let tls = self.tls.as_ref().map(|certificate| certificate.config());
                    let handshake = handshake(stream, peer, tls, Arc::clone(&handler));
                    let within = tokio::time::timeout(self.handshake_timeout, handshake);
                    tracker.spawn(welcome(within, peer, Arc::clone(&handler), permits));
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        let advice = descriptors::advice(&error).unwrap_or("it is tried again");
                        warn!(%error, "cannot accept a connection: {advice}");
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<(Accepted, Peer)> {
        match &*self.socket {
            Bound::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Failing here only costs time.
                let _ = stream.set_nodelay(true);
                Ok((Accepted::Tcp(stream), Peer::Tcp(address)))
            }
            Bound::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Ok((Accepted::Unix(stream), Peer::Unix))
            }
        }
    }
}

/// How many peers may be here at a time, known or not; further ones wait in the kernel's queue.
struct Room {
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    /// That peers wait has been said.
    said: AtomicBool,
}

/// Of one peer.
struct Permits {
    connection: OwnedSemaphorePermit,
    /// Until its handshake is over.
    handshake: OwnedSemaphorePermit,
}

impl Room {
    fn new() -> Room {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Room {
            connections: semaphore(descriptors::connections_max()),
            handshakes: semaphore(descriptors::handshakes_max(HANDSHAKES_MAX)),
            said: AtomicBool::new(false),
        }
    }

    /// Waits until there is room for one more peer. Dropping the future loses nothing.
    async fn take(&self) -> Permits {
        let connections = descriptors::connections_max();
        let free = self.connections.available_permits();
        if free == 0 && !self.said.swap(true, Ordering::Relaxed) {
            warn!(connections, "further peers wait until others are gone: {}", descriptors::ADVICE);
        } else if free > connections / 8 {
            self.said.store(false, Ordering::Relaxed);
        }
        let permit = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).acquire_owned();
        Permits {
            connection: permit(&self.connections).await.expect("the semaphore is never closed"),
            handshake: permit(&self.handshakes).await.expect("the semaphore is never closed"),
        }
    }
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// `SO_REUSEADDR`, so that a restart need not wait for old connections' TIME_WAIT.
fn bind_tcp(address: SocketAddr) -> io::Result<Bound> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into()).map(Bound::Tcp)
}

fn bind_unix(path: &Path) -> Result<Bound, BindError> {
    let address = || format!("unix:{}", path.display());
    let fault = |source| BindError::new(address(), source);
    match inherited::take(path, SocketType::STREAM).map_err(fault)? {
        Passed::Socket(passed) => {
            let listener = std::os::unix::net::UnixListener::from(passed);
            listener.set_nonblocking(true).map_err(fault)?;
            let listener = UnixListener::from_std(listener).map_err(fault)?;
            let file = SocketFile { path: path.to_owned(), inode: None };
            return Ok(Bound::Unix { listener, file });
        }
        Passed::OtherType => return Err(BindError::PassedType { address: address() }),
        Passed::No => {}
    }
    remove_stale(path).map_err(fault).and_then(|is_socket| {
        is_socket.then_some(()).ok_or_else(|| BindError::NotASocket(path.to_owned()))
    })?;
    let listener = UnixListener::bind(path).map_err(fault)?;
    let inode = Some(std::fs::symlink_metadata(path).map_err(fault)?.ino());
    let file = SocketFile { path: path.to_owned(), inode };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(fault)?;
    Ok(Bound::Unix { listener, file })
}

/// Removes a socket file behind which nobody answers; false where the path is something else.
fn remove_stale(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
        Ok(file) if !file.file_type().is_socket() => return Ok(false),
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

/// One peer: its handshake within the limit, then its session.
async fn welcome<H: Handler>(
    handshake: Timeout<impl Future<Output = Result<Option<(H::Session, Socket)>, String>>>,
    peer: Peer,
    handler: Arc<H>,
    permits: Permits,
) {
    let Permits { connection: _connection, handshake: permit } = permits;
    let outcome = handshake.await;
    drop(permit);
    match outcome {
        Ok(Ok(Some((session, socket)))) => handler.serve(session, socket).await,
        Ok(Ok(None)) => {}
        // Port scanners do this all day: no reason to warn.
        Ok(Err(reason)) => debug!(%peer, reason, "handshake failed"),
        Err(_) => debug!(%peer, "handshake timed out"),
    }
}

/// From the first byte to the upgrade or the refusal.
async fn handshake<H: Handler>(
    stream: Accepted,
    peer: Peer,
    tls: Option<Arc<ServerConfig>>,
    handler: Arc<H>,
) -> Result<Option<(H::Session, Socket)>, String> {
    let (io, certificate) = match stream {
        Accepted::Tcp(stream) => secure(stream, tls).await?,
        Accepted::Unix(stream) => secure(stream, tls).await?,
    };
    exchange(io, peer, certificate, &*handler).await
}

/// The stream, and the client certificate that was verified on the way.
async fn secure(
    stream: impl Stream + 'static,
    tls: Option<Arc<ServerConfig>>,
) -> Result<(Io, Option<CertificateDer<'static>>), String> {
    let Some(config) = tls else { return Ok((Io::new(stream), None)) };
    let stream = match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => stream,
        Err((error, mut stream)) => {
            // A close with bytes unread resets the connection, and the alert that says why may not
            // be read then.
            let _ = stream.shutdown().await;
            let _ = tokio::io::copy(&mut stream.take(REFUSED_BYTES), &mut tokio::io::sink()).await;
            return Err(format!("TLS: {error}"));
        }
    };
    let chain = stream.get_ref().1.peer_certificates();
    let certificate = chain.and_then(|chain| chain.first()).map(|own| own.clone().into_owned());
    Ok((Io::new(stream), certificate))
}

/// A request that was let in, until its connection is free for the WebSocket.
struct Upgrade<S> {
    session: S,
    on_upgrade: OnUpgrade,
    /// The peer's own.
    challenge: Option<Challenge>,
}

/// Reads one request and answers it; gives the socket where it was upgraded.
async fn exchange<H: Handler>(
    io: Io,
    peer: Peer,
    certificate: Option<CertificateDer<'static>>,
    handler: &H,
) -> Result<Option<(H::Session, Socket)>, String> {
    let upgrade: Mutex<Option<Upgrade<H::Session>>> = Mutex::new(None);
    let service = hyper::service::service_fn(|request: hyper::Request<Body>| {
        let (head, on_upgrade) = split(request);
        let request = Request { head, peer, certificate: certificate.clone() };
        let response = respond(&request, on_upgrade, handler, &upgrade);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    connection.await.map_err(|error| format!("HTTP: {error}"))?;
    let accepted = upgrade.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Some(Upgrade { session, on_upgrade, challenge }) = accepted else { return Ok(None) };
    let upgraded: Upgraded = on_upgrade.await.map_err(|error| format!("upgrade: {error}"))?;
    let parts = upgraded.downcast::<TokioIo<Io>>().map_err(|_| "upgrade: another stream")?;
    let socket = Socket::server(parts.io.into_inner(), parts.read_buf).await;
    Ok(Some((session, socket.challenged(challenge))))
}

fn split(mut request: hyper::Request<Body>) -> (hyper::http::request::Parts, OnUpgrade) {
    let on_upgrade = hyper::upgrade::on(&mut request);
    (request.into_parts().0, on_upgrade)
}

fn respond<H: Handler>(
    request: &Request,
    on_upgrade: OnUpgrade,
    handler: &H,
    upgrade: &Mutex<Option<Upgrade<H::Session>>>,
) -> Response<Full<Bytes>> {
    let (subprotocol, challenge, types, session) = match handler.answer(request) {
        Answer::Refuse(refuse) => return refused(&refuse),
        Answer::Accept { .. } if !request.is_upgrade() => {
            return refused(&Refuse::new(426, "this address speaks WebSocket only\n"));
        }
        Answer::Accept { subprotocol, challenge, types, session } => {
            (subprotocol, challenge, types, session)
        }
    };
    if request.header("sec-websocket-version") != Some("13") {
        return refused(&Refuse::new(426, "WebSocket version 13 is spoken here (RFC 6455)\n"));
    }
    let Some(key) = request.header(SEC_WEBSOCKET_KEY.as_str()) else {
        return refused(&Refuse::new(400, "the WebSocket key is missing (RFC 6455 section 4.1)\n"));
    };
    let accept = derive_accept_key(key.as_bytes());
    let accepted = Upgrade {
        session,
        on_upgrade,
        challenge: request.header(CHALLENGE_HEADER).and_then(Challenge::parse),
    };
    *upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepted);
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(subprotocol));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(Ok(challenge)) = challenge.map(|own| HeaderValue::from_str(&own.text())) {
        headers.insert(CHALLENGE_HEADER, challenge);
    }
    if let Some(Ok(types)) = types.map(|own| HeaderValue::from_str(&own)) {
        headers.insert(TYPES_HEADER, types);
    }
    response
}

fn refused(refuse: &Refuse) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(refuse.body.clone()));
    *response.status_mut() =
        StatusCode::from_u16(refuse.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if refuse.status == 426 {
        // RFC 9110 §15.5.22 and RFC 6455 §4.4.
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade, close"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    if refuse.status == 401 {
        headers.insert("www-authenticate", HeaderValue::from_static("Bearer"));
    }
    if let Some(after) = refuse.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs()));
    }
    response
}
