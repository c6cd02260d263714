//! Two hosts with a wire between them: network namespaces of this machine, joined by a veth pair.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::servers::{have, skip};

/// The near host's address on the wire.
pub const NEAR: &str = "10.83.0.1";

/// The far host's address on the wire.
pub const FAR: &str = "10.83.0.2";

/// Two namespaces; each test has its own, so that addresses and ports never meet. Gone when
/// dropped.
pub struct Wire {
    near: String,
    far: String,
}

impl Wire {
    /// Lays the wire; `None` is a noted skip.
    pub fn lay() -> Option<Wire> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !have("ip", "iproute2") || !have("nft", "nftables") {
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            skip("network namespaces need root");
            return None;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let wire = Wire { near: format!("wb-near-{name}"), far: format!("wb-far-{name}") };
        for host in [&wire.near, &wire.far] {
            // Before the namespace is first entered: `ip netns exec` puts it over /etc/hosts.
            fs::create_dir_all(format!("/etc/netns/{host}")).expect("a folder");
            fs::write(format!("/etc/netns/{host}/hosts"), "127.0.0.1 localhost\n").expect("hosts");
            run(&["ip", "netns", "add", host]);
            run(&["ip", "-n", host, "link", "set", "lo", "up"]);
        }
        run(&[
            "ip", "-n", &wire.near, "link", "add", "wire", "type", "veth", "peer", "name", "wire",
            "netns", &wire.far,
        ]);
        for (host, address) in [(&wire.near, NEAR), (&wire.far, FAR)] {
            run(&["ip", "-n", host, "address", "add", &format!("{address}/24"), "dev", "wire"]);
            run(&["ip", "-n", host, "link", "set", "wire", "up"]);
        }
        Some(wire)
    }

    /// The command as it runs on the near host.
    pub fn near(&self, command: &Command) -> Command {
        on(&self.near, command)
    }

    /// The command as it runs on the far host.
    pub fn far(&self, command: &Command) -> Command {
        on(&self.far, command)
    }

    /// What names mean on the near host.
    pub fn set_near_hosts(&self, text: &str) {
        fs::write(self.near_hosts(), format!("127.0.0.1 localhost\n{text}")).expect("hosts");
    }

    fn near_hosts(&self) -> PathBuf {
        PathBuf::from(format!("/etc/netns/{}/hosts", self.near))
    }

    /// What names mean on the far host.
    pub fn set_far_hosts(&self, text: &str) {
        let path = format!("/etc/netns/{}/hosts", self.far);
        fs::write(path, format!("127.0.0.1 localhost\n{text}")).expect("hosts");
    }

    /// The socket that is asked for names by whatever starts on the near host from now on; an unanswered question ends after
    /// a second.
    pub fn near_resolver(&self) -> UdpSocket {
        for (name, text) in [
            ("resolv.conf", "nameserver 127.0.0.1\nsearch .\noptions timeout:1 attempts:1\n"),
            ("nsswitch.conf", "hosts: files dns\n"),
        ] {
            fs::write(format!("/etc/netns/{}/{name}", self.near), text).expect(name);
        }
        let near = self.near.clone();
        let bound = thread::spawn(move || {
            enter(&near);
            UdpSocket::bind(("127.0.0.1", 53)).expect("the port is free")
        });
        bound.join().expect("a socket")
    }

    /// Every hundredth packet is lost in both directions, the eleventh first (nft(8), `numgen`): at random, none might be.
    pub fn lose_one_percent(&self) {
        for host in [&self.near, &self.far] {
            run(&["ip", "netns", "exec", host, "nft", "add table inet loss"]);
            let chain = "add chain inet loss in { type filter hook input priority 0; }";
            run(&["ip", "netns", "exec", host, "nft", chain]);
            let rule = "add rule inet loss in numgen inc mod 100 == 10 counter drop";
            run(&["ip", "netns", "exec", host, "nft", rule]);
        }
    }

    /// How many packets were lost that way.
    pub fn lost(&self) -> u64 {
        [&self.near, &self.far].map(|host| counted(host, "loss")).iter().sum()
    }

    /// The far host has this address as well.
    pub fn add_far(&self, address: &str) {
        run(&["ip", "-n", &self.far, "address", "add", &format!("{address}/24"), "dev", "wire"]);
    }

    /// What is sent to this address of the far host vanishes, as behind a firewall that drops.
    pub fn swallow(&self, address: &str) {
        let rules = format!(
            "add table inet swallow; add chain inet swallow in \
             {{ type filter hook input priority 0; policy accept; }}; \
             add rule inet swallow in ip daddr {address} counter drop"
        );
        run(&["ip", "netns", "exec", &self.far, "nft", &rules]);
    }

