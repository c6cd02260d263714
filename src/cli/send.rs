//! `waybill send`: files, sockets, receiver, and how it runs.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Logging;
use crate::config::{Endpoint, Listen, ProxySetting, Start, proxy, value};
use crate::record::{Format, TypeName};

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
