//! One record's bytes to one document, written straight into the bulk body.
//!
//! Called by the destinations for each line of a frame. Outside bytes never panic here (I8), and
//! whatever they are, the document is valid JSON without a duplicate key: `docs/fields.md` lists
//! what can stand in it.

mod access_log;
mod ecs;
mod escape;
mod json;
mod segment;
mod syslog;
#[cfg(test)]
mod tests;
mod timestamp;

pub use segment::{Form, FrameTimes, Segment};
