//! supervisor's event envelopes: bytes of standard input to events; no I/O.
//!
//! Two habits of supervisor 4 decide how bytes are counted here. `len` counts the characters of
//! the payload and not its UTF-8 bytes; and output that is no UTF-8 comes as Python's `repr` of
//! the bytes behind the word `Undecodable:`, which is undone.

use bytes::BytesMut;
use memchr::memchr;

/// The longest header line, in bytes: a few names and numbers.
const HEADER_BYTES_MAX: usize = 8 << 10;

/// The longest payload, in characters. supervisor reads at most 128 KiB of output at once, which
/// `repr` makes four times as long.
const PAYLOAD_CHARACTERS_MAX: usize = 4 << 20;

/// Why a stream of events cannot be followed: where the next one starts is unknown.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EventError {
    /// No header where one must stand.
    #[error(
        "no header of a supervisor event: {0:?}; run this from an [eventlistener:…] section of \
         supervisor 4, and nowhere else"
    )]
    NotAHeader(String),
    /// A payload that nobody sends.
    #[error("a supervisor event of {0} characters is over the limit of {PAYLOAD_CHARACTERS_MAX}")]
    TooLarge(u64),
}

/// One event, as supervisor sent it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Event {
    /// Such as `PROCESS_LOG_STDOUT`.
    pub name: String,
    /// Counts all events of one supervisord; the same when an event is sent again.
    pub serial: u64,
    /// Counts the events of this listener's pool: a gap is what its full buffer dropped.
    pub pool_serial: u64,
    /// `processname`, `groupname`, `pid` and `channel`, where the event has them.
    pub process: String,
    pub group: String,
    pub pid: String,
    pub channel: String,
    /// The output of a log event; of others the whole payload.
    pub data: Vec<u8>,
}

impl Event {
    /// Whether it carries a program's output.
    pub fn is_log(&self) -> bool {
        self.name.starts_with("PROCESS_LOG")
    }

    /// Whether its process has written its last.
    pub fn is_end(&self) -> bool {
        matches!(
            self.name.as_str(),
            "PROCESS_STATE_EXITED" | "PROCESS_STATE_STOPPED" | "PROCESS_STATE_FATAL"
        )
    }
}

/// Collects bytes until they are whole events; holds one event and one read.
#[derive(Debug, Default)]
pub(super) struct Events {
    buffer: BytesMut,
}

impl Events {
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event; `None` when more bytes are needed.
    pub fn next(&mut self) -> Result<Option<Event>, EventError> {
        let head = &self.buffer[..self.buffer.len().min(HEADER_BYTES_MAX)];
        let Some(newline) = memchr(b'\n', head) else {
            if head.len() == HEADER_BYTES_MAX {
                return Err(not_a_header(head));
            }
            return Ok(None);
        };
        let header = String::from_utf8_lossy(&head[..newline]).into_owned();
        let number = |key| field(&header, key)?.parse::<u64>().ok();
        let (Some(name), Some(serial), Some(pool_serial), Some(length)) =
            (field(&header, "eventname"), number("serial"), number("poolserial"), number("len"))
        else {
            return Err(not_a_header(header.as_bytes()));
        };
        let characters = match usize::try_from(length) {
            Ok(characters) if characters <= PAYLOAD_CHARACTERS_MAX => characters,
            _ => return Err(EventError::TooLarge(length)),
        };
        let Some(end) = end_of_characters(&self.buffer[newline + 1..], characters) else {
            return Ok(None);
        };
        let payload = self.buffer.split_to(newline + 1 + end).split_off(newline + 1);
        Ok(Some(event(name, serial, pool_serial, &payload)))
    }
}

fn not_a_header(bytes: &[u8]) -> EventError {
    EventError::NotAHeader(String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned())
}

fn event(name: &str, serial: u64, pool_serial: u64, payload: &[u8]) -> Event {
    let newline = memchr(b'\n', payload).unwrap_or(payload.len());
    let header = String::from_utf8_lossy(&payload[..newline]).into_owned();
    let text = |key| field(&header, key).unwrap_or_default().to_owned();
    let mut event = Event {
        name: name.to_owned(),
        serial,
        pool_serial,
        process: text("processname"),
        group: text("groupname"),
        pid: text("pid"),
        channel: text("channel"),
        data: payload.to_vec(),
    };
    if event.is_log() {
        let output = payload.get(newline + 1..).unwrap_or_default();
        event.data = undecodable(output).unwrap_or_else(|| output.to_vec());
    }
    event
}

