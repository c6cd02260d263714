//! Where bytes come from: files that others write, sockets, standard input.

pub mod files;

mod connection;
pub mod datagram;
mod drops;
mod framer;
pub mod http_intake;
mod socket;
pub mod stdin;
pub mod stream;

pub use socket::{BindError, SourceError};
