//! The whole destination against a server that is scripted per test: real sockets, real HTTP.

use std::collections::HashMap;
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
use crate::protocol::Verdict;
use crate::record::framing::encode_spool_record;
use crate::record::{Framing, Row, SegmentId, SenderId};

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

fn lines(index: &str) -> Arc<Segment> {
    segment(index, Framing::LINES)
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
        self.segment.ids.id(record.offset, record.payload).to_string()
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

fn is_parked(verdict: &Verdict, why: &str) -> bool {
    matches!(verdict, Verdict::Parked { reason } if reason.contains(why))
}

#[tokio::test]
async fn lines_are_stored_under_their_ids_and_empty_ones_skipped() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "one\n\n\ntwo\n");
    let ids = [sent.id(0), sent.id(3)];
    use Verdict::{Skipped, Stored};
    assert_eq!(sent.verdicts().await, [Stored, Skipped, Skipped, Stored]);
    let health = bench.health.clone();
    bench.end().await;
    assert_eq!(*health.borrow(), Health::Ready);
    let bulks = server.bulks();
    assert_eq!(bulks.len(), 1);
    let documents = bulks[0].documents();
    assert_eq!(documents, ids.map(|id| ("a".to_owned(), id)));
    assert!(bulks[0].headers.contains("content-type: application/x-ndjson\r\n"));
    assert!(bulks[0].line.ends_with(" HTTP/1.1"));
}

#[tokio::test]
async fn a_conflict_is_created_again_behind_a_flush_while_others_go_on() {
    let mut met = false;
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "a" if !std::mem::replace(&mut met, true) => {
                error(index, 409, "version_conflict_engine_exception")
            }
            "a" if request.documents().len() == 1 => {
                error(index, 409, "version_conflict_engine_exception")
            }
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let mut sent = bench.send(&lines("a"), "known\nnew\n");
    sent.answered(4).await;
    assert_eq!(sent.seen, [(1006, 1010, 1, Verdict::Stored)], "its neighbour does not wait");
    assert_eq!(bench.send(&lines("b"), "x\n").verdicts().await, [Verdict::Stored]);
    assert_eq!(sent.verdicts().await, [Verdict::Already, Verdict::Stored]);
    bench.end().await;
    let bulks = server.bulks();
    let last = bulks.last().expect("a second create");
    assert_eq!(last.documents().len(), 1, "only what met a conflict is created again");
    assert!(last.at - bulks[0].at >= PAUSE);
    assert_eq!(server.saw("POST /a/_flush"), 1);
    assert_eq!(CONFLICT_PAUSE, Duration::from_secs(2));
}

#[tokio::test]
async fn a_busy_document_alone_is_sent_again() {
    let mut tries = HashMap::<String, u32>::new();
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| {
            let tries = tries.entry(id.to_owned()).or_default();
            *tries += 1;
            match (request.documents().len(), *tries) {
                (3, 1) if id == request.documents()[1].1 => error(index, 429, "es_rejected"),
                (1, 2) => error(index, 503, "node_not_connected"),
                _ => created(index),
            }
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "1\n2\n3\n");
    let id = sent.id(1);
    assert_eq!(sent.verdicts().await, vec![Verdict::Stored; 3]);
    bench.end().await;
    let bulks: Vec<_> = server.bulks().iter().map(Request::documents).collect();
    let alone = vec![("a".to_owned(), id)];
    assert_eq!(bulks[1..], [alone.clone(), alone]);
}

#[tokio::test]
async fn a_refused_line_is_reduced_then_parked_in_pieces_and_neighbours_are_stored() {
    let long = "é".repeat(200 << 10);
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| match index {
            "a" if id == request.documents()[request.documents().len() / 2].1 => {
                error(index, 400, "mapper_parsing_exception")
            }
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), format!("1\n{long}\n3\n"));
    let id = sent.id(1);
    let verdicts = sent.verdicts().await;
    assert_eq!((&verdicts[0], &verdicts[2]), (&Verdict::Stored, &Verdict::Stored));
    assert!(is_parked(&verdicts[1], "mapper_parsing_exception: because"), "{:?}", verdicts[1]);
    bench.end().await;
    let bulks = server.bulks();
    assert_eq!(bulks.len(), 3, "full, reduced, dead letter");
    assert_eq!(bulks[1].documents(), [("a".to_owned(), id.clone())]);
    let letters = bulks[2].documents();
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0], ("dead".to_owned(), id.clone()), "under the line's own id");
    assert_ne!(letters[1].1, id);
    let sources = bulks[2].sources();
    let line: String = sources.iter().map(|letter| letter["line"].as_str().expect("line")).collect();
    assert_eq!(line, long);
    assert_eq!(sources[1]["piece"], 1);
    assert_eq!(sources[0]["offset"], 1002);
    assert_eq!(sources[0]["path"], "/var/log/app.log");
}

