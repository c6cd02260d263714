//! `waybill send`: what was typed, on the command line and in TOML, becomes a [`SendConfig`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{self, LogLayer};
use super::file::{File, Table};
use super::problem::{At, ConfigError, Findings, Place};
use super::source::{self, SourceLayer};
use super::value;
use super::{
    Endpoint, EndpointAddress, Environment, Input, Loaded, ReceiptsTarget, SendConfig, SourceConfig,
};

/// How long a stop waits for outstanding receipts unless configured.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Budget of the spool, and of copies of deleted files, unless configured: 1 GiB.
pub const DISK_BYTES_MAX: u64 = 1 << 30;

/// A spool must take at least a few of the largest records.
const SPOOL_BYTES_MIN: u64 = 4 << 20;

/// Settings of `waybill send` as typed in one place; paths are absolute.
#[derive(Clone, Debug, Default)]
pub struct SendLayer {
    /// `--to`, `to`.
    pub to: Vec<At<Endpoint>>,
    /// `--token-file`, `token_file`.
    pub token_file: Option<At<PathBuf>>,
    /// `--ca`, `ca`.
    pub ca: Option<At<PathBuf>>,
    /// `--state-dir`, `state_dir`.
    pub state_dir: Option<At<PathBuf>>,
    /// Files and sockets, `[[source]]`.
    pub sources: Vec<SourceLayer>,
    /// `--once`.
    pub once: bool,
    /// `--receipts`, `receipts`.
    pub receipts: Option<At<ReceiptsTarget>>,
    /// `--compress`, `compress`.
    pub compress: Option<At<bool>>,
    /// `idle_close`.
    pub idle_close: Option<At<Duration>>,
    /// `--drain-timeout`, `drain_timeout`.
    pub drain_timeout: Option<At<Duration>>,
    /// `--spool-bytes-max`, `spool_bytes_max`.
    pub spool_bytes_max: Option<At<u64>>,
    /// `--kept-bytes-max`, `kept_bytes_max`.
    pub kept_bytes_max: Option<At<u64>>,
    /// `--insecure-plaintext`, `insecure_plaintext`.
    pub insecure_plaintext: Option<At<bool>>,
    /// `--metrics`, `metrics`.
    pub metrics: Option<At<SocketAddr>>,
    /// `--log-level`, `--log-format`.
    pub log: LogLayer,
}

impl SendLayer {
    /// Each setting of this layer, else that of `under`. Sources are one setting: files named on
    /// the command line are sent instead of those in the file.
    fn over(self, under: SendLayer) -> SendLayer {
        SendLayer {
            to: source::either(self.to, under.to),
            token_file: self.token_file.or(under.token_file),
            ca: self.ca.or(under.ca),
            state_dir: self.state_dir.or(under.state_dir),
            sources: source::either(self.sources, under.sources),
            once: self.once || under.once,
            receipts: self.receipts.or(under.receipts),
            compress: self.compress.or(under.compress),
            idle_close: self.idle_close.or(under.idle_close),
            drain_timeout: self.drain_timeout.or(under.drain_timeout),
            spool_bytes_max: self.spool_bytes_max.or(under.spool_bytes_max),
            kept_bytes_max: self.kept_bytes_max.or(under.kept_bytes_max),
            insecure_plaintext: self.insecure_plaintext.or(under.insecure_plaintext),
            metrics: self.metrics.or(under.metrics),
            log: self.log.over(under.log),
        }
    }

    fn read(table: &mut Table<'_>) -> SendLayer {
        SendLayer {
            to: table.list("to", value::endpoint),
            token_file: table.path("token_file"),
            ca: table.path("ca"),
            state_dir: table.path("state_dir"),
            sources: table.tables("source", "source.", SourceLayer::read),
            once: false,
            receipts: read_receipts(table),
            compress: table.boolean("compress"),
            idle_close: table.text("idle_close", value::duration),
            drain_timeout: table.text("drain_timeout", value::duration),
            spool_bytes_max: table.size("spool_bytes_max"),
            kept_bytes_max: table.size("kept_bytes_max"),
            insecure_plaintext: table.boolean("insecure_plaintext"),
            metrics: table.text("metrics", value::tcp_address),
            log: LogLayer::read(table),
        }
    }
}

