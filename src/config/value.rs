//! Single values as people type them: sizes, durations, addresses.
//!
//! The command line and TOML parse with the same functions, so that a value means the same in both.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use jiff::tz::TimeZone;
use thiserror::Error;

use super::{Endpoint, EndpointAddress, Listen, Start};
use crate::record::{Format, IndexRule, TypeName};

/// What is wrong with a value, and what is allowed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{0}")]
pub struct ValueError(pub(super) String);

fn refuse<T>(message: String) -> Result<T, ValueError> {
    Err(ValueError(message))
}

/// Units of [`size`], longest first within each letter.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// A size in bytes: `64MiB`, `5MB`, or a bare number of bytes.
pub fn size(text: &str) -> Result<u64, ValueError> {
    let (digits, unit) = split_number(text);
    let factor = match unit {
        "" => Some(1),
        _ => SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor),
    };
    match (digits.parse::<u64>().ok(), factor) {
        (Some(number), Some(factor)) => match number.checked_mul(factor) {
            Some(bytes) => Ok(bytes),
            None => refuse(format!("size {text:?} is too large")),
        },
        _ => refuse(format!(
            "size {text:?} must be a whole number with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, \
             such as 64MiB"
        )),
    }
}

/// A duration: a whole number with `ms`, `s`, `m`, `h` or `d`.
pub fn duration(text: &str) -> Result<Duration, ValueError> {
    let (digits, unit) = split_number(text);
    let milliseconds = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    match (digits.parse::<u64>().ok(), milliseconds) {
        (Some(number), Some(factor)) => match number.checked_mul(factor) {
            Some(milliseconds) => Ok(Duration::from_millis(milliseconds)),
            None => refuse(format!("duration {text:?} is too long")),
        },
        _ => refuse(format!(
            "duration {text:?} must be a whole number with ms, s, m, h or d, such as 10s"
        )),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// The URL of the side that is dialled: `wss://HOST[:PORT][/PATH]`, `ws://…` or `ws+unix:/PATH/OF.sock`.
pub fn endpoint(text: &str) -> Result<Endpoint, ValueError> {
    if let Some(socket) = text.strip_prefix("ws+unix:") {
        let socket = socket.strip_prefix("//").filter(|s| s.starts_with('/')).unwrap_or(socket);
        if !socket.starts_with('/') {
            return refuse(format!("URL {text:?} must name an absolute path: ws+unix:/run/x.sock"));
        }
        return Ok(Endpoint {
            url: text.to_owned(),
            tls: false,
            address: EndpointAddress::Unix(PathBuf::from(socket)),
            host: "localhost".to_owned(),
            path: "/".to_owned(),
            proxy: None,
        });
    }
    let (tls, rest) = if let Some(rest) = text.strip_prefix("wss://") {
        (true, rest)
    } else if let Some(rest) = text.strip_prefix("ws://") {
        (false, rest)
    } else {
        return refuse(format!(
            "URL {text:?} must start with wss://, ws:// or ws+unix:, such as wss://logs.example.com/"
        ));
    };
    let parts = authority_and_path(text, rest)?;
    let port = parts.port.unwrap_or(if tls { 443 } else { 80 });
    let path = if parts.path.starts_with('/') {
        parts.path.to_owned()
    } else {
        format!("/{}", parts.path)
    };
    Ok(Endpoint {
        url: text.to_owned(),
        tls,
        address: EndpointAddress::Tcp { host: parts.host.to_owned(), port },
        host: parts.authority.to_owned(),
        path,
        proxy: None,
    })
}

/// A sender to dial: `NAME=URL`.
pub fn dialled_sender(text: &str) -> Result<(String, Endpoint), ValueError> {
    match text.split_once('=') {
        Some((name, url)) if !name.is_empty() => Ok((name.to_owned(), endpoint(url)?)),
        _ => refuse(format!(
            "{text:?} must be NAME=URL, such as web-1=wss://web-1.example.com/, where NAME is an \
             entry of the tokens file"
        )),
    }
}

/// Host and port of an HTTP proxy's URL.
pub(super) fn proxy(text: &str) -> Result<(String, u16), ValueError> {
    let Some(rest) = text.strip_prefix("http://") else {
        return refuse(format!(
            "proxy {text:?} must be none, or start with http://, such as http://proxy:3128"
        ));
    };
    let parts = authority_and_path(text, rest)?;
    if !matches!(parts.path, "" | "/") {
        return refuse(format!("proxy {text:?} must have no path"));
    }
    Ok((parts.host.to_owned(), parts.port.unwrap_or(80)))
}

/// A base URL of Elasticsearch, without a slash at its end.
pub fn elasticsearch_url(text: &str) -> Result<String, ValueError> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let Some(rest) = rest else {
        return refuse(format!(
            "URL {text:?} must start with http:// or https://, such as http://127.0.0.1:9200"
        ));
    };
    let parts = authority_and_path(text, rest)?;
    if parts.path.contains('?') {
        return refuse(format!("URL {text:?} must have no query: name the cluster's base only"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

struct UrlParts<'t> {
    authority: &'t str,
    host: &'t str,
    port: Option<u16>,
    path: &'t str,
}

/// RFC 3986 §3.2 for what we need of it. Credentials are refused because a URL is seen by everyone
/// who lists processes.
fn authority_and_path<'t>(url: &str, rest: &'t str) -> Result<UrlParts<'t>, ValueError> {
    if url.contains('#') || url.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return refuse(format!("URL {url:?} must have no '#', space or control character"));
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority.contains('@') {
        return refuse(
            "a URL must carry no user or password: name a file that holds them (a proxy's: set them \
             in HTTPS_PROXY)"
                .to_owned(),
        );
    }
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) if host.parse::<std::net::Ipv6Addr>().is_ok() => {
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")))
        }
        Some(_) => return refuse(format!("URL {url:?} has no IPv6 address between its brackets")),
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, Some("")),
        },
    };
    let good_host = !host.is_empty()
        && (host.contains(':')
            || host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)));
    if !good_host {
        return refuse(format!("URL {url:?} has no host name or address"));
    }
    let port = match port {
        Some("") => None,
        Some(digits) => match digits.parse::<u16>().ok().filter(|port| *port > 0) {
            Some(port) => Some(port),
            None => return refuse(format!("URL {url:?} must have a port from 1 to 65535")),
        },
        None => return refuse(format!("URL {url:?} must have ':PORT' or nothing after its ']'")),
    };
    Ok(UrlParts { authority: authority.trim_end_matches(':'), host, port, path })
}

