//! A destination that answers `_bulk` at once, so that what is measured is the way to it.
//!
//! It answers as the real one does: one whole item per document, cut down by `filter_path`. It
//! counts documents and keeps their ids, so that a run that lost or doubled a line is found out.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, bail, ensure};

/// Where the counts are asked for.
pub const COUNT_PATH: &str = "/_bench/count";
/// Where the ids are compared, which takes a moment.
pub const DISTINCT_PATH: &str = "/_bench/distinct";
/// Forgets everything.
pub const RESET_PATH: &str = "/_bench/reset";

/// The longest header of a request, in bytes.
const HEADER_BYTES_MAX: usize = 16 << 10;

#[derive(Default)]
struct Counts {
    documents: AtomicU64,
    /// Of all documents that had an id.
    ids: Mutex<Vec<Id>>,
}

type Id = [u8; 32];

/// Prints its port, then serves until it is killed.
pub fn run() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("the sink needs a port")?;
    println!("{}", listener.local_addr()?.port());
    let counts = Arc::new(Counts::default());
    for stream in listener.incoming() {
        let (stream, counts) = (stream?, Arc::clone(&counts));
        thread::spawn(move || {
            // A connection that ends in the middle of a request is the client's affair: it shows
            // in the counts.
            let _ = Connection::new(stream).serve(&counts);
        });
    }
    Ok(())
}

struct Connection {
    stream: TcpStream,
    /// What was read and not yet understood: `buffer[..filled]`.
    buffer: Vec<u8>,
    filled: usize,
    answer: Vec<u8>,
}

struct Request {
    method: String,
    target: String,
    /// Where the body starts and how long it is.
    header_length: usize,
    body_length: usize,
    waits_for_continue: bool,
}

impl Connection {
    fn new(stream: TcpStream) -> Connection {
        Connection { stream, buffer: vec![0; 64 << 10], filled: 0, answer: Vec::new() }
    }

    fn serve(&mut self, counts: &Counts) -> anyhow::Result<()> {
        self.stream.set_nodelay(true)?;
        while let Some(request) = self.request()? {
            let length = request.header_length + request.body_length;
            if request.waits_for_continue && self.filled < length {
                self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            self.fill(length)?;
            let body = &self.buffer[request.header_length..length];
            self.answer.clear();
            let status = answer(&request, body, counts, &mut self.answer)?;
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                self.answer.len()
            );
            self.stream.write_all(head.as_bytes())?;
            self.stream.write_all(&self.answer)?;
            self.buffer.copy_within(length..self.filled, 0);
            self.filled -= length;
        }
        Ok(())
    }

    /// The next request's header; `None` where the client has gone.
    fn request(&mut self) -> anyhow::Result<Option<Request>> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.buffer[..self.filled], b"\r\n\r\n") {
                return head(&self.buffer[..at + 4]).map(Some);
            }
            ensure!(self.filled < HEADER_BYTES_MAX, "a header that does not end");
            if self.read_some()? == 0 {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self, length: usize) -> anyhow::Result<()> {
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        while self.filled < length {
            ensure!(self.read_some()? > 0, "the body is cut");
        }
        Ok(())
    }

    fn read_some(&mut self) -> io::Result<usize> {
        let read = self.stream.read(&mut self.buffer[self.filled..])?;
        self.filled += read;
        Ok(read)
    }
}

fn head(bytes: &[u8]) -> anyhow::Result<Request> {
    let text = std::str::from_utf8(bytes)?;
    let mut lines = text.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target)) = (first.next(), first.next()) else { bail!("no HTTP") };
    let mut request = Request {
        method: method.to_owned(),
        target: target.to_owned(),
        header_length: bytes.len(),
        body_length: 0,
        waits_for_continue: false,
    };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        match name.to_ascii_lowercase().as_str() {
            "content-length" => request.body_length = value.trim().parse()?,
            "expect" => request.waits_for_continue = true,
            "transfer-encoding" => bail!("the sink takes no chunked bodies"),
            _ => {}
        }
    }
    Ok(request)
}

