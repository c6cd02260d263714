//! supervisor's event listener: programs' output over standard input, answers on standard output.
//!
//! `waybill send --supervisor-events` runs from an `[eventlistener:…]` section. supervisor sends
//! one event, waits for `RESULT`, and sends the next: an event is answered only when its lines are
//! synced to the spool, so a killed listener loses nothing that it answered. Nothing else may ever
//! be written to standard output: supervisor would send no more events.
//!
//! What no listener can prevent: supervisor keeps `buffer_size` events while the listener is away
//! or slow, in memory, and drops the oldest beyond that. Such gaps are counted and reported (I9).

mod event;
mod journal;
mod lines;

use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::event::{Event, Events};
use self::journal::{Entry, Journal};
use self::lines::Partials;
use super::socket::{Intake, SourceError, now_ms};
use super::stdin::{Ready, StdinEnd, is_passing, wait};
use crate::backoff::Backoff;
use crate::spool::{Spool, SpoolError, Throttle};

/// Bytes per read; supervisor's chunks are as long at most.
const READ_BYTES: usize = 128 << 10;

/// The file in the state directory that outlives a killed listener.
const JOURNAL_NAME: &str = "supervisor-events";

/// How fast a journal that cannot be written is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Standard input and output, before the first `READY`.
#[derive(Debug)]
pub struct SupervisorSource {
    input: File,
    output: File,
    journal: Journal,
    partials: Partials,
    newest: Option<Entry>,
    run: String,
}

impl SupervisorSource {
    /// Takes standard input and output, and reads what a killed predecessor left. Blocking.
    ///
    /// # Errors
    ///
    /// Where one of the two is closed, or the journal in `state_dir` cannot be read.
    pub fn open(state_dir: &Path) -> io::Result<SupervisorSource> {
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        SupervisorSource::with(input, output, state_dir, supervisord())
    }

    fn with(
        input: File,
        output: File,
        state_dir: &Path,
        run: String,
    ) -> io::Result<SupervisorSource> {
        let (journal, partials, newest) = Journal::open(&state_dir.join(JOURNAL_NAME))?;
        Ok(SupervisorSource { input, output, journal, partials, newest, run })
    }

    /// Takes events until the stop, or until supervisor closes standard input. The event under
    /// way is answered first; one of which only a part came is sent again by supervisor.
    ///
    /// # Errors
    ///
    /// Where standard input is no stream of events or cannot be read, or the answer cannot be
    /// written, or the spool closes too early.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
    ) -> Result<StdinEnd, SourceError> {
        // Its closing, also by dropping this future, wakes the thread.
        let (woken, wake) = io::pipe().map_err(failed)?;
        let intake = Intake { spool: spool.clone(), shutdown: shutdown.child_token() };
        let stop = intake.shutdown.clone().drop_guard();
        let listener = Listener {
            run_digest: Sha256::digest(&self.run).into(),
            source: self,
            intake,
            runtime: Handle::current(),
            gaps: Throttle::default(),
            lost: 0,
            trouble: Throttle::default(),
        };
        let (done, ended) = oneshot::channel();
        let builder = thread::Builder::new().name("supervisor".to_owned());
        let thread = builder.spawn(move || {
            // Nobody waits for it where the future was dropped.
            let _ = done.send(listener.listen(&woken));
        });
        thread.map_err(SpoolError::Thread)?;
        tokio::pin!(ended);
        let end = tokio::select! {
            biased;
            end = &mut ended => end,
            () = shutdown.cancelled() => {
                drop((stop, wake));
                ended.await
            }
        };
        spool.flush().await?;
        end.unwrap_or_else(|_| Err(failed(io::Error::other("the listening thread panicked"))))
    }
}

fn failed(source: io::Error) -> SourceError {
    SourceError::Read { from: "supervisor's events".to_owned(), source }
}

/// Names this life of our supervisord, within which its serials count: boot, process, start time.
fn supervisord() -> String {
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let stat = fs::read_to_string(format!("/proc/{parent}/stat"));
    // proc(5): the command may hold anything; behind its last parenthesis the start is the 20th.
    let start = stat.as_ref().ok().and_then(|stat| stat.rsplit_once(')')?.1.split(' ').nth(20));
    match (boot, start) {
        (Ok(boot), Some(start)) => format!("{} {parent} {start}", boot.trim()),
        // Then a repeated event is not recognised: its lines come twice.
        _ => Uuid::now_v7().to_string(),
    }
}

struct Listener {
    source: SupervisorSource,
    run_digest: [u8; 32],
    intake: Intake,
    runtime: Handle,
    gaps: Throttle,
    /// Events that supervisor dropped, as far as we saw.
    lost: u64,
    trouble: Throttle,
}

