//! A configuration that is wrong: the file, the line, and what is allowed; exit code 78, and 2 for a command line.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use crate::support::store::run;
use crate::support::waybill::{Bench, Finished, Process, waybill};

fn command(subcommand: &str) -> Command {
    let mut command = waybill();
    command.arg(subcommand);
    command
}

fn with_file(subcommand: &str, text: &str) -> Finished {
    let bench = Bench::new();
    bench.token("test");
    let file = bench.write("waybill.toml", text);
    let mut command = command(subcommand);
    command.arg("--config").arg(file).current_dir(bench.path(""));
    run(command)
}

#[track_caller]
fn refused(finished: &Finished, code: i32, said: &[&str]) {
    assert_eq!(finished.status.code(), Some(code), "{}", finished.stderr);
    for text in said {
        assert!(finished.stderr.contains(text), "no {text:?} in:\n{}", finished.stderr);
    }
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
}

#[test]
fn an_unknown_key_is_named_with_file_line_and_what_is_allowed() {
    let send = with_file(
        "send",
        "to = [\"ws://127.0.0.1:1/\"]\ntoken_file = \"test.token\"\ntokenfile = \"x\"\n[[source]]\nfiles = \"a\"\n",
    );
    refused(&send, 78, &["waybill.toml:3", "tokenfile", "token_file", "spool_bytes_max"]);
    let source = with_file(
        "send",
        "to = [\"ws://127.0.0.1:1/\"]\ntoken_file = \"test.token\"\n[[source]]\nfiles = \"a\"\ntyp = \"nginx\"\n",
    );
    refused(&source, 78, &["waybill.toml:5", "typ", "type", "unix_datagram"]);
    let receive = with_file(
        "receive",
        "listen = \"127.0.0.1:0\"\ntokens = \"tokens.toml\"\n[elasticsearch]\nurls = [\"http://127.0.0.1:1\"]\nuser = \"x\"\n",
    );
    refused(&receive, 78, &["waybill.toml:5", "user", "user_file", "dead_letter_index"]);
}

#[test]
fn every_bad_value_is_told_at_once() {
    let receive = with_file(
        "receive",
        "listen = \"nonsense\"\ntokens = \"tokens.toml\"\ncredit = \"12 parsecs\"\ndrain_timeout = 7\nindex = \"UPPER-{type}\"\nlog_level = \"loud\"\n",
    );
    let lines: Vec<String> = (1..=6).map(|line| format!("waybill.toml:{line}:")).collect();
    for line in [1, 3, 4, 5, 6] {
        refused(&receive, 78, &[&lines[line - 1]]);
    }
    refused(&receive, 78, &["HOST:PORT", "trace"]);
}

#[test]
fn broken_toml_is_named_with_its_line() {
    let send = with_file("send", "to = [\"ws://127.0.0.1:1/\"]\ntoken_file = \n");
    refused(&send, 78, &["waybill.toml:2"]);
    let mut absent = command("receive");
    absent.args(["--config", "/nonexistent/waybill.toml"]);
    refused(&run(absent), 78, &["/nonexistent/waybill.toml"]);
}

#[test]
fn a_port_in_use_is_said_with_its_address() {
    let bench = Bench::new();
    bench.token("test");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let mut receive = command("receive");
    receive.args(["--listen", &address, "--tokens"]).arg(bench.path("tokens.toml"));
    receive.arg("--store").arg(bench.path("store.sqlite"));
    refused(&run(receive), 1, &[&address, "in use"]);
}

