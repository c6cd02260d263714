//! What systemd hears and is given: readiness, reloads, stops, the watchdog, and the shipped units.

use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::support::servers::{free_port, have, root, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, PATIENCE, Process, waybill};

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

fn receiver(bench: &Bench, port: u16) -> Process {
    bench.token("test");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\n"));
    let mut command = waybill();
    command.args(["receive", "--config"]).arg(bench.path("receive.toml"));
    command.arg("--tokens").arg(bench.path("tokens.toml"));
    command.arg("--store").arg(bench.path("store.sqlite"));
    Manager::watch(bench, &mut command);
    Process::start("receiver", command, bench.path("receiver.log"))
}

/// A reload is begun with the time that `Type=notify-reload` compares, and over before anything else.
fn reload(manager: &Manager, process: &Process, said: &str) {
    process.signal("-HUP");
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
    reload(&manager, &sender, "the configuration has not changed");
    bench.write("send.toml", "[[source]]\nunix_datagram = 'log.sock'\ntags = ['new']\n");
    reload(&manager, &sender, "the changed configuration is in force");
    bench.write("send.toml", "[[source]]\nunix_datagramm = 'log.sock'\n");
    reload(&manager, &sender, "the changed configuration is refused");
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
    let mut receiver = receiver(&bench, port);
    assert_eq!(manager.hear(), "READY=1");
    std::net::TcpStream::connect(("127.0.0.1", port)).expect("ready before it listens");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\ncredit = '16MiB'\n"));
    reload(&manager, &receiver, "the changed configuration is in force");
    bench.write("receive.toml", format!("listen = '127.0.0.1:{port}'\ncredit = 'much'\n"));
    reload(&manager, &receiver, "the changed configuration is refused");
    receiver.signal("-TERM");
    assert_eq!(manager.hear(), "STOPPING=1");
    assert!(receiver.wait().success());
}

#[test]
fn the_watchdog_is_fed_as_long_as_the_process_runs() {
    const INTERVAL: Duration = Duration::from_millis(300);
    let bench = Bench::new();
    let manager = Manager::new(&bench);
    let mut sender = sender(&bench, |command| {
        command.env("WATCHDOG_USEC", INTERVAL.as_micros().to_string());
    });
    assert_eq!(manager.hear_news(), "READY=1");
    for _ in 0..10 {
        assert_eq!(manager.hear(), "WATCHDOG=1");
    }
    // Hung, as far as a service manager can see: nothing comes for longer than it waits.
    sender.signal("-STOP");
    let state = format!("/proc/{}/stat", sender.id());
    wait_until("it stands still", PATIENCE, || {
        fs::read_to_string(&state).is_ok_and(|text| text.contains(") T "))
    });
    manager.forget();
    manager.socket.set_read_timeout(Some(2 * INTERVAL)).expect("a timeout");
    let silence = manager.socket.recv(&mut [0; 64]).expect_err("it is hung");
    assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
    manager.socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    sender.signal("-CONT");
    assert_eq!(manager.hear(), "WATCHDOG=1");
    assert!(sender.stop().success());
}

/// A shipped unit with the built binary, since the one that it names need not be here.
fn unit(bench: &Bench, name: &str) -> std::path::PathBuf {
    let text = fs::read_to_string(root().join("docs/examples/systemd").join(name));
    let text = text.expect("the shipped unit");
    let program = Path::new(env!("CARGO_BIN_EXE_waybill")).display().to_string();
    assert!(text.contains("ExecStart=/usr/bin/waybill "), "{text}");
    bench.write(name, text.replace("/usr/bin/waybill", &program))
}

#[test]
fn the_shipped_units_are_sound_and_confined() {
    if !have("systemd-analyze", "systemd") {
        return;
    }
    let bench = Bench::new();
    for (name, bound) in [("waybill-send.service", 1.6), ("waybill-receive.service", 1.3)] {
        let unit = unit(&bench, name);
        let mut verify = Command::new("systemd-analyze");
        let finished = run({
            verify.args(["verify", "--man=no"]).arg(&unit);
            verify
        });
        assert!(finished.status.success(), "{}", finished.stderr);
        assert!(!finished.stderr.contains(name), "{}", finished.stderr);
        let mut security = Command::new("systemd-analyze");
        security.args(["security", "--offline=true", "--no-pager"]).arg(&unit);
        let finished = run(security);
        let level = finished
            .stdout
            .split("Overall exposure level")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().find_map(|word| word.parse::<f64>().ok()));
        let level = level.unwrap_or_else(|| panic!("{}{}", finished.stdout, finished.stderr));
        assert!(level <= bound, "{name}: {level}\n{}", finished.stdout);
    }
}
