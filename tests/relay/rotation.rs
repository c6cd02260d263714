//! Rotation: every way in which a file is taken from under its reader, with the sender up and down.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use serde_json::Value;

use super::files::gzip;
use super::support::servers::wait_until;
use super::support::waybill::{Bench, PATIENCE, lines, numbered};

pub fn rename(bench: &Bench, from: &str, to: &str) {
    fs::rename(bench.path(from), bench.path(to)).expect("rename");
}

/// As gzip(1) does it: the archive has the file's time, and appears before the file goes.
pub fn compress(bench: &Bench, name: &str) {
    let text = fs::read(bench.path(name)).expect("read");
    let modified = bench.path(name).metadata().and_then(|m| m.modified()).expect("a time");
    let archive = bench.write(&format!("{name}.gz"), gzip(&text));
    File::options().write(true).open(archive).and_then(|f| f.set_modified(modified)).expect("time");
    fs::remove_file(bench.path(name)).expect("remove");
}

/// `app.log` becomes `app.log.1`, that `app.log.2`, and so on.
pub fn shift(bench: &Bench) {
    let mut last = 1;
    while bench.path(&format!("app.log.{last}")).exists() {
        last += 1;
    }
    for number in (1..last).rev() {
        rename(bench, &format!("app.log.{number}"), &format!("app.log.{}", number + 1));
    }
}

pub fn copytruncate(bench: &Bench) {
    shift(bench);
    fs::copy(bench.path("app.log"), bench.path("app.log.1")).expect("copy");
    File::options()
        .write(true)
        .open(bench.path("app.log"))
        .and_then(|f| f.set_len(0))
        .expect("cut");
}

pub fn several(tags: &[&str], count: usize) -> impl Iterator<Item = String> {
    let lines: Vec<String> = tags.iter().flat_map(|tag| numbered(tag, count)).collect();
    lines.into_iter()
}

#[test]
fn renamed_while_written_with_the_sender_up() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("first", 500));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(500);
        let mut writer = File::options().append(true).open(bench.path("app.log")).expect("open");
        rename(&bench, "app.log", "app.log.1");
        // The writer goes on in the renamed file, before and after its successor is there.
        writer.write_all(lines("late", 500).as_bytes()).expect("write");
        bench.write("app.log", lines("second", 500));
        writer.write_all(lines("later", 500).as_bytes()).expect("write");
        bench.append("app.log", lines("third", 500));
        bench.wait_for_lines(2500);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern]).ok();
        bench.assert_lines(several(&["first", "late", "second", "later", "third"], 500));
    }
}

#[test]
fn renamed_and_compressed_with_the_sender_up() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("first", 500));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(500);
        bench.append("app.log", lines("late", 500));
        rename(&bench, "app.log", "app.log.1");
        bench.write("app.log", lines("second", 500));
        compress(&bench, "app.log.1");
        bench.wait_for_lines(1500);
        // The archive is met again by this sender and by the next one.
        bench.append("app.log", lines("third", 500));
        bench.wait_for_lines(2000);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern]).ok();
        rename(&bench, "app.log", "app.log.1");
        rename(&bench, "app.log.1.gz", "app.log.2.gz");
        bench.write("app.log", lines("fourth", 500));
        bench.send_once(&receiver, &[pattern]).ok();
        bench.assert_lines(several(&["first", "late", "second", "third", "fourth"], 500));
    }
}

#[test]
fn two_rotations_with_the_sender_down() {
    for pattern in ["app.log", "app.log*"] {
        for compressed in [false, true] {
            let bench = Bench::new();
            let receiver = bench.receiver();
            bench.write("app.log", lines("first", 500));
            bench.send_once(&receiver, &[pattern]).ok();
            bench.append("app.log", lines("late", 500));
            rename(&bench, "app.log", "app.log.1");
            bench.write("app.log", lines("unseen", 500));
            shift(&bench);
            rename(&bench, "app.log", "app.log.1");
            if compressed {
                compress(&bench, "app.log.2");
                compress(&bench, "app.log.1");
            }
            bench.write("app.log", lines("now", 500));
            for _ in 0..2 {
                bench.send_once(&receiver, &[pattern]).ok();
            }
            bench.assert_lines(several(&["first", "late", "unseen", "now"], 500));
        }
    }
}

