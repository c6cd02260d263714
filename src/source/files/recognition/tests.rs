//! Each test is an execution in which a simpler rule loses or doubles lines.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, SystemTime};

use super::*;
use crate::source::files::fingerprint::{fingerprint, prefix};
use crate::source::files::survey::{Scope, Survey, survey};
use crate::state::Place;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &[u8]) {
        fs::write(self.path(name), text).expect("write");
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).expect("rename");
    }

    fn found(&self, names: &[&str]) -> Vec<Found> {
        let open = |name: &&str| Tail::open(&self.path(name), false).expect("open");
        let found = |tail: Tail| {
            let path = tail.path().to_owned();
            Found { path, tail, source: 0, wanted: true, elsewhere: false }
        };
        names.iter().map(open).map(found).collect()
    }

    /// What a sender knows that has receipted `text` up to `position` in this file.
    fn known(&self, name: &str, text: &[u8], position: usize) -> Known {
        let tail = Tail::open(&self.path(name), false).expect("open");
        let place = Place {
            path: crate::record::escape_path(&self.path(name)),
            device: tail.inode().device,
            inode: tail.inode().inode,
            born: tail.born(),
        };
        let mut progress = Progress { prefix: prefix(text), place, ..Progress::default() };
        for at in [position / 2, position].into_iter().filter(|at| *at > 0) {
            progress.advance(fingerprint(at as u64, &text[..at]));
        }
        let run = Uuid::now_v7();
        Known { run, source: Some(0), progress, opened: SegmentId(run) }
    }

    fn decide(&self, names: &[&str], lost: &[Known], held: &[Known]) -> Vec<String> {
        self.decide_after(names, lost, held, true)
    }

    fn decide_after(
        &self,
        names: &[&str],
        lost: &[Known],
        held: &[Known],
        rebooted: bool,
    ) -> Vec<String> {
        let mut decisions = self.decide_in_order(names, lost, held, &[], rebooted);
        decisions.sort();
        decisions
    }

    fn decide_in_order(
        &self,
        names: &[&str],
        lost: &[Known],
        held: &[Known],
        first_run: &[usize],
        rebooted: bool,
    ) -> Vec<String> {
        let found = self.found(names);
        let ours = lost.iter().chain(held).filter(|known| known.source.is_some());
        let paths = ours.map(Known::path);
        let paths = paths.chain(found.iter().map(|found| found.path.clone()));
        let bases = paths.map(|path| (path, 0)).collect();
        let is_held = |inode, _| held.iter().any(|known| known.inode() == inode);
        let scope = Scope { bases, ..Scope::default() };
        let Survey { found, places } = survey(found, &scope, usize::MAX, is_held).expect("settled");
        let held: Vec<Held> = held
            .iter()
            .map(|known| Held {
                known: known.clone(),
                at: places.get(&known.inode()).map(|(path, _)| path.clone()),
            })
            .collect();
        let around = Surroundings { lost, held: &held, first_run, rebooted };
        let name =
            |found: &Found| found.path.file_name().expect("a name").to_string_lossy().into_owned();
        recognise(found, around)
            .expect("readable")
            .iter()
            .map(|decision| match decision {
                Decision::Continue { run, found, until } => {
                    let number = lost.iter().position(|known| known.run == *run).expect("lost");
                    let until = until.map(|until| format!(" until {until}")).unwrap_or_default();
                    format!("{} continues {number}{until}", name(found))
                }
                Decision::New { found } if found.wanted => format!("{} is new", name(found)),
                Decision::New { found } => format!("{} was missed", name(found)),
                Decision::Copy { found } => format!("{} is a copy", name(found)),
                Decision::PassOver { found } => format!("{} is passed over", name(found)),
            })
            .collect()
    }
}

fn lines(tag: &str, count: usize) -> Vec<u8> {
    (0..count).flat_map(|n| format!("{tag} {n}\n").into_bytes()).collect()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text).expect("gzip");
    encoder.finish().expect("gzip")
}

#[test]
fn renamed_while_down() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 1000)];
    folder.rename("a.log", "a.log.1");
    folder.write("a.log", b"new\n");
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1 continues 0"]);
}

