//! One file per subcommand: build parts, run, drain.

pub mod search;
