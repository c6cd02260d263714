//! Two running copies of one sender's token, or of its state directory: nothing is lost or doubled, and the receiver
//! says so. A restart is none of these.

use std::path::Path;
use std::process::Command;

use crate::support::servers::wait_until;
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, lines, numbered, waybill};

const TOKENS: &str = "two instances use this sender's token";
const STATES: &str = "two running senders use copies of one state directory";

/// A sender with this state directory, connected to each of these.
fn sender(bench: &Bench, to: &[&Receiver], state: &str, arguments: &[&str]) -> Process {
    let mut command = waybill();
    command.arg("send").args(arguments).args(["--token-file", "test.token", "--state-dir", state]);
    for receiver in to {
        command.args(["--to", &receiver.url()]);
    }
    command.current_dir(bench.path(""));
    let sender = Process::start(state, command, bench.path(&format!("sender-{state}.log")));
    sender.wait_for_log(" connected");
    sender
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-r").arg(from).arg(to).status().expect("cp");
    assert!(status.success());
}

#[test]
fn two_machines_with_one_token_are_reported_and_both_are_served() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("one.log", lines("one", 100));
    bench.write("two.log", lines("two", 100));
    let mut one = sender(&bench, &[&receiver], "one", &["one.log"]);
    bench.wait_for_lines(100);
    assert!(!receiver.log().contains("WARN"), "{}", receiver.log());
    let mut two = sender(&bench, &[&receiver], "two", &["two.log"]);
    bench.wait_for_lines(200);
    wait_until("it is reported", PATIENCE, || receiver.log().contains(TOKENS));
    assert!(one.stop().success() && two.stop().success());
    assert!(!receiver.log().contains(STATES), "{}", receiver.log());
    bench.assert_lines(numbered("one", 100).chain(numbered("two", 100)));
}

#[test]
fn two_running_copies_of_a_state_directory_are_reported_and_restarts_are_not() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    let mut one = sender(&bench, &[&receiver], "one", &["app.log"]);
    bench.wait_for_lines(100);
    one.kill_hard();
    let mut one = sender(&bench, &[&receiver], "one", &["app.log"]);
    assert!(one.stop().success());
    // Each receiver is connected to twice, by one process.
    let twice = [&receiver, &receiver];
    let mut one = sender(&bench, &twice, "one", &["app.log", "--balance"]);
    wait_until("both are connected", PATIENCE, || {
        receiver.log().matches("sender connected").count() == 4
    });
    copy(&bench.path("one"), &bench.path("two"));
    assert!(!receiver.log().contains("WARN"), "{}", receiver.log());

    let mut two = sender(&bench, &[&receiver], "two", &["app.log"]);
    bench.append("app.log", (100..200).map(|n| format!("line {n}\n")).collect::<String>());
    // By the next ping to the first one.
    wait_until("it is reported", PATIENCE, || receiver.log().contains(STATES));
    let log = receiver.log();
    assert_eq!(log.matches(STATES).count(), 1, "{log}");
    assert!(!log.contains(TOKENS), "{log}");
    bench.wait_for_lines(200);
    assert!(one.stop().success() && two.stop().success());
    bench.assert_lines(numbered("line", 200));
}
