//! Clocks that are wrong by a day, on both sides or one, while lines flow: nothing is lost, nothing is doubled.
//!
//! The programs see another time than the kernel does, by Debian's libfaketime; their monotonic clock stays the real one.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use super::support::servers::{free_port, have};
use super::support::waybill::{Bench, Process, Receiver, lines, numbered, waybill};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The time that programs are shown.
#[derive(Clone)]
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    fn new(bench: &Bench) -> Option<Clock> {
        if !have("faketime", "faketime") {
            return None;
        }
        let folder = Path::new("/usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
        let library = folder.join("faketime/libfaketimeMT.so.1");
        assert!(library.is_file(), "{} comes with faketime", library.display());
        Some(Clock { library, file: bench.path("clock") })
    }

    /// So far from the real time, as faketime(1) says it.
    fn set(&self, offset: &str) {
        let fresh = self.file.with_extension("new");
        fs::write(&fresh, format!("{offset}\n")).expect("written");
        fs::rename(&fresh, &self.file).expect("replaced");
    }

    fn show_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        command.env("FAKETIME_NO_CACHE", "1").env("NO_FAKE_STAT", "1");
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
    }
}

fn receiver(bench: &Bench, clock: &Clock) -> Receiver {
    let (store, clock) = (bench.path("store.sqlite"), clock.clone());
    bench.receiver_with(move |command| {
        // What the clock of before calls two days old is not deleted by the clock of after.
        command.arg("--store").arg(&store).args(["--keep-days", "2"]);
        clock.show_to(command);
    })
}

fn sender(bench: &Bench, clock: &Clock, receiver: &Receiver) -> Process {
    let arguments = ["app.log", "--unix-stream", "app.sock"];
    let mut command = bench.send_command(&receiver.url(), &arguments);
    clock.show_to(&mut command);
    let sender = Process::start("sender", command, bench.path("sender.log"));
    sender.wait_for_log("listening");
    sender
}

fn write_to_socket(bench: &Bench, text: &str) {
    let mut socket = UnixStream::connect(bench.path("app.sock")).expect("connect");
    socket.write_all(text.as_bytes()).expect("written");
}

/// Two generations come, and the first is gone from its name before anybody looks.
fn rotate_twice(bench: &Bench, between: &str, after: &str) {
    let rename = |from: &str, to: &str| fs::rename(bench.path(from), bench.path(to)).expect(from);
    for (from, to) in [("app.log.2", "app.log.4"), ("app.log.1", "app.log.3")] {
        if bench.path(from).exists() {
            rename(from, to);
        }
    }
    rename("app.log", "app.log.2");
    bench.write("app.log.1", between);
    bench.write("app.log", after);
}

#[test]
fn a_clock_that_is_set_back_by_a_day_loses_and_doubles_nothing() {
    let bench = Bench::new();
    let Some(clock) = Clock::new(&bench) else { return };
    clock.set("+1d");
    let mut receiver = receiver(&bench, &clock);
    bench.write("app.log", lines("before", 500));
    let file = File::options().append(true).open(bench.path("app.log")).expect("open");
    file.set_modified(SystemTime::now() + DAY).expect("a time");
    let mut sender = sender(&bench, &clock, &receiver);
    write_to_socket(&bench, &lines("socket before", 500));
    bench.wait_for_lines(1000);

    // Set back in the middle of a stream of lines.
    let done = AtomicBool::new(false);
    let pieces = thread::scope(|scope| {
        let (bench, done) = (&bench, &done);
        let writing = scope.spawn(move || {
            let mut pieces = 0;
            // A failure ends it too.
            while !done.load(Ordering::Relaxed) && pieces < 5000 {
                bench.append("app.log", lines(&format!("piece {pieces}"), 20));
                write_to_socket(bench, &lines(&format!("socket piece {pieces}"), 20));
                pieces += 1;
                thread::sleep(Duration::from_millis(20));
            }
            pieces
        });
        bench.wait_for_lines(1200);
        clock.set("+0");
        let before = bench.stored().len();
        bench.wait_for_lines(before + 400);
        // A killed receiver and its sender find each other again, whatever time it is.
        receiver.restart();
        let before = bench.stored().len();
        bench.wait_for_lines(before + 400);
        done.store(true, Ordering::Relaxed);
        writing.join().expect("written")
    });

    // Generations that nobody saw come and go: while the sender sleeps, and while it is down.
    sender.signal("-STOP");
    rotate_twice(&bench, &lines("asleep", 300), &lines("awake", 300));
    sender.signal("-CONT");
    bench.wait_for_lines(1600 + 40 * pieces);
    assert!(sender.stop().success());
    rotate_twice(&bench, &lines("away", 300), &lines("back", 300));
    let mut sender = self::sender(&bench, &clock, &receiver);
    bench.wait_for_lines(2200 + 40 * pieces);
    assert!(sender.stop().success());

    let mut expected: Vec<String> = Vec::new();
    let mut add = |tag: &str, count| {
        expected.extend(lines(tag, count).lines().map(str::to_owned));
    };
    for tag in ["before", "socket before"] {
        add(tag, 500);
    }
    for tag in ["asleep", "awake", "away", "back"] {
        add(tag, 300);
    }
    for piece in 0..pieces {
        add(&format!("piece {piece}"), 20);
        add(&format!("socket piece {piece}"), 20);
    }
    bench.assert_lines(expected);
    assert!(!sender.log().contains("lost:"), "{}", sender.log());
    // A spool's segment ends with its day too.
    let last = index_of(&bench, &format!("socket piece {} 0", pieces - 1));
    assert!(last < index_of(&bench, "socket before 0"), "{last}");
}