/// Whether a host is this machine without asking a resolver.
pub(super) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Where one side listens: `HOST:PORT` or `unix:PATH`.
pub fn listen(text: &str) -> Result<Listen, ValueError> {
    if let Some(path) = text.strip_prefix("unix:") {
        if path.is_empty() {
            return refuse("unix: must be followed by the socket's path".to_owned());
        }
        return Ok(Listen::Unix(PathBuf::from(path)));
    }
    socket_address(text, "HOST:PORT, [IPv6]:PORT or unix:PATH, such as 0.0.0.0:8443")
        .map(Listen::Tcp)
}

/// Where syslog arrives: `HOST:PORT`.
pub fn syslog_address(text: &str) -> Result<SocketAddr, ValueError> {
    socket_address(text, "HOST:PORT or [IPv6]:PORT, such as 0.0.0.0:514")
}

fn socket_address(text: &str, allowed: &str) -> Result<SocketAddr, ValueError> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    let has_host_and_port =
        text.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok());
    if !has_host_and_port {
        return refuse(format!("address {text:?} must be {allowed}"));
    }
    match text.to_socket_addrs().ok().and_then(|mut addresses| addresses.next()) {
        Some(address) => Ok(address),
        None => refuse(format!("address {text:?}: its host name cannot be resolved")),
    }
}

