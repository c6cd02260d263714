//! Whether the store's files are still those that were opened.
//!
//! SQLite goes on writing to a file without a name as if nothing had happened; what it commits
//! there is gone with the process. Asked by the store's thread after every commit, before receipts.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::Connection;

/// The file and the write-ahead log beside it, as they were when the store was opened.
#[derive(Debug)]
pub(super) struct Files([(PathBuf, Identity); 2]);

/// Device and inode; `None` where there is no such file.
type Identity = Option<(u64, u64)>;

impl Files {
    /// Of the store at `path` that `connection` has just opened and read.
    pub(super) fn of(path: &Path, connection: &Connection) -> Files {
        // The log lies beside the file itself, not beside a symlink to it.
        let mut log = OsString::from(connection.path().map_or(path, Path::new));
        log.push("-wal");
        Files([path.to_owned(), log.into()].map(|path| {
            let identity = identity(&path);
            (path, identity)
        }))
    }

    /// Whether a new process would find what this one has written.
    pub(super) fn are_there(&self) -> bool {
        self.0.iter().all(|(path, opened)| identity(path) == *opened)
    }
}

fn identity(path: &Path) -> Identity {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
