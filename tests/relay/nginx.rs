//! nginx on both ends: its log lines on a Unix datagram socket, and its front before receivers.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::support::servers::{Nginx, free_port, have, http, root, skip, spawn_bound, wait_until};
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, waybill};

fn shipped(file: &str, changes: &[(&str, String)]) -> String {
    let mut text = fs::read_to_string(root().join("nginx").join(file)).expect("the shipped file");
    for (from, to) in changes {
        assert!(text.contains(from), "nginx/{file} no longer holds {from:?}");
        text = text.replace(from, to);
    }
    text
}

/// The front for several receivers with certificates and sockets in `folder`.
pub fn front(folder: &Path, port: u16) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    shipped(
        "receivers.conf",
        &[
            ("/run/waybill/receive", at("receive")),
            ("listen 443 ssl;", format!("listen 127.0.0.1:{port} ssl;")),
            ("listen [::]:443 ssl;", String::new()),
            ("/etc/ssl/certs/logs.example.org.pem", at("server.pem")),
            ("/etc/ssl/private/logs.example.org.key", at("server.key")),
            ("/etc/ssl/certs/waybill-clients.pem", at("ca.pem")),
            ("server_name logs.example.org", "server_name localhost".to_owned()),
        ],
    )
}

pub fn http_block(text: &str) -> String {
    format!("events {{}}\nhttp {{\n{text}\n}}\n")
}

/// With a path changed here and there, every file that we ship is one that nginx takes.
#[test]
fn nginx_accepts_every_shipped_file() {
    let folder = tempfile::tempdir().expect("a folder");
    Certificates::make(folder.path());
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut found = 0;
    for entry in fs::read_dir(root().join("nginx")).expect("the folder") {
        let name = entry.expect("an entry").file_name().into_string().expect("a name");
        if !name.ends_with(".conf") {
            continue;
        }
        let text = fs::read_to_string(root().join("nginx").join(&name)).expect("the file");
        let text = text
            .replace("/etc/ssl/certs/logs.example.org.pem", &at("server.pem"))
            .replace("/etc/ssl/private/logs.example.org.key", &at("server.key"))
            .replace("/etc/ssl/certs/waybill-clients.pem", &at("ca.pem"));
        let Some(checked) = Nginx::check(folder.path(), &http_block(&text)) else { return };
        checked.unwrap_or_else(|said| panic!("nginx/{name}:\n{said}"));
        found += 1;
    }
    assert!(found >= 3, "only {found} files");
}

/// The numbers of `"path":"/r/N"` and how often each stands in `text`.
fn numbers(lines: impl Iterator<Item = String>) -> BTreeMap<u64, usize> {
    let mut numbers = BTreeMap::new();
    for line in lines {
        let number = line.split("/r/").nth(1).map(|rest| {
            rest.bytes().take_while(u8::is_ascii_digit).fold(0, |n, b| n * 10 + u64::from(b - b'0'))
        });
        *numbers.entry(number.unwrap_or(u64::MAX)).or_default() += 1;
    }
    numbers
}

/// Waits until what was queued before is decided: the queue keeps its order.
pub fn wait_for_the_queue(bench: &Bench, marker: &str) {
    let client = UnixDatagram::unbound().expect("a socket");
    client.send_to(format!("<13>{marker}").as_bytes(), bench.path("nginx.sock")).expect("send");
    wait_until(marker, PATIENCE, || bench.messages().iter().any(|message| message == marker));
}