fn read_receipts(table: &mut Table<'_>) -> Option<At<ReceiptsTarget>> {
    let At { value, place } = table.path("receipts")?;
    // A bare `-` was joined to the file's folder like any other relative path.
    let stdout = value.file_name().is_some_and(|name| name == "-");
    let target = if stdout { ReceiptsTarget::Stdout } else { ReceiptsTarget::File(value) };
    Some(At { value: target, place })
}

/// Lays `flags` over the file, where one is named, and checks the whole.
pub fn load_send(
    flags: SendLayer,
    file: Option<&Path>,
    environment: &Environment,
) -> Result<Loaded<SendConfig>, ConfigError> {
    let (layer, findings) = match file {
        Some(path) => {
            let (under, findings) =
                File::open(path, &environment.current_dir)?.walk(SendLayer::read)?;
            (flags.over(under), findings)
        }
        None => (flags, Findings::default()),
    };
    check(layer, findings, environment)
}

fn check(
    layer: SendLayer,
    mut findings: Findings,
    environment: &Environment,
) -> Result<Loaded<SendConfig>, ConfigError> {
    let log = layer.log.check();
    let plain_allowed = layer.insecure_plaintext.as_ref().is_some_and(|at| at.value);
    for endpoint in &layer.to {
        check_endpoint(endpoint, plain_allowed, &mut findings);
    }
    if layer.to.is_empty() {
        findings.missing("to", "no receiver: give --to wss://HOST/, or 'to' in the file");
    }
    match &layer.token_file {
        Some(at) => check::secret_file(at, &mut findings),
        None => findings.missing(
            "token_file",
            "no token: give --token-file FILE (or WAYBILL_TOKEN_FILE), or 'token_file' in the \
             file; 'waybill token NAME --tokens FILE' at the receiver makes one",
        ),
    }
    if let Some(ca) = &layer.ca {
        check::pem_file(ca, "CERTIFICATE", &mut findings);
    }
    if let Some(at) = layer.spool_bytes_max.as_ref().filter(|at| at.value < SPOOL_BYTES_MIN) {
        findings.problem(&at.place, "must be at least 4MiB, to hold a few of the longest lines");
    }
    let state_dir = check_state_dir(layer.state_dir, environment, &mut findings);
    let sources =
        check_sources(layer.sources, layer.once, plain_allowed, environment, &mut findings);
    if let Some(at) = layer.receipts.as_ref().filter(|at| at.value == ReceiptsTarget::Stdout)
        && sources.iter().any(|source| source.input == Input::SupervisorEvents)
    {
        let message = "supervisor's events are answered on standard output: name a file instead";
        findings.problem(&at.place, message);
    }
    if let Some(at) = &layer.metrics {
        check::metrics_address(at, plain_allowed, &mut findings);
    }
    let receipts = layer.receipts.map(|at| at.value);
    let receipts_on_terminal =
        receipts == Some(ReceiptsTarget::Stdout) && environment.stdout_is_terminal;
    let config = state_dir.map(|state_dir| SendConfig {
        to: layer.to.into_iter().map(|at| at.value).collect(),
        // A missing one was found above, so that this configuration never leaves `finish`.
        token_file: layer.token_file.map(|at| at.value).unwrap_or_default(),
        ca: layer.ca.map(|at| at.value),
        state_dir,
        sources,
        once: layer.once,
        receipts,
        compress: layer.compress.is_some_and(|at| at.value),
        idle_close: layer.idle_close.map(|at| at.value),
        drain_timeout: layer.drain_timeout.map_or(DRAIN_TIMEOUT, |at| at.value),
        spool_bytes_max: layer.spool_bytes_max.map_or(DISK_BYTES_MAX, |at| at.value),
        kept_bytes_max: layer.kept_bytes_max.map_or(DISK_BYTES_MAX, |at| at.value),
        progress: layer.once
            && environment.stderr_is_terminal
            && !receipts_on_terminal
            && log.format == check::LogFormat::Text,
        metrics: layer.metrics.map(|at| at.value),
    });
    let (config, warnings) = findings.finish(config)?;
    Ok(Loaded { config, log, warnings })
}

