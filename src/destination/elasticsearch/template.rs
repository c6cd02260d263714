//! Index templates: what `waybill setup` writes, or prints for an administrator.
//!
//! One text that Elasticsearch 7.17, 8, 9 and OpenSearch 2, 3 all accept: plain types only, and no
//! setting that one of them lacks.

use reqwest::Method;
use serde_json::{Value, json};
use thiserror::Error;

use crate::config::{DEAD_LETTER_INDEX, ElasticsearchConfig};
use crate::record::IndexRule;

use super::client::{Client, ConfigureError, RequestError};

/// Name of the template for lines under the default rule, and how the others begin.
const LINES_TEMPLATE: &str = "waybill";

/// Version of all templates, to be raised with each change: `waybill check` compares it with what
/// the cluster has.
pub(super) const VERSION: u64 = 1;

/// Name of the template for the default dead letter, and how the others begin.
const DEAD_LETTER_TEMPLATE: &str = "waybill-dead-letter";

/// Above Elastic's built-in templates (100); a user's own from 500 on is above ours, since index
/// names have at most 255 bytes.
const PRIORITY: usize = 200;

/// The longest string under `json.*` that can be searched, in characters.
const KEYWORD_CHARACTERS_MAX: u32 = 1024;

/// A request that sets up one part.
#[derive(Clone, PartialEq, Debug)]
pub struct SetupRequest {
    /// Always with `PUT`; starts with `/`.
    pub path: String,
    /// JSON.
    pub body: Value,
}

/// Why `setup` failed.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// A part was refused or not answered.
    #[error(
        "PUT {path} failed: {source}; `waybill setup --print` shows what an administrator can run"
    )]
    Request {
        /// Which part.
        path: String,
        /// Why.
        source: RequestError,
    },
}

/// All that `setup` does, in order: both templates, then the dead-letter index.
pub fn setup_requests(rule: &IndexRule, dead_letter: &str) -> Vec<SetupRequest> {
    let wildcard = rule.wildcard();
    let [lines, letters] = template_names(&wildcard, dead_letter);
    vec![
        SetupRequest {
            path: format!("/_index_template/{letters}"),
            body: dead_letter_template(dead_letter),
        },
        SetupRequest { path: format!("/_index_template/{lines}"), body: lines_template(&wildcard) },
        SetupRequest { path: format!("/{dead_letter}"), body: json!({}) },
    ]
}

/// Names of the templates for lines and for the dead letter.
pub(super) fn template_names(wildcard: &str, dead_letter: &str) -> [String; 2] {
    let lines = template_name(LINES_TEMPLATE, wildcard, &IndexRule::default().wildcard());
    [lines, template_name(DEAD_LETTER_TEMPLATE, dead_letter, DEAD_LETTER_INDEX)]
}

/// A template's name tells which indices it is for, so that one for others does not replace it:
/// `web-*` has `waybill-web-~`. A template's name may not have a `*`.
fn template_name(base: &str, pattern: &str, default: &str) -> String {
    match pattern == default {
        true => base.to_owned(),
        false => format!("{base}-{}", pattern.replace('*', "~")),
    }
}

/// Where two patterns cover an index, the one that says more of its name goes first. (Elasticsearch
/// refuses overlapping templates of the same priority.)
fn priority(pattern: &str) -> usize {
    PRIORITY + pattern.bytes().filter(|byte| *byte != b'*').count()
}