/// A file that was found under its rotated name is found there again, though no pattern names it and nobody knows what
/// has its plain name by then.
#[test]
fn left_under_its_rotated_name_through_two_restarts() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    bench.write("app.log", lines("first", 500));
    bench.send_once(&receiver, &["app.log"]).ok();
    receiver.stop();
    bench.append("app.log", lines("rest", 100));
    rename(&bench, "app.log", "app.log.1");
    bench.write("other.log", lines("other", 10));
    let arguments = ["app.log", "other.log", "--drain-timeout", "100ms"];
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("app.log.1");
    assert!(sender.stop().success());
    bench.write("app.log", lines("second", 100));
    receiver.start();
    bench.send_once(&receiver, &["app.log", "other.log"]).ok();
    let all = numbered("first", 500).chain(numbered("rest", 100)).chain(numbered("second", 100));
    bench.assert_lines(all.chain(numbered("other", 10)));
}

#[test]
fn a_generation_that_ended_before_we_came_is_not_sent() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log.1", lines("ancient", 500));
    bench.write("app.log", lines("first", 500));
    let mut sender = bench.sender(&receiver, &["app.log"]);
    bench.wait_for_lines(500);
    shift(&bench);
    rename(&bench, "app.log", "app.log.1");
    bench.write("app.log", lines("second", 500));
    bench.wait_for_lines(1000);
    assert!(sender.stop().success());
    bench.assert_lines(several(&["first", "second"], 500));
}

#[test]
fn copied_and_truncated_with_the_sender_up() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("a", 500));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(500);
        for (number, tag) in ["b", "c", "d", "e"].into_iter().enumerate() {
            // What was written just now may be found in the copy alone.
            bench.append("app.log", lines(tag, 500));
            copytruncate(&bench);
            bench.append("app.log", format!("first of {number}\n"));
            bench.wait_for_lines(500 + (number + 1) * 501);
        }
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern]).ok();
        let firsts = (0..4).map(|number| format!("first of {number}"));
        bench.assert_lines(several(&["a", "b", "c", "d", "e"], 500).chain(firsts));
    }
}

#[test]
fn copied_and_truncated_with_the_sender_down() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("first", 500));
        bench.send_once(&receiver, &[pattern]).ok();
        bench.append("app.log", lines("late", 500));
        copytruncate(&bench);
        // Grown past the old position again.
        bench.append("app.log", lines("second", 3000));
        for _ in 0..2 {
            bench.send_once(&receiver, &[pattern]).ok();
        }
        bench.assert_lines(several(&["first", "late"], 500).chain(numbered("second", 3000)));
    }
}

/// The archive is met while the stream of the truncated file does not know of it yet.
#[test]
fn copied_truncated_and_compressed_at_once_with_the_sender_up() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("a", 100));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(100);
        for (number, tag) in ["b", "c", "d", "e"].into_iter().enumerate() {
            sender.freeze();
            for older in (1..=number).rev() {
                let (from, to) =
                    (format!("app.log.{older}.gz"), format!("app.log.{}.gz", older + 1));
                rename(&bench, &from, &to);
            }
            copytruncate(&bench);
            compress(&bench, "app.log.1");
            bench.append("app.log", lines(tag, 100));
            sender.signal("-CONT");
            bench.wait_for_lines(100 * (number + 2));
        }
        assert!(sender.stop().success());
        assert!(!sender.log().contains(" lost: "), "{}", sender.log());
        bench.send_once(&receiver, &[pattern]).ok();
        bench.assert_lines(several(&["a", "b", "c", "d", "e"], 100));
    }
}

/// A followed file that is still empty comes and goes between two looks.
#[test]
fn written_renamed_and_compressed_at_once_with_the_sender_up() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", "");
        let mut sender = bench.sender(&receiver, &[pattern]);
        sender.wait_for_log(" following");
        sender.freeze();
        bench.append("app.log", lines("first", 100));
        rename(&bench, "app.log", "app.log.1");
        compress(&bench, "app.log.1");
        bench.write("app.log", lines("second", 100));
        sender.signal("-CONT");
        bench.wait_for_lines(200);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern]).ok();
        bench.assert_lines(several(&["first", "second"], 100));
    }
}

