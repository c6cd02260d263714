//! Datagram sockets: a Unix one, such as nginx's `syslog:server=unix:` writes to, and syslog over
//! UDP (RFC 5426).
//!
//! Their senders never wait for us. A Unix socket's queue is counted in datagrams,
//! `net.unix.max_dgram_qlen` at the time of the bind, and while it is full its senders' lines are
//! gone without our knowing. A UDP socket's queue is its receive buffer, and the kernel counts what
//! it had to drop. So a thread of its own drains either and never waits for a sync, only for room.

use std::io::{self, PipeReader, PipeWriter};
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::{fs, thread};

use rustix::net::{RecvFlags, SocketType};
use socket2::Socket;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::drops::{self, Drops};
use super::socket::{BindError, Intake, SocketFile, SourceError};
use super::stdin::wait_at_most;
use crate::record::escape_path;
use crate::spool::{Spool, SpoolError, Throttle};

/// The longest datagram that is taken whole, in bytes. A Unix sender's own bound is its send
/// buffer, 212,960 bytes by default, and UDP ends at 65,507; pages that no datagram reaches are
/// never touched.
const DATAGRAM_BYTES_MAX: usize = 4 << 20;

/// A bound socket, before its first datagram is read.
#[derive(Debug)]
pub struct DatagramSource {
    socket: Arc<Socket>,
    /// As log lines name it: the path, or the address.
    name: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Senders are refused at a stop, unless the socket is kept for the next start.
    Unix(SocketFile),
    /// Senders cannot be refused, and drops are counted.
    Udp,
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
        let name = escape_path(path);
        tracing::info!(
            socket = %name, queue_datagrams = queue.trim(),
            "listening for datagrams; when the queue is full their senders drop lines",
        );
        Ok(DatagramSource { socket: Arc::new(socket.into()), name, kind: Kind::Unix(file) })
    }

    /// Binds a UDP address and asks for a receive buffer of so many bytes, which holds what
    /// arrives while this process does not run. Port 0 takes a free one, which is logged.
    ///
    /// # Errors
    ///
    /// Where the address is in use, is none of this machine's, or may not be bound.
    pub fn bind_udp(
        address: SocketAddr,
        receive_buffer: usize,
    ) -> Result<DatagramSource, BindError> {
        let failed = |source| BindError::address(address, source);
        let socket: Socket = UdpSocket::bind(address).map_err(failed)?.into();
        // Only root may pass the machine's bound.
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, receive_buffer).is_err()
        {
            socket.set_recv_buffer_size(receive_buffer).map_err(failed)?;
        }
        // The kernel doubles what it grants, to pay for its own bookkeeping (socket(7)).
        let granted = socket.recv_buffer_size().map_err(failed)? / 2;
        let bound = socket.local_addr().ok().and_then(|address| address.as_socket());
        let name = bound.unwrap_or(address).to_string();
        tracing::info!(
            socket = %name, receive_buffer = granted,
            "listening for datagrams; what finds the receive buffer full is lost, and counted",
        );
        if granted < receive_buffer {
            tracing::warn!(
                socket = %name, receive_buffer = granted, wanted = receive_buffer,
                "the kernel grants a smaller receive buffer: set net.core.rmem_max by sysctl(8)",
            );
        }
        Ok(DatagramSource { socket: Arc::new(socket), name, kind: Kind::Udp })
    }

    /// Spools one record per datagram until the stop. Then what is queued is taken (senders to a
    /// Unix socket are refused, and its file is unlinked), and all is synced. A socket that a
    /// service manager keeps is left as it is, with its queue. What the kernel is known to have
    /// dropped is added to `lost`.
    ///
    /// # Errors
    ///
    /// Where the socket cannot be read, or the spool closes before all is synced.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
        lost: Arc<AtomicU64>,
    ) -> Result<(), SourceError> {
        let failed = |source| SourceError::Read { from: self.name.clone(), source };
        // Dropping this future stops the thread too.
        let (woken, wake) = io::pipe().map_err(failed)?;
        let (is_kept, is_refusing) = match &self.kind {
            Kind::Unix(file) => (file.is_kept(), !file.is_kept()),
            Kind::Udp => (false, false),
        };
        let stop = Stop {
            socket: is_refusing.then(|| self.socket.clone()),
            // Not the shutdown's child: senders are refused first.
            token: CancellationToken::new(),
            _wake: wake,
        };
        let drain = Drain {
            woken,
            is_kept,
            socket: self.socket.clone(),
            name: self.name.clone(),
            intake: Intake { spool: spool.clone(), shutdown: stop.token.clone() },
            runtime: Handle::current(),
            drops: matches!(self.kind, Kind::Udp).then(|| Drops::new(lost)),
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
        if let Kind::Unix(file) = &self.kind {
            file.unlink();
        }
        spool.flush().await?;
        end.unwrap_or_else(|_| Err(io::Error::other("the draining thread panicked")))
            .map_err(failed)
    }
}

