//! supervisor: programs' output reaches the index by its events and by its files, each line once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::support::servers::{have, root, wait_until};
use super::support::waybill::{Bench, PATIENCE, Process, Receiver};

/// Debian's supervisord with sections of the test's own.
struct Supervisor {
    process: Process,
    configuration: std::path::PathBuf,
    log: std::path::PathBuf,
}

impl Supervisor {
    fn start(bench: &Bench, sections: &str) -> Option<Supervisor> {
        if !have("supervisord", "supervisor") {
            return None;
        }
        let at = |name: &str| bench.path(name).display().to_string();
        // Among the files of its programs, as on Debian.
        bench.write("log/.keep", "");
        let log = bench.path("log/supervisord.log");
        let text = format!(
            "[supervisord]\nnodaemon=true\nlogfile={}\npidfile={}\n\
             [unix_http_server]\nfile={socket}\n\
             [rpcinterface:supervisor]\n\
             supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\
             [supervisorctl]\nserverurl=unix://{socket}\n\n{sections}",
            log.display(),
            at("supervisord.pid"),
            socket = at("supervisor.sock"),
        );
        let configuration = bench.write("supervisord.conf", text);
        let mut command = Command::new("supervisord");
        command.arg("-c").arg(&configuration);
        let process = Process::start("supervisord", command, bench.path("supervisord.err"));
        let supervisor = Supervisor { process, configuration, log };
        wait_until("supervisord answers", PATIENCE, || {
            supervisor.control(&["pid"]).trim().parse::<u32>().is_ok()
        });
        Some(supervisor)
    }

    fn control(&self, arguments: &[&str]) -> String {
        let output = Command::new("supervisorctl")
            .arg("-c")
            .arg(&self.configuration)
            .args(arguments)
            .output()
            .expect("supervisorctl comes with supervisor");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL; supervisor starts the program again.
    fn kill_hard(&self, program: &str) {
        let pid = self.control(&["pid", program]);
        if pid.trim().parse::<u32>().is_ok_and(|pid| pid > 0) {
            let _ = Command::new("kill").args(["-9", pid.trim()]).status();
        }
        wait_until("supervisor starts it again", PATIENCE, || {
            let now = self.control(&["pid", program]);
            now != pid && now.trim().parse::<u32>().is_ok_and(|pid| pid > 0)
        });
    }
}

/// Killed, it would leave its programs behind.
impl Drop for Supervisor {
    fn drop(&mut self) {
        if self.process.is_running() {
            self.process.stop();
        }
    }
}

/// A shipped file with the test's paths.
fn shipped(bench: &Bench, receiver: &Receiver, file: &str, state: &str) -> String {
    let text = fs::read_to_string(root().join("docs/examples/supervisor").join(file));
    let mut text = text.expect("the shipped file");
    let at = |name: &str| bench.path(name).display().to_string();
    for (from, to) in [
        ("/usr/bin/waybill", env!("CARGO_BIN_EXE_waybill").to_owned()),
        ("wss://logs.example.org/", receiver.url()),
        ("/etc/waybill/token", at("test.token")),
        (state, at("state")),
    ] {
        assert!(text.contains(from), "{file} no longer holds {from:?}");
        text = text.replace(from, &to);
    }
    text
}

/// The shipped event listener; its log is `listener.log`.
fn shipped_events(bench: &Bench, receiver: &Receiver) -> String {
    let events = shipped(bench, receiver, "eventlistener.conf", "/var/lib/waybill/supervisor");
    let log = "/var/log/supervisor/waybill-events.log";
    assert!(events.contains(log));
    events.replace(log, &bench.path("listener.log").display().to_string())
}

/// What `[program:NAME]` needs to print from a shell, its output as events.
fn talker(name: &str, script: &Path) -> String {
    format!(
        "[program:{name}]\ncommand=/bin/sh {}\nautorestart=false\nstartsecs=0\n\
         stdout_logfile=NONE\nstderr_logfile=NONE\n\
         stdout_events_enabled=true\nstderr_events_enabled=true\n\n",
        script.display()
    )
}

/// How often each message came, of those that start with `tag`.
fn counts(bench: &Bench, tag: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for message in bench.messages().into_iter().filter(|message| message.starts_with(tag)) {
        *counts.entry(message).or_default() += 1;
    }
    counts
}

/// Both channels of two programs, small writes and blocks that end within lines, while the
/// listener is killed again and again: each line is stored once, with its process.
#[test]
fn programs_output_is_stored_once_while_the_listener_is_killed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let events = shipped_events(&bench, &receiver);
    let slow = bench.write(
        "slow.sh",
        "i=0\nwhile [ $i -lt 1500 ]; do echo \"slow out $i\"; echo \"slow err $i\" >&2\n\
         [ $((i % 10)) -ne 0 ] || sleep 0.02\ni=$((i+1)); done\nprintf 'slow end'\n",
    );
    let bulk = bench.write(
        "bulk.sh",
        "seq -f 'bulk %.0f of a line that is somewhat longer, so that blocks end within it' 1 20000\n\
         printf 'bulk caf\\351\\n'; echo 'bulk grüße'\n",
    );
    let sections = [events, talker("slow", &slow), talker("bulk", &bulk)].concat();
    let Some(supervisor) = Supervisor::start(&bench, &sections) else { return };
    for _ in 0..4 {
        supervisor.kill_hard("waybill");
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    let complete = || {
        let (slow, bulk) = (counts(&bench, "slow "), counts(&bench, "bulk "));
        slow.len() == 3001 && bulk.len() == 20_002
    };
    let mut done = false;
    for _ in 0..240 {
        done = complete();
        if done {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(250));
    }
    let supervisor_log = supervisor.log();
    let overflows = supervisor_log.matches("event buffer overflowed").count();
    println!("supervisor's buffer overflowed {overflows} times");
    let (slow, bulk) = (counts(&bench, "slow "), counts(&bench, "bulk "));
    assert!(
        done && overflows == 0,
        "slow {} bulk {} overflows {overflows}\n{}",
        slow.len(),
        bulk.len(),
        fs::read_to_string(bench.path("listener.log")).unwrap_or_default()
    );
    let twice: Vec<_> = slow.iter().chain(&bulk).filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "stored more than once: {:?}", &twice[..twice.len().min(5)]);

