//! What was typed: clap types, and how they become layers of a configuration.
//!
//! Only this module knows clap. Values are parsed by [`crate::config::value`], so that a flag and
//! a key of a file mean the same.

mod generate;
mod import;
mod layers;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{Endpoint, Listen, LogFormat, LogLevel, ProxySetting, Start, proxy, value};
use crate::record::{Format, IndexRule, TypeName};

pub use generate::generate;
pub use import::Import;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "waybill", version, propagate_version = true, max_term_width = 100)]
#[command(about = "Ships log lines to Elasticsearch over WebSockets, one receipt per line")]
#[command(after_help = "\
Start here:
  waybill demo                     the whole way of a line on this machine, in 15 seconds
  waybill send --help              ship files and sockets to a receiver
  waybill receive --help           take lines in, beside Elasticsearch or with a store of its own

Exit codes: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration.")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A subcommand. What each is for stands at its type: a comment here would hide the longer text.
#[derive(Debug, Subcommand)]
pub enum Command {
    Send(Box<Send>),
    Receive(Box<Receive>),
    Check(Check),
    Import(Import),
    Token(Token),
    Search(Search),
    Setup(Setup),
    Demo(Demo),
    #[command(hide = true)]
    Generate(Generate),
}

/// Logging flags, the same for both sides.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Logging, on standard error")]
pub struct Logging {
    /// Least severe level: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Form of a log line: text or json [default: text]
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<LogFormat>,
}

/// Ship the lines of files and sockets to a receiver.
#[derive(Debug, Default, Args)]
#[command(long_about = "\
Ships the lines of files and sockets to a receiver and waits for one receipt per line.

The log file itself is the buffer: what is not receipted yet is sent again after a broken connection \
or a restart, under the same document id, so that nothing is lost and nothing is there twice. Runs \
until SIGTERM or Ctrl-C; then it stops reading, drains, and ends with 0 (with --once: with 1).")]
#[command(after_long_help = "\
Examples:
  Follow one file:
    waybill send /var/log/app.log --to wss://logs.example.com/ --token-file /etc/waybill/token

  nginx, by its log files and by 'access_log syslog:server=unix:/run/waybill/nginx.sock;':
    waybill send '/var/log/nginx/*.log' --unix-datagram /run/waybill/nginx.sock --type nginx \\
      --to wss://logs.example.com/ --token-file /etc/waybill/token

  Syslog of other machines, by UDP and by TLS:
    waybill send --syslog-udp 0.0.0.0:514 --syslog-tls 0.0.0.0:6514 --type syslog \\
      --syslog-tls-cert chain.pem --syslog-tls-key key.pem \\
      --to wss://logs.example.com/ --token-file /etc/waybill/token

  Backfill once, compressed files too, with one JSON receipt per line:
    waybill send '/var/log/app.log*' --once --receipts receipts.jsonl \\
      --to wss://logs.example.com/ --token-file /etc/waybill/token

  The receiver is in a private network and dials (see 'waybill receive --help'):
    waybill token central --tokens /etc/waybill/receivers.toml > token-for-the-receiver
    waybill send /var/log/app.log --listen 0.0.0.0:8443 --tls-cert chain.pem --tls-key key.pem \\
      --tokens /etc/waybill/receivers.toml

  Everything in a file, as the packaged service does:
    waybill send --config /etc/waybill/send.toml

Flags go before keys of the file. Files and sockets named here are sent instead of the file's. In the file alone: per-source \
settings, 'rotated', labels, and 'idle_close', after which an idle connection is closed until there is something to send. \
Every key: docs/examples/sender.toml.

Signals:
  SIGTERM, SIGINT  stop reading, wait up to --drain-timeout for receipts, end; a second one ends at once
  SIGHUP           put a changed --config file in force, or refuse it and go on as before

