//! When to ping, and when a silent connection is dead.

use tokio::time::{Instant, sleep_until};

use super::stream::Activity;
use crate::backoff::random_unit;
use crate::protocol::{DEAD_AFTER, PING_INTERVAL};

/// The clock of one connection.
#[derive(Debug)]
pub struct Heartbeat {
    activity: Activity,
    ping_at: Instant,
}

/// What is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beat {
    /// Send a ping.
    Ping,
    /// Nothing came in for [`DEAD_AFTER`]: drop the connection.
    Dead,
}

impl Heartbeat {
    pub(super) fn new(activity: Activity) -> Heartbeat {
        Heartbeat { activity, ping_at: next_ping(Instant::now()) }
    }

    /// Waits until something is due. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Beat {
        loop {
            match self.due(Instant::now()) {
                Ok(beat) => return beat,
                Err(at) => sleep_until(at).await,
            }
        }
    }

    /// What is due, or when something will be.
    fn due(&mut self, now: Instant) -> Result<Beat, Instant> {
        let dead_at = self.activity.last() + DEAD_AFTER;
        if now >= dead_at {
            return Ok(Beat::Dead);
        }
        if now >= self.ping_at {
            self.ping_at = next_ping(now);
            return Ok(Beat::Ping);
        }
        Err(self.ping_at.min(dead_at))
    }

    /// Counts this moment as life: for a side that has itself stopped reading for a while, and so
    /// cannot tell silence from its own deafness.
    pub fn touch(&self) {
        self.activity.touch();
    }
}

/// Jittered by a tenth, so that the pings of a fleet that connected at once spread out.
fn next_ping(now: Instant) -> Instant {
    now + PING_INTERVAL.mul_f64(0.9 + 0.2 * random_unit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::stream::Io;

    fn heartbeat() -> (Heartbeat, Activity, Instant) {
        let activity = Io::new(tokio::io::duplex(64).0).activity();
        (Heartbeat::new(activity.clone()), activity, Instant::now())
    }

    /// Goes to the next instant at which something is due.
    fn next(heartbeat: &mut Heartbeat, now: &mut Instant) -> Beat {
        loop {
            match heartbeat.due(*now) {
                Ok(beat) => return beat,
                Err(at) => *now = at,
            }
        }
    }

    #[test]
    fn a_silent_connection_is_pinged_and_then_dead() {
        let (mut heartbeat, activity, mut now) = heartbeat();
        let mut pings = 0;
        while next(&mut heartbeat, &mut now) == Beat::Ping {
            pings += 1;
        }
        assert_eq!(pings, 2);
        assert_eq!(now, activity.last() + DEAD_AFTER);
    }

    #[test]
    fn a_connection_that_hears_something_lives() {
        let (mut heartbeat, activity, mut now) = heartbeat();
        for _ in 0..10 {
            assert_eq!(next(&mut heartbeat, &mut now), Beat::Ping);
            activity.touch_at(now);
        }
    }
}
