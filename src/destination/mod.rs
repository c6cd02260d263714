//! Where documents go: Elasticsearch or the embedded store.
//!
//! A destination takes [`Frame`]s from the bounded [`Queue`], writes one document per record, and
//! answers each frame through its [`Reply`] with receipts that cover the frame exactly once. It
//! must never answer `stored`, `already` or `parked` before the destination holds it durably (I1).

pub mod elasticsearch;
pub mod embedded;
mod lookup;
mod queue;
mod reply;

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::DestinationConfig;
use crate::parse::Segment;
use crate::protocol::DayBounds;
use crate::record::{Day, Record};
use elasticsearch::Elasticsearch;
use embedded::Store;

pub use lookup::{Found, Lookup, LookupError};
pub use queue::Queue;
pub use reply::{Inbox, Reply};

/// Where the documents of one receiver go.
pub enum Destination {
    /// A cluster.
    Elasticsearch(Elasticsearch),
    /// A file.
    Embedded(Store),
}

/// Whether a destination takes documents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Health {
    /// Nothing is known yet.
    Starting,
    /// It took the last ones.
    Ready,
    /// It did not, or refused us as a whole.
    Down {
        /// For a person: what happened.
        reason: String,
    },
}

/// A destination as a receiver sees it.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Its identity, where it has one.
    pub id: Option<Uuid>,
    /// Whether it takes documents.
    pub health: watch::Receiver<Health>,
}

/// Why a destination cannot be set up.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Its configuration is not usable.
    #[error("{0}")]
    Elasticsearch(#[from] elasticsearch::ConfigureError),
    /// Its file is not usable.
    #[error("{0}")]
    Embedded(#[from] embedded::StoreError),
}

impl Destination {
    /// Opens the store, or prepares a client: an Elasticsearch that is away is no error here.
    pub fn open(config: &DestinationConfig) -> Result<Destination, OpenError> {
        Ok(match config {
            DestinationConfig::Elasticsearch(config) => {
                Destination::Elasticsearch(Elasticsearch::new(config)?)
            }
            DestinationConfig::Embedded(config) => Destination::Embedded(Store::open(config)?),
        })
    }

    /// Its identity, where it has one: a sender refuses two different ones at once.
    pub fn id(&self) -> Option<Uuid> {
        match self {
            Destination::Elasticsearch(_) => None,
            Destination::Embedded(store) => Some(store.destination_id()),
        }
    }

    /// Follows whether it takes documents.
    pub fn health(&self) -> watch::Receiver<Health> {
        match self {
            Destination::Elasticsearch(elasticsearch) => elasticsearch.health(),
            Destination::Embedded(store) => store.health(),
        }
    }

    /// What a receiver needs to know of it while it works.
    pub fn profile(&self) -> Profile {
        Profile { id: self.id(), health: self.health() }
    }

    /// Works until the queue is closed and empty. After `stop` nothing is tried again: what is
    /// under way is answered, the rest never.
    pub async fn run(self, queue: Arc<Queue>, stop: CancellationToken) {
        match self {
            Destination::Elasticsearch(elasticsearch) => elasticsearch.run(queue, stop).await,
            Destination::Embedded(store) => store.run(queue, stop).await,
        }
    }
}

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
    /// Days that records with a key may have, as of when the frame came. Fixed here, so that every
    /// attempt of a record has the same index.
    pub days: DayBounds,
    /// Whole records.
    pub records: Bytes,
    /// Where the receipts go.
    pub reply: Reply,
    /// Its share of the receiver's memory; returned when the frame is dropped (I7).
    pub memory: OwnedSemaphorePermit,
}

/// Why a record with a key is parked: its day would make an index outside the bounds (I8).
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "its time of origin is on {day}, outside {} to {}: check the client's clock, or widen the \
     bounds of days at the receiver", bounds.from, bounds.to
)]
pub struct OutsideDays {
    /// The UTC day of its time.
    pub day: Day,
    /// What is accepted.
    pub bounds: DayBounds,
}

impl Frame {
    /// The day in the name of a record's index: the row's, or that of the time that came with the
    /// record's key.
    ///
    /// # Errors
    ///
    /// Where that day is not accepted. Such a record is parked under its own id.
    #[inline]
    pub fn day_of(&self, record: &Record<'_>) -> Result<Day, OutsideDays> {
        let row_day = self.segment.row.day;
        if record.key.is_empty() {
            return Ok(row_day);
        }
        let day = record.time.map_or(row_day, Day::of_millis);
        match day == row_day || self.days.contains(day) {
            true => Ok(day),
            false => Err(OutsideDays { day, bounds: self.days }),
        }
    }
}
