//! `--metrics`: what is counted is what happened, to the line; and Prometheus's own tool takes page and rules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::support::servers::{free_port, http, root, unpacked, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, Receiver, lines, waybill};

/// The samples of a scrape, by name and labels as they are written.
#[derive(Debug)]
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    pub fn of(port: u16) -> Scrape {
        let text = page(port);
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        };
        Scrape(text.lines().filter(|line| !line.starts_with('#')).map(sample).collect())
    }

    #[track_caller]
    pub fn get(&self, sample: &str) -> f64 {
        *self.0.get(sample).unwrap_or_else(|| panic!("no {sample} in {:#?}", self.0))
    }
}

fn page(port: u16) -> String {
    let answer = http(&format!("127.0.0.1:{port}"), "GET", "/metrics", "text/plain", b"");
    let (status, text) = answer.expect("an answer");
    assert_eq!(status, 200);
    text
}

fn ready(port: u16) -> (u16, String) {
    http(&format!("127.0.0.1:{port}"), "GET", "/health/ready", "text/plain", b"").expect("answer")
}

fn metered_receiver(bench: &Bench, metrics: u16) -> Receiver {
    let store = bench.path("store.sqlite");
    bench.receiver_with(move |command| {
        command.arg("--store").arg(&store).args(["--metrics", &format!("127.0.0.1:{metrics}")]);
    })
}

fn metered_sender(bench: &Bench, receiver: &Receiver, metrics: u16, sources: &str) -> Process {
    let file = bench.write("send.toml", sources).display().to_string();
    let address = format!("127.0.0.1:{metrics}");
    let sender = bench.sender(receiver, &["--config", &file, "--metrics", &address]);
    wait_until("the sender is ready", PATIENCE, || {
        std::net::TcpStream::connect(&address).is_ok() && ready(metrics).0 == 200
    });
    sender
}

const SOURCES: &str = "[[source]]\nfiles = 'app.log'\nname = 'app'\n\
    [[source]]\nunix_datagram = 'log.sock'\nname = 'socket'\n";

#[test]
fn both_sides_count_each_line_once() {
    const LINES: usize = 20_000;
    const EMPTY: usize = 70;
    const DATAGRAMS: usize = 300;
    let bench = Bench::new();
    let (at_sender, at_receiver) = (free_port(), free_port());
    let _receiver = metered_receiver(&bench, at_receiver);
    let text = lines("line", LINES) + &"\n".repeat(EMPTY);
    let bytes = text.len() as f64;
    bench.write("app.log", text);
    let mut sender = metered_sender(&bench, &_receiver, at_sender, SOURCES);
    let client = UnixDatagram::unbound().expect("a socket");
    for number in 0..DATAGRAMS {
        let text = format!("datagram {number}");
        client.send_to(text.as_bytes(), bench.path("log.sock")).expect("send");
    }
    bench.wait_for_lines(LINES + DATAGRAMS);
    // What is stored is counted at the receiver; the sender's count comes with the receipts.
    let counted = |scrape: &Scrape| {
        scrape.get("waybill_lines_total{source=\"app\",verdict=\"stored\"}")
            + scrape.get("waybill_lines_total{source=\"app\",verdict=\"skipped\"}")
            + scrape.get("waybill_lines_total{source=\"socket\",verdict=\"stored\"}")
    };
    wait_until("all receipts are counted", PATIENCE, || {
        counted(&Scrape::of(at_sender)) >= (LINES + EMPTY + DATAGRAMS) as f64
    });
    wait_until("the spool is given back", PATIENCE, || {
        Scrape::of(at_sender).get("waybill_spool_bytes") == 0.0
    });
    let sent = Scrape::of(at_sender);
    for (sample, value) in [
        ("waybill_lines_total{source=\"app\",verdict=\"stored\"}", LINES as f64),
        ("waybill_lines_total{source=\"app\",verdict=\"skipped\"}", EMPTY as f64),
        ("waybill_lines_total{source=\"app\",verdict=\"already\"}", 0.0),
        ("waybill_lines_total{source=\"app\",verdict=\"parked\"}", 0.0),
        ("waybill_lines_total{source=\"socket\",verdict=\"stored\"}", DATAGRAMS as f64),
        ("waybill_sent_bytes_total{source=\"app\"}", bytes),
        ("waybill_receipted_bytes_total{source=\"app\"}", bytes),
        ("waybill_resent_bytes_total{source=\"app\"}", 0.0),
        ("waybill_lost_bytes_total{source=\"app\"}", 0.0),
        ("waybill_lag_bytes{source=\"app\"}", 0.0),
        ("waybill_lag_seconds{source=\"app\"}", 0.0),
        ("waybill_lag_bytes{source=\"socket\"}", 0.0),
        ("waybill_connected", 1.0),
        ("waybill_reconnects_total", 0.0),
        ("waybill_spool_limit_bytes", (1_u64 << 30) as f64),
    ] {
        assert_eq!(sent.get(sample), value, "{sample}");
    }
    let received = Scrape::of(at_receiver);
    let spooled = sent.get("waybill_sent_bytes_total{source=\"socket\"}");
    for (sample, value) in [
        ("waybill_lines_total{sender=\"test\",verdict=\"stored\"}", (LINES + DATAGRAMS) as f64),
        ("waybill_lines_total{sender=\"test\",verdict=\"skipped\"}", EMPTY as f64),
        ("waybill_lines_total{sender=\"test\",verdict=\"already\"}", 0.0),
        ("waybill_received_bytes_total{sender=\"test\"}", bytes + spooled),
        ("waybill_lag_bytes{sender=\"test\"}", 0.0),
        ("waybill_connections{sender=\"test\"}", 1.0),
        ("waybill_connections_total{sender=\"test\"}", 1.0),
        ("waybill_memory_bytes", 0.0),
        ("waybill_destination_ready", 1.0),
    ] {
        assert_eq!(received.get(sample), value, "{sample}");
    }
    assert_eq!(ready(at_receiver), (200, "ready\n".to_owned()));
    let post = http(&format!("127.0.0.1:{at_sender}"), "POST", "/metrics", "text/plain", b"x");
    assert_eq!(post.expect("an answer").0, 405);
    assert!(sender.stop().success());
}

