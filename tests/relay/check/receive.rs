//! The receiver's side.

use std::fs;
use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use super::{as_nobody, checked, ending, front, mode, receiver, sender};
use crate::support::servers::{Elasticsearch, Nginx, free_port, have, root, wait_until};
use crate::support::store::{run, wait_for_lines};
use crate::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, waybill};

/// The way to a sender that is dialled, while a receiver has it.
#[test]
fn a_dialled_sender_is_reached_and_not_taken_over() {
    let bench = Bench::new();
    bench.token("test");
    let files = ending(&bench, 100);
    let ca = files.ca.display().to_string();
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    mode(&bench.write("central.token", run(mint).ok().stdout), 0o600);
    let port = free_port();
    let mut send = waybill();
    send.args(["send", "app.log", "--listen", &format!("127.0.0.1:{port}")]);
    send.args(["--state-dir", "state", "--tokens", "receivers.toml"]);
    send.args(["--tls-cert", "server.pem", "--tls-key", "server.key"]).current_dir(bench.path(""));
    bench.write("app.log", lines("line", 100));
    let sending = Process::start("sender", send, bench.path("sender.log"));
    let common = ["--store", "store.sqlite", "--token-file", "central.token", "--dial"];
    let dial = |at: &str| format!("test=wss://{at}/");
    let here = dial(&format!("localhost:{port}"));
    let mut receive = waybill();
    receive.args(["receive", "--tokens", "tokens.toml", "--ca", &ca]).args(common).arg(&here);
    receive.current_dir(bench.path(""));
    let _receiving = Process::start("receiver", receive, bench.path("receiver.log"));
    wait_for_lines(&bench, 100);

    let check = |more: &[&str]| checked(receiver(&bench, &[&common, more].concat()));
    let sound = check(&[&here, "--ca", &ca]);
    sound.fails(&[]);
    for (name, status, words) in [
        ("name", "ok", "localhost is"),
        ("connection", "ok", "accepted"),
        ("tls", "ok", "days left"),
        ("token", "ok", "accepted"),
        ("upgrade", "skip", "take over"),
        ("clock", "ok", "of the sender's"),
    ] {
        sound.says(name, status, words);
    }
    let unknown = check(&[&here]);
    unknown.fails(&["tls"]);
    unknown.says("tls", "fail", "--ca");
    let other = check(&[&dial(&format!("127.0.0.1:{port}")), "--ca", &ca]);
    other.fails(&["tls"]);
    other.says("tls", "fail", "for another name");
    let nobody = check(&[&dial("localhost:1"), "--ca", &ca]);
    nobody.fails(&["connection"]);
    nobody.says("connection", "fail", "does not answer");
    let nameless = check(&[&dial("nothing.invalid"), "--ca", &ca]);
    nameless.fails(&["name"]);
    nameless.says("name", "fail", "does not resolve");
    // What is presented: a token that is none, and one of a receiver that would stand by.
    mode(&bench.write("other.token", "wb_wrong\n"), 0o600);
    let present = || {
        let other = ["--store", "store.sqlite", "--token-file", "other.token", "--dial", &here];
        checked(receiver(&bench, &[&other[..], &["--ca", &ca]].concat()))
    };
    let wrong = present();
    wrong.fails(&["token"]);
    wrong.says("token", "fail", "HTTP status 401");
    for (arguments, status, words) in [
        (&[][..], "ok", "accepted"),
        (&["--rotate", "--chain-key", "chain.key"], "fail", "bound to a chain key"),
        (&["--revoke"], "fail", "HTTP status 401"),
    ] {
        let mut mint = waybill();
        mint.args(["token", "other", "--tokens", "receivers.toml"]).args(arguments);
        mint.current_dir(bench.path(""));
        let token = run(mint).ok().stdout;
        if !token.is_empty() {
            bench.write("other.token", token);
        }
        wait_until("the sender knows", PATIENCE, || present().has("token", status, words));
    }

    let web_9 = format!("web-9=wss://localhost:{port}/");
    let file = bench.path("tokens.toml").display().to_string();
    let entry = |arguments: &[&str]| {
        let mut command = waybill();
        command.args(["token", "web-9", "--tokens", &file]).args(arguments);
        run(command).ok();
    };
    for (what, mend) in [("is not there", &[][..]), ("is revoked", &["--rotate"])] {
        let entryless = check(&[&web_9, "--ca", &ca]);
        entryless.fails(&["tokens"]);
        entryless.says("tokens", "fail", what);
        let command = [&["waybill token \"web-9\" --tokens", &file][..], mend].concat().join(" ");
        entryless.says("tokens", "fail", &command);
        entry(mend);
        check(&[&web_9, "--ca", &ca]).fails(&[]);
        entry(&["--revoke"]);
    }

    bench.append("app.log", (100..200).map(|n| format!("line {n}\n")).collect::<String>());
    wait_for_lines(&bench, 200);
    let log = sending.log();
    assert_eq!(log.matches(" connected ").count(), 1, "one connection, all the while: {log}");
}

