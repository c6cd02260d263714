//! What is decided at the HTTP request, before any WebSocket byte: who may come in.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tracing::info;

use super::Receiver;
use super::session::Sender;
use super::text;
use crate::protocol::{Challenge, SUBPROTOCOL, TEXT_SUBPROTOCOL, TYPES_HEADER_BYTES_MAX};
use crate::record::{SenderId, TypeName};
use crate::tls::{self, Fingerprint};
use crate::tokens::{self, Entry, TokenHash, Tokens};
use crate::transport::{Answer, Peer, Refuse, Request};

/// How many connections one sender may have.
const CONNECTIONS_MAX: usize = 16;

/// What a refused sender is asked to wait where waiting helps.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why a client without `hello` cannot use such a token.
const CHAINED_TEXT: &str = "this token is bound to a chain key, which waybill.text.v1 cannot prove: \
                            use a token without one (waybill token NAME --rotate --no-chain-key)\n";

/// A sender that is known.
#[derive(Debug)]
pub struct Accepted {
    pub(super) sender: Sender,
    pub(super) proof: Proof,
    /// Its address, or the URL that was dialled, for the log.
    pub(super) peer: String,
    pub(super) speaks: Speaks,
    /// What its `hello` is to answer.
    pub(super) challenge: Challenge,
    /// Held while the connection lives; none for one that was dialled, which is one of few.
    pub(super) _slot: Option<Slot>,
}

/// By what a sender is known.
#[derive(Debug)]
pub(super) enum Proof {
    /// It showed the token of this hash.
    Token {
        hash: TokenHash,
        /// The client certificate that came with it.
        certificate: Option<Fingerprint>,
    },
    /// It was dialled, at the address that the configuration gives under this name.
    Address,
}

impl Accepted {
    /// What the tokens file says of it now; `None` where it may no longer send.
    pub(super) fn entry<'t>(&self, tokens: &'t Tokens, now: Timestamp) -> Option<&'t Entry> {
        match &self.proof {
            Proof::Token { hash, .. } => tokens.find(hash, now),
            Proof::Address => tokens.named(&self.sender.name, now),
        }
    }

    /// Whether this entry lets it in on the same terms.
    pub(super) fn is_of(&self, entry: &Entry) -> bool {
        let accepts = match &self.proof {
            Proof::Token { certificate, .. } => entry.accepts(certificate.as_ref()),
            Proof::Address => true,
        };
        accepts && Sender::of(entry) == self.sender
    }
}

/// The subprotocol of a connection.
#[derive(Clone, Debug)]
pub(super) enum Speaks {
    /// `waybill.v1`.
    Frames,
    /// `waybill.text.v1`.
    Lines(text::Origin),
}

impl Speaks {
    fn subprotocol(&self) -> &'static str {
        match self {
            Speaks::Frames => SUBPROTOCOL,
            Speaks::Lines(_) => TEXT_SUBPROTOCOL,
        }
    }
}

impl Sender {
    pub(super) fn of(entry: &Entry) -> Sender {
        Sender {
            id: entry.id,
            name: entry.name.clone(),
            types: entry.allowed_types(),
            chain_key: entry.chain_key.clone(),
        }
    }

    /// What [`crate::protocol::TYPES_HEADER`] says of it.
    fn types_header(&self) -> Option<String> {
        let types: Vec<&str> = self.types.iter().map(TypeName::as_str).collect();
        Some(types.join(",")).filter(|list| list.len() <= TYPES_HEADER_BYTES_MAX)
    }
}

/// Decides about one request.
pub(super) fn answer(receiver: &Receiver, request: &Request) -> Answer<Accepted> {
    if !request.is_upgrade() {
        return Answer::Refuse(plain(receiver, request));
    }
    match admit(receiver, request) {
        Ok(session) => {
            let says_hello = matches!(session.speaks, Speaks::Frames);
            let asks = says_hello && session.sender.asks();
            let challenge = asks.then(|| session.challenge.clone());
            let types = says_hello.then(|| session.sender.types_header()).flatten();
            Answer::Accept { subprotocol: session.speaks.subprotocol(), challenge, types, session }
        }
        Err(refuse) => {
            receiver.metrics.refused(refuse.status);
            info!(peer = %request.peer(), status = refuse.status, why = refuse.body.trim_end(), "refused");
            Answer::Refuse(refuse)
        }
    }
}

/// Requests that ask for no WebSocket: health, and a word to those who are lost.
fn plain(receiver: &Receiver, request: &Request) -> Refuse {
    match (request.is_get(), request.path()) {
        (true, "/health/live") => Refuse::new(200, "live\n"),
        (true, "/health/ready") => match receiver.not_ready() {
            Some(why) => Refuse::new(503, format!("{why}\n")),
            None => Refuse::new(200, "ready\n"),
        },
        (true, _) => Refuse::new(426, "this is a Waybill receiver: it speaks WebSocket only\n"),
        (false, _) => Refuse::new(404, "this is a Waybill receiver: it takes no uploads\n"),
    }
}

