//! `--once` sends what is there, and ends, whatever happens to the files meanwhile. The next run sends the rest.

use std::fs::{self, File};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::rotation::{copytruncate, rename};
use super::support::servers::wait_until;
use super::support::waybill::{Bench, PATIENCE, Process, lines, numbered};

const THERE: usize = 1000;

type Rotate = fn(&Bench);

fn renamed(bench: &Bench) {
    rename(bench, "app.log", "app.log.1");
    bench.write("app.log", "successor\n");
}

/// Lets go of whoever waits for it, also where the test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn once(bench: &Bench, receiver: &str, arguments: &[&str]) -> Process {
    let mut command = bench.send_command(receiver, arguments);
    command.arg("--once");
    Process::start("sender", command, bench.path("sender.log"))
}

#[test]
fn a_file_that_is_written_all_the_time_has_an_end() {
    let rotations: [(Option<Rotate>, &[&str]); 3] =
        [(None, &[]), (Some(renamed), &["successor"]), (Some(copytruncate), &[])];
    for (rotate, others) in rotations {
        let bench = Bench::new();
        let mut receiver = bench.receiver();
        receiver.stop();
        bench.write("app.log", lines("there", THERE));
        let (done, written) = (AtomicBool::new(false), AtomicUsize::new(0));
        // A rotation that copies loses what comes between its two steps: nothing does here.
        let rotating = Mutex::new(File::options().append(true).open(bench.path("app.log")));
        thread::scope(|scope| {
            let done = Done(&done);
            scope.spawn(|| {
                while !done.0.load(Ordering::Relaxed) {
                    let number = written.load(Ordering::Relaxed);
                    let line = format!("later {number}\n");
                    let mut file = rotating.lock().expect("nobody panics");
                    file.as_mut().expect("open").write_all(line.as_bytes()).expect("append");
                    written.store(number + 1, Ordering::Relaxed);
                    drop(file);
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let mut sender = once(&bench, &receiver.url(), &["app.log"]);
            sender.wait_for_log("following");
            if let Some(rotate) = rotate {
                let _nobody_writes = rotating.lock().expect("nobody panics");
                rotate(&bench);
            }
            receiver.start();
            let status = sender.wait();
            assert!(status.success(), "{}", sender.log());
            assert!(sender.log().matches("following").count() <= 3, "{}", sender.log());
            let found = bench.messages();
            assert!(numbered("there", THERE).all(|line| found.contains(&line)), "{}", sender.log());
            drop(done);
        });
        bench.send_once(&receiver, &["app.log"]).ok();
        let later = numbered("later", written.into_inner());
        let others = others.iter().map(|&line| line.to_owned());
        bench.assert_lines(numbered("there", THERE).chain(later).chain(others));
    }
}

/// The file had its turn, and the run goes on for the sake of another one.
#[test]
fn a_file_that_is_rotated_after_its_turn_is_neither_lost_nor_doubled() {
    let rotations: [(Rotate, Option<&str>); 2] =
        [(renamed, Some("successor")), (copytruncate, None)];
    for (rotate, successor) in rotations {
        let bench = Bench::new();
        let receiver = bench.receiver();
        bench.write("app.log", lines("there", THERE));
        let line = format!("{}\n", "much to send".repeat(80));
        bench.write("other.log", line.repeat(2000));
        let arguments = ["app.log", "other.log", "--rate-limit", "256KiB"];
        let mut sender = once(&bench, &receiver.url(), &arguments);
        let is_there = || bench.messages().iter().filter(|line| line.starts_with("there")).count();
        wait_until("its lines are stored", PATIENCE, || is_there() == THERE);
        bench.append("app.log", lines("later", 100));
        rotate(&bench);
        bench.append("app.log", lines("last", 100));
        assert!(sender.is_running(), "the other file is still sent: {}", sender.log());
        assert!(sender.wait().success(), "{}", sender.log());
        bench.send_once(&receiver, &["app.log", "other.log"]).ok();
        let others = std::iter::repeat_n(line.trim_end().to_owned(), 2000);
        let successor = successor.map(str::to_owned);
        let app = [("there", THERE), ("later", 100), ("last", 100)];
        let app = app.into_iter().flat_map(|(tag, count)| numbered(tag, count));
        bench.assert_lines(app.chain(others).chain(successor));
    }
}

/// No later run finds it.
#[test]
fn a_file_that_is_deleted_meanwhile_is_sent_to_its_end() {
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    receiver.stop();
    bench.write("app.log", lines("there", THERE));
    let mut sender = once(&bench, &receiver.url(), &["app*.log"]);
    sender.wait_for_log("following");
    // Far more than one frame.
    bench.append("app.log", lines("later", 100_000));
    fs::remove_file(bench.path("app.log")).expect("remove");
    receiver.start();
    assert!(sender.wait().success(), "{}", sender.log());
    bench.assert_lines(numbered("there", THERE).chain(numbered("later", 100_000)));
}
