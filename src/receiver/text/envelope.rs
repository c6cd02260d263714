//! What a text message says: a log line, or an object with a line, its key and its time. No I/O.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::record::framing::KEY_BYTES_MAX;
use crate::record::{RECORD_BYTES_MAX, time_of_origin};

/// One line on its way into a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Line<'a> {
    /// Without the newline at its end, with its carriage return; at most [`RECORD_BYTES_MAX`].
    pub payload: Cow<'a, str>,
    /// Makes a repeat the same document, together with the time; empty where there is none.
    pub key: String,
    /// Its time of origin, milliseconds since 1970. There where there is a key.
    pub time: Option<u64>,
}

/// The only members that an envelope may have: a line that is JSON itself has others.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    /// Bytes: half of a surrogate pair, as a line has that was cut within an emoji, is no text.
    #[serde(borrow)]
    line: Cow<'a, [u8]>,
    #[serde(borrow, default)]
    key: Option<&'a RawValue>,
    #[serde(borrow, default)]
    time: Option<&'a RawValue>,
}

impl<'a> Line<'a> {
    /// Reads a message. An object that has a string `line`, and beside it nothing but `key` and
    /// `time`, is an envelope; every other text is the line itself.
    ///
    /// # Errors
    ///
    /// Where a line is too long, or an envelope promises exactly-once and cannot keep it: stored
    /// without its key, a repeat would be a second document that nobody expects.
    pub fn read(message: &'a str) -> Result<Line<'a>, String> {
        let line = match envelope(message) {
            Some(Envelope { line, key, time }) => Line {
                payload: without_newline(text(line)),
                key: key.map_or(Ok(String::new()), read_key)?,
                time: time.map(read_time).transpose()?,
            },
            None => {
                let payload = without_newline(Cow::Borrowed(message));
                Line { payload, key: String::new(), time: None }
            }
        };
        if !line.key.is_empty() && line.time.is_none() {
            return Err("a key needs a time: the day of the index is that of the time".to_owned());
        }
        match line.payload.len() {
            0..=RECORD_BYTES_MAX => Ok(line),
            bytes => Err(format!("a line of {bytes} bytes, allowed are {RECORD_BYTES_MAX}")),
        }
    }

    /// Whether there is nothing to store.
    pub fn is_empty(&self) -> bool {
        matches!(&*self.payload, "" | "\r")
    }
}

fn envelope(message: &str) -> Option<Envelope<'_>> {
    // Serde would take an array for the members in their order.
    let is_object = message.trim_ascii_start().starts_with('{');
    is_object.then(|| serde_json::from_str(message).ok()).flatten()
}

fn read_key(raw: &RawValue) -> Result<String, String> {
    let key: Option<String> = serde_json::from_str(raw.get()).ok();
    key.filter(|key| (1..=KEY_BYTES_MAX).contains(&key.len()))
        .ok_or_else(|| format!("the key must be a string of 1 to {KEY_BYTES_MAX} bytes"))
}

fn read_time(raw: &RawValue) -> Result<u64, String> {
    let time = match serde_json::from_str::<String>(raw.get()) {
        Ok(text) => time_of_origin(&text),
        Err(_) => time_of_origin(raw.get()),
    };
    time.ok_or_else(|| {
        "the time must be RFC 3339, or UNIX seconds or milliseconds in decimal digits".to_owned()
    })
}

