//! Dialling receivers, again and again: one at a time in their order, or all of them at once.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::connection::{Connections, Ended, GreetError, Greeted};
use crate::clock;
use crate::config::{DialConfig, Endpoint};
use crate::protocol::SUBPROTOCOL;
use crate::record::escape_path;
use crate::tls::ClientTrust;
use crate::tokens::file_advice;
use crate::transport::{CONNECT_TIMEOUT, ConnectError, Offer, Pause, Retry, connect};

/// Why there is no link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The token cannot be read.
    #[error("token file {path}: {source}; {}", file_advice(source, "receiver"))]
    TokenFile {
        /// As configured.
        path: String,
        /// From the operating system.
        source: std::io::Error,
    },
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Connected, and no understanding.
    #[error(transparent)]
    Greeting(#[from] GreetError),
}

impl LinkError {
    /// Whether trying again is of no use before a person mends something.
    fn needs_a_person(&self) -> bool {
        match self {
            LinkError::TokenFile { .. } => true,
            LinkError::Connect(error) => error.needs_a_person(),
            LinkError::Greeting(error) => error.needs_a_person(),
        }
    }

    /// Whether a script had better hear of it than wait: what answers there is no receiver.
    fn ends_once(&self) -> bool {
        let elsewhere = matches!(self, LinkError::Connect(ConnectError::NotWaybill { .. }));
        elsewhere || self.needs_a_person()
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            LinkError::Connect(error) => error.retry_after(),
            _ => None,
        }
    }
}

/// Dials until stopped.
pub struct Dialler {
    /// What to dial, and how.
    pub config: DialConfig,
    /// TLS for `wss://` endpoints.
    pub trust: Option<Arc<ClientTrust>>,
    /// What to do with a connection.
    pub connections: Arc<Connections>,
    /// Rung by streams that have something to send.
    pub wanted: Arc<Notify>,
    /// An error that only a person can mend is the end: a script must not wait for one.
    pub once: bool,
}

impl Dialler {
    /// Runs until stopped; where `once` says so, until no receiver is left that could be reached
    /// without a person.
    pub async fn run(self) -> Result<(), LinkError> {
        let dialler = Arc::new(self);
        let mut loops = JoinSet::new();
        let size = if dialler.config.balance { 1 } else { dialler.config.to.len() };
        for endpoints in dialler.config.to.chunks(size) {
            let (dialler, endpoints) = (dialler.clone(), endpoints.to_vec());
            loops.spawn(async move { dialler.keep_connected(&endpoints).await });
        }
        let mut last = Ok(());
        while let Some(ended) = loops.join_next().await {
            match ended {
                Ok(ended) => last = ended,
                Err(error) => error!(%error, "dialling ended unexpectedly"),
            }
        }
        last
    }

    /// Keeps one connection to one of these, the first that answers. While a receiver drains, the
    /// next one is dialled already.
    async fn keep_connected(&self, endpoints: &[Endpoint]) -> Result<(), LinkError> {
        let stop = &self.connections.stop;
        let mut retry = Retry::new();
        let mut at = 0;
        let clocks: Vec<_> = endpoints.iter().map(|_| clock::Watch::default()).collect();
        let mut leaving = JoinSet::new();
        while !stop.is_cancelled() {
            let (endpoint, clock) =
                (&endpoints[at % endpoints.len()], &clocks[at % endpoints.len()]);
            let connected = tokio::select! {
                () = stop.cancelled() => break,
                connected = self.connect(endpoint, clock) => connected,
            };
            let delay = match connected {
                Ok(greeted) => {
                    retry.connected();
                    let welcome = &greeted.welcome;
                    info!(receiver = %endpoint.url, name = welcome.name, sender = %welcome.sender,
                        "connected");
                    let open = self.connections.open(endpoint.url.clone(), greeted);
                    let link = open.link();
                    let connections = self.connections.clone();
                    let idle_close = self.config.idle_close;
                    let mut serving = tokio::spawn(async move {
                        connections.serve(open, idle_close, std::future::pending()).await
                    });
                    let ended = tokio::select! {
                        ended = &mut serving => Some(ended.unwrap_or(Ended::Early)),
                        () = link.draining.cancelled() => None,
                    };
                    at = 0;
                    match ended {
                        None => {
                            leaving.spawn(serving);
                            at = endpoints.iter().position(|e| e == endpoint).unwrap_or(0) + 1;
                            Duration::ZERO
                        }
                        Some(Ended::Idle) => {
                            info!("closed the idle connection");
                            tokio::select! {
                                () = stop.cancelled() => break,
                                () = self.wanted.notified() => Duration::ZERO,
                            }
                        }
                        Some(Ended::AfterReceipts) => retry.ended(true),
                        Some(Ended::Early) => retry.ended(false),
                    }
                }
                Err(error) => {
                    self.connections.metrics.connection_failures.add(1);
                    if self.once && error.ends_once() && retry.failures() + 1 >= endpoints.len() {
                        return Err(error);
                    }
                    let slowly = error.needs_a_person();
                    let Pause { delay, tell } = retry.failed(slowly, error.retry_after());
                    let round_is_over = retry.failures().is_multiple_of(endpoints.len());
                    let delay = if round_is_over { delay } else { Duration::ZERO };
                    if tell {
                        warn!(receiver = %endpoint.url, retry_in = ?delay, "{error}");
                    }
                    at += 1;
                    delay
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(delay) => {}
                // The receiver that sent us away for a while has ended: its successor may be there.
                () = all_ended(&mut leaving), if !leaving.is_empty() => {}
            }
        }
        all_ended(&mut leaving).await;
        Ok(())
    }

    /// Dials, says `hello` and hears `welcome`.
    async fn connect(
        &self,
        endpoint: &Endpoint,
        clock: &clock::Watch,
    ) -> Result<Greeted, LinkError> {
        let path = &self.config.token_file;
        let token = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| LinkError::TokenFile { path: escape_path(path), source })?;
        let tls = self.trust.as_ref().filter(|_| endpoint.tls).map(|trust| trust.config());
        let offer = Offer::new(token.trim(), SUBPROTOCOL);
        let connected = connect(endpoint, tls, &offer, CONNECT_TIMEOUT).await;
        let socket = connected.map_err(|error| error.trusting(self.config.ca.as_deref()))?;
        clock.look(&endpoint.url, "the receiver's", socket.date());
        Ok(self.connections.greet(&endpoint.url, socket).await?)
    }
}

async fn all_ended<T: 'static>(tasks: &mut JoinSet<T>) {
    while tasks.join_next().await.is_some() {}
}
