//! `waybill demo`: the main job on one machine, with the same programs and flags that a person
//! would use.
//!
//! Receiver and sender are processes of their own, because one of them is killed in the middle.
//! It ends with [`Exit::Done`] only if every line that was written is stored once: a demo that is
//! pleased with itself too early would be a lie.

mod lines;
mod process;
mod show;
mod workshop;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{self, Elasticsearch};
use crate::config::Environment;
use crate::exit::Exit;
use crate::record::framing::Whole;
use crate::record::{Framing, RECORD_BYTES_MAX, RecordKind, escape_path};
use crate::telemetry::escaped;

use lines::Writer;
use process::Process;
use show::{Account, COUNTED_MAX, Receipts, say, step};
use workshop::Workshop;

/// How long the receiver answers nothing before it dies: what is on its way then is sent again.
const FROZEN: Duration = Duration::from_millis(300);

/// How long the receiver stays dead.
const OUTAGE: Duration = Duration::from_secs(1);

/// Without a receipt for so long the demo gives up: longer than the sender's longest delay between
/// two attempts to connect.
const STALLED: Duration = Duration::from_secs(90);

/// Runs the demo until it is over, or until Ctrl-C.
pub async fn run(args: cli::Demo, environment: Environment) -> anyhow::Result<Exit> {
    let mut terminate = signal(SignalKind::terminate())?;
    let is_temporary = args.keep.is_none();
    // Before a folder is made: one may be mistyped.
    let files = regular_files(&args.files)?;
    let workshop = Workshop::make(args.keep.as_deref())?;
    let demo = Demo::new(args, files, environment, workshop)?;
    let mut processes = Processes::default();
    // Dropping `play` loses nothing: the processes are stopped below in either case.
    let exit = tokio::select! {
        exit = demo.play(&mut processes) => exit,
        _ = tokio::signal::ctrl_c() => Ok(Exit::Failed),
        _ = terminate.recv() => Ok(Exit::Failed),
    };
    processes.stop().await?;
    let folder = escape_path(demo.workshop.dir());
    say(format_args!("\nEverything lies in {folder}"))?;
    if is_temporary {
        say(format_args!("When you have seen enough: rm -r {folder}"))?;
    }
    exit
}

/// What runs, to be stopped whatever happens.
#[derive(Default)]
struct Processes {
    receiver: Option<Process>,
    sender: Option<Process>,
}

impl Processes {
    async fn stop(&mut self) -> anyhow::Result<()> {
        for process in [self.sender.take(), self.receiver.take()].into_iter().flatten() {
            let mut process = process;
            process.stop().await?;
        }
        Ok(())
    }
}

struct Demo {
    workshop: Workshop,
    environment: Environment,
    /// Flags that name the destination to the receiver.
    destination: Vec<String>,
    /// Flags that name the destination to a search.
    searched: Vec<String>,
    /// Files that were given; none means that the demo writes its own.
    files: Vec<PathBuf>,
    lines: u32,
    duration: Duration,
}

impl Demo {
    fn new(
        args: cli::Demo,
        files: Vec<PathBuf>,
        environment: Environment,
        workshop: Workshop,
    ) -> anyhow::Result<Demo> {
        let (destination, searched) = match args.elasticsearch.elasticsearch.is_empty() {
            true => {
                let store = ["--store".to_owned(), workshop.text("store.sqlite")];
                (store.to_vec(), store.to_vec())
            }
            false => elasticsearch_flags(&args.elasticsearch, &environment)?,
        };
        Ok(Demo {
            workshop,
            environment,
            destination,
            searched,
            files,
            lines: args.lines,
            duration: Duration::from_secs(args.seconds.into()),
        })
    }

    async fn play(&self, processes: &mut Processes) -> anyhow::Result<Exit> {
        say("Waybill carries lines from files and sockets into a store, one receipt per line.\n")?;
        step("making a certificate authority, a certificate and a token")?;
        self.workshop.make_certificates()?;
        self.make_token().await?;

        step("starting waybill receive, with TLS")?;
        let receiver = processes.receiver.insert(self.start_receiver("127.0.0.1:0").await?);
        let address = receiver.listening().await?;
        let mut accounts = self.accounts()?;
        let config = self.workshop.write_sender_config(&address, &self.sources()?)?;

        step(format_args!("starting waybill send to wss://{address}/"))?;
        say("")?;
        let mut arguments = vec!["send".to_owned(), "--config".to_owned(), config];
        if !self.files.is_empty() {
            arguments.push("--once".to_owned());
        }
        let log = self.workshop.path("sender.log");
        let sender = processes.sender.insert(Process::start("sender", &arguments, &log).await?);
        let stdout = sender.stdout()?;

        let (seen, receipts_seen) = watch::channel(0);
        let total = accounts.iter().map(|account| account.written).sum();
        let reading = Receipts::new(&mut accounts, seen, self.environment.stdout_is_terminal);
        let acting = async {
            let acted = if self.files.is_empty() {
                self.act_with_lines(receiver, sender, &address, receipts_seen, total).await
            } else {
                self.act_with_files(receiver, sender, &address, receipts_seen, total).await
            };
            // Whatever came of it, reading ends only with the sender.
            let stopped = sender.stop().await;
            acted?;
            stopped
        };
        let (read, acted) = tokio::join!(reading.read(stdout), acting);
        read?;
        acted.with_context(|| format!("the demo failed{}", sender.last_words()))?;
        self.settle(&accounts, sender.resent_bytes().await).await
    }

