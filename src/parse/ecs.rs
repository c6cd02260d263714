//! Which key of a JSON line becomes which ECS field, and what fits there.
//!
//! The table is data: a user's own entries join it. A value that does not fit its field is never
//! written there, since Elasticsearch would refuse the whole document for it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::LazyLock;

use super::escape::{write_escaped, write_integer, write_string};
use super::json::Value;
use super::timestamp::{Millis, Zone, any_form, nanos};

/// A field that a line can fill. The order up to [`Field::LAST_GROUPED`] is that of [`PATHS`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Field {
    HttpRequestBytes,
    HttpRequestId,
    HttpRequestMethod,
    HttpRequestReferrer,
    HttpResponseBodyBytes,
    HttpResponseBytes,
    HttpResponseMimeType,
    HttpResponseStatusCode,
    HttpVersion,
    SourceAddress,
    SourceIp,
    SourcePort,
    TraceId,
    UrlDomain,
    UrlOriginal,
    UrlPath,
    UrlPort,
    UrlQuery,
    UrlScheme,
    UserName,
    UserAgentOriginal,
    /// In the `event` object, beside what every document has there.
    EventDuration,
    /// In the `log` object.
    LogLevel,
    /// In the `log` object.
    LogLogger,
}

const FIELDS: usize = Field::LogLogger as usize + 1;

/// Paths of the fields that are written by [`Fields::write`], in an order that keeps those of one
/// object together.
const PATHS: [&[&str]; Field::LAST_GROUPED as usize + 1] = [
    &["http", "request", "bytes"],
    &["http", "request", "id"],
    &["http", "request", "method"],
    &["http", "request", "referrer"],
    &["http", "response", "body", "bytes"],
    &["http", "response", "bytes"],
    &["http", "response", "mime_type"],
    &["http", "response", "status_code"],
    &["http", "version"],
    &["source", "address"],
    &["source", "ip"],
    &["source", "port"],
    &["trace", "id"],
    &["url", "domain"],
    &["url", "original"],
    &["url", "path"],
    &["url", "port"],
    &["url", "query"],
    &["url", "scheme"],
    &["user", "name"],
    &["user_agent", "original"],
];

impl Field {
    const LAST_GROUPED: Field = Field::UserAgentOriginal;
}

/// What a known key's value must be, and where it goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lift {
    /// Any text but an empty one and `-`.
    Text(Field),
    /// `HTTP/1.1`, to `http.version` without its `HTTP/`.
    Protocol,
    /// A whole number from 0, as a number or as a string.
    Count(Field),
    /// An IPv4 or IPv6 address.
    Address(Field),
    /// `url.path`, and `url.query` after a `?`.
    Target,
    /// `GET /path HTTP/1.1`.
    RequestLine,
    /// A length of time whose unit is so many nanoseconds, to `event.duration`.
    Duration(u64),
    /// `@timestamp`.
    Time,
    /// `message`.
    Message,
}

