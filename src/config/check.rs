//! Checks that sender and receiver share: files that must be there, and logging.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Identity;
use super::problem::{At, Findings, Place};
use super::value::ValueError;

/// The longest path of a Unix socket in bytes (`sun_path` less its NUL, unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// How much the process says, and in which form.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogConfig {
    /// The least severe level that is written.
    pub level: LogLevel,
    /// The form of each line.
    pub format: LogFormat,
}

/// The least severe level that is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogLevel {
    /// What needs a person.
    Error,
    /// What may need a person.
    Warn,
    /// What happens.
    #[default]
    Info,
    /// Why it happens.
    Debug,
    /// Every step, of the libraries too.
    Trace,
}

impl FromStr for LogLevel {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<LogLevel, ValueError> {
        match text {
            "error" => Ok(LogLevel::Error),
            "warn" => Ok(LogLevel::Warn),
            "info" => Ok(LogLevel::Info),
            "debug" => Ok(LogLevel::Debug),
            "trace" => Ok(LogLevel::Trace),
            _ => Err(ValueError(format!(
                "log level {text:?} must be error, warn, info, debug or trace"
            ))),
        }
    }
}

/// The form of a log line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<LogFormat, ValueError> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err(ValueError(format!("log format {text:?} must be text or json"))),
        }
    }
}

/// Logging as typed.
#[derive(Clone, Debug, Default)]
pub struct LogLayer {
    /// `--log-level`, `log_level`.
    pub level: Option<At<LogLevel>>,
    /// `--log-format`, `log_format`.
    pub format: Option<At<LogFormat>>,
}

impl LogLayer {
    pub(super) fn read(table: &mut super::file::Table<'_>) -> LogLayer {
        LogLayer {
            level: table.text("log_level", str::parse),
            format: table.text("log_format", str::parse),
        }
    }

    pub(super) fn over(self, under: LogLayer) -> LogLayer {
        LogLayer { level: self.level.or(under.level), format: self.format.or(under.format) }
    }

    pub(super) fn check(self) -> LogConfig {
        LogConfig {
            level: self.level.map(|at| at.value).unwrap_or_default(),
            format: self.format.map(|at| at.value).unwrap_or_default(),
        }
    }
}

/// A regular file that this process can read; returns its first 64 KiB as text.
fn readable(at: &At<PathBuf>, findings: &mut Findings) -> Option<(fs::Metadata, String)> {
    let path = at.value.display();
    // Opening a FIFO would wait for a writer: its kind is looked at first.
    let metadata = match fs::metadata(&at.value) {
        Ok(metadata) if metadata.is_file() => metadata,
        Ok(_) => {
            findings.problem(&at.place, format!("{path} is not a regular file"));
            return None;
        }
        Err(error) => {
            findings.problem(&at.place, format!("cannot read {path}: {error}"));
            return None;
        }
    };
    let mut bytes = Vec::new();
    let read = fs::File::open(&at.value)
        .and_then(|file| file.take(64 << 10).read_to_end(&mut bytes).map(drop));
    match read {
        Ok(()) => Some((metadata, String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) => {
            findings.problem(&at.place, format!("cannot read {path}: {error}"));
            None
        }
    }
}

/// A file with a secret: readable, not empty; a warning where every user can read it.
pub(super) fn secret_file(at: &At<PathBuf>, findings: &mut Findings) {
    let Some((metadata, text)) = readable(at, findings) else { return };
    let path = at.value.display();
    if text.trim().is_empty() {
        findings.problem(&at.place, format!("{path} is empty"));
    }
    if metadata.mode() & 0o004 != 0 {
        let message = format!("every user can read {path}: chmod 600 {path}");
        findings.warning(&at.place, &message);
    }
}

/// The tokens file of a side that lets in whom it lists.
pub(super) fn tokens_file(typed: Option<&At<PathBuf>>, findings: &mut Findings) {
    match typed {
        Some(at) if !at.value.exists() => {
            let path = at.value.display();
            let message =
                format!("{path} is not there: make it with 'waybill token NAME --tokens {path}'");
            findings.problem(&at.place, message);
        }
        Some(at) => secret_file(at, findings),
        None => findings.missing(
            "tokens",
            "no tokens: give --tokens FILE, or 'tokens' in the file; without one nobody may enter",
        ),
    }
}

/// A PEM file with at least one block whose label ends with `label`.
pub(super) fn pem_file(at: &At<PathBuf>, label: &str, findings: &mut Findings) {
    let Some((_, text)) = readable(at, findings) else { return };
    let wanted =
        |line: &str| line.starts_with("-----BEGIN ") && line.ends_with(&format!("{label}-----"));
    if !text.lines().any(|line| wanted(line.trim_end())) {
        let message = format!("{} has no PEM block -----BEGIN {label}-----", at.value.display());
        findings.problem(&at.place, message);
    }
}

/// A private key in PEM, with the warning of [`secret_file`].
pub(super) fn key_file(at: &At<PathBuf>, findings: &mut Findings) {
    pem_file(at, "PRIVATE KEY", findings);
    let others = fs::metadata(&at.value).is_ok_and(|m| m.permissions().mode() & 0o004 != 0);
    if others {
        let path = at.value.display();
        findings.warning(&at.place, &format!("every user can read {path}: chmod 600 {path}"));
    }
}

/// A certificate with its key, or neither; `names` are what to give for each.
pub(super) fn identity(
    certificate: Option<At<PathBuf>>,
    key: Option<At<PathBuf>>,
    names: (&str, &str),
    findings: &mut Findings,
) -> Option<Identity> {
    match (certificate, key) {
        (Some(certificate), Some(key)) => {
            pem_file(&certificate, "CERTIFICATE", findings);
            key_file(&key, findings);
            Some(Identity { certificate: certificate.value, key: key.value })
        }
        (Some(certificate), None) => {
            let message = format!("a certificate needs its key: give {}", names.1);
            findings.problem(&certificate.place, message);
            None
        }
        (None, Some(key)) => {
            let message = format!("a key needs its certificate: give {}", names.0);
            findings.problem(&key.place, message);
            None
        }
        (None, None) => None,
    }
}

/// A path that the kernel takes as a socket's address.
pub(super) fn socket_path(path: &Path, place: &Place, findings: &mut Findings) {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_BYTES_MAX {
        let message = format!(
            "a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, and {} has {length}",
            path.display()
        );
        findings.problem(place, message);
    }
}
