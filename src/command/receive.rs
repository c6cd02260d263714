//! `waybill receive`: a listener, a receiver and a destination; run, drain, end.
//!
//! On SIGHUP a changed configuration takes the place of the one in force. What stays the same
//! stays open: the address, where senders wait meanwhile, and the destination. Senders that are dialled
//! are dialled anew.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::reload;
use crate::config::{DestinationConfig, ReceiveConfig};
use crate::destination::{Destination, Lookup, Profile, Queue};
use crate::metrics::Endpoint;
use crate::receiver::{Dial, Metrics, Receiver};
use crate::record::escape_path;
use crate::shutdown::Shutdown;
use crate::systemd;
use crate::tls::{ServerCertificate, TlsError};
use crate::transport::Listener;

/// How long the destination has, after the last connection, for what it has begun.
const DESTINATION_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until `shutdown`, then drains. `load` reads the configuration anew. Errors are those of
/// the start (files, certificates, the address, the store), and a destination that ended by
/// itself.
pub async fn run(
    config: ReceiveConfig,
    shutdown: Shutdown,
    load: impl Fn() -> anyhow::Result<ReceiveConfig>,
) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::default());
    let mut store = Store::start(Destination::open(&config.destination)?, Arc::default());
    let begun = begin(config, &store, &shutdown, &metrics);
    let (mut current, mut receiver, mut dials) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            // Its thread must not outlive the runtime.
            store.close().await;
            return Err(error);
        }
    };
    current.tell();
    systemd::ready();
    loop {
        let serving = receiver.run(current.listener.clone(), dials);
        tokio::pin!(serving);
        let next = loop {
            tokio::select! {
                () = &mut serving => break None,
                result = &mut store.writing => {
                    result?;
                    bail!("the destination ended by itself; nothing can be received");
                }
                () = shutdown.hangup() => {
                    systemd::reloading();
                    let next = load().and_then(|new| {
                        prepare(new, &current, &store, &shutdown, &metrics)
                    });
                    match reload::judge(next, &metrics.reloads) {
                        Some(next) => break Some(next),
                        None => systemd::ready(),
                    }
                }
            }
        };
        let Some(mut next) = next else { break };
        current.part.request_alone();
        serving.await;
        store = match next.store {
            StoreChange::None => store,
            StoreChange::To(new, queue) => {
                store.close().await;
                Store::start(*new, queue)
            }
            StoreChange::Reopen(queue) => {
                store.close().await;
                let new = Destination::open(&next.running.config.destination)?;
                let new = Store::start(new, queue);
                next.receiver.reopened(&new.profile);
                new
            }
        };
        if next.running.way() != current.way() {
            next.running.tell();
        }
        (current, receiver, dials) = (next.running, next.receiver, next.dials);
        reload::done();
    }
    store.close().await;
    info!("stopped");
    Ok(())
}

/// Opens what the first configuration needs besides the destination.
fn begin(
    config: ReceiveConfig,
    store: &Store,
    shutdown: &Shutdown,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<(Running, Receiver, Vec<Dial>)> {
    let part = shutdown.part();
    let queue = Arc::clone(&store.queue);
    let lookup = Lookup::new(&config.destination)?;
    let receiver =
        Receiver::new(&config, &store.profile, lookup, queue, part.clone(), metrics.clone())?;
    let dials = dials(&config)?;
    let listener = listen(&config, None)?;
    let endpoint = Endpoint::at(config.metrics, None, metrics)?;
    Ok((Running { config, listener, endpoint, part }, receiver, dials))
}

/// What is in force.
struct Running {
    config: ReceiveConfig,
    listener: Option<Listener>,
    endpoint: Option<Arc<Endpoint>>,
    part: Shutdown,
}

/// Where lines come in and where they go: what a person who mistyped it looks for.
#[derive(PartialEq)]
struct Way<'a> {
    listen: Option<String>,
    /// Senders that are dialled.
    dials: Option<usize>,
    to: String,
    index: &'a str,
}

impl Running {
    fn way(&self) -> Way<'_> {
        Way {
            listen: self.listener.as_ref().map(Listener::address),
            dials: Some(self.config.dials.len()).filter(|count| *count > 0),
            to: match &self.config.destination {
                DestinationConfig::Embedded(store) => escape_path(&store.file),
                DestinationConfig::Elasticsearch(cluster) => cluster.urls.join(" "),
            },
            index: self.config.rule.as_str(),
        }
    }

    fn tell(&self) {
        let Way { listen, dials, to, index } = self.way();
        match &self.config.destination {
            DestinationConfig::Embedded(_) => {
                info!(listen, dials, store = to, index, "receiving");
            }
            DestinationConfig::Elasticsearch(_) => {
                info!(listen, dials, elasticsearch = to, index, "receiving");
            }
        }
    }
}

