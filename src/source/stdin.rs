//! Standard input, through the spool: lines of whatever is piped into `waybill send -`.
//!
//! A thread of its own reads, since a pipe, a file and a terminal have nothing but a blocking read
//! in common. It waits with poll(2) for input or for the stop, so that nothing is read and lost.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::framer::Framer;
use super::socket::{Intake, SourceError};
use crate::spool::{Spool, SpoolError};

/// Bytes per read.
const READ_BYTES: usize = 64 << 10;

/// Standard input, before its first byte is read.
#[derive(Debug)]
pub struct StdinSource {
    input: File,
}

/// How reading ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StdinEnd {
    /// The input is finished: nothing more will come.
    Finished,
    /// The stop came first.
    Stopped,
}

impl StdinSource {
    /// Takes standard input.
    ///
    /// # Errors
    ///
    /// Where it is closed.
    pub fn open() -> io::Result<StdinSource> {
        Ok(StdinSource { input: File::from(io::stdin().as_fd().try_clone_to_owned()?) })
    }

    /// Spools one record per line until the end of the input or the stop, and syncs them. A last
    /// line without a newline is a record.
    ///
    /// # Errors
    ///
    /// Where reading fails (what came before is synced), or the spool closes too early.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
    ) -> Result<StdinEnd, SourceError> {
        // Its closing, also by dropping this future, wakes the thread.
        let (woken, wake) = io::pipe().map_err(unreadable)?;
        let intake = Intake { spool: spool.clone(), shutdown: shutdown.child_token() };
        let stop = intake.shutdown.clone().drop_guard();
        let runtime = Handle::current();
        let (done, ended) = oneshot::channel();
        let builder = thread::Builder::new().name("stdin".to_owned());
        let thread = builder.spawn(move || {
            // Nobody waits for it where the future was dropped.
            let _ = done.send(read_lines(self.input, &woken, &intake, &runtime));
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
        end.unwrap_or_else(|_| Err(io::Error::other("the reading thread panicked")))
            .map_err(unreadable)
    }
}

fn unreadable(source: io::Error) -> SourceError {
    SourceError::Read { from: "standard input".to_owned(), source }
}

fn read_lines(
    mut input: File,
    woken: &PipeReader,
    intake: &Intake,
    runtime: &Handle,
) -> io::Result<StdinEnd> {
    let mut framer = Framer::lines();
    let mut buffer = vec![0; READ_BYTES];
    let end = loop {
        runtime.block_on(intake.room());
        match wait(input.as_fd(), woken) {
            Ok(Ready::Input) => {}
            Ok(Ready::Stop) => break Ok(StdinEnd::Stopped),
            Err(error) => break Err(error),
        }
        match input.read(&mut buffer) {
            Ok(0) => break Ok(StdinEnd::Finished),
            Ok(count) => framer.space().extend_from_slice(&buffer[..count]),
            // Others may have made a shared terminal or pipe non-blocking.
            Err(error) if is_passing(&error) => {}
            Err(error) => break Err(error),
        }
        // Lines cannot be framed wrongly.
        while let Ok(Some(line)) = framer.next() {
            runtime.block_on(intake.append(&line));
        }
    };
    runtime.block_on(intake.append(&framer.finish()));
    end
}

/// Whether reading goes on after this.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// What came first.
pub(super) enum Ready {
    Input,
    Stop,
}

/// Waits until there is something to read, or the other end of `woken` is closed.
pub(super) fn wait(input: BorrowedFd<'_>, woken: &PipeReader) -> io::Result<Ready> {
    loop {
        if let Some(ready) = wait_at_most(input, woken, None)? {
            return Ok(ready);
        }
    }
}

/// The same, for so long; `None` where nothing came.
pub(super) fn wait_at_most(
    input: BorrowedFd<'_>,
    woken: &PipeReader,
    pause: Option<Duration>,
) -> io::Result<Option<Ready>> {
    let milliseconds = pause
        .map_or(-1, |pause| libc::c_int::try_from(pause.as_millis()).unwrap_or(libc::c_int::MAX));
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut entries = [entry(woken.as_raw_fd()), entry(input.as_raw_fd())];
    loop {
        // SAFETY: `entries` is an array of two that lives over the call, and both descriptors are
        // open as long as their owners are borrowed.
        let count = unsafe { libc::poll(entries.as_mut_ptr(), 2, milliseconds) };
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
            continue;
        }
        return Ok(match entries {
            _ if count == 0 => None,
            [woken, _] if woken.revents != 0 => Some(Ready::Stop),
            _ => Some(Ready::Input),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use tempfile::TempDir;

    use super::*;
    use crate::source::stream::tests::spooled;
    use crate::spool::Budget;

    fn spool(dir: &TempDir) -> Arc<Spool> {
        Arc::new(Spool::open(dir.path(), Arc::new(Budget::new(1 << 30))).expect("spool"))
    }

    fn source(input: impl Into<OwnedFd>) -> StdinSource {
        StdinSource { input: File::from(input.into()) }
    }

    #[tokio::test]
    async fn the_end_of_the_input_is_told_and_its_last_line_is_a_record() {
        let dir = TempDir::new().expect("dir");
        let spool = spool(&dir);
        let (reader, mut writer) = io::pipe().expect("pipe");
        writer.write_all(b"5 <13>\none\n\n\xff\nlast").expect("write");
        drop(writer);
        let end = source(reader).run(spool.clone(), CancellationToken::new()).await;
        assert_eq!(end.expect("read"), StdinEnd::Finished);
        assert_eq!(spooled(&spool), [&b"5 <13>"[..], b"one", b"\xff", b"last"]);
    }

    #[tokio::test]
    async fn a_regular_file_is_read_to_its_end() {
        let dir = TempDir::new().expect("dir");
        let file = dir.path().join("input");
        let lines: String = (0..50_000).map(|number| format!("line {number}\n")).collect();
        std::fs::write(&file, &lines).expect("write");
        let spool = spool(&dir);
        let end = source(File::open(file).expect("open"))
            .run(spool.clone(), CancellationToken::new())
            .await;
        assert_eq!(end.expect("read"), StdinEnd::Finished);
        let records = spooled(&spool);
        assert_eq!((records.len(), records[49_999].as_slice()), (50_000, &b"line 49999"[..]));
    }

    #[tokio::test]
    async fn a_stop_ends_a_silent_input_and_keeps_what_was_read() {
        let dir = TempDir::new().expect("dir");
        let spool = spool(&dir);
        let (reader, mut writer) = io::pipe().expect("pipe");
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(source(reader).run(spool.clone(), shutdown.clone()));
        writer.write_all(b"line\nunfinished").expect("write");
        let mut watermark = spool.subscribe();
        watermark.wait_for(|mark| mark.synced > 0).await.expect("open");
        shutdown.cancel();
        assert_eq!(task.await.expect("task").expect("read"), StdinEnd::Stopped);
        assert_eq!(spooled(&spool), [&b"line"[..], b"unfinished"]);
    }

    #[tokio::test]
    async fn an_unreadable_input_is_an_error() {
        let dir = TempDir::new().expect("dir");
        let input = File::open(dir.path()).expect("a directory");
        let end = source(input).run(spool(&dir), CancellationToken::new()).await;
        assert!(matches!(end, Err(SourceError::Read { .. })), "{end:?}");
    }
}
