//! The shipped fronts before real receivers: nothing is lost or doubled whatever nginx does, its limits hold, and a
//! session that is idle stays.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::certificates::nginx_text;
use super::nginx::{front, http_block};
use super::support::documents::prefix;
use super::support::servers::{Elasticsearch, Nginx, free_port, wait_until};
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, numbered, waybill};

/// A name of its own: OpenSSL takes a certificate with its issuer's name for a self-signed one.
fn certificates(bench: &Bench) -> Certificates {
    Certificates::make_with(&bench.path(""), &["localhost"], |parameters| {
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "logs");
    })
}

fn receive(bench: &Bench, listen: &str, arguments: &[&str]) -> Process {
    let mut command = waybill();
    command.arg("receive").args(["--listen", listen, "--tokens"]).arg(bench.path("tokens.toml"));
    command.args(arguments);
    let log = bench.path(&format!("receiver-{}.log", free_port()));
    let process = Process::start("receiver", command, log);
    process.wait_for_log("listening");
    process
}

/// A sender of `NAME.log` with the token and the state of that name.
fn sender(bench: &Bench, name: &str, port: u16) -> Process {
    let mut command = waybill();
    command.arg("send").arg(bench.path(&format!("{name}.log")));
    command.args(["--to", &format!("wss://localhost:{port}/"), "--ca"]).arg(bench.path("ca.pem"));
    command.arg("--token-file").arg(bench.token(name)).arg("--state-dir").arg(bench.path(name));
    Process::start("sender", command, bench.path(&format!("{name}-sender.log")))
}

/// Two senders through nginx, which reloads, restarts and is killed while lines are on their way to receivers that
/// listen at `listen`.
fn lines_survive(text: &str, port: u16, bench: &Bench, listen: &[(String, Vec<&str>)]) {
    const LINES: usize = 10_000;
    const SENDERS: [&str; 2] = ["a", "b"];
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else { return };
    let Some(mut nginx) = Nginx::start(text) else { return };
    let senders: Vec<Process> = SENDERS
        .iter()
        .map(|name| {
            bench.write(&format!("{name}.log"), "");
            sender(bench, name, port)
        })
        .collect();
    let (prefix, url) = (prefix("front"), elasticsearch.url());
    let (index, dead) = (format!("{prefix}-{{type}}-{{yyyy.MM.dd}}"), format!("{prefix}-dead"));
    let into = ["--elasticsearch", &url, "--index", &index, "--dead-letter-index", &dead];
    let receivers: Vec<Process> = listen
        .iter()
        .map(|(address, more)| receive(bench, address, &[&into[..], more].concat()))
        .collect();
    let pattern = format!("{prefix}-*");
    let stored = || elasticsearch.count(&pattern);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for name in SENDERS {
            let done = &done;
            scope.spawn(move || {
                // A piece at a time until the last restart is over, so that every disturbance meets lines on their way.
                for piece in lines(name, LINES).as_bytes().chunks(509) {
                    bench.append(&format!("{name}.log"), piece);
                    if !done.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
            });
        }
        let connections = || -> usize {
            receivers.iter().map(|one| one.log().matches("sender connected").count()).sum()
        };
        let back = |what: &str, before: usize| {
            wait_until(what, PATIENCE, || connections() >= before + SENDERS.len());
        };
        back("both senders are there", 0);
        wait_until("first lines", PATIENCE, || stored() > 0);
        nginx.reload(text);
        let before = connections();
        nginx.stop();
        nginx.restart();
        back("both senders are back after a restart", before);
        let before = connections();
        nginx.kill_hard();
        nginx.restart();
        back("both senders are back after a kill", before);
        done.store(true, Ordering::Relaxed);
    });
    let all = u64::try_from(SENDERS.len() * LINES).expect("few");
    wait_until("every line is stored", PATIENCE, || stored() >= all);
    for mut sender in senders {
        assert!(sender.stop().success());
    }
    for receiver in &receivers {
        assert!(receiver.log().contains("sender connected"), "one receiver was never used");
    }
    let documents = elasticsearch.all_documents(&pattern);
    let mut messages: Vec<&str> =
        documents.values().filter_map(|document| document["message"].as_str()).collect();
    messages.sort_unstable();
    let mut expected: Vec<String> = SENDERS.iter().flat_map(|name| numbered(name, LINES)).collect();
    expected.sort();
    assert_eq!(messages.len(), expected.len());
    assert!(messages == expected, "not the lines that were written");
}

fn unix(bench: &Bench, name: &str) -> String {
    format!("unix:{}", bench.path(name).display())
}

#[test]
fn lines_survive_what_the_front_of_one_receiver_does() {
    let bench = Bench::new();
    certificates(&bench);
    let port = free_port();
    let text = nginx_text(&bench.path(""), port);
    lines_survive(&text, port, &bench, &[(unix(&bench, "receive.sock"), Vec::new())]);
}

#[test]
fn lines_survive_what_the_front_of_several_receivers_does() {
    let bench = Bench::new();
    certificates(&bench);
    let port = free_port();
    let text = http_block(&front(&bench.path(""), port));
    let listen = [1, 2].map(|number| (unix(&bench, &format!("receive-{number}.sock")), Vec::new()));
    lines_survive(&text, port, &bench, &listen);
}

