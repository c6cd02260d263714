//! Elasticsearch 7.17, 8, 9 and OpenSearch 2, 3 by plain `_bulk`.
//!
//! Called by the receiver, which pushes frames into the [`Queue`] and gets receipts through each
//! frame's reply. It keeps nothing on disk: a line is receipted when Elasticsearch has answered for
//! it, and what has no answer when the process ends is sent again.
//!
//! ```text
//! queue ─ worker ─ batch ─ bulk ─ exchange ─ client ─ Elasticsearch
//!            │                       │
//!          aside ── verdict ─────  answer
//!            └───── dead letter
//! ```
//!
//! Never: a verdict without Elasticsearch's own answer for that document (I1), a line that holds up
//! another line or index (I6), or an unbounded wait list (I7).

mod answer;
mod aside;
mod batch;
mod bulk;
mod client;
mod cluster;
mod dead_letter;
mod exchange;
mod target;
mod template;
#[cfg(test)]
mod tests;
mod verdict;
mod worker;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::ElasticsearchConfig;

use super::{Health, Queue};

pub use client::{Client, ConfigureError, RequestError};
pub use cluster::{Cluster, Node, Privileges, Template, VersionError, supported};
pub use template::{SetupError, SetupRequest, render, setup, setup_requests};

/// Between the first and the second create of a conflict, at least. A conflict is answered from
/// memory, perhaps before the document that it met is durable.
const CONFLICT_PAUSE: Duration = Duration::from_secs(2);

/// The destination.
#[derive(Debug)]
pub struct Elasticsearch {
    client: Client,
    requests: usize,
    batch_bytes_max: usize,
    dead_letter_index: String,
    health: watch::Sender<Health>,
    /// 2 s; less in tests.
    conflict_pause: Duration,
    /// Divides all other waits; 1 but in tests.
    haste: u32,
}

impl Elasticsearch {
    /// Reads secret and authorities; connects to nothing yet.
    ///
    /// # Panics
    ///
    /// Where no default provider of rustls is installed: that is the first thing that `main` does.
    pub fn new(config: &ElasticsearchConfig) -> Result<Elasticsearch, ConfigureError> {
        Ok(Elasticsearch {
            client: Client::new(config)?,
            requests: config.requests.max(1),
            batch_bytes_max: config.batch_bytes_max.max(1),
            dead_letter_index: config.dead_letter_index.clone(),
            health: watch::Sender::new(Health::Starting),
            conflict_pause: CONFLICT_PAUSE,
            haste: 1,
        })
    }

    /// Follows whether Elasticsearch takes documents.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Works until the queue is closed and every frame is answered. After `shutdown` nothing new
    /// is begun and nothing tried again: what is under way is answered, the rest never.
    pub async fn run(self, queue: Arc<Queue>, shutdown: CancellationToken) {
        let targets = target::Targets::default();
        let dead_letter = dead_letter::DeadLetter::new(targets.get(&self.dead_letter_index));
        let exchange = exchange::Exchange {
            client: self.client,
            health: self.health,
            batch_bytes: AtomicUsize::new(self.batch_bytes_max),
            shutdown,
            haste: self.haste,
        };
        let shared = Arc::new(worker::Shared {
            exchange,
            queue,
            targets,
            aside: aside::Aside::default(),
            dead_letter,
            conflict_pause: self.conflict_pause,
        });
        let mut workers = JoinSet::new();
        for _ in 0..self.requests {
            workers.spawn(worker::Worker::new(Arc::clone(&shared)).run());
        }
        let all = async {
            while let Some(ended) = workers.join_next().await {
                if let Err(error) = ended
                    && let Ok(panic) = error.try_into_panic()
                {
                    std::panic::resume_unwind(panic);
                }
            }
        };
        tokio::pin!(all);
        tokio::select! {
            () = &mut all => {}
            () = shared.exchange.probe() => all.await,
        }
    }
}
