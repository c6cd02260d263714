//! Each test is an execution in which a simpler rule loses or doubles lines.

use std::fs;
use std::io::Write;

use super::*;
use crate::source::files::fingerprint::fingerprint;
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
        let found = |tail| Found { tail, source: 0, wanted: true };
        names.iter().map(open).map(found).collect()
    }

    /// What a sender knows that has receipted `text` up to `position` in this file.
    fn known(&self, name: &str, text: &[u8], position: usize) -> Known {
        let tail = Tail::open(&self.path(name), false).expect("open");
        let place = Place {
            path: crate::record::escape_path(&self.path(name)),
            device: tail.inode().device,
            inode: tail.inode().inode,
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
        let around = Surroundings { lost, held, patient: false, rebooted };
        let name = |found: &Found| {
            found.tail.path().file_name().expect("a name").to_string_lossy().into_owned()
        };
        let mut decisions: Vec<String> = recognise(self.found(names), around)
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
                Decision::Foreign => "foreign".to_owned(),
            })
            .collect();
        decisions.sort();
        decisions
    }
}

fn lines(tag: &str, count: usize) -> Vec<u8> {
    (0..count).flat_map(|n| format!("{tag} {n}\n").into_bytes()).collect()
}

/// The identity of a run whose file was found at this time.
fn found_at(time: SystemTime) -> Uuid {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let context = uuid::ContextV7::new();
    Uuid::new_v7(uuid::Timestamp::from_unix(&context, since.as_secs(), since.subsec_nanos()))
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
    folder.write("a.log-20261120.gz", &gzip(&old));
    folder.write("a.log", b"new\n");
    assert_eq!(
        folder.decide(&["a.log"], &lost, &[]),
        ["a.log is new", "a.log-20261120.gz continues 0"]
    );
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
    let mut lost = [folder.known("a.log", &old, 1000)];
    lost[0].run = found_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000));
    folder.rename("a.log", "a.log.2");
    folder.write("a.log.1", b"between\n");
    folder.write("a.log", b"new\n");
    assert_eq!(
        folder.decide(&["a.log"], &lost, &[]),
        ["a.log is new", "a.log.1 was missed", "a.log.2 continues 0"]
    );
}

#[test]
fn siblings_from_before_our_time_stay_alone() {
    let folder = Folder::new();
    let old = lines("old", 500);
    folder.write("a.log.1", b"before us\n");
    folder.write("a.log", &old);
    let mut lost = [folder.known("a.log", &old, 1000)];
    lost[0].run = found_at(SystemTime::now() + Duration::from_secs(3600));
    folder.rename("a.log", "a.log.2");
    folder.write("a.log", b"new\n");
    let around = Surroundings { lost: &lost, held: &[], patient: false, rebooted: false };
    let decisions = recognise(folder.found(&["a.log"]), around).expect("readable");
    assert!(decisions.iter().any(|decision| matches!(decision, Decision::Foreign)));
    assert!(
        !decisions
            .iter()
            .any(|decision| matches!(decision, Decision::New { found } if !found.wanted))
    );
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
    let held = [held];
    let around = Surroundings { lost: &[], held: &held, patient: true, rebooted: false };
    let decisions = recognise(folder.found(&["a.log"]), around).expect("readable");
    assert!(matches!(decisions[..], [Decision::New { .. }]), "{decisions:?}");
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
