//! Posts against a real spool: what is answered, and what lies in the spool by then.

use std::io;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::*;
use crate::record::Framing;
use crate::spool::{Budget, Chunk};

const JSON: &str = "Content-Type: application/x-ndjson\r\n";

struct Running {
    _dir: TempDir,
    address: SocketAddr,
    spool: Arc<Spool>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), SourceError>>,
}

fn start(budget: u64) -> Running {
    let dir = TempDir::new().expect("dir");
    let spool = Spool::open(&dir.path().join("spool"), Arc::new(Budget::new(budget)));
    let spool = Arc::new(spool.expect("spool"));
    let intake = HttpIntake::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
    let address = intake.address;
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(intake.run(spool.clone(), shutdown.clone()));
    Running { _dir: dir, address, spool, shutdown, task }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connect")
    }

    async fn post(&self, headers: &str, body: &[u8]) -> (u16, String) {
        exchange(&mut self.connect().await, "POST / HTTP/1.1", headers, body).await.expect("answer")
    }

    /// What is synced: time, key, payload.
    fn spooled(&self) -> Vec<(u64, Vec<u8>, Vec<u8>)> {
        let mut records = Vec::new();
        for segment in self.spool.segments() {
            let mut at = segment.start;
            while let Chunk::Records(bytes) =
                self.spool.read(segment.id, at, 65536).expect("readable")
            {
                records.extend(Framing::SPOOL.records(&bytes, at, false).map(|record| {
                    let time = record.time.expect("a spool record has a time");
                    (time, record.key.to_vec(), record.payload.to_vec())
                }));
                at += bytes.len() as u64;
            }
        }
        records
    }

    fn payloads(&self) -> Vec<Vec<u8>> {
        self.spooled().into_iter().map(|(.., payload)| payload).collect()
    }

    /// As if everything were receipted.
    fn release(&self) {
        for segment in self.spool.segments() {
            self.spool.release(segment.id, u64::MAX).expect("released");
        }
    }
}

