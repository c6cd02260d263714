//! Senders that are dialled, because this receiver is in a private network and they are not.
//!
//! A task for each. The sender is who its certificate says, under the entry of the tokens file that
//! the configuration gives its address; no token leaves before that certificate was checked.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::watch;
use tracing::{info, warn};

use super::connection::{self, Ended};
use super::gate::{Accepted, Proof, Speaks};
use super::session::Sender;
use super::{Receiver, Tokens};
use crate::clock;
use crate::config::DialledSender;
use crate::protocol::{Challenge, SUBPROTOCOL};
use crate::record::escape_path;
use crate::tls::{ClientTrust, TlsError};
use crate::tokens::file_advice;
use crate::transport::{CONNECT_TIMEOUT, ConnectError, Offer, Pause, Retry, Socket, connect};

/// One sender and how it is dialled.
#[derive(Debug)]
pub struct Dial {
    config: DialledSender,
    /// For `wss://`.
    trust: Option<Arc<ClientTrust>>,
}

#[derive(Debug, Error)]
enum DialError {
    #[error("token file {path}: {source}; {}", file_advice(source, "sender"))]
    TokenFile { path: String, source: std::io::Error },
    #[error("the system has no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl DialError {
    fn needs_a_person(&self) -> bool {
        match self {
            DialError::TokenFile { .. } => true,
            DialError::Random(_) => false,
            DialError::Connect(error) => error.needs_a_person(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            DialError::TokenFile { .. } | DialError::Random(_) => None,
            DialError::Connect(error) => error.retry_after(),
        }
    }
}

impl Dial {
    /// Reads the authorities to trust.
    pub fn new(config: DialledSender) -> Result<Dial, TlsError> {
        let trust = match config.endpoint.tls {
            true => Some(ClientTrust::open(config.ca.as_deref(), None)?),
            false => None,
        };
        Ok(Dial { config, trust })
    }

    /// Dials until the shutdown; a connection that is there then is drained.
    pub(super) async fn run(self, receiver: Arc<Receiver>) {
        let shutdown = receiver.shutdown.clone();
        let DialledSender { name, endpoint, .. } = &self.config;
        let mut tokens = receiver.tokens.clone();
        let mut retry = Retry::new();
        let clock = clock::Watch::default();
        loop {
            let attempt = async {
                let sender = entry(&mut tokens, name, &receiver.tokens_file).await;
                let challenge = Challenge::mint()?;
                let asked = sender.asks().then_some(&challenge);
                self.connect(asked).await.map(|socket| (sender, challenge, socket))
            };
            let attempt = tokio::select! {
                () = shutdown.requested() => return,
                attempt = attempt => attempt,
            };
            let delay = match attempt {
                Ok((sender, challenge, socket)) => {
                    retry.connected();
                    info!(sender = name, url = %endpoint.url, "dialled");
                    clock.look(&endpoint.url, "the sender's", socket.date());
                    let accepted = Accepted {
                        sender,
                        proof: Proof::Address,
                        peer: endpoint.url.clone(),
                        speaks: Speaks::Frames,
                        challenge,
                        _slot: None,
                    };
                    match connection::serve(Arc::clone(&receiver), accepted, socket).await {
                        Ended::AfterReceipts => retry.ended(true),
                        Ended::Early => retry.ended(false),
                        Ended::SentAway => retry.failed(true, None).delay,
                    }
                }
                Err(error) => {
                    let slowly = error.needs_a_person();
                    let Pause { delay, tell } = retry.failed(slowly, error.retry_after());
                    if tell {
                        warn!(sender = name, url = %endpoint.url, retry_in = ?delay, "{error}");
                    }
                    delay
                }
            };
            tokio::select! {
                () = shutdown.requested() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    async fn connect(&self, challenge: Option<&Challenge>) -> Result<Socket, DialError> {
        let path = &self.config.token_file;
        let token = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| DialError::TokenFile { path: escape_path(path), source })?;
        let (endpoint, tls) =
            (&self.config.endpoint, self.trust.as_ref().map(|trust| trust.config()));
        let offer = Offer { challenge, ..Offer::new(token.trim(), SUBPROTOCOL) };
        let connected = connect(endpoint, tls, &offer, CONNECT_TIMEOUT).await;
        Ok(connected.map_err(|error| error.trusting(self.config.ca.as_deref()))?)
    }
}

/// Waits for a valid entry of this name, and says so. Dropping the future loses nothing.
async fn entry(tokens: &mut watch::Receiver<Arc<Tokens>>, name: &str, file: &Path) -> Sender {
    let mut waits = false;
    loop {
        if let Some(entry) = tokens.borrow_and_update().named(name, Timestamp::now()) {
            return Sender::of(entry);
        }
        if !std::mem::replace(&mut waits, true) {
            warn!(
                sender = name, file = %escape_path(file),
                "not dialled: no valid entry has this name; `waybill token NAME --tokens FILE` \
                 makes one"
            );
        }
        if tokens.changed().await.is_err() {
            // Nobody looks at the file any more: this process ends.
            std::future::pending::<()>().await;
        }
    }
}
