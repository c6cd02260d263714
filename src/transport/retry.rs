//! When to dial again, the same for both sides.

use std::time::Duration;

use crate::backoff::{Backoff, random_unit};

/// How fast attempts follow each other after a lost connection.
const QUICKLY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// How fast they follow each other where only a person can mend what is wrong.
const SLOWLY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// The pauses of one side that dials.
#[derive(Debug)]
pub struct Retry {
    quickly: Backoff,
    slowly: Backoff,
    failures: usize,
}

/// What follows a failed attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pause {
    /// How long to wait.
    pub delay: Duration,
    /// Whether to tell a person: the first failures at once, lasting ones now and then.
    pub tell: bool,
}

impl Retry {
    /// Before the first attempt.
    pub fn new() -> Retry {
        Retry {
            quickly: Backoff::new(QUICKLY.0, QUICKLY.1),
            slowly: Backoff::new(SLOWLY.0, SLOWLY.1),
            failures: 0,
        }
    }

    /// Attempts that failed since the last connection.
    pub fn failures(&self) -> usize {
        self.failures
    }

    /// There is a connection. Pauses go on growing until it proves its worth.
    pub fn connected(&mut self) {
        self.failures = 0;
    }

    /// The connection ended. `receipts` passed over it: the other side works.
    pub fn ended(&mut self, receipts: bool) -> Duration {
        if receipts {
            self.quickly.reset();
            self.slowly.reset();
        }
        self.quickly.delay()
    }

    /// The attempt failed, or the other side wants no more of this one. `asked` is what it wants
    /// us to wait; it is met, within a minute, with up to a quarter more, so that a fleet that was
    /// sent away at once does not come back at once.
    pub fn failed(&mut self, needs_a_person: bool, asked: Option<Duration>) -> Pause {
        let delay = match asked {
            Some(asked) => asked.min(SLOWLY.1).mul_f64(1.0 + random_unit() / 4.0),
            None if needs_a_person => self.slowly.delay(),
            None => self.quickly.delay(),
        };
        self.failures += 1;
        // Whole milliseconds are enough for a log.
        let delay = Duration::from_millis(delay.as_millis() as u64);
        Pause { delay, tell: needs_a_person || self.failures.is_power_of_two() }
    }
}

impl Default for Retry {
    fn default() -> Retry {
        Retry::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lasting_failures_are_told_now_and_then_and_those_for_a_person_each_time() {
        let mut retry = Retry::new();
        let told: Vec<bool> = (0..9).map(|_| retry.failed(false, None).tell).collect();
        assert_eq!(told, [true, true, false, true, false, false, false, true, false]);
        assert!(retry.failed(false, None).delay >= QUICKLY.1 / 2 - Duration::from_millis(1));
        let pause = retry.failed(true, None);
        assert!(pause.tell && pause.delay >= SLOWLY.0 / 2, "{pause:?}");
        retry.connected();
        assert_eq!(retry.failures(), 0);
    }

    #[test]
    fn receipts_make_pauses_short_again_and_a_mere_connection_does_not() {
        let mut retry = Retry::new();
        for _ in 0..20 {
            retry.failed(false, None);
        }
        retry.connected();
        assert!(retry.ended(false) >= QUICKLY.1 / 2);
        assert!(retry.ended(true) <= QUICKLY.0);
    }

    #[test]
    fn what_the_other_side_asks_for_is_met_with_jitter_and_within_a_minute() {
        let mut retry = Retry::new();
        let asked = Duration::from_secs(4);
        let delay = retry.failed(false, Some(asked)).delay;
        assert!((asked..=asked * 5 / 4).contains(&delay), "{delay:?}");
        let delay = retry.failed(false, Some(Duration::from_secs(86_400))).delay;
        assert!(delay <= SLOWLY.1 * 5 / 4, "{delay:?}");
    }
}
