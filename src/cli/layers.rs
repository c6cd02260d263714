//! From flags to layers of a configuration: relative paths start at the working directory.

use std::path::Path;

use super::{Elasticsearch, Logging, Receive, Send, Settings};
use crate::config::{
    At, ConfigError, DialLayer, ElasticsearchLayer, Environment, Listen, LogLayer, Place, Problem,
    ReceiptsTarget, ReceiveLayer, SendLayer, SourceLayer, SourceSettings, StoreLayer,
    SyslogSettings, TypedInput, file_argument,
};

const FILE: &str = "FILE";

fn flag<T>(name: &'static str, value: Option<T>) -> Option<At<T>> {
    value.map(|value| At::flag(name, value))
}

fn flags<T>(name: &'static str, values: Vec<T>) -> Vec<At<T>> {
    values.into_iter().map(|value| At::flag(name, value)).collect()
}

/// A switch that was not given leaves the file's value alone.
fn switch(name: &'static str, given: bool) -> Option<At<bool>> {
    given.then(|| At::flag(name, true))
}

fn absolute(listen: Listen, base: &Path) -> Listen {
    match listen {
        Listen::Unix(path) => Listen::Unix(base.join(path)),
        tcp @ Listen::Tcp(_) => tcp,
    }
}

impl Logging {
    /// The layer of these flags.
    pub fn layer(self) -> LogLayer {
        LogLayer {
            level: flag("--log-level", self.log_level),
            format: flag("--log-format", self.log_format),
        }
    }
}

impl Settings {
    fn layer(self) -> SourceSettings {
        SourceSettings {
            type_name: flag("--type", self.type_name),
            tags: flags("--tag", self.tag),
            labels: flags("--label", self.label),
            format: flag("--format", self.format),
            timezone: flag("--timezone", self.timezone),
            start: flag("--start", self.start),
            follow_symlinks: switch("--follow-symlinks", self.follow_symlinks),
        }
    }
}

