//! The pages under `docs/migration` are true: their files and commands are used as they stand, and the change that they
//! describe loses and doubles no line.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::documents::prefix;
use super::support::pages::Page;
use super::support::registries::{At, filestream_state, log_state, memlog, sincedb};
use super::support::servers::{
    Elasticsearch, SyslogNg, free_port, have, root, unpacked, wait_until,
};
use super::support::waybill::{Bench, PATIENCE, Process, lines, numbered};
use super::syslog_ng::stored;

fn wait_for_port(port: u16) {
    wait_until("the receiver listens", PATIENCE, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
}

/// What a page expects of whoever follows it: a token and, where that is asked for, the tokens file.
fn enrol(bench: &Bench, folder: &Path) {
    if !bench.path("test.token").exists() {
        bench.token("test");
    }
    fs::create_dir_all(folder.join("etc/waybill")).expect("folders");
    for (from, to) in [("test.token", "token"), ("tokens.toml", "tokens.toml")] {
        fs::copy(bench.path(from), folder.join("etc/waybill").join(to)).expect("copy");
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Each of these once, and nothing else.
#[track_caller]
fn assert_each_once(mut found: Vec<String>, expected: impl Iterator<Item = String>) {
    let mut expected: Vec<String> = expected.collect();
    found.sort();
    expected.sort();
    let strange: Vec<_> =
        found.iter().filter(|line| expected.binary_search(line).is_err()).take(5).collect();
    let missing = expected.iter().filter(|line| found.binary_search(line).is_err()).count();
    assert_eq!(
        (found.len(), missing, strange),
        (expected.len(), 0, vec![]),
        "lines, missing, strange"
    );
}

// --- tail and socat --------------------------------------------------------------------------------------------------

/// Whether a process has this file open, and stands at its end.
fn has_reached_the_end(path: &Path) -> bool {
    let size = fs::metadata(path).expect("there").len();
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let open = processes
        .filter_map(|process| fs::read_dir(process.path().join("fd")).ok())
        .flatten()
        .flatten();
    open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == path)).any(|fd| {
        let info = fd.path().to_string_lossy().replace("/fd/", "/fdinfo/");
        text(Path::new(&info)).lines().next() == Some(&format!("pos:\t{size}"))
    })
}

#[test]
fn from_tail_and_socat() {
    if !have("socat", "socat") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let folder = bench.path("machine");
    enrol(&bench, &folder);
    let address = format!("127.0.0.1:{}", receiver.port());
    let changes = [("127.0.0.1:7700", &*address)];
    let mut page = Page::open("docs/migration/tail-socat.md", None, &folder, &changes);
    let log = bench.write("machine/var/log/app.log", "from before the script\n");
    bench.write("machine/var/run/.keep", "");
    let mut collector = Command::new("socat");
    let socket = format!("UNIX-RECV:{}", folder.join("var/run/collector.sock").display());
    let collected = bench.path("collected");
    collector.args(["-u", &socket]).arg(format!("OPEN:{},creat,append", collected.display()));
    let _collector = Process::start("socat", collector, bench.path("socat.log"));
    wait_until("the collector listens", PATIENCE, || {
        folder.join("var/run/collector.sock").exists()
    });

    page.next("ship-app.sh");
    page.next("sh ");
    wait_until("tail has found the end", PATIENCE, || has_reached_the_end(&log));
    let append =
        |number: usize| bench.append("machine/var/log/app.log", format!("line {number}\n"));
    // socat waits half a second behind each line.
    (0..40).for_each(append);
    page.next("mv ");
    (40..60).for_each(append);
    page.next("waybill send");
    (60..100).for_each(append);
    let last = page.next("tail -n 1");
    wait_until("it has arrived", PATIENCE, || text(&collected).ends_with(&last));
    page.stop_one("sh ");
    bench.wait_for_lines(60);
    page.end();
    assert_each_once(text(&collected).lines().map(str::to_owned).collect(), numbered("line", 40));
    bench.assert_lines(numbered("line", 100).skip(40));
}

// --- syslog-ng -------------------------------------------------------------------------------------------------------

const MESSAGES: usize = 8_000;

/// syslog-ng's own configuration, which includes the page's files.
fn configuration(more: &str) -> String {
    format!(
        "@version: 3.38\n@include \"scl.conf\"\n{more}options {{ time-reopen(1); }};\n\
         source s_src {{ unix-stream(\"@FOLDER@/in.sock\" log-iw-size(10000)); }};\n\
         @include \"@FOLDER@/etc/syslog-ng/conf.d/*.conf\"\n"
    )
}

/// What in a page stands for this test's syslog-ng.
fn control(folder: &Path) -> Vec<(&'static str, String)> {
    let folder = folder.display();
    let option = format!("--control={folder}/syslog-ng.ctl");
    vec![
        (
            "syslog-ng --syntax-only",
            format!(
                "syslog-ng --syntax-only -f {folder}/syslog-ng.conf -R {folder}/syntax.persist"
            ),
        ),
        ("syslog-ng-ctl reload", format!("syslog-ng-ctl reload {option}")),
        ("syslog-ng-ctl stats", format!("syslog-ng-ctl stats {option}")),
    ]
}

fn page<'a>(heading: &str, folder: &Path, changes: &'a [(&'static str, String)]) -> Page {
    let changes: Vec<(&str, &'a str)> = changes.iter().map(|(from, to)| (*from, &**to)).collect();
    Page::open("docs/migration/syslog-ng.md", Some(heading), folder, &changes)
}

/// Writes `message 0` to `message N-1` into a syslog-ng, which holds it back at times.
struct Load {
    allowed: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Load {
    /// Begins, and pauses after so many.
    fn start(syslog_ng: &SyslogNg, allowed: usize) -> Load {
        let mut socket = UnixStream::connect(syslog_ng.folder().join("in.sock")).expect("connect");
        let allowed = Arc::new(AtomicUsize::new(allowed));
        let limit = Arc::clone(&allowed);
        let thread = thread::spawn(move || {
            for number in 0..MESSAGES {
                while number >= limit.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(1));
                }
                let line = format!("<13>Nov 21 10:00:00 app[7]: message {number}\n");
                socket.write_all(line.as_bytes()).expect("written");
            }
        });
        Load { allowed, thread }
    }

    fn go_on(&self) {
        self.allowed.store(MESSAGES, Ordering::Relaxed);
    }
}

/// How many messages wait in this destination's queue.
fn queued(syslog_ng: &SyslogNg, destination: &str) -> usize {
    let (_, stats) = syslog_ng.control("stats");
    let lines = stats.lines().filter(|line| line.contains(destination));
    lines.filter_map(|line| line.split_once(";queued;")?.1.parse::<usize>().ok()).sum()
}

#[test]
fn from_syslog_ng_network() {
    let port = free_port();
    let central = format!(
        "@version: 3.38\nsource s_net {{ network(ip(127.0.0.1) port({port})); }};\n\
         destination d_file {{ file(\"@FOLDER@/central.log\" template(\"$MSG\\n\")); }};\n\
         log {{ source(s_net); destination(d_file); flags(flow-control); }};\n"
    );
    let Some(mut central) = SyslogNg::start(&central) else { return };
    let arrived = central.folder().join("central.log");
    let bench = Bench::new();
    let receiver = bench.receiver();
    let folder = TempDir::new().expect("a folder");
    enrol(&bench, folder.path());
    let mut changes = control(folder.path());
    changes.push(("logs.example.com\" port(601)", format!("127.0.0.1\" port({port})")));
    changes.push(("127.0.0.1:7700", format!("127.0.0.1:{}", receiver.port())));
    let mut page = page("## From `network()`", folder.path(), &changes);

    page.next("ship.conf");
    let Some(syslog_ng) = SyslogNg::start_in(folder, &configuration("")) else { return };
    let load = Load::start(&syslog_ng, MESSAGES / 4);
    let arrived_count = || text(&arrived).lines().count();
    wait_until("a quarter is on the other side", PATIENCE, || arrived_count() == MESSAGES / 4);
    // The old receiver is away for a while. (What `network()` itself loses then is not the question here: nothing is in
    // flight.) So there is something in the queue when the configuration changes.
    central.stop();
    wait_until("syslog-ng has noticed", PATIENCE, || syslog_ng.log().contains("onnection closed"));
    load.go_on();
    wait_until("messages are queued", PATIENCE, || queued(&syslog_ng, "d_ship") > 0);
    page.next("ship.conf");
    page.next("syslog-ng-ctl reload");
    assert!(queued(&syslog_ng, "d_ship") > 0, "the queue outlives the reload");
    page.next("waybill send");
    central.restart();
    page.next("until syslog-ng-ctl stats");
    page.next("ship.conf");
    page.next("syslog-ng-ctl reload");
    load.thread.join().expect("every message is handed over");
    wait_until("everything has arrived", PATIENCE, || arrived_count() + stored(&bench) >= MESSAGES);
    page.end();
    let old: Vec<String> = text(&arrived).lines().map(str::to_owned).collect();
    let new = bench.messages();
    println!("{} messages by network(), {} by Waybill", old.len(), new.len());
    assert!(old.len() > MESSAGES / 4 && !new.is_empty());
    assert_each_once([old, new].concat(), numbered("message", MESSAGES));
}

#[test]
fn from_syslog_ng_elasticsearch_http() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let scl = "usr/share/syslog-ng/include/scl/elasticsearch/elastic-http.conf";
    let Some(packages) = unpacked("syslog-ng-scl", scl) else { return };
    let bench = Bench::new();
    let folder = TempDir::new().expect("a folder");
    enrol(&bench, folder.path());
    let (port, intake, name) = (free_port(), free_port(), prefix("migration"));
    let mut changes = control(folder.path());
    changes.push(("127.0.0.1:9200", elasticsearch.host_port().to_owned()));
    changes.push(("index(\"syslog-", format!("index(\"{name}-syslog-")));
    changes.push(("--index 'syslog-", format!("--index '{name}-syslog-")));
    changes.push(("127.0.0.1:7700", format!("127.0.0.1:{port}")));
    changes.push(("127.0.0.1:8514", format!("127.0.0.1:{intake}")));
    let own = format!("url(\"http://127.0.0.1:{intake}/\") dir(\"{}\")", folder.path().display());
    changes.push(("waybill();", format!("waybill({own});")));
    let mut page = page("## From `elasticsearch-http()`", folder.path(), &changes);

    page.next("ship.conf");
    let plugin = root().join("syslog-ng/scl/waybill/plugin.conf");
    let includes =
        [packages.join(scl), plugin].map(|path| format!("@include \"{}\"\n", path.display()));
    let Some(syslog_ng) = SyslogNg::start_in(folder, &configuration(&includes.concat())) else {
        return;
    };
    let load = Load::start(&syslog_ng, MESSAGES);
    let pattern = format!("{name}-syslog-*");
    wait_until("some are in Elasticsearch", PATIENCE, || elasticsearch.count(&pattern) > 1_000);
    page.next("waybill receive");
    wait_for_port(port);
    page.next("waybill send");
    page.next("ship.conf");
    page.next("syslog-ng-ctl reload");
    page.next("until syslog-ng-ctl stats");
    page.next("ship.conf");
    page.next("syslog-ng-ctl reload");
    load.thread.join().expect("every message is handed over");
    wait_until("everything is stored", PATIENCE, || {
        elasticsearch.count(&pattern) >= MESSAGES as u64
    });
    page.end();
    let documents = elasticsearch.all_documents(&pattern);
    let message = |document: &Value, name: &str| document[name].as_str().map(str::to_owned);
    let old: Vec<String> = documents.values().filter_map(|d| message(d, "MESSAGE")).collect();
    let new: Vec<String> = documents.values().filter_map(|d| message(d, "message")).collect();
    println!("{} messages by elasticsearch-http(), {} by Waybill", old.len(), new.len());
    assert!(old.len() > 1_000 && !new.is_empty());
    assert_each_once([old, new].concat(), numbered("message", MESSAGES));
    // Side by side in the indices of one pattern: no field of one is another kind of field of the other.
    let one =
        |name: &str| documents.values().find(|document| !document[name].is_null()).expect("one");
    let (old, new) = (one("MESSAGE"), one("message"));
    assert!(old["HOST"].is_string() && old["HOST"] == new["host"]["name"], "{old}\n{new}");
    assert_eq!((&old["PROGRAM"], &new["process"]["name"]), (&json!("app"), &json!("app")));
    let names = |document: &Value| {
        document.as_object().expect("fields").keys().cloned().collect::<Vec<_>>()
    };
    let shared: Vec<String> = names(old).into_iter().filter(|key| !new[key].is_null()).collect();
    assert_eq!(shared, ["@timestamp"], "{old}\n{new}");
}

// --- Registries ------------------------------------------------------------------------------------------------------

/// The files of the pages, and what stands for what.
fn nginx(bench: &Bench) -> (u16, Vec<(&'static str, String)>) {
    bench.write("logs/access.log", lines("current", 1000));
    bench.write("logs/access.log.1", lines("rotated", 1000));
    bench.write("logs/error.log", lines("failure", 10));
    let port = free_port();
    let own = |name: &str| bench.path(name).display().to_string();
    let changes = vec![
        ("/var/log/nginx/", own("logs/")),
        ("/var/lib/filebeat", own("registry")),
        ("/var/lib/logstash/plugins/inputs/file", own("registry")),
        ("/var/lib/waybill/store.sqlite", own("store.sqlite")),
        ("127.0.0.1:7700", format!("127.0.0.1:{port}")),
    ];
    (port, changes)
}

fn current() -> At<'static> {
    At::new("access.log", lines("current", 900).len())
}

fn rotated() -> At<'static> {
    At { was: "access.log", ..At::new("access.log.1", lines("rotated", 950).len()) }
}

