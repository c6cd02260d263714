//! The row journal: one change per line, `CRC32C JSON`, appended and synced.
//!
//! A line is one durable write: a crash leaves it whole or unreadable, and an unreadable one is
//! skipped. The sender that finds a torn line has not sent anything under it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;
use uuid::Uuid;

use super::{Entry, replace_file};
use crate::record::SegmentId;

const NAME: &str = "rows";

/// One line of the journal.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Change {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub surveyed: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<SegmentId>,
}

/// What the journal said when it was opened.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    pub instance: Option<Uuid>,
    pub machine: Option<String>,
    pub sources: BTreeSet<String>,
    pub surveyed: BTreeSet<String>,
    pub entries: BTreeMap<SegmentId, Entry>,
}

#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    file: File,
    /// Length of what is known to be good and synced.
    length: u64,
    /// Lines since the last rewrite.
    lines: usize,
    machine: Option<String>,
    /// A write or sync failed: the file's tail is unknown, so the next append rewrites it.
    broken: bool,
}

impl Journal {
    pub fn open(dir: &Path) -> io::Result<(Journal, Replayed)> {
        let Content { text, lines, replayed } = Content::read(dir)?;
        let file = File::options().create(true).append(true).open(dir.join(NAME))?;
        let journal = Journal {
            dir: dir.to_owned(),
            file,
            length: text.len() as u64,
            lines,
            machine: replayed.machine.clone(),
            // A torn last line must not swallow the next one.
            broken: !text.is_empty() && !text.ends_with(b"\n"),
        };
        Ok((journal, replayed))
    }

    pub fn machine(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    pub fn is_overgrown(&self, live: usize) -> bool {
        self.lines > 1000 + 4 * live
    }

    /// Appends one change and syncs it. On an error nothing of it is kept.
    pub fn append(&mut self, change: &Change) -> io::Result<()> {
        if self.broken {
            self.repair()?;
        }
        let line = write_line(change);
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // After a failed sync the kernel may have dropped the pages: never trust this tail.
            self.broken = true;
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += line.len() as u64;
        self.lines += 1;
        if let Some(machine) = &change.machine {
            self.machine = Some(machine.clone());
        }
        Ok(())
    }

    /// Replaces the journal by one line that says everything.
    pub fn rewrite(&mut self, everything: &Change) -> io::Result<()> {
        let line = write_line(everything);
        let rewritten =
            replace_file(&self.dir, NAME, &line).and_then(|()| self.reopen(line.len() as u64, 1));
        if rewritten.is_err() {
            // After the rename the file that is open has no name any more.
            self.broken |= self.file.metadata().map_or(true, |file| file.nlink() == 0);
        }
        rewritten
    }

    /// Copies the good lines into a new file.
    fn repair(&mut self) -> io::Result<()> {
        let text = fs::read(self.dir.join(NAME))?;
        let mut good = Vec::with_capacity(text.len());
        let mut lines = 0;
        let known = &text[..text.len().min(self.length as usize)];
        for line in known.split(|&byte| byte == b'\n').filter(|line| read_line(line).is_some()) {
            good.extend_from_slice(line);
            good.push(b'\n');
            lines += 1;
        }
        replace_file(&self.dir, NAME, &good)?;
        self.reopen(good.len() as u64, lines)
    }

    fn reopen(&mut self, length: u64, lines: usize) -> io::Result<()> {
        self.file = File::options().append(true).open(self.dir.join(NAME))?;
        (self.length, self.lines, self.broken) = (length, lines, false);
        Ok(())
    }
}

/// The journal as it lies on the disk.
pub(super) struct Content {
    text: Vec<u8>,
    lines: usize,
    pub replayed: Replayed,
}

impl Content {
    /// Reads it; a journal that is not there is an empty one.
    pub fn read(dir: &Path) -> io::Result<Content> {
        let path = dir.join(NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut replayed = Replayed::default();
        let mut unreadable = 0;
        let mut lines = 0;
        for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match read_line(line) {
                Some(change) => replayed.apply(change),
                None => unreadable += 1,
            }
            lines += 1;
        }
        if unreadable > 0 {
            warn!(file = %path.display(), lines = unreadable,
                "unreadable lines in the row journal: what they named is sent again");
        }
        Ok(Content { text, lines, replayed })
    }
}

impl Replayed {
    fn apply(&mut self, change: Change) {
        self.instance = change.instance.or(self.instance);
        self.machine = change.machine.or(self.machine.take());
        self.sources.extend(change.sources);
        self.surveyed.extend(change.surveyed);
        for entry in change.rows {
            self.entries.insert(entry.row.segment, entry);
        }
        for segment in &change.dropped {
            self.entries.remove(segment);
        }
    }
}

fn write_line(change: &Change) -> Vec<u8> {
    let json = serde_json::to_vec(change).expect("changes have string keys only");
    let mut line = format!("{:08x} ", crc32c::crc32c(&json)).into_bytes();
    line.extend_from_slice(&json);
    line.push(b'\n');
    line
}

fn read_line(line: &[u8]) -> Option<Change> {
    let (checksum, json) = line.split_first_chunk::<9>()?;
    let checksum = std::str::from_utf8(checksum).ok()?.strip_suffix(' ')?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (crc32c::crc32c(json) == checksum).then(|| serde_json::from_slice(json).ok())?
}
