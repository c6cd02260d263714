//! The receiver and the sender of the demo, as processes of their own.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::watch;

/// How long a process may take to start or to stop: generous, because a demo on a busy machine
/// that gives up is worse than one that is slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process of the demo; it never outlives this value.
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    said: watch::Receiver<Said>,
}

/// What the demo takes from a process's log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Said {
    /// Where it listens.
    address: Option<String>,
    /// What it had sent a second time when it ended, in bytes.
    resent_bytes: Option<u64>,
}

impl Process {
    /// Starts this same program with `arguments`; what it logs is appended to `log`.
    pub(super) async fn start(
        name: &'static str,
        arguments: &[String],
        log: &Path,
    ) -> anyhow::Result<Process> {
        let program = std::env::current_exe().context("cannot tell which program this is")?;
        let file = OpenOptions::new().create(true).append(true).open(log).await;
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C reaches the demo alone, which then stops its processes in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start the {name}"))?;
        let stderr = child.stderr.take().context("standard error was piped")?;
        let (found, said) = watch::channel(Said::default());
        tokio::spawn(copy_log(BufReader::new(stderr), file, found));
        Ok(Process { name, child, log: log.to_owned(), said })
    }

    /// Its standard output; once.
    pub(super) fn stdout(&mut self) -> anyhow::Result<BufReader<ChildStdout>> {
        let stdout = self.child.stdout.take().context("standard output is read already")?;
        Ok(BufReader::new(stdout))
    }

    /// The address that it logs when it listens.
    pub(super) async fn listening(&mut self) -> anyhow::Result<String> {
        let mut said = self.said.clone();
        let listens = said.wait_for(|said| said.address.is_some());
        match tokio::time::timeout(PATIENCE, listens).await {
            Ok(Ok(said)) => Ok(said.address.clone().unwrap_or_default()),
            Ok(Err(_)) => bail!("the {} ended before it listened{}", self.name, self.last_words()),
            Err(_) => bail!("the {} does not listen yet{}", self.name, self.last_words()),
        }
    }

    /// What a sender that has ended sent a second time, in bytes; `None` where it did not say.
    pub(super) async fn resent_bytes(&mut self) -> Option<u64> {
        let said = self.said.wait_for(|said| said.resent_bytes.is_some()).await;
        said.ok().and_then(|said| said.resent_bytes)
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end.
    pub(super) async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let name = self.name;
        self.child.wait().await.with_context(|| format!("cannot wait for the {name}"))
    }

    /// SIGSTOP: it takes bytes, as far as the kernel does, and answers none.
    pub(super) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(pid) = pid {
            // It may have ended in between: then there is nothing to signal.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// SIGKILL: what a power cut does to a process.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        let name = self.name;
        self.child.kill().await.with_context(|| format!("cannot kill the {name}"))
    }

    /// SIGTERM, and SIGKILL if that does not help.
    pub(super) async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM);
        if tokio::time::timeout(PATIENCE, self.child.wait()).await.is_err() {
            self.kill().await?;
        }
        self.wait().await
    }

    /// The end of its log, for an error.
    pub(super) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(5)..];
        let mut words = format!("; see {}", self.log.display());
        for line in tail {
            words.push_str("\n  ");
            words.push_str(&crate::telemetry::escaped(line));
        }
        words
    }
}

/// Copies the log into its file, and tells what the demo takes from it.
async fn copy_log(
    mut stderr: BufReader<tokio::process::ChildStderr>,
    mut file: File,
    found: watch::Sender<Said>,
) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match stderr.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        // A full disk must not stop the process that logs: the pipe is read on.
        drop(file.write_all(&line).await);
        drop(file.flush().await);
        found.send_if_modified(|said| hear(said, &line).is_some());
    }
}

/// `None` where the line says nothing that the demo takes.
fn hear(said: &mut Said, line: &[u8]) -> Option<()> {
    let event: Value = serde_json::from_slice(line).ok()?;
    match event.get("message")?.as_str()? {
        "listening" => said.address = Some(event.get("address")?.as_str()?.to_owned()),
        "ended" => said.resent_bytes = Some(event.get("resent_bytes")?.as_u64()?),
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_and_what_was_resent_are_read_from_the_log() {
        let mut said = Said::default();
        for line in ["listening at 127.0.0.1:1", r#"{"message":"dialled","address":"x"}"#] {
            assert_eq!(hear(&mut said, line.as_bytes()), None);
        }
        assert_eq!(said, Said::default());
        let line = br#"{"level":"INFO","message":"listening","address":"127.0.0.1:4711"}"#;
        hear(&mut said, line).expect("heard");
        hear(&mut said, br#"{"message":"ended","stored":3,"resent_bytes":40}"#).expect("heard");
        let address = Some("127.0.0.1:4711".to_owned());
        assert_eq!(said, Said { address, resent_bytes: Some(40) });
    }
}
