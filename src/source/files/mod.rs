//! Files that others write: opening, recognising and finding them.

pub mod discovery;
pub mod fingerprint;
pub mod recognition;
pub mod siblings;
pub mod survey;
pub mod tail;
