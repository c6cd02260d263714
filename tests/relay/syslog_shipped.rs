//! The files in `syslog-ng/` as their heads say to install them, each with a real syslog-ng: their syntax, the blocks'
//! defaults, what becomes of bytes that are no plain line, and the snippet for logrotate.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tempfile::TempDir;

use super::package::logrotate;
use super::support::servers::{SyslogNg, daemon, free_port, have, root, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, PATIENCE, numbered};
use super::syslog_ng::{HEAD, file_text, plugin, shipped, stored, with};

#[test]
fn every_shipped_file_passes_the_syntax_check() {
    let mut found = 0;
    for entry in fs::read_dir(root().join("syslog-ng")).expect("the folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "conf") {
            continue;
        }
        found += 1;
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let blocks = plugin("waybill") + &plugin("waybill-stream");
        let text = format!("{HEAD}{blocks}source s_src {{ internal(); }};\n{}", shipped(&name));
        let folder = tempfile::tempdir().expect("a folder");
        match SyslogNg::check(folder.path(), &text) {
            Some(checked) => assert_eq!(checked, Ok(()), "{name}"),
            None => return,
        }
    }
    assert!(found >= 3, "the folder holds every road's file");
}

#[test]
fn the_stream_road_needs_no_module_for_http() {
    if !have("syslog-ng", "syslog-ng-core") {
        return;
    }
    let bench = Bench::new();
    let mut version = daemon("syslog-ng");
    version.arg("--version");
    let said = run(version).ok().stdout;
    let all = said.lines().find_map(|line| line.strip_prefix("Module-Directory: "));
    let modules = bench.path("modules");
    fs::create_dir(&modules).expect("a folder");
    for entry in fs::read_dir(all.expect("a folder of modules")).expect("modules").flatten() {
        if entry.file_name() != "libhttp.so" {
            symlink(entry.path(), modules.join(entry.file_name())).expect("a link");
        }
    }
    let checked = |block: &str, name: &str| {
        let source = "source s_src { internal(); };\n";
        let text = format!("{HEAD}{}{source}{}", plugin(block), shipped(name));
        SyslogNg::check_with_modules(&bench.path(""), &text, &modules).expect("syslog-ng is there")
    };
    assert_eq!(checked("waybill-stream", "waybill-stream.conf"), Ok(()));
    let refused = checked("waybill", "waybill-intake.conf").expect_err("no http()");
    assert!(refused.contains("apt-get install syslog-ng-mod-http"), "{refused}");
}

/// A folder with a block where its head says to install it, and a configuration that finds it there; these values stand
/// for its defaults'. `s_src` takes datagrams, which may hold any byte.
fn installed(block: &str, defaults: &[(&str, &str)]) -> (TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let text = shipped(&format!("scl/{block}/plugin.conf"));
    let place = format!("scl/{block}/plugin.conf");
    assert!(text.contains(&format!("/usr/share/syslog-ng/include/{place}")), "{text}");
    let path = folder.path().join("include").join(place);
    fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
    let own = folder.path().display().to_string();
    let text = with(&with(&text, &[("/var/lib/syslog-ng", &own)]), defaults);
    fs::write(path, text).expect("write");
    let includes = "@define include-path \"@FOLDER@/include:/etc/syslog-ng\"\n";
    let head = HEAD.replacen('\n', &format!("\n{includes}"), 1);
    let source = "source s_src { unix-dgram(\"@FOLDER@/in.sock\"); };\n";
    (folder, head + source)
}

/// Hands over a line with bytes that are not UTF-8, and one with a newline within.
fn write_odd_messages(socket: &Path) {
    let datagrams = UnixDatagram::unbound().expect("a socket");
    for message in [&b"odd \xff\xfe end"[..], b"first\nsecond"] {
        let line = [b"<13>Nov 21 10:00:00 app[7]: ", message].concat();
        datagrams.send_to(&line, socket).expect("sent");
    }
}

/// The odd bytes are kept, and the other message is two lines.
#[track_caller]
fn assert_kept_bytes_and_two_lines(bench: &Bench) {
    assert_eq!(bench.messages(), ["first", "odd \u{fffd}\u{fffd} end", "second"]);
    let kept: Vec<Value> =
        bench.stored().into_iter().filter(|hit| hit["waybill"]["bytes"].is_string()).collect();
    let [kept] = &kept[..] else { panic!("one line is not UTF-8: {kept:?}") };
    let bytes = STANDARD.decode(kept["waybill"]["bytes"].as_str().expect("text")).expect("base64");
    assert!(bytes.ends_with(b" odd \xff\xfe end"), "{}", String::from_utf8_lossy(&bytes));
}

