//! The README is true: its commands run as written, in order, and print what it shows (see `support::pages`).

use std::fs;
use std::net::TcpStream;
use std::process::Command;

use clap::{CommandFactory as _, Parser as _};
use waybill::cli::Cli;

use super::support::pages::Page;
use super::support::servers::{free_port, root, wait_until};
use super::support::waybill::PATIENCE;

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

#[test]
fn every_command_of_the_readme_does_what_it_shows() {
    let folder = tempfile::tempdir().expect("a folder");
    let host = host_name();
    let port = free_port().to_string();
    let home = format!("{}/", folder.path().display());
    let changes = [("7700", &*port), ("/home/me/", &home), ("web1", &host)];
    let mut page = Page::open("README.md", None, folder.path(), &changes).normalising(normal_word);
    assert!(page.len() > 5, "only {} commands found", page.len());
    page.next("waybill token");
    page.next("waybill receive");
    wait_until("the receiver listens", PATIENCE, || {
        TcpStream::connect(format!("127.0.0.1:{port}")).is_ok()
    });
    while page.len() > 0 {
        page.next("");
    }
}

/// The commands that stand alone, for machines that a test does not have: each is one that the program takes.
#[test]
fn every_indented_command_of_the_readme_is_taken() {
    let text = fs::read_to_string(root().join("README.md")).expect("the README");
    let indented: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let joined = indented.join("\n").replace("\\\n", " ");
    let commands: Vec<&str> = joined.lines().filter(|line| line.starts_with("waybill ")).collect();
    assert!(commands.len() >= 8, "only {commands:?}");
    for command in commands {
        let words =
            command.split_whitespace().take_while(|word| !["#", ">", "|", "&"].contains(word));
        let words: Vec<&str> = words.map(|word| word.trim_matches('\'')).collect();
        if let Err(error) = Cli::try_parse_from(&words) {
            panic!("{command}\n{error}");
        }
    }
}

/// The files that it proposes for a first try are on a fresh Debian.
#[test]
fn the_files_to_try_are_there() {
    let text = fs::read_to_string(root().join("README.md")).expect("the README");
    let help = Cli::command().find_subcommand_mut("demo").expect("demo").render_long_help();
    let text = format!("{text}\n{help}");
    let tried = text
        .match_indices("demo /")
        .map(|(at, _)| text[at + "demo ".len()..].split_whitespace().next().expect("a file"));
    let tried: Vec<&str> = tried.collect();
    assert_eq!(tried.len(), 2, "{tried:?}");
    for file in tried {
        assert!(fs::exists(file).expect("looked for"), "{file}");
    }
}

fn host_name() -> String {
    let output = Command::new("uname").arg("-n").output().expect("uname runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