#[test]
fn generations_with_equal_first_lines_are_kept_apart() {
    let header = |tag: &str| lines("header", 200) + &lines(tag, 300);
    for down in [false, true] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", header("first"));
        let mut sender = bench.sender(&receiver, &["app.log*"]);
        bench.wait_for_lines(500);
        if down {
            assert!(sender.stop().success());
        }
        for tag in ["second", "third"] {
            shift(&bench);
            rename(&bench, "app.log", "app.log.1");
            bench.write("app.log", header(tag));
        }
        if !down {
            bench.wait_for_lines(1500);
            assert!(sender.stop().success());
        }
        for _ in 0..2 {
            bench.send_once(&receiver, &["app.log*"]).ok();
        }
        let tags = several(&["first", "second", "third"], 300);
        bench.assert_lines(several(&["header"; 3], 200).chain(tags));
    }
}

#[test]
fn a_new_file_with_an_old_inode_is_read_from_its_start() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut expected = Vec::new();
    for number in 0..5 {
        let tag = format!("generation {number}");
        bench.write("app.log", lines(&tag, 500));
        bench.send_once(&receiver, &["app.log"]).ok();
        expected.extend(numbered(&tag, 500));
        // Most file systems give the number to the next file.
        fs::remove_file(bench.path("app.log")).expect("remove");
    }
    bench.assert_lines(expected);
}

/// Two files may hold the same lines; while the first is there, the second is another one.
#[test]
fn an_equal_file_beside_one_that_rests_is_sent() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("logs/a.log", lines("line", 100));
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    bench.write("logs/b.log", lines("line", 100));
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    bench.append("logs/a.log", "end of a\n");
    bench.append("logs/b.log", "end of b\n");
    bench.send_once(&receiver, &["logs/*.log"]).ok();
    let ends = ["end of a", "end of b"].map(String::from);
    bench.assert_lines(several(&["line", "line"], 100).chain(ends));
}

/// A generation of a few lines, which for a minute could as well be the beginning of a copy, and whose name no pattern
/// holds: it is looked at again when it has settled.
#[test]
fn a_short_generation_that_came_and_went_unseen_is_sent_when_it_has_settled() {
    for once in [true, false] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("first", 500));
        let mut sender = bench.sender(&receiver, &["app.log"]);
        bench.wait_for_lines(500);
        if once {
            assert!(sender.stop().success());
        } else {
            sender.signal("-STOP");
        }
        fs::rename(bench.path("app.log"), bench.path("app.log.2")).expect("rename");
        bench.write("app.log.1", lines("short", 3));
        bench.write("app.log", lines("last", 500));
        if once {
            bench.send_once(&receiver, &["app.log"]).ok();
        } else {
            sender.signal("-CONT");
            bench.wait_for_lines(1003);
            assert!(sender.stop().success());
        }
        let expected = several(&["first", "last"], 500).chain(several(&["short"], 3));
        bench.assert_lines(expected);
    }
}

pub fn set_modified(bench: &Bench, name: &str, time: SystemTime) {
    let file = File::options().write(true).open(bench.path(name)).expect("open");
    file.set_modified(time).expect("time");
}

#[test]
fn deleted_before_it_was_receipted() {
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let mut receiver = bench.receiver();
        bench.write("app.log", lines("first", 500));
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(500);
        receiver.stop();
        bench.append("app.log", lines("second", 30_000));
        fs::remove_file(bench.path("app.log")).expect("remove");
        sender.wait_for_log("a copy is kept");
        sender.kill_hard();
        assert!(bench.bytes_below("state/kept") > 300_000);
        sender = bench.sender(&receiver, &[pattern]);
        receiver.start();
        bench.wait_for_lines(30_500);
        wait_until("the copy is removed", PATIENCE, || bench.bytes_below("state/kept") == 0);
        assert!(sender.stop().success());
        bench.assert_lines(numbered("first", 500).chain(numbered("second", 30_000)));
    }
}

