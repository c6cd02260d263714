//! Counters and gauges that Prometheus scrapes, and what both sides' metrics are made of.
//!
//! Counting is an atomic addition per frame or receipt, never per line; a scrape alone makes text.
//! Labels hold names of sources and senders: their number is bounded (I7), their text is escaped.

mod lag;
mod page;
mod process;
mod serve;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub use lag::{Lag, Lags};
pub use page::{Kind, Page};
pub use process::{Reloads, write_build_info};
pub use serve::{Endpoint, MetricsError, Report};

/// How many values a label has; what comes later is counted together under [`OTHER`].
pub const LABELS_MAX: usize = 100;

/// The label of all that came after the first [`LABELS_MAX`].
pub const OTHER: &str = "_other";

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    /// What was added up so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One `T` per value of a label, for the life of the process.
#[derive(Debug, Default)]
pub struct PerLabel<T>(Mutex<BTreeMap<String, Arc<T>>>);

impl<T: Default> PerLabel<T> {
    /// That of `label`, or the common one of all that are too many.
    pub fn of(&self, label: &str) -> Arc<T> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(label) {
            return known.clone();
        }
        let label = if known.len() < LABELS_MAX { label } else { OTHER };
        known.entry(label.to_owned()).or_default().clone()
    }

    /// All of them, in order of their labels.
    pub fn all(&self) -> Vec<(String, Arc<T>)> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(label, value)| (label.clone(), value.clone())).collect()
    }

    /// Sums a counter over all labels.
    pub fn sum(&self, counter: impl Fn(&T) -> &Counter) -> u64 {
        self.all().iter().map(|(_, value)| counter(value).get()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_and_nothing_goes_uncounted() {
        let counters = PerLabel::<Counter>::default();
        for number in 0..LABELS_MAX + 50 {
            counters.of(&format!("source {number}")).add(1);
        }
        counters.of("source 3").add(1);
        let all = counters.all();
        assert_eq!(all.len(), LABELS_MAX + 1);
        assert_eq!(counters.of(OTHER).get(), 50);
        assert_eq!(counters.of("source 3").get(), 2);
        assert_eq!(counters.sum(|counter| counter), LABELS_MAX as u64 + 51);
    }
}
