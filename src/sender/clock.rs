//! Notices that the machine's clock was set back, for the one decision that compares its times
//! over hours: which rotated files are older than what the sender knows.

use std::time::{Duration, Instant, SystemTime};

use tracing::warn;

/// Steps up to this are daily business of a clock that is kept right, and change nothing here.
const SLACK: Duration = Duration::from_secs(1);

/// The clock as it was at the last look.
#[derive(Debug)]
pub struct Clock {
    at: Instant,
    shown: SystemTime,
    back_to: Option<SystemTime>,
}

impl Clock {
    /// `newest` is the latest time that the state knows of. If that lies ahead, the clock was set
    /// back by so much or more while nobody looked, and files may have changed ever since.
    pub fn new(newest: SystemTime) -> Clock {
        Clock::start(newest, Instant::now(), SystemTime::now())
    }

    fn start(newest: SystemTime, at: Instant, shown: SystemTime) -> Clock {
        let by = newest.duration_since(shown).ok().filter(|by| *by > SLACK);
        let back_to = by.map(|by| shown.checked_sub(by).unwrap_or(SystemTime::UNIX_EPOCH));
        if let Some(by) = by {
            say(by);
        }
        Clock { at, shown, back_to }
    }

    /// What the clock showed when it was set back to its earliest, as far as we know; to be called
    /// again and again. What changed after that may be younger than its time says.
    pub fn back_to(&mut self) -> Option<SystemTime> {
        self.look(Instant::now(), SystemTime::now())
    }

    fn look(&mut self, at: Instant, shown: SystemTime) -> Option<SystemTime> {
        let elapsed = at.saturating_duration_since(self.at);
        let expected = self.shown.checked_add(elapsed);
        let by = expected.and_then(|expected| expected.duration_since(shown).ok());
        if let Some(by) = by.filter(|by| *by > SLACK) {
            say(by);
            let earliest = shown.checked_sub(elapsed).unwrap_or(SystemTime::UNIX_EPOCH);
            self.back_to = Some(self.back_to.map_or(earliest, |known| known.min(earliest)));
        }
        (self.at, self.shown) = (at, shown);
        self.back_to
    }
}

fn say(by: Duration) {
    warn!(
        by_seconds = by.as_secs(),
        "this machine's clock was set back: no line is lost or doubled, but times of arrival and \
         the days of indices follow the clock"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_step_back_is_noticed_and_the_earliest_time_is_kept() {
        let (at, shown) = (Instant::now(), SystemTime::now());
        let mut clock = Clock::start(shown - HOUR, at, shown);
        let second = Duration::from_secs(1);
        assert_eq!(clock.look(at + second, shown + second), None, "it goes on");
        assert_eq!(clock.look(at + 2 * second, shown + HOUR), None, "set forward, or a sleep");
        let back = shown - HOUR;
        assert_eq!(clock.look(at + 3 * second, back), Some(back - second));
        assert_eq!(clock.look(at + 4 * second, back + second), Some(back - second));
        let further = back - HOUR;
        assert_eq!(clock.look(at + 5 * second, further), Some(further - second));
    }

    #[test]
    fn a_state_from_the_future_means_a_step_back_while_nobody_looked() {
        let (at, shown) = (Instant::now(), SystemTime::now());
        let mut clock = Clock::start(shown + HOUR, at, shown);
        assert_eq!(clock.look(at, shown), Some(shown - HOUR));
    }
}
