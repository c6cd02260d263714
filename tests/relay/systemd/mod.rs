//! What systemd hears and is given: readiness, reloads, stops, the watchdog; and the shipped units.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use super::support::servers::{free_port, have, root, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, Certificates, Finished, PATIENCE, Process, waybill};

mod sockets;

const SOCKET: &str = "waybill-send.socket";
const RECEIVER_SOCKET: &str = "waybill-receive.socket";
pub const SENDER: &str = "waybill-send.service";
pub const RECEIVER: &str = "waybill-receive.service";

/// The service manager's end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new(bench: &Bench) -> Manager {
        let socket = UnixDatagram::bind(bench.path("notify.sock")).expect("bind");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Manager { socket }
    }

    /// Lets a process tell this manager.
    fn watch(bench: &Bench, command: &mut Command) {
        command.env("NOTIFY_SOCKET", bench.path("notify.sock"));
    }

    /// The next message.
    fn hear(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("a message");
        String::from_utf8_lossy(&buffer[..length]).trim_end().to_owned()
    }

    /// The next message that is no ping.
    fn hear_news(&self) -> String {
        loop {
            let message = self.hear();
            if message != "WATCHDOG=1" {
                return message;
            }
        }
    }

    /// Throws away what has come.
    fn forget(&self) {
        self.socket.set_nonblocking(true).expect("nonblocking");
        let end = loop {
            if let Err(error) = self.socket.recv(&mut [0; 4096]) {
                break error;
            }
        };
        assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
        self.socket.set_nonblocking(false).expect("blocking");
    }
}

fn sender(bench: &Bench, change: impl FnOnce(&mut Command)) -> Process {
    bench.token("test");
    bench.write("send.toml", "[[source]]\nunix_datagram = 'log.sock'\n");
    // Nobody listens there: a sender is ready all the same.
    let mut command = bench.send_command("ws://127.0.0.1:1/", &["--config", "send.toml"]);
    Manager::watch(bench, &mut command);
    change(&mut command);
    Process::start("sender", command, bench.path("sender.log"))
}

fn receiver(bench: &Bench, port: u16, change: impl FnOnce(&mut Command)) -> Process {
    bench.token("test");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\n"));
    let mut command = waybill();
    command.args(["receive", "--config"]).arg(bench.path("receive.toml"));
    command.arg("--tokens").arg(bench.path("tokens.toml"));
    command.arg("--store").arg(bench.path("store.sqlite"));
    Manager::watch(bench, &mut command);
    change(&mut command);
    Process::start("receiver", command, bench.path("receiver.log"))
}

/// A reload by the shipped unit's command is begun with the time that `Type=notify-reload` compares, and over before
/// anything else.
fn reload(manager: &Manager, process: &Process, unit: &str, said: &str) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &value(&shipped(unit), "ExecReload")]);
    command.env("MAINPID", process.id().to_string());
    run(command).ok();
    let begun = manager.hear_news();
    let time = begun.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&begun);
    let time: u64 = time.parse().expect("microseconds");
    // Since the machine was started, as CLOCK_MONOTONIC counts.
    let uptime = fs::read_to_string("/proc/uptime").expect("uptime");
    let seconds: f64 = uptime.split(' ').next().expect("a number").parse().expect("a number");
    assert!((time as f64 / 1e6 - seconds).abs() < PATIENCE.as_secs_f64(), "{time} at {seconds}");
    assert_eq!(manager.hear_news(), "READY=1");
    process.wait_for_log(said);
}

