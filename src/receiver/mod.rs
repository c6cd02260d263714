//! Receiver.
pub mod tokens;
