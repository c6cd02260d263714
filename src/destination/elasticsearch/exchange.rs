//! One bulk body, sent until every document in it has an answer.
//!
//! Called by the workers. Whatever happens on the way (no connection, a cut answer, a proxy that
//! refuses the size, a secret that was revoked), nothing is answered for Elasticsearch: its own
//! answer counts, or the wait goes on (I1).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;

use super::Health;
use super::answer::{self, Answer, Answers, error_of_request};
use super::bulk::Sealed;
use super::client::{Client, RequestError};

/// Between attempts while nobody answers.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Between attempts while we are refused.
const PROBE_MIN: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(30);

/// A 413 never makes batches smaller than this, in bytes.
const BATCH_BYTES_MIN: usize = 64 << 10;

/// So many unknown answers in a row make the request smaller: something in it may be what breaks
/// them. A single document is given up for now, so that it does not keep the slot (I6).
const UNKNOWN_MAX: u32 = 4;

/// So many single documents refused as whole requests, with none accepted: it is not their fault.
const REFUSED_ALONE_MAX: u32 = 3;

/// The longest bulk answer: some for the whole, some for each item with a long reason.
fn reply_bytes_max(documents: usize) -> usize {
    (1 << 20) + documents * 2048
}

/// The wait ended before the answer came; nothing is known, nothing may be receipted.
#[derive(Debug)]
pub(super) struct Stopped;

/// The answers to a body.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) answers: Answers,
    /// Some documents were sent more than once.
    pub(super) repeated: bool,
}

/// What one request came to.
enum Attempted {
    Answered(Answers),
    /// Less at once, please.
    TooLarge(String),
    /// The request as a whole is refused.
    Bad(String),
    /// Nobody may write, or this is no Elasticsearch.
    Forbidden(String),
    /// No answer, but nothing was done either.
    Nothing(String),
    /// A proxy found nobody behind it; everything or nothing may be done.
    Away(String),
    /// Everything or nothing may be done, and this request may be the cause.
    Unknown(String),
}

/// The way to Elasticsearch that all workers share.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) client: Client,
    pub(super) health: watch::Sender<Health>,
    pub(super) batch_bytes: AtomicUsize,
    pub(super) shutdown: CancellationToken,
    /// Scales the waits; 1 but in tests.
    pub(super) haste: u32,
}

impl Exchange {
    /// How large a body should be, in bytes.
    pub(super) fn batch_bytes(&self) -> usize {
        self.batch_bytes.load(Ordering::Relaxed)
    }

    /// Sends a body and waits for all its answers; `reply` is a buffer.
    pub(super) async fn send(
        &self,
        body: &Sealed,
        reply: &mut Vec<u8>,
    ) -> Result<Outcome, Stopped> {
        let mut sending = Sending {
            exchange: self,
            body,
            reply,
            retry: Backoff::new(RETRY_MIN / self.haste, RETRY_MAX / self.haste),
            probe: Backoff::new(PROBE_MIN / self.haste, PROBE_MAX / self.haste),
            node: self.client.current(),
            failed: 0,
            repeated: false,
            accepted: false,
            refused_alone: 0,
        };
        let mut answers = Answers::AllStored(0);
        // A stack of what is still to be sent, first on top.
        let whole = 0..body.documents();
        let mut open = vec![whole];
        while let Some(range) = open.pop() {
            match sending.range(range.clone()).await? {
                Part::Answered(more) => answers.append(more),
                Part::Halve => {
                    let middle = range.start + range.len() / 2;
                    open.push(middle..range.end);
                    open.push(range.start..middle);
                }
            }
        }
        debug_assert_eq!(answers.len(), body.documents());
        Ok(Outcome { answers, repeated: sending.repeated })
    }

    /// Asks until Elasticsearch answers at all, so that health is known before the first line.
    pub(super) async fn probe(&self) {
        let mut backoff = Backoff::new(PROBE_MIN / self.haste, PROBE_MAX / self.haste);
        let mut reply = Vec::new();
        let mut failed = 0;
        while *self.health.borrow() != Health::Ready {
            let (node, empty) = (self.client.current(), bytes::Bytes::new());
            let limit = reply_bytes_max(0);
            let reason = match self.client.bulk(node, empty, &mut reply, limit).await {
                // An empty request is bad, and only who may enter is told so.
                Ok(200 | 400) => {
                    self.set_health(Health::Ready);
                    return;
                }
                Ok(status) => format!("HTTP status {status}: {}", error_of_request(&reply)),
                Err(error) => error.to_string(),
            };
            // A worker may have got through meanwhile.
            if *self.health.borrow() == Health::Ready {
                return;
            }
            failed += 1;
            self.fail_over(node, failed, reason);
            if self.pause(backoff.delay()).await.is_err() {
                return;
            }
        }
    }

    /// Waits, unless the whole process stops.
    pub(super) async fn pause(&self, delay: Duration) -> Result<(), Stopped> {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Err(Stopped),
            () = tokio::time::sleep(delay) => Ok(()),
        }
    }

    /// The next URL takes over. Once all of them have failed in a row, Elasticsearch is down.
    fn fail_over(&self, node: usize, failed: usize, reason: String) {
        self.client.fail_over(node);
        if failed < self.client.nodes() {
            tracing::warn!(%reason, "one URL of Elasticsearch takes no documents: trying the next");
        } else {
            self.set_health(Health::Down { reason });
        }
    }

    fn set_health(&self, health: Health) {
        self.health.send_if_modified(|now| {
            if *now == health {
                return false;
            }
            match (&*now, &health) {
                (_, Health::Starting) => {}
                (Health::Down { .. }, Health::Ready) => {
                    tracing::info!("Elasticsearch takes documents again");
                }
                (_, Health::Ready) => tracing::info!("Elasticsearch takes documents"),
                (Health::Down { .. }, Health::Down { reason }) => {
                    tracing::warn!(%reason, "Elasticsearch still takes no documents");
                }
                (_, Health::Down { reason }) => tracing::error!(
                    %reason,
                    "Elasticsearch takes no documents: nothing is receipted until it does"
                ),
            }
            *now = health;
            true
        });
    }
}

