//! `waybill receive`: what was typed, on the command line and in TOML, becomes a
//! [`ReceiveConfig`].

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{self, LogLayer};
use super::dial::{self, DialLayer};
use super::file::{File, Table};
use super::problem::{At, ConfigError, Findings};
use super::proxy::{self, ProxySetting};
use super::send::DRAIN_TIMEOUT;
use super::source::either;
use super::value;
use super::{
    DestinationConfig, ElasticsearchAuth, ElasticsearchConfig, EmbeddedConfig, Environment, Listen,
    Loaded, ReceiveConfig,
};
use crate::protocol::FRAME_BYTES_MAX;
use crate::record::IndexRule;

/// The index of parked lines unless configured. The default rule cannot make this name.
pub const DEAD_LETTER_INDEX: &str = "waybill-parked";

/// Uncompressed bytes that a connection may have without a receipt, unless configured: 8 MiB,
/// which fills 600 Mbit/s at 100 ms there and back.
pub const CREDIT_BYTES: u64 = 8 << 20;

/// Bytes of frames that the whole receiver holds, unless configured: 32 MiB.
pub const MEMORY_BYTES_MAX: u64 = 32 << 20;

/// Largest bulk body to start with, unless configured: 5 MiB.
pub const BATCH_BYTES_MAX: u64 = 5 << 20;

/// Bulk requests in flight, unless configured.
pub const REQUESTS: u32 = 2;

/// Oldest and newest day accepted unless configured, relative to today.
pub const DAYS: (i32, i32) = (-400, 2);

/// Settings of `waybill receive` as typed in one place; paths are absolute.
#[derive(Clone, Debug, Default)]
pub struct ReceiveLayer {
    /// `--listen`, `listen`.
    pub listen: Option<At<Listen>>,
    /// `--tls-cert`, `tls_cert`.
    pub tls_cert: Option<At<PathBuf>>,
    /// `--tls-key`, `tls_key`.
    pub tls_key: Option<At<PathBuf>>,
    /// `--dial`, `[[dial]]`.
    pub dials: Vec<DialLayer>,
    /// `--token-file`, `token_file`.
    pub token_file: Option<At<PathBuf>>,
    /// `--ca`, `ca`.
    pub ca: Option<At<PathBuf>>,
    /// `--proxy`, `proxy`.
    pub proxy: Option<At<ProxySetting>>,
    /// `--client-ca`, `client_ca`.
    pub client_ca: Option<At<PathBuf>>,
    /// `--trust-client-headers`, `trust_client_headers`.
    pub trust_client_headers: Option<At<bool>>,
    /// `--tokens`, `tokens`.
    pub tokens: Option<At<PathBuf>>,
    /// `--elasticsearch` and its companions, `[elasticsearch]`.
    pub elasticsearch: ElasticsearchLayer,
    /// `--store` and its companions, `[store]`.
    pub store: StoreLayer,
    /// `--index`, `index`.
    pub index: Option<At<IndexRule>>,
    /// `--former-index`, `former_index`.
    pub former_index: Vec<At<IndexRule>>,
    /// `days_before`.
    pub days_before: Option<At<u32>>,
    /// `days_after`.
    pub days_after: Option<At<u32>>,
    /// `credit`.
    pub credit: Option<At<u64>>,
    /// `memory_bytes_max`.
    pub memory_bytes_max: Option<At<u64>>,
    /// `--drain-timeout`, `drain_timeout`.
    pub drain_timeout: Option<At<Duration>>,
    /// `--insecure-plaintext`, `insecure_plaintext`.
    pub insecure_plaintext: Option<At<bool>>,
    /// `--metrics`, `metrics`.
    pub metrics: Option<At<SocketAddr>>,
    /// `--log-level`, `--log-format`.
    pub log: LogLayer,
}

