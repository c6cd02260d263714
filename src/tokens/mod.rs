//! The tokens file: who may enter. Written by `waybill token`, read by the side that listens; a
//! receiver that dials takes a sender's id from it.
//!
//! It holds hashes of tokens only, so a copy of it lets nobody in. Chain keys stand in it as they are: a
//! code made with a key is checked with the same key. It is replaced as a whole and durably:
//! whoever reads it meets the old one or the new one.

pub mod watch;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use thiserror::Error;

use crate::descriptors;
use crate::protocol::ChainKey;
use crate::record::{DEFAULT_TYPES, SenderId, TypeName};
use crate::tls::Fingerprint;

/// What a token starts with, so that scanners for leaked secrets can know it.
const TOKEN_PREFIX: &str = "wb_";

/// Mode of a new tokens file: its owner alone.
const FILE_MODE: u32 = 0o600;

/// Mode of one that a service's group reads.
const SERVICE_MODE: u32 = 0o640;

/// What those who are neither owner nor group may do: nothing, once the file holds a secret.
const OTHERS: u32 = 0o007;

const HEADER: &str = "\
# Who may enter here, and a receiver's senders. `waybill token NAME --tokens FILE` adds an entry, and
# rewrites this file. Edits by hand are taken over within seconds; comments are lost at the next rewrite.
";

/// What a person does where a file with a token cannot be read; `peer` is where tokens are minted.
pub fn file_advice(error: &io::Error, peer: &str) -> String {
    match descriptors::advice(error) {
        Some(advice) => advice.to_owned(),
        None => format!("mint a token at the {peer} with `waybill token NAME`"),
    }
}

/// SHA-256 of a token.
pub type TokenHash = [u8; 32];

/// The entry of one sender, or of one receiver that dials a sender.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Unique in the file; may be changed at will.
    pub name: String,
    /// Minted with the first token; never changes, because document ids depend on a sender's.
    pub id: SenderId,
    /// SHA-256 of the token in lower-case hexadecimal.
    #[serde(with = "hexadecimal")]
    pub sha256: TokenHash,
    /// Types that a sender may use; where missing, [`DEFAULT_TYPES`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub types: Option<Vec<TypeName>>,
    /// Client certificates of which one must come with the token; where empty, none need.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "fingerprints")]
    pub certificates: Vec<Fingerprint>,
    /// What the sender must prove to have beside the token; where missing, the token is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain_key: Option<ChainKey>,
    /// When the token was minted.
    pub created: Timestamp,
    /// From when on it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Timestamp>,
}

impl Entry {
    /// Whether its token lets in at this instant.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }

    /// Whether the token may be shown with this client certificate, or without any.
    pub fn accepts(&self, certificate: Option<&Fingerprint>) -> bool {
        self.certificates.is_empty()
            || certificate.is_some_and(|shown| self.certificates.contains(shown))
    }

    /// The types that the sender may use.
    pub fn allowed_types(&self) -> Vec<TypeName> {
        let default = || DEFAULT_TYPES.iter().filter_map(|name| name.parse().ok()).collect();
        self.types.clone().unwrap_or_else(default)
    }
}

/// What is wrong with a tokens file or with what was asked of it.
#[derive(Debug, Error)]
pub enum TokensError {
    /// It is not there.
    #[error("tokens file {0:?} does not exist: make it with `waybill token NAME --tokens FILE`")]
    Missing(PathBuf),
    /// It cannot be read or replaced.
    #[error("tokens file {file:?}: {what}: {source}")]
    Io {
        /// Its path.
        file: PathBuf,
        /// What was tried.
        what: &'static str,
        /// From the operating system.
        source: io::Error,
    },
    /// It is not what a tokens file looks like.
    #[error("tokens file {file:?} is broken: {reason}")]
    Broken {
        /// Its path.
        file: PathBuf,
        /// Line, column and what is wrong there.
        reason: String,
    },
    /// A token of this name is there.
    #[error(
        "{0:?} has a token already: use --rotate to replace it, or choose another name; a file into which \
         this output was to go is empty now"
    )]
    Exists(String),
    /// No token of this name is there.
    #[error("{name:?} has no token in {file:?}: --list shows the names")]
    Unknown {
        /// As asked for.
        name: String,
        /// The file's path.
        file: PathBuf,
    },
    /// A name must be something that a person can tell apart.
    #[error("name {0:?} must be 1 to 128 characters without control characters")]
    Name(String),
    /// The token would be refused from the start.
    #[error("the token would expire at {0}, which is over: choose a later time")]
    Expired(Timestamp),
    /// The system gave no random bytes.
    #[error("the system has no random bytes for a token: {0}")]
    Random(getrandom::Error),
}

/// The entries of a tokens file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tokens {
    entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    token: Vec<Entry>,
}