fn answer(
    request: &Request,
    body: &[u8],
    counts: &Counts,
    out: &mut Vec<u8>,
) -> anyhow::Result<&'static str> {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    match (request.method.as_str(), path) {
        ("POST", "/_bulk") if body.is_empty() => {
            out.extend_from_slice(
                br#"{"error":{"type":"parse_exception","reason":"request body is required"},"status":400}"#,
            );
            return Ok("400 Bad Request");
        }
        ("POST", "/_bulk") => bulk(body, query.contains("filter_path="), counts, out)?,
        ("GET", COUNT_PATH) => {
            write!(out, "{}", counts.documents.load(Ordering::Relaxed))?;
        }
        ("GET", DISTINCT_PATH) => {
            let ids = counts.ids.lock().unwrap_or_else(PoisonError::into_inner);
            write!(out, "{}", ids.iter().collect::<HashSet<_>>().len())?;
        }
        ("GET", RESET_PATH) => {
            counts.documents.store(0, Ordering::Relaxed);
            *counts.ids.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
        }
        _ => {
            out.extend_from_slice(
                br#"{"error":{"type":"index_not_found_exception"},"status":404}"#,
            );
            return Ok("404 Not Found");
        }
    }
    Ok("200 OK")
}

/// Answers every document with `created`.
fn bulk(body: &[u8], filtered: bool, counts: &Counts, out: &mut Vec<u8>) -> anyhow::Result<()> {
    let before = counts.documents.load(Ordering::Relaxed);
    let mut ids: Vec<Id> = Vec::new();
    let mut number = 0;
    out.extend_from_slice(if filtered {
        br#"{"errors":false,"items":["#.as_slice()
    } else {
        br#"{"took":0,"errors":false,"items":["#
    });
    let mut ends = memchr::memchr_iter(b'\n', body);
    let mut at = 0;
    while let Some(end) = ends.next() {
        let action = &body[at..end];
        let Some(document) = ends.next() else { bail!("an action without a document") };
        ensure!(body[end + 1] == b'{' && body[document - 1] == b'}', "not a document");
        at = document + 1;
        let (verb, index, id) = parts(action).context("an action the sink does not know")?;
        if number > 0 {
            out.push(b',');
        }
        let made;
        let id = match id {
            Some(id) => {
                ids.push(id.try_into().context("an id of another length than 32")?);
                id
            }
            None => {
                made = format!("{:020}", before + number);
                made.as_bytes()
            }
        };
        for piece in [br#"{""#.as_slice(), verb, br#"":{"_index":""#, index] {
            out.extend_from_slice(piece);
        }
        if !filtered {
            out.extend_from_slice(br#"","_id":""#);
            out.extend_from_slice(id);
            out.extend_from_slice(br#"","_version":1"#);
        } else {
            out.push(b'"');
        }
        out.extend_from_slice(br#","result":"created""#);
        if !filtered {
            out.extend_from_slice(
                br#","_shards":{"total":2,"successful":1,"failed":0},"_seq_no":"#,
            );
            out.extend_from_slice(itoa::Buffer::new().format(before + number).as_bytes());
            out.extend_from_slice(br#","_primary_term":1"#);
        }
        out.extend_from_slice(br#","status":201}}"#);
        number += 1;
    }
    ensure!(at == body.len(), "a line that does not end");
    out.extend_from_slice(b"]}");
    counts.ids.lock().unwrap_or_else(PoisonError::into_inner).append(&mut ids);
    counts.documents.fetch_add(number, Ordering::Relaxed);
    Ok(())
}

/// Index, id and, where there is one, the rest of an action line.
type Parts<'a> = (&'a [u8], &'a [u8], Option<&'a [u8]>);

/// Verb, index and id of `{"create":{"_index":"a","_id":"b"}}`.
fn parts(action: &[u8]) -> Option<Parts<'_>> {
    let rest = action.strip_prefix(br#"{""#)?;
    let (verb, rest) = until(rest, br#"":{"_index":""#)?;
    let quote = memchr::memchr(b'"', rest)?;
    let (index, rest) = rest.split_at(quote);
    match rest.strip_prefix(br#"","_id":""#) {
        Some(rest) => Some((verb, index, Some(until(rest, b"\"}}")?.0))),
        None => Some((verb, index, None)),
    }
}

fn until<'a>(bytes: &'a [u8], mark: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = memchr::memmem::find(bytes, mark)?;
    Some((&bytes[..at], &bytes[at + mark.len()..]))
}
