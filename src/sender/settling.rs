//! Rotated files outside of every pattern that may be copies in the making. No sweep meets them by
//! itself, so they are kept in mind until they have settled, and are looked at again then: such a
//! file may as well be a short generation that came and went unseen.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::follow::Stamp;

/// Paths with the number of their source, how they were, and since when.
#[derive(Debug, Default)]
pub struct Settling(HashMap<PathBuf, (usize, Stamp, Instant)>);

impl Settling {
    /// Keeps a file in mind.
    pub fn add(&mut self, path: PathBuf, source: usize) {
        if let Ok(metadata) = fs::metadata(&path) {
            self.0.insert(path, (source, Stamp::of(&metadata), Instant::now()));
        }
    }

    /// Those that have not changed for so long, to be looked at once more. One that is gone is
    /// forgotten: if it was renamed, the rotation that did it brings it up again.
    pub fn take(&mut self, unchanged_for: Duration) -> Vec<(PathBuf, usize)> {
        let mut settled = Vec::new();
        self.0.retain(|path, (source, known, since)| {
            let Ok(metadata) = fs::metadata(path) else { return false };
            let stamp = Stamp::of(&metadata);
            if stamp != *known {
                (*known, *since) = (stamp, Instant::now());
            }
            let is_settled = since.elapsed() >= unchanged_for;
            if is_settled {
                settled.push((path.clone(), *source));
            }
            !is_settled
        });
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_up_once_and_only_unchanged() {
        let dir = tempfile::tempdir().expect("a folder");
        let (one, gone) = (dir.path().join("a.log.1"), dir.path().join("a.log.2"));
        let mut settling = Settling::default();
        for path in [&one, &gone] {
            fs::write(path, "x\n").expect("written");
            settling.add(path.clone(), 3);
        }
        fs::remove_file(&gone).expect("removed");
        assert_eq!(settling.take(Duration::from_secs(3600)), []);
        assert_eq!(settling.take(Duration::ZERO), [(one.clone(), 3)]);
        assert_eq!(settling.take(Duration::ZERO), []);
        settling.add(one.clone(), 3);
        let before = settling.0[&one].2;
        fs::write(&one, "longer\n").expect("written");
        assert_eq!(settling.take(Duration::from_secs(3600)), []);
        assert!(settling.0[&one].2 > before, "a change starts the time anew");
    }
}
