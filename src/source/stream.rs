//! Listeners for streams of lines or octet-counted messages (RFC 6587): a Unix socket, such as
//! syslog-ng's `unix-stream()` destination writes to, and syslog over TCP or TLS (RFC 5425).
//!
//! A peer counts a line as delivered when its `write` returns, so what it wrote must not die with
//! an orderly stop. Full means not reading, which the peer's own flow control sees.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::SocketType;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::Accepted;
use super::room::{Permits, Room};
use super::socket::{BindError, Intake, SocketFile, SourceError};
use crate::config::Identity;
use crate::record::escape_path;
use crate::spool::Spool;
use crate::tls::{self, Acceptor};

/// Connections served at a time at most, each with at most one longest record in memory; more wait in the
/// kernel's backlog.
const CONNECTIONS_MAX: usize = 256;

/// More connections than the kernel holds for a listener (net.core.somaxconn).
const BACKLOG_MAX: usize = 4096;
/// Receive buffer of a TCP connection in bytes, where the machine allows so much: 5 MB/s at 50 ms
/// there and back. Left to itself the kernel grows it to `tcp_rmem`, 6 MiB or 32, and what it has
/// acknowledged is lost at a kill.
const RECEIVE_BUFFER: usize = 256 << 10;

/// Pause after a failed accept: out of descriptors stays so for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// A bound socket, before its first connection is accepted.
#[derive(Debug)]
pub struct StreamSource {
    bound: Bound,
    /// As log lines name it: the path, or the address.
    name: String,
}

#[derive(Debug)]
enum Bound {
    Unix { listener: StdUnixListener, file: SocketFile },
    Tcp { listener: StdTcpListener, tls: Option<Acceptor> },
}

impl StreamSource {
    /// Binds `path` with the permission bits `mode`; a stale socket file there is replaced.
    ///
    /// # Errors
    ///
    /// Where somebody listens there, something else lies there, or the directory is missing.
    pub fn bind(path: &Path, mode: u32) -> Result<StreamSource, BindError> {
        let (listener, file) =
            SocketFile::bind(path, mode, SocketType::STREAM, |path| StdUnixListener::bind(path))?;
        let name = escape_path(path);
        tracing::info!(socket = %name, "listening for connections");
        Ok(StreamSource { bound: Bound::Unix { listener, file }, name })
    }

    /// Binds a TCP address, where peers speak plainly or, with a certificate, TLS. Port 0 takes a
    /// free one, which is logged.
    ///
    /// # Errors
    ///
    /// Where the address is in use, is none of this machine's, or may not be bound; where the
    /// certificate or its key is unfit.
    pub fn bind_tcp(
        address: SocketAddr,
        tls: Option<&Identity>,
    ) -> Result<StreamSource, BindError> {
        let tls = tls.map(Acceptor::new).transpose()?;
        // The standard library sets SO_REUSEADDR: a restart need not wait for TIME_WAIT.
        let failed = |source| BindError::address(address, source);
        let listener = StdTcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        // Connections inherit it. Failing here only leaves the kernel's own way.
        let _ = socket2::SockRef::from(&listener).set_recv_buffer_size(RECEIVE_BUFFER);
        let name = listener.local_addr().unwrap_or(address).to_string();
        tracing::info!(socket = %name, tls = tls.is_some(), "listening for connections");
        Ok(StreamSource { bound: Bound::Tcp { listener, tls }, name })
    }

