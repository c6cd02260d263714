//! `waybill token`: mints, replaces, revokes and lists the tokens of a file.

use std::io::Write as _;
use std::path::Path;

use jiff::Timestamp;

use crate::tokens::{self, Terms, Tokens};

/// What to do with a tokens file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TokenAction {
    /// A first token for a new sender.
    Mint {
        /// The sender's name.
        name: String,
        /// What goes with it.
        terms: Terms,
    },
    /// Another token for a known sender; the old one ends.
    Rotate {
        /// The sender's name.
        name: String,
        /// What goes with it from now on.
        terms: Terms,
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
        TokenAction::Mint { name, terms } => {
            writeln!(out, "{}", tokens::mint(file, &name, terms)?)?;
        }
        TokenAction::Rotate { name, terms } => {
            writeln!(out, "{}", tokens::rotate(file, &name, terms)?)?;
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
        text.push_str(&format!(
            "{:width$}  {}  created {:.0}  {state}  types {}{certificates}\n",
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
