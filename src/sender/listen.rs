//! The side that is dialled: which receivers may take the lines, and which of them does.
//!
//! One receiver at a time is served. A further connection under its token takes over at once: the
//! old one may be half-open, which only time would tell. One under another token is asked to wait:
//! it stands by.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::connection::{Close, Connections, GreetError};
use crate::config::{Listen, ListenConfig};
use crate::protocol::{SUBPROTOCOL, TOKEN_LETS_IN};
use crate::record::{SenderId, escape_path};
use crate::tls::{ServerCertificate, TlsError};
use crate::tokens::{self, Entry, TokenHash, Tokens, TokensError};
use crate::transport::{
    Answer, BindError, Handler, Listener, Peer, Refuse, Request, Socket, close,
};

/// What a receiver that stands by is asked to wait.
const STANDBY: Duration = Duration::from_secs(5);

/// Why a sender cannot be dialled.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The tokens file cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// A bound address; clones share it, from one configuration to the next.
#[derive(Clone)]
pub struct Address {
    listen: Listen,
    listener: Listener,
}

impl Address {
    /// What receivers are shown.
    pub fn certificate(&self) -> Option<Arc<ServerCertificate>> {
        self.listener.certificate().cloned()
    }
}

/// A bound address to which receivers connect, and who may.
pub struct Listening {
    config: ListenConfig,
    listener: Listener,
    tokens: watch::Receiver<Arc<Tokens>>,
    tokens_changed: watch::Sender<Arc<Tokens>>,
}

impl Listening {
    /// Reads the files and binds, where `current` is not bound there already.
    pub fn open(config: ListenConfig, current: Option<&Address>) -> Result<Listening, ListenError> {
        let known = current.and_then(|current| current.listener.certificate());
        let tls = ServerCertificate::again(known, config.tls.as_ref(), None)?;
        let tokens = Tokens::load(&config.tokens)?;
        if tokens.entries().is_empty() {
            warn!(file = %escape_path(&config.tokens), "no tokens: no receiver may enter until `waybill token` mints one");
        }
        let (tokens_changed, tokens) = watch::channel(Arc::new(tokens));
        let listener = match current.filter(|current| current.listen == config.listen) {
            Some(current) => current.listener.with_tls(tls),
            None => {
                let encrypted = tls.is_some();
                let listener = Listener::bind(&config.listen, tls)?;
                info!(address = listener.address(), tls = encrypted, "listening for a receiver");
                listener
            }
        };
        Ok(Listening { config, listener, tokens, tokens_changed })
    }

    /// For a successor that listens at the same address.
    pub fn address(&self) -> Address {
        Address { listen: self.config.listen.clone(), listener: self.listener.clone() }
    }

    /// Serves one receiver after another until stopped.
    pub async fn run(self, connections: Connections) {
        let Listening { config, listener, tokens, tokens_changed } = self;
        let stop = &connections.stop;
        let watching = tokens::watch::run(
            config.tokens,
            tokens_changed,
            tokens::watch::INTERVAL,
            stop.clone(),
        );
        let watching = tokio::spawn(watching);
        let (callers, mut calls) = mpsc::channel(1);
        let admission = Arc::new(Admission { tokens, seat: Arc::default(), callers });
        let listening =
            tokio::spawn(listener.run(Arc::clone(&admission), TaskTracker::new(), stop.clone()));
        let mut next = None;
        loop {
            let caller = match next.take() {
                Some(caller) => caller,
                None => tokio::select! {
                    () = stop.cancelled() => break,
                    Some(caller) = calls.recv() => caller,
                },
            };
            next = serve(&connections, &admission.tokens, caller, &mut calls).await;
        }
        // The file of a Unix socket goes with the last of its listeners.
        let _ = tokio::join!(watching, listening);
    }
}

/// Serves a receiver until it is gone; gives the one that takes over from it, if that is why.
async fn serve(
    connections: &Connections,
    tokens: &watch::Receiver<Arc<Tokens>>,
    caller: Caller,
    calls: &mut mpsc::Receiver<Caller>,
) -> Option<Caller> {
    let Caller { guest, socket } = caller;
    let Guest { name, hash, peer, seat: _seat } = guest;
    let mut next = None;
    {
        let close = async {
            tokio::select! {
                Some(caller) = calls.recv() => {
                    next = Some(caller);
                    let reason = "another connection under this token takes over";
                    Close { code: close::POLICY, reason }
                }
                () = ended(tokens.clone(), &hash) => {
                    let reason = "the token was revoked, replaced or has expired";
                    Close { code: close::POLICY, reason }
                }
            }
        };
        let mut close = std::pin::pin!(close);
        let greeted = tokio::select! {
            greeted = connections.greet(&name, socket) => greeted,
            // Whoever is still silent needs no close frame.
            Close { reason, .. } = &mut close => Err(GreetError::Failed(reason.to_owned())),
            () = connections.stop.cancelled() => return None,
        };
        match greeted {
            Ok(greeted) => {
                let sender = greeted.welcome.sender;
                info!(receiver = name, %peer, name = greeted.welcome.name, %sender, "connected");
                let close = async {
                    let close = close.await;
                    info!(receiver = name, %peer, reason = close.reason, "closing");
                    close
                };
                let open = connections.open(name.clone(), greeted);
                connections.serve(open, None, close).await;
            }
            Err(error) => {
                connections.metrics.connection_failures.add(1);
                warn!(receiver = name, %peer, "{error}");
            }
        }
    }
    next
}

