//! The built binary as the tests run it: receivers, senders, tokens, certificates, files.
//!
//! Every process is killed when its value is dropped, and its log is shown when the test failed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::servers::{free_port, spawn_bound, wait_until};

/// Longer than anything takes on a slow machine: only a failure waits so long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with everything that one test makes.
pub struct Bench {
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Bench {
        Bench { folder: tempfile::tempdir().expect("a folder") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(&path, text).expect("write");
        path
    }

    pub fn append(&self, name: &str, text: impl AsRef<[u8]>) {
        let file = File::options().append(true).create(true).open(self.path(name));
        file.expect("open").write_all(text.as_ref()).expect("append");
    }

    /// Mints a token for `name` and writes it into the file that it returns.
    pub fn token(&self, name: &str) -> PathBuf {
        let output = waybill()
            .args(["token", name, "--tokens"])
            .arg(self.path("tokens.toml"))
            .output()
            .expect("waybill token");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = self.write(&format!("{name}.token"), output.stdout);
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, private).expect("chmod");
        path
    }

    /// A plain receiver on loopback with the embedded store `store.sqlite`.
    pub fn receiver(&self) -> Receiver {
        let store = self.path("store.sqlite");
        self.receiver_with(move |command| {
            command.arg("--store").arg(&store);
        })
    }

    /// A plain receiver on loopback into the Elasticsearch at `url`, under its own index prefix.
    pub fn receiver_into(&self, url: &str, prefix: &str) -> Receiver {
        let index = format!("{prefix}-{{type}}-{{yyyy.MM.dd}}");
        let dead = format!("{prefix}-dead");
        let url = url.to_owned();
        self.receiver_with(move |command| {
            command.args([
                "--elasticsearch",
                &url,
                "--index",
                &index,
                "--dead-letter-index",
                &dead,
            ]);
        })
    }

    /// A receiver on a free port of loopback with this bench's tokens and further arguments.
    pub fn receiver_with(&self, add: impl Fn(&mut Command) + Send + 'static) -> Receiver {
        if !self.path("tokens.toml").exists() {
            self.token("test");
        }
        let port = free_port();
        let tokens = self.path("tokens.toml");
        let log = self.path(&format!("receiver-{port}.log"));
        let command = Box::new(move || {
            let mut command = waybill();
            command.arg("receive").args(["--listen", &format!("127.0.0.1:{port}"), "--tokens"]);
            command.arg(&tokens);
            add(&mut command);
            command
        });
        let mut receiver = Receiver { command, port, process: None, log };
        receiver.start();
        receiver
    }

    /// `waybill send` with the token `test`, state in `state`, and these further arguments.
    pub fn send_command(&self, receiver: &str, arguments: &[&str]) -> Command {
        let mut command = waybill();
        command.arg("send").args(["--to", receiver, "--token-file"]).arg(self.path("test.token"));
        command.arg("--state-dir").arg(self.path("state")).args(arguments);
        command.current_dir(self.folder.path());
        command
    }

