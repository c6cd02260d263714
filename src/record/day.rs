//! A UTC calendar day, the only part of time that an index name may depend on.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use serde::{Deserialize, Serialize};

/// A UTC day; its text form is `2026-11-21` (RFC 3339 `full-date`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Day(pub Date);

impl Day {
    /// The day of the machine's clock.
    pub fn today() -> Day {
        Day::of(SystemTime::now())
    }

    /// The UTC day of an instant, clamped to what a calendar can say.
    pub fn of(time: SystemTime) -> Day {
        let seconds = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
        };
        let clamped = seconds.clamp(-62_135_596_800, 253_402_207_200);
        let timestamp = Timestamp::from_second(clamped).unwrap_or(Timestamp::UNIX_EPOCH);
        Day(timestamp.to_zoned(TimeZone::UTC).date())
    }

    /// The UTC day of a time in milliseconds since 1970.
    pub fn of_millis(time: u64) -> Day {
        UNIX_EPOCH.checked_add(Duration::from_millis(time)).map_or(Day(Date::MAX), Day::of)
    }

    /// The day `days` later (earlier where negative), clamped to what a calendar can say.
    pub fn plus(self, days: i32) -> Day {
        Day(self.0.saturating_add(days.clamp(-3_000_000, 3_000_000).days()))
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.0.year(), self.0.month(), self.0.day())
    }
}

impl FromStr for Day {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Day, jiff::Error> {
        text.parse().map(Day)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_utc() {
        let last_second = UNIX_EPOCH + Duration::from_secs(86_399);
        assert_eq!(Day::of(last_second).to_string(), "1970-01-01");
        assert_eq!(Day::of(last_second + Duration::from_secs(1)).to_string(), "1970-01-02");
        assert_eq!(Day::of(UNIX_EPOCH - Duration::from_secs(1)).to_string(), "1969-12-31");
    }

    #[test]
    fn bounds_do_not_panic() {
        let far = UNIX_EPOCH + Duration::from_secs(1 << 60);
        assert!(Day::of(far).plus(i32::MAX) >= Day::of(far));
    }
}
