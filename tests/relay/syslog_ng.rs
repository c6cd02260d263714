//! The roads over a file and over the HTTP intake from a real syslog-ng, by the files in `syslog-ng/` as they are
//! shipped, with paths changed at most: 100,000 messages while Waybill is killed, stopped, away and started again.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use super::support::servers::{SyslogNg, free_port, root, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, Receiver};

const MESSAGES: usize = 100_000;

/// What every configuration of these tests has before the shipped file: what Debian's has.
pub const HEAD: &str = "@version: 3.38\n@include \"scl.conf\"\n";

/// A source that loses nothing itself: its writers wait.
pub const SOURCE: &str = "source s_src { unix-stream(\"@FOLDER@/in.sock\" log-iw-size(1000)); };\n";

pub fn shipped(name: &str) -> String {
    fs::read_to_string(root().join("syslog-ng").join(name)).expect("a shipped file")
}

/// Includes the shipped block `waybill` or `waybill-stream`.
pub fn plugin(name: &str) -> String {
    let path = root().join("syslog-ng/scl").join(name).join("plugin.conf");
    format!("@include \"{}\"\n", path.display())
}

/// With the paths and addresses of a test instead of those on a server.
pub fn with(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from} is in the shipped file");
        text.replace(from, to)
    })
}

/// Lines in the embedded store, the ones stored twice counted twice.
pub fn stored(bench: &Bench) -> usize {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let Ok(store) = Connection::open_with_flags(bench.path("store.sqlite"), flags) else {
        return 0;
    };
    let count = store.query_row("SELECT count(*) FROM lines", [], |row| row.get::<_, i64>(0));
    usize::try_from(count.unwrap_or(0)).expect("a count")
}

/// What the load generator has handed over.
struct Load {
    sent: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Load {
    fn start(mut write: impl FnMut(&str) + Send + 'static) -> Load {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let thread = thread::spawn(move || {
            for number in 0..MESSAGES {
                write(&format!("<13>Nov 21 10:00:00 app[7]: message {number}"));
                counter.store(number + 1, Ordering::Relaxed);
            }
        });
        Load { sent, thread }
    }

    /// Into [`SOURCE`].
    fn stream(folder: &Path) -> Load {
        let mut socket = UnixStream::connect(folder.join("in.sock")).expect("connect");
        Load::start(move |line| socket.write_all(format!("{line}\n").as_bytes()).expect("written"))
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    fn join(self) {
        self.thread.join().expect("every message is handed over");
    }
}

/// A sender that is stopped, killed and started again.
struct Mortal<'b> {
    bench: &'b Bench,
    receiver: &'b Receiver,
    arguments: Vec<String>,
    process: Process,
}

impl<'b> Mortal<'b> {
    fn start(bench: &'b Bench, receiver: &'b Receiver, arguments: &[&str]) -> Mortal<'b> {
        let process = bench.sender(receiver, arguments);
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Mortal { bench, receiver, arguments, process }
    }

    /// SIGKILL as soon as so many lines are stored, then another one.
    fn kill_at(&mut self, lines: usize) {
        self.wait_for(lines);
        self.process.kill_hard();
        self.start_again();
    }

    /// SIGTERM as soon as so many lines are stored, then another one.
    fn stop_at(&mut self, lines: usize) {
        self.wait_for(lines);
        // A process that was just started knows of no signals yet.
        self.process.wait_for_log("connected");
        assert!(self.process.stop().success());
        self.start_again();
    }

    fn wait_for(&mut self, lines: usize) {
        wait_until(&format!("{lines} lines are stored"), PATIENCE, || {
            assert!(self.process.is_running(), "the sender runs");
            stored(self.bench) >= lines
        });
    }

    fn start_again(&mut self) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.process = self.bench.sender(self.receiver, &arguments);
    }

    /// Waits for the last receipt and stops.
    fn finish(mut self) {
        self.process.wait_for_log("connected");
        assert!(self.process.stop().success());
    }
}

/// A counter of syslog-ng's, summed over its destinations to Waybill.
pub fn counter(syslog_ng: &SyslogNg, name: &str) -> usize {
    let (_, stats) = syslog_ng.control("stats");
    let lines = stats.lines().filter(|line| line.starts_with("dst.") && line.contains("waybill"));
    let counts = lines.filter_map(|line| line.split_once(&format!(";{name};")));
    counts.map(|(_, count)| count.trim().parse::<usize>().expect("a number")).sum()
}

