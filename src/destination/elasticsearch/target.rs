//! What is known of each index: whether it is one, whether it takes documents now.
//!
//! Shared by the workers. A fault of one index is remembered here, so that it costs the others
//! nothing (I6).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::record::DocumentId;

use super::client::Client;

/// How long an index in trouble is left alone.
const TROUBLE_MIN: Duration = Duration::from_secs(5);
const TROUBLE_MAX: Duration = Duration::from_secs(60);

/// Between two checks of a name that got no answer.
const CHECK_PAUSE: Duration = Duration::from_secs(10);

/// How many indices are remembered; those that nobody uses are forgotten beyond it (I7).
const TARGETS_MAX: usize = 1024;

/// How many refused lines of one index are remembered (I7).
const REFUSED_MAX: usize = 1024;

/// What stands behind a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Not asked yet, or no answer.
    Unchecked,
    /// The key may not ask.
    Hidden,
    /// Nothing yet: the first document makes the index.
    Missing,
    /// An index of this name.
    Index,
    /// An alias or a data stream: a line sent again could land in another index (I3).
    Refused(Arc<str>),
}

/// One index by name.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) name: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    kind: Kind,
    /// When the question was last asked.
    asked: Option<Instant>,
    /// An answer has named the index as it was asked for: it is no alias.
    named: bool,
    /// Documents stored since the start.
    stored: u64,
    trouble: Option<Trouble>,
    backoff: Backoff,
    /// When the last flush that succeeded was begun.
    flushed: Option<Instant>,
    /// Lines refused in both forms, and `stored` at that time.
    refused: HashMap<DocumentId, u64>,
}

#[derive(Clone, Debug)]
struct Trouble {
    reason: Arc<str>,
    until: Instant,
}

/// What a verdict depends on beside the answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct View {
    pub(super) kind: Kind,
    pub(super) named: bool,
    pub(super) stored: u64,
}

impl Target {
    fn new(name: &str) -> Target {
        let state = State {
            kind: Kind::Unchecked,
            asked: None,
            named: false,
            stored: 0,
            trouble: None,
            backoff: Backoff::new(TROUBLE_MIN, TROUBLE_MAX),
            flushed: None,
            refused: HashMap::new(),
        };
        Target { name: Arc::from(name), state: Mutex::new(state) }
    }

    /// Why and how long nothing should be sent there, where that is so.
    pub(super) fn trouble(&self, now: Instant) -> Option<(Arc<str>, Duration)> {
        let mut state = self.lock();
        let trouble = state.trouble.clone()?;
        if trouble.until <= now {
            // Whoever comes next finds out. An alias may have become an index meanwhile.
            state.trouble = None;
            if matches!(state.kind, Kind::Refused(_)) {
                state.kind = Kind::Unchecked;
                state.asked = None;
            }
            return None;
        }
        Some((trouble.reason, trouble.until - now))
    }

    /// Notes that the index refuses everything, and says for how long it is left alone: longer each
    /// time, until it stores something.
    pub(super) fn set_trouble(&self, reason: &Arc<str>, now: Instant) -> Duration {
        let mut state = self.lock();
        if let Some(trouble) = state.trouble.as_ref().filter(|trouble| trouble.until > now) {
            return trouble.until - now;
        }
        let delay = state.backoff.delay();
        state.trouble = Some(Trouble { reason: Arc::clone(reason), until: now + delay });
        tracing::warn!(index = %self.name, %reason, ?delay, "index refuses documents, others go on");
        delay
    }

    /// A delay for one line that this index refuses while it may take others.
    pub(super) fn delay(&self) -> Duration {
        self.lock().backoff.delay()
    }

    /// Counts documents stored under the name that was asked for.
    pub(super) fn add_stored(&self, count: usize) {
        let mut state = self.lock();
        state.stored += count as u64;
        state.named = true;
        if state.kind == Kind::Missing {
            state.kind = Kind::Index;
        }
        state.trouble = None;
        state.backoff.reset();
    }

    pub(super) fn view(&self) -> View {
        let state = self.lock();
        View { kind: state.kind.clone(), named: state.named, stored: state.stored }
    }

    /// Whether [`Target::check`] has something to find out. One that got no answer is not repeated
    /// for every frame, because each may take as long as a request can.
    pub(super) fn wants_check(&self, now: Instant) -> bool {
        let state = self.lock();
        let asked = state.asked.is_some_and(|asked| now < asked + CHECK_PAUSE);
        state.kind == Kind::Unchecked && !asked
    }

