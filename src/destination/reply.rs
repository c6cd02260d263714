//! The way back of receipts: from a destination to the connection that waits for them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::protocol::{Receipt, Run, Verdict};

/// The receipts for one connection. A destination never waits for a slow connection: what lies
/// here is bounded by that connection's credit and number of outstanding frames (I7).
#[derive(Debug, Default)]
pub struct Inbox {
    receipts: Mutex<VecDeque<Receipt>>,
    arrived: Notify,
}

impl Inbox {
    /// Waits until there are receipts and takes them all. Dropping the future loses nothing.
    pub async fn take(&self) -> VecDeque<Receipt> {
        loop {
            let arrived = self.arrived.notified();
            let receipts = self.try_take();
            if !receipts.is_empty() {
                return receipts;
            }
            arrived.await;
        }
    }

    /// The receipts that are there right now.
    pub fn try_take(&self) -> VecDeque<Receipt> {
        std::mem::take(&mut *self.receipts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends receipts for one segment of one connection.
#[derive(Clone, Debug)]
pub struct Reply {
    inbox: Arc<Inbox>,
    handle: u32,
}

impl Reply {
    /// For the segment that the connection knows as `handle`.
    pub fn new(inbox: Arc<Inbox>, handle: u32) -> Reply {
        Reply { inbox, handle }
    }

    /// One receipt for the range that starts at `from`; neighbouring runs with the same verdict
    /// are joined. Records that stay open must not be in it: their receipt follows on its own.
    pub fn send(&self, from: u64, runs: impl IntoIterator<Item = Run>) {
        let mut joined: Vec<Run> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if last.verdict == run.verdict => {
                    last.to = run.to;
                    last.lines += run.lines;
                }
                _ => joined.push(run),
            }
        }
        let Some(to) = joined.last().map(|run| run.to) else {
            return;
        };
        let receipt = Receipt { handle: self.handle, from, to, runs: joined };
        self.inbox.receipts.lock().unwrap_or_else(PoisonError::into_inner).push_back(receipt);
        self.inbox.arrived.notify_one();
    }

    /// One verdict for a whole range.
    pub fn send_one(&self, from: u64, to: u64, lines: u64, verdict: Verdict) {
        self.send(from, [Run { to, lines, verdict }]);
    }
}
