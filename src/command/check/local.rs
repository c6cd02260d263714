//! What this machine must allow: folders, files, sockets, ports, the kernel's queue.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::Access;
use socket2::{Domain, Socket, Type};

use super::Report;
use crate::config::{Identity, Input, Listen, SourceConfig};
use crate::record::escape_path;
use crate::source::files::discovery::sweep;
use crate::source::{BindError, Place};
use crate::state::{State, StateError};
use crate::tls::{self, Acceptor, Leaf, ServerCertificate};

/// Fewer datagrams than systemd's default are lost in any burst.
const DATAGRAMS_MIN: u64 = 512;

const DATAGRAMS: &str = "/proc/sys/net/unix/max_dgram_qlen";

/// Whether the side that is checked runs already: what it listens on is then in use, by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Runs {
    Yes,
    No,
    Unknown,
}

/// By the lock of its state directory.
pub(super) fn sender_runs(report: &mut Report, state_dir: &Path) -> io::Result<Runs> {
    match State::refuse_in_use(state_dir) {
        Ok(()) => Ok(Runs::No),
        Err(StateError::InUse { holder, .. }) => {
            let dir = escape_path(state_dir);
            let message = format!("{dir} is in use by the waybill send that runs{holder}");
            report.ok("lock", None, message)?;
            Ok(Runs::Yes)
        }
        // Whoever may not open it has been told so of the folder.
        Err(StateError::Io { .. }) => Ok(Runs::Unknown),
    }
}

/// A folder that is written to, and made where it is missing.
pub(super) fn folder(report: &mut Report, check: &str, folder: &Path) -> io::Result<()> {
    let path = escape_path(folder);
    // What is missing is made by the service, below the nearest folder that is there.
    let there = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(folder);
    let missing = there != folder;
    match rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK) {
        Err(error) => {
            let there = escape_path(there);
            let message = format!(
                "{there} cannot be written: {error}; give it to the service's user: \
                 install -d -o USER -m 700 {path}"
            );
            report.fail(check, None, message)
        }
        Ok(()) if missing => {
            report.ok(check, None, format!("{path} is not there yet; it can be made"))
        }
        Ok(()) => report.ok(check, None, format!("{path} can be written")),
    }?;
    let owner = fs::metadata(there).map_or(0, |metadata| metadata.uid());
    if rustix::process::geteuid().is_root() && owner != 0 && !missing {
        let message = format!(
            "{path} belongs to user {owner}, and root may do more: repeat this as that user, \
             with sudo -u '#{owner}'"
        );
        report.warn("user", None, message)?;
    }
    Ok(())
}

/// What a source reads.
pub(super) fn source(report: &mut Report, source: &SourceConfig, runs: Runs) -> io::Result<()> {
    let name = Some(source.name.as_str());
    match &source.input {
        Input::Files { pattern, .. } => files(report, source, pattern),
        Input::UnixDatagram { path, .. } => {
            socket(report, name, path, runs)?;
            queue(report, name)
        }
        Input::UnixStream { path, .. } => socket(report, name, path, runs),
        Input::SyslogUdp { address, .. } => port(report, name, *address, Type::DGRAM, runs),
        Input::HttpIntake { address } => port(report, name, *address, Type::STREAM, runs),
        Input::SyslogTcp { address, tls } => {
            port(report, name, *address, Type::STREAM, runs)?;
            tls.as_ref().map_or(Ok(()), |tls| certificate(report, name, tls, Peer::Syslog))
        }
        // Whoever starts the service gives it its standard input.
        Input::Stdin | Input::SupervisorEvents => Ok(()),
    }
}

/// Where the other side is waited for.
pub(super) fn listen(report: &mut Report, listen: &Listen, runs: Runs) -> io::Result<()> {
    match listen {
        Listen::Tcp(address) => port(report, None, *address, Type::STREAM, runs),
        Listen::Unix(path) => socket(report, None, path, runs),
    }
}

/// A port that the service binds.
pub(super) fn port(
    report: &mut Report,
    of: Option<&str>,
    address: SocketAddr,
    kind: Type,
    runs: Runs,
) -> io::Result<()> {
    const CHECK: &str = "port";
    match bind(address, kind).map_err(|source| BindError::address(address, source)) {
        Ok(_) => report.ok(CHECK, of, format!("{address} is free")),
        Err(BindError::AddressInUse { .. }) if runs == Runs::Yes => {
            report.ok(CHECK, of, format!("{address} is in use, as it must be by what runs"))
        }
        Err(BindError::AddressInUse { .. }) if runs == Runs::Unknown => {
            let message = format!(
                "{address} is in use: as it must be if this service runs; else stop what listens \
                 there, or choose another port"
            );
            report.warn(CHECK, of, message)
        }
        Err(error) => report.fail(CHECK, of, error.to_string()),
    }
}

