//! Times in lines: read from the fixed forms that logs use, written as RFC 3339 in UTC.
//!
//! All is arithmetic on fixed columns; jiff is asked only for zones whose offset changes. What is
//! not a time of the calendar is `None`, never a guess.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// Milliseconds since 1970, in the years 0 to 9999.
pub type Millis = i64;

/// Length of `2026-11-21T07:17:01.000Z`.
pub const TEXT_LEN: usize = 24;

const DAY_MS: i64 = 86_400_000;
/// The Gregorian calendar repeats every 400 years.
const DAYS_OF_ERA: i64 = 146_097;
const YEAR_0: Millis = -62_167_219_200_000;
const YEAR_9999_END: Millis = 253_402_300_799_999;

/// Days from 1970-01-01 to a day of the Gregorian calendar (Howard Hinnant's `days_from_civil`).
pub fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * DAYS_OF_ERA + day_of_era - 719_468
}

/// RFC 3339 in UTC with milliseconds; a time outside the years 0 to 9999 is clamped.
pub fn format(time: Millis) -> [u8; TEXT_LEN] {
    let time = time.clamp(YEAR_0, YEAR_9999_END);
    // The inverse of `days_from_civil`, from the same source; 400 years later, so that nothing is
    // negative and 32 bits do.
    let shifted = (time + (719_468 + DAYS_OF_ERA) * DAY_MS) as u64;
    let (days, of_day) = ((shifted / DAY_MS as u64) as u32, (shifted % DAY_MS as u64) as u32);
    let (era, day_of_era) = (days / DAYS_OF_ERA as u32, days % DAYS_OF_ERA as u32);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + u32::from(month <= 2) - 400;

    let mut text = *b"0000-00-00T00:00:00.000Z";
    put(&mut text, 0, year / 100);
    put(&mut text, 2, year % 100);
    put(&mut text, 5, month);
    put(&mut text, 8, day);
    put(&mut text, 11, of_day / 3_600_000);
    put(&mut text, 14, of_day / 60_000 % 60);
    put(&mut text, 17, of_day / 1000 % 60);
    put(&mut text, 20, of_day % 1000 / 10);
    text[22] = b'0' + (of_day % 10) as u8;
    text
}

/// Two digits.
#[inline]
fn put(text: &mut [u8; TEXT_LEN], at: usize, number: u32) {
    text[at] = b'0' + (number / 10) as u8;
    text[at + 1] = b'0' + (number % 10) as u8;
}

/// A date and time of day, zone not yet applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Civil {
    year: i64,
    month: i64,
    day: i64,
    of_day: i64,
}

impl Civil {
    fn new(year: i64, month: i64, day: i64, of_day: i64) -> Option<Civil> {
        let valid = (0..=9999).contains(&year) && (1..=days_in_month(year, month)).contains(&day);
        valid.then_some(Civil { year, month, day, of_day })
    }

    /// As if it were UTC.
    fn as_utc(self) -> Millis {
        days_from_civil(self.year, self.month, self.day) * DAY_MS + self.of_day
    }
}

/// 0 for what is no month.
fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 0,
    }
}

/// The zone of times that name none.
#[derive(Clone, Debug)]
pub enum Zone {
    /// Always the same offset, in milliseconds east of UTC.
    Fixed(i64),
    /// By the rules of the machine's zone database, or of the one in this program where there is none.
    Named(TimeZone),
}

impl Zone {
    /// The zone of an IANA name; `None` where neither this machine nor this program knows it.
    pub fn of(name: &str) -> Option<Zone> {
        if name.is_empty() || name.eq_ignore_ascii_case("UTC") {
            return Some(Zone::Fixed(0));
        }
        let zone = TimeZone::get(name).ok()?;
        Some(match zone.to_fixed_offset() {
            Ok(offset) => Zone::Fixed(i64::from(offset.seconds()) * 1000),
            Err(_) => Zone::Named(zone),
        })
    }

