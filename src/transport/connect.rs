//! Dialling: resolve, connect, TLS, HTTP upgrade.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming as Body;
use hyper::header::{
    AUTHORIZATION, CONNECTION, DATE, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION,
    RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, SERVER, UPGRADE, USER_AGENT,
};
use hyper::http::request;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::fault::{ConnectError, TlsFault, printable, tls_fault};
use super::proxy::tunnel;
use super::socket::Socket;
use super::stream::Io;
use crate::config::{Endpoint, EndpointAddress};
use crate::protocol::{CHALLENGE_HEADER, Challenge, TOKEN_LETS_IN, TYPES_HEADER};

/// Addresses of one name that are tried, the first of those that it has: each holds a socket until
/// one of them connects (I7). The last one's turn comes within four seconds.
const ADDRESSES_MAX: usize = 16;

/// How long an address has before the next one is tried beside it (RFC 8305 §5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

/// How long either side that dials waits, from the name to the answer of the upgrade.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of a refusal's body that are shown.
const EXCERPT_BYTES: usize = 200;

/// How long that body may take: the status alone says enough.
const EXCERPT_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest header of an answer, in bytes.
pub(super) const HEADER_BYTES_MAX: usize = 16 << 10;

/// Who we say we are.
pub(super) const AGENT: &str = concat!("waybill/", env!("CARGO_PKG_VERSION"));

/// What a dial met on its way; filled as far as it came.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Steps {
    /// The name that was resolved; empty for a Unix socket.
    pub host: String,
    /// What it resolves to, as far as it is tried.
    pub addresses: Vec<SocketAddr>,
    /// There is a connection to the endpoint.
    pub connected: bool,
    /// The server's own certificate (DER), which was accepted.
    pub certificate: Option<Vec<u8>>,
    /// Status of the answer to the upgrade.
    pub status: Option<u16>,
    /// The answer's `Date`, as sent.
    pub date: Option<String>,
    /// The types of the token, as [`TYPES_HEADER`] lists them.
    pub types: Option<String>,
    /// The answer's `Server`, printable: proxies name themselves there.
    pub server: Option<String>,
}

/// What the request says of the side that dials.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// The token that it presents.
    pub token: &'a str,
    /// The subprotocol that it wants.
    pub subprotocol: &'static str,
    /// What the side that is dialled is to answer.
    pub challenge: Option<&'a Challenge>,
}

impl<'a> Offer<'a> {
    /// Without a challenge.
    pub fn new(token: &'a str, subprotocol: &'static str) -> Offer<'a> {
        Offer { token, subprotocol, challenge: None }
    }
}

/// Opens a WebSocket: resolves the name anew, takes the first of its addresses that connects, then
/// upgrades with the token.
///
/// `tls` is needed where the endpoint says TLS. Nothing is retried: the caller decides by the
/// error. Dropping the future drops the attempt.
pub async fn connect(
    endpoint: &Endpoint,
    tls: Option<Arc<ClientConfig>>,
    offer: &Offer<'_>,
    timeout: Duration,
) -> Result<Socket, ConnectError> {
    connect_noting(endpoint, tls, offer, timeout, &mut Steps::default()).await
}

/// [`connect`], for somebody who wants to know how far it came.
pub async fn connect_noting(
    endpoint: &Endpoint,
    tls: Option<Arc<ClientConfig>>,
    offer: &Offer<'_>,
    timeout: Duration,
    steps: &mut Steps,
) -> Result<Socket, ConnectError> {
    let attempt = async {
        let io = open(endpoint, tls, steps).await?;
        upgrade(endpoint, io, offer, steps).await
    };
    tokio::time::timeout(timeout, attempt).await.map_err(|_| timed_out(endpoint, timeout))?
}

/// Asks a sender that listens whether the token lets in. That is no upgrade, so that whoever is
/// connected stays. Notes how far it came.
pub async fn ask(
    endpoint: &Endpoint,
    tls: Option<Arc<ClientConfig>>,
    token: &str,
    timeout: Duration,
    steps: &mut Steps,
) -> Result<(), ConnectError> {
    let attempt = async {
        let io = open(endpoint, tls, steps).await?;
        let request = request(endpoint, token)?.header(CONNECTION, "close");
        exchange(endpoint, io, request, steps, lets_in).await
    };
    tokio::time::timeout(timeout, attempt).await.map_err(|_| timed_out(endpoint, timeout))?
}

fn timed_out(endpoint: &Endpoint, after: Duration) -> ConnectError {
    ConnectError::Timeout { url: endpoint.url.clone(), after }
}

