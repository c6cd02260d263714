//! One file as a run of bytes: plain, or decompressed as it is read.

use std::fs::{File, Metadata};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::buffer::spare_capacity;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::descriptors;
use crate::record::framing::{RECORD_BYTES_MAX, Whole};
use crate::record::{Day, END_MAX, Framing};
use crate::state::Stamp;

/// How far back from an offset the newline before it is sought.
const BOUNDARY_SCAN_BYTES: u64 = 16 * RECORD_BYTES_MAX as u64;

/// Why a file is not followed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It is not there (any more).
    #[error("no such file")]
    Gone,
    /// A symbolic link, and those are not followed.
    #[error("is a symbolic link: name its target, or allow it with --follow-symlinks")]
    Symlink,
    /// A folder, socket, device or pipe.
    #[error("is not a regular file")]
    NotRegular,
    /// This process may not read it, or not enter one of its folders.
    #[error(
        "user id {uid} may not read it: put that user into its group, or run `setfacl -m \
         u:{uid}:rX` on it and its folders", uid = rustix::process::geteuid().as_raw()
    )]
    Denied,
    /// Not now: there is no descriptor for it.
    #[error("cannot be opened: {0}; {advice}", advice = descriptors::advice(.0).unwrap_or_default())]
    Exhausted(io::Error),
    /// Anything else.
    #[error("cannot be read: {0}")]
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> OpenError {
        match error.kind() {
            io::ErrorKind::PermissionDenied => OpenError::Denied,
            _ if descriptors::advice(&error).is_some() => OpenError::Exhausted(error),
            _ => OpenError::Io(error),
        }
    }
}