fn admit(receiver: &Receiver, request: &Request) -> Result<Accepted, Refuse> {
    if receiver.shutdown.is_requested() {
        return Err(Refuse::later(503, "this receiver is stopping\n", RETRY_AFTER));
    }
    // A browser says where its page is from; a page has no business here, whatever it knows.
    if request.has_header("origin") {
        return Err(Refuse::new(403, "requests of web pages are refused (header Origin)\n"));
    }
    let (sender, proof) = authenticate(receiver, request)?;
    let speaks = if request.offers(SUBPROTOCOL) {
        Speaks::Frames
    } else if request.offers(TEXT_SUBPROTOCOL) {
        if sender.chain_key.is_some() {
            return Err(Refuse::new(403, CHAINED_TEXT));
        }
        Speaks::Lines(text::Origin::read(request.query(), &sender)?)
    } else {
        let text =
            format!("the subprotocols spoken here are {SUBPROTOCOL} and {TEXT_SUBPROTOCOL}\n");
        return Err(Refuse::new(400, text));
    };
    let slot = receiver.slots.take(sender.id).ok_or_else(|| {
        let text = format!("this sender has {CONNECTIONS_MAX} connections open already\n");
        Refuse::later(429, text, RETRY_AFTER)
    })?;
    let challenge = Challenge::mint().map_err(|_| {
        Refuse::later(503, "the receiver's system has no random bytes\n", RETRY_AFTER)
    })?;
    let peer = request.peer().to_string();
    Ok(Accepted { sender, proof, peer, speaks, challenge, _slot: Some(slot) })
}

fn authenticate(receiver: &Receiver, request: &Request) -> Result<(Sender, Proof), Refuse> {
    let mut tokens = Arc::clone(&receiver.tokens.borrow());
    let hash = request.bearer().map(tokens::hash);
    let is_unknown = |tokens: &Tokens, hash| tokens.find(&hash, Timestamp::now()).is_none();
    if hash.is_some_and(|hash| is_unknown(&tokens, hash)) && receiver.look_at_tokens() {
        tokens = Arc::clone(&receiver.tokens.borrow());
    }
    let found = hash.and_then(|hash| Some((hash, tokens.find(&hash, Timestamp::now())?)));
    let (hash, entry) = found
        .ok_or_else(|| Refuse::new(401, "the token is missing, unknown, expired or revoked\n"))?;
    let certificate = certificate(receiver, request);
    if !entry.accepts(certificate.as_ref()) {
        let why = match certificate {
            None => "this token needs its client certificate, and none was shown\n",
            Some(_) => "this token needs another client certificate than the one shown\n",
        };
        return Err(Refuse::new(403, why));
    }
    Ok((Sender::of(entry), Proof::Token { hash, certificate }))
}

/// The client certificate that our own TLS verified; else the one of which a proxy says that it
/// did. Over TCP anybody could say so, hence a proxy is heard over a Unix socket only.
fn certificate(receiver: &Receiver, request: &Request) -> Option<Fingerprint> {
    if let Some(own) = request.certificate() {
        return Some(tls::fingerprint(own));
    }
    let is_heard = receiver.trust_client_headers && request.peer() == Peer::Unix;
    if !is_heard || request.header("x-client-verify") != Some("SUCCESS") {
        return None;
    }
    // nginx's $ssl_client_escaped_cert: PEM, percent-encoded.
    let escaped = request.header("x-client-certificate")?;
    let pem: Vec<u8> = percent_encoding::percent_decode_str(escaped).collect();
    tls::fingerprint_of_pem(&pem)
}

/// Open connections per sender.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots(Arc<Mutex<HashMap<SenderId, usize>>>);

/// One of them; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Slots,
    sender: SenderId,
}

impl Slots {
    fn take(&self, sender: SenderId) -> Option<Slot> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(sender).or_default();
        if *count >= CONNECTIONS_MAX {
            return None;
        }
        *count += 1;
        Some(Slot { slots: self.clone(), sender })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.sender) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_comes_back_when_its_connection_ends() {
        let slots = Slots::default();
        let sender = SenderId::mint();
        let mut held: Vec<Slot> = (0..CONNECTIONS_MAX).filter_map(|_| slots.take(sender)).collect();
        assert_eq!(held.len(), CONNECTIONS_MAX);
        assert!(slots.take(sender).is_none());
        assert!(slots.take(SenderId::mint()).is_some(), "another sender");
        held.pop();
        assert!(slots.take(sender).is_some());
    }
}
