//! Files and folders that the sender may not read: the others flow, the log says what to do, and once they are readable
//! their lines come without a restart.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use super::support::servers::have;
use super::support::waybill::{Bench, Process, Receiver, lines, numbered};

/// The user nobody: to root, everything is readable.
const NOBODY: u32 = 65534;

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `waybill send` as a user who may read no file of mode 0.
fn unprivileged_sender(bench: &Bench, receiver: &Receiver, arguments: &[&str]) -> Process {
    let ordinary = bench.send_command(&receiver.url(), arguments);
    let command = if is_root() { as_nobody(bench, &ordinary) } else { ordinary };
    Process::start("sender", command, bench.path("sender.log"))
}

/// The same command under another user id, who reaches the program, the token and the state.
fn as_nobody(bench: &Bench, ordinary: &Command) -> Command {
    let program = bench.path("waybill");
    if !program.exists() {
        // The build may lie in a home directory.
        fs::copy(ordinary.get_program(), &program).expect("a copy");
        chmod(&bench.path(""), 0o755);
        fs::create_dir(bench.path("state")).expect("a folder");
        for name in ["state", "test.token"] {
            chown(bench.path(name), Some(NOBODY), Some(NOBODY)).expect("chown");
        }
    }
    let mut command = Command::new("setpriv");
    let id = |flag: &str| format!("--{flag}={NOBODY}");
    // A change of user would take away the signal by which the process ends with the tests.
    command.args([&id("reuid"), &id("regid"), "--clear-groups", "--pdeathsig=keep"]);
    command.arg(program).args(ordinary.get_args()).current_dir(bench.path(""));
    for (key, value) in ordinary.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command
}

/// What the log says of a path.
fn said_of(sender: &Process, path: &Path) -> Vec<String> {
    let path = format!("path={}", path.display());
    let of_path = |line: &&str| line.split(' ').any(|word| word == path);
    sender.log().lines().filter(of_path).map(str::to_owned).collect()
}

#[test]
fn an_unreadable_file_holds_up_nobody_and_is_sent_once_it_is_readable() {
    if !have("setpriv", "util-linux") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/a.log", lines("a", 100));
    let closed = bench.write("logs/closed.log", lines("closed", 100));
    bench.write("logs/z.log", lines("z", 100));
    chmod(&closed, 0);
    let mut sender = unprivileged_sender(&bench, &receiver, &["logs/*.log"]);
    bench.wait_for_lines(200);
    sender.wait_for_log("may not read it");
    bench.append("logs/a.log", "later in a\n");
    bench.append("logs/z.log", "later in z\n");
    bench.wait_for_lines(202);
    let said = said_of(&sender, &closed);
    assert_eq!(said.len(), 1, "said once: {said:?}");
    assert!(said[0].contains("WARN") && said[0].contains("setfacl -m u:"), "{said:?}");
    let neighbours = || {
        let later = ["later in a", "later in z"].map(String::from);
        numbered("a", 100).chain(numbered("z", 100)).chain(later)
    };
    bench.assert_lines(neighbours());
    chmod(&closed, 0o644);
    bench.wait_for_lines(302);
    assert!(sender.stop().success());
    bench.assert_lines(neighbours().chain(numbered("closed", 100)));
}

#[test]
fn a_folder_that_cannot_be_listed_is_said_and_holds_up_nobody() {
    if !have("setpriv", "util-linux") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("closed/a.log", lines("closed", 100));
    bench.write("open/a.log", lines("open", 100));
    // Its file can be opened by name; its rotated generations cannot be found.
    bench.write("enter/a.log", lines("enter", 100));
    chmod(&bench.path("closed"), 0);
    chmod(&bench.path("enter"), 0o311);
    let arguments = ["closed/*.log", "open/*.log", "enter/a.log"];
    let mut sender = unprivileged_sender(&bench, &receiver, &arguments);
    bench.wait_for_lines(200);
    sender.wait_for_log("may not read it");
    let said = said_of(&sender, &bench.path("closed"));
    assert!(said.len() == 1 && said[0].contains("setfacl -m u:"), "{said:?}");
    // Now the files are known, so that their siblings are looked for.
    assert!(sender.stop().success());
    for name in ["open", "enter"] {
        bench.append(&format!("{name}/a.log"), format!("later in {name}\n"));
    }
    let mut sender = unprivileged_sender(&bench, &receiver, &arguments);
    bench.wait_for_lines(202);
    chmod(&bench.path("closed"), 0o755);
    bench.wait_for_lines(302);
    assert!(sender.stop().success());
    let later = ["later in open", "later in enter"].map(String::from);
    let all = ["closed", "open", "enter"].into_iter().flat_map(|tag| numbered(tag, 100));
    bench.assert_lines(all.chain(later));
}

#[test]
fn a_socket_in_a_folder_of_another_owner_is_bound_once_that_is_mended() {
    if !have("setpriv", "util-linux") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("a.log", lines("a", 100));
    fs::create_dir(bench.path("run")).expect("a folder");
    chmod(&bench.path("run"), 0o555);
    let arguments = ["a.log", "--unix-datagram", "run/log.sock"];
    let mut sender = unprivileged_sender(&bench, &receiver, &arguments);
    bench.wait_for_lines(100);
    sender.wait_for_log("cannot bind the socket: Permission denied");
    sender.wait_for_log("check the owner and permissions");
    if is_root() {
        chown(bench.path("run"), Some(NOBODY), Some(NOBODY)).expect("chown");
    }
    chmod(&bench.path("run"), 0o755);
    sender.wait_for_log("listening for datagrams");
    let socket = UnixDatagram::unbound().expect("a socket");
    socket.send_to(b"a datagram", bench.path("run/log.sock")).expect("send");
    bench.wait_for_lines(101);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("a", 100).chain(["a datagram".to_owned()]));
}
