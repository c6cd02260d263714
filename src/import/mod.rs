//! Taking over the positions of another shipper, so that a sender goes on where that one ended.
//!
//! `waybill import` calls [`run`]. A position is taken only where the file that it belongs to is
//! known for certain and the position lies behind a whole line; everything else starts at its first
//! byte, since a line that is there twice is better than one that is lost. What must never happen: a
//! row that starts behind a line which nobody has sent, or a position of Waybill's own that moves.

mod filebeat;
mod files;
mod logstash;
mod plan;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;
use thiserror::Error;

use crate::config::{ImportConfig, Input, SourceConfig};
use crate::record::escape_path;
use crate::state::{Entry, Progress, State, StateError, machine_identity};

use plan::Plan;
pub use plan::{Line, Start};

/// Whose positions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Registry {
    /// Filebeat's data folder, its registry, or one file of it.
    Filebeat(PathBuf),
    /// A sincedb file, or a folder of them.
    Logstash(PathBuf),
}

/// How far another shipper has read a file.
#[derive(Clone, PartialEq, Debug)]
struct Position {
    /// Under which path it knew the file; a rotation may have moved it since.
    path: Option<PathBuf>,
    identity: Identity,
    /// Bytes read, which for these shippers means whole lines.
    offset: u64,
    /// When it was changed last, or a later time.
    changed: SystemTime,
    /// No input of the shipper used it any more.
    stale: bool,
    /// A compressed file is counted by its stored size, once all of it was read.
    counts_stored: bool,
}

/// By what a shipper knew a file again.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Identity {
    /// The inode, with what the device may be: shippers write that in more than one way.
    Inode { inode: u64, devices: Vec<u64> },
    /// SHA-256 in lower-case hexadecimal over first bytes of the file, or over their hexadecimal
    /// text; how many is up to the shipper's configuration.
    Content(String),
    /// The path alone.
    Path,
    /// Something that is not known here, by its name.
    Unknown(String),
}

/// Why nothing was imported.
#[derive(Debug, Error)]
pub enum ImportError {
    /// There is no registry, or it cannot be read.
    #[error("{}: {reason}", escape_path(.path))]
    Registry {
        /// What was read.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The other shipper still writes it.
    #[error(
        "{shipper} still runs, as its lock {} says: stop it, and import again",
        escape_path(.lock)
    )]
    Running {
        /// Its name.
        shipper: &'static str,
        /// Its lock.
        lock: PathBuf,
    },
    /// Sockets and standard input have no positions that could be taken over.
    #[error("no source of the configuration reads files: nothing to import into")]
    NoFiles,
    /// Waybill's own state cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// Files cannot be listed, or the state cannot be written.
    #[error("{what}: {source}; nothing was imported")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl ImportError {
    fn registry(path: &Path, reason: impl Into<String>) -> ImportError {
        ImportError::Registry { path: path.to_owned(), reason: reason.into() }
    }
}

/// What was done, or with `dry_run` what would be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// One per file, in order of path.
    pub lines: Vec<Line>,
    /// How many files go on at their position.
    pub taken: usize,
    /// A file could not be read, so that nothing is known of it.
    pub failed: bool,
}

/// Reads the registries and writes a row for each file that they know, in one durable write; with
/// `dry_run` nothing is written. Blocking.
///
/// # Errors
///
/// Where a registry is damaged, its shipper still runs, or a sender uses the state directory. Then
/// nothing was written.
pub fn run(
    config: &ImportConfig,
    registries: &[Registry],
    dry_run: bool,
) -> Result<Report, ImportError> {
    let sources: Vec<&SourceConfig> = config.sources.iter().filter(|s| reads_files(s)).collect();
    if sources.is_empty() {
        return Err(ImportError::NoFiles);
    }
    let mut positions = Vec::new();
    for registry in registries {
        positions.extend(match registry {
            Registry::Filebeat(path) => filebeat::read(path)?,
            Registry::Logstash(path) => logstash::read(path)?,
        });
    }
    let failed = |what| move |source| ImportError::Io { what, source };
    let plan_with = |known: &[(Entry, Progress)]| {
        plan::make(&sources, &positions, known).map_err(failed("files cannot be listed"))
    };
    let plan = if dry_run {
        plan_with(&State::read(&config.state_dir)?)?
    } else {
        let state = State::open(&config.state_dir, &machine_identity())?;
        let plan = plan_with(&state.entries())?;
        write(&state, &sources, &plan).map_err(failed("the state directory cannot be written"))?;
        plan
    };
    Ok(Report { lines: plan.lines, taken: plan.taken, failed: plan.failed })
}

fn reads_files(source: &SourceConfig) -> bool {
    matches!(source.input, Input::Files { .. })
}

/// All rows in one write that a crash does not divide. A row starts at its position, so that it is
/// right also where the crash comes before the positions are saved. From then on, a rotated file that
/// nobody knows is one that came after the import.
fn write(state: &State, sources: &[&SourceConfig], plan: &Plan) -> io::Result<()> {
    let name = |source: usize| &sources[source].name;
    let first_run: Vec<usize> =
        (0..sources.len()).filter(|source| state.is_unsurveyed(name(*source))).collect();
    let passed = plan.passed.iter().filter(|(source, _)| first_run.contains(source));
    let taken = plan.rows.iter().map(|(entry, _)| entry);
    let entries = passed.map(|(_, entry)| entry).chain(taken).cloned().collect();
    let surveyed = first_run.iter().map(|source| name(*source).clone()).collect();
    state.pass_over(surveyed, entries, &plan.dropped)?;
    for (entry, progress) in &plan.rows {
        state.set_progress(entry.row.segment, progress.clone());
    }
    state.save()?;
    give_to_owner(state.dir())
}

/// Root may import for a sender that runs as another user: the files are that user's, as the
/// directory is.
fn give_to_owner(dir: &Path) -> io::Result<()> {
    let owner = fs::metadata(dir)?;
    if !rustix::process::geteuid().is_root() || owner.uid() == 0 {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.metadata()?.uid() == 0 {
            std::os::unix::fs::lchown(entry.path(), Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}

/// Whether a process holds a lock on this file: Go locks with flock(2), Java with fcntl(2).
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    // Taken, if at all, for this moment: closing the file gives it back.
    let shared = FlockOperation::NonBlockingLockShared;
    let taken = |tried| matches!(tried, Err(Errno::WOULDBLOCK | Errno::ACCESS));
    taken(flock(&file, shared)) || taken(fcntl_lock(&file, shared))
}
