//! Lines that wait for their next attempt, without a request slot waiting with them.
//!
//! Filled and emptied by the workers. Bounded twice: each stretch keeps its frame and so its share
//! of the receiver's memory, and their number has a limit of its own (I7).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::batch::Stretch;

/// Stretches held at most. One that holds a single line weighs more than the line, so that frames
/// alone do not bound them.
const STRETCHES_MAX: usize = 1 << 16;

/// A stretch on its way into the dead letter.
#[derive(Debug)]
pub(super) struct Parking {
    pub(super) stretch: Stretch,
    pub(super) reason: Arc<str>,
    /// When an earlier attempt met its own documents.
    pub(super) conflict: Option<Instant>,
}

/// What waits.
#[derive(Debug)]
pub(super) enum Work {
    Index(Stretch),
    Park(Parking),
}

impl Work {
    /// The lines that wait.
    pub(super) fn stretch(&self) -> &Stretch {
        match self {
            Work::Index(stretch) | Work::Park(Parking { stretch, .. }) => stretch,
        }
    }
}

/// All that waits, in order of time.
#[derive(Debug, Default)]
pub(super) struct Aside {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By time due; the number keeps the order of what is due together.
    waiting: BTreeMap<(Instant, u64), Work>,
    pushed: u64,
}

impl State {
    fn insert(&mut self, due: Instant, work: Work) {
        self.pushed += 1;
        self.waiting.insert((due, self.pushed), work);
    }
}

impl Aside {
    /// Holds something until it is due; gives it back where there is no room.
    pub(super) fn push(&self, due: Instant, work: Work) -> Result<(), Work> {
        let mut state = self.lock();
        if state.waiting.len() >= STRETCHES_MAX {
            return Err(work);
        }
        state.insert(due, work);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Passes on what a worker has begun and not finished, at once. The limit is for what waits;
    /// there is at most one of these per worker.
    pub(super) fn hand_on(&self, work: Work) {
        let mut state = self.lock();
        state.insert(Instant::now(), work);
        drop(state);
        self.changed.notify_one();
    }

    /// Takes something that is due now.
    pub(super) fn try_take(&self) -> Option<Work> {
        let mut state = self.lock();
        let first = state.waiting.first_entry()?;
        (first.key().0 <= Instant::now()).then(|| first.remove())
    }

    /// Waits until something is due and takes it. With `last`, nothing new will come from outside:
    /// the answer is `None` as soon as nothing waits. Dropping the future loses nothing.
    pub(super) async fn take(&self, last: bool) -> Option<Work> {
        loop {
            let changed = self.changed.notified();
            if let Some(work) = self.try_take() {
                // What else is due may be another worker's.
                self.changed.notify_one();
                return Some(work);
            }
            match self.next_due() {
                Some(due) => {
                    let _ = tokio::time::timeout_at(due, changed).await;
                }
                None if last => return None,
                None => changed.await,
            }
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.lock().waiting.first_key_value().map(|(key, _)| key.0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::stretch;
    use super::*;

    #[tokio::test]
    async fn what_waits_comes_when_it_is_due_and_in_order() {
        let aside = Aside::default();
        let now = Instant::now();
        let later = now + Duration::from_millis(50);
        for (due, index) in [(later, "last"), (now, "first"), (now, "second")] {
            aside.push(due, Work::Index(stretch(index))).expect("room");
        }
        let mut order = Vec::new();
        while let Some(work) = aside.take(true).await {
            order.push(work.stretch().target.name.to_string());
        }
        assert_eq!(order, ["first", "second", "last"]);
        assert!(Instant::now() >= later);
    }

    #[tokio::test]
    async fn a_full_list_gives_back() {
        let aside = Aside::default();
        let stretch = stretch("a");
        let due = Instant::now() + Duration::from_secs(60);
        for _ in 0..STRETCHES_MAX {
            aside.push(due, Work::Index(stretch.clone())).expect("room");
        }
        assert!(aside.push(due, Work::Index(stretch.clone())).is_err());
        aside.hand_on(Work::Index(stretch));
        assert!(aside.try_take().is_some(), "what is begun goes on all the same");
    }
}
