//! The sender: sources to streams, streams to a receiver, receipts to positions.
//!
//! `waybill send` makes a [`Sender`], which outlives its configurations. Each stream is a task of
//! its own ([`stream`]); they share the connections to receivers ([`connection`]) and one durable
//! state. Only a receipt moves a position.

mod chain;
mod connection;
mod dial;
mod follow;
mod intakes;
mod kept;
mod link;
mod listen;
mod metrics;
mod origin;
mod receipts;
mod rows;
mod spools;
mod stream;
mod window;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::config::{ConnectionConfig, DialConfig, Input, SendConfig, SourceConfig};
use crate::descriptors;
use crate::shutdown::Shutdown;
use crate::source::files::tail::Tail;
use crate::spool::{Budget, Spool};
use crate::state::{self, Entry, State, StateError, machine_identity};
use crate::telemetry::Progress;
use crate::tls::{ClientTrust, TlsError};

use chain::Answerer;
use connection::{Connections, Pace};
use dial::{Dialler, LinkError};
use follow::Follower;
use intakes::{Intakes, Needed};
use link::Links;
pub use listen::receiver_refusal;
use listen::{Address, ListenError, Listening};
pub use metrics::Metrics;
use origin::{FileOrigin, Origin};
use receipts::Receipts;
use rows::{Attributes, Opening, progress_at_start};
use spools::SpoolFollower;

/// How often positions are made durable.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How often it is said that they cannot be saved.
const UNSAVED_INTERVAL: Duration = Duration::from_secs(30);

/// How often the same deferral is logged.
const DEFERRAL_INTERVAL: Duration = Duration::from_secs(30);

/// Why sending did not start, or ended early.
#[derive(Debug, Error)]
pub enum SendError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The CA file, the certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A running sender keeps its state directory.
    #[error("state_dir cannot change while this process runs: {dir} is in use; restart to move it")]
    StateMoved {
        /// The one in use.
        dir: PathBuf,
    },
    /// A source cannot be opened.
    #[error("source {source_name:?}: {error}")]
    Source {
        /// Its name.
        source_name: String,
        /// Why.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The receipts cannot be written.
    #[error("receipts cannot be written to {path}: {source}; check the path and its permissions")]
    Receipts {
        /// As configured.
        path: String,
        /// From the operating system.
        source: io::Error,
    },
    /// No receiver can connect.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// With `--once`: the receiver cannot be used before a person mends something.
    #[error("{0}")]
    Link(String),
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Lines stored by this process's receipts.
    pub stored: u64,
    /// Lines that were there already.
    pub already: u64,
    /// Empty lines and NUL runs.
    pub skipped: u64,
    /// Lines in the dead letter.
    pub parked: u64,
    /// Bytes sent, resends included.
    pub sent_bytes: u64,
    /// Bytes sent again.
    pub resent_bytes: u64,
    /// Bytes that were reported lost.
    pub lost_bytes: u64,
    /// Datagrams that the kernel counted as dropped, at all UDP sockets.
    pub lost_datagrams: u64,
    /// Bytes of what was followed that had no receipt at the end: the next run sends them.
    pub left_bytes: u64,
    /// Every line was receipted: with `--once`, the exit code depends on it.
    pub complete: bool,
}

/// What all streams share.
pub struct Context {
    config: Arc<SendConfig>,
    state: Arc<State>,
    links: watch::Receiver<Links>,
    wanted: Arc<Notify>,
    receipts: Option<Receipts>,
    /// What there was to send when each file was found, in bytes.
    total_bytes: AtomicU64,
    /// By run: what the last stream of it left without a receipt, in bytes.
    left: Mutex<HashMap<Uuid, u64>>,
    deferrals: Deferrals,
    kept_bytes: AtomicU64,
    /// Files wait until others give their descriptors back.
    crowded: AtomicBool,
    shutdown: Shutdown,
    /// Stop reading; wait for receipts. The shutdown's own.
    stopping: CancellationToken,
    /// Stop waiting.
    ending: CancellationToken,
}

impl Context {
    fn note_left(&self, run: Uuid, bytes: u64) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        match bytes {
            0 => left.remove(&run),
            _ => left.insert(run, bytes),
        };
    }

    fn left_bytes(&self) -> u64 {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    fn path_of(&self, source: &SourceConfig) -> String {
        match &source.input {
            Input::UnixDatagram { path, .. } | Input::UnixStream { path, .. } => {
                crate::record::escape_path(path)
            }
            Input::Files { .. }
            | Input::Stdin
            | Input::SupervisorEvents
            | Input::HttpIntake { .. }
            | Input::SyslogUdp { .. }
            | Input::SyslogTcp { .. } => String::new(),
        }
    }
}

