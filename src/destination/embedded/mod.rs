//! SQLite with FTS5 in one file: the destination when no Elasticsearch is named.
//!
//! The receiver opens a [`Store`] and spawns [`Store::run`], whose one thread takes all frames that
//! are waiting into one transaction and answers them after its commit. Nothing is receipted that
//! is not committed with `synchronous=FULL` (I1), and a line that is there already is told by its
//! id (I3). `waybill search` reads the same file from another process.

mod files;
mod retention;
mod schema;
#[cfg(test)]
pub(crate) mod tests;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::ErrorCode;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::EmbeddedConfig;
use crate::protocol::Verdict;

use super::{Frame, Health, Queue};

pub use schema::{StoreError, look, open_reader};

use files::Files;
use retention::{Retention, Step};
use writer::{Room, Runs, Writer};

/// Bytes of lines and documents in one transaction: it ends after the line that reaches this. A
/// short line may be a long document, so that the frame's own size says little.
const BATCH_BYTES: usize = 8 << 20;

/// Records in one transaction, likewise.
const BATCH_LINES: usize = 10_000;

/// How often an idle store looks for lines that have become too old.
const RETENTION_INTERVAL: Duration = Duration::from_secs(60);

/// How often an idle store looks whether its file is still there.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// When a sender may try again after the store could not write.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// After a failure for which no sender came back, the store tries by itself, so that a front that
/// asks for `/health/ready` before it lets a sender in is not told no for ever.
const PROBE_AFTER: Duration = Duration::from_secs(10);

/// The embedded store, open for writing.
pub struct Store {
    writer: Writer,
    retention: Retention,
    path: PathBuf,
    files: Files,
    destination_id: Uuid,
    /// When it last could not write, which has been said; `None` since it can.
    failed: Option<Instant>,
    health: watch::Sender<Health>,
}

/// Why nothing of a transaction may be receipted.
#[derive(Debug, Error)]
enum WriteError {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// What was written is in a file that nobody will find.
    #[error("its file is no longer the one that was opened")]
    Gone,
}

impl Store {
    /// Opens the store, or makes it where there is none.
    pub fn open(config: &EmbeddedConfig) -> Result<Store, StoreError> {
        let path = config.file.clone();
        let (connection, destination_id) = schema::open_writer(&path)?;
        let writer = Writer::new(connection).map_err(|source| StoreError::of(&path, source))?;
        let files = Files::of(&path, &writer.connection);
        let retention = Retention::new(config);
        let health = watch::Sender::new(Health::Ready);
        Ok(Store { writer, retention, path, files, destination_id, failed: None, health })
    }

    /// Minted when the store was made, and part of it for ever.
    pub fn destination_id(&self) -> Uuid {
        self.destination_id
    }

    /// Follows whether the store can write.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
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
        let mut idle = Instant::now();
        loop {
            let tending = aged && !shutdown.is_cancelled();
            let first = match queue.try_pop() {
                Some(frame) => frame,
                None if tending => {
                    aged = self.tend(1) == Tended::More;
                    continue;
                }
                None => match runtime.block_on(tokio::time::timeout(LOOK_INTERVAL, queue.pop())) {
                    Ok(Some(frame)) => frame,
                    Ok(None) => return,
                    Err(_) => {
                        self.look();
                        if idle.elapsed() >= RETENTION_INTERVAL {
                            (aged, idle) = (true, Instant::now());
                        }
                        continue;
                    }
                },
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
                self.recovered();
                let lines = answers.iter().map(|runs| runs.lines).sum();
                for (frame, answer) in frames.into_iter().zip(answers) {
                    let (from, reply) = (frame.offset, frame.reply.clone());
                    // Others do not wait for the whole of it.
                    if let Some(rest) = answer.rest(frame) {
                        queue.push_rest(rest);
                    }
                    reply.send(from, answer.runs);
                }
                lines
            }
            Err(error) => {
                self.defer(&frames, &error);
                0
            }
        }
    }

    /// One transaction over all frames that are waiting, within the batch's limits: of the last frame
    /// perhaps only the beginning. Every frame taken from the queue is in `frames`, whatever happens.
    fn commit(&mut self, frames: &mut Vec<Frame>, queue: &Queue) -> Result<Vec<Runs>, WriteError> {
        if !self.files.are_there() {
            return Err(WriteError::Gone);
        }
        let mut batch = self.writer.begin()?;
        let mut answers: Vec<Runs> = Vec::new();
        let mut room = Room { bytes: BATCH_BYTES, lines: BATCH_LINES };
        while let Some(frame) = frames.get(answers.len()) {
            answers.push(batch.frame(frame, now_ms(), &mut room)?);
            if !room.is_used_up() {
                frames.extend(queue.try_pop());
            }
        }
        batch.commit()?;
        // Again: what the commit wrote must be in a file that a restart finds (I1).
        if !self.files.are_there() {
            return Err(WriteError::Gone);
        }
        Ok(answers)
    }

    /// The store has written.
    fn recovered(&mut self) {
        if self.failed.take().is_some() {
            tracing::info!(store = %self.path.display(), "the store can write again");
            self.health.send_replace(Health::Ready);
        }
    }

    /// The store cannot write: says so once.
    fn failed(&mut self, error: &WriteError) {
        let advice = error.advice();
        if self.failed.replace(Instant::now()).is_none() {
            tracing::error!(store = %self.path.display(), %error, "the store cannot write: {advice}");
        }
        self.health.send_replace(Health::Down { reason: advice.to_owned() });
    }

    /// While nothing comes in: whether the file is still there, and whether what failed works now.
    fn look(&mut self) {
        if !self.files.are_there() {
            self.failed(&WriteError::Gone);
        } else if self.failed.is_some_and(|at| at.elapsed() >= PROBE_AFTER) {
            match self.writer.probe() {
                Ok(()) => self.recovered(),
                Err(error) => self.failed(&error.into()),
            }
        }
    }

    /// Nothing of these frames is stored: says so, to the senders each time and to the log once.
    fn defer(&mut self, frames: &[Frame], error: &WriteError) {
        self.failed(error);
        let reason = format!("the receiver's store cannot write: {}", error.advice());
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
            match self.retention.step(&self.writer.connection, now_ms(), Instant::now()) {
                Ok(Step::Done) => return Tended::Done,
                Ok(Step::Deleted(some)) => deleted += some as u64,
                Err(error) => {
                    // A store that cannot write has said so already.
                    if self.failed.is_none() {
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

impl WriteError {
    /// What a person does about it.
    fn advice(&self) -> &'static str {
        match self {
            WriteError::Sqlite(error) => advice(error),
            WriteError::Gone => {
                "its file was deleted, moved or replaced, put it back or start the receiver again"
            }
        }
    }
}

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
