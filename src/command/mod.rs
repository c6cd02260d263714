//! One file per subcommand: build parts, run, drain.
//!
//! A command says by its [`Exit`] how it ended, and has told a person why before it returns.

pub mod demo;
pub mod search;
pub mod token;

use std::io;

use crate::cli::{Cli, Command};
use crate::config::{ConfigError, Environment};
use crate::exit::Exit;
use crate::telemetry;

/// Threads of the runtime: a companion leaves the other cores to what it serves.
const WORKER_THREADS: usize = 2;

/// Runs what was typed, and says on standard error why it failed, if it did.
pub fn run(cli: Cli) -> Exit {
    let environment = Environment::of_process();
    let result = match cli.command {
        Command::Demo(demo) => with_runtime(demo::run(demo, environment)),
        _ => Ok(Exit::Usage),
    };
    result.unwrap_or_else(|error| failure(&error))
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
    telemetry::report(&format!("{error:#}"));
    if error.chain().any(|cause| cause.is::<ConfigError>()) {
        Exit::Configuration
    } else {
        Exit::Failed
    }
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
        assert_eq!(failure(&anyhow::anyhow!("lost")).code(), 1);
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(failure(&anyhow::Error::from(gone).context("writing")).code(), 0);
    }
}
