//! The last line without a newline: it waits until its file was renamed, succeeded and unchanged for a minute, and is
//! then sent by itself.

use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::rotation::{rename, set_modified};
use super::support::waybill::Bench;

const MINUTE: Duration = Duration::from_secs(60);

/// The renamed file is followed by its descriptor alone, or found under its new name as well.
const PATTERNS: [&str; 2] = ["app.log", "app.log*"];

#[test]
fn a_last_line_is_sent_once_its_file_is_renamed_succeeded_and_unchanged_for_a_minute() {
    for pattern in PATTERNS {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", "one\ntwo");
        set_modified(&bench, "app.log", SystemTime::now() - 2 * MINUTE);
        let mut sender = bench.sender(&receiver, &[pattern, "other.log"]);
        bench.wait_for_lines(1);
        // A file of this age may still be written to: neither its age nor its rename is enough.
        bench.write("other.log", "before the rename\n");
        bench.wait_for_lines(2);
        rename(&bench, "app.log", "app.log.1");
        bench.append("other.log", "after the rename\n");
        bench.wait_for_lines(3);
        let others = ["one", "before the rename", "after the rename"];
        bench.assert_lines(others.map(String::from));
        bench.write("app.log", "three\n");
        bench.wait_for_lines(5);
        // What comes after the cut is a record of its own, and marked.
        bench.append("app.log.1", " and more\n");
        bench.wait_for_lines(6);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern, "other.log"]).ok();
        let all = others.into_iter().chain(["two", "three", " and more"]);
        bench.assert_lines(all.map(String::from));
        let stored = bench.stored();
        let rest = stored.iter().find(|line| line["message"] == " and more").expect("stored");
        assert_eq!(rest["log"]["flags"], json!(["continues"]));
    }
}

#[test]
fn a_last_line_that_was_written_just_now_waits_and_time_alone_sends_it() {
    for pattern in PATTERNS {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let written = Instant::now();
        bench.write("app.log", "one\ntwo");
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(1);
        rename(&bench, "app.log", "app.log.1");
        bench.write("app.log", "three\n");
        bench.wait_for_lines(2);
        bench.append("app.log", "four\n");
        bench.wait_for_lines(3);
        let found = bench.messages();
        assert!(written.elapsed() >= MINUTE || !found.contains(&"two".to_owned()), "{found:?}");
        assert!(sender.stop().success());
        // The minute is almost over when the next sender comes, and nothing happens any more.
        let almost = SystemTime::now() - MINUTE + Duration::from_secs(3);
        set_modified(&bench, "app.log.1", almost);
        let mut sender = bench.sender(&receiver, &[pattern]);
        bench.wait_for_lines(4);
        assert!(sender.stop().success());
        bench.assert_lines(["one", "two", "three", "four"].map(String::from));
        let log = sender.log();
        assert!(!log.contains("lost: ") && log.contains(" lost_bytes=0 "), "{log}");
    }
}
