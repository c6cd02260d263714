//! Records in memory on their way to the writer: encoded once, swapped out in groups.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::record::framing::encode_spool_record;

/// Bytes that wait for the writer before a source has to wait; as much again may be in the
/// writer's hands.
pub(super) const QUEUE_BYTES_MAX: usize = 2 << 20;

/// A group of this many bytes is written without lingering.
const GROUP_BYTES: usize = 1 << 20;

/// How long the first record of a group waits for others that share its sync.
const GROUP_DELAY: Duration = Duration::from_millis(10);

/// What one sync makes durable: whole records.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub bytes: Vec<u8>,
    /// The segment ends behind this group.
    pub ends_segment: bool,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pending: Mutex<Pending>,
    work: Condvar,
    pub room: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// The segment ends behind so many of `bytes`.
    segment_end: Option<usize>,
    /// Bytes ever appended.
    appended: u64,
    closed: bool,
    /// Somebody waits for the sync: no lingering.
    hurried: bool,
}

impl Queue {
    /// Adds a record if `admit`, called under the lock with nothing else in the way, agrees.
    pub fn push(
        &self,
        record: (u64, &[u8], &[u8]),
        bounded: bool,
        admit: impl FnOnce() -> bool,
    ) -> bool {
        let (time_ms, key, payload) = record;
        let mut pending = self.lock();
        if bounded && pending.bytes.len() >= QUEUE_BYTES_MAX || !admit() {
            return false;
        }
        let before = pending.bytes.len();
        encode_spool_record(&mut pending.bytes, time_ms, key, payload);
        let after = pending.bytes.len();
        pending.appended += (after - before) as u64;
        // The writer sleeps only before a group's first record and while it lingers for a full one.
        if before == 0 || (before < GROUP_BYTES && after >= GROUP_BYTES) {
            self.work.notify_all();
        }
        true
    }

    pub fn is_full(&self) -> bool {
        self.lock().bytes.len() >= QUEUE_BYTES_MAX
    }

    pub fn appended(&self) -> u64 {
        self.lock().appended
    }

    pub fn end_segment(&self) {
        let mut pending = self.lock();
        pending.segment_end = Some(pending.bytes.len());
        drop(pending);
        self.work.notify_all();
    }

    /// The group that waits for others is written at once.
    pub fn hurry(&self) {
        self.lock().hurried = true;
        self.work.notify_all();
    }

    pub fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// Waits for the next group; `None` once the queue is closed and empty. `spare` is a buffer to
    /// fill next.
    pub fn take(&self, spare: Vec<u8>) -> Option<Group> {
        let mut pending = self.lock();
        while pending.bytes.is_empty() && pending.segment_end.is_none() {
            if pending.closed {
                return None;
            }
            pending = self.work.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        let deadline = Instant::now() + GROUP_DELAY;
        while pending.bytes.len() < GROUP_BYTES
            && pending.segment_end.is_none()
            && !pending.closed
            && !pending.hurried
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.work.wait_timeout(pending, left);
            pending = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut bytes = std::mem::replace(&mut pending.bytes, spare);
        let segment_end = pending.segment_end.take();
        pending.hurried = false;
        if let Some(end) = segment_end {
            pending.bytes.extend_from_slice(&bytes[end..]);
            bytes.truncate(end);
        }
        drop(pending);
        self.room.notify_waiters();
        Some(Group { bytes, ends_segment: segment_end.is_some() })
    }

    /// Waits before another attempt; `false` as soon as the queue is closed.
    pub fn linger(&self, delay: Duration) -> bool {
        let deadline = Instant::now() + delay;
        let mut pending = self.lock();
        while !pending.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.work.wait_timeout(pending, left);
            pending = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