systemd: waybill-send.service is ready (Type=notify) when the state is open and the sockets are bound, is reloaded by \
'systemctl reload' and watched (WatchdogSec=). Sockets of waybill-send.socket are found by their path (LISTEN_FDS). Secrets \
are credentials (LoadCredential=), copies made at the start: after a rotation, 'systemctl restart'.")]
pub struct Send {
    /// Files, quoted patterns such as '/var/log/nginx/*.log', or '-' for standard input
    #[arg(value_name = "FILE|PATTERN|-")]
    pub files: Vec<OsString>,
    /// Read all of this from a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Receiver: wss://HOST[:PORT]/PATH; on this machine also ws://127.0.0.1:PORT/ or ws+unix:PATH;
    /// several are tried in order. The name is resolved anew at each dial
    #[arg(long, value_name = "URL", value_parser = value::endpoint, help_heading = "Receiver")]
    pub to: Vec<Endpoint>,
    /// File that holds the token alone, as 'waybill token' printed it
    #[arg(long, value_name = "FILE", env = "WAYBILL_TOKEN_FILE", help_heading = "Receiver")]
    pub token_file: Option<PathBuf>,
    /// File with the key to which the token is bound, as 'waybill token --chain-key' wrote it; read
    /// anew at each connection
    #[arg(long, value_name = "FILE", env = "WAYBILL_CHAIN_KEY_FILE", help_heading = "Receiver")]
    pub chain_key_file: Option<PathBuf>,
    /// PEM file of the authorities to trust instead of this machine's own
    #[arg(long, value_name = "PEM", help_heading = "Receiver")]
    pub ca: Option<PathBuf>,
    /// Use all receivers at once, each file and socket one of them, instead of the first that
    /// answers
    #[arg(long, help_heading = "Receiver")]
    pub balance: bool,
    /// HTTP proxy to pass through by CONNECT, or none; never for loopback [default: HTTPS_PROXY,
    /// ALL_PROXY and NO_PROXY, as curl reads them]
    #[arg(long, value_name = "URL|none", value_parser = proxy, help_heading = "Receiver")]
    pub proxy: Option<ProxySetting>,
    /// Most bytes per second to write to all receivers together, such as 64KiB, for a thin line
    /// [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = value::size, help_heading = "Receiver")]
    pub rate_limit: Option<u64>,
    /// PEM file with the client certificate to present, chain included; a changed one is taken over
    #[arg(long, value_name = "PEM", help_heading = "Receiver")]
    pub cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(long, value_name = "PEM", help_heading = "Receiver")]
    pub key: Option<PathBuf>,
    /// Compress frames with zstd where the receiver can: saves traffic, costs processor time
    #[arg(long, help_heading = "Receiver")]
    pub compress: bool,
    /// DANGER: allow ws:// to and from other machines, and an HTTP intake or metrics that they
    /// reach; token and lines can be read on the way
    #[arg(long, help_heading = "Receiver")]
    pub insecure_plaintext: bool,

    /// Where the receiver connects, instead of --to: for one in a private network ('--dial' there)
    #[arg(long, value_name = "HOST:PORT|unix:PATH", value_parser = value::listen, conflicts_with = "to", help_heading = "Receiver that dials")]
    pub listen: Option<Listen>,
    /// PEM file with the certificate chain, by which the receiver knows this sender
    #[arg(long, value_name = "PEM", help_heading = "Receiver that dials")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(long, value_name = "PEM", help_heading = "Receiver that dials")]
    pub tls_key: Option<PathBuf>,
    /// Tokens of receivers that may take the lines, as 'waybill token' writes them; read anew when
    /// it changes
    #[arg(long, value_name = "FILE", help_heading = "Receiver that dials")]
    pub tokens: Option<PathBuf>,

    /// Unix datagram socket to make and read, as nginx's syslog:server=unix: wants it
    #[arg(long, value_name = "PATH", help_heading = "Sources")]
    pub unix_datagram: Vec<PathBuf>,
    /// Unix stream socket to make and read, lines or octet-counted, as syslog-ng's unix-stream()
    #[arg(long, value_name = "PATH", help_heading = "Sources")]
    pub unix_stream: Vec<PathBuf>,
    /// Address on loopback where lines are posted over HTTP, as syslog-ng's http() does
    #[arg(long, value_name = "HOST:PORT", value_parser = value::tcp_address, help_heading = "Sources")]
    pub http_intake: Vec<SocketAddr>,
    /// Address to take syslog over UDP at; what the kernel drops is counted
    #[arg(long, value_name = "HOST:PORT", value_parser = value::syslog_address, help_heading = "Sources")]
    pub syslog_udp: Vec<SocketAddr>,
    /// Address to take syslog over TCP at, lines or octet-counted (RFC 6587)
    #[arg(long, value_name = "HOST:PORT", value_parser = value::syslog_address, help_heading = "Sources")]
    pub syslog_tcp: Vec<SocketAddr>,
    /// Address to take syslog over TLS at (RFC 5425)
    #[arg(long, value_name = "HOST:PORT", value_parser = value::syslog_address, help_heading = "Sources")]
    pub syslog_tls: Vec<SocketAddr>,
    /// PEM file with the certificate chain that --syslog-tls shows
    #[arg(long, value_name = "PEM", requires = "syslog_tls", help_heading = "Sources")]
    pub syslog_tls_cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(long, value_name = "PEM", requires = "syslog_tls", help_heading = "Sources")]
    pub syslog_tls_key: Option<PathBuf>,
    /// Answer supervisor's events on standard input and output, as an [eventlistener:…] does
    #[arg(long, help_heading = "Sources")]
    pub supervisor_events: bool,
    /// What is said of all of them.
    #[command(flatten)]
    pub settings: Settings,

    /// Send what is there now, wait for every receipt, and end: 1 if a line was parked or failed;
    /// for files and '-' only. An absent receiver or Elasticsearch is waited for without end; a
    /// terminal shows how far it is
    #[arg(long, help_heading = "Running")]
    pub once: bool,
    /// How long --once tries lines again that their index refuses; then it ends with 1, and the next
    /// run sends them [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = value::duration, requires = "once", help_heading = "Running")]
    pub once_timeout: Option<Duration>,
    /// Write one JSON line per line sent to this file, or to standard output with '-'
    #[arg(long, value_name = "FILE|-", help_heading = "Running")]
    pub receipts: Option<PathBuf>,
    /// How long a stop waits for outstanding receipts [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = value::duration, help_heading = "Running")]
    pub drain_timeout: Option<Duration>,

    /// Address on loopback for Prometheus metrics, /health/live and /health/ready
    #[arg(long, value_name = "HOST:PORT", value_parser = value::tcp_address, help_heading = "Running")]
    pub metrics: Option<SocketAddr>,

    /// Where positions and the spool lie [default: $STATE_DIRECTORY, else /var/lib/waybill for
    /// root and its owner, else $XDG_STATE_HOME/waybill, else ~/.local/state/waybill]
    #[arg(long, value_name = "DIR", help_heading = "State")]
    pub state_dir: Option<PathBuf>,
    /// Most that the spool of sockets may hold; then they are not read [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = value::size, help_heading = "State")]
    pub spool_bytes_max: Option<u64>,
    /// Most that is copied of deleted files whose lines wait; beyond it they are reported as lost
    /// [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = value::size, help_heading = "State")]
    pub kept_bytes_max: Option<u64>,

    /// Logging.
    #[command(flatten)]
    pub logging: Logging,
}

