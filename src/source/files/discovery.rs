//! Finding files: patterns swept each second, with inotify(7) as a hint to sweep sooner.
//!
//! The sweep alone is enough: an overflowing inotify queue, a file system without it (NFS) or a
//! folder that appears later costs a second, never a file.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tracing::debug;

use crate::descriptors;

/// How often patterns are swept without a hint.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What a pattern names now.
#[derive(Debug, Default)]
pub struct Sweep {
    /// In order.
    pub paths: Vec<PathBuf>,
    /// Folders that cannot be listed, which may become readable later.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

/// Looks for what an absolute pattern names. In names that are not UTF-8, a wildcard matches any
/// byte.
pub fn sweep(pattern: &str) -> Sweep {
    if !has_wildcard(pattern) {
        return Sweep { paths: vec![PathBuf::from(pattern)], unreadable: Vec::new() };
    }
    let mut paths = vec![PathBuf::from("/")];
    let mut unreadable = Vec::new();
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        paths = match part {
            "**" => folders_below(paths, &mut unreadable),
            _ if !has_wildcard(part) => paths.iter().map(|path| path.join(part)).collect(),
            _ => match glob::Pattern::new(part) {
                Ok(part) => paths
                    .iter()
                    .flat_map(|folder| matching(folder, &part, &mut unreadable))
                    .collect(),
                // The configuration was checked; nothing matches a pattern that is none.
                Err(_) => Vec::new(),
            },
        };
    }
    paths.retain(|path| path.symlink_metadata().is_ok());
    paths.sort();
    paths.dedup();
    Sweep { paths, unreadable }
}

fn matching(
    folder: &Path,
    pattern: &glob::Pattern,
    unreadable: &mut Vec<(PathBuf, io::Error)>,
) -> Vec<PathBuf> {
    match list(folder) {
        Ok(names) => names
            .into_iter()
            .filter(|name| pattern.matches(&name.to_string_lossy()))
            .map(|name| folder.join(name))
            .collect(),
        Err(error) => {
            unreadable.push((folder.to_owned(), error));
            Vec::new()
        }
    }
}

/// Whether a pattern would name this path, were it there.
pub fn would_name(pattern: &str, path: &Path) -> bool {
    if !has_wildcard(pattern) {
        return Path::new(pattern) == path;
    }
    let options = glob::MatchOptions { require_literal_separator: true, ..Default::default() };
    glob::Pattern::new(pattern)
        .is_ok_and(|pattern| pattern.matches_with(&path.to_string_lossy(), options))
}

/// The names in a folder, as far as it may be read.
///
/// # Errors
///
/// For want of descriptors: then nothing is known of it.
pub fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    match list(folder) {
        Err(error) if descriptors::advice(&error).is_none() => {
            debug!(folder = %folder.display(), %error, "not searched");
            Ok(Vec::new())
        }
        names => names,
    }
}

/// The names in a folder; none in what is no folder.
fn list(folder: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.file_name()).collect()),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(Vec::new()),
            _ => Err(error),
        },
    }
}

/// These folders and all below them, each once: links may form a circle. What is there is met
/// before what is linked.
fn folders_below(
    folders: Vec<PathBuf>,
    unreadable: &mut Vec<(PathBuf, io::Error)>,
) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next = VecDeque::from(folders);
    while let Some(folder) = next.pop_front() {
        let Ok(metadata) = fs::metadata(&folder) else { continue };
        if !metadata.is_dir() || !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        match fs::read_dir(&folder) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    match entry.file_type() {
                        Ok(kind) if kind.is_dir() => next.push_front(entry.path()),
                        Ok(kind) if kind.is_symlink() => next.push_back(entry.path()),
                        _ => {}
                    }
                }
            }
            Err(error) => {
                unreadable.push((folder, error));
                continue;
            }
        }
        all.push(folder);
    }
    all
}