/// What nginx wrote into a file of its own at the same moment is what is stored: over a reload, a
/// restart, and kills that may cut between its two writes of a line. Requests come in rounds that
/// the socket's queue has room for, since nginx drops without a word what does not fit.
#[test]
fn every_line_that_nginx_could_send_is_stored_once() {
    const ROUND: usize = 8;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let text = shipped(
        "access-log.conf",
        &[("/run/waybill/nginx.sock", bench.path("nginx.sock").display().to_string())],
    );
    let text = http_block(&format!(
        "{text}\naccess_log reference.log waybill;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ return 204; }}\n\
         location /gone {{ root /nonexistent; }} }}"
    ));
    let arguments =
        ["--unix-datagram", "nginx.sock", "--type", "nginx", "--receipts", "receipts.jsonl"];
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("listening for datagrams");
    let Some(mut nginx) = Nginx::start(&text) else { return };
    let reference = nginx.folder().join("reference.log");
    let lines_of = |path: &Path| {
        fs::read(path).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count()
    };

    let stop = AtomicBool::new(false);
    let next = AtomicUsize::new(0);
    let kills = AtomicUsize::new(0);
    let request = || {
        let path = format!("/r/{}", next.fetch_add(1, Ordering::Relaxed));
        // Refused while nginx is away: then it has no line either.
        let _ = http(&format!("127.0.0.1:{port}"), "GET", &path, "text/plain", b"");
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                thread::scope(|round| {
                    for _ in 0..2 {
                        round.spawn(|| (0..ROUND / 2).for_each(|_| request()));
                    }
                });
                wait_until("receipts of a round", PATIENCE, || {
                    let lost = kills.load(Ordering::Relaxed);
                    lines_of(&bench.path("receipts.jsonl")) + lost >= lines_of(&reference)
                });
            }
        });
        let requests = |more: usize| {
            let target = next.load(Ordering::Relaxed) + more;
            wait_until("requests", PATIENCE, || next.load(Ordering::Relaxed) >= target);
        };
        requests(100);
        nginx.reload(&text);
        requests(100);
        nginx.stop();
        nginx.restart();
        requests(100);
        for _ in 0..3 {
            kills.fetch_add(1, Ordering::Relaxed);
            nginx.kill_hard();
            nginx.restart();
            requests(50);
        }
        stop.store(true, Ordering::Relaxed);
    });
    // The error log shares the socket, which has room by now.
    wait_for_the_queue(&bench, "all is read");
    let gone = http(&format!("127.0.0.1:{port}"), "GET", "/gone", "text/plain", b"");
    assert_eq!(gone.expect("an answer").0, 404);
    nginx.stop();
    // What is read at the stop itself stays in the spool, for the next run.
    wait_for_the_queue(&bench, "the last is read");
    let accepted = fs::read_to_string(&reference).expect("a log");
    let accepted = numbers(accepted.lines().filter(|line| line.contains("/r/")).map(str::to_owned));
    assert!(sender.stop().success(), "drained");
    let documents = bench.stored();
    let errors: Vec<_> = documents
        .iter()
        .filter(|document| document["message"].to_string().contains("/nonexistent/gone"))
        .collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0]["log"]["level"], "error", "{}", errors[0]);
    let stored = numbers(
        documents
            .iter()
            .map(|document| document["url"].to_string())
            .filter(|url| url.contains("/r/")),
    );
    let kills = kills.into_inner();
    let missing = accepted.keys().filter(|number| !stored.contains_key(number)).count();
    let more = stored.keys().filter(|number| !accepted.contains_key(number)).count();
    println!(
        "nginx wrote {} lines into its file; {} stored, {missing} missing, {more} more, {kills} kills",
        accepted.len(),
        stored.len(),
    );
    assert!(stored.values().all(|count| *count == 1), "stored twice");
    assert!(accepted.len() > 300, "{}", accepted.len());
    // Each kill may fall between the two writes of one line.
    assert!(missing + more <= kills, "{missing} missing, {more} more");
}