/// Device and inode: proposes who a file is, and never decides it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Inode {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl Inode {
    /// Of an open file or a path.
    pub fn of(metadata: &Metadata) -> Inode {
        Inode { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// How a file is compressed, told by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// `.gz`, RFC 1952.
    Gzip,
    /// `.zst`, RFC 8878.
    Zstd,
    /// `.xz`.
    Xz,
}

impl Compression {
    /// By the name's ending.
    pub fn of(path: &Path) -> Option<Compression> {
        match path.extension()?.to_str()? {
            "gz" => Some(Compression::Gzip),
            "zst" => Some(Compression::Zstd),
            "xz" => Some(Compression::Xz),
            _ => None,
        }
    }
}

/// An open file. All methods may block on the disk.
pub struct Tail {
    file: Arc<File>,
    path: PathBuf,
    inode: Inode,
    born: u64,
    decoder: Option<Decoder>,
}

impl Tail {
    /// Opens a regular file. Opening first and asking afterwards leaves no moment in which the
    /// name could come to mean another file; `O_NONBLOCK` keeps a pipe from holding us up.
    pub fn open(path: &Path, follow_symlinks: bool) -> Result<Tail, OpenError> {
        let mut flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if !follow_symlinks {
            flags |= OFlags::NOFOLLOW;
        }
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Err(OpenError::Gone),
            Err(rustix::io::Errno::LOOP) => return Err(OpenError::Symlink),
            Err(rustix::io::Errno::NXIO) => return Err(OpenError::NotRegular),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(OpenError::NotRegular);
        }
        let decoder = Compression::of(path).map(|kind| Decoder::new(kind, &metadata));
        let inode = Inode::of(&metadata);
        let (file, path) = (Arc::new(file), path.to_owned());
        Ok(Tail { file, path, inode, born: born(&metadata), decoder })
    }

    /// The path under which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file as it is stored, for as long as it is open here.
    pub fn stored(&self) -> Weak<File> {
        Arc::downgrade(&self.file)
    }

    /// Its device and inode.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// When its inode was made, in nanoseconds since 1970; 0 where the file system does not tell.
    pub fn born(&self) -> u64 {
        self.born
    }

    /// Whether its bytes are decompressed.
    pub fn is_compressed(&self) -> bool {
        self.decoder.is_some()
    }

    /// Reads up to `buffer.len()` (decompressed) bytes at `offset`; fewer only at the end.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.decoder {
            Some(decoder) => decoder.read_at(&self.file, offset, buffer),
            None => {
                let mut read = 0;
                while read < buffer.len() {
                    match self.file.read_at(&mut buffer[read..], offset + read as u64) {
                        Ok(0) => break,
                        Ok(length) => read += length,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(read)
            }
        }
    }

    /// Appends up to `want` (decompressed) bytes at `offset`; fewer only at the end. A large read
    /// goes into memory that nobody has filled with zeros before.
    pub fn append_at(&mut self, offset: u64, want: usize, to: &mut Vec<u8>) -> io::Result<()> {
        let start = to.len();
        if let Some(decoder) = &mut self.decoder {
            to.resize(start + want, 0);
            let read = decoder.read_at(&self.file, offset, &mut to[start..])?;
            to.truncate(start + read);
            return Ok(());
        }
        to.reserve(want);
        while to.len() < start + want {
            let at = offset + (to.len() - start) as u64;
            match rustix::io::pread(&self.file, spare_capacity(to), at) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // There may have been more room than was asked for.
        to.truncate(start + want);
        Ok(())
    }

    /// Where its bytes end now. A compressed file does not grow, and its length is known only
    /// after it was read to its end: until then [`u64::MAX`].
    pub fn size(&self) -> io::Result<u64> {
        match &self.decoder {
            Some(decoder) => Ok(decoder.length.unwrap_or(u64::MAX)),
            None => Ok(self.file.metadata()?.len()),
        }
    }

    /// Whether a compressed file is still what it was when it was opened; plain files may change.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        match &self.decoder {
            Some(decoder) => Ok(decoder.stamp == Stamp::of(&self.file.metadata()?)),
            None => Ok(true),
        }
    }

    /// How many names it has; 0 means that it is deleted.
    pub fn links(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.nlink())
    }

    /// When it was changed last.
    pub fn modified(&self) -> io::Result<SystemTime> {
        self.file.metadata()?.modified()
    }

    /// The UTC day of its last change.
    pub fn day(&self) -> io::Result<Day> {
        self.modified().map(Day::of)
    }

    /// Size and time of the last change, of the file as it is stored.
    pub fn stamp(&self) -> io::Result<Stamp> {
        Ok(Stamp::of(&self.file.metadata()?))
    }

    /// The end of the last whole record before `end`, not before `floor`, which is the end of one;
    /// and never past what a segment can hold.
    ///
    /// A process that dies before the boundary is durable leaves its successor another floor, and
    /// nothing that it sent may lie astride the boundary found then (I3). So records are counted
    /// from the newline before `end` as frames count them, whatever the floor. A hole, or a line
    /// without end, must not hold up the sender: the newline is sought for
    /// [`BOUNDARY_SCAN_BYTES`]. Where there is none, they are counted from a multiple of their
    /// limit in the file, which is the same at each computation. NUL bytes have no ids; of a line
    /// as long as that, one piece may be stored twice after a crash, in two lengths.
    pub fn last_boundary(&mut self, floor: u64, end: u64) -> io::Result<u64> {
        let limit = RECORD_BYTES_MAX as u64;
        let end = end.min(END_MAX).max(floor);
        let start = (end.saturating_sub(BOUNDARY_SCAN_BYTES) / limit * limit).max(floor);
        let mut at = self.last_newline(start, end)?.map_or(start, |newline| newline + 1);
        let mut buffer = vec![0; RECORD_BYTES_MAX + 1];
        loop {
            let wanted = (end - at).min(buffer.len() as u64) as usize;
            let read = self.read_at(at, &mut buffer[..wanted])?;
            match Framing::LINES.whole(&buffer[..read]) {
                Whole::Bytes(length) => at += length as u64,
                Whole::Needs(_) | Whole::Corrupt => return Ok(at),
            }
        }
    }

    fn last_newline(&mut self, start: u64, mut end: u64) -> io::Result<Option<u64>> {
        let mut buffer = vec![0; 64 << 10];
        while end > start {
            let from = end.saturating_sub(buffer.len() as u64).max(start);
            let read = self.read_at(from, &mut buffer[..(end - from) as usize])?;
            if let Some(newline) = memchr::memrchr(b'\n', &buffer[..read]) {
                return Ok(Some(from + newline as u64));
            }
            end = from;
        }
        Ok(None)
    }
}

