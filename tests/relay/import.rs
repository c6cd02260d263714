//! `waybill import`: after a clean stop of the other shipper, exactly the lines are sent that it had not read.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::files::gzip;
use super::support::registries::{
    At, cursor, filestream, filestream_checkpoint, filestream_fingerprint, filestream_state, inode,
    log_input, log_input_6, log_state, memlog, sha256, sincedb, sincedb_without_paths,
};
use super::support::servers::skip;
use super::support::store::run;
use super::support::waybill::{Bench, Finished, Receiver, lines, numbered, waybill};

/// A registry that lies in `registry`, and the flag that names it.
type Registry = (&'static str, fn(&Bench, &[At<'_>]));

const REGISTRIES: [Registry; 7] = [
    ("--from-logstash", sincedb),
    ("--from-logstash", sincedb_without_paths),
    ("--from-filebeat", log_input),
    ("--from-filebeat", log_input_6),
    ("--from-filebeat", filestream),
    ("--from-filebeat", filestream_checkpoint),
    ("--from-filebeat", filestream_fingerprint),
];

/// Runs `waybill import` with the state directory of this bench's sender, for `logs/*.log`.
fn import(bench: &Bench, arguments: &[&str]) -> Finished {
    let mut command = waybill();
    command
        .arg("import")
        .arg("--state-dir")
        .arg(bench.path("state"))
        .arg("logs/*.log")
        .args(arguments);
    command.current_dir(bench.path(""));
    run(command)
}

/// The line of a file in the table that was printed.
#[track_caller]
fn line_of(finished: &Finished, name: &str) -> String {
    let line = finished.stdout.lines().find(|line| {
        line.split("  ").any(|field| Path::new(field).file_name().is_some_and(|f| f == name))
    });
    let words =
        line.unwrap_or_else(|| panic!("no {name} in\n{}", finished.stdout)).split_whitespace();
    words.collect::<Vec<_>>().join(" ")
}

fn set_modified(bench: &Bench, name: &str, time: SystemTime) {
    let file = File::options().write(true).open(bench.path(name)).expect("open");
    file.set_modified(time).expect("a file's time can be set");
}

/// The folder `state`, name by name.
fn state(bench: &Bench) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(bench.path("state")).into_iter().flatten();
    let content = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        (path.display().to_string(), fs::read(&path).expect("read"))
    };
    let mut all: Vec<_> = entries.map(content).collect();
    all.sort();
    all
}

/// Where the first `count` of these lines end.
fn end_of(tag: &str, count: usize) -> usize {
    lines(tag, count).len()
}

fn from(tag: &str, first: usize, count: usize) -> impl Iterator<Item = String> {
    numbered(tag, count).skip(first)
}

#[track_caller]
fn send(bench: &Bench, receiver: &Receiver) {
    bench.send_once(receiver, &["logs/*.log"]).ok();
}

/// A current file and a rotated one, both read in part, and one that the shipper had not found yet.
#[test]
fn exactly_the_unread_lines_are_sent_whatever_the_registry() {
    for (flag, write) in REGISTRIES {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("logs/app.log.1", lines("rotated", 300));
        bench.write("logs/app.log", lines("current", 300));
        bench.write("logs/new.log", lines("new", 10));
        let rotated = At { was: "app.log", ..At::new("app.log.1", end_of("rotated", 250)) };
        write(&bench, &[rotated, At::new("app.log", end_of("current", 100))]);
        let finished = import(&bench, &[flag, "registry"]).ok();
        let (position, size) = (end_of("current", 100), end_of("current", 300));
        let said = format!("{position} {size} {} ", size - position);
        assert!(line_of(&finished, "app.log").starts_with(&said), "{}", finished.stdout);
        assert!(line_of(&finished, "new.log").contains("not in the registry"));
        assert!(finished.stderr.contains("2 positions imported into"), "{}", finished.stderr);
        bench.append("logs/app.log", "written since\n");
        for _ in 0..2 {
            send(&bench, &receiver);
            let unread = from("rotated", 250, 300).chain(from("current", 100, 300));
            let since = ["written since".to_owned()];
            bench.assert_lines(unread.chain(numbered("new", 10)).chain(since));
        }
    }
}