/// A run whose file had a rotated name when it was left is found there again, also where nobody
/// knows what has the plain name now.
#[test]
fn left_under_its_rotated_name() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log.1", &old);
    let lost = [folder.known("a.log.1", &old, 1000)];
    assert_eq!(folder.decide(&[], &lost, &[]), ["a.log.1 continues 0"]);
    folder.write("a.log", b"new\n");
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1 continues 0"]);
}

#[test]
fn renamed_and_compressed_while_down() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 1000)];
    folder.write("a.log", b"new\n");
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&old).expect("xz");
    for (ending, archive) in [
        ("gz", gzip(&old)),
        ("zst", zstd::bulk::compress(&old, 1).expect("zstd")),
        ("xz", xz.finish().expect("xz")),
    ] {
        let name = format!("a.log-20261120.{ending}");
        folder.write(&name, &archive);
        assert_eq!(
            folder.decide(&["a.log"], &lost, &[]),
            ["a.log is new".to_owned(), format!("{name} continues 0")]
        );
        fs::remove_file(folder.path(&name)).expect("remove");
    }
}

#[test]
fn copied_and_truncated_while_down() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 1000)];
    folder.write("a.log.1", &old);
    // The inode stays, and the file may have grown past the position again.
    folder.write("a.log", &lines("new", 5000));
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1 continues 0"]);
}

#[test]
fn two_rotations_while_down_miss_no_generation() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 1000)];
    folder.rename("a.log", "a.log.2");
    folder.write("a.log.1", b"between\n");
    folder.write("a.log", b"new\n");
    assert_eq!(
        folder.decide(&["a.log"], &lost, &[]),
        ["a.log is new", "a.log.1 was missed", "a.log.2 continues 0"]
    );
}

/// At a later run a rotated file that nobody knows is ours, whatever its time says.
#[test]
fn only_at_the_first_run_are_siblings_passed_over() {
    let folder = Folder::new();
    folder.write("a.log.1", b"before us\n");
    folder.write("a.log", b"now\n");
    let ancient = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::options()
        .write(true)
        .open(folder.path("a.log.1"))
        .expect("open")
        .set_modified(ancient)
        .expect("time");
    let decide =
        |first_run: &[usize]| folder.decide_in_order(&["a.log"], &[], &[], first_run, false);
    assert_eq!(decide(&[0]), ["a.log.1 is passed over", "a.log is new"]);
    // In this order: the rotated one is durable before the one that came after it.
    assert_eq!(decide(&[]), ["a.log.1 was missed", "a.log is new"]);
}

#[test]
fn a_reused_inode_is_not_the_old_file() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 1000)];
    // Same inode, other bytes, longer than the position: as if deleted and made anew.
    folder.write("a.log", &lines("other", 2000));
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new"]);
}

#[test]
fn a_tail_lost_in_a_power_cut_ends_the_row_at_a_fingerprint() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 2000)];
    folder.write("a.log", &old[..1500]);
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log continues 0 until 1000"]);
}

#[test]
fn a_shorter_file_with_the_same_beginning_was_truncated_unless_the_machine_went_down() {
    let folder = Folder::new();
    let old = lines("line", 500);
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", &old, 2000)];
    // The next generation begins with the very same lines.
    folder.write("a.log", &old[..1500]);
    assert_eq!(folder.decide_after(&["a.log"], &lost, &[], false), ["a.log is new"]);
}

#[test]
fn equal_first_lines_do_not_make_two_files_one() {
    let folder = Folder::new();
    let header = lines("header", 200);
    let kern: Vec<u8> = [header.clone(), lines("kern", 300)].concat();
    let ufw: Vec<u8> = [header, lines("ufw", 300)].concat();
    folder.write("kern.log", &kern);
    folder.write("ufw.log", &ufw);
    let held = [folder.known("kern.log", &kern, kern.len())];
    assert_eq!(folder.decide(&["ufw.log"], &[], &held), ["ufw.log is new"]);
}