/// nginx passes the question on; what nginx itself answers is no word of a sender.
#[test]
fn a_sender_behind_nginx_is_asked_whether_it_takes_the_token() {
    let bench = Bench::new();
    let token = bench.token("test").display().to_string();
    let ca = Certificates::make(&bench.path("")).ca.display().to_string();
    bench.write("app.log", "a line\n");
    let port = free_port();
    let Some(_nginx) = front(&bench, port, |text| text) else { return };
    let url = format!("test=wss://localhost:{port}/");
    let ask = || {
        let dial = ["--store", "store.sqlite", "--token-file", &token, "--ca", &ca, "--dial", &url];
        checked(receiver(&bench, &dial))
    };
    let nobody = ask();
    nobody.fails(&["upgrade"]);
    nobody.says("upgrade", "fail", "HTTP status 502");
    let mut send = waybill();
    send.args(["send", "app.log", "--state-dir", "state", "--tokens", "tokens.toml", "--listen"]);
    send.arg(format!("unix:{}", bench.path("receive.sock").display()));
    send.current_dir(bench.path(""));
    let sending = Process::start("sender", send, bench.path("sender.log"));
    sending.wait_for_log("listening for a receiver");
    let asked = ask();
    asked.fails(&[]);
    asked.says("token", "ok", "accepted");
}

#[test]
fn what_a_receiver_lacks_is_said() {
    let bench = Bench::new();
    let mint = |name: &str, more: &[&str]| {
        let mut command = waybill();
        command.args(["token", name, "--tokens"]).arg(bench.path("tokens.toml")).args(more);
        run(command).ok();
    };
    mint("one", &["--expires", "3d"]);
    mint("two", &[]);
    let store = ["--store", "store/store.sqlite"];
    let check = checked(receiver(&bench, &store));
    check.fails(&[]);
    check.says("tokens", "warn", "the token of \"one\" ends");
    check.says("tokens", "ok", "2 senders");
    check.says("store", "ok", "it can be made");

    mint("one", &["--revoke"]);
    mint("two", &["--revoke"]);
    let files = Certificates::make(&bench.path(""));
    let (own, other) = (files.certificate.display().to_string(), bench.path("other.key"));
    fs::write(&other, rcgen::KeyPair::generate().expect("a key").serialize_pem()).expect("written");
    mode(&other, 0o644);
    let arguments = ["--tls-cert", &own, "--tls-key", "other.key", store[0], store[1]];
    let command = as_nobody(&bench, &receiver(&bench, &arguments));
    // It holds hashes, and is its owner's alone.
    mode(&bench.path("tokens.toml"), 0o644);
    mode(&bench.path(""), 0o555);
    let check = checked(command);
    mode(&bench.path(""), 0o755);
    check.fails(&["tls", "tokens", "store"]);
    check.says("tls", "fail", "does not belong to certificate");
    check.says("tokens", "fail", "nobody may enter");
    check.says("configuration", "warn", "chmod 600");
}

#[test]
fn a_file_that_is_no_store_is_said() {
    let bench = Bench::new();
    bench.token("test");
    let notes = bench.write("notes.txt", "notes\n");
    let check = checked(receiver(&bench, &["--store", "notes.txt"]));
    check.fails(&["store"]);
    check.says("store", "fail", "is not a Waybill store");
    let mut command = waybill();
    command.args(["receive", "--listen", "127.0.0.1:0", "--store"]).arg(&notes);
    command.arg("--tokens").arg(bench.path("tokens.toml"));
    let finished = run(command);
    assert_eq!(finished.status.code(), Some(78), "{}", finished.stderr);
    assert_eq!(fs::read_to_string(notes).expect("a file"), "notes\n");
}

