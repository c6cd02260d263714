//! Rotation while lines are written all the time: each line is there, and once.

use std::fs::{self, File};
use std::io::Write;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::rotation::{rename, shift};
use super::support::servers::{daemon, have, wait_until};
use super::support::store::run;
use super::support::waybill::{Bench, PATIENCE, Process, Random, numbered};

/// A daemon that opens its log anew at SIGUSR1, and says at its end how many lines it wrote.
const WRITER: &str = "\
trap 'exec >>app.log' USR1
trap 'on=' TERM
exec >>app.log 3<> <(:)
on=1 number=0
while [[ $on ]]; do
  for _ in {1..20}; do echo \"line $((number++))\"; done
  read -rt 0.002 -u 3
done
echo \"$number\" >written
";

/// logrotate's own order: renamed, the writer told, compressed at once.
const LOGROTATE: &str = "\
FOLDER/app.log {
  rotate 100
  nocreate
  compress
  postrotate
    kill -USR1 WRITER
    until [ -e FOLDER/app.log ]; do sleep 0.01; done
  endscript
}
";

#[test]
fn renamed_and_compressed_by_logrotate_under_load_with_the_sender_up() {
    const ROTATIONS: usize = 25;
    if !have("logrotate", "logrotate") {
        return;
    }
    for pattern in ["app.log", "app.log*"] {
        let bench = Bench::new();
        let receiver = bench.receiver();
        let mut sender = bench.sender(&receiver, &[pattern]);
        let mut writer = Command::new("bash");
        writer.args(["-c", WRITER]).current_dir(bench.path(""));
        let mut writer = Process::start("writer", writer, bench.path("writer.log"));
        let folder = bench.path("").display().to_string();
        let configuration =
            LOGROTATE.replace("FOLDER/", &folder).replace("WRITER", &writer.id().to_string());
        let configuration = bench.write("logrotate.conf", configuration);
        for _ in 0..ROTATIONS {
            wait_until("a thousand lines", PATIENCE, || bench.size_of("app.log") > 10_000);
            let mut logrotate = daemon("logrotate");
            logrotate.arg("--state").arg(bench.path("logrotate.state"));
            logrotate.arg("--force").arg(&configuration);
            run(logrotate).ok();
        }
        assert!(bench.path(&format!("app.log.{ROTATIONS}.gz")).exists());
        writer.stop();
        let written = fs::read_to_string(bench.path("written")).expect("how many");
        let written: usize = written.trim().parse().expect("a number");
        bench.wait_for_lines(written);
        assert!(sender.stop().success());
        bench.send_once(&receiver, &[pattern]).ok();
        bench.assert_lines(numbered("line", written));
    }
}

/// Writers, rotation and crashes at once: each line is there, and once.
#[test]
fn rotated_each_200_ms_under_load_while_the_sender_is_killed() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let mut random = Random::new();
    let (done, written) = (AtomicBool::new(false), Mutex::new(0_usize));
    bench.write("app.log", "");
    let mut sender = bench.sender(&receiver, &["app.log"]);
    sender.wait_for_log("following");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            let mut number = 0;
            for generation in 1.. {
                let mut file = File::options()
                    .append(true)
                    .create(true)
                    .open(bench.path("app.log"))
                    .expect("open");
                while started.elapsed() < Duration::from_millis(200) * generation {
                    let text: String =
                        (number..number + 20).map(|n| format!("line {n}\n")).collect();
                    file.write_all(text.as_bytes()).expect("write");
                    number += 20;
                    std::thread::sleep(Duration::from_millis(3));
                }
                if generation == 25 {
                    break;
                }
                shift(&bench);
                rename(&bench, "app.log", "app.log.1");
            }
            *written.lock().expect("lock") = number;
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(100 + random.below(900)));
            sender.kill_hard();
            sender = bench.sender(&receiver, &["app.log"]);
        }
    });
    let written = *written.lock().expect("lock");
    bench.wait_for_lines(written);
    assert!(sender.stop().success());
    bench.send_once(&receiver, &["app.log"]).ok();
    bench.assert_lines(numbered("line", written));
}
