//! Who has much to send does not hold up who has a line to send, neither another sender nor another source of the same one.

use serde_json::json;

use crate::metrics::Scrape;
use crate::support::documents::{prefix, wait_for_documents};
use crate::support::proxy::Proxy;
use crate::support::servers::{Elasticsearch, free_port, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, waybill};

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
    let metrics = free_port();
    bench.token("test");
    let token = bench.token("other");
    let receiver = receiver(&bench, &held, &prefix, metrics);
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

/// Their files wait for credit, each for a frame of its own, when the line comes. Elasticsearch answers request by
/// request, and after each the sender has sent what the receipts allow.
#[test]
fn a_line_does_not_wait_for_a_frame_of_each_file_of_its_sender() {
    const FILES: usize = 40;
    const LINES: usize = 250;
    const CREDIT: f64 = (8 << 20) as f64;
    const FRAME: f64 = (256 << 10) as f64;
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("files");
    let held = Proxy::start(node.host_port(), &[]);
    let metrics = free_port();
    let receiver = receiver(&bench, &held, &prefix, metrics);
    let text: String = (0..LINES).map(|n| format!("{n:06} {}\n", "x".repeat(2000))).collect();
    (0..FILES).for_each(|number| drop(bench.write(&format!("back/{number}.log"), &text)));
    let of_test = |name: &str| Scrape::of(metrics).get(&format!("{name}{{sender=\"test\"}}"));
    let has_no_credit = || of_test("waybill_lag_bytes") > CREDIT - FRAME;
    let stored =
        || Scrape::of(metrics).get("waybill_lines_total{sender=\"test\",verdict=\"stored\"}");
    // All other lines have the same length.
    let line_came = || of_test("waybill_received_bytes_total") % (text.len() / LINES) as f64 != 0.;
    held.hold();
    let mut sender = bench.sender(&receiver, &["back/*.log", "live.log"]);
    sender.wait_for_log(" connected");
    wait_until("no credit is left for a frame", PATIENCE, has_no_credit);
    let line = "a line beside many files\n";
    bench.write("live.log", line);
    sender.wait_for_log("/live.log");
    let mut written = 1;
    while !line_came() {
        let before = stored();
        // Also where it is written all the time.
        bench.append("live.log", line);
        written += 1;
        held.pass_one();
        wait_until("receipts came", PATIENCE, || stored() > before);
        wait_until("their credit is used", PATIENCE, || line_came() || has_no_credit());
    }
    // With a frame of each file before it these would be more than 3000.
    assert!(stored() < 2000., "{} lines were stored before it came", stored());
    held.release();
    wait_for_documents(node, &format!("{prefix}-default"), FILES * LINES + written);
    assert!(sender.stop().success());
}

/// A receiver whose requests are small beside what waits for them.
fn receiver(bench: &Bench, node: &Proxy, prefix: &str, metrics: u16) -> Receiver {
    let config = bench.write("receive.toml", "[elasticsearch]\nbatch_bytes_max = \"256KiB\"\n");
    let (url, index) = (node.url(), format!("{prefix}-{{type}}"));
    bench.receiver_with(move |command| {
        command.arg("--config").arg(&config).args(["--elasticsearch", &url, "--index", &index]);
        command.args(["--metrics", &format!("127.0.0.1:{metrics}")]);
    })
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
