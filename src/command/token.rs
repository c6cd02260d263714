//! `waybill token`: mints, replaces, revokes and lists the tokens of a file.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use jiff::Timestamp;

use crate::protocol::ChainKey;
use crate::record::escape_path;
use crate::tokens::{self, ChainTerm, Terms, Tokens, TokensError};

/// What to do with a tokens file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TokenAction {
    /// A first token for a new sender.
    Mint {
        /// The sender's name.
        name: String,
        /// What goes with it.
        terms: Terms,
        /// Where a fresh chain key goes.
        chain_key: Option<PathBuf>,
    },
    /// Another token for a known sender; the old one ends.
    Rotate {
        /// The sender's name.
        name: String,
        /// What goes with it from now on.
        terms: Terms,
        /// Where a fresh chain key goes.
        chain_key: Option<PathBuf>,
    },
    /// The end of a sender's token.
    Revoke {
        /// The sender's name.
        name: String,
    },
    /// One line per entry.
    List,
}

/// Does it. A token goes to standard output alone on its line, once; words for a person go to
/// standard error.
pub fn run(file: &Path, action: TokenAction) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match action {
        TokenAction::Mint { name, terms, chain_key } => {
            let is_new = !file.exists();
            let token = enrol(chain_key, terms, |terms| tokens::mint(file, &name, terms))?;
            writeln!(out, "{token}")?;
            if is_new {
                // A path that was mistyped shows here.
                anstream::eprintln!("tokens file {} is new", escape_path(file));
            }
        }
        TokenAction::Rotate { name, terms, chain_key } => {
            let token = enrol(chain_key, terms, |terms| tokens::rotate(file, &name, terms))?;
            writeln!(out, "{token}")?;
        }
        TokenAction::Revoke { name } => {
            tokens::revoke(file, &name)?;
            anstream::eprintln!("revoked {name:?}: its connections end within seconds");
        }
        TokenAction::List => {
            out.write_all(list(&Tokens::load(file)?, Timestamp::now()).as_bytes())?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Makes a chain key where one is asked for, then the token. A key whose token was not made is
/// removed again.
fn enrol(
    chain_key: Option<PathBuf>,
    terms: Terms,
    make: impl FnOnce(Terms) -> Result<String, TokensError>,
) -> anyhow::Result<String> {
    let Some(path) = chain_key else { return Ok(make(terms)?) };
    let key = ChainKey::mint().context("the system has no random bytes for a chain key")?;
    let shown = escape_path(&path);
    match write_key(&path, &key) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{shown} exists, and no chain key is written over: name a new file")
        }
        written => written.with_context(|| format!("chain key {shown} cannot be written"))?,
    }
    let made = make(Terms { chain: ChainTerm::Require(key), ..terms });
    if made.is_err() {
        let _ = fs::remove_file(&path);
    }
    let token = made?;
    anstream::eprintln!(
        "chain key in {shown}: take it to the sender beside the token, for --chain-key-file"
    );
    Ok(token)
}

fn write_key(path: &Path, key: &ChainKey) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(format!("{}\n", key.text()).as_bytes())?;
    file.sync_all()
}

fn list(tokens: &Tokens, now: Timestamp) -> String {
    let name = |entry: &tokens::Entry| format!("{:?}", entry.name);
    let width = tokens.entries().iter().map(|entry| name(entry).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for entry in tokens.entries() {
        let state = match (entry.revoked, entry.expires) {
            (Some(at), _) => format!("revoked {at:.0}"),
            (None, Some(at)) if at <= now => format!("expired {at:.0}"),
            (None, Some(at)) => format!("valid until {at:.0}"),
            (None, None) => "valid".to_owned(),
        };
        let types: Vec<String> = entry.allowed_types().into_iter().map(String::from).collect();
        let certificates = match entry.certificates.len() {
            0 => String::new(),
            count => format!("  certificates {count}"),
        };
        let chained = if entry.chain_key.is_some() { "  chained" } else { "" };
        text.push_str(&format!(
            "{:width$}  {}  created {:.0}  {state}  types {}{certificates}{chained}\n",
            name(entry),
            entry.id,
            entry.created,
            types.join(","),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::TypeName;

    #[test]
    fn a_chain_key_is_never_written_over_and_goes_if_its_token_cannot_be_made() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = |name: &str| dir.path().join(name);
        let mint = |key: &str| {
            let (terms, chain_key) = (Terms::default(), Some(path(key)));
            run(&path("tokens"), TokenAction::Mint { name: "a".to_owned(), terms, chain_key })
        };
        mint("key").expect("enrolled");
        let text = fs::read_to_string(path("key")).expect("a key");
        let key = ChainKey::parse(&text).expect("a key");
        let tokens = Tokens::load(&path("tokens")).expect("tokens");
        assert_eq!(tokens.entries()[0].chain_key, Some(key));
        assert!(list(&tokens, Timestamp::now()).ends_with("  chained\n"));
        assert!(mint("key").expect_err("exists").to_string().contains("name a new file"));
        mint("other").expect_err("the name is taken");
        assert!(!path("other").exists());
        assert_eq!(fs::read_to_string(path("key")).expect("a key"), text);
    }

    #[test]
    fn the_list_shows_every_state_and_no_hash() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("tokens.toml");
        let end = Timestamp::now() + jiff::SignedDuration::from_secs(3600);
        tokens::mint(&file, "a", Terms::default()).expect("mint");
        tokens::mint(&file, "ends", Terms { expires: Some(end), ..Terms::default() })
            .expect("mint");
        let types = Some(vec![TypeName::default()]);
        let terms = Terms { types, certificates: vec![[7; 32]], ..Terms::default() };
        tokens::mint(&file, "gone", terms).expect("mint");
        tokens::revoke(&file, "gone").expect("revoke");
        let loaded = Tokens::load(&file).expect("load");
        let text = list(&loaded, end);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("\"a\"     ") && lines[0].contains("  valid  "), "{text}");
        assert!(lines[1].contains("expired") && lines[2].contains("revoked"), "{text}");
        assert!(lines[2].ends_with("types default  certificates 1"), "{text}");
        assert!(list(&loaded, Timestamp::UNIX_EPOCH).contains("valid until"), "{text}");
    }
}
