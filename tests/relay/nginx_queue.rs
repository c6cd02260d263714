//! What nginx can have queued at a Unix datagram socket that nobody reads (each worker's own send buffer bounds it, so
//! that more workers queue more), and which of its lines are lost when the socket or its reader goes: measured. The
//! table and the numbers in nginx/README.md come from here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::nginx::{activated, wait_for_the_queue};
use super::support::servers::{Nginx, free_port, have, http, root, skip, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, waybill};

/// Far more than the workers can queue.
const REQUESTS: usize = 3000;

/// `waybill send` in a network namespace of its own, in which sockets get the queue that we ship.
fn sender(bench: &Bench) -> Process {
    let mut inner = waybill();
    inner.arg("send").arg("--to").arg(format!("ws+unix:{}", bench.path("receive.sock").display()));
    inner.arg("--token-file").arg(bench.path("test.token"));
    inner.arg("--state-dir").arg(bench.path("state"));
    inner.arg("--unix-datagram").arg(bench.path("nginx.sock")).args(["--type", "nginx"]);
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", "sysctl --quiet -p \"$0\" && exec \"$@\""]);
    command.arg(root().join("docs/examples/sysctl.d/60-waybill.conf"));
    command.arg(inner.get_program()).args(inner.get_args());
    command.env_remove("JOURNAL_STREAM").env("NO_COLOR", "1");
    let sender = Process::start("sender", command, bench.path("sender.log"));
    sender.wait_for_log("queue_datagrams=\"8192\"");
    sender
}

/// nginx with the shipped logging; the same lines are in `reference.log`, and which worker wrote them in `workers.log`.
fn nginx(bench: &Bench, port: u16, workers: usize) -> Option<Nginx> {
    let text = fs::read_to_string(root().join("nginx/access-log.conf")).expect("the shipped file");
    let socket = bench.path("nginx.sock").display().to_string();
    assert!(text.contains("/run/waybill/nginx.sock"));
    let text = text.replace("/run/waybill/nginx.sock", &socket);
    Nginx::start(&format!(
        "worker_processes {workers};\nevents {{}}\nhttp {{\n{text}\naccess_log reference.log waybill;\n\
         log_format worker '$pid $request_uri';\naccess_log workers.log worker;\n\
         server {{ listen 127.0.0.1:{port} reuseport; location / {{ return 204; }} }}\n}}\n"
    ))
}

/// Access log lines that wait in the queue, and their mean length, while the reader sleeps.
fn queued_by(workers: usize) -> Option<(usize, usize)> {
    let bench = Bench::new();
    bench.token("test");
    let mut command = waybill();
    command.arg("receive").arg("--tokens").arg(bench.path("tokens.toml"));
    command.arg("--listen").arg(format!("unix:{}", bench.path("receive.sock").display()));
    command.arg("--store").arg(bench.path("store.sqlite"));
    let receiver = Process::start("receiver", command, bench.path("receiver.log"));
    receiver.wait_for_log("listening");
    let mut sender = sender(&bench);

    let port = free_port();
    let nginx = nginx(&bench, port, workers)?;
    sender.signal("-STOP");
    for number in 0..REQUESTS {
        let path = format!("/r/{number:05}");
        let answer = http(&format!("127.0.0.1:{port}"), "GET", &path, "text/plain", b"");
        assert_eq!(answer.expect("an answer").0, 204);
    }
    let reference = nginx.folder().join("reference.log");
    let written = || fs::read_to_string(&reference).unwrap_or_default();
    wait_until("nginx has logged every request", PATIENCE, || {
        written().lines().count() == REQUESTS
    });
    let mean = written().len() / REQUESTS;
    sender.signal("-CONT");
    // The queue keeps its order: what is behind it comes last.
    let stored = |part: &str| {
        bench.stored().iter().filter(|hit| hit["url"].to_string().contains(part)).count()
    };
    wait_until("a line behind the queue", PATIENCE, || {
        let _ = http(&format!("127.0.0.1:{port}"), "GET", "/behind", "text/plain", b"");
        stored("/behind") > 0
    });
    assert!(sender.stop().success());
    Some((stored("/r/"), mean))
}

