//! Arguments, command, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use waybill::cli::Cli;

fn main() -> ExitCode {
    waybill::command::run(Cli::parse()).into()
}
