//! `waybill import`: which registry, and the sources of a sender.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{Logging, Send, Settings};
use crate::config::{ConfigError, Environment, SendLayer};

/// Take over the positions of Filebeat or Logstash, so that 'send' goes on where it ended.
#[derive(Debug, Default, Args)]
#[command(group = ArgGroup::new("registry").required(true).multiple(true))]
#[command(long_about = "\
Takes over how far Filebeat or Logstash has read each file, so that 'waybill send' goes on there. Stop the other \
shipper first, and wait until it has ended: a registry is only then exact.

Says for each file where reading will start, how much is left, and why a position was not taken. A position that \
Waybill has already is never moved. What cannot be taken over for certain starts at the file's first byte: lines \
may then be there twice, but none is lost.")]
#[command(after_long_help = "\
Examples:
  Look first, and change nothing:
    waybill import --from-filebeat /var/lib/filebeat --config /etc/waybill/send.toml --dry-run

  All sincedb files of Logstash, with the files and settings that 'send' will be given too:
    waybill import --from-logstash /var/lib/logstash/plugins/inputs/file \\
      '/var/log/nginx/*.log' --type nginx

The pages under docs/migration (of the Debian package: /usr/share/doc/waybill/docs) go through the whole change.")]
pub struct Import {
    /// Files and quoted patterns, as 'waybill send' will be given them
    #[arg(value_name = "FILE|PATTERN")]
    pub files: Vec<OsString>,
    /// The sender's TOML file; of it, sources and state directory count
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Filebeat's data folder (path.data), such as /var/lib/filebeat, or its registry
    #[arg(long, value_name = "PATH", group = "registry")]
    pub from_filebeat: Vec<PathBuf>,
    /// A sincedb file of Logstash's file input, or a folder of them
    #[arg(long, value_name = "PATH", group = "registry")]
    pub from_logstash: Vec<PathBuf>,
    /// Say what would be done, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Of the files named here.
    #[command(flatten)]
    pub settings: Settings,

    /// Where positions lie, the same as for 'send' [default: $STATE_DIRECTORY, else /var/lib/waybill
    /// for root and its owner, else $XDG_STATE_HOME/waybill, else ~/.local/state/waybill]
    #[arg(long, value_name = "DIR", help_heading = "State")]
    pub state_dir: Option<PathBuf>,

    /// Logging.
    #[command(flatten)]
    pub logging: Logging,
}

impl Import {
    /// The layer that a sender with these flags would have.
    pub fn layer(self, environment: &Environment) -> Result<SendLayer, ConfigError> {
        let send = Send {
            files: self.files,
            settings: self.settings,
            state_dir: self.state_dir,
            logging: self.logging,
            ..Send::default()
        };
        send.layer(environment)
    }
}