impl Tokens {
    /// Reads a file.
    pub fn load(file: &Path) -> Result<Tokens, TokensError> {
        let text = std::fs::read_to_string(file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => TokensError::Missing(file.to_owned()),
            _ => TokensError::Io { file: file.to_owned(), what: "cannot be read", source },
        })?;
        Tokens::parse(&text).map_err(|reason| TokensError::Broken { file: file.to_owned(), reason })
    }

    fn parse(text: &str) -> Result<Tokens, String> {
        let document: Document = toml::from_str(text).map_err(|error| error.to_string())?;
        let (mut names, mut hashes) = (HashSet::new(), HashSet::new());
        for entry in &document.token {
            check_name(&entry.name).map_err(|error| error.to_string())?;
            if !names.insert(&entry.name) {
                return Err(format!("two entries have the name {:?}", entry.name));
            }
            if !hashes.insert(entry.sha256) {
                return Err(format!("{:?} has the same token as an entry before", entry.name));
            }
        }
        Ok(Tokens { entries: document.token })
    }

    /// All entries, in the file's order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The valid entry of a token. Every entry is compared in constant time, so that the time it
    /// takes says nothing about hashes.
    pub fn find(&self, hash: &TokenHash, now: Timestamp) -> Option<&Entry> {
        let mut found = None;
        for entry in &self.entries {
            if bool::from(entry.sha256.ct_eq(hash)) {
                found = Some(entry);
            }
        }
        found.filter(|entry| entry.is_valid(now))
    }

    /// The valid entry of this name.
    pub fn named(&self, name: &str, now: Timestamp) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name).filter(|entry| entry.is_valid(now))
    }

    /// When the next valid token expires.
    pub fn next_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        let valid = self.entries.iter().filter(|entry| entry.is_valid(now));
        valid.filter_map(|entry| entry.expires).min()
    }
}

/// SHA-256 of a token's text.
pub fn hash(token: &str) -> TokenHash {
    Sha256::digest(token.as_bytes()).into()
}

/// What goes with a token besides its sender. Where nothing is said, a new entry takes the default
/// and a rotated one keeps what it has, but for the expiry, which is the token's own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Terms {
    /// Types that the sender may use.
    pub types: Option<Vec<TypeName>>,
    /// Client certificates of which one must come with the token.
    pub certificates: Vec<Fingerprint>,
    /// What the sender must prove to have beside the token.
    pub chain: ChainTerm,
    /// From when on it is refused.
    pub expires: Option<Timestamp>,
}

/// What becomes of an entry's chain key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ChainTerm {
    /// It stays as it is: none, in a new entry.
    #[default]
    Keep,
    /// This is the key from now on.
    Require(ChainKey),
    /// The token is enough from now on.
    Drop,
}

impl ChainTerm {
    fn over(self, known: Option<ChainKey>) -> Option<ChainKey> {
        match self {
            ChainTerm::Keep => known,
            ChainTerm::Require(key) => Some(key),
            ChainTerm::Drop => None,
        }
    }
}

/// Adds an entry with a fresh sender id and gives its token, which is kept nowhere.
pub fn mint(file: &Path, name: &str, terms: Terms) -> Result<String, TokensError> {
    check_name(name)?;
    let Terms { types, certificates, chain, expires } = terms;
    check_expiry(expires)?;
    edit(file, true, |tokens| {
        if tokens.entries.iter().any(|entry| entry.name == name) {
            return Err(TokensError::Exists(name.to_owned()));
        }
        let token = random_token()?;
        tokens.entries.push(Entry {
            name: name.to_owned(),
            id: SenderId::mint(),
            sha256: hash(&token),
            types,
            certificates,
            chain_key: chain.over(None),
            created: Timestamp::now(),
            expires,
            revoked: None,
        });
        Ok(token)
    })
}

/// Replaces the token of an entry, which keeps its sender id, and lifts a revocation.
pub fn rotate(file: &Path, name: &str, terms: Terms) -> Result<String, TokensError> {
    let Terms { types, certificates, chain, expires } = terms;
    check_expiry(expires)?;
    edit(file, false, |tokens| {
        let entry = entry_of(tokens, name, file)?;
        let token = random_token()?;
        entry.sha256 = hash(&token);
        entry.created = Timestamp::now();
        entry.expires = expires;
        entry.revoked = None;
        if types.is_some() {
            entry.types = types;
        }
        if !certificates.is_empty() {
            entry.certificates = certificates;
        }
        entry.chain_key = chain.over(entry.chain_key.take());
        Ok(token)
    })
}

/// Marks an entry's token as revoked; its live connections end within seconds. The entry stays,
/// because its sender id does.
pub fn revoke(file: &Path, name: &str) -> Result<(), TokensError> {
    edit(file, false, |tokens| {
        let entry = entry_of(tokens, name, file)?;
        entry.revoked.get_or_insert_with(Timestamp::now);
        Ok(())
    })
}

fn entry_of<'a>(
    tokens: &'a mut Tokens,
    name: &str,
    file: &Path,
) -> Result<&'a mut Entry, TokensError> {
    let entry = tokens.entries.iter_mut().find(|entry| entry.name == name);
    entry.ok_or_else(|| TokensError::Unknown { name: name.to_owned(), file: file.to_owned() })
}

