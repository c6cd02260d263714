//! `waybill demo`, as somebody runs it who has just built it, without a terminal.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::servers::{Elasticsearch, wait_until};
use crate::support::store::run;
use crate::support::waybill::{Bench, Finished, PATIENCE, Process, lines, waybill};

fn demo(arguments: &[&str]) -> Command {
    let mut command = waybill();
    command.arg("demo").args(arguments).stdin(Stdio::null());
    command
}

#[track_caller]
fn agrees(finished: &Finished, count: usize) {
    let text = &finished.stdout;
    assert!(finished.status.success(), "{}\n{text}\n{}", finished.status, finished.stderr);
    assert!(text.contains(&format!("a search for every line finds {count}")), "{text}");
    assert!(text.contains(&format!("{count} lines, each once")), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours without a terminal: {text}");
    assert!(text.contains("receiver killed with SIGKILL"), "{text}");
}

/// Processes that have the folder on their command line.
fn processes(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(&folder) && !line.contains(" demo "))
        .collect()
}

#[test]
fn the_demo_ends_with_counts_that_agree() {
    let bench = Bench::new();
    let keep = bench.path("kept");
    let finished =
        run(demo(&["--keep", &keep.display().to_string(), "--lines", "300", "--seconds", "2"]));
    agrees(&finished, 300);
    assert!(finished.stdout.contains("log rotated"), "{}", finished.stdout);
    let resent = finished.stdout.lines().find(|line| line.contains(" bytes were sent again"));
    let resent = resent.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    assert!(resent.is_some(), "{}", finished.stdout);
    assert!(processes(&keep).is_empty(), "{:?}", processes(&keep));
    // The commands that it proposes work.
    let proposed =
        finished.stdout.lines().filter(|line| line.starts_with("  ") && line.contains(" --store "));
    let mut count = 0;
    for line in proposed {
        let line = line.split(" | ").next().expect("a command");
        let status = Command::new("sh").arg("-c").arg(line).stdout(Stdio::null()).status();
        assert!(status.expect("sh").success(), "{line}");
        count += 1;
    }
    assert!(count > 0, "{}", finished.stdout);
}

#[test]
fn the_demo_sends_the_files_that_it_is_given() {
    let bench = Bench::new();
    let many = bench.write("many.log", lines("many", 30_000)).display().to_string();
    let kept = bench.path("first").display().to_string();
    let finished = run(demo(&[&many, "--keep", &kept]));
    assert!(finished.status.success(), "{}\n{}", finished.stdout, finished.stderr);
    assert!(finished.stdout.contains("finds 10000"), "{}", finished.stdout);
    assert!(finished.stdout.contains("30000 lines, each once"), "{}", finished.stdout);
    let file = bench.write("my.log", lines("mine", 5_000));
    let keep = bench.path("kept").display().to_string();
    let finished = run(demo(&[&file.display().to_string(), "--keep", &keep, "--seconds", "2"]));
    agrees(&finished, 5_000);
    assert_eq!(fs::read_to_string(file).expect("untouched"), lines("mine", 5_000));
}

#[test]
fn the_demo_runs_into_elasticsearch() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let keep = bench.path("kept").display().to_string();
    let arguments =
        ["--elasticsearch", &node.url(), "--keep", &keep, "--lines", "300", "--seconds", "2"]
            .map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    agrees(&run(demo(&arguments)), 300);
}

#[test]
fn an_interrupted_demo_leaves_no_process_behind() {
    for signal in ["-INT", "-TERM"] {
        let bench = Bench::new();
        let keep = bench.path("kept");
        let command = demo(&["--keep", &keep.display().to_string(), "--seconds", "600"]);
        let mut demo = Process::start("demo", command, bench.path("demo.log"));
        wait_until("both children", PATIENCE, || processes(&keep).len() >= 2);
        demo.signal(signal);
        let status = demo.wait();
        assert!(!status.success(), "an interrupted demo has proved nothing: {status}");
        assert!(processes(&keep).is_empty(), "{:?}", processes(&keep));
    }
}

#[test]
fn a_demo_that_cannot_start_says_why() {
    let bench = Bench::new();
    let missing = run(demo(&["/nonexistent/file.log"]));
    assert!(!missing.status.success());
    assert!(missing.stderr.contains("/nonexistent/file.log"), "{}", missing.stderr);
    bench.write("full/something", "here");
    let full = run(demo(&["--keep", &bench.path("full").display().to_string()]));
    assert!(!full.status.success());
    assert!(full.stderr.contains("full"), "{}", full.stderr);
}