#[test]
fn a_damaged_registry_is_an_error_and_nothing_is_written() {
    let bench = Bench::new();
    bench.write("logs/app.log", lines("line", 10));
    let positions = [At::new("app.log", end_of("line", 5)), At::new("app.log", end_of("line", 6))];
    filestream(&bench, &positions);
    sincedb(&bench, &positions);
    for (flag, name, says) in [
        ("--from-filebeat", "registry/registry/filebeat/log.json", "mends its registry"),
        ("--from-logstash", "registry/.sincedb_a1b2", "line 2 is none of a sincedb"),
    ] {
        let whole = fs::read(bench.path(name)).expect("read");
        // As a file system leaves it whose last block was not written.
        let mut torn = whole[..whole.len() - 20].to_vec();
        torn.extend([0; 20]);
        bench.write(name, torn);
        // The other shipper's registry is good, and counts for nothing.
        let arguments = ["--from-filebeat", "registry", "--from-logstash", "registry"];
        let finished = import(&bench, &arguments);
        assert_eq!(finished.status.code(), Some(1), "{flag}");
        let path = bench.path(name).display().to_string();
        let said = &finished.stderr;
        assert!(said.contains(&path) && said.contains(says), "{said}");
        assert!(!bench.path("state").exists());
        bench.write(name, whole);
    }
    let finished = import(&bench, &["--from-logstash", "nowhere"]);
    assert_eq!(finished.status.code(), Some(1));
    assert!(finished.stderr.contains("nowhere: cannot be read"), "{}", finished.stderr);
}

/// A file that was cut short or written anew has lines that nobody has read, wherever the old position is in it.
#[test]
fn a_position_beyond_the_end_or_within_a_line_starts_at_the_first_byte() {
    for (offset, says) in
        [(end_of("line", 100) + 1, "lies behind its end"), (2, "lies within a line")]
    {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("logs/app.log", lines("line", 100));
        sincedb(&bench, &[At::new("app.log", offset)]);
        let finished = import(&bench, &["--from-logstash", "registry"]).ok();
        let line = line_of(&finished, "app.log");
        assert!(line.starts_with("0 ") && line.contains(says), "{line}");
        assert!(line.contains(&format!("({offset} lies")), "{line}");
        send(&bench, &receiver);
        bench.assert_lines(numbered("line", 100));
    }
}

/// Logstash's `read` mode takes the last line with the end of the file.
#[test]
fn a_position_at_the_end_of_a_file_without_a_last_newline_is_taken() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", "one\ntwo");
    sincedb(&bench, &[At::new("app.log", 7)]);
    import(&bench, &["--from-logstash", "registry"]).ok();
    send(&bench, &receiver);
    bench.assert_lines([]);
}

#[test]
fn a_dry_run_writes_nothing() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", lines("line", 100));
    log_input(&bench, &[At::new("app.log", end_of("line", 60))]);
    let dry = import(&bench, &["--from-filebeat", "registry", "--dry-run"]).ok();
    assert!(dry.stderr.contains("nothing was written"), "{}", dry.stderr);
    assert!(!bench.path("state").exists());
    // With a state of its own, too; it says what the import then does.
    bench.write("logs/other.log", lines("other", 10));
    bench.send_once(&receiver, &["logs/other.log"]).ok();
    let before = state(&bench);
    let dry = import(&bench, &["--from-filebeat", "registry", "--dry-run"]).ok();
    assert_eq!(state(&bench), before);
    let done = import(&bench, &["--from-filebeat", "registry"]).ok();
    assert_eq!(done.stdout, dry.stdout);
    assert_ne!(state(&bench), before);
}

#[test]
fn a_position_that_waybill_has_is_never_moved() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", lines("line", 50));
    log_input(&bench, &[At::new("app.log", end_of("line", 20))]);
    for again in [false, true] {
        let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
        let passed_over = format!("passed over: Waybill is at {} itself", end_of("line", 20));
        assert_eq!(line_of(&finished, "app.log").contains(&passed_over), again);
    }
    send(&bench, &receiver);
    bench.append("logs/app.log", lines("more", 50));
    // Neither back nor on.
    for offset in [end_of("line", 30), end_of("line", 50) + end_of("more", 30)] {
        log_input(&bench, &[At::new("app.log", offset)]);
        let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
        let passed_over = format!("passed over: Waybill is at {} itself", end_of("line", 50));
        assert!(line_of(&finished, "app.log").contains(&passed_over), "{}", finished.stdout);
    }
    send(&bench, &receiver);
    bench.assert_lines(from("line", 20, 50).chain(numbered("more", 50)));
}

