//! `--receipts`: one JSON line per line sent, in order per file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::thread::JoinHandle;

use serde::Serialize;
use tokio::sync::mpsc;
use tracing::error;

use super::window::Finished;
use crate::config::ReceiptsTarget;
use crate::protocol::Verdict;
use crate::record::{Day, IdPrefix, RecordKind, Row};

/// Ranges that may wait to be written; each is at most a frame (I7).
const WAITING_MAX: usize = 16;

/// A finished range with its row.
#[derive(Debug)]
pub struct Line {
    /// Complete: it was sent.
    pub row: Row,
    /// What became of its records.
    pub finished: Finished,
}

/// Writes receipts from a thread of its own.
#[derive(Debug)]
pub struct Receipts {
    lines: mpsc::Sender<Line>,
}

/// A line of the output.
#[derive(Serialize)]
struct Entry<'a> {
    id: &'a str,
    index: &'a str,
    /// Of a file or a Unix socket.
    #[serde(skip_serializing_if = "str::is_empty")]
    path: &'a str,
    /// The source's name, where there is no path.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    offset: u64,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl Receipts {
    /// Opens the output; a file is appended to.
    pub fn open(target: &ReceiptsTarget) -> io::Result<(Receipts, JoinHandle<()>)> {
        let output: Box<dyn Write + Send> = match target {
            ReceiptsTarget::Stdout => Box::new(io::stdout()),
            ReceiptsTarget::File(path) => {
                Box::new(File::options().create(true).append(true).open(path)?)
            }
        };
        let (lines, waiting) = mpsc::channel(WAITING_MAX);
        let writer = std::thread::Builder::new().name("receipts".to_owned());
        let thread =
            writer.spawn(move || run(waiting, BufWriter::with_capacity(64 << 10, output)))?;
        Ok((Receipts { lines }, thread))
    }

    /// Hands over a range; waits while the output is slow.
    pub async fn write(&self, line: Line) {
        // The thread ends only when its output failed, which it has said.
        let _ = self.lines.send(line).await;
    }
}

fn run(mut waiting: mpsc::Receiver<Line>, mut output: BufWriter<Box<dyn Write + Send>>) {
    while let Some(line) = waiting.blocking_recv() {
        let mut written = write_line(&mut output, &line);
        if waiting.is_empty() && written.is_ok() {
            written = output.flush();
        }
        if let Err(error) = written {
            // A reader that went away (`| head`) is no failure of ours.
            if error.kind() != io::ErrorKind::BrokenPipe {
                error!(%error, "receipts cannot be written any more; lines are still sent");
            }
            return;
        }
    }
    if let Err(error) = output.flush() {
        error!(%error, "the last receipts could not be written");
    }
}

fn write_line(output: &mut impl Write, line: &Line) -> io::Result<()> {
    let Line { row, finished } = line;
    let (Some(sender), Some(rule)) = (row.sender, &row.rule) else { return Ok(()) };
    let ids = IdPrefix::new(sender, row.segment);
    let index = rule.name(&row.type_name, row.day);
    let mut runs = finished.runs.iter();
    let mut run = runs.next();
    for record in row.framing.records(&finished.records, finished.from, finished.continues) {
        while run.is_some_and(|run| record.offset >= run.to) {
            run = runs.next();
        }
        let Some(run) = run else { break };
        if record.kind == RecordKind::Skipped {
            continue;
        }
        let (verdict, reason) = match &run.verdict {
            Verdict::Stored => ("stored", None),
            Verdict::Already => ("already", None),
            Verdict::Parked { reason } => ("parked", Some(reason.as_str())),
            Verdict::Skipped | Verdict::Deferred { .. } => continue,
        };
        let text = ids.of(&record).text();
        let own_day = record.time.filter(|_| !record.key.is_empty()).map(Day::of_millis);
        let own_index =
            own_day.filter(|day| *day != row.day).map(|day| rule.name(&row.type_name, day));
        let entry = Entry {
            id: std::str::from_utf8(&text).unwrap_or_default(),
            index: own_index.as_deref().unwrap_or(&index),
            path: &row.path,
            source: row.path.is_empty().then_some(&row.source),
            offset: record.offset,
            verdict,
            reason,
        };
        serde_json::to_writer(&mut *output, &entry).map_err(io::Error::other)?;
        output.write_all(b"\n")?;
    }
    Ok(())
}
