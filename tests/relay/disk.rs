//! A disk that is full, under the state directory, the spool and the store: it is said, nothing is lost, and it goes on
//! by itself when there is room again. Needs root, for a file system of a few megabytes.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::support::servers::{free_port, http, skip, wait_until};
use crate::support::store::{assert_lines, run, wait_for_lines};
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, lines, waybill};

/// A small file system in memory.
struct Disk {
    folder: PathBuf,
}

impl Disk {
    fn mount(folder: PathBuf, megabytes: u32) -> Option<Disk> {
        fs::create_dir_all(&folder).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=700"), "waybill-test"]);
        let mounted = mount.arg(&folder).stderr(Stdio::null()).status();
        if !mounted.is_ok_and(|status| status.success()) {
            skip("a full disk: needs root, to mount a small tmpfs");
            return None;
        }
        Some(Disk { folder })
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("filler"))
            .expect("open");
        for size in [1 << 16, 1 << 12, 1] {
            let piece = vec![b'x'; size];
            while file.write_all(&piece).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.folder.join("filler")).expect("the filler");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a process that failed to end may still hold it.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

fn ready(receiver: &Receiver) -> u16 {
    let address = format!("127.0.0.1:{}", receiver.port());
    http(&address, "GET", "/health/ready", "text/plain", b"").expect("an answer").0
}

fn lines_of(store: &Path) -> usize {
    let mut command = waybill();
    command.args(["search", "--limit", "10000000", "--json", "--store"]).arg(store);
    run(command).stdout.lines().count()
}

#[test]
fn a_full_state_directory_holds_up_new_files_and_loses_nothing() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("state"), 4) else {
        return;
    };
    let receiver = bench.receiver();
    bench.write("logs/a.log", lines("line", 100));
    let mut sender = bench.sender(&receiver, &["logs/*.log"]);
    wait_for_lines(&bench, 100);
    disk.fill();
    // A file that is new needs a row, which must be on disk before its first line leaves. Several, because the last
    // page of a file that exists may have room for one.
    for number in 100..120 {
        let more: String =
            (0..5).map(|part| format!("line {}\n", 5 * number - 400 + part)).collect();
        bench.write(&format!("logs/b{number}.log"), more);
    }
    sender.wait_for_log("the state directory cannot be written");
    // The file that is known goes on; its position is saved later.
    let more: String = (200..300).map(|number| format!("line {number}\n")).collect();
    bench.append("logs/a.log", more);
    let known =
        |lines: &[String]| (200..300).all(|number| lines.contains(&format!("line {number}")));
    wait_until("the lines of the known file", PATIENCE, || known(&bench.messages()));
    assert!(bench.messages().len() < 300, "the disk was not full");
    disk.free();
    wait_for_lines(&bench, 300);
    assert_lines(&bench, "line", 300);
    assert!(sender.stop().success());
    // What was saved is whole: nothing is sent twice under another id.
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    assert_lines(&bench, "line", 300);
}

#[test]
fn a_state_directory_that_is_full_at_the_start_is_said() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("state"), 2) else {
        return;
    };
    disk.fill();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    let refused = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("state"), "{}", refused.stderr);
    assert!(refused.stderr.contains("No space left"), "{}", refused.stderr);
    disk.free();
    bench.send_once(&receiver, &["app.log"]).ok();
    assert_lines(&bench, "line", 100);
}

#[test]
fn a_full_spool_holds_up_its_writer_and_loses_nothing() {
    const LINES: usize = 40_000;
    let bench = Bench::new();
    let Some(_disk) = Disk::mount(bench.path("state"), 4) else {
        return;
    };
    let mut receiver = bench.receiver();
    let socket = bench.path("in.sock");
    let arguments =
        ["--unix-stream", &socket.display().to_string(), "--format", "raw"].map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut sender = bench.sender(&receiver, &arguments);
    wait_until("the socket", PATIENCE, || UnixStream::connect(&socket).is_ok());
    receiver.kill_hard();
    // Far more than the disk holds; the writer is held up until it is all taken.
    let padding = "x".repeat(180);
    let writer = thread::spawn(move || {
        let mut stream = UnixStream::connect(&socket).expect("the socket");
        for number in 0..LINES {
            writeln!(stream, "line {number} {padding}").expect("written");
        }
    });
    sender.wait_for_log("spool: cannot write");
    assert!(!writer.is_finished(), "the disk took more than it holds");
    receiver.start();
    // Nobody makes room on the disk but the receipts.
    writer.join().expect("everything is taken");
    wait_for_lines(&bench, LINES);
    let mut numbers: Vec<usize> = bench
        .messages()
        .iter()
        .filter_map(|message| message.split(' ').nth(1)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    assert!(numbers.iter().copied().eq(0..LINES), "not the lines that were written");
    assert!(sender.stop().success());
}

#[test]
fn posts_are_answered_503_while_the_disk_is_full_and_200_after() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("state"), 8) else {
        return;
    };
    let receiver = bench.receiver();
    let address = format!("127.0.0.1:{}", free_port());
    let mut sender = bench.sender(&receiver, &["--http-intake", &address]);
    wait_until("the intake answers", PATIENCE, || {
        http(&address, "GET", "/", "text/plain", b"").is_ok_and(|(status, _)| status == 200)
    });
    let now = jiff::Timestamp::now();
    // With a key and a time, as syslog-ng posts: what is repeated is stored once.
    let post = |number: usize| {
        let body =
            format!("{{\"line\":\"line {number}\",\"key\":\"k{number}\",\"time\":\"{now}\"}}\n");
        http(&address, "POST", "/", "application/x-ndjson", body.as_bytes()).expect("an answer").0
    };
    assert_eq!(post(0), 200);
    disk.fill();
    for _ in 0..3 {
        assert_eq!(post(1), 503);
    }
    sender.wait_for_log("spool: cannot write");
    disk.free();
    wait_until("there is room", PATIENCE, || {
        let status = post(1);
        assert!([200, 503].contains(&status), "{status}");
        status == 200
    });
    assert_eq!(post(2), 200);
    wait_for_lines(&bench, 3);
    assert!(sender.stop().success());
    assert_lines(&bench, "line", 3);
}