/// How Elasticsearch is reached, as typed.
#[derive(Clone, Debug, Default)]
pub struct ElasticsearchLayer {
    /// `--elasticsearch`, `elasticsearch.urls`.
    pub urls: Vec<At<String>>,
    /// `--api-key-file`, `elasticsearch.api_key_file`.
    pub api_key_file: Option<At<PathBuf>>,
    /// `--es-user-file`, `elasticsearch.user_file`.
    pub user_file: Option<At<PathBuf>>,
    /// `--es-ca`, `elasticsearch.ca`.
    pub ca: Option<At<PathBuf>>,
    /// `--dead-letter-index`, `elasticsearch.dead_letter_index`.
    pub dead_letter_index: Option<At<String>>,
    /// `elasticsearch.batch_bytes_max`.
    pub batch_bytes_max: Option<At<u64>>,
    /// `elasticsearch.requests`.
    pub requests: Option<At<u32>>,
}

/// The embedded store, as typed.
#[derive(Clone, Debug, Default)]
pub struct StoreLayer {
    /// `--store`, `store.file`.
    pub file: Option<At<PathBuf>>,
    /// `--keep-days`, `store.keep_days`.
    pub keep_days: Option<At<u32>>,
    /// `--keep-bytes`, `store.keep_bytes`.
    pub keep_bytes: Option<At<u64>>,
}

impl ReceiveLayer {
    /// Each setting of this layer, else that of `under`. Naming the other kind of destination on
    /// the command line drops the one in the file.
    fn over(self, mut under: ReceiveLayer) -> ReceiveLayer {
        if self.store.file.is_some() {
            under.elasticsearch = ElasticsearchLayer::default();
        }
        if !self.elasticsearch.urls.is_empty() {
            under.store = StoreLayer::default();
        }
        ReceiveLayer {
            listen: self.listen.or(under.listen),
            tls_cert: self.tls_cert.or(under.tls_cert),
            tls_key: self.tls_key.or(under.tls_key),
            dials: either(self.dials, under.dials),
            token_file: self.token_file.or(under.token_file),
            ca: self.ca.or(under.ca),
            proxy: self.proxy.or(under.proxy),
            client_ca: self.client_ca.or(under.client_ca),
            trust_client_headers: self.trust_client_headers.or(under.trust_client_headers),
            tokens: self.tokens.or(under.tokens),
            elasticsearch: self.elasticsearch.over(under.elasticsearch),
            store: StoreLayer {
                file: self.store.file.or(under.store.file),
                keep_days: self.store.keep_days.or(under.store.keep_days),
                keep_bytes: self.store.keep_bytes.or(under.store.keep_bytes),
            },
            index: self.index.or(under.index),
            former_index: either(self.former_index, under.former_index),
            days_before: self.days_before.or(under.days_before),
            days_after: self.days_after.or(under.days_after),
            credit: self.credit.or(under.credit),
            memory_bytes_max: self.memory_bytes_max.or(under.memory_bytes_max),
            drain_timeout: self.drain_timeout.or(under.drain_timeout),
            insecure_plaintext: self.insecure_plaintext.or(under.insecure_plaintext),
            metrics: self.metrics.or(under.metrics),
            log: self.log.over(under.log),
        }
    }

    fn read(table: &mut Table<'_>) -> ReceiveLayer {
        let base = table.base().to_owned();
        ReceiveLayer {
            listen: table
                .text("listen", value::listen)
                .map(|at| at.map(|listen| absolute_listen(listen, &base))),
            tls_cert: table.path("tls_cert"),
            tls_key: table.path("tls_key"),
            dials: table.tables("dial", "dial.", DialLayer::read),
            token_file: table.path("token_file"),
            ca: table.path("ca"),
            proxy: table.text("proxy", proxy::proxy),
            client_ca: table.path("client_ca"),
            trust_client_headers: table.boolean("trust_client_headers"),
            tokens: table.path("tokens"),
            elasticsearch: table
                .table("elasticsearch", "elasticsearch.", ElasticsearchLayer::read)
                .unwrap_or_default(),
            store: table
                .table("store", "store.", |table| StoreLayer {
                    file: table.path("file"),
                    keep_days: table.integer("keep_days", 1..=36_500),
                    keep_bytes: table.size("keep_bytes"),
                })
                .unwrap_or_default(),
            index: table.text("index", value::index_rule),
            former_index: table.list("former_index", value::index_rule),
            days_before: table.integer("days_before", 0..=36_500),
            days_after: table.integer("days_after", 0..=36_500),
            credit: table.size("credit"),
            memory_bytes_max: table.size("memory_bytes_max"),
            drain_timeout: table.text("drain_timeout", value::duration),
            insecure_plaintext: table.boolean("insecure_plaintext"),
            metrics: table.text("metrics", value::tcp_address),
            log: LogLayer::read(table),
        }
    }
}

