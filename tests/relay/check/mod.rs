//! `waybill check`: each line says what is so, against real servers, and how to mend it; nobody is disturbed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use jiff::ToSpan;
use serde_json::Value;

use crate::support::servers::{Elasticsearch, Nginx, free_port, have, root};
use crate::support::store::run;
use crate::support::waybill::{Bench, Certificates, Process, waybill};

mod receive;
mod send;

pub use receive::cluster;

/// What `waybill check --json` said.
struct Checked {
    code: Option<i32>,
    lines: Vec<Value>,
    text: String,
}

fn checked(mut command: Command) -> Checked {
    command.arg("--json");
    let finished = run(command);
    let text = format!("{}\n{}", finished.stdout, finished.stderr);
    let lines = finished.stdout.lines();
    let lines = lines.map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    Checked { code: finished.status.code(), lines, text }
}

impl Checked {
    /// Whether there is such a line, whose message holds these words.
    fn has(&self, check: &str, status: &str, words: &str) -> bool {
        self.lines.iter().any(|line| {
            line["check"] == check
                && line["status"] == status
                && line["message"].as_str().is_some_and(|message| message.contains(words))
        })
    }

    #[track_caller]
    fn says(&self, check: &str, status: &str, words: &str) {
        assert!(
            self.has(check, status, words),
            "no {status} {check} with {words:?} in\n{}",
            self.text
        );
    }

    /// It ended as its lines say, and fails exactly here.
    #[track_caller]
    fn fails(&self, checks: &[&str]) {
        let failed = self.lines.iter().filter(|line| line["status"] == "fail");
        let failed: Vec<_> = failed.filter_map(|line| line["check"].as_str()).collect();
        assert_eq!(failed, checks, "{}", self.text);
        assert_eq!(self.code, Some(i32::from(!checks.is_empty())), "{}", self.text);
    }
}

fn sender(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = waybill();
    command.args(["check", "send", "--state-dir"]).arg(bench.path("state")).arg("--token-file");
    command.arg(bench.path("test.token")).args(arguments).current_dir(bench.path(""));
    command
}

fn receiver(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = waybill();
    command.args(["check", "receive", "--tokens"]).arg(bench.path("tokens.toml"));
    command.args(["--listen", "127.0.0.1:7700"]).args(arguments).current_dir(bench.path(""));
    command
}