async fn open(
    endpoint: &Endpoint,
    tls: Option<Arc<ClientConfig>>,
    steps: &mut Steps,
) -> Result<Io, ConnectError> {
    let stream = match &endpoint.address {
        EndpointAddress::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(|source| {
                ConnectError::Unreachable { address: format!("unix:{}", path.display()), source }
            })?;
            steps.connected = true;
            return Ok(Io::new(stream));
        }
        EndpointAddress::Tcp { host, port } => match &endpoint.proxy {
            None => tcp(host, *port, steps).await?,
            Some(proxy) => {
                let stream = tcp(&proxy.host, proxy.port, steps).await?;
                tunnel(stream, proxy, host, *port).await?
            }
        },
    };
    steps.connected = true;
    if !endpoint.tls {
        return Ok(Io::new(stream));
    }
    let invalid = |reason| ConnectError::Endpoint { url: endpoint.url.clone(), reason };
    let config = tls.ok_or_else(|| invalid("there is no TLS configuration"))?;
    let host = server_name(&endpoint.host).to_owned();
    let name = ServerName::try_from(host.clone())
        .map_err(|_| invalid("its host is neither a DNS name nor an IP address"))?;
    let stream = TlsConnector::from(config)
        .connect(name, stream)
        .await
        .map_err(|error| ConnectError::Tls { host, fault: tls_fault(&error) })?;
    let chain = stream.get_ref().1.peer_certificates();
    steps.certificate = chain.and_then(<[_]>::first).map(|own| own.to_vec());
    Ok(Io::new(stream))
}

impl Steps {
    fn note_answer(&mut self, response: &Response<Body>) {
        let header = |name| text(response.headers(), &name).map(|text| printable(text.as_bytes()));
        self.status = Some(response.status().as_u16());
        self.types = header(HeaderName::from_static(TYPES_HEADER));
        self.date = header(DATE);
        self.server = header(SERVER);
    }
}

/// The `Host` header's name without its port and brackets.
fn server_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains(':') => name,
        _ => host,
    }
}

/// Connects to the first address that answers, and tries them beside each other: one that drops what
/// it is sent does not hold up the others.
async fn tcp(host: &str, port: u16, steps: &mut Steps) -> Result<TcpStream, ConnectError> {
    let resolve = |source| ConnectError::Resolve { host: host.to_owned(), source };
    host.clone_into(&mut steps.host);
    let found = lookup_host((host, port)).await.map_err(resolve)?;
    steps.addresses = found.take(ADDRESSES_MAX).collect();
    let mut last = resolve(io::Error::other("the name has no address"));
    let mut untried = steps.addresses.iter();
    let mut attempts = FuturesUnordered::new();
    let attempt =
        |&address: &SocketAddr| async move { (address, TcpStream::connect(address).await) };
    loop {
        attempts.extend(untried.next().map(attempt));
        let ended = tokio::select! {
            ended = attempts.next() => ended,
            () = sleep(NEXT_ADDRESS_AFTER), if untried.len() > 0 => continue,
        };
        match ended {
            Some((_, Ok(stream))) => {
                // Receipts and small frames must not wait for a full segment. Failing here only
                // costs time.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Some((address, Err(source))) => {
                last = ConnectError::Unreachable { address: address.to_string(), source };
            }
            None => return Err(last),
        }
    }
}

/// In TLS 1.3 a server's word on our certificate comes after the handshake, as an alert where the
/// answer to the request is expected.
fn broken(endpoint: &Endpoint, error: hyper::Error) -> ConnectError {
    let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref());
    match cause.map(tls_fault) {
        Some(fault @ TlsFault::Refused(_)) => {
            ConnectError::Tls { host: server_name(&endpoint.host).to_owned(), fault }
        }
        _ if !endpoint.tls && error.is_parse() => ConnectError::NotHttp,
        _ => ConnectError::Broken(error),
    }
}

async fn upgrade(
    endpoint: &Endpoint,
    io: Io,
    offer: &Offer<'_>,
    steps: &mut Steps,
) -> Result<Socket, ConnectError> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce)
        .map_err(|_| endpoint_error(endpoint, "the system has no random bytes"))?;
    let key = STANDARD.encode(nonce);
    let mut request = request(endpoint, offer.token)?
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, &key)
        .header(SEC_WEBSOCKET_PROTOCOL, offer.subprotocol);
    if let Some(challenge) = offer.challenge {
        request = request.header(CHALLENGE_HEADER, challenge.text());
    }
    let accepted = |response| accept(response, offer.subprotocol, &key);
    let (upgraded, challenge) = exchange(endpoint, io, request, steps, accepted).await?;
    let parts = upgraded
        .downcast::<TokioIo<Io>>()
        .map_err(|_| endpoint_error(endpoint, "the upgrade gave another stream back"))?;
    let socket = Socket::client(parts.io.into_inner(), parts.read_buf).await;
    Ok(socket.challenged(challenge).dated(steps.date.clone()))
}