    async fn make_token(&self) -> anyhow::Result<()> {
        let tokens = self.workshop.text("tokens.toml");
        let output = self.waybill(&["token", "demo", "--tokens", &tokens]).await?;
        if !output.status.success() {
            bail!("no token: {}", escaped(&String::from_utf8_lossy(&output.stderr)));
        }
        self.workshop.write_secret("token", &String::from_utf8_lossy(&output.stdout))
    }

    /// Runs this same program to its end.
    async fn waybill(&self, arguments: &[&str]) -> anyhow::Result<std::process::Output> {
        let program = std::env::current_exe().context("cannot tell which program this is")?;
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true);
        command.output().await.context("cannot start waybill")
    }

    async fn start_receiver(&self, listen: &str) -> anyhow::Result<Process> {
        let path = |name: &str| self.workshop.text(name);
        let mut arguments: Vec<String> = vec![
            "receive".to_owned(),
            format!("--listen={listen}"),
            format!("--tls-cert={}", path("receiver.pem")),
            format!("--tls-key={}", path("receiver.key")),
            format!("--tokens={}", path("tokens.toml")),
            "--log-format=json".to_owned(),
        ];
        arguments.extend(self.destination.iter().cloned());
        Process::start("receiver", &arguments, &self.workshop.path("receiver.log")).await
    }

    /// What the sender reads, and how many lines of it must be stored in the end.
    fn accounts(&self) -> anyhow::Result<Vec<Account>> {
        if self.files.is_empty() {
            let labels = ["access.log, nginx JSON", "syslog, RFC 3164", "socket, nginx datagrams"];
            let paths = [self.access_log(), self.syslog(), self.socket()];
            return Ok(labels
                .into_iter()
                .zip(paths)
                .enumerate()
                .map(|(source, (label, path))| {
                    let written = Writer::share(self.lines, source);
                    Account::new(label, escape_path(&path), written, u64::MAX)
                })
                .collect());
        }
        let mut accounts = Vec::new();
        for path in &self.files {
            let (lines, end) =
                count_lines(path).with_context(|| format!("cannot read {}", path.display()))?;
            let text = escape_path(path);
            accounts.push(Account::new(&text, text.clone(), lines, end));
        }
        Ok(accounts)
    }

    fn access_log(&self) -> PathBuf {
        self.workshop.path("logs/access.log")
    }

    fn syslog(&self) -> PathBuf {
        self.workshop.path("logs/syslog")
    }

    fn socket(&self) -> PathBuf {
        self.workshop.path("nginx.sock")
    }

    fn sources(&self) -> anyhow::Result<String> {
        if self.files.is_empty() {
            return Ok("\n[[source]]\nfiles = \"logs/access.log\"\ntype = \"nginx\"\n\
                 \n[[source]]\nfiles = \"logs/syslog\"\ntype = \"syslog\"\ntimezone = \"UTC\"\n\
                 \n[[source]]\nunix_datagram = \"nginx.sock\"\ntype = \"nginx\"\n\
                 timezone = \"UTC\"\nmode = \"0600\"\n"
                .to_owned());
        }
        let mut text = String::new();
        for path in &self.files {
            let path = path.to_str().with_context(|| format!("{path:?} is not UTF-8"))?;
            let pattern = toml::Value::String(glob::Pattern::escape(path));
            text.push_str(&format!("\n[[source]]\nfiles = {pattern}\n"));
        }
        Ok(text)
    }

    /// Writes lines; the log is rotated after a third, the receiver killed after a half.
    async fn act_with_lines(
        &self,
        receiver: &mut Process,
        sender: &mut Process,
        address: &str,
        receipts: watch::Receiver<u64>,
        total: u64,
    ) -> anyhow::Result<()> {
        wait_for_socket(&self.socket(), sender).await?;
        let writer = Writer::open(&self.access_log(), &self.syslog(), &self.socket(), self.lines)?;
        let (written, progress) = watch::channel(0);
        let rotated = |path: &Path| {
            let name = path.file_name().map(Path::new).map(escape_path).unwrap_or_default();
            // Only a reader of standard output that left makes this fail, and others tell that.
            drop(step(format_args!("log rotated: access.log is {name} now")));
        };
        tokio::try_join!(
            writer.run(self.duration, &written, rotated),
            self.disturb(receiver, address, progress, total / 2),
        )?;
        step(format_args!("all {total} lines are written"))?;
        wait_for_receipts(receipts, total, sender).await
    }

    /// Waits for a sender that sends files once; the receiver is killed after the first half.
    async fn act_with_files(
        &self,
        receiver: &mut Process,
        sender: &mut Process,
        address: &str,
        receipts: watch::Receiver<u64>,
        total: u64,
    ) -> anyhow::Result<()> {
        self.disturb(receiver, address, receipts.clone(), total / 2).await?;
        wait_for_receipts(receipts, total, sender).await?;
        // It ends by itself, once it has saved its positions.
        match tokio::time::timeout(STALLED, sender.wait()).await {
            Ok(status) => status.map(drop),
            Err(_) => Ok(()),
        }
    }

    /// Kills the receiver at `half` and starts it again at the same address.
    async fn disturb(
        &self,
        receiver: &mut Process,
        address: &str,
        mut progress: watch::Receiver<u64>,
        half: u64,
    ) -> anyhow::Result<()> {
        if progress.wait_for(|done| *done >= half).await.is_err() {
            return Ok(()); // over before the half
        }
        receiver.freeze();
        tokio::time::sleep(FROZEN).await;
        receiver.kill().await?;
        let meanwhile = if self.files.is_empty() { "; writing goes on" } else { "" };
        step(format_args!("receiver killed with SIGKILL{meanwhile}"))?;
        tokio::time::sleep(OUTAGE).await;
        *receiver = self.start_receiver(address).await?;
        receiver.listening().await?;
        step("receiver started again; what has no receipt is sent again")?;
        Ok(())
    }

    /// The account: counts, a search, where things lie, and what to try next.
    async fn settle(&self, accounts: &[Account], resent: Option<u64>) -> anyhow::Result<Exit> {
        let written: u64 = accounts.iter().map(|account| account.written).sum();
        let found = self.count_found(written.min(COUNTED_MAX)).await?;
        say(format_args!("\n{}", show::table(accounts)))?;
        if let Some(bytes) = resent {
            say(format_args!("  {bytes} bytes were sent again, after the receiver died"))?;
        }
        say("  already: of those, what was stored before: known by its id, stored once")?;
        if written > COUNTED_MAX {
            say(format_args!("  a search, which counts no more than that, finds {found}"))?;
        } else {
            say(format_args!("  a search for every line finds {found}"))?;
        }
        let sample = if self.files.is_empty() { "shipped" } else { "" };
        say(format_args!("\n$ {} --limit 3", self.search_command(sample)))?;
        let mut arguments = vec!["search", "--limit", "3"];
        arguments.extend(self.searched.iter().map(String::as_str));
        if !sample.is_empty() {
            arguments.push(sample);
        }
        let output = self.waybill(&arguments).await?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            say(escaped(line))?;
        }
        self.say_what_next()?;
        let faults = show::faults(accounts, found);
        for fault in &faults {
            say(format_args!("MISSING  {fault}"))?;
        }
        if faults.is_empty() {
            say(format_args!("\nWhat was written is what is stored: {written} lines, each once."))?;
            Ok(Exit::Done)
        } else {
            say("\nWhat was written is not what is stored: see sender.log and receiver.log.")?;
            Ok(Exit::Failed)
        }
    }

    /// How many lines a search for all of them finds. Elasticsearch shows them after its refresh.
    async fn count_found(&self, expected: u64) -> anyhow::Result<u64> {
        let limit = (expected + 1).min(COUNTED_MAX).to_string();
        let mut arguments = vec!["search", "--json", "--limit", &limit];
        arguments.extend(self.searched.iter().map(String::as_str));
        let mut found = 0;
        for _ in 0..20 {
            let output = self.waybill(&arguments).await?;
            found = output.stdout.iter().filter(|byte| **byte == b'\n').count() as u64;
            if found == expected {
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(found)
    }

    fn search_command(&self, query: &str) -> String {
        let program = std::env::args().next().unwrap_or_else(|| "waybill".to_owned());
        let words = [program.as_str(), "search", query];
        let words = words.into_iter().chain(self.searched.iter().map(String::as_str));
        let quoted: Vec<String> = words.filter(|word| !word.is_empty()).map(shell_word).collect();
        quoted.join(" ")
    }

    fn say_what_next(&self) -> std::io::Result<()> {
        say("\nTry next:")?;
        // Both are among the first lines, however few there are; every third one is an order.
        for query in ["http.response.status_code:502", "\"order 22 shipped\""] {
            if self.files.is_empty() {
                say(format_args!("  {}", self.search_command(query)))?;
            }
        }
        say(format_args!("  {} --json | head", self.search_command("")))?;
        let sender = escape_path(&self.workshop.path("sender.toml"));
        say(format_args!("  less {sender}    # the sender's configuration"))
    }
}

/// What was named, which must be there. The sender refuses symbolic links; a person who names one here
/// means its target.
fn regular_files(named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let regular = |file: &PathBuf| {
        let path = file.canonicalize().with_context(|| format!("{}", file.display()))?;
        ensure!(path.is_file(), "{} is not a regular file", file.display());
        Ok(path)
    };
    named.iter().map(regular).collect()
}

/// A word as a shell takes it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The demo's lines go to indices of their own, so that they can be counted and deleted.
fn elasticsearch_flags(
    given: &Elasticsearch,
    environment: &Environment,
) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let random = getrandom::u32().context("no random number")?;
    let mut flags = Vec::new();
    for url in &given.elasticsearch {
        flags.push(format!("--elasticsearch={url}"));
    }
    let files = [
        ("--api-key-file", &given.api_key_file),
        ("--es-user-file", &given.es_user_file),
        ("--es-ca", &given.es_ca),
    ];
    for (flag, path) in files {
        if let Some(path) = path {
            flags.push(format!("{flag}={}", environment.current_dir.join(path).display()));
        }
    }
    flags.push(format!("--index=waybill-demo-{random:08x}-{{type}}-{{yyyy.MM.dd}}"));
    Ok((flags.clone(), flags))
}