#[test]
fn a_second_receiver_on_a_unix_socket_leaves_the_first_alone() {
    let bench = Bench::new();
    bench.token("test");
    let socket = bench.path("receive.sock").display().to_string();
    let receive = |store: &str| {
        let mut command = command("receive");
        command.args(["--listen", &format!("unix:{socket}"), "--tokens"]);
        command.arg(bench.path("tokens.toml")).arg("--store").arg(bench.path(store));
        command
    };
    let sends = |line: &str| {
        bench.append("app.log", format!("{line}\n"));
        run(bench.send_command(&format!("ws+unix:{socket}"), &["app.log", "--once"])).ok();
        assert!(bench.messages().contains(&line.to_owned()));
    };
    let log = |name: &str| bench.path(name);
    let mut first = Process::start("first", receive("store.sqlite"), log("first.log"));
    first.wait_for_log(" listening");
    let inode = || fs::symlink_metadata(&socket).expect("the socket").ino();
    let before = inode();
    // Several times: its store's thread must end in order each time.
    for _ in 0..20 {
        refused(&run(receive("other.sqlite")), 1, &["receive.sock", "in use by another process"]);
    }
    assert_eq!(inode(), before, "the socket is another one");
    sends("to the first");
    assert!(first.stop().success());
    let mut second = Process::start("second", receive("store.sqlite"), log("second.log"));
    second.wait_for_log(" listening");
    sends("to the second");
    assert!(second.stop().success());
}

#[test]
fn plain_ws_to_other_machines_needs_the_flag_that_names_the_danger() {
    let bench = Bench::new();
    bench.token("test");
    bench.write("app.log", "a line\n");
    let send = run(bench.send_command("ws://logs.example.org/", &["app.log", "--once"]));
    refused(&send, 78, &["wss://", "insecure"]);
    let mut receive = command("receive");
    receive.args(["--listen", "0.0.0.0:0", "--tokens"]).arg(bench.path("tokens.toml"));
    receive.arg("--store").arg(bench.path("store.sqlite"));
    refused(&run(receive), 78, &["tls", "insecure"]);
}

#[test]
fn an_unknown_flag_or_command_is_a_usage_error() {
    let mut send = command("send");
    send.arg("--tokenfile");
    refused(&run(send), 2, &["--tokenfile", "--token-file"]);
    refused(&run(command("ship")), 2, &["ship"]);
    let mut search = command("search");
    search.arg("\"open");
    refused(&run(search), 2, &["\""]);
}

#[test]
fn what_is_missing_is_said() {
    let bench = Bench::new();
    let mut send = command("send");
    send.current_dir(bench.path(""));
    refused(&run(send), 78, &["--to", "--token-file"]);
    let mut receive = command("receive");
    receive.args(["--listen", "127.0.0.1:0"]).current_dir(bench.path(""));
    refused(&run(receive), 78, &["--tokens"]);
}

#[test]
fn elasticsearch_and_a_store_at_once_are_refused() {
    let bench = Bench::new();
    bench.token("test");
    let mut receive = command("receive");
    receive.args(["--listen", "127.0.0.1:0", "--elasticsearch", "http://127.0.0.1:1", "--tokens"]);
    receive.arg(bench.path("tokens.toml")).arg("--store").arg(bench.path("store.sqlite"));
    let finished = run(receive);
    assert!(matches!(finished.status.code(), Some(2 | 78)), "{}", finished.stderr);
    assert!(finished.stderr.contains("store"), "{}", finished.stderr);
}

#[test]
fn a_certificate_or_key_that_cannot_be_used_is_said() {
    let bench = Bench::new();
    bench.token("test");
    bench.write("server.pem", "no certificate");
    bench.write("server.key", "no key");
    let mut receive = command("receive");
    receive.args(["--listen", "127.0.0.1:0", "--tokens"]).arg(bench.path("tokens.toml"));
    receive.arg("--store").arg(bench.path("store.sqlite"));
    receive.arg("--tls-cert").arg(bench.path("server.pem"));
    receive.arg("--tls-key").arg(bench.path("server.key"));
    let finished = run(receive);
    assert!(matches!(finished.status.code(), Some(1 | 78)), "{}", finished.stderr);
    assert!(finished.stderr.contains("server.pem"), "{}", finished.stderr);
}