/// A user who may do nothing: root may do anything, and finds no fault with permissions. The binary is copied to where
/// that user may run it.
fn as_nobody(bench: &Bench, command: &Command) -> Command {
    let program = bench.path("waybill");
    if !program.exists() {
        fs::copy(command.get_program(), &program).expect("copied");
    }
    let mut as_nobody = Command::new(program);
    as_nobody.args(command.get_args()).current_dir(bench.path(""));
    if rustix::process::geteuid().is_root() {
        as_nobody.uid(65534).gid(65534);
    }
    as_nobody
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// nginx as it ships before a receiver's socket.
fn front(bench: &Bench, port: u16, change: impl FnOnce(String) -> String) -> Option<Nginx> {
    let text = fs::read_to_string(root().join("nginx/receiver.conf")).expect("the shipped file");
    let at = |name: &str| bench.path(name).display().to_string();
    let text = text
        .replace("listen 443 ssl;", &format!("listen 127.0.0.1:{port} ssl;"))
        .replace("listen [::]:443 ssl;", "")
        .replace("/etc/ssl/certs/logs.example.org.pem", &at("server.pem"))
        .replace("/etc/ssl/private/logs.example.org.key", &at("server.key"))
        .replace("/run/waybill/receive.sock", &at("receive.sock"));
    Nginx::start(&format!("events {{}}\nhttp {{\n{}\n}}\n", change(text)))
}

fn behind(bench: &Bench) -> Process {
    let mut command = waybill();
    command
        .args(["receive", "--listen"])
        .arg(format!("unix:{}", bench.path("receive.sock").display()));
    command.arg("--tokens").arg(bench.path("tokens.toml"));
    command.arg("--store").arg(bench.path("store.sqlite"));
    let process = Process::start("receiver", command, bench.path("receiver.log"));
    process.wait_for_log(" listening");
    process
}

#[test]
fn a_wrong_configuration_fails_with_every_fault() {
    let bench = Bench::new();
    bench.token("test");
    let file = bench.write("send.toml", "to = [\"ws://192.0.2.1/\"]\ntokenfile = \"x\"\n");
    let mut command = waybill();
    command.args(["check", "send", "--config"]).arg(&file);
    let check = checked(command);
    assert_eq!(check.code, Some(1), "{}", check.text);
    check.says("configuration", "fail", "send.toml:2:1: tokenfile");
    let mut command = waybill();
    command.args(["check", "receive", "--config", "/nonexistent/receive.toml"]);
    let check = checked(command);
    check.fails(&["configuration"]);
}

/// Certificates for `localhost` that end so many days from now.
fn ending(bench: &Bench, days: i64) -> Certificates {
    let end = jiff::Zoned::now().date() + days.days();
    let number = |number: i8| u8::try_from(number).expect("a date");
    Certificates::make_with(&bench.path(""), &["localhost"], |params| {
        let year = i32::from(end.year());
        params.not_after = rcgen::date_time_ymd(year, number(end.month()), number(end.day()));
    })
}

#[test]
fn a_certificate_that_ends_soon_is_warned_of_on_both_sides() {
    let bench = Bench::new();
    bench.token("test");
    bench.write("app.log", "a line\n");
    for (days, status, side) in [(8, "warn", &[][..]), (-2, "fail", &["tls"][..])] {
        let files = ending(&bench, days);
        let (ca, own, key) = (
            files.ca.display().to_string(),
            files.certificate.display().to_string(),
            files.key.display().to_string(),
        );
        let tls = ["--tls-cert", &own, "--tls-key", &key, "--store", "store.sqlite"];
        let check = checked(receiver(&bench, &tls));
        check.fails(side);
        check.says("tls", status, "renew it");

        let port = free_port();
        let mut command = waybill();
        command.args(["receive", "--listen", &format!("127.0.0.1:{port}"), "--tokens"]);
        command.arg(bench.path("tokens.toml")).args(tls).current_dir(bench.path(""));
        let running = Process::start("receiver", command, bench.path("receiver.log"));
        running.wait_for_log(" listening");
        let url = format!("wss://localhost:{port}/");
        let check = checked(sender(&bench, &["app.log", "--ca", &ca, "--to", &url]));
        check.fails(side);
        check.says("tls", status, "renew it");
        let port = free_port();
        let mut command = waybill();
        command.args(["send", "app.log", "--listen", &format!("127.0.0.1:{port}"), "--tokens"]);
        command.arg(bench.path("tokens.toml")).args(&tls[..4]).current_dir(bench.path(""));
        command.args(["--state-dir", "state"]);
        let running = Process::start("sender", command, bench.path("sender.log"));
        running.wait_for_log("listening for a receiver");
        let url = format!("test=wss://localhost:{port}/");
        let dial =
            ["--store", "store.sqlite", "--ca", &ca, "--token-file", "test.token", "--dial", &url];
        let check = checked(receiver(&bench, &dial));
        check.fails(side);
        check.says("tls", status, "renew it");
    }
}

/// The same binary under another clock.
fn under_clock(offset: &str, command: &Command) -> Command {
    let mut other = Command::new("faketime");
    other.args(["-f", offset]).arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        other.current_dir(folder);
    }
    other
}

#[test]
fn a_clock_that_is_off_by_minutes_is_warned_of() {
    if !have("faketime", "faketime") {
        return;
    }
    let bench = Bench::new();
    bench.write("app.log", "a line\n");
    let running = bench.receiver();
    let command = sender(&bench, &["app.log", "--to", &running.url()]);
    checked(command).says("clock", "ok", "within");
    let command = sender(&bench, &["app.log", "--to", &running.url()]);
    checked(under_clock("+1h", &command)).says("clock", "warn", "ahead of the receiver's");
    checked(under_clock("-1h", &command)).says("clock", "warn", "behind the receiver's");
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let command = receiver(&bench, &["--elasticsearch", &node.url()]);
    checked(under_clock("+1h", &command)).says("clock", "warn", "ahead of Elasticsearch's");
}