    /// Spools what peers write until the stop. Then peers are told to end, what they wrote by then
    /// is read, and all is synced.
    ///
    /// # Errors
    ///
    /// Where the listener cannot be polled, or the spool closes before all is synced.
    pub async fn run(
        self,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
    ) -> Result<(), SourceError> {
        let (listener, tls, file) = match self.bound {
            Bound::Unix { listener, file } => {
                let listener = listener
                    .set_nonblocking(true)
                    .and_then(|()| UnixListener::from_std(listener).map(Listener::Unix));
                (listener, None, Some(file))
            }
            Bound::Tcp { listener, tls } => {
                (TcpListener::from_std(listener).map(Listener::Tcp), tls, None)
            }
        };
        let listener =
            listener.map_err(|source| SourceError::Read { from: self.name.clone(), source })?;
        let server = Arc::new(Server {
            room: Room::new(&self.name, CONNECTIONS_MAX),
            name: self.name,
            tls,
            intake: Intake { spool: spool.clone(), shutdown },
            connections: TaskTracker::new(),
        });
        server.accept(&listener).await;
        // Connections that wait on a socket that is kept are the next process's.
        if !file.as_ref().is_some_and(SocketFile::is_kept) {
            if let Some(file) = file {
                file.unlink();
            }
            server.accept_backlog(listener).await;
        }
        server.connections.close();
        server.connections.wait().await;
        Ok(spool.flush().await?)
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Listener::Unix(listener) => {
                listener.accept().await.map(|(stream, _)| Accepted::Unix(stream))
            }
            Listener::Tcp(listener) => {
                listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer))
            }
        }
    }

    /// Gives each connection that the kernel holds by now, then an error.
    fn into_backlog(self) -> io::Result<Backlog> {
        match self {
            Listener::Unix(listener) => {
                let listener = listener.into_std()?;
                Ok(Box::new(move || {
                    let (stream, _) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    UnixStream::from_std(stream).map(Accepted::Unix)
                }))
            }
            Listener::Tcp(listener) => {
                let listener = listener.into_std()?;
                Ok(Box::new(move || {
                    let (stream, peer) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    TcpStream::from_std(stream).map(|stream| Accepted::Tcp(stream, peer))
                }))
            }
        }
    }
}

type Backlog = Box<dyn FnMut() -> io::Result<Accepted> + Send>;

struct Server {
    name: String,
    room: Room,
    tls: Option<Acceptor>,
    intake: Intake,
    connections: TaskTracker,
}

