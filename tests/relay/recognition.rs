//! Recognition: who a file is, in executions in which a simpler rule lost or doubled lines.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

use super::files::gzip;
use super::rotation::{compress, rename, several, shift};
use super::support::servers::wait_until;
use super::support::waybill::{Bench, PATIENCE, lines, numbered};

/// `app.log` becomes `app.log.1` and begins anew with this text.
fn rotate(bench: &Bench, text: &str) {
    shift(bench);
    rename(bench, "app.log", "app.log.1");
    bench.write("app.log", text);
}

#[test]
fn a_kill_while_missed_generations_are_taken_up_loses_none() {
    const GENERATIONS: usize = 40;
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("generation 0", 20));
    bench.send_once(&receiver, &["app.log"]).ok();
    for number in 1..=GENERATIONS {
        rotate(&bench, &lines(&format!("generation {number}"), 20));
    }
    for _ in 0..4 {
        let mut sender = bench.sender(&receiver, &["app.log"]);
        sender.wait_for_log(" following");
        sender.kill_hard();
    }
    for _ in 0..2 {
        bench.send_once(&receiver, &["app.log"]).ok();
    }
    let tags: Vec<String> =
        (0..=GENERATIONS).map(|number| format!("generation {number}")).collect();
    bench.assert_lines(tags.iter().flat_map(|tag| numbered(tag, 20)));
}

/// Positions were not saved, and the first KiB is the same: the run whose file is there keeps it.
#[test]
fn compressed_after_a_kill_beside_an_equal_beginning() {
    let header = format!("# {}\n", "x".repeat(1500));
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", header.clone() + &lines("first", 50));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(51);
        rename(&bench, "app.log", "app.log.1");
        bench.write("app.log", header.clone() + &lines("second", 100));
        bench.wait_for_lines(152);
        sender.kill_hard();
        compress(&bench, "app.log.1");
        for _ in 0..2 {
            bench.send_once(&receiver, &[pattern]).ok();
        }
        let headers = [header.trim_end().to_owned(), header.trim_end().to_owned()];
        let tags = numbered("first", 50).chain(numbered("second", 100));
        bench.assert_lines(tags.chain(headers));
    }
}

/// A clock of another machine, or preserved times, say nothing.
#[test]
fn a_missed_generation_with_an_old_time_is_sent() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("first", 100));
    bench.send_once(&receiver, &["app.log"]).ok();
    rotate(&bench, &lines("second", 100));
    let old = SystemTime::now() - Duration::from_secs(100 * 24 * 3600);
    let file = File::options().write(true).open(bench.path("app.log")).expect("open");
    file.set_modified(old).expect("time");
    rotate(&bench, &lines("third", 100));
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(several(&["first", "second", "third"], 100));
}

/// What was there before the first run stays passed over when it is renamed and compressed.
#[test]
fn rotated_files_from_before_the_first_run_are_never_sent() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log.1", lines("ancient", 100));
    bench.write("app.log.2.gz", gzip(lines("older", 100).as_bytes()));
    bench.write("app.log", lines("first", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(100);
    sender.kill_hard();
    rename(&bench, "app.log.2.gz", "app.log.3.gz");
    rename(&bench, "app.log.1", "app.log.2");
    compress(&bench, "app.log.2");
    rename(&bench, "app.log", "app.log.1");
    bench.write("app.log", lines("second", 100));
    for _ in 0..2 {
        bench.send_once(&receiver, &["app.log"]).ok();
    }
    bench.assert_lines(several(&["first", "second"], 100));
}

#[test]
fn a_short_generation_between_two_sweeps_is_sent() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("first", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(100);
    sender.freeze();
    rotate(&bench, "the only one\n");
    rotate(&bench, &lines("third", 100));
    sender.signal("-CONT");
    bench.wait_for_lines(201);
    assert!(sender.stop().success());
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(several(&["first", "third"], 100).chain(["the only one".to_owned()]));
}

/// rotatelogs and cronolog give dated names themselves; a job's log may soon be deleted.
#[test]
fn a_short_live_file_with_a_dated_name_is_sent_at_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log-20261120", lines("first", 100));
    let mut sender = bench.sender(&receiver, &["app.log-*"]);
    bench.wait_for_lines(100);
    let file = File::create(bench.path("app.log-20261121")).expect("create");
    (&file).write_all(lines("second", 10).as_bytes()).expect("write");
    wait_until("it is sent, however young it is", PATIENCE, || {
        file.set_modified(SystemTime::now()).expect("time");
        bench.messages().len() == 110
    });
    fs::remove_file(bench.path("app.log-20261121")).expect("remove");
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 100).chain(numbered("second", 10)));
}

