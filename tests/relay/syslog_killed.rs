//! kill -9 of syslog-ng itself, on the roads over a file and over a Unix stream socket; tests/relay/syslog_ng.rs has the
//! one over the HTTP intake. What syslog-ng/README.md says of it was measured here.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;

use super::support::servers::{SyslogNg, wait_until};
use super::support::waybill::{Bench, PATIENCE};
use super::syslog_kills::is_stored;
use super::syslog_ng::{counter, file_text, stored};
use super::syslog_stream::{connect, message, stream_text, write};

/// How often each message is stored.
fn counts(bench: &Bench) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for message in bench.messages() {
        *counts.entry(message).or_default() += 1;
    }
    counts
}

/// Road (a): what is in the file is stored, each line once, and the rest was never Waybill's.
#[test]
fn of_a_killed_syslog_ng_waybill_has_what_is_in_the_file() {
    const HALF: usize = 20_000;
    let bench = Bench::new();
    let Some(mut syslog_ng) = SyslogNg::start(&file_text()) else { return };
    let receiver = bench.receiver();
    let file = syslog_ng.folder().join("outgoing.log");
    let mut sender = bench.sender(&receiver, &[&file.display().to_string()]);
    let socket = UnixDatagram::unbound().expect("a socket");
    let input = syslog_ng.folder().join("nginx.sock");
    let send = |number: usize| {
        let line = format!("<13>Nov 21 10:00:00 app[7]: message {number}");
        socket.send_to(line.as_bytes(), &input).expect("sent");
    };
    (0..HALF).for_each(send);
    syslog_ng.kill_hard();
    syslog_ng.restart();
    (HALF..2 * HALF).for_each(send);
    let in_file = || {
        let text = fs::read_to_string(&file).expect("the file");
        let message = |line: &str| line[line.find("message").expect("a whole line")..].to_owned();
        text.lines().map(message).collect::<Vec<String>>()
    };
    let last = format!("message {}", 2 * HALF - 1);
    wait_until("the last message is in the file", PATIENCE, || in_file().last() == Some(&last));
    let mut lines = in_file();
    wait_until("the file is stored", PATIENCE, || stored(&bench) >= lines.len());
    assert!(sender.stop().success());
    println!("of {} messages {} were lost at the kill", 2 * HALF, 2 * HALF - lines.len());
    lines.sort();
    assert_eq!(bench.messages(), lines);
    let counts = counts(&bench);
    assert_eq!(counts.len(), lines.len(), "a message is in the file twice");
    let second =
        (HALF..2 * HALF).filter(|number| counts.contains_key(&format!("message {number}")));
    assert_eq!(second.count(), HALF, "what came after the kill");
}

/// Road (c): a kill while the socket is full, then one while messages go through, in turns.
#[test]
fn a_killed_syslog_ng_writes_its_disk_buffer_to_the_stream_socket() {
    const KILLS: usize = 6;
    const ROUND: usize = 20_000;
    let is_full = |round: usize| round.is_multiple_of(2);
    let bench = Bench::new();
    let socket = bench.path("syslog.sock").display().to_string();
    let Some(mut syslog_ng) = SyslogNg::start(&stream_text(&socket)) else { return };
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["--unix-stream", &socket]);
    for round in 0..KILLS {
        sender.freeze();
        let mut input = connect(&syslog_ng);
        let numbers = round * ROUND..(round + 1) * ROUND;
        numbers.for_each(|number| write(&mut input, &message(number)));
        wait_until("syslog-ng has read everything", PATIENCE, || {
            counter(&syslog_ng, "processed") >= ROUND
        });
        if !is_full(round) {
            let before = counter(&syslog_ng, "written");
            sender.signal("-CONT");
            wait_until("messages go through", PATIENCE, || counter(&syslog_ng, "written") > before);
        }
        syslog_ng.kill_hard();
        syslog_ng.restart();
        sender.signal("-CONT");
        wait_until("syslog-ng has handed over everything", PATIENCE, || {
            counter(&syslog_ng, "queued") == 0
        });
    }
    let last = message(KILLS * ROUND - 1);
    wait_until("the last message is stored", PATIENCE, || is_stored(&bench, &last));
    assert!(sender.stop().success());
    let mut counts = counts(&bench);
    for round in 0..KILLS {
        let of_round = (round * ROUND..(round + 1) * ROUND).map(message);
        let stored: Vec<usize> = of_round.filter_map(|text| counts.remove(&text)).collect();
        let twice = stored.iter().sum::<usize>() - stored.len();
        println!("round {round}: {} of {ROUND} stored, {twice} of them twice", stored.len());
        assert_eq!(stored.len(), ROUND);
        // The one that was written, and not yet crossed off in the disk-buffer.
        assert!(twice <= usize::from(!is_full(round)), "{twice} twice in round {round}");
    }
    assert!(counts.is_empty(), "parts: {counts:?}");
}