fn wait_for_empty_queue(syslog_ng: &SyslogNg) {
    wait_until("syslog-ng has handed over everything", PATIENCE, || {
        counter(syslog_ng, "queued") == 0
    });
}

/// The messages that are stored, and how many documents there are.
fn messages(bench: &Bench) -> (BTreeSet<String>, usize) {
    let messages = bench.messages();
    let count = messages.len();
    (messages.into_iter().collect(), count)
}

fn expected() -> BTreeSet<String> {
    (0..MESSAGES).map(|number| format!("message {number}")).collect()
}

#[track_caller]
fn assert_each_once(bench: &Bench) {
    let (messages, count) = messages(bench);
    let missing = expected().difference(&messages).count();
    let strange: Vec<_> = messages.difference(&expected()).take(5).cloned().collect();
    assert_eq!((missing, count, strange), (0, MESSAGES, Vec::new()), "missing, stored, unknown");
}

fn intake_text(port: u16, more: &str) -> String {
    let url = format!("waybill(url(\"http://127.0.0.1:{port}/\") dir(\"@FOLDER@\") {more});");
    let road = with(&shipped("waybill-intake.conf"), &[("waybill();", &url)]);
    format!("{HEAD}{}{SOURCE}{road}", plugin("waybill"))
}

/// The shipped file of road (a) in a folder of the test's.
pub fn file_text() -> String {
    let changes = [
        ("/run/waybill/", "@FOLDER@/"),
        ("/var/log/waybill/outgoing.log\"", "@FOLDER@/outgoing.log\""),
    ];
    format!("{HEAD}{}", with(&shipped("waybill.conf"), &changes))
}

/// A load into both sockets of road (a).
fn datagrams(folder: &Path) -> Load {
    let sockets = ["nginx.sock", "supervisor.sock"].map(|name| folder.join(name));
    let socket = UnixDatagram::unbound().expect("a socket");
    let mut number = 0;
    Load::start(move |line| {
        // Blocks while the queue is full, unlike nginx.
        socket.send_to(line.as_bytes(), &sockets[number % 2]).expect("sent");
        number += 1;
    })
}

/// Road (a).
#[test]
fn a_file_between_syslog_ng_and_waybill_loses_and_doubles_nothing() {
    let bench = Bench::new();
    let Some(syslog_ng) = SyslogNg::start(&file_text()) else { return };
    let receiver = bench.receiver();
    let file = syslog_ng.folder().join("outgoing.log");
    let mut sender = Mortal::start(&bench, &receiver, &[&file.display().to_string()]);
    let load = datagrams(syslog_ng.folder());
    for (round, lines) in [10_000, 30_000, 50_000, 70_000, 90_000].into_iter().enumerate() {
        if round % 2 == 0 {
            sender.kill_at(lines);
        } else {
            sender.stop_at(lines);
        }
        match round {
            1 | 3 => assert!(syslog_ng.control("reload").0.success()),
            // As its logrotate example does.
            2 => {
                fs::rename(&file, file.with_extension("log.1")).expect("rename");
                assert!(syslog_ng.control("reopen").0.success());
            }
            _ => {}
        }
    }
    load.join();
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= MESSAGES);
    sender.finish();
    assert_each_once(&bench);
}

/// Road (a).
#[test]
fn a_file_takes_everything_while_waybill_is_away() {
    let bench = Bench::new();
    let Some(syslog_ng) = SyslogNg::start(&file_text()) else { return };
    datagrams(syslog_ng.folder()).join();
    let file = syslog_ng.folder().join("outgoing.log");
    wait_until("everything is in the file", PATIENCE, || {
        let bytes = fs::read(&file).unwrap_or_default();
        memchr::memchr_iter(b'\n', &bytes).count() >= MESSAGES
    });
    let receiver = bench.receiver();
    bench.send_once(&receiver, &[&file.display().to_string()]).ok();
    assert_each_once(&bench);
}

