//! Following spools: what sockets and standard input bring becomes streams like any file.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Context;
use super::follow::rows_of;
use super::link::Mailbox;
use super::origin::Origin;
use super::rows::Attributes;
use super::stream::{End, Ended, Flags, Parts, Stream};
use crate::config::Input;
use crate::record::{Day, Framing, SegmentId};
use crate::source::datagram::DatagramSource;
use crate::source::http_intake::HttpIntake;
use crate::source::stdin::{StdinEnd, StdinSource};
use crate::source::stream::StreamSource;
use crate::source::supervisor::SupervisorSource;
use crate::source::{BindError, SourceError};
use crate::spool::{Budget, Spool, SpoolError, directory};

/// How often the day is compared with the live row's.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A source that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The socket cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The spool cannot be opened.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Standard input is closed.
    #[error("standard input cannot be read: {0}")]
    Stdin(io::Error),
    /// Standard input or output is closed, or what a killed listener left cannot be read.
    #[error("supervisor's events cannot be taken: {0}")]
    Supervisor(io::Error),
}

/// A source that writes into a spool, before its first byte.
pub struct SpoolSource {
    attributes: Arc<Attributes>,
    spool: Arc<Spool>,
    intake: Intake,
}

enum Intake {
    Datagram(DatagramSource),
    Stream(StreamSource),
    Http(HttpIntake),
    Stdin(StdinSource),
    Supervisor(SupervisorSource),
}

impl SpoolSource {
    /// Binds the socket and opens the spool; `None` for a source of files. Blocking.
    pub fn open(
        attributes: &Arc<Attributes>,
        state_dir: &Path,
        budget: &Arc<Budget>,
    ) -> Result<Option<SpoolSource>, OpenError> {
        let intake = match &attributes.source.input {
            Input::Files { .. } => return Ok(None),
            Input::Stdin => Intake::Stdin(StdinSource::open().map_err(OpenError::Stdin)?),
            Input::SupervisorEvents => Intake::Supervisor(
                SupervisorSource::open(state_dir).map_err(OpenError::Supervisor)?,
            ),
            Input::UnixDatagram { path, mode } => {
                Intake::Datagram(DatagramSource::bind(path, *mode)?)
            }
            Input::UnixStream { path, mode } => Intake::Stream(StreamSource::bind(path, *mode)?),
            Input::HttpIntake { address } => Intake::Http(HttpIntake::bind(*address)?),
            Input::SyslogUdp { address, receive_buffer } => {
                Intake::Datagram(DatagramSource::bind_udp(*address, *receive_buffer)?)
            }
            Input::SyslogTcp { address, tls } => {
                Intake::Stream(StreamSource::bind_tcp(*address, tls.as_ref())?)
            }
        };
        let folder = directory(state_dir, &attributes.source.name);
        let spool = Arc::new(Spool::open(&folder, budget.clone())?);
        Ok(Some(SpoolSource { attributes: attributes.clone(), spool, intake }))
    }

    /// The spool, for giving back what is receipted durably.
    pub fn spool(&self) -> Arc<Spool> {
        self.spool.clone()
    }

    /// Spools what comes in and sends what is spooled, until stopped; standard input also ends by
    /// itself, once everything of it is receipted. `false` where that failed.
    pub async fn run(self, context: Arc<Context>) -> bool {
        let SpoolSource { attributes, spool, intake } = self;
        let is_stdin = matches!(intake, Intake::Stdin(_));
        let lost = context.totals.lost_datagrams.clone();
        let intake = tokio::spawn(take_in(intake, spool.clone(), context.stopping.clone(), lost));
        let follower = SpoolFollower {
            context,
            attributes,
            spool,
            streams: HashMap::new(),
            tasks: JoinSet::new(),
            ended: false,
        };
        follower.run(intake, is_stdin).await
    }
}

/// Runs the socket; `true` when its input is finished.
async fn take_in(
    intake: Intake,
    spool: Arc<Spool>,
    stopping: CancellationToken,
    lost_datagrams: Arc<AtomicU64>,
) -> Result<bool, SourceError> {
    match intake {
        Intake::Datagram(source) => {
            source.run(spool, stopping, lost_datagrams).await.map(|()| false)
        }
        Intake::Stream(source) => source.run(spool, stopping).await.map(|()| false),
        Intake::Http(source) => source.run(spool, stopping).await.map(|()| false),
        Intake::Stdin(source) => {
            source.run(spool, stopping).await.map(|end| end == StdinEnd::Finished)
        }
        Intake::Supervisor(source) => {
            let end = source.run(spool, stopping.clone()).await?;
            if end == StdinEnd::Finished {
                info!("supervisor closed standard input: stopping with it");
                stopping.cancel();
            }
            Ok(false)
        }
    }
}

struct SpoolFollower {
    context: Arc<Context>,
    attributes: Arc<Attributes>,
    spool: Arc<Spool>,
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
    async fn run(
        mut self,
        mut intake: JoinHandle<Result<bool, SourceError>>,
        is_stdin: bool,
    ) -> bool {
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
            let stopping = self.context.stopping.clone();
            tokio::select! {
                () = stopping.cancelled(), if !running => break,
                _ = watermark.changed() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                ended = &mut intake, if running => {
                    running = false;
                    match ended {
                        Ok(Ok(finished)) => self.ended = is_stdin && finished,
                        Ok(Err(error)) => {
                            error!(source = ?self.attributes.source.name, %error, "source ended");
                            healthy = false;
                        }
                        Err(error) => {
                            error!(source = ?self.attributes.source.name, %error, "source ended");
                            healthy = false;
                        }
                    }
                    if self.ended {
                        info!("standard input is finished");
                        self.spool.end_segment();
                    }
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
