//! The Debian package, on machines of the test's own: installed, upgraded, removed and purged by dpkg; and what it ships
//! beside the program.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::host::Host;
use crate::support::servers::{have, root, skip};
use crate::support::store::run;
use crate::support::waybill::{Bench, numbered};

/// The package of the binary under test, built once, in a folder that holds nothing else.
pub fn package() -> Option<&'static Path> {
    static PACKAGE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        if !have("dpkg-shlibdeps", "build-essential") {
            return None;
        }
        let script = || Command::new(root().join("scripts/package"));
        let mut fetch = script();
        fetch.arg("--fetch");
        let fetched = run(fetch);
        if !fetched.status.success() {
            skip(&format!("cargo-deb cannot be fetched: {}", fetched.stderr));
            return None;
        }
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
        let _ = fs::remove_dir_all(&out);
        let mut command = script();
        command.args(["--dev", "--out"]).arg(out).env("WAYBILL", env!("CARGO_BIN_EXE_waybill"));
        Some(PathBuf::from(run(command).ok().stdout.trim_end()))
    };
    PACKAGE.get_or_init(build).as_deref()
}

#[test]
fn it_installs_upgrades_removes_and_purges_without_losing_what_is_not_its_own() {
    let Some(package) = package() else { return };
    let bench = Bench::new();
    fs::copy(package, bench.path("first.deb")).expect("copied");
    let Some(host) = Host::start(&bench.path(""), None) else { return };
    host.ok("dpkg -i /mnt/first.deb");
    let stat = |path: &str| host.ok(&format!("stat -c '%a %U:%G' {path}"));
    assert_eq!(stat("/etc/waybill"), "750 root:waybill\n");
    assert_eq!(stat("/etc/waybill/send.toml"), "640 root:waybill\n");
    assert_eq!(stat("/var/lib/waybill"), "700 waybill:waybill\n");
    assert_eq!(stat("/run/waybill"), "755 waybill:waybill\n");
    // What a boot does, when /run is empty.
    if have("systemd-tmpfiles", "systemd") {
        host.ok("rm -r /run/waybill && systemd-tmpfiles --create /usr/lib/tmpfiles.d/waybill.conf");
        assert_eq!(stat("/run/waybill"), "755 waybill:waybill\n");
    }
    assert_eq!(host.ok("sysctl -n net.unix.max_dgram_qlen"), "8192\n");
    let version = host.ok("waybill --version");
    assert!(version.starts_with("waybill "), "{version}");
    // A page per subcommand, and completions that know them.
    let pages = host.ok(
        "cd /usr/share/man/man1 && zcat waybill.1.gz waybill-send.1.gz waybill-check-receive.1.gz",
    );
    assert!(pages.contains("token\\-file"), "{pages}");
    for page in ["waybill-send", "waybill-receive"] {
        let page = host.ok(&format!("zcat /usr/share/man/man1/{page}.1.gz"));
        for word in ["SIGHUP", "Type=notify"] {
            assert!(page.contains(word), "no {word} in {page}");
        }
    }
    host.ok("zgrep -q waybill.text.v1 /usr/share/man/man1/waybill-receive.1.gz");
    let completed = "source /usr/share/bash-completion/completions/waybill; COMP_WORDS=(waybill se); COMP_CWORD=1; \
                     _waybill waybill se waybill; echo ${COMPREPLY[@]}";
    assert_eq!(host.ok(completed), "send search setup\n");
    for file in ["zsh/vendor-completions/_waybill", "fish/vendor_completions.d/waybill.fish"] {
        host.ok(&format!("grep -q token-file /usr/share/{file}"));
    }
    // The links of the README, and what it runs.
    let readme = host.ok("cat /usr/share/doc/waybill/README.md");
    let targets = readme.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let folders = ["docs/", "nginx/", "syslog-ng/"];
    let targets: Vec<&str> =
        targets.filter(|target| folders.iter().any(|folder| target.starts_with(folder))).collect();
    assert!(targets.len() > 20, "{targets:?}");
    for target in targets {
        host.ok(&format!("test -e /usr/share/doc/waybill/{target}"));
    }
    host.ok("/usr/share/doc/waybill/scripts/install-many --help");
    // The units are there, and whether they start is the administrator's to say.
    let units = fs::read_dir(root().join("docs/examples/systemd")).expect("the units");
    let units: Vec<_> = units.map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(units.len(), 4, "{units:?}");
    for unit in units {
        let unit = unit.into_string().expect("a name");
        host.ok(&format!("test -f /usr/lib/systemd/system/{unit}"));
        host.ok(&format!("test -z \"$(find /etc/systemd -name {unit})\""));
    }
    // Nothing is configured yet, and both sides say what is missing.
    for side in ["send", "receive"] {
        let said = host.run(&format!("waybill {side} --config /etc/waybill/{side}.toml"));
        assert_eq!(said.status.code(), Some(78), "{}", said.stderr);
        assert!(said.stderr.contains("configuration: no "), "{}", said.stderr);
    }

    // The administrator's changes, another owner of a folder, and data.
    host.ok("echo 'log_level = \"debug\"' >> /etc/waybill/send.toml");
    host.ok("chgrp adm /etc/waybill && echo secret > /etc/waybill/token");
    host.ok("echo data > /var/lib/waybill/store.sqlite");
    // A later package, whose own configuration has changed too.
    let later = "dpkg-deb -R /mnt/first.deb /tmp/later && cd /tmp/later && \
                 sed -i 's/^Version: .*/&+later/' DEBIAN/control && \
                 echo '# later' >> etc/waybill/send.toml && echo '# later' >> etc/waybill/receive.toml && \
                 dpkg-deb --root-owner-group -Zgzip -b . /tmp/later.deb";
    host.ok(later);
    host.ok("dpkg --force-confdef --force-confold -i /tmp/later.deb");
    let kept = host.ok("cat /etc/waybill/send.toml");
    assert!(kept.contains("log_level = \"debug\"") && !kept.contains("# later"), "{kept}");
    assert!(host.ok("cat /etc/waybill/receive.toml").contains("# later"));
    assert_eq!(stat("/etc/waybill"), "750 root:adm\n");
    assert_eq!(host.ok("cat /var/lib/waybill/store.sqlite"), "data\n");

    assert!(host.ok("dpkg -r waybill").contains("stay in /var/lib/waybill"));
    assert_eq!(host.ok("cat /var/lib/waybill/store.sqlite /etc/waybill/token"), "data\nsecret\n");
    host.ok("! command -v waybill");
    host.ok("dpkg -i /tmp/later.deb && test -s /var/lib/waybill/store.sqlite");
    host.ok("dpkg -P waybill");
    host.ok("! test -e /var/lib/waybill && ! test -e /etc/waybill && ! test -e /run/waybill");
}

