//! What is measured, each as one run with fresh files.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use super::process::{Process, Usage, until};
use super::sink;

/// One way of lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Case {
    /// syslog-ng's `elasticsearch-http()` into the sink.
    SyslogNg,
    /// Plain lines through both hops into the sink.
    Sink,
    /// The same with `--receipts FILE`.
    Receipts,
    /// The same into the embedded store.
    Store,
    /// nginx's JSON lines into the sink, parsed.
    Nginx,
    /// RFC 3164 lines into the sink, parsed.
    Syslog,
    /// `openssl s_client` into a TLS sink.
    Openssl,
    /// Elasticsearch, by the bare loader.
    Loader,
    /// Elasticsearch, through both hops.
    Elasticsearch,
}

impl Case {
    /// In the order of their runs.
    pub const ALL: [Case; 9] = [
        Case::SyslogNg,
        Case::Sink,
        Case::Receipts,
        Case::Nginx,
        Case::Syslog,
        Case::Openssl,
        Case::Store,
        Case::Loader,
        Case::Elasticsearch,
    ];

    /// As typed and printed.
    pub fn name(self) -> &'static str {
        match self {
            Case::SyslogNg => "syslog-ng",
            Case::Sink => "sink",
            Case::Receipts => "receipts",
            Case::Store => "store",
            Case::Nginx => "nginx",
            Case::Syslog => "syslog",
            Case::Openssl => "openssl",
            Case::Loader => "loader",
            Case::Elasticsearch => "elasticsearch",
        }
    }

    /// From what was typed.
    pub fn parse(name: &str) -> anyhow::Result<Case> {
        let case = Case::ALL.into_iter().find(|case| case.name() == name);
        case.with_context(|| format!("no case {name:?}; see scripts/bench --help"))
    }

    /// Whether Waybill takes part.
    pub fn has_waybill(self) -> bool {
        !matches!(self, Case::SyslogNg | Case::Openssl | Case::Loader)
    }
}

/// One run.
#[derive(Debug)]
pub struct Outcome {
    /// How many lines.
    pub lines: u64,
    /// Their bytes.
    pub bytes: u64,
    /// From the start of the program that sends to the last receipt, in seconds.
    pub seconds: f64,
    /// What each program took.
    pub usage: Vec<(&'static str, Usage)>,
}

impl Outcome {
    /// Lines per second.
    pub fn rate(&self) -> f64 {
        self.lines as f64 / self.seconds
    }
}

/// Everything that runs share.
pub struct Bench {
    folder: PathBuf,
    itself: PathBuf,
    lines: u64,
    elasticsearch_lines: u64,
    /// Killed when this is dropped.
    _sink: Process,
    sink_port: u16,
    /// Started and warmed up when the first case wants it; `None` inside where it cannot be had.
    elasticsearch: Option<Option<Node>>,
    numbers: u32,
}

/// A real Elasticsearch. It is stopped when dropped.
struct Node {
    url: String,
    script: String,
    folder: String,
}

impl Drop for Node {
    fn drop(&mut self) {
        let stopped = Command::new(&self.script).args(["stop", &self.folder]).output();
        if !stopped.is_ok_and(|output| output.status.success()) {
            eprintln!("Elasticsearch in {} could not be stopped", self.folder);
        }
    }
}

impl Bench {
    /// Makes certificates and lines, and starts the sink.
    pub fn new(folder: &Path, lines: u64, elasticsearch_lines: u64) -> anyhow::Result<Bench> {
        let itself = std::env::current_exe()?;
        let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        fs::write(folder.join("certificate.pem"), certificate.cert.pem())?;
        fs::write(folder.join("key.pem"), certificate.signing_key.serialize_pem())?;
        let (sink, sink_port) = Process::serve(&itself, &["sink"], &folder.join("sink.log"))?;
        Ok(Bench {
            folder: folder.to_owned(),
            itself,
            lines,
            elasticsearch_lines,
            _sink: sink,
            sink_port,
            elasticsearch: None,
            numbers: 0,
        })
    }

