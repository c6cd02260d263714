//! The sender's side.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;

use super::{as_nobody, behind, checked, front, mode, sender};
use crate::support::servers::{free_port, have, skip};
use crate::support::store::{run, wait_for_lines};
use crate::support::waybill::{Bench, Certificates, Process, lines, waybill};

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
        ("lock", "by the waybill send that runs (process "),
        ("source", "1 file"),
        ("name", "localhost is"),
        ("connection", "accepted"),
        ("tls", "days left"),
        ("upgrade", "101, waybill.v1, through nginx"),
        ("token", "accepted"),
        ("types", "the token lists"),
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

#[test]
fn a_type_that_the_token_does_not_list_fails() {
    let bench = Bench::new();
    let mut mint = waybill();
    mint.args(["token", "test", "--tokens", "tokens.toml", "--types", "app,nginx"]);
    mint.current_dir(bench.path(""));
    mode(&bench.write("test.token", run(mint).ok().stdout), 0o600);
    let receiver = bench.receiver();
    bench.write(
        "send.toml",
        format!(
            "to = ['{}']\n[[source]]\nfiles = 'app.log'\nname = 'app'\ntype = 'app'\n\
             [[source]]\nfiles = 'db.log'\nname = 'db'\ntype = 'database'\n",
            receiver.url()
        ),
    );
    let check = checked(sender(&bench, &["--config", "send.toml"]));
    check.fails(&["types"]);
    check.says("token", "ok", "accepted");
    check.says("types", "fail", "database of \"db\", whose lines would be refused");
    check.says("types", "fail", "types = [\"app\", \"nginx\", \"database\"]");
    assert!(!check.text.contains("app of"), "{}", check.text);
}

/// Each listener of a sender, with its address.
struct Listeners {
    arguments: Vec<String>,
    tcp: Vec<u16>,
    udp: u16,
}

impl Listeners {
    fn choose() -> Listeners {
        let (http, tcp, metrics, udp) = (free_port(), free_port(), free_port(), free_port());
        let arguments = [
            ("--http-intake", http),
            ("--syslog-tcp", tcp),
            ("--syslog-udp", udp),
            ("--metrics", metrics),
        ];
        let arguments = arguments
            .iter()
            .flat_map(|(flag, port)| [(*flag).to_owned(), format!("127.0.0.1:{port}")]);
        Listeners { arguments: arguments.collect(), tcp: vec![http, tcp, metrics], udp }
    }
}

#[test]
fn a_port_that_is_in_use_fails_unless_the_sender_itself_has_it() {
    let bench = Bench::new();
    bench.token("test");
    let receiver = bench.receiver();
    let url = receiver.url();
    let listeners = Listeners::choose();
    let mut arguments: Vec<&str> = listeners.arguments.iter().map(String::as_str).collect();
    arguments.extend(["--unix-stream", "s.sock"]);
    let check = || checked(sender(&bench, &[&arguments[..], &["--to", &url]].concat()));
    let loopback = |port: u16| ("127.0.0.1", port);
    let sound = check();
    sound.fails(&[]);
    for port in listeners.tcp.iter().chain([&listeners.udp]) {
        sound.says("port", "ok", &format!("127.0.0.1:{port} is free"));
    }
    // The check has let go of them.
    let held: Vec<_> =
        listeners.tcp.iter().map(|port| TcpListener::bind(loopback(*port))).collect();
    let held = (held, UdpSocket::bind(loopback(listeners.udp)).expect("bound"));
    let taken = check();
    taken.fails(&["port"; 4]);
    for port in listeners.tcp.iter().chain([&listeners.udp]) {
        let words = format!("127.0.0.1:{port} is in use: stop what listens there");
        taken.says("port", "fail", &words);
    }
    assert!(!taken.text.contains("\"lock\""), "{}", taken.text);
    drop(held);

    let mut running =
        Process::start("sender", bench.send_command(&url, &arguments), bench.path("sender.log"));
    running.wait_for_log(" connected ");
    let check = check();
    check.fails(&[]);
    for port in listeners.tcp.iter().chain([&listeners.udp]) {
        check.says("port", "ok", &format!("127.0.0.1:{port} is in use, as it must be"));
    }
    check.says("socket", "ok", "is bound, as it must be");
    check.says("lock", "ok", &format!("(process {})", running.id()));
    assert!(!check.text.contains("\"warn\""), "{}", check.text);
    assert!(running.stop().success());
}

#[test]
fn what_lies_where_a_socket_belongs_is_said() {
    let bench = Bench::new();
    bench.token("test");
    let receiver = bench.receiver();
    drop(UnixDatagram::bind(bench.path("dead.sock")).expect("bound"));
    let _listener = UnixListener::bind(bench.path("taken.sock")).expect("bound");
    bench.write("file.sock", "no socket");
    let url = receiver.url();
    let check = checked(sender(
        &bench,
        &[
            "--unix-datagram",
            "dead.sock",
            "--unix-stream",
            "taken.sock",
            "--unix-datagram",
            "file.sock",
            "--unix-stream",
            "missing/waybill.sock",
            "--to",
            &url,
        ],
    ));
    check.fails(&["socket"; 2]);
    check.says("socket", "ok", "dead.sock is a dead process's, and will be replaced");
    check.says("socket", "warn", "taken.sock is bound already");
    check.says("socket", "fail", "file.sock: exists and is not a socket: remove it");
    check.says("socket", "fail", "make the folder");
    assert!(bench.path("dead.sock").exists(), "nothing is changed");
}

/// A sender that listens: its port and certificate, and who of its receivers' tokens file may enter.
#[test]
fn a_sender_that_listens_counts_the_receivers_that_may_enter() {
    let bench = Bench::new();
    Certificates::make(&bench.path(""));
    bench.write("app.log", "a line\n");
    let token = |name: &str, more: &[&str]| {
        let mut command = waybill();
        command.args(["token", name, "--tokens", "receivers.toml"]).args(more);
        command.current_dir(bench.path(""));
        run(command).ok();
    };
    let check = |port: u16| {
        let mut command = waybill();
        command.args(["check", "send", "app.log", "--listen", &format!("127.0.0.1:{port}")]);
        command.args(["--state-dir", "state", "--tokens", "receivers.toml"]);
        command.args(["--tls-cert", "server.pem", "--tls-key", "server.key"]);
        command.current_dir(bench.path(""));
        checked(command)
    };
    let port = free_port();
    token("central", &["--chain-key", "chain.key"]);
    token("former", &[]);
    token("former", &["--revoke"]);
    token("certified", &["--certificate", "server.pem"]);
    let chained = check(port);
    chained.fails(&["tokens"]);
    chained.says("tokens", "warn", "\"central\" may not enter: this token is bound to a chain key");
    chained.says("tokens", "warn", "\"certified\" may not enter: this token needs its client");
    chained.says("tokens", "fail", "nobody may enter: waybill token NAME --tokens ");

    token("central", &["--rotate", "--no-chain-key"]);
    let sound = check(port);
    sound.fails(&[]);
    sound.says("tokens", "ok", "1 receiver may enter");
    sound.says("port", "ok", "is free");
    sound.says("tls", "ok", "days left");

    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let in_use = check(taken.local_addr().expect("an address").port());
    in_use.fails(&["port"]);
    in_use.says("port", "fail", "is in use");
    token("central", &["--revoke"]);
    check(port).fails(&["tokens"]);
}