/// Writes `line N` until told to stop, and opens its log anew when told: what a daemon does on USR1.
struct Writer {
    log: PathBuf,
    file: File,
    written: usize,
}

impl Writer {
    fn new(log: PathBuf) -> Writer {
        let file = Writer::open(&log);
        Writer { log, file, written: 0 }
    }

    fn open(log: &Path) -> File {
        File::options().create(true).append(true).open(log).expect("the log")
    }

    fn write(&mut self, count: usize) {
        for number in self.written..self.written + count {
            writeln!(self.file, "line {number}").expect("written");
        }
        self.written += count;
    }
}

/// The shipped snippet for this log.
fn snippet(bench: &Bench, name: &str) -> PathBuf {
    let file = root().join("docs/examples/logrotate").join(name);
    let text = fs::read_to_string(file).expect("the shipped file");
    let log = bench.path("app.log").display().to_string();
    let signal = "systemctl kill --signal=USR1 app.service";
    assert!(text.contains("/var/log/app/*.log {"), "{text}");
    assert_eq!(text.contains(signal), name == "rename.conf");
    let mut text = text.replace("/var/log/app/*.log", &log);
    if !rustix::process::geteuid().is_root() {
        // Whoever runs the test owns the log.
        text = text.replace("create 0640 root adm", "create 0640");
    }
    let path = bench.write(name, text);
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("chmod");
    path
}

