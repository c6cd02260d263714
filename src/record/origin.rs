//! A time of origin as clients write it beside a key, the same at each repeat.

use jiff::Timestamp;

/// Numbers from here on are milliseconds: as seconds they would lie in the year 5138.
const MILLISECONDS_FROM: u64 = 100_000_000_000;

/// 9999-12-31T23:59:59.999Z, the last moment that RFC 3339 can write.
const TIME_MAX: u64 = 253_402_300_799_999;

/// Milliseconds since 1970 of RFC 3339, or of decimal UNIX seconds or milliseconds, whose further
/// digits are dropped. Read as text: a float would round differently than another reader's.
pub fn time_of_origin(text: &str) -> Option<u64> {
    let text = text.trim();
    let time = match unix_time(text) {
        Some(time) => time,
        None => u64::try_from(text.parse::<Timestamp>().ok()?.as_millisecond()).ok()?,
    };
    (time <= TIME_MAX).then_some(time)
}

fn unix_time(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || whole.len() > 18 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    if whole >= MILLISECONDS_FROM {
        return Some(whole);
    }
    let milliseconds: String = fraction.chars().chain("000".chars()).take(3).collect();
    Some(whole * 1000 + milliseconds.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_clients_write_them() {
        for (text, time) in [
            ("1795250808", Some(1_795_250_808_000)),
            ("1795250808.0899", Some(1_795_250_808_089)),
            ("1795250808.5", Some(1_795_250_808_500)),
            ("1795250808089", Some(1_795_250_808_089)),
            ("2026-11-21T08:46:48.089Z", Some(1_795_250_808_089)),
            ("2026-11-21T09:46:48.089+01:00", Some(1_795_250_808_089)),
            ("0", Some(0)),
            ("", None),
            ("-5", None),
            ("1e9", None),
            (".5", None),
            ("yesterday", None),
            ("1969-12-31T00:00:00Z", None),
            ("999999999999999999", None),
            ("9999999999999999999999", None),
        ] {
            assert_eq!(time_of_origin(text), time, "{text:?}");
        }
    }
}
