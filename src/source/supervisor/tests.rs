use std::io::PipeWriter;
use std::os::fd::OwnedFd;

use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::event::tests::envelope;
use super::*;
use crate::record::Framing;
use crate::spool::{Budget, Chunk};

struct Running {
    input: PipeWriter,
    answers: PipeReader,
    spool: Arc<Spool>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<StdinEnd, SourceError>>,
}

fn start(dir: &TempDir, run: &str) -> Running {
    let (reader, input) = io::pipe().expect("pipe");
    let (answers, writer) = io::pipe().expect("pipe");
    let file = |pipe: OwnedFd| File::from(pipe);
    let source = SupervisorSource::with(
        file(reader.into()),
        file(writer.into()),
        dir.path(),
        run.to_owned(),
    );
    let budget = Arc::new(Budget::new(1 << 30));
    let spool = Arc::new(Spool::open(&dir.path().join("spool"), budget).expect("spool"));
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(source.expect("source").run(spool.clone(), shutdown.clone()));
    Running { input, answers, spool, shutdown, task }
}

impl Running {
    async fn expect(&mut self, text: &'static str) {
        let mut answers = self.answers.try_clone().expect("dup");
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; text.len()];
            answers.read_exact(&mut bytes).expect("an answer");
            bytes
        });
        assert_eq!(read.await.expect("read"), text.as_bytes());
    }

    /// Sends an event and waits for its answer.
    async fn event(&mut self, serial: u64, output: &str) {
        self.input.write_all(&log(serial, output)).expect("write");
        self.expect("RESULT 2\nOKREADY\n").await;
    }

    /// Key, time and message of each record.
    fn spooled(&self) -> Vec<(Vec<u8>, u64, String)> {
        let mut records = Vec::new();
        for segment in self.spool.segments() {
            let mut at = segment.start;
            while let Chunk::Records(bytes) = self.spool.read(segment.id, at, 65536).expect("read")
            {
                records.extend(Framing::SPOOL.records(&bytes, at, false).map(|record| {
                    let text = String::from_utf8_lossy(record.payload).into_owned();
                    let message = text.split_once("] ").expect("a header").1.to_owned();
                    (record.key.to_vec(), record.time.expect("a time"), message)
                }));
                at += bytes.len() as u64;
            }
        }
        records
    }

    fn messages(&self) -> Vec<String> {
        self.spooled().into_iter().map(|(_, _, message)| message).collect()
    }
}

fn log(serial: u64, output: &str) -> Vec<u8> {
    let payload = format!("processname:p groupname:g pid:7 channel:stdout\n{output}");
    envelope("PROCESS_LOG_STDOUT", serial, &payload)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answered_event_is_synced() {
    let dir = TempDir::new().expect("dir");
    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.event(1, "one\ntwo\nthr").await;
    assert_eq!(running.messages(), ["one", "two"]);
    running.event(2, "ee\n").await;
    assert_eq!(running.messages(), ["one", "two", "three"]);
    drop(running.input);
    assert_eq!(running.task.await.expect("task").expect("an end"), StdinEnd::Finished);
}

/// The stop answers what is under way, and asks for no more: supervisor keeps the next event.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_asks_for_no_further_event() {
    let dir = TempDir::new().expect("dir");
    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.event(1, "one\n").await;
    // Half an event is not answered.
    let next = log(2, "two\n");
    running.input.write_all(&next[..next.len() - 3]).expect("write");
    running.shutdown.cancel();
    assert_eq!(running.task.await.expect("task").expect("an end"), StdinEnd::Stopped);
    let mut rest = Vec::new();
    running.answers.read_to_end(&mut rest).expect("closed");
    assert!(rest.is_empty());
}

/// Killed after the sync and before the answer: supervisor sends the event again, to a successor
/// that gives its lines the same key, time and text, hence the same document ids (I3).
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_comes_again_makes_the_same_records() {
    let dir = TempDir::new().expect("dir");
    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.event(1, "be").await;
    running.event(2, "gin\nmiddle\ne").await;
    let first = running.spooled();
    // As if the answer to 2 had never left.
    drop(running.input);
    running.task.await.expect("task").expect("an end");
    drop(running.spool);

    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.event(2, "gin\nmiddle\ne").await;
    running.event(3, "nd\n").await;
    let all = running.spooled();
    assert_eq!(all[..2], first[..]);
    assert_eq!(all[2..4], first[..], "the same again");
    assert_eq!(all[4].2, "end");
    assert_eq!(all[0].2, "begin");

    // Another supervisord counts anew, and finishes nobody's line.
    drop(running.input);
    running.task.await.expect("task").expect("an end");
    drop(running.spool);
    let mut running = start(&dir, "another");
    running.expect("READY\n").await;
    running.event(3, "nd\n").await;
    let last = running.spooled().pop().expect("a record");
    assert_eq!(last.2, "nd");
    assert_ne!(last.0, all[4].0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_is_not_continued_over_dropped_events() {
    let dir = TempDir::new().expect("dir");
    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.event(1, "half").await;
    running.event(4, "of another\n").await;
    assert_eq!(running.messages(), ["half", "of another"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_event_ends_the_source() {
    let dir = TempDir::new().expect("dir");
    let mut running = start(&dir, "run");
    running.expect("READY\n").await;
    running.input.write_all(b"hello?\n").expect("write");
    let error = running.task.await.expect("task").expect_err("no event");
    assert!(matches!(error, SourceError::Read { .. }), "{error}");
}