    /// The instant of a time in this zone. In the hour that a change of clocks repeats it is the
    /// first, in the hour that it leaves out it is as before the change.
    pub fn instant(&self, civil: Civil) -> Option<Millis> {
        match self {
            Zone::Fixed(offset) => Some(civil.as_utc() - offset),
            Zone::Named(zone) => {
                let second = civil.of_day / 1000;
                let date_time = DateTime::new(
                    civil.year as i16,
                    civil.month as i8,
                    civil.day as i8,
                    (second / 3600) as i8,
                    (second / 60 % 60) as i8,
                    (second % 60) as i8,
                    0,
                )
                .ok()?;
                let timestamp = zone.to_timestamp(date_time).ok()?;
                Some(timestamp.as_millisecond() + civil.of_day % 1000)
            }
        }
    }
}

/// Reads fixed columns from the front of some bytes.
struct Columns<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Columns<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn byte(&mut self, wanted: impl Fn(u8) -> bool) -> Option<u8> {
        let byte = self.peek().filter(|&byte| wanted(byte))?;
        self.at += 1;
        Some(byte)
    }

    fn digits<const N: usize>(&mut self) -> Option<i64> {
        let digits = self.bytes.get(self.at..)?.first_chunk::<N>()?;
        let mut number = 0;
        for digit in digits {
            number = number * 10 + i64::from(digit.checked_sub(b'0').filter(|&digit| digit < 10)?);
        }
        self.at += N;
        Some(number)
    }

    /// `HH:MM:SS` in milliseconds; a leap second is the second before it.
    fn time_of_day(&mut self) -> Option<i64> {
        let hour = self.digits::<2>()?;
        self.byte(|byte| byte == b':')?;
        let minute = self.digits::<2>()?;
        self.byte(|byte| byte == b':')?;
        let second = self.digits::<2>()?;
        let valid = hour < 24 && minute < 60 && second <= 60;
        valid.then(|| ((hour * 60 + minute) * 60 + second.min(59)) * 1000)
    }

    /// `.123456`, or `,123` as Python and Java write it, in milliseconds; 0 where there is none.
    fn fraction(&mut self) -> i64 {
        let is_fraction = matches!(self.peek(), Some(b'.' | b','))
            && self.bytes.get(self.at + 1).is_some_and(u8::is_ascii_digit);
        if !is_fraction {
            return 0;
        }
        self.at += 1;
        let (mut millis, mut unit) = (0, 100);
        while let Some(digit) = self.byte(|byte| byte.is_ascii_digit()) {
            millis += i64::from(digit - b'0') * unit;
            unit /= 10;
        }
        millis
    }

    /// `Z`, `+01:00`, `+0100` or `+01`, in milliseconds east of UTC.
    fn offset(&mut self) -> Option<i64> {
        let sign = match self.byte(|byte| matches!(byte, b'Z' | b'z' | b'+' | b'-'))? {
            b'+' => 1,
            b'-' => -1,
            _ => return Some(0),
        };
        let hours = self.digits::<2>()?;
        let colon = usize::from(self.peek() == Some(b':'));
        self.at += colon;
        let minutes = match self.digits::<2>() {
            Some(minutes) => minutes,
            None if colon == 0 => 0,
            None => return None,
        };
        (hours < 24 && minutes < 60).then_some(sign * (hours * 60 + minutes) * 60_000)
    }

    /// `Nov`, from 1.
    fn month(&mut self) -> Option<i64> {
        let name = self.bytes.get(self.at..)?.first_chunk::<3>()?;
        let month = match name {
            b"Jan" => 1,
            b"Feb" => 2,
            b"Mar" => 3,
            b"Apr" => 4,
            b"May" => 5,
            b"Jun" => 6,
            b"Jul" => 7,
            b"Aug" => 8,
            b"Sep" => 9,
            b"Oct" => 10,
            b"Nov" => 11,
            b"Dec" => 12,
            _ => return None,
        };
        self.at += 3;
        Some(month)
    }
}