#[test]
fn a_running_sender_and_a_running_shipper_are_refused() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", lines("line", 10));
    filestream(&bench, &[At::new("app.log", end_of("line", 5))]);
    let mut sender = bench.sender(&receiver, &["logs/app.log"]);
    bench.wait_for_lines(10);
    for more in [&[][..], &["--dry-run"]] {
        let arguments = [&["--from-filebeat", "registry"], more].concat();
        let finished = import(&bench, &arguments);
        assert_eq!(finished.status.code(), Some(1));
        assert!(finished.stderr.contains("in use by another waybill send"), "{}", finished.stderr);
    }
    assert!(sender.stop().success());
    // Go's locks, and Java's.
    bench.write("registry/filebeat.lock", "");
    let filebeat = File::open(bench.path("registry/filebeat.lock")).expect("open");
    rustix::fs::flock(&filebeat, rustix::fs::FlockOperation::LockExclusive).expect("lock");
    bench.write("data/plugins/inputs/file/.sincedb_a1b2", "");
    let logstash = File::create(bench.path("data/.lock")).expect("create");
    rustix::fs::fcntl_lock(&logstash, rustix::fs::FlockOperation::LockExclusive).expect("lock");
    for (flag, path, says) in [
        ("--from-filebeat", "registry", "Filebeat still runs"),
        ("--from-logstash", "data/plugins/inputs/file", "Logstash still runs"),
    ] {
        let finished = import(&bench, &[flag, path]);
        assert_eq!(finished.status.code(), Some(1));
        assert!(finished.stderr.contains(says), "{}", finished.stderr);
    }
    drop((filebeat, logstash));
    import(&bench, &["--from-filebeat", "registry"]).ok();
    import(&bench, &["--from-logstash", "data/plugins/inputs/file"]).ok();
}

/// Two rotations between the stop and the import: the older file is known, the younger one is nobody's.
#[test]
fn a_generation_that_came_after_the_stop_is_sent_whole() {
    for compressed in [false, true] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("logs/app.log.2", lines("oldest", 50));
        bench.write("logs/app.log.3", lines("from before", 5));
        let stop = SystemTime::now();
        let was = At { was: "app.log", ..At::new("app.log.2", end_of("oldest", 20)) };
        filestream(&bench, &[At { changed: stop, ..was }]);
        bench.write("logs/app.log.1", lines("missed", 50));
        bench.write("logs/app.log", lines("current", 50));
        let later = |seconds| stop + Duration::from_secs(seconds);
        let mut unread = 20;
        if compressed {
            // Under another inode, which tells nothing: all of it is sent, so that nothing is lost.
            bench.write("logs/app.log.2.gz", gzip(lines("oldest", 50).as_bytes()));
            fs::remove_file(bench.path("logs/app.log.2")).expect("remove");
            set_modified(&bench, "logs/app.log.2.gz", later(1));
            unread = 0;
        }
        set_modified(&bench, "logs/app.log.1", later(2));
        set_modified(&bench, "logs/app.log.3", stop - Duration::from_secs(60));
        let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
        let missed = line_of(&finished, "app.log.1");
        assert!(missed.starts_with("0 ") && missed.contains("rotated since"), "{missed}");
        assert!(!finished.stdout.contains("app.log.3"), "{}", finished.stdout);
        send(&bench, &receiver);
        let rotated = from("oldest", unread, 50).chain(numbered("missed", 50));
        bench.assert_lines(rotated.chain(numbered("current", 50)));
    }
}

/// Two rotations between the import and the first start: the younger file came and went unseen, and is not taken for
/// one of those that were there before.
#[test]
fn a_generation_that_came_after_the_import_is_sent_whole() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log.1", lines("from before", 5));
    set_modified(&bench, "logs/app.log.1", SystemTime::now() - Duration::from_secs(60));
    bench.write("logs/app.log", lines("known", 50));
    sincedb(&bench, &[At::new("app.log", end_of("known", 20))]);
    import(&bench, &["--from-logstash", "registry"]).ok();
    for (from, to) in [("app.log.1", "app.log.3"), ("app.log", "app.log.2")] {
        let path = |name: &str| bench.path(&format!("logs/{name}"));
        fs::rename(path(from), path(to)).expect("rename");
    }
    bench.write("logs/app.log.1", lines("missed", 50));
    bench.write("logs/app.log", lines("current", 50));
    for _ in 0..2 {
        send(&bench, &receiver);
        let known = from("known", 20, 50).chain(numbered("missed", 50));
        bench.assert_lines(known.chain(numbered("current", 50)));
    }
}

