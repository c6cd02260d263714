//! The promises of the state directory, on a real disk.

use std::collections::BTreeMap;

use super::*;
use crate::record::{Day, Format, Framing, Prefix};

/// A row of a file.
pub(crate) fn entry(path: &str) -> Entry {
    let row = Row {
        segment: SegmentId::mint(),
        source: "test".to_owned(),
        path: path.to_owned(),
        host: "host".to_owned(),
        device: 1,
        inode: 2,
        start: 0,
        end: None,
        cuts: Vec::new(),
        day: Day::today(),
        type_name: Default::default(),
        tags: Vec::new(),
        labels: BTreeMap::new(),
        framing: Framing::LINES,
        format: Format::Auto,
        timezone: "UTC".to_owned(),
        sender: None,
        rule: None,
        first_bytes: Prefix::default(),
    };
    Entry {
        row,
        run: Uuid::now_v7(),
        destination: None,
        kept_from: None,
        kept_short_of: None,
        born: 0,
        passed_over: None,
        refused: false,
    }
}

fn names(state: &State) -> Vec<String> {
    state.entries().into_iter().map(|(entry, _)| entry.row.path).collect()
}

#[test]
fn rows_and_positions_outlive_the_process() {
    let dir = tempfile::tempdir().expect("a folder");
    let (a, b) = (entry("/a"), entry("/b"));
    let text = str::to_owned;
    let last =
        LastReceipted { receiver: text("wss://a/"), index: text("waybill-app"), id: text("id") };
    {
        let state = State::open(dir.path(), "machine").expect("state");
        assert!(state.is_first_run("test"));
        state.commit(&[&a, &b], &[]).expect("commit");
        state.mark_followed("test").expect("mark");
        let mut progress = Progress::at_start(&a.row, 0);
        progress.advance(Fingerprint { offset: 77, hash: 5 });
        state.set_progress(a.row.segment, progress);
        state.commit(&[], &[b.row.segment]).expect("drop");
        assert_eq!(state.last_receipted(), None);
        state.note_last_receipted(last.clone());
        state.save().expect("save");
    }
    let state = State::open(dir.path(), "machine").expect("state");
    let entries = state.entries();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].0, a);
    assert_eq!(entries[0].1.position, 77);
    assert_eq!(state.last_receipted(), Some(last));
    assert!(!state.is_first_run("test"));
    assert!(!state.was_cloned());
}

/// Killed before the first position was saved, the file deleted, its inode number given to another one.
#[test]
fn a_row_alone_knows_when_its_inode_was_made() {
    let dir = tempfile::tempdir().expect("a folder");
    let row = Entry { born: 7, ..entry("/a") };
    State::open(dir.path(), "machine").expect("state").commit(&[&row], &[]).expect("commit");
    let state = State::open(dir.path(), "machine").expect("state");
    assert_eq!(state.entries()[0].1.place.born, 7);
}

#[test]
fn a_second_sender_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let _first = State::open(dir.path(), "machine").expect("state");
    let error = State::open(dir.path(), "machine").expect_err("locked").to_string();
    assert!(error.contains("in use by another"), "{error}");
    assert!(error.contains(&std::process::id().to_string()), "{error}");
}

#[test]
fn a_clone_on_another_machine_is_noticed_and_gets_a_new_instance() {
    let dir = tempfile::tempdir().expect("a folder");
    let instance = State::open(dir.path(), "one").expect("state").instance();
    assert_eq!(State::open(dir.path(), "one").expect("state").instance(), instance);
    let clone = State::open(dir.path(), "two").expect("state");
    assert!(clone.was_cloned());
    assert_ne!(clone.instance(), instance);
}

/// A crash right after the clone was noticed must not leave rows under which the other machine may
/// go on: a second start would not notice the clone any more, and both would give different lines
/// the same ids (I4).
#[test]
fn a_clone_has_new_rows_before_anything_else_happens() {
    let dir = tempfile::tempdir().expect("a folder");
    let (open, mut ended) = (entry("/open"), entry("/ended"));
    ended.row.end = Some(50);
    {
        let state = State::open(dir.path(), "one").expect("state");
        state.commit(&[&open, &ended], &[]).expect("commit");
        for entry in [&open, &ended] {
            let mut progress = Progress::at_start(&entry.row, 0);
            progress.advance(Fingerprint { offset: 50, hash: 5 });
            state.set_progress(entry.row.segment, progress);
        }
        state.save().expect("save");
    }
    // Never saved a position: killed at once.
    drop(State::open(dir.path(), "two").expect("state"));
    let state = State::open(dir.path(), "two").expect("state");
    assert!(!state.was_cloned());
    let entries = state.entries();
    assert_eq!(names(&state), ["/open"]);
    assert_ne!(entries[0].0.row.segment, open.row.segment);
    assert_eq!(entries[0].0.run, open.run);
    assert_eq!((entries[0].0.row.start, entries[0].1.position), (50, 50));
}

#[test]
fn rows_go_when_nobody_saw_their_file_for_thirty_days_and_not_while_it_is_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let (there, gone, kept) = (entry("/there"), entry("/gone"), entry("/kept"));
    let kept = Entry { kept_from: Some(0), ..kept };
    let state = State::open(dir.path(), "machine").expect("state");
    state.commit(&[&there, &gone, &kept], &[]).expect("commit");
    for entry in [&there, &gone, &kept] {
        let progress = Progress { seen_ms: 5, ..Progress::at_start(&entry.row, 0) };
        state.set_progress(entry.row.segment, progress);
    }
    state.save().expect("save");
    drop(state);
    // Down for more than 30 days, with the file still there.
    let state = State::open(dir.path(), "machine").expect("state");
    assert_eq!(names(&state).len(), 3);
    state.saw(&BTreeSet::from([there.run])).expect("saw");
    assert_eq!(names(&state), ["/there", "/kept"]);
    state.saw(&BTreeSet::new()).expect("saw");
    assert_eq!(names(&state), ["/there", "/kept"], "seen just now");
}

