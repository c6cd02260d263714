//! Who uses a sender's token, and with which state: two at once mean a copied token, or a copied
//! state directory. Ids keep what is stored right either way, but a person should know.
//!
//! Called by connections, from `hello` to their end. A restart and a connection that is dead without
//! this side's knowing are no copies: hence a process counts from its answer to a ping, and the ping
//! says up to which of the others it lives.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::warn;
use uuid::Uuid;

use super::session::{Identity, Sender};
use crate::record::SenderId;

/// An instance counts for so long after its last connection, and two of them are reported.
const INSTANCES_WITHIN: Duration = Duration::from_secs(600);

/// Copies of one state directory are reported at most this often.
const REPEATED_AFTER: Duration = Duration::from_secs(600);

/// Instances of one sender that are remembered, unless more are connected.
const INSTANCES_MAX: usize = 32;

/// Processes of one instance that are remembered.
const RUNS_MAX: usize = 16;

/// The instances of each sender.
#[derive(Clone, Debug, Default)]
pub(super) struct Instances(Arc<Mutex<HashMap<SenderId, Vec<Instance>>>>);

/// A state directory, as its senders name it.
#[derive(Debug)]
struct Instance {
    id: Uuid,
    connections: usize,
    /// When a connection last began or ended.
    at: Instant,
    runs: Runs,
}

/// The processes that used it.
#[derive(Debug, Default)]
struct Runs {
    /// In the order in which they first answered a ping.
    known: VecDeque<Uuid>,
    reported: Option<Instant>,
}

/// One connection of an instance, while it lives.
#[derive(Debug)]
pub(super) struct Presence {
    instances: Instances,
    sender: SenderId,
    name: String,
    identity: Identity,
}

impl Instances {
    /// Counts a connection, and warns where another instance uses the same token.
    pub(super) fn enter(&self, sender: &Sender, identity: Identity) -> Presence {
        let instance = identity.instance;
        if let Some(other) = self.begin(sender.id, instance, Instant::now()) {
            warn!(
                sender = sender.name, %instance, %other,
                "two instances use this sender's token: give each machine a token of its own"
            );
        }
        let (instances, name) = (self.clone(), sender.name.clone());
        Presence { instances, sender: sender.id, name, identity }
    }

    /// Another instance of the sender that is here, or was a short while ago.
    fn begin(&self, sender: SenderId, instance: Uuid, now: Instant) -> Option<Uuid> {
        self.with(sender, |all| {
            // One that ended before this one was last here has been told of, or was none.
            let before = all.iter().find(|known| known.id == instance).map(|known| known.at);
            let counts = |other: &&Instance| {
                let is_recent = now.duration_since(other.at) < INSTANCES_WITHIN;
                let came_between = before.is_none_or(|before| other.at >= before);
                other.connections > 0 || is_recent && came_between
            };
            let others = all.iter().filter(|other| other.id != instance).filter(counts);
            let other = others.max_by_key(|other| other.at).map(|other| other.id);
            match all.iter_mut().find(|known| known.id == instance) {
                Some(known) => {
                    known.connections += 1;
                    known.at = now;
                }
                None => {
                    all.push(Instance {
                        id: instance,
                        connections: 1,
                        at: now,
                        runs: Runs::default(),
                    });
                }
            }
            let gone = all.iter().filter(|known| known.connections == 0);
            if let Some(oldest) = gone.min_by_key(|known| known.at).map(|known| known.id)
                && all.len() > INSTANCES_MAX
            {
                all.retain(|known| known.id != oldest);
            }
            other
        })
    }

    fn end(&self, sender: SenderId, instance: Uuid, now: Instant) {
        self.with(sender, |all| {
            if let Some(known) = all.iter_mut().find(|known| known.id == instance) {
                known.connections -= 1;
                known.at = now;
            }
        });
    }

    fn with<T>(&self, sender: SenderId, act: impl FnOnce(&mut Vec<Instance>) -> T) -> T {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        act(known.entry(sender).or_default())
    }

    fn with_runs<T>(
        &self,
        sender: SenderId,
        instance: Uuid,
        act: impl FnOnce(&mut Runs) -> T,
    ) -> Option<T> {
        self.with(sender, |all| {
            let known = all.iter_mut().find(|known| known.id == instance);
            known.map(|known| act(&mut known.runs))
        })
    }
}

impl Presence {
    /// What a ping is to carry: the newest process of the instance. Empty for a sender that does not
    /// say which process it is.
    pub(super) fn question(&self) -> Bytes {
        let Identity { instance, run } = self.identity;
        let newest =
            run.and_then(|_| self.instances.with_runs(self.sender, instance, |runs| runs.newest()));
        newest.map_or_else(Bytes::new, |newest| Bytes::copy_from_slice(newest.as_bytes()))
    }

    /// The answer to a ping, with what the ping carried; outside bytes. Warns where another process
    /// uses a copy of the state directory.
    pub(super) fn answered(&self, question: &[u8]) {
        let Identity { instance, run } = self.identity;
        let (Some(run), Ok(newest)) = (run, Uuid::from_slice(question)) else { return };
        let now = Instant::now();
        let other = self
            .instances
            .with_runs(self.sender, instance, |runs| runs.lives(run, newest, now))
            .flatten();
        if let Some(other) = other {
            warn!(
                sender = self.name, %instance, %run, %other,
                "two running senders use copies of one state directory: stop one of them, and give \
                 it an empty state directory and a token of its own"
            );
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.instances.end(self.sender, self.identity.instance, Instant::now());
    }
}

impl Runs {
    /// The last that was new, nil where none is known.
    fn newest(&self) -> Uuid {
        self.known.back().copied().unwrap_or_default()
    }

