//! What somebody meets who types something wrong: a type, a path, a pattern. It is said, and can be corrected.

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

use crate::support::servers::free_port;
use crate::support::store::run;
use crate::support::waybill::{Bench, Process, lines, numbered, waybill};

/// A new token for `test`, with other types.
fn rotate(bench: &Bench, types: &str) {
    let mut command = waybill();
    command.args(["token", "test", "--rotate", "--types", types, "--tokens"]);
    command.arg(bench.path("tokens.toml"));
    let token = run(command).ok().stdout;
    bench.write("test.token", token);
}

fn index_of(document: &Value) -> &str {
    document["_index"].as_str().expect("an index")
}

#[test]
fn a_mistyped_type_sticks_to_nothing() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("line", 100));
    // The second time the row is known, and declared anew.
    for _ in 0..2 {
        let finished = bench.send_once(&receiver, &["app.log", "--type", "aap"]);
        assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
        assert!(finished.stderr.contains("give another type here"), "{}", finished.stderr);
        let left = format!("the next run sends: {}", bench.size_of("app.log"));
        assert!(finished.stderr.contains(&left), "{}", finished.stderr);
    }
    bench.append("app.log", lines("more", 10));
    let arguments = ["app.log", "--type", "app", "--receipts", "-"];
    let finished = bench.send_once(&receiver, &arguments).ok();
    assert_eq!(finished.stdout.lines().count(), 110);
    bench.assert_lines(numbered("line", 100).chain(numbered("more", 10)));
    for document in bench.stored() {
        assert!(index_of(&document).starts_with("waybill-app-"), "{document}");
    }
    assert_eq!(bench.send_once(&receiver, &arguments).ok().stdout, "");
}

/// Lines may have been stored under it: they would be stored twice under another.
#[test]
fn a_type_that_was_accepted_once_stays_with_its_lines() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", lines("before", 10));
    let mut sender = bench.sender(&receiver, &["app.log", "--type", "app"]);
    bench.wait_for_lines(10);
    rotate(&bench, "nginx");
    // What comes before it is taken under the former types.
    sender.wait_for_log("the token was revoked, replaced or has expired");
    bench.append("app.log", lines("waiting", 10));
    sender.wait_for_log("these lines keep the type under which they began");
    assert!(sender.stop().success());
    for _ in 0..2 {
        let finished = bench.send_once(&receiver, &["app.log", "--type", "nginx"]);
        assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
        assert!(finished.stderr.contains("keep the type"), "{}", finished.stderr);
    }
    bench.assert_lines(numbered("before", 10));
    bench.append("app.log", lines("after", 10));
    rotate(&bench, "app,nginx");
    bench.send_once(&receiver, &["app.log", "--type", "nginx"]).ok();
    let all = ["before", "waiting", "after"].into_iter().flat_map(|tag| numbered(tag, 10));
    bench.assert_lines(all);
    for document in bench.stored() {
        let text = document["message"].as_str().expect("a message");
        let under = if text.starts_with("after") { "waybill-nginx-" } else { "waybill-app-" };
        assert!(index_of(&document).starts_with(under), "{document}");
    }
}

#[test]
fn a_receiver_says_where_lines_come_in_and_go() {
    let bench = Bench::new();
    bench.token("test");
    let port = free_port();
    let configuration = |store: &str| {
        let text = format!(
            "listen = \"127.0.0.1:{port}\"\ntokens = \"tokens.toml\"\nindex = \"web-{{type}}\"\n\
             [store]\nfile = \"{store}\"\n"
        );
        bench.write("receive.toml", text)
    };
    let start = || {
        let mut command = waybill();
        command.args(["receive", "--config"]).arg(configuration("new/store.sqlite"));
        Process::start("receiver", command, bench.path("receiver.log"))
    };
    let store = bench.path("new/store.sqlite").display().to_string();
    let created = format!("created: there was no store here store={store}");
    let mut receiver = start();
    receiver.wait_for_log(&created);
    receiver.wait_for_log(&format!("receiving listen=\"127.0.0.1:{port}\""));
    receiver.wait_for_log(&format!("store=\"{store}\" index=\"web-{{type}}\""));
    configuration("other.sqlite");
    receiver.signal("-HUP");
    receiver.wait_for_log(&format!("store=\"{}\"", bench.path("other.sqlite").display()));
    assert!(receiver.stop().success());

    fs::remove_file(bench.path("receiver.log")).expect("removed");
    let mut again = start();
    again.wait_for_log(&format!("store=\"{store}\""));
    assert!(!again.log().contains("created"), "{}", again.log());
    assert!(again.stop().success());
}

