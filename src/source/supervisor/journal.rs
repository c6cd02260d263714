//! What a killed listener must still know: unfinished lines, and the event that was under way.
//!
//! One entry per event, `CRC32C JSON`, is appended and synced before the event's lines are
//! spooled. supervisor sends an event again to whom it has no answer from; the entry then gives it
//! the same time and the same partial lines, hence the same records under the same keys.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lines::{Change, Partials};
use crate::record::escape_path;

/// Beyond this many bytes the file is replaced by a short one.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Names one life of one supervisord; serials count within it.
    pub run: String,
    pub serial: u64,
    pub pool_serial: u64,
    /// When it first came, in milliseconds since 1970.
    pub time_ms: u64,
    /// Events before it were lost.
    pub gap: bool,
    /// What it does to unfinished lines.
    pub changes: Vec<Change>,
}

#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    /// A write failed: what the file ends with is unknown.
    broken: bool,
}

impl Journal {
    /// Opens the file, and reads the unfinished lines before the newest event and that event.
    pub fn open(path: &Path) -> io::Result<(Journal, Partials, Option<Entry>)> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut partials = Partials::default();
        let mut newest: Option<Entry> = None;
        let mut unreadable = 0;
        for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match read_line(line) {
                Some(entry) => {
                    if let Some(before) = newest.replace(entry) {
                        partials.apply(&before.changes);
                    }
                }
                None => unreadable += 1,
            }
        }
        // A torn last line is an event of which nothing was spooled.
        if unreadable > usize::from(!text.ends_with(b"\n")) {
            tracing::warn!(
                file = %escape_path(path), lines = unreadable,
                "unreadable lines in the journal of supervisor's events: unfinished lines may be cut",
            );
        }
        let file = File::options().create(true).append(true).open(path)?;
        let journal = Journal {
            path: path.to_owned(),
            file,
            length: text.len() as u64,
            broken: !text.is_empty() && !text.ends_with(b"\n"),
        };
        Ok((journal, partials, newest))
    }

    /// Makes an entry durable; `before` are the unfinished lines without it. Blocking.
    ///
    /// # Errors
    ///
    /// Then it is to be called again with the same.
    pub fn append(&mut self, before: &Partials, entry: &Entry) -> io::Result<()> {
        if self.broken || self.length > FILE_BYTES_MAX + 2 * before.bytes() as u64 {
            return self.replace(before, entry);
        }
        let line = write_line(entry);
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        match &written {
            Ok(()) => self.length += line.len() as u64,
            // After a failed sync the kernel may have dropped the pages: this tail is not trusted.
            Err(_) => self.broken = true,
        }
        written
    }

    /// Replaces the file by what it comes to, and the entry.
    fn replace(&mut self, before: &Partials, entry: &Entry) -> io::Result<()> {
        let base = Entry { changes: before.snapshot(), ..Entry::default() };
        let text = [write_line(&base), write_line(entry)].concat();
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_data()?;
        fs::rename(&temporary, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        self.file = File::options().append(true).open(&self.path)?;
        (self.length, self.broken) = (text.len() as u64, false);
        Ok(())
    }
}

fn write_line(entry: &Entry) -> Vec<u8> {
    let json = serde_json::to_vec(entry).expect("entries have string keys only");
    let mut line = format!("{:08x} ", crc32c::crc32c(&json)).into_bytes();
    line.extend_from_slice(&json);
    line.push(b'\n');
    line
}

fn read_line(line: &[u8]) -> Option<Entry> {
    let (checksum, json) = line.split_first_chunk::<9>()?;
    let checksum = std::str::from_utf8(checksum).ok()?.strip_suffix(' ')?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (crc32c::crc32c(json) == checksum).then(|| serde_json::from_slice(json).ok())?
}

#[cfg(test)]
mod tests {
    use super::super::lines::Channel;
    use super::*;

    fn entry(serial: u64, keep: bool, tail: &str) -> Entry {
        let channel = Channel {
            group: "g".to_owned(),
            process: "p".to_owned(),
            channel: "stdout".to_owned(),
        };
        let change = Change { channel, pid: "1".to_owned(), keep, tail: tail.to_owned() };
        Entry { run: "run".to_owned(), serial, changes: vec![change], ..Entry::default() }
    }

    #[test]
    fn the_newest_entry_is_told_apart_and_a_torn_one_forgotten() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("events");
        let (mut journal, before, newest) = Journal::open(&path).expect("open");
        assert_eq!((before.bytes(), newest), (0, None));
        journal.append(&before, &entry(1, false, "YWJj")).expect("append");
        journal.append(&before, &entry(2, true, "ZGVm")).expect("append");
        drop(journal);
        let (mut journal, before, newest) = Journal::open(&path).expect("open");
        assert_eq!((before.bytes(), newest.expect("an entry").serial), (3, 2));
        journal.append(&before, &entry(3, true, "ZGVm")).expect("append");
        drop(journal);
        // Cut anywhere, the last entry alone is gone, and the next is not swallowed by it.
        let text = fs::read(&path).expect("read");
        fs::write(&path, &text[..text.len() - 5]).expect("write");
        let (mut journal, before, newest) = Journal::open(&path).expect("open");
        assert_eq!((before.bytes(), newest.expect("an entry").serial), (3, 2));
        journal.append(&before, &entry(4, true, "")).expect("append");
        let (_, before, newest) = Journal::open(&path).expect("open");
        assert_eq!((before.bytes(), newest.expect("an entry").serial), (3, 4));
    }

    #[test]
    fn the_file_stays_short() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("events");
        let (mut journal, mut partials, _) = Journal::open(&path).expect("open");
        let tail = "QUFB".repeat(64 << 10);
        for serial in 0..40 {
            let entry = entry(serial, false, &tail);
            journal.append(&partials, &entry).expect("append");
            partials.apply(&entry.changes);
        }
        assert!(fs::metadata(&path).expect("file").len() < 6 << 20);
        let (_, before, newest) = Journal::open(&path).expect("open");
        assert_eq!((before, newest.expect("an entry").serial), (partials, 39));
    }
}