    let documents = bench.stored();
    let of = |message: &str| -> &Value {
        let found = documents.iter().find(|document| document["message"] == message);
        found.unwrap_or_else(|| panic!("no document with {message:?}"))
    };
    let document = of("slow err 7");
    assert_eq!(document["log"]["syslog"]["appname"], "slow", "{document}");
    assert!(document["process"]["pid"].as_u64().is_some_and(|pid| pid > 1), "{document}");
    let structured = &document["log"]["syslog"]["structured_data"]["supervisor@32473"];
    assert_eq!(structured["channel"], "stderr", "{document}");
    assert_eq!(structured["group"], "slow", "{document}");
    // What the program left without a newline, once it has ended; and bytes that are no UTF-8.
    of("slow end");
    of("bulk grüße");
    assert!(
        documents.iter().any(|document| {
            let text = document["message"].as_str().unwrap_or_default();
            text.starts_with("PROCESS_STATE_EXITED processname:bulk")
        }),
        "no state change"
    );
}

/// While the listener is away supervisor keeps `buffer_size` events and drops older ones: the
/// listener tells how many.
#[test]
fn what_supervisors_buffer_drops_is_counted() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let events = shipped_events(&bench, &receiver);
    assert!(events.contains("\nbuffer_size=10000\n"));
    let events = events.replace("\nbuffer_size=10000\n", "\nbuffer_size=10\n");
    let first = bench.write("first.sh", "echo early 1\n");
    let script = bench.write(
        "talk.sh",
        "i=0\nwhile [ $i -lt 40 ]; do echo \"late $i\"; sleep 0.03; i=$((i+1)); done\n",
    );
    let late = talker("late", &script).replace("autorestart", "autostart=false\nautorestart");
    let sections = [events, talker("early", &first), late].concat();
    let Some(supervisor) = Supervisor::start(&bench, &sections) else { return };
    wait_until("the early line", PATIENCE, || counts(&bench, "early ").len() == 1);
    supervisor.control(&["stop", "waybill"]);
    supervisor.control(&["start", "late"]);
    wait_until("the program has said all", PATIENCE, || {
        supervisor.control(&["status", "late"]).contains("EXITED")
    });
    supervisor.control(&["start", "waybill"]);
    wait_until("its newest line", PATIENCE, || counts(&bench, "late 39").len() == 1);
    let listener = fs::read_to_string(bench.path("listener.log")).unwrap_or_default();
    let told = listener
        .lines()
        .find(|line| line.contains("supervisor dropped events"))
        .unwrap_or_else(|| panic!("no word of the gap in:\n{listener}"));
    let dropped = supervisor.log().matches("event buffer overflowed").count();
    assert!(told.contains(&format!("events={dropped} ")), "{dropped} dropped: {told}");
    let arrived = counts(&bench, "late ").len();
    println!("buffer_size=10: {dropped} events dropped, {arrived} of 40 lines arrived");
    assert!((1..40).contains(&arrived), "{arrived}");
}