#[test]
fn each_nginx_worker_queues_as_much_as_its_send_buffer_holds() {
    if !have("unshare", "util-linux") || !have("sysctl", "procps") || !have("nginx", "nginx") {
        return;
    }
    if !Command::new("unshare").args(["--net", "true"]).status().is_ok_and(|done| done.success()) {
        return skip("a network namespace needs root");
    }
    let Some((one, mean)) = queued_by(1) else { return };
    let Some((four, _)) = queued_by(4) else { return };
    println!("queued, at {mean} bytes a line: {one} lines by one worker, {four} by four");
    let buffer = fs::read_to_string("/proc/sys/net/core/wmem_default").expect("a setting");
    let buffer: usize = buffer.trim().parse().expect("a number");
    // The kernel charges each datagram for its own bookkeeping too, about twice a short line.
    assert!(one >= buffer / 1280 && one <= buffer / 512, "{one} lines by one worker");
    // Each worker has had its share of the requests, hence filled its own buffer.
    assert!(four >= 3 * one && four <= 4 * one + 4, "{four} lines by four workers, {one} by one");
}

/// Requests that the queue of any machine has room for.
const ROUND: usize = 8;

/// Asks for `/PHASE/N` until each worker has written two lines; the lines of each that are not stored, by their place
/// among its own.
fn lost_of(
    bench: &Bench,
    nginx: &Nginx,
    port: u16,
    workers: usize,
    phase: &str,
    is_read: bool,
) -> BTreeMap<u32, (Vec<usize>, usize)> {
    let log = nginx.folder().join("workers.log");
    let written = || {
        let mut written: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for line in fs::read_to_string(&log).unwrap_or_default().lines() {
            let (worker, path) = line.split_once(' ').expect("two fields");
            if path.starts_with(&format!("/{phase}/")) {
                written.entry(worker.parse().expect("a pid")).or_default().push(path.to_owned());
            }
        }
        written
    };
    let mut asked = 0;
    wait_until("each worker has written two lines", PATIENCE, || {
        for _ in 0..ROUND {
            let path = format!("/{phase}/{asked}");
            let answer = http(&format!("127.0.0.1:{port}"), "GET", &path, "text/plain", b"");
            assert_eq!(answer.expect("an answer").0, 204);
            asked += 1;
        }
        wait_until("nginx has logged them", PATIENCE, || {
            written().values().map(Vec::len).sum::<usize>() == asked
        });
        if is_read {
            wait_for_the_queue(bench, &format!("{phase} {asked}"));
        }
        let written = written();
        written.len() == workers && written.values().all(|lines| lines.len() >= 2)
    });
    let stored: BTreeSet<String> = bench
        .stored()
        .iter()
        .filter_map(|hit| hit["url"]["path"].as_str().map(str::to_owned))
        .collect();
    let lost = |lines: &Vec<String>| {
        let lost = (0..lines.len()).filter(|at| !stored.contains(&lines[*at])).collect();
        (lost, lines.len())
    };
    written().iter().map(|(worker, lines)| (*worker, lost(lines))).collect()
}

