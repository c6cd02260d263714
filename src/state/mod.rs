//! The sender's durable memory: segment rows and receipted positions.
//!
//! Two classes with two promises. *Rows* are on disk before the first line of their segment is
//! sent ([`State::commit`]); *positions* are saved about once a second ([`State::save`]), and
//! losing the last of them only causes resends. Losing the whole directory costs duplicates, never
//! lines (I5). The directory may be copied while it is in use: every record carries a checksum,
//! and what is torn is ignored.

mod journal;
mod lock;
mod positions;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{info, warn};
use uuid::Uuid;

use crate::record::{Framing, Row, SegmentId, escape_path};

use journal::{Change, Journal};
pub use positions::{Fingerprint, LastReceipted, Place, Progress, Stamp};

/// Rows whose file was not seen for so long are forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

/// A row with what the sender alone needs to know of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// As it goes out with `open`.
    pub row: Row,
    /// The physical run of bytes: all rows of one file or one spool run share it.
    pub run: Uuid,
    /// When the file's inode was made, as in [`Place::born`]: a number that is used again is told from
    /// it before the first position is saved, too.
    #[serde(default)]
    pub born: u64,
    /// The destination at the first `welcome`, where it has an identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Uuid>,
    /// The file was deleted when its receipted prefix ended here: what follows lies in the state
    /// directory. Saved positions may be older, since they are saved later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_from: Option<u64>,
    /// How far the deleted file went when the budget for copies was full: what the copy lacks up to
    /// here is lost if this process ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_short_of: Option<u64>,
    /// What recognises the file before the first position of this row is saved, where the row
    /// passes over what is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_over: Option<Box<Progress>>,
    /// A receiver refused the row, and none can ever have accepted it: nothing is stored under it, so
    /// that a changed configuration, or a clock that was set right, may replace it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refused: bool,
}

impl Entry {
    /// Whether this row, with what is known of it, is one that passes over what is there, and nothing
    /// has come behind it yet.
    pub fn only_passes_over(&self, progress: &Progress) -> bool {
        self.passed_over.as_ref().is_some_and(|passed| {
            passed.position == progress.position && passed.rest == progress.rest
        })
    }

    /// What is known before a position of this row is saved.
    fn first_progress(&self) -> Progress {
        match &self.passed_over {
            Some(progress) => (**progress).clone(),
            None => Progress::at_start(&self.row, self.born),
        }
    }

    /// The same stretch from `start` on under a new segment id: for another identity than the one
    /// under which its lines were sent so far, since the old ids could never be made again, or
    /// would be another sender's.
    pub fn renewed(&self, start: u64) -> Entry {
        let mut renewed = self.clone();
        renewed.row.segment = SegmentId::mint();
        renewed.row.start = start;
        renewed.row.sender = None;
        renewed.row.rule = None;
        renewed.destination = None;
        renewed.passed_over = None;
        renewed.refused = false;
        renewed
    }

    /// The row as it was before its first `welcome`, once it is known that it was refused wherever it
    /// was declared.
    pub fn as_refused(&self) -> Entry {
        let mut refused = self.clone();
        refused.row.sender = None;
        refused.row.rule = None;
        refused.destination = None;
        refused.refused = true;
        refused
    }
}

/// Why a state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another sender holds the lock.
    #[error(
        "state directory {dir} is in use by another waybill send{holder}: stop that one or give \
         this one its own --state-dir"
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// ` (process N)` where known.
        holder: String,
    },
    /// It cannot be made, read or written.
    #[error(
        "state directory {dir}: {what}: {source}: make it writable or choose another --state-dir"
    )]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// The open state directory. All methods may block on the disk.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    inner: Mutex<Inner>,
    /// Held while positions are written: one after the other, so that older ones never replace
    /// newer ones.
    saving: Mutex<()>,
    /// Held for its lock.
    _lock: File,
}

#[derive(Debug)]
struct Inner {
    journal: Journal,
    entries: BTreeMap<SegmentId, Entry>,
    progress: BTreeMap<SegmentId, Progress>,
    sources: BTreeSet<String>,
    surveyed: BTreeSet<String>,
    instance: Uuid,
    last: Option<LastReceipted>,
    /// Positions that are on disk.
    durable: BTreeMap<SegmentId, u64>,
    dirty: bool,
    cloned: bool,
    rebooted: bool,
    /// The journal could not be rewritten when it was to be.
    grows: bool,
}