impl Send {
    /// The layer of these flags; the error names arguments that cannot be files.
    pub fn layer(self, environment: &Environment) -> Result<SendLayer, ConfigError> {
        let base = &environment.current_dir;
        let settings = self.settings.layer();
        let mut inputs = Vec::new();
        let mut problems = Vec::new();
        for argument in self.files {
            let input = match argument.to_str() {
                Some("-") => Ok(TypedInput::Stdin),
                _ => file_argument(&argument, base),
            };
            match input {
                Ok(input) => inputs.push(At::flag(FILE, input)),
                Err(error) => {
                    problems.push(Problem { place: Place::Flag(FILE), message: error.to_string() })
                }
            }
        }
        for path in self.unix_datagram {
            inputs.push(At::flag("--unix-datagram", TypedInput::UnixDatagram(base.join(path))));
        }
        for path in self.unix_stream {
            inputs.push(At::flag("--unix-stream", TypedInput::UnixStream(base.join(path))));
        }
        for address in self.http_intake {
            inputs.push(At::flag("--http-intake", TypedInput::HttpIntake(address)));
        }
        for (name, addresses, input) in [
            ("--syslog-udp", self.syslog_udp, TypedInput::SyslogUdp as fn(_) -> _),
            ("--syslog-tcp", self.syslog_tcp, TypedInput::SyslogTcp),
            ("--syslog-tls", self.syslog_tls, TypedInput::SyslogTls),
        ] {
            inputs.extend(addresses.into_iter().map(|address| At::flag(name, input(address))));
        }
        if self.supervisor_events {
            inputs.push(At::flag("--supervisor-events", TypedInput::SupervisorEvents));
        }
        let syslog = SyslogSettings {
            tls_cert: flag("--syslog-tls-cert", self.syslog_tls_cert.map(|path| base.join(path))),
            tls_key: flag("--syslog-tls-key", self.syslog_tls_key.map(|path| base.join(path))),
            receive_buffer: None,
        };
        if let Some(place) = settings.first().filter(|_| inputs.is_empty() && problems.is_empty()) {
            let message = "describes files and sockets of the command line, and there are none: \
                           name them, or set it under [[source]] in the file";
            problems.push(Problem { place: place.clone(), message: message.to_owned() });
        }
        if !problems.is_empty() {
            return Err(ConfigError::Faults(problems));
        }
        let receipts = self.receipts.map(|path| {
            if path == Path::new("-") {
                ReceiptsTarget::Stdout
            } else {
                ReceiptsTarget::File(base.join(path))
            }
        });
        Ok(SendLayer {
            to: flags("--to", self.to),
            token_file: flag("--token-file", self.token_file.map(|path| base.join(path))),
            chain_key_file: flag(
                "--chain-key-file",
                self.chain_key_file.map(|path| base.join(path)),
            ),
            ca: flag("--ca", self.ca.map(|path| base.join(path))),
            balance: switch("--balance", self.balance),
            idle_close: None,
            listen: flag("--listen", self.listen.map(|listen| absolute(listen, base))),
            tls_cert: flag("--tls-cert", self.tls_cert.map(|path| base.join(path))),
            tls_key: flag("--tls-key", self.tls_key.map(|path| base.join(path))),
            tokens: flag("--tokens", self.tokens.map(|path| base.join(path))),
            proxy: flag("--proxy", self.proxy),
            rate_limit: flag("--rate-limit", self.rate_limit),
            cert: flag("--cert", self.cert.map(|path| base.join(path))),
            key: flag("--key", self.key.map(|path| base.join(path))),
            state_dir: flag("--state-dir", self.state_dir.map(|path| base.join(path))),
            sources: inputs
                .into_iter()
                .map(|input| SourceLayer {
                    place: input.place.clone(),
                    name: None,
                    inputs: vec![input],
                    refused: false,
                    mode: None,
                    rotated: Vec::new(),
                    syslog: syslog.clone(),
                    settings: settings.clone(),
                })
                .collect(),
            once: self.once,
            once_timeout: flag("--once-timeout", self.once_timeout),
            receipts: flag("--receipts", receipts),
            compress: switch("--compress", self.compress),
            drain_timeout: flag("--drain-timeout", self.drain_timeout),
            spool_bytes_max: flag("--spool-bytes-max", self.spool_bytes_max),
            kept_bytes_max: flag("--kept-bytes-max", self.kept_bytes_max),
            insecure_plaintext: switch("--insecure-plaintext", self.insecure_plaintext),
            metrics: flag("--metrics", self.metrics),
            log: self.logging.layer(),
        })
    }
}

impl Elasticsearch {
    /// The layer of these flags.
    pub fn layer(self, environment: &Environment) -> ElasticsearchLayer {
        let base = &environment.current_dir;
        ElasticsearchLayer {
            urls: flags("--elasticsearch", self.elasticsearch),
            api_key_file: flag("--api-key-file", self.api_key_file.map(|path| base.join(path))),
            user_file: flag("--es-user-file", self.es_user_file.map(|path| base.join(path))),
            ca: flag("--es-ca", self.es_ca.map(|path| base.join(path))),
            ..ElasticsearchLayer::default()
        }
    }
}

