//! One `[[source]]`, or one file or socket of the command line, becomes a [`SourceConfig`].

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::check;
use super::file::Table;
use super::problem::{At, Findings, Place};
use super::value::{self, ValueError};
use super::{Environment, Identity, Input, SourceConfig, Start};
use crate::record::{Format, TAGS_BYTES_MAX, TAGS_MAX, TypeName, bytes_of_tags, escape_path};

/// Permission bits of a socket unless configured: every local program may log, as with `/dev/log`.
pub const SOCKET_MODE: u32 = 0o666;

/// Receive buffer of a UDP socket unless configured, in bytes: bursts of some ten thousand lines.
pub const RECEIVE_BUFFER: u64 = 8 << 20;

/// The kernel counts it as a signed number of 32 bits, doubled.
const RECEIVE_BUFFER_MAX: u64 = 1 << 29;

/// A source as typed; paths are absolute.
#[derive(Clone, Debug)]
pub struct SourceLayer {
    /// Where the source as a whole was typed.
    pub place: Place,
    /// `source.name`; made from the input where missing.
    pub name: Option<At<String>>,
    /// `source.files`, `.unix_datagram`, `.unix_stream`, `.http_intake`, `.syslog_udp`, `.syslog_tcp`,
    /// `.syslog_tls`, `.stdin`, `.supervisor_events`; one of them.
    pub inputs: Vec<At<TypedInput>>,
    /// An input was typed, and refused.
    pub refused: bool,
    /// `source.mode` of a Unix socket.
    pub mode: Option<At<u32>>,
    /// `source.rotated` of files.
    pub rotated: Vec<At<String>>,
    /// Of a syslog listener.
    pub syslog: SyslogSettings,
    /// Settings that the command line gives all its sources at once.
    pub settings: SourceSettings,
}

/// What a source reads, as typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TypedInput {
    /// Files: the absolute pattern, and how a person would name it.
    Files {
        /// As glob(7) has it.
        pattern: String,
        /// The source's name, where none is given.
        name: String,
        /// The path itself, where it looks like a pattern and may be a file's.
        literal: Option<PathBuf>,
    },
    /// Standard input.
    Stdin,
    /// supervisor's events.
    SupervisorEvents,
    /// A Unix datagram socket.
    UnixDatagram(PathBuf),
    /// A Unix stream socket.
    UnixStream(PathBuf),
    /// Posts over HTTP.
    HttpIntake(SocketAddr),
    /// Syslog over UDP.
    SyslogUdp(SocketAddr),
    /// Syslog over TCP.
    SyslogTcp(SocketAddr),
    /// Syslog over TLS.
    SyslogTls(SocketAddr),
}

/// Settings of one kind of syslog listener, refused with another.
#[derive(Clone, Debug, Default)]
pub struct SyslogSettings {
    /// `--syslog-tls-cert`, `source.tls_cert` of `syslog_tls`.
    pub tls_cert: Option<At<PathBuf>>,
    /// `--syslog-tls-key`, `source.tls_key` of `syslog_tls`.
    pub tls_key: Option<At<PathBuf>>,
    /// `source.receive_buffer` of `syslog_udp`, in bytes.
    pub receive_buffer: Option<At<u64>>,
}

/// Settings of a source that do not say where its bytes come from.
#[derive(Clone, Debug, Default)]
pub struct SourceSettings {
    /// `--type`, `source.type`.
    pub type_name: Option<At<TypeName>>,
    /// `--tag`, `source.tags`.
    pub tags: Vec<At<String>>,
    /// `--label`, `source.labels`.
    pub labels: Vec<At<(String, String)>>,
    /// `--format`, `source.format`.
    pub format: Option<At<Format>>,
    /// `--timezone`, `source.timezone`.
    pub timezone: Option<At<String>>,
    /// `--start`, `source.start`.
    pub start: Option<At<Start>>,
    /// `--follow-symlinks`, `source.follow_symlinks`.
    pub follow_symlinks: Option<At<bool>>,
}

impl SourceSettings {
    /// The first setting that was typed, if any.
    pub fn first(&self) -> Option<&Place> {
        let settings = [
            self.type_name.as_ref().map(|at| &at.place),
            self.tags.first().map(|at| &at.place),
            self.labels.first().map(|at| &at.place),
            self.format.as_ref().map(|at| &at.place),
            self.timezone.as_ref().map(|at| &at.place),
            self.start.as_ref().map(|at| &at.place),
            self.follow_symlinks.as_ref().map(|at| &at.place),
        ];
        settings.into_iter().flatten().next()
    }
}

