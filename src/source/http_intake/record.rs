//! What a line of a post says: a log line, or an object with a line, its key and its time. No I/O.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::record::framing::KEY_BYTES_MAX;
use crate::record::time_of_origin;

/// Longer keys are replaced by their SHA-256: room is left for a piece's number.
const OWN_KEY_BYTES_MAX: usize = KEY_BYTES_MAX - PIECE_BYTES;

/// What [`piece_key`] adds.
const PIECE_BYTES: usize = 5;

/// How the lines of a post are understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// Log lines as they are.
    Lines,
    /// `application/x-ndjson`: objects with `line`, `key` and `time`.
    Objects,
}

impl Form {
    /// From the value of `Content-Type`.
    pub fn of(content_type: Option<&str>) -> Form {
        let media_type = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
        match media_type.trim().to_ascii_lowercase().as_str() {
            "application/x-ndjson" | "application/ndjson" => Form::Objects,
            _ => Form::Lines,
        }
    }
}

/// One line on its way into the spool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Posted<'a> {
    /// Its time of origin, milliseconds since 1970.
    pub time: Option<u64>,
    /// Makes a repeat the same document; empty where the client gave none, or no time with it.
    pub key: Cow<'a, [u8]>,
    /// Without the newline at its end.
    pub payload: Cow<'a, [u8]>,
    /// It was to be an object with a key, and is stored without one.
    pub flaw: Option<Flaw>,
}

/// Why a line has no key although its client seems to want one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flaw {
    /// No object with a `line`: stored as the text that it is.
    NotAnObject,
    /// A key without a time that can be read: the day of its index would be anybody's guess.
    NoTime,
}

impl Flaw {
    /// For the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Flaw::NotAnObject => "not a JSON object with a \"line\" of at most 1 MiB",
            Flaw::NoTime => "a key without a time (RFC 3339, or UNIX seconds or milliseconds)",
        }
    }
}

#[derive(Deserialize)]
struct Object<'a> {
    /// Bytes: half of a surrogate pair, as a line has that was cut within an emoji, is no text.
    #[serde(borrow)]
    line: Cow<'a, [u8]>,
    #[serde(default)]
    key: Option<String>,
    #[serde(borrow, default)]
    time: Option<&'a RawValue>,
}

