//! One file per subcommand: build parts, run, drain.
//!
//! A command says by its [`Exit`] how it ended, and has told a person why before it returns.

pub mod check;
pub mod demo;
pub mod import;
pub mod receive;
mod reload;
pub mod search;
pub mod send;
pub mod setup;
pub mod token;

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use jiff::Timestamp;
use tracing::warn;

use crate::cli::{self, Cli, Command};
use crate::config::{
    ConfigError, DestinationConfig, Environment, Loaded, LogConfig, default_store,
    load_elasticsearch, load_receive,
};
use crate::destination::embedded::StoreError;
use crate::exit::Exit;
use crate::record::escape_path;
use crate::search::{QueryError, SearchArgs, SearchTarget};
use crate::tokens::{ChainTerm, Terms};
use crate::{descriptors, shutdown, systemd, telemetry, tls};

use token::TokenAction;

/// Threads of the runtime: a companion leaves the other cores to what it serves.
const WORKER_THREADS: usize = 2;

/// Runs what was typed, and says on standard error why it failed, if it did.
pub fn run(cli: Cli) -> Exit {
    tls::install_provider();
    let environment = Environment::of_process();
    let result = match cli.command {
        Command::Send(args) => with_runtime(send::run(*args, environment)),
        Command::Receive(args) => with_runtime(receive(*args, environment)),
        Command::Check(args) => with_runtime(check::run(args, environment)),
        Command::Import(args) => import::run(args, &environment),
        Command::Token(args) => token(args, &environment),
        Command::Search(args) => with_runtime(search(args, environment)),
        Command::Setup(args) => with_runtime(setup::run(args, environment)),
        Command::Demo(args) => with_runtime(demo::run(args, environment)),
        Command::Generate(args) => cli::generate(&args.folder).map(|()| Exit::Done),
    };
    result.unwrap_or_else(|error| failure(&error))
}

async fn receive(args: cli::Receive, environment: Environment) -> anyhow::Result<Exit> {
    let shutdown = shutdown::install();
    let file = args.config.clone();
    let layer = args.layer(&environment);
    let loaded = load_receive(layer.clone(), file.as_deref(), &environment)?;
    let log = loaded.log;
    let config = begin(loaded);
    if let DestinationConfig::Embedded(store) = &config.destination {
        refuse_for_another_user(store.file.parent().unwrap_or(Path::new("/")))?;
    }
    systemd::accompany(&shutdown);
    let load = || Ok(take(load_receive(layer.clone(), file.as_deref(), &environment)?, log));
    receive::run(config, shutdown, load).await?;
    Ok(Exit::Done)
}

fn token(args: cli::Token, environment: &Environment) -> anyhow::Result<Exit> {
    let file = environment.current_dir.join(args.tokens);
    let types = (!args.types.is_empty()).then_some(args.types);
    // A time so far away that no clock can say it is no end at all.
    let expires = args
        .expires
        .and_then(|from_now| SystemTime::now().checked_add(from_now))
        .and_then(|end| Timestamp::try_from(end).ok());
    let certificates: Result<Vec<_>, _> = args
        .certificate
        .iter()
        .map(|file| tls::fingerprint_of_file(&environment.current_dir.join(file)))
        .collect();
    let chain = if args.no_chain_key { ChainTerm::Drop } else { ChainTerm::Keep };
    let terms = Terms { types, certificates: certificates?, chain, expires };
    let chain_key = args.chain_key.map(|file| environment.current_dir.join(file));
    let action = match args.name {
        Some(name) if args.rotate => TokenAction::Rotate { name, terms, chain_key },
        Some(name) if args.revoke => TokenAction::Revoke { name },
        Some(name) => TokenAction::Mint { name, terms, chain_key },
        None => TokenAction::List,
    };
    token::run(&file, action)?;
    Ok(Exit::Done)
}