    /// Runs `waybill send --once` to its end.
    pub fn send_once(&self, receiver: &Receiver, arguments: &[&str]) -> Finished {
        let mut command = self.send_command(&receiver.url(), arguments);
        let output = command.arg("--once").output().expect("waybill send");
        Finished {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts `waybill send` without `--once`.
    pub fn sender(&self, receiver: &Receiver, arguments: &[&str]) -> Process {
        Process::start(
            "sender",
            self.send_command(&receiver.url(), arguments),
            self.path("sender.log"),
        )
    }

    /// All lines in the embedded store, as documents, in order of path and offset.
    pub fn stored(&self) -> Vec<Value> {
        let output = waybill()
            .args(["search", "--json", "--limit", "10000000", "--store"])
            .arg(self.path("store.sqlite"))
            .output()
            .expect("waybill search");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut hits: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("a document")).collect();
        hits.sort_by_key(|hit| {
            (hit["log"]["file"]["path"].to_string(), hit["log"]["offset"].as_u64())
        });
        hits
    }

    /// Waits until the embedded store holds at least so many lines.
    #[track_caller]
    pub fn wait_for_lines(&self, count: usize) {
        wait_until(&format!("{count} lines are stored"), PATIENCE, || self.stored().len() >= count);
    }

    /// The embedded store holds exactly these lines, each once.
    #[track_caller]
    pub fn assert_lines(&self, expected: impl IntoIterator<Item = String>) {
        let mut expected: Vec<String> = expected.into_iter().collect();
        expected.sort();
        let found = self.messages();
        if found == expected {
            return;
        }
        let count = |all: &[String]| {
            let mut counts = std::collections::BTreeMap::<String, i64>::new();
            all.iter().for_each(|line| *counts.entry(line.clone()).or_default() += 1);
            counts
        };
        let (mut wrong, found_counts) = (count(&expected), count(&found));
        for (line, times) in found_counts {
            *wrong.entry(line).or_default() -= times;
        }
        wrong.retain(|_, times| *times != 0);
        let some: Vec<_> = wrong.iter().take(20).collect();
        panic!(
            "{} lines stored, {} expected; lost (above 0) or doubled (below): {some:?}",
            found.len(),
            expected.len()
        );
    }

    /// How long a file is; 0 where it is not there.
    pub fn size_of(&self, name: &str) -> u64 {
        self.path(name).metadata().map_or(0, |metadata| metadata.len())
    }

    /// How many bytes lie below a folder.
    pub fn bytes_below(&self, name: &str) -> u64 {
        fn walk(path: &Path) -> u64 {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            let size = |entry: fs::DirEntry| match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => walk(&entry.path()),
                Ok(metadata) => metadata.len(),
                Err(_) => 0,
            };
            entries.map(size).sum()
        }
        walk(&self.path(name))
    }

    /// The messages of all lines in the embedded store, sorted.
    pub fn messages(&self) -> Vec<String> {
        let text = |hit: &Value| hit["message"].as_str().unwrap_or_default().to_owned();
        let mut messages: Vec<String> = self.stored().iter().map(text).collect();
        messages.sort();
        messages
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    #[track_caller]
    pub fn ok(self) -> Finished {
        assert!(self.status.success(), "{}\n{}", self.status, self.stderr);
        self
    }
}

/// A process with its log in a file.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Where its own part of the log begins: several processes may write into one, in turn.
    log_start: usize,
}

impl Process {
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> Process {
        let file = File::options().create(true).append(true).open(&log).expect("a log");
        let log_start = file.metadata().expect("a log").len() as usize;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let child = spawn_bound(command).expect("the program starts");
        Process { name: name.to_owned(), child, log, log_start }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(text.get(self.log_start..).unwrap_or_default()).into_owned()
    }

    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        wait_until(&format!("{} says {text:?}", self.name), PATIENCE, || self.log().contains(text));
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(status.expect("kill").success());
    }

    /// SIGSTOP, and waits until no thread runs any more: the signal stops the others only when one of them has taken it.
    pub fn freeze(&self) {
        self.signal("-STOP");
        let tasks = format!("/proc/{}/task", self.child.id());
        wait_until(&format!("{} is stopped", self.name), PATIENCE, || {
            let mut threads = fs::read_dir(&tasks).expect("threads").flatten();
            threads.all(|thread| {
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
            })
        });
    }

    /// SIGKILL.
    pub fn kill_hard(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and how it ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal("-TERM");
        self.wait()
    }

    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until(&format!("{} ends", self.name), PATIENCE, || {
            status = self.child.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("ended")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_hard();
        if std::thread::panicking() {
            let log = self.log();
            let start = log.len().saturating_sub(60000);
            let start = (start..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
            eprintln!("--- log of {} ---\n{}", self.name, &log[start..]);
        }
    }
}

/// A receiver that can be killed and started again on its port.
pub struct Receiver {
    command: Box<dyn Fn() -> Command + Send>,
    port: u16,
    process: Option<Process>,
    log: PathBuf,
}

impl Receiver {
    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}/", self.port)
    }

    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it runs")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Starts it and waits until it listens.
    pub fn start(&mut self) {
        let before = self.log().matches(" listening").count();
        self.process = Some(Process::start("receiver", (self.command)(), self.log.clone()));
        wait_until("the receiver listens", PATIENCE, || {
            assert!(self.process().is_running(), "{}", self.log());
            self.log().matches(" listening").count() > before
        });
    }

    pub fn kill_hard(&mut self) {
        self.process().kill_hard();
    }

    pub fn stop(&mut self) -> ExitStatus {
        self.process().stop()
    }

    /// Kills it and starts it again.
    pub fn restart(&mut self) {
        self.kill_hard();
        self.start();
    }
}