/// nginx's variables in the usual JSON spellings, Filebeat's names for them, and ECS's own names
/// where a program writes those as dotted keys. In order of the key.
const TABLE: &[(&str, Lift)] = &[
    ("@timestamp", Lift::Time),
    ("args", Lift::Text(Field::UrlQuery)),
    ("body_bytes_sent", Lift::Count(Field::HttpResponseBodyBytes)),
    ("bytes", Lift::Count(Field::HttpResponseBodyBytes)),
    ("bytes_sent", Lift::Count(Field::HttpResponseBytes)),
    ("client_ip", Lift::Address(Field::SourceIp)),
    ("date", Lift::Time),
    ("event.duration", Lift::Duration(1)),
    ("generation_time_milli", Lift::Duration(1_000_000)),
    ("host", Lift::Text(Field::UrlDomain)),
    ("http.request.method", Lift::Text(Field::HttpRequestMethod)),
    ("http.request.referrer", Lift::Text(Field::HttpRequestReferrer)),
    ("http.response.body.bytes", Lift::Count(Field::HttpResponseBodyBytes)),
    ("http.response.status_code", Lift::Count(Field::HttpResponseStatusCode)),
    ("http.version", Lift::Text(Field::HttpVersion)),
    ("http_host", Lift::Text(Field::UrlDomain)),
    ("http_referer", Lift::Text(Field::HttpRequestReferrer)),
    ("http_user_agent", Lift::Text(Field::UserAgentOriginal)),
    ("ip", Lift::Address(Field::SourceIp)),
    ("length", Lift::Count(Field::HttpResponseBodyBytes)),
    ("level", Lift::Text(Field::LogLevel)),
    ("log.level", Lift::Text(Field::LogLevel)),
    ("log.logger", Lift::Text(Field::LogLogger)),
    ("logger", Lift::Text(Field::LogLogger)),
    ("message", Lift::Message),
    ("method", Lift::Text(Field::HttpRequestMethod)),
    ("msec", Lift::Time),
    ("msg", Lift::Message),
    ("path", Lift::Target),
    ("query_string", Lift::Text(Field::UrlQuery)),
    ("referer", Lift::Text(Field::HttpRequestReferrer)),
    ("referrer", Lift::Text(Field::HttpRequestReferrer)),
    ("remote_addr", Lift::Address(Field::SourceIp)),
    ("remote_ip", Lift::Address(Field::SourceIp)),
    ("remote_port", Lift::Count(Field::SourcePort)),
    ("remote_user", Lift::Text(Field::UserName)),
    ("request", Lift::RequestLine),
    ("request_id", Lift::Text(Field::HttpRequestId)),
    ("request_length", Lift::Count(Field::HttpRequestBytes)),
    ("request_method", Lift::Text(Field::HttpRequestMethod)),
    ("request_time", Lift::Duration(1_000_000_000)),
    ("request_uri", Lift::Target),
    ("response_code", Lift::Count(Field::HttpResponseStatusCode)),
    ("scheme", Lift::Text(Field::UrlScheme)),
    ("sent_http_content_type", Lift::Text(Field::HttpResponseMimeType)),
    ("server_name", Lift::Text(Field::UrlDomain)),
    ("server_port", Lift::Count(Field::UrlPort)),
    ("server_protocol", Lift::Protocol),
    ("severity", Lift::Text(Field::LogLevel)),
    ("source.ip", Lift::Address(Field::SourceIp)),
    ("status", Lift::Count(Field::HttpResponseStatusCode)),
    ("time", Lift::Time),
    ("time_iso8601", Lift::Time),
    ("time_local", Lift::Time),
    ("timestamp", Lift::Time),
    ("trace.id", Lift::Text(Field::TraceId)),
    ("trace_id", Lift::Text(Field::TraceId)),
    ("uri", Lift::Target),
    ("url.domain", Lift::Text(Field::UrlDomain)),
    ("url.path", Lift::Target),
    ("user_agent", Lift::Text(Field::UserAgentOriginal)),
    ("user_agent.original", Lift::Text(Field::UserAgentOriginal)),
];

/// The table, ready for a look-up per key of a line.
type Index = HashMap<&'static str, Lift, BuildHasherDefault<KeyHasher>>;

static INDEX: LazyLock<Index> = LazyLock::new(|| TABLE.iter().copied().collect());

/// What becomes of a key, if it is known.
#[inline]
pub fn lift(key: &str) -> Option<Lift> {
    INDEX.get(key).copied()
}

