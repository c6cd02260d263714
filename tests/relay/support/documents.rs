//! Lines in the real Elasticsearch: counted, and read back beside the receipts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::servers::{Elasticsearch, http, wait_until};
use super::waybill::PATIENCE;

/// A prefix of index names that no other test or run uses.
pub fn prefix(name: &str) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    // A server may outlive the runs, and process ids come again.
    static RUN: OnceLock<String> = OnceLock::new();
    let run = RUN.get_or_init(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        format!("{:x}-{}", now.as_millis(), std::process::id())
    });
    format!("t{run}-{}-{name}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Deletes a test's templates and indices, by the prefix of their names, at a server that may outlive it.
pub struct Cleanup<'a> {
    node: &'a Elasticsearch,
    prefix: String,
}

impl<'a> Cleanup<'a> {
    pub fn of(node: &'a Elasticsearch, prefix: &str) -> Cleanup<'a> {
        Cleanup { node, prefix: prefix.to_owned() }
    }
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        // A test that failed is not to be ended a second time.
        let ask = |method: &str, path: &str| {
            http(self.node.host_port(), method, path, "application/json", b"").map(|(_, text)| text)
        };
        let prefix = &self.prefix;
        let _ = ask("DELETE", &format!("/_index_template/*{prefix}*"));
        // Wildcards are refused for indices.
        let indices = ask("GET", &format!("/_cat/indices/{prefix}*?h=index")).unwrap_or_default();
        for index in indices.split_whitespace().filter(|index| index.starts_with(prefix)) {
            let _ = ask("DELETE", &format!("/{index}"));
        }
    }
}

/// Waits until the indices hold so many documents, and looks that they do not hold more.
#[track_caller]
pub fn wait_for_documents(node: &Elasticsearch, pattern: &str, count: usize) {
    let mut found = 0;
    wait_until(&format!("{count} documents in {pattern}"), PATIENCE, || {
        // A shard that is about to start answers 503: neither a failure nor a number.
        let (status, answer) = node.request("GET", &format!("/{pattern}/_count"), &Value::Null);
        let whole = status == 200 && answer["_shards"]["failed"] == 0;
        found = if whole { node.count(pattern) } else { 0 };
        found >= count as u64
    });
    assert_eq!(found, count as u64, "documents in {pattern}");
}

/// Looks that the indices hold `TAG 0` to `TAG N-1`, each once.
#[track_caller]
pub fn assert_documents(node: &Elasticsearch, pattern: &str, tag: &str, count: usize) {
    let documents = node.all_documents(pattern);
    let text = |document: &Value| document["message"].as_str().unwrap_or_default().to_owned();
    let mut messages: Vec<String> = documents.values().map(text).collect();
    messages.sort();
    let mut expected: Vec<String> = (0..count).map(|number| format!("{tag} {number}")).collect();
    expected.sort();
    assert_eq!(messages.len(), expected.len());
    assert!(messages == expected, "not the lines that were written");
}

/// The receipts of a file, verdict by document id; each line has one.
#[track_caller]
pub fn receipts(file: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut verdicts = BTreeMap::new();
    for line in text.lines() {
        let receipt: Value = serde_json::from_str(line).expect("a receipt is a line of JSON");
        let of = |key: &str| receipt[key].as_str().unwrap_or_default().to_owned();
        let twice = verdicts.insert(of("id"), of("verdict"));
        assert!(twice.is_none(), "two receipts for one line: {line}");
    }
    verdicts
}

/// Sets the last change of a file to two days ago, and gives that day as an index name has it: the test's index is
/// known before the first line is sent, also at midnight.
pub fn age(file: &Path) -> String {
    let then = SystemTime::now() - Duration::from_secs(2 * 86_400);
    let open = File::options().write(true).open(file).expect("the file");
    open.set_modified(then).expect("a file's time can be set");
    let then = jiff::Timestamp::try_from(then).expect("a time within range");
    then.to_zoned(jiff::tz::TimeZone::UTC).strftime("%Y.%m.%d").to_string()
}
