//! `waybill check`: one line for each thing that a configuration needs.
//!
//! It changes nothing: no document is written, and a connection to a receiver is closed right after
//! the upgrade, before it is anybody's session. The state directory's lock is held for a moment, for
//! which a start waits; a port is bound for a moment and never listened on.

mod cluster;
mod local;
mod receive;
mod receiver;
mod send;

use std::io::{self, Write};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli;
use crate::clock;
use crate::config::{ConfigError, Environment, Loaded};
use crate::exit::Exit;
use crate::telemetry::escaped;
use crate::tls::Leaf;

/// A certificate or a token that ends sooner is warned of.
const ENDS_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// Of the hosts that a certificate is for.
const NAMES_SHOWN_MAX: usize = 4;

const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const RED: &str = "\x1b[31m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Checks one side; [`Exit::Failed`] where a line says `fail`.
pub async fn run(args: cli::Check, environment: Environment) -> anyhow::Result<Exit> {
    let mut report = Report { json: args.json, failed: false };
    match args.side {
        cli::CheckSide::Send(send) => send::check(*send, &environment, &mut report).await?,
        cli::CheckSide::Receive(receive) => {
            receive::check(*receive, &environment, &mut report).await?;
        }
    }
    Ok(if report.failed { Exit::Failed } else { Exit::Done })
}

/// What a line says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// It is as it must be.
    Ok,
    /// It works, and somebody should look at it.
    Warn,
    /// It does not work.
    Fail,
    /// It cannot be told.
    Skip,
}

#[derive(Serialize)]
struct Line<'a> {
    check: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<&'a str>,
    status: Status,
    message: &'a str,
}

/// Writes lines as they come: some checks wait for a network.
#[derive(Debug)]
struct Report {
    json: bool,
    failed: bool,
}

impl Report {
    /// `of` names which one, where there are several.
    fn line(
        &mut self,
        check: &str,
        of: Option<&str>,
        status: Status,
        message: impl AsRef<str>,
    ) -> io::Result<()> {
        self.failed |= status == Status::Fail;
        // Texts of servers are among the messages (I8), and a line is a line.
        let message = escaped(message.as_ref());
        let line = Line { check, of, status, message: &message };
        let mut out = anstream::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut out, &line)?;
            writeln!(out)?;
        } else {
            let (colour, word) = match status {
                Status::Ok => (GREEN, "ok  "),
                Status::Warn => (YELLOW, "warn"),
                Status::Fail => (RED, "fail"),
                Status::Skip => (DIM, "skip"),
            };
            let of = of.map(|of| format!(" {}:", escaped(of))).unwrap_or_default();
            writeln!(out, "{colour}{word}{PLAIN}  {check:<13} {DIM}{of}{PLAIN} {message}")?;
        }
        out.flush()
    }

    fn ok(&mut self, check: &str, of: Option<&str>, message: impl AsRef<str>) -> io::Result<()> {
        self.line(check, of, Status::Ok, message)
    }

    fn warn(&mut self, check: &str, of: Option<&str>, message: impl AsRef<str>) -> io::Result<()> {
        self.line(check, of, Status::Warn, message)
    }

    fn fail(&mut self, check: &str, of: Option<&str>, message: impl AsRef<str>) -> io::Result<()> {
        self.line(check, of, Status::Fail, message)
    }

    fn skip(&mut self, check: &str, of: Option<&str>, message: impl AsRef<str>) -> io::Result<()> {
        self.line(check, of, Status::Skip, message)
    }

    /// The configuration's own faults and warnings; `None` where nothing more can be checked.
    fn configuration<T>(
        &mut self,
        loaded: Result<Loaded<T>, ConfigError>,
    ) -> io::Result<Option<T>> {
        const CHECK: &str = "configuration";
        match loaded {
            Ok(loaded) => {
                for warning in &loaded.warnings {
                    self.warn(CHECK, None, warning)?;
                }
                if loaded.warnings.is_empty() {
                    self.ok(
                        CHECK,
                        None,
                        "complete; the files of secrets are not open to every user",
                    )?;
                }
                return Ok(Some(loaded.config));
            }
            Err(ConfigError::Faults(problems)) => {
                for problem in problems {
                    self.fail(CHECK, None, problem.to_string())?;
                }
            }
            Err(error) => self.fail(CHECK, None, error.to_string())?,
        }
        Ok(None)
    }

    /// What a certificate that a server shows is good for, and until when.
    fn certificate(&mut self, check: &str, of: Option<&str>, leaf: Option<Leaf>) -> io::Result<()> {
        let Some(leaf) = leaf else {
            return self.skip(check, of, "the certificate's names and end cannot be read");
        };
        let end = leaf.not_after();
        let day = end.strftime("%Y-%m-%d");
        let Ok(left) = Duration::try_from(end.duration_since(Timestamp::now())) else {
            return self.fail(check, of, format!("the certificate ended on {day}; renew it"));
        };
        let days = left.as_secs() / (24 * 3600);
        let names = leaf.names();
        let mut hosts = names[..names.len().min(NAMES_SHOWN_MAX)].join(", ");
        if let Some(more @ 1..) = names.len().checked_sub(NAMES_SHOWN_MAX) {
            hosts += &format!(" and {more} more");
        }
        let of_hosts = if hosts.is_empty() { hosts } else { format!(" for {hosts}") };
        let message = format!("the certificate{of_hosts} is good until {day}, {days} days left");
        if left < ENDS_SOON {
            self.warn(check, of, format!("{message}; renew it"))
        } else {
            self.ok(check, of, message)
        }
    }

    /// This machine's clock against another's, which `whose` names.
    fn clock(&mut self, of: Option<&str>, whose: &str, theirs: Timestamp) -> io::Result<()> {
        match clock::compare(whose, theirs) {
            Err(message) => self.warn("clock", of, message),
            Ok(off) => self.ok("clock", of, format!("within {} s of {whose}", off.as_secs() + 1)),
        }
    }
}
