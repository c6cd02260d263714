//! What the kernel dropped of a UDP socket's datagrams: counted, ranged in time, reported (I9).
//!
//! The kernel keeps one number per socket: datagrams for which the receive buffer had no room,
//! and those with a wrong checksum. `SO_RXQ_OVFL` tells it with the next datagram only, so that
//! the last drops of a burst would stay unknown; `SO_MEMINFO` tells it at any time.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;

/// How often the number is looked at.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Pause after a report, so that a lasting loss does not fill the log.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// The drops of one socket since it was bound.
#[derive(Debug)]
pub(super) struct Drops {
    /// The kernel's number at the last report.
    seen: u32,
    /// All that was reported; the kernel's own number wraps.
    total: u64,
    /// The same, of all sockets of this process.
    lost: Arc<AtomicU64>,
    /// When the number was last known not to have grown.
    quiet: Timestamp,
    next_look: Instant,
}

impl Drops {
    /// Of a socket that was just bound; `lost` counts what is lost at all sockets.
    pub fn new(lost: Arc<AtomicU64>) -> Drops {
        Drops { seen: 0, total: 0, lost, quiet: Timestamp::now(), next_look: Instant::now() }
    }

    /// Looks and reports when it is time to; cheap otherwise.
    pub fn look(&mut self, socket: impl AsFd, name: &str) {
        if Instant::now() >= self.next_look {
            self.look_now(socket, name);
        }
    }

    /// Looks and reports. Each loss is in exactly one report.
    pub fn look_now(&mut self, socket: impl AsFd, name: &str) {
        self.next_look = Instant::now() + LOOK_INTERVAL;
        let now = Timestamp::now();
        let count = match dropped(socket) {
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(socket = name, %error, "this kernel does not count drops");
                return;
            }
        };
        let lost = count.wrapping_sub(self.seen);
        if lost > 0 {
            self.seen = count;
            self.total += u64::from(lost);
            self.lost.fetch_add(lost.into(), Ordering::Relaxed);
            tracing::warn!(
                socket = name, lost, lost_total = self.total, after = %self.quiet, before = %now,
                "the kernel dropped datagrams, as its receive buffer was full: these lines are \
                 lost; raise receive_buffer, or let the peer send over TCP",
            );
            self.next_look = Instant::now() + REPORT_INTERVAL;
        }
        self.quiet = now;
    }
}

/// The datagrams that the kernel dropped since the socket was made (Linux 4.12 and later).
fn dropped(socket: impl AsFd) -> io::Result<u32> {
    let mut values = [0_u32; libc::SK_MEMINFO_DROPS as usize + 1];
    let mut length = size_of_val(&values) as libc::socklen_t;
    // SAFETY: the descriptor is open while borrowed; the kernel writes at most `length` bytes,
    // which is what `values` holds, and writes how many they were into `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    if length as usize != size_of_val(&values) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(values[libc::SK_MEMINFO_DROPS as usize])
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// What is taken and what is counted as dropped make up what was sent.
    #[test]
    fn every_datagram_is_taken_or_counted_as_dropped() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        socket2::SockRef::from(&socket).set_recv_buffer_size(4096).expect("buffer");
        socket.set_nonblocking(true).expect("nonblocking");
        let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
        client.connect(socket.local_addr().expect("address")).expect("connect");
        assert_eq!(dropped(&socket).expect("a count"), 0);
        for _ in 0..1000 {
            client.send(&[b'x'; 200]).expect("send");
        }
        let mut buffer = [0; 300];
        let taken = std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count();
        let lost = Arc::new(AtomicU64::new(5));
        let mut drops = Drops::new(lost.clone());
        drops.look(&socket, "test");
        assert!(taken > 0 && drops.total > 0, "{taken} taken, {} dropped", drops.total);
        assert_eq!(taken as u64 + drops.total, 1000);
        drops.look_now(&socket, "test");
        assert_eq!(taken as u64 + drops.total, 1000, "a loss is counted once");
        assert_eq!(lost.load(Ordering::Relaxed), 5 + drops.total, "beside what others lost");
    }
}