/// Rotates now, whatever the sizes and dates.
pub fn logrotate(bench: &Bench, configuration: &Path) -> Command {
    let mut command = Command::new("/usr/sbin/logrotate");
    command.args(["--force", "--state"]).arg(bench.path("logrotate.status")).arg(configuration);
    // No systemd runs here: the signal that the snippet asks for reaches the writer as a file.
    let script =
        "#!/bin/sh\n[ \"$*\" = 'kill --signal=USR1 app.service' ] && touch \"${0%/*}/../reopen\"\n";
    let systemctl = bench.write("bin/systemctl", script);
    fs::set_permissions(&systemctl, PermissionsExt::from_mode(0o755)).expect("chmod");
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", bench.path("bin").display()));
    command
}

#[test]
fn logrotate_by_rename_loses_nothing_while_the_program_writes() {
    if !have("logrotate", "logrotate") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let configuration = snippet(&bench, "rename.conf");
    let mut writer = Writer::new(bench.path("app.log"));
    writer.write(1000);
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(1000);
    for _ in 0..4 {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let rotating = scope.spawn(|| {
                run(logrotate(&bench, &configuration)).ok();
                done.store(true, Ordering::Relaxed);
            });
            // Into the old file until it is told, and then into the new one.
            while !done.load(Ordering::Relaxed) {
                writer.write(10);
                if fs::remove_file(bench.path("reopen")).is_ok() {
                    writer.file = Writer::open(&writer.log);
                }
            }
            rotating.join().expect("rotated");
        });
        if fs::remove_file(bench.path("reopen")).is_ok() {
            writer.file = Writer::open(&writer.log);
        }
        writer.write(100);
    }
    assert!(bench.path("app.log.2.gz").exists(), "logrotate compressed nothing");
    bench.wait_for_lines(writer.written);
    // Two more while nobody reads, the older one compressed when it is found.
    assert!(sender.stop().success());
    for _ in 0..2 {
        writer.write(500);
        run(logrotate(&bench, &configuration)).ok();
        writer.file = Writer::open(&writer.log);
    }
    writer.write(500);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", writer.written));
}

/// The program rests while logrotate works: the moment between copy and truncate is nobody's to save.
#[test]
fn logrotate_by_copytruncate_loses_nothing_while_the_program_rests() {
    if !have("logrotate", "logrotate") {
        return;
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let configuration = snippet(&bench, "copytruncate.conf");
    let mut writer = Writer::new(bench.path("app.log"));
    writer.write(1000);
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(1000);
    for _ in 0..3 {
        writer.write(1000);
        run(logrotate(&bench, &configuration)).ok();
        assert_eq!(bench.size_of("app.log"), 0);
        writer.write(100);
        bench.wait_for_lines(writer.written);
    }
    assert!(sender.stop().success());
    writer.write(1000);
    run(logrotate(&bench, &configuration)).ok();
    writer.write(1000);
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", writer.written));
}

#[test]
fn the_container_holds_the_binary_alone_and_runs_as_nobody() {
    let text = fs::read_to_string(root().join("Containerfile")).expect("the Containerfile");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let instructions: Vec<(&str, &str)> =
        lines.map(|line| line.split_once(' ').expect("an instruction")).collect();
    let of = |name: &str| -> Vec<&str> {
        instructions.iter().filter(|(found, _)| *found == name).map(|(_, rest)| *rest).collect()
    };
    assert_eq!(of("COPY"), ["target/release/waybill /usr/bin/waybill"]);
    assert_eq!(of("ENTRYPOINT"), ["[\"/usr/bin/waybill\"]"]);
    assert_eq!(of("USER"), ["nonroot"]);
    assert_eq!((of("RUN").len(), of("ADD").len(), of("FROM").len()), (0, 0, 1));
    assert_eq!(instructions.len(), 5, "{instructions:?}");
}
