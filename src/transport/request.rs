//! What a listener hands to its owner before a peer is known, the HTTP request, and what the owner may answer.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use rustls::pki_types::CertificateDer;

use super::socket::Socket;
use crate::protocol::Challenge;

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// By its address.
    Tcp(SocketAddr),
    /// A process on this machine.
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

/// A request whose header is complete. All its parts but `peer` are outside bytes.
#[derive(Debug)]
pub struct Request {
    pub(super) head: hyper::http::request::Parts,
    pub(super) peer: Peer,
    /// What TLS verified, in DER.
    pub(super) certificate: Option<CertificateDer<'static>>,
}

impl Request {
    /// Who sent it.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The client certificate in DER that this listener's TLS verified.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }

    /// Its path, without a query.
    pub fn path(&self) -> &str {
        self.head.uri.path()
    }

    /// What stands behind the `?`, as it was sent.
    pub fn query(&self) -> Option<&str> {
        self.head.uri.query()
    }

    /// Whether it is a `GET` or `HEAD`.
    pub fn is_get(&self) -> bool {
        matches!(self.head.method, Method::GET | Method::HEAD)
    }

    /// Whether it asks for a WebSocket (RFC 6455 §4.2.1, points 1 to 4).
    pub fn is_upgrade(&self) -> bool {
        self.head.method == Method::GET
            && self.names("upgrade").any(|name| name.eq_ignore_ascii_case("websocket"))
            && self.names("connection").any(|name| name.eq_ignore_ascii_case("upgrade"))
    }

    /// The value of a header; `None` where it is missing, repeated or not visible ASCII.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.head.headers.get_all(name).iter();
        let value = values.next()?.to_str().ok()?;
        values.next().is_none().then_some(value)
    }

    /// Whether the header is there at all.
    pub fn has_header(&self, name: &str) -> bool {
        self.head.headers.contains_key(name)
    }

    /// The token that the peer presents (RFC 6750 §2.1).
    pub fn bearer(&self) -> Option<&str> {
        let (scheme, token) = self.header("authorization")?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    }

    /// Whether the peer offers this subprotocol (RFC 6455 §4.1, point 10).
    pub fn offers(&self, subprotocol: &str) -> bool {
        self.names("sec-websocket-protocol").any(|name| name == subprotocol)
    }

    fn names<'a>(&'a self, header: &'a str) -> impl Iterator<Item = &'a str> {
        let values = self.head.headers.get_all(header).iter();
        values.filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim)
    }
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Answer<S> {
    /// Upgrade it: the peer is authenticated, and `session` knows as whom.
    Accept {
        /// One that the peer offers.
        subprotocol: &'static str,
        /// What the peer is to answer.
        challenge: Option<Challenge>,
        /// What [`crate::protocol::TYPES_HEADER`] says.
        types: Option<String>,
        /// Handed to [`Handler::serve`] with the socket.
        session: S,
    },
    /// Answer it and close.
    Refuse(Refuse),
}

/// A plain HTTP answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refuse {
    /// HTTP status.
    pub status: u16,
    /// One line of text for a person.
    pub body: String,
    /// When the peer may try again.
    pub retry_after: Option<Duration>,
}

impl Refuse {
    /// Without `Retry-After`.
    pub fn new(status: u16, body: impl Into<String>) -> Refuse {
        Refuse { status, body: body.into(), retry_after: None }
    }

    /// With it: waiting helps.
    pub fn later(status: u16, body: impl Into<String>, after: Duration) -> Refuse {
        Refuse { retry_after: Some(after), ..Refuse::new(status, body) }
    }
}

/// Decides about requests and serves the sockets that come of them.
pub trait Handler: Send + Sync + 'static {
    /// What is known of an accepted peer.
    type Session: Send + 'static;

    /// Decides. Called for every request, upgrade or not; must not block.
    fn answer(&self, request: &Request) -> Answer<Self::Session>;

    /// Serves an accepted peer until it is gone, in a task of its own.
    fn serve(
        self: Arc<Self>,
        session: Self::Session,
        socket: Socket,
    ) -> impl Future<Output = ()> + Send;
}