impl ElasticsearchLayer {
    fn read(table: &mut Table<'_>) -> ElasticsearchLayer {
        ElasticsearchLayer {
            urls: table.list("urls", value::elasticsearch_url),
            api_key_file: table.path("api_key_file"),
            user_file: table.path("user_file"),
            ca: table.path("ca"),
            dead_letter_index: table.text("dead_letter_index", value::index_name),
            batch_bytes_max: table.size("batch_bytes_max"),
            requests: table.integer("requests", 1..=64),
        }
    }

    /// One way of authentication replaces the other.
    fn over(self, under: ElasticsearchLayer) -> ElasticsearchLayer {
        let authenticates = self.api_key_file.is_some() || self.user_file.is_some();
        let (under_key, under_user) =
            if authenticates { (None, None) } else { (under.api_key_file, under.user_file) };
        ElasticsearchLayer {
            urls: either(self.urls, under.urls),
            api_key_file: self.api_key_file.or(under_key),
            user_file: self.user_file.or(under_user),
            ca: self.ca.or(under.ca),
            dead_letter_index: self.dead_letter_index.or(under.dead_letter_index),
            batch_bytes_max: self.batch_bytes_max.or(under.batch_bytes_max),
            requests: self.requests.or(under.requests),
        }
    }
}

/// A relative socket path, from the folder where it was typed.
pub(super) fn absolute_listen(listen: Listen, base: &Path) -> Listen {
    match listen {
        Listen::Unix(path) => Listen::Unix(base.join(path)),
        tcp @ Listen::Tcp(_) => tcp,
    }
}

/// Lays `flags` over the file, where one is named, and checks the whole.
pub fn load_receive(
    flags: ReceiveLayer,
    file: Option<&Path>,
    environment: &Environment,
) -> Result<Loaded<ReceiveConfig>, ConfigError> {
    let (layer, findings) = match file {
        Some(path) => {
            let (under, findings) =
                File::open(path, &environment.current_dir)?.walk(ReceiveLayer::read)?;
            (flags.over(under), findings)
        }
        None => (flags, Findings::default()),
    };
    check(layer, findings, environment)
}

