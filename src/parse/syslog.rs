//! Syslog headers: RFC 5424, RFC 3164 with and without its priority, and the forms in which
//! syslog-ng, rsyslog and nginx write them.
//!
//! A header is read whole or not at all: what does not fit is `None`, and the line is raw.

use std::sync::LazyLock;

use super::escape::write_string;
use super::timestamp::{Millis, Zone, iso, rfc3164};

/// Bytes of a host name or tag in a header that we take for one.
const WORD_BYTES_MAX: usize = 255;
/// Parameters of one line's structured data.
const PARAMS_MAX: usize = 200;

/// A line's header, and where its message starts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Header<'a> {
    pub timestamp: Option<Millis>,
    /// 0 to 191.
    pub priority: Option<u8>,
    /// RFC 5424 only.
    pub version: Option<&'a str>,
    pub hostname: Option<&'a str>,
    /// RFC 5424's APP-NAME, RFC 3164's tag.
    pub appname: Option<&'a str>,
    pub procid: Option<&'a str>,
    pub msgid: Option<&'a str>,
    pub structured_data: Vec<Param<'a>>,
    pub message: &'a str,
}

/// One parameter of structured data (RFC 5424 §6.3.3). An element without any has one whose name
/// is empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Param<'a> {
    id: &'a str,
    name: &'a str,
    /// With its escapes.
    value: &'a str,
}

/// What a time without a year or a zone is understood by.
#[derive(Clone, Copy, Debug)]
pub struct Clock<'a> {
    pub zone: &'a Zone,
    /// Days since 1970.
    pub near: i64,
}

/// Reads a line that starts with `<PRI>`.
pub fn with_priority<'a>(line: &'a str, clock: Clock<'_>) -> Option<Header<'a>> {
    let inside = line.strip_prefix('<')?;
    let close = inside.bytes().take(4).position(|byte| byte == b'>')?;
    let (digits, rest) = inside.split_at(close);
    let all_digits = (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let priority =
        all_digits.then(|| digits.parse().ok()).flatten().filter(|&pri: &u8| pri <= 191)?;
    let rest = &rest[1..];
    let version = rest.bytes().take_while(u8::is_ascii_digit).count();
    let header = if (1..=3).contains(&version) && rest[version..].starts_with(' ') {
        rfc5424(&rest[..version], &rest[version + 1..], clock.zone)?
    } else {
        // RFC 3164 §4.3: what has no timestamp is all message; the priority still counts.
        let (timestamp, message) = match stamp(rest, clock) {
            Some((time, length)) => (Some(time), &rest[length..]),
            None => (None, rest),
        };
        let body = match (timestamp, message.strip_prefix(' ')) {
            (Some(_), Some(body)) => host_and_tag(body),
            (Some(_), None) => Header { message, ..Header::default() },
            (None, _) => tag_only(message),
        };
        Header { timestamp, ..body }
    };
    Some(Header { priority: Some(priority), ..header })
}

/// Reads a line that starts with a timestamp, as files have it. Unless `any_word` may be a host, one
/// is only taken for it where a tag follows: many programs write a time and then their own things.
pub fn without_priority<'a>(line: &'a str, clock: Clock<'_>, any_word: bool) -> Option<Header<'a>> {
    let (time, length) = stamp(line, clock)?;
    let body = line[length..].strip_prefix(' ')?;
    let header = host_and_tag(body);
    if header.appname.is_none() && !any_word {
        // The time is certain, the rest is not.
        return Some(Header { timestamp: Some(time), message: line, ..Header::default() });
    }
    Some(Header { timestamp: Some(time), ..header })
}

fn stamp(text: &str, clock: Clock<'_>) -> Option<(Millis, usize)> {
    match text.as_bytes().first()? {
        b'0'..=b'9' => iso(text.as_bytes(), clock.zone),
        _ => rfc3164(text.as_bytes(), clock.zone, clock.near),
    }
}

/// `host tag[pid]: message`, `tag[pid]: message` (nginx's `nohostname`), or `host message`.
fn host_and_tag(body: &str) -> Header<'_> {
    let header = tag_only(body);
    if header.appname.is_some() {
        return header;
    }
    let Some((host, rest)) = body.split_once(' ') else {
        return header;
    };
    if !is_host(host) {
        return header;
    }
    // syslogd's own "last message repeated" has no tag and, from some, no host.
    if host == "last" && rest.starts_with("message repeated") {
        return header;
    }
    Header { hostname: Some(host), ..tag_only(rest) }
}

