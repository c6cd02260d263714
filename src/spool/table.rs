//! Which segments a spool has, and in which files their bytes lie.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::files::{self, Kind};
use super::{SpoolError, SpoolSegment};
use crate::record::{SegmentId, escape_path};

#[derive(Debug, Default)]
pub(super) struct Table {
    /// Oldest first; the live one, if it has any bytes yet, is the last.
    pub runs: Vec<Run>,
}

/// A segment's run of bytes.
#[derive(Debug)]
pub(super) struct Run {
    pub id: SegmentId,
    pub files: VecDeque<SpoolFile>,
    pub end: Option<u64>,
    /// Below it nothing counts against the budget.
    pub released: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SpoolFile {
    pub start: u64,
    pub end: u64,
    pub path: PathBuf,
}

impl Run {
    pub fn live(id: SegmentId) -> Run {
        Run { id, files: VecDeque::new(), end: None, released: 0 }
    }

    /// Where its synced bytes end.
    pub fn synced(&self) -> u64 {
        self.files.back().map_or(0, |file| file.end)
    }

    pub fn start(&self) -> u64 {
        self.files.front().map_or(0, |file| file.start)
    }

    pub fn describe(&self) -> SpoolSegment {
        SpoolSegment { id: self.id, start: self.start(), end: self.end }
    }
}

impl Table {
    pub fn run(&mut self, id: SegmentId) -> Option<&mut Run> {
        self.runs.iter_mut().find(|run| run.id == id)
    }

    /// Takes out the files that `released` covers; the caller unlinks them, in this order.
    pub fn covered(&mut self, dir: &Path, id: SegmentId) -> Vec<PathBuf> {
        let Some(at) = self.runs.iter().position(|run| run.id == id) else {
            return Vec::new();
        };
        let run = &mut self.runs[at];
        let mut paths = Vec::new();
        // The live segment's last file is still written to.
        let keep = usize::from(run.end.is_none());
        while run.files.len() > keep && run.files[0].end <= run.released {
            paths.extend(run.files.pop_front().map(|file| file.path));
        }
        if let (Some(end), true) = (run.end, run.files.is_empty()) {
            paths.push(dir.join(files::file_name(id, end, Kind::End)));
            self.runs.remove(at);
        }
        paths
    }
}

/// What a start found on disk, made ready to be read.
pub(super) fn recover(dir: &Path) -> Result<Table, SpoolError> {
    let failed = |source| SpoolError::Recover { dir: escape_path(dir), source };
    let mut found: BTreeMap<SegmentId, (BTreeMap<u64, PathBuf>, Option<u64>)> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        match name.to_str().and_then(files::parse_name) {
            Some((id, offset, Kind::Records)) => {
                found.entry(id).or_default().0.insert(offset, entry.path());
            }
            Some((id, offset, Kind::End)) => found.entry(id).or_default().1 = Some(offset),
            None => {
                tracing::debug!(file = %escape_path(&entry.path()), "not a spool file, left alone");
            }
        }
    }
    let mut table = Table::default();
    for (id, (paths, marked_end)) in found {
        if let Some(run) = recover_run(id, paths, marked_end).map_err(failed)? {
            table.runs.push(run);
        } else if let Some(end) = marked_end {
            files::remove(&dir.join(files::file_name(id, end, Kind::End))).map_err(failed)?;
        }
    }
    files::sync_directory(dir).map_err(failed)?;
    Ok(table)
}

fn recover_run(
    id: SegmentId,
    paths: BTreeMap<u64, PathBuf>,
    marked_end: Option<u64>,
) -> io::Result<Option<Run>> {
    let mut run = Run::live(id);
    let starts: Vec<u64> = paths.keys().copied().collect();
    for (number, (start, path)) in paths.into_iter().enumerate() {
        let bound = match starts.get(number + 1) {
            Some(&next) => next.min(marked_end.unwrap_or(next)),
            None => marked_end.unwrap_or(u64::MAX),
        };
        let is_last = number + 1 == starts.len() || marked_end.is_some_and(|end| bound >= end);
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let length = file.metadata()?.len();
        let kept = length.min(bound.saturating_sub(start));
        let kept = if is_last { files::good_end(&file, kept)? } else { kept };
        if is_last && kept < length {
            if marked_end.is_none() {
                tracing::warn!(
                    file = %escape_path(&path), from = start + kept, to = start + length,
                    "spool: torn records at the end of a file are cut off: they were not synced \
                     when the sender died",
                );
            }
            // Durable before the end is told to anyone: the segment ends there at every later
            // start too.
            file.set_len(kept)?;
            file.sync_all()?;
        }
        if is_last && kept == 0 {
            files::remove(&path)?;
        } else {
            run.files.push_back(SpoolFile { start, end: start + kept, path });
        }
    }
    run.end = Some(run.synced());
    run.released = run.start();
    Ok((!run.files.is_empty()).then_some(run))
}
