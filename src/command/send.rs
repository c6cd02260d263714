//! `waybill send`: configuration, logging, signals, and the sender's run.
//!
//! On SIGHUP a changed configuration takes the place of the one in force; sockets that stay the
//! same are read all the while.

use std::sync::Arc;

use tracing::{error, info};

use super::reload;
use crate::cli;
use crate::config::{Environment, SendConfig, load_send};
use crate::exit::Exit;
use crate::metrics::Endpoint;
use crate::sender::{Prepared, Sender, Summary};
use crate::{shutdown, systemd};

/// Sends until a signal, or with `--once` until everything has its receipt.
pub async fn run(args: cli::Send, environment: Environment) -> anyhow::Result<Exit> {
    let shutdown = shutdown::install();
    let file = args.config.clone();
    let layer = args.layer(&environment)?;
    let loaded = load_send(layer.clone(), file.as_deref(), &environment)?;
    let log = loaded.log;
    let mut config = super::begin(loaded);
    let once = config.once;
    super::refuse_for_another_user(&config.state_dir)?;
    systemd::accompany(&shutdown);
    let mut sender = Sender::open(&config, &shutdown)?;
    let metrics = sender.metrics();
    let mut endpoint = Endpoint::at(config.metrics, None, &metrics)?;
    let prepared = sender.prepare(config.clone())?;
    let mut part = shutdown.part();
    let mut sending = Box::pin(sender.start(prepared, part.clone()).await?);
    systemd::ready();
    let ended = loop {
        let next = loop {
            tokio::select! {
                ended = &mut sending => break Err(ended),
                () = shutdown.hangup() => {}
            }
            if once || file.is_none() {
                info!("SIGHUP ignored: there is no configuration file to be read anew");
                continue;
            }
            systemd::reloading();
            let next = load_send(layer.clone(), file.as_deref(), &environment)
                .map_err(anyhow::Error::from)
                .map(|loaded| super::take(loaded, log))
                .and_then(|new| prepare(new, &config, &sender, endpoint.as_ref()));
            match reload::judge(next, &metrics.reloads) {
                Some(next) => break Ok(next),
                None => systemd::ready(),
            }
        };
        match next {
            Err(ended) => break ended,
            Ok((new, new_endpoint, prepared)) => {
                part.request_alone();
                sending.await?;
                (config, endpoint, part) = (new, new_endpoint, shutdown.part());
                sending = Box::pin(sender.start(prepared, part.clone()).await?);
                reload::done();
            }
        }
    };
    // What a refusal ended may have a reader that waits on.
    if ended.is_ok() {
        sender.close().await;
    }
    // Sockets count to their end, over all configurations that were in force.
    let summary = metrics.summary(ended.as_ref().is_ok_and(|summary| summary.complete));
    info!(
        stored = summary.stored,
        already = summary.already,
        skipped = summary.skipped,
        parked = summary.parked,
        sent_bytes = summary.sent_bytes,
        resent_bytes = summary.resent_bytes,
        lost_bytes = summary.lost_bytes,
        lost_datagrams = summary.lost_datagrams,
        left_bytes = summary.left_bytes,
        "ended"
    );
    ended?;
    if !once || summary.complete {
        return Ok(Exit::Done);
    }
    error!("failed: {}", failure(&summary));
    Ok(Exit::Failed)
}

/// Why `--once` is no success; the messages before it name files and lines.
fn failure(summary: &Summary) -> String {
    let mut why = Vec::new();
    if summary.parked > 0 {
        why.push(format!("lines parked in the dead letter: {}", summary.parked));
    }
    if summary.lost_bytes > 0 {
        why.push(format!("bytes lost: {}", summary.lost_bytes));
    }
    if summary.left_bytes > 0 {
        let left = summary.left_bytes;
        why.push(format!("bytes without a receipt, which the next run sends: {left}"));
    }
    if why.is_empty() {
        why.push("not everything that was named could be sent".to_owned());
    }
    format!("{}; the messages above say more", why.join(", "))
}

type InForce = (SendConfig, Option<Arc<Endpoint>>, Prepared);

/// Opens what a changed configuration needs; `None` where nothing changed. Where it fails, nothing
/// has changed either.
fn prepare(
    config: SendConfig,
    current: &SendConfig,
    sender: &Sender,
    endpoint: Option<&Arc<Endpoint>>,
) -> anyhow::Result<Option<InForce>> {
    if config == *current {
        return Ok(None);
    }
    let endpoint = Endpoint::at(config.metrics, endpoint, &sender.metrics())?;
    let prepared = sender.prepare(config.clone())?;
    Ok(Some((config, endpoint, prepared)))
}
