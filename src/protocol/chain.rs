//! The receipt-chained handshake: what makes a copied token worthless without its key.
//!
//! The receiver's half of the upgrade carries a [`Challenge`], fresh for each connection; `hello`
//! answers it with a [`Chain`]. Whether the answer is right depends on the key alone, never on what
//! either side remembers: lost receipts, lost state and restored backups lock nobody out.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The header of the upgrade that carries the challenge: of its answer where the receiver is
/// dialled, of its request where the receiver dials.
pub const CHALLENGE_HEADER: &str = "waybill-challenge";

/// Length of keys and challenges in bytes.
const SECRET_BYTES: usize = 32;

/// What no other use of a key begins with.
const LABEL: &[u8] = b"waybill.v1 chain";

/// The key of one sender, on both sides. Its text form is base64 (RFC 4648 §4), 44 characters.
#[derive(Clone, PartialEq, Eq)]
pub struct ChainKey([u8; SECRET_BYTES]);

/// What a receiver wants answered, in base64 on the wire. Never used twice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Challenge([u8; SECRET_BYTES]);

/// How `hello` answers the challenge.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Chain {
    /// Index of the last document of which this receiver sent a receipt; absent where none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<String>,
    /// Its id in text, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// HMAC-SHA256 over the challenge and both, in base64.
    pub mac: String,
}

impl ChainKey {
    /// A fresh random one.
    pub fn mint() -> Result<ChainKey, getrandom::Error> {
        random().map(ChainKey)
    }

    /// Reads the text form; white space around it is no part of it.
    pub fn parse(text: &str) -> Option<ChainKey> {
        decode(text.trim()).map(ChainKey)
    }

    /// The text form: a secret.
    pub fn text(&self) -> String {
        STANDARD.encode(self.0)
    }
}

impl fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChainKey(***)")
    }
}

impl Serialize for ChainKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text())
    }
}

impl<'de> Deserialize<'de> for ChainKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ChainKey, D::Error> {
        let text = String::deserialize(from)?;
        let fault = "a chain key must be 32 bytes in base64, 44 characters";
        ChainKey::parse(&text).ok_or_else(|| D::Error::custom(fault))
    }
}

impl Challenge {
    /// A fresh random one.
    pub fn mint() -> Result<Challenge, getrandom::Error> {
        random().map(Challenge)
    }

    /// Reads the header's value.
    pub fn parse(text: &str) -> Option<Challenge> {
        decode(text).map(Challenge)
    }

    /// The header's value.
    pub fn text(&self) -> String {
        STANDARD.encode(self.0)
    }
}

impl Chain {
    /// The answer of a sender that has this key; `last` is index and id of the last document that
    /// was receipted.
    pub fn answer(key: &ChainKey, challenge: &Challenge, last: Option<(String, String)>) -> Chain {
        let (index, id) = last.unzip();
        let tag = hmac::sign(&hmac_key(key), &message(challenge, index.as_deref(), id.as_deref()));
        Chain { index, id, mac: STANDARD.encode(tag) }
    }

    /// Whether who answered so has this key. Takes the same time whatever is wrong with the code.
    pub fn is_answer(&self, key: &ChainKey, challenge: &Challenge) -> bool {
        let Ok(mac) = STANDARD.decode(&self.mac) else { return false };
        let message = message(challenge, self.index.as_deref(), self.id.as_deref());
        hmac::verify(&hmac_key(key), &message, &mac).is_ok()
    }
}

fn hmac_key(key: &ChainKey) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &key.0)
}

/// `LABEL ‖ challenge ‖ length of index, u32 ‖ index ‖ length of id, u32 ‖ id`, big-endian; what is
/// absent has length 0.
fn message(challenge: &Challenge, index: Option<&str>, id: Option<&str>) -> Vec<u8> {
    let mut message = [LABEL, &challenge.0].concat();
    for text in [index, id] {
        let text = text.unwrap_or_default();
        // A control message is far shorter than 4 GiB.
        message.extend_from_slice(&(text.len() as u32).to_be_bytes());
        message.extend_from_slice(text.as_bytes());
    }
    message
}

fn random() -> Result<[u8; SECRET_BYTES], getrandom::Error> {
    let mut bytes = [0; SECRET_BYTES];
    getrandom::fill(&mut bytes).map(|()| bytes)
}

fn decode(text: &str) -> Option<[u8; SECRET_BYTES]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(index: &str, id: &str) -> Option<(String, String)> {
        Some((index.to_owned(), id.to_owned()))
    }

    #[test]
    fn only_the_same_key_challenge_and_document_prove_themselves() {
        let (key, other_key) = (ChainKey([1; 32]), ChainKey([2; 32]));
        let (challenge, other_challenge) = (Challenge([3; 32]), Challenge([4; 32]));
        for last in [None, last("waybill-app-2026.11.21", "AZLzpFtsCeIxdz4wBeoAAAAAAFVcYtz9")] {
            let chain = Chain::answer(&key, &challenge, last);
            assert!(chain.is_answer(&key, &challenge));
            assert!(!chain.is_answer(&other_key, &challenge));
            assert!(!chain.is_answer(&key, &other_challenge), "a replay");
            let claim = Chain { index: Some("another".to_owned()), ..chain.clone() };
            assert!(!claim.is_answer(&key, &challenge));
            for mac in ["", "?", "AAAA", &chain.mac[4..], &"A".repeat(4096)] {
                let forged = Chain { mac: mac.to_owned(), ..chain.clone() };
                assert!(!forged.is_answer(&key, &challenge), "{mac:?}");
            }
        }
    }

    #[test]
    fn no_byte_moves_from_the_index_to_the_id() {
        let (key, challenge) = (ChainKey([1; 32]), Challenge([3; 32]));
        let chain = Chain::answer(&key, &challenge, last("ab", "c"));
        let moved = Chain { index: Some("a".to_owned()), id: Some("bc".to_owned()), ..chain };
        assert!(!moved.is_answer(&key, &challenge));
    }

    #[test]
    fn keys_and_challenges_are_read_as_written_and_nothing_else_is() {
        let key = ChainKey::mint().expect("random bytes");
        assert_ne!(key, ChainKey::mint().expect("random bytes"));
        let text = key.text();
        assert_eq!(text.len(), 44);
        assert_eq!(ChainKey::parse(&format!(" {text}\n")), Some(key.clone()));
        assert!(!format!("{key:?}").contains(&text[..8]));
        for bad in
            ["", "\n", &text[..40], &format!("{text}{text}"), &text.replace('=', "!"), "wb_x"]
        {
            assert_eq!(ChainKey::parse(bad), None, "{bad:?}");
            assert_eq!(Challenge::parse(bad), None, "{bad:?}");
        }
        let challenge = Challenge::mint().expect("random bytes");
        assert_eq!(Challenge::parse(&challenge.text()), Some(challenge));
    }
}
