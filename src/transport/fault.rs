//! Why there is no connection: every way to fail has a name and an advice.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

use crate::record::escape_path;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The token holds bytes that no header may have.
    #[error("the token has characters that no HTTP header may have; its file must hold it alone")]
    Token,
    /// An endpoint with TLS was given no TLS configuration, or its URL is no request target.
    #[error("{url} cannot be dialled: {reason}")]
    Endpoint {
        /// As configured.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The name has no address.
    #[error("{host:?} does not resolve: {source}; check the name and the machine's DNS")]
    Resolve {
        /// As configured.
        host: String,
        /// From the resolver.
        source: io::Error,
    },
    /// No address took the connection.
    #[error("{address} does not answer: {source}; is it up, and the port open?")]
    Unreachable {
        /// The last address that failed.
        address: String,
        /// From the operating system.
        source: io::Error,
    },
    /// The proxy does not let us through.
    #[error(
        "the proxy {proxy} opens no tunnel: HTTP status {status}{}", proxy_advice(*.status, .body)
    )]
    ProxyRefused {
        /// Its address.
        proxy: String,
        /// HTTP status.
        status: u16,
        /// The start of the body, printable.
        body: String,
    },
    /// The proxy does not speak HTTP, or went away.
    #[error("the proxy {proxy} broke off: {source}; is it an HTTP proxy?")]
    ProxyBroken {
        /// Its address.
        proxy: String,
        /// What was wrong.
        source: hyper::Error,
    },
    /// It took too long.
    #[error(
        "{url} did not finish the handshake within {after:?}; is it the receiver's port, or that of a \
         proxy before it?"
    )]
    Timeout {
        /// As configured.
        url: String,
        /// The limit.
        after: Duration,
    },
    /// TLS failed.
    #[error("no TLS with {host:?}: {fault}")]
    Tls {
        /// The name that the certificate was checked against.
        host: String,
        /// Which kind of failure, and what to do.
        fault: TlsFault,
    },
    /// The other side, or a proxy before it, said no.
    #[error("refused with HTTP status {status}{}", advice(*.status, .body))]
    Refused {
        /// HTTP status: 401, 403, 429 and 503 are Waybill's own.
        status: u16,
        /// When the server asks for the next attempt.
        retry_after: Option<Duration>,
        /// The start of the body, printable.
        body: String,
    },
    /// The answer sends us elsewhere; a token is not carried there.
    #[error(
        "redirected with HTTP status {status} to {location:?}; a token is never carried elsewhere: \
         set that address if it is right"
    )]
    Redirected {
        /// HTTP status.
        status: u16,
        /// Where to, printable.
        location: String,
    },
    /// Something answers there that is not Waybill.
    #[error("{reason} (HTTP status {status}{}); {}", quoted(.body), page_advice(*.status))]
    NotWaybill {
        /// HTTP status.
        status: u16,
        /// What was missing.
        reason: &'static str,
        /// The start of the body, printable.
        body: String,
    },
    /// The other side does not speak our subprotocol.
    #[error(
        "the server does not speak {wanted}: it chose {}",
        .chosen.as_ref().map_or("nothing".to_owned(), |chosen| format!("{chosen:?}"))
    )]
    Subprotocol {
        /// What was asked for.
        wanted: String,
        /// What the answer says.
        chosen: Option<String>,
    },
    /// The connection broke within the upgrade, or the answer is not HTTP.
    #[error("the HTTP upgrade broke off: {0}")]
    Broken(#[source] hyper::Error),
    /// Without TLS, the answer is not HTTP.
    #[error("the answer is no HTTP: if the server speaks TLS on this port, use wss://")]
    NotHttp,
}

impl ConnectError {
    /// Whether trying again is of no use before a person mends something.
    pub fn needs_a_person(&self) -> bool {
        matches!(
            self,
            ConnectError::Token
                | ConnectError::Endpoint { .. }
                | ConnectError::Tls { .. }
                | ConnectError::Refused { status: 400 | 401 | 403, .. }
                | ConnectError::ProxyRefused { status: 401 | 403 | 405 | 407, .. }
                | ConnectError::Redirected { .. }
                | ConnectError::Subprotocol { .. }
                | ConnectError::NotHttp
        )
    }

    /// Names the file of the authorities that were trusted, where one was given.
    pub fn trusting(self, ca: Option<&Path>) -> ConnectError {
        match (self, ca) {
            (ConnectError::Tls { host, fault: TlsFault::UnknownAuthority }, Some(ca)) => {
                ConnectError::Tls { host, fault: TlsFault::OtherAuthority(escape_path(ca)) }
            }
            (error, _) => error,
        }
    }

