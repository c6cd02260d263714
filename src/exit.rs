//! Every exit code.

use std::process::ExitCode;

/// How a command ended, as scripts and service managers see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done as asked.
    Done,
    /// Failed: tried, and did not work; also `--once` with a line that was parked.
    Failed,
    /// The command line is wrong; clap ends with this code by itself.
    Usage,
    /// The configuration is wrong (`EX_CONFIG` of sysexits(3)); trying again does not help.
    Configuration,
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Configuration => 78,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}