/// A key by its ends and its length: the table is fixed, so nobody can make keys collide that would cost anything.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        const PRIME: u64 = 0x9e37_79b9_7f4a_7c15;
        let ends = match (bytes.first_chunk::<8>(), bytes.last_chunk::<8>()) {
            (Some(first), Some(last)) => {
                u64::from_le_bytes(*first) ^ u64::from_le_bytes(*last).rotate_left(20)
            }
            _ => bytes.iter().fold(0, |word, &byte| (word << 8) | u64::from(byte)),
        };
        let mixed = (ends ^ bytes.len() as u64).wrapping_mul(PRIME);
        self.0 = mixed ^ (mixed >> 32);
    }

    #[inline]
    fn write_u8(&mut self, _: u8) {
        // The end mark of a string: its length is in the hash.
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// What a field holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Held<'a> {
    /// Nothing.
    #[default]
    Absent,
    /// The inside of a JSON string that has no escapes: copied as it is.
    Plain(&'a str),
    /// Text, still to be escaped.
    Text(Cow<'a, str>),
    /// A number.
    Long(i64),
}

impl<'a> Held<'a> {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Held::Absent => out.extend_from_slice(b"null"),
            Held::Plain(text) => {
                out.push(b'"');
                out.extend_from_slice(text.as_bytes());
                out.push(b'"');
            }
            Held::Text(text) => write_string(text, out),
            Held::Long(number) => write_integer(*number, out),
        }
    }

    /// Appends the inside of a string.
    pub fn write_inside(&self, out: &mut Vec<u8>) {
        match self {
            Held::Absent => {}
            Held::Plain(text) => out.extend_from_slice(text.as_bytes()),
            Held::Text(text) => write_escaped(text, out),
            Held::Long(number) => write_integer(*number, out),
        }
    }

    fn text(text: Cow<'a, str>) -> Option<Held<'a>> {
        (!matches!(&*text, "" | "-")).then_some(Held::Text(text))
    }
}

/// The fields that one line fills.
#[derive(Debug, Default)]
pub struct Fields<'a> {
    held: [Held<'a>; FIELDS],
    /// From the line itself.
    pub timestamp: Option<Millis>,
    /// From the line itself.
    pub message: Held<'a>,
}

impl<'a> Fields<'a> {
    /// Fills a field unless it is filled; whether it did.
    pub fn set(&mut self, field: Field, held: Held<'a>) -> bool {
        let slot = &mut self.held[field as usize];
        let free = *slot == Held::Absent;
        if free {
            *slot = held;
        }
        free
    }

    /// Fills a text field, unless the text says that there is nothing.
    pub fn set_text(&mut self, field: Field, text: &'a str) {
        if let Some(held) = Held::text(Cow::Borrowed(text)) {
            self.set(field, held);
        }
    }

    /// Puts a JSON value where its key belongs; whether it fits there.
    pub fn put(&mut self, lift: Lift, value: &Value<'a>, zone: &Zone) -> bool {
        match lift {
            Lift::Text(field) => match value {
                Value::String(text) => match text.held() {
                    Held::Plain("" | "-") => false,
                    held => self.set(field, held),
                },
                Value::Number(text) => self.set(field, Held::Plain(text)),
                _ => false,
            },
            Lift::Protocol => match value {
                Value::String(text) => {
                    let text = text.text();
                    let start = "HTTP/".len();
                    text.starts_with("HTTP/")
                        && self.set(Field::HttpVersion, slice(&text, start, text.len()))
                }
                _ => false,
            },
            Lift::Count(field) => value
                .text()
                .and_then(|text| count(&text))
                .is_some_and(|number| self.set(field, Held::Long(number))),
            Lift::Address(field) => match value {
                Value::String(text) => {
                    let address = text.text();
                    address.parse::<IpAddr>().is_ok() && self.set(field, Held::Text(address))
                }
                _ => false,
            },
            Lift::Target => match value {
                Value::String(text) => self.set_target(text.text()),
                _ => false,
            },
            Lift::RequestLine => match value {
                Value::String(text) => self.set_request_line(text.text()),
                _ => false,
            },
            Lift::Duration(unit) => value
                .text()
                .and_then(|text| i64::try_from(nanos(&text, unit)?).ok())
                .is_some_and(|nanos| self.set(Field::EventDuration, Held::Long(nanos))),
            Lift::Time => {
                let time = value.text().and_then(|text| any_form(&text, zone));
                let first = self.timestamp.is_none() && time.is_some();
                if first {
                    self.timestamp = time;
                }
                first
            }
            Lift::Message => match value {
                Value::String(text) if self.message == Held::Absent => {
                    self.message = text.held();
                    true
                }
                _ => false,
            },
        }
    }

    /// `url.path`, and `url.query` where there is a `?`.
    fn set_target(&mut self, target: Cow<'a, str>) -> bool {
        let free = self.held[Field::UrlPath as usize] == Held::Absent;
        if !free || matches!(&*target, "" | "-") {
            return false;
        }
        let Some(mark) = target.find('?') else {
            return self.set(Field::UrlPath, Held::Text(target));
        };
        // A query that came as a key of its own is the same one.
        self.set(Field::UrlQuery, slice(&target, mark + 1, target.len()));
        self.set(Field::UrlPath, slice(&target, 0, mark))
    }

    /// Method, target and version of a request line; what is no request line changes nothing.
    pub fn set_request_line(&mut self, line: Cow<'a, str>) -> bool {
        let Some((method, rest)) = line.split_once(' ') else {
            return false;
        };
        let Some((target, version)) = rest.rsplit_once(" HTTP/") else {
            return false;
        };
        let free = self.held[Field::UrlOriginal as usize] == Held::Absent;
        let is_method = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase());
        if !free || !is_method || target.is_empty() {
            return false;
        }
        let start = method.len() + 1;
        let end = start + target.len();
        let (method, version) =
            (slice(&line, 0, start - 1), slice(&line, line.len() - version.len(), line.len()));
        self.set(Field::HttpRequestMethod, method);
        self.set(Field::HttpVersion, version);
        let target = match &line {
            Cow::Borrowed(line) => Cow::Borrowed(&line[start..end]),
            Cow::Owned(line) => Cow::Owned(line[start..end].to_owned()),
        };
        self.set(Field::UrlOriginal, Held::Text(target.clone()));
        self.set_target(target);
        true
    }

    /// Appends `,"name":value` if the field is filled.
    pub fn write_one(&self, field: Field, name: &str, out: &mut Vec<u8>) {
        let held = &self.held[field as usize];
        if *held != Held::Absent {
            out.extend_from_slice(b",\"");
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b"\":");
            held.write(out);
        }
    }

    /// Appends the filled fields of [`PATHS`], as objects, with a comma before the first.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut before = START;
        for (at, held) in self.held[..PATHS.len()].iter().enumerate() {
            if *held != Held::Absent {
                out.extend_from_slice(STEPS.between(before, at));
                held.write(out);
                before = at;
            }
        }
        if before != START {
            out.extend_from_slice(STEPS.between(before, END));
        }
    }
}