fn born(metadata: &Metadata) -> u64 {
    let since = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tail").field("path", &self.path).field("inode", &self.inode).finish()
    }
}

/// Reads forwards; an offset behind it starts over.
struct Decoder {
    kind: Compression,
    /// A compressed file that changes is another file.
    stamp: Stamp,
    stream: Option<Box<dyn Read + Send + Sync>>,
    at: u64,
    length: Option<u64>,
}

impl Decoder {
    fn new(kind: Compression, metadata: &Metadata) -> Decoder {
        Decoder { kind, stamp: Stamp::of(metadata), stream: None, at: 0, length: None }
    }

    fn read_at(&mut self, file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if self.length.is_some_and(|length| offset >= length) {
            return Ok(0);
        }
        if self.at > offset {
            self.stream = None;
        }
        if self.stream.is_none() {
            self.stream = Some(self.start(file)?);
            self.at = 0;
        }
        let mut skipped = vec![0; if self.at < offset { 64 << 10 } else { 0 }];
        while self.at < offset {
            let wanted = skipped.len().min((offset - self.at) as usize);
            if self.fill(&mut skipped[..wanted])? < wanted {
                return Ok(0);
            }
        }
        self.fill(buffer)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stream) = &mut self.stream else { return Ok(0) };
        let mut read = 0;
        while read < buffer.len() {
            match stream.read(&mut buffer[read..]) {
                Ok(0) => {
                    self.length = Some(self.at + read as u64);
                    break;
                }
                Ok(length) => read += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Nothing is known of the stream's place any more.
                    self.stream = None;
                    return Err(error);
                }
            }
        }
        self.at += read as u64;
        Ok(read)
    }

    fn start(&self, file: &File) -> io::Result<Box<dyn Read + Send + Sync>> {
        // By pread: a duplicated descriptor would share its place with the original.
        let reader =
            BufReader::with_capacity(64 << 10, FromStart { file: file.try_clone()?, at: 0 });
        Ok(match self.kind {
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Compression::Zstd => Box::new(zstd::Decoder::with_buffer(reader)?),
            Compression::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(reader)),
        })
    }
}

struct FromStart {
    file: File,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn read_all(tail: &mut Tail, from: u64, chunk: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = vec![0; chunk];
        loop {
            let read = tail.read_at(from + all.len() as u64, &mut buffer).expect("read");
            all.extend_from_slice(&buffer[..read]);
            if read < chunk {
                return all;
            }
        }
    }