/// The new generation begins with all bytes that the old one had.
#[test]
fn an_equal_beginning_is_sent_with_each_generation() {
    for compressed in [false, true] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", "started\n");
        bench.send_once(&receiver, &["app.log"]).ok();
        rename(&bench, "app.log", "app.log.1");
        if compressed {
            compress(&bench, "app.log.1");
        }
        bench.write("app.log", "started\none\n");
        for _ in 0..3 {
            bench.send_once(&receiver, &["app.log"]).ok();
        }
        let mut sender = bench.sender(&receiver, &["app.log"]);
        sender.wait_for_log("following");
        bench.append("app.log", "two\n");
        bench.wait_for_lines(4);
        assert!(sender.stop().success());
        bench.assert_lines(["started", "started", "one", "two"].map(String::from));
    }
}

#[test]
fn identical_lines_are_counted_in_each_generation() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "tick\n".repeat(1000));
    bench.send_once(&receiver, &["app.log"]).ok();
    rotate(&bench, &"tick\n".repeat(1500));
    for _ in 0..3 {
        bench.send_once(&receiver, &["app.log"]).ok();
    }
    bench.assert_lines(vec!["tick".to_owned(); 2500]);
}

#[test]
fn a_file_that_was_moved_away_unsent_is_reported_once() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("first", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("following");
    assert!(sender.stop().success());
    fs::create_dir(bench.path("old")).expect("a folder");
    rename(&bench, "app.log", "old/app.log.1");
    bench.write("app.log", lines("second", 100));
    receiver.start();
    let finished = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    let size = lines("first", 100).len();
    assert!(finished.stderr.contains("lost: the file was moved away"), "{}", finished.stderr);
    assert!(finished.stderr.contains(&format!("from=0 to={size}")), "{}", finished.stderr);
    bench.send_once(&receiver, &["app.log"]).ok();
    // It comes back: every line, after all.
    rename(&bench, "old/app.log.1", "app.log.1");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(several(&["first", "second"], 100));
}

#[test]
fn rotated_files_are_found_where_the_source_says_they_lie() {
    for compressed in [false, true] {
        let bench = Bench::new();
        let mut receiver = bench.receiver();
        receiver.stop();
        fs::create_dir(bench.path("old")).expect("a folder");
        bench.write("old/app.log.9", lines("ancient", 100));
        bench.write("app.log", lines("first", 100));
        let source = "[[source]]\nfiles = \"app.log\"\nrotated = [\"old/app.log*\"]\n";
        bench.write("sender.toml", source);
        let mut sender = bench.sender(&receiver, &["--config", "sender.toml"]);
        sender.wait_for_log("following");
        assert!(sender.stop().success());
        rename(&bench, "app.log", "old/app.log.2");
        bench.write("old/app.log.1", lines("unseen", 100));
        if compressed {
            compress(&bench, "old/app.log.2");
            compress(&bench, "old/app.log.1");
        }
        bench.write("app.log", lines("now", 100));
        receiver.start();
        for _ in 0..2 {
            bench.send_once(&receiver, &["--config", "sender.toml"]).ok();
        }
        bench.assert_lines(several(&["first", "unseen", "now"], 100));
    }
}