#[test]
fn a_sender_says_when_it_is_ready_reloads_and_stops() {
    let bench = Bench::new();
    let manager = Manager::new(&bench);
    let mut sender = sender(&bench, |_| {});
    assert_eq!(manager.hear(), "READY=1");
    assert!(bench.path("log.sock").exists(), "ready before its sockets are bound");
    assert!(bench.path("state/rows").exists(), "ready before its state is open");
    reload(&manager, &sender, SENDER, "the configuration has not changed");
    bench.write("send.toml", "[[source]]\nunix_datagram = 'log.sock'\ntags = ['new']\n");
    reload(&manager, &sender, SENDER, "the changed configuration is in force");
    bench.write("send.toml", "[[source]]\nunix_datagramm = 'log.sock'\n");
    reload(&manager, &sender, SENDER, "the changed configuration is refused");
    assert!(sender.log().contains("send.toml:2"), "{}", sender.log());
    sender.signal("-TERM");
    assert_eq!(manager.hear(), "STOPPING=1");
    assert!(sender.wait().success());
}

#[test]
fn a_receiver_says_when_it_is_ready_reloads_and_stops() {
    let bench = Bench::new();
    let manager = Manager::new(&bench);
    let port = free_port();
    let mut receiver = receiver(&bench, port, |_| {});
    assert_eq!(manager.hear(), "READY=1");
    std::net::TcpStream::connect(("127.0.0.1", port)).expect("ready before it listens");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\ncredit = '16MiB'\n"));
    reload(&manager, &receiver, RECEIVER, "the changed configuration is in force");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\ncredit = 'much'\n"));
    reload(&manager, &receiver, RECEIVER, "the changed configuration is refused");
    receiver.signal("-TERM");
    assert_eq!(manager.hear(), "STOPPING=1");
    assert!(receiver.wait().success());
}

#[test]
fn the_watchdog_is_fed_as_long_as_the_process_runs() {
    const INTERVAL: Duration = Duration::from_millis(300);
    let watched = |command: &mut Command| {
        command.env("WATCHDOG_USEC", INTERVAL.as_micros().to_string());
    };
    for side in [SENDER, RECEIVER] {
        let bench = Bench::new();
        let manager = Manager::new(&bench);
        let mut process = match side {
            SENDER => sender(&bench, watched),
            _ => receiver(&bench, free_port(), watched),
        };
        assert_eq!(manager.hear_news(), "READY=1");
        for _ in 0..10 {
            assert_eq!(manager.hear(), "WATCHDOG=1");
        }
        // Hung, as far as a service manager can see: nothing comes for longer than it waits.
        process.freeze();
        manager.forget();
        manager.socket.set_read_timeout(Some(2 * INTERVAL)).expect("a timeout");
        let silence = manager.socket.recv(&mut [0; 64]).expect_err("it is hung");
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
        manager.socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        process.signal("-CONT");
        assert_eq!(manager.hear(), "WATCHDOG=1");
        assert!(process.stop().success());
    }
}

// --- The shipped units -----------------------------------------------------------------------------------------------

pub fn shipped(name: &str) -> String {
    fs::read_to_string(root().join("docs/examples/systemd").join(name)).expect("the shipped file")
}

/// The values of a setting, in order.
pub fn values(unit: &str, setting: &str) -> Vec<String> {
    let start = format!("{setting}=");
    unit.lines().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect()
}

pub fn value(unit: &str, setting: &str) -> String {
    let mut values = values(unit, setting);
    assert_eq!(values.len(), 1, "{setting}: {values:?}");
    values.remove(0)
}

/// What `systemd-analyze` says of a unit in the folder.
fn analyze(bench: &Bench, name: &str, arguments: &[&str]) -> Finished {
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).arg(bench.path(name));
    run(command)
}

