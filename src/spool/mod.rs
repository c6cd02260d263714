//! What arrived on a socket and awaits a receipt: append, sync, read, release.
//!
//! One spool per source. Its socket task appends records to memory; one thread writes them in
//! groups and syncs each group once; the sender's stream reads what is synced and releases what a
//! durable position covers. Three things must never happen: a byte that is not synced is read (a
//! power cut could then give its offset to another record, I3), a file is unlinked before a
//! durable position covers it (I2), and memory or disk grows without bound (I7).
//!
//! Each start opens a new segment, so that what a crash tore is never appended to. So do
//! [`Spool::end_segment`] and a failed sync: the kernel may have dropped the pages, and asking a
//! second time only hides it, so the records are written again to a fresh segment.

mod budget;
mod files;
mod queue;
mod table;
#[cfg(test)]
mod tests;
mod throttle;
mod writer;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};
use tokio::sync::watch;

pub use budget::Budget;
pub(crate) use throttle::Throttle;

use self::queue::Queue;
use self::table::Table;
use self::writer::Writer;
use crate::record::framing::{Framing, SPOOL_HEADER_BYTES, Whole};
use crate::record::{SegmentId, escape_path};

/// What every file system takes as a name, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// The directory of a source's spool: `STATE_DIR/spool/NAME`, where bytes other than ASCII
/// letters, digits, `-` and `_` become `%XX`; of a name too long for a file system the rest is
/// replaced by `%` and its SHA-256.
pub fn directory(state_dir: &Path, source: &str) -> PathBuf {
    let mut name = String::new();
    for byte in source.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    if name.len() > NAME_BYTES_MAX {
        let digest = Sha256::digest(source);
        name.truncate(NAME_BYTES_MAX - 65);
        name.push('%');
        name.extend(digest.iter().map(|byte| format!("{byte:02x}")));
    }
    state_dir.join("spool").join(name)
}

/// A spool: shared by the source that appends, and the stream that reads and releases.
///
/// Dropping it writes and syncs what was appended, blocking for that sync.
#[derive(Debug)]
pub struct Spool {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    full: Throttle,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    queue: Queue,
    table: Mutex<Table>,
    watermark: watch::Sender<Watermark>,
    budget: Arc<Budget>,
    waits: AtomicU64,
}

/// A segment of a spool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpoolSegment {
    /// Names it in the spool; its first row may have the same id.
    pub id: SegmentId,
    /// Its first byte that is still there.
    pub start: u64,
    /// Where it ends; `None` for the live one.
    pub end: Option<u64>,
}

/// How far the live segment is synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermark {
    /// The live segment.
    pub segment: SegmentId,
    /// Only bytes below it may be read.
    pub offset: u64,
    /// Bytes synced since the spool was opened, over all segments.
    pub synced: u64,
    /// No more bytes will be synced: the writer has ended.
    pub ended: bool,
}

/// What [`Spool::read`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Chunk {
    /// Whole records with right checksums, at least one.
    Records(Vec<u8>),
    /// From the offset asked to `end` there are no records: damaged, or their file is gone. A
    /// loss, to be reported and passed over (I9).
    Bad {
        /// Where reading goes on.
        end: u64,
    },
    /// Nothing is synced there yet: wait for the watermark.
    Wait,
    /// The segment ends at or before this offset.
    End,
}

/// Why a spool does not open or lost something.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The directory cannot be made.
    #[error("cannot make the spool directory {dir}: check its parent's owner and permissions")]
    Directory {
        /// The directory.
        dir: String,
        /// Why.
        source: io::Error,
    },
    /// What is there cannot be read or cut.
    #[error("cannot recover the spool in {dir}: check the disk and the files' owner")]
    Recover {
        /// The directory.
        dir: String,
        /// Why.
        source: io::Error,
    },
    /// The thread that writes cannot be started.
    #[error("cannot start the spool's thread: raise the limit of tasks")]
    Thread(#[source] io::Error),
    /// The spool was closed while its disk refused writes.
    #[error("{bytes} bytes of records were not written to the spool before it closed")]
    Lost {
        /// Bytes that were appended and never synced.
        bytes: u64,
    },
}