/// Each worker keeps its connection to the socket until a line of its own fails.
#[test]
fn without_a_reader_nginx_loses_every_line_or_one_per_worker_once_it_is_back() {
    for workers in [1, 4] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let arguments = ["--unix-datagram", "nginx.sock", "--type", "nginx"];
        let start = || {
            let sender = bench.sender(&receiver, &arguments);
            sender.wait_for_log("listening for datagrams");
            sender
        };
        let mut sender = start();
        let port = free_port();
        let Some(nginx) = nginx(&bench, port, workers) else { return };
        let lost = |phase, is_read| lost_of(&bench, &nginx, port, workers, phase, is_read);
        for (worker, (lost, _)) in lost("first", true) {
            assert!(lost.is_empty(), "worker {worker} of {workers} lost {lost:?}");
        }
        // Another socket at the same path, and nothing was written meanwhile: noticed by the first line of each.
        assert!(sender.stop().success());
        sender = start();
        for (worker, (lost, _)) in lost("renewed", true) {
            assert_eq!(lost, [0], "worker {worker} of {workers}");
        }
        assert!(sender.stop().success());
        for (worker, (lost, written)) in lost("away", false) {
            assert_eq!(lost.len(), written, "worker {worker} of {workers}");
        }
        sender = start();
        for (worker, (lost, _)) in lost("back", true) {
            assert!(lost.is_empty(), "worker {worker} of {workers} lost {lost:?}");
        }
        assert!(sender.stop().success());
    }
}

/// What the sender had read and not synced is gone with it: an unbroken run of lines up to the kill, none after.
#[test]
fn a_killed_sender_loses_only_what_it_had_read_of_a_kept_socket() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let socket = UnixDatagram::bind(bench.path("nginx.sock")).expect("bind");
    let port = free_port();
    let Some(nginx) = nginx(&bench, port, 1) else { return };
    let log = nginx.folder().join("workers.log");
    let written = || fs::read_to_string(&log).unwrap_or_default();
    let ask = |path: &str| {
        let answer = http(&format!("127.0.0.1:{port}"), "GET", path, "text/plain", b"");
        assert_eq!(answer.expect("an answer").0, 204);
    };
    let mut sender = activated(&bench, &receiver.url(), "nginx.sock", &socket);
    wait_for_the_queue(&bench, "up");
    let mut lost = 0;
    const KILLS: usize = 10;
    for kill in 0..KILLS {
        let asked = AtomicUsize::new(0);
        let killed = AtomicBool::new(false);
        thread::scope(|scope| {
            let asking = scope.spawn(|| {
                // As many as a short queue takes, before and after the kill.
                for number in 0..ROUND {
                    let tag = if killed.load(Ordering::SeqCst) { "after" } else { "before" };
                    ask(&format!("/{kill}/{tag}/{number}"));
                    asked.fetch_add(1, Ordering::SeqCst);
                }
            });
            // At once after another line each time, within the moment before its sync.
            while asked.load(Ordering::SeqCst) <= kill % ROUND && !asking.is_finished() {
                thread::yield_now();
            }
            sender.kill_hard();
            killed.store(true, Ordering::SeqCst);
        });
        for number in 0..2 {
            ask(&format!("/{kill}/after/last-{number}"));
        }
        sender = activated(&bench, &receiver.url(), "nginx.sock", &socket);
        wait_for_the_queue(&bench, &format!("kill {kill}"));
        let stored: Vec<String> = bench
            .stored()
            .iter()
            .filter_map(|hit| hit["url"]["path"].as_str().map(str::to_owned))
            .collect();
        let distinct: BTreeSet<&String> = stored.iter().collect();
        assert_eq!(distinct.len(), stored.len(), "stored twice");
        let written = written();
        let of_round: Vec<&str> = written
            .lines()
            .filter_map(|line| line.split_once(' ').map(|(_, path)| path))
            .filter(|path| path.starts_with(&format!("/{kill}/")))
            .collect();
        assert_eq!(of_round.len(), ROUND + 2);
        let gone: Vec<usize> = (0..of_round.len())
            .filter(|at| !stored.iter().any(|path| path == of_round[*at]))
            .collect();
        assert!(gone.windows(2).all(|pair| pair[1] == pair[0] + 1), "{gone:?} of {of_round:?}");
        assert!(
            gone.iter().all(|at| of_round[*at].contains("/before/")),
            "{gone:?} of {of_round:?}"
        );
        lost += gone.len();
    }
    println!("{lost} of {} lines lost at {KILLS} kills", KILLS * (ROUND + 2));
    assert!(sender.stop().success());
}