/// Says why lines are deferred, without saying it for each frame.
#[derive(Debug, Default)]
struct Deferrals(Mutex<HashMap<(String, String), Instant>>);

impl Deferrals {
    fn say(&self, path: &str, reason: &str, after: Duration) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.retain(|_, at| at.elapsed() < DEFERRAL_INTERVAL);
        let key = (path.to_owned(), reason.to_owned());
        if said.contains_key(&key) {
            return;
        }
        said.insert(key, Instant::now());
        warn!(path, reason, again_in = ?after, "the receiver cannot store these lines yet");
    }
}

/// A sender: what lives as long as the process, whatever configuration is in force.
pub struct Sender {
    state: Arc<State>,
    budget: Arc<Budget>,
    intakes: Intakes,
    /// Where receivers connect, if they do.
    address: Option<Address>,
    metrics: Arc<Metrics>,
    /// Tells this process from others with a copy of the state directory.
    run: Uuid,
    shutdown: Shutdown,
}

/// A configuration of which everything is opened that can be before it is in force.
pub struct Prepared {
    config: Arc<SendConfig>,
    opener: Opener,
    receipts: Option<(Receipts, JoinHandle<()>)>,
    sources: Vec<Arc<Attributes>>,
    needed: Needed,
}

/// Who opens the connection with a receiver, and what that takes.
enum Opener {
    Dial(DialConfig, Option<Arc<ClientTrust>>),
    Listen(Listening),
}

impl Opener {
    fn of(config: &ConnectionConfig, current: Option<&Address>) -> Result<Opener, SendError> {
        match config.clone() {
            ConnectionConfig::Dial(config) => {
                let trust = match config.to.iter().any(|endpoint| endpoint.tls) {
                    true => {
                        Some(ClientTrust::open(config.ca.as_deref(), config.identity.as_ref())?)
                    }
                    false => None,
                };
                Ok(Opener::Dial(config, trust))
            }
            ConnectionConfig::Listen(config) => {
                Ok(Opener::Listen(Listening::open(config, current)?))
            }
        }
    }
}

impl Sender {
    /// Opens the state.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened.
    pub fn open(config: &SendConfig, shutdown: &Shutdown) -> Result<Sender, SendError> {
        let state = Arc::new(State::open(&config.state_dir, &machine_identity())?);
        if state.was_cloned() {
            warn!(
                "this state directory comes from another machine: new rows opened at its positions"
            );
        }
        let budget = Arc::new(Budget::new(config.spool_bytes_max));
        let metrics = Arc::new(Metrics::new(budget.clone()));
        let shutdown = shutdown.clone();
        let intakes = Intakes::default();
        let run = Uuid::now_v7();
        Ok(Sender { state, budget, intakes, address: None, metrics, run, shutdown })
    }

    /// What it counts.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Opens what `config` needs beyond what is open, sockets among it. Where it fails, everything
    /// is as before.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be put in force, in this process or at all.
    pub fn prepare(&self, config: SendConfig) -> Result<Prepared, SendError> {
        if config.state_dir != self.state.dir() {
            return Err(SendError::StateMoved { dir: self.state.dir().to_owned() });
        }
        let opener = Opener::of(&config.connection, self.address.as_ref())?;
        let receipts = config.receipts.as_ref().map(|target| {
            Receipts::open(target)
                .map_err(|source| SendError::Receipts { path: target.to_string(), source })
        });
        let host = host_name();
        let attributes = |source: &SourceConfig| {
            let counters = self.metrics.sources.of(&source.name);
            Arc::new(Attributes { source: source.clone(), host: host.clone(), counters })
        };
        let sources: Vec<_> = config.sources.iter().map(attributes).collect();
        let needed = self.intakes.open(&sources, self.state.dir(), &self.budget)?;
        let (config, receipts) = (Arc::new(config), receipts.transpose()?);
        Ok(Prepared { config, opener, receipts, sources, needed })
    }

