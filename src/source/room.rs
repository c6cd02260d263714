//! How many connections a listener may have, alone and beside those of other sources (I7).

use std::io;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::descriptors;
use crate::spool::Throttle;

/// The room of one listener.
#[derive(Debug)]
pub(super) struct Room {
    /// The socket, as log lines name it.
    name: String,
    max: usize,
    own: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    crowded: Throttle,
    failed: Throttle,
}

/// Held as long as the connection.
pub(super) type Permits = [OwnedSemaphorePermit; 2];

impl Room {
    /// For at most `max` connections, or fewer where the limit of open files is low.
    pub(super) fn new(name: &str, max: usize) -> Room {
        let max = descriptors::of_one_source(max);
        Room {
            name: name.to_owned(),
            max,
            own: Arc::new(Semaphore::new(max)),
            shared: descriptors::source_connections(),
            crowded: Throttle::default(),
            failed: Throttle::default(),
        }
    }

    /// Waits until there is room for one more. Dropping the future loses nothing.
    pub(super) async fn take(&self) -> Permits {
        let socket = &self.name;
        if self.own.available_permits() == 0 {
            if let Some(times) = self.crowded.count() {
                tracing::warn!(%socket, times, "{} connections are open: further ones wait", self.max);
            }
        } else if self.shared.available_permits() == 0
            && let Some(times) = self.crowded.count()
        {
            tracing::warn!(
                %socket, times,
                "all sources together have as many connections as there may be: further ones wait; {}",
                descriptors::ADVICE,
            );
        }
        let permit = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).acquire_owned();
        // Its own first: who waits for it takes nothing from others.
        let own = permit(&self.own).await.expect("the semaphore is never closed");
        [own, permit(&self.shared).await.expect("the semaphore is never closed")]
    }

    /// Says that a connection could not be accepted.
    pub(super) fn failed(&self, error: &io::Error) {
        if let Some(times) = self.failed.count() {
            let advice = descriptors::advice(error).unwrap_or("it is tried again");
            let socket = &self.name;
            tracing::error!(%socket, %error, times, "cannot accept a connection: {advice}");
        }
    }
}