/// `first` unless it is empty.
pub(super) fn either<T>(first: Vec<T>, second: Vec<T>) -> Vec<T> {
    if first.is_empty() { second } else { first }
}

/// A file or pattern of the command line. The shell passes on what it does not expand: a file that
/// has just this name is meant too, beside those that the pattern matches.
pub fn file_argument(argument: &OsStr, current_dir: &Path) -> Result<TypedInput, ValueError> {
    let Some(text) = argument.to_str() else {
        let name = escape_path(Path::new(argument));
        return Err(ValueError(format!(
            "{name} is not UTF-8: name it by a pattern, such as DIR/*"
        )));
    };
    let path = current_dir.join(text);
    match value::pattern(text) {
        Ok(pattern) if has_wildcard(text) => match absolute(&pattern, text, current_dir)? {
            TypedInput::Files { pattern, name, .. } => {
                Ok(TypedInput::Files { pattern, name, literal: Some(path) })
            }
            other => Ok(other),
        },
        Ok(pattern) => absolute(&pattern, text, current_dir),
        Err(_) if path.symlink_metadata().is_ok() => {
            absolute(&glob::Pattern::escape(text), text, current_dir)
        }
        Err(error) => Err(error),
    }
}

/// Whether a pattern is more than a path.
fn has_wildcard(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

fn absolute(pattern: &str, name: &str, base: &Path) -> Result<TypedInput, ValueError> {
    if pattern.starts_with('/') {
        let (pattern, name) = (pattern.to_owned(), name.to_owned());
        return Ok(TypedInput::Files { pattern, name, literal: None });
    }
    let Some(base) = base.to_str() else {
        let base = escape_path(base);
        return Err(ValueError(format!("{base} is not UTF-8: name files by absolute patterns")));
    };
    let base = base.trim_end_matches('/');
    let (pattern, name) = (without_dot(pattern), without_dot(name));
    Ok(TypedInput::Files {
        pattern: format!("{}/{pattern}", glob::Pattern::escape(base)),
        name: format!("{base}/{name}"),
        literal: None,
    })
}

fn without_dot(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}

impl SourceLayer {
    pub(super) fn read(table: &mut Table<'_>) -> SourceLayer {
        let named = [
            "files",
            "unix_datagram",
            "unix_stream",
            "http_intake",
            "syslog_udp",
            "syslog_tcp",
            "syslog_tls",
        ]
        .iter()
        .any(|key| table.has(key));
        let base = table.base().to_owned();
        let files = table.text("files", |text| absolute(&value::pattern(text)?, text, &base));
        let datagram = table.path("unix_datagram").map(|at| at.map(TypedInput::UnixDatagram));
        let stream = table.path("unix_stream").map(|at| at.map(TypedInput::UnixStream));
        let http =
            table.text("http_intake", value::tcp_address).map(|at| at.map(TypedInput::HttpIntake));
        let stdin =
            table.boolean("stdin").filter(|at| at.value).map(|at| at.map(|_| TypedInput::Stdin));
        let supervisor = table
            .boolean("supervisor_events")
            .filter(|at| at.value)
            .map(|at| at.map(|_| TypedInput::SupervisorEvents));
        let mut syslog = |key, input: fn(SocketAddr) -> TypedInput| {
            table.text(key, value::syslog_address).map(|at| at.map(input))
        };
        let udp = syslog("syslog_udp", TypedInput::SyslogUdp);
        let tcp = syslog("syslog_tcp", TypedInput::SyslogTcp);
        let tls = syslog("syslog_tls", TypedInput::SyslogTls);
        let inputs: Vec<_> = [files, datagram, stream, http, udp, tcp, tls, stdin, supervisor]
            .into_iter()
            .flatten()
            .collect();
        SourceLayer {
            place: table.place(),
            name: table.text("name", name),
            refused: named && inputs.is_empty(),
            inputs,
            mode: table.text("mode", value::mode),
            rotated: table.list("rotated", |text| {
                match absolute(&value::pattern(text)?, text, &base)? {
                    TypedInput::Files { pattern, .. } => Ok(pattern),
                    _ => Err(ValueError(format!("{text:?} names no files"))),
                }
            }),
            syslog: SyslogSettings {
                tls_cert: table.path("tls_cert"),
                tls_key: table.path("tls_key"),
                receive_buffer: table.size("receive_buffer"),
            },
            settings: SourceSettings {
                type_name: table.text("type", value::type_name),
                tags: table.list("tags", value::tag),
                labels: table.strings_by_key("labels", value::label_key),
                format: table.text("format", value::format),
                timezone: table.text("timezone", value::timezone),
                start: table.text("start", value::start),
                follow_symlinks: table.boolean("follow_symlinks"),
            },
        }
    }

    pub(super) fn check(
        self,
        once: bool,
        environment: &Environment,
        findings: &mut Findings,
    ) -> Option<SourceConfig> {
        let typed = match <[_; 1]>::try_from(self.inputs) {
            Ok([input]) => input,
            // A value that is wrong in itself has been told already.
            Err(inputs) if inputs.is_empty() && self.refused => return None,
            Err(inputs) => {
                let place = inputs.get(1).map_or(&self.place, |second| &second.place);
                let message = "a source has exactly one of files, unix_datagram, unix_stream, http_intake, syslog_udp, \
                     syslog_tcp, syslog_tls, stdin, supervisor_events";
                findings.problem(place, message);
                return None;
            }
        };
        let mode = self.mode.as_ref().map_or(SOCKET_MODE, |at| at.value);
        self.syslog.refuse_strays(&typed.value, findings);
        let is_files = matches!(typed.value, TypedInput::Files { .. });
        if let Some(at) = self.rotated.first().filter(|_| !is_files) {
            findings.problem(&at.place, "only files are rotated: remove it");
        }
        let (input, derived_name) = match typed.value {
            TypedInput::Files { pattern, name, literal } => {
                check_files(&pattern, &name, once, &typed.place, findings);
                let rotated = self.rotated.into_iter().map(|at| at.value).collect();
                (Input::Files { pattern, literal, rotated }, name)
            }
            TypedInput::Stdin => (Input::Stdin, "stdin".to_owned()),
            TypedInput::SupervisorEvents => (Input::SupervisorEvents, "supervisor".to_owned()),
            TypedInput::UnixDatagram(path) => {
                check::socket_path(&path, &typed.place, findings);
                let name = escape_path(&path);
                (Input::UnixDatagram { path, mode }, name)
            }
            TypedInput::UnixStream(path) => {
                check::socket_path(&path, &typed.place, findings);
                let name = escape_path(&path);
                (Input::UnixStream { path, mode }, name)
            }
            TypedInput::HttpIntake(address) => {
                (Input::HttpIntake { address }, format!("http://{address}"))
            }
            TypedInput::SyslogUdp(address) => {
                let receive_buffer = self.syslog.receive_buffer(findings);
                (Input::SyslogUdp { address, receive_buffer }, format!("udp:{address}"))
            }
            TypedInput::SyslogTcp(address) => {
                (Input::SyslogTcp { address, tls: None }, format!("tcp:{address}"))
            }
            TypedInput::SyslogTls(address) => {
                let tls = self.syslog.tls(&typed.place, findings);
                (Input::SyslogTcp { address, tls }, format!("tls:{address}"))
            }
        };
        let settings = self.settings;
        let is_socket = matches!(input, Input::UnixDatagram { .. } | Input::UnixStream { .. });
        if let Some(at) = self.mode.as_ref().filter(|_| !is_socket) {
            findings.problem(&at.place, "only a Unix socket has a mode: remove it");
        }
        if input == Input::SupervisorEvents
            && let Some(at) = settings.format.as_ref()
            && matches!(at.value, Format::Json | Format::Raw)
        {
            let message = "lines of supervisor's events get a syslog header: use auto or syslog";
            findings.problem(&at.place, message);
        }
        let repeated = settings.tags.first().map(|at| &at.place);
        let repeated = repeated.or(settings.labels.first().map(|at| &at.place)).cloned();
        let tags: Vec<String> = settings.tags.into_iter().map(|at| at.value).collect();
        let labels = labels(settings.labels, findings);
        if let Some(place) = repeated {
            check_repeated(&tags, &labels, &place, findings);
        }
        Some(SourceConfig {
            name: self.name.map_or(derived_name, |at| at.value),
            input,
            type_name: settings.type_name.map(|at| at.value).unwrap_or_default(),
            tags,
            labels,
            format: settings.format.map(|at| at.value).unwrap_or_default(),
            timezone: settings
                .timezone
                .map(|at| at.value)
                .or_else(|| environment.timezone.clone())
                .unwrap_or_else(|| "UTC".to_owned()),
            start: settings.start.map(|at| at.value).unwrap_or_default(),
            follow_symlinks: settings.follow_symlinks.is_some_and(|at| at.value),
        })
    }
}

impl SyslogSettings {
    /// The certificate, without which nobody speaks TLS.
    fn tls(&self, place: &Place, findings: &mut Findings) -> Option<Identity> {
        let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) else {
            let message = "syslog over TLS needs a certificate and its key: give \
                           --syslog-tls-cert FILE and --syslog-tls-key FILE (tls_cert, tls_key)";
            findings.problem(place, message);
            return None;
        };
        check::pem_file(certificate, "CERTIFICATE", findings);
        check::key_file(key, findings);
        Some(Identity { certificate: certificate.value.clone(), key: key.value.clone() })
    }

    /// The size of the receive buffer in bytes.
    fn receive_buffer(&self, findings: &mut Findings) -> usize {
        let bytes = self.receive_buffer.as_ref().map_or(RECEIVE_BUFFER, |at| at.value);
        if let Some(at) = &self.receive_buffer
            && !(1..=RECEIVE_BUFFER_MAX).contains(&bytes)
        {
            findings.problem(&at.place, "a receive buffer has 1 byte to 512MiB");
        }
        // What does not fit was refused.
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Settings that another input than theirs was given. The flags' certificate is handed to all
    /// sources of the command line alike.
    fn refuse_strays(&self, input: &TypedInput, findings: &mut Findings) {
        let is_udp = matches!(input, TypedInput::SyslogUdp(_));
        if let Some(at) = self.receive_buffer.as_ref().filter(|_| !is_udp) {
            findings.problem(&at.place, "only syslog_udp has a receive buffer: remove it");
        }
        let is_tls = matches!(input, TypedInput::SyslogTls(_));
        for at in [&self.tls_cert, &self.tls_key].into_iter().flatten() {
            if !is_tls && matches!(at.place, Place::File { .. }) {
                findings.problem(&at.place, "only syslog_tls has a certificate: remove it");
            }
        }
    }
}

fn name(text: &str) -> Result<String, ValueError> {
    if (1..=256).contains(&text.len()) && !text.chars().any(char::is_control) {
        Ok(text.to_owned())
    } else {
        Err(ValueError(format!("name {text:?} must be 1 to 256 bytes without control characters")))
    }
}

fn labels(typed: Vec<At<(String, String)>>, findings: &mut Findings) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for At { value: (key, value), place } in typed {
        if labels.insert(key.clone(), value).is_some() {
            findings.problem(&place, format!("label {key:?} is given twice"));
        }
    }
    labels
}