/// An ISO 8601 time at the front of `bytes`, as RFC 3339 and its looser relatives write it: `T` or
/// a space, any fraction, with or without an offset (then `zone`'s). Also how many bytes it took.
pub fn iso(bytes: &[u8], zone: &Zone) -> Option<(Millis, usize)> {
    let mut columns = Columns { bytes, at: 0 };
    let year = columns.digits::<4>()?;
    columns.byte(|byte| byte == b'-')?;
    let month = columns.digits::<2>()?;
    columns.byte(|byte| byte == b'-')?;
    let day = columns.digits::<2>()?;
    columns.byte(|byte| matches!(byte, b'T' | b't' | b' '))?;
    let of_day = columns.time_of_day()? + columns.fraction();
    let civil = Civil::new(year, month, day, of_day)?;
    let time = match columns.peek() {
        Some(b'Z' | b'z' | b'+' | b'-') => civil.as_utc() - columns.offset()?,
        _ => zone.instant(civil)?,
    };
    Some((time, columns.at))
}

/// `2026/11/21 07:17:01` at the front of `bytes`, as nginx's error log has it, in `zone`.
pub fn nginx_error(bytes: &[u8], zone: &Zone) -> Option<(Millis, usize)> {
    let mut columns = Columns { bytes, at: 0 };
    let year = columns.digits::<4>()?;
    columns.byte(|byte| byte == b'/')?;
    let month = columns.digits::<2>()?;
    columns.byte(|byte| byte == b'/')?;
    let day = columns.digits::<2>()?;
    columns.byte(|byte| byte == b' ')?;
    let of_day = columns.time_of_day()?;
    Some((zone.instant(Civil::new(year, month, day, of_day)?)?, columns.at))
}

/// `21/Nov/2026:07:17:01 +0000`, the common log format's; also how many bytes it took.
pub fn common_log(bytes: &[u8]) -> Option<(Millis, usize)> {
    let mut columns = Columns { bytes, at: 0 };
    let day = columns.digits::<2>()?;
    columns.byte(|byte| byte == b'/')?;
    let month = columns.month()?;
    columns.byte(|byte| byte == b'/')?;
    let year = columns.digits::<4>()?;
    columns.byte(|byte| byte == b':')?;
    let of_day = columns.time_of_day()? + columns.fraction();
    columns.byte(|byte| byte == b' ')?;
    let civil = Civil::new(year, month, day, of_day)?;
    Some((civil.as_utc() - columns.offset()?, columns.at))
}

/// `Nov 21 07:17:01` (RFC 3164 §4.1.2) at the front of `bytes`, with the year that lies nearest to
/// `near` (days since 1970) unless one is written; a fraction is accepted.
pub fn rfc3164(bytes: &[u8], zone: &Zone, near: i64) -> Option<(Millis, usize)> {
    let mut columns = Columns { bytes, at: 0 };
    let month = columns.month()?;
    columns.byte(|byte| byte == b' ')?;
    let padded = columns.byte(|byte| byte == b' ').is_some();
    let day = match (!padded).then(|| columns.digits::<2>()).flatten() {
        Some(day) => day,
        None => columns.digits::<1>()?,
    };
    columns.byte(|byte| byte == b' ')?;
    let year = match (columns.bytes.get(columns.at + 4) == Some(&b' '))
        .then(|| columns.digits::<4>())
        .flatten()
    {
        Some(year) => {
            columns.at += 1;
            year
        }
        None => nearest_year(month, day, near)?,
    };
    let of_day = columns.time_of_day()? + columns.fraction();
    Some((zone.instant(Civil::new(year, month, day, of_day)?)?, columns.at))
}