impl State {
    /// Opens or makes the directory (mode 0700) and takes its lock. `machine` is this machine's
    /// identity (machine-id(5)): where it differs from the one in the directory, the directory was
    /// cloned. Then each row ends at its position and a new one opens there, since the other
    /// machine may go on under the same rows; [`State::was_cloned`] says so.
    pub fn open(dir: &Path, machine: &str) -> Result<State, StateError> {
        let failed = |what| move |source| StateError::Io { dir: dir.to_owned(), what, source };
        let is_new = !dir.exists();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("cannot be made"))?;
        if is_new {
            // A path that was mistyped shows here.
            info!(state_dir = %escape_path(dir), "created: no position is known yet");
        }
        let lock = lock::create(dir)?;
        let (journal, replayed) =
            Journal::open(dir).map_err(failed("its row journal cannot be opened"))?;
        let loaded = positions::load(dir);
        let rebooted = loaded.boot != positions::boot_id();
        let (progress, last) = (loaded.segments, loaded.last);
        let durable = progress.iter().map(|(id, progress)| (*id, progress.position)).collect();
        let mut inner = Inner {
            journal,
            entries: replayed.entries,
            progress,
            last,
            sources: replayed.sources,
            surveyed: replayed.surveyed,
            instance: replayed.instance.unwrap_or_else(Uuid::now_v7),
            durable,
            dirty: false,
            cloned: false,
            rebooted,
            grows: false,
        };
        let known_machine = replayed.machine.as_deref();
        if known_machine != Some(machine) || replayed.instance.is_none() {
            inner.cloned = known_machine.is_some_and(|known| known != machine);
            if inner.cloned {
                inner.instance = Uuid::now_v7();
            }
            let (dropped, rows) =
                if inner.cloned { inner.renew_rows() } else { Default::default() };
            // One write: a directory that names this machine has no row of the other one.
            let change = Change {
                instance: Some(inner.instance),
                machine: Some(machine.to_owned()),
                rows,
                dropped,
                ..Change::default()
            };
            inner.journal.append(&change).map_err(failed("cannot be written"))?;
        }
        inner.compact().map_err(failed("its row journal cannot be rewritten"))?;
        Ok(State {
            dir: dir.to_owned(),
            inner: Mutex::new(inner),
            saving: Mutex::new(()),
            _lock: lock,
        })
    }

    /// What [`State::entries`] would give, without changing the directory: nothing where there is
    /// none. A running sender's is refused here too.
    pub fn read(dir: &Path) -> Result<Vec<(Entry, Progress)>, StateError> {
        let _lock = lock::take_if_there(dir)?;
        let content = journal::Content::read(dir).map_err(|source| StateError::Io {
            dir: dir.to_owned(),
            what: "its row journal cannot be opened",
            source,
        })?;
        Ok(with_progress(&content.replayed.entries, &positions::load(dir).segments))
    }

    /// [`StateError::InUse`] where a sender runs with this directory, which stays as it is.
    pub fn refuse_in_use(dir: &Path) -> Result<(), StateError> {
        lock::refuse(dir)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Identity of this state directory, as `hello` carries it.
    pub fn instance(&self) -> Uuid {
        self.lock().instance
    }

    /// Whether the directory came from another machine, and all its rows are new.
    pub fn was_cloned(&self) -> bool {
        self.lock().cloned
    }

    /// Whether the machine was started anew since the previous process saved its positions: files
    /// may have lost their last bytes.
    pub fn rebooted(&self) -> bool {
        self.lock().rebooted
    }

    /// All rows with their progress, oldest first.
    pub fn entries(&self) -> Vec<(Entry, Progress)> {
        let inner = self.lock();
        with_progress(&inner.entries, &inner.progress)
    }

    /// Makes rows new, changed and dropped durable, in one write that a crash does not divide.
    pub fn commit(&self, changed: &[&Entry], dropped: &[SegmentId]) -> io::Result<()> {
        let mut inner = self.lock();
        let change = Change {
            rows: changed.iter().map(|entry| (*entry).clone()).collect(),
            dropped: dropped.to_vec(),
            ..Change::default()
        };
        inner.journal.append(&change)?;
        for entry in change.rows {
            inner.entries.insert(entry.row.segment, entry);
        }
        for segment in dropped {
            inner.entries.remove(segment);
            inner.progress.remove(segment);
            inner.dirty = true;
        }
        // The change is durable by now: whoever is told otherwise acts on a row that is not there.
        if inner.journal.is_overgrown(inner.entries.len()) {
            let compacted = inner.compact();
            let is_new = !std::mem::replace(&mut inner.grows, compacted.is_err());
            if let Err(error) = compacted
                && is_new
            {
                warn!(dir = %escape_path(&self.dir), %error, "the row journal cannot be rewritten, and grows");
            }
        }
        Ok(())
    }

    /// Whether this source was never followed with this state.
    pub fn is_first_run(&self, source: &str) -> bool {
        !self.lock().sources.contains(source)
    }

    /// Remembers durably that a source has been followed.
    pub fn mark_followed(&self, source: &str) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.sources.contains(source) {
            return Ok(());
        }
        let change = Change { sources: vec![source.to_owned()], ..Change::default() };
        inner.journal.append(&change)?;
        inner.sources.insert(source.to_owned());
        Ok(())
    }

    /// Whether it was never noted which rotated files were there before this source.
    pub fn is_unsurveyed(&self, source: &str) -> bool {
        !self.lock().surveyed.contains(source)
    }

    /// Remembers durably, in one write, which rotated files were there before these sources, and
    /// forgets the rows `dropped`.
    pub fn pass_over(
        &self,
        sources: Vec<String>,
        passed: Vec<Entry>,
        dropped: &[SegmentId],
    ) -> io::Result<()> {
        let mut inner = self.lock();
        let dropped = dropped.to_vec();
        let change = Change { surveyed: sources, rows: passed, dropped, ..Change::default() };
        inner.journal.append(&change)?;
        inner.surveyed.extend(change.surveyed);
        for entry in change.rows {
            inner.entries.insert(entry.row.segment, entry);
        }
        for segment in &change.dropped {
            inner.entries.remove(segment);
            inner.progress.remove(segment);
            inner.dirty = true;
        }
        Ok(())
    }

    /// Notes how far a segment has come; durable after the next [`State::save`].
    pub fn set_progress(&self, segment: SegmentId, progress: Progress) {
        let mut inner = self.lock();
        inner.progress.insert(segment, progress);
        inner.dirty = true;
    }

    /// Notes the newest document of which a receipt came, likewise.
    pub fn note_last_receipted(&self, last: LastReceipted) {
        let mut inner = self.lock();
        inner.last = Some(last);
        inner.dirty = true;
    }

    /// The newest document of which a receipt came, if one was ever noted.
    pub fn last_receipted(&self) -> Option<LastReceipted> {
        self.lock().last.clone()
    }

    /// What is known of a run's bytes without receipt was reported as lost: it is not said again.
    pub fn forget_size(&self, run: Uuid) {
        let mut inner = self.lock();
        let Inner { entries, progress, dirty, .. } = &mut *inner;
        for (segment, _) in entries.iter().filter(|(_, entry)| entry.run == run) {
            if let Some(progress) = progress.get_mut(segment) {
                progress.size = 0;
                *dirty = true;
            }
        }
    }

    /// Notes that the files of these runs are there, and forgets the rows of files that nobody has
    /// seen for 30 days. What a spool or a kept copy holds is not forgotten.
    pub fn saw(&self, present: &BTreeSet<Uuid>) -> io::Result<()> {
        let dropped = {
            let mut inner = self.lock();
            let Inner { entries, progress, dirty, .. } = &mut *inner;
            let now = SystemTime::now();
            let mut dropped = Vec::new();
            for (segment, entry) in entries.iter() {
                if !matches!(entry.row.framing, Framing::Lines { .. }) || entry.kept_from.is_some()
                {
                    continue;
                }
                let progress = progress.entry(*segment).or_insert_with(|| entry.first_progress());
                let seen = UNIX_EPOCH + Duration::from_millis(progress.seen_ms);
                if present.contains(&entry.run) {
                    progress.seen_ms = positions::milliseconds(now);
                    *dirty = true;
                } else if now.duration_since(seen).is_ok_and(|age| age > FORGET_AFTER) {
                    dropped.push(*segment);
                }
            }
            dropped
        };
        if dropped.is_empty() { Ok(()) } else { self.commit(&[], &dropped) }
    }

    /// Makes all noted positions durable; does nothing where nothing changed.
    pub fn save(&self) -> io::Result<()> {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let content = {
            let mut inner = self.lock();
            if !inner.dirty {
                return Ok(());
            }
            inner.dirty = false;
            let live = inner.progress.iter().filter(|(id, _)| inner.entries.contains_key(id));
            let segments = live.map(|(segment, progress)| (*segment, progress.clone())).collect();
            positions::Content { boot: positions::boot_id(), last: inner.last.clone(), segments }
        };
        // Not under the lock: a slow disk must not hold up those who only note a position.
        let saved = positions::save(&self.dir, &content);
        let mut inner = self.lock();
        match &saved {
            Ok(()) => {
                inner.durable = content
                    .segments
                    .iter()
                    .map(|(id, progress)| (*id, progress.position))
                    .collect();
            }
            Err(_) => inner.dirty = true,
        }
        saved
    }

    /// Up to where a run is receipted for good: what lies below is never needed again (I2).
    pub fn durable_position(&self, run: Uuid) -> Option<u64> {
        let inner = self.lock();
        let of_run = inner.entries.values().filter(|entry| entry.run == run);
        let position = |entry: &Entry| {
            let saved = inner.durable.get(&entry.row.segment).copied();
            saved.unwrap_or(entry.row.start).max(entry.row.start)
        };
        of_run.map(position).min()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Ends every row at its position and opens a new one there; gives the old ids and the new
    /// rows. What is receipted up to its end needs none.
    fn renew_rows(&mut self) -> (Vec<SegmentId>, Vec<Entry>) {
        let dropped = self.entries.keys().copied().collect();
        let mut progress = std::mem::take(&mut self.progress);
        for (segment, entry) in std::mem::take(&mut self.entries) {
            let known = progress.remove(&segment);
            let known = known.unwrap_or_else(|| entry.first_progress());
            if entry.row.end.is_some_and(|end| known.position >= end) {
                continue;
            }
            let renewed = entry.renewed(known.position);
            self.progress.insert(renewed.row.segment, known);
            self.entries.insert(renewed.row.segment, renewed);
        }
        self.durable.clear();
        self.dirty = true;
        (dropped, self.entries.values().cloned().collect())
    }

    fn compact(&mut self) -> io::Result<()> {
        let everything = Change {
            instance: Some(self.instance),
            machine: self.journal.machine().map(str::to_owned),
            sources: self.sources.iter().cloned().collect(),
            surveyed: self.surveyed.iter().cloned().collect(),
            rows: self.entries.values().cloned().collect(),
            dropped: Vec::new(),
        };
        self.journal.rewrite(&everything)
    }
}

/// Rows, oldest first, with what is known of each.
fn with_progress(
    entries: &BTreeMap<SegmentId, Entry>,
    progress: &BTreeMap<SegmentId, Progress>,
) -> Vec<(Entry, Progress)> {
    let with_progress = |entry: &Entry| {
        let progress = progress.get(&entry.row.segment).cloned();
        let mut progress = progress.unwrap_or_else(|| entry.first_progress());
        if progress.prefix.length < entry.row.first_bytes.length {
            progress.prefix = entry.row.first_bytes.clone();
        }
        (entry.clone(), progress)
    };
    entries.values().map(with_progress).collect()
}

/// This machine's identity, as machine-id(5) has it; the host name where there is none.
pub fn machine_identity() -> String {
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let id = read("/etc/machine-id").filter(|id| !id.is_empty());
    id.or_else(|| read("/proc/sys/kernel/hostname")).unwrap_or_else(|| {
        warn!("neither /etc/machine-id nor a host name: a cloned state directory goes unnoticed");
        "unknown".to_owned()
    })
}

/// Writes a file so that a crash leaves the old or the new one, and makes its name durable.
fn replace_file(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let file = File::create(&temporary)?;
    io::Write::write_all(&mut &file, bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
pub(crate) mod tests;
