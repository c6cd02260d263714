//! The real servers do what the other tests rely on, and the shipped nginx and syslog-ng files are accepted by them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::documents::prefix;
use crate::support::servers::{
    Elasticsearch, Nginx, SyslogNg, free_port, http, root, spawn_bound, wait_until,
};

const SOON: Duration = Duration::from_secs(20);

fn creates(index: &str, ids: std::ops::Range<u32>) -> String {
    ids.map(|id| {
        format!("{{\"create\":{{\"_index\":\"{index}\",\"_id\":\"{id:06}\"}}}}\n{{\"n\":{id}}}\n")
    })
    .collect()
}

#[test]
fn shared_elasticsearch_answers_a_repeated_create_with_409() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else {
        return;
    };
    let index = &prefix("smoke-repeat");
    let (status, answer) = elasticsearch.bulk(&creates(index, 0..1));
    assert_eq!((status, &answer["items"][0]["create"]["status"]), (200, &json!(201)), "{answer}");
    let (status, answer) = elasticsearch.bulk(&creates(index, 0..2));
    assert_eq!(status, 200);
    assert_eq!(answer["items"][0]["create"]["status"], 409);
    assert_eq!(answer["items"][1]["create"]["status"], 201);
    assert_eq!(elasticsearch.count(index), 2);
}

#[test]
fn every_document_is_read_back_over_several_pages() {
    let Some(elasticsearch) = Elasticsearch::shared_8_17() else {
        return;
    };
    let index = &prefix("smoke-pages");
    for start in (0..25_000).step_by(5_000) {
        let (status, answer) = elasticsearch.bulk(&creates(index, start..start + 5_000));
        assert_eq!((status, &answer["errors"]), (200, &json!(false)));
    }
    let expected: Vec<String> = (0..25_000).map(|id| format!("{id:06}")).collect();
    assert_eq!(elasticsearch.all_ids(index), expected);
    let documents = elasticsearch.all_documents(index);
    assert_eq!(documents.len(), expected.len());
    assert_eq!(documents["024999"], json!({"n": 24_999}));
    assert!(elasticsearch.all_ids("smoke-absent").is_empty());
    assert_eq!(elasticsearch.count("smoke-absent"), 0);
}

#[test]
fn killed_elasticsearch_comes_back_with_its_data_and_address() {
    let Some(elasticsearch) =
        Elasticsearch::start_with("8.17", &["--http-max-content-length", "1mb"])
    else {
        return;
    };
    let (_, answer) = elasticsearch.bulk(&creates("smoke-kill", 0..1_000));
    assert_eq!(answer["errors"], false);
    let (status, _) = elasticsearch.bulk(&creates("smoke-kill", 0..30_000));
    assert_eq!(status, 413);
    elasticsearch.kill_hard();
    elasticsearch.restart();
    assert_eq!(elasticsearch.count("smoke-*"), 1_000);
    elasticsearch.pause();
    elasticsearch.resume();
    assert_eq!(elasticsearch.request("POST", "/smoke-kill/_flush", &Value::Null).0, 200);
}

#[test]
fn nginx_serves_reloads_stops_and_starts_again() {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let text = |status: u16| {
        format!(
            "events {{}}\nhttp {{\n  server {{ listen 127.0.0.1:{port}; access_log access.log; return {status}; }}\n}}\n"
        )
    };
    let Some(mut nginx) = Nginx::start(&text(502)) else {
        return;
    };
    let status = || http(&address, "GET", "/", "text/plain", b"").map(|(status, _)| status);
    assert_eq!(status().expect("an answer"), 502);
    nginx.reload(&text(504));
    assert_eq!(status().expect("an answer"), 504);
    nginx.stop();
    assert!(status().is_err());
    nginx.restart();
    assert_eq!(status().expect("an answer"), 504);
    nginx.kill_hard();
    assert!(status().is_err());
    nginx.restart();
    assert_eq!(status().expect("an answer"), 504);
    // nginx logs after it has answered, so an answer does not mean a line yet.
    let log = nginx.folder().join("access.log");
    wait_until("a line in the access log of the test's folder", SOON, || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("\" 504 "))
    });
}

/// A certificate for `logs.example.org`, as nginx needs one to accept the receiver's file.
fn certificate(folder: &Path) {
    let made = rcgen::generate_simple_self_signed(vec!["logs.example.org".to_owned()])
        .expect("a certificate");
    fs::write(folder.join("tls.pem"), made.cert.pem()).expect("written");
    fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).expect("written");
}

