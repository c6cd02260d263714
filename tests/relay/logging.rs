//! What both sides say on standard error: the form, the level, and the progress bar on a terminal.

use std::fs;
use std::net::TcpStream;
use std::process::Command;

use serde_json::Value;

use crate::support::servers::{free_port, have, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Process, lines, numbered, waybill};

/// One line on its way with these flags at both sides; what the receiver and the sender said.
fn said_with(flags: &[&str]) -> [String; 2] {
    let bench = Bench::new();
    bench.token("test");
    let port = free_port();
    let mut command = waybill();
    command.args(["receive", "--listen", &format!("127.0.0.1:{port}"), "--tokens"]);
    command.arg(bench.path("tokens.toml")).arg("--store").arg(bench.path("store.sqlite"));
    command.args(flags);
    let mut receiver = Process::start("receiver", command, bench.path("receiver.log"));
    wait_until("the receiver listens", PATIENCE, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    bench.write("app.log", "line\n");
    let mut command =
        bench.send_command(&format!("ws://127.0.0.1:{port}/"), &["app.log", "--once"]);
    let output = command.args(flags).output().expect("waybill send");
    assert!(output.status.success());
    assert!(receiver.stop().success());
    [receiver.log(), String::from_utf8(output.stderr).expect("UTF-8")]
}

#[test]
fn json_is_an_object_per_line() {
    for said in said_with(&["--log-format", "json"]) {
        let parsed: Vec<Value> =
            said.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        assert!(!parsed.is_empty());
        for line in &parsed {
            let text = |key: &str| line[key].as_str().is_some_and(|text| !text.is_empty());
            assert!(text("timestamp") && text("level") && text("message"), "{line}");
            let is_quoted =
                |value: &Value| value.as_str().is_some_and(|text| text.starts_with('"'));
            assert!(!line.as_object().expect("an object").values().any(is_quoted), "{line}");
        }
    }
}

#[test]
fn a_level_leaves_out_what_is_less_severe() {
    for said in said_with(&[]) {
        assert!(said.contains(" INFO "), "{said}");
    }
    for said in said_with(&["--log-level", "warn"]) {
        assert!(!said.contains(" INFO "), "{said}");
    }
}

/// It said 0 of 0 bytes, and no time left, until it knew what there was to send.
#[test]
fn the_progress_bar_shows_what_there_is_to_send() {
    if !have("script", "bsdutils") {
        return;
    }
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("line", 10_000));
    let inner = bench.send_command(&receiver.url(), &["app.log", "--once"]);
    let words = std::iter::once(inner.get_program()).chain(inner.get_args());
    let words: Vec<&str> = words.map(|word| word.to_str().expect("UTF-8")).collect();
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--flush", "--command", &words.join(" ")]);
    command.arg(bench.path("terminal")).current_dir(bench.path("")).env("TERM", "xterm");
    let mut terminal = Process::start("script", command, bench.path("script.log"));
    let shown = || {
        let bytes = fs::read(bench.path("terminal")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    wait_until("a bar", PATIENCE, || shown().contains("0 B/96.57 KiB  0 lines"));
    assert!(shown().contains("/s  ") && shown().contains(" left"), "{}", shown());
    receiver.start();
    assert!(terminal.wait().success(), "{}", shown());
    assert!(!shown().contains("/0 B"), "{}", shown());
    bench.assert_lines(numbered("line", 10_000));
}