    #[test]
    fn appending_reads_what_reading_does() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("log");
        std::fs::write(&path, b"0123456789").expect("written");
        let mut tail = Tail::open(&path, false).expect("opened");
        let mut appended = |offset, want, room| {
            let mut to = Vec::with_capacity(room);
            to.push(b'>');
            tail.append_at(offset, want, &mut to).expect("read");
            String::from_utf8(to).expect("ASCII")
        };
        assert_eq!(appended(2, 3, 4), ">234");
        assert_eq!(appended(2, 3, 100), ">234", "room is no wish");
        assert_eq!(appended(8, 5, 1), ">89", "the end");
        assert_eq!(appended(10, 5, 6), ">");
        assert_eq!(appended(0, 0, 1), ">");
    }

    #[test]
    fn compressed_files_read_like_plain_ones() {
        let dir = tempfile::tempdir().expect("a folder");
        let text: Vec<u8> = (0..30_000).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
        let gz = dir.path().join("a.gz");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&text).expect("gzip");
        // Two members, as `cat a.gz b.gz` makes them (RFC 1952 §2.2).
        let mut members = encoder.finish().expect("gzip");
        members.extend_from_within(..);
        fs::write(&gz, members).expect("write");
        let zst = dir.path().join("a.zst");
        fs::write(&zst, zstd::bulk::compress(&text, 1).expect("zstd")).expect("write");
        let xz = dir.path().join("a.xz");
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&text).expect("xz");
        fs::write(&xz, encoder.finish().expect("xz")).expect("write");

        for (path, times) in [(gz, 2), (zst, 1), (xz, 1)] {
            let whole = text.repeat(times);
            let mut tail = Tail::open(&path, false).expect("open");
            assert_eq!(tail.size().expect("size"), u64::MAX);
            assert_eq!(read_all(&mut tail, 0, 1000), whole, "{path:?}");
            assert_eq!(tail.size().expect("size"), whole.len() as u64);
            // Backwards, too.
            assert_eq!(read_all(&mut tail, 777, 65_537), whole[777..], "{path:?}");
            assert_eq!(tail.read_at(u64::MAX, &mut [0]).expect("past the end"), 0);
        }
    }

    #[test]
    fn what_is_no_regular_file_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("file");
        fs::write(&file, "x\n").expect("write");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).expect("link");
        assert!(matches!(Tail::open(&link, false), Err(OpenError::Symlink)));
        assert!(Tail::open(&link, true).is_ok());
        assert!(matches!(Tail::open(dir.path(), false), Err(OpenError::NotRegular)));
        assert!(matches!(Tail::open(&dir.path().join("no"), false), Err(OpenError::Gone)));
    }

    #[test]
    fn the_last_boundary_is_found_backwards() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let mut text = b"first\n".to_vec();
        text.extend(std::iter::repeat_n(b'x', 200_000));
        fs::write(&path, &text).expect("write");
        let mut tail = Tail::open(&path, false).expect("open");
        assert_eq!(tail.last_boundary(0, text.len() as u64).expect("scan"), 6);
        assert_eq!(tail.last_boundary(10, text.len() as u64).expect("scan"), 10);
    }

    #[test]
    fn the_last_boundary_is_where_frames_cut_whatever_was_sent() {
        const LIMIT: u64 = RECORD_BYTES_MAX as u64;
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let file = File::create_new(&path).expect("a file");
        let x = vec![b'x'; 3 * RECORD_BYTES_MAX + 7];
        file.write_all_at(b"first\n", 0).expect("write");
        file.write_all_at(&x, 6).expect("write");
        let mut tail = Tail::open(&path, false).expect("open");
        for sent in [0, 6, 6 + LIMIT, 6 + 2 * LIMIT, 6 + 3 * LIMIT] {
            let at = tail.last_boundary(sent, 6 + x.len() as u64).expect("scan");
            assert_eq!(at, 6 + 3 * LIMIT, "sent up to {sent}");
        }
        // NUL bytes are a record, and a line may start behind them.
        file.write_all_at(b"\n\0\0\0end", 6 + x.len() as u64).expect("write");
        let end = tail.size().expect("size");
        assert_eq!(tail.last_boundary(0, end).expect("scan"), end - 3);
    }

    /// A hole of 1 TiB held a sender up for minutes.
    #[test]
    fn a_boundary_is_not_sought_without_end() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let file = File::create_new(&path).expect("a file");
        let end = 32 << 30;
        file.write_all_at(b"first\nbegun", 0).expect("write");
        file.set_len(end).expect("a hole");
        let mut tail = Tail::open(&path, false).expect("open");
        assert_eq!(tail.last_boundary(0, end).expect("scan"), end);
        file.write_all_at(b"last", end).expect("write");
        assert_eq!(tail.last_boundary(0, end + 4).expect("scan"), end);
        // Without a hole either: then the cut is a multiple of the limit.
        let long = vec![b'x'; 2 * BOUNDARY_SCAN_BYTES as usize];
        file.write_all_at(&long, end + 4).expect("write");
        let size = tail.size().expect("size");
        for floor in [0, end, end + (1 << 20)] {
            let at = tail.last_boundary(floor, size).expect("scan");
            assert_eq!(at, end + long.len() as u64, "not before {floor}");
        }
        file.set_len(END_MAX + 10).expect("a larger hole");
        assert_eq!(tail.last_boundary(0, END_MAX + 10).expect("scan"), END_MAX);
    }
}
