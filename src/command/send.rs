//! `waybill send`: configuration, logging, signals, and the sender's run.

use tracing::info;

use crate::cli;
use crate::config::{Environment, load_send};
use crate::exit::Exit;
use crate::{sender, shutdown};

/// Sends until a signal, or with `--once` until everything has its receipt.
pub async fn run(args: cli::Send, environment: Environment) -> anyhow::Result<Exit> {
    let file = args.config.clone();
    let loaded = load_send(args.layer(&environment)?, file.as_deref(), &environment)?;
    let config = super::begin(loaded);
    let once = config.once;
    let summary = sender::run(config, shutdown::install()).await?;
    info!(
        stored = summary.stored,
        already = summary.already,
        skipped = summary.skipped,
        parked = summary.parked,
        sent_bytes = summary.sent_bytes,
        resent_bytes = summary.resent_bytes,
        lost_bytes = summary.lost_bytes,
        lost_datagrams = summary.lost_datagrams,
        "ended"
    );
    Ok(if once && !summary.complete { Exit::Failed } else { Exit::Done })
}