    /// One run; `None` where a program for it is missing, which is said.
    pub fn run(&mut self, case: Case, waybill: &Path) -> anyhow::Result<Option<Outcome>> {
        self.numbers += 1;
        let folder = self.folder.join(format!("run-{}", self.numbers));
        fs::create_dir(&folder)?;
        let run = Run { bench: self, folder: folder.clone() };
        let outcome = match case {
            Case::SyslogNg => run.syslog_ng(),
            Case::Openssl => run.openssl(),
            Case::Sink | Case::Receipts => run.sink(waybill, "plain", case == Case::Receipts),
            Case::Nginx => run.sink(waybill, "nginx", false),
            Case::Syslog => run.sink(waybill, "syslog", false),
            Case::Store => run.store(waybill),
            Case::Loader => run.loader(waybill),
            Case::Elasticsearch => run.elasticsearch(waybill),
        };
        // A failed run's files say why.
        if outcome.is_ok() {
            fs::remove_dir_all(folder)?;
        }
        outcome
    }

    /// A file with lines, made at its first use.
    fn file(&self, kind: &str, lines: u64) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(format!("{kind}-{lines}.log"));
        if !path.exists() {
            // In a process of its own: the peak memory of a child starts at its parent's.
            let made = Command::new(&self.itself)
                .args(["lines", kind, &lines.to_string()])
                .arg(&path)
                .status()?;
            ensure!(made.success(), "the lines could not be made");
        }
        Ok(path)
    }

    fn text(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn ask_sink(&mut self, path: &str) -> anyhow::Result<String> {
        let mut stream =
            TcpStream::connect(("127.0.0.1", self.sink_port)).context("the sink has ended")?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: sink\r\n\r\n")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        body.context("the sink gave no answer")
    }

    fn sink_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.sink_port)
    }
}

struct Run<'a> {
    bench: &'a mut Bench,
    folder: PathBuf,
}

