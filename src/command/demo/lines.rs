//! The lines that the demo writes: what nginx, syslog-ng and an application would.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use tokio::net::UnixDatagram;
use tokio::sync::watch;
use tokio::time::Instant;

/// How many sources the demo writes to.
pub(super) const SOURCES: usize = 3;

/// How often lines are written.
const TICK: Duration = Duration::from_millis(20);

/// What is written where: two log files and a socket, in turns.
pub(super) struct Writer {
    access_log: PathBuf,
    access: std::fs::File,
    syslog: std::fs::File,
    socket: UnixDatagram,
    total: u32,
    written: u32,
    rotated: bool,
}

impl Writer {
    /// Opens the files anew and the sender's socket.
    pub(super) fn open(
        access_log: &Path,
        syslog: &Path,
        socket_path: &Path,
        total: u32,
    ) -> anyhow::Result<Writer> {
        let open = |path: &Path| {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("cannot write {}", path.display()))
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect(socket_path).with_context(|| {
            format!("cannot reach the sender's socket {}", socket_path.display())
        })?;
        Ok(Writer {
            access_log: access_log.to_owned(),
            access: open(access_log)?,
            syslog: open(syslog)?,
            socket,
            total,
            written: 0,
            rotated: false,
        })
    }

    /// How many lines of `total` go to source `source` (0 is the access log, 1 syslog, 2 the
    /// socket).
    pub(super) fn share(total: u32, source: usize) -> u64 {
        (0..total as usize).filter(|line| line % SOURCES == source).count() as u64
    }

    /// Writes all lines over `duration` and counts them in `written`; renames the access log after
    /// a third, as logrotate does, and tells the name it got in `rotated`.
    pub(super) async fn run(
        mut self,
        duration: Duration,
        written: &watch::Sender<u64>,
        rotated: impl Fn(&Path),
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut ticks = tokio::time::interval(TICK);
        while self.written < self.total {
            ticks.tick().await;
            let passed = start.elapsed().as_secs_f64() / duration.as_secs_f64();
            let due = (f64::from(self.total) * passed.min(1.0)).ceil() as u32;
            while self.written < due {
                self.write_next().await.context("cannot write a line")?;
                if !self.rotated && self.written >= self.total / 3 {
                    rotated(&self.rotate()?);
                }
            }
            written.send_replace(u64::from(self.written));
        }
        Ok(())
    }

    /// A full queue of the socket is waited for: nginx itself would drop the line.
    async fn write_next(&mut self) -> io::Result<()> {
        let number = self.written;
        let now = Timestamp::now();
        match number as usize % SOURCES {
            0 => self.access.write_all(format!("{}\n", access_line(number, now)).as_bytes())?,
            1 => self.syslog.write_all(format!("{}\n", syslog_line(number, now)).as_bytes())?,
            _ => drop(self.socket.send(datagram(number, now).as_bytes()).await?),
        }
        self.written += 1;
        Ok(())
    }

    fn rotate(&mut self) -> anyhow::Result<PathBuf> {
        self.rotated = true;
        let old = self.access_log.with_extension("log.1");
        std::fs::rename(&self.access_log, &old).context("cannot rotate the access log")?;
        let mut options = std::fs::OpenOptions::new();
        self.access = options.create_new(true).append(true).open(&self.access_log)?;
        Ok(old)
    }
}

/// A line of nginx's `log_format … escape=json`.
fn access_line(number: u32, now: Timestamp) -> String {
    const PATHS: [&str; 5] = ["/", "/cart", "/search", "/checkout", "/favicon.ico"];
    const STATUS: [u16; 7] = [200, 200, 200, 304, 404, 200, 502];
    let line = json!({
        "ip": format!("192.0.2.{}", number % 254 + 1),
        "host": "shop.example.com",
        "path": format!("{}?visit={number}", PATHS[number as usize % PATHS.len()]),
        "status": STATUS[number as usize % STATUS.len()].to_string(),
        "referrer": "https://www.example.com/",
        "user_agent": "Mozilla/5.0 (X11; Linux x86_64) demo",
        "length": 200 + number % 5000,
        "generation_time_milli": f64::from(number % 900) / 1000.0,
        "date": format!("{now:.0}").replace('Z', "+00:00"),
    });
    line.to_string()
}

/// A line as syslog-ng writes it into a file: RFC 3164 without a priority.
fn syslog_line(number: u32, now: Timestamp) -> String {
    format!("{} web-1 shop[812]: order {number} shipped", stamp(now))
}

/// A datagram as nginx sends it: RFC 3164, with JSON inside.
fn datagram(number: u32, now: Timestamp) -> String {
    format!("<190>{} web-1 nginx: {}", stamp(now), access_line(number, now))
}

/// The time of RFC 3164 §4.1.2: the day is padded with a space.
fn stamp(now: Timestamp) -> String {
    now.to_zoned(TimeZone::UTC).strftime("%b %e %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn instant() -> Timestamp {
        "2026-11-05T07:08:09.5Z".parse().expect("a time")
    }

    #[test]
    fn access_lines_are_nginx_json_with_its_usual_keys() {
        let line: Value = serde_json::from_str(&access_line(7, instant())).expect("JSON");
        let keys: Vec<_> = line.as_object().expect("an object").keys().cloned().collect();
        let mut expected = [
            "ip",
            "host",
            "path",
            "status",
            "referrer",
            "user_agent",
            "length",
            "generation_time_milli",
            "date",
        ];
        expected.sort_unstable();
        let mut keys: Vec<_> = keys.iter().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(line["date"], "2026-11-05T07:08:09+00:00");
    }

    #[test]
    fn syslog_lines_and_datagrams_are_rfc_3164() {
        assert_eq!(syslog_line(12, instant()), "Nov  5 07:08:09 web-1 shop[812]: order 12 shipped");
        let datagram = datagram(2, instant());
        let message = datagram.strip_prefix("<190>Nov  5 07:08:09 web-1 nginx: ").expect("header");
        assert!(serde_json::from_str::<Value>(message).is_ok());
    }

    #[test]
    fn no_two_lines_are_alike() {
        let lines: std::collections::BTreeSet<_> =
            (0..3000).map(|number| access_line(number, instant())).collect();
        assert_eq!(lines.len(), 3000);
        let shares: u64 = (0..SOURCES).map(|source| Writer::share(100, source)).sum();
        assert_eq!(shares, 100);
    }

    #[tokio::test]
    async fn every_line_is_written_once_over_a_rotation() {
        let dir = tempfile::tempdir().expect("a folder");
        let (access, syslog) = (dir.path().join("access.log"), dir.path().join("syslog"));
        let socket = UnixDatagram::bind(dir.path().join("s")).expect("a socket");
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            for _ in 0..20 {
                socket.recv(&mut buffer).await.expect("a datagram");
            }
        });
        let writer = Writer::open(&access, &syslog, &dir.path().join("s"), 60).expect("a writer");
        let (written, progress) = watch::channel(0);
        writer.run(Duration::from_millis(1), &written, |_| {}).await.expect("written");
        reader.await.expect("20 datagrams");
        let count = |path: &Path| std::fs::read_to_string(path).expect("a file").lines().count();
        let rotated = dir.path().join("access.log.1");
        assert!(count(&rotated) > 0 && count(&access) > 0);
        assert_eq!(count(&rotated) + count(&access), 20);
        assert_eq!(count(&syslog), 20);
        assert_eq!(*progress.borrow(), 60);
    }
}