    /// `run` lived when `newest` was the newest; gives that one where it came after this one, and
    /// nobody was told for a while.
    fn lives(&mut self, run: Uuid, newest: Uuid, now: Instant) -> Option<Uuid> {
        // An answer that lay unread: another came meanwhile, whom this one may not have outlived.
        if newest != self.newest() || newest == run {
            return None;
        }
        if !self.known.contains(&run) {
            self.known.push_back(run);
            if self.known.len() > RUNS_MAX {
                self.known.pop_front();
            }
            return None;
        }
        if self.reported.is_some_and(|at| now.duration_since(at) < REPEATED_AFTER) {
            return None;
        }
        self.reported = Some(now);
        Some(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Uuid = Uuid::from_u128(1);
    const TWO: Uuid = Uuid::from_u128(2);

    #[test]
    fn another_instance_counts_while_it_is_connected_and_minutes_after() {
        let instances = Instances::default();
        let sender = SenderId::mint();
        let start = Instant::now();
        assert_eq!(instances.begin(sender, ONE, start), None);
        assert_eq!(instances.begin(sender, ONE, start), None, "the same again");
        assert_eq!(instances.begin(SenderId::mint(), TWO, start), None, "another sender's");
        let long = start + 10 * INSTANCES_WITHIN;
        assert_eq!(instances.begin(sender, TWO, long), Some(ONE), "connected all the while");
        instances.end(sender, ONE, long);
        instances.end(sender, TWO, long);
        assert_eq!(instances.begin(sender, TWO, long), Some(ONE), "one connection is left");
        instances.end(sender, TWO, long);
        instances.end(sender, ONE, long);
        let soon = long + INSTANCES_WITHIN - Duration::from_secs(1);
        assert_eq!(instances.begin(sender, ONE, soon), Some(TWO));
        instances.end(sender, ONE, soon);
        assert_eq!(instances.begin(sender, TWO, soon + INSTANCES_WITHIN), None, "a successor");
    }

    #[test]
    fn a_lost_state_directory_is_told_of_once_and_two_in_turns_each_time() {
        let instances = Instances::default();
        let sender = SenderId::mint();
        let mut now = Instant::now();
        let mut here = |instance| {
            now += Duration::from_secs(1);
            let other = instances.begin(sender, instance, now);
            instances.end(sender, instance, now);
            other
        };
        assert_eq!(here(ONE), None);
        assert_eq!(here(TWO), Some(ONE), "the new state directory");
        assert_eq!(here(TWO), None, "and its further connections");
        assert_eq!(here(ONE), Some(TWO));
        assert_eq!(here(TWO), Some(ONE));
    }

    #[test]
    fn only_so_many_instances_are_remembered_and_none_that_is_connected_is_forgotten() {
        let instances = Instances::default();
        let sender = SenderId::mint();
        let now = Instant::now();
        instances.begin(sender, ONE, now);
        for number in 0..1000 {
            let instance = Uuid::from_u128(100 + number);
            instances.begin(sender, instance, now);
            instances.end(sender, instance, now);
        }
        let count = instances.with(sender, |all| all.len());
        assert!(count <= INSTANCES_MAX + 1, "{count}");
        assert!(instances.with_runs(sender, ONE, |_| ()).is_some());
    }

    /// What comes back for what was asked just before.
    fn lives(runs: &mut Runs, run: Uuid, now: Instant) -> Option<Uuid> {
        let newest = runs.newest();
        runs.lives(run, newest, now)
    }

    #[test]
    fn a_restart_is_no_copy_and_two_that_live_are() {
        let mut runs = Runs::default();
        let now = Instant::now();
        for run in 1..100 {
            let run = Uuid::from_u128(run);
            for _ in 0..3 {
                assert_eq!(lives(&mut runs, run, now), None, "restarts, and several connections");
            }
        }
        let (before, last) = (Uuid::from_u128(98), Uuid::from_u128(99));
        assert_eq!(lives(&mut runs, before, now), Some(last));
        assert_eq!(lives(&mut runs, before, now), None, "it was said");
        assert_eq!(lives(&mut runs, last, now), None);
        assert_eq!(lives(&mut runs, before, now + REPEATED_AFTER), Some(last), "said again");
        assert!(runs.known.len() <= RUNS_MAX);
    }

    #[test]
    fn answers_that_lay_unread_since_before_a_restart_prove_nothing() {
        let mut runs = Runs::default();
        let now = Instant::now();
        assert_eq!(lives(&mut runs, ONE, now), None);
        let asked = runs.newest();
        assert_eq!(lives(&mut runs, TWO, now), None);
        assert_eq!(runs.lives(ONE, asked, now), None, "it was asked before");
        let mut runs = Runs::default();
        let asked = runs.newest();
        assert_eq!(lives(&mut runs, TWO, now), None);
        assert_eq!(runs.lives(ONE, asked, now), None, "it was never heard before");
        assert_eq!(lives(&mut runs, TWO, now), None);
    }
}