fn check_name(name: &str) -> Result<(), TokensError> {
    if (1..=128).contains(&name.chars().count()) && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(TokensError::Name(name.to_owned()))
    }
}

fn check_expiry(expires: Option<Timestamp>) -> Result<(), TokensError> {
    match expires {
        Some(expires) if expires <= Timestamp::now() => Err(TokensError::Expired(expires)),
        _ => Ok(()),
    }
}

fn random_token() -> Result<String, TokensError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(TokensError::Random)?;
    Ok(format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)))
}

/// Reads, changes and replaces the file. Others that edit wait; nothing is written where `change`
/// fails.
fn edit<T>(
    file: &Path,
    create: bool,
    change: impl FnOnce(&mut Tokens) -> Result<T, TokensError>,
) -> Result<T, TokensError> {
    // A link to the file stays a link.
    let file = &std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let fault =
        |what| move |source: io::Error| TokensError::Io { file: file.to_owned(), what, source };
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // The folder is locked, because the file itself is another one after each rename.
    let directory = File::open(folder).map_err(fault("its folder cannot be opened"))?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)
        .map_err(|error| fault("cannot be locked")(error.into()))?;
    let mut tokens = match Tokens::load(file) {
        Err(TokensError::Missing(_)) if create => Tokens::default(),
        loaded => loaded?,
    };
    let done = change(&mut tokens)?;
    replace(file, folder, &tokens).map_err(fault("cannot be replaced"))?;
    directory.sync_all().map_err(fault("its folder cannot be synced"))?;
    Ok(done)
}

fn replace(file: &Path, folder: &Path, tokens: &Tokens) -> io::Result<()> {
    let document = Document { token: tokens.entries.clone() };
    let body = toml::to_string(&document).map_err(io::Error::other)?;
    let mut fresh = tempfile::Builder::new().prefix(".waybill-tokens").tempfile_in(folder)?;
    fresh.write_all(format!("{HEADER}\n{body}").as_bytes())?;
    match std::fs::metadata(file) {
        // The receiver's user must still be able to read what an administrator edits.
        Ok(old) => {
            std::os::unix::fs::fchown(fresh.as_file(), Some(old.uid()), Some(old.gid())).or_else(
                |error| match fresh.as_file().metadata() {
                    Ok(new) if (new.uid(), new.gid()) == (old.uid(), old.gid()) => Ok(()),
                    _ => Err(error),
                },
            )?;
            let mut mode = old.mode() & 0o7777;
            if tokens.entries.iter().any(|entry| entry.chain_key.is_some()) {
                mode &= !OTHERS;
            }
            fresh.as_file().set_permissions(std::fs::Permissions::from_mode(mode))?;
        }
        Err(_) => {
            let mode = match service_group(folder)? {
                Some(group) => {
                    std::os::unix::fs::fchown(fresh.as_file(), None, Some(group))?;
                    SERVICE_MODE
                }
                None => FILE_MODE,
            };
            fresh.as_file().set_permissions(std::fs::Permissions::from_mode(mode))?;
        }
    }
    fresh.as_file().sync_all()?;
    fresh.persist(file).map_err(|error| error.error)?;
    Ok(())
}

/// The group that reads what root puts into this folder, where it is another's than root's and the folder is closed
/// to all others: that of the service, as the package makes /etc/waybill.
fn service_group(folder: &Path) -> io::Result<Option<u32>> {
    const GROUP_READS: u32 = 0o050;
    let folder = std::fs::metadata(folder)?;
    let is_closed = folder.mode() & OTHERS == 0 && folder.mode() & GROUP_READS == GROUP_READS;
    let is_service = rustix::process::geteuid().is_root() && folder.gid() != 0 && is_closed;
    Ok(is_service.then(|| folder.gid()))
}

mod hexadecimal {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::TokenHash;

    pub fn serialize<S: Serializer>(hash: &TokenHash, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&text(hash))
    }

    pub fn text(hash: &[u8; 32]) -> String {
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TokenHash, D::Error> {
        let text = String::deserialize(from)?;
        parse(&text).ok_or_else(|| D::Error::custom("sha256 must be 64 hexadecimal digits"))
    }

    pub fn parse(text: &str) -> Option<[u8; 32]> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16);
            *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
        }
        Some(hash)
    }
}

/// With colons or without, so that what openssl prints can be pasted.
mod fingerprints {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::{Fingerprint, hexadecimal};

    pub fn serialize<S: Serializer>(all: &[Fingerprint], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(all.iter().map(hexadecimal::text))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Fingerprint>, D::Error> {
        let all = Vec::<String>::deserialize(from)?;
        let read = |text: &String| hexadecimal::parse(&text.replace(':', ""));
        let fault = "certificates must be SHA-256 fingerprints, 64 hexadecimal digits each: \
                     openssl x509 -in FILE -noout -fingerprint -sha256";
        all.iter().map(|text| read(text).ok_or_else(|| D::Error::custom(fault))).collect()
    }
}
