//! A low limit of open files: followed files and peers never take the last descriptor from the rest.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::support::servers::wait_until;
use crate::support::waybill::{Bench, PATIENCE, Process};

/// Soft and hard: it cannot be raised.
fn limit_files(command: &mut Command, files: u64) {
    let limit = Rlimit { current: Some(files), maximum: Some(files) };
    // SAFETY: one system call, which is async-signal-safe, and no allocation.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?));
    }
}

#[test]
fn more_files_and_peers_than_descriptors_are_served_in_turns() {
    const FILES: usize = 200;
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let name = |number| format!("logs/{number:03}.log");
    for number in 0..FILES {
        bench.write(&name(number), format!("first {number}\n"));
    }
    let arguments = ["logs/*.log", "--unix-stream", "stream.sock"];
    let mut command = bench.send_command(&receiver.url(), &arguments);
    limit_files(&mut command, 128);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    wait_until("the socket is there", PATIENCE, || bench.path("stream.sock").exists());
    let peers: Vec<UnixStream> = (0..100)
        .map(|_| UnixStream::connect(bench.path("stream.sock")).expect("connect"))
        .collect();
    sender.wait_for_log("further ones wait");
    bench.wait_for_lines(FILES);
    sender.wait_for_log("followed in turns; raise the limit of open files");
    // A new connection, and a token file to read for it.
    receiver.process().kill_hard();
    for number in 0..FILES {
        bench.append(&name(number), format!("second {number}\n"));
    }
    receiver.start();
    bench.wait_for_lines(2 * FILES);
    let log = sender.log();
    assert!(!log.contains("Too many open files") && !log.contains("cannot be saved"), "{log}");
    drop(peers);
    assert!(sender.stop().success());
    // All positions were saved: there is nothing to send.
    let mut once = bench.send_command(&receiver.url(), &["logs/*.log", "--once"]);
    limit_files(&mut once, 128);
    let output = once.output().expect("waybill send");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let lines = |tag: &'static str| (0..FILES).map(move |number| format!("{tag} {number}"));
    bench.assert_lines(lines("first").chain(lines("second")));
}

#[test]
fn peers_that_say_nothing_leave_descriptors_to_a_receiver() {
    let bench = Bench::new();
    let store = bench.path("store.sqlite");
    let receiver = bench.receiver_with(move |command| {
        command.arg("--store").arg(&store);
        limit_files(command, 64);
    });
    bench.write("app.log", "before\n");
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(1);
    let peers: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(("127.0.0.1", receiver.port())).expect("connect"))
        .collect();
    bench.append("app.log", "meanwhile\n");
    bench.wait_for_lines(2);
    assert!(sender.stop().success());
    drop(peers);
    bench.append("app.log", "after\n");
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(3);
    let log = receiver.log();
    assert!(!log.contains("Too many open files"), "{log}");
    assert!(sender.stop().success());
}