/// A TCP address to listen on: `HOST:PORT`.
pub fn tcp_address(text: &str) -> Result<SocketAddr, ValueError> {
    match listen(text)? {
        Listen::Tcp(address) => Ok(address),
        Listen::Unix(_) => refuse(format!("address {text:?} must be HOST:PORT or [IPv6]:PORT")),
    }
}

/// An IANA time zone's name.
pub fn timezone(text: &str) -> Result<String, ValueError> {
    if text == "UTC" || TimeZone::get(text).is_ok() {
        return Ok(text.to_owned());
    }
    refuse(format!(
        "time zone {text:?} is not known: use UTC or an IANA name such as Europe/Berlin"
    ))
}

/// How lines are parsed.
pub fn format(text: &str) -> Result<Format, ValueError> {
    match text {
        "auto" => Ok(Format::Auto),
        "json" => Ok(Format::Json),
        "syslog" => Ok(Format::Syslog),
        "raw" => Ok(Format::Raw),
        _ => refuse(format!("format {text:?} must be auto, json, syslog or raw")),
    }
}

/// Where a file starts at its source's first run.
pub fn start(text: &str) -> Result<Start, ValueError> {
    match text {
        "beginning" => Ok(Start::Beginning),
        "end" => Ok(Start::End),
        _ => refuse(format!("start {text:?} must be beginning or end")),
    }
}

/// Part of an index name.
pub fn type_name(text: &str) -> Result<TypeName, ValueError> {
    text.parse().map_err(|error| ValueError(format!("{error}")))
}

/// How indices are named.
pub fn index_rule(text: &str) -> Result<IndexRule, ValueError> {
    IndexRule::parse(text).map_err(|error| ValueError(error.to_string()))
}

/// The name of one index, without a type or date.
pub fn index_name(text: &str) -> Result<String, ValueError> {
    if text.contains('{') {
        return refuse(format!("index {text:?} must be one name, without braces"));
    }
    index_rule(text).map(|rule| rule.as_str().to_owned())
}

/// A path pattern as glob(7) has it.
pub fn pattern(text: &str) -> Result<String, ValueError> {
    match glob::Pattern::new(text) {
        Ok(_) if text.is_empty() => refuse("a file's path must not be empty".to_owned()),
        Ok(_) if text.contains('\0') => refuse("a path must have no NUL byte".to_owned()),
        Ok(_) => Ok(text.to_owned()),
        Err(error) => refuse(format!(
            "pattern {text:?} is wrong at character {}: {}; write [[] for a literal '['",
            error.pos + 1,
            error.msg.to_lowercase()
        )),
    }
}

/// A label: `KEY=VALUE`.
pub fn label(text: &str) -> Result<(String, String), ValueError> {
    match text.split_once('=') {
        Some((key, value)) => Ok((label_key(key)?, value.to_owned())),
        None => refuse(format!("label {text:?} must be KEY=VALUE")),
    }
}

/// A label's key: dots would make objects of it in Elasticsearch.
pub fn label_key(key: &str) -> Result<String, ValueError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if (1..=64).contains(&key.len()) && key.bytes().all(allowed) {
        Ok(key.to_owned())
    } else {
        refuse(format!("label key {key:?} must be 1 to 64 characters of letters, digits, '_', '-'"))
    }
}

/// A tag: no control characters, at most 256 bytes.
pub fn tag(text: &str) -> Result<String, ValueError> {
    if (1..=256).contains(&text.len()) && !text.chars().any(char::is_control) {
        Ok(text.to_owned())
    } else {
        refuse(format!("tag {text:?} must be 1 to 256 bytes without control characters"))
    }
}