/// What the command line says of all files and sockets that it names.
#[derive(Debug, Default, Args)]
pub struct Settings {
    /// Where files start that are there at the first run: beginning or end [default: beginning]
    #[arg(long, value_name = "WHERE", value_parser = value::start, help_heading = "Sources")]
    pub start: Option<Start>,
    /// Follow symbolic links, which are refused otherwise
    #[arg(long, help_heading = "Sources")]
    pub follow_symlinks: bool,

    /// Type of the lines, part of the index name: a-z, 0-9, '_', '-' [default: default]
    #[arg(long = "type", value_name = "TYPE", value_parser = value::type_name, help_heading = "Lines")]
    pub type_name: Option<TypeName>,
    /// Tag of each document; may be repeated
    #[arg(long, value_name = "TAG", value_parser = value::tag, help_heading = "Lines")]
    pub tag: Vec<String>,
    /// Label of each document; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::label, help_heading = "Lines")]
    pub label: Vec<(String, String)>,
    /// How lines are parsed: auto, json, syslog or raw [default: auto]
    #[arg(long, value_name = "FORMAT", value_parser = value::format, help_heading = "Lines")]
    pub format: Option<Format>,
    /// Zone of timestamps that name none, such as Europe/Berlin [default: this machine's]
    #[arg(long, value_name = "ZONE", value_parser = value::timezone, help_heading = "Lines")]
    pub timezone: Option<String>,
}

