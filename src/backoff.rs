//! Waiting between attempts: exponential, with full jitter, checked when built.

use std::time::Duration;

/// Delays that double from `min` to `max`, each drawn between half and the whole of its bound.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// # Panics
    ///
    /// Where `min` is zero or over `max`: both are constants of the caller.
    pub fn new(min: Duration, max: Duration) -> Backoff {
        assert!(!min.is_zero() && min <= max, "backoff from {min:?} to {max:?}");
        Backoff { min, max, next: min }
    }

    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(self.max);
        bound / 2 + bound.mul_f64(random_unit() / 2.0)
    }

    /// Starts over: to be called at the first receipt, not at a mere connection.
    pub fn reset(&mut self) {
        self.next = self.min;
    }
}

/// A random number from 0 (included) to 1 (excluded).
pub fn random_unit() -> f64 {
    let bits = getrandom::u64().unwrap_or(1 << 63);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_within_bounds_and_reset() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(3));
        let mut backoff = Backoff::new(min, max);
        for _ in 0..20 {
            let delay = backoff.delay();
            assert!(delay >= min / 2 && delay <= max, "{delay:?}");
        }
        assert!(backoff.delay() >= max / 2);
        backoff.reset();
        assert!(backoff.delay() <= min);
    }

    #[test]
    fn delays_at_the_maximum_are_spread() {
        let max = Duration::from_secs(30);
        let mut backoff = Backoff::new(max, max);
        let delays: Vec<Duration> = (0..20).map(|_| backoff.delay()).collect();
        assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
    }
}
