//! A Unix datagram socket, such as nginx's `syslog:server=unix:` writes to.
//!
//! Its senders never block: while the kernel's queue is full their lines are gone, and nothing
//! tells us. That queue is counted in datagrams, `net.unix.max_dgram_qlen` at the time of the
//! bind, so a thread of its own drains it and never waits for a sync, only for room.

use std::io::{self, PipeReader, PipeWriter};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::{fs, thread};

use rustix::net::{RecvFlags, SocketType};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::socket::{BindError, Intake, SocketFile, SourceError};
use super::stdin::wait;
use crate::record::escape_path;
use crate::spool::{Spool, SpoolError, Throttle};

/// The longest datagram that is taken whole, in bytes. A sender's own bound is its send buffer,
/// 212,960 bytes by default; pages that no datagram reaches are never touched.
const DATAGRAM_BYTES_MAX: usize = 4 << 20;

/// A bound socket, before its first datagram is read.
#[derive(Debug)]
pub struct DatagramSource {
    socket: Arc<UnixDatagram>,
    file: SocketFile,
}

impl DatagramSource {
    /// Binds `path` with the permission bits `mode`; a stale socket file there is replaced.
    ///
    /// # Errors
    ///
    /// Where somebody listens there, something else lies there, or the directory is missing.
    pub fn bind(path: &Path, mode: u32) -> Result<DatagramSource, BindError> {
        let (socket, file) =
            SocketFile::bind(path, mode, SocketType::DGRAM, |path| UnixDatagram::bind(path))?;
        let queue = fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").unwrap_or_default();
        tracing::info!(
            socket = %escape_path(path), queue_datagrams = queue.trim(),
            "listening for datagrams; when the queue is full their senders drop lines",
        );
        Ok(DatagramSource { socket: Arc::new(socket), file })
    }

    /// Spools one record per datagram until the stop, and syncs them. Of a socket that this process
    /// bound, senders are then refused, what is queued is taken, and the file is unlinked; one that
    /// a service manager keeps is left as it is, with its queue.
    ///
    /// # Errors
    ///
    /// Where the socket cannot be read, or the spool closes before all is synced.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
    ) -> Result<(), SourceError> {
        let failed = |source| SourceError::Read { from: escape_path(self.file.path()), source };
        // Dropping this future stops the thread too.
        let (woken, wake) = io::pipe().map_err(failed)?;
        let stop = Stop {
            socket: (!self.file.is_kept()).then(|| self.socket.clone()),
            token: shutdown.child_token(),
            _wake: wake,
        };
        let drain = Drain {
            woken,
            is_kept: self.file.is_kept(),
            socket: self.socket.clone(),
            path: escape_path(self.file.path()),
            intake: Intake { spool: spool.clone(), shutdown: stop.token.clone() },
            runtime: Handle::current(),
            truncated: Throttle::default(),
            waited: Throttle::default(),
        };
        let (done, ended) = oneshot::channel();
        let builder = thread::Builder::new().name("datagram".to_owned());
        let thread = builder.spawn(move || {
            // Nobody waits for it where the future was dropped.
            let _ = done.send(drain.run());
        });
        thread.map_err(SpoolError::Thread)?;
        tokio::pin!(ended);
        let end = tokio::select! {
            end = &mut ended => end,
            () = shutdown.cancelled() => {
                drop(stop);
                ended.await
            }
        };
        self.file.unlink();
        spool.flush().await?;
        end.unwrap_or_else(|_| Err(io::Error::other("the draining thread panicked")))
            .map_err(failed)
    }
}

/// Ends the thread when dropped: the pipe's closing wakes it, and `shutdown` refuses senders and
/// leaves the queue.
struct Stop {
    /// `None` where others hold the socket too.
    socket: Option<Arc<UnixDatagram>>,
    token: CancellationToken,
    _wake: PipeWriter,
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.token.cancel();
        if let Some(socket) = &self.socket
            && let Err(error) = socket.shutdown(Shutdown::Read)
        {
            tracing::warn!(%error, "cannot shut a datagram socket down");
        }
    }
}

struct Drain {
    socket: Arc<UnixDatagram>,
    woken: PipeReader,
    is_kept: bool,
    path: String,
    intake: Intake,
    runtime: Handle,
    truncated: Throttle,
    waited: Throttle,
}

