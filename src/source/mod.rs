//! Where bytes come from: files that others write, sockets, standard input, supervisor.

pub mod files;

mod connection;
pub mod datagram;
mod drops;
mod framer;
pub mod http_intake;
mod room;
mod socket;
pub mod stdin;
pub mod stream;
pub mod supervisor;

pub use socket::{BindError, Place, SourceError};