/// Said when it begins, not at each connection.
#[test]
fn a_sender_whose_clock_is_a_day_off_says_so_and_loses_and_doubles_nothing() {
    for (offset, way) in [("+1d", "s ahead of the receiver's"), ("-1d", "s behind the receiver's")]
    {
        let bench = Bench::new();
        let Some(clock) = Clock::new(&bench) else { return };
        clock.set("+0");
        let mut receiver = bench.receiver();
        bench.write("app.log", lines("right", 200));
        let mut sender = sender(&bench, &clock, &receiver);
        bench.wait_for_lines(200);
        let said = |sender: &Process| sender.log().matches(way).count();
        assert_eq!(said(&sender), 0, "{}", sender.log());

        clock.set(offset);
        for round in 0..2 {
            receiver.restart();
            bench.append("app.log", lines(&format!("off {round}"), 200));
            write_to_socket(&bench, &lines(&format!("socket {round}"), 200));
            bench.wait_for_lines(200 + 400 * (round + 1));
        }
        rotate_twice(&bench, &lines("between", 200), &lines("after", 200));
        bench.wait_for_lines(1400);
        assert_eq!(said(&sender), 1, "{}", sender.log());
        assert!(sender.log().contains("NTP"), "{}", sender.log());
        clock.set("+0");
        receiver.restart();
        sender.wait_for_log("agrees with the receiver's again");
        clock.set(offset);
        receiver.restart();
        bench.append("app.log", lines("off again", 200));
        bench.wait_for_lines(1600);
        assert_eq!(said(&sender), 2, "{}", sender.log());
        assert!(sender.stop().success());
        let tags =
            ["right", "off 0", "socket 0", "off 1", "socket 1", "between", "after", "off again"];
        bench.assert_lines(tags.into_iter().flat_map(|tag| numbered(tag, 200)));
        let log = sender.log();
        assert!(!log.contains("lost:") && log.contains(" lost_bytes=0 "), "{log}");
    }
}

fn index_of(bench: &Bench, message: &str) -> String {
    let stored = bench.stored();
    let line = stored.iter().find(|line| line["message"] == message).expect("stored");
    line["_index"].as_str().expect("a name").to_owned()
}

/// What was written while its machine's clock was ahead: no receiver took it under that day.
#[test]
fn a_file_from_a_day_to_come_is_sent_when_its_day_has_come_back() {
    for restarts in [false, true] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("ahead", 100));
        let file = File::options().append(true).open(bench.path("app.log")).expect("open");
        file.set_modified(SystemTime::now() + 10 * DAY).expect("a time");
        let mut sender = bench.sender(&receiver, &["app.log"]);
        sender.wait_for_log("the receiver refuses these lines: day ");
        if restarts {
            assert!(sender.stop().success());
        }
        bench.append("app.log", lines("right", 100));
        if restarts {
            sender = bench.sender(&receiver, &["app.log"]);
        }
        bench.wait_for_lines(200);
        assert!(sender.stop().success());
        bench.assert_lines(numbered("ahead", 100).chain(numbered("right", 100)));
        assert_eq!(index_of(&bench, "ahead 0"), index_of(&bench, "right 0"));
    }
}

