//! One file per subcommand.

pub mod token;