fn is_host(word: &str) -> bool {
    const LEVELS: [&str; 10] = [
        "TRACE", "DEBUG", "INFO", "NOTICE", "WARN", "WARNING", "ERROR", "CRITICAL", "FATAL",
        "PANIC",
    ];
    let allowed = |b: u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'/' | b'@' | b'%')
    };
    (1..=WORD_BYTES_MAX).contains(&word.len())
        && word != "-"
        && word.bytes().all(allowed)
        && !LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word))
}

/// `tag[pid]: message`; without a tag all of it is message.
fn tag_only(body: &str) -> Header<'_> {
    tagged(body).unwrap_or(Header { message: body, ..Header::default() })
}

fn tagged(body: &str) -> Option<Header<'_>> {
    let end = body.bytes().take(WORD_BYTES_MAX).position(|b| matches!(b, b' ' | b':' | b'['))?;
    let (tag, rest) = body.split_at_checked(end).filter(|(tag, _)| !tag.is_empty())?;
    if tag.bytes().any(|b| !b.is_ascii_graphic() || matches!(b, b'"' | b'{' | b'=')) {
        return None;
    }
    let (procid, rest) = match rest.strip_prefix('[') {
        Some(inside) => {
            let close = inside.bytes().take(WORD_BYTES_MAX).position(|b| b == b']')?;
            let procid = &inside[..close];
            let is_word = !procid.is_empty() && procid.bytes().all(|b| b.is_ascii_graphic());
            (Some(procid).filter(|_| is_word).map(Some)?, &inside[close + 1..])
        }
        None => (None, rest),
    };
    let message = match rest.strip_prefix(':') {
        Some(message) => message,
        None => procid.and(Some(rest))?,
    };
    // "10:20" and "http://x" are no tags; nginx's own tag may touch its JSON.
    let separated = matches!(message.as_bytes().first(), None | Some(b' ' | b'{' | b'\t'));
    let message = message.strip_prefix(' ').unwrap_or(message);
    separated.then_some(Header { appname: Some(tag), procid, message, ..Header::default() })
}

fn rfc5424<'a>(version: &'a str, text: &'a str, zone: &Zone) -> Option<Header<'a>> {
    let mut rest = text;
    let mut word = || {
        let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = after;
        let is_word = !word.is_empty() && word.bytes().all(|b| b.is_ascii_graphic());
        is_word.then_some(word)
    };
    let nil = |word: &'a str| (word != "-").then_some(word);
    let timestamp = match nil(word()?) {
        None => None,
        Some(text) => {
            let (time, length) = iso(text.as_bytes(), zone)?;
            (length == text.len()).then_some(Some(time))?
        }
    };
    let (hostname, appname) = (nil(word()?), nil(word()?));
    let (procid, msgid) = (nil(word()?), nil(word()?));
    let (structured_data, rest) = match rest.strip_prefix('-') {
        Some(rest) => (Vec::new(), rest),
        None => structured_data(rest)?,
    };
    let message = match rest.strip_prefix(' ') {
        Some(message) => message.strip_prefix('\u{feff}').unwrap_or(message),
        None if rest.is_empty() => "",
        None => return None,
    };
    Some(Header {
        timestamp,
        version: Some(version),
        hostname,
        appname,
        procid,
        msgid,
        structured_data,
        message,
        priority: None,
    })
}

/// `[id name="value" …]…` (RFC 5424 §6.3), and what follows it.
fn structured_data(text: &str) -> Option<(Vec<Param<'_>>, &str)> {
    let mut params = Vec::new();
    let mut rest = text;
    while let Some(element) = rest.strip_prefix('[') {
        let (id, mut tail) = sd_name(element)?;
        params.push(Param { id, name: "", value: "" });
        while let Some(param) = tail.strip_prefix(' ') {
            let (name, quoted) = sd_name(param)?;
            let quoted = quoted.strip_prefix("=\"")?;
            let end = closing_quote(quoted)?;
            params.push(Param { id, name, value: &quoted[..end] });
            tail = &quoted[end + 1..];
        }
        if params.len() > PARAMS_MAX {
            return None;
        }
        rest = tail.strip_prefix(']')?;
    }
    (!params.is_empty()).then_some((params, rest))
}

