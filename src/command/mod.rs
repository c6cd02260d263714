//! One file per subcommand.

pub mod search;
pub mod token;
