//! The logs that web servers write unless told otherwise: common and combined access log, and
//! nginx's error log.

use std::borrow::Cow;
use std::net::IpAddr;

use memchr::memchr;

use super::ecs::{Field, Fields, Held, count};
use super::syslog::closing_quote;
use super::timestamp::{Zone, common_log, nginx_error};

/// How far into a line its time can stand: after the client, an identity and a user.
const TIME_WITHIN: usize = 256;

/// Where the `[` of an access log's time stands, if the line looks like one.
#[inline]
pub fn time_at(line: &str) -> Option<usize> {
    let bytes = line.as_bytes();
    let at = memchr(b'[', &bytes[..bytes.len().min(TIME_WITHIN)])?;
    let looks = bytes.get(at + 3) == Some(&b'/') && bytes.get(at + 7) == Some(&b'/');
    looks.then_some(at)
}

/// Reads `client identity user [time] "request" status bytes`, and the combined format's `"referrer"
/// "user agent"` where they follow. `None`, with nothing filled, where it is another line.
pub fn read<'a>(line: &'a str, time_at: usize, fields: &mut Fields<'a>) -> Option<()> {
    let (front, rest) = line.split_at_checked(time_at)?;
    let mut words = front.strip_suffix(' ')?.splitn(3, ' ');
    let (client, _identity, user) = (words.next()?, words.next()?, words.next()?);
    let (time, length) = common_log(&rest.as_bytes()[1..])?;
    let rest = rest.get(1 + length..)?.strip_prefix("] ")?;
    let (request, rest) = quoted(rest)?;
    let mut words = rest.strip_prefix(' ')?.splitn(3, ' ');
    let (status, bytes) = (count(words.next()?)?, words.next()?);
    if client.is_empty() || (bytes != "-" && count(bytes).is_none()) {
        return None;
    }

    fields.timestamp = Some(time);
    let is_address = client.parse::<IpAddr>().is_ok();
    fields.set_text(if is_address { Field::SourceIp } else { Field::SourceAddress }, client);
    fields.set_text(Field::UserName, user);
    fields.set_request_line(Cow::Borrowed(request));
    fields.set(Field::HttpResponseStatusCode, Held::Long(status));
    if let Some(bytes) = count(bytes) {
        fields.set(Field::HttpResponseBodyBytes, Held::Long(bytes));
    }
    if let Some((referrer, rest)) = words.next().and_then(quoted) {
        fields.set_text(Field::HttpRequestReferrer, referrer);
        if let Some((agent, _)) = rest.strip_prefix(' ').and_then(quoted) {
            fields.set_text(Field::UserAgentOriginal, agent);
        }
    }
    Some(())
}

/// The inside of the quotes at the front (with the server's escapes), and what follows them.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let inside = text.strip_prefix('"')?;
    let end = closing_quote(inside)?;
    Some((&inside[..end], &inside[end + 1..]))
}

/// Reads nginx's `2026/11/21 07:17:01 [error] 123#0: *5 message`; answers the process id and the
/// message. `None`, with nothing filled, where it is another line.
pub fn read_nginx_error<'a>(
    line: &'a str,
    zone: &Zone,
    fields: &mut Fields<'a>,
) -> Option<(i64, &'a str)> {
    let (time, length) = nginx_error(line.as_bytes(), zone)?;
    let (level, rest) = line[length..].strip_prefix(" [")?.split_once("] ")?;
    let (pid, rest) = rest.split_once('#')?;
    let (thread, message) = rest.split_once(": ")?;
    let pid = count(pid)?;
    count(thread)?;
    if level.is_empty() || !level.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return None;
    }
    fields.timestamp = Some(time);
    fields.set_text(Field::LogLevel, level);
    Some((pid, message))
}
