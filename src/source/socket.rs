//! What the sockets and standard input share: claiming a path or an address, handing records to
//! the spool.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::net::SocketType;
use tokio_util::sync::CancellationToken;

use crate::inherited::{self, Passed};
use crate::record::{RECORD_BYTES_MAX, escape_path};
use crate::spool::{Spool, SpoolError};
use crate::tls::TlsError;

/// The longest socket path, in bytes: `sun_path` less its final NUL (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process answers there.
    #[error("{path}: another process is listening on it: stop it, or name another path")]
    InUse {
        /// The socket's path.
        path: String,
    },
    /// Something else lies there, and is left alone.
    #[error("{path}: exists and is not a socket: remove it, or name another path")]
    NotASocket {
        /// The socket's path.
        path: String,
    },
    /// Its directory is missing.
    #[error("{path}: its directory is missing: make it with `install -d -m 0755 {dir}`")]
    NoDirectory {
        /// The socket's path.
        path: String,
        /// The directory to make.
        dir: String,
    },
    /// The kernel takes no path so long.
    #[error(
        "{path}: longer than the {PATH_BYTES_MAX} bytes that a socket's path may have: name a shorter one"
    )]
    TooLong {
        /// The socket's path.
        path: String,
    },
    /// A service manager bound it, and not as we need it.
    #[error(
        "{path}: the service manager passed a socket of another type: its unit needs \
         ListenDatagram= for a datagram source, ListenStream= for a stream source"
    )]
    PassedType {
        /// The socket's path.
        path: String,
    },
    /// Somebody listens at an address.
    #[error("{address} is in use: stop what listens there, or choose another port")]
    AddressInUse {
        /// As configured.
        address: SocketAddr,
    },
    /// A port below 1024 that this user may not use.
    #[error(
        "{address} may not be bound by this user: choose a port above 1023, or grant \
         CAP_NET_BIND_SERVICE (AmbientCapabilities= of the service)"
    )]
    AddressDenied {
        /// As configured.
        address: SocketAddr,
    },
    /// The address belongs to another machine, or to none.
    #[error(
        "{address} is no address of this machine: choose one that `ip address` lists, or 0.0.0.0"
    )]
    AddressElsewhere {
        /// As configured.
        address: SocketAddr,
    },
    /// Any other trouble with an address.
    #[error("{address} cannot be bound: {source}")]
    Address {
        /// As configured.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The certificate or its key is unfit.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Anything else with a path, mostly permissions.
    #[error(
        "{path}: cannot bind the socket: {source}: check the owner and permissions of its directory"
    )]
    Io {
        /// The socket's path.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl BindError {
    fn io(path: &Path, source: io::Error) -> BindError {
        BindError::Io { path: escape_path(path), source }
    }

    /// Whether it is about the place of a socket, which somebody may mend while we run.
    pub fn is_about_the_place(&self) -> bool {
        matches!(
            self,
            BindError::NotASocket { .. } | BindError::NoDirectory { .. } | BindError::Io { .. }
        )
    }

    /// Why an address cannot be bound.
    pub fn address(address: SocketAddr, source: io::Error) -> BindError {
        match source.kind() {
            io::ErrorKind::AddrInUse => BindError::AddressInUse { address },
            io::ErrorKind::PermissionDenied => BindError::AddressDenied { address },
            io::ErrorKind::AddrNotAvailable => BindError::AddressElsewhere { address },
            _ => BindError::Address { address, source },
        }
    }
}

/// Why a source that feeds a spool ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kernel gives no more bytes; what came before is synced.
    #[error("cannot read {from}")]
    Read {
        /// The socket's path or address, or `standard input`.
        from: String,
        /// Why.
        source: io::Error,
    },
    /// The spool closed before all was synced.
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

/// The file of a socket that this process bound, or that was passed to it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode; `None` where a service manager bound it and keeps it.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// Takes the socket that a service manager passed for `path`; else binds with `bind` there and
    /// sets the permission bits `mode`. What a dead process left there is removed; a socket on
    /// which somebody answers is not.
    pub fn bind<S: From<OwnedFd>>(
        path: &Path,
        mode: u32,
        kind: SocketType,
        bind: impl FnOnce(&Path) -> io::Result<S>,
    ) -> Result<(S, SocketFile), BindError> {
        let failed = |source| BindError::io(path, source);
        match inherited::take(path, kind).map_err(failed)? {
            Passed::Socket(passed) => {
                return Ok((S::from(passed), SocketFile { path: path.to_owned(), identity: None }));
            }
            Passed::OtherType => return Err(BindError::PassedType { path: escape_path(path) }),
            Passed::No => clear(path)?,
        }
        let socket = bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { path: escape_path(path) },
            _ => failed(source),
        })?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let identity = Some((metadata.dev(), metadata.ino()));
        let file = SocketFile { path: path.to_owned(), identity };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
        Ok((socket, file))
    }

    /// Whether the socket outlives this process: what is queued then is for the next start.
    pub fn is_kept(&self) -> bool {
        self.identity.is_none()
    }

    /// Unlinks the file, unless the socket is another's, or another process has bound its own there
    /// meanwhile.
    pub fn unlink(&self) {
        let still_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| Some((metadata.dev(), metadata.ino())) == self.identity);
        if still_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %escape_path(&self.path), %error, "cannot unlink the socket");
        }
    }
}

/// What lies where a socket is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Nothing.
    Free,
    /// The file of a socket on which nobody listens any more: binding replaces it.
    Dead,
    /// A socket on which somebody listens.
    Taken,
}