fn check_endpoint(endpoint: &At<Endpoint>, plain_allowed: bool, findings: &mut Findings) {
    match &endpoint.value.address {
        EndpointAddress::Unix(path) => check::socket_path(path, &endpoint.place, findings),
        EndpointAddress::Tcp { host, .. } if !endpoint.value.tls && !value::is_loopback(host) => {
            let url = &endpoint.value.url;
            if plain_allowed {
                let message = format!("{url} sends the token and every line unencrypted");
                findings.warning(&endpoint.place, &message);
            } else {
                let message = format!(
                    "{url} would send the token and every line unencrypted: use wss://, or allow \
                     it with --insecure-plaintext (insecure_plaintext = true)"
                );
                findings.problem(&endpoint.place, message);
            }
        }
        EndpointAddress::Tcp { .. } => {}
    }
}

/// Posts come without a password and unencrypted: fit for one machine.
fn check_intake(address: SocketAddr, plain_allowed: bool, place: &Place, findings: &mut Findings) {
    if address.ip().to_canonical().is_loopback() {
        return;
    }
    if plain_allowed {
        let message = format!("{address} takes lines from anybody who reaches it, unencrypted");
        findings.warning(place, &message);
    } else {
        let message = format!(
            "{address} would take lines from anybody who reaches it, unencrypted: use 127.0.0.1, \
             or allow it with --insecure-plaintext (insecure_plaintext = true)"
        );
        findings.problem(place, message);
    }
}

fn check_state_dir(
    typed: Option<At<PathBuf>>,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<PathBuf> {
    match typed {
        Some(at) if at.value.exists() && !at.value.is_dir() => {
            findings.problem(&at.place, format!("{} is not a directory", at.value.display()));
            None
        }
        Some(at) => Some(at.value),
        None => environment.default_state_dir().or_else(|| {
            findings.missing(
                "state_dir",
                "no place for the state: give --state-dir DIR, or set HOME or XDG_STATE_HOME",
            );
            None
        }),
    }
}

fn check_sources(
    layers: Vec<SourceLayer>,
    once: bool,
    plain_allowed: bool,
    environment: &Environment,
    findings: &mut Findings,
) -> Vec<SourceConfig> {
    if layers.is_empty() {
        findings.missing(
            "source",
            "nothing to send: name a FILE, a pattern, '-' or a socket, or a [[source]] in the file",
        );
    }
    let mut names: BTreeMap<String, Place> = BTreeMap::new();
    let mut sources: Vec<SourceConfig> = Vec::new();
    for layer in layers {
        let place = layer.place.clone();
        let input_place = layer.inputs.first().map_or(&place, |at| &at.place).clone();
        let Some(source) = layer.check(once, environment, findings) else { continue };
        if let Input::HttpIntake { address } = source.input {
            check_intake(address, plain_allowed, &input_place, findings);
        }
        if let Some(twin) = sources.iter().find(|other| same_input(&other.input, &source.input)) {
            let name = &twin.name;
            findings.problem(&place, format!("the same is read by source {name:?} already"));
        } else if let Some(first) = names.get(&source.name) {
            let message = format!("name {:?} is taken by {first}: names are unique", source.name);
            findings.problem(&place, message);
        } else {
            names.insert(source.name.clone(), place);
            sources.push(source);
        }
    }
    sources
}

/// Whether both would read the same bytes: there is one standard input.
fn same_input(one: &Input, other: &Input) -> bool {
    let is_stdin = |input: &Input| matches!(input, Input::Stdin | Input::SupervisorEvents);
    one == other || is_stdin(one) && is_stdin(other)
}