fn sd_name(text: &str) -> Option<(&str, &str)> {
    let is_name = |b: u8| b.is_ascii_graphic() && !matches!(b, b'=' | b']' | b'"');
    let end = text.bytes().take_while(|&b| is_name(b)).count();
    (1..=WORD_BYTES_MAX).contains(&end).then(|| text.split_at(end))
}

/// Where the quote stands that ends a string in which a backslash takes the next byte with it.
pub fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })
}

impl Header<'_> {
    /// Appends `,"syslog":{…}` unless there is nothing to say.
    pub fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(b",\"syslog\":{");
        if let Some(text) = self.priority.and_then(|code| PRIORITIES.get(usize::from(code))) {
            out.extend_from_slice(text.as_bytes());
        }
        for (name, value) in [
            (",\"version\":", self.version),
            (",\"hostname\":", self.hostname),
            (",\"appname\":", self.appname),
            (",\"procid\":", self.procid),
            (",\"msgid\":", self.msgid),
        ] {
            if let Some(value) = value {
                let comma = usize::from(out.last() == Some(&b'{'));
                out.extend_from_slice(&name.as_bytes()[comma..]);
                write_string(value, out);
            }
        }
        if !self.structured_data.is_empty() {
            key("structured_data", out);
            write_structured_data(&self.structured_data, out);
        }
        if out.ends_with(b"{") {
            out.truncate(start);
        } else {
            out.push(b'}');
        }
    }
}

fn key(name: &str, out: &mut Vec<u8>) {
    if !out.ends_with(b"{") {
        out.push(b',');
    }
    write_string(name, out);
    out.push(b':');
}

/// An object per SD-ID. RFC 5424 lets names repeat: their values become an array.
fn write_structured_data(params: &[Param<'_>], out: &mut Vec<u8>) {
    out.push(b'{');
    for (at, param) in params.iter().enumerate() {
        if params[..at].iter().any(|before| before.id == param.id) {
            continue;
        }
        key(param.id, out);
        out.push(b'{');
        let of_id = |other: &&Param<'_>| other.id == param.id && !other.name.is_empty();
        for (at, first) in params.iter().enumerate().filter(|(_, other)| of_id(other)) {
            if params[..at].iter().filter(of_id).any(|before| before.name == first.name) {
                continue;
            }
            key(first.name, out);
            let mut same =
                params[at..].iter().filter(of_id).filter(|other| other.name == first.name);
            let repeats = same.clone().count() > 1;
            if repeats {
                out.push(b'[');
            }
            for (at, param) in same.by_ref().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write_string(&sd_value(param.value), out);
            }
            if repeats {
                out.push(b']');
            }
        }
        out.push(b'}');
    }
    out.push(b'}');
}

/// Only `\"`, `\\` and `\]` are escapes (RFC 5424 §6.3.3); any other backslash is itself.
fn sd_value(raw: &str) -> String {
    let mut value = String::with_capacity(raw.len());
    let mut characters = raw.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, characters.peek()) {
            ('\\', Some(&next @ ('"' | '\\' | ']'))) => {
                value.push(next);
                characters.next();
            }
            _ => value.push(character),
        }
    }
    value
}

/// What each `<PRI>` becomes.
static PRIORITIES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let text = |priority: usize| {
        let (facility, severity) = (priority / 8, priority % 8);
        format!(
            r#""facility":{{"code":{facility},"name":"{}"}},"severity":{{"code":{severity},"name":"{}"}},"priority":{priority}"#,
            FACILITIES[facility], SEVERITIES[severity],
        )
    };
    (0..8 * FACILITIES.len()).map(text).collect()
});

/// RFC 5424 §6.2.1, by the names of syslog.h.
const FACILITIES: [&str; 24] = [
    "kern",
    "user",
    "mail",
    "daemon",
    "auth",
    "syslog",
    "lpr",
    "news",
    "uucp",
    "cron",
    "authpriv",
    "ftp",
    "ntp",
    "security",
    "console",
    "solaris-cron",
    "local0",
    "local1",
    "local2",
    "local3",
    "local4",
    "local5",
    "local6",
    "local7",
];

