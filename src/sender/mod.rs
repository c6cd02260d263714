//! The sender: sources to streams, streams to a receiver, receipts to positions.
//!
//! `waybill send` calls [`run`]. Each stream is a task of its own ([`stream`]); they share one
//! connection ([`connection`]) and one durable state. Only a receipt moves a position.

mod connection;
mod dial;
mod follow;
mod kept;
mod link;
mod listen;
mod origin;
mod receipts;
mod rows;
mod spools;
mod stream;
mod window;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::config::{ConnectionConfig, Input, SendConfig, SourceConfig};
use crate::descriptors;
use crate::shutdown::Shutdown;
use crate::source::files::tail::Tail;
use crate::spool::{Budget, Spool};
use crate::state::{self, Entry, State, StateError, machine_identity};
use crate::telemetry::Progress;
use crate::tls::{TlsError, client_config};

use connection::Connections;
use dial::{Dialler, LinkError};
use follow::Follower;
use link::Links;
use listen::{ListenError, Listening};
use origin::{FileOrigin, Origin};
use receipts::Receipts;
use rows::{Attributes, Opening, progress_at_start};
use spools::{OpenError, SpoolSource};
use window::Counted;

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
    totals: Totals,
    deferrals: Deferrals,
    kept_bytes: AtomicU64,
    /// Files wait until others give their descriptors back.
    crowded: AtomicBool,
    /// Stop reading; wait for receipts.
    stopping: CancellationToken,
    /// Stop waiting.
    ending: CancellationToken,
}

impl Context {
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

#[derive(Debug, Default)]
struct Totals {
    stored: AtomicU64,
    already: AtomicU64,
    skipped: AtomicU64,
    parked: AtomicU64,
    sent_bytes: AtomicU64,
    resent_bytes: AtomicU64,
    receipted_bytes: AtomicU64,
    lost_bytes: AtomicU64,
    lost_datagrams: Arc<AtomicU64>,
    /// What there was to send when each file was found.
    total_bytes: AtomicU64,
}

impl Totals {
    fn count(&self, counted: &Counted) {
        self.stored.fetch_add(counted.stored, Ordering::Relaxed);
        self.already.fetch_add(counted.already, Ordering::Relaxed);
        self.skipped.fetch_add(counted.skipped, Ordering::Relaxed);
        self.parked.fetch_add(counted.parked, Ordering::Relaxed);
    }