/// What is to take its place.
struct Next {
    running: Running,
    receiver: Receiver,
    dials: Vec<Dial>,
    store: StoreChange,
}

/// What becomes of the destination.
enum StoreChange {
    None,
    /// Open, and not at work before the former has ended.
    To(Box<Destination>, Arc<Queue>),
    /// Under other settings, once it is closed: two must not have one file open.
    Reopen(Arc<Queue>),
}

/// Opens what a changed configuration needs; `None` where nothing changed. Where it fails, nothing
/// has changed either.
fn prepare(
    config: ReceiveConfig,
    current: &Running,
    store: &Store,
    shutdown: &Shutdown,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Option<Next>> {
    if config == current.config {
        return Ok(None);
    }
    let endpoint = Endpoint::at(config.metrics, current.endpoint.as_ref(), metrics)?;
    let dials = dials(&config)?;
    let listener = listen(&config, Some(current))?;
    let change = match (&current.config.destination, &config.destination) {
        (old, new) if old == new => StoreChange::None,
        (DestinationConfig::Embedded(old), DestinationConfig::Embedded(new))
            if old.file == new.file =>
        {
            StoreChange::Reopen(Arc::default())
        }
        (_, new) => StoreChange::To(Box::new(Destination::open(new)?), Arc::default()),
    };
    let (profile, queue) = match &change {
        StoreChange::None => (store.profile.clone(), &store.queue),
        StoreChange::To(new, queue) => (new.profile(), queue),
        StoreChange::Reopen(queue) => (store.profile.clone(), queue),
    };
    let part = shutdown.part();
    let lookup = Lookup::new(&config.destination)?;
    let queue = Arc::clone(queue);
    let receiver = Receiver::new(&config, &profile, lookup, queue, part.clone(), metrics.clone())?;
    let running = Running { config, listener, endpoint, part };
    Ok(Some(Next { running, receiver, dials, store: change }))
}

/// The address where the configuration listens, if it does; `current` may have it bound already.
fn listen(config: &ReceiveConfig, current: Option<&Running>) -> anyhow::Result<Option<Listener>> {
    let bound = current.and_then(|current| current.listener.as_ref());
    let known = bound.and_then(Listener::certificate);
    let tls = ServerCertificate::again(known, config.tls.as_ref(), config.client_ca.as_deref())?;
    let Some(address) = &config.listen else { return Ok(None) };
    if let Some(bound) = bound
        && current.is_some_and(|current| current.config.listen == config.listen)
    {
        return Ok(Some(bound.with_tls(tls)));
    }
    let encrypted = tls.is_some();
    let listener = Listener::bind(address, tls)?;
    info!(address = listener.address(), tls = encrypted, "listening");
    Ok(Some(listener))
}

/// The senders to dial, with the authorities to trust there.
fn dials(config: &ReceiveConfig) -> Result<Vec<Dial>, TlsError> {
    config.dials.iter().cloned().map(Dial::new).collect()
}

/// A destination that works.
struct Store {
    profile: Profile,
    queue: Arc<Queue>,
    /// Not the shutdown's own token: while connections drain, the destination works on.
    stop: CancellationToken,
    writing: JoinHandle<()>,
}

impl Store {
    fn start(destination: Destination, queue: Arc<Queue>) -> Store {
        let (profile, stop) = (destination.profile(), CancellationToken::new());
        let writing = tokio::spawn(destination.run(Arc::clone(&queue), stop.clone()));
        Store { profile, queue, stop, writing }
    }

    /// Lets it finish what it has begun.
    async fn close(self) {
        self.queue.close();
        self.stop.cancel();
        match tokio::time::timeout(DESTINATION_TIMEOUT, self.writing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%error, "the destination ended unexpectedly"),
            Err(_) => warn!("the destination did not end in time; unanswered lines are sent again"),
        }
    }
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
            metrics: None,
        }
    }

    fn unchanged() -> anyhow::Result<ReceiveConfig> {
        bail!("nobody sends SIGHUP here")
    }

    #[tokio::test]
    async fn it_ends_with_the_shutdown_and_leaves_no_socket() {
        let dir = tempfile::tempdir().expect("tempdir");
        let config = config(&dir);
        tokens::mint(&config.tokens, "web-1", tokens::Terms::default()).expect("mint");
        let shutdown = Shutdown::new();
        let running = tokio::spawn(run(config, shutdown.clone(), unchanged));
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
        let error =
            run(config, Shutdown::new(), unchanged).await.expect_err("no tokens").to_string();
        assert!(error.contains("waybill token"), "{error}");
    }
}
