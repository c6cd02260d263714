//! Sockets and standard input: what was spooled and synced is never lost.

use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Stdio;

use super::support::servers::wait_until;
use super::support::waybill::{Bench, PATIENCE, Process, lines, numbered};

fn datagrams(bench: &Bench, name: &str, texts: impl Iterator<Item = String>) {
    let socket = UnixDatagram::unbound().expect("a socket");
    // Blocks while the queue is full, so that none is dropped here.
    for text in texts {
        socket.send_to(text.as_bytes(), bench.path(name)).expect("send");
    }
}

/// By the log: a process that was killed leaves a socket file behind.
fn wait_for_socket(sender: &Process, name: &str) {
    wait_until(&format!("{name} is bound"), PATIENCE, || {
        sender.log().lines().any(|line| line.contains("listening for") && line.contains(name))
    });
}

#[test]
fn datagrams_are_stored_once_and_the_spool_drains() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let arguments = ["--unix-datagram", "log.sock", "--type", "nginx"];
    let mut sender = bench.sender(&receiver, &arguments);
    wait_for_socket(&sender, "log.sock");
    datagrams(&bench, "log.sock", numbered("first", 1000));
    bench.wait_for_lines(1000);
    receiver.stop();
    datagrams(&bench, "log.sock", numbered("down", 5000));
    receiver.start();
    bench.wait_for_lines(6000);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 1000).chain(numbered("down", 5000)));
    assert!(bench.stored().iter().all(|line| line["waybill"]["type"] == "nginx"));
}

/// Guaranteed: what was synced before the kill (in groups of milliseconds) is sent by the next
/// start, once. What is still in the socket's queue or not yet synced goes with the process.
#[test]
fn what_was_spooled_outlives_the_sender() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    let arguments = ["--unix-datagram", "log.sock", "--unix-stream", "stream.sock"];
    let mut sender = bench.sender(&receiver, &arguments);
    wait_for_socket(&sender, "log.sock");
    wait_for_socket(&sender, "stream.sock");
    let mut expected = Vec::new();
    for round in 0..3 {
        let before = bench.bytes_below("state/spool");
        let tag = format!("datagram {round}");
        datagrams(&bench, "log.sock", numbered(&tag, 1000));
        let mut stream = UnixStream::connect(bench.path("stream.sock")).expect("connect");
        let text = lines(&format!("stream {round}"), 1000);
        stream.write_all(text.as_bytes()).expect("write");
        drop(stream);
        expected.extend(numbered(&tag, 1000));
        expected.extend(numbered(&format!("stream {round}"), 1000));
        // Every record has 18 bytes before its payload.
        let payloads = text.len() - 1000 + lines(&tag, 1000).len() - 1000;
        wait_until("everything is spooled", PATIENCE, || {
            bench.bytes_below("state/spool") >= before + (payloads + 2000 * 18) as u64
        });
        let mut synced = sender.log().len();
        if round == 2 {
            // Under way to the receiver when it is killed for the last time.
            receiver.start();
            bench.wait_for_lines(1);
            synced += 1;
        }
        assert!(synced > 0);
        sender.kill_hard();
        // The files of both sockets stay behind, and must not keep the next start from binding.
        sender = bench.sender(&receiver, &arguments);
        wait_for_socket(&sender, "log.sock");
        wait_for_socket(&sender, "stream.sock");
    }
    bench.wait_for_lines(expected.len());
    wait_until("receipted spool files are removed", PATIENCE, || {
        bench.bytes_below("state/spool") < 4096
    });
    assert!(sender.stop().success());
    bench.assert_lines(expected);
}

#[test]
fn a_stream_socket_takes_lines_and_counted_frames() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["--unix-stream", "log.sock", "--format", "raw"]);
    wait_for_socket(&sender, "log.sock");
    let mut plain = UnixStream::connect(bench.path("log.sock")).expect("connect");
    let mut counted = UnixStream::connect(bench.path("log.sock")).expect("connect");
    for number in 0..1000 {
        plain.write_all(format!("plain {number}\n").as_bytes()).expect("write");
        let frame = format!("<13>counted {number}");
        counted.write_all(format!("{} {frame}", frame.len()).as_bytes()).expect("write");
    }
    plain.write_all(b"no newline").expect("write");
    drop((plain, counted));
    bench.wait_for_lines(2001);
    assert!(sender.stop().success());
    let all = numbered("plain", 1000).chain(numbered("<13>counted", 1000));
    bench.assert_lines(all.chain(["no newline".to_owned()]));
}

#[test]
fn standard_input_ends_with_its_last_receipt() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut command = bench.send_command(&receiver.url(), &["-"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut sender = command.spawn().expect("waybill send");
    let mut input = sender.stdin.take().expect("piped");
    input.write_all(lines("line", 50_000).as_bytes()).expect("write");
    input.write_all(b"no newline").expect("write");
    drop(input);
    let output = sender.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    bench.assert_lines(numbered("line", 50_000).chain(["no newline".to_owned()]));
    assert_eq!(bench.bytes_below("state/spool"), 0, "receipted spool files are removed");
}

#[test]
fn standard_input_that_is_refused_fails_with_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut command = bench.send_command(&receiver.url(), &["-", "--once", "--type", "not-listed"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut sender = command.spawn().expect("waybill send");
    sender.stdin.take().expect("piped").write_all(b"line\n").expect("write");
    let output = sender.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    bench.assert_lines([]);
}

/// Something in the way of a socket, or no folder for it, costs nobody else anything, and is got over without a restart.
#[test]
fn a_socket_whose_place_is_not_fit_is_bound_once_it_is_mended() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("file.log", lines("file", 100));
    bench.write("stream.sock", "precious");
    let arguments = ["file.log", "--unix-datagram", "run/log.sock", "--unix-stream", "stream.sock"];
    let mut sender = bench.sender(&receiver, &arguments);
    bench.wait_for_lines(100);
    sender.wait_for_log(&format!("install -d -m 0755 {}", bench.path("run").display()));
    sender.wait_for_log("exists and is not a socket: remove it, or name another path");

    std::fs::create_dir(bench.path("run")).expect("a folder");
    wait_for_socket(&sender, "log.sock");
    datagrams(&bench, "run/log.sock", numbered("datagram", 100));
    assert_eq!(std::fs::read(bench.path("stream.sock")).expect("a file"), b"precious");
    std::fs::remove_file(bench.path("stream.sock")).expect("removed");
    wait_for_socket(&sender, "stream.sock");
    let mut stream = UnixStream::connect(bench.path("stream.sock")).expect("connect");
    stream.write_all(lines("stream", 100).as_bytes()).expect("write");
    drop(stream);
    bench.wait_for_lines(300);
    assert!(sender.stop().success());
    bench.assert_lines(
        ["file", "datagram", "stream"].into_iter().flat_map(|tag| numbered(tag, 100)),
    );
    assert!(!bench.path("run/log.sock").exists() && !bench.path("stream.sock").exists());
}

#[test]
fn a_sender_stops_while_a_socket_waits_for_its_place() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["--unix-datagram", "run/log.sock"]);
    sender.wait_for_log("its directory is missing");
    assert!(sender.stop().success());
}