    /// What the other side asks us to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ConnectError::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// Which way TLS failed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TlsFault {
    /// The certificate's time is over.
    #[error("the server's certificate has expired; renew it, or check this machine's clock")]
    Expired,
    /// The certificate's time has not come.
    #[error("the server's certificate is not valid yet; check this machine's clock")]
    NotYetValid,
    /// The certificate is for somebody else.
    #[error("the server's certificate is for another name: {0}; use a name that it lists")]
    WrongName(String),
    /// The certificate is for nobody.
    #[error("the server's certificate names no host; make it one with subjectAltName")]
    NoName,
    /// No trusted authority signed it.
    #[error("the server's certificate comes from an unknown authority; name its CA with --ca")]
    UnknownAuthority,
    /// None of the authorities in this file signed it.
    #[error(
        "the server's certificate is signed by no authority in {0}, the CA file that was given; name \
         the file of the one that signed it, if this is the right server"
    )]
    OtherAuthority(String),
    /// The server shows an authority's certificate as its own.
    #[error(
        "the server's certificate is one of an authority (CA:TRUE), as openssl makes by default when it \
         signs itself; make the server one with basicConstraints=CA:FALSE"
    )]
    AuthorityItself,
    /// The server's certificate has no extensions, and thereby no names.
    #[error(
        "the server's certificate is of X.509 version 1, which has no names; make it one of version 3, with \
         subjectAltName"
    )]
    Version1,
    /// The answer is not TLS.
    #[error("the server does not speak TLS on this port; check the port, or use ws:// on loopback")]
    NotTls,
    /// The server did not take our certificate, or wants one.
    #[error(
        "the server refuses this sender's client certificate ({0}); check --cert, and the authority \
         that the server trusts for it"
    )]
    Refused(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

pub(super) fn tls_fault(error: &io::Error) -> TlsFault {
    use rustls::Error;
    let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match cause {
        Some(Error::InvalidCertificate(fault)) => match fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                TlsFault::Expired
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                TlsFault::NotYetValid
            }
            CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
                TlsFault::NoName
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsFault::WrongName(fault.to_string())
            }
            // A bad signature is an authority made anew under its old name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                TlsFault::UnknownAuthority
            }
            // rustls has no names for these.
            CertificateError::Other(other) => match other.0.to_string().as_str() {
                "CaUsedAsEndEntity" => TlsFault::AuthorityItself,
                "UnsupportedCertVersion" => TlsFault::Version1,
                other => TlsFault::Other(other.to_owned()),
            },
            other => TlsFault::Other(other.to_string()),
        },
        Some(Error::InvalidMessage(_)) => TlsFault::NotTls,
        Some(Error::AlertReceived(alert)) if is_about_certificates(*alert) => {
            TlsFault::Refused(format!("{alert:?}"))
        }
        Some(other) => TlsFault::Other(other.to_string()),
        None => TlsFault::Other(error.to_string()),
    }
}

/// Alerts by which a server refuses what a client shows of itself (RFC 8446 §6.2).
fn is_about_certificates(alert: AlertDescription) -> bool {
    use AlertDescription as Alert;
    matches!(
        alert,
        Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::CertificateRequired
    )
}

/// Outside bytes as one line of text (I8).
pub(super) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn quoted(body: &str) -> String {
    if body.is_empty() { String::new() } else { format!(", {body:?}") }
}

fn advice(status: u16, body: &str) -> String {
    let advice = match status {
        400 => {
            "a proxy or the receiver takes this request for broken: check address and certificate"
        }
        401 => {
            "the token is unknown, expired or revoked: for a new one, at the other side: \
             waybill token NAME --tokens FILE --rotate"
        }
        403 if body.contains("cannot check") => "",
        403 if body.contains("client certificate") => "show the right one with --cert and --key",
        403 if body.contains("token") => "",
        403 => "a proxy or the server itself forbids this request",
        429 => "this token has too many connections open",
        503 => "it is starting, stopping, or has a connection already",
        502 | 504 => "the proxy does not reach what is behind it",
        _ => "",
    };
    let separator = if advice.is_empty() { "" } else { "; " };
    format!("{}{separator}{advice}", quoted(body))
}

fn page_advice(status: u16) -> &'static str {
    if status == 426 { "compare with nginx/receiver.conf" } else { "check host and path" }
}

fn proxy_advice(status: u16, body: &str) -> String {
    let advice = match status {
        407 => "; it wants a user and password: set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
        403 | 405 => "; it does not allow CONNECT to this host and port",
        502..=504 => "; it does not reach the receiver",
        _ => "",
    };
    format!("{}{advice}", quoted(body))
}
