//! One file per subcommand: build parts, run, drain.

pub mod receive;
pub mod search;
pub mod token;