#[test]
fn a_link_that_names_another_file_now_is_a_reported_loss() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("a.log", lines("first", 100));
    symlink(bench.path("a.log"), bench.path("current.log")).expect("a link");
    let arguments = ["current.log", "--follow-symlinks"];
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("following");
    assert!(sender.stop().success());
    bench.write("b.log", lines("second", 100));
    fs::remove_file(bench.path("current.log")).expect("remove");
    symlink(bench.path("b.log"), bench.path("current.log")).expect("a link");
    receiver.start();
    let finished = bench.send_once(&receiver, &arguments);
    assert!(finished.stderr.contains("lost: the file was moved away"), "{}", finished.stderr);
    bench.assert_lines(numbered("second", 100));
}

#[test]
fn the_end_of_a_rotated_file_is_sent_without_a_successor() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "first\n");
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.append("app.log", "out of memory\n");
    rename(&bench, "app.log", "app.log.1");
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(2);
    assert!(sender.stop().success());
    bench.assert_lines(["first", "out of memory"].map(String::from));
}

#[test]
fn names_that_are_not_utf_8_are_followed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/plain.log", "one\n");
    let odd = bench.path("logs").join(OsStr::from_bytes(b"caf\xe9.log"));
    fs::write(&odd, "two\n").expect("write");
    for _ in 0..2 {
        bench.send_once(&receiver, &["logs/*.log"]).ok();
    }
    fs::rename(&odd, bench.path("logs").join(OsStr::from_bytes(b"caf\xe9.log.1"))).expect("rename");
    fs::write(&odd, "three\n").expect("write");
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    bench.assert_lines(["one", "two", "three"].map(String::from));
}

#[test]
fn a_file_named_like_the_pattern_switches_off_no_other() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/a.log", "one\n");
    bench.write("logs/*.log", "two\n");
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    bench.assert_lines(["one", "two"].map(String::from));
    // Neither does one that its own pattern does not match.
    bench.write("logs/[ab].log", "three\n");
    bench.append("logs/a.log", "four\n");
    bench.send_once(&receiver, &["logs/[ab].log"]).ok();
    bench.assert_lines(["one", "two", "three", "four"].map(String::from));
}

#[test]
fn a_missed_generation_and_its_archive_are_sent_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let unseen = lines("unseen", 20_000);
    let archive = gzip(unseen.as_bytes());
    bench.write("app.log", lines("first", 100));
    bench.send_once(&receiver, &["app.log"]).ok();
    rename(&bench, "app.log", "app.log.2");
    bench.write("app.log.1", &unseen);
    // gzip is at work.
    bench.write("app.log.1.gz", &archive[..archive.len() / 2]);
    bench.write("app.log", lines("now", 100));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("holds what another file holds");
    bench.wait_for_lines(20_200);
    bench.write("app.log.1.gz", &archive);
    fs::remove_file(bench.path("app.log.1")).expect("remove");
    bench.append("app.log", "more\n");
    bench.wait_for_lines(20_201);
    assert!(sender.stop().success());
    for _ in 0..2 {
        let finished = bench.send_once(&receiver, &["app.log"]).ok();
        let is_whole =
            !finished.stderr.contains("lost: ") && finished.stderr.contains(" lost_bytes=0 ");
        assert!(is_whole, "{}", finished.stderr);
    }
    let all = several(&["first", "now"], 100).chain(numbered("unseen", 20_000));
    bench.assert_lines(all.chain(["more".to_owned()]));
}

#[test]
fn old_generations_are_not_followed_again_at_each_start() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("generation 0", 10));
        for number in 1..=20 {
            bench.send_once(&receiver, &[pattern]).ok();
            rotate(&bench, &lines(&format!("generation {number}"), 10));
        }
        for name in ["app.log.7", "app.log.12"] {
            compress(&bench, name);
        }
        for _ in 0..2 {
            bench.send_once(&receiver, &[pattern]).ok();
        }
        let mut sender = bench.sender(&receiver, &[pattern]);
        sender.wait_for_log("following");
        // One of them changes: it alone is opened.
        bench.append("app.log.3", "late\n");
        bench.append("app.log", "now\n");
        wait_until("both lines are stored", PATIENCE, || bench.messages().len() == 212);
        let followed = sender.log().matches("following").count();
        assert!(followed <= 2, "{followed} files are followed: {}", sender.log());
        assert!(sender.stop().success());
    }
}