    /// Puts a configuration in force that takes the place of the one before, which has ended.
    /// What it returns sends until `part` stops, or, with `--once` or only standard input, until
    /// everything is receipted.
    ///
    /// # Errors
    ///
    /// Where a socket that another source had cannot be bound again; and later, with `--once`,
    /// where only a person can mend what is wrong.
    pub async fn start(
        &mut self,
        prepared: Prepared,
        part: Shutdown,
    ) -> Result<impl Future<Output = Result<Summary, SendError>> + Send + use<>, SendError> {
        let Prepared { config, opener, receipts, sources, needed } = prepared;
        self.budget.set_max(config.spool_bytes_max);
        let (dir, budget) = (self.state.dir(), &self.budget);
        self.intakes.change(&sources, needed, dir, budget, &self.shutdown).await?;
        let (receipts, receipts_thread) = receipts.unzip();
        let (links_sender, links) = watch::channel(Links::default());
        let wanted = Arc::new(Notify::new());
        let ending = CancellationToken::new();
        let context = Arc::new(Context {
            config: config.clone(),
            state: self.state.clone(),
            links,
            wanted: wanted.clone(),
            receipts,
            total_bytes: AtomicU64::new(0),
            left: Mutex::default(),
            deferrals: Deferrals::default(),
            kept_bytes: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            stopping: part.token(),
            shutdown: part,
            ending: ending.clone(),
        });
        let connections = Connections {
            instance: self.state.instance(),
            run: self.run,
            compress: config.compress,
            pace: Pace::new(config.rate_limit),
            chain: (config.chain_key_file.clone())
                .map(|file| Answerer::new(file, self.state.clone())),
            links: links_sender,
            stop: ending,
            metrics: self.metrics.clone(),
        };
        self.address = match &opener {
            Opener::Dial(..) => None,
            Opener::Listen(listening) => Some(listening.address()),
        };
        self.metrics.set_certificate(self.address.as_ref().and_then(Address::certificate));
        let connector = match opener {
            Opener::Dial(dial, trust) => {
                let (connections, once) = (Arc::new(connections), config.once);
                Connector::Dial(Dialler { config: dial, trust, connections, wanted, once })
            }
            Opener::Listen(listening) => Connector::Listen(listening, connections),
        };
        let mut spools = Vec::new();
        let mut followers = Vec::new();
        for attributes in &sources {
            if let Some((spool, intake)) = self.intakes.of(&attributes.source) {
                spools.push(spool.clone());
                let (context, attributes) = (context.clone(), attributes.clone());
                followers.push(SpoolFollower::new(context, attributes, spool, intake));
            }
        }
        let metrics = self.metrics.clone();
        let saver = Saver { context, spools, metrics, said: Mutex::default() };
        self.metrics.ready.store(true, Ordering::Relaxed);
        Ok(run(sources, followers, connector, saver, receipts_thread))
    }

    /// Waits until sockets are let go, after the shutdown.
    pub async fn close(self) {
        self.metrics.ready.store(false, Ordering::Relaxed);
        self.intakes.end().await;
    }
}

