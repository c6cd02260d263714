//! What a person sees of the demo: receipts scrolling past, and the account at the end.

use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;

use jiff::Zoned;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::telemetry::escaped;

/// Up to so many lines a search counts them one by one: Elasticsearch shows no more.
pub(super) const COUNTED_MAX: u64 = 10_000;

const DIM: &str = "\x1b[2m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Writes a line to standard output, without colours where it is no terminal.
pub(super) fn say(text: impl Display) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// A line about what the demo does now.
pub(super) fn step(text: impl Display) -> io::Result<()> {
    say(format_args!("{DIM}{}{PLAIN}  {BOLD}{text}{PLAIN}", time()))
}

fn time() -> String {
    Zoned::now().strftime("%H:%M:%S%.3f").to_string()
}

/// A line of the sender's `--receipts`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
struct ReceiptLine {
    id: String,
    path: String,
    offset: u64,
    verdict: String,
    #[serde(default)]
    reason: Option<String>,
}

/// One source, what was written to it, and what became of that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Account {
    /// For the table.
    pub label: String,
    /// Path in receipts.
    pub path: String,
    /// Lines that must be stored.
    pub written: u64,
    /// Where the file ended when those were counted; later lines are not part of the account.
    pub end: u64,
    /// Now stored.
    pub stored: u64,
    /// Sent again after a broken connection, and found there.
    pub already: u64,
    /// In the dead letter.
    pub parked: u64,
}

impl Account {
    /// Nothing receipted yet.
    pub(super) fn new(label: &str, path: String, written: u64, end: u64) -> Account {
        Account { label: label.to_owned(), path, written, end, stored: 0, already: 0, parked: 0 }
    }

    /// Lines that have a receipt.
    pub(super) fn receipted(&self) -> u64 {
        self.stored + self.already + self.parked
    }

    /// Receipts of a rotated file may carry the name it got.
    fn owns(&self, path: &str) -> bool {
        path.strip_prefix(&self.path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
    }
}

/// Shows receipts at a pace that a person can read, and books them.
pub(super) struct Receipts<'a> {
    accounts: &'a mut [Account],
    seen: watch::Sender<u64>,
    /// Least time between two lines shown.
    pace: Duration,
    shown_at: Option<Instant>,
    hidden: u64,
    already_shown: bool,
}

impl<'a> Receipts<'a> {
    /// Books into `accounts`, and counts booked receipts in `seen`.
    pub(super) fn new(
        accounts: &'a mut [Account],
        seen: watch::Sender<u64>,
        is_terminal: bool,
    ) -> Receipts<'a> {
        let pace = Duration::from_millis(if is_terminal { 120 } else { 500 });
        Receipts { accounts, seen, pace, shown_at: None, hidden: 0, already_shown: false }
    }

    /// Reads until the sender closes its standard output.
    pub(super) async fn read(
        mut self,
        mut lines: BufReader<impl AsyncRead + Unpin>,
    ) -> anyhow::Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            if lines.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let receipt: ReceiptLine = serde_json::from_str(&line)
                .map_err(|error| anyhow::anyhow!("the sender wrote an odd receipt: {error}"))?;
            self.book(&receipt);
            self.show(&receipt)?;
        }
    }

    fn book(&mut self, receipt: &ReceiptLine) {
        // The longest path that fits: `a.log` and `a.log.1` may both be given.
        let account = self
            .accounts
            .iter_mut()
            .filter(|account| account.owns(&receipt.path) && receipt.offset < account.end)
            .max_by_key(|account| account.path.len());
        let Some(account) = account else { return };
        match receipt.verdict.as_str() {
            "stored" => account.stored += 1,
            "already" => account.already += 1,
            "parked" => account.parked += 1,
            _ => return,
        }
        self.seen.send_modify(|seen| *seen += 1);
    }

    fn show(&mut self, receipt: &ReceiptLine) -> io::Result<()> {
        // The first line that was recognised is what the killed receiver is for.
        let first_already = receipt.verdict == "already" && !self.already_shown;
        let due = self.shown_at.is_none_or(|at| at.elapsed() >= self.pace);
        if !due && !first_already {
            self.hidden += 1;
            return Ok(());
        }
        self.already_shown |= first_already;
        let colour = if receipt.verdict == "stored" { GREEN } else { YELLOW };
        let name = receipt.path.rsplit('/').next().unwrap_or(&receipt.path);
        let place = format!("{}:{}", escaped(name), receipt.offset);
        let verdict = escaped(&receipt.verdict);
        let mut line = format!(
            "{DIM}{}{PLAIN}  {place:<22} {colour}{verdict:<8}{PLAIN} {}",
            time(),
            escaped(&receipt.id)
        );
        if let Some(reason) = &receipt.reason {
            line.push_str(&format!("  {}", escaped(reason)));
        }
        if self.hidden > 0 {
            line.push_str(&format!("  {DIM}and {} before{PLAIN}", self.hidden));
        }
        self.hidden = 0;
        self.shown_at = Some(Instant::now());
        say(line)
    }
}