/// One request and its answer: status, and head with body.
async fn exchange(
    stream: &mut TcpStream,
    request: &str,
    headers: &str,
    body: &[u8],
) -> io::Result<(u16, String)> {
    let length = body.len();
    let head = format!("{request}\r\nHost: x\r\nContent-Length: {length}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    answer(stream).await
}

async fn answer(stream: &mut TcpStream) -> io::Result<(u16, String)> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
            if body.len() >= length.expect("a length").parse::<usize>().expect("a number") {
                let status = head.split(' ').nth(1).expect("a status").parse().expect("digits");
                return Ok((status, text));
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[tokio::test]
async fn lines_are_synced_before_they_are_answered() {
    let running = start(1 << 20);
    let (status, text) = running.post("", b"one\ntwo\r\n\n\xff three").await;
    assert_eq!((status, text.contains("3 lines")), (200, true), "{text}");
    assert_eq!(running.payloads(), [&b"one"[..], b"two\r", b"\xff three"]);
    assert!(running.spooled().iter().all(|(_, key, _)| key.is_empty()));
}

#[tokio::test]
async fn objects_carry_their_key_and_time_into_the_spool() {
    let running = start(1 << 20);
    let body = "{\"time\":\"1795250808.089\",\"line\":\"a\",\"key\":\"k@1\"}\n\
                {\"line\":\"b\",\"key\":\"k@2\"}\nc";
    assert_eq!(running.post(JSON, body.as_bytes()).await.0, 200);
    let records = running.spooled();
    assert_eq!(records[0], (1_795_250_808_089, b"k@1".to_vec(), b"a".to_vec()));
    assert_eq!((&records[1].1[..], &records[1].2[..]), (&b""[..], &b"b"[..]));
    assert_eq!((&records[2].1[..], &records[2].2[..]), (&b""[..], &b"c"[..]));
}

#[tokio::test]
async fn pieces_of_a_long_keyed_line_have_keys_of_their_own() {
    let running = start(16 << 20);
    // Below the limit as an object, above it once its escapes are read: never the other way round.
    let line = "\u{e9}".repeat(RECORD_BYTES_MAX / 2 - 64);
    let body = format!(r#"{{"time":1,"key":"k","line":"{line}"}}"#);
    assert_eq!(running.post(JSON, body.as_bytes()).await.0, 200);
    assert_eq!(running.spooled(), [(1000, b"k".to_vec(), line.into_bytes())]);
    let keys = [0, 1, 2].map(|number| piece_key(b"k", number).into_owned());
    assert_eq!(keys[0], b"k");
    assert_ne!(keys[1], keys[2]);
}

#[tokio::test]
async fn a_full_spool_is_503_until_there_is_room() {
    let running = start(1000);
    assert_eq!(running.post("", &[b'x'; 980]).await.0, 200);
    let (status, text) = running.post("", b"one\ntwo\n").await;
    assert_eq!(status, 503);
    assert!(text.contains("retry-after: "), "{text}");
    assert!(text.contains("spool"), "{text}");
    running.release();
    assert_eq!(running.post("", b"one\ntwo\n").await.0, 200);
}

#[tokio::test]
async fn a_body_larger_than_the_spool_passes_as_receipts_make_room() {
    let running = start(64 << 10);
    let body: String = (0..100_000).map(|number| format!("line {number}\n")).collect();
    let mut stream = running.connect().await;
    let posting =
        tokio::spawn(
            async move { exchange(&mut stream, "POST / HTTP/1.1", "", body.as_bytes()).await },
        );
    let mut seen = 0;
    while !posting.is_finished() {
        running.release();
        seen += 1;
        tokio::task::yield_now().await;
    }
    let (status, text) = posting.await.expect("no panic").expect("an answer");
    assert_eq!((status, text.contains("100000 lines")), (200, true), "{text}");
    assert!(seen > 0);
}

#[tokio::test]
async fn a_line_that_was_cut_off_with_its_post_is_not_spooled() {
    let running = start(1 << 20);
    let mut stream = running.connect().await;
    stream
        .write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nwhole\nhal")
        .await
        .expect("written");
    stream.shutdown().await.expect("closed");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    running.shutdown.cancel();
    running.spool.flush().await.expect("open");
    assert!(running.payloads().iter().all(|payload| payload == b"whole"));
}

#[tokio::test]
async fn no_method_or_path_is_answered_otherwise() {
    let running = start(1000);
    let mut stream = running.connect().await;
    for request in ["GET /health HTTP/1.1", "DELETE /x?y HTTP/1.1", "PUT /_bulk HTTP/1.1"] {
        let (status, text) = exchange(&mut stream, request, "", b"").await.expect("answer");
        assert_eq!((status, text.contains("0 lines")), (200, true), "{request}: {text}");
    }
    assert_eq!(exchange(&mut stream, "PUT / HTTP/1.1", "", b"put").await.expect("answer").0, 200);
    assert_eq!(running.payloads(), [b"put"]);
    assert_eq!(running.post("", &[b'x'; 940]).await.0, 200);
    assert_eq!(exchange(&mut stream, "PUT / HTTP/1.1", "", &[b'x'; 99]).await.expect("503").0, 503);
}

#[tokio::test]
async fn web_pages_and_compressed_bodies_are_held_back_and_said() {
    let running = start(1 << 20);
    for (headers, says) in [
        ("Origin: https://example.org\r\n", "web page"),
        ("Content-Encoding: gzip\r\n", "uncompressed"),
    ] {
        let (status, text) = running.post(headers, b"line\n").await;
        assert_eq!((status, text.contains(says)), (503, true), "{text}");
    }
    assert!(running.payloads().is_empty());
    assert_eq!(running.post("Content-Encoding: identity\r\n", b"line\n").await.0, 200);
}

#[tokio::test]
async fn a_stop_answers_503_to_what_is_being_read_and_ends() {
    let running = start(1 << 20);
    let mut idle = running.connect().await;
    exchange(&mut idle, "GET / HTTP/1.1", "", b"").await.expect("answer");
    let mut stream = running.connect().await;
    let head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\nfirst\n";
    stream.write_all(head).await.expect("written");
    // Synced, so that the post is known to be in the middle.
    let mut watermark = running.spool.subscribe();
    watermark.wait_for(|mark| mark.synced > 0).await.expect("open");
    running.shutdown.cancel();
    stream.write_all(b"second").await.expect("written");
    assert_eq!(answer(&mut stream).await.expect("an answer").0, 503);
    let ended = timeout(Duration::from_secs(60), running.task).await.expect("it ends");
    ended.expect("no panic").expect("all is synced");
}

#[tokio::test]
async fn what_is_no_readable_request_has_hypers_answer() {
    let running = start(1 << 20);
    let url = format!("POST /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(70_000));
    let fields: String = (0..200).map(|number| format!("X-{number}: x\r\n")).collect();
    let head = format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
    for (request, status) in [("no HTTP\r\n\r\n", 400), (&*url, 414), (&*head, 431)] {
        let mut stream = running.connect().await;
        stream.write_all(request.as_bytes()).await.expect("written");
        assert_eq!(answer(&mut stream).await.expect("an answer").0, status);
    }
    assert!(running.payloads().is_empty());
}

#[tokio::test]
async fn a_taken_port_says_so() {
    let running = start(1000);
    let error = HttpIntake::bind(running.address).expect_err("taken");
    assert!(matches!(error, BindError::AddressInUse { .. }), "{error}");
}
