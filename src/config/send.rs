//! `waybill send`: what was typed, on the command line and in TOML, becomes a [`SendConfig`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{self, LogLayer};
use super::file::{File, Table};
use super::problem::{At, ConfigError, Findings, Place};
use super::proxy::{self, ProxySetting};
use super::receive::{absolute_listen, check_listen};
use super::source::{self, SourceLayer};
use super::value;
use super::{
    ConnectionConfig, DialConfig, Endpoint, EndpointAddress, Environment, ImportConfig, Input,
    Listen, ListenConfig, Loaded, ReceiptsTarget, SendConfig, SourceConfig,
};

/// How long `--once` tries lines again that an index refuses, unless configured.
pub const ONCE_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a stop waits for outstanding receipts unless configured.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Budget of the spool, and of copies of deleted files, unless configured: 1 GiB.
pub const DISK_BYTES_MAX: u64 = 1 << 30;

/// A spool must take at least a few of the largest records.
const SPOOL_BYTES_MIN: u64 = 4 << 20;

/// Below it even a ping would wait for seconds.
const RATE_LIMIT_MIN: u64 = 1 << 10;

/// Settings of `waybill send` as typed in one place; paths are absolute.
#[derive(Clone, Debug, Default)]
pub struct SendLayer {
    /// `--to`, `to`.
    pub to: Vec<At<Endpoint>>,
    /// `--token-file`, `token_file`.
    pub token_file: Option<At<PathBuf>>,
    /// `--ca`, `ca`.
    pub ca: Option<At<PathBuf>>,
    /// `--balance`, `balance`.
    pub balance: Option<At<bool>>,
    /// `idle_close`.
    pub idle_close: Option<At<Duration>>,
    /// `--listen`, `listen`.
    pub listen: Option<At<Listen>>,
    /// `--tls-cert`, `tls_cert`.
    pub tls_cert: Option<At<PathBuf>>,
    /// `--tls-key`, `tls_key`.
    pub tls_key: Option<At<PathBuf>>,
    /// `--tokens`, `tokens`.
    pub tokens: Option<At<PathBuf>>,
    /// `--proxy`, `proxy`.
    pub proxy: Option<At<ProxySetting>>,
    /// `--rate-limit`, `rate_limit`.
    pub rate_limit: Option<At<u64>>,
    /// `--cert`, `cert`.
    pub cert: Option<At<PathBuf>>,
    /// `--key`, `key`.
    pub key: Option<At<PathBuf>>,
    /// `--state-dir`, `state_dir`.
    pub state_dir: Option<At<PathBuf>>,
    /// Files and sockets, `[[source]]`.
    pub sources: Vec<SourceLayer>,
    /// `--once`.
    pub once: bool,
    /// `--once-timeout`, `once_timeout`.
    pub once_timeout: Option<At<Duration>>,
    /// `--receipts`, `receipts`.
    pub receipts: Option<At<ReceiptsTarget>>,
    /// `--compress`, `compress`.
    pub compress: Option<At<bool>>,
    /// `--drain-timeout`, `drain_timeout`.
    pub drain_timeout: Option<At<Duration>>,
    /// `--spool-bytes-max`, `spool_bytes_max`.
    pub spool_bytes_max: Option<At<u64>>,
    /// `--kept-bytes-max`, `kept_bytes_max`.
    pub kept_bytes_max: Option<At<u64>>,
    /// `--insecure-plaintext`, `insecure_plaintext`.
    pub insecure_plaintext: Option<At<bool>>,
    /// `--log-level`, `--log-format`.
    pub log: LogLayer,
}

impl SendLayer {
    /// Each setting of this layer, else that of `under`. Sources are one setting: files named on
    /// the command line are sent instead of those in the file. Naming the other side to dial on the
    /// command line drops how it is in the file.
    fn over(self, mut under: SendLayer) -> SendLayer {
        if self.listen.is_some() {
            (under.to, under.ca, under.idle_close) = (Vec::new(), None, None);
            (under.balance, under.proxy) = (None, None);
        }
        if !self.to.is_empty() {
            (under.listen, under.tokens) = (None, None);
            (under.tls_cert, under.tls_key) = (None, None);
        }
        SendLayer {
            to: source::either(self.to, under.to),
            token_file: self.token_file.or(under.token_file),
            ca: self.ca.or(under.ca),
            balance: self.balance.or(under.balance),
            idle_close: self.idle_close.or(under.idle_close),
            listen: self.listen.or(under.listen),
            tls_cert: self.tls_cert.or(under.tls_cert),
            tls_key: self.tls_key.or(under.tls_key),
            tokens: self.tokens.or(under.tokens),
            proxy: self.proxy.or(under.proxy),
            rate_limit: self.rate_limit.or(under.rate_limit),
            cert: self.cert.or(under.cert),
            key: self.key.or(under.key),
            state_dir: self.state_dir.or(under.state_dir),
            sources: source::either(self.sources, under.sources),
            once: self.once || under.once,
            once_timeout: self.once_timeout.or(under.once_timeout),
            receipts: self.receipts.or(under.receipts),
            compress: self.compress.or(under.compress),
            drain_timeout: self.drain_timeout.or(under.drain_timeout),
            spool_bytes_max: self.spool_bytes_max.or(under.spool_bytes_max),
            kept_bytes_max: self.kept_bytes_max.or(under.kept_bytes_max),
            insecure_plaintext: self.insecure_plaintext.or(under.insecure_plaintext),
            log: self.log.over(under.log),
        }
    }

