//! How much nginx can have queued at a Unix datagram socket that nobody reads, measured: each worker's own send buffer
//! bounds it, so that more workers queue more. The numbers in nginx/README.md come from here.

use std::fs;
use std::process::Command;

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

    let text = fs::read_to_string(root().join("nginx/access-log.conf")).expect("the shipped file");
    let socket = bench.path("nginx.sock").display().to_string();
    assert!(text.contains("/run/waybill/nginx.sock"));
    let text = text.replace("/run/waybill/nginx.sock", &socket);
    let port = free_port();
    let nginx = Nginx::start(&format!(
        "worker_processes {workers};\nevents {{}}\nhttp {{\n{text}\naccess_log reference.log waybill;\n\
         server {{ listen 127.0.0.1:{port} reuseport; location / {{ return 204; }} }}\n}}\n"
    ))?;
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
