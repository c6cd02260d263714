//! The thread that makes a spool's records durable, group by group.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::files::{self, Kind};
use super::table::{Run, SpoolFile};
use super::{Shared, Throttle};
use crate::backoff::Backoff;
use crate::descriptors;
use crate::record::{END_MAX, SegmentId, escape_path};

/// A file of this many bytes is full; its last group may reach over it.
const FILE_BYTES: u64 = 16 << 20;

/// What the spool leaves free on its disk, in bytes.
const ROOM_BYTES_MIN: u64 = 1 << 20;

/// A buffer above this is given back after a burst.
const SPARE_BYTES_MAX: usize = 1 << 20;

/// Writes to the live segment; nobody else does.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    segment: SegmentId,
    /// Where the live segment's synced bytes end.
    pub(super) offset: u64,
    file: Option<LiveFile>,
    /// The live file may hold bytes that a failed write or sync left in doubt.
    broken: bool,
    trouble: Throttle,
    pub(super) file_bytes: u64,
}

#[derive(Debug)]
struct LiveFile {
    file: File,
    path: PathBuf,
    start: u64,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, segment: SegmentId) -> Writer {
        Writer {
            shared,
            segment,
            offset: 0,
            file: None,
            broken: false,
            trouble: Throttle::default(),
            file_bytes: FILE_BYTES,
        }
    }

    pub fn run(mut self) {
        let mut spare = Vec::new();
        while let Some(group) = self.shared.queue.take(spare) {
            if !self.commit_patiently(&group.bytes) {
                tracing::error!(
                    dir = %escape_path(&self.shared.dir),
                    bytes = self.shared.queue.appended() - self.shared.watermark.borrow().synced,
                    "spool: stopped while its disk refuses writes: not all of these bytes are kept",
                );
                break;
            }
            if group.ends_segment {
                self.end_segment();
            }
            spare = group.bytes;
            spare.clear();
            spare.shrink_to(SPARE_BYTES_MAX);
        }
        self.shared.watermark.send_modify(|mark| mark.ended = true);
    }

    /// Tries until the group is durable; meanwhile the queue fills and the source is not read.
    /// `false`: the spool was closed and a last attempt failed too.
    fn commit_patiently(&mut self, bytes: &[u8]) -> bool {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let was_broken = self.broken;
            let Err(error) = self.commit(bytes) else {
                return true;
            };
            if let Some(times) = self.trouble.count() {
                let advice =
                    descriptors::advice(&error).unwrap_or("make room on the disk, or mend it");
                tracing::error!(
                    dir = %escape_path(&self.shared.dir), %error, times,
                    "spool: cannot write; its source is read no further until this succeeds: {advice}",
                );
            }
            // A file that just broke is left for a fresh one at once.
            let retry_now = self.broken && !was_broken;
            if !retry_now && !self.shared.queue.linger(backoff.delay()) {
                return self.commit(bytes).is_ok();
            }
        }
    }

    /// Writes whole records behind the synced ones, syncs, and moves the watermark.
    ///
    /// # Errors
    ///
    /// Then nothing of it counts as written, and it is to be called again with the same bytes.
    pub fn commit(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.broken {
            self.abandon_file()?;
        }
        if self.offset + bytes.len() as u64 > END_MAX {
            self.end_segment();
        }
        self.open_file()?;
        let Some(live) = &self.file else {
            return Err(io::Error::other("the spool has no open file"));
        };
        let room = check_room(&live.file, bytes.len());
        let written = room.and_then(|()| live.file.write_all_at(bytes, self.offset - live.start));
        if let Err(error) = written {
            // After "no space" the same bytes could go to the same place later. But a live file is
            // never unlinked, so one that holds records would keep the room that their receipts
            // are to make.
            self.broken = !is_full(&error) || self.offset > live.start;
            return Err(error);
        }
        if let Err(error) = live.file.sync_data() {
            self.broken = true;
            return Err(error);
        }
        let end = self.offset + bytes.len() as u64;
        let file = SpoolFile { start: live.start, end, path: live.path.clone() };
        self.offset = end;
        self.publish(file, bytes.len() as u64);
        Ok(())
    }

    /// Makes sure that there is a live file with room.
    pub fn open_file(&mut self) -> io::Result<()> {
        if self.file.as_ref().is_none_or(|live| self.offset - live.start >= self.file_bytes) {
            self.file = None;
            let name = files::file_name(self.segment, self.offset, Kind::Records);
            let (file, path) = files::create(&self.shared.dir, &name)?;
            self.file = Some(LiveFile { file, path, start: self.offset });
        }
        Ok(())
    }

    fn publish(&self, file: SpoolFile, bytes: u64) {
        {
            let mut table = self.shared.table();
            if let Some(run) = table.run(self.segment) {
                match run.files.back_mut() {
                    Some(last) if last.start == file.start => last.end = file.end,
                    _ => run.files.push_back(file),
                }
            }
        }
        self.shared.watermark.send_modify(|mark| {
            mark.offset = self.offset;
            mark.synced += bytes;
        });
    }

    /// Ends the live segment behind its synced bytes and starts another.
    fn end_segment(&mut self) {
        self.file = None;
        if self.offset > 0 {
            self.next_segment();
        }
    }

    /// Leaves a file whose last write or sync failed: the segment ends at its synced bytes, for
    /// every later start too, since what lies behind them is written again under other offsets.
    fn abandon_file(&mut self) -> io::Result<()> {
        if let Some(live) = &self.file {
            if self.offset > live.start {
                let name = files::file_name(self.segment, self.offset, Kind::End);
                files::create(&self.shared.dir, &name)?;
                // Only to be tidy: the marker is what counts.
                let _ = live.file.set_len(self.offset - live.start);
            } else {
                files::remove(&live.path)?;
                files::sync_directory(&self.shared.dir)?;
            }
            tracing::error!(
                file = %escape_path(&live.path), synced = self.offset,
                "spool: this file is given up after a failed write; what was not synced is \
                 written to a new one",
            );
        }
        self.file = None;
        self.broken = false;
        if self.offset > 0 {
            self.next_segment();
        }
        Ok(())
    }

    fn next_segment(&mut self) {
        let ended = std::mem::replace(&mut self.segment, SegmentId::mint());
        let paths = {
            let mut table = self.shared.table();
            if let Some(run) = table.run(ended) {
                run.end = Some(self.offset);
            }
            table.runs.push(Run::live(self.segment));
            // What is receipted to the end by now has nobody left to release it.
            table.covered(&self.shared.dir, ended)
        };
        self.offset = 0;
        for path in paths {
            if let Err(error) = files::remove(&path) {
                tracing::warn!(file = %escape_path(&path), %error, "spool: cannot unlink");
            }
        }
        self.shared.watermark.send_modify(|mark| {
            mark.segment = self.segment;
            mark.offset = 0;
        });
    }
}

#[cfg(test)]
impl Writer {
    /// Lets the next writes go to another file, a device that fails; answers the real one.
    pub fn replace_file(&mut self, device: &std::path::Path) -> File {
        let other = std::fs::OpenOptions::new().write(true).open(device).expect("device");
        self.put_file(other)
    }

    /// Puts the real file back.
    pub fn put_file(&mut self, file: File) -> File {
        let live = self.file.as_mut().expect("a live file");
        std::mem::replace(&mut live.file, file)
    }
}

/// The spool leaves the last of a disk to the positions: without them no receipt could ever unlink
/// one of its files, and a spool that filled its disk would stay full for ever.
fn check_room(file: &File, bytes: usize) -> io::Result<()> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM_BYTES_MIN + bytes as u64 {
        return Err(io::Error::from(io::ErrorKind::StorageFull));
    }
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
