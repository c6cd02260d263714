//! How a byte stream from a socket or a pipe becomes records for the spool; no I/O.

use bytes::BytesMut;
use memchr::memchr;

use crate::record::RECORD_BYTES_MAX;

/// Room for one read, in bytes.
const READ_BYTES: usize = 64 << 10;

/// More digits than the longest record has are no octet count.
const COUNT_DIGITS_MAX: usize = 10;

/// Splits one peer's bytes; holds at most one longest record and one read.
#[derive(Debug)]
pub(super) struct Framer {
    mode: Mode,
    buffer: BytesMut,
    /// No newline lies before this.
    searched: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Unknown,
    /// RFC 6587 §3.4.2: a newline ends each record.
    Lines,
    /// RFC 6587 §3.4.1: each record is announced by its length.
    Counted,
}

/// An octet count that cannot be followed: where the next record starts is unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum FramingError {
    #[error("octet count {0} is over the limit of {RECORD_BYTES_MAX} bytes")]
    TooLarge(u64),
    #[error("no octet count where one must stand (RFC 6587 §3.4.1)")]
    NotACount,
}

enum Header {
    /// So many bytes of header announce so many of message.
    Count(usize, u64),
    /// More bytes are needed.
    Partial,
    Wrong,
}

impl Framer {
    /// Newlines end records.
    pub fn lines() -> Framer {
        Framer { mode: Mode::Lines, buffer: BytesMut::new(), searched: 0 }
    }

    /// The first bytes tell: `LENGTH <` starts an octet-counted syslog message, all else is lines.
    /// The `<` is asked for since many a plain line starts with digits, a date above all.
    pub fn detecting() -> Framer {
        Framer { mode: Mode::Unknown, ..Framer::lines() }
    }

    /// Where the next read goes.
    pub fn space(&mut self) -> &mut BytesMut {
        self.buffer.reserve(READ_BYTES);
        &mut self.buffer
    }

    /// The next whole record, never empty; `None` when more bytes are needed.
    pub fn next(&mut self) -> Result<Option<BytesMut>, FramingError> {
        loop {
            let record = match self.mode {
                Mode::Unknown => match self.detect() {
                    Some(mode) => {
                        self.mode = mode;
                        continue;
                    }
                    None => return Ok(None),
                },
                Mode::Lines => self.line(),
                Mode::Counted => self.counted()?,
            };
            match record {
                Some(record) if record.is_empty() => {}
                other => return Ok(other),
            }
        }
    }

    /// What is left when no more bytes come: the last line without its newline, or the part that
    /// came of a counted message. May be longer than a record.
    pub fn finish(mut self) -> BytesMut {
        if self.mode == Mode::Counted
            && let Header::Count(header, _) = self.header()
        {
            return self.buffer.split_off(header);
        }
        self.buffer
    }

    fn detect(&self) -> Option<Mode> {
        match self.header() {
            Header::Count(header, _) => self.buffer.get(header).map(|&byte| match byte {
                b'<' => Mode::Counted,
                _ => Mode::Lines,
            }),
            Header::Partial => None,
            Header::Wrong => Some(Mode::Lines),
        }
    }

    fn line(&mut self) -> Option<BytesMut> {
        let end = self.buffer.len().min(RECORD_BYTES_MAX + 1);
        match memchr(b'\n', &self.buffer[self.searched..end]) {
            Some(found) => {
                let mut line = self.buffer.split_to(self.searched + found + 1);
                line.truncate(line.len() - 1);
                self.searched = 0;
                Some(line)
            }
            None if self.buffer.len() > RECORD_BYTES_MAX => {
                self.searched = 0;
                Some(self.buffer.split_to(RECORD_BYTES_MAX))
            }
            None => {
                self.searched = end;
                None
            }
        }
    }

    fn counted(&mut self) -> Result<Option<BytesMut>, FramingError> {
        let (header, count) = match self.header() {
            Header::Count(header, count) => (header, count),
            Header::Partial => return Ok(None),
            Header::Wrong => return Err(FramingError::NotACount),
        };
        let length = match usize::try_from(count) {
            Ok(length) if length <= RECORD_BYTES_MAX => length,
            _ => return Err(FramingError::TooLarge(count)),
        };
        if self.buffer.len() < header + length {
            return Ok(None);
        }
        let mut message = self.buffer.split_to(header + length).split_off(header);
        if message.last() == Some(&b'\n') {
            message.truncate(message.len() - 1);
        }
        Ok(Some(message))
    }