impl Receive {
    /// The layer of these flags.
    pub fn layer(self, environment: &Environment) -> ReceiveLayer {
        let base = &environment.current_dir;
        let dials = self.dial.into_iter();
        ReceiveLayer {
            listen: flag("--listen", self.listen.map(|listen| absolute(listen, base))),
            tls_cert: flag("--tls-cert", self.tls_cert.map(|path| base.join(path))),
            tls_key: flag("--tls-key", self.tls_key.map(|path| base.join(path))),
            dials: dials.map(|(sender, url)| DialLayer::flag(sender, url)).collect(),
            token_file: flag("--token-file", self.token_file.map(|path| base.join(path))),
            ca: flag("--ca", self.ca.map(|path| base.join(path))),
            proxy: flag("--proxy", self.proxy),
            client_ca: flag("--client-ca", self.client_ca.map(|path| base.join(path))),
            trust_client_headers: switch("--trust-client-headers", self.trust_client_headers),
            tokens: flag("--tokens", self.tokens.map(|path| base.join(path))),
            elasticsearch: ElasticsearchLayer {
                dead_letter_index: flag("--dead-letter-index", self.dead_letter_index),
                ..self.elasticsearch.layer(environment)
            },
            store: StoreLayer {
                file: flag("--store", self.store.map(|path| base.join(path))),
                keep_days: flag("--keep-days", self.keep_days),
                keep_bytes: flag("--keep-bytes", self.keep_bytes),
            },
            index: flag("--index", self.index),
            former_index: flags("--former-index", self.former_index),
            drain_timeout: flag("--drain-timeout", self.drain_timeout),
            insecure_plaintext: switch("--insecure-plaintext", self.insecure_plaintext),
            metrics: flag("--metrics", self.metrics),
            log: self.logging.layer(),
            ..ReceiveLayer::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::super::{Cli, Command};
    use super::*;

    fn send(arguments: &[&str]) -> Send {
        let line = ["waybill", "send"].iter().chain(arguments);
        match Cli::try_parse_from(line).expect("a command line").command {
            Command::Send(send) => *send,
            other => panic!("{other:?}"),
        }
    }

    fn environment() -> Environment {
        Environment { current_dir: "/srv/logs".into(), ..Environment::default() }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn files_and_sockets_become_sources_with_the_same_settings() {
        let layer =
            send(&["a.log", "/var/log/*.log", "-", "--unix-datagram", "d.sock", "--type", "nginx"])
                .layer(&environment())
                .expect("a layer");
        let inputs: Vec<_> = layer.sources.iter().map(|s| s.inputs[0].value.clone()).collect();
        let files = |pattern: &str| TypedInput::Files {
            pattern: pattern.to_owned(),
            name: pattern.to_owned(),
            literal: pattern.contains('*').then(|| pattern.into()),
        };
        assert_eq!(
            inputs,
            [
                files("/srv/logs/a.log"),
                files("/var/log/*.log"),
                TypedInput::Stdin,
                TypedInput::UnixDatagram("/srv/logs/d.sock".into()),
            ]
        );
        assert!(layer.sources.iter().all(|source| source.settings.type_name.is_some()));
    }

    #[test]
    fn a_setting_without_a_source_is_refused() {
        let error = send(&["--type", "nginx", "--config", "x"]).layer(&environment());
        let message = error.expect_err("refused").to_string();
        assert!(message.starts_with("--type: describes files and sockets"), "{message}");
    }

    #[test]
    fn a_wrong_value_is_wrong_usage_and_says_what_is_allowed() {
        for (arguments, says) in [
            (["--drain-timeout", "10"], "such as 10s"),
            (["--spool-bytes-max", "lots"], "such as 64MiB"),
            (["--type", "No"], "a-z"),
            (["--to", "http://x"], "wss://"),
            (["--log-level", "loud"], "debug"),
        ] {
            let error = Cli::try_parse_from(["waybill", "send"].iter().chain(&arguments));
            let error = error.expect_err("refused");
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_sender_dials_or_is_dialled() {
        let both = ["waybill", "send", "a.log", "--to", "wss://h/", "--listen", "127.0.0.1:0"];
        let error = Cli::try_parse_from(both).expect_err("refused");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--to"), "{error}");
    }

    #[test]
    fn no_flag_takes_a_secret() {
        for command in Cli::command().get_subcommands() {
            for argument in command.get_arguments() {
                let name = argument.get_long().unwrap_or_default();
                let secret = ["token", "password", "key", "secret", "user"]
                    .iter()
                    .any(|word| name.contains(word));
                let path = ["file", "tokens", "tls-key", "chain-key"]
                    .iter()
                    .any(|word| name.contains(word))
                    || name == "key";
                assert!(!secret || path, "--{name} of {}", command.get_name());
            }
        }
    }

    #[test]
    fn help_shows_the_long_text_and_wraps_no_example() {
        let all = Cli::command();
        let shown = all.get_subcommands().filter(|command| !command.is_hide_set());
        let mut examples = 0;
        for command in shown {
            let name = command.get_name();
            let about = command.get_about().expect("a short text").to_string();
            assert!(!about.contains('`'), "{name}: {about}");
            assert!(command.get_long_about().is_some(), "{name}");
            let text = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            for line in text.lines() {
                if line.starts_with("    ") || line.starts_with("  waybill ") {
                    examples += 1;
                    assert!(line.len() <= 100, "{name} --help wraps: {line}");
                }
            }
        }
        assert!(examples > 20, "only {examples} lines of examples found");
    }
}