const SEVERITIES: [&str; 8] =
    ["emergency", "alert", "critical", "error", "warning", "notice", "informational", "debug"];

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: Clock<'static> = Clock { zone: &Zone::Fixed(0), near: 20_778 };

    fn words(header: &Header<'_>) -> String {
        let word = |word: Option<&str>| word.unwrap_or("-").to_owned();
        [header.hostname, header.appname, header.procid, Some(header.message)].map(word).join("|")
    }

    #[test]
    fn rfc_3164_in_the_forms_that_are_written() {
        for (line, expected) in [
            (
                "<34>Oct 11 22:14:15 mymachine su: 'su root' failed",
                "mymachine|su|-|'su root' failed",
            ),
            ("<13>Feb  5 17:32:18 10.0.0.99 Use the BFG!", "10.0.0.99|-|-|Use the BFG!"),
            ("<190>Nov 21 07:17:01 nginx: {\"ip\":1}", "-|nginx|-|{\"ip\":1}"),
            ("<190>Nov 21 07:17:01 web1 nginx: {}", "web1|nginx|-|{}"),
            ("<190>Nov 21 07:17:01 web1 nginx:{}", "web1|nginx|-|{}"),
            ("<30>Nov 21 07:17:01 h postfix/smtpd[12]: hi", "h|postfix/smtpd|12|hi"),
            ("<30>Nov 21 07:17:01 h a[x-1] hi", "h|a|x-1|hi"),
            ("<30>2026-11-21T07:17:01+00:00 h a: hi", "h|a|-|hi"),
            ("<30>Nov 21 07:17:01 fe80::1 a: hi", "fe80::1|a|-|hi"),
            ("<30>Nov 21 07:17:01 h at 10:20 o'clock", "h|-|-|at 10:20 o'clock"),
            (
                "<30>Nov 21 07:17:01 last message repeated 3 times",
                "-|-|-|last message repeated 3 times",
            ),
            ("<30>Nov 21 07:17:01", "-|-|-|"),
            ("<30>app: no time", "-|app|-|no time"),
            ("<0>", "-|-|-|"),
        ] {
            let header = with_priority(line, CLOCK).unwrap_or_else(|| panic!("{line}"));
            assert_eq!(words(&header), expected, "{line}");
        }
        for bad in [
            "<192>x",
            "<>x",
            "<1234>x",
            "<-1>x",
            "<",
            "<1",
            "<é>",
            "<13é",
            "<aaaé>",
            "<30>1 not a date",
        ] {
            assert_eq!(with_priority(bad, CLOCK), None, "{bad}");
        }
    }

    #[test]
    fn a_word_after_a_time_is_a_host_only_before_a_tag() {
        for (line, expected) in [
            ("2026-11-21T07:17:01Z web1 app[5]: hi", "web1|app|5|hi"),
            ("2026-11-21T07:17:01Z INFO main: hi", "-|-|-|2026-11-21T07:17:01Z INFO main: hi"),
            ("2026-11-21 07:17:01,123 hello there", "-|-|-|2026-11-21 07:17:01,123 hello there"),
            ("Nov 21 07:17:01 web1 CRON[1]: x", "web1|CRON|1|x"),
        ] {
            let header = without_priority(line, CLOCK, false).unwrap_or_else(|| panic!("{line}"));
            assert_eq!(words(&header), expected, "{line}");
            assert!(header.timestamp.is_some());
        }
        let loose = without_priority("Nov 21 07:17:01 web1 x y", CLOCK, true).expect("a header");
        assert_eq!(words(&loose), "web1|-|-|x y");
        assert_eq!(without_priority("Nov 41 07:17:01 web1 x: y", CLOCK, true), None);
    }

    #[test]
    fn structured_data_keeps_every_value() {
        let (params, rest) =
            structured_data(r#"[a@1 x="1" y="\"\\\]\n" x="2"][b][a@1 z=""] hi"#).expect("SD");
        assert_eq!(rest, " hi");
        let mut out = Vec::new();
        write_structured_data(&params, &mut out);
        assert_eq!(
            String::from_utf8(out).expect("UTF-8"),
            r#"{"a@1":{"x":["1","2"],"y":"\"\\]\\n","z":""},"b":{}}"#
        );
        for bad in ["[]", "[a", "[a b]", "[a b=c]", "[a b=\"c]", "[a b=\"c\"", "x"] {
            assert_eq!(structured_data(bad), None, "{bad}");
        }
    }
}