impl Drain {
    fn run(&self) -> io::Result<()> {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        // TRUNC: the answer is the datagram's own length. DONTWAIT and not O_NONBLOCK, which all
        // holders of a socket share.
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        loop {
            let stopping = self.intake.shutdown.is_cancelled();
            if stopping && self.is_kept {
                return Ok(());
            }
            if !stopping && self.runtime.block_on(self.intake.room()) {
                self.note_wait();
                // The stop may have ended the wait.
                continue;
            }
            match rustix::net::recv(&*self.socket, &mut buffer[..], flags) {
                Ok((taken, length)) => self.spool(&buffer[..taken], length),
                Err(error) => match io::Error::from(error) {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ if stopping => return Ok(()),
                    _ => {
                        wait(self.socket.as_fd(), &self.woken)?;
                    }
                },
            }
        }
    }

    /// One record per datagram (RFC 5426 §3.1), less one newline at its end.
    fn spool(&self, datagram: &[u8], length: usize) {
        if length > datagram.len()
            && let Some(times) = self.truncated.count()
        {
            tracing::warn!(
                socket = %self.path, length, taken = datagram.len(), times,
                "a datagram was longer than the limit: its end is lost; send it over a stream",
            );
        }
        let payload = datagram.strip_suffix(b"\n").unwrap_or(datagram);
        if !payload.is_empty() {
            self.runtime.block_on(self.intake.append(payload));
        }
    }

    fn note_wait(&self) {
        if let Some(times) = self.waited.count() {
            tracing::warn!(
                socket = %self.path, times,
                "the spool had no room, so that datagrams waited in the kernel's queue; when that \
                 is full their senders drop lines",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::record::RECORD_BYTES_MAX;
    use crate::source::stream::tests::spooled;
    use crate::spool::Budget;

    struct Running {
        dir: TempDir,
        path: std::path::PathBuf,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<Result<(), SourceError>>,
    }

    fn start(budget: u64) -> Running {
        let dir = TempDir::new().expect("dir");
        let path = dir.path().join("log.sock");
        let source = DatagramSource::bind(&path, 0o600).expect("bind");
        let budget = Arc::new(Budget::new(budget));
        let spool = Arc::new(Spool::open(&dir.path().join("spool"), budget).expect("spool"));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(source.run(spool.clone(), shutdown.clone()));
        Running { dir, path, spool, shutdown, task }
    }

    impl Running {
        async fn stop(self) -> Vec<Vec<u8>> {
            self.shutdown.cancel();
            self.task.await.expect("task").expect("synced");
            assert!(!self.path.exists(), "unlinked on a clean stop");
            let records = spooled(&self.spool);
            drop(self.dir);
            records
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ten_thousand_datagrams_arrive_in_order() {
        let running = start(1 << 30);
        let client = UnixDatagram::unbound().expect("socket");
        client.connect(&running.path).expect("connect");
        let sending = tokio::task::spawn_blocking(move || {
            for number in 0..10_000 {
                let newline = if number % 2 == 0 { "\n" } else { "" };
                client.send(format!("line {number}{newline}").as_bytes()).expect("send");
            }
        });
        sending.await.expect("sent");
        // What is still queued at the stop is drained.
        let records = running.stop().await;
        let expected: Vec<_> = (0..10_000).map(|n| format!("line {n}").into_bytes()).collect();
        assert_eq!(records, expected);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_datagram_is_one_record_and_a_huge_one_is_cut() {
        let running = start(1 << 30);
        let client = UnixDatagram::unbound().expect("socket");
        let socket = socket2::SockRef::from(&client);
        socket.set_send_buffer_size(4 << 20).expect("buffer");
        client.connect(&running.path).expect("connect");
        client.send(b"two\nlines\n").expect("send");
        client.send(b"").expect("an empty datagram");
        let largest = socket.send_buffer_size().expect("size") - 1000;
        let huge = vec![b'x'; largest.min(RECORD_BYTES_MAX + 10)];
        client.send(&huge).expect("send");
        let records = running.stop().await;
        assert_eq!(records[0], b"two\nlines");
        assert_eq!(records[1..].concat(), huge);
        assert!(records.iter().all(|record| record.len() <= RECORD_BYTES_MAX));
    }

    /// Full means that nothing more is taken from the kernel's queue, and a stop still loses
    /// nothing that is in it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_spool_leaves_datagrams_with_the_kernel() {
        let running = start(1);
        let client = UnixDatagram::unbound().expect("socket");
        client.connect(&running.path).expect("connect");
        client.send(b"first").expect("send");
        let mut watermark = running.spool.subscribe();
        watermark.wait_for(|mark| mark.synced > 0).await.expect("open");
        client.set_nonblocking(true).expect("nonblocking");
        let mut sent = 1;
        while client.send(format!("more {sent}").as_bytes()).is_ok() {
            sent += 1;
        }
        assert_eq!(running.spool.watermark().synced, 18 + 5, "only the first was taken");
        assert_eq!(running.stop().await.len(), sent);
    }
}