/// The shipped front is accepted as it is, with TLS, and passes an upgrade and the bytes after it to the Unix socket.
#[test]
fn shipped_receiver_front_passes_websockets_to_the_unix_socket() {
    let folder = tempfile::tempdir().expect("a folder");
    certificate(folder.path());
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (tls, plain) = (free_port(), free_port());
    let shipped = fs::read_to_string(root().join("nginx/receiver.conf")).expect("the shipped file");
    let shipped = replace(&shipped, "/etc/ssl/certs/logs.example.org.pem", &at("tls.pem"));
    let shipped = replace(&shipped, "/etc/ssl/private/logs.example.org.key", &at("tls.key"));
    let shipped = replace(&shipped, "listen 443 ssl;", &format!("listen 127.0.0.1:{tls} ssl;"));
    // Without TLS here, so that the test can speak to it over a bare connection.
    let shipped = replace(&shipped, "listen [::]:443 ssl;", &format!("listen 127.0.0.1:{plain};"));
    let shipped = replace(
        &shipped,
        "unix:/run/waybill/receive.sock:",
        &format!("unix:{}:", at("receive.sock")),
    );

    let listener = UnixListener::bind(folder.path().join("receive.sock")).expect("a socket");
    let Some(_nginx) = Nginx::start_in(folder, &format!("events {{}}\nhttp {{\n{shipped}}}\n"))
    else {
        return;
    };

    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("nginx dials the socket");
        let head = read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n").expect("sent");
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).expect("the bytes after the upgrade");
        stream.write_all(&bytes).expect("sent");
        head.to_ascii_lowercase()
    });
    let mut stream = TcpStream::connect(("127.0.0.1", plain)).expect("nginx listens");
    stream.set_read_timeout(Some(SOON)).expect("set");
    stream
        .write_all(b"GET /some/path HTTP/1.1\r\nHost: logs.example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: Bearer token\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        .expect("sent");
    let answer = read_head(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    stream.write_all(b"ping").expect("sent");
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).expect("the bytes come back");
    assert_eq!(&echo, b"ping");
    let head = receiver.join().expect("the receiver's side");
    for line in [
        "upgrade: websocket",
        "connection: upgrade",
        "authorization: bearer token",
        "x-forwarded-for: 127.0.0.1",
    ] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "no {line:?} in:\n{head}");
    }
}

/// Byte by byte, so that nothing after the head is taken.
fn read_head(stream: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).expect("a whole head");
        head.push(byte[0]);
    }
    String::from_utf8(head).expect("a head is text")
}

/// The shipped nginx and syslog-ng files together: a request becomes a line of JSON in the file that is tailed.
#[test]
fn shipped_nginx_and_syslog_ng_files_carry_a_request_into_the_tailed_file() {
    let shipped =
        fs::read_to_string(root().join("syslog-ng/waybill.conf")).expect("the shipped file");
    let shipped = replace(&shipped, "/run/waybill/", "@FOLDER@/");
    let shipped = replace(&shipped, "/var/log/waybill/", "@FOLDER@/log/");
    // The group may not exist here, and the tests may not be root.
    let shipped = replace(&shipped, "group(\"www-data\")", "");
    let Some(syslog_ng) = SyslogNg::start(&format!("@version: 3.38\n{shipped}")) else {
        return;
    };

    let shipped =
        fs::read_to_string(root().join("nginx/access-log.conf")).expect("the shipped file");
    let shipped = replace(&shipped, "/run/waybill/", &format!("{}/", syslog_ng.folder().display()));
    let port = free_port();
    let server = format!(
        "server {{ listen 127.0.0.1:{port}; location / {{ return 404 nothing; }}\n\
         location /gone {{ root /nonexistent; }} }}"
    );
    let Some(_nginx) = Nginx::start(&format!("events {{}}\nhttp {{\n{shipped}\n{server}\n}}\n"))
    else {
        return;
    };
    let path = "/a%20path?q=%22quoted%22";
    let (status, _) =
        http(&format!("127.0.0.1:{port}"), "GET", path, "text/plain", b"").expect("an answer");
    assert_eq!(status, 404);

    let (status, _) =
        http(&format!("127.0.0.1:{port}"), "GET", "/gone", "text/plain", b"").expect("an answer");
    assert_eq!(status, 404);

    let program = UnixDatagram::unbound().expect("a socket");
    program
        .send_to(
            b"<14>Nov 21 07:00:00 worker[77]: job done",
            syslog_ng.folder().join("supervisor.sock"),
        )
        .expect("the supervisor socket takes a datagram");

    let file = syslog_ng.folder().join("log/outgoing.log");
    let text = || fs::read_to_string(&file).unwrap_or_default();
    wait_until("all lines in the tailed file", SOON, || text().lines().count() >= 4);
    let text = text();
    let line = text
        .lines()
        .find(|line| line.contains(" nginx ") && line.contains("%22quoted%22"))
        .unwrap_or_else(|| panic!("no nginx line in:\n{text}"));
    let document = &line[line.find('{').unwrap_or_else(|| panic!("no JSON in: {line}"))..];
    let document: Value =
        serde_json::from_str(document).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_eq!(document["ip"], "127.0.0.1");
    assert_eq!(document["host"], "127.0.0.1");
    assert_eq!(document["path"], path);
    assert_eq!(document["status"], 404);
    assert!(document["length"].as_u64().is_some_and(|length| length > 100), "{document}");
    assert!(document["generation_time_milli"].is_u64(), "{document}");
    assert!(
        document["date"].as_str().is_some_and(|date| date.parse::<jiff::Timestamp>().is_ok()),
        "{document}"
    );
    for key in ["referrer", "user_agent"] {
        assert_eq!(document[key], "", "{key}: {document}");
    }
    // local7.err, as nginx's error log has it.
    let error = |line: &str| line.starts_with("<187>1 ") && line.contains("\"/nonexistent/gone\"");
    assert_eq!(text.lines().filter(|line| error(line)).count(), 1, "{text}");
    assert!(
        text.lines()
            .any(|line| line.starts_with("<14>1 ") && line.ends_with(" worker 77 - - job done")),
        "{text}"
    );
}