    /// How many packets vanished that way.
    pub fn swallowed(&self) -> u64 {
        counted(&self.far, "swallow")
    }

    /// From now on, packets with data that reach either host are counted; TCP's bare acknowledgements are not pushed.
    pub fn count_data(&self) {
        for host in [&self.near, &self.far] {
            let rules = "add table inet data; add chain inet data in \
                         { type filter hook input priority 0; policy accept; }; \
                         add rule inet data in iifname wire tcp flags & psh == psh counter";
            run(&["ip", "netns", "exec", host, "nft", rules]);
        }
    }

    /// How many came to the near host, and how many to the far one.
    pub fn data(&self) -> [u64; 2] {
        [&self.near, &self.far].map(|host| counted(host, "data"))
    }

    /// What is sent vanishes, and nobody is told: packets are dropped as they come in.
    pub fn cut(&self) {
        for host in [&self.near, &self.far] {
            let rules = "add table inet cut; add chain inet cut in \
                         { type filter hook input priority 0; policy accept; }; \
                         add rule inet cut in iifname wire drop";
            run(&["ip", "netns", "exec", host, "nft", rules]);
        }
    }

    /// Undoes [`Wire::cut`].
    pub fn mend(&self) {
        for host in [&self.near, &self.far] {
            run(&["ip", "netns", "exec", host, "nft", "delete table inet cut"]);
        }
    }

    /// The far host moves to another address.
    pub fn move_far(&self, from: &str, to: &str) {
        renumber(&self.far, from, to);
    }

    /// The near host moves to another address.
    pub fn move_near(&self, from: &str, to: &str) {
        renumber(&self.near, from, to);
    }

    /// A relay on the far host, from [`FAR`] to its loopback, that delivers every byte so much
    /// later, in both directions. It serves until the test program ends.
    pub fn delay(&self, port: u16, to: u16, delay: Duration) {
        let far = self.far.clone();
        let (ready, bound) = mpsc::sync_channel(1);
        thread::spawn(move || {
            enter(&far);
            let address = SocketAddr::new(FAR.parse().expect("an address"), port);
            let listener = TcpListener::bind(address).expect("the address is free");
            ready.send(()).expect("the test waits");
            for client in listener.incoming().flatten() {
                // A receiver that is away: the client is closed, as by any relay.
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone(), to.try_clone());
                    if let (Ok(from), Ok(to)) = (from, to) {
                        thread::spawn(move || late(from, to, delay));
                    }
                }
            }
        });
        bound.recv().expect("the relay listens");
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for host in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", host]).status();
            let _ = fs::remove_dir_all(format!("/etc/netns/{host}"));
        }
    }
}

/// What the counter in this table of a host's nftables shows, in packets.
fn counted(host: &str, table: &str) -> u64 {
    let text = run(&["ip", "netns", "exec", host, "nft", "list table inet", table]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    words.next().and_then(|word| word.parse().ok()).expect("a counter")
}

fn renumber(host: &str, from: &str, to: &str) {
    run(&["ip", "-n", host, "address", "del", &format!("{from}/24"), "dev", "wire"]);
    run(&["ip", "-n", host, "address", "add", &format!("{to}/24"), "dev", "wire"]);
}

/// Moves this thread, and those that it starts, into a host's network.
fn enter(host: &str) {
    let file = fs::File::open(format!("/var/run/netns/{host}")).expect("the namespace");
    // SAFETY: setns changes this thread only.
    let entered = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(entered, 0, "setns: {}", io::Error::last_os_error());
}

/// Copies until either side ends; what came in at one instant goes out together, later.
fn late(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (queue, due) = mpsc::sync_channel::<(Instant, Vec<u8>)>(4096);
    let mut out = match to.try_clone() {
        Ok(out) => out,
        Err(_) => return,
    };
    thread::spawn(move || {
        for (at, bytes) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if out.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = out.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if queue.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
            break;
        }
    }
    drop(queue);
    let _ = from.shutdown(Shutdown::Read);
    let _ = to.flush();
}

/// The same command inside a namespace; `ip` replaces itself by it, so that signals reach it.
fn on(host: &str, command: &Command) -> Command {
    let mut inside = Command::new("ip");
    inside.args(["netns", "exec", host]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(name, value),
            None => inside.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        inside.current_dir(folder);
    }
    inside
}

/// Runs to the end, and gives what it says.
#[track_caller]
fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