#[test]
fn a_copy_beside_an_open_file_is_no_new_file() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log", &text);
    let held = [folder.known("a.log", &text, 1000)];
    folder.write("a.log.1", &text);
    folder.write("a.log.2.gz", &gzip(&lines("older", 500)));
    assert_eq!(
        folder.decide(&["a.log.1", "a.log.2.gz"], &[], &held),
        ["a.log.1 is a copy", "a.log.2.gz is new"]
    );
}

#[test]
fn of_several_matches_the_rows_inode_wins() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log", &text);
    folder.write("a.log.1", &text);
    let lost = [folder.known("a.log", &text, 1000)];
    assert_eq!(
        folder.decide(&["a.log.1", "a.log"], &lost, &[]),
        ["a.log continues 0", "a.log.1 is a copy"]
    );
}

/// A new generation that begins as the one before did is no copy of it, although that one is open
/// under its rotated name.
#[test]
fn a_new_generation_with_equal_first_lines_is_no_copy() {
    let folder = Folder::new();
    folder.write("a.log.1", b"started\nfirst\n");
    folder.write("a.log", b"started\nsecond\n");
    let mut held = folder.known("a.log.1", b"started\n", 0);
    held.progress.fingerprints.clear();
    assert_eq!(folder.decide(&["a.log"], &[], &[held]), ["a.log is new"]);
}

#[test]
fn the_same_file_in_another_source_goes_on_and_an_equal_one_does_not() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log", &text);
    folder.write("b.log", &text);
    let mut lost = [folder.known("a.log", &text, 1000)];
    lost[0].source = None;
    assert_eq!(folder.decide(&["b.log"], &lost, &[]), ["b.log is new"]);
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log continues 0"]);
}

/// A run whose own file is at hand never moves to an equal one (here: a banner that each start of
/// a program writes).
#[test]
fn a_run_stays_with_its_inode() {
    let folder = Folder::new();
    folder.write("a.log", b"started\n");
    let lost = [folder.known("a.log", b"started\n", 8)];
    folder.rename("a.log", "a.log.1");
    folder.write("a.log", b"started\nmore\n");
    for _ in 0..2 {
        assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1 continues 0"]);
    }
    // The same, while the old one rests or is followed.
    assert_eq!(folder.decide(&["a.log"], &[], &lost), ["a.log is new"]);
}

#[test]
fn an_archive_wins_over_an_equal_successor() {
    let folder = Folder::new();
    folder.write("a.log", b"started\n");
    let lost = [folder.known("a.log", b"started\n", 8)];
    fs::remove_file(folder.path("a.log")).expect("remove");
    folder.write("a.log.1.gz", &gzip(b"started\n"));
    folder.write("a.log", b"started\nmore\n");
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1.gz continues 0"]);
}

#[test]
fn an_equal_successor_of_a_deleted_file_is_new() {
    let folder = Folder::new();
    folder.write("a.log", b"started\n");
    let lost = [folder.known("a.log", b"started\n", 8)];
    folder.rename("a.log", "elsewhere");
    folder.write("a.log", b"started\nmore\n");
    assert_eq!(folder.decide_after(&["a.log"], &lost, &[], false), ["a.log is new"]);
}

/// Generations that hold the same banner and no more are as many as there are.
#[test]
fn equal_generations_are_no_copies() {
    let folder = Folder::new();
    folder.write("a.log", b"started\n");
    let known = [folder.known("a.log", b"started\n", 8)];
    folder.rename("a.log", "a.log.3");
    for name in ["a.log.2", "a.log.1", "a.log"] {
        folder.write(name, b"started\n");
    }
    let missed = ["a.log is new", "a.log.1 was missed", "a.log.2 was missed"];
    assert_eq!(folder.decide(&["a.log"], &[], &known), missed);
    assert_eq!(
        folder.decide(&["a.log"], &known, &[]),
        [&missed[..], &["a.log.3 continues 0"]].concat()
    );
}

/// Dated names that a program writes itself: a short file is no copy of the day before.
#[test]
fn a_short_file_with_a_dated_name_is_new_at_once() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log-20261120", &old);
    folder.write("a.log-20261121", b"new\n");
    let held = [folder.known("a.log-20261120", &old, old.len())];
    assert_eq!(folder.decide(&["a.log-20261121"], &[], &held), ["a.log-20261121 is new"]);
}