fn check(
    layer: ReceiveLayer,
    mut findings: Findings,
    environment: &Environment,
) -> Result<Loaded<ReceiveConfig>, ConfigError> {
    let log = layer.log.check();
    let names = ("--tls-cert FILE (tls_cert)", "--tls-key FILE (tls_key)");
    let tls = check::identity(layer.tls_cert, layer.tls_key, names, &mut findings);
    let plain_allowed = layer.insecure_plaintext.as_ref().is_some_and(|at| at.value);
    if layer.listen.is_none() && layer.dials.is_empty() {
        findings.missing(
            "listen",
            "no address: give --listen HOST:PORT or --listen unix:PATH, or 'listen' in the file; or \
             dial senders with --dial NAME=URL, or [[dial]] in the file",
        );
    }
    let listen = check_listen(layer.listen, tls.is_some(), plain_allowed, &mut findings);
    if let Some(at) = &layer.client_ca {
        check::pem_file(at, "CERTIFICATE", &mut findings);
        if tls.is_none() {
            let message = "client certificates come with TLS: give --tls-cert and --tls-key too \
                           (tls_cert, tls_key)";
            findings.problem(&at.place, message);
        }
    }
    let trust_client_headers = layer.trust_client_headers.filter(|at| at.value);
    if let (Some(at), Some(Listen::Tcp(_))) = (&trust_client_headers, &listen) {
        let message = "anybody who reaches a TCP address could forge these headers: let the proxy \
                       connect to a Unix socket (listen = \"unix:PATH\")";
        findings.problem(&at.place, message);
    }
    let dials = dial::check(
        layer.dials,
        dial::Defaults { token_file: layer.token_file, ca: layer.ca, proxy: layer.proxy },
        plain_allowed,
        environment,
        &mut findings,
    );
    check::tokens_file(layer.tokens.as_ref(), &mut findings);
    if let Some(at) = &layer.metrics {
        check::metrics_address(at, plain_allowed, &mut findings);
    }
    let rule = layer.index.map(|at| at.value).unwrap_or_default();
    let destination =
        check_destination(layer.elasticsearch, layer.store, &rule, environment, &mut findings);
    for at in [&layer.credit, &layer.memory_bytes_max].into_iter().flatten() {
        if at.value < FRAME_BYTES_MAX as u64 {
            let message = format!("must be at least one largest frame, {FRAME_BYTES_MAX} bytes");
            findings.problem(&at.place, message);
        }
    }
    let days = (
        layer.days_before.map_or(DAYS.0, |at| -i32::try_from(at.value).unwrap_or(i32::MAX)),
        layer.days_after.map_or(DAYS.1, |at| i32::try_from(at.value).unwrap_or(i32::MAX)),
    );
    let config = destination.map(|destination| ReceiveConfig {
        listen,
        tls,
        dials,
        client_ca: layer.client_ca.map(|at| at.value),
        trust_client_headers: trust_client_headers.is_some(),
        // A missing one was found above, so that this configuration never leaves `finish`.
        tokens: layer.tokens.map(|at| at.value).unwrap_or_default(),
        destination,
        rule,
        former_rules: layer.former_index.into_iter().map(|at| at.value).collect(),
        days,
        credit: layer.credit.map_or(CREDIT_BYTES, |at| at.value),
        memory_bytes_max: layer.memory_bytes_max.map_or(MEMORY_BYTES_MAX, |at| at.value),
        drain_timeout: layer.drain_timeout.map_or(DRAIN_TIMEOUT, |at| at.value),
        metrics: layer.metrics.map(|at| at.value),
    });
    let (config, warnings) = findings.finish(config)?;
    Ok(Loaded { config, log, warnings })
}

pub(super) fn check_listen(
    typed: Option<At<Listen>>,
    has_tls: bool,
    plain_allowed: bool,
    findings: &mut Findings,
) -> Option<Listen> {
    let At { value: listen, place } = typed?;
    match &listen {
        Listen::Unix(path) => check::socket_path(path, &place, findings),
        Listen::Tcp(address) if !has_tls && !address.ip().to_canonical().is_loopback() => {
            if plain_allowed {
                let message = format!("{address} takes tokens and lines unencrypted");
                findings.warning(&place, &message);
            } else {
                let message = format!(
                    "{address} would take tokens and lines unencrypted: give --tls-cert and \
                     --tls-key, listen on 127.0.0.1 or a Unix socket behind a proxy, or allow it \
                     with --insecure-plaintext (insecure_plaintext = true)"
                );
                findings.problem(&place, message);
            }
        }
        Listen::Tcp(_) => {}
    }
    Some(listen)
}

