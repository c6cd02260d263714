//! Pages of documentation that are true: their commands run as written, in order, and print what they show; their files
//! are written before the commands that need them.
//!
//! A fenced block marked `console` is run: lines that begin with `$ ` are commands, what follows is their output. A block
//! with a path behind its language (`toml /etc/waybill/send.toml`) is that file. One marked `shell-session` is run on
//! machines of its own, by `fleet`. Paths and addresses are those of the test instead; ids, times and the host's name differ
//! from run to run and are compared as such.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::servers::{root, spawn_bound};

/// One thing that a page says to do.
enum Block {
    /// A command and what it prints.
    Step { command: String, output: String },
    /// A file and what it holds.
    File { path: String, text: String },
}

impl Block {
    fn text(&self) -> &str {
        match self {
            Block::Step { command, .. } => command,
            Block::File { path, .. } => path,
        }
    }
}

/// A page that is being followed, in a folder of its own.
pub struct Page {
    blocks: VecDeque<Block>,
    folder: PathBuf,
    changes: Vec<(String, String)>,
    background: Vec<Background>,
    /// A word that is the same in each run becomes `None`.
    normal_word: fn(&str) -> Option<String>,
}

impl Page {
    /// The blocks of a page, or of its section under this heading (`## From here`), with what stands for what in them.
    /// `/etc/` and `/var/` stand for folders in `folder`.
    pub fn open(
        name: &str,
        heading: Option<&str>,
        folder: &Path,
        changes: &[(&str, &str)],
    ) -> Page {
        let text = fs::read_to_string(root().join(name)).expect("a page");
        let section = match heading {
            Some(heading) => {
                let start = text.find(&format!("\n{heading}\n")).expect("a heading") + 1;
                let rest = &text[start..];
                &rest[..rest[1..].find("\n## ").map_or(rest.len(), |end| end + 1)]
            }
            None => &text,
        };
        // Without a slash at its end.
        let folder: PathBuf = folder.components().collect();
        let own = |text: &str| format!("{}{text}", folder.display());
        let typed = changes.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned()));
        let folders = ["/etc/", "/var/"].map(|name| (name.to_owned(), own(name)));
        let changes = typed.chain(folders).collect();
        let blocks = blocks(section);
        assert!(!blocks.is_empty(), "{name} has no blocks");
        Page { blocks, folder, changes, background: Vec::new(), normal_word: |_| None }
    }

    /// What differs from run to run, by a name for its kind.
    pub fn normalising(mut self, normal_word: fn(&str) -> Option<String>) -> Page {
        self.normal_word = normal_word;
        self
    }

    /// How many blocks are left.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Does what the page says next, which has this text in it; gives what a command printed. One that ends with ` &`
    /// runs on until the test ends, or [`Page::stop_one`].
    #[track_caller]
    pub fn next(&mut self, contains: &str) -> String {
        let block =
            self.blocks.pop_front().unwrap_or_else(|| panic!("the page ends before {contains:?}"));
        assert!(block.text().contains(contains), "{contains:?} comes after {:?}", block.text());
        match block {
            Block::File { path, text } => {
                let path = PathBuf::from(self.changed(&path));
                fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
                fs::write(path, self.changed(&text)).expect("write");
                String::new()
            }
            Block::Step { command, output } => self.run(&command, &output),
        }
    }

    /// The page says nothing more.
    #[track_caller]
    pub fn end(self) {
        let left: Vec<&str> = self.blocks.iter().map(Block::text).collect();
        assert!(left.is_empty(), "not run: {left:?}");
    }

    /// Ends what was started by the command that begins like this, with its children.
    pub fn stop_one(&mut self, command: &str) {
        let before = self.background.len();
        self.background.retain(|process| !process.command.starts_with(command));
        assert_eq!(self.background.len() + 1, before, "{command:?} runs in the background");
    }

    /// What those in the background have said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("background.log")).unwrap_or_default()
    }

    /// With everything that stands for something replaced by it, once.
    fn changed(&self, mut text: &str) -> String {
        let mut changed = String::new();
        while let Some(next) = text.chars().next() {
            match self.changes.iter().find(|(from, _)| text.starts_with(from)) {
                Some((from, to)) => {
                    changed.push_str(to);
                    text = &text[from.len()..];
                }
                None => {
                    changed.push(next);
                    text = &text[next.len_utf8()..];
                }
            }
        }
        changed
    }

    #[track_caller]
    fn run(&mut self, typed: &str, expected: &str) -> String {
        let line = self.changed(typed);
        let built = Path::new(env!("CARGO_BIN_EXE_waybill")).parent().expect("a folder");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", built.display());
        let mut command = Command::new("bash");
        command.current_dir(&self.folder).env("PATH", path).env("HOME", &self.folder);
        command.env("NO_COLOR", "1").env_remove("JOURNAL_STREAM").stdin(Stdio::null());
        if let Some(line) = line.strip_suffix(" &") {
            let log =
                File::options().create(true).append(true).open(self.folder.join("background.log"));
            let log = log.expect("a log");
            command.args(["-c", line]).stdout(log.try_clone().expect("a log")).stderr(log);
            command.process_group(0);
            let child = spawn_bound(command).expect("bash runs");
            self.background.push(Background { command: typed.to_owned(), child });
            return String::new();
        }
        let output = command.args(["-o", "pipefail", "-c", &line]).output().expect("bash runs");
        // What goes to standard error is a log, and the pages say so; the rest is exact.
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(self.normal(&shown), self.normal(&self.changed(expected)), "{typed}\n{said}");
        assert!(output.status.success(), "{typed}: {}\n{said}", output.status);
        shown
    }

    fn normal(&self, text: &str) -> Vec<String> {
        let word = |word: &str| (self.normal_word)(word).unwrap_or_else(|| word.to_owned());
        let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
        text.lines().map(line).collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- in the background ---\n{}", self.log());
        }
    }
}

fn blocks(text: &str) -> VecDeque<Block> {
    let mut blocks = VecDeque::new();
    for block in text.split("\n```").skip(1).step_by(2) {
        let (kind, text) = block.split_once('\n').unwrap_or((block, ""));
        match kind.split_once(' ') {
            Some((_, path)) => {
                blocks.push_back(Block::File { path: path.to_owned(), text: format!("{text}\n") });
            }
            None if kind == "console" => {
                for line in text.lines() {
                    match (line.strip_prefix("$ "), blocks.back_mut()) {
                        (Some(command), _) => blocks.push_back(Block::Step {
                            command: command.to_owned(),
                            output: String::new(),
                        }),
                        (None, Some(Block::Step { output, .. })) => {
                            output.push_str(line);
                            output.push('\n');
                        }
                        (None, _) => panic!("a block begins with a command: {line}"),
                    }
                }
            }
            None if kind == "shell-session" => {}
            None => panic!("a block that nobody runs: {kind:?}"),
        }
    }
    blocks
}

/// A process with its children.
struct Background {
    command: String,
    child: Child,
}

impl Drop for Background {
    fn drop(&mut self) {
        let group = libc::pid_t::try_from(self.child.id()).expect("a process id fits");
        // SAFETY: kill has no memory effects; the group is that of a process we started and have not waited for.
        unsafe {
            libc::kill(-group, libc::SIGKILL);
        }
        let _ = self.child.wait();
    }
}