#[test]
fn a_copy_in_the_making_waits_while_its_bytes_agree() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log", &text);
    let held = [folder.known("a.log", &text, 1000)];
    for length in [0, 10, 2000] {
        folder.write("a.log.1", &text[..length]);
        assert_eq!(folder.decide(&[], &[], &held), ["a.log.1 is a copy"], "{length}");
    }
    folder.write("a.log.1", b"other\n");
    assert_eq!(folder.decide(&[], &[], &held), ["a.log.1 was missed"]);
}

/// Truncated, and grown past the position with the same first bytes: the copy holds other bytes.
#[test]
fn a_truncated_file_that_begins_as_before_is_told_by_its_copy() {
    let folder = Folder::new();
    let old = [&b"started\n"[..], &lines("old", 50)].concat();
    folder.write("a.log", &old);
    let lost = [folder.known("a.log", b"started\n", 8)];
    folder.write("a.log.1", &old);
    let file = File::options().write(true).open(folder.path("a.log")).expect("open");
    file.set_len(0).expect("truncate");
    let new = [&b"started\n"[..], &lines("new", 500)].concat();
    (&file).write_all(&new).expect("write");
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log is new", "a.log.1 continues 0"]);
}

#[test]
fn a_file_that_is_shorter_than_it_was_seen_was_truncated() {
    let folder = Folder::new();
    let old = lines("line", 500);
    folder.write("a.log", &old);
    let mut lost = [folder.known("a.log", &old, 1000)];
    lost[0].progress.size = old.len() as u64;
    folder.write("a.log", &old[..2000]);
    assert_eq!(folder.decide_after(&["a.log"], &lost, &[], false), ["a.log is new"]);
}

/// gzip is at work on a generation that nobody knows: one of the two is followed.
#[test]
fn a_file_and_its_archive_are_one() {
    let folder = Folder::new();
    let text = lines("line", 50_000);
    let archive = gzip(&text);
    folder.write("a.log.1", &text);
    folder.write("a.log", b"new\n");
    for length in [0, 5, archive.len() / 2, archive.len()] {
        folder.write("a.log.1.gz", &archive[..length]);
        assert_eq!(
            folder.decide(&["a.log"], &[], &[]),
            ["a.log is new", "a.log.1 was missed", "a.log.1.gz is a copy"],
            "{length}"
        );
    }
    folder.write("a.log.1.gz", &gzip(b"another one\n"));
    assert_eq!(
        folder.decide(&["a.log"], &[], &[]),
        ["a.log is new", "a.log.1 was missed", "a.log.1.gz was missed"]
    );
}

/// A first line fits many files: the run of which more is known goes first.
#[test]
fn archives_go_to_the_runs_that_know_them_best() {
    let folder = Folder::new();
    let second = [&b"started\n"[..], &lines("second", 5)].concat();
    let mut lost = Vec::new();
    for text in [&b"started\n"[..], &second] {
        folder.write("a.log", text);
        lost.push(folder.known("a.log", text, 8));
        folder.rename("a.log", &format!("gone{}", lost.len()));
    }
    folder.write("a.log.2.gz", &gzip(b"started\n"));
    folder.write("a.log.1.gz", &gzip(&second));
    assert_eq!(
        folder.decide(&[], &lost, &[]),
        ["a.log.1.gz continues 1", "a.log.2.gz continues 0"]
    );
}

/// What lies at its own home under a rotated name says nothing of another run's home.
#[test]
fn runs_with_equal_beginnings_stay_at_their_homes() {
    let folder = Folder::new();
    let first = [&b"started\n"[..], &lines("first", 5)].concat();
    folder.write("a.log", &first);
    let mut lost = vec![folder.known("a.log", &first, 8)];
    folder.rename("a.log", "a.log.1");
    folder.write("a.log", b"started\n");
    lost.push(folder.known("a.log", b"started\n", 0));
    assert_eq!(folder.decide(&["a.log"], &lost, &[]), ["a.log continues 1", "a.log.1 continues 0"]);
}

