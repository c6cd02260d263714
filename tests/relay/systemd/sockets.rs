//! Sockets that systemd keeps while the service is down.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use super::{RECEIVER, RECEIVER_SOCKET, SENDER, SOCKET, service, shipped, value};
use crate::support::servers::{have, wait_until};
use crate::support::store::run;
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, lines, numbered, waybill};

/// Writes the sources that the socket's unit shows, with the paths of a test.
fn configure(bench: &Bench, receiver: &Receiver, change: impl FnOnce(String) -> String) {
    let unit = shipped(SOCKET);
    let shown = unit.lines().filter_map(|line| line.strip_prefix("#   "));
    let sources: Vec<&str> = shown
        .skip_while(|line| *line != "[[source]]")
        .take_while(|line| line.starts_with("[[") || line.contains(" = "))
        .collect();
    let text = format!("to = {:?}\n{}\n", receiver.url(), sources.join("\n"));
    assert_eq!(text.matches("/run/waybill/").count(), 2, "{text}");
    let text = text.replace("/run/waybill/", &bench.path("").display().to_string());
    bench.write("send.toml", change(text));
}

/// The service of the sender as it is shipped.
fn sending(bench: &Bench) -> Command {
    fs::copy(bench.path("test.token"), bench.path("token")).expect("copied");
    service(bench, &shipped(SENDER))
}

/// A path of the unit, in the test's folder.
fn at(bench: &Bench, path: &str) -> PathBuf {
    bench.path(path.strip_prefix("/run/waybill/").expect("a path below /run/waybill"))
}

/// What systemd binds: a socket for datagrams, one for connections, and both.
fn bound(bench: &Bench) -> (PathBuf, PathBuf, [OwnedFd; 2]) {
    let unit = shipped(SOCKET);
    let path = |setting: &str| at(bench, &value(&unit, setting));
    let (datagram, stream) = (path("ListenDatagram"), path("ListenStream"));
    let sockets = [
        OwnedFd::from(UnixDatagram::bind(&datagram).expect("bind")),
        OwnedFd::from(UnixListener::bind(&stream).expect("bind")),
    ];
    (datagram, stream, sockets)
}

/// Starts a service with the sockets that a service manager holds, from number 3 on.
fn start(bench: &Bench, inner: &Command, sockets: &[OwnedFd]) -> Process {
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
    wait_until("each socket is taken", PATIENCE, || {
        process.log().matches("taken from the service manager").count() == sockets.len()
    });
    drop(held);
    process
}

#[test]
fn what_is_written_while_the_service_is_down_is_stored_after_it_starts_again() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    configure(&bench, &receiver, |text| text);
    let (datagram, stream, sockets) = bound(&bench);
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
        let mut running = start(&bench, &sending(&bench), &sockets);
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

/// The socket is passed once, at the start, and a source that comes later finds it all the same.
#[test]
fn a_passed_socket_stays_with_its_path_when_its_source_changes() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    configure(&bench, &receiver, |text| text);
    let (datagram, _, sockets) = bound(&bench);
    let client = UnixDatagram::unbound().expect("a socket");
    client.connect(&datagram).expect("connect");
    let mut running = start(&bench, &sending(&bench), &sockets);
    client.send(b"<13>app: first").expect("sent");
    bench.wait_for_lines(1);
    let renamed = |text: String| text.replacen("[[source]]", "[[source]]\nname = 'renamed'", 1);
    configure(&bench, &receiver, renamed);
    running.signal("-HUP");
    running.wait_for_log("the changed configuration is in force");
    client.send(b"<13>app: second").expect("sent");
    bench.wait_for_lines(2);
    assert!(running.stop().success());
    bench.assert_lines(["first".to_owned(), "second".to_owned()]);
}