#[test]
fn a_file_keeps_odd_bytes_and_cuts_at_newlines() {
    let bench = Bench::new();
    let Some(syslog_ng) = SyslogNg::start(&file_text()) else { return };
    let receiver = bench.receiver();
    let file = syslog_ng.folder().join("outgoing.log").display().to_string();
    let mut sender = bench.sender(&receiver, &[&file]);
    write_odd_messages(&syslog_ng.folder().join("supervisor.sock"));
    wait_until("three lines are stored", PATIENCE, || stored(&bench) >= 3);
    assert_kept_bytes_and_two_lines(&bench);
    // nginx's source has `no-multi-line`.
    let socket = UnixDatagram::unbound().expect("a socket");
    let line = b"<190>Nov 21 10:00:00 nginx: from\nnginx";
    socket.send_to(line, syslog_ng.folder().join("nginx.sock")).expect("sent");
    wait_until("nginx's line is stored", PATIENCE, || stored(&bench) >= 4);
    assert!(sender.stop().success());
    assert!(bench.messages().contains(&"from nginx".to_owned()), "{:?}", bench.messages());
}

#[test]
fn the_http_block_works_by_its_defaults_and_keeps_newlines() {
    let bench = Bench::new();
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let (folder, head) =
        installed("waybill", &[("\"http://127.0.0.1:8514/\"", &format!("\"http://{address}/\""))]);
    let text = head + &shipped("waybill-intake.conf");
    let Some(syslog_ng) = SyslogNg::start_in(folder, &text) else { return };
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["--http-intake", &address]);
    write_odd_messages(&syslog_ng.folder().join("in.sock"));
    wait_until("both messages are stored", PATIENCE, || stored(&bench) >= 2);
    assert!(sender.stop().success());
    assert_eq!(bench.messages(), ["first\nsecond", "odd \\xff\\xfe end"]);
    assert!(bench.stored().iter().all(|hit| hit["waybill"]["bytes"].is_null()));
}

#[test]
fn the_stream_block_works_by_its_defaults_keeps_odd_bytes_and_cuts_at_newlines() {
    let bench = Bench::new();
    let socket = bench.path("syslog.sock").display().to_string();
    let (folder, head) =
        installed("waybill-stream", &[("\"/run/waybill/syslog.sock\"", &format!("\"{socket}\""))]);
    let text = head + &shipped("waybill-stream.conf");
    let Some(syslog_ng) = SyslogNg::start_in(folder, &text) else { return };
    let receiver = bench.receiver();
    let mut sender = bench.sender(&receiver, &["--unix-stream", &socket]);
    write_odd_messages(&syslog_ng.folder().join("in.sock"));
    wait_until("three lines are stored", PATIENCE, || stored(&bench) >= 3);
    assert!(sender.stop().success());
    assert_kept_bytes_and_two_lines(&bench);
}

/// The snippet at the foot of `waybill.conf`, for a file and a syslog-ng in `folder`.
fn rotation(folder: &Path) -> String {
    let text = shipped("waybill.conf");
    let (_, snippet) = text.split_once("# Rotation: ").expect("the snippet");
    let lines: Vec<&str> = snippet.lines().filter_map(|line| line.strip_prefix("#   ")).collect();
    let folder = folder.display();
    let file = format!("{folder}/outgoing.log {{");
    let control = format!("syslog-ng-ctl reopen --control={folder}/syslog-ng.ctl");
    with(
        &(lines.join("\n") + "\n"),
        &[("/var/log/waybill/outgoing.log {", &file), ("syslog-ng-ctl reopen", &control)],
    )
}

#[test]
fn the_rotation_of_the_file_loses_and_doubles_nothing() {
    const ROUNDS: usize = 4;
    const ROUND: usize = 1_000;
    if !have("logrotate", "logrotate") {
        return;
    }
    let bench = Bench::new();
    let Some(syslog_ng) = SyslogNg::start(&file_text()) else { return };
    let folder = syslog_ng.folder();
    let configuration = bench.write("rotation.conf", rotation(folder));
    let receiver = bench.receiver();
    let file = folder.join("outgoing.log");
    let mut sender = bench.sender(&receiver, &[&file.display().to_string()]);
    let socket = UnixDatagram::unbound().expect("a socket");
    let write = |number: usize| {
        let line = format!("<13>Nov 21 10:00:00 app[7]: message {number}");
        socket.send_to(line.as_bytes(), folder.join("supervisor.sock")).expect("sent");
    };
    for round in 0..ROUNDS {
        (round * ROUND..(round + 1) * ROUND).for_each(write);
        // Some are still on their way into the old file.
        wait_until("the file is not empty", PATIENCE, || {
            file.metadata().is_ok_and(|metadata| metadata.len() > 0)
        });
        run(logrotate(&bench, &configuration)).ok();
    }
    (ROUNDS * ROUND..(ROUNDS + 1) * ROUND).for_each(write);
    wait_until("everything is stored", PATIENCE, || stored(&bench) >= (ROUNDS + 1) * ROUND);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("message", (ROUNDS + 1) * ROUND));
    assert!(folder.join("outgoing.log.1").exists() && folder.join("outgoing.log.2.gz").exists());
}