/// Binds, and does not listen: the kernel lets a service that starts in this moment bind a TCP port too.
fn bind(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn files(report: &mut Report, source: &SourceConfig, pattern: &str) -> io::Result<()> {
    const CHECK: &str = "source";
    let name = Some(source.name.as_str());
    let found = sweep(pattern);
    let mut readable = 0;
    let mut links = 0;
    let mut refused = Vec::new();
    for path in &found.paths {
        let path = path.as_path();
        let is_link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
        if is_link && !source.follow_symlinks {
            let path = escape_path(path);
            let message = format!(
                "{path} is a symbolic link, which is not followed: name its target, or \
                 --follow-symlinks (follow_symlinks = true)"
            );
            report.warn(CHECK, name, message)?;
            links += 1;
            continue;
        }
        // Opening a FIFO would wait for its writer.
        match fs::metadata(path).map(|metadata| metadata.is_file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => refused.push((path, error.to_string())),
            Ok(false) => {}
            Ok(true) => match fs::File::open(path) {
                Ok(_) => readable += 1,
                Err(error) => refused.push((path, error.to_string())),
            },
        }
    }
    if let Some((path, error)) = refused.first() {
        let message = format!(
            "{} of {} files cannot be read, such as {}: {error}; let the service's user read \
             them, mostly by their group: usermod -aG GROUP USER",
            refused.len(),
            found.paths.len(),
            escape_path(path)
        );
        return report.fail(CHECK, name, message);
    }
    if let Some((folder, error)) = found.unreadable.first() {
        let folder = escape_path(folder);
        let message = format!("{folder} cannot be listed: {error}; let the service's user read it");
        return report.fail(CHECK, name, message);
    }
    match readable {
        0 if links > 0 => Ok(()),
        0 => report.warn(CHECK, name, format!("{pattern:?} is no file yet; followed when it is")),
        1 => report.ok(CHECK, name, "1 file, readable"),
        count => report.ok(CHECK, name, format!("{count} files, readable")),
    }
}

/// A Unix socket that the service binds, or that is bound already.
fn socket(report: &mut Report, of: Option<&str>, path: &Path, runs: Runs) -> io::Result<()> {
    const CHECK: &str = "socket";
    let shown = escape_path(path);
    let is_dead = match Place::look(path) {
        Ok(Place::Taken) if runs == Runs::Yes => {
            return report.ok(CHECK, of, format!("{shown} is bound, as it must be by what runs"));
        }
        Ok(Place::Taken) => {
            let message = format!(
                "{shown} is bound already: as it must be if this service runs, or systemd keeps it \
                 (a .socket unit); else stop what listens there, or name another path"
            );
            return report.warn(CHECK, of, message);
        }
        Err(error @ (BindError::NotASocket { .. } | BindError::TooLong { .. })) => {
            return report.fail(CHECK, of, error.to_string());
        }
        Err(_) if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) => {
            let message = format!("{shown} is there; this user may not ask whether it is in use");
            return report.skip(CHECK, of, message);
        }
        place => matches!(place, Ok(Place::Dead)),
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    match rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) if is_dead => {
            let message = format!("{shown} is a dead process's, and will be replaced");
            report.ok(CHECK, of, message)
        }
        Ok(()) => report.ok(CHECK, of, format!("{shown} can be made")),
        Err(error) => {
            let folder = escape_path(folder);
            let message = format!(
                "{shown} cannot be made: {folder}: {error}; make the folder, writable for the \
                 service's user (systemd: RuntimeDirectory=waybill)"
            );
            report.fail(CHECK, of, message)
        }
    }
}

/// How many datagrams the kernel queues, which is set when the socket is bound.
fn queue(report: &mut Report, of: Option<&str>) -> io::Result<()> {
    const CHECK: &str = "queue";
    let text = match fs::read_to_string(DATAGRAMS) {
        Ok(text) => text,
        Err(error) => return report.skip(CHECK, of, format!("{DATAGRAMS}: {error}")),
    };
    let length: u64 = text.trim().parse().unwrap_or_default();
    if length < DATAGRAMS_MIN {
        let message = format!(
            "net.unix.max_dgram_qlen is {length}: more datagrams in a burst are lost, unseen; \
             sysctl net.unix.max_dgram_qlen=8192, then bind the socket anew"
        );
        report.warn(CHECK, of, message)
    } else {
        report.ok(CHECK, of, format!("net.unix.max_dgram_qlen is {length}"))
    }
}

/// Who looks at a certificate of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer<'a> {
    /// Waybill's other side, which may have to show one that this authority signed.
    Waybill(Option<&'a Path>),
    /// Syslog's senders, some of which are less strict.
    Syslog,
}

/// A certificate with its key, as a server of ours shows it.
pub(super) fn certificate(
    report: &mut Report,
    of: Option<&str>,
    files: &Identity,
    peer: Peer<'_>,
) -> io::Result<()> {
    const CHECK: &str = "tls";
    let opened = match peer {
        Peer::Waybill(client_ca) => ServerCertificate::for_http(files, client_ca).map(drop),
        Peer::Syslog => Acceptor::new(files).map(drop),
    };
    match opened.and_then(|()| tls::leaf_of_file(&files.certificate)) {
        Err(error) => report.fail(CHECK, of, error.to_string()),
        Ok(leaf) => match leaf.as_ref().and_then(Leaf::refusal) {
            Some(fault) if peer != Peer::Syslog => {
                report.fail(CHECK, of, format!("the certificate {fault}"))
            }
            _ => report.certificate(CHECK, of, leaf),
        },
    }
}