/// Each document repeats them: a receiver refuses more than these.
fn check_repeated(
    tags: &[String],
    labels: &BTreeMap<String, String>,
    place: &Place,
    findings: &mut Findings,
) {
    let bytes = bytes_of_tags(tags, labels);
    if bytes > TAGS_BYTES_MAX || tags.len() > TAGS_MAX || labels.len() > TAGS_MAX {
        let message = format!(
            "{} tags and {} labels of {bytes} bytes: each line repeats them, so at most {TAGS_MAX} \
             of each and {TAGS_BYTES_MAX} bytes in all are allowed",
            tags.len(),
            labels.len()
        );
        findings.problem(place, message);
    }
}

/// A name without wildcards says which file is meant: a folder, or with `once` a file that is not
/// there, is a mistake. (Following waits for a file to appear.)
fn check_files(pattern: &str, name: &str, once: bool, place: &Place, findings: &mut Findings) {
    let path = Path::new(name);
    let is_literal =
        pattern == name && !has_wildcard(pattern) || pattern == glob::Pattern::escape(name);
    if !is_literal {
        return;
    }
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            let message = format!("{name} is a directory: name files, such as {name}/*.log");
            findings.problem(place, message);
        }
        Err(error) if once => {
            let message = match error.kind() {
                io::ErrorKind::NotFound => {
                    format!("{name} is not there, and --once waits for none")
                }
                _ => format!("{name}: {error}"),
            };
            findings.problem(place, message);
        }
        _ => {}
    }
}