    fn summary(&self, complete: bool) -> Summary {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Summary {
            stored: get(&self.stored),
            already: get(&self.already),
            skipped: get(&self.skipped),
            parked: get(&self.parked),
            sent_bytes: get(&self.sent_bytes),
            resent_bytes: get(&self.resent_bytes),
            lost_bytes: get(&self.lost_bytes),
            lost_datagrams: get(&self.lost_datagrams),
            complete: complete && get(&self.parked) == 0 && get(&self.lost_bytes) == 0,
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
        warn!(path, ?reason, again_in = ?after, "the receiver cannot store these lines yet");
    }
}

/// Sends until stopped, or, with `--once` or only standard input, until everything is receipted.
///
/// # Errors
///
/// Where it cannot start; and with `--once` where only a person can mend what is wrong.
pub async fn run(config: SendConfig, shutdown: Shutdown) -> Result<Summary, SendError> {
    let config = Arc::new(config);
    let state = Arc::new(State::open(&config.state_dir, &machine_identity())?);
    if state.was_cloned() {
        warn!("this state directory comes from another machine: new rows opened at its positions");
    }
    let (receipts, receipts_thread) = match &config.receipts {
        Some(target) => {
            let (receipts, thread) = Receipts::open(target)
                .map_err(|source| SendError::Receipts { path: format!("{target:?}"), source })?;
            (Some(receipts), Some(thread))
        }
        None => (None, None),
    };
    let host = host_name();
    let sources: Vec<Arc<Attributes>> = config
        .sources
        .iter()
        .map(|source| Arc::new(Attributes { source: source.clone(), host: host.clone() }))
        .collect();
    let budget = Arc::new(Budget::new(config.spool_bytes_max));
    let mut spooled = Vec::new();
    for attributes in &sources {
        let opened = SpoolSource::open(attributes, state.dir(), &budget);
        let opened = opened.map_err(|error: OpenError| SendError::Source {
            source_name: attributes.source.name.clone(),
            error: Box::new(error),
        })?;
        spooled.extend(opened);
    }

    let (links_sender, links) = watch::channel(Links::default());
    let wanted = Arc::new(Notify::new());
    let ending = CancellationToken::new();
    let context = Arc::new(Context {
        config: config.clone(),
        state: state.clone(),
        links,
        wanted: wanted.clone(),
        receipts,
        totals: Totals::default(),
        deferrals: Deferrals::default(),
        kept_bytes: AtomicU64::new(0),
        crowded: AtomicBool::new(false),
        stopping: shutdown.token(),
        ending: ending.clone(),
    });
    let connections = Connections {
        instance: state.instance(),
        compress: config.compress,
        rate_limit: config.rate_limit,
        links: links_sender,
        stop: ending.clone(),
    };
    let connector = Connector::new(&config, connections, wanted)?;
    let saver = Saver {
        context: context.clone(),
        spools: spooled.iter().map(SpoolSource::spool).collect(),
        said: Mutex::default(),
    };
    let complete = drive(&context, &sources, spooled, connector, &saver).await;
    ending.cancel();
    saver.save().await;
    let summary = context.totals.summary(*complete.as_ref().unwrap_or(&false));
    drop((saver, context));
    if let Some(thread) = receipts_thread {
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
    complete.map_err(|error| SendError::Link(error.to_string())).map(|_| summary)
}

/// What comes to a connection with a receiver, over and over.
enum Connector {
    Dial(Dialler),
    Listen(Listening),
}

impl Connector {
    fn new(
        config: &SendConfig,
        connections: Connections,
        wanted: Arc<Notify>,
    ) -> Result<Connector, SendError> {
        let once = config.once;
        match config.connection.clone() {
            ConnectionConfig::Dial(config) => {
                if config.to.iter().any(|endpoint| endpoint.tls) {
                    // Each connection reads the files anew; what is wrong with them now is said now.
                    client_config(config.ca.as_deref(), config.identity.as_ref())?;
                }
                let connections = Arc::new(connections);
                Ok(Connector::Dial(Dialler { config, connections, wanted, once }))
            }
            ConnectionConfig::Listen(config) => {
                Ok(Connector::Listen(Listening::open(config, connections)?))
            }
        }
    }

    /// Until stopped, or until an error that only a person can mend, with `--once`.
    async fn run(self) -> Result<(), LinkError> {
        match self {
            Connector::Dial(dialler) => dialler.run().await,
            Connector::Listen(listening) => {
                listening.run().await;
                Ok(())
            }
        }
    }
}

/// Runs sources and connection side by side until the sources are done or the drain is over.
async fn drive(
    context: &Arc<Context>,
    sources: &[Arc<Attributes>],
    spooled: Vec<SpoolSource>,
    connector: Connector,
    saver: &Saver,
) -> Result<bool, LinkError> {
    let files = sources.len() - spooled.len();
    let mut work = JoinSet::new();
    for source in spooled {
        work.spawn(source.run(context.clone()));
    }
    if files > 0 {
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
    let progress = Progress::new(context.config.progress, 0);
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
                context.stopping.cancel();
            }
            _ = saving.tick() => {
                saver.save().await;
                let totals = &context.totals;
                let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
                let lines = get(&totals.stored) + get(&totals.already) + get(&totals.parked);
                progress.set_total(get(&totals.total_bytes));
                progress.set(get(&totals.receipted_bytes), lines);
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
    /// When a failure was said last.
    said: Mutex<Option<Instant>>,
}

impl Saver {
    async fn save(&self) {
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
    Attributes { source: source.clone(), host: host_name() }
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