/// The archive of a file whose last lines are sent from their copy is no new file.
#[test]
fn compressed_before_it_was_receipted() {
    for pattern in ["app.log", "app.log*"] {
        for restarted in [true, false] {
            let bench = Bench::new();
            let mut receiver = bench.receiver();
            bench.write("app.log", lines("first", 500));
            let mut sender = bench.sender(&receiver, &[pattern]);
            bench.wait_for_lines(500);
            receiver.stop();
            bench.append("app.log", lines("late", 500));
            rename(&bench, "app.log", "app.log.1");
            compress(&bench, "app.log.1");
            sender.wait_for_log("a copy is kept");
            if restarted {
                sender.kill_hard();
                sender = bench.sender(&receiver, &[pattern]);
            }
            bench.write("app.log", lines("second", 500));
            receiver.start();
            bench.wait_for_lines(1500);
            assert!(sender.stop().success());
            for _ in 0..2 {
                bench.send_once(&receiver, &[pattern]).ok();
            }
            bench.assert_lines(several(&["first", "late", "second"], 500));
        }
    }
}

#[test]
fn what_the_budget_for_copies_cannot_hold_is_reported_as_lost() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("line", 100_000));
    let arguments = ["app.log", "--kept-bytes-max", "200KiB"];
    let mut sender = bench.sender(&receiver, &arguments);
    sender.wait_for_log("following");
    fs::remove_file(bench.path("app.log")).expect("remove");
    sender.wait_for_log("the budget for copies is full");
    sender.kill_hard();
    sender = bench.sender(&receiver, &arguments);
    receiver.start();
    sender.wait_for_log("lost: the budget for copies of deleted files was full");
    let size = lines("line", 100_000).len();
    sender.wait_for_log(&format!("from={} to={size} bytes={}", 200 << 10, size - (200 << 10)));
    let whole = lines("line", 100_000)[..200 << 10].matches('\n').count();
    bench.wait_for_lines(whole);
    wait_until("the copy is removed", PATIENCE, || bench.bytes_below("state/kept") == 0);
    assert!(sender.stop().success());
    let found = bench.messages();
    assert!(numbered("line", whole).all(|line| found.binary_search(&line).is_ok()));
}

#[test]
fn truncated_before_it_was_receipted_is_a_reported_loss() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    bench.write("app.log", lines("first", 500));
    bench.send_once(&receiver, &["app.log"]).ok();
    receiver.stop();
    bench.append("app.log", lines("second", 500));
    let from = lines("first", 500).len();
    let to = from + lines("second", 500).len();
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("following");
    bench.write("app.log", "third\n");
    sender.wait_for_log("lost: the file was truncated");
    sender.wait_for_log(&format!("from={from} to={to} bytes={}", to - from));
    receiver.start();
    bench.wait_for_lines(501);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 500).chain(["third".to_owned()]));
}

/// Makes saved positions those of another boot of the machine: only then can a file have lost its
/// tail.
fn another_boot(positions: &Path) {
    let text = std::fs::read_to_string(positions).expect("positions");
    let mut content: Value = serde_json::from_str(&text[9..]).expect("a checksum and JSON");
    assert!(content["boot"].is_string());
    content["boot"] = "another".into();
    let json = content.to_string();
    let text = format!("{:08x} {json}", crc32c::crc32c(json.as_bytes()));
    std::fs::write(positions, text).expect("write");
}

#[test]
fn a_tail_lost_in_a_power_cut_loses_no_later_line() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let text = lines("line", 100_000);
    bench.write("app.log", &text);
    bench.send_once(&receiver, &["app.log"]).ok();
    another_boot(&bench.path("state/positions"));
    // Not at the end of a line, and new lines after it.
    let file = File::options().write(true).open(bench.path("app.log")).expect("open");
    file.set_len(text.len() as u64 - 10_003).expect("cut");
    bench.append("app.log", lines("after", 500));
    let finished = bench.send_once(&receiver, &["app.log"]).ok();
    assert!(finished.stderr.contains("the file lost its end"), "{}", finished.stderr);
    let found = bench.messages();
    for line in numbered("line", 100_000).chain(numbered("after", 500).skip(1)) {
        assert!(found.binary_search(&line).is_ok(), "{line} is lost");
    }
    // Only what lay behind the newest fingerprint that still fits is there twice.
    assert!(found.len() < 150_000, "{} lines", found.len());
}
