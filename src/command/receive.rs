//! `waybill receive`: a listener, a receiver and a destination; run, drain, end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::ReceiveConfig;
use crate::destination::{Destination, Queue};
use crate::receiver::{Dial, Receiver};
use crate::shutdown::Shutdown;
use crate::tls;
use crate::transport::Listener;

/// How long the destination has, after the last connection, for what it has begun.
const DESTINATION_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until `shutdown`, then drains. Errors are those of the start (files, certificates, the
/// address, the store), and a destination that ended by itself.
pub async fn run(config: ReceiveConfig, shutdown: Shutdown) -> anyhow::Result<()> {
    let client_ca = config.client_ca.as_deref();
    let tls = config.tls.as_ref().map(|files| tls::server_config(files, client_ca)).transpose()?;
    let destination = Destination::open(&config.destination)?;
    let queue = Arc::new(Queue::default());
    let receiver = Receiver::new(&config, &destination, Arc::clone(&queue), shutdown.clone())?;
    let dials: Result<Vec<Dial>, _> = config.dials.into_iter().map(Dial::new).collect();
    let dials = dials?;
    let encrypted = tls.is_some();
    let listener = config.listen.map(|listen| Listener::bind(&listen, tls)).transpose()?;
    if let Some(listener) = &listener {
        info!(address = listener.address(), tls = encrypted, "listening");
    }

    // Not the shutdown's own token: while connections drain, the destination works on.
    let stop = CancellationToken::new();
    let mut writing = tokio::spawn(destination.run(Arc::clone(&queue), stop.clone()));
    tokio::select! {
        () = receiver.run(listener, dials) => {}
        result = &mut writing => {
            result?;
            bail!("the destination ended by itself; nothing can be received");
        }
    }
    queue.close();
    stop.cancel();
    match tokio::time::timeout(DESTINATION_TIMEOUT, writing).await {
        Ok(ended) => ended?,
        Err(_) => warn!("the destination did not end in time; unanswered lines are sent again"),
    }
    info!("stopped");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::{DestinationConfig, EmbeddedConfig, Listen};
    use crate::record::IndexRule;
    use crate::tokens;

    fn config(dir: &tempfile::TempDir) -> ReceiveConfig {
        ReceiveConfig {
            listen: Some(Listen::Unix(dir.path().join("waybill.sock"))),
            tls: None,
            dials: Vec::new(),
            client_ca: None,
            trust_client_headers: false,
            tokens: dir.path().join("tokens.toml"),
            destination: DestinationConfig::Embedded(EmbeddedConfig {
                file: dir.path().join("store.sqlite"),
                keep_days: None,
                keep_bytes: None,
            }),
            rule: IndexRule::default(),
            former_rules: Vec::new(),
            days: (-400, 2),
            credit: 8 << 20,
            memory_bytes_max: 64 << 20,
            drain_timeout: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn it_ends_with_the_shutdown_and_leaves_no_socket() {
        let dir = tempfile::tempdir().expect("tempdir");
        let config = config(&dir);
        tokens::mint(&config.tokens, "web-1", tokens::Terms::default()).expect("mint");
        let shutdown = Shutdown::new();
        let running = tokio::spawn(run(config, shutdown.clone()));
        let socket = dir.path().join("waybill.sock");
        while !socket.exists() {
            assert!(!running.is_finished());
            tokio::task::yield_now().await;
        }
        shutdown.request();
        running.await.expect("no panic").expect("a clean end");
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn a_start_without_tokens_says_how_to_make_them() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut config = config(&dir);
        config.tokens = PathBuf::from("/nonexistent/tokens.toml");
        let error = run(config, Shutdown::new()).await.expect_err("no tokens").to_string();
        assert!(error.contains("waybill token"), "{error}");
    }
}
