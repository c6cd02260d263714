//! A low limit of open files: followed files and peers never take the last descriptor from the rest.

use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::rotation::rename;
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

/// Of each family that waits, one generation rests and the other one is for the next turn.
#[test]
fn more_rotated_files_than_descriptors_go_on_after_a_restart() {
    const FILES: usize = 200;
    for signal in ["-TERM", "-KILL"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let name = |number| format!("logs/{number:03}.log");
        let start = || {
            let mut command = bench.send_command(&receiver.url(), &["logs/*.log"]);
            limit_files(&mut command, 128);
            Process::start("sender", command, bench.path("sender.log"))
        };
        for number in 0..FILES {
            bench.write(&name(number), format!("first {number}\n"));
        }
        let mut sender = start();
        bench.wait_for_lines(FILES);
        for number in 0..FILES {
            rename(&bench, &name(number), &format!("{}.1", name(number)));
            bench.write(&name(number), format!("second {number}\n"));
        }
        bench.wait_for_lines(2 * FILES);
        sender.signal(signal);
        sender.wait();
        for number in 0..FILES {
            bench.append(&name(number), format!("third {number}\n"));
        }
        let mut sender = start();
        bench.wait_for_lines(3 * FILES);
        assert!(sender.stop().success());
        let mut once = bench.send_command(&receiver.url(), &["logs/*.log", "--once"]);
        limit_files(&mut once, 128);
        let output = once.output().expect("waybill send");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = |tag: &'static str| (0..FILES).map(move |number| format!("{tag} {number}"));
        bench.assert_lines(["first", "second", "third"].into_iter().flat_map(lines));
    }
}

/// Whose turn has not come is not followed as somebody's sibling: its run is not looked for yet.
#[test]
fn files_that_wait_are_nobodys_siblings() {
    const FILES: usize = 70;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let names: Vec<String> = (0..FILES).map(|number| format!("{number:02}.log")).collect();
    let append = |tag: &str| {
        for name in &names {
            bench.append(name, format!("{tag} {name}\n"));
        }
    };
    let patterns: Vec<&str> = names.iter().map(String::as_str).collect();
    append("first");
    bench.send_once(&receiver, &patterns).ok();
    append("second");
    let mut command = bench.send_command(&receiver.url(), &patterns);
    limit_files(&mut command, 128);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    bench.wait_for_lines(2 * FILES);
    assert!(sender.stop().success());
    let tagged = |tag: &str| names.iter().map(|name| format!("{tag} {name}")).collect::<Vec<_>>();
    bench.assert_lines(["first", "second"].into_iter().flat_map(tagged));
}

#[test]
fn rotated_files_of_families_that_wait_lie_elsewhere_until_their_turn() {
    const FILES: usize = 70;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let source = "[[source]]\nfiles = \"logs/*.log\"\nrotated = [\"old/*\"]\n";
    bench.write("sender.toml", source);
    let arguments = ["--config", "sender.toml"];
    let name = |number| format!("logs/{number:02}.log");
    for number in 0..FILES {
        bench.write(&name(number), format!("first {number}\n"));
    }
    bench.send_once(&receiver, &arguments).ok();
    fs::create_dir(bench.path("old")).expect("a folder");
    for number in 0..FILES {
        bench.append(&name(number), format!("second {number}\n"));
        // The last ones: it is them that wait.
        if number >= 60 {
            rename(&bench, &name(number), &format!("old/{number:02}.log.1"));
            bench.write(&name(number), format!("third {number}\n"));
        }
    }
    let mut command = bench.send_command(&receiver.url(), &arguments);
    limit_files(&mut command, 128);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    bench.wait_for_lines(2 * FILES + 10);
    assert!(sender.stop().success());
    let lines = |tag: &'static str| (0..FILES).map(move |number| format!("{tag} {number}"));
    bench.assert_lines(lines("first").chain(lines("second")).chain(lines("third").skip(60)));
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
