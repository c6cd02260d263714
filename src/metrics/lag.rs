//! What waits for a receipt: how many bytes, and since when.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How many times of growth are remembered apart; beyond it neighbours share the older time.
const MARKS_MAX: usize = 64;

/// One run of bytes. Its owner tells how far it reaches and how far it is receipted.
#[derive(Debug, Default)]
pub struct Lag(Mutex<Run>);

#[derive(Debug, Default)]
struct Run {
    end: u64,
    receipted: u64,
    /// Where the run ended when, oldest first; those at or below `receipted` are gone.
    marks: VecDeque<(u64, Instant)>,
}

impl Lag {
    /// The run reaches up to `end` and is receipted up to `receipted`. A run may get shorter.
    pub fn set(&self, end: u64, receipted: u64, now: Instant) {
        let mut run = self.lock();
        if end < run.end {
            run.marks.clear();
            run.end = receipted;
        }
        run.receipted = receipted;
        if end > run.end.max(receipted) {
            if run.marks.len() == MARKS_MAX {
                run.thin();
            }
            run.marks.push_back((end, now));
        }
        run.end = end;
        while run.marks.front().is_some_and(|(end, _)| *end <= receipted) {
            run.marks.pop_front();
        }
    }

    /// So many bytes more came.
    pub fn grow(&self, bytes: u64, now: Instant) {
        let (end, receipted) = {
            let run = self.lock();
            (run.end + bytes, run.receipted)
        };
        self.set(end, receipted, now);
    }

    /// So many bytes more are receipted: the oldest, as far as anybody can tell here.
    pub fn settle(&self, bytes: u64, now: Instant) {
        let (end, receipted) = {
            let run = self.lock();
            (run.end, (run.receipted + bytes).min(run.end))
        };
        self.set(end, receipted, now);
    }

    fn waiting(&self) -> (u64, Option<Instant>) {
        let run = self.lock();
        (run.end.saturating_sub(run.receipted), run.marks.front().map(|(_, since)| *since))
    }

    fn lock(&self) -> MutexGuard<'_, Run> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    /// Halves the marks: bytes are taken for older than they are, never for younger.
    fn thin(&mut self) {
        let mut thinned = VecDeque::with_capacity(MARKS_MAX);
        while let Some((mut end, since)) = self.marks.pop_front() {
            if let Some((next, _)) = self.marks.pop_front() {
                end = next;
            }
            thinned.push_back((end, since));
        }
        self.marks = thinned;
    }
}

/// The runs of one source or sender, as long as somebody owns them.
#[derive(Debug, Default)]
pub struct Lags(Mutex<Vec<Weak<Lag>>>);

impl Lags {
    /// A new run, which counts until it is dropped.
    pub fn open(&self) -> Arc<Lag> {
        let lag = Arc::default();
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() == open.capacity() {
            open.retain(|lag| lag.strong_count() > 0);
        }
        open.push(Arc::downgrade(&lag));
        lag
    }

    /// Bytes that wait, and how long the oldest of them has.
    pub fn waiting(&self, now: Instant) -> (u64, Duration) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = open.iter().filter_map(Weak::upgrade).map(|lag| lag.waiting());
        runs.fold((0, Duration::ZERO), |(bytes, longest), (more, since)| {
            let waits = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            (bytes + more, longest.max(waits))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_oldest_byte_without_a_receipt_counts() {
        let (lags, start) = (Lags::default(), Instant::now());
        let lag = lags.open();
        lag.set(100, 0, start);
        lag.set(300, 0, start + SECOND);
        assert_eq!(lags.waiting(start + 5 * SECOND), (300, 5 * SECOND));
        lag.set(300, 99, start + 2 * SECOND);
        assert_eq!(lags.waiting(start + 5 * SECOND), (201, 5 * SECOND));
        lag.set(300, 100, start + 2 * SECOND);
        assert_eq!(lags.waiting(start + 5 * SECOND), (200, 4 * SECOND));
        lag.set(300, 300, start + 2 * SECOND);
        assert_eq!(lags.waiting(start + 5 * SECOND), (0, Duration::ZERO));
    }

    #[test]
    fn a_source_lags_as_much_as_the_sum_and_the_slowest_of_its_runs() {
        let (lags, start) = (Lags::default(), Instant::now());
        let (one, other) = (lags.open(), lags.open());
        one.grow(10, start);
        other.grow(20, start + SECOND);
        assert_eq!(lags.waiting(start + 3 * SECOND), (30, 3 * SECOND));
        drop(one);
        assert_eq!(lags.waiting(start + 3 * SECOND), (20, 2 * SECOND));
        other.settle(50, start);
        assert_eq!(lags.waiting(start + 3 * SECOND).0, 0, "no more than there was");
    }

    #[test]
    fn a_run_that_gets_shorter_starts_anew() {
        let (lags, start) = (Lags::default(), Instant::now());
        let lag = lags.open();
        lag.set(1000, 10, start);
        lag.set(500, 10, start + SECOND);
        assert_eq!(lags.waiting(start + 3 * SECOND), (490, 2 * SECOND));
    }

    /// Steady growth without a receipt takes bounded memory and never looks younger than it is.
    #[test]
    fn many_marks_are_thinned_to_the_older_time() {
        let (lags, start) = (Lags::default(), Instant::now());
        let lag = lags.open();
        for second in 0..1000 {
            lag.set(u64::from(second) + 1, 0, start + second * SECOND);
        }
        assert!(lag.lock().marks.len() <= MARKS_MAX);
        let now = start + 1000 * SECOND;
        for receipted in 0..1000_u32 {
            lag.set(1000, receipted.into(), now);
            let (bytes, waits) = lags.waiting(now);
            assert_eq!(bytes, u64::from(1000 - receipted));
            assert!(waits >= (1000 - receipted) * SECOND, "{receipted}: {waits:?}");
        }
    }
}