/// As the comments of the shipped file have it for receivers on other machines.
#[test]
fn lines_survive_what_the_front_of_receivers_on_other_machines_does() {
    let bench = Bench::new();
    let files = certificates(&bench);
    let (ca, certificate, key) = (
        files.ca.display().to_string(),
        files.certificate.display().to_string(),
        files.key.display().to_string(),
    );
    let port = free_port();
    let members = [free_port(), free_port()];
    let mut text = front(&bench.path(""), port);
    let member = |number: u32| {
        let socket = bench.path(&format!("receive-{number}.sock"));
        format!("    server unix:{} max_fails=0;\n", socket.display())
    };
    for (from, to) in [
        (member(1), String::new()),
        (member(2), String::new()),
        (
            "    #   server 10.0.0.11:8443 max_fails=1 fail_timeout=5s;\n".to_owned(),
            members
                .map(|port| format!("server 127.0.0.1:{port} max_fails=1 fail_timeout=5s;\n"))
                .concat(),
        ),
        (
            "proxy_pass http://waybill_receivers/;".to_owned(),
            format!(
                "proxy_pass https://waybill_receivers/; proxy_ssl_verify on; proxy_ssl_name localhost;\n\
                 proxy_ssl_trusted_certificate {ca};"
            ),
        ),
    ] {
        assert!(text.contains(&from), "the shipped file no longer holds {from:?}");
        text = text.replace(&from, &to);
    }
    let listen = members.map(|port| {
        (format!("127.0.0.1:{port}"), vec!["--tls-cert", &certificate, "--tls-key", &key])
    });
    lines_survive(&http_block(&text), port, &bench, &listen);
}

/// Asks for `waybill.text.v1` without TLS; the status, and the connection where it is 101.
fn upgrade(port: u16, token: &str) -> (u16, TcpStream) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("nginx listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let request = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: waybill.text.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).expect("a whole head");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("a head is text");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{head}")), stream)
}

/// One short text message, masked with zeros (RFC 6455 §5.2).
fn say(stream: &mut TcpStream, text: &str) {
    let length = u8::try_from(text.len()).ok().filter(|length| *length < 126).expect("short");
    let frame = [&[0x81, 0x80 | length, 0, 0, 0, 0], text.as_bytes()].concat();
    stream.write_all(&frame).expect("the connection is there");
}

/// `limit_conn`: as many connections as the file says go on, one more is told to wait, and comes in once another ends.
#[test]
fn the_front_for_several_receivers_holds_as_many_connections_as_it_says() {
    const HELD: usize = 50;
    let bench = Bench::new();
    certificates(&bench);
    // A receiver allows each sender a share of these.
    let tokens: Vec<String> = (0..5)
        .map(|number| std::fs::read_to_string(bench.token(&format!("t{number}"))).expect("a token"))
        .collect();
    let (port, plain) = (free_port(), free_port());
    let tls = format!("listen 127.0.0.1:{port} ssl;");
    let text = front(&bench.path(""), port);
    assert!(text.contains(&tls) && text.contains(&format!("waybill_connections {HELD};")));
    let text = http_block(&text.replace(&tls, &format!("{tls} listen 127.0.0.1:{plain};")));
    let Some(nginx) = Nginx::start(&text) else { return };
    let store = bench.path("store.sqlite").display().to_string();
    let _receiver = receive(&bench, &unix(&bench, "receive-1.sock"), &["--store", &store]);
    let refused = || nginx.log().matches("limiting connections by zone").count();

    // The limit of handshakes refuses some of them as well; the error log tells one from the other.
    let attempt = |held: &mut Vec<TcpStream>| match upgrade(plain, tokens[held.len() / 12].trim()) {
        (101, stream) => held.push(stream),
        (429, _) => {
            // Nobody here answers a ping, but whoever says something is alive.
            held.iter_mut().for_each(|stream| say(stream, "still here"));
            thread::sleep(Duration::from_millis(100));
        }
        (status, _) => panic!("status {status} after {}", held.len()),
    };
    let mut held = Vec::new();
    wait_until("one connection too many", PATIENCE, || {
        attempt(&mut held);
        refused() > 0
    });
    assert_eq!(held.len(), HELD);
    for (number, stream) in held.iter_mut().enumerate() {
        say(stream, &format!("held {number}"));
    }
    wait_until("a line over each of them", PATIENCE, || {
        let said = bench.messages().into_iter().filter(|message| message.starts_with("held "));
        said.collect::<BTreeSet<_>>().len() == HELD
    });
    drop(held.pop());
    wait_until("its place is taken", PATIENCE, || {
        attempt(&mut held);
        held.len() == HELD
    });
}

/// nginx cuts a connection over which nothing came for `proxy_read_timeout`. Pings come sooner.
#[test]
fn pings_keep_an_idle_session_through_nginx() {
    // Above the longest pause between two pings, 22 s.
    const TIMEOUT: Duration = Duration::from_secs(25);
    let bench = Bench::new();
    certificates(&bench);
    let port = free_port();
    let shipped = "proxy_read_timeout    75s;";
    let text = nginx_text(&bench.path(""), port);
    assert!(text.contains(shipped));
    let text = text.replace(shipped, &format!("proxy_read_timeout {}s;", TIMEOUT.as_secs()));
    let Some(nginx) = Nginx::start(&text) else { return };
    bench.write("idle.log", "first\n");
    let mut sender = sender(&bench, "idle", port);
    let store = bench.path("store.sqlite").display().to_string();
    let receiver = receive(&bench, &unix(&bench, "receive.sock"), &["--store", &store]);
    bench.wait_for_lines(1);
    // There is nothing to wait for: what must not happen would happen by then.
    thread::sleep(TIMEOUT + Duration::from_secs(2));
    bench.append("idle.log", "second\n");
    bench.wait_for_lines(2);
    assert!(!nginx.log().contains("timed out"), "{}", nginx.log());
    assert_eq!(receiver.log().matches("sender connected").count(), 1, "{}", receiver.log());
    assert!(sender.stop().success());
}
