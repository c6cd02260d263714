//! Midnight: each line lies in the index of its day, once, also where the file is rotated meanwhile.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::rotation::{compress, rename, set_modified, several};
use super::support::waybill::{Bench, lines};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What lies in each index, in the order of the days.
fn days(bench: &Bench) -> Vec<Vec<String>> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let mut days = BTreeMap::<String, Vec<String>>::new();
    for line in bench.stored() {
        days.entry(text(&line["_index"])).or_default().push(text(&line["message"]));
    }
    days.into_values().collect()
}

#[test]
fn across_midnight_each_line_lies_in_the_index_of_its_day() {
    for up in [true, false] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("yesterday", 500));
        set_modified(&bench, "app.log", SystemTime::now() - DAY);
        let mut sender = bench.sender(&receiver, &["app.log"]);
        bench.wait_for_lines(500);
        if !up {
            // Whatever stood in the file when its row opened is receipted: a new row opens with
            // the first line of the new day.
            assert!(sender.stop().success());
        }
        bench.append("app.log", lines("today", 500));
        if !up {
            sender = bench.sender(&receiver, &["app.log"]);
        }
        bench.wait_for_lines(1000);
        bench.append("app.log", lines("more", 500));
        bench.wait_for_lines(1500);
        assert!(sender.stop().success());
        bench.assert_lines(several(&["yesterday", "today", "more"], 500));
        let days = days(&bench);
        let [first, second] = &days[..] else { panic!("two days: {days:?}") };
        assert!(first.iter().any(|line| line.starts_with("yesterday")));
        assert!(!second.iter().any(|line| line.starts_with("yesterday")));
        assert!(!first.iter().any(|line| line.starts_with("more")), "up: {up}");
        if up {
            assert!(!first.iter().any(|line| line.starts_with("today")));
        }
    }
}

/// logrotate runs at midnight: what was written before belongs to yesterday, whoever reads it and when.
fn rotated_at_midnight(rotate: fn(&Bench)) {
    for up in [true, false] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let yesterday = SystemTime::now() - DAY;
        bench.write("app.log", lines("first", 500));
        set_modified(&bench, "app.log", yesterday);
        let mut sender = bench.sender(&receiver, &["app.log"]);
        bench.wait_for_lines(500);
        if up {
            // It must not see a time at which nobody wrote.
            sender.freeze();
        } else {
            assert!(sender.stop().success());
        }
        bench.append("app.log", lines("late", 500));
        set_modified(&bench, "app.log", yesterday);
        rotate(&bench);
        bench.append("app.log", lines("second", 700));
        if up {
            sender.signal("-CONT");
        } else {
            sender = bench.sender(&receiver, &["app.log"]);
        }
        bench.wait_for_lines(1700);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &["app.log"]).ok();
        let expected = several(&["first", "late"], 500).chain(several(&["second"], 700));
        bench.assert_lines(expected);
        let days = days(&bench);
        let [first, second] = &days[..] else { panic!("two days, up: {up}: {days:?}") };
        assert_eq!((first.len(), second.len()), (1000, 700), "up: {up}");
        assert!(second.iter().all(|line| line.starts_with("second")), "up: {up}");
    }
}

#[test]
fn renamed_at_midnight() {
    rotated_at_midnight(|bench| rename(bench, "app.log", "app.log.1"));
}

#[test]
fn renamed_and_compressed_at_midnight() {
    rotated_at_midnight(|bench| {
        rename(bench, "app.log", "app.log.1");
        compress(bench, "app.log.1");
    });
}

#[test]
fn copied_and_truncated_at_midnight() {
    rotated_at_midnight(|bench| {
        let modified = bench.path("app.log").metadata().and_then(|m| m.modified()).expect("a time");
        fs::copy(bench.path("app.log"), bench.path("app.log.1")).expect("copy");
        // As logrotate does.
        set_modified(bench, "app.log.1", modified);
        File::create(bench.path("app.log")).expect("cut");
    });
}