/// U+FFFD for what is no text, the same at each repeat.
fn text(line: Cow<'_, [u8]>) -> Cow<'_, str> {
    match line {
        Cow::Borrowed(line) => String::from_utf8_lossy(line),
        Cow::Owned(line) => Cow::Owned(String::from_utf8_lossy(&line).into_owned()),
    }
}

fn without_newline(line: Cow<'_, str>) -> Cow<'_, str> {
    match line {
        Cow::Borrowed(line) => Cow::Borrowed(line.strip_suffix('\n').unwrap_or(line)),
        Cow::Owned(mut line) => {
            if line.ends_with('\n') {
                line.pop();
            }
            Cow::Owned(line)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(message: &str) -> Line<'_> {
        Line::read(message).unwrap_or_else(|reason| panic!("{message}: {reason}"))
    }

    #[test]
    fn a_message_is_a_line_and_one_newline_at_its_end_is_none_of_it() {
        for (message, payload) in [
            ("a line", "a line"),
            ("a line\n", "a line"),
            ("a line\r\n", "a line\r"),
            ("a\nb\n\n", "a\nb\n"),
            ("", ""),
        ] {
            assert_eq!(
                read(message),
                Line { payload: payload.into(), key: String::new(), time: None }
            );
        }
        assert!(read("\n").is_empty() && read("\r\n").is_empty() && !read(" ").is_empty());
    }

    #[test]
    fn an_envelope_has_a_line_and_may_have_key_and_time() {
        let line = read(r#"{"time":"1795250808.089","line":"a \"b\"\n","key":"cb@01"}"#);
        assert_eq!((&*line.payload, &*line.key), ("a \"b\"", "cb@01"));
        assert_eq!(line.time, Some(1_795_250_808_089));
        let line = read(r#"{"line":"cut \ud83d","key":"k","time":5}"#);
        assert_eq!((&*line.payload, &*line.key), ("cut \u{fffd}\u{fffd}\u{fffd}", "k"));
        let line = read(r#" {"line":"{\"line\":\"a\"}","key":null,"time":5} "#);
        assert_eq!((&*line.payload, &*line.key, line.time), (r#"{"line":"a"}"#, "", Some(5000)));
    }

    #[test]
    fn every_other_text_is_the_line_itself() {
        for text in [
            r#"{"line":"a","level":"info"}"#,
            r#"{"line":5}"#,
            r#"{"line":"a","line":"b"}"#,
            r#"{"key":"k","time":1}"#,
            r#"{"message":"a","time":"2026-11-21T08:00:00Z"}"#,
            r#"["a"]"#,
            r#""a""#,
            r#"{"line":"a""#,
            r#"{"line":"a"} {"line":"b"}"#,
            "{}",
        ] {
            assert_eq!(read(text).payload, text);
        }
    }

    #[test]
    fn an_envelope_that_cannot_be_exactly_once_is_refused() {
        let long = format!(r#"{{"line":"a","time":1,"key":"{}"}}"#, "k".repeat(KEY_BYTES_MAX + 1));
        for (message, word) in [
            (r#"{"line":"a","key":"k"}"#, "a key needs a time"),
            (r#"{"line":"a","key":"","time":1}"#, "the key must be"),
            (r#"{"line":"a","key":7,"time":1}"#, "the key must be"),
            (&long, "the key must be"),
            (r#"{"line":"a","key":"k","time":"yesterday"}"#, "the time must be"),
            (r#"{"line":"a","key":"k","time":-1}"#, "the time must be"),
            (r#"{"line":"a","time":{}}"#, "the time must be"),
        ] {
            let reason = Line::read(message).expect_err(message);
            assert!(reason.contains(word), "{message}: {reason}");
        }
    }

    #[test]
    fn a_line_has_a_longest_length() {
        let longest = "x".repeat(RECORD_BYTES_MAX);
        assert_eq!(read(&longest).payload.len(), RECORD_BYTES_MAX);
        assert_eq!(read(&format!("{longest}\n")).payload.len(), RECORD_BYTES_MAX);
        let reason = Line::read(&format!("{longest}x")).expect_err("too long").to_string();
        assert!(reason.contains("1048577") && reason.contains("1048576"), "{reason}");
    }

    proptest! {
        #[test]
        fn any_line_survives_its_envelope(line in ".*", key in ".{1,40}", time in 0_u64..1 << 40) {
            let message = serde_json::json!({"line": line, "key": key, "time": time}).to_string();
            let read = Line::read(&message).map_err(TestCaseError::fail)?;
            prop_assert_eq!(&*read.payload, line.strip_suffix('\n').unwrap_or(&line));
            prop_assert_eq!(read.key, key);
        }
    }
}