#[test]
fn a_new_tokens_file_and_a_new_state_directory_are_said() {
    let bench = Bench::new();
    let mint = |name: &str| {
        let mut command = waybill();
        command.args(["token", name, "--tokens"]).arg(bench.path("own.toml"));
        run(command).ok().stderr
    };
    assert!(mint("web-1").contains("own.toml is new"));
    assert_eq!(mint("web-2"), "");
    let receiver = bench.receiver();
    bench.write("app.log", "line\n");
    let said = "created: no position is known yet";
    assert!(bench.send_once(&receiver, &["app.log"]).ok().stderr.contains(said));
    assert!(!bench.send_once(&receiver, &["app.log"]).ok().stderr.contains(said));
}

#[test]
fn a_pattern_that_names_no_file_is_said_and_a_file_that_is_not_there_is_refused() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("app.log", "line\n");
    let finished = bench.send_once(&receiver, &["app.log", "ap.lo*"]).ok();
    let said = format!(
        "no file matches this pattern: nothing is sent for it pattern=\"{}\"",
        bench.path("ap.lo*").display()
    );
    assert!(finished.stderr.contains(&said), "{}", finished.stderr);
    assert!(!finished.stderr.contains("app.log*"), "{}", finished.stderr);
    let finished = bench.send_once(&receiver, &["ap.log"]);
    assert_eq!(finished.status.code(), Some(78), "{}", finished.stderr);
    assert!(finished.stderr.contains("ap.log is not there"), "{}", finished.stderr);
}

#[test]
fn once_that_fails_says_what_is_left_and_why() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    bench.write("test.token", "waybill_this-is-not-it\n");
    bench.write("app.log", lines("line", 10));
    let finished = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    let ended = finished.stderr.lines().find(|line| line.contains(" ended "));
    let ended = ended.unwrap_or_else(|| panic!("{}", finished.stderr));
    assert!(ended.contains("stored=0"), "{ended}");
    assert!(ended.ends_with(&format!("left_bytes={}", bench.size_of("app.log"))), "{ended}");
    let last = finished.stderr.lines().last().expect("a reason");
    assert!(last.starts_with("waybill: ") && last.contains("401"), "{last}");
}

/// `waybill send --once` in a script, `&& rm`: interrupted, it has not sent everything.
#[test]
fn once_that_is_interrupted_fails_and_says_what_is_left() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("line", 100));
    let mut archive = GzEncoder::new(Vec::new(), Compression::default());
    archive.write_all(lines("old", 100).as_bytes()).expect("compressed");
    bench.write("old.gz", archive.finish().expect("compressed"));
    for signal in ["-TERM", "-INT"] {
        let mut sender = bench.sender(&receiver, &["app.log", "old.gz", "--once"]);
        for file in ["app.log", "old.gz"] {
            sender.wait_for_log(&format!("following path={}", bench.path(file).display()));
        }
        sender.signal(signal);
        assert_eq!(sender.wait().code(), Some(1), "{}", sender.log());
        let log = sender.log();
        let left = log.split("left_bytes=").nth(1).and_then(|text| text.split('\n').next());
        let left: u64 = left.and_then(|text| text.parse().ok()).expect("a number");
        assert_eq!(left, bench.size_of("app.log") + lines("old", 100).len() as u64, "{log}");
    }
    receiver.start();
    bench.send_once(&receiver, &["app.log", "old.gz"]).ok();
    bench.assert_lines(numbered("line", 100).chain(numbered("old", 100)));
}

#[test]
fn a_folder_in_a_files_place_and_a_broken_archive_are_said_once() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let config = format!(
        "[[source]]\nfiles = '{}'\n[[source]]\nfiles = '{}'\n",
        bench.path("later").display(),
        bench.path("logs/*").display()
    );
    bench.write("send.toml", config);
    let mut sender = bench.sender(&receiver, &["--config", "send.toml"]);
    sender.wait_for_log("is not there yet");
    fs::create_dir(bench.path("later")).expect("a folder");
    sender.wait_for_log("not a regular file");
    bench.write("logs/broken.gz", "no archive");
    sender.wait_for_log("cannot be followed");
    // Each makes it look around again.
    for number in 0..5 {
        bench.write(&format!("logs/{number}.log"), "line\n");
        bench.wait_for_lines(number + 1);
    }
    for said in ["not a regular file", "cannot be followed"] {
        assert_eq!(sender.log().matches(said).count(), 1, "{}", sender.log());
    }
    assert!(sender.stop().success());
}

#[test]
fn receipts_without_a_path_name_their_source() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut command = bench.send_command(&receiver.url(), &["-", "--receipts", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut sender = command.spawn().expect("waybill send");
    sender.stdin.take().expect("a pipe").write_all(b"line\n").expect("written");
    let output = sender.wait_with_output().expect("waybill send");
    let receipt: Value = serde_json::from_slice(&output.stdout).expect("one receipt");
    assert_eq!(receipt["source"], "stdin", "{receipt}");
    assert!(receipt.get("path").is_none(), "{receipt}");
}