impl Listener {
    fn listen(mut self, woken: &PipeReader) -> Result<StdinEnd, SourceError> {
        let mut events = Events::default();
        let mut buffer = vec![0; READ_BYTES];
        self.answer(b"READY\n")?;
        loop {
            match wait(self.source.input.as_fd(), woken).map_err(failed)? {
                Ready::Input => {}
                Ready::Stop => return Ok(StdinEnd::Stopped),
            }
            match self.source.input.read(&mut buffer) {
                Ok(0) => return Ok(StdinEnd::Finished),
                Ok(count) => events.extend(&buffer[..count]),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(failed(error)),
            }
            let wrong = |error| failed(io::Error::new(io::ErrorKind::InvalidData, error));
            while let Some(event) = events.next().map_err(wrong)? {
                if !self.take(&event)? {
                    return Ok(StdinEnd::Stopped);
                }
                if self.intake.shutdown.is_cancelled() {
                    self.answer(b"RESULT 2\nOK")?;
                    return Ok(StdinEnd::Stopped);
                }
                // In one write: supervisor looks at its listeners once per turn of its loop.
                self.answer(b"RESULT 2\nOKREADY\n")?;
            }
        }
    }

    /// Makes an event's lines durable; `false` where the stop came first and it is not answered.
    fn take(&mut self, event: &Event) -> Result<bool, SourceError> {
        let entry = match self.repeated(event) {
            Some(entry) => entry,
            None => {
                if let Some(before) = self.source.newest.take() {
                    let gap = self.gap(&before, event);
                    self.source.partials.apply(&before.changes);
                    self.entry(event, gap)
                } else {
                    self.entry(event, false)
                }
            }
        };
        let plan = self.source.partials.plan(event, entry.time_ms, entry.gap);
        let entry = Entry { changes: plan.changes, ..entry };
        if self.source.newest.as_ref() != Some(&entry) && !self.remember(&entry) {
            return Ok(false);
        }
        for (index, record) in plan.records.iter().enumerate() {
            let key = self.key(event.serial, index);
            self.runtime.block_on(self.intake.append_keyed(entry.time_ms, &key, record));
        }
        self.source.newest = Some(entry);
        self.intake.spool.hurry();
        self.runtime.block_on(self.intake.spool.flush())?;
        Ok(true)
    }

    /// What the journal says of an event that supervisor sends again.
    fn repeated(&self, event: &Event) -> Option<Entry> {
        let newest = self.source.newest.as_ref()?;
        let same = newest.run == self.source.run && newest.serial == event.serial;
        same.then(|| newest.clone())
    }

    fn entry(&self, event: &Event, gap: bool) -> Entry {
        Entry {
            run: self.source.run.clone(),
            serial: event.serial,
            pool_serial: event.pool_serial,
            time_ms: now_ms(),
            gap,
            changes: Vec::new(),
        }
    }

    /// Whether events were lost between two; they are counted and told.
    fn gap(&mut self, before: &Entry, event: &Event) -> bool {
        if before.run != self.source.run {
            // What the former supervisord held when it ended is gone with it.
            return true;
        }
        // A pool that was made anew counts from 0 again.
        let lost = event.pool_serial.saturating_sub(before.pool_serial + 1);
        self.lost += lost;
        if lost > 0 && self.gaps.count().is_some() {
            tracing::error!(
                events = lost,
                after = before.serial,
                before = event.serial,
                total = self.lost,
                "supervisor dropped events, and with them programs' output: raise buffer_size in \
                 the [eventlistener] section",
            );
        }
        lost > 0
    }

    /// Writes the journal, patiently; `false` where the stop came first.
    fn remember(&mut self, entry: &Entry) -> bool {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let Err(error) = self.source.journal.append(&self.source.partials, entry) else {
                return true;
            };
            if let Some(times) = self.trouble.count() {
                tracing::error!(
                    %error, times,
                    "the journal of supervisor's events cannot be written, so that supervisor has \
                     to wait: make room in the state directory, or mend it",
                );
            }
            let pause = tokio::time::sleep(backoff.delay());
            let stopped = self.runtime.block_on(async {
                tokio::select! {
                    () = pause => false,
                    () = self.intake.shutdown.cancelled() => true,
                }
            });
            if stopped {
                return false;
            }
        }
    }

    /// The same for the same line of the same event of the same supervisord (I3).
    fn key(&self, serial: u64, index: usize) -> Vec<u8> {
        let mut key = self.run_digest[..8].to_vec();
        key.extend_from_slice(&serial.to_be_bytes());
        key.extend_from_slice(&(index as u64).to_be_bytes()[4..]);
        key
    }

    fn answer(&mut self, text: &[u8]) -> Result<(), SourceError> {
        self.source.output.write_all(text).map_err(|source| SourceError::Read {
            from: "supervisor's events: the answer cannot be written".to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests;