/// Follows a page to its end, and looks that exactly the unread lines were sent, into indices of the old name.
fn follow(
    name: &str,
    steps: &[&str],
    bench: &Bench,
    port: u16,
    changes: &[(&'static str, String)],
) {
    let changes: Vec<(&str, &str)> = changes.iter().map(|(from, to)| (*from, &**to)).collect();
    let mut page = Page::open(name, None, &bench.path(""), &changes);
    page.next("waybill token");
    page.next("waybill receive");
    wait_for_port(port);
    steps.iter().for_each(|step| drop(page.next(step)));
    let unread = || {
        let rest = numbered("current", 1000).skip(900).chain(numbered("rotated", 1000).skip(950));
        rest.chain(numbered("failure", 10))
    };
    bench.append("logs/access.log", "written since\n");
    bench.wait_for_lines(unread().count() + 1);
    page.end();
    bench.assert_lines(unread().chain(["written since".to_owned()]));
    for line in bench.stored() {
        let index = line["_index"].as_str().expect("an index");
        let day = index.strip_prefix("web-").expect("the page's name");
        assert!(day.len() == 10 && day.split('.').count() == 3, "{index}");
        assert_eq!(line["waybill"]["type"], "nginx");
    }
}

#[test]
fn from_filebeat() {
    let bench = Bench::new();
    let (port, changes) = nginx(&bench);
    let (key, elsewhere) = log_state(&bench, &rotated());
    let elsewhere = elsewhere.replace("/logs/access.log", "/var/log/syslog");
    // The rotated file is the `log` input's, whose source stays the old path; the current one is filestream's.
    let (log_key, log) = log_state(&bench, &rotated());
    let states = [
        (key.replace("native::", "native::9"), elsewhere.replace("\"inode\":", "\"inode\":9")),
        (log_key, log),
        filestream_state(&bench, &current()),
    ];
    memlog(&bench, 0, states);
    let steps = ["send.toml", "--dry-run", "waybill import", "waybill send"];
    follow("docs/migration/filebeat.md", &steps, &bench, port, &changes);
}

#[test]
fn from_logstash() {
    let bench = Bench::new();
    let (port, changes) = nginx(&bench);
    sincedb(&bench, &[current(), rotated()]);
    let steps = ["--dry-run", "waybill import", "waybill send"];
    follow("docs/migration/logstash.md", &steps, &bench, port, &changes);
}

/// What the pages say of an index in which `host` is text.
#[test]
fn an_index_of_logstash_without_ecs_keeps_waybills_lines_out_and_loses_none() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let name = prefix("logstash");
    let receiver = bench.receiver_into(&elasticsearch.url(), &name);
    let path = bench.write("app.log", lines("line", 10));
    let day = super::support::documents::age(&path);
    let document = json!({"@timestamp": "2026-11-21T10:00:00Z", "host": "web1", "message": "x"});
    let (status, answer) =
        elasticsearch.request("POST", &format!("/{name}-default-{day}/_doc"), &document);
    assert_eq!(status, 201, "{answer}");
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("cannot store these lines yet");
    assert_eq!(elasticsearch.count(&format!("{name}-default-*")), 1);
    sender.stop();
}