#[test]
fn a_full_disk_under_the_store_is_no_receipt_and_loses_nothing() {
    const LINES: usize = 20_000;
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("disk"), 24) else {
        return;
    };
    let store = bench.path("disk/store.sqlite");
    let path = store.clone();
    let receiver = bench.receiver_with(move |command| {
        command.arg("--store").arg(&path);
    });
    bench.write("app.log", lines("first", 10));
    let mut sender: Process = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    let receipted =
        || fs::read_to_string(bench.path("receipts.jsonl")).unwrap_or_default().lines().count();
    wait_until("the first receipts", PATIENCE, || receipted() == 10);
    disk.fill();
    bench.append("app.log", lines("line", LINES));
    wait_until("the receiver says that it cannot write", PATIENCE, || {
        receiver.log().contains("the store cannot write")
    });
    assert!(receipted() < 10 + LINES, "a false receipt");
    wait_until("the receiver is not ready", PATIENCE, || ready(&receiver) == 503);
    disk.free();
    wait_until("a receipt for each line", PATIENCE, || receipted() == 10 + LINES);
    assert!(receiver.log().contains("the store can write again"), "{}", receiver.log());
    assert_eq!(ready(&receiver), 200);
    assert_eq!(lines_of(&store), 10 + LINES);
    assert!(sender.stop().success());
}

#[test]
fn a_store_that_is_deleted_under_the_receiver_receipts_nothing_more() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    bench.write("app.log", lines("line", 10));
    let mut sender = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    let receipted =
        || fs::read_to_string(bench.path("receipts.jsonl")).unwrap_or_default().lines().count();
    wait_until("the first receipts", PATIENCE, || receipted() == 10);
    assert_eq!(ready(&receiver), 200);
    for name in ["store.sqlite", "store.sqlite-wal", "store.sqlite-shm"] {
        fs::remove_file(bench.path(name)).expect("a file of the store");
    }
    bench.append("app.log", "line 10\n");
    sender.wait_for_log("deleted, moved or replaced");
    assert_eq!(ready(&receiver), 503);
    assert_eq!(receipted(), 10, "a false receipt");
    receiver.stop();
    receiver.start();
    wait_until("the receipt of the new store", PATIENCE, || receipted() == 11);
    assert_eq!(ready(&receiver), 200);
    assert_eq!(bench.messages(), ["line 10"]);
    assert!(sender.stop().success());
}

/// Without a word, SIGXFSZ would end the receiver.
#[test]
fn a_limit_of_file_sizes_is_met_like_a_full_disk() {
    const LINES: usize = 10_000;
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let process = i32::try_from(receiver.process().id()).ok().and_then(Pid::from_raw);
    let limit = |current| {
        let limit = Rlimit { current, ..getrlimit(Resource::Fsize) };
        prlimit(process, Resource::Fsize, limit).expect("a limit");
    };
    limit(Some(1 << 20));
    bench.write("app.log", lines("line", LINES));
    let mut sender = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    receiver.process().wait_for_log("the store cannot write");
    assert_eq!(ready(&receiver), 503);
    limit(getrlimit(Resource::Fsize).maximum);
    wait_for_lines(&bench, LINES);
    assert_lines(&bench, "line", LINES);
    assert!(sender.stop().success());
}

#[test]
fn a_store_keeps_the_newest_lines_within_its_size() {
    let bench = Bench::new();
    let store = bench.path("store.sqlite");
    let receiver = bench.receiver_with(move |command| {
        command.args(["--keep-bytes", "1MiB", "--store"]).arg(&store);
    });
    bench.write("app.log", lines("line", 40_000));
    bench.send_once(&receiver, &["app.log"]).ok();
    wait_until("the oldest are gone", PATIENCE, || {
        let kept = bench.messages();
        !kept.contains(&"line 0".to_owned()) && kept.len() < 20_000
    });
    let kept = bench.messages();
    assert!(kept.contains(&"line 39999".to_owned()), "{} kept", kept.len());
    // In the order in which they came.
    let oldest = 40_000 - kept.len();
    assert!(kept.contains(&format!("line {oldest}")), "{oldest}");
}
