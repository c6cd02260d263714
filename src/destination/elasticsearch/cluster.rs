//! What `waybill check` asks a cluster; nothing is written, no document and no setting.
//!
//! A key that may only write gets 403 for most of it: that is an answer, not a fault.

use reqwest::Method;
use serde_json::{Value, json};
use thiserror::Error;

use crate::config::ElasticsearchConfig;
use crate::record::IndexRule;

use super::client::{Client, ConfigureError, RequestError};
use super::template::{VERSION, template_names};

/// What writing needs, on the indices and on the dead letter.
const PRIVILEGES: [&str; 2] = ["create_doc", "auto_configure"];

/// A cluster, asked.
#[derive(Debug)]
pub struct Cluster {
    client: Client,
    rule: IndexRule,
    dead_letter_index: String,
}

/// One URL's answer.
#[derive(Debug)]
pub struct Node {
    /// Such as `8.17.0`, or why the node does not tell it.
    pub version: Result<String, RequestError>,
    /// The `Date` header of its answer.
    pub date: Option<String>,
    /// Its own certificate (DER), over TLS.
    pub certificate: Option<Vec<u8>>,
}

/// Whether the key may write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Privileges {
    /// It has all that writing needs.
    Enough,
    /// It lacks these, each as `privilege on index`.
    Missing(Vec<String>),
    /// This cluster has no users, or no way to ask for their rights.
    Unknown,
}

/// An index template of ours, compared with what `waybill setup` would put there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Template {
    /// As this version makes it.
    Current(u64),
    /// Made by another version.
    Other {
        /// `None` where it has none.
        version: Option<u64>,
        /// What this program makes.
        ours: u64,
    },
    /// It does not cover these indices.
    Elsewhere {
        /// The indices that it covers.
        covers: Vec<String>,
        /// The indices to cover.
        wanted: String,
    },
    /// There is none of this name.
    Absent,
}

/// A version that Waybill does not support.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("version {0} is not one of Elasticsearch 7.17, 8, 9 and OpenSearch 2, 3")]
pub struct VersionError(pub String);

impl Cluster {
    /// Reads the secret and the authorities; connects to nothing.
    pub fn new(config: &ElasticsearchConfig, rule: &IndexRule) -> Result<Cluster, ConfigureError> {
        Ok(Cluster {
            client: Client::noting(config)?,
            rule: rule.clone(),
            dead_letter_index: config.dead_letter_index.clone(),
        })
    }

    /// The base URLs, in order.
    pub fn urls(&self) -> &[String] {
        self.client.bases()
    }

    /// Asks one URL for its version, at `/` or else where keys that may monitor find it.
    ///
    /// # Errors
    ///
    /// No answer at all.
    pub async fn node(&self, number: usize) -> Result<Node, RequestError> {
        let root = self.client.look(number, "/").await?;
        let version = match root.body {
            Ok(body) => self.text(number, &body["version"]["number"]),
            Err(error) if error.status() == Some(401) => Err(error),
            Err(_) => {
                let path = "/_nodes/_local?filter_path=nodes.*.version";
                let info = self.client.look(number, path).await?.body;
                info.and_then(|body| self.text(number, &first(&body["nodes"])["version"]))
            }
        };
        Ok(Node { version, date: root.date, certificate: root.certificate })
    }

    fn text(&self, number: usize, value: &Value) -> Result<String, RequestError> {
        let strange = || RequestError::NotJson(self.urls()[number].clone());
        value.as_str().map(str::to_owned).ok_or_else(strange)
    }

    /// The cluster's clock, in milliseconds since 1970; needs `monitor`.
    pub async fn time(&self) -> Result<u64, RequestError> {
        let path = "/_nodes/_local/stats/jvm?filter_path=nodes.*.timestamp";
        let stats = self.client.json(Method::GET, path, None).await?;
        let time = first(&stats["nodes"])["timestamp"].as_u64();
        time.ok_or_else(|| RequestError::NotJson(self.urls()[0].clone()))
    }

    /// Whether this key may write lines and dead letters.
    pub async fn privileges(&self) -> Result<Privileges, RequestError> {
        let names = [self.rule.wildcard(), self.dead_letter_index.clone()];
        let body = json!({ "index": [{ "names": names, "privileges": PRIVILEGES }] });
        let path = "/_security/user/_has_privileges";
        match self.client.json(Method::POST, path, Some(&body)).await {
            Ok(answer) => Ok(privileges(&answer)),
            // No such API: security is switched off, absent, or OpenSearch's.
            Err(error) if matches!(error.status(), Some(400 | 404 | 405)) => {
                Ok(Privileges::Unknown)
            }
            Err(error) => Err(error),
        }
    }