/// `waybill send` on the socket NAME, with descriptor 3 as a service manager passes it.
pub fn activated(bench: &Bench, url: &str, name: &str, socket: &UnixDatagram) -> Process {
    let inner = bench.send_command(url, &["--unix-datagram", name]);
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command.current_dir(inner.get_current_dir().expect("a folder"));
    let fd = socket.as_raw_fd();
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are
    // async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // A copy has no close-on-exec flag; where it is number 3 already, it has.
            if libc::dup2(fd, 3) < 0 || libc::fcntl(3, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Process::start("activated sender", command, bench.path("activated.log"))
}

/// A socket that a service manager keeps: whatever is queued while the sender is away arrives
/// after its restart, and a stop in the middle of the stream loses nothing.
#[test]
fn the_queue_of_a_passed_socket_outlives_the_sender() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let socket = UnixDatagram::bind(bench.path("kept.sock")).expect("bind");
    let client = UnixDatagram::unbound().expect("socket");
    client.connect(bench.path("kept.sock")).expect("connect");

    // Stopped in the middle of the stream, again and again; the client waits while it is full.
    const LINES: usize = 20_000;
    let writing = thread::spawn(move || {
        for number in 0..LINES {
            client.send(format!("<13>stream {number}").as_bytes()).expect("send");
        }
        client
    });
    for _ in 0..4 {
        let mut sender = activated(&bench, &receiver.url(), "kept.sock", &socket);
        sender.wait_for_log("taken from the service manager");
        thread::sleep(Duration::from_millis(100));
        assert!(sender.stop().success());
        assert!(bench.path("kept.sock").exists(), "the socket is another's");
        fs::remove_file(bench.path("activated.log")).expect("a fresh log");
    }
    let mut sender = activated(&bench, &receiver.url(), "kept.sock", &socket);
    let client = writing.join().expect("all sent");
    wait_until("every line", PATIENCE, || bench.messages().len() >= LINES);

    // Killed while idle; what fits into the queue waits for the next start.
    sender.kill_hard();
    client.set_nonblocking(true).expect("nonblocking");
    let mut queued = 0;
    while queued < 5000 && client.send(format!("<13>queued {queued}").as_bytes()).is_ok() {
        queued += 1;
    }
    println!("{queued} datagrams queued while the sender was away");
    assert!(queued > 0);
    let mut sender = activated(&bench, &receiver.url(), "kept.sock", &socket);
    wait_until("what was queued", PATIENCE, || bench.messages().len() >= LINES + queued);
    assert!(sender.stop().success());
    let mut messages = bench.messages();
    assert_eq!(messages.len(), LINES + queued);
    messages.dedup();
    assert_eq!(messages.len(), LINES + queued, "nothing twice");
}

#[test]
fn systemd_socket_activate_starts_the_sender_with_its_socket() {
    if !have("systemd-socket-activate", "systemd") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let path = bench.path("activated.sock");
    let inner = bench.send_command(&receiver.url(), &["--unix-datagram", "activated.sock"]);
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--datagram").arg("--listen").arg(&path);
    command.arg(inner.get_program()).args(inner.get_args());
    command.current_dir(inner.get_current_dir().expect("a folder"));
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    wait_until("the socket", PATIENCE, || path.exists());
    let client = UnixDatagram::unbound().expect("socket");
    client.connect(&path).expect("connect");
    for number in 0..50 {
        client.send(format!("<13>line {number}").as_bytes()).expect("send");
    }
    wait_until("every line", PATIENCE, || bench.messages().len() == 50);
    sender.wait_for_log("taken from the service manager");
    assert!(sender.stop().success());
}

