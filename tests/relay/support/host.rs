//! Machines of a test's own: this one's files under an overlay that vanishes, a network of its own, no systemd running.
//!
//! Needs root and namespaces; what is changed inside never reaches this machine.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use super::servers::{have, skip, spawn_bound};
use super::store::run;
use super::waybill::{Finished, Process};

/// Ends with its process.
pub struct Host {
    keeper: Child,
    /// Where the overlay is mounted inside; empty outside.
    _folder: TempDir,
}

/// Argument 1 becomes /mnt inside; the overlay is mounted on argument 2. /run and /tmp are empty, as after a boot.
const MAKE: &str = r#"
set -e
dir=$2
mount -t tmpfs tmpfs "$dir"
mkdir "$dir/up" "$dir/work" "$dir/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/up,workdir=$dir/work" "$dir/root"
for own in tmp run; do mount -t tmpfs tmpfs "$dir/root/$own"; done
mount --rbind /proc "$dir/root/proc"
mount --rbind /dev "$dir/root/dev"
mount --bind "$1" "$dir/root/mnt"
touch "$dir/root/machine-of-a-test"
ip link set lo up
# Said from within, so that no command of the test can meet this machine's own files.
exec chroot "$dir/root" sh -c 'echo ready; exec sleep infinity'
"#;

impl Host {
    /// A machine that finds `shared` under /mnt; `neighbour`'s network, or one of its own. `None` is a visible skip.
    pub fn start(shared: &Path, neighbour: Option<&Host>) -> Option<Host> {
        for (program, package) in [("unshare", "util-linux"), ("ip", "iproute2")] {
            if !have(program, package) {
                return None;
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = match neighbour {
            Some(neighbour) => {
                let mut command = Command::new("nsenter");
                command.args(["--target", &neighbour.keeper.id().to_string(), "--net"]);
                command.args(["unshare", "--mount"]);
                command
            }
            None => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "--net"]);
                command
            }
        };
        command.args(["sh", "-c", MAKE, "host"]).arg(shared).arg(folder.path()).env("PATH", PATH);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut keeper = spawn_bound(command).expect("the program starts");
        let mut line = String::new();
        let read = BufReader::new(keeper.stdout.take().expect("piped")).read_line(&mut line);
        if read.is_ok() && line == "ready\n" {
            return Some(Host { keeper, _folder: folder });
        }
        let output = keeper.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        skip(&format!("no machine of one's own can be made (as root, with namespaces): {said}"));
        None
    }

    /// A shell command inside.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.keeper.id().to_string(), "--mount", "--net", "--root"]);
        command.args(["--wd", "env", "-i", &format!("PATH={PATH}"), "HOME=/root", "NO_COLOR=1"]);
        command.args(["DEBIAN_FRONTEND=noninteractive", "bash", "-c"]);
        // Never on this machine itself, whatever went wrong before.
        command.arg(format!("test -e /machine-of-a-test || exit 99\n{script}"));
        command.stdin(Stdio::null());
        command
    }

    /// Runs it to its end, with `input` on its standard input.
    pub fn run_with(&self, script: &str, input: &str) -> Finished {
        use std::io::Write;
        let mut command = self.command(script);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("nsenter");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("written");
        let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
        Finished {
            status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    /// Runs it to its end.
    pub fn run(&self, script: &str) -> Finished {
        run(self.command(script))
    }

    /// Runs it and gives what it wrote, where it succeeded.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let finished = self.run(script);
        assert!(finished.status.success(), "{script}\n{}\n{}", finished.stdout, finished.stderr);
        finished.stdout
    }

    /// Starts it; its log is a file outside.
    pub fn start_process(&self, name: &str, script: &str, log: &Path) -> Process {
        Process::start(name, self.command(&format!("exec {script}")), log.to_owned())
    }

    /// Joins both networks by a cable: this machine is 10.99.0.1, the other 10.99.0.2.
    pub fn connect(&self, other: &Host) {
        let peer = other.keeper.id();
        // From outside any root: the other's process id means nothing within.
        let inside = |host: &Host, line: &str| {
            let mut command = Command::new("nsenter");
            command.args(["--target", &host.keeper.id().to_string(), "--net"]);
            command.args(["ip"]).args(line.split(' ')).env("PATH", PATH);
            run(command).ok();
        };
        inside(self, &format!("link add cable type veth peer name cable netns {peer}"));
        for (host, address) in [(self, "10.99.0.1/24"), (other, "10.99.0.2/24")] {
            inside(host, &format!("addr add {address} dev cable"));
            inside(host, "link set cable up");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
