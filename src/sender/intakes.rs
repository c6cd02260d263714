//! Sockets and standard input on their way into spools.
//!
//! An intake lives as long as its source has the same name and input, whatever else of the
//! configuration changes: its socket stays bound and is read all the while.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::SendError;
use super::rows::Attributes;
use crate::config::{Input, SourceConfig};
use crate::shutdown::Shutdown;
use crate::source::datagram::DatagramSource;
use crate::source::http_intake::HttpIntake;
use crate::source::stdin::{StdinEnd, StdinSource};
use crate::source::stream::StreamSource;
use crate::source::supervisor::SupervisorSource;
use crate::source::{BindError, SourceError};
use crate::spool::{Budget, Spool, SpoolError, Throttle, directory};

/// How often a socket is bound again whose place is to be mended.
const BIND_INTERVAL: Duration = Duration::from_secs(1);

/// How often it is looked whether somebody still reads an old spool.
const LET_GO_INTERVAL: Duration = Duration::from_millis(10);

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
    /// Another source would go on reading standard input.
    #[error("standard input goes to one source, under one name: restart to change it")]
    StdinTaken,
}

/// A socket with its spool, before its first byte.
pub struct SpoolSource {
    source: SourceConfig,
    spool: Arc<Spool>,
    intake: Intake,
}

enum Intake {
    Datagram(DatagramSource),
    Stream(StreamSource),
    Http(HttpIntake),
    Stdin(StdinSource),
    Supervisor(SupervisorSource),
    Unbound(Unbound),
}

/// A Unix socket that is to be bound, perhaps once somebody has mended its place.
struct Unbound {
    path: PathBuf,
    mode: u32,
    bind: fn(&Path, u32) -> Result<Intake, BindError>,
    said: Throttle,
}

impl Unbound {
    fn new(path: &Path, mode: u32, bind: fn(&Path, u32) -> Result<Intake, BindError>) -> Unbound {
        Unbound { path: path.to_owned(), mode, bind, said: Throttle::default() }
    }

    fn bind(&self) -> Result<Intake, BindError> {
        (self.bind)(&self.path, self.mode)
    }

    /// Binds; what somebody can mend meanwhile is left for later.
    fn open(self) -> Result<Intake, BindError> {
        match self.bind() {
            Err(error) if error.is_about_the_place() => {
                self.say(&error);
                Ok(Intake::Unbound(self))
            }
            bound => bound,
        }
    }

    /// Tries until it is bound; `None` at the stop.
    async fn wait(self, stopping: &CancellationToken) -> Option<Intake> {
        loop {
            tokio::select! {
                () = stopping.cancelled() => return None,
                () = tokio::time::sleep(BIND_INTERVAL) => {}
            }
            match tokio::task::block_in_place(|| self.bind()) {
                Ok(intake) => return Some(intake),
                Err(error) => self.say(&error),
            }
        }
    }

    fn say(&self, error: &BindError) {
        if self.said.count().is_some() {
            error!("{error}; until then this source takes nothing, and the others go on");
        }
    }
}

impl Intake {
    /// Binds the socket, if it can be; `None` for a source of files. Blocking.
    fn bind(attributes: &Attributes, state_dir: &Path) -> Result<Option<Intake>, OpenError> {
        Ok(Some(match &attributes.source.input {
            Input::Files { .. } => return Ok(None),
            Input::Stdin => Intake::Stdin(StdinSource::open().map_err(OpenError::Stdin)?),
            Input::SupervisorEvents => Intake::Supervisor(
                SupervisorSource::open(state_dir).map_err(OpenError::Supervisor)?,
            ),
            Input::UnixDatagram { path, mode } => Unbound::new(path, *mode, |path, mode| {
                Ok(Intake::Datagram(DatagramSource::bind(path, mode)?))
            })
            .open()?,
            Input::UnixStream { path, mode } => Unbound::new(path, *mode, |path, mode| {
                Ok(Intake::Stream(StreamSource::bind(path, mode)?))
            })
            .open()?,
            Input::HttpIntake { address } => Intake::Http(HttpIntake::bind(*address)?),
            Input::SyslogUdp { address, receive_buffer } => {
                let dropped = attributes.counters.dropped_datagrams.clone();
                let bound = DatagramSource::bind_udp(*address, *receive_buffer)?;
                Intake::Datagram(bound.counting(dropped))
            }
            Input::SyslogTcp { address, tls } => {
                Intake::Stream(StreamSource::bind_tcp(*address, tls.as_ref())?)
            }
        }))
    }
}