/// Permission bits in octal: `0660`.
pub fn mode(text: &str) -> Result<u32, ValueError> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if text.len() <= 4 && mode <= 0o777 => Ok(mode),
        _ => refuse(format!("mode {text:?} must be octal permission bits such as \"0660\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says<T: std::fmt::Debug>(result: Result<T, ValueError>) -> String {
        result.expect_err("must be refused").to_string()
    }

    #[test]
    fn sizes_and_durations_have_units() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("5 MB"), Ok(5_000_000));
        assert_eq!(size("17"), Ok(17));
        assert_eq!(size("0B"), Ok(0));
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for bad in ["", "MiB", "-1", "1.5GiB", "64mib", "99999999999TiB"] {
            assert!(says(size(bad)).starts_with(&format!("size {bad:?} ")), "{bad}");
        }
        for bad in ["", "10", "s", "1 fortnight", "99999999999999999d"] {
            assert!(says(duration(bad)).starts_with(&format!("duration {bad:?} ")), "{bad}");
        }
    }

    #[test]
    fn urls_become_addresses() {
        let url = endpoint("wss://logs.example.com/ship?a=1").expect("a URL");
        assert!(url.tls);
        assert_eq!(
            url.address,
            EndpointAddress::Tcp { host: "logs.example.com".to_owned(), port: 443 }
        );
        assert_eq!((url.host.as_str(), url.path.as_str()), ("logs.example.com", "/ship?a=1"));

        let url = endpoint("ws://[::1]:8080").expect("a URL");
        assert_eq!(url.address, EndpointAddress::Tcp { host: "::1".to_owned(), port: 8080 });
        assert_eq!((url.host.as_str(), url.path.as_str()), ("[::1]:8080", "/"));

        for url in ["ws+unix:/run/waybill.sock", "ws+unix:///run/waybill.sock"] {
            let url = endpoint(url).expect("a URL");
            assert_eq!(url.address, EndpointAddress::Unix(PathBuf::from("/run/waybill.sock")));
        }
    }

    #[test]
    fn bad_urls_say_what_is_allowed() {
        for (url, expected) in [
            ("https://host/", "wss://"),
            ("wss://", "no host"),
            ("wss://host:0/", "port from 1"),
            ("wss://host:99999/", "port from 1"),
            ("wss://[::1]x/", "after its ']'"),
            ("wss://[nonsense]/", "IPv6"),
            ("wss://ho st/", "space"),
            ("wss://host/#a", "'#'"),
            ("ws+unix:run.sock", "absolute"),
        ] {
            let message = says(endpoint(url));
            assert!(message.contains(expected), "{url}: {message}");
        }
        assert!(says(elasticsearch_url("localhost:9200")).contains("http://"));
        assert_eq!(elasticsearch_url("http://a:9200/"), Ok("http://a:9200".to_owned()));
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_repeated() {
        for message in [
            says(elasticsearch_url("https://elastic:hunter2@host:9200")),
            says(endpoint("wss://me:hunter2@host/")),
        ] {
            assert!(message.contains("file"), "{message}");
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn addresses_to_listen_on() {
        assert_eq!(listen("unix:/run/w.sock"), Ok(Listen::Unix(PathBuf::from("/run/w.sock"))));
        let v6: SocketAddr = "[::]:8443".parse().expect("an address");
        assert_eq!(listen("[::]:8443"), Ok(Listen::Tcp(v6)));
        for bad in ["8443", ":8443", "host:", "host:http", "unix:"] {
            assert!(listen(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn loopback_is_told_without_a_resolver() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.com", "10.0.0.1", "0.0.0.0", "::", "127.0.0.1.nip.io"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn small_values_say_what_is_allowed() {
        assert_eq!(timezone("UTC"), Ok("UTC".to_owned()));
        assert!(says(timezone("Mars/Olympus")).contains("IANA"));
        assert!(says(pattern("/var/log/[a")).contains("literal '['"));
        assert!(says(label("novalue")).contains("KEY=VALUE"));
        assert!(says(label("a.b=c")).contains("label key"));
        assert_eq!(label("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(mode("0660"), Ok(0o660));
        for bad in ["", "888", "07777", "u+w"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
        assert!(says(index_name("a-{type}")).contains("braces"));
        assert!(says(tag("a\x1bb")).contains("control"));
    }
}