/// The table at the end.
pub(super) fn table(accounts: &[Account]) -> String {
    let width = accounts.iter().map(|account| account.label.chars().count()).max();
    let width = width.unwrap_or(0).max("together".len());
    let mut text = format!(
        "  {:<width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}\n",
        "", "written", "receipted", "stored", "already", "parked"
    );
    let mut sum = Account::new("together", String::new(), 0, 0);
    for account in accounts {
        text.push_str(&row(account, width));
        sum.written += account.written;
        sum.stored += account.stored;
        sum.already += account.already;
        sum.parked += account.parked;
    }
    if accounts.len() > 1 {
        text.push_str(&row(&sum, width));
    }
    text
}

fn row(account: &Account, width: usize) -> String {
    format!(
        "  {:<width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}\n",
        account.label,
        account.written,
        account.receipted(),
        account.stored,
        account.already,
        account.parked
    )
}

/// What keeps the demo from having succeeded; nothing if each line is stored once.
pub(super) fn faults(accounts: &[Account], found: u64) -> Vec<String> {
    let mut faults = Vec::new();
    for account in accounts {
        let (label, written, receipted) = (&account.label, account.written, account.receipted());
        if receipted < written {
            faults.push(format!("{label}: {} lines have no receipt", written - receipted));
        } else if receipted > written {
            faults.push(format!("{label}: {} receipts too many", receipted - written));
        }
        if account.parked > 0 {
            faults.push(format!("{label}: {} lines were parked, not stored", account.parked));
        }
    }
    let written: u64 = accounts.iter().map(|account| account.written).sum();
    if found != written.min(COUNTED_MAX) {
        faults.push(format!("{written} lines were written, and a search finds {found}"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Vec<Account> {
        vec![
            Account::new("access.log", "/d/access.log".to_owned(), 2, u64::MAX),
            Account::new("app", "/d/app.log".to_owned(), 1, 100),
        ]
    }

    async fn read(accounts: &mut [Account], text: &str) -> anyhow::Result<u64> {
        let (seen, count) = watch::channel(0);
        Receipts::new(accounts, seen, false).read(BufReader::new(text.as_bytes())).await?;
        Ok(*count.borrow())
    }

    fn receipt(path: &str, offset: u64, verdict: &str) -> String {
        format!(
            "{{\"id\":\"x\",\"index\":\"i\",\"path\":\"{path}\",\"offset\":{offset},\
             \"verdict\":\"{verdict}\"}}\n"
        )
    }

    #[tokio::test]
    async fn receipts_are_booked_where_they_belong() {
        let mut accounts = accounts();
        let text = receipt("/d/access.log", 0, "stored")
            + &receipt("/d/access.log.1", 9, "already")
            + &receipt("/d/app.log", 100, "stored")
            + &receipt("/d/app.log", 99, "stored");
        assert_eq!(read(&mut accounts, &text).await.expect("receipts"), 3);
        assert_eq!((accounts[0].stored, accounts[0].already), (1, 1));
        assert_eq!(accounts[1].stored, 1);
        assert_eq!(faults(&accounts, 3), Vec::<String>::new());
    }

    #[tokio::test]
    async fn what_is_missing_doubled_or_parked_is_a_fault() {
        let mut accounts = accounts();
        let text = receipt("/d/access.log", 0, "stored")
            + &receipt("/d/app.log", 0, "parked")
            + &receipt("/d/app.log", 50, "stored");
        read(&mut accounts, &text).await.expect("receipts");
        assert_eq!(
            faults(&accounts, 4),
            [
                "access.log: 1 lines have no receipt",
                "app: 1 receipts too many",
                "app: 1 lines were parked, not stored",
                "3 lines were written, and a search finds 4"
            ]
        );
        assert!(read(&mut accounts, "{}\n").await.is_err());
    }
}
