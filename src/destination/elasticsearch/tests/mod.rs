//! The whole destination at work: a server that is scripted per test, with real sockets and real
//! HTTP. What real servers answer is tested in `tests/relay`.

mod keyed;
mod rules;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::config::ElasticsearchAuth;
use crate::destination::{Frame, Inbox, Reply};
use crate::parse::Segment;
use crate::protocol::{DayBounds, Verdict};
use crate::record::{Day, Framing, Row, SegmentId, SenderId};

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Request {
    at: Instant,
    line: String,
    headers: String,
    body: String,
}

impl Request {
    fn is_bulk(&self) -> bool {
        self.line.starts_with("POST /_bulk")
    }

    /// Index and id of each document.
    fn documents(&self) -> Vec<(String, String)> {
        let lines = self.body.split('\n').step_by(2).filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let action: Value = serde_json::from_str(line).expect("an action");
                let text = |key: &str| action["create"][key].as_str().expect(key).to_owned();
                (text("_index"), text("_id"))
            })
            .collect()
    }

    /// Which second lines there are.
    fn sources(&self) -> Vec<Value> {
        let lines = self.body.split('\n').skip(1).step_by(2);
        lines.map(|line| serde_json::from_str(line).unwrap_or(Value::Null)).collect()
    }
}

/// What a script answers.
enum Answer {
    Json(u16, Value),
    Raw(Vec<u8>),
}

type Script = Box<dyn FnMut(&Request) -> Answer + Send>;

fn item(index: &str, status: u16, more: Value) -> Value {
    let mut item = json!({ "_index": index, "status": status });
    if let (Some(item), Value::Object(more)) = (item.as_object_mut(), more) {
        item.extend(more);
    }
    json!({ "create": item })
}

fn created(index: &str) -> Value {
    item(index, 201, json!({ "result": "created" }))
}

fn error(index: &str, status: u16, kind: &str) -> Value {
    item(index, status, json!({ "error": { "type": kind, "reason": "because" } }))
}

/// A bulk answer, one item per document.
fn items(request: &Request, mut item: impl FnMut(&str, &str) -> Value) -> Answer {
    let items: Vec<_> = request.documents().iter().map(|(index, id)| item(index, id)).collect();
    Answer::Json(200, json!({ "errors": true, "items": items }))
}

/// What anything but a bulk request gets where a test does not care.
fn other(request: &Request) -> Answer {
    if request.line.starts_with("GET ") {
        Answer::Json(404, json!({ "error": { "type": "index_not_found_exception" } }))
    } else {
        Answer::Json(200, json!({}))
    }
}

struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    async fn start(script: impl FnMut(&Request) -> Answer + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        let log = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&script), Arc::clone(&log)));
            }
        });
        Server { url, seen }
    }

    fn bulks(&self) -> Vec<Request> {
        let seen = self.seen.lock().expect("not poisoned");
        let not_a_probe = |request: &&Request| request.is_bulk() && !request.body.is_empty();
        seen.iter().filter(not_a_probe).cloned().collect()
    }

    fn saw(&self, start: &str) -> usize {
        let seen = self.seen.lock().expect("not poisoned");
        seen.iter().filter(|request| request.line.starts_with(start)).count()
    }
}

async fn serve(stream: TcpStream, script: Arc<Mutex<Script>>, log: Arc<Mutex<Vec<Request>>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).expect("a head");
        let (line, headers) = head.split_once("\r\n").expect("a request line");
        let headers = headers.to_ascii_lowercase();
        let length = headers.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length = length.map_or(0, |length| length.parse().expect("a length"));
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        let body = String::from_utf8(body).expect("UTF-8");
        let request = Request { at: Instant::now(), line: line.to_owned(), headers, body };
        let answer = if request.is_bulk() && request.body.is_empty() {
            Answer::Json(400, json!({ "error": { "type": "parse_exception" } }))
        } else {
            script.lock().expect("not poisoned")(&request)
        };
        log.lock().expect("not poisoned").push(request);
        let bytes = match answer {
            Answer::Json(status, body) => {
                let body = body.to_string();
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                    .into_bytes()
            }
            Answer::Raw(bytes) => {
                // The end of the connection is part of the answer.
                let _ = stream.write_all(&bytes).await;
                return;
            }
        };
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

fn config(urls: &[&str]) -> ElasticsearchConfig {
    // Fails only where an earlier test has installed it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    ElasticsearchConfig {
        urls: urls.iter().map(|url| (*url).to_owned()).collect(),
        auth: ElasticsearchAuth::None,
        ca: None,
        batch_bytes_max: 1 << 20,
        requests: 1,
        dead_letter_index: "dead".to_owned(),
    }
}

fn segment(index: &str, framing: Framing) -> Arc<Segment> {
    let row: Row = serde_json::from_value(json!({
        "segment": SegmentId::mint(), "source": "app", "path": "/var/log/app.log", "host": "web1",
        "start": 0, "day": "2026-11-21", "type": "default", "framing": framing,
    }))
    .expect("a row");
    Arc::new(Segment::new(row, SenderId::mint(), "web1".to_owned(), index.to_owned()))
}