/// The built binary.
pub fn waybill() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waybill"));
    command.env_remove("JOURNAL_STREAM").env_remove("NOTIFY_SOCKET").env("NO_COLOR", "1");
    command
}

/// Bytes that wait to be read by whoever listens on this port, as proc_net_tcp says.
pub fn unread(port: u16) -> u64 {
    let table = fs::read_to_string("/proc/net/tcp").expect("Linux");
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).unwrap_or_default();
    let waiting = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (_, local) = fields.next()?.split_once(':')?;
        let (state, queues) = (fields.nth(1)?, fields.next()?);
        let (_, unread) = queues.split_once(':')?;
        // An established connection, not the listening socket.
        (hexadecimal(local) == u64::from(port) && state == "01").then(|| hexadecimal(unread))
    });
    waiting.sum()
}

/// `TAG 0` to `TAG N-1`, as they are stored.
pub fn numbered(tag: &str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{tag} {number}"))
}

/// Numbers from a seed that a failed test prints; `WAYBILL_TEST_SEED` repeats a run.
pub struct Random(u64);

impl Random {
    pub fn new() -> Random {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = std::env::var("WAYBILL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(now.expect("after 1970").subsec_nanos().into());
        println!("WAYBILL_TEST_SEED={seed}");
        Random(seed)
    }

    /// Always the same ones.
    pub fn from(seed: u64) -> Random {
        Random(seed)
    }

    /// From 0 to `below` - 1 (SplitMix64).
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below
    }
}

/// `TAG 0` to `TAG N-1`, a line each.
pub fn lines(tag: &str, count: usize) -> String {
    (0..count).map(|number| format!("{tag} {number}\n")).collect()
}

/// A certificate authority and a certificate for `localhost` and 127.0.0.1, as PEM files.
pub struct Certificates {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Certificates {
    /// Valid for ten years around now.
    pub fn make(folder: &Path) -> Certificates {
        Certificates::make_with(folder, &["localhost", "127.0.0.1"], |_| {})
    }

    /// For these names, with changes to the parameters.
    pub fn make_with(
        folder: &Path,
        names: &[&str],
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) -> Certificates {
        let ca_key = rcgen::KeyPair::generate().expect("a key");
        let mut ca_params = rcgen::CertificateParams::new(Vec::new()).expect("names");
        ca_params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = ca_params.self_signed(&ca_key).expect("a CA");
        let issuer = rcgen::Issuer::from_params(&ca_params, &ca_key);
        let key = rcgen::KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("names");
        change(&mut params);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        let files = Certificates {
            ca: folder.join("ca.pem"),
            certificate: folder.join("server.pem"),
            key: folder.join("server.key"),
        };
        fs::write(&files.ca, ca.pem()).expect("write");
        fs::write(&files.certificate, certificate.pem()).expect("write");
        fs::write(&files.key, key.serialize_pem()).expect("write");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&files.key, private).expect("chmod");
        files
    }
}
