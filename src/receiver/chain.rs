//! Whether the document that a chained `hello` names is where its receipt said it is.
//!
//! Asked beside the connection and for a person alone: the key has proven who the sender is, and
//! retention, a restored store or another state directory are no fault of its own.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::session::Sender;
use crate::destination::{Found, Lookup};
use crate::record::DocumentId;

/// Questions to the destination at a time: a fleet that connects at once must not hold up lines.
const LOOKUPS_MAX: usize = 4;

/// The last document of which a sender has a receipt, as its `hello` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    pub(super) index: String,
    pub(super) id: String,
}

/// Compares claims with what is stored.
#[derive(Debug)]
pub(super) struct Claims {
    lookup: Lookup,
    permits: Semaphore,
    /// It was said that nothing can be looked up.
    is_said: AtomicBool,
}

impl Claims {
    pub(super) fn new(lookup: Lookup) -> Claims {
        let permits = Semaphore::new(LOOKUPS_MAX);
        Claims { lookup, permits, is_said: AtomicBool::new(false) }
    }

    /// Looks once, and warns where the document is not there or is another sender's.
    pub(super) async fn check(&self, sender: &Sender, claim: &Claim) {
        let _permit = self.permits.acquire().await;
        let Claim { index, id } = claim;
        let found = match DocumentId::parse(id) {
            Some(id) => self.lookup.sender_of(index, &id).await,
            None => Ok(Found::Nothing),
        };
        match found {
            Ok(Found::Of(found)) if found == sender.id => {
                debug!(sender = sender.name, index, id, "the last receipted document is there");
            }
            Ok(Found::Of(other)) => warn!(
                sender = sender.name, index, id, %other,
                "the last document that this sender has a receipt for is another sender's: a state \
                 directory that was used under another token, or a forged hello"
            ),
            Ok(Found::Nothing) => warn!(
                sender = sender.name,
                index,
                id,
                "the last document that this sender has a receipt for is not there: deleted by \
                 retention (keep_days, keep_bytes, an index that was deleted), which is as it \
                 should be; else a store that was restored from an older copy, or a forged hello"
            ),
            Err(error) if !self.is_said.swap(true, Ordering::Relaxed) => {
                debug!(%error, "last receipted documents are not looked up");
            }
            Err(_) => {}
        }
    }
}
