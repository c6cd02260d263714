//! The bare loader: what Elasticsearch takes when nothing stands before it.
//!
//! Writes the same `create` documents with ids of the same form, in requests of the same size, over
//! two connections. Bodies are made ahead of their requests, as fast as they are needed.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};
use waybill::parse::{Form, FrameTimes, Segment};
use waybill::record::{Day, Framing, Row, SegmentId, SenderId};

/// As many as the receiver has requests in flight.
const CONNECTIONS: usize = 2;

/// As large as the receiver's.
const BODY_BYTES: usize = 5 << 20;

/// Loads a file's lines into an index.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
pub async fn run(url: &str, index: &str, file: &Path) -> anyhow::Result<()> {
    let (bodies, taken) = mpsc::channel(1);
    let taken = Arc::new(Mutex::new(taken));
    waybill::tls::install_provider();
    let client = reqwest::Client::builder().http1_only().build()?;
    let loaders: Vec<_> = (0..CONNECTIONS)
        .map(|_| tokio::spawn(load(client.clone(), url.to_owned(), Arc::clone(&taken))))
        .collect();
    let segment = segment(index)?;
    let lines = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut body = Vec::with_capacity(BODY_BYTES + BODY_BYTES / 16);
    for record in segment.row.framing.records(&lines, 0, false) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        let id = segment.ids.id(record.offset, record.payload);
        writeln!(body, "{{\"create\":{{\"_index\":\"{index}\",\"_id\":\"{id}\"}}}}")?;
        segment.write_document(&record, &FrameTimes::new(now, now), Form::Full, &mut body);
        body.push(b'\n');
        if body.len() >= BODY_BYTES {
            let next = Vec::with_capacity(body.capacity());
            send(&bodies, std::mem::replace(&mut body, next)).await?;
        }
    }
    if !body.is_empty() {
        send(&bodies, body).await?;
    }
    drop(bodies);
    for loader in loaders {
        loader.await??;
    }
    Ok(())
}

async fn send(bodies: &mpsc::Sender<Vec<u8>>, body: Vec<u8>) -> anyhow::Result<()> {
    bodies.send(body).await.ok().context("the loaders have ended")
}

/// A segment such as a sender would open for the file.
fn segment(index: &str) -> anyhow::Result<Segment> {
    let row: Row = serde_json::from_value(json!({
        "segment": SegmentId::mint(), "source": "bench", "path": "/bench/lines", "host": "bench",
        "start": 0, "day": Day::today(), "type": "default", "framing": Framing::LINES,
    }))
    .context("a row")?;
    Ok(Segment::new(row, SenderId::mint(), "bench".to_owned(), index.to_owned()))
}

/// Sends bodies until there are no more.
async fn load(
    client: reqwest::Client,
    url: String,
    bodies: Arc<Mutex<mpsc::Receiver<Vec<u8>>>>,
) -> anyhow::Result<()> {
    loop {
        let next = bodies.lock().await.recv().await;
        let Some(body) = next else { return Ok(()) };
        let answer = client
            .post(format!("{url}/_bulk?filter_path=errors,items.*.status"))
            .header("content-type", "application/x-ndjson")
            .body(body)
            .send()
            .await?
            .text()
            .await?;
        let answer: Value = serde_json::from_str(&answer)?;
        if answer["errors"] != false {
            bail!("the loader was refused: {answer:.300}");
        }
    }
}
