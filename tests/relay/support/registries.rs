//! Registries of other shippers, about files of the test.
//!
//! Filebeat and Logstash cannot be installed here: neither is in Debian, nor can their parts be had from Maven Central,
//! PyPI, npm or the Go proxy. So these have the form in which Filebeat 6.3, 7.9 to 9 and Logstash's file input write them,
//! taken from their sources, from their tests and from registries that users have published; inode, device, path and
//! position are those of each test's own files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::waybill::Bench;

/// A position as a shipper would write it: of the file that has this name now, under the path that it had.
pub struct At<'a> {
    pub name: &'a str,
    pub was: &'a str,
    pub offset: usize,
    pub changed: SystemTime,
}

impl<'a> At<'a> {
    pub fn new(name: &'a str, offset: usize) -> At<'a> {
        At { name, was: name, offset, changed: SystemTime::now() }
    }
}

pub fn inode(bench: &Bench, at: &At<'_>) -> (u64, u64) {
    let metadata = bench.path(&format!("logs/{}", at.name)).metadata().expect("the file is there");
    (metadata.ino(), metadata.dev())
}

fn since(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).expect("after 1970")
}

/// As file input 4.1 and later write it.
pub fn sincedb(bench: &Bench, positions: &[At<'_>]) {
    let line = |at: &At<'_>| {
        let (inode, device) = inode(bench, at);
        let (changed, path) =
            (since(at.changed).as_secs_f64(), bench.path(&format!("logs/{}", at.was)));
        format!("{inode} 0 {device} {} {changed:.6} {}\n", at.offset, path.display())
    };
    bench.write("registry/.sincedb_a1b2", positions.iter().map(line).collect::<String>());
}

/// As earlier ones did.
pub fn sincedb_without_paths(bench: &Bench, positions: &[At<'_>]) {
    let line = |at: &At<'_>| {
        let (inode, device) = inode(bench, at);
        format!("{inode} 0 {device} {}\n", at.offset)
    };
    bench.write("registry/.sincedb_a1b2", positions.iter().map(line).collect::<String>());
}

pub fn log_state(bench: &Bench, at: &At<'_>) -> (String, String) {
    let ((inode, device), since) = (inode(bench, at), since(at.changed));
    let value = format!(
        r#"{{"id":"native::{inode}-{device}","prev_id":"","source":"{}","offset":{},"timestamp":[{},{}],"ttl":-1,"type":"log","FileStateOS":{{"inode":{inode},"device":{device}}},"identifier_name":"native"}}"#,
        bench.path(&format!("logs/{}", at.was)).display(),
        at.offset,
        since.subsec_nanos(),
        since.as_secs(),
    );
    (format!("filebeat::logs::native::{inode}-{device}"), value)
}

pub fn filestream_state(bench: &Bench, at: &At<'_>) -> (String, String) {
    let (inode, device) = inode(bench, at);
    let key = format!("filestream::my-id::native::{inode}-{device}");
    (key, cursor(bench, at, "native", r#","eof":false"#))
}

pub fn cursor(bench: &Bench, at: &At<'_>, identity: &str, more: &str) -> String {
    let since = since(at.changed);
    format!(
        r#"{{"ttl":-1,"updated":[{},{}],"cursor":{{"offset":{}{more}}},"meta":{{"source":"{}","identifier_name":"{identity}"}}}}"#,
        // Two hours behind UTC.
        (0xff88 << 32) + u64::from(since.subsec_nanos()),
        since.as_secs(),
        at.offset,
        bench.path(&format!("logs/{}", at.was)).display(),
    )
}

/// `registry/registry/filebeat/log.json`, with changes from number `after` + 1 on.
pub fn memlog(bench: &Bench, after: usize, states: impl IntoIterator<Item = (String, String)>) {
    let change = |(number, (key, value)): (usize, (String, String))| {
        let number = after + number + 1;
        format!("{{\"op\":\"set\",\"id\":{number}}}\n{{\"k\":\"{key}\",\"v\":{value}}}\n")
    };
    let log: String = states.into_iter().enumerate().map(change).collect();
    bench.write("registry/registry/filebeat/log.json", log);
    bench.write("registry/registry/filebeat/meta.json", r#"{"version":"1"}"#);
}

pub fn log_input(bench: &Bench, positions: &[At<'_>]) {
    memlog(bench, 0, positions.iter().map(|at| log_state(bench, at)));
}

/// As Filebeat 6 wrote it: one file, times as text.
pub fn log_input_6(bench: &Bench, positions: &[At<'_>]) {
    let state = |at: &At<'_>| {
        let (inode, device) = inode(bench, at);
        let changed = jiff::Timestamp::try_from(at.changed).expect("a time");
        format!(
            r#"{{"source":"{}","offset":{},"timestamp":"{changed}","ttl":-1,"type":"log","meta":{{}},"FileStateOS":{{"inode":{inode},"device":{device}}}}}"#,
            bench.path(&format!("logs/{}", at.was)).display(),
            at.offset,
        )
    };
    let states: Vec<String> = positions.iter().map(state).collect();
    bench.write("registry/registry", format!("[{}]", states.join(",")));
}

pub fn filestream(bench: &Bench, positions: &[At<'_>]) {
    memlog(bench, 0, positions.iter().map(|at| filestream_state(bench, at)));
}

/// Everything in a checkpoint, and the newest change of the first file in the log.
pub fn filestream_checkpoint(bench: &Bench, positions: &[At<'_>]) {
    let state = |at: &At<'_>| {
        let (key, value) = filestream_state(bench, &At { offset: at.offset / 2, ..*at });
        format!("\n{{\"_key\":\"{key}\",{}", &value[1..])
    };
    let states: Vec<String> = positions.iter().map(state).collect();
    bench.write("registry/registry/filebeat/7.json", format!("[{}\n]", states.join(",")));
    let active = bench.path("registry/registry/filebeat/7.json").display().to_string();
    bench.write("registry/registry/filebeat/active.dat", active);
    memlog(bench, 7, positions.iter().map(|at| filestream_state(bench, at)));
}

/// The default since Filebeat 9: the hash of the first 1024 bytes.
pub fn filestream_fingerprint(bench: &Bench, positions: &[At<'_>]) {
    let state = |at: &At<'_>| {
        let text = fs::read(bench.path(&format!("logs/{}", at.name))).expect("read");
        (
            format!("filestream::my-id::fingerprint::{}", sha256(&text[..1024])),
            cursor(bench, at, "fingerprint", ""),
        )
    };
    memlog(bench, 0, positions.iter().map(state));
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