/// Ends the thread when dropped: the pipe's closing wakes it, and `shutdown` refuses a Unix
/// socket's senders and leaves the queue.
struct Stop {
    /// `None` where senders cannot be refused, or others hold the socket too.
    socket: Option<Arc<Socket>>,
    token: CancellationToken,
    _wake: PipeWriter,
}

impl Drop for Stop {
    fn drop(&mut self) {
        // Before the thread knows of the stop: what it then finds queued is all there will be.
        if let Some(socket) = &self.socket
            && let Err(error) = socket.shutdown(Shutdown::Read)
        {
            tracing::warn!(%error, "cannot shut a datagram socket down");
        }
        self.token.cancel();
    }
}

struct Drain {
    socket: Arc<Socket>,
    woken: PipeReader,
    is_kept: bool,
    name: String,
    intake: Intake,
    runtime: Handle,
    /// Of a UDP socket.
    drops: Option<Drops>,
    truncated: Throttle,
    waited: Throttle,
}

impl Drain {
    fn run(mut self) -> io::Result<()> {
        let end = self.drain();
        if let Some(drops) = &mut self.drops {
            drops.look_now(&*self.socket, &self.name);
        }
        end
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        // Once stopping: how many more bytes of payload may have been queued by then.
        let mut queued: Option<usize> = None;
        // TRUNC: the answer is the datagram's own length. DONTWAIT and not O_NONBLOCK, which all
        // holders of a socket share.
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        // So often the drops are looked at while nothing arrives.
        let pause = self.drops.as_ref().map(|_| drops::LOOK_INTERVAL);
        loop {
            if queued.is_none() && self.intake.shutdown.is_cancelled() {
                if self.is_kept {
                    return Ok(());
                }
                queued = Some(match self.drops {
                    // Nobody can refuse the senders, so that the queue need never be empty.
                    Some(_) => self.socket.recv_buffer_size()?,
                    None => usize::MAX,
                });
            }
            if queued.is_none() && self.wait_for_room() {
                // The stop may have ended the wait.
                continue;
            }
            match rustix::net::recv(&*self.socket, &mut buffer[..], flags) {
                Ok((taken, length)) => {
                    self.spool(&buffer[..taken], length);
                    if let Some(left) = &mut queued {
                        // An empty datagram takes room as well.
                        match left.checked_sub(taken.max(1)) {
                            Some(rest) => *left = rest,
                            None => return Ok(()),
                        }
                    }
                }
                Err(error) => match io::Error::from(error) {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ if queued.is_some() => return Ok(()),
                    _ => {
                        wait_at_most(self.socket.as_fd(), &self.woken, pause)?;
                    }
                },
            }
            if let Some(drops) = &mut self.drops {
                drops.look(&*self.socket, &self.name);
            }
        }
    }