fn check_destination(
    elasticsearch: ElasticsearchLayer,
    store: StoreLayer,
    rule: &IndexRule,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<DestinationConfig> {
    if elasticsearch.urls.is_empty() {
        return check_store(elasticsearch, store, environment, findings)
            .map(DestinationConfig::Embedded);
    }
    let bounds = store.keep_days.as_ref().map(|at| &at.place);
    let bounds = bounds.or(store.keep_bytes.as_ref().map(|at| &at.place));
    if let Some(file) = &store.file {
        let message = "there is one destination: name Elasticsearch or a store, not both";
        findings.problem(&file.place, message);
    } else if let Some(place) = bounds {
        let message = "only the embedded store is bounded here: Elasticsearch has index lifecycle \
                       policies for that";
        findings.problem(place, message);
    }
    check_elasticsearch(elasticsearch, Some(rule), findings).map(DestinationConfig::Elasticsearch)
}

fn check_store(
    elasticsearch: ElasticsearchLayer,
    store: StoreLayer,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<EmbeddedConfig> {
    const NO_URL: &str = "no Elasticsearch is named: give --elasticsearch URL (elasticsearch.urls)";
    let strays = [
        elasticsearch.user_file.map(|at| at.place),
        elasticsearch.ca.map(|at| at.place),
        elasticsearch.dead_letter_index.map(|at| at.place),
        elasticsearch.batch_bytes_max.map(|at| at.place),
        elasticsearch.requests.map(|at| at.place),
    ];
    for place in strays.into_iter().flatten() {
        findings.problem(&place, NO_URL);
    }
    if let Some(at) = elasticsearch.api_key_file {
        // It may stand in the environment for other commands, and so is no fault.
        findings.warning(&at.place, "not used: no Elasticsearch is named");
    }
    if let Some(at) = store.keep_bytes.as_ref().filter(|at| at.value < 1 << 20) {
        findings.problem(&at.place, "must be at least 1MiB");
    }
    let file = store.file.map(|at| at.value);
    let file = file.or_else(|| default_store(environment));
    if file.is_none() {
        findings.missing("store.file", "no place for the store: give --store FILE, or set HOME");
    }
    file.map(|file| EmbeddedConfig {
        file,
        keep_days: store.keep_days.map(|at| at.value),
        keep_bytes: store.keep_bytes.map(|at| at.value),
    })
}

/// Where the embedded store lies unless it is configured.
pub fn default_store(environment: &Environment) -> Option<PathBuf> {
    environment.default_state_dir().map(|dir| dir.join("store.sqlite"))
}

fn check_elasticsearch(
    layer: ElasticsearchLayer,
    rule: Option<&IndexRule>,
    findings: &mut Findings,
) -> Option<ElasticsearchConfig> {
    let auth = match (layer.api_key_file, layer.user_file) {
        (Some(_), Some(user)) => {
            findings.problem(&user.place, "give an API key or a user, not both");
            ElasticsearchAuth::None
        }
        (Some(key), None) => {
            check::secret_file(&key, findings);
            ElasticsearchAuth::ApiKey(key.value)
        }
        (None, Some(user)) => {
            check::secret_file(&user, findings);
            ElasticsearchAuth::Basic(user.value)
        }
        (None, None) => ElasticsearchAuth::None,
    };
    if let Some(ca) = &layer.ca {
        check::pem_file(ca, "CERTIFICATE", findings);
    }
    if auth != ElasticsearchAuth::None {
        for url in layer.urls.iter().filter(|url| sends_openly(&url.value)) {
            let message = format!("{} gets the credentials unencrypted: use https://", url.value);
            findings.warning(&url.place, &message);
        }
    }
    let dead_letter = layer.dead_letter_index;
    if let Some(at) = &dead_letter
        && rule.is_some_and(|rule| rule.as_str() == at.value)
    {
        findings.problem(&at.place, "parked lines need an index of their own");
    }
    let batch_bytes_max = layer.batch_bytes_max.as_ref().map_or(BATCH_BYTES_MAX, |at| at.value);
    if let Some(at) = layer.batch_bytes_max.filter(|at| !(1 << 16..=1 << 30).contains(&at.value)) {
        findings.problem(&at.place, "must be from 64KiB to 1GiB");
    }
    Some(ElasticsearchConfig {
        urls: layer.urls.into_iter().map(|at| at.value).collect(),
        auth,
        ca: layer.ca.map(|at| at.value),
        batch_bytes_max: usize::try_from(batch_bytes_max).ok()?,
        requests: layer.requests.map_or(REQUESTS, |at| at.value) as usize,
        dead_letter_index: dead_letter.map_or(DEAD_LETTER_INDEX.to_owned(), |at| at.value),
    })
}

fn sends_openly(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://") else { return false };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => authority.split(':').next(),
    };
    !host.is_some_and(value::is_loopback)
}

/// Elasticsearch alone, for commands that speak to it without receiving.
pub fn load_elasticsearch(
    flags: ElasticsearchLayer,
) -> Result<(ElasticsearchConfig, Vec<String>), ConfigError> {
    let mut findings = Findings::default();
    if flags.urls.is_empty() {
        findings.missing("elasticsearch.urls", "no Elasticsearch: give --elasticsearch URL");
    }
    let config = check_elasticsearch(flags, None, &mut findings);
    findings.finish(config)
}