/// What became of some documents of a body.
enum Part {
    Answered(Answers),
    Halve,
}

/// One body on its way.
struct Sending<'a> {
    exchange: &'a Exchange,
    body: &'a Sealed,
    reply: &'a mut Vec<u8>,
    retry: Backoff,
    probe: Backoff,
    /// The URL that was asked last.
    node: usize,
    /// Attempts in a row that brought no answer of Elasticsearch.
    failed: usize,
    repeated: bool,
    /// A request of this body was answered item by item.
    accepted: bool,
    refused_alone: u32,
}

impl Sending<'_> {
    /// Sends some documents until they are answered or must be fewer.
    async fn range(&mut self, range: Range<usize>) -> Result<Part, Stopped> {
        let mut unknown = 0;
        loop {
            match self.once(range.clone()).await {
                Attempted::Answered(answers) => {
                    self.accepted = true;
                    self.failed = 0;
                    self.exchange.set_health(Health::Ready);
                    return Ok(Part::Answered(answers));
                }
                Attempted::TooLarge(reason) => {
                    self.shrink(&range);
                    return Ok(self.halve(range, reason));
                }
                Attempted::Bad(reason) => return Ok(self.halve(range, reason)),
                Attempted::Forbidden(reason) => {
                    self.fail_over(reason);
                    self.exchange.pause(self.probe.delay()).await?;
                    self.exchange.client.reload_secret();
                }
                Attempted::Nothing(reason) => self.wait(reason).await?,
                Attempted::Away(reason) => {
                    self.repeated = true;
                    self.wait(reason).await?;
                }
                Attempted::Unknown(reason) => {
                    self.repeated = true;
                    unknown += 1;
                    self.wait(reason.clone()).await?;
                    if unknown == UNKNOWN_MAX && range.len() > 1 {
                        return Ok(Part::Halve);
                    }
                    if unknown == UNKNOWN_MAX {
                        let answer = Answer::Broken(Arc::from(reason));
                        return Ok(Part::Answered(Answers::Each(vec![answer])));
                    }
                }
            }
        }
    }

    async fn once(&mut self, range: Range<usize>) -> Attempted {
        let limit = reply_bytes_max(range.len());
        let bytes = self.body.slice(range.clone());
        let client = &self.exchange.client;
        self.node = client.current();
        let status = match client.bulk(self.node, bytes, self.reply, limit).await {
            Ok(status) => status,
            Err(error @ RequestError::Connect { .. }) => {
                return Attempted::Nothing(error.to_string());
            }
            Err(error @ RequestError::TooLong(_)) => {
                self.repeated = true;
                return Attempted::TooLarge(error.to_string());
            }
            Err(error) => return Attempted::Unknown(error.to_string()),
        };
        if (200..300).contains(&status) {
            return match answer::read(self.reply, &self.body.expected(range)) {
                Ok(answers) => Attempted::Answered(answers),
                Err(error) => Attempted::Unknown(error.to_string()),
            };
        }
        let reason = format!("HTTP status {status}: {}", error_of_request(self.reply));
        match status {
            413 => Attempted::TooLarge(reason),
            400 => Attempted::Bad(reason),
            502..=504 => Attempted::Away(reason),
            408 | 500.. => Attempted::Unknown(reason),
            429 => Attempted::Nothing(reason),
            // Redirects and 404 come from something else than Elasticsearch.
            _ => Attempted::Forbidden(reason),
        }
    }

    /// The next node at once, and a pause after all were tried.
    async fn wait(&mut self, reason: String) -> Result<(), Stopped> {
        self.fail_over(reason);
        let delay = self.retry.delay() / u32::try_from(self.exchange.client.nodes()).unwrap_or(1);
        self.exchange.pause(delay).await
    }

    fn fail_over(&mut self, reason: String) {
        self.failed += 1;
        self.exchange.fail_over(self.node, self.failed, reason);
    }

    fn halve(&mut self, range: Range<usize>, reason: String) -> Part {
        let blameless = !self.accepted && self.refused_alone >= REFUSED_ALONE_MAX;
        if blameless {
            // A proxy that refuses everything would otherwise see each document alone, and all of
            // them would be parked.
            let answer = Answer::Index(Arc::from(reason));
            return Part::Answered(Answers::Each(vec![answer; range.len()]));
        }
        if range.len() > 1 {
            return Part::Halve;
        }
        self.refused_alone += 1;
        Part::Answered(Answers::Each(vec![Answer::Unacceptable(Arc::from(reason))]))
    }

    fn shrink(&self, range: &Range<usize>) {
        let bytes = self.body.slice(range.clone()).len();
        let smaller = (bytes / 2).max(BATCH_BYTES_MIN);
        if self.exchange.batch_bytes.fetch_min(smaller, Ordering::Relaxed) > smaller {
            tracing::warn!(bytes, smaller, "a bulk request was too large, sending smaller ones");
        }
    }
}
