//! Following spools: what sockets and standard input bring becomes streams like any file.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, warn};
use uuid::Uuid;

use super::Context;
use super::follow::rows_of;
use super::intakes::IntakeEnd;
use super::link::Mailbox;
use super::origin::Origin;
use super::rows::Attributes;
use super::stream::{End, Ended, Flags, Parts, Stream};
use crate::record::{Day, Framing, SegmentId};
use crate::spool::Spool;

/// How often the day is compared with the live row's.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Follows the spool of one source under one configuration.
pub struct SpoolFollower {
    context: Arc<Context>,
    attributes: Arc<Attributes>,
    spool: Arc<Spool>,
    intake: watch::Receiver<Option<IntakeEnd>>,
    streams: HashMap<Uuid, Live>,
    tasks: JoinSet<Ended>,
    /// The input is finished: no more bytes will come.
    ended: bool,
}

struct Live {
    mailbox: Arc<Mailbox>,
    flags: Arc<Flags>,
    opened: Day,
}

impl SpoolFollower {
    /// For a source whose spool is filled by an intake, until that ends.
    pub fn new(
        context: Arc<Context>,
        attributes: Arc<Attributes>,
        spool: Arc<Spool>,
        intake: watch::Receiver<Option<IntakeEnd>>,
    ) -> SpoolFollower {
        SpoolFollower {
            context,
            attributes,
            spool,
            intake,
            streams: HashMap::new(),
            tasks: JoinSet::new(),
            ended: false,
        }
    }

    /// Sends what is spooled, until stopped; standard input also ends by itself, once everything
    /// of it is receipted. `false` where that failed.
    pub async fn run(mut self) -> bool {
        self.forget_vanished();
        let mut watermark = self.spool.subscribe();
        let mut healthy = true;
        let mut running = true;
        loop {
            let mark = *watermark.borrow_and_update();
            self.start_streams();
            for live in self.streams.values() {
                live.flags.look.store(true, Ordering::Relaxed);
                live.mailbox.wake.notify_one();
            }
            if let Some(live) = self.streams.get(&mark.segment.0)
                && Day::today() != live.opened
                && mark.offset > 0
            {
                self.spool.end_segment();
            }
            if self.ended && self.is_empty() {
                return healthy;
            }
            let shutdown = self.context.shutdown.clone();
            // At the end of the process the intake's last bytes are waited for. A successor has
            // the same intake.
            let stopping = async {
                shutdown.requested().await;
                if running && !shutdown.ends_alone() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = stopping => break,
                _ = watermark.changed() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                end = ended(&mut self.intake), if running => {
                    running = false;
                    self.ended = end == IntakeEnd::Finished;
                    healthy &= end != IntakeEnd::Failed;
                }
                Some(ended) = self.tasks.join_next() => {
                    if !self.stream_ended(ended) {
                        healthy = false;
                        // With --once: nobody waits for a person.
                        if self.ended {
                            return healthy;
                        }
                    }
                }
            }
        }
        while let Some(ended) = self.tasks.join_next().await {
            healthy &= self.stream_ended(ended);
        }
        healthy
    }

    /// Whether nothing spooled awaits a receipt.
    fn is_empty(&self) -> bool {
        let mark = self.spool.watermark();
        let bytes = |segment: &crate::spool::SpoolSegment| match segment.end {
            Some(end) => end > segment.start,
            None => segment.id == mark.segment && mark.offset > segment.start,
        };
        !self.spool.segments().iter().any(bytes)
    }

    fn stream_ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) -> bool {
        match ended {
            Ok(ended) => {
                self.streams.remove(&ended.run);
                ended.end != End::Failed
            }
            Err(error) => {
                error!(%error, "a stream ended unexpectedly and is started again");
                self.streams.clear();
                self.tasks.abort_all();
                true
            }
        }
    }

    /// Every segment with bytes gets a row, durably, and a stream.
    fn start_streams(&mut self) {
        for segment in self.spool.segments() {
            let mark = self.spool.watermark();
            let has_bytes = match segment.end {
                Some(end) => end > segment.start,
                None => segment.id == mark.segment && mark.offset > segment.start,
            };
            if self.streams.contains_key(&segment.id.0) || !has_bytes {
                continue;
            }
            if let Err(error) = self.start_stream(segment.id, segment.start) {
                warn!(%error, "a spool segment cannot be sent yet: it is tried again");
            }
        }
    }

    fn start_stream(&mut self, segment: SegmentId, start: u64) -> io::Result<()> {
        let run = segment.0;
        let parts = Parts {
            context: self.context.clone(),
            attributes: self.attributes.clone(),
            run,
            origin: Origin::Spool { spool: self.spool.clone(), segment },
            known: rows_of(&self.context, run),
            until: None,
            start,
            kept: None,
        };
        let stream = tokio::task::block_in_place(|| Stream::attach(parts))?;
        let (mailbox, flags) = (stream.mailbox(), stream.flags());
        self.streams.insert(run, Live { mailbox, flags, opened: Day::today() });
        self.tasks.spawn(stream.run());
        Ok(())
    }

    /// Rows of this source whose spool segment is gone: finished, and released before they were
    /// forgotten.
    fn forget_vanished(&self) {
        let segments = self.spool.segments();
        let vanished: Vec<SegmentId> = self
            .context
            .state
            .entries()
            .into_iter()
            .map(|(entry, _)| entry)
            .filter(|entry| {
                matches!(entry.row.framing, Framing::Spool { .. })
                    && entry.row.source == self.attributes.source.name
                    && !segments.iter().any(|segment| segment.id.0 == entry.run)
            })
            .map(|entry| entry.row.segment)
            .collect();
        if !vanished.is_empty()
            && let Err(error) = self.context.state.commit(&[], &vanished)
        {
            warn!(%error, "the state directory cannot be written");
        }
    }
}

/// Waits for the end of an intake. One that says nothing any more has panicked.
async fn ended(intake: &mut watch::Receiver<Option<IntakeEnd>>) -> IntakeEnd {
    match intake.wait_for(Option::is_some).await {
        Ok(end) => end.unwrap_or(IntakeEnd::Failed),
        Err(_) => IntakeEnd::Failed,
    }
}