    /// `MSG-LEN SP` at the front of the buffer.
    fn header(&self) -> Header {
        let mut count = 0;
        for (at, &byte) in self.buffer.iter().enumerate() {
            match byte {
                b'0' if at == 0 => return Header::Wrong,
                b'0'..=b'9' if at < COUNT_DIGITS_MAX => count = count * 10 + u64::from(byte - b'0'),
                b' ' if at > 0 => return Header::Count(at + 1, count),
                _ => return Header::Wrong,
            }
        }
        Header::Partial
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `bytes` in pieces of `size`; the records, the rest, and the error that ended it.
    fn run(bytes: &[u8], size: usize) -> (Vec<Vec<u8>>, Vec<u8>, Option<FramingError>) {
        let mut framer = Framer::detecting();
        let mut records = Vec::new();
        for piece in bytes.chunks(size) {
            framer.space().extend_from_slice(piece);
            loop {
                match framer.next() {
                    Ok(Some(record)) => records.push(record.to_vec()),
                    Ok(None) => break,
                    Err(error) => return (records, framer.finish().to_vec(), Some(error)),
                }
            }
        }
        (records, framer.finish().to_vec(), None)
    }

    #[test]
    fn newlines_end_records_and_the_rest_is_the_last_line() {
        let (records, rest, error) = run(b"<13>one\r\n\ntwo\nlast", 1000);
        assert_eq!(records, [&b"<13>one\r"[..], b"two"]);
        assert_eq!((rest.as_slice(), error), (&b"last"[..], None));
    }

    #[test]
    fn octet_counts_are_followed_through_newlines() {
        let (records, rest, error) = run(b"8 <13>a\nb\n7 <13>c\n\n12 <13>half", 1000);
        assert_eq!(records[0], b"<13>a\nb");
        assert_eq!(records[1], b"<13>c\n");
        assert_eq!((rest.as_slice(), error), (&b"<13>half"[..], None));
    }

    #[test]
    fn a_line_that_starts_with_a_number_is_a_line() {
        for line in
            [&b"2026-11-21 08:00 up"[..], b"200 OK", b"12", b"12 ", b"0 <13>x", b"99999999999"]
        {
            let with_newline = [line, b"\n"].concat();
            assert_eq!(run(&with_newline, 1000).0, [line]);
        }
    }

    #[test]
    fn a_count_that_lies_ends_the_stream_and_keeps_what_came() {
        let (records, rest, error) = run(b"5 <13>a99999999 <13>b", 1000);
        assert_eq!(records, [b"<13>a"]);
        assert_eq!(rest, b"<13>b");
        assert_eq!(error, Some(FramingError::TooLarge(99_999_999)));
        let (records, rest, error) = run(b"5 <13>a<13>b no count", 1000);
        assert_eq!(records, [b"<13>a"]);
        assert_eq!(rest, b"<13>b no count");
        assert_eq!(error, Some(FramingError::NotACount));
    }

    #[test]
    fn an_endless_line_is_cut_at_the_limit() {
        let bytes = vec![b'x'; 2 * RECORD_BYTES_MAX + 5];
        let (records, rest, _) = run(&bytes, READ_BYTES);
        assert_eq!(records.iter().map(Vec::len).collect::<Vec<_>>(), [RECORD_BYTES_MAX; 2]);
        assert_eq!(rest.len(), 5);
        // A line of exactly the limit is whole.
        let exact = [&bytes[..RECORD_BYTES_MAX], b"\nnext\n"].concat();
        assert_eq!(run(&exact, 1000).0[1], b"next");
    }

    proptest! {
        /// Records never depend on how a peer's writes were cut into reads.
        #[test]
        fn reads_do_not_matter(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'\n'), Just(b'1'), Just(b'4'), Just(b' '), Just(b'<'), Just(b'x')],
                0..60,
            ),
            size in 1_usize..20,
        ) {
            let (records, rest, error) = run(&bytes, 1000);
            let (same_records, same_rest, same_error) = run(&bytes, size);
            prop_assert_eq!((records, error), (same_records, same_error));
            // Behind an error a reader stops where it happens to be.
            prop_assert!(error.is_some() || rest == same_rest);
        }
    }
}