/// An archive that fits two runs is the earlier one's: the other has its own file.
#[test]
fn a_run_with_its_file_stays_beside_its_predecessors_archive() {
    let folder = Folder::new();
    let text = |tag: &str| [lines("header", 200), lines(tag, 100)].concat();
    folder.write("a.log", &text("first"));
    let first = folder.known("a.log", &text("first"), 0);
    folder.rename("a.log", "a.log.1");
    folder.write("a.log", &text("second"));
    let second = folder.known("a.log", &text("second"), 0);
    fs::remove_file(folder.path("a.log.1")).expect("remove");
    folder.write("a.log.1.gz", &gzip(&text("first")));
    let lost = [first, second];
    let expected = ["a.log continues 1", "a.log.1.gz continues 0"];
    assert_eq!(folder.decide_after(&["a.log"], &lost, &[], false), expected);
    // One more copy is that of the second, which was truncated.
    folder.write("a.log.2.gz", &gzip(&text("other")));
    assert!(
        !folder
            .decide_after(&["a.log"], &lost, &[], false)
            .contains(&"a.log continues 1".to_owned())
    );
}

/// Its stream is about to notice that the file was truncated.
#[test]
fn a_copy_of_a_file_that_was_truncated_just_now_waits() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log", &text);
    let mut held = folder.known("a.log", &text, 1000);
    held.progress.size = text.len() as u64;
    File::options().write(true).open(folder.path("a.log")).expect("open").set_len(0).expect("cut");
    for (names, copy) in [(&["a.log.1"], text.clone()), (&["a.log.2.gz"], gzip(&text))] {
        folder.write(names[0], &copy);
        let decided = folder.decide(names, &[], std::slice::from_ref(&held));
        assert_eq!(decided, [format!("{} is a copy", names[0])]);
        fs::remove_file(folder.path(names[0])).expect("remove");
    }
}

/// The archive of a run whose last lines are sent from a copy says nothing of another one.
#[test]
fn an_archive_of_a_run_in_hand_is_not_another_ones() {
    let folder = Folder::new();
    let first = [&b"started\n"[..], &lines("first", 5)].concat();
    folder.write("a.log", &first);
    let held = [folder.known("a.log", &first, 0)];
    folder.rename("a.log", "gone");
    folder.write("a.log.1.gz", &gzip(&first));
    folder.write("a.log", b"started\n");
    let lost = [folder.known("a.log", b"started\n", 0)];
    assert_eq!(
        folder.decide(&["a.log"], &lost, &held),
        ["a.log continues 0", "a.log.1.gz is a copy"]
    );
}

/// Nothing else tells two runs of equal bytes apart: the one that was opened first goes first, however they are listed.
#[test]
fn of_runs_that_fit_alike_the_oldest_goes_on() {
    let folder = Folder::new();
    let text = lines("line", 500);
    let mut lost = Vec::new();
    for name in ["gone1", "gone2"] {
        folder.write("a.log", &text);
        lost.push(folder.known("a.log", &text, 1000));
        folder.rename("a.log", name);
    }
    folder.write("a.log.1.gz", &gzip(&text));
    assert_eq!(folder.decide(&[], &lost, &[]), ["a.log.1.gz continues 0"]);
    lost.reverse();
    assert_eq!(folder.decide(&[], &lost, &[]), ["a.log.1.gz continues 1"]);
}

/// Between the look at the folder and the comparison gzip removed the file whose bytes are in hand.
#[test]
fn an_archive_whose_file_went_a_moment_ago_waits() {
    let folder = Folder::new();
    let text = lines("line", 500);
    folder.write("a.log.1", &text);
    let known = folder.known("a.log.1", &text, text.len());
    folder.write("a.log.1.gz", &gzip(&text));
    let found = folder.found(&["a.log.1.gz"]);
    let held = [Held { known, at: Some(folder.path("a.log.1")) }];
    fs::remove_file(folder.path("a.log.1")).expect("remove");
    let around = Surroundings { lost: &[], held: &held, first_run: &[], rebooted: false };
    let decisions = recognise(found, around).expect("readable");
    assert!(matches!(decisions[..], [Decision::Copy { .. }]), "{decisions:?}");
}
