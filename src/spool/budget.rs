//! How many bytes all spools together may hold without a receipt (I7).

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Counts bytes from their append until a durable position covers them.
///
/// The disk holds at most one file per segment more, since only whole files are unlinked.
#[derive(Debug)]
pub struct Budget {
    max: AtomicU64,
    used: AtomicU64,
    pub(super) freed: Notify,
}

impl Budget {
    /// A budget of `max` bytes. One record is always admitted to an empty spool, however small
    /// `max` is: otherwise nothing would ever move.
    pub fn new(max: u64) -> Budget {
        Budget { max: AtomicU64::new(max), used: AtomicU64::new(0), freed: Notify::new() }
    }

    /// How many bytes it is.
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }

    /// Makes it larger or smaller from now on.
    pub fn set_max(&self, max: u64) {
        self.max.store(max, Ordering::Relaxed);
        self.freed.notify_waiters();
    }

    /// Bytes that await a receipt.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Whether not one more byte is admitted.
    pub fn is_full(&self) -> bool {
        self.used() >= self.max()
    }

    /// Whether so many more bytes are admitted now.
    pub(super) fn admits(&self, bytes: u64) -> bool {
        let used = self.used();
        used == 0 || used + bytes <= self.max()
    }

    /// Takes `bytes`, or nothing and answers `false`.
    pub(super) fn try_take(&self, bytes: u64) -> bool {
        let max = self.max();
        let take =
            |used: u64| (used == 0 || used + bytes <= max).then(|| used.saturating_add(bytes));
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok()
    }

    /// Takes `bytes` that are there already, over the limit if need be.
    pub(super) fn take(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(super) fn give_back(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "{bytes} bytes given back, {before} taken");
        self.freed.notify_waiters();
    }
}
