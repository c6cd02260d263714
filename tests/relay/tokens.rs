//! Tokens: who has none stays out and is told so; one that changes takes effect without a restart on either side.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::support::servers::wait_until;
use crate::support::store::{assert_lines, assert_slow_retries, run, wait_for_lines};
use crate::support::waybill::{Bench, Certificates, Finished, PATIENCE, Process, lines, waybill};

fn token(bench: &Bench, arguments: &[&str]) -> Finished {
    let mut command: Command = waybill();
    command.arg("token").args(arguments).arg("--tokens").arg(bench.path("tokens.toml"));
    run(command)
}

fn token_file(bench: &Bench) -> PathBuf {
    bench.path("test.token")
}

/// Lines sent, and nothing more: for a sender that is to keep its connection open.
fn connected(bench: &Bench, url: &str) -> Process {
    bench.write("app.log", lines("line", 100));
    let sender =
        Process::start("sender", bench.send_command(url, &["app.log"]), bench.path("sender.log"));
    wait_for_lines(bench, 100);
    sender
}

const REFUSED: &str = "refused with HTTP status 401";

#[test]
fn a_wrong_token_is_refused_and_a_right_one_needs_no_restart() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let right = fs::read(token_file(&bench)).expect("the token");
    bench.write("test.token", "waybill_this-is-not-it\n");
    bench.write("app.log", lines("line", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log(REFUSED);
    assert_slow_retries(&sender.log(), REFUSED);
    bench.write("test.token", right);
    wait_for_lines(&bench, 100);
    assert!(sender.stop().success());
    assert!(receiver.log().contains("status=401"), "{}", receiver.log());
}

#[test]
fn a_token_file_that_vanishes_and_comes_back_needs_no_restart() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let right = fs::read(token_file(&bench)).expect("the token");
    let sender = connected(&bench, &receiver.url());
    fs::remove_file(token_file(&bench)).expect("removed");
    receiver.restart();
    sender.wait_for_log("waybill token NAME");
    assert_slow_retries(&sender.log(), "waybill token NAME");
    bench.append("app.log", "line 100\n");
    bench.write("test.token", right);
    wait_for_lines(&bench, 101);
}

#[test]
fn a_token_file_that_is_missing_at_the_start_is_a_configuration_error() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "a line\n");
    fs::remove_file(token_file(&bench)).expect("removed");
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("test.token"), "{}", refused.stderr);
    bench.write("test.token", "");
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert!(matches!(refused.status.code(), Some(1 | 78)), "{}", refused.stderr);
    assert!(refused.stderr.contains("token"), "{}", refused.stderr);
}

#[test]
fn a_revoked_token_ends_its_connection_and_a_rotated_one_goes_on() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut sender = connected(&bench, &receiver.url());
    let said = token(&bench, &["test", "--revoke"]).ok();
    assert!(said.stdout.is_empty(), "{}", said.stdout);
    sender.wait_for_log("the token was revoked");
    sender.wait_for_log(REFUSED);
    let more: String = (100..200).map(|number| format!("line {number}\n")).collect();
    bench.append("app.log", more);
    let fresh = token(&bench, &["test", "--rotate"]).ok().stdout;
    assert_eq!(fresh.lines().count(), 1);
    bench.write("test.token", fresh);
    wait_for_lines(&bench, 200);
    // The same sender: what was sent under the old token is not sent anew under another id.
    assert_lines(&bench, "line", 200);
    assert!(sender.stop().success());
    assert!(receiver.log().contains("tokens taken over"));
}

#[test]
fn an_expired_token_ends_its_connection() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let short = token(&bench, &["test", "--rotate", "--expires", "15s"]).ok().stdout;
    bench.write("test.token", short);
    let sender = connected(&bench, &receiver.url());
    sender.wait_for_log("has expired");
    sender.wait_for_log(REFUSED);
    let list = token(&bench, &["--list"]).ok().stdout;
    assert!(list.contains("expired"), "{list}");
}

#[test]
fn a_broken_tokens_file_keeps_its_entries_and_says_so() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let right = fs::read(bench.path("tokens.toml")).expect("the tokens");
    let mut sender = connected(&bench, &receiver.url());
    bench.write("tokens.toml", "[[token]]\nname = broken");
    wait_until("the receiver says that the file is broken", PATIENCE, || {
        receiver.log().contains("the tokens known before stay in force")
    });
    // Not only the connection that is there: one that is new gets in as well.
    assert!(sender.stop().success());
    bench.append("app.log", "line 100\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_lines(&bench, "line", 101);

    bench.write("tokens.toml", right);
    token(&bench, &["test", "--revoke"]).ok();
    wait_until("the revocation is seen", PATIENCE, || receiver.log().contains("tokens taken over"));
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains(REFUSED), "{}", refused.stderr);
}