/// Sends a request, and takes of the answer what `read` makes of it.
async fn exchange<T, F: Future<Output = Result<T, ConnectError>>>(
    endpoint: &Endpoint,
    io: Io,
    request: request::Builder,
    steps: &mut Steps,
    read: impl FnOnce(Response<Body>) -> F,
) -> Result<T, ConnectError> {
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|_| endpoint_error(endpoint, "its host or path is no HTTP request"))?;
    let (mut client, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(HEADER_BYTES_MAX)
        .handshake(TokioIo::new(io))
        .await
        .map_err(ConnectError::Broken)?;
    let connection = connection.with_upgrades();
    let exchange = async {
        let response =
            client.send_request(request).await.map_err(|error| broken(endpoint, error))?;
        steps.note_answer(&response);
        read(response).await
    };
    let mut exchange = std::pin::pin!(exchange);
    // Both run here, so that a dropped attempt leaves no task behind.
    tokio::select! {
        biased;
        read = &mut exchange => read,
        _ = connection => exchange.await,
    }
}

fn endpoint_error(endpoint: &Endpoint, reason: &'static str) -> ConnectError {
    ConnectError::Endpoint { url: endpoint.url.clone(), reason }
}

/// A request with the token.
fn request(endpoint: &Endpoint, token: &str) -> Result<request::Builder, ConnectError> {
    let mut authorization =
        HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ConnectError::Token)?;
    authorization.set_sensitive(true);
    Ok(Request::get(&endpoint.path)
        .header(HOST, &endpoint.host)
        .header(AUTHORIZATION, authorization)
        .header(USER_AGENT, AGENT))
}

/// Checks the answer to the upgrade (RFC 6455 §4.1).
async fn accept(
    response: Response<Body>,
    subprotocol: &'static str,
    key: &str,
) -> Result<(hyper::upgrade::Upgraded, Option<Challenge>), ConnectError> {
    let status = response.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refusal(response).await);
    }
    let headers = response.headers();
    let expected = derive_accept_key(key.as_bytes());
    if text(headers, &SEC_WEBSOCKET_ACCEPT).as_deref() != Some(expected.as_str()) {
        let reason = "the server switched protocols without accepting our WebSocket key";
        return Err(ConnectError::NotWaybill { status: 101, reason, body: String::new() });
    }
    let chosen = text(headers, &SEC_WEBSOCKET_PROTOCOL);
    if chosen.as_deref() != Some(subprotocol) {
        return Err(ConnectError::Subprotocol { wanted: subprotocol.to_owned(), chosen });
    }
    let challenge = headers.get(CHALLENGE_HEADER).and_then(|value| value.to_str().ok());
    let challenge = challenge.and_then(Challenge::parse);
    let upgraded = hyper::upgrade::on(response).await.map_err(ConnectError::Broken)?;
    Ok((upgraded, challenge))
}

/// Checks the answer about a token; a page that somebody else shows is none.
async fn lets_in(response: Response<Body>) -> Result<(), ConnectError> {
    if response.status() != StatusCode::OK {
        return Err(refusal(response).await);
    }
    match excerpt(response.into_body()).await {
        body if body == TOKEN_LETS_IN => Ok(()),
        body => {
            let reason = "the server answered something else than a sender that listens";
            Err(ConnectError::NotWaybill { status: 200, reason, body })
        }
    }
}

async fn refusal(response: Response<Body>) -> ConnectError {
    let status = response.status();
    let retry_after = text(response.headers(), &RETRY_AFTER)
        .and_then(|seconds| seconds.parse().ok())
        .map(Duration::from_secs);
    let location = text(response.headers(), &LOCATION);
    let body = excerpt(response.into_body()).await;
    let code = status.as_u16();
    match location {
        Some(location) if status.is_redirection() => {
            ConnectError::Redirected { status: code, location: printable(location.as_bytes()) }
        }
        _ if status.is_success() => {
            let reason = "the server answered a page instead of a WebSocket";
            ConnectError::NotWaybill { status: code, reason, body }
        }
        // Only a request without `Upgrade` is answered so by a receiver.
        _ if code == 426 => {
            let reason = "the proxy drops the Upgrade header";
            ConnectError::NotWaybill { status: code, reason, body }
        }
        _ if matches!(code, 404 | 405) => {
            let reason = "there is no Waybill at this path";
            ConnectError::NotWaybill { status: code, reason, body }
        }
        _ => ConnectError::Refused { status: code, retry_after, body },
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_owned())
}

/// The start of a body; what cannot be read of it does not matter.
pub(super) async fn excerpt(mut body: Body) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() < EXCERPT_BYTES {
            let Some(Ok(frame)) = body.frame().await else { break };
            bytes.extend_from_slice(frame.data_ref().map_or(b"", |data| data));
        }
    };
    let _ = tokio::time::timeout(EXCERPT_TIMEOUT, read).await;
    bytes.truncate(EXCERPT_BYTES);
    printable(&bytes)
}