#[tokio::test]
async fn a_line_refused_alone_is_deferred_until_its_index_has_taken_another() {
    let mut bad = String::new();
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| {
            if bad.is_empty() {
                bad = id.to_owned();
            }
            match index {
                "a" if id == bad => error(index, 400, "mapper_parsing_exception"),
                _ => created(index),
            }
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let segment = lines("a");
    let verdicts = bench.send(&segment, "bad\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "mapper_parsing_exception"), "{verdicts:?}");
    assert_eq!(bench.send(&lines("a"), "good\n").verdicts().await, [Verdict::Stored]);
    // The same line again, with nothing stored in this round.
    let verdicts = bench.send(&segment, "bad\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "mapper_parsing_exception"), "{verdicts:?}");
    bench.end().await;
}

#[tokio::test]
async fn a_closed_index_is_deferred_at_once_and_others_go_on() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "closed" => error(index, 400, "index_closed_exception"),
            "read-only" => error(index, 403, "cluster_block_exception"),
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    for (index, why) in
        [("closed", "index_closed_exception"), ("read-only", "cluster_block_exception")]
    {
        let verdicts = bench.send(&lines(index), "1\n\n3\n").verdicts().await;
        assert!(is_deferred(&verdicts[0], why) && is_deferred(&verdicts[2], why), "{verdicts:?}");
        let before = server.bulks().len();
        let verdicts = bench.send(&lines(index), "4\n").verdicts().await;
        assert!(is_deferred(&verdicts[0], why), "{verdicts:?}");
        assert_eq!(server.bulks().len(), before, "known, so not asked again at once");
    }
    assert_eq!(bench.send(&lines("open"), "5\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
}

#[tokio::test]
async fn an_alias_or_data_stream_is_refused_before_anything_is_written() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false if request.line.starts_with("GET /alias/") => {
            Answer::Json(200, json!({ "real": { "settings": { "index": { "uuid": "u" } } } }))
        }
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("alias"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "alias is an alias (of real)"), "{verdicts:?}");
    assert_eq!(bench.send(&lines("index"), "1\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
    assert_eq!(server.bulks().len(), 1);
}

#[tokio::test]
async fn a_document_that_landed_elsewhere_is_never_stored() {
    // The key may not ask what stands behind a name.
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, id| match index {
            "stream" => created(".ds-stream-000001"),
            "routed" if id == request.documents()[0].1 => created("other"),
            _ => created(index),
        }),
        false => Answer::Json(403, json!({ "error": { "type": "security_exception" } })),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("stream"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], ".ds-stream-000001"), "{verdicts:?}");
    // A name that other documents prove to be an index: a pipeline did it.
    let verdicts = bench.send(&lines("routed"), "1\n2\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    assert_eq!(verdicts[1], Verdict::Stored);
    bench.end().await;
}

#[tokio::test]
async fn a_line_that_a_pipeline_drops_is_parked() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => created(index),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    bench.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_cannot_be_written_defers_its_lines() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => error(index, 403, "security_exception"),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "security_exception"), "{verdicts:?}");
    bench.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_is_there_already_is_believed_at_its_second_conflict() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => error(index, 409, "version_conflict_engine_exception"),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    bench.end().await;
    assert_eq!(server.bulks().len(), 3);
}

