//! Where a stream reads: a file or a spool segment, checked after every read.
//!
//! Blocking; called from the blocking pool. A read that disagrees with what is known of the file
//! is thrown away before a byte of it is framed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::protocol::{DataFrame, FRAME_BYTES_TARGET, FRAME_HEADER_BYTES, FrameFlags};
use crate::record::framing::Whole;
use crate::record::{END_MAX, Framing, SegmentId};
use crate::source::files::fingerprint::{
    FINGERPRINT_BYTES, PREFIX_BYTES_MAX, fingerprint, first_bytes,
};
use crate::source::files::tail::Tail;
use crate::spool::{Chunk, Spool};
use crate::state::Fingerprint;

/// A run of bytes that can be read again and again.
#[derive(Debug)]
pub enum Origin {
    /// A file that somebody else writes.
    File(FileOrigin),
    /// What is left of a deleted file, in the state directory.
    Kept(KeptOrigin),
    /// A segment of a spool.
    Spool {
        /// The spool.
        spool: Arc<Spool>,
        /// Which of its segments.
        segment: SegmentId,
    },
}

/// An open file with its first bytes as they are known.
#[derive(Debug)]
pub struct FileOrigin {
    /// The file.
    pub tail: Tail,
    first: Vec<u8>,
}

/// A copy of a deleted file's unreceipted end.
#[derive(Debug)]
pub struct KeptOrigin {
    /// The copy.
    pub file: File,
    /// The offset of its first byte in the run.
    pub from: u64,
}

/// What to read.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where.
    pub from: u64,
    /// Not past here, where that is known: the end of the segment, a cut, or of a range that is
    /// read again.
    pub to: Option<u64>,
    /// How many bytes to ask for.
    pub want: usize,
    /// The first byte that was never sent: `from`, but for a range that is read again.
    pub frontier: u64,
    /// What the (at most 64) bytes before the frontier were.
    pub before: Vec<u8>,
    /// What the bytes before `to` must be, where known.
    pub expect: Option<Fingerprint>,
    /// The segment's framing.
    pub framing: Framing,
    /// The segment's handle on this connection.
    pub handle: u32,
    /// This range was sent before.
    pub resend: bool,
    /// Compress the frame.
    pub compress: bool,
}

/// Whole records, framed.
#[derive(Debug)]
pub struct Framed {
    /// The binary message.
    pub message: Bytes,
    /// The records in it.
    pub records: Bytes,
    /// One past the last byte.
    pub to: u64,
    /// Of the bytes before `to`.
    pub fingerprint: Fingerprint,
    /// The last (at most 64) bytes before `to`.
    pub before: Vec<u8>,
    /// The first record goes on from one that was cut.
    pub continues: bool,
}

/// What a read found.
#[derive(Debug)]
pub enum Read {
    /// Records to send.
    Framed(Framed),
    /// A run of NUL bytes up to here: nothing to send.
    Nul {
        /// One past the last of them.
        to: u64,
    },
    /// A damaged or missing stretch up to here: a loss to report.
    Lost {
        /// Where reading goes on.
        to: u64,
    },
    /// More bytes must be asked for to see a whole record.
    Needs(usize),
    /// No whole record yet; so many bytes of one.
    Partial(u64),
    /// The run has ended before `from`.
    End,
    /// The next record ends behind what an id can name.
    PastEndMax,
    /// The file is no longer what it was: recognise it again.
    Disagrees,
}

impl FileOrigin {
    /// Takes a file that was recognised just now.
    pub fn new(mut tail: Tail) -> io::Result<FileOrigin> {
        let first = first_bytes(&mut tail)?;
        Ok(FileOrigin { tail, first })
    }

    /// The first bytes known by now, at most 1 KiB.
    pub fn first(&self) -> &[u8] {
        &self.first
    }

    /// Whether size, first bytes and the bytes before the frontier still agree after a read up to
    /// `end`.
    pub fn agrees(&mut self, end: u64, frontier: u64, before: &[u8]) -> io::Result<bool> {
        if self.tail.is_compressed() {
            return self.tail.is_unchanged();
        }
        if self.tail.size()? < end {
            return Ok(false);
        }
        let mut first = vec![0; PREFIX_BYTES_MAX];
        let read = self.tail.read_at(0, &mut first)?;
        first.truncate(read);
        if !first.starts_with(&self.first) {
            return Ok(false);
        }
        self.first = first;
        let mut now = [0; FINGERPRINT_BYTES];
        let now = &mut now[..before.len()];
        let read = self.tail.read_at(frontier - before.len() as u64, now)?;
        Ok(read == before.len() && now == before)
    }
}

impl Origin {
    /// The last (at most 64) bytes before an offset.
    pub fn before(&mut self, offset: u64) -> io::Result<Vec<u8>> {
        let start = offset.saturating_sub(FINGERPRINT_BYTES as u64);
        let mut before = vec![0; (offset - start) as usize];
        let read = match self {
            Origin::File(file) => file.tail.read_at(start, &mut before)?,
            Origin::Kept(kept) if start >= kept.from => kept.read_at(start, &mut before)?,
            // Spool records carry checksums of their own; a copy begins before the position.
            Origin::Kept(_) | Origin::Spool { .. } => 0,
        };
        before.truncate(read);
        Ok(before)
    }