/// Whether a pattern is more than a path.
pub fn has_wildcard(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// Watches folders for any change in them.
#[derive(Debug)]
pub struct Hints {
    inotify: Option<AsyncFd<Inotify>>,
    watched: BTreeSet<PathBuf>,
}

impl Hints {
    /// Without inotify (a limit is reached), sweeping alone has to do.
    pub fn new() -> Hints {
        // SAFETY: `Inotify` owns its descriptor and gives out the same one for as long as it lives.
        let register = |inotify| unsafe { AsyncFd::register(inotify) }.map_err(io::Error::from);
        let inotify = Inotify::init().and_then(register);
        let inotify = inotify
            .inspect_err(|error| debug!(%error, "no inotify: files are polled each second"))
            .ok();
        Hints { inotify, watched: BTreeSet::new() }
    }

    /// Watches a folder, once.
    pub fn watch(&mut self, folder: &Path) {
        let Some(inotify) = &mut self.inotify else { return };
        if self.watched.contains(folder) {
            return;
        }
        let mask = WatchMask::MODIFY
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ONLYDIR;
        match inotify.get_mut().watches().add(folder, mask) {
            Ok(_) => {
                self.watched.insert(folder.to_owned());
            }
            Err(error) => debug!(folder = %folder.display(), %error, "polled each second"),
        }
    }

    /// Returns when something happened in a watched folder; never where nothing is watched.
    /// Dropping the future loses at most a hint.
    pub async fn changed(&mut self) {
        let Some(inotify) = &mut self.inotify else { return std::future::pending().await };
        let mut buffer = [0; 16 << 10];
        let read = async {
            let mut ready = inotify.readable_mut().await?;
            // One read, and not until nothing is left: a busy writer adds events as fast as they
            // are read. The rest is the next hint.
            match ready.get_inner_mut().read_events(&mut buffer) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Err(error),
            }
            io::Result::Ok(())
        };
        if let Err(error) = read.await {
            debug!(%error, "inotify failed: files are polled each second");
            self.inotify = None;
        }
    }
}

impl Default for Hints {
    fn default() -> Hints {
        Hints::new()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn patterns_match_later_files() {
        let dir = tempfile::tempdir().expect("a folder");
        let pattern = format!("{}/**/*.log", dir.path().display());
        assert!(sweep(&pattern).paths.is_empty());
        fs::create_dir(dir.path().join("sub")).expect("folder");
        fs::write(dir.path().join("sub/a.log"), "x\n").expect("write");
        fs::write(dir.path().join("b.log.1"), "x\n").expect("write");
        assert_eq!(sweep(&pattern).paths, [dir.path().join("sub/a.log")]);
        assert!(would_name(&pattern, &dir.path().join("sub/later.log")));
        assert!(!would_name(&pattern, &dir.path().join("b.log.1")));
        let path = dir.path().join("a[1].log");
        let literal = glob::Pattern::escape(&path.to_string_lossy());
        assert!(would_name(&literal, &path) && !would_name(&literal, &dir.path().join("a1.log")));
    }

    #[test]
    fn names_that_are_not_utf_8_match() {
        let dir = tempfile::tempdir().expect("a folder");
        let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.log"));
        fs::write(&odd, "x\n").expect("write");
        let folder = dir.path().display();
        assert_eq!(sweep(&format!("{folder}/*.log")).paths, std::slice::from_ref(&odd));
        assert_eq!(sweep(&format!("{folder}/caf?.log")).paths, [odd]);
        assert!(sweep(&format!("{folder}/*.txt")).paths.is_empty());
    }

    #[test]
    fn links_in_a_circle_end() {
        let dir = tempfile::tempdir().expect("a folder");
        fs::create_dir(dir.path().join("sub")).expect("folder");
        fs::write(dir.path().join("sub/a.log"), "x\n").expect("write");
        std::os::unix::fs::symlink("..", dir.path().join("sub/up")).expect("link");
        let found = sweep(&format!("{}/**/a.log", dir.path().display())).paths;
        assert_eq!(found, [dir.path().join("sub/a.log")]);
    }

    /// Otherwise whoever follows a busy folder would neither read its files nor stop.
    #[tokio::test]
    async fn a_folder_that_never_rests_gives_hints_all_the_same() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut hints = Hints::new();
        hints.watch(dir.path());
        let over = Arc::new(AtomicBool::new(false));
        let writers = ["a.log", "b.log"].map(|name| {
            let (over, path) = (over.clone(), dir.path().join(name));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    fs::write(&path, "x\n").expect("write");
                }
            })
        });
        for _ in 0..200 {
            hints.changed().await;
        }
        over.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().expect("a writer");
        }
    }

    #[tokio::test]
    async fn a_write_is_a_hint() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut hints = Hints::new();
        hints.watch(dir.path());
        fs::write(dir.path().join("a.log"), "x\n").expect("write");
        tokio::time::timeout(Duration::from_secs(20), hints.changed()).await.expect("a hint");
    }
}