/// The day of [`segment`] and the next.
fn days() -> DayBounds {
    let day: Day = "2026-11-21".parse().expect("a day");
    DayBounds { from: day, to: day.plus(1) }
}

fn lines(index: &str) -> Arc<Segment> {
    segment(index, Framing::LINES)
}

/// A line that waits for nothing in particular.
pub(super) fn stretch(index: &str) -> batch::Stretch {
    let memory = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("memory");
    let frame = Frame {
        segment: lines(index),
        offset: 0,
        read_at: 0,
        continues: false,
        days: days(),
        records: Bytes::from_static(b"line\n"),
        reply: Reply::new(Arc::default(), 1),
        memory,
    };
    batch::Stretch::whole(frame, &target::Targets::default())
}

const PAUSE: Duration = Duration::from_millis(60);

/// A destination at work.
struct Bench {
    queue: Arc<Queue>,
    shutdown: CancellationToken,
    health: watch::Receiver<Health>,
    running: JoinHandle<()>,
    memory: Arc<Semaphore>,
}

/// One frame under way.
struct Sent {
    inbox: Arc<Inbox>,
    segment: Arc<Segment>,
    records: Bytes,
    seen: Vec<(u64, u64, u64, Verdict)>,
}

impl Bench {
    fn start(config: &ElasticsearchConfig) -> Bench {
        let mut destination = Elasticsearch::new(config).expect("a good configuration");
        destination.conflict_pause = PAUSE;
        destination.haste = 50;
        let queue = Arc::new(Queue::default());
        let shutdown = CancellationToken::new();
        let health = destination.health();
        let running = tokio::spawn(destination.run(Arc::clone(&queue), shutdown.clone()));
        Bench { queue, shutdown, health, running, memory: Arc::new(Semaphore::new(1000)) }
    }

    fn send(&self, segment: &Arc<Segment>, records: impl Into<Bytes>) -> Sent {
        let inbox = Arc::new(Inbox::default());
        let records = records.into();
        self.queue.push(Frame {
            segment: Arc::clone(segment),
            offset: 1000,
            read_at: 1_700_000_000_000,
            continues: false,
            days: days(),
            records: records.clone(),
            reply: Reply::new(Arc::clone(&inbox), 1),
            memory: Arc::clone(&self.memory).try_acquire_owned().expect("memory"),
        });
        Sent { inbox, segment: Arc::clone(segment), records, seen: Vec::new() }
    }

    /// Everything is answered and given back.
    async fn end(self) {
        self.queue.close();
        within(self.running).await.expect("no panic");
        assert_eq!(self.memory.available_permits(), 1000, "every frame is given back");
    }
}

impl Sent {
    fn id(&self, record: usize) -> String {
        let records = self.segment.row.framing.records(&self.records, 1000, false);
        let record = records.into_iter().nth(record).expect("a record");
        self.segment.ids.of(&record).to_string()
    }

    /// Waits until so many bytes have a verdict.
    async fn answered(&mut self, bytes: u64) {
        while self.seen.iter().map(|(from, to, ..)| to - from).sum::<u64>() < bytes {
            for receipt in within(self.inbox.take()).await {
                let mut from = receipt.from;
                for run in receipt.runs {
                    self.seen.push((from, run.to, run.lines, run.verdict));
                    from = run.to;
                }
                assert_eq!(from, receipt.to);
            }
        }
    }

    /// The verdict of every record, which must cover the frame exactly once.
    async fn verdicts(mut self) -> Vec<Verdict> {
        self.answered(self.records.len() as u64).await;
        self.seen.sort_by_key(|(from, ..)| *from);
        let mut at = 1000;
        let mut verdicts = Vec::new();
        let bytes = &self.records;
        for (from, to, count, verdict) in self.seen {
            assert_eq!(from, at, "no gap, nothing twice");
            let run = bytes.slice((from - 1000) as usize..(to - 1000) as usize);
            let records = self.segment.row.framing.records(&run, from, false).count();
            assert_eq!(records as u64, count, "lines of {from}..{to}");
            verdicts.extend(std::iter::repeat_n(verdict, records));
            at = to;
        }
        assert_eq!(at, 1000 + bytes.len() as u64);
        verdicts
    }
}

/// No test waits for ever.
async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("an end within 30 s")
}

fn is_deferred(verdict: &Verdict, why: &str) -> bool {
    matches!(verdict, Verdict::Deferred { reason, .. } if reason.contains(why))
}

/// Whose fault the verdict says it is.
fn refused_by(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::Deferred { index, .. } => index.as_deref(),
        _ => None,
    }
}

fn is_parked(verdict: &Verdict, why: &str) -> bool {
    matches!(verdict, Verdict::Parked { reason } if reason.contains(why))
}