/// The year in which that day of the calendar lies nearest to `near`. Leap days are at most eight
/// years apart.
fn nearest_year(month: i64, day: i64, near: i64) -> Option<i64> {
    let middle = 1970 + near.div_euclid(365);
    let reach = if (month, day) == (2, 29) { 9 } else { 2 };
    (middle - reach..=middle + reach)
        .filter(|&year| day >= 1 && day <= days_in_month(year, month))
        .min_by_key(|&year| (days_from_civil(year, month, day) - near).abs())
}

/// A time as a JSON value says it: ISO 8601, the common log format, or a number since 1970 in
/// seconds, milliseconds, microseconds or nanoseconds, whichever lies after 1973 and before 5000.
pub fn any_form(text: &str, zone: &Zone) -> Option<Millis> {
    let bytes = text.as_bytes();
    match iso(bytes, zone).or_else(|| common_log(bytes)) {
        Some((time, length)) => (length == bytes.len()).then_some(time),
        None => since_1970(text),
    }
}

fn since_1970(text: &str) -> Option<Millis> {
    let nanos = nanos(text, 1_000_000_000)?;
    // As seconds, 1e8 is March 1973; a shorter number is a duration or a counter.
    let scale = match nanos / 1_000_000_000 {
        100_000_000..100_000_000_000 => 1_000_000,
        100_000_000_000..100_000_000_000_000 => 1_000_000_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1_000_000_000_000,
        100_000_000_000_000_000..100_000_000_000_000_000_000 => 1_000_000_000_000_000,
        _ => return None,
    };
    i64::try_from(nanos / scale).ok().filter(|time| (YEAR_0..=YEAR_9999_END).contains(time))
}