/// How Elasticsearch is reached, the same for each command.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Elasticsearch")]
pub struct Elasticsearch {
    /// Base URL of Elasticsearch or OpenSearch; several of one cluster mean failover
    #[arg(long, value_name = "URL", value_parser = value::elasticsearch_url)]
    pub elasticsearch: Vec<String>,
    /// File with an API key, as id:key or in base64
    #[arg(long, value_name = "FILE", env = "WAYBILL_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// File whose first line is user:password, instead of an API key
    #[arg(long, value_name = "FILE", conflicts_with = "api_key_file")]
    pub es_user_file: Option<PathBuf>,
    /// PEM file of the authorities to trust for https://
    #[arg(long, value_name = "PEM")]
    pub es_ca: Option<PathBuf>,
}

/// Take lines from senders and write them into Elasticsearch or the embedded store.
#[derive(Debug, Default, Args)]
#[command(long_about = "\
Takes lines from senders and writes them into Elasticsearch, or into a store of its own: one SQLite \
file with full-text search, which is the default where no Elasticsearch is named.

A line is receipted only when the destination holds it durably. Nothing else is kept on disk here, so \
that several receivers can stand behind one proxy.")]
#[command(after_long_help = "\
Examples:
  First make a token; it is printed once, and the sender's machine keeps it in a file:
    waybill token web-1 --tokens /etc/waybill/tokens.toml

  With TLS and a store of its own, kept for 30 days:
    waybill receive --listen 0.0.0.0:8443 --tls-cert chain.pem --tls-key key.pem \\
      --tokens /etc/waybill/tokens.toml --store /var/lib/waybill/store.sqlite --keep-days 30

  Behind nginx, into Elasticsearch:
    waybill receive --listen unix:/run/waybill/receive.sock --tokens /etc/waybill/tokens.toml \\
      --elasticsearch https://es-1:9200 --elasticsearch https://es-2:9200 \\
      --api-key-file /etc/waybill/api-key

  In a private network: dial the senders, which '--listen'. The entry of each gives it its identity;
  its token is not used. The token to present was made at the sender:
    waybill token web-1 --tokens /etc/waybill/tokens.toml > /dev/null
    waybill receive --dial web-1=wss://web-1.example.com:8443/ --token-file token-for-the-receiver \\
      --tokens /etc/waybill/tokens.toml --ca ca.pem

Flags go before keys of the file.

Any WebSocket client can hand over lines: under the subprotocol waybill.text.v1 each text message is one line, and each \
answer one JSON receipt with the document's id. docs/protocol.md shows clients in Python and Node \
(of the Debian package: /usr/share/doc/waybill/docs).

Signals:
  SIGTERM, SIGINT  take nothing new, answer what has come, end; a second one ends at once
  SIGHUP           put a changed --config file in force, or refuse it and go on as before

systemd: waybill-receive.service is ready (Type=notify) when it listens, is reloaded by 'systemctl reload' and watched \
(WatchdogSec=). The socket of waybill-receive.socket is found by its path (LISTEN_FDS). Whether the destination \
answers stands in /health/ready.")]
pub struct Receive {
    /// Read all of this from a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where senders connect; port 0 takes a free one, which is logged. Not needed with --dial
    #[arg(long, value_name = "HOST:PORT|unix:PATH", value_parser = value::listen)]
    pub listen: Option<Listen>,
    /// Tokens that may enter, as 'waybill token' writes them; read anew when it changes
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// How long a stop waits for what is under way [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = value::duration)]
    pub drain_timeout: Option<Duration>,

    /// Address on loopback for Prometheus metrics, /health/live and /health/ready
    #[arg(long, value_name = "HOST:PORT", value_parser = value::tcp_address)]
    pub metrics: Option<SocketAddr>,

    /// Sender to connect to, which listens; NAME is its entry in the tokens file. May be repeated
    #[arg(long, value_name = "NAME=URL", value_parser = value::dialled_sender, help_heading = "Senders to dial")]
    pub dial: Vec<(String, Endpoint)>,
    /// File that holds the token to present there alone, as 'waybill token' printed it at the sender
    #[arg(long, value_name = "FILE", env = "WAYBILL_TOKEN_FILE", help_heading = "Senders to dial")]
    pub token_file: Option<PathBuf>,
    /// PEM file of the authorities to trust there instead of this machine's own
    #[arg(long, value_name = "PEM", help_heading = "Senders to dial")]
    pub ca: Option<PathBuf>,
    /// HTTP proxy to pass through to them by CONNECT, or none; never for loopback [default:
    /// HTTPS_PROXY, ALL_PROXY and NO_PROXY, as curl reads them]
    #[arg(long, value_name = "URL|none", value_parser = proxy, help_heading = "Senders to dial")]
    pub proxy: Option<ProxySetting>,

