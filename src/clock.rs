//! This machine's clock against a peer's, by the `Date` of an HTTP answer.
//!
//! No clock decides which line is sent, nor its id; but days, times and the expiry of tokens and
//! certificates go by it, so a person should hear of one that is wrong.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tracing::{info, warn};

/// Clocks that differ by more are warned of.
const DIFFER: Duration = Duration::from_secs(300);

/// The time in a `Date` header (RFC 9110 §5.6.7).
pub fn http_date(date: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::parse(date).ok().map(|zoned| zoned.timestamp())
}

/// How far this machine's clock is from another's.
///
/// # Errors
///
/// Where it is too far: which way, and what mends it; `whose` names the other clock.
pub fn compare(whose: &str, theirs: Timestamp) -> Result<Duration, String> {
    let ahead = Timestamp::now().duration_since(theirs);
    let (off, way) = match Duration::try_from(ahead) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(_) => (ahead.unsigned_abs(), "behind"),
    };
    if off <= DIFFER {
        return Ok(off);
    }
    Err(format!(
        "this machine's clock is {} s {way} {whose}: days and times of lines go wrong; set both by \
         NTP (timedatectl set-ntp true)",
        off.as_secs()
    ))
}

/// Says that the clocks differ when that begins, not at each connection.
#[derive(Debug, Default)]
pub struct Watch {
    differ: AtomicBool,
}

impl Watch {
    /// Looks at the `Date` of a peer's answer; one that cannot be read says nothing.
    pub fn look(&self, url: &str, whose: &str, date: Option<&str>) {
        let Some(theirs) = date.and_then(http_date) else { return };
        let compared = compare(whose, theirs);
        let differed = self.differ.swap(compared.is_err(), Ordering::Relaxed);
        match compared {
            Err(message) if !differed => warn!(url, "{message}"),
            Ok(_) if differed => info!(url, "this machine's clock agrees with {whose} again"),
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan;

    use super::*;

    #[test]
    fn a_date_of_http_is_read() {
        let date = http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date");
        assert_eq!(date.to_string(), "1994-11-06T08:49:37Z");
        assert_eq!(http_date("yesterday"), None);
    }

    #[test]
    fn minutes_are_too_far_either_way() {
        let now = Timestamp::now();
        assert!(compare("its", now).is_ok());
        assert!(compare("its", now + 250.seconds()).is_ok());
        let error = compare("its", now + 1.hour()).expect_err("an hour");
        assert!(error.contains("s behind its") && error.contains("NTP"), "{error}");
        let error = compare("its", now - 24.hours()).expect_err("a day");
        assert!(error.contains("s ahead of its"), "{error}");
    }
}