#[test]
fn what_waits_for_a_receiver_shows_as_lag_and_a_parked_line_as_parked() {
    let bench = Bench::new();
    let (at_sender, at_receiver, intake) = (free_port(), free_port(), free_port());
    let mut receiver = metered_receiver(&bench, at_receiver);
    receiver.stop();
    bench.write("app.log", lines("before", 500));
    let sources =
        format!("{SOURCES}[[source]]\nhttp_intake = '127.0.0.1:{intake}'\nname = 'http'\n");
    let mut sender = metered_sender(&bench, &receiver, at_sender, &sources);
    bench.append("app.log", lines("while away", 500));
    let bytes = bench.size_of("app.log") as f64;
    wait_until("the lag is seen", PATIENCE, || {
        let scrape = Scrape::of(at_sender);
        scrape.get("waybill_lag_bytes{source=\"app\"}") == bytes
            && scrape.get("waybill_lag_seconds{source=\"app\"}") > 1.0
    });
    let away = Scrape::of(at_sender);
    assert_eq!(away.get("waybill_connected"), 0.0);
    assert!(away.get("waybill_connection_failures_total") > 0.0);
    // A receiver that is away is no fault of this process.
    assert_eq!(ready(at_sender).0, 200);

    // A key with a time far outside the days that the receiver accepts: the store parks it.
    let line = r#"{"line":"old","key":"k","time":"1000000000.000"}"#;
    let posted =
        http(&format!("127.0.0.1:{intake}"), "POST", "/", "application/x-ndjson", line.as_bytes());
    assert_eq!(posted.expect("an answer").0, 200);
    assert!(Scrape::of(at_sender).get("waybill_spool_bytes") > 0.0);
    receiver.start();
    bench.wait_for_lines(1000);
    wait_until("nothing lags", PATIENCE, || {
        let scrape = Scrape::of(at_sender);
        scrape.get("waybill_lag_bytes{source=\"app\"}") == 0.0
            && scrape.get("waybill_lines_total{source=\"http\",verdict=\"parked\"}") == 1.0
    });
    assert_eq!(Scrape::of(at_sender).get("waybill_lag_seconds{source=\"app\"}"), 0.0);
    let received = Scrape::of(at_receiver);
    assert_eq!(received.get("waybill_lines_total{sender=\"test\",verdict=\"parked\"}"), 1.0);

    receiver.restart();
    wait_until("a new connection is counted", PATIENCE, || {
        let scrape = Scrape::of(at_sender);
        scrape.get("waybill_reconnects_total") >= 1.0 && scrape.get("waybill_connected") == 1.0
    });
    assert!(sender.stop().success());
}