async fn run(
    sources: Vec<Arc<Attributes>>,
    followers: Vec<SpoolFollower>,
    connector: Connector,
    saver: Saver,
    receipts_thread: Option<JoinHandle<()>>,
) -> Result<Summary, SendError> {
    let context = saver.context.clone();
    let complete = drive(&context, &sources, followers, connector, &saver).await;
    context.ending.cancel();
    saver.save().await;
    saver.metrics.left_bytes.store(context.left_bytes(), Ordering::Relaxed);
    let summary = saver.metrics.summary(*complete.as_ref().unwrap_or(&false));
    drop((saver, context));
    if let Some(thread) = receipts_thread {
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
    complete.map_err(|error| SendError::Link(error.to_string())).map(|_| summary)
}

/// What comes to a connection with a receiver, over and over.
enum Connector {
    Dial(Dialler),
    Listen(Listening, Connections),
}

impl Connector {
    /// Until stopped, or until an error that only a person can mend, with `--once`.
    async fn run(self) -> Result<(), LinkError> {
        match self {
            Connector::Dial(dialler) => dialler.run().await,
            Connector::Listen(listening, connections) => {
                listening.run(connections).await;
                Ok(())
            }
        }
    }
}

/// Runs sources and connection side by side until the sources are done or the drain is over.
async fn drive(
    context: &Arc<Context>,
    sources: &[Arc<Attributes>],
    followers: Vec<SpoolFollower>,
    connector: Connector,
    saver: &Saver,
) -> Result<bool, LinkError> {
    let follows_files = sources.len() > followers.len();
    let mut work = JoinSet::new();
    for follower in followers {
        work.spawn(follower.run());
    }
    if follows_files {
        work.spawn(Follower::new(context.clone(), sources).run());
    }
    let mut connecting = tokio::spawn(connector.run());
    let mut connecting_ended = false;
    let mut saving = tokio::time::interval(SAVE_INTERVAL);
    let deadline = async {
        context.stopping.cancelled().await;
        tokio::time::sleep(context.config.drain_timeout).await;
    };
    tokio::pin!(deadline);
    let mut progress = Progress::new(context.config.progress);
    let mut complete = true;
    let mut refusal = None;
    loop {
        tokio::select! {
            ended = work.join_next() => match ended {
                Some(Ok(healthy)) => complete &= healthy,
                Some(Err(error)) => {
                    error!(%error, "a source ended unexpectedly");
                    complete = false;
                }
                None => break,
            },
            // A script that was interrupted must not take its files for sent.
            () = context.stopping.cancelled(), if complete && context.config.once => {
                complete = false;
            }
            () = &mut deadline, if !context.ending.is_cancelled() => {
                warn!("stopping without some receipts: those lines are sent again at the next start");
                complete = false;
                context.ending.cancel();
            }
            ended = &mut connecting, if !connecting_ended => {
                connecting_ended = true;
                match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => refusal = Some(error),
                    Err(error) => error!(%error, "the connection task ended unexpectedly"),
                }
                complete = false;
                context.ending.cancel();
                // Nobody waits for sockets, which go on until this process ends.
                context.shutdown.request_alone();
            }
            _ = saving.tick() => {
                saver.save().await;
                let sources = &saver.metrics.sources;
                let done = saver.metrics.summary(false);
                progress.set_total(context.total_bytes.load(Ordering::Relaxed));
                let bytes = sources.sum(|counters| &counters.receipted_bytes);
                progress.set(bytes, done.stored + done.already + done.parked);
            }
        }
    }
    progress.finish();
    context.ending.cancel();
    if !connecting_ended {
        // Lets the close frame out; a receiver that does not answer holds up nobody.
        let _ = tokio::time::timeout(Duration::from_secs(2), connecting).await;
    }
    match refusal {
        Some(error) => Err(error),
        None => Ok(complete),
    }
}

/// Makes positions durable, and gives back what they cover.
struct Saver {
    context: Arc<Context>,
    spools: Vec<Arc<Spool>>,
    metrics: Arc<Metrics>,
    /// When a failure was said last.
    said: Mutex<Option<Instant>>,
}

impl Saver {
    async fn save(&self) {
        self.metrics.set_kept(
            self.context.kept_bytes.load(Ordering::Relaxed),
            self.context.config.kept_bytes_max,
        );
        let state = self.context.state.clone();
        let spools = self.spools.clone();
        let save = move || {
            state.save()?;
            for spool in &spools {
                for segment in spool.segments() {
                    if let Some(position) = state.durable_position(segment.id.0) {
                        spool.release(segment.id, position)?;
                    }
                }
            }
            Ok(())
        };
        let saved: io::Result<()> = tokio::task::spawn_blocking(save)
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)));
        let Err(error) = saved else { return };
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= UNSAVED_INTERVAL) {
            *said = Some(Instant::now());
            let advice = descriptors::advice(&error)
                .unwrap_or("make room in the state directory, or mend its disk");
            warn!(%error, "positions cannot be saved: after a crash, lines are sent again; {advice}");
        }
    }
}

/// The row that a sender of this source would open in this file at this offset; nothing is written.
/// The file must reach that far.
pub fn open_file_row(
    source: &SourceConfig,
    tail: Tail,
    start: u64,
) -> io::Result<(Entry, state::Progress)> {
    let mut file = Origin::File(FileOrigin::new(tail)?);
    let before = file.before(start)?;
    let Origin::File(file) = file else { unreachable!("it is a file") };
    let opening = Opening::in_file(Uuid::now_v7(), &file, start)?;
    let entry = offline(source).open(opening, None);
    let mut progress = progress_at_start(&entry.row, &file.tail, &before);
    if !file.tail.is_compressed() {
        progress.size = file.tail.size()?;
    }
    Ok((entry, progress))
}

/// The row that makes a sender of this source send of this file only what comes after now; nothing is
/// written.
pub fn pass_over_row(source: &SourceConfig, mut tail: Tail) -> io::Result<Entry> {
    let path = tail.path().to_owned();
    rows::passed_over(&offline(source), &mut tail, &path)
}

fn offline(source: &SourceConfig) -> Attributes {
    Attributes { source: source.clone(), host: host_name(), counters: Arc::default() }
}

fn host_name() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy().into_owned();
    if name.is_empty() {
        info!("this host has no name: documents get host.name \"localhost\"");
        return "localhost".to_owned();
    }
    name
}
