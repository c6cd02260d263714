//! The shipped systemd units: systemd takes them, and what is written while the service is down is stored afterwards.

use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::support::servers::{have, root, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, Receiver};

const SOCKET: &str = "waybill-send.socket";
const SERVICE: &str = "waybill-send.service";

fn shipped(name: &str) -> String {
    fs::read_to_string(root().join("docs/examples/systemd").join(name)).expect("the shipped file")
}

/// The values of a setting, in order.
fn values(unit: &str, setting: &str) -> Vec<String> {
    let start = format!("{setting}=");
    unit.lines().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect()
}

#[test]
fn systemd_takes_the_shipped_units() {
    if !have("systemd-analyze", "systemd") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let binary = env!("CARGO_BIN_EXE_waybill");
    let service = shipped(SERVICE);
    assert!(service.contains("ExecStart=/usr/bin/waybill "), "{service}");
    fs::write(folder.path().join(SERVICE), service.replace("/usr/bin/waybill", binary))
        .expect("written");
    fs::write(folder.path().join(SOCKET), shipped(SOCKET)).expect("written");
    let verify = |name: &str| {
        Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(folder.path().join(name))
            .output()
            .expect("systemd-analyze")
    };
    for name in [SOCKET, SERVICE] {
        let checked = verify(name);
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success() && said.trim().is_empty(), "{name}: {said}");
    }
    // It does look: a word that it does not know is told.
    let wrong = shipped(SOCKET).replace("SocketMode=", "SocketMood=");
    fs::write(folder.path().join(SOCKET), wrong).expect("written");
    let said = verify(SOCKET);
    assert!(String::from_utf8_lossy(&said.stderr).contains("SocketMood"), "{said:?}");
}

/// What the unit starts, with the paths of a test.
fn service(bench: &Bench, receiver: &Receiver) -> Command {
    let lines = values(&shipped(SERVICE), "ExecStart");
    let [line] = &lines[..] else { panic!("one command: {lines:?}") };
    let mut line = line.clone();
    let at = |name: &str| bench.path(name).display().to_string();
    for (from, to) in [
        ("/usr/bin/waybill", env!("CARGO_BIN_EXE_waybill").to_owned()),
        ("/run/waybill/", at("")),
        ("wss://logs.example.org/", receiver.url()),
        ("%d/token", at("test.token")),
    ] {
        assert!(line.contains(from), "{SERVICE} no longer holds {from:?}");
        line = line.replace(from, &to);
    }
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).env("STATE_DIRECTORY", bench.path("state"));
    command.env_remove("JOURNAL_STREAM").env("NO_COLOR", "1");
    command
}

/// A path of the unit, in the test's folder.
fn at(bench: &Bench, path: &str) -> std::path::PathBuf {
    bench.path(path.strip_prefix("/run/waybill/").expect("a path below /run/waybill"))
}

/// Starts the service with the sockets that a service manager holds, from number 3 on.
fn start(bench: &Bench, receiver: &Receiver, sockets: &[OwnedFd]) -> Process {
    let inner = service(bench, receiver);
    let mut command = Command::new("/bin/sh");
    let listen = format!("LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\"", sockets.len());
    command.args(["-c", &listen, "sh"]).arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // High numbers, so that none is overwritten before it is copied.
    let held: Vec<OwnedFd> = sockets
        .iter()
        .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 100).expect("a copy"))
        .collect();
    let numbers: Vec<i32> = held.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe. Its copies have
    // no close-on-exec flag.
    unsafe {
        command.pre_exec(move || {
            for (to, from) in (3..).zip(&numbers) {
                if libc::dup2(*from, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let process = Process::start("service", command, bench.path("service.log"));
    wait_until("both sockets are taken", PATIENCE, || {
        process.log().matches("taken from the service manager").count() == 2
    });
    drop(held);
    process
}

#[test]
fn what_is_written_while_the_service_is_down_is_stored_after_it_starts_again() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let unit = shipped(SOCKET);
    let (datagram, stream) = (values(&unit, "ListenDatagram"), values(&unit, "ListenStream"));
    assert_eq!((datagram.len(), stream.len()), (1, 1));
    let (datagram, stream) = (at(&bench, &datagram[0]), at(&bench, &stream[0]));
    let sockets = [
        OwnedFd::from(UnixDatagram::bind(&datagram).expect("bind")),
        OwnedFd::from(UnixListener::bind(&stream).expect("bind")),
    ];
    let client = UnixDatagram::unbound().expect("a socket");
    client.connect(&datagram).expect("connect");
    let send = |text: &str| client.send(format!("<13>app: {text}").as_bytes()).expect("sent");
    let write = |text: &str| {
        let mut stream = UnixStream::connect(&stream).expect("connect");
        stream.write_all(format!("<13>app: {text}\n").as_bytes()).expect("written");
    };

    let mut expected = Vec::new();
    for round in 0..3 {
        // Nobody runs: the queue takes it. Ten datagrams fit with any setting of the kernel's.
        for number in 0..8 {
            send(&format!("down {round} {number}"));
            expected.push(format!("down {round} {number}"));
        }
        write(&format!("stream down {round}"));
        expected.push(format!("stream down {round}"));
        let mut running = start(&bench, &receiver, &sockets);
        bench.wait_for_lines(expected.len());
        send(&format!("up {round}"));
        write(&format!("stream up {round}"));
        expected.extend([format!("up {round}"), format!("stream up {round}")]);
        bench.wait_for_lines(expected.len());
        match round {
            1 => running.kill_hard(),
            _ => assert!(running.stop().success()),
        }
        assert!(datagram.exists() && stream.exists(), "the sockets are the service manager's");
        fs::remove_file(bench.path("service.log")).expect("a fresh log");
    }
    bench.assert_lines(expected);
}

/// systemd's own tool binds the socket and starts the unit's command at the first datagram.
#[test]
fn systemd_socket_activate_runs_the_shipped_command() {
    if !have("systemd-socket-activate", "systemd") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let datagram = at(&bench, &values(&shipped(SOCKET), "ListenDatagram")[0]);
    let inner = service(&bench, &receiver);
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--datagram").arg("--listen").arg(&datagram);
    // It hands on these variables only.
    command.arg(format!("--setenv=STATE_DIRECTORY={}", bench.path("state").display()));
    command.arg("--setenv=NO_COLOR=1").arg(inner.get_program()).args(inner.get_args());
    let mut running = Process::start("service", command, bench.path("service.log"));
    wait_until("the socket", PATIENCE, || datagram.exists());
    let client = UnixDatagram::unbound().expect("a socket");
    client.connect(&datagram).expect("connect");
    for number in 0..50 {
        client.send(format!("<13>app: line {number}").as_bytes()).expect("sent");
    }
    bench.wait_for_lines(50);
    running.wait_for_log("taken from the service manager");
    assert!(running.stop().success());
    bench.assert_lines((0..50).map(|number| format!("line {number}")));
}
