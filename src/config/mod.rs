//! Checked configurations: what is true, after what was typed has been read.
//!
//! A *layer* holds what was typed in one place, each value parsed and with its place. `load_send`
//! and `load_receive` lay the command line's over the file's and check the whole: what leaves here
//! needs no further check, and every fault is told at once.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::record::{Format, IndexRule, TypeName, escape_path};

mod check;
mod dial;
mod environment;
mod file;
mod problem;
mod proxy;
mod receive;
mod send;
mod source;
pub mod value;

#[cfg(test)]
mod tests;

pub use check::{LogConfig, LogFormat, LogLayer, LogLevel};
pub use dial::DialLayer;
pub use environment::Environment;
pub use problem::{At, ConfigError, Place, Problem};
pub use proxy::{Proxy, ProxySetting, proxy};
pub use receive::{
    DEAD_LETTER_INDEX, ElasticsearchLayer, ReceiveLayer, StoreLayer, default_store,
    load_elasticsearch, load_receive,
};
pub use send::{SendLayer, load_import, load_send};
pub use source::{SourceLayer, SourceSettings, SyslogSettings, TypedInput, file_argument};

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// What is true.
    pub config: T,
    /// How the process logs.
    pub log: LogConfig,
    /// What a person should know, to be logged once logging is set up.
    pub warnings: Vec<String>,
}

/// What `waybill send` does.
#[derive(Clone, PartialEq, Debug)]
pub struct SendConfig {
    /// Who opens the connection with a receiver.
    pub connection: ConnectionConfig,
    /// File that holds the chain key alone; read anew at each connection.
    pub chain_key_file: Option<PathBuf>,
    /// Where the durable state lies.
    pub state_dir: PathBuf,
    /// What is read.
    pub sources: Vec<SourceConfig>,
    /// Send what is there now, wait for every receipt, and end.
    pub once: bool,
    /// With `once`: how long lines are tried again that an index refuses while nothing else comes
    /// through.
    pub once_timeout: Duration,
    /// Where one JSON line per line sent goes.
    pub receipts: Option<ReceiptsTarget>,
    /// Compress frames with zstd where the receiver can.
    pub compress: bool,
    /// Most bytes per second that all connections write together.
    pub rate_limit: Option<u64>,
    /// How long a stop waits for outstanding receipts.
    pub drain_timeout: Duration,
    /// Budget of the spool in bytes; full means that sockets are not read.
    pub spool_bytes_max: u64,
    /// Budget for copies of deleted files in bytes; beyond it a deleted file is a reported loss.
    pub kept_bytes_max: u64,
    /// Show a progress bar (only with `once`, on a terminal).
    pub progress: bool,
    /// Where metrics and health are served over HTTP.
    pub metrics: Option<SocketAddr>,
}

/// Who opens the connection between a sender and its receiver.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConnectionConfig {
    /// The sender does.
    Dial(DialConfig),
    /// A receiver does, for instance because it is in a private network.
    Listen(ListenConfig),
}

/// How a sender dials.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DialConfig {
    /// Receivers, in order of preference.
    pub to: Vec<Endpoint>,
    /// Use all of them at once, each file and socket one of them, instead of the first that
    /// answers.
    pub balance: bool,
    /// File that holds the token alone; read anew at each connection.
    pub token_file: PathBuf,
    /// PEM file of the authorities to trust instead of the machine's own.
    pub ca: Option<PathBuf>,
    /// Client certificate to present; taken over at the next connection where it changed.
    pub identity: Option<Identity>,
    /// Close a connection that was idle for so long; `None` keeps it.
    pub idle_close: Option<Duration>,
}

/// How a sender is dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListenConfig {
    /// Where it listens.
    pub listen: Listen,
    /// Certificate chain and key, both PEM; `None` means plain WebSocket.
    pub tls: Option<Identity>,
    /// The tokens file with the receivers that may enter; read anew whenever it changes.
    pub tokens: PathBuf,
}

/// What `waybill import` needs to know of a sender.
#[derive(Clone, Debug)]
pub struct ImportConfig {
    /// Where the durable state lies.
    pub state_dir: PathBuf,
    /// What the sender reads.
    pub sources: Vec<SourceConfig>,
}

/// One `[[source]]`.
#[derive(Clone, PartialEq, Debug)]
pub struct SourceConfig {
    /// Unique among the sources; part of a row.
    pub name: String,
    /// Where its bytes come from.
    pub input: Input,
    /// Part of the index name.
    pub type_name: TypeName,
    /// Copied into each document.
    pub tags: Vec<String>,
    /// Copied into each document.
    pub labels: BTreeMap<String, String>,
    /// How lines are parsed by the receiver.
    pub format: Format,
    /// Zone of timestamps that name none: an IANA name, checked.
    pub timezone: String,
    /// Where files that are present at the source's first run start.
    pub start: Start,
    /// Follow symbolic links (refused by default).
    pub follow_symlinks: bool,
}