    /// Asks what stands behind the name.
    pub(super) async fn check(&self, client: &Client) {
        let path = format!("/{}/_settings?filter_path=*.settings.index.uuid", self.name);
        let kind = match client.json(Method::GET, &path, None).await {
            Ok(answer) => kind_of(&self.name, &answer),
            Err(error) => match error.status() {
                Some(404) => Kind::Missing,
                Some(401 | 403 | 405) => Kind::Hidden,
                // No reason to hold lines up: a wrong `_index` in the answer shows it too.
                _ => Kind::Unchecked,
            },
        };
        let mut state = self.lock();
        state.kind = kind;
        state.asked = Some(Instant::now());
    }

    /// Makes what the index holds durable, behind everything answered before `since`. An error
    /// where that failed, though the key may do it.
    pub(super) async fn flush(&self, client: &Client, since: Instant) -> Result<(), Arc<str>> {
        if self.lock().flushed.is_some_and(|flushed| flushed >= since) {
            return Ok(());
        }
        let begun = Instant::now();
        match client.json(Method::POST, &format!("/{}/_flush", self.name), None).await {
            Ok(_) => {
                self.lock().flushed = Some(begun);
                Ok(())
            }
            // Without the privilege the pause alone must do; a missing index takes the line anew.
            Err(error) if matches!(error.status(), Some(401 | 403 | 404 | 405)) => Ok(()),
            Err(error) => Err(Arc::from(format!("flush failed: {error}"))),
        }
    }

    /// How many documents were stored when this line was first refused, where that is known.
    pub(super) fn refused_when(&self, id: &DocumentId) -> Option<u64> {
        self.lock().refused.get(id).copied()
    }

    /// Remembers a line that was refused in both forms.
    pub(super) fn remember_refused(&self, id: DocumentId, stored: u64) {
        let mut state = self.lock();
        if state.refused.len() >= REFUSED_MAX {
            state.refused.clear();
        }
        state.refused.entry(id).or_insert(stored);
    }

    /// The line has its verdict.
    pub(super) fn forget_refused(&self, id: &DocumentId) {
        self.lock().refused.remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kind_of(name: &str, answer: &Value) -> Kind {
    let Some(indices) = answer.as_object().filter(|indices| !indices.is_empty()) else {
        return Kind::Unchecked;
    };
    if indices.len() == 1 && indices.contains_key(name) {
        return Kind::Index;
    }
    let real = indices.keys().next().map_or("", String::as_str);
    let what = if real.starts_with(".ds-") { "a data stream" } else { "an alias" };
    Kind::Refused(Arc::from(format!(
        "{name} is {what} (of {real}), where a line sent again could be stored twice: name another \
         index or remove it"
    )))
}

/// All targets by name.
#[derive(Debug, Default)]
pub(super) struct Targets {
    by_name: Mutex<HashMap<String, Arc<Target>>>,
}

impl Targets {
    /// The target of this name.
    pub(super) fn get(&self, name: &str) -> Arc<Target> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = by_name.get(name) {
            return Arc::clone(target);
        }
        if by_name.len() >= TARGETS_MAX {
            by_name.retain(|_, target| Arc::strong_count(target) > 1);
        }
        let target = Arc::new(Target::new(name));
        by_name.insert(name.to_owned(), Arc::clone(&target));
        target
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aliases_and_data_streams_are_told_by_the_real_name() {
        let settings = |name: &str| json!({ name: { "settings": { "index": { "uuid": "u" } } } });
        assert_eq!(kind_of("a", &settings("a")), Kind::Index);
        for (real, says) in [("a-000001", "alias"), (".ds-a-2026.11.21-000001", "data stream")] {
            let Kind::Refused(reason) = kind_of("a", &settings(real)) else {
                panic!("{real} is refused");
            };
            assert!(reason.contains(says), "{reason}");
        }
        assert_eq!(kind_of("a", &json!({})), Kind::Unchecked);
    }

    #[test]
    fn trouble_ends_by_itself_and_by_a_stored_document() {
        let target = Target::new("a");
        let now = Instant::now();
        let reason = Arc::from("closed");
        let delay = target.set_trouble(&reason, now);
        assert!(delay >= TROUBLE_MIN / 2 && delay <= TROUBLE_MIN);
        assert_eq!(target.trouble(now), Some((Arc::clone(&reason), delay)));
        assert_eq!(target.set_trouble(&reason, now), delay, "one failure at a time");
        assert_eq!(target.trouble(now + delay), None);
        let second = target.set_trouble(&reason, now + delay);
        assert!(second >= TROUBLE_MIN, "{second:?} grows");
        target.add_stored(1);
        assert_eq!(target.trouble(now + delay), None);
    }

    #[test]
    fn unused_targets_are_forgotten() {
        let targets = Targets::default();
        let used = targets.get("used");
        used.add_stored(1);
        for number in 0..TARGETS_MAX {
            targets.get(&number.to_string());
        }
        assert!(targets.by_name.lock().expect("not poisoned").len() <= TARGETS_MAX);
        assert_eq!(targets.get("used").view().stored, 1);
    }
}