/// The value of `key:value` among words with a space between them.
fn field<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    header.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix(':'))
}

/// Where `count` characters of UTF-8 end; `None` where more bytes are needed.
fn end_of_characters(bytes: &[u8], count: usize) -> Option<usize> {
    let mut at = 0;
    for _ in 0..count {
        at += match bytes.get(at)? {
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0.. => 4,
            _ => 1,
        };
    }
    (at <= bytes.len()).then_some(at)
}

/// The bytes behind `Undecodable: b'…'`; `None` where it is a program's own text. Only bytes that
/// are no UTF-8 are ever sent so, which a program that imitates the form would have to match.
fn undecodable(output: &[u8]) -> Option<Vec<u8>> {
    let quoted = output.strip_prefix(b"Undecodable: b")?;
    let (&quote, inside) = quoted.split_first()?;
    let inside = inside.strip_suffix(&[quote]).filter(|_| matches!(quote, b'\'' | b'"'))?;
    let mut bytes = Vec::with_capacity(inside.len());
    let mut rest = inside.iter();
    while let Some(&byte) = rest.next() {
        match byte {
            b'\\' => bytes.push(match rest.next()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'x' => {
                    let digits = [*rest.next()?, *rest.next()?];
                    u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
                }
                &itself @ (b'\\' | b'\'' | b'"') => itself,
                _ => return None,
            }),
            b' '..=b'~' => bytes.push(byte),
            _ => return None,
        }
    }
    std::str::from_utf8(&bytes).is_err().then_some(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An envelope as supervisor 4.2 writes it.
    pub fn envelope(name: &str, serial: u64, payload: &str) -> Vec<u8> {
        format!(
            "ver:3.0 server:supervisor serial:{serial} pool:waybill poolserial:{serial} \
             eventname:{name} len:{}\n{payload}",
            payload.chars().count(),
        )
        .into_bytes()
    }

    fn log(output: &str) -> String {
        format!("processname:web_00 groupname:web pid:77 channel:stdout\n{output}")
    }

    #[test]
    fn the_length_counts_characters() {
        let mut events = Events::default();
        let first = envelope("PROCESS_LOG_STDOUT", 1, &log("grüße 𝄞\n"));
        let second = envelope("PROCESS_LOG_STDOUT", 2, &log("next\n"));
        let whole = [first, second].concat();
        // Byte by byte: no cut, not even within a character, is mistaken for the end.
        let mut found = Vec::new();
        for byte in whole {
            events.extend(&[byte]);
            found.extend(events.next().expect("events"));
        }
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].data, "grüße 𝄞\n".as_bytes());
        assert_eq!((found[1].serial, found[1].data.as_slice()), (2, &b"next\n"[..]));
        assert_eq!(
            (found[0].process.as_str(), found[0].group.as_str(), found[0].pid.as_str()),
            ("web_00", "web", "77")
        );
        assert_eq!(found[0].channel, "stdout");
    }

    #[test]
    fn undecodable_output_gets_its_bytes_back() {
        let one = |output: &str| {
            let mut events = Events::default();
            events.extend(&envelope("PROCESS_LOG_STDERR", 1, &log(output)));
            events.next().expect("an event").expect("whole").data
        };
        assert_eq!(one(r"Undecodable: b'caf\xe9\n\t\\x\'\x00'"), b"caf\xe9\n\t\\x'\x00");
        assert_eq!(one(r#"Undecodable: b"it's \xff""#), b"it's \xff");
        // What a program says itself, or what is UTF-8 after all, stays what it is.
        for own in ["Undecodable: b'plain'", "Undecodable: b'\\q\\xff'", "Undecodable: b'", "x"] {
            assert_eq!(one(own), own.as_bytes());
        }
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for bad in ["GET / HTTP/1.1\r\n", "ver:3.0 serial:1 poolserial:1 eventname:X len:many\n"] {
            let mut events = Events::default();
            events.extend(bad.as_bytes());
            assert!(matches!(events.next(), Err(EventError::NotAHeader(_))), "{bad}");
        }
        let mut events = Events::default();
        events.extend(&[b'x'; HEADER_BYTES_MAX]);
        assert!(events.next().is_err());
        let mut events = Events::default();
        events.extend(b"ver:3.0 serial:1 poolserial:1 eventname:X len:99999999999\n");
        assert_eq!(events.next(), Err(EventError::TooLarge(99_999_999_999)));
    }
}