/// Where a source's bytes come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A path or a glob pattern, absolute.
    Files {
        /// As glob(7) has it; `**` crosses folders.
        pattern: String,
        /// The file whose very name looks like the pattern: it is followed too.
        literal: Option<PathBuf>,
        /// Patterns of other places where rotated files lie.
        rotated: Vec<String>,
    },
    /// Standard input, through the spool.
    Stdin,
    /// supervisor's events on standard input, answered on standard output.
    SupervisorEvents,
    /// A Unix datagram socket that this process binds, one record per datagram.
    UnixDatagram {
        /// Absolute path of the socket.
        path: PathBuf,
        /// Permission bits of the socket file.
        mode: u32,
    },
    /// A Unix stream socket that this process binds, newline or octet-counted (RFC 6587 §3.4).
    UnixStream {
        /// Absolute path of the socket.
        path: PathBuf,
        /// Permission bits of the socket file.
        mode: u32,
    },
    /// A TCP address on which lines are posted over HTTP.
    HttpIntake {
        /// Loopback, unless plaintext is allowed.
        address: SocketAddr,
    },
    /// Syslog over UDP (RFC 5426), one record per datagram.
    SyslogUdp {
        /// Where it listens.
        address: SocketAddr,
        /// Receive buffer to ask the kernel for, in bytes.
        receive_buffer: usize,
    },
    /// Syslog over TCP (RFC 6587), or over TLS with a certificate (RFC 5425).
    SyslogTcp {
        /// Where it listens.
        address: SocketAddr,
        /// Its certificate; `None` means plain TCP.
        tls: Option<Identity>,
    },
}

/// Where files that are present at a source's first run start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Start {
    /// At their first byte.
    #[default]
    Beginning,
    /// At their end; what is passed over is logged.
    End,
}

/// Where receipts are written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReceiptsTarget {
    /// Standard output.
    Stdout,
    /// Appended to a file.
    File(PathBuf),
}

impl fmt::Display for ReceiptsTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReceiptsTarget::Stdout => f.write_str("standard output"),
            ReceiptsTarget::File(path) => f.write_str(&escape_path(path)),
        }
    }
}

/// The address of the side that is dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// As typed, for messages.
    pub url: String,
    /// `wss` (true) or `ws` (false, allowed on loopback and Unix sockets only).
    pub tls: bool,
    /// Where to connect.
    pub address: EndpointAddress,
    /// Value of the `Host` header, and name on the certificate.
    pub host: String,
    /// Path and query of the request, starting with `/`.
    pub path: String,
    /// Through which proxy it is reached.
    pub proxy: Option<Proxy>,
}

/// Where a connection goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EndpointAddress {
    /// Name or IP address and port; resolved anew at each connection.
    Tcp {
        /// Name or IP address without brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// `ws+unix:/path/of.sock`.
    Unix(PathBuf),
}

/// What `waybill receive` does.
#[derive(Clone, PartialEq, Debug)]
pub struct ReceiveConfig {
    /// Where it listens; `None` where it only dials.
    pub listen: Option<Listen>,
    /// Certificate chain and key, both PEM; `None` means plain WebSocket.
    pub tls: Option<Identity>,
    /// Senders that it dials.
    pub dials: Vec<DialledSender>,
    /// PEM file of the authorities whose client certificates are taken (with `tls`).
    pub client_ca: Option<PathBuf>,
    /// Believe what the proxy before a Unix socket says of client certificates.
    pub trust_client_headers: bool,
    /// The tokens file; read anew whenever it changes.
    pub tokens: PathBuf,
    /// Where documents go.
    pub destination: DestinationConfig,
    /// How indices are named.
    pub rule: IndexRule,
    /// Rules of the past whose rows are still accepted.
    pub former_rules: Vec<IndexRule>,
    /// Oldest and newest day accepted, relative to today: -400 and 2.
    pub days: (i32, i32),
    /// Uncompressed bytes that one connection may have without a receipt.
    pub credit: u64,
    /// Bytes of frames that the whole receiver holds.
    pub memory_bytes_max: u64,
    /// How long a stop waits for what is under way.
    pub drain_timeout: Duration,
    /// Where metrics and health are served over HTTP.
    pub metrics: Option<SocketAddr>,
}

/// A sender that a receiver dials.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DialledSender {
    /// Its entry in the receiver's tokens file, which says who it is.
    pub name: String,
    /// Where it listens; resolved anew at each connection.
    pub endpoint: Endpoint,
    /// File with the token to present, alone; read anew at each connection.
    pub token_file: PathBuf,
    /// PEM file of the authorities to trust instead of the machine's own.
    pub ca: Option<PathBuf>,
}

/// Where a sender or receiver listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket; the path, without `unix:`.
    Unix(PathBuf),
}

/// What one side shows of itself over TLS.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// PEM file with the certificate chain, its own first.
    pub certificate: PathBuf,
    /// PEM file with the key.
    pub key: PathBuf,
}

/// Where documents go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DestinationConfig {
    /// One or more URLs of the same cluster.
    Elasticsearch(ElasticsearchConfig),
    /// The embedded store.
    Embedded(EmbeddedConfig),
}

/// How Elasticsearch is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ElasticsearchConfig {
    /// Base URLs, tried in order, one after another on failure.
    pub urls: Vec<String>,
    /// How requests are authenticated.
    pub auth: ElasticsearchAuth,
    /// PEM file of the authorities to trust instead of the machine's own.
    pub ca: Option<PathBuf>,
    /// Largest bulk body to start with, in bytes.
    pub batch_bytes_max: usize,
    /// Bulk requests in flight.
    pub requests: usize,
    /// Index of parked lines.
    pub dead_letter_index: String,
}

/// How requests to Elasticsearch are authenticated; secrets stay in files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ElasticsearchAuth {
    /// Not at all.
    #[default]
    None,
    /// File with `id:key` or its base64: `Authorization: ApiKey`.
    ApiKey(PathBuf),
    /// File whose first line is `user:password`: `Authorization: Basic`.
    Basic(PathBuf),
}

/// The embedded store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EmbeddedConfig {
    /// The SQLite file; its folder is made where missing.
    pub file: PathBuf,
    /// Lines older than so many days are deleted.
    pub keep_days: Option<u32>,
    /// Oldest lines are deleted until the store is at most so large, in bytes.
    pub keep_bytes: Option<u64>,
}