/// Waits until the sender has bound its socket.
async fn wait_for_socket(path: &Path, sender: &mut Process) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while std::os::unix::net::UnixDatagram::unbound()?.connect(path).is_err() {
        if sender.ended().is_some() {
            bail!("the sender ended early");
        }
        ensure!(tokio::time::Instant::now() < deadline, "the sender binds no socket");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Waits until `total` receipts are there, or none comes any more: what is missing is told by the
/// account at the end.
async fn wait_for_receipts(
    mut receipts: watch::Receiver<u64>,
    total: u64,
    sender: &mut Process,
) -> anyhow::Result<()> {
    while *receipts.borrow_and_update() < total && sender.ended().is_none() {
        match tokio::time::timeout(STALLED, receipts.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => break,
        }
    }
    Ok(())
}

/// How many lines of a file become documents, and where it ends.
fn count_lines(path: &Path) -> std::io::Result<(u64, u64)> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer: Vec<u8> = Vec::new();
    let (mut lines, mut end, mut continues) = (0, 0, false);
    loop {
        let read = file.by_ref().take(RECORD_BYTES_MAX as u64).read_to_end(&mut buffer)?;
        end += read as u64;
        let whole = match Framing::LINES.whole(&buffer) {
            // At the end of the file the last line needs no newline.
            _ if read == 0 => buffer.len(),
            Whole::Bytes(whole) => whole,
            Whole::Needs(_) | Whole::Corrupt => 0,
        };
        for record in Framing::LINES.records(&buffer[..whole], 0, continues) {
            lines += u64::from(record.kind == RecordKind::Line);
            continues = record.cut;
        }
        buffer.drain(..whole);
        if read == 0 {
            return Ok((lines, end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_as_they_are_framed() {
        let dir = tempfile::tempdir().expect("a folder");
        let count = |bytes: &[u8]| {
            let path = dir.path().join("f");
            std::fs::write(&path, bytes).expect("a file");
            count_lines(&path).expect("counted")
        };
        assert_eq!(count(b""), (0, 0));
        assert_eq!(count(b"a\n\r\n\nb"), (2, 6));
        assert_eq!(count(b"a\n\0\0\0b\n"), (2, 7));
        let long = vec![b'x'; RECORD_BYTES_MAX * 2 + 1];
        assert_eq!(count(&long).0, 3);
        let many = b"0123456789\n".repeat(300_000);
        assert_eq!(count(&many), (300_000, 3_300_000));
    }

    #[test]
    fn commands_that_are_shown_can_be_pasted() {
        assert_eq!(shell_word("/tmp/a.sqlite"), "/tmp/a.sqlite");
        assert_eq!(shell_word("\"order 42\""), "'\"order 42\"'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word("--index=a-{type}"), "'--index=a-{type}'");
    }
}
