//! What was typed: clap types, and how they become layers of a configuration.
//!
//! Only this module knows clap. Values are parsed by [`crate::config::value`], so that a flag and
//! a key of a file mean the same.

mod generate;
mod import;
mod layers;
mod receive;
mod send;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{LogFormat, LogLevel, value};
use crate::record::{IndexRule, TypeName};

pub use generate::generate;
pub use import::Import;
pub use receive::Receive;
pub use send::{Send, Settings};

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
dialled name, connection, certificate and token; then the store, or Elasticsearch: version, rights, template, durability. A key that may only write \
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