impl Run<'_> {
    fn text(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The baseline.
    fn syslog_ng(mut self) -> anyhow::Result<Option<Outcome>> {
        let Some(program) = found(&["/usr/sbin/syslog-ng", "/usr/bin/syslog-ng"]) else {
            eprintln!("skipped: syslog-ng (apt-get install syslog-ng-core syslog-ng-mod-http)");
            return Ok(None);
        };
        let lines = self.bench.lines;
        let file = self.bench.file("plain", lines)?;
        let config = include_str!("syslog-ng.conf")
            .replace("@FILE@", &file.display().to_string())
            .replace("@URL@", &self.bench.sink_url())
            .replace("@WORKERS@", "2");
        fs::write(self.folder.join("syslog-ng.conf"), config)?;
        self.bench.ask_sink(sink::RESET_PATH)?;
        let [config, persist, pid, control] =
            ["syslog-ng.conf", "persist", "pid", "control"].map(|name| self.text(name));
        let start = Instant::now();
        let process = Process::start(
            program,
            &["-F", "--no-caps", "-f", &config, "-R", &persist, "-p", &pid, "-c", &control],
            &self.log("syslog-ng.log"),
            Stdio::null(),
        )?;
        until(|| {
            let count: u64 = self.bench.ask_sink(sink::COUNT_PATH)?.parse()?;
            Ok((count >= lines).then_some(()))
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let usage = process.stop()?;
        self.expect(sink::COUNT_PATH, lines)?;
        let bytes = fs::metadata(file)?.len();
        Ok(Some(Outcome { lines, bytes, seconds, usage: vec![("syslog-ng", usage)] }))
    }

    /// The yardstick of a sender.
    fn openssl(self) -> anyhow::Result<Option<Outcome>> {
        let Some(program) = found(&["/usr/bin/openssl", "/usr/local/bin/openssl"]) else {
            eprintln!("skipped: openssl (apt-get install openssl)");
            return Ok(None);
        };
        let lines = self.bench.lines;
        let file = self.bench.file("plain", lines)?;
        let bytes = fs::metadata(&file)?.len();
        let (certificate, key) = (self.bench.text("certificate.pem"), self.bench.text("key.pem"));
        let arguments = ["tls-sink", &certificate, &key, &bytes.to_string()];
        let (server, port) =
            Process::serve(&self.bench.itself, &arguments, &self.log("tls-sink.log"))?;
        // As a shell's `cat FILE |` would do it.
        let start = Instant::now();
        let mut cat = Command::new("cat").arg(&file).stdout(Stdio::piped()).spawn()?;
        let pipe = cat.stdout.take().context("a pipe")?;
        let to = format!("localhost:{port}");
        let client = Process::start(
            program,
            &["s_client", "-quiet", "-CAfile", &certificate, "-connect", &to],
            &self.log("openssl.log"),
            pipe.into(),
        )?;
        let server = server.wait()?;
        let seconds = start.elapsed().as_secs_f64();
        let client = client.stop()?;
        cat.wait()?;
        let usage = vec![("openssl", client), ("TLS sink", server)];
        Ok(Some(Outcome { lines, bytes, seconds, usage }))
    }

    /// Both hops into the sink.
    fn sink(
        mut self,
        waybill: &Path,
        kind: &str,
        receipts: bool,
    ) -> anyhow::Result<Option<Outcome>> {
        let lines = self.bench.lines;
        self.bench.ask_sink(sink::RESET_PATH)?;
        let url = self.bench.sink_url();
        let outcome = self.relay(waybill, kind, lines, &["--elasticsearch", &url], receipts)?;
        self.expect(sink::COUNT_PATH, lines)?;
        self.expect(sink::DISTINCT_PATH, lines)?;
        if receipts {
            // Line by line: the peak memory of the next program starts at this one's.
            let receipts = BufReader::new(File::open(self.folder.join("receipts"))?);
            let mut stored = 0;
            for line in receipts.split(b'\n') {
                stored += u64::from(memchr::memmem::find(&line?, br#""stored""#).is_some());
            }
            ensure!(stored == lines, "{stored} receipts for {lines} lines");
        }
        Ok(Some(outcome))
    }

    /// Both hops into the embedded store.
    fn store(self, waybill: &Path) -> anyhow::Result<Option<Outcome>> {
        let (lines, file) = (self.bench.lines, self.text("store.sqlite"));
        let outcome = self.relay(waybill, "plain", lines, &["--store", &file], false)?;
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let store = rusqlite::Connection::open_with_flags(&file, flags)?;
        let count: i64 = store.query_row("SELECT count(*) FROM lines", [], |row| row.get(0))?;
        ensure!(u64::try_from(count) == Ok(lines), "{count} lines in the store, not {lines}");
        Ok(Some(outcome))
    }

    /// Both hops into Elasticsearch.
    fn elasticsearch(self, waybill: &Path) -> anyhow::Result<Option<Outcome>> {
        let Some(node) = self.bench.node(waybill)? else { return Ok(None) };
        let lines = self.bench.elasticsearch_lines;
        let arguments = ["--elasticsearch", &node];
        let outcome = self.relay(waybill, "plain", lines, &arguments, false)?;
        expect_documents(&node, lines)?;
        Ok(Some(outcome))
    }

    /// The bare loader into Elasticsearch.
    fn loader(self, waybill: &Path) -> anyhow::Result<Option<Outcome>> {
        let Some(node) = self.bench.node(waybill)? else { return Ok(None) };
        let lines = self.bench.elasticsearch_lines;
        let file = self.bench.file("plain", lines)?;
        let start = Instant::now();
        let usage = self.bench.load(&node, &file, &self.log("loader.log"))?;
        let seconds = start.elapsed().as_secs_f64();
        expect_documents(&node, lines)?;
        let bytes = fs::metadata(file)?.len();
        Ok(Some(Outcome { lines, bytes, seconds, usage: vec![("loader", usage)] }))
    }

    /// Starts a receiver, sends a file, ends both.
    fn relay(
        &self,
        waybill: &Path,
        kind: &str,
        lines: u64,
        destination: &[&str],
        receipts: bool,
    ) -> anyhow::Result<Outcome> {
        let file = self.bench.file(kind, lines)?;
        let [tokens, token, state] = ["tokens.toml", "token", "state"].map(|name| self.text(name));
        let minted =
            Command::new(waybill).args(["token", "bench", "--tokens", &tokens]).output()?;
        ensure!(minted.status.success(), "{}", String::from_utf8_lossy(&minted.stderr));
        fs::write(&token, minted.stdout)?;
        let (certificate, key) = (self.bench.text("certificate.pem"), self.bench.text("key.pem"));
        let mut arguments = vec!["receive", "--listen", "localhost:0", "--tokens", &tokens];
        arguments.extend(["--tls-cert", &certificate, "--tls-key", &key, "--log-format", "json"]);
        arguments.extend(destination);
        let mut receiver =
            Process::start(waybill, &arguments, &self.log("receive.log"), Stdio::null())?;
        let said = receiver.said("\"address\":\"")?;
        let (address, _) = said.split_once('"').context("an address")?;
        let (_, port) = address.rsplit_once(':').context("a port")?;

        let to = format!("wss://localhost:{port}/");
        let (path, receipts_file) = (file.display().to_string(), self.text("receipts"));
        let mut arguments = vec!["send", &path, "--once", "--to", &to, "--ca", &certificate];
        arguments.extend(["--token-file", &token, "--state-dir", &state]);
        if receipts {
            arguments.extend(["--receipts", &receipts_file]);
        }
        let start = Instant::now();
        let sender = Process::start(waybill, &arguments, &self.log("send.log"), Stdio::null())?;
        let sender = sender.wait()?;
        let seconds = start.elapsed().as_secs_f64();
        let receiver = receiver.stop()?;
        let bytes = fs::metadata(&file)?.len();
        let usage = vec![("sender", sender), ("receiver", receiver)];
        Ok(Outcome { lines, bytes, seconds, usage })
    }

    /// The sink must have exactly so many.
    fn expect(&mut self, path: &str, lines: u64) -> anyhow::Result<()> {
        let count: u64 = self.bench.ask_sink(path)?.parse()?;
        ensure!(count == lines, "{count} documents at {path}, not {lines}");
        Ok(())
    }
}

impl Bench {
    /// The base URL of Elasticsearch with empty indices, warmed up.
    fn node(&mut self, waybill: &Path) -> anyhow::Result<Option<String>> {
        if self.elasticsearch.is_none() {
            let node = self.start_node(waybill)?;
            self.elasticsearch = Some(node);
        }
        let Some(Some(node)) = &self.elasticsearch else { return Ok(None) };
        let url = node.url.clone();
        // One by one: a wildcard is refused by default.
        for index in request("GET", &format!("{url}/_cat/indices/waybill-*?h=index"))?.lines() {
            request("DELETE", &format!("{url}/{}", index.trim()))?;
        }
        Ok(Some(url))
    }

    fn start_node(&self, waybill: &Path) -> anyhow::Result<Option<Node>> {
        let script = std::env::var("WAYBILL_BENCH_ELASTICSEARCH_SCRIPT")
            .context("run this by scripts/bench")?;
        let folder = self.text("node");
        let started = Command::new(&script)
            .args(["start", "8.17", "--dir", &folder])
            .args(["--die-with", &std::process::id().to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        match started.status.code() {
            Some(0) => {}
            // Automake's code for a prerequisite that is missing.
            Some(77) => return Ok(None),
            _ => bail!("Elasticsearch did not start"),
        }
        let url = String::from_utf8(started.stdout)?.trim().to_owned();
        let node = Node { url: url.clone(), script, folder };
        let setup = Command::new(waybill).args(["setup", "--elasticsearch", &url]).output()?;
        ensure!(setup.status.success(), "{}", String::from_utf8_lossy(&setup.stderr));
        // Its compiler has seen nothing yet: the first load is at half speed.
        let file = self.file("plain", self.elasticsearch_lines)?;
        self.load(&url, &file, &self.folder.join("warm-up.log"))?;
        Ok(Some(node))
    }

    fn load(&self, url: &str, file: &Path, log: &Path) -> anyhow::Result<Usage> {
        let file = file.display().to_string();
        let arguments = ["load", url, "waybill-default-loader", &file];
        Process::start(&self.itself, &arguments, log, Stdio::null())?.wait()
    }
}

fn expect_documents(url: &str, lines: u64) -> anyhow::Result<()> {
    request("POST", &format!("{url}/waybill-default-*/_refresh"))?;
    let answer = request("GET", &format!("{url}/waybill-default-*/_count"))?;
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    ensure!(answer["count"] == lines, "{} documents, not {lines}", answer["count"]);
    Ok(())
}

fn request(method: &str, url: &str) -> anyhow::Result<String> {
    let answer = Command::new("curl").args(["-fsS", "-X", method, url]).output()?;
    ensure!(answer.status.success(), "{method} {url}: {}", String::from_utf8_lossy(&answer.stderr));
    Ok(String::from_utf8(answer.stdout)?)
}

fn found<'a>(paths: &[&'a str]) -> Option<&'a str> {
    paths.iter().copied().find(|path| File::open(path).is_ok())
}
