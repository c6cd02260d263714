//! What this machine must allow: folders, files, sockets, the kernel's queue.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::Access;

use super::Report;
use crate::config::{Input, SourceConfig};
use crate::record::escape_path;
use crate::source::files::discovery::sweep;

/// Fewer datagrams than systemd's default are lost in any burst.
const DATAGRAMS_MIN: u64 = 512;

const DATAGRAMS: &str = "/proc/sys/net/unix/max_dgram_qlen";

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
pub(super) fn source(report: &mut Report, source: &SourceConfig) -> io::Result<()> {
    let name = Some(source.name.as_str());
    match &source.input {
        Input::Files { pattern, .. } => files(report, source, pattern),
        Input::UnixDatagram { path, .. } => {
            socket(report, name, path)?;
            queue(report, name)
        }
        Input::UnixStream { path, .. } => socket(report, name, path),
        Input::SyslogTcp { tls: Some(tls), .. } => certificate(report, "tls", name, tls, None),
        // Ports and standard input cannot be tried without taking them from who has them.
        _ => Ok(()),
    }
}

fn files(report: &mut Report, source: &SourceConfig, pattern: &str) -> io::Result<()> {
    const CHECK: &str = "source";
    let name = Some(source.name.as_str());
    let found = sweep(pattern);
    let mut readable = 0;
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
        0 => report.warn(CHECK, name, format!("{pattern:?} is no file yet; followed when it is")),
        1 => report.ok(CHECK, name, "1 file, readable"),
        count => report.ok(CHECK, name, format!("{count} files, readable")),
    }
}

/// A Unix socket that the service binds, or that is bound already.
pub(super) fn socket(report: &mut Report, of: Option<&str>, path: &Path) -> io::Result<()> {
    const CHECK: &str = "socket";
    let shown = escape_path(path);
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            return report.ok(CHECK, of, format!("{shown} is bound"));
        }
        Ok(_) => {
            let message =
                format!("{shown} is there and no socket: remove it, or choose another path");
            return report.fail(CHECK, of, message);
        }
        Err(_) => {}
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    match rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK) {
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

/// A certificate with its key, as a server of ours shows it.
pub(super) fn certificate(
    report: &mut Report,
    check: &str,
    of: Option<&str>,
    files: &crate::config::Identity,
    client_ca: Option<&Path>,
) -> io::Result<()> {
    let end = crate::tls::server_config(files, client_ca)
        .and_then(|_| crate::tls::end_of(&files.certificate));
    match end {
        Ok(end) => report.certificate(check, of, end),
        Err(error) => report.fail(check, of, error.to_string()),
    }
}