#[tokio::test]
async fn a_request_that_is_too_large_is_halved_and_a_single_document_parked() {
    let server = Server::start(|request| match request.is_bulk() {
        true if request.body.contains("\"dead\"") => items(request, |index, _| created(index)),
        true if request.documents().len() > 2 => Answer::Json(413, json!({})),
        true if request.documents()[0].1.ends_with('A') && request.documents().len() == 2 => {
            Answer::Json(400, json!({ "error": { "type": "illegal_argument_exception" } }))
        }
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let text: String = (0..16).map(|number| format!("{number}\n")).collect();
    assert_eq!(bench.send(&lines("a"), text).verdicts().await, vec![Verdict::Stored; 16]);
    bench.end().await;

    let server = Server::start(|request| match request.is_bulk() {
        true if request.body.contains("\"dead\"") => items(request, |index, _| created(index)),
        true if request.documents().len() > 1 => Answer::Json(413, json!({})),
        true if request.body.len() > 1 => match request.documents()[0].0.as_str() {
            "big" => Answer::Json(413, json!({})),
            index => Answer::Json(200, json!({ "errors": false, "items": [created(index)] })),
        },
        _ => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("big"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "413"), "{verdicts:?}");
    assert_eq!(bench.send(&lines("small"), "1\n2\n").verdicts().await, vec![Verdict::Stored; 2]);
    bench.end().await;
}

#[tokio::test]
async fn a_proxy_that_refuses_every_request_parks_nothing() {
    let server = Server::start(|request| match request.is_bulk() {
        true => Answer::Raw(
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 12\r\n\r\nplain HTTP?\n".to_vec(),
        ),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let text: String = (0..100).map(|number| format!("{number}\n")).collect();
    let verdicts = bench.send(&lines("a"), text).verdicts().await;
    assert!(verdicts.iter().all(|verdict| is_deferred(verdict, "400")), "{verdicts:?}");
    assert!(server.bulks().len() < 50, "not one request per line: {}", server.bulks().len());
    bench.end().await;
}

#[tokio::test]
async fn a_revoked_secret_pauses_everything_until_a_new_one_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = folder.path().join("key");
    std::fs::write(&key, "old:key\n").expect("written");
    let server = Server::start(|request| {
        // base64 of new:key, in lower case as all headers here.
        if !request.headers.contains("authorization: apikey bmv3omtlea==") {
            return Answer::Json(401, json!({ "error": { "type": "security_exception" } }));
        }
        match request.is_bulk() {
            true => items(request, |index, _| created(index)),
            false => other(request),
        }
    })
    .await;
    let auth = ElasticsearchAuth::ApiKey(key.clone());
    let bench = Bench::start(&ElasticsearchConfig { auth, ..config(&[&server.url]) });
    let sent = bench.send(&lines("a"), "1\n");
    let mut health = bench.health.clone();
    let down = |health: &Health| matches!(health, Health::Down { reason } if reason.contains("401"));
    within(health.wait_for(down)).await.expect("the destination runs");
    assert!(sent.inbox.try_take().is_empty(), "nothing is receipted");
    std::fs::write(&key, "new:key\n").expect("written");
    assert_eq!(sent.verdicts().await, [Verdict::Stored]);
    assert_eq!(*health.borrow(), Health::Ready);
    bench.end().await;
}

#[tokio::test]
async fn half_an_answer_means_unknown_and_the_same_ids_are_sent_again() {
    let mut number = 0;
    let server = Server::start(move |request| match request.is_bulk() {
        true => {
            number += 1;
            match number {
                1 => Answer::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{\"err".to_vec()),
                2 => Answer::Json(200, json!({ "errors": false, "items": [created("a")] })),
                3 => Answer::Json(502, json!({})),
                4 => Answer::Raw(Vec::new()),
                _ => items(request, |index, _| {
                    error(index, 409, "version_conflict_engine_exception")
                }),
            }
        }
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "1\n2\n");
    assert_eq!(sent.verdicts().await, vec![Verdict::Already; 2]);
    bench.end().await;
    let ids: Vec<_> = server.bulks().iter().flat_map(Request::documents).collect();
    assert!(ids.iter().all(|document| ids[..2].contains(document)));
    let conflicts = server.bulks().split_off(4);
    let both = conflicts.iter().filter(|bulk| bulk.at >= conflicts[0].at + PAUSE).count();
    assert!(both >= 1, "a conflict with our own first try is not believed at once");
}

#[tokio::test]
async fn another_url_takes_over() {
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone = format!("http://{}", dead.local_addr().expect("an address"));
    drop(dead);
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&gone, &server.url]));
    assert_eq!(bench.send(&lines("a"), "1\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
}

#[tokio::test]
async fn a_corrupt_spool_record_is_parked_as_it_is() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let mut records = Vec::new();
    encode_spool_record(&mut records, 1, b"", b"good");
    records.extend_from_slice(&[0xff; 20]);
    let verdicts = bench.send(&segment("a", Framing::SPOOL), records).verdicts().await;
    assert_eq!(verdicts[0], Verdict::Stored);
    assert!(is_parked(&verdicts[1], "corrupt"), "{verdicts:?}");
    bench.end().await;
    let letters = server.bulks();
    let letter = &letters.last().expect("a dead letter").sources()[0];
    assert_eq!(letter["line_base64"], "//////////////////////////8=");
    assert_eq!(letter["line"], Value::Null);
}

#[tokio::test]
async fn a_frame_larger_than_a_batch_goes_in_parts() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let config = ElasticsearchConfig { batch_bytes_max: 4000, ..config(&[&server.url]) };
    let bench = Bench::start(&config);
    let text: String = (0..500).map(|number| format!("{number}\n\n")).collect();
    let verdicts = bench.send(&lines("a"), text).verdicts().await;
    let stored = verdicts.iter().filter(|verdict| **verdict == Verdict::Stored).count();
    assert_eq!((stored, verdicts.len()), (500, 1000));
    bench.end().await;
    assert!(server.bulks().len() > 5);
    assert!(server.bulks().iter().all(|bulk| bulk.body.len() < 8000));
}

#[tokio::test]
async fn a_stop_ends_the_retries_and_receipts_nothing() {
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone = format!("http://{}", dead.local_addr().expect("an address"));
    drop(dead);
    let bench = Bench::start(&config(&[&gone]));
    let sent = bench.send(&lines("a"), "1\n");
    let mut health = bench.health.clone();
    let down = |health: &Health| matches!(health, Health::Down { .. });
    within(health.wait_for(down)).await.expect("the destination runs");
    bench.shutdown.cancel();
    within(bench.running).await.expect("no panic");
    assert!(sent.inbox.try_take().is_empty());
}