    /// PEM file with the certificate chain
    #[arg(long, value_name = "PEM", help_heading = "TLS")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(long, value_name = "PEM", help_heading = "TLS")]
    pub tls_key: Option<PathBuf>,
    /// PEM file of the authorities whose client certificates are taken; entries of the tokens file
    /// may ask for one
    #[arg(long, value_name = "PEM", help_heading = "TLS")]
    pub client_ca: Option<PathBuf>,
    /// Believe what the proxy says of client certificates in X-Client-Verify and
    /// X-Client-Certificate; with --listen unix:PATH only
    #[arg(long, help_heading = "TLS")]
    pub trust_client_headers: bool,
    /// DANGER: take plain ws:// from other machines; tokens and lines can be read on the way
    #[arg(long, help_heading = "TLS")]
    pub insecure_plaintext: bool,

    /// Elasticsearch.
    #[command(flatten)]
    pub elasticsearch: Elasticsearch,
    /// Index of lines that Elasticsearch refuses [default: waybill-parked]
    #[arg(long, value_name = "INDEX", value_parser = value::index_name, help_heading = "Elasticsearch")]
    pub dead_letter_index: Option<String>,

    /// SQLite file of the embedded store [default: store.sqlite in $STATE_DIRECTORY, else in
    /// /var/lib/waybill for root and its owner, else in ~/.local/state/waybill]
    #[arg(long, value_name = "FILE", help_heading = "Embedded store")]
    pub store: Option<PathBuf>,
    /// Delete lines that arrived more than this many days ago
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500), help_heading = "Embedded store")]
    pub keep_days: Option<u32>,
    /// Delete the lines that arrived first beyond this size, such as 20GiB; up to 64 MiB of log come
    /// on top
    #[arg(long, value_name = "SIZE", value_parser = value::size, help_heading = "Embedded store")]
    pub keep_bytes: Option<u64>,

    /// How indices are named [default: waybill-{type}-{yyyy.MM.dd}]
    #[arg(long, value_name = "PATTERN", value_parser = value::index_rule, help_heading = "Indices")]
    pub index: Option<IndexRule>,
    /// Pattern of the past, under which lines may still be on their way; may be repeated
    #[arg(long, value_name = "PATTERN", value_parser = value::index_rule, help_heading = "Indices")]
    pub former_index: Vec<IndexRule>,

    /// Logging.
    #[command(flatten)]
    pub logging: Logging,
}

/// Check a configuration and all that it needs, and say how to mend it.
#[derive(Debug, Args)]
#[command(long_about = "\
Checks a configuration and all that it needs, one line each: 'ok', 'warn', 'fail' with what to do, or 'skip' \
where it cannot be told. Put 'check' before what the service runs:

  waybill check send --config /etc/waybill/send.toml
  waybill check receive --config /etc/waybill/receive.toml

Nothing is sent or written, and a running sender or receiver is not disturbed. Run it as the service's user, so \
that permissions are the service's own. Ends with 1 if a line says 'fail'.")]
pub struct Check {
    /// Which side.
    #[command(subcommand)]
    pub side: CheckSide,
    /// One JSON object per line: check, status, message, and where there are several: of
    #[arg(long, global = true)]
    pub json: bool,
}

/// What is checked, with the flags of that command.
#[derive(Debug, Subcommand)]
pub enum CheckSide {
    /// Files, sockets, ports, state; then each receiver: name, TLS, upgrade, token, types, clock.
    #[command(
        long_about = "Checks what 'waybill send' with the same arguments needs.",
        after_long_help = "\
Examples:
  waybill check send --config /etc/waybill/send.toml
  waybill check send /var/log/app.log --to wss://logs.example.com/ --token-file /etc/waybill/token"
    )]
    Send(Box<Send>),
    /// Certificate, tokens, ports; the way to dialled senders; the store, or Elasticsearch: version, rights, template.
    #[command(
        long_about = "\
Checks what 'waybill receive' with the same arguments needs: its certificate, tokens, ports and sockets; of each sender that is \
dialled name, connection and certificate; then the store, or Elasticsearch: version, rights, template, durability. A key that may only write \
cannot see the template: another may be given with --api-key-file.",
        after_long_help = "\
Examples:
  waybill check receive --config /etc/waybill/receive.toml
  waybill check receive --config /etc/waybill/receive.toml --api-key-file admin-key"
    )]
    Receive(Box<Receive>),
}

