//! What syslog-ng's `http()` does at each answer, by its own counters: the table in syslog-ng/README.md, which is why the
//! HTTP intake answers 200 and 503 and nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::support::servers::{SyslogNg, free_port, wait_until};
use super::support::waybill::PATIENCE;
use super::syslog_ng::{HEAD, SOURCE, plugin, shipped};

/// `retries()` unless set: what gives up does so after this many posts.
const RETRIES: usize = 3;

/// A peer that answers a post with the status that its path names, and keeps nothing. `/closed` and `/silent` get no
/// answer. Once it relents, all get 200.
#[derive(Clone, Default)]
struct Stub {
    posts: Arc<Mutex<BTreeMap<String, usize>>>,
    relents: Arc<AtomicBool>,
}

impl Stub {
    fn listen(&self, port: u16) {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
        let stub = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let stub = stub.clone();
                // A client that goes away ends its thread; that is no failure.
                thread::spawn(move || stub.serve(stream));
            }
        });
    }

    /// The posts of one connection, until it ends.
    fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut writer = stream;
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                (reader.read_line(&mut head).ok()? > 0).then_some(())?;
            }
            let path = head.split(' ').nth(1)?.trim_start_matches('/').to_owned();
            let lower = head.to_ascii_lowercase();
            let length = lower.split("\r\ncontent-length:").nth(1)?.lines().next()?.trim();
            let mut body = vec![0; length.parse().ok()?];
            reader.read_exact(&mut body).ok()?;
            let mut posts = self.posts.lock().unwrap_or_else(PoisonError::into_inner);
            *posts.entry(path.clone()).or_default() += 1;
            drop(posts);
            let status = match &*path {
                _ if self.relents.load(Ordering::Relaxed) => "200",
                "closed" => return None,
                "silent" => {
                    // Until the client has waited long enough.
                    let _ = reader.read(&mut [0]);
                    return None;
                }
                status => status,
            };
            let answer =
                format!("HTTP/1.1 {status} x\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n");
            writer.write_all(answer.as_bytes()).ok()?;
        }
    }

    fn posts(&self, path: &str) -> usize {
        let posts = self.posts.lock().unwrap_or_else(PoisonError::into_inner);
        posts.get(path).copied().unwrap_or_default()
    }
}

/// The statuses in the first cell of the one row of the README's table that says this.
fn statuses(says: &str) -> Vec<String> {
    let readme = shipped("README.md");
    let table = readme.split("\n| Answer | syslog-ng |\n").nth(1).expect("the table");
    let rows: Vec<&str> = table
        .lines()
        .take_while(|row| row.starts_with('|'))
        .filter(|row| row.contains(says))
        .collect();
    let [row] = rows[..] else { panic!("one row says {says:?}: {rows:?}") };
    let cell = row.split('|').nth(1).expect("a cell");
    let words = cell.split(|letter: char| !letter.is_ascii_digit());
    let statuses: Vec<String> = words.filter(|word| word.len() == 3).map(str::to_owned).collect();
    assert!(!statuses.is_empty(), "{row}");
    statuses
}

#[test]
fn syslog_ng_keeps_and_drops_as_the_readme_says() {
    let mut kept = statuses("keeps the batch");
    let given_up = statuses("three attempts");
    let dropped = statuses("at once");
    // 414 and 431 are hyper's own.
    for status in ["503", "400", "414", "431"] {
        assert!(kept.iter().any(|kept| kept == status), "{status} is kept");
    }
    kept.extend(["closed", "silent", "refused"].map(str::to_owned));

    let stub = Stub::default();
    let (port, refused) = (free_port(), free_port());
    stub.listen(port);
    let mut text = format!("{HEAD}{}{SOURCE}", plugin("waybill"));
    for path in kept.iter().chain(&given_up).chain(&dropped) {
        let port = if path == "refused" { refused } else { port };
        // So short where no answer comes at all.
        let timeout = if path == "silent" { "timeout(1)" } else { "" };
        let _ = writeln!(
            text,
            "destination d_{path} {{\n  waybill(url(\"http://127.0.0.1:{port}/{path}\") dir(\"@FOLDER@\") {timeout});\n}};\n\
             log {{ source(s_src); destination(d_{path}); flags(flow-control); }};"
        );
    }
    let Some(syslog_ng) = SyslogNg::start(&text) else { return };
    let counter = |path: &str, name: &str| -> usize {
        let (_, stats) = syslog_ng.control("stats");
        let prefix = format!("dst.http;d_{path}#0;");
        let mut lines = stats.lines().filter(|line| line.starts_with(&prefix));
        let count = lines.find_map(|line| line.split_once(&format!(";{name};")));
        let (_, count) = count.unwrap_or_else(|| panic!("no {name} of {path} in:\n{stats}"));
        count.trim().parse().expect("a number")
    };
    // One message is one batch.
    let mut socket = UnixStream::connect(syslog_ng.folder().join("in.sock")).expect("connect");
    socket.write_all(b"<13>Nov 21 10:00:00 app[7]: message\n").expect("written");

    for path in given_up.iter().chain(&dropped) {
        wait_until(&format!("{path} drops"), PATIENCE, || counter(path, "dropped") == 1);
        let posts = if given_up.contains(path) { RETRIES } else { 1 };
        assert_eq!((stub.posts(path), counter(path, "queued")), (posts, 0), "{path}");
    }
    for path in &kept {
        if path == "refused" {
            wait_until("refused connections", PATIENCE, || {
                syslog_ng.log().matches(&format!("127.0.0.1:{refused}")).count() > RETRIES
            });
        } else {
            wait_until(&format!("{path} is tried on"), PATIENCE, || stub.posts(path) > RETRIES + 1);
        }
        assert_eq!((counter(path, "dropped"), counter(path, "written")), (0, 0), "{path}");
        // While a batch is under way it is in no queue.
        wait_until(&format!("{path} is kept"), PATIENCE, || counter(path, "queued") == 1);
    }
    stub.relents.store(true, Ordering::Relaxed);
    stub.listen(refused);
    for path in &kept {
        wait_until(&format!("{path} is handed over"), PATIENCE, || counter(path, "written") == 1);
        assert_eq!(counter(path, "dropped"), 0, "{path}");
    }
    for path in given_up.iter().chain(&dropped) {
        assert_eq!(counter(path, "written"), 0, "{path}");
    }
}