/// Why a receiver may not enter with the valid token of this entry. A sender asks for no client
/// certificate and no key, and must not let in by the token alone what is bound to one.
pub fn receiver_refusal(entry: &Entry) -> Option<&'static str> {
    if !entry.accepts(None) {
        return Some("this token needs its client certificate, which a sender cannot check");
    }
    entry.chain_key.as_ref().map(|_| {
        "this token is bound to a chain key, which a receiver cannot prove: use a token without \
         one (waybill token NAME --rotate --no-chain-key)"
    })
}

/// Waits until the token lets nobody in any more.
async fn ended(mut tokens: watch::Receiver<Arc<Tokens>>, hash: &TokenHash) {
    while tokens
        .borrow_and_update()
        .find(hash, Timestamp::now())
        .is_some_and(|entry| receiver_refusal(entry).is_none())
    {
        if tokens.changed().await.is_err() {
            // Nobody looks at the file any more: this process ends.
            std::future::pending::<()>().await;
        }
    }
}

/// A receiver that showed a valid token.
struct Guest {
    /// In the tokens file.
    name: String,
    hash: TokenHash,
    peer: Peer,
    /// Held while the connection lives.
    seat: Seat,
}

/// A receiver that has connected.
struct Caller {
    guest: Guest,
    socket: Socket,
}

/// Decides who may come in.
struct Admission {
    tokens: watch::Receiver<Arc<Tokens>>,
    seat: Arc<Mutex<Taken>>,
    callers: mpsc::Sender<Caller>,
}

impl Handler for Admission {
    type Session = Guest;

    fn answer(&self, request: &Request) -> Answer<Guest> {
        let answered = match request.is_upgrade() {
            true => self.admit(request).map(|session| Answer::Accept {
                subprotocol: SUBPROTOCOL,
                challenge: None,
                types: None,
                session,
            }),
            false => self.plain(request).map(Answer::Refuse),
        };
        answered.unwrap_or_else(|refuse| {
            let why = refuse.body.trim_end();
            info!(peer = %request.peer(), status = refuse.status, why, "refused");
            Answer::Refuse(refuse)
        })
    }

    async fn serve(self: Arc<Self>, guest: Guest, socket: Socket) {
        // Fails only when this sender stops.
        let _ = self.callers.send(Caller { guest, socket }).await;
    }
}

impl Admission {
    /// Requests that ask for no WebSocket. One with a token hears what an upgrade would, and no
    /// more; whoever has the seat keeps it.
    fn plain(&self, request: &Request) -> Result<Refuse, Refuse> {
        Ok(match (request.is_get(), request.path()) {
            (true, "/health/live") => Refuse::new(200, "live\n"),
            (true, _) if request.bearer().is_some() => {
                authenticate(&self.tokens.borrow(), request)?;
                Refuse::new(200, format!("{TOKEN_LETS_IN}\n"))
            }
            (true, _) => Refuse::new(426, "this is a Waybill sender: it speaks WebSocket only\n"),
            (false, _) => Refuse::new(404, "this is a Waybill sender: it takes no uploads\n"),
        })
    }

    fn admit(&self, request: &Request) -> Result<Guest, Refuse> {
        let tokens = Arc::clone(&self.tokens.borrow());
        let (hash, entry) = authenticate(&tokens, request)?;
        if !request.offers(SUBPROTOCOL) {
            return Err(Refuse::new(
                400,
                format!("the subprotocol spoken here is {SUBPROTOCOL}\n"),
            ));
        }
        let seat = take(&self.seat, entry.id).ok_or_else(|| {
            Refuse::later(503, "another receiver is connected: stand by\n", STANDBY)
        })?;
        Ok(Guest { name: entry.name.clone(), hash, peer: request.peer(), seat })
    }
}

/// The token that a request shows, and its entry.
fn authenticate<'a>(
    tokens: &'a Tokens,
    request: &Request,
) -> Result<(TokenHash, &'a Entry), Refuse> {
    // A browser says where its page is from; a page has no business here, whatever it knows.
    if request.has_header("origin") {
        return Err(Refuse::new(403, "requests of web pages are refused (header Origin)\n"));
    }
    let hash = request.bearer().map(tokens::hash);
    let found = hash.and_then(|hash| Some((hash, tokens.find(&hash, Timestamp::now())?)));
    let (hash, entry) = found
        .ok_or_else(|| Refuse::new(401, "the token is missing, unknown, expired or revoked\n"))?;
    match receiver_refusal(entry) {
        Some(why) => Err(Refuse::new(403, format!("{why}\n"))),
        None => Ok((hash, entry)),
    }
}

/// The entry that has the seat, and how many of its connections live: for a moment, the one that
/// takes over and the one that it takes over from.
type Taken = Option<(SenderId, usize)>;

/// Given back when dropped.
struct Seat(Arc<Mutex<Taken>>);

/// `None` where another entry has it.
fn take(seat: &Arc<Mutex<Taken>>, entry: SenderId) -> Option<Seat> {
    let mut taken = seat.lock().unwrap_or_else(PoisonError::into_inner);
    match &mut *taken {
        None => *taken = Some((entry, 1)),
        Some((holder, count)) if *holder == entry => *count += 1,
        Some(_) => return None,
    }
    Some(Seat(Arc::clone(seat)))
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.filter(|(_, count)| *count > 1).map(|(holder, count)| (holder, count - 1));
    }
}

#[cfg(test)]
mod tests;
