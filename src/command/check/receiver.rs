//! A receiver, as a sender meets it: name, connection, TLS, upgrade, token, clock.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use super::{Report, http_date};
use crate::config::{DialConfig, Endpoint};
use crate::protocol::SUBPROTOCOL;
use crate::record::escape_path;
use crate::tls;
use crate::transport::{ConnectError, Socket, Steps, close, connect_noting};

/// As long as a sender waits.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Dials, and closes right after the upgrade: without a `hello` the receiver takes nobody for a
/// second instance of the sender.
pub(super) async fn check(
    report: &mut Report,
    endpoint: &Endpoint,
    dial: &DialConfig,
) -> io::Result<()> {
    let of = Some(endpoint.url.as_str());
    let token_file = &dial.token_file;
    let token = match std::fs::read_to_string(token_file) {
        Ok(token) => token,
        Err(error) => {
            return report.fail("token", of, format!("{}: {error}", escape_path(token_file)));
        }
    };
    let config = || tls::client_config(dial.ca.as_deref(), dial.identity.as_ref());
    let tls = match endpoint.tls.then(config).transpose() {
        Ok(tls) => tls,
        Err(error) => return report.fail("tls", of, error.to_string()),
    };
    let mut steps = Steps::default();
    let connected =
        connect_noting(endpoint, tls, token.trim(), SUBPROTOCOL, TIMEOUT, &mut steps).await;
    told(report, endpoint, &steps, connected.as_ref().err())?;
    if let Ok(socket) = connected {
        leave(socket).await;
    }
    Ok(())
}

/// One line per step, up to the one that failed.
fn told(
    report: &mut Report,
    endpoint: &Endpoint,
    steps: &Steps,
    error: Option<&ConnectError>,
) -> io::Result<()> {
    let of = Some(endpoint.url.as_str());
    let failure = || error.map(ConnectError::to_string).unwrap_or_default();
    let host = &steps.host;
    if !host.is_empty() && host.parse::<IpAddr>().is_err() {
        if steps.addresses.is_empty() {
            return report.fail("name", of, failure());
        }
        let addresses: Vec<_> = steps.addresses.iter().map(|at| at.ip().to_string()).collect();
        report.ok("name", of, format!("{host} is {}", addresses.join(", ")))?;
    }
    if !steps.connected {
        return report.fail("connection", of, failure());
    }
    report.ok("connection", of, "taken")?;
    if endpoint.tls {
        let Some(certificate) = &steps.certificate else {
            return report.fail("tls", of, failure());
        };
        report.certificate("tls", of, tls::not_after(certificate))?;
    }
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
            // Only a request without `Upgrade` is answered so by a receiver.
            let advice = match steps.status {
                Some(426) => {
                    "; the proxy drops the Upgrade header: compare with nginx/receiver.conf"
                }
                _ => "",
            };
            report.fail("upgrade", of, format!("{error}{advice}{through}"))?;
        }
    }
    match steps.date.as_deref().map(http_date) {
        Some(Some(date)) => report.clock(of, "the receiver's", date),
        _ => report.skip("clock", of, "the answer has no Date"),
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
    let _ = tokio::time::timeout(TIMEOUT, closing).await;
}
