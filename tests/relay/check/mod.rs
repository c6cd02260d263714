//! `waybill check`: each line says what is so, against real servers, and how to mend it; nobody is disturbed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use jiff::ToSpan;
use serde_json::{Value, json};

use crate::support::servers::{Elasticsearch, Nginx, free_port, have, root, skip};
use crate::support::store::{run, wait_for_lines};
use crate::support::waybill::{Bench, Certificates, Process, lines, waybill};

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
    /// There is such a line, and its message holds these words.
    #[track_caller]
    fn says(&self, check: &str, status: &str, words: &str) {
        let found = self.lines.iter().any(|line| {
            line["check"] == check
                && line["status"] == status
                && line["message"].as_str().is_some_and(|message| message.contains(words))
        });
        assert!(found, "no {status} {check} with {words:?} in\n{}", self.text);
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
fn a_sound_sender_is_ok_in_each_line_and_a_running_one_is_not_disturbed() {
    let bench = Bench::new();
    bench.token("test");
    let files = Certificates::make(&bench.path(""));
    let port = free_port();
    let Some(_nginx) = front(&bench, port, |text| text) else { return };
    let receiver = behind(&bench);
    let (url, ca) = (format!("wss://localhost:{port}/"), files.ca.display().to_string());
    bench.write("app.log", lines("line", 100));
    let mut running = Process::start(
        "sender",
        bench.send_command(&url, &["app.log", "--ca", &ca]),
        bench.path("sender.log"),
    );
    wait_for_lines(&bench, 100);

    let arguments = ["app.log", "--ca", &ca, "--to", &url];
    let check = checked(sender(&bench, &arguments));
    check.fails(&[]);
    for (name, words) in [
        ("configuration", "complete"),
        ("state", "can be written"),
        ("source", "1 file"),
        ("name", "localhost is"),
        ("connection", "taken"),
        ("tls", "days left"),
        ("upgrade", "101, waybill.v1, through nginx"),
        ("token", "accepted"),
        ("clock", "within"),
    ] {
        check.says(name, "ok", words);
    }
    // For a person: words in columns, and no colours where it is no terminal.
    let shown = run(sender(&bench, &arguments)).ok().stdout;
    assert!(shown.contains("\nok    token "), "{shown}");
    assert!(!shown.contains('\x1b'), "{shown}");

    bench.append("app.log", lines("more", 100));
    wait_for_lines(&bench, 200);
    assert!(running.stop().success());
    let log = receiver.log();
    assert!(!log.contains("WARN") && !log.contains("two instances"), "{log}");
    assert!(log.contains("\"checked\""), "the check was here:\n{log}");
}

/// Everything that a user without rights is refused, and what is not there yet.
#[test]
fn what_the_machine_denies_a_sender_is_said() {
    let bench = Bench::new();
    bench.token("test");
    for name in ["shut.log", "open/app.log", "shut/app.log"] {
        bench.write(name, "a line\n");
    }
    let command = sender(
        &bench,
        &[
            "shut.log",
            "open/*.log",
            "shut/*.log",
            "none/*.log",
            "--unix-stream",
            "shut/waybill.sock",
            "--to",
            "ws://127.0.0.1:1/",
        ],
    );
    let command = as_nobody(&bench, &command);
    mode(&bench.path("test.token"), 0o644);
    mode(&bench.path("shut.log"), 0);
    mode(&bench.path("shut"), 0);
    mode(&bench.path(""), 0o555);
    let check = checked(command);
    // So that the folder can be removed, by others than root too.
    for folder in ["", "shut"] {
        mode(&bench.path(folder), 0o755);
    }
    check.fails(&["state", "source", "source", "socket", "connection"]);
    check.says("configuration", "warn", "chmod 600");
    check.says("state", "fail", "install -d");
    check.says("source", "fail", "1 of 1 files cannot be read");
    check.says("source", "fail", "cannot be listed");
    check.says("source", "ok", "1 file");
    check.says("source", "warn", "no file yet");
    check.says("socket", "fail", "RuntimeDirectory");
    check.says("connection", "fail", "does not answer");
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

/// The kernel's number belongs to a network of its own, so that this machine's stays as it is.
#[test]
fn a_short_queue_of_datagrams_is_warned_of() {
    if !have("unshare", "util-linux") || !have("sysctl", "procps") {
        return;
    }
    let bench = Bench::new();
    bench.token("test");
    let command = sender(&bench, &["--unix-datagram", "d.sock", "--to", "ws://127.0.0.1:1/"]);
    for (length, status) in [("10", "warn"), ("512", "ok")] {
        let mut inside = Command::new("unshare");
        let script = "sysctl -q net.unix.max_dgram_qlen=$0 && exec \"$@\"";
        inside.args(["--map-root-user", "--net", "sh", "-c", script, length]);
        inside.arg(command.get_program()).args(command.get_args()).current_dir(bench.path(""));
        inside.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let check = checked(inside);
        if check.lines.is_empty() {
            return skip(&format!("no network of one's own: {}", check.text));
        }
        check.says("queue", status, &format!("net.unix.max_dgram_qlen is {length}"));
        check.says("socket", "ok", "can be made");
    }
}

#[test]
fn a_token_that_is_bound_to_a_key_fails_without_one() {
    let bench = Bench::new();
    bench.write("app.log", "a line\n");
    let mut mint = waybill();
    mint.args(["token", "test", "--tokens", "tokens.toml", "--chain-key", "chain.key"]);
    mint.current_dir(bench.path(""));
    mode(&bench.write("test.token", run(mint).ok().stdout), 0o600);
    let free = bench.token("free");
    let receiver = bench.receiver();
    let check = |arguments: &[&str]| {
        let url = receiver.url();
        let arguments = [&["app.log", "--to", &url], arguments].concat();
        checked(sender(&bench, &arguments))
    };
    let without = check(&[]);
    without.fails(&["chain key"]);
    without.says("chain key", "fail", "--chain-key-file FILE");
    without.says("token", "ok", "accepted");
    let with = check(&["--chain-key-file", "chain.key"]);
    with.fails(&[]);
    with.says("chain key", "skip", "only a session proves");
    fs::copy(free, bench.path("test.token")).expect("copied");
    let with = check(&["--chain-key-file", "chain.key"]);
    with.fails(&[]);
    with.says("chain key", "warn", "bound to no key");
    let without = check(&[]);
    without.fails(&[]);
    assert!(!without.text.contains("chain key"), "{}", without.text);
}

/// The way to a sender that is dialled, while a receiver has it.
#[test]
fn a_dialled_sender_is_reached_and_not_taken_over() {
    let bench = Bench::new();
    bench.token("test");
    let files = ending(&bench, 100);
    let ca = files.ca.display().to_string();
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    mode(&bench.write("central.token", run(mint).ok().stdout), 0o600);
    let port = free_port();
    let mut send = waybill();
    send.args(["send", "app.log", "--listen", &format!("127.0.0.1:{port}")]);
    send.args(["--state-dir", "state", "--tokens", "receivers.toml"]);
    send.args(["--tls-cert", "server.pem", "--tls-key", "server.key"]).current_dir(bench.path(""));
    bench.write("app.log", lines("line", 100));
    let sending = Process::start("sender", send, bench.path("sender.log"));
    let common = ["--store", "store.sqlite", "--token-file", "central.token", "--dial"];
    let dial = |at: &str| format!("test=wss://{at}/");
    let here = dial(&format!("localhost:{port}"));
    let mut receive = waybill();
    receive.args(["receive", "--tokens", "tokens.toml", "--ca", &ca]).args(common).arg(&here);
    receive.current_dir(bench.path(""));
    let _receiving = Process::start("receiver", receive, bench.path("receiver.log"));
    wait_for_lines(&bench, 100);

    let check = |more: &[&str]| checked(receiver(&bench, &[&common, more].concat()));
    let sound = check(&[&here, "--ca", &ca]);
    sound.fails(&[]);
    for (name, status, words) in [
        ("name", "ok", "localhost is"),
        ("connection", "ok", "taken"),
        ("tls", "ok", "days left"),
        ("upgrade", "skip", "take over"),
        ("token", "skip", "take over"),
    ] {
        sound.says(name, status, words);
    }
    let unknown = check(&[&here]);
    unknown.fails(&["tls"]);
    unknown.says("tls", "fail", "--ca");
    let other = check(&[&dial(&format!("127.0.0.1:{port}")), "--ca", &ca]);
    other.fails(&["tls"]);
    other.says("tls", "fail", "for another name");
    let nobody = check(&[&dial("localhost:1"), "--ca", &ca]);
    nobody.fails(&["connection"]);
    nobody.says("connection", "fail", "does not answer");
    let nameless = check(&[&dial("nothing.invalid"), "--ca", &ca]);
    nameless.fails(&["name"]);
    nameless.says("name", "fail", "does not resolve");

    bench.append("app.log", (100..200).map(|n| format!("line {n}\n")).collect::<String>());
    wait_for_lines(&bench, 200);
    let log = sending.log();
    assert_eq!(log.matches(" connected ").count(), 1, "one connection, all the while: {log}");
}

/// From the name to the token: each step that fails is named, and those before it are `ok`.
#[test]
fn what_is_wrong_on_the_way_to_the_receiver_is_said() {
    let bench = Bench::new();
    bench.token("test");
    bench.write("app.log", "a line\n");
    let files = Certificates::make(&bench.path(""));
    let ca = files.ca.display().to_string();
    let port = free_port();
    let url = format!("wss://localhost:{port}/");
    let to = |url: &str| checked(sender(&bench, &["app.log", "--ca", &ca, "--to", url]));

    let check = to("wss://nothing.invalid/");
    check.fails(&["name"]);
    check.says("name", "fail", "does not resolve");

    // nginx without a receiver, then without the headers that its shipped configuration sets.
    let Some(nginx) = front(&bench, port, |text| text) else { return };
    let check = to(&url);
    check.fails(&["upgrade"]);
    check.says("upgrade", "fail", "the proxy does not reach");
    check.says("tls", "ok", "days left");
    let receiver = behind(&bench);
    let check = checked(sender(&bench, &["app.log", "--to", &url]));
    check.fails(&["tls"]);
    check.says("tls", "fail", "--ca");
    let check = to(&format!("wss://127.0.0.1:{port}/"));
    check.fails(&[]);
    bench.write("test.token", "wb_wrong\n");
    let check = to(&url);
    check.fails(&["token"]);
    check.says("token", "fail", "unknown, expired or revoked");
    drop(nginx);
    let without = |text: String| text.replace("proxy_set_header Upgrade    $http_upgrade;", "");
    let Some(nginx) = front(&bench, port, without) else { return };
    let check = to(&url);
    check.fails(&["upgrade"]);
    check.says("upgrade", "fail", "the proxy drops the Upgrade header");
    drop(nginx);
    let page = |text: String| text.replace("location / {", "location / { return 200 page;");
    let Some(_nginx) = front(&bench, port, page) else { return };
    let check = to(&url);
    check.fails(&["upgrade"]);
    check.says("upgrade", "fail", "a page instead of a WebSocket");
    drop(receiver);
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
        let url = format!("test=wss://localhost:{port}/");
        let dial =
            ["--store", "store.sqlite", "--ca", &ca, "--token-file", "test.token", "--dial", &url];
        let check = checked(receiver(&bench, &dial));
        check.fails(side);
        check.says("tls", status, "renew it");
    }
}

#[test]
fn what_a_receiver_lacks_is_said() {
    let bench = Bench::new();
    let mint = |name: &str, more: &[&str]| {
        let mut command = waybill();
        command.args(["token", name, "--tokens"]).arg(bench.path("tokens.toml")).args(more);
        run(command).ok();
    };
    mint("one", &["--expires", "3d"]);
    mint("two", &[]);
    let store = ["--store", "store/store.sqlite"];
    let check = checked(receiver(&bench, &store));
    check.fails(&[]);
    check.says("tokens", "warn", "the token of \"one\" ends");
    check.says("tokens", "ok", "2 senders");
    check.says("store", "ok", "it can be made");

    mint("one", &["--revoke"]);
    mint("two", &["--revoke"]);
    let files = Certificates::make(&bench.path(""));
    let (own, other) = (files.certificate.display().to_string(), bench.path("other.key"));
    fs::write(&other, rcgen::KeyPair::generate().expect("a key").serialize_pem()).expect("written");
    mode(&other, 0o644);
    let arguments = ["--tls-cert", &own, "--tls-key", "other.key", store[0], store[1]];
    let command = as_nobody(&bench, &receiver(&bench, &arguments));
    // It holds hashes, and is its owner's alone.
    mode(&bench.path("tokens.toml"), 0o644);
    mode(&bench.path(""), 0o555);
    let check = checked(command);
    mode(&bench.path(""), 0o755);
    check.fails(&["tls", "tokens", "store"]);
    check.says("tls", "fail", "does not belong to certificate");
    check.says("tokens", "fail", "nobody may enter");
    check.says("configuration", "warn", "chmod 600");
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

/// What `waybill setup` put there, and what others change; called for each version.
pub fn cluster(node: &Elasticsearch, rule: &str, dead_letter: &str) {
    let bench = Bench::new();
    bench.token("test");
    let check = |rule: &str| {
        let arguments = ["--elasticsearch", &node.url(), "--index", rule];
        let mut command = receiver(&bench, &arguments);
        command.args(["--dead-letter-index", dead_letter]);
        checked(command)
    };
    let sound = check(rule);
    sound.fails(&[]);
    sound.says("version", "ok", "");
    sound.says("clock", "ok", "within");
    sound.says("template", "ok", "version");
    sound.says("durability", "ok", "request");
    sound.says("privileges", "skip", "not checked");
    check("other-{type}").says("template", "fail", "it is missing");

    let put = |path: &str, body: Value| {
        let (status, answer) = node.request("PUT", path, &body);
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
    };
    let delete = |path: &str| assert_eq!(node.request("DELETE", path, &Value::Null).0, 200);
    let asynchronous = json!({ "index.translog.durability": "async" });
    put("/checked-default", json!({ "settings": asynchronous }));
    let template =
        json!({ "index_patterns": ["checked-*"], "template": { "settings": asynchronous } });
    put("/_index_template/checked", template);
    let check = check("checked-{type}");
    check.fails(&["template", "durability", "durability"]);
    check.says("durability", "fail", "checked-default");
    check.says("durability", "fail", "a template makes");
    delete("/_index_template/checked");
    delete("/checked-default");
}

/// Before the node: TLS and a key, and answers that only a cluster with users gives.
#[test]
fn credentials_and_privileges_are_checked_through_tls() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    bench.token("test");
    let files = Certificates::make(&bench.path(""));
    let port = free_port();
    // The published servers have no users: nginx asks for the key, and says what Elasticsearch with users would.
    let missing = json!({ "has_all_requested": false, "index": {
        "waybill-*": { "create_doc": true, "auto_configure": false },
        "waybill-parked": { "create_doc": true, "auto_configure": true } } });
    let text = format!(
        "events {{}}\nhttp {{ server {{ listen 127.0.0.1:{port} ssl; server_name localhost;\n\
         ssl_certificate {}; ssl_certificate_key {};\n\
         if ($http_authorization != \"ApiKey aWQ6a2V5\") {{ return 401; }}\n\
         location /_security/ {{ default_type application/json; return 200 '{missing}'; }}\n\
         location /_index_template/ {{ return 403; }}\n\
         location / {{ proxy_pass http://{}; }} }} }}\n",
        files.certificate.display(),
        files.key.display(),
        node.host_port()
    );
    let Some(_nginx) = Nginx::start(&text) else { return };
    let url = format!("https://localhost:{port}");
    let ca = files.ca.display().to_string();
    let with = |key: &str, more: &[&str]| {
        mode(&bench.write("api-key", key), 0o600);
        let mut command = receiver(&bench, &["--elasticsearch", &url, "--api-key-file", "api-key"]);
        command.args(more);
        checked(command)
    };
    let check = with("id:key", &["--es-ca", &ca]);
    check.fails(&["privileges"]);
    check.says("privileges", "fail", "auto_configure on waybill-*");
    check.says("tls", "ok", "days left");
    check.says("clock", "ok", "within");
    check.says("template", "skip", "manage_index_templates");
    let check = with("id:other", &["--es-ca", &ca]);
    check.fails(&["credentials"]);
    let check = with("id:key", &[]);
    check.fails(&["connection"]);
    check.says("connection", "fail", "certificate");
    let mut command = receiver(&bench, &["--elasticsearch", "http://127.0.0.1:1"]);
    command.args(["--elasticsearch", &node.url()]);
    let check = checked(command);
    check.says("connection", "fail", "cannot connect");
    check.says("version", "ok", "");
}
