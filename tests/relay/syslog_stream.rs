//! The road over a Unix stream socket from a real syslog-ng, by the files in `syslog-ng/` as they are shipped: what it
//! loses at a stop, a reload and a kill in the middle of the stream. The numbers in syslog-ng/README.md come from here.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::Value;

use super::support::servers::{SyslogNg, wait_until};
use super::support::waybill::{Bench, PATIENCE};
use super::syslog_kills::is_stored;
use super::syslog_ng::{HEAD, SOURCE, counter, plugin, shipped, stored, with};

/// What happens in the middle of each round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    /// syslog-ng reloads while the socket is full.
    Reload,
    /// SIGTERM while the socket is full.
    Stop,
    /// SIGKILL while the socket is full.
    Kill,
    /// SIGKILL while messages go through.
    KillUnderWay,
}

const ROUNDS: [Act; 6] =
    [Act::Stop, Act::Reload, Act::Kill, Act::Stop, Act::KillUnderWay, Act::KillUnderWay];

/// Messages of one round: a half before it happens, and far more than the socket holds in the other one.
const ROUND: usize = 20_000;

/// So many of them are stored when it happens.
const UNDER_WAY: usize = 200;

/// What one message is padded with, to the length of an ordinary line: what is lost is bounded in bytes.
const PADDING_BYTES: usize = 200;

/// The most that one kill may lose, in bytes: the socket's buffer (net.core.wmem_default), one read, and what waits for
/// its sync in the spool, which is little where the disk is quick.
const WINDOW_BYTES: usize = 212_992 + (64 << 10) + 2 * (2 << 20);

/// Its padding repeats its number, so that a part of it is like a part of no other one.
pub fn message(number: usize) -> String {
    let mark = format!(" {number:06}");
    format!("message{}", mark.repeat(1 + PADDING_BYTES / mark.len()))
}

/// The shipped file and block, to this socket.
pub fn stream_text(socket: &str) -> String {
    let own = format!("waybill-stream(path(\"{socket}\") dir(\"@FOLDER@\"));");
    let road = with(&shipped("waybill-stream.conf"), &[("waybill-stream();", &own)]);
    format!("{HEAD}{}{SOURCE}{road}", plugin("waybill-stream"))
}

/// A connection to [`SOURCE`].
pub fn connect(syslog_ng: &SyslogNg) -> UnixStream {
    UnixStream::connect(syslog_ng.folder().join("in.sock")).expect("connect")
}

pub fn write(input: &mut UnixStream, message: &str) {
    let line = format!("<13>Nov 21 10:00:00 app[7]: {message}\n");
    input.write_all(line.as_bytes()).expect("written");
}