    /// Runs what may have to wait for the spool; what the kernel drops meanwhile is reported
    /// meanwhile.
    fn wait<'s, T, F>(&'s mut self, future: impl FnOnce(&'s Intake) -> F) -> T
    where
        F: Future<Output = T> + 's,
    {
        let future = future(&self.intake);
        let Some(drops) = &mut self.drops else { return self.runtime.block_on(future) };
        let (socket, name) = (&*self.socket, &self.name);
        self.runtime.block_on(async {
            tokio::pin!(future);
            loop {
                tokio::select! {
                    biased;
                    done = &mut future => return done,
                    () = tokio::time::sleep(drops::LOOK_INTERVAL) => drops.look(socket, name),
                }
            }
        })
    }

    /// `true` where it had to wait, for room or the stop.
    fn wait_for_room(&mut self) -> bool {
        let waited = self.wait(Intake::room);
        if waited && let Some(times) = self.waited.count() {
            tracing::warn!(
                socket = %self.name, times,
                "the spool had no room, so that datagrams waited in the kernel's queue; when that \
                 is full lines are lost",
            );
        }
        waited
    }

    /// One record per datagram (RFC 5426 §3.1), less one newline at its end.
    fn spool(&mut self, datagram: &[u8], length: usize) {
        if length > datagram.len()
            && let Some(times) = self.truncated.count()
        {
            tracing::warn!(
                socket = %self.name, length, taken = datagram.len(), times,
                "a datagram was longer than the limit: its end is lost; send it over a stream",
            );
        }
        let payload = datagram.strip_suffix(b"\n").unwrap_or(datagram);
        if !payload.is_empty() {
            self.wait(|intake| intake.append(payload));
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
        let task = tokio::spawn(source.run(spool.clone(), shutdown.clone(), Arc::default()));
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

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_queued_at_a_stop_is_taken_though_udp_senders_go_on() {
        let dir = TempDir::new().expect("dir");
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let source = DatagramSource::bind_udp(loopback, 1 << 20).expect("bind");
        let address = source.name.clone();
        let budget = Arc::new(Budget::new(1 << 30));
        let spool = Arc::new(Spool::open(&dir.path().join("spool"), budget).expect("spool"));
        let client = UdpSocket::bind("127.0.0.1:0").expect("socket");
        client.connect(address).expect("connect");
        for number in 0..100 {
            client.send(format!("<13>line {number}\n").as_bytes()).expect("send");
        }
        let over = CancellationToken::new();
        let going_on = over.clone();
        let flood = tokio::task::spawn_blocking(move || {
            while !going_on.is_cancelled() {
                let _ = client.send(b"more");
            }
        });
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        source.run(spool.clone(), shutdown, Arc::default()).await.expect("an end all the same");
        over.cancel();
        flood.await.expect("flood");
        let records = spooled(&spool);
        let expected: Vec<_> = (0..100).map(|n| format!("<13>line {n}").into_bytes()).collect();
        assert_eq!(records[..100], expected);
    }

    /// What the kernel took from a sender before it refused is spooled.
    #[tokio::test(flavor = "multi_thread")]
    async fn every_datagram_that_was_taken_before_the_stop_is_spooled() {
        for _ in 0..50 {
            let running = start(1 << 30);
            let client = UnixDatagram::unbound().expect("socket");
            client.connect(&running.path).expect("connect");
            let (first, begun) = oneshot::channel();
            let sending = tokio::task::spawn_blocking(move || {
                let sent = |number: &u64| client.send(number.to_string().as_bytes()).is_ok();
                assert!(sent(&0));
                let _ = first.send(());
                1 + (1..).take_while(sent).count()
            });
            begun.await.expect("begun");
            let records = running.stop().await;
            assert_eq!(records.len(), sending.await.expect("sent"));
        }
    }

    #[test]
    fn a_udp_address_in_use_says_so() {
        let holder = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let address = holder.local_addr().expect("address");
        let error = DatagramSource::bind_udp(address, 1 << 20).expect_err("in use");
        assert!(matches!(error, BindError::AddressInUse { .. }), "{error}");
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