/// Each way in which openssl makes a certificate that no sender takes: the receiver's check names it, and the sender's.
#[test]
fn a_certificate_that_senders_refuse_is_said_on_both_sides() {
    if !have("openssl", "openssl") {
        return;
    }
    let bench = Bench::new();
    bench.token("test");
    bench.write("app.log", "a line\n");
    let openssl = |arguments: &str| {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(bench.path(""));
        run(command).ok();
    };
    let key =
        "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -subj /CN=localhost";
    let end = "-out own.pem -days 90";
    let names = "-addext subjectAltName=DNS:localhost,IP:127.0.0.1";
    let no_authority = "-addext basicConstraints=critical,CA:FALSE";
    let cases = [
        (format!("x509 -req -in own.csr -signkey own.key {end}"), "version 1"),
        (format!("req -x509 {key} {end} {no_authority}"), "names no host"),
        (format!("req -x509 {key} {end} {names}"), "CA:TRUE"),
    ];
    let tls = ["--tls-cert", "own.pem", "--tls-key", "own.key", "--store", "store.sqlite"];
    openssl(&format!("req {key} -out own.csr"));
    for (arguments, words) in cases {
        openssl(&arguments);
        let check = checked(receiver(&bench, &tls));
        check.fails(&["tls"]);
        check.says("tls", "fail", words);
        let port = free_port();
        let mut command = Command::new("openssl");
        command.args(["s_server", "-www", "-cert", "own.pem", "-key", "own.key", "-accept"]);
        command.arg(format!("127.0.0.1:{port}")).current_dir(bench.path(""));
        let _server = Process::start("s_server", command, bench.path("openssl.log"));
        wait_until("it listens", PATIENCE, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let url = format!("wss://localhost:{port}/");
        let check = checked(sender(&bench, &["app.log", "--ca", "own.pem", "--to", &url]));
        check.fails(&["tls"]);
        check.says("tls", "fail", words);
    }
    // Clients that are not ours may take it.
    let mut command = waybill();
    command.args(["receive", "--listen", "127.0.0.1:0", "--tokens"]).arg(bench.path("tokens.toml"));
    command.args(tls).current_dir(bench.path(""));
    let running = Process::start("receiver", command, bench.path("receiver.log"));
    running.wait_for_log("other side will refuse the certificate");
    running.wait_for_log(" listening");
    openssl(&format!("req -x509 {key} {end} {names} {no_authority}"));
    let check = checked(receiver(&bench, &tls));
    check.fails(&[]);
    check.says("tls", "ok", "the certificate for localhost, 127.0.0.1 is good until ");

    // The one that the README makes is taken.
    let readme = fs::read_to_string(root().join("README.md")).expect("the README");
    let (_, command) = readme.split_once("\n    openssl ").expect("a command");
    let (command, _) = command.split_once("\n\n").expect("its end");
    let command = command.replace("\\\n", " ").replace("logs.example.com", "localhost");
    openssl(&command.split_whitespace().collect::<Vec<_>>().join(" "));
    let port = free_port();
    let mut command = waybill();
    command.args(["receive", "--listen", &format!("127.0.0.1:{port}"), "--store", "own.sqlite"]);
    command.args(["--tokens", "tokens.toml", "--tls-cert", "cert.pem", "--tls-key", "key.pem"]);
    command.current_dir(bench.path(""));
    let running = Process::start("receiver", command, bench.path("own.log"));
    running.wait_for_log(" listening");
    assert!(!running.log().contains("will refuse"), "{}", running.log());
    let url = format!("wss://localhost:{port}/");
    let check = checked(sender(&bench, &["app.log", "--ca", "cert.pem", "--to", &url]));
    check.fails(&[]);
    check.says("tls", "ok", "the certificate for localhost is good until ");
}

/// What `waybill setup` put there, and what others change; called for each version.
pub fn cluster(node: &Elasticsearch, rule: &str, dead_letter: &str) {
    let bench = Bench::new();
    bench.token("test");
    let check = |rule: &str| {
        let arguments = ["--elasticsearch", &node.url(), "--index", rule];
        let mut command = receiver(&bench, &arguments);
        command.args(["--dead-letter-index", dead_letter]);
        checked(command)
    };
    let sound = check(rule);
    sound.fails(&[]);
    sound.says("version", "ok", "");
    sound.says("clock", "ok", "within");
    sound.says("template", "ok", "version");
    sound.says("durability", "ok", "request");
    sound.says("privileges", "skip", "not checked");
    check("other-{type}").says("template", "fail", "it is missing");

    let put = |path: &str, body: Value| {
        let (status, answer) = node.request("PUT", path, &body);
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
    };
    let delete = |path: &str| assert_eq!(node.request("DELETE", path, &Value::Null).0, 200);
    let asynchronous = json!({ "index.translog.durability": "async" });
    put("/checked-default", json!({ "settings": asynchronous }));
    let template =
        json!({ "index_patterns": ["checked-*"], "template": { "settings": asynchronous } });
    put("/_index_template/checked", template);
    let check = check("checked-{type}");
    check.fails(&["template", "durability", "durability"]);
    check.says("durability", "fail", "checked-default");
    check.says("durability", "fail", "a template makes");
    delete("/_index_template/checked");
    delete("/checked-default");
}

/// Before the node: TLS and a key, and answers that only a cluster with users gives.
#[test]
fn credentials_and_privileges_are_checked_through_tls() {
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    bench.token("test");
    let files = Certificates::make(&bench.path(""));
    let port = free_port();
    // The published servers have no users: nginx asks for the key, and says what Elasticsearch with users would.
    let missing = json!({ "has_all_requested": false, "index": {
        "waybill-*": { "create_doc": true, "auto_configure": false },
        "waybill-parked": { "create_doc": true, "auto_configure": true } } });
    let text = format!(
        "events {{}}\nhttp {{ server {{ listen 127.0.0.1:{port} ssl; server_name localhost;\n\
         ssl_certificate {}; ssl_certificate_key {};\n\
         if ($http_authorization != \"ApiKey aWQ6a2V5\") {{ return 401; }}\n\
         location /_security/ {{ default_type application/json; return 200 '{missing}'; }}\n\
         location /_index_template/ {{ return 403; }}\n\
         location / {{ proxy_pass http://{}; }} }} }}\n",
        files.certificate.display(),
        files.key.display(),
        node.host_port()
    );
    let Some(_nginx) = Nginx::start(&text) else { return };
    let url = format!("https://localhost:{port}");
    let ca = files.ca.display().to_string();
    let with = |key: &str, more: &[&str]| {
        mode(&bench.write("api-key", key), 0o600);
        let mut command = receiver(&bench, &["--elasticsearch", &url, "--api-key-file", "api-key"]);
        command.args(more);
        checked(command)
    };
    let check = with("id:key", &["--es-ca", &ca]);
    check.fails(&["privileges"]);
    check.says("privileges", "fail", "auto_configure on waybill-*");
    check.says("tls", "ok", "days left");
    check.says("clock", "ok", "within");
    check.says("template", "skip", "manage_index_templates");
    let check = with("id:other", &["--es-ca", &ca]);
    check.fails(&["credentials"]);
    let check = with("id:key", &[]);
    check.fails(&["connection"]);
    check.says("connection", "fail", "certificate");
    let mut command = receiver(&bench, &["--elasticsearch", "http://127.0.0.1:1"]);
    command.args(["--elasticsearch", &node.url()]);
    let check = checked(command);
    check.says("connection", "fail", "cannot connect");
    check.says("version", "ok", "");
}

/// Nothing tells whether it is this receiver that has its port.
#[test]
fn a_receivers_port_that_is_in_use_is_warned_of() {
    let bench = Bench::new();
    bench.token("test");
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let taken = holder.local_addr().expect("an address").to_string();
    let mut command = waybill();
    command.args(["check", "receive", "--tokens", "tokens.toml", "--store", "store.sqlite"]);
    command.args(["--listen", &taken, "--metrics", &format!("127.0.0.1:{}", free_port())]);
    command.current_dir(bench.path(""));
    let check = checked(command);
    check.fails(&[]);
    check.says("port", "warn", &format!("{taken} is in use: as it must be if this service runs"));
    check.says("port", "ok", "is free");
}
