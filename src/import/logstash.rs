//! Logstash's sincedb: a line per file, `INODE MAJOR MINOR POSITION [TIME [PATH]]`.
//!
//! Lines without time and path come from plugin versions before 4.1.0. TIME is in seconds since
//! 1970, with a fraction.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Identity, ImportError, Position, is_locked};

/// What the names begin with that Logstash chooses itself.
const NAME: &str = ".sincedb";

/// No sincedb is so large: a line for each file has some hundred bytes.
const BYTES_MAX: u64 = 64 << 20;

/// All positions of a sincedb file, or of those in a folder.
pub(super) fn read(path: &Path) -> Result<Vec<Position>, ImportError> {
    let files = if path.is_dir() { in_folder(path)? } else { vec![path.to_owned()] };
    let mut positions = Vec::new();
    for file in files {
        // path.data/plugins/inputs/file/.sincedb_HASH, where no path is configured.
        let lock = file.ancestors().nth(4).map(|data| data.join(".lock"));
        if let Some(lock) = lock.filter(|lock| is_locked(lock)) {
            return Err(ImportError::Running { shipper: "Logstash", lock });
        }
        let unreadable = |error| ImportError::registry(&file, format!("cannot be read: {error}"));
        let metadata = fs::metadata(&file).map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() > BYTES_MAX {
            let reason = "is no sincedb: no file, or one of more than 64 MiB";
            return Err(ImportError::registry(&file, reason));
        }
        let text = fs::read(&file).map_err(unreadable)?;
        let modified = metadata.modified().map_err(unreadable)?;
        for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let whole = line.strip_suffix(b"\n");
            let position = whole.and_then(|line| parse(line, modified)).ok_or_else(|| {
                ImportError::registry(
                    &file,
                    format!(
                        "line {} is none of a sincedb, INODE MAJOR MINOR POSITION [TIME [PATH]]: \
                         is it damaged, or another file?",
                        number + 1
                    ),
                )
            })?;
            positions.push(position);
        }
    }
    Ok(positions)
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let unreadable = |error| ImportError::registry(folder, format!("cannot be read: {error}"));
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.file_name().as_bytes().starts_with(NAME.as_bytes()) {
            files.push(entry.path());
        }
    }
    if files.is_empty() {
        let reason = "holds no .sincedb files: name the folder path.data/plugins/inputs/file, or \
                      the file of sincedb_path";
        return Err(ImportError::registry(folder, reason));
    }
    files.sort();
    Ok(files)
}

fn parse(line: &[u8], modified: SystemTime) -> Option<Position> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse::<u64>().ok();
    let (inode, major, minor, offset) = (number()?, number()?, number()?, number()?);
    let changed = match fields.next() {
        None => modified,
        Some(seconds) => {
            let seconds: f64 = std::str::from_utf8(seconds).ok()?.parse().ok()?;
            UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?
        }
    };
    let path = fields.next().map(|path| PathBuf::from(OsStr::from_bytes(path)));
    if line.contains(&0) {
        // No path has one: a block that never reached the disk.
        return None;
    }
    Some(Position {
        path,
        identity: Identity::Inode { inode, devices: devices(major, minor) },
        offset,
        changed,
        stale: false,
        counts_stored: true,
    })
}

/// What `st_dev` may be. JRuby takes it apart as BSD does, so that on Linux nearly all of it stands
/// in `minor`: device 8:1, 0x801, is written `0 2049`.
fn devices(major: u64, minor: u64) -> Vec<u64> {
    let mut devices = vec![major << 24 | minor];
    if let (Ok(major), Ok(minor)) = (u32::try_from(major), u32::try_from(minor)) {
        devices.push(rustix::fs::makedev(major, minor));
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Position>, String> {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("sincedb");
        fs::write(&file, text).expect("write");
        read(&file).map_err(|error| error.to_string())
    }

    /// Lines as users of the plugin have shown them, and those of its own tests.
    #[test]
    fn every_form_of_a_line_is_read() {
        let text = "1048593 0 64785 640205159\n\
                    14 0 64828 21958106 1527183875.379154 /folder/file2.log\n\
                    53912987 1 4 12 1536236943.678 /a/path/to/log log.log\n\
                    42424242 2 5 42 1519319662.852678\n";
        let positions = read_text(text).expect("positions");
        let paths: Vec<_> = positions.iter().map(|p| p.path.as_deref()).collect();
        let path = |text| Some(Path::new(text));
        assert_eq!(paths, [None, path("/folder/file2.log"), path("/a/path/to/log log.log"), None]);
        let offsets: Vec<u64> = positions.iter().map(|p| p.offset).collect();
        assert_eq!(offsets, [640_205_159, 21_958_106, 12, 42]);
        let Identity::Inode { inode, devices } = &positions[0].identity else { panic!("an inode") };
        // 253:17, a logical volume.
        assert_eq!((*inode, devices.contains(&64785)), (1_048_593, true));
        let Identity::Inode { devices, .. } = &positions[2].identity else { panic!("an inode") };
        assert!(devices.contains(&rustix::fs::makedev(1, 4)));
        let since = positions[1].changed.duration_since(UNIX_EPOCH).expect("after 1970");
        assert_eq!((since.as_secs(), since.subsec_millis()), (1_527_183_875, 379));
        // Without a time of its own, a position is as old as the file.
        assert!(positions[0].changed > positions[1].changed);
    }

    #[test]
    fn what_is_no_sincedb_is_refused_with_its_line() {
        for (text, line) in [
            ("14 0 64785 12\n\u{0}\u{0}\u{0}\n", "line 2"),
            ("14 0 64785 12\n14 0 64785 12 1.0 /a\u{0}\u{0}\n", "line 2"),
            ("14 0 64785 12\n14 0 64785 1", "line 2"),
            ("14 0 64785\n", "line 1"),
            ("14 0 64785 12 soon /a\n", "line 1"),
            ("unknown 0 0 12 1.0 C:/a\n", "line 1"),
        ] {
            let error = read_text(text).expect_err("refused");
            assert!(error.contains(line) && error.contains("INODE MAJOR MINOR"), "{error}");
        }
        assert!(read_text("").expect("an empty one").is_empty());
        let error = read(Path::new("/dev/zero")).expect_err("endless").to_string();
        assert!(error.contains("is no sincedb"), "{error}");
    }

    #[test]
    fn a_folder_stands_for_its_sincedb_files() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = read(dir.path()).expect_err("no file").to_string();
        assert!(error.contains("holds no .sincedb files"), "{error}");
        fs::write(dir.path().join(".sincedb_a1"), "1 0 1 10\n").expect("write");
        fs::write(dir.path().join(".sincedb_b2"), "2 0 1 20\n").expect("write");
        fs::write(dir.path().join("other"), "x\n").expect("write");
        assert_eq!(read(dir.path()).expect("positions").len(), 2);
    }
}