/// Before the first path.
const START: usize = PATHS.len();
/// After the last path.
const END: usize = PATHS.len();

/// What stands between the values of two fields: the end of objects, the start of others, a name.
struct Steps(Vec<Vec<u8>>);

static STEPS: LazyLock<Steps> = LazyLock::new(Steps::new);

impl Steps {
    fn new() -> Steps {
        let side = || (0..=PATHS.len()).map(|at| PATHS.get(at).copied().unwrap_or(&[]));
        Steps(side().flat_map(|from| side().map(move |to| step(from, to))).collect())
    }

    #[inline]
    fn between(&self, from: usize, to: usize) -> &[u8] {
        &self.0[from * (PATHS.len() + 1) + to]
    }
}

fn step(from: &[&str], to: &[&str]) -> Vec<u8> {
    let open = &from[..from.len().saturating_sub(1)];
    let wanted = &to[..to.len().saturating_sub(1)];
    let shared = open.iter().zip(wanted).take_while(|(left, right)| left == right).count();
    let mut text = vec![b'}'; open.len() - shared];
    let mut before = ",";
    for object in &wanted[shared..] {
        text.extend_from_slice(format!("{before}\"{object}\":{{").as_bytes());
        before = "";
    }
    if let Some(leaf) = to.last() {
        text.extend_from_slice(format!("{before}\"{leaf}\":").as_bytes());
    }
    text
}

fn slice<'a>(text: &Cow<'a, str>, from: usize, to: usize) -> Held<'a> {
    Held::Text(match text {
        Cow::Borrowed(text) => Cow::Borrowed(&text[from..to]),
        Cow::Owned(text) => Cow::Owned(text[from..to].to_owned()),
    })
}

/// A whole number from 0 that a `long` can hold.
pub fn count(text: &str) -> Option<i64> {
    let digits = (1..=19).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_key_is_found() {
        assert!(TABLE.is_sorted_by(|left, right| left.0 < right.0));
        for &(key, entry) in TABLE {
            assert_eq!(lift(key), Some(entry), "{key}");
        }
        assert_eq!(lift("waybill"), None);
        assert_eq!(lift(""), None);
    }

    #[test]
    fn objects_of_one_name_are_together() {
        assert!(PATHS.is_sorted(), "an object would be written twice");
        assert_eq!(PATHS[Field::SourceIp as usize], ["source", "ip"]);
        assert_eq!(PATHS[Field::UserAgentOriginal as usize], ["user_agent", "original"]);
        assert_eq!(PATHS[Field::UrlQuery as usize], ["url", "query"]);
    }

    #[test]
    fn counts_are_what_a_long_holds() {
        assert_eq!(count("200"), Some(200));
        assert_eq!(count("9223372036854775807"), Some(i64::MAX));
        for bad in ["", "-", "-1", "+1", "2.5", "9223372036854775808", "1e3"] {
            assert_eq!(count(bad), None, "{bad}");
        }
    }
}