    /// The templates of lines and of the dead letter, by name.
    pub async fn templates(&self) -> Result<Vec<(String, Template)>, RequestError> {
        let mut found = Vec::new();
        let patterns = [self.rule.wildcard(), self.dead_letter_index.clone()];
        for (name, wanted) in template_names(&patterns[0], &patterns[1]).into_iter().zip(patterns) {
            let path = format!("/_index_template/{name}");
            let template = match self.client.json(Method::GET, &path, None).await {
                Ok(answer) => template(&answer, wanted),
                Err(error) if error.status() == Some(404) => Template::Absent,
                Err(error) => return Err(error),
            };
            found.push((name, template));
        }
        Ok(found)
    }

    /// Existing indices of ours that answer before a document is durable.
    pub async fn asynchronous(&self) -> Result<Vec<String>, RequestError> {
        let path = format!(
            "/{},{}/_settings/index.translog.durability?ignore_unavailable=true&allow_no_indices=true",
            self.rule.wildcard(),
            self.dead_letter_index
        );
        let settings = self.client.json(Method::GET, &path, None).await?;
        let indices = settings.as_object().into_iter().flatten();
        let asynchronous = indices.filter(|(_, index)| is_asynchronous(&index["settings"]));
        Ok(asynchronous.map(|(name, _)| name.clone()).collect())
    }

    /// Whether an index that is made now would answer before a document is durable.
    pub async fn next_is_asynchronous(&self, index: &str) -> Result<bool, RequestError> {
        let path = format!("/_index_template/_simulate_index/{index}");
        let simulated = self.client.json(Method::POST, &path, None).await?;
        Ok(is_asynchronous(&simulated["template"]["settings"]))
    }
}

/// Refuses versions that Waybill does not know.
pub fn supported(version: &str) -> Result<(), VersionError> {
    let mut numbers = version.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(7)), Some(Ok(17..))) | (Some(Ok(2 | 3 | 8 | 9)), _) => Ok(()),
        _ => Err(VersionError(version.to_owned())),
    }
}

/// `durability` is absent where the default, `request`, is in force.
fn is_asynchronous(settings: &Value) -> bool {
    let durability = settings["index"]["translog"]["durability"].as_str();
    durability.is_some_and(|durability| !durability.eq_ignore_ascii_case("request"))
}

/// The value of an object's first key; `null` where there is none.
fn first(object: &Value) -> &Value {
    object.as_object().and_then(|object| object.values().next()).unwrap_or(&Value::Null)
}

fn privileges(answer: &Value) -> Privileges {
    if answer["has_all_requested"] == true {
        return Privileges::Enough;
    }
    let indices = answer["index"].as_object().into_iter().flatten();
    let missing = indices.flat_map(|(index, has)| {
        let lacks = |privilege: &&str| has[*privilege] != true;
        PRIVILEGES.into_iter().filter(lacks).map(move |privilege| format!("{privilege} on {index}"))
    });
    Privileges::Missing(missing.collect())
}

fn template(answer: &Value, wanted: String) -> Template {
    let found = &answer["index_templates"][0]["index_template"];
    let patterns = found["index_patterns"].as_array().into_iter().flatten();
    let covers: Vec<String> = patterns.filter_map(Value::as_str).map(str::to_owned).collect();
    if !covers.contains(&wanted) {
        return Template::Elsewhere { covers, wanted };
    }
    match found["version"].as_u64() {
        Some(version) if version == VERSION => Template::Current(version),
        version => Template::Other { version, ours: VERSION },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        for version in ["7.17.0", "7.17.29", "8.0.0", "9.2.0", "2.19.1", "3.8.0-SNAPSHOT"] {
            assert_eq!(supported(version), Ok(()), "{version}");
        }
        for version in ["7.16.3", "6.8.0", "10.0.0", "1.3.0", "", "x"] {
            assert!(supported(version).is_err(), "{version}");
        }
    }

    #[test]
    fn missing_privileges_are_named_with_their_index() {
        let answer = json!({
            "username": "u", "has_all_requested": false, "cluster": {}, "application": {},
            "index": {
                "waybill-*": { "create_doc": true, "auto_configure": false },
                "waybill-parked": { "create_doc": true, "auto_configure": true },
            },
        });
        let missing = vec!["auto_configure on waybill-*".to_owned()];
        assert_eq!(privileges(&answer), Privileges::Missing(missing));
        assert_eq!(privileges(&json!({ "has_all_requested": true })), Privileges::Enough);
    }

    #[test]
    fn a_template_is_compared_by_its_indices_and_its_version() {
        let answer = |version: Value| {
            json!({ "index_templates": [{ "name": "waybill", "index_template": {
                "index_patterns": ["waybill-*"], "version": version } }] })
        };
        let compared = |version, wanted: &str| template(&answer(version), wanted.to_owned());
        assert_eq!(compared(json!(VERSION), "waybill-*"), Template::Current(VERSION));
        let other = Template::Other { version: None, ours: VERSION };
        assert_eq!(compared(Value::Null, "waybill-*"), other);
        assert!(matches!(compared(json!(VERSION), "web-*"), Template::Elsewhere { .. }));
    }
}
