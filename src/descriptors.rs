//! How many files may be open at a time, shared out.
//!
//! Followed files and peers have their shares of the system's limit (RLIMIT_NOFILE), so that a flood
//! of either never takes the last descriptor from the state, the spool, the store or the way to the
//! other side (I7).

use std::io;
use std::sync::{Arc, LazyLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Semaphore;

/// More than any machine has, and less than a semaphore takes.
const LIMIT_MAX: usize = 1 << 24;

/// What a person does about too low a limit.
pub const ADVICE: &str = "raise the limit of open files (LimitNOFILE= in the unit, ulimit -n)";

/// Lets the process open as many files as the hard limit allows: the soft one, often 1024, is for
/// programs that call `select`. To be called before anything asks for its share.
///
/// # Errors
///
/// Where the system refuses; the soft limit stays.
pub fn raise_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

fn limit() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(LIMIT_MAX).min(LIMIT_MAX)
}

/// How many files a sender follows at a time: half of all descriptors.
pub fn followed_max() -> usize {
    (limit() / 2).max(1)
}

/// How many more are opened for a moment to tell files apart.
pub fn compared_max() -> usize {
    (limit() / 8).max(1)
}

/// The connections of all sources of a sender: a quarter.
pub fn source_connections() -> Arc<Semaphore> {
    static CONNECTIONS: LazyLock<Arc<Semaphore>> =
        LazyLock::new(|| Arc::new(Semaphore::new((limit() / 4).max(1))));
    Arc::clone(&CONNECTIONS)
}

/// The connections of one source: no more than half of the above, since others want some too.
pub fn of_one_source(max: usize) -> usize {
    max.min(limit() / 8).max(1)
}

/// The connections of a listener for WebSockets: half.
pub fn connections_max() -> usize {
    (limit() / 2).max(1)
}

/// Those of peers that are not known yet: no more than a quarter of the above.
pub fn handshakes_max(max: usize) -> usize {
    max.min(limit() / 8).max(1)
}

/// What a person does, where an operation failed for want of descriptors.
pub fn advice(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error() {
        Some(libc::EMFILE) => Some(ADVICE),
        Some(libc::ENFILE) => {
            Some("the whole system has too many files open: raise the sysctl fs.file-max")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_leave_some_descriptors_to_nobody() {
        let shared = followed_max() + source_connections().available_permits() + compared_max();
        assert!(shared < limit(), "{shared} of {}", limit());
        assert!(connections_max() > 2 * handshakes_max(usize::MAX));
    }

    #[test]
    fn only_a_want_of_descriptors_has_this_advice() {
        let advice = |number| advice(&io::Error::from_raw_os_error(number));
        assert!(advice(libc::EMFILE).is_some_and(|advice| advice.contains("LimitNOFILE")));
        assert!(advice(libc::ENFILE).is_some_and(|advice| advice.contains("fs.file-max")));
        assert_eq!(advice(libc::ENOSPC), None);
    }
}