/// Write manual pages and shell completions, for packages.
#[derive(Debug, Args)]
pub struct Generate {
    /// Folder that gets man1 and completions, made where missing
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// Make, rotate, revoke and list the tokens that senders present.
#[derive(Debug, Default, Args)]
#[command(long_about = "\
Makes the token of a sender, prints it alone on standard output, once, and keeps only its SHA-256.

A running receiver notices the change by itself; a revoked token ends its live connections.

Where the receiver dials, both sides have such a file: the receiver's lists its senders, for their \
identities, and the sender's lists the receiver, for its token.")]
#[command(after_long_help = "\
Examples:
  waybill token web-1 --tokens /etc/waybill/tokens.toml > token
  waybill token web-1 --tokens /etc/waybill/tokens.toml --types nginx,syslog --expires 365d
  waybill token web-1 --tokens /etc/waybill/tokens.toml --certificate web-1.pem > token
  waybill token web-1 --tokens /etc/waybill/tokens.toml --chain-key chain.key > token
  waybill token web-1 --tokens /etc/waybill/tokens.toml --rotate > token
  waybill token web-1 --tokens /etc/waybill/tokens.toml --revoke
  waybill token --tokens /etc/waybill/tokens.toml --list")]
pub struct Token {
    /// Name of the sender, or of a receiver that dials, for people
    #[arg(value_name = "NAME", required_unless_present = "list")]
    pub name: Option<String>,
    /// File that holds the hashes, made where missing
    #[arg(long, value_name = "FILE", required = true)]
    pub tokens: PathBuf,
    /// Types that its lines may have, with commas [default: default,nginx,syslog,supervisor,app]
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', value_parser = value::type_name)]
    pub types: Vec<TypeName>,
    /// PEM file of a client certificate that must come with the token; may be repeated, so that one
    /// can follow another
    #[arg(long, value_name = "PEM")]
    pub certificate: Vec<PathBuf>,
    /// Bind the token to a fresh key, written to this new file for the sender's --chain-key-file: a
    /// copied token lets nobody in without it. --rotate keeps the key there is
    #[arg(long, value_name = "FILE")]
    pub chain_key: Option<PathBuf>,
    /// With --rotate: the token alone is enough again
    #[arg(long, requires = "rotate", conflicts_with = "chain_key")]
    pub no_chain_key: bool,
    /// How long it works, from now on, such as 90d [default: without end]
    #[arg(long, value_name = "TIME", value_parser = value::duration)]
    pub expires: Option<Duration>,
    /// Replace the token of this name; the sender's identity stays
    #[arg(long, conflicts_with_all = ["revoke", "list"])]
    pub rotate: bool,
    /// Let nobody in with this name's token any more
    #[arg(long, conflicts_with_all = ["list", "types", "certificate", "chain_key", "expires"])]
    pub revoke: bool,
    /// Show names, types and ends
    #[arg(long, conflicts_with_all = ["name", "types", "certificate", "chain_key", "expires"])]
    pub list: bool,
}

/// Find lines in the embedded store or in Elasticsearch.
#[derive(Debug, Default, Args)]
#[command(
    long_about = "Finds lines in the embedded store, or in Elasticsearch where that is named."
)]
#[command(after_long_help = "\
A query is words, all of which must be there (whole words, no wildcards); \"a phrase\" in quotes; and field:value. A '-' before any of \
them leaves out what has it; a query that starts with one goes behind '--'.

Examples:
  waybill search error --store store.sqlite
  waybill search '\"connection refused\" host.name:web-1' --after 2h
  waybill search 'error -process.name:cron'
  waybill search http.response.status_code:502 --elasticsearch http://127.0.0.1:9200 --json")]
