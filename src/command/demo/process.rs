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
    address: watch::Receiver<Option<String>>,
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
        let (found, address) = watch::channel(None);
        tokio::spawn(copy_log(BufReader::new(stderr), file, found));
        Ok(Process { name, child, log: log.to_owned(), address })
    }

    /// Its standard output; once.
    pub(super) fn stdout(&mut self) -> anyhow::Result<BufReader<ChildStdout>> {
        let stdout = self.child.stdout.take().context("standard output is read already")?;
        Ok(BufReader::new(stdout))
    }

    /// The address that it logs when it listens.
    pub(super) async fn listening(&mut self) -> anyhow::Result<String> {
        let mut address = self.address.clone();
        let found = tokio::time::timeout(PATIENCE, address.wait_for(Option::is_some)).await;
        match found {
            Ok(Ok(address)) => Ok(address.clone().unwrap_or_default()),
            Ok(Err(_)) => bail!("the {} ended before it listened{}", self.name, self.last_words()),
            Err(_) => bail!("the {} does not listen yet{}", self.name, self.last_words()),
        }
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

    /// SIGKILL: what a power cut does to a process.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        let name = self.name;
        self.child.kill().await.with_context(|| format!("cannot kill the {name}"))
    }

    /// SIGTERM, and SIGKILL if that does not help.
    pub(super) async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        let pid = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(pid) = pid {
            // It may have ended in between: then there is nothing to stop.
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
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

/// Copies the log into its file, and tells the address at which the process listens.
async fn copy_log(
    mut stderr: BufReader<tokio::process::ChildStderr>,
    mut file: File,
    found: watch::Sender<Option<String>>,
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
        if let Some(address) = listening_address(&line) {
            found.send_replace(Some(address));
        }
    }
}

fn listening_address(line: &[u8]) -> Option<String> {
    let event: Value = serde_json::from_slice(line).ok()?;
    event.get("message")?.as_str().filter(|message| message.contains("listening"))?;
    Some(event.get("address")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_the_log() {
        let line = br#"{"level":"INFO","message":"listening","address":"127.0.0.1:4711"}"#;
        assert_eq!(listening_address(line), Some("127.0.0.1:4711".to_owned()));
        assert_eq!(listening_address(b"listening at 127.0.0.1:1"), None);
        assert_eq!(listening_address(br#"{"message":"dialled","address":"x"}"#), None);
    }
}
