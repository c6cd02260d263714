//! The sender's half of the receipt-chained handshake: the key, and the last receipted document.
//!
//! The document is a claim that a receiver may look up, no more: a sender that lost it, or whose last
//! receipt was lost on the way, proves itself by the key alone.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tracing::debug;

use super::origin::Framed;
use crate::protocol::{Chain, ChainKey, Challenge, Receipt, Verdict};
use crate::record::{Day, DocumentId, IdPrefix, RecordKind, Row, escape_path};
use crate::state::{LastReceipted, State};

/// Why a challenge cannot be answered.
#[derive(Debug, Error)]
#[error(
    "chain key file {path}: {reason}; take there what `waybill token NAME --chain-key FILE` wrote at \
     the receiver"
)]
pub struct ChainKeyError {
    path: String,
    reason: String,
}

/// Answers challenges.
pub struct Answerer {
    key_file: PathBuf,
    state: Arc<State>,
}

impl Answerer {
    /// The key is read anew for each answer.
    pub fn new(key_file: PathBuf, state: Arc<State>) -> Answerer {
        Answerer { key_file, state }
    }

    /// The answer for this receiver; none where it asks nothing, because the token is bound to no
    /// key.
    pub async fn answer(
        &self,
        receiver: &str,
        challenge: Option<&Challenge>,
    ) -> Result<Option<Chain>, ChainKeyError> {
        let Some(challenge) = challenge else {
            debug!(receiver, "the receiver asks for no chain key");
            return Ok(None);
        };
        let fault = |reason| ChainKeyError { path: escape_path(&self.key_file), reason };
        let text = tokio::fs::read_to_string(&self.key_file).await;
        let text = text.map_err(|error| fault(error.to_string()))?;
        let key = ChainKey::parse(&text);
        let key = key.ok_or_else(|| fault("it must hold 44 characters, a key in base64".into()))?;
        // What another receiver stored may be unknown to this one.
        let last = self.state.last_receipted().filter(|last| last.receiver == receiver);
        Ok(Some(Chain::answer(&key, challenge, last.map(|last| (last.index, last.id)))))
    }
}

/// The last documents of a segment's frames that are on their way, in order.
#[derive(Debug, Default)]
pub struct Lasts(VecDeque<Last>);

#[derive(Clone, Copy, Debug)]
struct Last {
    /// One past the record's last byte.
    to: u64,
    id: DocumentId,
    /// In the name of its index.
    day: Day,
}

impl Lasts {
    /// A frame was sent for the first time, from this offset of the row.
    pub fn sent(&mut self, row: &Row, from: u64, framed: &Framed) {
        let Some(sender) = row.sender else { return };
        let records = row.framing.records(&framed.records, from, framed.continues);
        let Some(record) = records.filter(|record| record.kind == RecordKind::Line).last() else {
            return;
        };
        let own_day = record.time.filter(|_| !record.key.is_empty()).map(Day::of_millis);
        self.0.push_back(Last {
            to: record.offset + record.length as u64,
            id: IdPrefix::new(sender, row.segment).of(&record),
            day: own_day.unwrap_or(row.day),
        });
    }

    /// The newest of them that the receipt says is stored. What lies before `position` is done with.
    pub fn receipted(
        &mut self,
        row: &Row,
        receipt: &Receipt,
        position: u64,
        receiver: &str,
    ) -> Option<LastReceipted> {
        let newest = self.0.iter().rev().find(|last| is_stored(receipt, last.to)).copied();
        self.0.retain(|last| last.to > position);
        let Last { id, day, .. } = newest?;
        let index = row.rule.as_ref()?.name(&row.type_name, day);
        Some(LastReceipted { receiver: receiver.to_owned(), index, id: id.to_string() })
    }
}

/// Whether the receipt says so of the record that ends at `to`.
fn is_stored(receipt: &Receipt, to: u64) -> bool {
    let run = receipt.runs.iter().find(|run| run.to >= to);
    receipt.from < to
        && run.is_some_and(|run| matches!(run.verdict, Verdict::Stored | Verdict::Already))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Run;

    fn last(to: u64) -> Last {
        Last { to, id: DocumentId([to as u8; 24]), day: Day::today() }
    }

    fn receipt(from: u64, runs: &[(u64, Verdict)]) -> Receipt {
        let run =
            |(to, verdict): &(u64, Verdict)| Run { to: *to, lines: 1, verdict: verdict.clone() };
        let runs: Vec<Run> = runs.iter().map(run).collect();
        Receipt { handle: 1, from, to: runs[runs.len() - 1].to, runs }
    }

    fn row() -> Row {
        let mut row = crate::state::tests::entry("/a").row;
        row.rule = Some(Default::default());
        row
    }

    #[test]
    fn only_a_stored_document_is_the_last_one_and_what_is_done_is_forgotten() {
        let row = row();
        let mut lasts = Lasts([10, 20, 30, 40].map(last).into());
        let mut id = |receipt: &Receipt, position: u64| {
            let found = lasts.receipted(&row, receipt, position, "here");
            let left = lasts.0.len();
            (found.map(|last| last.id), left)
        };
        let named = |to: u64| Some(DocumentId([to as u8; 24]).to_string());
        let parked = Verdict::Parked { reason: "mapping".to_owned() };
        // Receipts come in any order; the range before has none yet.
        assert_eq!(id(&receipt(10, &[(20, Verdict::Stored)]), 0), (named(20), 4));
        assert_eq!(id(&receipt(20, &[(30, parked.clone())]), 0), (None, 4));
        let runs = [(5, Verdict::Already), (10, Verdict::Skipped)];
        assert_eq!(id(&receipt(0, &runs), 30), (None, 1));
        let runs = [(35, parked), (42, Verdict::Already)];
        assert_eq!(id(&receipt(30, &runs), 42), (named(40), 0));
    }
}