/// The other road: supervisor writes files, its own log among them, and waybill tails them.
#[test]
fn supervisors_files_are_tailed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let files = shipped(&bench, &receiver, "program.conf", "/var/lib/waybill/files");
    let (from, to) = ("/var/log/supervisor/", bench.path("log").display().to_string() + "/");
    assert!(files.contains(from));
    let files = files.replace(from, &to);
    let files =
        files.replace("/var/log/waybill-send.log", &bench.path("send.log").display().to_string());
    // A generation that is rotated away before the file was first seen is no generation of it.
    let go = bench.path("go");
    let script = bench.write(
        "talk.sh",
        format!(
            "echo 'line first'\nuntil [ -e {} ]; do sleep 0.1; done\ni=1\n\
             while [ $i -lt 3000 ]; do echo \"line $i\"; i=$((i+1)); done; exec sleep 1000\n",
            go.display()
        ),
    );
    // Small enough that supervisor rotates several times.
    let program = format!(
        "[program:talker]\ncommand=/bin/sh {}\nstdout_logfile={}\n\
         stdout_logfile_maxbytes=10KB\nstdout_logfile_backups=50\nredirect_stderr=true\n",
        script.display(),
        bench.path("log/talker.log").display()
    );
    let Some(supervisor) = Supervisor::start(&bench, &(files + &program)) else { return };
    wait_until("the first line", PATIENCE, || counts(&bench, "line ").len() == 1);
    fs::write(&go, "").expect("write");
    supervisor.kill_hard("waybill");
    wait_until("every line", PATIENCE, || counts(&bench, "line ").len() == 3000);
    assert!(counts(&bench, "line ").values().all(|count| *count == 1));
    assert!(bench.path("log/talker.log.1").exists(), "it was rotated");

    // supervisord's own log came the same way: its lines are text, and their times are read.
    let own = supervisor.log();
    let line = own.lines().find(|line| line.contains("INFO spawned: 'talker'")).expect("a line");
    wait_until("its line", PATIENCE, || counts(&bench, line).len() == 1);
    let documents = bench.stored();
    let document = documents.iter().find(|hit| hit["message"] == line).expect("found");
    // `2026-11-21 10:00:00,123 INFO …`, in the machine's zone.
    let local: jiff::civil::DateTime = line[..23].replace(',', ".").parse().expect("a time");
    let time = local.to_zoned(jiff::tz::TimeZone::system()).expect("a zoned time").timestamp();
    let stored: jiff::Timestamp =
        document["@timestamp"].as_str().expect("a time").parse().expect("a time");
    assert_eq!(stored, time, "{document}");
    assert_eq!(document["waybill"]["type"], "supervisor", "{document}");
}

/// A listener is nobody's child any more once its supervisord was killed.
#[test]
fn a_listener_whose_supervisor_is_killed_ends_with_all_receipts() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let events = shipped_events(&bench, &receiver);
    let script = bench.write("talk.sh", "echo 'line 1'\n");
    let sections = [events, talker("talker", &script)].concat();
    let Some(mut supervisor) = Supervisor::start(&bench, &sections) else { return };
    wait_until("the line", PATIENCE, || counts(&bench, "line ").len() == 1);
    let listener = supervisor.control(&["pid", "waybill"]);
    let listener: u32 = listener.trim().parse().expect("a process");
    supervisor.process.kill_hard();
    // Whoever adopted it may not have asked how it ended.
    wait_until("the listener ends", PATIENCE, || {
        let stat = fs::read_to_string(format!("/proc/{listener}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.starts_with(" Z"))
    });
    // Its own log went through supervisord.
    wait_until("the receiver says how it went", PATIENCE, || {
        receiver.log().contains("code=1001 reason=\"the sender stops\"")
    });
}