#[test]
fn lines_that_arrived_on_a_day_to_come_are_sent_when_the_clock_is_right() {
    let bench = Bench::new();
    let Some(clock) = Clock::new(&bench) else { return };
    clock.set("+10d");
    let receiver = bench.receiver();
    bench.write("app.log", "");
    let mut sender = sender(&bench, &clock, &receiver);
    write_to_socket(&bench, &lines("ahead", 100));
    sender.wait_for_log("the receiver refuses these lines: day ");
    clock.set("+0");
    write_to_socket(&bench, &lines("right", 100));
    bench.wait_for_lines(200);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("ahead", 100).chain(numbered("right", 100)));
    assert_eq!(index_of(&bench, "ahead 0"), index_of(&bench, "right 0"));
}

/// A machine that was asleep, say, and has not asked for the time yet.
#[test]
fn lines_that_a_receiver_refuses_while_its_clock_is_behind_come_when_it_is_right() {
    let bench = Bench::new();
    let Some(clock) = Clock::new(&bench) else { return };
    clock.set("-10d");
    let receiver = receiver(&bench, &clock);
    bench.write("app.log", lines("behind", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("the receiver refuses these lines: day ");
    clock.set("+0");
    bench.append("app.log", lines("right", 100));
    bench.wait_for_lines(200);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("behind", 100).chain(numbered("right", 100)));
    // Nobody connected anew, which would offer the lines again by itself.
    assert_eq!(receiver.log().matches("sender connected").count(), 1, "{}", receiver.log());
}

/// The side that dials hears the time of the other; here it is the receiver.
#[test]
fn a_receiver_that_dials_says_that_its_clock_is_a_day_off() {
    let bench = Bench::new();
    let Some(clock) = Clock::new(&bench) else { return };
    clock.set("+1d");
    bench.token("test");
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    bench.write("central.token", mint.output().expect("a token").stdout);
    bench.write("app.log", lines("line", 100));
    let port = free_port();
    let mut send = waybill();
    send.args(["send", "app.log", "--listen", &format!("127.0.0.1:{port}")]);
    send.args(["--state-dir", "state", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    let mut sender = Process::start("sender", send, bench.path("sender.log"));
    let mut receive = waybill();
    receive.args(["receive", "--tokens", "tokens.toml", "--store", "store.sqlite"]);
    receive.args([
        "--dial",
        &format!("test=ws://127.0.0.1:{port}/"),
        "--token-file",
        "central.token",
    ]);
    receive.current_dir(bench.path(""));
    clock.show_to(&mut receive);
    let receiver = Process::start("receiver", receive, bench.path("receiver.log"));
    bench.wait_for_lines(100);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 100));
    assert_eq!(receiver.log().matches("s ahead of the sender's").count(), 1, "{}", receiver.log());
}

/// A token ends when the clock says so, whichever way that goes.
#[test]
fn a_token_that_expired_by_a_clock_set_forward_works_again_when_that_is_mended() {
    let bench = Bench::new();
    let Some(clock) = Clock::new(&bench) else { return };
    clock.set("+0");
    let mut command = waybill();
    command.args(["token", "test", "--expires", "12h", "--tokens"]).arg(bench.path("tokens.toml"));
    let output = command.output().expect("waybill token");
    let token = bench.write("test.token", output.stdout);
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(token, private).expect("chmod");
    let receiver = receiver(&bench, &clock);
    bench.write("app.log", lines("line", 100));
    let mut sender = sender(&bench, &clock, &receiver);
    bench.wait_for_lines(100);
    clock.set("+1d");
    sender.wait_for_log("refused with HTTP status 401");
    bench.append("app.log", lines("more", 100));
    clock.set("+0");
    bench.wait_for_lines(200);
    assert!(sender.stop().success());
    let both = [lines("line", 100), lines("more", 100)].concat();
    bench.assert_lines(both.lines().map(str::to_owned));
}