#[test]
fn the_shipped_units_are_sound_and_confined_as_the_readme_says() {
    if !have("systemd-analyze", "systemd") {
        return;
    }
    const VERIFY: &[&str] = &["verify", "--man=no", "--recursive-errors=no"];
    const SECURITY: &[&str] = &["security", "--offline=true", "--no-pager"];
    let bench = Bench::new();
    for name in [SENDER, RECEIVER] {
        // The program that it names need not be here.
        let text = shipped(name);
        assert!(text.contains("ExecStart=/usr/bin/waybill "), "{text}");
        bench.write(name, text.replace("/usr/bin/waybill", env!("CARGO_BIN_EXE_waybill")));
    }
    for name in [SOCKET, RECEIVER_SOCKET] {
        bench.write(name, shipped(name));
    }
    let is_sound = |name: &str| {
        let said = analyze(&bench, name, VERIFY).ok().stderr;
        assert!(said.trim().is_empty(), "{name}: {said}");
    };
    [SENDER, RECEIVER, SOCKET, RECEIVER_SOCKET].into_iter().for_each(is_sound);

    let readme = fs::read_to_string(root().join("README.md")).expect("the README");
    let scores = readme.split_once("(`systemd-analyze security`: ").expect("the scores").1;
    let scores = scores.split_once(" of 10)").expect("the scores").0;
    let (sender, receiver) = scores.split_once(" and ").expect("two scores");
    for (name, score) in [(SENDER, sender), (RECEIVER, receiver)] {
        let bound: f64 = score.parse().expect("a number");
        let table = analyze(&bench, name, SECURITY).ok().stdout;
        let rest = table.split("Overall exposure level").nth(1).unwrap_or_default();
        let level = rest.split_whitespace().find_map(|word| word.parse::<f64>().ok());
        let level = level.unwrap_or_else(|| panic!("{table}"));
        assert!(level <= bound, "{name}: {level}\n{table}");
    }

    // So are they with the lines that stand there as comments.
    for name in [SENDER, RECEIVER] {
        let program = env!("CARGO_BIN_EXE_waybill");
        let text = shipped(name).replace("/usr/bin/waybill", program);
        let text =
            ["ExecStart=", "LoadCredential=", "Environment="].iter().fold(text, |text, setting| {
                text.replace(&format!("\n#{setting}"), &format!("\n{setting}"))
            });
        bench.write(name, text);
        is_sound(name);
    }

    // It does look: a word that it does not know is told.
    for name in [SOCKET, RECEIVER_SOCKET] {
        bench.write(name, shipped(name).replace("SocketMode=", "SocketMood="));
        let said = analyze(&bench, name, VERIFY).stderr;
        assert!(said.contains("SocketMood"), "{said:?}");
    }
}

#[test]
fn the_shipped_services_notify_are_watched_and_reloaded() {
    for name in [SENDER, RECEIVER] {
        let unit = shipped(name);
        for (setting, expected) in
            [("Type", "notify"), ("ExecReload", "/bin/kill -HUP $MAINPID"), ("WatchdogSec", "60")]
        {
            assert_eq!(value(&unit, setting), expected, "{setting} of {name}");
        }
    }
}