/// Lines are on their way when the store is locked and then the receiver killed: not ready, and sent again.
#[test]
fn a_locked_store_is_not_ready_and_what_was_on_its_way_counts_as_resent() {
    let bench = Bench::new();
    let (at_sender, at_receiver) = (free_port(), free_port());
    let mut receiver = metered_receiver(&bench, at_receiver);
    bench.write("app.log", "line 0\n");
    let mut sender = metered_sender(&bench, &receiver, at_sender, SOURCES);
    bench.wait_for_lines(1);
    assert_eq!(ready(at_receiver).0, 200);
    let store = rusqlite::Connection::open(bench.path("store.sqlite")).expect("the store");
    store.execute_batch("BEGIN IMMEDIATE").expect("locked");
    bench.append("app.log", "line 1\n");
    wait_until("it is not ready", PATIENCE, || ready(at_receiver).0 == 503);
    // The process is well.
    for port in [at_receiver, at_sender] {
        let live = http(&format!("127.0.0.1:{port}"), "GET", "/health/live", "text/plain", b"");
        assert_eq!(live.expect("an answer"), (200, "live\n".to_owned()));
    }
    receiver.kill_hard();
    store.execute_batch("ROLLBACK").expect("given back");
    receiver.start();
    bench.wait_for_lines(2);
    assert_eq!(ready(at_receiver).0, 200);
    wait_until("the receipt has come", PATIENCE, || {
        Scrape::of(at_sender).get("waybill_lag_bytes{source=\"app\"}") == 0.0
    });
    let line = "line 1\n".len() as f64;
    let sent = Scrape::of(at_sender).get("waybill_resent_bytes_total{source=\"app\"}");
    let received = Scrape::of(at_receiver).get("waybill_resent_bytes_total{sender=\"test\"}");
    assert!(sent >= line && received >= line, "{sent} and {received}");
    assert!(sender.stop().success());
    bench.assert_lines(["line 0".to_owned(), "line 1".to_owned()]);
}

#[test]
fn a_wrong_token_is_counted_by_its_status() {
    let bench = Bench::new();
    let at_receiver = free_port();
    let receiver = metered_receiver(&bench, at_receiver);
    bench.write("test.token", "not a token");
    bench.write("app.log", "line\n");
    assert!(!bench.send_once(&receiver, &["app.log"]).status.success());
    let scrape = Scrape::of(at_receiver);
    assert_eq!(scrape.get("waybill_refused_requests_total{status=\"401\"}"), 1.0);
}

#[test]
fn metrics_for_other_machines_need_the_flag_that_names_the_danger() {
    let bench = Bench::new();
    let _token = bench.token("test");
    let mut receive = waybill();
    receive.args(["receive", "--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:0", "--tokens"]);
    receive.arg(bench.path("tokens.toml")).arg("--store").arg(bench.path("store.sqlite"));
    let mut send = bench.send_command("ws://127.0.0.1:1/", &["a", "--metrics", "0.0.0.0:0"]);
    send.arg("--once");
    for command in [receive, send] {
        let finished = run(command);
        assert_eq!(finished.status.code(), Some(78), "{}", finished.stderr);
        assert!(finished.stderr.contains("--metrics: 0.0.0.0:0 would tell"), "{}", finished.stderr);
    }
}

#[test]
fn a_sender_that_listens_tells_when_its_certificate_ends() {
    let bench = Bench::new();
    bench.token("test");
    Certificates::make(&bench.path(""));
    let at = free_port();
    let mut command = waybill();
    command.args(["send", "app.log", "--listen", "127.0.0.1:0", "--tokens", "tokens.toml"]);
    command.args(["--tls-cert", "server.pem", "--tls-key", "server.key", "--state-dir", "state"]);
    command.args(["--metrics", &format!("127.0.0.1:{at}")]).current_dir(bench.path(""));
    let sender = Process::start("sender", command, bench.path("sender.log"));
    sender.wait_for_log("waiting for it");
    let end = Scrape::of(at).get("waybill_certificate_expiry_timestamp_seconds");
    assert!(end > 1.7e9, "{end}");
}

/// Prometheus's own tool.
fn promtool(arguments: &[&str]) -> Option<Command> {
    const PROGRAM: &str = "usr/bin/promtool";
    let mut command = Command::new(unpacked("prometheus", PROGRAM)?.join(PROGRAM));
    command.args(arguments);
    Some(command)
}

/// Names of metrics in a text.
fn named(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c));
    words.filter(|word| word.starts_with("waybill_")).collect()
}