impl<'a> Posted<'a> {
    /// Reads one line of a post. Nothing is refused: what is not understood is a line.
    pub fn read(line: &'a [u8], form: Form) -> Posted<'a> {
        let plain = |flaw| Posted {
            time: None,
            key: Cow::Borrowed(b""),
            payload: Cow::Borrowed(line),
            flaw,
        };
        if form == Form::Lines {
            return plain(None);
        }
        // Serde would take an array for the fields in their order.
        let is_object = line.trim_ascii_start().starts_with(b"{");
        let object = is_object.then(|| serde_json::from_slice(line).ok()).flatten();
        let Some(Object { line: text, key, time }) = object else {
            return plain(Some(Flaw::NotAnObject));
        };
        let time = time.and_then(|raw| match serde_json::from_str::<String>(raw.get()) {
            Ok(text) => time_of_origin(&text),
            Err(_) => time_of_origin(raw.get()),
        });
        let key = key.unwrap_or_default();
        let flaw = (!key.is_empty() && time.is_none()).then_some(Flaw::NoTime);
        let key = match key.len() {
            _ if flaw.is_some() => Vec::new(),
            0..=OWN_KEY_BYTES_MAX => key.into_bytes(),
            _ => {
                let digest = Sha256::digest(key.as_bytes());
                digest.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect()
            }
        };
        let payload = match text {
            Cow::Borrowed(text) => Cow::Borrowed(without_newline(text)),
            Cow::Owned(text) => Cow::Owned(without_newline(&text).to_owned()),
        };
        Posted { time, key: Cow::Owned(key), payload, flaw }
    }
}

fn without_newline(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\n").unwrap_or(text)
}

/// The key of a piece of a line that is too long for one record. Two pieces may hold the same
/// bytes, and must not be one document (I4); 0xFF occurs in no key that came as UTF-8.
pub(super) fn piece_key(key: &[u8], number: u32) -> Cow<'_, [u8]> {
    if key.is_empty() || number == 0 {
        return Cow::Borrowed(key);
    }
    Cow::Owned([key, &[0xff], &number.to_be_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Posted<'_> {
        Posted::read(text.as_bytes(), Form::Objects)
    }

    #[test]
    fn an_object_has_line_key_and_time() {
        let posted =
            object(r#"{"time":"1795250808.089","line":"a \"b\"\n","key":"cb@01","x":[1]}"#);
        assert_eq!(posted.time, Some(1_795_250_808_089));
        assert_eq!((&*posted.key, &*posted.payload), (&b"cb@01"[..], &b"a \"b\""[..]));
        assert_eq!(posted.flaw, None);
    }

    #[test]
    fn a_line_that_is_no_text_keeps_its_key() {
        let posted = object(r#"{"line":"cut \ud83d","key":"k","time":5}"#);
        assert_eq!((&*posted.key, posted.flaw), (&b"k"[..], None));
        assert_eq!(&*posted.payload, b"cut \xed\xa0\xbd");
        let latin = b"{\"line\":\"caf\xe9\",\"key\":\"k\",\"time\":5}";
        let posted = Posted::read(latin, Form::Objects);
        assert_eq!((&*posted.key, &*posted.payload), (&b"k"[..], &b"caf\xe9"[..]));
    }

    #[test]
    fn a_time_may_be_a_number() {
        assert_eq!(object(r#"{"line":"a","time":1795250808.089}"#).time, Some(1_795_250_808_089));
    }

    #[test]
    fn what_is_not_understood_is_a_line_without_a_key() {
        for text in ["no json", r#"{"key":"k","time":1}"#, r#"{"line":5}"#, r#"["a"]"#] {
            let posted = object(text);
            assert_eq!(&*posted.payload, text.as_bytes());
            assert_eq!(posted.flaw, Some(Flaw::NotAnObject), "{text}");
        }
        let posted = object(r#"{"line":"a","key":"k"}"#);
        assert_eq!((&*posted.key, &*posted.payload), (&b""[..], &b"a"[..]));
        assert_eq!(posted.flaw, Some(Flaw::NoTime));
        // syslog-ng without use-uniqid(yes).
        let posted = object(r#"{"line":"a","key":"","time":"5"}"#);
        assert_eq!((posted.time, &*posted.key, posted.flaw), (Some(5000), &b""[..], None));
    }

    #[test]
    fn plain_lines_are_taken_as_they_are() {
        let line = br#"{"line":"a","key":"k","time":5}"#;
        let posted = Posted::read(line, Form::Lines);
        assert_eq!((&*posted.key, &*posted.payload), (&b""[..], &line[..]));
        assert_eq!(Form::of(Some("Application/X-NDJSON; charset=utf-8")), Form::Objects);
        assert_eq!(Form::of(Some("text/plain")), Form::Lines);
        assert_eq!(Form::of(None), Form::Lines);
    }

    #[test]
    fn keys_fit_into_a_record_whatever_their_length() {
        let text =
            |length: usize| format!(r#"{{"line":"a","time":1,"key":"{}"}}"#, "k".repeat(length));
        for length in [1, OWN_KEY_BYTES_MAX, OWN_KEY_BYTES_MAX + 1, 5000] {
            let text = text(length);
            let posted = object(&text);
            assert!(piece_key(&posted.key, 7).len() <= KEY_BYTES_MAX, "{length}");
        }
        let (long, longer) = (text(5000), text(5001));
        assert_ne!(object(&long).key, object(&longer).key);
        assert_ne!(piece_key(b"k", 1), piece_key(b"k", 2));
        assert_eq!(&*piece_key(b"", 3), b"");
    }
}