    fn read(table: &mut Table<'_>) -> SendLayer {
        let base = table.base().to_owned();
        SendLayer {
            to: table.list("to", value::endpoint),
            token_file: table.path("token_file"),
            ca: table.path("ca"),
            balance: table.boolean("balance"),
            idle_close: table.text("idle_close", value::duration),
            listen: table
                .text("listen", value::listen)
                .map(|at| at.map(|listen| absolute_listen(listen, &base))),
            tls_cert: table.path("tls_cert"),
            tls_key: table.path("tls_key"),
            tokens: table.path("tokens"),
            proxy: table.text("proxy", proxy::proxy),
            rate_limit: table.size("rate_limit"),
            cert: table.path("cert"),
            key: table.path("key"),
            state_dir: table.path("state_dir"),
            sources: table.tables("source", "source.", SourceLayer::read),
            once: false,
            once_timeout: table.text("once_timeout", value::duration),
            receipts: read_receipts(table),
            compress: table.boolean("compress"),
            drain_timeout: table.text("drain_timeout", value::duration),
            spool_bytes_max: table.size("spool_bytes_max"),
            kept_bytes_max: table.size("kept_bytes_max"),
            insecure_plaintext: table.boolean("insecure_plaintext"),
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
    let (layer, findings) = lay_over(flags, file, environment)?;
    check(layer, findings, environment)
}

/// The same for `waybill import`, which needs neither a receiver nor its token.
pub fn load_import(
    flags: SendLayer,
    file: Option<&Path>,
    environment: &Environment,
) -> Result<Loaded<ImportConfig>, ConfigError> {
    let (layer, mut findings) = lay_over(flags, file, environment)?;
    let log = layer.log.check();
    let plain_allowed = layer.insecure_plaintext.as_ref().is_some_and(|at| at.value);
    let state_dir = check_state_dir(layer.state_dir, environment, &mut findings);
    let sources = check_sources(layer.sources, false, plain_allowed, environment, &mut findings);
    let config = state_dir.map(|state_dir| ImportConfig { state_dir, sources });
    let (config, warnings) = findings.finish(config)?;
    Ok(Loaded { config, log, warnings })
}

fn lay_over(
    flags: SendLayer,
    file: Option<&Path>,
    environment: &Environment,
) -> Result<(SendLayer, Findings), ConfigError> {
    Ok(match file {
        Some(path) => {
            let (under, findings) =
                File::open(path, &environment.current_dir)?.walk(SendLayer::read)?;
            (flags.over(under), findings)
        }
        None => (flags, Findings::default()),
    })
}

fn check(
    mut layer: SendLayer,
    mut findings: Findings,
    environment: &Environment,
) -> Result<Loaded<SendConfig>, ConfigError> {
    let log = std::mem::take(&mut layer.log).check();
    let plain_allowed = layer.insecure_plaintext.as_ref().is_some_and(|at| at.value);
    let connection = check_connection(&mut layer, plain_allowed, environment, &mut findings);
    if let Some(at) = layer.rate_limit.as_ref().filter(|at| at.value < RATE_LIMIT_MIN) {
        findings.problem(&at.place, "must be at least 1KiB, per second");
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
    let receipts = layer.receipts.map(|at| at.value);
    let receipts_on_terminal =
        receipts == Some(ReceiptsTarget::Stdout) && environment.stdout_is_terminal;
    let config = connection.zip(state_dir).map(|(connection, state_dir)| SendConfig {
        connection,
        state_dir,
        sources,
        once: layer.once,
        once_timeout: layer.once_timeout.map_or(ONCE_TIMEOUT, |at| at.value),
        receipts,
        compress: layer.compress.is_some_and(|at| at.value),
        rate_limit: layer.rate_limit.map(|at| at.value),
        drain_timeout: layer.drain_timeout.map_or(DRAIN_TIMEOUT, |at| at.value),
        spool_bytes_max: layer.spool_bytes_max.map_or(DISK_BYTES_MAX, |at| at.value),
        kept_bytes_max: layer.kept_bytes_max.map_or(DISK_BYTES_MAX, |at| at.value),
        progress: layer.once
            && environment.stderr_is_terminal
            && !receipts_on_terminal
            && log.format == check::LogFormat::Text,
    });
    let (config, warnings) = findings.finish(config)?;
    Ok(Loaded { config, log, warnings })
}

/// Takes out of the layer who opens the connection.
fn check_connection(
    layer: &mut SendLayer,
    plain_allowed: bool,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<ConnectionConfig> {
    if layer.listen.is_some() {
        check_listening(layer, plain_allowed, findings).map(ConnectionConfig::Listen)
    } else {
        Some(ConnectionConfig::Dial(check_dialling(layer, plain_allowed, environment, findings)))
    }
}

fn check_dialling(
    layer: &mut SendLayer,
    plain_allowed: bool,
    environment: &Environment,
    findings: &mut Findings,
) -> DialConfig {
    let mut to = std::mem::take(&mut layer.to);
    let proxy = layer.proxy.take();
    for endpoint in &mut to {
        check_endpoint(endpoint, plain_allowed, findings);
        match proxy::choose(proxy.as_ref().map(|at| &at.value), &endpoint.value, environment) {
            Ok(proxy) => endpoint.value.proxy = proxy,
            Err(message) => findings.problem(&endpoint.place, message),
        }
    }
    if to.is_empty() {
        findings.missing(
            "to",
            "no receiver: give --to wss://HOST/, or 'to' in the file; or --listen HOST:PORT, where \
             the receiver dials",
        );
    }
    for at in [&layer.tls_cert, &layer.tls_key, &layer.tokens].into_iter().flatten() {
        let message = "only a sender that is dialled needs it: give --listen HOST:PORT (listen)";
        findings.problem(&at.place, message);
    }
    let token_file = layer.token_file.take();
    match &token_file {
        Some(at) => check::secret_file(at, findings),
        None => findings.missing(
            "token_file",
            "no token: give --token-file FILE (or WAYBILL_TOKEN_FILE), or 'token_file' in the \
             file; 'waybill token NAME --tokens FILE' at the receiver makes one",
        ),
    }
    let ca = layer.ca.take();
    if let Some(ca) = &ca {
        check::pem_file(ca, "CERTIFICATE", findings);
    }
    if let Some(at) = layer.cert.as_ref().filter(|_| !to.iter().any(|to| to.value.tls)) {
        findings
            .problem(&at.place, "a certificate is shown over wss:// only, and no receiver has it");
    }
    let names = ("--cert FILE (cert)", "--key FILE (key)");
    let identity = check::identity(layer.cert.take(), layer.key.take(), names, findings);
    DialConfig {
        to: to.into_iter().map(|at| at.value).collect(),
        // A missing one was found above, so that this configuration never leaves `finish`.
        token_file: token_file.map(|at| at.value).unwrap_or_default(),
        ca: ca.map(|at| at.value),
        identity,
        balance: layer.balance.take().is_some_and(|at| at.value),
        idle_close: layer.idle_close.take().map(|at| at.value),
    }
}

/// A token file is passed over: it may be named by the environment, for another command.
fn check_listening(
    layer: &mut SendLayer,
    plain_allowed: bool,
    findings: &mut Findings,
) -> Option<ListenConfig> {
    if let Some(to) = layer.to.first() {
        let message = "a sender dials or is dialled: give 'to' or 'listen', not both";
        findings.problem(&to.place, message);
    }
    if let Some(balance) = layer.balance.as_ref().filter(|at| at.value) {
        findings.problem(&balance.place, "only a sender that dials can balance: remove it");
    }
    if let Some(proxy) = &layer.proxy {
        findings.problem(&proxy.place, "only a sender that dials passes a proxy: remove it");
    }
    if let Some(ca) = &layer.ca {
        let message = "only a sender that dials checks a certificate: remove it";
        findings.problem(&ca.place, message);
    }
    for at in [&layer.cert, &layer.key].into_iter().flatten() {
        let message = "only a sender that dials shows a client certificate: remove it";
        findings.problem(&at.place, message);
    }
    if let Some(idle_close) = &layer.idle_close {
        let message = "a sender that cannot dial keeps its connection: remove it";
        findings.problem(&idle_close.place, message);
    }
    let names = ("--tls-cert FILE (tls_cert)", "--tls-key FILE (tls_key)");
    let tls = check::identity(layer.tls_cert.take(), layer.tls_key.take(), names, findings);
    let listen = check_listen(layer.listen.take(), tls.is_some(), plain_allowed, findings);
    let tokens = layer.tokens.take();
    check::tokens_file(tokens.as_ref(), findings);
    // A missing file was found, so that this configuration never leaves `finish`.
    let tokens = tokens.map(|at| at.value).unwrap_or_default();
    listen.map(|listen| ListenConfig { listen, tls, tokens })
}

pub(super) fn check_endpoint(
    endpoint: &At<Endpoint>,
    plain_allowed: bool,
    findings: &mut Findings,
) {
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
        if once && !matches!(source.input, Input::Files { .. } | Input::Stdin) {
            let message = "--once sends what is there and ends, and a listener has no end: leave \
                           out --once, or name files or '-' instead";
            findings.problem(&input_place, message);
        }
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
