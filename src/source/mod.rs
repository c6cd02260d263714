//! Where bytes come from: files that others write, sockets, standard input, supervisor.

pub mod files;

pub mod datagram;
mod framer;
mod inherited;
mod socket;
pub mod stdin;
pub mod stream;
pub mod supervisor;

pub use socket::{BindError, SourceError};
