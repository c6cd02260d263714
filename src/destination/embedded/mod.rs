//! SQLite with FTS5 in one file: the destination when no Elasticsearch is named.
//!
//! The receiver opens a [`Store`] and spawns [`Store::run`], whose one thread takes all frames that
//! are waiting into one transaction and answers them after its commit. Nothing is receipted that
//! is not committed with `synchronous=FULL` (I1), and a line that is there already is told by its
//! id (I3). `waybill search` reads the same file from another process.

mod retention;
mod schema;
#[cfg(test)]
pub(crate) mod tests;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::ErrorCode;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::EmbeddedConfig;
use crate::protocol::Verdict;

use super::{Frame, Queue};

pub use schema::{StoreError, open_reader};

use retention::{Retention, Step};
use writer::{Runs, Writer};

/// Bytes of frames in one transaction: it ends after the frame that reaches this.
const BATCH_BYTES: usize = 8 << 20;

/// Lines in one transaction, likewise.
const BATCH_LINES: u64 = 10_000;

/// How often an idle store looks for lines that have become too old.
const RETENTION_INTERVAL: Duration = Duration::from_secs(60);

/// When a sender may try again after the store could not write.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The embedded store, open for writing.
pub struct Store {
    writer: Writer,
    retention: Retention,
    path: PathBuf,
    destination_id: Uuid,
    /// The store could not write last time, and that has been said.
    failing: bool,
}

impl Store {
    /// Opens the store, or makes it where there is none.
    pub fn open(config: &EmbeddedConfig) -> Result<Store, StoreError> {
        let path = config.file.clone();
        let (connection, destination_id) = schema::open_writer(&path)?;
        let writer = Writer::new(connection).map_err(|source| StoreError::of(&path, source))?;
        let retention = Retention::new(config);
        Ok(Store { writer, retention, path, destination_id, failing: false })
    }

    /// Minted when the store was made, and part of it for ever.
    pub fn destination_id(&self) -> Uuid {
        self.destination_id
    }

    /// Takes frames until the queue is closed and empty. `shutdown` only ends the deletion of old
    /// lines: frames that are still coming are written and answered.
    pub async fn run(self, queue: Arc<Queue>, shutdown: CancellationToken) {
        let runtime = Handle::current();
        let thread = tokio::task::spawn_blocking(move || self.serve(&queue, &shutdown, &runtime));
        if let Err(error) = thread.await {
            // Frames that it held were dropped without a receipt and will be sent again.
            tracing::error!(%error, "the store's thread ended");
        }
    }

    fn serve(mut self, queue: &Queue, shutdown: &CancellationToken, runtime: &Handle) {
        let mut aged = true;
        loop {
            let tending = aged && !shutdown.is_cancelled();
            let first = match queue.try_pop() {
                Some(frame) => frame,
                None if tending => {
                    aged = self.tend(1) == Tended::More;
                    continue;
                }
                None => {
                    match runtime.block_on(tokio::time::timeout(RETENTION_INTERVAL, queue.pop())) {
                        Ok(Some(frame)) => frame,
                        Ok(None) => return,
                        Err(_) => {
                            aged = true;
                            continue;
                        }
                    }
                }
            };
            let lines = self.write(first, queue);
            if !shutdown.is_cancelled() {
                // Twice what came in: a store that is full stays at its bound under any load.
                aged = self.tend(2 * lines) == Tended::More;
            }
        }
    }

    /// Writes `first` and what else is waiting, answers it, and says how many lines it was.
    fn write(&mut self, first: Frame, queue: &Queue) -> u64 {
        let mut frames = vec![first];
        match self.commit(&mut frames, queue) {
            Ok(answers) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!(store = %self.path.display(), "the store can write again");
                }
                let lines = answers.iter().map(|runs| runs.lines).sum();
                for (frame, answer) in frames.iter().zip(answers) {
                    frame.reply.send(frame.offset, answer.runs);
                }
                lines
            }
            Err(error) => {
                self.defer(&frames, &error);
                0
            }
        }
    }

    /// One transaction over all frames that are waiting, within the batch's limits. Every frame
    /// taken from the queue is in `frames`, whatever happens.
    fn commit(&mut self, frames: &mut Vec<Frame>, queue: &Queue) -> rusqlite::Result<Vec<Runs>> {
        let mut batch = self.writer.begin()?;
        let mut answers: Vec<Runs> = Vec::new();
        let (mut bytes, mut lines) = (0, 0);
        while let Some(frame) = frames.get(answers.len()) {
            let runs = batch.frame(frame, now_ms())?;
            bytes += frame.records.len();
            lines += runs.lines;
            answers.push(runs);
            if bytes < BATCH_BYTES && lines < BATCH_LINES {
                frames.extend(queue.try_pop());
            }
        }
        batch.commit()?;
        Ok(answers)
    }

    /// Nothing of these frames is stored: says so, to the senders each time and to the log once.
    fn defer(&mut self, frames: &[Frame], error: &rusqlite::Error) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::error!(
                store = %self.path.display(), %error,
                "the store cannot write: {}", advice(error)
            );
        }
        let reason = format!("the receiver's store cannot write: {}", advice(error));
        for frame in frames {
            let records = frame.segment.row.framing;
            let lines = records.records(&frame.records, frame.offset, frame.continues).count();
            let to = frame.offset + frame.records.len() as u64;
            let verdict =
                Verdict::Deferred { reason: reason.clone(), after: RETRY_AFTER, index: None };
            frame.reply.send_one(frame.offset, to, lines as u64, verdict);
        }
    }

    /// Deletes old lines, about `lines` of them, and says whether there is more to delete.
    fn tend(&mut self, lines: u64) -> Tended {
        let mut deleted = 0;
        while deleted < lines {
            match self.retention.step(&self.writer.connection, now_ms()) {
                Ok(Step::Done) => return Tended::Done,
                Ok(Step::Deleted(some)) => deleted += some as u64,
                Err(error) => {
                    // A store that cannot write has said so already.
                    if !self.failing {
                        tracing::warn!(store = %self.path.display(), %error, "old lines were not deleted");
                    }
                    return Tended::Done;
                }
            }
        }
        Tended::More
    }
}

/// Whether old lines are left after [`Store::tend`].
#[derive(PartialEq, Eq)]
enum Tended {
    Done,
    More,
}

/// What a person does about an error of the store.
fn advice(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "its disk is full, free some space or set keep_bytes",
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another process holds its lock, stop that one"
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "its file is damaged, stop the receiver and move the file away"
        }
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
            "its file or folder may not be written, check permissions"
        }
        _ => "input or output failed, check its disk",
    }
}

/// The machine's clock in milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