impl SpoolSource {
    /// Opens the spool behind this intake. Blocking.
    fn open(
        attributes: &Attributes,
        intake: Intake,
        state_dir: &Path,
        budget: &Arc<Budget>,
    ) -> Result<SpoolSource, OpenError> {
        let source = attributes.source.clone();
        let folder = directory(state_dir, &source.name);
        let spool = Arc::new(Spool::open(&folder, budget.clone())?);
        Ok(SpoolSource { source, spool, intake })
    }

    /// Spools what comes in, until `shutdown` or until the source is given up.
    fn start(self, shutdown: &Shutdown) -> Running {
        let SpoolSource { source, spool, intake } = self;
        let stop = shutdown.token().child_token();
        let (say, ended) = watch::channel(None);
        let (name, into) = (source.name.clone(), spool.clone());
        let (stopping, everything) = (stop.clone(), shutdown.clone());
        let task = tokio::spawn(async move {
            // Should this panic, the channel closes, which its readers take for a failure.
            let end = match take_in(intake, into.clone(), stopping, everything).await {
                Ok(true) => {
                    info!("standard input is finished");
                    into.end_segment();
                    IntakeEnd::Finished
                }
                Ok(false) => IntakeEnd::Stopped,
                Err(error) => {
                    error!(source = name, %error, "source ended");
                    IntakeEnd::Failed
                }
            };
            say.send_replace(Some(end));
        });
        Running { source, spool, ended, stop, task }
    }
}

/// How an intake ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IntakeEnd {
    /// Standard input came to its end: no more bytes will come.
    Finished,
    /// It was told to.
    Stopped,
    /// The socket cannot be read, or the spool not written.
    Failed,
}

/// Runs the socket; `true` when its input is finished.
async fn take_in(
    intake: Intake,
    spool: Arc<Spool>,
    stopping: CancellationToken,
    everything: Shutdown,
) -> Result<bool, SourceError> {
    match intake {
        Intake::Datagram(source) => source.run(spool, stopping).await.map(|()| false),
        Intake::Stream(source) => source.run(spool, stopping).await.map(|()| false),
        Intake::Http(source) => source.run(spool, stopping).await.map(|()| false),
        Intake::Unbound(socket) => match socket.wait(&stopping).await {
            Some(bound) => Box::pin(take_in(bound, spool, stopping, everything)).await,
            None => Ok(false),
        },
        Intake::Stdin(source) => {
            source.run(spool, stopping).await.map(|end| end == StdinEnd::Finished)
        }
        Intake::Supervisor(source) => {
            if source.run(spool, stopping).await? == StdinEnd::Finished {
                info!("supervisor closed standard input: stopping with it");
                everything.request();
            }
            Ok(false)
        }
    }
}

/// An intake that runs.
struct Running {
    source: SourceConfig,
    spool: Arc<Spool>,
    ended: watch::Receiver<Option<IntakeEnd>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn serves(&self, source: &SourceConfig) -> bool {
        self.source.name == source.name && self.source.input == source.input
    }

    /// Takes in and syncs what is queued, and lets go of the socket.
    async fn end(&mut self) {
        self.stop.cancel();
        if let Err(error) = (&mut self.task).await {
            error!(source = self.source.name, %error, "source ended unexpectedly");
        }
    }

    /// The same, and lets go of the spool, so that another may open it.
    async fn give_up(mut self) {
        self.end().await;
        let source = &self.source.name;
        match self.spool.unreleased() {
            0 => info!(source, "source given up"),
            bytes => warn!(
                source,
                bytes,
                "source given up: what of it has no receipt stays in \
                the spool until a source has this name again"
            ),
        }
        let left = Arc::downgrade(&self.spool);
        drop(self.spool);
        // A read that was under way may hold it for a moment; two must never write one folder.
        while left.strong_count() > 0 {
            tokio::time::sleep(LET_GO_INTERVAL).await;
        }
    }
}

/// All that run.
#[derive(Default)]
pub struct Intakes(Vec<Running>);

/// What a configuration needs and what does not run yet.
#[derive(Default)]
pub struct Needed {
    opened: Vec<SpoolSource>,
    /// Sources whose name another one holds that is given up; without an intake where that one holds
    /// the address or path, too.
    held: Vec<(Arc<Attributes>, Option<Intake>)>,
}

