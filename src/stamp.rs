//! Noticing that a small file was replaced or edited, without reading it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What changes with every replacement and every edit in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file as it is now, behind symbolic links; `None` where it is not there.
    pub fn of(file: &Path) -> Option<Stamp> {
        let meta = std::fs::metadata(file).ok()?;
        Some(Stamp {
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_and_editing_change_the_stamp() {
        let dir = tempfile::tempdir().expect("a folder");
        let (file, other) = (dir.path().join("file"), dir.path().join("other"));
        assert_eq!(Stamp::of(&file), None);
        std::fs::write(&file, "one").expect("write");
        let first = Stamp::of(&file);
        assert!(first.is_some() && first == Stamp::of(&file));
        std::fs::write(&other, "two").expect("write");
        std::fs::rename(&other, &file).expect("rename");
        let replaced = Stamp::of(&file);
        assert_ne!(replaced, first);
        std::fs::write(&file, "more").expect("write");
        assert_ne!(Stamp::of(&file), replaced);
    }
}