/// A rotated file that one registry does not know, and that another one knows in part.
#[test]
fn a_second_registry_counts_for_what_the_first_one_left_alone() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log.1", lines("rotated", 50));
    set_modified(&bench, "logs/app.log.1", SystemTime::now() - Duration::from_secs(60));
    bench.write("logs/app.log", lines("current", 50));
    sincedb(&bench, &[At::new("app.log", end_of("current", 20))]);
    import(&bench, &["--from-logstash", "registry"]).ok();
    let rotated = At { was: "app.log", ..At::new("app.log.1", end_of("rotated", 30)) };
    log_input(&bench, &[rotated]);
    import(&bench, &["--from-filebeat", "registry"]).ok();
    send(&bench, &receiver);
    bench.assert_lines(from("rotated", 30, 50).chain(from("current", 20, 50)));
}

/// Known by its bytes, a file is found again wherever it is: here compressed, and with an inode of its own.
#[test]
fn a_fingerprint_finds_a_file_that_was_compressed() {
    for length in [64, 1024] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let text = lines("rotated", 300);
        bench.write("logs/app.log.2.gz", gzip(text.as_bytes()));
        bench.write("logs/app.log", lines("current", 10));
        let at = At { was: "app.log", ..At::new("app.log.2.gz", end_of("rotated", 120)) };
        let hash = sha256(&text.as_bytes()[..length]);
        let key = format!("filestream::my-id::fingerprint::{hash}");
        memlog(&bench, 0, [(key, cursor(&bench, &at, "fingerprint", ""))]);
        let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
        let said = format!("{} {} ", end_of("rotated", 120), text.len());
        assert!(line_of(&finished, "app.log.2.gz").starts_with(&said), "{}", finished.stdout);
        send(&bench, &receiver);
        bench.assert_lines(from("rotated", 120, 300).chain(numbered("current", 10)));
    }
}

/// A file smaller than 1 KiB, as Filebeat 9.5 knows it: the hash of its bytes in hexadecimal.
#[test]
fn a_growing_fingerprint_is_known() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let text = lines("line", 20);
    bench.write("logs/app.log", &text);
    let hexadecimal: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let key = format!("filestream::my-id::fingerprint::{}", sha256(hexadecimal.as_bytes()));
    let at = At::new("app.log", end_of("line", 15));
    memlog(&bench, 0, [(key, cursor(&bench, &at, "fingerprint", ""))]);
    bench.append("logs/app.log", lines("more", 200));
    import(&bench, &["--from-filebeat", "registry"]).ok();
    send(&bench, &receiver);
    bench.assert_lines(from("line", 15, 20).chain(numbered("more", 200)));
}

/// Logstash counts an archive by its stored size, once it has read all of it.
#[test]
fn an_archive_that_logstash_has_read_is_not_sent_again() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let (done, begun) = (gzip(lines("done", 100).as_bytes()), gzip(lines("begun", 100).as_bytes()));
    bench.write("logs/done.log.gz", &done);
    bench.write("logs/begun.log.gz", begun);
    sincedb(&bench, &[At::new("done.log.gz", done.len()), At::new("begun.log.gz", 0)]);
    let mut command = waybill();
    command.args(["import", "--from-logstash", "registry", "logs/*.gz", "--state-dir", "state"]);
    command.current_dir(bench.path(""));
    let finished = run(command).ok();
    assert!(
        line_of(&finished, "done.log.gz")
            .ends_with(&format!(" 0 {}", bench.path("logs/done.log.gz").display()))
    );
    bench.send_once(&receiver, &["logs/*.gz"]).ok();
    bench.assert_lines(numbered("begun", 100));
}

/// An inode is given to another file as soon as its own is deleted (elastic/logstash#8818).
#[test]
fn a_file_that_is_younger_than_its_position_is_another_one() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", lines("line", 100));
    if fs::metadata(bench.path("logs/app.log")).expect("there").created().is_err() {
        return skip("this file system does not tell when a file was made");
    }
    let changed = SystemTime::now() - Duration::from_secs(3600);
    sincedb(&bench, &[At { changed, ..At::new("app.log", end_of("line", 50)) }]);
    let finished = import(&bench, &["--from-logstash", "registry"]).ok();
    assert!(finished.stdout.contains("is younger than the position"), "{}", finished.stdout);
    send(&bench, &receiver);
    bench.assert_lines(numbered("line", 100));
}

