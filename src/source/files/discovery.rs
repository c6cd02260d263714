//! Finding files: patterns swept each second, with inotify(7) as a hint to sweep sooner.
//!
//! The sweep alone is enough: an overflowing inotify queue, a file system without it (NFS) or a
//! folder that appears later costs a second, never a file.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tracing::debug;

/// How often patterns are swept without a hint.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The paths that a pattern names now, in order. Unreadable folders are passed over: they may
/// become readable later.
pub fn sweep(pattern: &str) -> Vec<PathBuf> {
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: false,
    };
    if !has_wildcard(pattern) {
        return vec![PathBuf::from(pattern)];
    }
    match glob::glob_with(pattern, options) {
        Ok(paths) => paths.filter_map(Result::ok).collect(),
        // The configuration was checked; nothing matches a pattern that is none.
        Err(_) => Vec::new(),
    }
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
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn patterns_match_later_files() {
        let dir = tempfile::tempdir().expect("a folder");
        let pattern = format!("{}/**/*.log", dir.path().display());
        assert!(sweep(&pattern).is_empty());
        fs::create_dir(dir.path().join("sub")).expect("folder");
        fs::write(dir.path().join("sub/a.log"), "x\n").expect("write");
        fs::write(dir.path().join("b.log.1"), "x\n").expect("write");
        assert_eq!(sweep(&pattern), [dir.path().join("sub/a.log")]);
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