impl Spool {
    /// Opens a source's spool, recovers what is there, and mints the live segment. Blocking.
    ///
    /// The live segment's first file is made with its first record.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be made or read, or a torn file cannot be cut.
    pub fn open(dir: &Path, budget: Arc<Budget>) -> Result<Spool, SpoolError> {
        files::make_directory(dir)
            .map_err(|source| SpoolError::Directory { dir: escape_path(dir), source })?;
        let mut table = table::recover(dir)?;
        for run in &table.runs {
            budget.take(run.synced() - run.start());
        }
        let live = SegmentId::mint();
        table.runs.push(table::Run::live(live));
        let mark = Watermark { segment: live, offset: 0, synced: 0, ended: false };
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            queue: Queue::default(),
            table: Mutex::new(table),
            watermark: watch::Sender::new(mark),
            budget,
            waits: AtomicU64::new(0),
        });
        let writer = Writer::new(shared.clone(), live);
        let thread = std::thread::Builder::new().name("spool".to_owned());
        let handle = thread.spawn(move || writer.run()).map_err(SpoolError::Thread)?;
        Ok(Spool { shared, writer: Some(handle), full: Throttle::default() })
    }

    /// All segments with unreleased bytes, oldest first, then the live one.
    pub fn segments(&self) -> Vec<SpoolSegment> {
        self.shared.table().runs.iter().map(table::Run::describe).collect()
    }

    /// How far the live segment is synced.
    pub fn watermark(&self) -> Watermark {
        *self.shared.watermark.borrow()
    }

    /// Where a segment ends, as far as it is synced; `None` where it is gone.
    pub fn end_of(&self, segment: SegmentId) -> Option<u64> {
        self.shared.table().run(segment).map(|run| run.synced())
    }

    /// Follows the watermark; it also changes when another segment becomes the live one.
    pub fn subscribe(&self) -> watch::Receiver<Watermark> {
        self.shared.watermark.subscribe()
    }

    /// How often an append had to wait for room.
    pub fn waits(&self) -> u64 {
        self.shared.waits.load(Ordering::Relaxed)
    }

    /// Appends one record if there is room. It is durable once [`Spool::flush`] returns.
    ///
    /// # Panics
    ///
    /// Where payload or key is over its limit, as
    /// [`encode_spool_record`](crate::record::framing::encode_spool_record) does.
    pub fn try_append(&self, time_ms: u64, key: &[u8], payload: &[u8]) -> bool {
        let bytes = record_bytes(key, payload);
        let budget = &self.shared.budget;
        self.shared.queue.push((time_ms, key, payload), true, || budget.try_take(bytes))
    }

    /// Appends one record as soon as there is room. Dropping the future appends nothing.
    pub async fn append(&self, time_ms: u64, key: &[u8], payload: &[u8]) {
        let bytes = record_bytes(key, payload);
        self.when_room(bytes, || self.try_append(time_ms, key, payload)).await;
    }

    /// Appends one record over the bounds: what a source has in its hands when it must stop.
    pub fn append_last(&self, time_ms: u64, key: &[u8], payload: &[u8]) {
        let take = || {
            self.shared.budget.take(record_bytes(key, payload));
            true
        };
        self.shared.queue.push((time_ms, key, payload), false, take);
    }

    /// Waits until there is room for a record, so that none is taken from a socket in vain.
    pub async fn room(&self) {
        self.when_room(1, || !self.shared.queue.is_full() && !self.shared.budget.is_full()).await;
    }

    /// Waits until all that was appended before this call is synced: as long as the disk refuses
    /// writes, unless the spool is closed meanwhile. Dropping the future changes nothing.
    ///
    /// # Errors
    ///
    /// [`SpoolError::Lost`] where the spool closes before that.
    pub async fn flush(&self) -> Result<(), SpoolError> {
        let target = self.shared.queue.appended();
        let mut watermark = self.subscribe();
        let reached = watermark.wait_for(|mark| mark.synced >= target || mark.ended).await;
        // The sender lives in `self`, so that the channel cannot be closed here.
        let synced = reached.map_or(0, |mark| mark.synced);
        if synced >= target { Ok(()) } else { Err(SpoolError::Lost { bytes: target - synced }) }
    }

    /// Lets the next sync begin at once: for a source whose peer waits for [`Spool::flush`] before
    /// it sends more, so that nothing else would share the sync.
    pub fn hurry(&self) {
        self.shared.queue.hurry();
    }

    /// Ends the live segment behind what was appended so far, for a row that must end there (a
    /// new UTC day); the watermark tells when. Nothing happens where the segment is empty.
    pub fn end_segment(&self) {
        self.shared.queue.end_segment();
    }

    /// Writes and syncs what was appended, then ends the writer. An unwritable disk gets one more
    /// attempt. Nothing may be appended after it.
    pub fn close(&self) {
        self.shared.queue.close();
    }

    /// Reads whole, checked records at `offset`, about `limit` bytes and at least one record.
    /// Blocking.
    ///
    /// # Errors
    ///
    /// Where the disk fails to read; what is merely wrong is [`Chunk::Bad`].
    pub fn read(&self, segment: SegmentId, offset: u64, limit: usize) -> io::Result<Chunk> {
        let file = {
            let mut table = self.shared.table();
            let Some(run) = table.run(segment) else {
                return Ok(Chunk::End);
            };
            match run.files.iter().find(|file| offset < file.end) {
                Some(file) if offset < file.start => return Ok(Chunk::Bad { end: file.start }),
                Some(file) => file.clone(),
                None if run.end.is_some() => return Ok(Chunk::End),
                None => return Ok(Chunk::Wait),
            }
        };
        let opened = match File::open(&file.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Chunk::Bad { end: file.end });
            }
            other => other?,
        };
        match read_records(&opened, offset - file.start, file.end - file.start, limit) {
            // Something cut the file short behind our back.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Ok(Chunk::Bad { end: file.end })
            }
            Ok(Chunk::Bad { end }) => Ok(Chunk::Bad { end: end + file.start }),
            other => other,
        }
    }

    /// Gives back what lies below `position`, which must be durable already (I2): whole files
    /// below it are unlinked, durably. Blocking.
    ///
    /// # Errors
    ///
    /// Where a file cannot be unlinked; it is met again at the next start.
    pub fn release(&self, segment: SegmentId, position: u64) -> io::Result<()> {
        let paths = {
            let mut table = self.shared.table();
            let Some(run) = table.run(segment) else {
                return Ok(());
            };
            let released = position.min(run.synced());
            if released > run.released {
                self.shared.budget.give_back(released - run.released);
                run.released = released;
            }
            table.covered(&self.shared.dir, segment)
        };
        if paths.is_empty() {
            return Ok(());
        }
        paths.iter().try_for_each(|path| files::remove(path))?;
        // Before anybody forgets their rows: a power cut would bring the files back.
        files::sync_directory(&self.shared.dir)
    }

    async fn when_room(&self, bytes: u64, mut attempt: impl FnMut() -> bool) {
        if attempt() {
            return;
        }
        self.note_full(bytes);
        loop {
            let room = self.shared.queue.room.notified();
            let freed = self.shared.budget.freed.notified();
            tokio::pin!(room, freed);
            // Registered before looking, so that no room made in between is missed.
            room.as_mut().enable();
            freed.as_mut().enable();
            if attempt() {
                return;
            }
            tokio::select! {
                () = room => {}
                () = freed => {}
            }
        }
    }

    fn note_full(&self, bytes: u64) {
        self.shared.waits.fetch_add(1, Ordering::Relaxed);
        // A queue that is full for the length of one sync is everyday backpressure.
        if self.shared.budget.admits(bytes) {
            return;
        }
        if let Some(times) = self.full.count() {
            tracing::warn!(
                dir = %escape_path(&self.shared.dir), times, bytes = self.shared.budget.used(),
                "spool is full: the source is not read until receipts make room; raise \
                 spool_bytes_max if outages last longer",
            );
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.close();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!(dir = %escape_path(&self.shared.dir), "spool: the writer panicked");
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record_bytes(key: &[u8], payload: &[u8]) -> u64 {
    (SPOOL_HEADER_BYTES + key.len() + payload.len()) as u64
}

/// Reads records at `at`, in a file of `length` synced bytes.
fn read_records(file: &File, at: u64, length: u64, limit: usize) -> io::Result<Chunk> {
    let rest = usize::try_from(length - at).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    let mut size = limit.max(SPOOL_HEADER_BYTES);
    loop {
        bytes.resize(size.min(rest), 0);
        file.read_exact_at(&mut bytes, at)?;
        match Framing::SPOOL.whole(&bytes) {
            Whole::Bytes(whole) => {
                bytes.truncate(whole);
                return Ok(Chunk::Records(bytes));
            }
            Whole::Needs(needed) if needed <= rest => size = needed,
            // A record never reaches into the next file.
            Whole::Needs(_) | Whole::Corrupt => {
                return Ok(Chunk::Bad { end: files::next_good(file, at, length)? });
            }
        }
    }
}