#[test]
fn of_several_positions_of_a_file_the_lowest_counts_and_unclaimed_ones_do_not() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/app.log", lines("line", 100));
    let state = |count| At::new("app.log", end_of("line", count));
    let unclaimed = log_state(&bench, &state(10));
    let unclaimed = (unclaimed.0, unclaimed.1.replace("\"ttl\":-1", "\"ttl\":-2"));
    let (one, mut other) =
        (filestream_state(&bench, &state(70)), filestream_state(&bench, &state(60)));
    other.0 = other.0.replace("my-id", "another-id");
    memlog(&bench, 0, [unclaimed, one, other]);
    let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
    let line = line_of(&finished, "app.log");
    assert!(line.contains("the lowest of its 2 positions"), "{line}");
    send(&bench, &receiver);
    bench.assert_lines(from("line", 60, 100));
}

/// Identities without a device, and what cannot be taken over: each with its reason.
#[test]
fn every_position_is_accounted_for() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    for name in ["path", "marker", "native", "renamed", "unknown"] {
        bench.write(&format!("logs/{name}.log"), lines(name, 10));
    }
    bench.write("elsewhere/app.log", lines("elsewhere", 10));
    let at = |name: &'static str, tag| At::new(name, end_of(tag, 5));
    let state = |key: &str, at: &At<'_>, identity: &str| {
        (format!("filestream::id::{identity}::{key}"), cursor(&bench, at, identity, ""))
    };
    let marked = at("marker.log", "marker");
    let (marked_inode, _) = inode(&bench, &marked);
    let gone = At { was: "gone.log", ..at("native.log", "native") };
    let elsewhere = At { was: "../elsewhere/app.log", ..at("native.log", "native") };
    memlog(
        &bench,
        0,
        [
            state("/any", &at("path.log", "path"), "path"),
            state(&format!("{marked_inode}-host-7"), &marked, "inode_marker"),
            filestream_state(&bench, &at("native.log", "native")),
            state("1-1", &at("renamed.log", "renamed"), "native"),
            state("1", &at("unknown.log", "unknown"), "by_smell"),
            state("2-2", &gone, "native"),
            state("3-3", &elsewhere, "native"),
        ],
    );
    let finished = import(&bench, &["--from-filebeat", "registry"]).ok();
    for says in [
        "renamed.log (passed over: another file has this name now)",
        "unknown.log (passed over: it was known by \"by_smell\", which is not known here)",
        "gone.log (passed over: the file is gone; if it was compressed since",
        "elsewhere/app.log (passed over: no source reads it)",
    ] {
        let words: Vec<&str> = finished.stdout.split_whitespace().collect();
        assert!(words.join(" ").contains(says), "{says}\n{}", finished.stdout);
    }
    assert!(finished.stderr.contains("3 positions imported into"), "{}", finished.stderr);
    send(&bench, &receiver);
    let taken = ["path", "marker", "native"].into_iter().flat_map(|tag| from(tag, 5, 10));
    let whole = ["renamed", "unknown"].into_iter().flat_map(|tag| numbered(tag, 10));
    bench.assert_lines(taken.chain(whole));
}

/// Root imports for a sender that runs as another user.
#[test]
fn what_root_imports_belongs_to_the_owner_of_the_state_directory() {
    const NOBODY: u32 = 65534;
    let bench = Bench::new();
    bench.write("logs/app.log", lines("line", 10));
    sincedb(&bench, &[At::new("app.log", end_of("line", 5))]);
    fs::create_dir(bench.path("state")).expect("a folder");
    if chown(bench.path("state"), Some(NOBODY), Some(NOBODY)).is_err() {
        return skip("only root can give a folder to another user");
    }
    import(&bench, &["--from-logstash", "registry"]).ok();
    let files = state(&bench);
    assert!(files.len() >= 3, "{files:?}");
    for (path, _) in files {
        assert_eq!(fs::metadata(&path).expect("there").uid(), NOBODY, "{path}");
    }
}

#[test]
fn what_start_end_passes_over_is_said() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/known.log", lines("known", 10));
    bench.write("logs/new.log", lines("new", 10));
    sincedb(&bench, &[At::new("known.log", end_of("known", 5))]);
    let finished = import(&bench, &["--from-logstash", "registry", "--start", "end"]).ok();
    assert!(line_of(&finished, "new.log").contains("passed over by start = \"end\""));
    bench.send_once(&receiver, &["logs/*.log", "--start", "end"]).ok();
    bench.assert_lines(from("known", 5, 10));
}