/// A crash may leave any prefix of the last write. No prefix may lose an earlier row, and no later
/// row may be lost behind a torn one.
#[test]
fn a_torn_journal_keeps_every_whole_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let first = entry("/first");
    State::open(dir.path(), "machine").expect("state").commit(&[&first], &[]).expect("commit");
    let before = fs::read(dir.path().join("rows")).expect("journal");
    State::open(dir.path(), "machine")
        .expect("state")
        .commit(&[&entry("/second")], &[])
        .expect("commit");
    let after = fs::read(dir.path().join("rows")).expect("journal");
    // Opening compacts: what the second commit added lies behind the compacted line.
    let base = after.iter().position(|&byte| byte == b'\n').expect("a line") + 1;
    assert!(before.len() > 10 && after.len() > base);
    for torn in base..after.len() {
        let copy = tempfile::tempdir().expect("a folder");
        fs::write(copy.path().join("rows"), &after[..torn]).expect("copy");
        let state = State::open(copy.path(), "machine").expect("state");
        let whole = if torn + 1 == after.len() { 2 } else { 1 };
        assert_eq!(names(&state).len(), whole, "torn at {torn}");
        state.commit(&[&entry("/third")], &[]).expect("commit");
        drop(state);
        let state = State::open(copy.path(), "machine").expect("state");
        assert!(names(&state).contains(&"/third".to_owned()), "torn at {torn}");
    }
}

/// A caller who is told of a failure would act on a row that is not there, and send its lines under another.
#[test]
fn a_commit_is_kept_where_the_journal_cannot_be_rewritten() {
    let dir = tempfile::tempdir().expect("a folder");
    let state = State::open(dir.path(), "machine").expect("state");
    let lines = || {
        let text = fs::read(dir.path().join("rows")).expect("journal");
        memchr::memchr_iter(b'\n', &text).count()
    };
    let obstacle = dir.path().join("rows.new");
    fs::create_dir(&obstacle).expect("a folder");
    let mut a = entry("/a");
    while lines() <= 1100 {
        state.commit(&[&a], &[]).expect("it is durable");
        a.row.cuts = vec![lines() as u64];
    }
    state.commit(&[&a], &[]).expect("it is durable");
    fs::remove_dir(&obstacle).expect("removed");
    let content = journal::Content::read(dir.path()).expect("readable");
    assert_eq!(content.replayed.entries[&a.row.segment], a);
    state.commit(&[&a], &[]).expect("commit");
    assert_eq!(lines(), 1, "rewritten once it can be");
}

#[test]
fn torn_positions_fall_back_to_the_ones_before() {
    let dir = tempfile::tempdir().expect("a folder");
    let a = entry("/a");
    let state = State::open(dir.path(), "machine").expect("state");
    state.commit(&[&a], &[]).expect("commit");
    for offset in [10, 20] {
        let mut progress = Progress::at_start(&a.row, 0);
        progress.advance(Fingerprint { offset, hash: 1 });
        state.set_progress(a.row.segment, progress);
        state.save().expect("save");
    }
    drop(state);
    let path = dir.path().join("positions");
    let bytes = fs::read(&path).expect("positions");
    fs::write(&path, &bytes[..bytes.len() - 3]).expect("tear");
    let state = State::open(dir.path(), "machine").expect("state");
    assert_eq!(state.entries()[0].1.position, 10);
}

#[test]
fn fingerprints_stay_few_and_spread() {
    let mut progress = Progress::at_start(&entry("/a").row, 0);
    for step in 1..=100_000_u64 {
        progress.advance(Fingerprint { offset: step * 1000, hash: step });
    }
    let fingerprints = &progress.fingerprints;
    assert_eq!(fingerprints.len(), FINGERPRINT_COUNT);
    assert_eq!(fingerprints[0].offset, progress.position);
    assert!(fingerprints.windows(2).all(|pair| pair[0].offset > pair[1].offset));
    let near = progress.position - fingerprints[2].offset;
    let far = progress.position - fingerprints[FINGERPRINT_COUNT - 1].offset;
    assert!(near <= 10_000, "the newest are near: {near}");
    assert!(far >= 50_000_000, "the oldest is far: {far}");
}

const FINGERPRINT_COUNT: usize = 16;

/// The saver and streams that end save at the same time.
#[test]
fn saves_from_several_threads_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let state = State::open(dir.path(), "machine").expect("state");
    let rows: Vec<Entry> = (0..4).map(|number| entry(&format!("/{number}"))).collect();
    state.commit(&rows.iter().collect::<Vec<_>>(), &[]).expect("commit");
    std::thread::scope(|scope| {
        for row in &rows {
            scope.spawn(|| {
                for offset in 1..=100 {
                    let mut progress = Progress::at_start(&row.row, 0);
                    progress.advance(Fingerprint { offset, hash: 5 });
                    state.set_progress(row.row.segment, progress);
                    state.save().expect("save");
                }
            });
        }
    });
    drop(state);
    let state = State::open(dir.path(), "machine").expect("state");
    assert!(state.entries().iter().all(|(_, progress)| progress.position == 100));
}