#[test]
fn a_stream_socket_loses_no_more_at_a_stop_and_a_kill_than_the_readme_says() {
    let bench = Bench::new();
    let socket = bench.path("syslog.sock").display().to_string();
    let Some(syslog_ng) = SyslogNg::start(&stream_text(&socket)) else { return };
    let receiver = bench.receiver();
    let arguments = ["--unix-stream", &socket];
    let mut sender = bench.sender(&receiver, &arguments);
    let mut input = connect(&syslog_ng);
    let mut write = |message: &str| write(&mut input, message);
    for (round, act) in ROUNDS.into_iter().enumerate() {
        let before = stored(&bench);
        let (first, end) = (round * ROUND, (round + 1) * ROUND);
        (first..first + ROUND / 2).for_each(|number| write(&message(number)));
        wait_until("the stream is under way", PATIENCE, || stored(&bench) >= before + UNDER_WAY);
        let mut rest = first + ROUND / 2..end;
        match act {
            Act::KillUnderWay => thread::scope(|scope| {
                rest.by_ref().take(ROUND / 8).for_each(|number| write(&message(number)));
                let writer = scope.spawn(|| rest.for_each(|number| write(&message(number))));
                sender.kill_hard();
                writer.join().expect("syslog-ng takes them");
            }),
            Act::Reload | Act::Stop | Act::Kill => {
                // It reads no more, so that the socket is full when the end comes.
                sender.freeze();
                rest.for_each(|number| write(&message(number)));
                wait_until("the socket is full", PATIENCE, || {
                    counter(&syslog_ng, "queued") > ROUND / 4
                });
                match act {
                    Act::Kill => sender.kill_hard(),
                    Act::Stop => {
                        sender.signal("-TERM");
                        sender.signal("-CONT");
                        assert!(sender.wait().success());
                    }
                    _ => {
                        assert!(syslog_ng.control("reload").0.success());
                        sender.signal("-CONT");
                    }
                }
            }
        }
        if act != Act::Reload {
            sender = bench.sender(&receiver, &arguments);
        }
        // Nothing of this round is on its way any more when the next one begins.
        let last = format!("round {round} is over");
        write(&last);
        wait_until(&last, PATIENCE, || is_stored(&bench, &last));
    }
    assert!(sender.stop().success());

    let mut segments = BTreeMap::<String, Vec<String>>::new();
    for line in bench.stored() {
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let segment = text(&line["waybill"]["segment"]);
        segments.entry(text(&line["message"])).or_default().push(segment);
    }
    let of_round = |round: usize| (round * ROUND..(round + 1) * ROUND).map(message);
    let lost: Vec<usize> = (0..ROUNDS.len())
        .map(|round| of_round(round).filter(|text| !segments.contains_key(text)).count())
        .collect();
    println!(
        "of {ROUND} messages each were lost: {:?}",
        ROUNDS.iter().zip(&lost).collect::<Vec<_>>()
    );
    // A reload makes syslog-ng write the message again that found no room, and one before it for each that a stop made
    // it forget, since it crosses off the oldest: one after the other in the spool.
    for (text, segments) in segments.iter().filter(|(_, segments)| segments.len() > 1) {
        assert!(segments.len() == 2 && segments[0] == segments[1], "{text} in {segments:?}");
    }
    for (round, act) in ROUNDS.into_iter().enumerate() {
        let is_twice = |text: &String| segments.get(text).is_some_and(|at| at.len() > 1);
        let twice = of_round(round).filter(is_twice).count();
        let expected = match act {
            Act::Reload => 1 + lost[..round].iter().sum::<usize>(),
            _ => 0,
        };
        assert_eq!(twice, expected, "doubled in round {round}: {act:?}");
    }
    // A line that was being written at the end may come in two parts.
    let parts = segments.len() + lost.iter().sum::<usize>() - ROUNDS.len() * (ROUND + 1);
    assert!(parts <= 2 * ROUNDS.len(), "{parts} unknown lines");
    for (act, lost) in ROUNDS.into_iter().zip(lost) {
        match act {
            Act::Reload => assert_eq!(lost, 0, "at a reload"),
            // syslog-ng forgets what it has taken from its queue and found no room for.
            Act::Stop => assert!(lost <= 1, "{lost} at a stop"),
            // What was in the full socket, whatever the disk's speed.
            Act::Kill => {
                assert!(lost > 0 && lost * PADDING_BYTES <= WINDOW_BYTES, "{lost} at a kill")
            }
            Act::KillUnderWay => assert!(lost * PADDING_BYTES <= WINDOW_BYTES, "{lost} at a kill"),
        }
    }
}

#[test]
fn a_full_spool_holds_syslog_ng_back_on_the_stream_socket_and_loses_nothing() {
    let bench = Bench::new();
    let socket = bench.path("syslog.sock").display().to_string();
    let Some(syslog_ng) = SyslogNg::start(&stream_text(&socket)) else { return };
    let mut receiver = bench.receiver();
    receiver.kill_hard();
    let arguments = ["--unix-stream", &socket, "--spool-bytes-max", "4MiB"];
    let mut sender = bench.sender(&receiver, &arguments);
    let mut input = connect(&syslog_ng);
    let numbers = 0..2 * ROUND;
    numbers.clone().for_each(|number| write(&mut input, &message(number)));
    sender.wait_for_log("spool is full");
    wait_until("the socket is full", PATIENCE, || counter(&syslog_ng, "queued") > ROUND / 4);
    receiver.start();
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= numbers.len());
    assert_eq!(counter(&syslog_ng, "dropped"), 0);
    assert!(sender.stop().success());
    let mut expected: Vec<String> = numbers.map(message).collect();
    expected.sort();
    assert_eq!(bench.messages(), expected);
}
