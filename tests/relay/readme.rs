//! The README is true: its commands run as written, in order, and print what it shows.
//!
//! A fenced block marked `console` is run: lines that begin with `$ ` are commands, what follows is
//! their output. Ids, times, ports and the folder differ from run to run and are compared as such.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::servers::{free_port, root, wait_until};
use crate::support::waybill::PATIENCE;

/// Where the README's receiver listens.
const PORT: &str = "7700";

/// A command and what the README says that it prints.
struct Step {
    command: String,
    output: String,
}

fn steps() -> Vec<Step> {
    let text = fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut steps: Vec<Step> = Vec::new();
    for block in text.split("\n```console\n").skip(1) {
        let block = block.split("\n```").next().unwrap_or_default();
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => {
                    steps.push(Step { command: command.to_owned(), output: String::new() });
                }
                None => {
                    let step = steps.last_mut().expect("a block begins with a command");
                    step.output.push_str(line);
                    step.output.push('\n');
                }
            }
        }
    }
    assert!(steps.len() > 5, "only {} commands found", steps.len());
    steps
}

/// What differs from run to run, by a name for its kind.
fn normalise(text: &str, folder: &Path) -> Vec<String> {
    let text = text.replace(&format!("{}/", folder.display()), "/home/me/");
    let word = |word: &str| normal_word(word).unwrap_or_else(|| word.to_owned());
    let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(line).collect()
}

/// `None` where a word is the same in each run.
fn normal_word(word: &str) -> Option<String> {
    if word.starts_with("20") && word.get(10..11) == Some("T") && word.ends_with('Z') {
        return Some("TIME".to_owned());
    }
    let receipt = word.strip_prefix("{\"id\":\"")?;
    // The first 19 characters are sender and segment; what follows is offset and content.
    let (id, rest) = receipt.get(19..)?.split_once("\",\"index\":\"waybill-app-")?;
    Some(format!("id …{id} index waybill-app-DAY{}", rest.get(10..)?))
}

/// The receiver of the README, stopped with the test.
struct Background(std::process::Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_command_of_the_readme_does_what_it_shows() {
    let folder = tempfile::tempdir().expect("a folder");
    let host = host_name();
    let port = free_port().to_string();
    let built = Path::new(env!("CARGO_BIN_EXE_waybill")).parent().expect("a folder");
    let path = format!("{}:{}", built.display(), std::env::var("PATH").unwrap_or_default());
    let mut background = Vec::new();
    for step in steps() {
        let line = step.command.replace(PORT, &port);
        let mut command = Command::new("bash");
        command.current_dir(folder.path()).env("PATH", &path).env("HOME", folder.path());
        command.env("NO_COLOR", "1").env_remove("JOURNAL_STREAM").stdin(Stdio::null());
        if let Some(line) = line.strip_suffix(" &") {
            let log = fs::File::create(folder.path().join("background.log")).expect("a log");
            let line = format!("exec {line}");
            let child = command.args(["-c", &line]).stderr(log).spawn().expect("bash runs");
            background.push(Background(child));
            wait_until("the receiver listens", PATIENCE, || {
                TcpStream::connect(format!("127.0.0.1:{port}")).is_ok()
            });
            continue;
        }
        let output = command.args(["-c", &line]).output().expect("bash runs");
        // What goes to standard error is a log, and the README says so; the rest is exact.
        let shown = String::from_utf8_lossy(&output.stdout).replace(&host, "web1");
        assert_eq!(
            normalise(&shown, folder.path()),
            normalise(&step.output, Path::new("/home/me")),
            "{}\n{}",
            step.command,
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn host_name() -> String {
    let output = Command::new("uname").arg("-n").output().expect("uname runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
