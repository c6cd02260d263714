//! The lock of a state directory: one sender at a time.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::StateError;

/// The file whose flock(2) says that the directory is in use.
const NAME: &str = "lock";

/// How long a start asks for the lock: `waybill check` has it for a moment.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// Takes the lock, whose file is made where it is missing, and leaves our process id there.
pub(super) fn create(dir: &Path) -> Result<File, StateError> {
    let path = dir.join(NAME);
    let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
    let file = take(dir, file.map_err(|source| failed(dir, source))?, pause)?;
    let _ = file.set_len(0);
    // For the message of the next one only; the lock itself is what counts.
    let _ = io::Write::write_all(&mut &file, std::process::id().to_string().as_bytes());
    Ok(file)
}

/// Takes the lock where a sender has used this directory before.
pub(super) fn take_if_there(dir: &Path) -> Result<Option<File>, StateError> {
    open(dir)?.map(|file| take(dir, file, pause)).transpose()
}

/// Fails where somebody has the lock.
pub(super) fn refuse(dir: &Path) -> Result<(), StateError> {
    let Some(file) = open(dir)? else { return Ok(()) };
    // Shared, so that two who ask do not take each other for a sender.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(in_use(dir)),
        Err(error) => Err(failed(dir, error.into())),
    }
}

fn open(dir: &Path) -> Result<Option<File>, StateError> {
    match File::open(dir.join(NAME)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed(dir, source)),
    }
}

fn pause() {
    std::thread::sleep(PAUSE);
}

fn take(dir: &Path, file: File, mut pause: impl FnMut()) -> Result<File, StateError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => pause(),
            Err(Errno::WOULDBLOCK) => return Err(in_use(dir)),
            Err(error) => return Err(failed(dir, error.into())),
        }
    }
}

/// Whoever holds the lock has left its process id there.
fn in_use(dir: &Path) -> StateError {
    let holder = fs::read_to_string(dir.join(NAME)).unwrap_or_default();
    let holder = match holder.trim() {
        "" => String::new(),
        process => format!(" (process {})", process.escape_debug()),
    };
    StateError::InUse { dir: dir.to_owned(), holder }
}

fn failed(dir: &Path, source: io::Error) -> StateError {
    StateError::Io { dir: dir.to_owned(), what: "its lock cannot be taken", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_is_refused_beside_a_sender_and_takes_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        refuse(dir.path()).expect("no sender was ever here");
        assert!(!dir.path().join(NAME).exists());
        let held = create(dir.path()).expect("the lock");
        let error = refuse(dir.path()).expect_err("in use").to_string();
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        drop(held);
        refuse(dir.path()).expect("free again");
    }

    #[test]
    fn a_start_waits_for_one_who_asks() {
        let dir = tempfile::tempdir().expect("a folder");
        drop(create(dir.path()).expect("the lock"));
        let asking = open(dir.path()).expect("readable").expect("there");
        flock(&asking, FlockOperation::NonBlockingLockShared).expect("shared");
        let mut asking = Some(asking);
        let starting = open(dir.path()).expect("readable").expect("there");
        take(dir.path(), starting, || drop(asking.take())).expect("the lock");
        assert!(asking.is_none(), "it had to wait");
    }
}
