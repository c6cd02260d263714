//! Where documents go: Elasticsearch or the embedded store.
//!
//! A destination takes [`Frame`]s from the bounded [`Queue`], writes one document per record, and
//! answers each frame through its [`Reply`] with receipts that cover the frame exactly once. It
//! must never answer `stored`, `already` or `parked` before the destination holds it durably (I1).

pub mod elasticsearch;
pub mod embedded;
mod queue;
mod reply;

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::parse::Segment;

pub use queue::Queue;
pub use reply::{Inbox, Reply};

/// A data frame on its way into the destination.
#[derive(Debug)]
pub struct Frame {
    /// What the records' ids, index and parse depend on.
    pub segment: Arc<Segment>,
    /// Offset of the first record in the segment.
    pub offset: u64,
    /// When the sender read it, milliseconds since 1970.
    pub read_at: u64,
    /// The first record goes on from one that was cut.
    pub continues: bool,
    /// Whole records.
    pub records: Bytes,
    /// Where the receipts go.
    pub reply: Reply,
    /// Its share of the receiver's memory; returned when the frame is dropped (I7).
    pub memory: OwnedSemaphorePermit,
}