/// A decimal number without sign or exponent in units of `unit` nanoseconds, as nanoseconds.
pub fn nanos(text: &str, unit: u64) -> Option<u128> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| {
        (1..=19).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
    };
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let mut nanos = u128::from(whole.parse::<u64>().ok()?) * u128::from(unit);
    let mut unit = u128::from(unit);
    for digit in fraction.bytes() {
        unit /= 10;
        nanos += u128::from(digit - b'0') * unit;
    }
    Some(nanos)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UTC: Zone = Zone::Fixed(0);

    fn text(time: Option<(Millis, usize)>) -> String {
        time.map_or("none".to_owned(), |(time, _)| show(time))
    }

    fn show(time: Millis) -> String {
        String::from_utf8(format(time).to_vec()).expect("ASCII")
    }

    #[test]
    fn iso_forms() {
        for (from, to) in [
            ("2026-11-21T07:17:01Z", "2026-11-21T07:17:01.000Z"),
            ("2026-11-21T07:17:01+00:00", "2026-11-21T07:17:01.000Z"),
            ("2026-11-21T07:17:01.5+0130", "2026-11-21T05:47:01.500Z"),
            ("2026-11-21T07:17:01.123456789-05", "2026-11-21T12:17:01.123Z"),
            ("2026-11-21 07:17:01,999", "2026-11-21T07:17:01.999Z"),
            ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59.000Z"),
            ("2026-02-29T00:00:00Z", "none"),
            ("2026-13-01T00:00:00Z", "none"),
            ("2026-11-21T24:00:00Z", "none"),
            ("2026-11-21T07:17:01+01:", "none"),
            ("2026-11-21", "none"),
        ] {
            assert_eq!(text(iso(from.as_bytes(), &UTC)), to, "{from}");
        }
    }

    #[test]
    fn a_year_that_is_not_written_is_the_nearest() {
        let near = |text: &str| {
            let mut parts = text.split('-').map(|part| part.parse().expect("a number"));
            let mut next = || parts.next().expect("three parts");
            days_from_civil(next(), next(), next())
        };
        for (from, day, to) in [
            ("Nov 21 07:17:01", "2026-11-21", "2026-11-21T07:17:01.000Z"),
            ("Nov  1 07:17:01", "2026-11-21", "2026-11-01T07:17:01.000Z"),
            ("Nov 1 07:17:01.25", "2026-11-21", "2026-11-01T07:17:01.250Z"),
            ("Nov 21 2019 07:17:01", "2026-11-21", "2019-11-21T07:17:01.000Z"),
            ("Dec 31 23:59:59", "2026-01-01", "2025-12-31T23:59:59.000Z"),
            ("Jan  1 00:00:00", "2025-12-31", "2026-01-01T00:00:00.000Z"),
            ("Feb 29 12:00:00", "2024-03-01", "2024-02-29T12:00:00.000Z"),
            ("Feb 29 12:00:00", "2027-03-01", "2028-02-29T12:00:00.000Z"),
            ("Feb 29 12:00:00", "1900-03-01", "1904-02-29T12:00:00.000Z"),
            ("Feb 30 12:00:00", "2024-03-01", "none"),
            ("Nov  0 12:00:00", "2024-03-01", "none"),
        ] {
            assert_eq!(text(rfc3164(from.as_bytes(), &UTC, near(day))), to, "{from} near {day}");
        }
    }

    #[test]
    fn a_named_zone_follows_its_clocks() {
        let berlin = Zone::of("Europe/Berlin").expect("a zone");
        for (from, to) in [
            ("2026-11-21 07:17:01.250", "2026-11-21T06:17:01.250Z"),
            ("2026-07-01 07:17:01", "2026-07-01T05:17:01.000Z"),
            // 02:00 to 03:00 does not exist in the first, comes twice in the second.
            ("2026-03-29 02:30:00", "2026-03-29T01:30:00.000Z"),
            ("2026-10-25 02:30:00", "2026-10-25T00:30:00.000Z"),
        ] {
            assert_eq!(text(iso(from.as_bytes(), &berlin)), to, "{from}");
        }
        assert!(Zone::of("Nowhere/Nothing").is_none());
    }

    #[test]
    fn numbers_are_times_where_they_can_be() {
        let any = |text: &str| any_form(text, &UTC).map_or("none".to_owned(), show);
        assert_eq!(any("1795245421.123"), "2026-11-21T07:17:01.123Z");
        assert_eq!(any("1795245421"), "2026-11-21T07:17:01.000Z");
        assert_eq!(any("1795245421123"), "2026-11-21T07:17:01.123Z");
        assert_eq!(any("1795245421123456"), "2026-11-21T07:17:01.123Z");
        assert_eq!(any("1795245421123456789"), "2026-11-21T07:17:01.123Z");
        assert_eq!(any("21/Nov/2026:08:17:01 +0100"), "2026-11-21T07:17:01.000Z");
        for none in ["", "0.123", "12", "-1795245421", "1e10", "2026-11-21T07:17:01Zx", "yesterday"]
        {
            assert_eq!(any(none), "none", "{none}");
        }
    }

    #[test]
    fn the_ends_of_the_calendar() {
        assert_eq!(show(i64::MIN), "0000-01-01T00:00:00.000Z");
        assert_eq!(show(i64::MAX), "9999-12-31T23:59:59.999Z");
        assert_eq!(show(-1), "1969-12-31T23:59:59.999Z");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(time in YEAR_0..=YEAR_9999_END) {
            let text = format(time);
            prop_assert_eq!(iso(&text, &UTC), Some((time, TEXT_LEN)));
            let jiff = jiff::Timestamp::from_millisecond(time).expect("in range");
            let printer = jiff::fmt::temporal::DateTimePrinter::new().precision(Some(3));
            let expected = printer.timestamp_to_string(&jiff);
            prop_assert_eq!(&text[..], expected.as_bytes());
        }

        #[test]
        fn no_bytes_panic(bytes in "[0-9A-Za-z:/., +TZ-]{0,40}", near in any::<i32>()) {
            let near = i64::from(near);
            let _ = (iso(bytes.as_bytes(), &UTC), common_log(bytes.as_bytes()), any_form(&bytes, &UTC));
            let _ = (rfc3164(bytes.as_bytes(), &UTC, near), nginx_error(bytes.as_bytes(), &UTC));
        }
    }
}
