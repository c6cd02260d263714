//! Copies of deleted files: what was not receipted when the last name went away.
//!
//! While we run, the open descriptor keeps the file; the copy is for the next process. Hard links
//! would do the same for less, and stop logrotate and gzip.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::Context;
use super::origin::KeptOrigin;
use crate::source::files::fingerprint::FINGERPRINT_BYTES;
use crate::source::files::tail::Tail;

/// A copy being made.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    position: u64,
    from: u64,
    until: u64,
}

impl Kept {
    /// Starts a copy of a run whose receipted prefix ends at `position`.
    pub fn create(context: &Context, run: Uuid, position: u64) -> io::Result<Kept> {
        let folder = folder(context.state.dir());
        fs::create_dir_all(&folder)?;
        let path = path(context.state.dir(), run, position);
        File::create(&path)?;
        File::open(&folder)?.sync_all()?;
        let from = first_byte(position);
        Ok(Kept { path, position, from, until: from })
    }

    /// The copy that a former process made.
    pub fn open(dir: &Path, run: Uuid, position: u64) -> io::Result<(Kept, KeptOrigin)> {
        let path = path(dir, run, position);
        let from = first_byte(position);
        let file = File::open(&path)?;
        let until = from + file.metadata()?.len();
        let origin = KeptOrigin { file, from };
        Ok((Kept { path, position, from, until }, origin))
    }

    /// Where the receipted prefix ended when the copy was made.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How many bytes were copied.
    pub fn length(&self) -> u64 {
        self.until - self.from
    }

    /// One past the last byte copied.
    pub fn until(&self) -> u64 {
        self.until
    }

    /// Copies and syncs up to `size`, within the budget; `false` where it is exhausted.
    pub fn copy(&mut self, context: &Context, tail: &mut Tail, size: u64) -> io::Result<bool> {
        // Not held open: its stream holds a descriptor already.
        let file = File::options().write(true).open(&self.path)?;
        let mut buffer = vec![0; 256 << 10];
        let mut complete = true;
        while self.until < size {
            let used = context.kept_bytes.load(Ordering::Relaxed);
            let room = context.config.kept_bytes_max.saturating_sub(used);
            let wanted = (size - self.until).min(room).min(buffer.len() as u64) as usize;
            if wanted == 0 {
                complete = false;
                break;
            }
            let read = tail.read_at(self.until, &mut buffer[..wanted])?;
            if read == 0 {
                break;
            }
            // At its offset: an attempt that failed in the middle leaves nothing behind.
            file.write_all_at(&buffer[..read], self.until - self.from)?;
            self.until += read as u64;
            context.kept_bytes.fetch_add(read as u64, Ordering::Relaxed);
        }
        file.sync_data()?;
        Ok(complete)
    }

    /// Removes the copy: everything in it is receipted, and its rows are forgotten durably.
    pub fn remove(self, context: &Context) -> io::Result<()> {
        context.kept_bytes.fetch_sub(
            (self.until - self.from).min(context.kept_bytes.load(Ordering::Relaxed)),
            Ordering::Relaxed,
        );
        fs::remove_file(&self.path)
    }
}

fn folder(dir: &Path) -> PathBuf {
    dir.join("kept")
}

fn path(dir: &Path, run: Uuid, position: u64) -> PathBuf {
    folder(dir).join(format!("{run}-{position:016x}"))
}

/// A copy has the bytes before its position too, by which that is recognised.
fn first_byte(position: u64) -> u64 {
    position.saturating_sub(FINGERPRINT_BYTES as u64)
}

/// Removes copies that no row names, left by a crash between two writes.
pub fn sweep(dir: &Path, named: &[(Uuid, u64)]) {
    let named: Vec<PathBuf> = named.iter().map(|(run, at)| path(dir, *run, *at)).collect();
    for entry in fs::read_dir(folder(dir)).into_iter().flatten().flatten() {
        if !named.contains(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
