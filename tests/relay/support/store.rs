//! Looking into the store while lines are on their way, and what a finished command said.

use std::io::ErrorKind;
use std::process::{Command, Output};

use super::servers::wait_until;
use super::waybill::{Bench, Finished, PATIENCE, waybill};

/// Waits until the embedded store holds so many lines, and looks that it does not hold more.
#[track_caller]
pub fn wait_for_lines(bench: &Bench, count: usize) {
    let mut found = 0;
    wait_until(&format!("{count} lines in the store"), PATIENCE, || {
        found = count_lines(bench);
        found >= count
    });
    assert_eq!(found, count);
}

/// How many lines the embedded store holds.
pub fn count_lines(bench: &Bench) -> usize {
    let mut command = waybill();
    command.args(["search", "--limit", "10000000", "--json", "--store"]);
    command.arg(bench.path("store.sqlite"));
    finished(command.output().expect("waybill search")).stdout.lines().count()
}

/// Looks that the store holds `TAG 0` to `TAG N-1`, each once.
#[track_caller]
pub fn assert_lines(bench: &Bench, tag: &str, count: usize) {
    let mut expected: Vec<String> = (0..count).map(|number| format!("{tag} {number}")).collect();
    expected.sort();
    let messages = bench.messages();
    assert_eq!(messages.len(), expected.len());
    assert!(messages == expected, "not the lines that were written");
}

/// Runs a command to its end. A script that was written just now is busy for as long as a process that another test
/// forked meanwhile has not begun its own program.
pub fn run(mut command: Command) -> Finished {
    let mut output = command.output();
    while output.as_ref().is_err_and(|error| error.kind() == ErrorKind::ExecutableFileBusy) {
        std::thread::yield_now();
        output = command.output();
    }
    finished(output.expect("the program starts"))
}

fn finished(output: Output) -> Finished {
    Finished {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Looks that every attempt in a sender's log that failed like this was followed by a long wait: what only a person can
/// mend is not tried often.
#[track_caller]
pub fn assert_slow_retries(log: &str, said: &str) {
    let failed = log.lines().filter(|line| line.contains(said));
    let waits: Vec<Option<f64>> = failed
        .map(|line| line.split("retry_in=").nth(1)?.trim().strip_suffix('s')?.parse().ok())
        .collect();
    assert!(!waits.is_empty(), "no attempt failed like this:\n{log}");
    // Ten seconds and more, with jitter; "250ms" is no number of seconds.
    assert!(waits.iter().all(|wait| wait.is_some_and(|wait| wait >= 4.0)), "too fast:\n{log}");
}
