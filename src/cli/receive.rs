//! `waybill receive`: where lines come in, and where they go.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{Elasticsearch, Logging};
use crate::config::{Endpoint, Listen, ProxySetting, proxy, value};
use crate::record::IndexRule;

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