/// systemd's own tool, which binds a socket and starts the command at the first that comes there.
fn activated(inner: &Command, listen: &[&str]) -> Command {
    let mut command = Command::new("systemd-socket-activate");
    command.args(listen);
    // It hands on these variables only.
    for (name, value) in inner.get_envs() {
        let Some(value) = value else { continue };
        let (name, value) = (name.to_str().expect("UTF-8"), value.to_str().expect("UTF-8"));
        command.arg(format!("--setenv={name}={value}"));
    }
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

#[test]
fn systemd_socket_activate_runs_the_shipped_command() {
    if !have("systemd-socket-activate", "systemd") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let datagram = at(&bench, &value(&shipped(SOCKET), "ListenDatagram"));
    configure(&bench, &receiver, |text| text);
    let listen = ["--datagram", "--listen", datagram.to_str().expect("UTF-8")];
    let command = activated(&sending(&bench), &listen);
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

/// What connects before the receiver runs starts it, and is answered.
#[test]
fn systemd_socket_activate_runs_the_shipped_receiver() {
    if !have("systemd-socket-activate", "systemd") {
        return;
    }
    let bench = Bench::new();
    bench.token("test");
    let path = at(&bench, &value(&shipped(RECEIVER_SOCKET), "ListenStream"));
    let shown = shipped(RECEIVER_SOCKET);
    let listen = shown.lines().find_map(|line| line.strip_prefix("#   listen = "));
    let listen = listen.expect("the key that the unit shows");
    let text =
        format!("listen = {listen}\ntokens = 'tokens.toml'\n[store]\nfile = 'store.sqlite'\n");
    let folder = bench.path("").display().to_string();
    bench.write("receive.toml", text.replace("/run/waybill/", &folder));
    let listen = ["--listen", path.to_str().expect("UTF-8")];
    let command = activated(&service(&bench, &shipped(RECEIVER)), &listen);
    let mut receiver = Process::start("service", command, bench.path("service.log"));
    wait_until("the socket", PATIENCE, || path.exists());
    let mut early = UnixStream::connect(&path).expect("connect");
    early.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    early.write_all(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n").expect("written");
    let mut answer = String::new();
    early.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("live\n"), "{answer}");
    receiver.wait_for_log("taken from the service manager");

    bench.write("app.log", lines("line", 100));
    let url = format!("ws+unix:{}", path.display());
    run(bench.send_command(&url, &["app.log", "--once"])).ok();
    assert!(receiver.stop().success());
    assert!(path.exists(), "the socket is the service manager's");
    bench.assert_lines(numbered("line", 100));
}

/// A receiver that dials waits at the kept socket while the sender is down.
#[test]
fn a_sender_that_listens_takes_the_socket_over_restarts() {
    let bench = Bench::new();
    bench.token("test");
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens"]).arg(bench.path("receivers.toml"));
    bench.write("central.token", run(mint).ok().stdout);
    let path = bench.path("send.sock");
    let socket = [OwnedFd::from(UnixListener::bind(&path).expect("bind"))];
    let mut send = waybill();
    send.arg("send").arg(bench.write("app.log", "")).arg("--state-dir").arg(bench.path("state"));
    send.arg("--listen").arg(format!("unix:{}", path.display()));
    send.arg("--tokens").arg(bench.path("receivers.toml"));
    let mut receive = waybill();
    receive.arg("receive").arg("--tokens").arg(bench.path("tokens.toml"));
    receive.arg("--store").arg(bench.path("store.sqlite"));
    receive.arg("--token-file").arg(bench.path("central.token"));
    receive.args(["--dial", &format!("test=ws+unix:{}", path.display())]);
    let receiver = Process::start("receiver", receive, bench.path("receiver.log"));
    for round in 0..3 {
        bench.append("app.log", format!("line {round}\n"));
        let mut sender = start(&bench, &send, &socket);
        bench.wait_for_lines(round + 1);
        match round {
            1 => sender.kill_hard(),
            _ => assert!(sender.stop().success()),
        }
        assert!(path.exists(), "the socket is the service manager's");
        fs::remove_file(bench.path("service.log")).expect("a fresh log");
    }
    bench.assert_lines(numbered("line", 3));
    assert!(!receiver.log().contains("does not answer"), "{}", receiver.log());
}
