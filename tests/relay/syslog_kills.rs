//! kill -9 of `waybill send` in the middle of a TCP stream of syslog: what is lost is what the kernels and the spool held
//! at that moment, and no more; the numbers in docs/sources.md come from here.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::support::servers::{SyslogNg, free_port, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process};
use super::syslog_network::{rsyslogd, sender_of, syslog_ng_configuration};

const KILLS: usize = 4;

/// Lines that are written at once before each kill, more than a connection can hold.
const ROUND: usize = 50_000;

/// So many of them are stored when the kill comes.
const UNDER_WAY: usize = 2000;

fn query<T: rusqlite::types::FromSql>(bench: &Bench, sql: &str, of: &str) -> Option<T> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let store = Connection::open_with_flags(bench.path("store.sqlite"), flags).ok()?;
    store.query_row(sql, [of], |row| row.get(0)).ok()
}

/// Whether a line with these words in this order is in the embedded store.
pub fn is_stored(bench: &Bench, phrase: &str) -> bool {
    let sql = "SELECT count(*) FROM words WHERE words MATCH ?1";
    query::<i64>(bench, sql, &format!("\"{phrase}\"")).is_some_and(|count| count > 0)
}

/// What one line is padded with, to the length of an ordinary one: what is lost is bounded in bytes.
const PADDING_BYTES: usize = 200;

/// The most that one kill may lose, in bytes: the peer's send buffer, our receive buffer (twice 256 KiB, as the kernel
/// doubles it), and what awaits its sync.
fn window_bytes() -> usize {
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").expect("a setting");
    let most = text.split_whitespace().nth(2).expect("three numbers");
    most.parse::<usize>().expect("a number") + (512 << 10) + 2 * (2 << 20)
}

/// Line `number` as it is written.
fn line(number: usize) -> String {
    format!("line {number} {:x<PADDING_BYTES$}", "")
}

/// Writes lines with these numbers.
fn write_lines(input: &Path, numbers: std::ops::Range<usize>) {
    let mut file = fs::File::options().create(true).append(true).open(input).expect("open");
    let text: String = numbers.map(|number| line(number) + "\n").collect();
    file.write_all(text.as_bytes()).expect("write");
}

/// Kills and starts the sender in the stream, then counts. `doubled_max` is how many lines a client may send twice at a
/// kill, since it has no receipts to know better.
fn kill_in_the_stream(
    bench: &Bench,
    input: &Path,
    start: impl Fn() -> Process,
    what: &str,
    doubled_max: usize,
) {
    let mut sender = start();
    let mut written = 0;
    for _ in 0..KILLS {
        let first = written;
        write_lines(input, first..first + ROUND);
        wait_until("the stream is under way", PATIENCE, || {
            is_stored(bench, &format!("line {}", first + UNDER_WAY))
        });
        sender.kill_hard();
        sender = start();
        // Nothing of this round is on its way any more when the next one begins: else the next kill
        // would meet a spool full of it, and a stream at rest.
        written = first + ROUND + 1;
        write_lines(input, written - 1..written);
        wait_until("the round is over", PATIENCE, || {
            is_stored(bench, &format!("line {}", written - 1))
        });
    }
    assert!(sender.stop().success());

    let mut counts = vec![0_usize; written];
    let mut parts = BTreeMap::<String, usize>::new();
    for message in bench.messages() {
        let number = message.split(' ').nth(1).and_then(|number| number.parse::<usize>().ok());
        match number.filter(|number| *number < written && message == line(*number)) {
            Some(number) => counts[number] += 1,
            None => *parts.entry(message).or_default() += 1,
        }
    }
    let mut gaps: Vec<usize> = Vec::new();
    let mut before = true;
    for count in &counts {
        match (count, before) {
            (0, true) => gaps.push(1),
            (0, false) => *gaps.last_mut().expect("a gap goes on") += 1,
            _ => {}
        }
        before = *count > 0;
    }
    let doubled: usize = counts.iter().map(|count| count.saturating_sub(1)).sum();
    let lost: usize = gaps.iter().sum();
    println!(
        "{what}: {lost} of {written} lines lost in {KILLS} kills, in runs of {gaps:?}; {doubled} doubled; {} in parts",
        parts.len()
    );
    // Where a kill falls within a line, the part that was spooled is stored as a line of its own.
    assert!(parts.len() <= 2 * KILLS, "{parts:?}");
    // A line that was lost alone at the edge of what was taken makes two gaps of one.
    assert!(gaps.len() <= 2 * KILLS, "nothing is lost but at a kill: {gaps:?}");
    for gap in gaps {
        assert!(gap * PADDING_BYTES <= window_bytes(), "{gap} lines lost at once");
    }
    assert!(doubled <= doubled_max * KILLS, "{doubled} lines doubled");
}

fn source(port: u16) -> String {
    format!("[[source]]\nsyslog_tcp = '127.0.0.1:{port}'\nformat = 'syslog'\n")
}

#[test]
fn what_syslog_ng_loses_over_tcp_at_each_kill_is_bounded() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let network = format!("network(\"127.0.0.1\" transport(\"tcp\") port({port})");
    let Some(syslog_ng) = SyslogNg::start(&syslog_ng_configuration(&[("tcp", network)])) else {
        return;
    };
    let input = syslog_ng.folder().join("in.log");
    let start = || sender_of(&bench, &receiver, "", &source(port));
    kill_in_the_stream(&bench, &input, start, "syslog-ng network()", 0);
}

#[test]
fn what_rsyslog_loses_over_tcp_at_each_kill_is_bounded() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let folder = bench.path("");
    let text = format!(
        "global(workDirectory=\"{0}\")\nmodule(load=\"imfile\" mode=\"polling\" pollingInterval=\"1\")\n\
         input(type=\"imfile\" file=\"{0}/in.log\" tag=\"source:\")\n\
         action(type=\"omfwd\" target=\"127.0.0.1\" port=\"{port}\" protocol=\"tcp\" \
         action.resumeRetryCount=\"-1\" action.resumeInterval=\"1\")\n",
        folder.display()
    );
    let configuration = bench.write("rsyslog.conf", text);
    let Some(command) = rsyslogd(&configuration, &folder) else { return };
    let _rsyslog = Process::start("rsyslogd", command, bench.path("rsyslogd.log"));
    let start = || sender_of(&bench, &receiver, "", &source(port));
    // A batch (queue.dequeueBatchSize, 1024) whose end could not be written is written again.
    kill_in_the_stream(&bench, &bench.path("in.log"), start, "rsyslog omfwd", 1024);
}