    /// Reads and frames. See [`Read`].
    pub fn read(&mut self, request: &Request) -> io::Result<Read> {
        match self {
            Origin::Spool { spool, segment } => read_spool(spool, *segment, request),
            Origin::File(_) | Origin::Kept(_) => self.read_bytes(request),
        }
    }

    fn read_bytes(&mut self, request: &Request) -> io::Result<Read> {
        let from = request.from;
        let room = request.to.map_or(u64::MAX, |to| to.saturating_sub(from));
        let addressable = END_MAX.saturating_sub(from);
        let want = request.want.min(usize::try_from(room.min(addressable)).unwrap_or(usize::MAX));
        let mut message = Vec::with_capacity(FRAME_HEADER_BYTES + want);
        message.resize(FRAME_HEADER_BYTES, 0);
        match self {
            Origin::File(file) => file.tail.append_at(from, want, &mut message)?,
            Origin::Kept(kept) => {
                message.resize(FRAME_HEADER_BYTES + want, 0);
                let read = kept.read_at(from, &mut message[FRAME_HEADER_BYTES..])?;
                message.truncate(FRAME_HEADER_BYTES + read);
            }
            Origin::Spool { .. } => {}
        }
        let read = message.len() - FRAME_HEADER_BYTES;
        let read_at = now_ms();
        let before = if request.resend { self.before(from)? } else { request.before.clone() };
        if let Origin::File(file) = self
            && !file.agrees(from + read as u64, request.frontier, &request.before)?
        {
            return Ok(Read::Disagrees);
        }
        if request.resend {
            let whole = read as u64 == room;
            let framed = frame(message, request, &before, read_at);
            let same = request.expect.is_none_or(|expect| framed.fingerprint == expect);
            return Ok(if whole && same { Read::Framed(framed) } else { Read::Disagrees });
        }
        if read == 0 && room == 0 {
            return Ok(Read::End);
        }
        let is_past = read as u64 == addressable && self.has_byte_at(END_MAX.max(from))?;
        if read == 0 {
            return Ok(if is_past { Read::PastEndMax } else { Read::Partial(0) });
        }
        let bytes = &message[FRAME_HEADER_BYTES..];
        let length = match request.framing.whole(bytes) {
            Whole::Bytes(length) => length,
            // What stands before a recorded end is a record, with or without its newline.
            Whole::Needs(_) if read as u64 == room => read,
            Whole::Needs(_) if is_past => return Ok(Read::PastEndMax),
            Whole::Needs(needs) if read == want => return Ok(Read::Needs(needs)),
            Whole::Needs(_) | Whole::Corrupt => return Ok(Read::Partial(read as u64)),
        };
        if bytes[0] == 0 && bytes[..length].iter().all(|&byte| byte == 0) {
            return Ok(Read::Nul { to: from + length as u64 });
        }
        message.truncate(FRAME_HEADER_BYTES + length);
        Ok(Read::Framed(frame(message, request, &before, read_at)))
    }

    fn has_byte_at(&mut self, offset: u64) -> io::Result<bool> {
        let mut byte = [0];
        let read = match self {
            Origin::File(file) => file.tail.read_at(offset, &mut byte)?,
            Origin::Kept(kept) => kept.read_at(offset, &mut byte)?,
            Origin::Spool { .. } => 0,
        };
        Ok(read > 0)
    }
}

