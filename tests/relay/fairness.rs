//! Who has much to send does not hold up who has a line to send, neither another sender nor another source of the same one.

use serde_json::json;

use crate::metrics::Scrape;
use crate::support::documents::{prefix, wait_for_documents};
use crate::support::proxy::Proxy;
use crate::support::servers::{Elasticsearch, free_port, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Process, waybill};

/// Lines of the backfill: less than the credit of a connection, so that all of it is queued at the receiver.
const BACKFILL: usize = 10_000;

/// What may come before a line that is queued last: what the held requests have taken of the queue before, two frames
/// with what else fitted, and the request that holds the line.
const BEFORE: usize = BACKFILL / 4;

/// Elasticsearch does not answer until all of a backfill and then two lines lie at the receiver. Elasticsearch numbers
/// the documents of a shard as they come.
#[test]
fn a_line_does_not_wait_for_a_backfill_that_came_before_it() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("fairness");
    let held = Proxy::start(node.host_port(), &[]);
    let (url, index) = (held.url(), format!("{prefix}-{{type}}"));
    let metrics = free_port();
    bench.token("test");
    let token = bench.token("other");
    let config = bench.write("receive.toml", "[elasticsearch]\nbatch_bytes_max = \"256KiB\"\n");
    let receiver = bench.receiver_with(move |command| {
        command.arg("--config").arg(&config).args(["--elasticsearch", &url, "--index", &index]);
        command.args(["--metrics", &format!("127.0.0.1:{metrics}")]);
    });
    let mut sender = bench.sender(&receiver, &["back.log", "live.log"]);
    bench.write("other/other.log", "");
    let mut command = waybill();
    command.args(["send", "other/other.log", "--to", &receiver.url(), "--token-file"]).arg(token);
    command.arg("--state-dir").arg(bench.path("other-state")).current_dir(bench.path(""));
    let mut other = Process::start("other sender", command, bench.path("other-sender.log"));
    let came = |name: &str, bytes: usize| {
        wait_until(&format!("{bytes} bytes of {name} are at the receiver"), PATIENCE, || {
            let sample = format!("waybill_received_bytes_total{{sender=\"{name}\"}}");
            Scrape::of(metrics).get(&sample) >= bytes as f64
        });
    };
    other.wait_for_log(" connected");
    sender.wait_for_log(" connected");
    held.hold();
    let backfill: String =
        (0..BACKFILL).map(|number| format!("{number:06} {}\n", "x".repeat(600))).collect();
    let (line, others) = ("a line of the same sender\n", "a line of another sender\n");
    bench.write("back.log", &backfill);
    came("test", backfill.len());
    bench.write("live.log", line);
    came("test", backfill.len() + line.len());
    bench.append("other/other.log", others);
    came("other", others.len());
    wait_until("both requests are held", PATIENCE, || held.held() == 2);
    held.release();
    let pattern = format!("{prefix}-default");
    wait_for_documents(node, &pattern, BACKFILL + 2);
    for line in [line, others] {
        let before = stored_before(node, &pattern, line.trim_end());
        assert!(before < BEFORE as u64, "{before} lines were stored before {line:?}");
    }
    assert!(sender.stop().success());
    assert!(other.stop().success());
}

/// How many documents the index's one shard was given before the one with this message.
#[track_caller]
fn stored_before(node: &Elasticsearch, index: &str, message: &str) -> u64 {
    let query =
        json!({"seq_no_primary_term": true, "query": {"match_phrase": {"message": message}}});
    let (_, found) = node.request("POST", &format!("/{index}/_search"), &query);
    assert_eq!(found["hits"]["total"]["value"], 1, "{found}");
    found["hits"]["hits"][0]["_seq_no"].as_u64().expect("a number")
}