pub struct Search {
    /// Words, a "phrase", field:value; nothing finds every line
    #[arg(value_name = "QUERY")]
    pub query: Vec<String>,
    /// SQLite file of the embedded store [default: where 'waybill receive' puts it]
    #[arg(long, value_name = "FILE", conflicts_with = "elasticsearch")]
    pub store: Option<PathBuf>,
    /// Elasticsearch.
    #[command(flatten)]
    pub elasticsearch: Elasticsearch,
    /// Indices to search in Elasticsearch: the receiver's index pattern
    #[arg(long, value_name = "PATTERN", value_parser = value::index_rule, default_value = crate::record::DEFAULT_RULE, help_heading = "Elasticsearch")]
    pub index: IndexRule,
    /// Lines at this time or later: 2026-11-21T10:00:00Z, 2026-11-21, or 2h for two hours ago
    #[arg(long, value_name = "TIME", help_heading = "Which lines, and how")]
    pub after: Option<String>,
    /// Lines before this time, in the same forms
    #[arg(long, value_name = "TIME", help_heading = "Which lines, and how")]
    pub before: Option<String>,
    /// Most lines to show, the newest
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Which lines, and how")]
    pub limit: u32,
    /// One whole JSON document per line
    #[arg(long, help_heading = "Which lines, and how")]
    pub json: bool,
}

/// Put the index templates and the dead-letter index into Elasticsearch.
#[derive(Debug, Default, Args)]
#[command(long_about = "\
Puts the index templates and the dead-letter index into Elasticsearch. The key needs 'manage_index_templates' \
and the right to make the dead-letter index; the receiver's own key needs neither.

Each index pattern has a template of its own: 'waybill' for the default one, 'waybill-web-~' for web-{yyyy.MM.dd}. \
Likewise each dead letter: 'waybill-dead-letter', or 'waybill-dead-letter-NAME'. Several receivers with patterns of \
their own may so share a cluster. Where two patterns cover an index, the one that says more of its name goes first: \
the priority is 200 and 1 for each of its characters, so that a template of yours goes before all of them from 500 on.")]
#[command(after_long_help = "\
Examples:
  waybill setup --elasticsearch https://es-1:9200 --api-key-file /etc/waybill/admin-key
  waybill setup --elasticsearch https://es-1:9200 --index 'web-{yyyy.MM.dd}' \\
    --api-key-file /etc/waybill/admin-key
  waybill setup --print")]
pub struct Setup {
    /// Elasticsearch.
    #[command(flatten)]
    pub elasticsearch: Elasticsearch,
    /// The receiver's index pattern
    #[arg(long, value_name = "PATTERN", value_parser = value::index_rule, default_value = crate::record::DEFAULT_RULE, help_heading = "What is made")]
    pub index: IndexRule,
    /// The receiver's dead-letter index
    #[arg(long, value_name = "INDEX", value_parser = value::index_name, default_value = crate::config::DEAD_LETTER_INDEX, help_heading = "What is made")]
    pub dead_letter_index: String,
    /// Ask no server; print the requests for an administrator
    #[arg(long, help_heading = "What is made")]
    pub print: bool,
}

/// Show the whole way of a line on this machine.
#[derive(Debug, Default, Args)]
#[command(long_about = "\
Shows the whole way of a line on this machine: makes a certificate and a token, starts 'waybill receive' \
and 'waybill send' as processes of their own, writes lines (or takes the given files), shows receipts, \
rotates a log, kills the receiver in the middle, and in the end counts what was written and what is stored.

Ends with 0 only if every line written is stored once.")]
#[command(after_long_help = "\
Examples:
  waybill demo
  waybill demo /var/log/dpkg.log
  waybill demo --elasticsearch http://127.0.0.1:9200")]
pub struct Demo {
    /// Files to send; without any, the demo writes lines itself
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Elasticsearch instead of the embedded store.
    #[command(flatten)]
    pub elasticsearch: Elasticsearch,
    /// Folder for everything the demo makes, new or empty [default: one under /tmp]
    #[arg(long, value_name = "DIR", help_heading = "What the demo does")]
    pub keep: Option<PathBuf>,
    /// How many lines the demo writes
    #[arg(long, value_name = "N", default_value_t = 1200, value_parser = clap::value_parser!(u32).range(30..=1_000_000), help_heading = "What the demo does")]
    pub lines: u32,
    /// How long it takes to write them
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600), help_heading = "What the demo does")]
    pub seconds: u32,
}