/// Both units as they are shipped, with the secrets whose lines stand there as comments.
#[test]
fn the_shipped_services_pass_a_line_with_every_secret_as_a_credential() {
    let bench = Bench::new();
    let manager = Manager::new(&bench);
    let port = free_port();
    let paths = Certificates::make(&bench.path(""));
    fs::copy(&paths.certificate, bench.path("chain.pem")).expect("copied");
    fs::rename(&paths.certificate, bench.path("client.pem")).expect("renamed");
    fs::copy(&paths.key, bench.path("client.key")).expect("copied");
    fs::rename(&paths.key, bench.path("tls-key.pem")).expect("renamed");
    let mut token = waybill();
    token.args(["token", "web-1", "--tokens"]).arg(bench.path("tokens.toml"));
    token.arg("--certificate").arg(bench.path("client.pem"));
    token.arg("--chain-key").arg(bench.path("chain.key"));
    bench.write("token", run(token).ok().stdout);
    bench.write(
        "receive.toml",
        format!("listen = '127.0.0.1:{port}'\ntokens = 'tokens.toml'\nclient_ca = 'ca.pem'\n"),
    );
    let mut command = service(&bench, &with_lines(RECEIVER, &["tls-key"]));
    Manager::watch(&bench, &mut command);
    let mut receiver = Process::start("receiver", command, bench.path("receiver.log"));
    assert_eq!(manager.hear(), "READY=1");

    bench.write(
        "send.toml",
        format!("to = ['wss://localhost:{port}/']\nca = 'ca.pem'\n[[source]]\nfiles = 'app.log'\n"),
    );
    bench.write("app.log", "a line\n");
    let command = service(&bench, &with_lines(SENDER, &["chain-key", "client-key"]));
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    let search = || {
        let mut search = waybill();
        search.args(["search", "a line", "--store"]).arg(bench.path("state/store.sqlite"));
        run(search).stdout
    };
    wait_until("the line is stored", PATIENCE, || search().ends_with("a line\n"));
    assert!(sender.stop().success());
    assert!(receiver.stop().success());

    // The other way round: the sender's own certificate, and the token of a receiver that dials.
    let mut token = waybill();
    token.args(["token", "central", "--tokens"]).arg(bench.path("receivers.toml"));
    bench.write("dial-token", run(token).ok().stdout);
    bench.write(
        "send.toml",
        format!("listen = '127.0.0.1:{port}'\ntokens = 'receivers.toml'\n[[source]]\nfiles = 'app.log'\n"),
    );
    bench.write(
        "receive.toml",
        format!(
            "tokens = 'tokens.toml'\nca = 'ca.pem'\n[[dial]]\nsender = 'web-1'\n\
             url = 'wss://localhost:{port}/'\n"
        ),
    );
    bench.append("app.log", "a line too\n");
    let own = ["LoadCredential=token:", "Environment=WAYBILL_TOKEN_FILE="];
    let unit = with_lines(SENDER, &["chain-key", "tls-key"]);
    let unit = own.iter().fold(unit, |unit, line| unit.replace(line, &format!("#{line}")));
    let mut sender = Process::start("sender", service(&bench, &unit), bench.path("listening.log"));
    let command = service(&bench, &with_lines(RECEIVER, &["dial-token"]));
    let mut receiver = Process::start("receiver", command, bench.path("dialling.log"));
    wait_until("the second line is stored", PATIENCE, || search().contains("a line too\n"));
    assert!(sender.stop().success());
    assert!(receiver.stop().success());
}

/// What a unit starts, with this folder as /etc/waybill. Credentials are copies, as systemd makes them.
fn service(bench: &Bench, unit: &str) -> Command {
    let etc = bench.path("").display().to_string();
    let unit = unit.replace("/etc/waybill/", &etc);
    let folder = tempfile::tempdir_in(&etc).expect("a folder").keep();
    for credential in values(&unit, "LoadCredential") {
        let (name, from) = credential.split_once(':').expect("a name and a path");
        fs::copy(from, folder.join(name)).expect("copied");
        fs::set_permissions(folder.join(name), PermissionsExt::from_mode(0o400)).expect("chmod");
    }
    let credentials = folder.display().to_string();
    let line = values(&unit, "ExecStart").pop().expect("a command").replace("%d", &credentials);
    let mut words = line.split(' ');
    assert_eq!(words.next(), Some("/usr/bin/waybill"), "{line}");
    let mut command = waybill();
    command.args(words).env("STATE_DIRECTORY", bench.path("state"));
    for setting in values(&unit, "Environment") {
        let (name, value) = setting.split_once('=').expect("a variable");
        command.env(name, value.replace("%d", &credentials));
    }
    command
}

/// The shipped unit with those of its commented lines that hold one of these words.
fn with_lines(unit: &str, words: &[&str]) -> String {
    let mut found = 0;
    let is_setting = |line: &str| {
        ["LoadCredential=", "Environment=", "ExecStart=/"].iter().any(|name| line.starts_with(name))
    };
    let mut choose = |line: &str| match line.strip_prefix('#') {
        Some(setting) if is_setting(setting) && words.iter().any(|word| setting.contains(word)) => {
            found += 1;
            setting.to_owned() + "\n"
        }
        _ => line.to_owned() + "\n",
    };
    let text = shipped(unit).lines().map(&mut choose).collect();
    assert_eq!(found, 2 * words.len(), "{text}");
    text
}