/// Road (b).
#[test]
fn the_http_intake_loses_and_doubles_nothing_while_waybill_is_killed_and_stopped() {
    let bench = Bench::new();
    let port = free_port();
    let Some(mut syslog_ng) = SyslogNg::start(&intake_text(port, "")) else { return };
    let receiver = bench.receiver();
    let address = format!("127.0.0.1:{port}");
    let mut sender = Mortal::start(&bench, &receiver, &["--http-intake", &address]);
    let load = Load::stream(syslog_ng.folder());
    for (round, lines) in
        [5_000, 15_000, 25_000, 35_000, 45_000, 60_000, 75_000, 90_000].into_iter().enumerate()
    {
        if round % 2 == 0 {
            sender.kill_at(lines);
        } else {
            sender.stop_at(lines);
        }
        if round % 3 == 1 {
            assert!(syslog_ng.control("reload").0.success());
        }
    }
    load.join();
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= MESSAGES);
    wait_for_empty_queue(&syslog_ng);
    assert_eq!(counter(&syslog_ng, "dropped"), 0);
    sender.finish();
    assert_each_once(&bench);
    syslog_ng.stop();
}

/// Road (b).
#[test]
fn syslog_ng_takes_everything_while_the_http_intake_is_away() {
    let bench = Bench::new();
    let port = free_port();
    let Some(syslog_ng) = SyslogNg::start(&intake_text(port, "")) else { return };
    Load::stream(syslog_ng.folder()).join();
    wait_until("syslog-ng has read everything", PATIENCE, || {
        counter(&syslog_ng, "processed") == MESSAGES
    });
    assert_eq!(counter(&syslog_ng, "written"), 0);
    let receiver = bench.receiver();
    let address = format!("127.0.0.1:{port}");
    let mut sender = bench.sender(&receiver, &["--http-intake", &address]);
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= MESSAGES);
    wait_until("every post is answered", PATIENCE, || counter(&syslog_ng, "written") == MESSAGES);
    assert_eq!(counter(&syslog_ng, "dropped"), 0);
    assert!(sender.stop().success());
    assert_each_once(&bench);
}

#[test]
fn a_full_spool_holds_syslog_ng_back_and_loses_nothing() {
    let bench = Bench::new();
    let port = free_port();
    // A small disk-buffer, so that the sources are held back too.
    let text = intake_text(port, "disk-buf-size(2097152) mem-buf-size(1048576)");
    let Some(syslog_ng) = SyslogNg::start(&text) else { return };
    let mut receiver = bench.receiver();
    receiver.kill_hard();
    let address = format!("127.0.0.1:{port}");
    let arguments = ["--http-intake", &address, "--spool-bytes-max", "4MiB"];
    let mut sender = bench.sender(&receiver, &arguments);
    let load = Load::stream(syslog_ng.folder());
    sender.wait_for_log("post answered 503");
    let mut last = (0, Instant::now());
    wait_until("syslog-ng reads no more", PATIENCE, || {
        if load.sent() != last.0 {
            last = (load.sent(), Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(2)
    });
    assert!(load.sent() < MESSAGES, "its source is held back");
    // Killed while it is full; what it holds is taken up again.
    sender.kill_hard();
    let mut sender = bench.sender(&receiver, &arguments);
    receiver.start();
    load.join();
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= MESSAGES);
    wait_for_empty_queue(&syslog_ng);
    assert_eq!(counter(&syslog_ng, "dropped"), 0);
    assert!(sender.stop().success());
    assert_each_once(&bench);
}

#[test]
fn a_killed_syslog_ng_posts_its_disk_buffer_again_under_the_same_keys() {
    let bench = Bench::new();
    let port = free_port();
    let Some(mut syslog_ng) = SyslogNg::start(&intake_text(port, "")) else { return };
    let receiver = bench.receiver();
    let address = format!("127.0.0.1:{port}");
    let mut sender = Mortal::start(&bench, &receiver, &["--http-intake", &address]);
    let load = Load::stream(syslog_ng.folder());
    sender.kill_at(30_000);
    load.join();
    // What it has read lies in its disk-buffer, or is stored; only its own socket is a window.
    wait_until("syslog-ng has read everything", PATIENCE, || {
        counter(&syslog_ng, "processed") == MESSAGES
    });
    for lines in [60_000, 80_000] {
        wait_until("some more is stored", PATIENCE, || stored(&bench) >= lines);
        syslog_ng.kill_hard();
        syslog_ng.restart();
    }
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= MESSAGES);
    wait_for_empty_queue(&syslog_ng);
    sender.finish();
    assert_each_once(&bench);
}