impl Place {
    /// Looks at `path`. Whoever listens there notices nothing.
    ///
    /// # Errors
    ///
    /// Where no socket can be bound, whoever tries; or where this user may not ask.
    pub fn look(path: &Path) -> Result<Place, BindError> {
        let text = || escape_path(path);
        if path.as_os_str().len() > PATH_BYTES_MAX {
            return Err(BindError::TooLong { path: text() });
        }
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match path.parent() {
                    Some(dir) if !dir.as_os_str().is_empty() && !dir.exists() => {
                        Err(BindError::NoDirectory { path: text(), dir: escape_path(dir) })
                    }
                    _ => Ok(Place::Free),
                };
            }
            Err(error) => return Err(BindError::io(path, error)),
        };
        if !metadata.file_type().is_socket() {
            return Err(BindError::NotASocket { path: text() });
        }
        let probe = UnixDatagram::unbound().map_err(|error| BindError::io(path, error))?;
        let Err(error) = probe.connect(path) else {
            return Ok(Place::Taken);
        };
        match Errno::from_io_error(&error) {
            // No socket belongs to the file any more.
            Some(Errno::CONNREFUSED) => Ok(Place::Dead),
            Some(Errno::NOENT) => Ok(Place::Free),
            // A live socket of another type, or one that serves its own peer only.
            Some(Errno::PROTOTYPE | Errno::PERM) => Ok(Place::Taken),
            _ => Err(BindError::io(path, error)),
        }
    }
}

/// Makes way for a socket at `path`.
fn clear(path: &Path) -> Result<(), BindError> {
    match Place::look(path)? {
        Place::Free => Ok(()),
        Place::Dead => fs::remove_file(path).map_err(|error| BindError::io(path, error)),
        Place::Taken => Err(BindError::InUse { path: escape_path(path) }),
    }
}

/// Hands records to a source's spool.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    pub spool: Arc<Spool>,
    pub shutdown: CancellationToken,
}

impl Intake {
    /// Waits until the spool has room, or until the stop. `true` where it had to wait.
    pub async fn room(&self) -> bool {
        let mut waited = false;
        let room = self.spool.room();
        tokio::pin!(room);
        std::future::poll_fn(|context| {
            let ready = room.as_mut().poll(context);
            waited |= ready.is_pending();
            // Looked at once: the stop is waited for below.
            std::task::Poll::Ready(())
        })
        .await;
        if waited {
            tokio::select! {
                () = room => {}
                () = self.shutdown.cancelled() => {}
            }
        }
        waited
    }

    /// Appends a payload, cut into records of the longest length. Full means to wait; at the stop
    /// what is in hand goes in over the bounds, since nobody could send it again.
    pub async fn append(&self, payload: &[u8]) {
        let now = now_ms();
        for piece in payload.chunks(RECORD_BYTES_MAX) {
            self.append_keyed(now, b"", piece).await;
        }
    }

    /// Appends one record with its key and time, under the same rule.
    pub async fn append_keyed(&self, time_ms: u64, key: &[u8], payload: &[u8]) {
        if self.spool.try_append(time_ms, key, payload) {
            return;
        }
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => self.spool.append_last(time_ms, key, payload),
            () = self.spool.append(time_ms, key, payload) => {}
        }
    }
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use tempfile::TempDir;

    use super::*;

    fn bind(path: &Path) -> Result<(UnixDatagram, SocketFile), BindError> {
        SocketFile::bind(path, 0o622, SocketType::DGRAM, |path| UnixDatagram::bind(path))
    }

    #[test]
    fn a_stale_socket_file_is_replaced_and_mode_bits_are_applied() {
        let dir = TempDir::new().expect("dir");
        let path = dir.path().join("log.sock");
        drop(UnixDatagram::bind(&path).expect("bind"));
        let (_socket, file) = bind(&path).expect("the dead socket is replaced");
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o7777, 0o622);
        file.unlink();
        assert!(!path.exists());
        drop(UnixListener::bind(&path).expect("bind"));
        bind(&path).expect("a dead stream socket is replaced too");
    }

    #[test]
    fn a_path_where_somebody_listens_is_refused() {
        let dir = TempDir::new().expect("dir");
        let (datagram, stream) = (dir.path().join("d"), dir.path().join("s"));
        let _datagram = UnixDatagram::bind(&datagram).expect("bind");
        let _stream = UnixListener::bind(&stream).expect("bind");
        for path in [&datagram, &stream] {
            assert!(matches!(bind(path), Err(BindError::InUse { .. })), "{}", path.display());
            assert!(path.exists());
        }
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = TempDir::new().expect("dir");
        let path = dir.path().join("file");
        fs::write(&path, "precious").expect("write");
        assert!(matches!(bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(fs::read(&path).expect("file"), b"precious");
    }

    #[test]
    fn a_missing_directory_and_a_long_path_say_what_to_do() {
        let dir = TempDir::new().expect("dir");
        let error = bind(&dir.path().join("run/log.sock")).expect_err("no directory").to_string();
        let command = format!("install -d -m 0755 {}/run", dir.path().display());
        assert!(error.contains(&command), "{error}");
        let long = dir.path().join("x".repeat(PATH_BYTES_MAX));
        assert!(matches!(bind(&long), Err(BindError::TooLong { .. })));
    }

    #[test]
    fn a_successors_socket_is_not_unlinked() {
        let dir = TempDir::new().expect("dir");
        let path = dir.path().join("log.sock");
        let (_old, file) = bind(&path).expect("bind");
        fs::rename(&path, dir.path().join("old.sock")).expect("rename");
        let _new = UnixDatagram::bind(&path).expect("bind");
        file.unlink();
        assert!(path.exists());
    }
}
