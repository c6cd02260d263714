//! The receiver's side.

use std::io;
use std::path::Path;

use jiff::Timestamp;
use socket2::Type;

use super::local::{Peer, Runs};
use super::{ENDS_SOON, Report, cluster, local, receiver};
use crate::cli;
use crate::config::{DestinationConfig, DialledSender, Environment, load_receive};
use crate::destination::embedded;
use crate::record::escape_path;
use crate::tls;
use crate::tokens::{Entry, Tokens};
use crate::transport::{CONNECT_TIMEOUT, ConnectError, Steps, ask};

pub(super) async fn check(
    args: cli::Receive,
    environment: &Environment,
    report: &mut Report,
) -> anyhow::Result<()> {
    let file = args.config.clone();
    let loaded = load_receive(args.layer(environment), file.as_deref(), environment);
    let Some(config) = report.configuration(loaded)? else { return Ok(()) };
    if let Some(listen) = &config.listen {
        local::listen(report, listen, Runs::Unknown)?;
    }
    if let Some(address) = config.metrics {
        local::port(report, Some("metrics"), address, Type::STREAM, Runs::Unknown)?;
    }
    if let Some(tls) = &config.tls {
        local::certificate(report, None, tls, Peer::Waybill(config.client_ca.as_deref()))?;
    }
    let tokens = tokens(report, &config.tokens, "sender", |_| None)?;
    for sender in &config.dials {
        if let Some(tokens) = &tokens {
            entry(report, sender, tokens, &config.tokens)?;
        }
        dialled(report, sender).await?;
    }
    match &config.destination {
        DestinationConfig::Embedded(store) => {
            const CHECK: &str = "store";
            match embedded::look(&store.file) {
                Err(error) => report.fail(CHECK, None, error.to_string())?,
                Ok(()) => {
                    let folder = store.file.parent().unwrap_or(Path::new("/"));
                    local::folder(report, CHECK, folder)?;
                }
            }
        }
        DestinationConfig::Elasticsearch(elasticsearch) => {
            cluster::check(report, elasticsearch, &config.rule).await?;
        }
    }
    Ok(())
}

/// Whether a sender that is dialled has the entry that says who it is.
fn entry(
    report: &mut Report,
    sender: &DialledSender,
    tokens: &Tokens,
    file: &Path,
) -> io::Result<()> {
    let name = &sender.name;
    if tokens.named(name, Timestamp::now()).is_some() {
        return Ok(());
    }
    let is_over = tokens.entries().iter().any(|entry| entry.name == *name);
    let (what, how) = match is_over {
        true => ("is revoked or has expired", " --rotate"),
        false => ("is not there", ""),
    };
    let message = format!(
        "not dialled: its entry {name:?} {what}: waybill token {name:?} --tokens {}{how}",
        escape_path(file)
    );
    report.fail("tokens", Some(&sender.endpoint.url), message)
}

/// A sender that is dialled: the way, and whether it takes the token, which is asked without an
/// upgrade.
async fn dialled(report: &mut Report, sender: &DialledSender) -> io::Result<()> {
    let DialledSender { endpoint, token_file, ca, .. } = sender;
    let of = Some(endpoint.url.as_str());
    let Some(token) = receiver::token(report, of, token_file)? else { return Ok(()) };
    let tls = match endpoint.tls.then(|| tls::client_config(ca.as_deref(), None)).transpose() {
        Ok(tls) => tls,
        Err(error) => return report.fail("tls", of, error.to_string()),
    };
    let mut steps = Steps::default();
    let asked = ask(endpoint, tls, token.trim(), CONNECT_TIMEOUT, &mut steps)
        .await
        .map_err(|error| error.trusting(ca.as_deref()));
    if !receiver::way(report, endpoint, &steps, asked.as_ref().err())? {
        return Ok(());
    }
    match asked {
        Ok(()) => report.ok("token", of, "accepted")?,
        Err(error @ (ConnectError::Token | ConnectError::Refused { status: 401 | 403, .. })) => {
            report.fail("token", of, error.to_string())?
        }
        Err(error) => return report.fail("upgrade", of, error.to_string()),
    }
    let message = "not tried: it would take over from a receiver that runs";
    report.skip("upgrade", of, message)?;
    receiver::clock(report, of, "the sender's", &steps)
}

/// Whom a tokens file lets in, but for those whose entry is refused, and why; gives its entries
/// where it can be used.
pub(super) fn tokens(
    report: &mut Report,
    file: &Path,
    who: &str,
    refusal: fn(&Entry) -> Option<&'static str>,
) -> io::Result<Option<Tokens>> {
    const CHECK: &str = "tokens";
    let tokens = match Tokens::load(file) {
        Ok(tokens) => tokens,
        Err(error) => return report.fail(CHECK, None, error.to_string()).map(|()| None),
    };
    let now = Timestamp::now();
    let mut valid = 0;
    for entry in tokens.entries().iter().filter(|entry| entry.is_valid(now)) {
        if let Some(why) = refusal(entry) {
            report.warn(CHECK, None, format!("{:?} may not enter: {why}", entry.name))?;
            continue;
        }
        valid += 1;
        if let Some(end) = entry.expires.filter(|end| *end < now + ENDS_SOON) {
            let message = format!(
                "the token of {:?} ends at {end}: waybill token {0:?} --tokens {} --rotate",
                entry.name,
                escape_path(file)
            );
            report.warn(CHECK, None, message)?;
        }
    }
    match valid {
        0 => {
            let path = escape_path(file);
            let message = format!("nobody may enter: waybill token NAME --tokens {path}");
            report.fail(CHECK, None, message)?;
        }
        1 => report.ok(CHECK, None, format!("1 {who} may enter"))?,
        valid => report.ok(CHECK, None, format!("{valid} {who}s may enter"))?,
    }
    Ok(Some(tokens))
}
