//! WebSocket clients that are not ours, in the tests' cache: Python's `websockets` and Node's `ws`.
//!
//! They are installed at their first use, each in a folder that is named for its version. A program that is missing is
//! a visible skip.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;

use serde_json::{Value, json};

use super::servers::{cache, have, root, skip, spawn_bound, wait_until};
use super::waybill::{Bench, PATIENCE, Receiver};

const WEBSOCKETS: &str = "15.0.1";
const WS: &str = "8.18.3";

/// An interpreter that has `websockets`.
pub fn python() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    if !have("python3", "python3-venv") {
        return None;
    }
    let folder = installed(&FOLDER, &format!("python-websockets-{WEBSOCKETS}"), |folder| {
        said(Command::new("python3").args(["-m", "venv"]).arg(folder).output())?;
        let mut pip = Command::new(folder.join("bin/python"));
        pip.args(["-m", "pip", "--disable-pip-version-check", "install"]);
        said(pip.arg(format!("websockets=={WEBSOCKETS}")).output())
    })?;
    Some(folder.join("bin/python"))
}

/// A folder with a `node_modules` that has `ws`; scripts that import it must lie there or have a link to it.
pub fn node_modules() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    if !have("node", "nodejs") || !have("npm", "npm") {
        return None;
    }
    let folder = installed(&FOLDER, &format!("node-ws-{WS}"), |folder| {
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--prefix"]).arg(folder);
        said(npm.arg(format!("ws@{WS}")).output())
    })?;
    Some(folder.join("node_modules"))
}

/// The folder in the cache, made where it is not there. It gets its name when it is whole, so that several test programs
/// may make it at a time.
fn installed(
    known: &'static OnceLock<Option<PathBuf>>,
    name: &str,
    install: impl FnOnce(&Path) -> Result<(), String>,
) -> Option<PathBuf> {
    let folder = cache().join("clients").join(name);
    let made = known.get_or_init(|| {
        if folder.is_dir() {
            return Some(folder.clone());
        }
        let made = cache().join("clients").join(format!("{name}.{}", std::process::id()));
        let _ = fs::create_dir_all(&made);
        let outcome = install(&made).and_then(|()| match fs::rename(&made, &folder) {
            Err(error) if !folder.is_dir() => Err(error.to_string()),
            _ => Ok(()),
        });
        let _ = fs::remove_dir_all(&made);
        if let Err(reason) = &outcome {
            eprintln!("{name}: {reason}");
        }
        outcome.ok().map(|()| folder.clone())
    });
    if made.is_none() {
        skip(&format!(
            "{name} cannot be installed; the reason stands in the log of the first test"
        ));
    }
    made.clone()
}

fn said(output: std::io::Result<Output>) -> Result<(), String> {
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => {
            Err(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
        }
    }
}

/// Python's `websockets`, steered by `tests/fixtures/text_client.py`.
pub struct Client {
    _program: Program,
    commands: ChildStdin,
    said: mpsc::Receiver<String>,
}

impl Client {
    /// Dials with the token `test`; the first thing that it says tells how that went.
    pub fn dial(python: &Path, bench: &Bench, url: &str) -> Client {
        let mut command = Command::new(python);
        command.arg(root().join("tests/fixtures/text_client.py")).arg(url);
        command.arg(bench.path("test.token")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn_bound(command).expect("python runs");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let (lines, said) = mpsc::sync_channel(1 << 20);
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        Client { commands: child.stdin.take().expect("a pipe"), _program: Program(child), said }
    }

    pub fn connect(python: &Path, bench: &Bench, receiver: &Receiver) -> Client {
        let client = Client::dial(python, bench, &receiver.url());
        assert_eq!(client.hear(), json!({"subprotocol": "waybill.text.v1"}));
        client
    }

    pub fn tell(&mut self, command: Value) {
        writeln!(self.commands, "{command}").expect("the client lives");
    }

    pub fn send(&mut self, message: &str) {
        self.tell(json!({"send": message}));
    }

    #[track_caller]
    pub fn hear(&self) -> Value {
        let line = self.said.recv_timeout(PATIENCE).expect("the client says something");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// Receives so many answers.
    #[track_caller]
    pub fn answers(&mut self, count: usize) -> Vec<Value> {
        self.tell(json!({"receive": count}));
        (0..count).map(|_| self.hear()).collect()
    }

    #[track_caller]
    pub fn answer_to(&mut self, message: &str) -> Value {
        self.send(message);
        self.answers(1).remove(0)
    }

    /// The code of the close frame and its reason, which a further receive comes upon.
    #[track_caller]
    pub fn closed(&mut self) -> (u64, String) {
        self.tell(json!({"receive": 1}));
        let said = self.hear();
        let reason = said["reason"].as_str().unwrap_or_default().to_owned();
        (said["closed"].as_u64().unwrap_or_else(|| panic!("not closed: {said}")), reason)
    }
}

/// A client's process; it ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `tests/fixtures/text_client.mjs` or a script of the page: its answers, and whether the connection lived until
/// all of them were there.
pub fn node(
    modules: &Path,
    bench: &Bench,
    script: &str,
    url: &str,
    feed: impl FnOnce(&mut ChildStdin),
) -> (Vec<Value>, bool) {
    let script = bench.write("client.mjs", script);
    let link = bench.path("node_modules");
    if !link.exists() {
        std::os::unix::fs::symlink(modules, &link).expect("a link");
    }
    let mut command = Command::new("node");
    command.arg(script).arg(url).arg(bench.path("test.token"));
    run(command, bench, feed)
}

/// Runs a client to its end; `feed` gives it its lines.
pub fn run(
    mut command: Command,
    bench: &Bench,
    feed: impl FnOnce(&mut ChildStdin),
) -> (Vec<Value>, bool) {
    let answers = bench.path("answers");
    // A file takes all that comes, while the client is being fed.
    command.stdin(Stdio::piped()).stdout(fs::File::create(&answers).expect("a file"));
    let mut program = Program(spawn_bound(command).expect("it runs"));
    let mut input = program.0.stdin.take().expect("a pipe");
    feed(&mut input);
    drop(input);
    let mut status = None;
    wait_until("the client ends", 3 * PATIENCE, || {
        status = program.0.try_wait().expect("wait");
        status.is_some()
    });
    let text = fs::read_to_string(&answers).expect("its answers");
    let answers = text.lines().map(|line| serde_json::from_str(line).expect("an answer"));
    (answers.collect(), status.is_some_and(|status| status.success()))
}

pub fn feed(messages: &str) -> impl FnOnce(&mut ChildStdin) + '_ {
    move |input| input.write_all(messages.as_bytes()).expect("the client lives")
}