/// The shipped front before two receivers: one is enough, the other takes over, and a client that
/// dials too often is told to wait.
#[test]
fn the_front_for_several_receivers_spreads_limits_and_names_certificates() {
    if !have("curl", "curl") || !have("openssl", "openssl") {
        return;
    }
    let bench = Bench::new();
    // A name of its own: OpenSSL takes a certificate with its issuer's name for a self-signed one.
    let certificates =
        Certificates::make_with(&bench.path(""), &["localhost", "127.0.0.1"], |parameters| {
            parameters.distinguished_name = rcgen::DistinguishedName::new();
            parameters.distinguished_name.push(rcgen::DnType::CommonName, "web-1");
        });
    bench.token("test");
    let port = free_port();
    let receive = |number: u32| {
        let mut command = waybill();
        command
            .arg("receive")
            .arg("--listen")
            .arg(format!("unix:{}", bench.path(&format!("receive-{number}.sock")).display()))
            .arg("--tokens")
            .arg(bench.path("tokens.toml"))
            .arg("--store")
            .arg(bench.path("store.sqlite"));
        let log = bench.path(&format!("receive-{number}.log"));
        let process = Process::start("receiver", command, log);
        process.wait_for_log("listening");
        process
    };
    let mut first = receive(1);
    let text = http_block(&front(&bench.path(""), port));
    let Some(_nginx) = Nginx::start(&text) else { return };
    let url = format!("wss://localhost:{port}/");
    let ca = certificates.ca.display().to_string();
    bench.write("app.log", lines("line", 1000));
    let sender = Process::start(
        "sender",
        bench.send_command(&url, &["app.log", "--ca", &ca]),
        bench.path("sender.log"),
    );
    wait_until("the first lines", PATIENCE, || bench.messages().len() == 1000);
    // Each takes over from the other, over the store that they share here one after the other.
    first.kill_hard();
    let second = receive(2);
    bench.append("app.log", lines("more", 1000));
    wait_until("the other lines", PATIENCE, || bench.messages().len() == 2000);
    drop((sender, second));

    // What nginx knows of a certificate arrives; what a client claims does not.
    fs::remove_file(bench.path("receive-2.sock")).ok();
    let listener = UnixListener::bind(bench.path("receive-2.sock")).expect("a socket");
    let heads = thread::spawn(move || {
        let mut heads = Vec::new();
        for stream in listener.incoming().take(2) {
            let mut stream = stream.expect("a connection");
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("read") > 0 {
                head.push(byte[0]);
            }
            stream
                .write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
                .expect("sent");
            heads.push(String::from_utf8_lossy(&head).into_owned());
        }
        heads
    });
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", &ca])
            .args(["-H", "X-Client-Verify: SUCCESS", "-H", "X-Client-Certificate: forged"])
            .args(arguments)
            .arg(format!("https://localhost:{port}/"))
            .output()
            .expect("curl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (pem, key) = (bench.path("server.pem"), bench.path("server.key"));
    let (pem, key) = (pem.display().to_string(), key.display().to_string());
    wait_until("an answer without a certificate", PATIENCE, || curl(&[]) == "204");
    assert_eq!(curl(&["--cert", &pem, "--key", &key]), "204");
    let heads = heads.join().expect("two requests");
    assert!(heads[0].contains("X-Client-Verify: NONE\r\n"), "{}", heads[0]);
    assert!(!heads[0].contains("forged"), "{}", heads[0]);
    assert!(heads[1].contains("X-Client-Verify: SUCCESS\r\n"), "{}", heads[1]);
    assert!(heads[1].contains("X-Client-Certificate: -----BEGIN%20CERT"), "{}", heads[1]);

    // Over one connection, hence faster than any limit that suits senders.
    let answers = Command::new("curl")
        .args(["-s", "-w", "%{stderr}%{http_code} ", "--cacert", &ca])
        .arg(format!("https://localhost:{port}/[1-200]"))
        .output()
        .expect("curl");
    let answers = String::from_utf8_lossy(&answers.stderr).into_owned();
    assert!(answers.contains("429"), "no limit: {answers}");
}

/// `scripts/stack` as CI runs it: the counts at each hop agree.
#[test]
fn the_whole_stack_loses_and_doubles_nothing() {
    for (program, package) in [
        ("nginx", "nginx"),
        ("syslog-ng", "syslog-ng-core"),
        ("supervisord", "supervisor"),
        ("wrk", "wrk"),
    ] {
        if !have(program, package) {
            return;
        }
    }
    let log = tempfile::NamedTempFile::new().expect("a file");
    let mut command = Command::new(root().join("scripts/stack"));
    command.args(["--requests", "5000"]).env("WAYBILL", env!("CARGO_BIN_EXE_waybill"));
    command.stdin(std::process::Stdio::null());
    command.stdout(log.reopen().expect("a file")).stderr(log.reopen().expect("a file"));
    let mut child = spawn_bound(command).expect("the script runs");
    let status = child.wait().expect("it ends");
    let said = fs::read_to_string(log.path()).unwrap_or_default();
    if status.code() == Some(77) {
        skip(&said);
        return;
    }
    println!("{said}");
    assert!(status.success(), "{status}\n{said}");
    assert!(said.contains("the counts agree"), "{said}");
    let hop = |name: &str| {
        let line = said.lines().find(|line| line.trim().starts_with(name));
        let count = line.and_then(|line| line.split_whitespace().last()?.parse::<i64>().ok());
        count.unwrap_or_else(|| panic!("no count of {name:?} in:\n{said}"))
    };
    assert!(hop("Elasticsearch: documents") >= 5000, "{said}");
    let dropped = hop("of them dropped at the socket");
    // Without a network namespace the queue of nginx's socket is as short as this machine has it.
    if !have("unshare", "util-linux") || !have("ip", "iproute2") {
        return;
    }
    let namespace = Command::new("unshare").args(["--net", "true"]).status();
    if namespace.is_ok_and(|done| done.success()) {
        assert_eq!(dropped, 0, "{said}");
    } else {
        skip("lines dropped at nginx's socket: a network namespace needs root");
    }
}