#[test]
fn a_token_minted_while_the_receiver_runs_gets_in() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.token("late");
    fs::copy(bench.path("late.token"), token_file(&bench)).expect("copied");
    bench.write("app.log", lines("line", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    wait_for_lines(&bench, 100);
    assert!(sender.stop().success());
}

/// A receiver that looks at its file each second must not refuse what was minted in between.
#[test]
fn a_token_that_was_minted_just_now_is_good() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 10));
    for number in 0..5 {
        let token = bench.token(&format!("new-{number}"));
        let mut command = waybill();
        command.arg("send").arg(bench.path("app.log")).args(["--once", "--to", &receiver.url()]);
        command.arg("--token-file").arg(token);
        command.arg("--state-dir").arg(bench.path(&format!("state-{number}")));
        run(command).ok();
    }
}

#[test]
fn a_port_that_speaks_tls_is_named_to_who_does_not() {
    let bench = Bench::new();
    Certificates::make(&bench.path(""));
    let [certificate, key, store] =
        ["server.pem", "server.key", "store.sqlite"].map(|name| bench.path(name));
    let receiver = bench.receiver_with(move |command| {
        command.arg("--tls-cert").arg(&certificate).arg("--tls-key").arg(&key);
        command.arg("--store").arg(&store);
    });
    bench.write("app.log", "a line\n");
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("use wss://"), "{}", refused.stderr);
}

#[test]
fn once_with_a_wrong_token_fails_at_once_with_advice() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("test.token", "waybill_this-is-not-it\n");
    bench.write("app.log", "a line\n");
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains(REFUSED), "{}", refused.stderr);
    assert!(refused.stderr.contains("token"), "{}", refused.stderr);
}

#[test]
fn the_tokens_file_holds_no_token_and_the_list_shows_every_state() {
    let bench = Bench::new();
    let first = fs::read_to_string(bench.token("web-1")).expect("the token");
    token(&bench, &["web-2", "--types", "nginx,syslog", "--expires", "90d"]).ok();
    token(&bench, &["web-3"]).ok();
    token(&bench, &["web-3", "--revoke"]).ok();
    let file = fs::read_to_string(bench.path("tokens.toml")).expect("the file");
    assert!(!file.contains(first.trim()), "the token itself stands in the file");
    let list = token(&bench, &["--list"]).ok().stdout;
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    assert!(lines[0].starts_with("\"web-1\"") && lines[0].contains("  valid  "), "{list}");
    assert!(lines[1].contains("valid until") && lines[1].ends_with("nginx,syslog"), "{list}");
    assert!(lines[2].contains("revoked"), "{list}");

    let twice = token(&bench, &["web-1"]);
    assert_eq!(twice.status.code(), Some(1));
    assert!(twice.stderr.contains("--rotate"), "{}", twice.stderr);
    let unknown = token(&bench, &["web-9", "--revoke"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(unknown.stderr.contains("--list"), "{}", unknown.stderr);
}

#[test]
fn a_type_that_the_token_does_not_list_holds_up_its_source_alone() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    bench.write("odd.log", "never\n");
    let configuration = format!(
        "to = [{:?}]\ntoken_file = \"test.token\"\nstate_dir = \"state\"\n\
         [[source]]\nfiles = \"odd.log\"\ntype = \"billing\"\n\
         [[source]]\nfiles = \"app.log\"\ntype = \"app\"\n",
        receiver.url()
    );
    let configuration = bench.write("sender.toml", configuration);
    let mut command = waybill();
    command.arg("send").arg("--config").arg(configuration);
    let sender = Process::start("sender", command, bench.path("sender.log"));
    wait_for_lines(&bench, 100);
    assert_lines(&bench, "line", 100);
    sender.wait_for_log("is not listed with this token");
    sender.wait_for_log("billing");
    // The type is added at the receiver; neither side is restarted.
    let types = "default,nginx,syslog,supervisor,app,billing";
    let fresh = token(&bench, &["test", "--rotate", "--types", types]).ok().stdout;
    bench.write("test.token", fresh);
    wait_for_lines(&bench, 101);
}