/// The same as text for a console: `PUT /path`, then the body.
pub fn render(rule: &IndexRule, dead_letter: &str) -> String {
    let mut text = String::new();
    for request in setup_requests(rule, dead_letter) {
        // The alternate form of a JSON value is the indented one.
        text.push_str(&format!("PUT {}\n{:#}\n\n", request.path, request.body));
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// Writes both templates and makes the dead-letter index where it is missing. Doing it again
/// changes nothing. Indices that exist keep their mapping.
pub async fn setup(config: &ElasticsearchConfig, rule: &IndexRule) -> Result<(), SetupError> {
    let client = Client::new(config)?;
    for request in setup_requests(rule, &config.dead_letter_index) {
        match client.json(Method::PUT, &request.path, Some(&request.body)).await {
            Ok(_) => {}
            Err(error) if is_there_already(&error) => {}
            Err(source) => return Err(SetupError::Request { path: request.path, source }),
        }
    }
    Ok(())
}

fn is_there_already(error: &RequestError) -> bool {
    // The status alone says only that something is wrong with the request.
    matches!(error, RequestError::Status { status: 400, reason }
        if reason.starts_with("resource_already_exists_exception"))
}

fn settings() -> Value {
    // Durable before the answer: a receipt stands for it, whatever other templates say (I1).
    json!({ "index": { "translog": { "durability": "request" } } })
}

fn dead_letter_template(index: &str) -> Value {
    json!({
        "index_patterns": [index],
        // One more, so that it wins where a rule's wildcard covers this name too.
        "priority": priority(index) + 1,
        "version": VERSION,
        "template": {
            "settings": settings(),
            "mappings": {
                "dynamic": false,
                "properties": {
                    "reason": { "type": "text" },
                    "sender": { "type": "keyword" },
                    "source": { "type": "keyword" },
                    "offset": { "type": "long" },
                    "time": { "type": "date", "format": "epoch_millis" },
                },
            },
        },
    })
}

fn lines_template(wildcard: &str) -> Value {
    json!({
        "index_patterns": [wildcard],
        "priority": priority(wildcard),
        "version": VERSION,
        "template": {
            "settings": settings(),
            "mappings": {
                "dynamic": false,
                "date_detection": false,
                "numeric_detection": false,
                "dynamic_templates": dynamic_templates(),
                "properties": properties(),
            },
        },
    })
}

/// How keys that no table knows become fields, under `json` and `labels` alone.
fn dynamic_templates() -> Value {
    let string = json!({ "type": "keyword", "ignore_above": KEYWORD_CHARACTERS_MAX });
    let number = json!({ "type": "double", "ignore_malformed": true });
    let under = |path: &str, kind: &str, mapping: &Value| json!({ "path_match": path, "match_mapping_type": kind, "mapping": mapping });
    json!([
        { "labels": under("labels.*", "string", &string) },
        { "json_strings": under("json.*", "string", &string) },
        { "json_longs": under("json.*", "long", &number) },
        { "json_doubles": under("json.*", "double", &number) },
        // A key that is true today may be a word tomorrow, and a keyword takes both.
        { "json_booleans": under("json.*", "boolean", &string) },
    ])
}

/// ECS fields with their types; what may come malformed from a line is ignored, not refused.
fn properties() -> Value {
    let keyword = || json!({ "type": "keyword", "ignore_above": KEYWORD_CHARACTERS_MAX });
    let long = || json!({ "type": "long", "ignore_malformed": true });
    let ip = || json!({ "type": "ip", "ignore_malformed": true });
    let text = || json!({ "type": "text" });
    let date = || json!({ "type": "date" });
    let group = |properties: Value| json!({ "properties": properties });
    // Shown, not searched; of any length.
    let kept = || json!({ "type": "keyword", "index": false, "doc_values": false });
    let dynamic = || json!({ "type": "object", "dynamic": true });
    json!({
        "@timestamp": date(),
        "message": text(),
        "tags": keyword(),
        "labels": dynamic(),
        "json": {
            "type": "object",
            "dynamic": true,
            // What was not made fields, as text.
            "properties": { "_rest": kept() },
        },
        "ecs": group(json!({ "version": keyword() })),
        "error": group(json!({ "message": text() })),
        "event": group(json!({
            "original": kept(),
            "created": date(),
            "ingested": date(),
            "dataset": keyword(),
            "duration": long(),
        })),
        "host": group(json!({ "name": keyword(), "hostname": keyword() })),
        "process": group(json!({ "name": keyword(), "pid": long() })),
        "log": group(json!({
            "level": keyword(),
            "logger": keyword(),
            "flags": keyword(),
            "offset": { "type": "long" },
            "file": group(json!({ "path": keyword() })),
            "syslog": group(json!({
                "appname": keyword(),
                "hostname": keyword(),
                "msgid": keyword(),
                "procid": keyword(),
                "priority": long(),
                "version": keyword(),
                "facility": group(json!({ "code": long(), "name": keyword() })),
                "severity": group(json!({ "code": long(), "name": keyword() })),
                // Its keys come from outside: kept, not indexed.
                "structured_data": { "type": "object", "enabled": false },
            })),
        })),
        "source": group(json!({ "ip": ip(), "address": keyword(), "port": long() })),
        "client": group(json!({ "ip": ip(), "address": keyword() })),
        "server": group(json!({ "address": keyword(), "port": long() })),
        "user": group(json!({ "name": keyword() })),
        "user_agent": group(json!({ "original": keyword() })),
        "url": group(json!({
            "domain": keyword(),
            "original": keyword(),
            "path": keyword(),
            "port": long(),
            "query": keyword(),
            "scheme": keyword(),
        })),
        "http": group(json!({
            "version": keyword(),
            "request": group(json!({
                "id": keyword(),
                "method": keyword(),
                "referrer": keyword(),
                "bytes": long(),
                "body": group(json!({ "bytes": long() })),
            })),
            "response": group(json!({
                "status_code": long(),
                "mime_type": keyword(),
                "bytes": long(),
                "body": group(json!({ "bytes": long() })),
            })),
        })),
        "waybill": group(json!({
            "sender": keyword(),
            "sender_name": keyword(),
            "segment": keyword(),
            "type": keyword(),
            "bytes": { "type": "binary" },
        })),
        "trace": group(json!({ "id": keyword() })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD_LETTER: &str = "waybill-dead-letter";

    #[test]
    fn what_is_printed_is_what_is_put() {
        let rule = IndexRule::parse("web-{yyyy.MM.dd}").expect("a rule");
        let text = render(&rule, DEAD_LETTER);
        for request in setup_requests(&rule, DEAD_LETTER) {
            let after = text.split(&format!("PUT {}\n", request.path)).nth(1).expect("printed");
            let body = after.split("\n\n").next().expect("a body");
            assert_eq!(serde_json::from_str::<Value>(body).expect("JSON"), request.body);
        }
        assert!(text.contains(r#""web-*""#), "{text}");
    }

    #[test]
    fn the_name_of_a_template_tells_its_indices() {
        let name = |rule: &str| {
            let rule = IndexRule::parse(rule).expect("a rule");
            setup_requests(&rule, DEAD_LETTER)[1].path.clone()
        };
        assert_eq!(name(crate::record::DEFAULT_RULE), "/_index_template/waybill");
        assert_eq!(name("web-{yyyy.MM.dd}"), "/_index_template/waybill-web-~");
        assert_eq!(name("web-{type}-{yyyy.MM}"), "/_index_template/waybill-web-~-~");
        assert_eq!(name("{type}-prod"), "/_index_template/waybill-~-prod");
        assert_eq!(name("web"), "/_index_template/waybill-web");
    }

    #[test]
    fn the_dead_letter_wins_over_a_wildcard_that_covers_it() {
        let mut requests = Vec::new();
        for rule in ["waybill-{type}", "waybill-dead-letter{type}"] {
            let parsed = IndexRule::parse(rule).expect("a rule");
            requests = setup_requests(&parsed, DEAD_LETTER);
            let priority = |number: usize| requests[number].body["priority"].as_u64();
            assert!(priority(0) > priority(1), "{rule}");
        }
        let indexed = &requests[0].body["template"]["mappings"];
        assert_eq!(indexed["dynamic"], false);
        let mut fields: Vec<_> =
            indexed["properties"].as_object().expect("fields").keys().collect();
        fields.sort();
        assert_eq!(fields, ["offset", "reason", "sender", "source", "time"]);
    }
}