impl Intakes {
    /// Opens what these sources need beyond what runs. Where that fails, nothing has changed.
    pub fn open(
        &self,
        sources: &[Arc<Attributes>],
        state_dir: &Path,
        budget: &Arc<Budget>,
    ) -> Result<Needed, SendError> {
        let mut needed = Needed::default();
        for attributes in sources {
            let source = &attributes.source;
            if self.0.iter().any(|running| running.serves(source)) {
                continue;
            }
            let Some(claim) = Claim::of(&source.input) else { continue };
            let claimed =
                |running: &Running| Claim::of(&running.source.input).as_ref() == Some(&claim);
            let named = |running: &Running| {
                running.source.name == source.name && Claim::of(&running.source.input).is_some()
            };
            if self.0.iter().any(claimed) {
                if claim == Claim::Stdin {
                    return Err(failed(source, OpenError::StdinTaken));
                }
                assignable(&source.input).map_err(|error| failed(source, error))?;
                needed.held.push((attributes.clone(), None));
            } else if self.0.iter().any(named) {
                needed.held.push((attributes.clone(), bound(attributes, state_dir)?));
            } else if let Some(intake) = bound(attributes, state_dir)? {
                needed.opened.push(opened(attributes, intake, state_dir, budget)?);
            }
        }
        Ok(needed)
    }

    /// Ends what `sources` do not need, opens what could not be opened before, and starts what is
    /// new. Nobody else may hold a spool that ends.
    pub async fn change(
        &mut self,
        sources: &[Arc<Attributes>],
        mut needed: Needed,
        state_dir: &Path,
        budget: &Arc<Budget>,
        shutdown: &Shutdown,
    ) -> Result<(), SendError> {
        let wanted =
            |running: &Running| sources.iter().any(|attributes| running.serves(&attributes.source));
        let (kept, given_up) = std::mem::take(&mut self.0).into_iter().partition(wanted);
        self.0 = kept;
        for running in given_up {
            running.give_up().await;
        }
        for (attributes, intake) in needed.held {
            let intake = match intake {
                None => bound(&attributes, state_dir)?,
                intake => intake,
            };
            if let Some(intake) = intake {
                needed.opened.push(opened(&attributes, intake, state_dir, budget)?);
            }
        }
        self.0.extend(needed.opened.into_iter().map(|source| source.start(shutdown)));
        Ok(())
    }

    /// The spool of a source, and how its intake ends; `None` for a source of files.
    pub fn of(
        &self,
        source: &SourceConfig,
    ) -> Option<(Arc<Spool>, watch::Receiver<Option<IntakeEnd>>)> {
        let running = self.0.iter().find(|running| running.serves(source))?;
        Some((running.spool.clone(), running.ended.clone()))
    }

    /// Ends all of them.
    pub async fn end(self) {
        for mut running in self.0 {
            running.end().await;
        }
    }
}

fn bound(attributes: &Attributes, state_dir: &Path) -> Result<Option<Intake>, SendError> {
    Intake::bind(attributes, state_dir).map_err(|error| failed(&attributes.source, error))
}

fn opened(
    attributes: &Attributes,
    intake: Intake,
    state_dir: &Path,
    budget: &Arc<Budget>,
) -> Result<SpoolSource, SendError> {
    let opened = SpoolSource::open(attributes, intake, state_dir, budget);
    opened.map_err(|error| failed(&attributes.source, error))
}

/// Whether this machine has the address, whose port a source that is given up holds still.
fn assignable(input: &Input) -> Result<(), OpenError> {
    let address = match input {
        Input::HttpIntake { address }
        | Input::SyslogTcp { address, .. }
        | Input::SyslogUdp { address, .. } => *address,
        _ => return Ok(()),
    };
    match UdpSocket::bind((address.ip(), 0)) {
        Ok(_) => Ok(()),
        Err(error) => Err(BindError::address(address, error).into()),
    }
}

fn failed(source: &SourceConfig, error: OpenError) -> SendError {
    SendError::Source { source_name: source.name.clone(), error: Box::new(error) }
}

/// What only one source of a machine can have.
#[derive(PartialEq, Eq)]
enum Claim<'s> {
    Path(&'s Path),
    Tcp(u16),
    Udp(u16),
    Stdin,
}

impl Claim<'_> {
    fn of(input: &Input) -> Option<Claim<'_>> {
        let tcp = |address: &SocketAddr| Some(Claim::Tcp(address.port()));
        match input {
            Input::Files { .. } => None,
            Input::Stdin | Input::SupervisorEvents => Some(Claim::Stdin),
            Input::UnixDatagram { path, .. } | Input::UnixStream { path, .. } => {
                Some(Claim::Path(path))
            }
            Input::HttpIntake { address } | Input::SyslogTcp { address, .. } => tcp(address),
            Input::SyslogUdp { address, .. } => Some(Claim::Udp(address.port())),
        }
    }
}