impl Server {
    async fn accept(self: &Arc<Self>, listener: &Listener) {
        let next = async {
            loop {
                let permits = self.room.take().await;
                match listener.accept().await {
                    Ok(accepted) => self.spawn(accepted, permits),
                    Err(error) => {
                        self.room.failed(&error);
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        let certificate = self.tls.as_ref().map(Acceptor::certificate);
        // Dropping an accept loses no connection (tokio documents it as cancel safe).
        tokio::select! {
            () = self.intake.shutdown.cancelled() => {}
            () = next => {}
            () = tls::watch(certificate) => {}
        }
    }

    /// Takes the connections that nobody accepted before the stop: their peers may have written.
    /// The others end by themselves now, so that there will be room.
    async fn accept_backlog(self: &Arc<Self>, listener: Listener) {
        let Ok(mut next) = listener.into_backlog() else { return };
        // Whoever connects again now must not keep this going.
        for _ in 0..BACKLOG_MAX {
            let permits = self.room.take().await;
            let Ok(accepted) = next() else { return };
            self.spawn(accepted, permits);
        }
    }

    fn spawn(self: &Arc<Self>, accepted: Accepted, permits: Permits) {
        let server = self.clone();
        self.connections.spawn(async move {
            accepted.serve(&server.name, server.tls.as_ref(), &server.intake).await;
            drop(permits);
        });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{self, Read, Write};
    use std::net::TcpStream as StdTcpStream;

    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::record::{Framing, RECORD_BYTES_MAX};
    use crate::spool::{Budget, Chunk};

    /// The payloads of all that a spool has synced.
    pub(in crate::source) fn spooled(spool: &Spool) -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        for segment in spool.segments() {
            let mut at = segment.start;
            while let Chunk::Records(bytes) = spool.read(segment.id, at, 65536).expect("read") {
                let records = Framing::SPOOL.records(&bytes, at, false);
                payloads.extend(records.map(|record| record.payload.to_vec()));
                at += bytes.len() as u64;
            }
        }
        payloads
    }

    struct Running {
        _dir: TempDir,
        path: std::path::PathBuf,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<Result<(), SourceError>>,
    }

    fn start(budget: u64) -> Running {
        let dir = TempDir::new().expect("dir");
        let path = dir.path().join("log.sock");
        let source = StreamSource::bind(&path, 0o600).expect("bind");
        let budget = Arc::new(Budget::new(budget));
        let spool = Arc::new(Spool::open(&dir.path().join("spool"), budget).expect("spool"));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(source.run(spool.clone(), shutdown.clone()));
        Running { _dir: dir, path, spool, shutdown, task }
    }

    impl Running {
        async fn connect(&self) -> UnixStream {
            UnixStream::connect(&self.path).await.expect("connect")
        }

        async fn stop(self) -> Vec<Vec<u8>> {
            self.shutdown.cancel();
            self.task.await.expect("task").expect("synced");
            assert!(!self.path.exists(), "unlinked on a clean stop");
            spooled(&self.spool)
        }
    }

    struct Network {
        _dir: TempDir,
        address: String,
        spool: Arc<Spool>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<Result<(), SourceError>>,
    }

    fn loopback() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    fn listen(tls: Option<&Identity>) -> Network {
        let dir = TempDir::new().expect("dir");
        let source = StreamSource::bind_tcp(loopback(), tls).expect("bind");
        let address = source.name.clone();
        let budget = Arc::new(Budget::new(1 << 30));
        let spool = Arc::new(Spool::open(&dir.path().join("spool"), budget).expect("spool"));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(source.run(spool.clone(), shutdown.clone()));
        Network { _dir: dir, address, spool, shutdown, task }
    }

    impl Network {
        async fn stop(self) -> Vec<Vec<u8>> {
            self.shutdown.cancel();
            self.task.await.expect("task").expect("synced");
            spooled(&self.spool)
        }
    }

    #[tokio::test]
    async fn one_peers_lie_or_endless_line_is_no_other_peers_trouble() {
        let network = listen(None);
        let mut liar = TcpStream::connect(&network.address).await.expect("connect");
        liar.write_all(b"5 <13>a99999999 <13>b").await.expect("write");
        let mut rest = Vec::new();
        let _ = liar.read_to_end(&mut rest).await;
        let mut endless = TcpStream::connect(&network.address).await.expect("connect");
        endless.write_all(&vec![b'x'; RECORD_BYTES_MAX + 1]).await.expect("write");
        let mut honest = TcpStream::connect(&network.address).await.expect("connect");
        honest.write_all(b"fine\n").await.expect("write");
        drop((endless, honest));
        let mut records = network.stop().await;
        records.sort();
        let cut = vec![b'x'; RECORD_BYTES_MAX];
        assert_eq!(records, [&b"<13>a"[..], b"<13>b", b"fine", b"x", &cut]);
    }

    #[test]
    fn an_address_in_use_says_so() {
        let holder = StdTcpListener::bind(loopback()).expect("bind");
        let address = holder.local_addr().expect("address");
        let error = StreamSource::bind_tcp(address, None).expect_err("in use");
        assert!(matches!(error, BindError::AddressInUse { .. }), "{error}");
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 0));
        let error = StreamSource::bind_tcp(elsewhere, None).expect_err("not ours");
        assert!(matches!(error, BindError::AddressElsewhere { .. }), "{error}");
    }

    /// A peer that ends its connection when it is told to (as syslog daemons do) loses nothing,
    /// whatever it wrote until it noticed.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_peer_that_heeds_the_end_loses_no_line_at_a_stop() {
        let network = listen(None);
        let address = network.address.clone();
        let (begun, writing) = tokio::sync::oneshot::channel();
        let peer = tokio::task::spawn_blocking(move || {
            let mut peer = StdTcpStream::connect(address).expect("connect");
            peer.set_nonblocking(true).expect("nonblocking");
            let mut begun = Some(begun);
            let mut sent: u64 = 0;
            let mut told = [0; 1];
            while !matches!(peer.read(&mut told), Ok(0)) {
                peer.set_nonblocking(false).expect("blocking");
                peer.write_all(format!("line {sent}\n").as_bytes()).expect("write");
                peer.set_nonblocking(true).expect("nonblocking");
                sent += 1;
                if let Some(begun) = begun.take_if(|_| sent > 100) {
                    begun.send(()).expect("the test waits");
                }
            }
            sent
        });
        writing.await.expect("lines are written");
        let records = network.stop().await;
        let sent = peer.await.expect("peer");
        let expected: Vec<_> = (0..sent).map(|n| format!("line {n}").into_bytes()).collect();
        assert_eq!(records, expected);
    }

    /// One that neither writes nor ends holds a stop up for a moment only.
    #[tokio::test]
    async fn an_idle_peer_that_never_ends_does_not_hold_up_a_stop() {
        let network = listen(None);
        let mut peer = TcpStream::connect(&network.address).await.expect("connect");
        peer.write_all(b"a line\nunfinished").await.expect("write");
        assert_eq!(network.stop().await, [&b"a line"[..], b"unfinished"]);
        drop(peer);
    }

    fn certificate(dir: &Path) -> (Identity, std::path::PathBuf) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("made");
        let files = Identity { certificate: dir.join("cert.pem"), key: dir.join("key.pem") };
        std::fs::write(&files.certificate, made.cert.pem()).expect("write");
        std::fs::write(&files.key, made.signing_key.serialize_pem()).expect("write");
        let authority = files.certificate.clone();
        (files, authority)
    }