impl KeptOrigin {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(at) = offset.checked_sub(self.from) else { return Ok(0) };
        let mut read = 0;
        while read < buffer.len() {
            match self.file.read_at(&mut buffer[read..], at + read as u64) {
                Ok(0) => break,
                Ok(length) => read += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }
}

fn read_spool(spool: &Spool, segment: SegmentId, request: &Request) -> io::Result<Read> {
    let limit = request.to.map_or(request.want, |to| (to - request.from) as usize);
    let records = match spool.read(segment, request.from, limit.max(1))? {
        Chunk::Records(records) => records,
        Chunk::Bad { end } => return Ok(Read::Lost { to: end }),
        Chunk::Wait => return Ok(Read::Partial(0)),
        Chunk::End => return Ok(Read::End),
    };
    let records = match request.to {
        // A range is sent again as it was: its end is the end of a record.
        Some(to) if request.resend => &records[..records.len().min((to - request.from) as usize)],
        _ => &records[..],
    };
    if records.len() > request.want.max(FRAME_BYTES_TARGET) && !request.resend {
        return Ok(Read::Needs(records.len()));
    }
    let mut message = Vec::with_capacity(FRAME_HEADER_BYTES + records.len());
    message.resize(FRAME_HEADER_BYTES, 0);
    message.extend_from_slice(records);
    Ok(Read::Framed(frame(message, request, &[], now_ms())))
}

/// Writes the header and notes what the next read is compared with. `before` are the (at most 64)
/// bytes before the records.
fn frame(message: Vec<u8>, request: &Request, before: &[u8], read_at: u64) -> Framed {
    let records = &message[FRAME_HEADER_BYTES..];
    let to = request.from + records.len() as u64;
    let ends = ends_with(before, records);
    // After a newline or a NUL run a record is a new one.
    let continues = matches!(request.framing, Framing::Lines { .. })
        && before.last().is_some_and(|&byte| byte != b'\n' && byte != 0);
    let flags = FrameFlags { zstd: false, resend: request.resend, continues };
    let message = DataFrame::encode_in_place(message, request.handle, flags, request.from, read_at);
    let records = message.slice(FRAME_HEADER_BYTES..);
    let message = if request.compress {
        let (handle, offset, records) = (request.handle, request.from, records.clone());
        DataFrame { handle, flags, offset, read_at, records }.encode(true)
    } else {
        message
    };
    let fingerprint = fingerprint_or_short(to, &ends);
    Framed { message, records, to, fingerprint, before: ends, continues }
}

/// The last 64 bytes of `before` followed by `records`.
fn ends_with(before: &[u8], records: &[u8]) -> Vec<u8> {
    if records.len() >= FINGERPRINT_BYTES {
        return records[records.len() - FINGERPRINT_BYTES..].to_vec();
    }
    let mut joined = before.to_vec();
    joined.extend_from_slice(records);
    let excess = joined.len().saturating_sub(FINGERPRINT_BYTES);
    joined.drain(..excess);
    joined
}

/// In spools and kept copies fewer bytes than 64 may be known before an offset; their content is
/// not recognised by fingerprints.
pub fn fingerprint_or_short(offset: u64, before: &[u8]) -> Fingerprint {
    if before.len() as u64 >= offset.min(FINGERPRINT_BYTES as u64) {
        fingerprint(offset, before)
    } else {
        Fingerprint { offset, hash: 0 }
    }
}

/// The machine's clock in milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn origin(path: &Path) -> Origin {
        let tail = Tail::open(path, false).expect("open");
        Origin::File(FileOrigin::new(tail).expect("first bytes"))
    }

    fn request(from: u64, frontier: u64, before: &[u8]) -> Request {
        Request {
            from,
            to: None,
            want: FRAME_BYTES_TARGET,
            frontier,
            before: before.to_vec(),
            expect: None,
            framing: Framing::LINES,
            handle: 1,
            resend: false,
            compress: false,
        }
    }

    fn framed(read: Read) -> Framed {
        match read {
            Read::Framed(framed) => framed,
            other => panic!("not framed: {other:?}"),
        }
    }

    /// Sends `text` as two frames that meet at `middle`, and asks for the second one again.
    fn twice(text: &[u8], middle: usize) -> (Framed, Framed) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        fs::write(&path, text).expect("write");
        let mut origin = origin(&path);
        let mut request = request(0, 0, b"");
        request.to = Some(middle as u64);
        let first = framed(origin.read(&request).expect("read"));
        let mut request = self::request(first.to, first.to, &first.before);
        request.to = Some(text.len() as u64);
        let second = framed(origin.read(&request).expect("read"));
        let mut again = self::request(first.to, second.to, &second.before);
        again.to = Some(second.to);
        again.want = (second.to - first.to) as usize;
        again.expect = Some(second.fingerprint);
        again.resend = true;
        let again = framed(origin.read(&again).expect("read"));
        (second, again)
    }

    #[test]
    fn a_range_shorter_than_a_fingerprint_is_read_again() {
        let text = [vec![b'x'; 200], b"\nshort\n".to_vec()].concat();
        let (first, again) = twice(&text, 201);
        assert_eq!(first.records, &b"short\n"[..]);
        assert_eq!(again.records, first.records);
        assert_eq!(again.fingerprint, first.fingerprint);
    }

    #[test]
    fn what_goes_on_from_a_cut_still_does_when_it_is_read_again() {
        let (first, again) = twice(b"cut here", 4);
        assert!(first.continues && again.continues);
    }

    #[test]
    fn a_part_of_a_frame_is_not_taken_from_another_generation() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let text = |tag: &str| format!("{}{}", "header\n".repeat(200), tag.repeat(100));
        fs::write(&path, text("one\n")).expect("write");
        let mut origin = origin(&path);
        let sent = framed(origin.read(&request(0, 0, b"")).expect("read"));
        // Truncated and grown again, with the same first bytes.
        fs::write(&path, text("two\n")).expect("write");
        // A deferred part in the middle of a frame has no fingerprint of its own.
        let mut again = request(1404, sent.to, &sent.before);
        again.to = Some(1412);
        again.want = 8;
        again.resend = true;
        assert!(matches!(origin.read(&again).expect("read"), Read::Disagrees));
    }
}