/// Each expression of a dashboard's panels as a recording rule, with a value for Grafana's variables.
fn expressions(board: &Value) -> Vec<Value> {
    let panels = board["panels"].as_array().expect("panels").iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let rule = |(number, target): (usize, &Value)| {
        let expression = target["expr"].as_str().expect("an expression");
        let expression = expression
            .replace("$__rate_interval", "5m")
            .replace("$__range", "1h")
            .replace("$job", ".*")
            .replace("$instance", ".*");
        assert!(!expression.contains('$'), "{expression}");
        serde_json::json!({"record": format!("panel:{number}"), "expr": expression})
    };
    targets.enumerate().map(rule).collect()
}

#[test]
fn promtool_takes_the_pages_and_what_is_shipped_names_only_what_is_on_them() {
    let bench = Bench::new();
    let (at_sender, at_receiver) = (free_port(), free_port());
    let paths = super::support::waybill::Certificates::make(&bench.path(""));
    let store = bench.path("store.sqlite");
    let (certificate, key) = (paths.certificate.clone(), paths.key.clone());
    let receiver = bench.receiver_with(move |command| {
        command.arg("--store").arg(&store).args(["--metrics", &format!("127.0.0.1:{at_receiver}")]);
        command.arg("--tls-cert").arg(&certificate).arg("--tls-key").arg(&key);
    });
    bench.write("app.log", "line\n");
    let metrics = format!("127.0.0.1:{at_sender}");
    let url = format!("wss://localhost:{}/", receiver.port());
    let ca = paths.ca.display().to_string();
    // Whatever stands in a name, the page stays one.
    let file = bench.write("send.toml", "[[source]]\nfiles = 'app.log'\nname = 'a\"b\\c'\n");
    let arguments = ["--config", file.to_str().expect("UTF-8"), "--metrics", &metrics, "--ca", &ca];
    let command = bench.send_command(&url, &arguments);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    bench.wait_for_lines(1);
    let pages = [page(at_sender), page(at_receiver)];
    assert!(pages[0].contains("source=\"a\\\"b\\\\c\""), "{}", pages[0]);
    let expires = Scrape::of(at_receiver).get("waybill_certificate_expiry_timestamp_seconds");
    assert!(expires > 1.7e9, "{expires}");

    let examples = root().join("docs/examples");
    let on_pages: BTreeSet<&str> = pages.iter().flat_map(|page| named(page)).collect();
    for name in ["prometheus/waybill.rules.yml", "grafana/waybill.json"] {
        let text = fs::read_to_string(examples.join(name)).expect("the shipped file");
        let names = named(&text);
        assert!(names.len() > 5, "{name} names {names:?}");
        let unknown: Vec<_> = names.difference(&on_pages).collect();
        assert!(unknown.is_empty(), "{name} names what no page has: {unknown:?}");
    }
    let board =
        fs::read_to_string(examples.join("grafana/waybill.json")).expect("the shipped file");
    let board: Value = serde_json::from_str(&board).expect("JSON");
    assert!(board["panels"].as_array().is_some_and(|panels| panels.len() > 5));

    for page in &pages {
        let Some(mut command) = promtool(&["check", "metrics"]) else { return };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut checking = command.spawn().expect("promtool starts");
        checking.stdin.take().expect("piped").write_all(page.as_bytes()).expect("write");
        let output = checking.wait_with_output().expect("promtool ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.is_empty(), "{said}\n{page}");
    }
    let at = |name: &str| examples.join(name).display().to_string();
    for arguments in [
        ["check", "rules", &at("prometheus/waybill.rules.yml")],
        ["check", "config", &at("prometheus/prometheus.yml")],
        ["test", "rules", &at("prometheus/waybill.test.yml")],
    ] {
        let Some(command) = promtool(&arguments) else { return };
        let finished = run(command);
        assert!(finished.status.success(), "{}\n{}", finished.stdout, finished.stderr);
    }
    let check = |rules: &[Value]| {
        let groups = serde_json::json!({"groups": [{"name": "board", "rules": rules}]});
        let file = bench.write("board.rules.yml", groups.to_string()).display().to_string();
        run(promtool(&["check", "rules", &file]).expect("as before"))
    };
    let mut rules = expressions(&board);
    assert!(rules.len() > 8, "{rules:?}");
    let checked = check(&rules);
    let found = format!("SUCCESS: {} rules found", rules.len());
    assert!(checked.stdout.contains(&found), "{}\n{}", checked.stdout, checked.stderr);
    // It does look.
    rules
        .push(serde_json::json!({"record": "broken", "expr": "sum by (job (waybill_lines_total)"}));
    assert!(!check(&rules).status.success());
    assert!(sender.stop().success());
}