    /// RFC 5425: octet-counted messages within TLS; a peer that speaks plainly gets no further.
    #[tokio::test]
    async fn lines_come_through_tls_and_plain_peers_are_refused() {
        let dir = TempDir::new().expect("dir");
        let (files, authority) = certificate(dir.path());
        let network = listen(Some(&files));
        let mut plain = TcpStream::connect(&network.address).await.expect("connect");
        plain.write_all(b"<13>not encrypted\n").await.expect("write");
        let mut answer = Vec::new();
        // An alert, or a reset: either way an end.
        let _ = plain.read_to_end(&mut answer).await;
        let mut peer = crate::tls::dial_for_test(&network.address, &authority).await;
        peer.write_all(b"6 <13>ab9 <13>count").await.expect("write");
        peer.shutdown().await.expect("close_notify");
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).await.expect("a clean end");
        assert_eq!(network.stop().await, [&b"<13>ab"[..], b"<13>count"]);
    }

    /// Whatever was written when the stop came is spooled, accepted or not, ended or not.
    #[tokio::test]
    async fn what_was_written_before_the_stop_is_spooled() {
        let running = start(1 << 30);
        let mut one = running.connect().await;
        one.write_all(b"a line\nno newline yet").await.expect("write");
        let mut other = running.connect().await;
        other.write_all(b"9 <13>count10 <13>half").await.expect("write");
        let mut records = running.stop().await;
        records.sort();
        assert_eq!(records, [&b"<13>count"[..], b"<13>half", b"a line", b"no newline yet"]);
        let error = one.write_all(b"late\n").await.expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_lying_count_closes_that_connection_only() {
        let running = start(1 << 30);
        let mut liar = running.connect().await;
        liar.write_all(b"5 <13>a123456789 <13>b").await.expect("write");
        let mut rest = Vec::new();
        // Its own half is open: only our close can end this read.
        let _ = liar.read_to_end(&mut rest).await;
        let mut honest = running.connect().await;
        honest.write_all(b"fine\n").await.expect("write");
        assert_eq!(running.stop().await, [&b"<13>a"[..], b"<13>b", b"fine"]);
    }

    #[tokio::test]
    async fn an_endless_line_is_cut_and_read_in_bounded_memory() {
        let running = start(1 << 30);
        let mut peer = running.connect().await;
        let piece = vec![b'x'; RECORD_BYTES_MAX];
        for _ in 0..10 {
            peer.write_all(&piece).await.expect("write");
        }
        drop(peer);
        let records = running.stop().await;
        assert_eq!(records.len(), 10);
        assert!(records.iter().all(|record| record.len() == RECORD_BYTES_MAX));
    }

    #[tokio::test]
    async fn a_full_spool_stops_reading_until_receipts_make_room() {
        let running = start(100_000);
        let mut peer = running.connect().await;
        let line = [&[b'x'; 999][..], b"\n"].concat();
        let writing = tokio::spawn(async move {
            for _ in 0..2000 {
                peer.write_all(&line).await.expect("write");
            }
        });
        let mut watermark = running.spool.subscribe();
        let mut released = 0;
        while released < 2000 * (18 + 999) {
            let mark = *watermark.wait_for(|mark| mark.offset > released).await.expect("open");
            assert!(mark.offset - released <= 100_000, "the budget holds");
            released = mark.offset;
            running.spool.release(mark.segment, released).expect("release");
        }
        writing.await.expect("all written");
        assert!(running.spool.waits() > 0);
        running.stop().await;
    }
}