#[test]
fn elasticsearch_script_explains_itself() {
    let script = root().join("scripts/elasticsearch");
    let help = Command::new(&script).arg("--help").output().expect("the script runs");
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--http-max-content-length"));
    let wrong = Command::new(&script).args(["start", "6.8"]).output().expect("the script runs");
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("opensearch-3.8"));
}

/// `scripts/elasticsearch start` in a process group of its own, on the folder `node` of the current one.
fn start_script(folder: &Path, die_with: &str) -> Child {
    let script = root().join("scripts/elasticsearch");
    let start = "\"$0\" start 8.17 --dir node --remove --die-with";
    let mut command = Command::new("bash");
    command.args(["-c", &format!("{start} {die_with} || exit; exec sleep infinity")]);
    command.arg(script).current_dir(folder).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    spawn_bound(command).expect("bash")
}

/// The process of the node in `folder`, once there is one.
fn node(folder: &Path) -> Option<u32> {
    fs::read_to_string(folder.join("node/pid")).ok()?.trim().parse().ok()
}

#[track_caller]
fn kill_group(leader: &mut Child) {
    let group = format!("-{}", leader.id());
    let killed = Command::new("kill").args(["-KILL", "--", &group]).status().expect("kill");
    assert!(killed.success());
    leader.wait().expect("the leader is gone");
}

/// Whoever interrupts the tests kills a process, or a whole group, at any moment.
#[test]
fn a_node_ends_with_its_process_though_the_group_is_killed() {
    if Elasticsearch::shared_8_17().is_none() {
        return;
    }
    let ends = |folder: &Path, pid: u32| {
        wait_until("the node has ended and its folder is gone", SOON, || {
            !Path::new(&format!("/proc/{pid}")).exists() && !folder.join("node").exists()
        });
    };
    // The tests' own group, once the node runs: with the process that it is to die with.
    let folder = tempfile::tempdir().expect("a folder");
    let mut tests = start_script(folder.path(), "$$");
    wait_until("the node answers", 6 * SOON, || folder.path().join("node/url").exists());
    let pid = node(folder.path()).expect("a node");
    kill_group(&mut tests);
    ends(folder.path(), pid);

    // The script's group while the node starts, and that process later.
    let folder = tempfile::tempdir().expect("a folder");
    let mut tests = Command::new("sleep").arg("infinity").spawn().expect("sleep");
    let mut script = start_script(folder.path(), &tests.id().to_string());
    wait_until("the node starts", SOON, || node(folder.path()).is_some());
    let pid = node(folder.path()).expect("a node");
    kill_group(&mut script);
    tests.kill().expect("killed");
    tests.wait().expect("gone");
    ends(folder.path(), pid);
}

/// A test that replaces what is no longer there would test nothing.
#[track_caller]
fn replace(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "the shipped file no longer holds {from:?}");
    text.replace(from, to)
}
