//! A receiver, as a sender meets it: name, connection, TLS, upgrade, token, clock, types, chain key.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::Report;
use crate::clock::http_date;
use crate::config::{DialConfig, Endpoint, SendConfig, SourceConfig};
use crate::protocol::SUBPROTOCOL;
use crate::record::escape_path;
use crate::tls::{self, Leaf};
use crate::transport::{
    CONNECT_TIMEOUT, ConnectError, Offer, Socket, Steps, close, connect_noting,
};

/// Dials, and closes right after the upgrade: without a `hello` the receiver takes nobody for a
/// second instance of the sender.
pub(super) async fn check(
    report: &mut Report,
    endpoint: &Endpoint,
    dial: &DialConfig,
    config: &SendConfig,
) -> io::Result<()> {
    let of = Some(endpoint.url.as_str());
    let Some(token) = token(report, of, &dial.token_file)? else { return Ok(()) };
    let client = || tls::client_config(dial.ca.as_deref(), dial.identity.as_ref());
    let tls = match endpoint.tls.then(client).transpose() {
        Ok(tls) => tls,
        Err(error) => return report.fail("tls", of, error.to_string()),
    };
    let offer = Offer::new(token.trim(), SUBPROTOCOL);
    let mut steps = Steps::default();
    let connected = connect_noting(endpoint, tls, &offer, CONNECT_TIMEOUT, &mut steps)
        .await
        .map_err(|error| error.trusting(dial.ca.as_deref()));
    told(report, endpoint, &steps, connected.as_ref().err())?;
    if let Ok(socket) = connected {
        types(report, of, steps.types.as_deref(), &config.sources)?;
        let has_chain_key = config.chain_key_file.is_some();
        chain_key(report, of, socket.challenge().is_some(), has_chain_key)?;
        leave(socket).await;
    }
    Ok(())
}

/// Reads the token to present; says so where it cannot be read.
pub(super) fn token(
    report: &mut Report,
    of: Option<&str>,
    file: &Path,
) -> io::Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(token) => Ok(Some(token)),
        Err(error) => {
            report.fail("token", of, format!("{}: {error}", escape_path(file)))?;
            Ok(None)
        }
    }
}

/// One line per step to the server, up to the one that failed; whether all were made.
pub(super) fn way(
    report: &mut Report,
    endpoint: &Endpoint,
    steps: &Steps,
    error: Option<&ConnectError>,
) -> io::Result<bool> {
    let of = Some(endpoint.url.as_str());
    let failure = || error.map(ConnectError::to_string).unwrap_or_default();
    let host = &steps.host;
    if !host.is_empty() && host.parse::<IpAddr>().is_err() {
        if steps.addresses.is_empty() {
            report.fail("name", of, failure())?;
            return Ok(false);
        }
        let addresses: Vec<_> = steps.addresses.iter().map(|at| at.ip().to_string()).collect();
        report.ok("name", of, format!("{host} is {}", addresses.join(", ")))?;
    }
    if !steps.connected {
        report.fail("connection", of, failure())?;
        return Ok(false);
    }
    report.ok("connection", of, "accepted")?;
    if endpoint.tls {
        let Some(certificate) = &steps.certificate else {
            report.fail("tls", of, failure())?;
            return Ok(false);
        };
        report.certificate("tls", of, Leaf::from_der(certificate))?;
    }
    Ok(true)
}

/// The way, then what the receiver answered.
fn told(
    report: &mut Report,
    endpoint: &Endpoint,
    steps: &Steps,
    error: Option<&ConnectError>,
) -> io::Result<()> {
    if !way(report, endpoint, steps, error)? {
        return Ok(());
    }
    let of = Some(endpoint.url.as_str());
    let through = steps.server.as_ref().map(|name| format!(", through {name}")).unwrap_or_default();
    match error {
        None => {
            report.ok("upgrade", of, format!("101, {SUBPROTOCOL}{through}"))?;
            report.ok("token", of, "accepted")?;
        }
        Some(error @ (ConnectError::Token | ConnectError::Refused { status: 401, .. })) => {
            report.fail("token", of, error.to_string())?;
        }
        Some(error) => {
            report.fail("upgrade", of, format!("{error}{through}"))?;
        }
    }
    clock(report, of, "the receiver's", steps)
}

/// This machine's clock against the one of the side that answered.
pub(super) fn clock(
    report: &mut Report,
    of: Option<&str>,
    whose: &str,
    steps: &Steps,
) -> io::Result<()> {
    match steps.date.as_deref().map(http_date) {
        Some(Some(date)) => report.clock(of, whose, date),
        _ => report.skip("clock", of, "the answer has no Date"),
    }
}

/// Whether the token may use the type of each source.
fn types(
    report: &mut Report,
    of: Option<&str>,
    listed: Option<&str>,
    sources: &[SourceConfig],
) -> io::Result<()> {
    const CHECK: &str = "types";
    let Some(listed) = listed else {
        return report.skip(CHECK, of, "this receiver does not say which types the token lists");
    };
    let mut types: Vec<&str> = listed.split(',').map(str::trim).collect();
    let unlisted: Vec<_> =
        sources.iter().filter(|source| !types.contains(&source.type_name.as_str())).collect();
    if unlisted.is_empty() {
        return report.ok(CHECK, of, "the token lists each source's");
    }
    let of_sources =
        unlisted.iter().map(|source| format!("{} of {:?}", source.type_name, source.name));
    let of_sources = of_sources.collect::<Vec<_>>().join(", ");
    for source in unlisted {
        if !types.contains(&source.type_name.as_str()) {
            types.push(source.type_name.as_str());
        }
    }
    let message = format!(
        "the token does not list {of_sources}, whose lines would be refused: in the receiver's tokens \
         file, set for this sender: types = {types:?}"
    );
    report.fail(CHECK, of, message)
}

/// Whether the token needs a key, and this side has one. A check says no `hello`, hence proves none.
fn chain_key(
    report: &mut Report,
    of: Option<&str>,
    is_needed: bool,
    is_there: bool,
) -> io::Result<()> {
    const CHECK: &str = "chain key";
    match (is_needed, is_there) {
        (false, false) => Ok(()),
        (false, true) => {
            let message = "the receiver asks for none: this token is bound to no key, and a copy of \
                           it lets others in (waybill token NAME --rotate --chain-key FILE)";
            report.warn(CHECK, of, message)
        }
        (true, false) => {
            let message = "this token is bound to a key: give --chain-key-file FILE, the file that \
                           waybill token NAME --chain-key FILE wrote at the receiver";
            report.fail(CHECK, of, message)
        }
        (true, true) => {
            let message =
                "there is one; whether it is this token's only a session proves, not this";
            report.skip(CHECK, of, message)
        }
    }
}

async fn leave(socket: Socket) {
    let (mut sender, mut incoming) = socket.split();
    let closing = async {
        if sender.close(close::NORMAL, "checked").await.is_ok() {
            while let Some(Ok(_)) = incoming.next().await {}
        }
    };
    // It is gone either way.
    let _ = tokio::time::timeout(CONNECT_TIMEOUT, closing).await;
}
