//! Sockets that a service manager bound before us and keeps (sd_listen_fds(3), `systemd.socket`).
//!
//! Such a socket outlives this process: what its peers send, and who connects, while nobody reads
//! waits in the kernel's queue for the next start. It is found by the path at which it is bound. Its options,
//! its file and its other holders are not ours: nothing here may shut it down or unlink it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::LazyLock;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname, sockopt};

use crate::record::escape_path;

/// `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;

/// More than any unit passes; a wrong number must not claim descriptors of others.
const COUNT_MAX: u32 = 256;

/// What was passed to this process. It stays open: what is given up when a changed configuration
/// comes into force may come back, a source perhaps under another name.
static PASSED: LazyLock<Vec<OwnedFd>> = LazyLock::new(passed);

/// What was passed for a path.
#[derive(Debug)]
pub enum Passed {
    /// Nothing.
    No,
    /// A socket of the type that is wanted, as a descriptor of its own.
    Socket(OwnedFd),
    /// A socket of another type.
    OtherType,
}

/// Takes the Unix socket that is bound at `path`, if one was passed to this process.
///
/// # Errors
///
/// Where this process may open no more descriptors.
pub fn take(path: &Path, wanted: SocketType) -> io::Result<Passed> {
    let found = find(&PASSED, path, wanted)?;
    if let Passed::Socket(_) = found {
        tracing::info!(socket = %escape_path(path), "taken from the service manager");
    }
    Ok(found)
}

fn find(passed: &[OwnedFd], path: &Path, wanted: SocketType) -> io::Result<Passed> {
    match passed.iter().find(|fd| is_bound_at(fd.as_fd(), path)) {
        None => Ok(Passed::No),
        Some(fd) if sockopt::socket_type(fd) == Ok(wanted) => fd.try_clone().map(Passed::Socket),
        Some(_) => Ok(Passed::OtherType),
    }
}

fn is_bound_at(fd: BorrowedFd<'_>, path: &Path) -> bool {
    let Ok(address) = getsockname(fd) else { return false };
    if address.address_family() != AddressFamily::UNIX {
        return false;
    }
    let Ok(address) = SocketAddrUnix::try_from(address) else { return false };
    address.path_bytes() == Some(path.as_os_str().as_bytes())
}

fn passed() -> Vec<OwnedFd> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    // A child of ours inherits the variables and not the sockets.
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).min(COUNT_MAX);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    tracing::info!(count, names, "the service manager passed sockets");
    (FIRST..)
        .zip(0..count)
        .filter_map(|(number, _)| {
            // SAFETY: only asks whether the number is an open descriptor.
            if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
                return None;
            }
            // SAFETY: it is open, and by sd_listen_fds(3) it is ours: whoever sets LISTEN_PID to
            // this process hands over the descriptors from 3 on. This runs once.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            // Failing here would only let a child of ours hold the socket too.
            let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
            Some(fd)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn a_socket_is_found_by_its_path_and_type() {
        let dir = tempfile::tempdir().expect("dir");
        let (datagram, stream) = (dir.path().join("d"), dir.path().join("s"));
        let passed = [
            OwnedFd::from(UnixListener::bind(&stream).expect("bind")),
            OwnedFd::from(UnixDatagram::bind(&datagram).expect("bind")),
            OwnedFd::from(UnixDatagram::unbound().expect("socket")),
            OwnedFd::from(std::fs::File::open("/dev/null").expect("file")),
        ];
        let find = |path: &Path, wanted| find(&passed, path, wanted).expect("a descriptor");
        assert!(matches!(find(&dir.path().join("other"), SocketType::DGRAM), Passed::No));
        assert!(matches!(find(&stream, SocketType::DGRAM), Passed::OtherType));
        assert!(matches!(find(&stream, SocketType::STREAM), Passed::Socket(_)));
        assert!(matches!(find(&datagram, SocketType::DGRAM), Passed::Socket(_)));
        assert!(matches!(find(&datagram, SocketType::DGRAM), Passed::Socket(_)), "again");
    }
}