async fn search(args: cli::Search, environment: Environment) -> anyhow::Result<Exit> {
    let target = if args.elasticsearch.elasticsearch.is_empty() {
        let typed = args.store.map(|file| environment.current_dir.join(file));
        let file = typed.or_else(|| default_store(&environment));
        SearchTarget::Store(file.context("no store: give --store FILE")?)
    } else {
        let (config, warnings) = load_elasticsearch(args.elasticsearch.layer(&environment))?;
        for warning in warnings {
            telemetry::report(&warning);
        }
        SearchTarget::Elasticsearch { config, index: args.index.wildcard() }
    };
    let typed = SearchArgs {
        query: args.query.join(" "),
        after: args.after,
        before: args.before,
        limit: usize::try_from(args.limit).unwrap_or(usize::MAX),
        json: args.json,
        target,
    };
    search::run(typed).await
}

/// Sets up logging, tells the warnings, and hands out the configuration.
fn begin<T>(loaded: Loaded<T>) -> T {
    let log = loaded.log;
    telemetry::init(log);
    if let Err(error) = descriptors::raise_limit() {
        warn!(%error, "the limit of open files stays at its soft value");
    }
    take(loaded, log)
}

/// Tells the warnings, and hands out the configuration; `log` is how this process logs.
fn take<T>(loaded: Loaded<T>, log: LogConfig) -> T {
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    if loaded.log != log {
        warn!("log_level and log_format stay as they are until the next start");
    }
    loaded.config
}

/// Refuses to work as root in a folder of another user: a service that runs as that user could not
/// open afterwards what root left there.
fn refuse_for_another_user(folder: &Path) -> anyhow::Result<()> {
    let owner = fs::metadata(folder).map_or(0, |metadata| metadata.uid());
    if rustix::process::geteuid().is_root() && owner != 0 {
        let folder = escape_path(folder);
        anyhow::bail!(
            "{folder} belongs to user {owner}, who could not open what root leaves there: run this \
             as that user, with runuser -u \"$(stat -c %U {folder})\" --, or give root a folder of \
             its own"
        );
    }
    Ok(())
}

/// Runs a command's future to its end.
fn with_runtime<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(command);
    // A thread that waits in a blocking read (standard input) must not hold up the end.
    runtime.shutdown_background();
    result
}

/// The exit code of an error, once it is told.
fn failure(error: &anyhow::Error) -> Exit {
    if is_broken_pipe(error) {
        // Whoever read our output has seen enough (`| head`).
        return Exit::Done;
    }
    telemetry::report(&told(error));
    let names_another_file = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref().is_some_and(StoreError::is_of_another_kind)
    };
    if error.chain().any(|cause| cause.is::<ConfigError>() || names_another_file(cause)) {
        Exit::Configuration
    } else if error.chain().any(|cause| cause.is::<QueryError>()) {
        Exit::Usage
    } else {
        Exit::Failed
    }
}

/// The error and its causes; those that it names in its own text are not said twice.
fn told(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match text.as_str() {
            "" => cause,
            said if said.contains(&cause) => text,
            _ => format!("{text}: {cause}"),
        }
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Place, Problem};

    #[test]
    fn errors_end_with_the_documented_codes() {
        let problem = Problem { place: Place::Missing, message: "x".to_owned() };
        let configuration = anyhow::Error::from(ConfigError::Faults(vec![problem]));
        assert_eq!(failure(&configuration.context("loading")).code(), 78);
        let store = anyhow::Error::from(StoreError::NotAStore("notes.txt".into()));
        assert_eq!(failure(&store).code(), 78);
        let store = anyhow::Error::from(StoreError::Missing("store".into()));
        assert_eq!(failure(&store).code(), 1);
        assert_eq!(failure(&anyhow::anyhow!("lost")).code(), 1);
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = io::Error::from(io::ErrorKind::NotFound);
        let error = anyhow::anyhow!("no room").context("x cannot be made: no room; make some");
        assert_eq!(told(&error), "x cannot be made: no room; make some");
        let error = anyhow::Error::from(cause).context("reading x");
        assert_eq!(told(&error), "reading x: entity not found");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(failure(&anyhow::Error::from(gone).context("writing")).code(), 0);
    }
}
