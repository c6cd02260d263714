//! The receiver dials: same lines, same ids, whatever dies, and nobody gets a token who is not the sender.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use crate::certificates::Authority;
use crate::support::servers::{Nginx, free_port, have, root, skip, wait_until};
use crate::support::store::{assert_slow_retries, run, wait_for_lines};
use crate::support::waybill::{
    Bench, Certificates, Finished, PATIENCE, Process, Random, lines, numbered, waybill,
};

/// A bench with certificates for `localhost`, an entry `test` for the sender and a token for the receiver in
/// `central.token`, which `receivers.toml` lists.
struct Reversed {
    bench: Bench,
    ca: PathBuf,
}

impl Reversed {
    fn new() -> Reversed {
        let bench = Bench::new();
        let ca = Certificates::make(&bench.path("")).ca;
        bench.token("test");
        let reversed = Reversed { bench, ca };
        reversed.guest("central");
        reversed
    }

    /// Mints a token for a receiver into `NAME.token`.
    fn guest(&self, name: &str) {
        let token = self.guest_tokens(&[name]).ok().stdout;
        let path = self.bench.write(&format!("{name}.token"), token);
        fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("chmod");
    }

    fn guest_tokens(&self, arguments: &[&str]) -> Finished {
        let mut command = waybill();
        command.arg("token").args(arguments).arg("--tokens").arg(self.bench.path("receivers.toml"));
        run(command)
    }

    /// `waybill send --listen` over TLS, with its state in `state`.
    fn send_command(&self, port: u16, arguments: &[&str]) -> Command {
        self.send_command_at(&format!("127.0.0.1:{port}"), "", arguments)
    }

    /// With a folder for its state and log of its own, below the bench.
    fn send_command_at(&self, listen: &str, folder: &str, arguments: &[&str]) -> Command {
        let path = |name: &str| self.bench.path(name);
        let mut command = waybill();
        command.arg("send").args(["--listen", listen]).args(arguments);
        command.arg("--state-dir").arg(path(folder).join("state"));
        command.arg("--tokens").arg(path("receivers.toml"));
        if !listen.starts_with("unix:") {
            command.arg("--tls-cert").arg(path("server.pem"));
            command.arg("--tls-key").arg(path("server.key"));
        }
        command.current_dir(path(folder));
        command
    }

    fn sender(&self, port: u16, arguments: &[&str]) -> Process {
        let command = self.send_command(port, arguments);
        let sender = Process::start("sender", command, self.bench.path("sender.log"));
        sender.wait_for_log("listening for a receiver");
        sender
    }

    /// `waybill receive --dial` into the store of the bench.
    fn receive_command(&self, dials: &[&str]) -> Command {
        self.receive_command_as("central", dials)
    }

    fn receive_command_as(&self, guest: &str, dials: &[&str]) -> Command {
        let mut command = waybill();
        command.arg("receive").arg("--tokens").arg(self.bench.path("tokens.toml"));
        command.arg("--store").arg(self.bench.path("store.sqlite"));
        command.arg("--token-file").arg(self.bench.path(&format!("{guest}.token")));
        command.arg("--ca").arg(&self.ca);
        for dial in dials {
            command.args(["--dial", dial]);
        }
        command
    }

    fn receiver(&self, dials: &[&str]) -> Process {
        Process::start("receiver", self.receive_command(dials), self.bench.path("receiver.log"))
    }

    fn ids(&self) -> Vec<String> {
        let stored = self.bench.stored();
        stored.iter().map(|document| document["_id"].as_str().expect("an id").to_owned()).collect()
    }
}

fn dial(port: u16) -> String {
    format!("test=wss://localhost:{port}/")
}

/// Half of a file goes the usual way, the rest is fetched, and fetched once more as if nobody had known of its receipts.
/// The sender is the same to the receiver, so that nothing is stored twice.
#[test]
fn who_dials_changes_neither_ids_nor_what_is_stored() {
    const HALF: usize = 5_000;
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let text = lines("line", 2 * HALF);
    let middle = text.match_indices('\n').nth(HALF - 1).expect("a line").0 + 1;
    bench.write("app.log", &text[..middle]);
    let mut usual = bench.receiver();
    bench.send_once(&usual, &["app.log", "--receipts", "receipts.jsonl"]).ok();
    assert!(usual.stop().success());
    let sender = bench.stored()[0]["waybill"]["sender"].clone();
    let positions = bench.path("positions.before");
    fs::copy(bench.path("state/positions"), &positions).expect("copied");

    bench.append("app.log", &text[middle..]);
    let port = free_port();
    let mut receiver = reversed.receiver(&[&dial(port)]);
    let command =
        reversed.send_command(port, &["app.log", "--once", "--receipts", "receipts.jsonl"]);
    run(command).ok();
    bench.assert_lines(numbered("line", 2 * HALF));
    let stored = bench.stored();
    assert!(stored.iter().all(|document| document["waybill"]["sender"] == sender));
    assert!(
        stored
            .iter()
            .all(|document| document["waybill"]["segment"] == stored[0]["waybill"]["segment"])
    );

    // One receipt per line, with the id that is stored.
    let receipts = fs::read_to_string(bench.path("receipts.jsonl")).expect("receipts");
    assert_eq!(receipts.matches("\"stored\"").count(), 2 * HALF);
    assert_eq!(receipts.lines().count(), 2 * HALF);

    // The positions are those of before: the same rows, hence the same ids.
    let before = reversed.ids();
    fs::copy(&positions, bench.path("state/positions")).expect("copied");
    let again = ["app.log", "--once", "--receipts", "again.jsonl"];
    run(reversed.send_command(port, &again)).ok();
    let receipts = fs::read_to_string(bench.path("again.jsonl")).expect("receipts");
    assert_eq!(receipts.matches("\"already\"").count(), HALF);
    assert_eq!(reversed.ids(), before);
    assert!(receiver.stop().success());
}

#[test]
fn either_side_is_killed_again_and_again() {
    const LINES: usize = 200_000;
    const KILLS: usize = 10;
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let mut random = Random::new();
    let port = free_port();
    bench.write("app.log", "");
    let arguments = ["app.log", "--receipts", "receipts.jsonl"];
    let mut sender = reversed.sender(port, &arguments);
    let mut receiver = reversed.receiver(&[&dial(port)]);
    for kill in 0..KILLS {
        let (from, to) = (LINES * kill / KILLS, LINES * (kill + 1) / KILLS);
        let before = bench.size_of("receipts.jsonl");
        let text: String = (from..to).map(|number| format!("line {number}\n")).collect();
        bench.append("app.log", text);
        wait_until("some receipts came", PATIENCE, || bench.size_of("receipts.jsonl") > before);
        std::thread::sleep(Duration::from_millis(random.below(50)));
        if kill % 2 == 0 {
            receiver.kill_hard();
            receiver = reversed.receiver(&[&dial(port)]);
        } else {
            sender.kill_hard();
            sender = reversed.sender(port, &arguments);
        }
    }
    wait_until("every line", PATIENCE, || bench.stored().len() >= LINES);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", LINES));
}

/// It is there before any of them, keeps trying, and each sender keeps its own identity.
#[test]
fn one_receiver_dials_three_senders_that_come_later() {
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let names = ["web-1", "web-2", "web-3"];
    let ports = names.map(|_| free_port());
    let mut dials = Vec::new();
    for (name, port) in names.iter().zip(ports) {
        bench.token(name);
        dials.push(format!("{name}=wss://localhost:{port}/"));
    }
    let dials: Vec<&str> = dials.iter().map(String::as_str).collect();
    let mut receiver = reversed.receiver(&dials);
    let failures = || receiver.log().matches("does not answer").count();
    wait_until("it tries all, more than once", PATIENCE, || failures() >= 2 * names.len());

    let mut senders = Vec::new();
    for (name, port) in names.iter().zip(ports) {
        bench.write(&format!("{name}/app.log"), lines(name, 1_000));
        let command = reversed.send_command_at(&format!("127.0.0.1:{port}"), name, &["app.log"]);
        senders.push(Process::start(name, command, bench.path(&format!("{name}.log"))));
    }
    wait_for_lines(bench, 3 * 1_000);
    bench.assert_lines(names.iter().flat_map(|name| numbered(name, 1_000)));
    for document in bench.stored() {
        let name = document["waybill"]["sender_name"].as_str().expect("a name").to_owned();
        assert!(document["message"].as_str().expect("a message").starts_with(&name), "{document}");
    }
    // Nothing was lost on the way: all of it is receipted, so that nothing is sent again.
    assert!(receiver.stop().success());
    assert!(senders.iter_mut().map(Process::stop).all(|status: ExitStatus| status.success()));
}

/// TLS at the shipped nginx, a Unix socket behind it, and a path of its own: other things are served there too.
#[test]
fn a_sender_behind_nginx_is_dialled() {
    const LINES: usize = 5_000;
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let port = free_port();
    let text = fs::read_to_string(root().join("nginx/receiver.conf")).expect("the shipped file");
    let mut text = format!("events {{}}\nhttp {{\n{text}}}\n");
    let at = |name: &str| bench.path(name).display().to_string();
    for (from, to) in [
        ("/etc/ssl/certs/logs.example.org.pem", at("server.pem")),
        ("/etc/ssl/private/logs.example.org.key", at("server.key")),
        ("listen 443 ssl;", format!("listen 127.0.0.1:{port} ssl;")),
        ("    listen [::]:443 ssl;\n", String::new()),
        ("location / {", "location /logs/web-1/ {".to_owned()),
        ("unix:/run/waybill/receive.sock:", format!("unix:{}:", at("send.sock"))),
    ] {
        assert!(text.contains(from), "the shipped file no longer holds {from:?}");
        text = text.replace(from, &to);
    }
    let Some(mut nginx) = Nginx::start(&text) else { return };
    // nginx has nobody behind it yet.
    let receiver = reversed.receiver(&[&format!("{}logs/web-1/", dial(port))]);
    receiver.wait_for_log("refused with HTTP status 502");
    bench.write("app.log", lines("line", LINES / 2));
    let socket = format!("unix:{}", at("send.sock"));
    let command = reversed.send_command_at(&socket, "", &["app.log"]);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    wait_for_lines(bench, LINES / 2);
    nginx.kill_hard();
    let more: String = (LINES / 2..LINES).map(|number| format!("line {number}\n")).collect();
    bench.append("app.log", more);
    nginx.restart();
    wait_for_lines(bench, LINES);
    bench.assert_lines(numbered("line", LINES));
    assert!(sender.stop().success());
    assert!(!bench.path("send.sock").exists(), "the socket goes with its process");
}

const REFUSED: &str = "refused with HTTP status 401";

#[test]
fn a_wrong_token_is_said_on_both_sides_and_mended_without_a_restart() {
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let right = fs::read(bench.path("central.token")).expect("the token");
    bench.write("central.token", "wb_this-is-not-it\n");
    bench.write("app.log", lines("line", 100));
    let port = free_port();
    let mut sender = reversed.sender(port, &["app.log"]);
    let receiver = reversed.receiver(&[&dial(port)]);
    receiver.wait_for_log(REFUSED);
    assert_slow_retries(&receiver.log(), REFUSED);
    sender.wait_for_log("status=401");
    assert!(bench.messages().is_empty());
    bench.write("central.token", right);
    wait_for_lines(bench, 100);

    // Revoked while connected, and minted anew under the same name.
    reversed.guest_tokens(&["central", "--revoke"]).ok();
    receiver.wait_for_log("the token was revoked");
    bench.append("app.log", "line 100\n");
    let fresh = reversed.guest_tokens(&["central", "--rotate"]).ok().stdout;
    bench.write("central.token", fresh);
    wait_for_lines(bench, 101);
    bench.assert_lines(numbered("line", 101));
    assert!(sender.stop().success());
}

/// The certificate of a sender that listens is renewed: open connections go on, new ones are shown the new one.
#[test]
fn a_replaced_certificate_is_shown_to_receivers_that_dial_anew() {
    let mut reversed = Reversed::new();
    let folder = reversed.bench.path("");
    let others = folder.join("others");
    fs::create_dir(&others).expect("a folder");
    Authority::new(&folder).sign(&folder, "localhost", |_| {});
    reversed.ca = folder.join("trusted.pem");
    let port = free_port();
    reversed.bench.write("app.log", lines("line", 100));
    let mut sender = reversed.sender(port, &["app.log"]);
    let mut first = reversed.receiver(&[&dial(port)]);
    wait_for_lines(&reversed.bench, 100);
    // Another authority's: what it is shown tells a new connection apart from the old one.
    Authority::new(&others).sign(&folder, "localhost", |_| {});
    sender.wait_for_log("certificate taken over");
    reversed.bench.append("app.log", "line 100\n");
    wait_for_lines(&reversed.bench, 101);
    assert_eq!(first.log().matches("dialled").count(), 1, "{}", first.log());
    assert!(first.stop().success());

    reversed.ca = others.join("trusted.pem");
    reversed.bench.append("app.log", "line 101\n");
    let mut second = reversed.receiver(&[&dial(port)]);
    wait_for_lines(&reversed.bench, 102);
    reversed.bench.assert_lines(numbered("line", 102));
    assert!(second.stop().success());
    assert!(sender.stop().success());
}

/// nginx with a certificate stands where the sender should; it would log what it is told.
fn impostor(said: &str, make: impl FnOnce(&Reversed)) {
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    fs::create_dir(bench.path("impostor")).expect("a folder");
    make(&reversed);
    let at = |name: &str| bench.path("impostor").join(name).display().to_string();
    let port = free_port();
    let text = format!(
        "events {{}}\nhttp {{ log_format told '$request $http_authorization';\n\
         server {{ listen 127.0.0.1:{port} ssl; access_log told.log told;\n\
         ssl_certificate {}; ssl_certificate_key {}; location / {{ return 401; }} }} }}\n",
        at("server.pem"),
        at("server.key"),
    );
    let Some(mut nginx) = Nginx::start(&text) else { return };
    let receiver = reversed.receiver(&[&dial(port)]);
    receiver.wait_for_log(said);
    assert_slow_retries(&receiver.log(), said);
    let told = fs::read_to_string(nginx.folder().join("told.log")).expect("the log");
    assert_eq!(told, "", "the impostor was told something");
    // With the right certificate the same nginx is told all: the log above would have shown it.
    for name in ["server.pem", "server.key"] {
        fs::copy(bench.path(name), bench.path("impostor").join(name)).expect("copied");
    }
    nginx.reload(&text);
    receiver.wait_for_log(REFUSED);
    let told = fs::read_to_string(nginx.folder().join("told.log")).expect("the log");
    assert!(told.contains("Bearer wb_"), "{told}");

    nginx.stop();
    bench.write("app.log", lines("line", 100));
    let mut sender = reversed.sender(port, &["app.log"]);
    wait_for_lines(bench, 100);
    assert!(sender.stop().success());
}

#[test]
fn a_certificate_for_another_name_gets_no_token() {
    impostor("the server's certificate is for another name", |reversed| {
        let folder = reversed.bench.path("impostor");
        let other = Certificates::make_with(&folder, &["web-9.example.org"], |_| {});
        // Both authorities are trusted: the name alone is wrong.
        let both = [&reversed.ca, &other.ca].map(|ca| fs::read_to_string(ca).expect("a CA"));
        fs::write(&reversed.ca, both.concat()).expect("written");
    });
}

#[test]
fn a_certificate_of_an_unknown_authority_gets_no_token() {
    impostor("the server's certificate is signed by no authority in", |reversed| {
        Certificates::make(&reversed.bench.path("impostor"));
    });
}

/// A sender moves to another address under its name; only the names' file of the machine says so.
#[test]
fn the_name_is_resolved_anew_at_each_dial() {
    if !have("unshare", "util-linux") {
        return;
    }
    let private = |command: &Command, hosts: &std::path::Path| {
        let mut inner = Command::new("unshare");
        inner.args(["--map-root-user", "--mount", "sh", "-c"]);
        inner.arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"").arg(hosts);
        inner.arg(command.get_program()).args(command.get_args());
        inner
    };
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    Certificates::make_with(&bench.path(""), &["web-1.test"], |_| {});
    let hosts = bench.write("hosts", "127.0.0.1 web-1.test\n");
    let allowed = private(&Command::new("true"), &hosts).output().expect("unshare runs");
    if !allowed.status.success() {
        return skip("no mount namespaces here");
    }
    let port = free_port();
    bench.write("app.log", lines("line", 100));
    let command = reversed.receive_command(&[&format!("test=wss://web-1.test:{port}/")]);
    let receiver =
        Process::start("receiver", private(&command, &hosts), bench.path("receiver.log"));
    let at = |address: &str| {
        let command = reversed.send_command_at(&format!("{address}:{port}"), "", &["app.log"]);
        Process::start("sender", command, bench.path("sender.log"))
    };
    let mut sender = at("127.0.0.1");
    wait_for_lines(bench, 100);
    assert!(sender.stop().success());
    // In place: the bound file stays the same.
    fs::write(&hosts, "127.0.0.2 web-1.test\n").expect("written");
    bench.append("app.log", "line 100\n");
    let mut sender = at("127.0.0.2");
    wait_for_lines(bench, 101);
    assert!(sender.stop().success());
    drop(receiver);
}

#[test]
fn a_sender_without_an_entry_is_not_dialled_until_it_has_one() {
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    let port = free_port();
    bench.write("app.log", lines("line", 100));
    let mut sender = reversed.sender(port, &["app.log"]);
    let receiver = reversed.receiver(&[&format!("web-9=wss://localhost:{port}/")]);
    receiver.wait_for_log("no valid entry has this name");
    assert!(!sender.log().contains("connected"), "{}", sender.log());
    bench.token("web-9");
    wait_for_lines(bench, 100);

    // The entry decides as a token does: revoked, it ends the connection; types are added to a living one.
    let entry = |arguments: &[&str]| {
        let mut command = waybill();
        command.args(["token", "web-9"]).args(arguments);
        command.arg("--tokens").arg(bench.path("tokens.toml"));
        run(command).ok();
    };
    entry(&["--revoke"]);
    sender.wait_for_log("the token was revoked");
    wait_until("it waits again", PATIENCE, || {
        receiver.log().matches("no valid entry has this name").count() == 2
    });
    bench.append("app.log", "line 100\n");
    entry(&["--rotate"]);
    wait_for_lines(bench, 101);
    bench.assert_lines(numbered("line", 101));
    assert!(sender.stop().success());
}

/// A half-open connection does not lock its receiver out, and a second receiver waits until the first is gone.
#[test]
fn the_same_receiver_takes_over_at_once_and_another_one_stands_by() {
    let reversed = Reversed::new();
    let bench = &reversed.bench;
    reversed.guest("standby");
    let port = free_port();
    // Long enough that what is written after the first line fills every buffer on the way.
    let tag = "long ".repeat(80);
    let text = lines(&tag, 20_000);
    let first_line = text.find('\n').expect("a line") + 1;
    bench.write("app.log", &text[..first_line]);
    let mut sender = reversed.sender(port, &["app.log", "--receipts", "receipts.jsonl"]);
    let first = reversed.receiver(&[&dial(port)]);
    // A receipt, not only a line that can be read: a process that is stopped while it holds the lock of
    // the store stops the second one, too.
    wait_until("the first receipt", PATIENCE, || {
        fs::read(bench.path("receipts.jsonl")).is_ok_and(|text| text.ends_with(b"\n"))
    });
    // As after a lost network: the connection stands, and nobody is there.
    first.freeze();
    bench.append("app.log", &text[first_line..]);
    let mut second = reversed.receiver(&[&dial(port)]);
    sender.wait_for_log("another connection under this token takes over");
    wait_for_lines(bench, 20_000);

    let command = reversed.receive_command_as("standby", &[&dial(port)]);
    let standby = Process::start("standby", command, bench.path("standby.log"));
    standby.wait_for_log("refused with HTTP status 503");
    drop(first);
    assert!(second.stop().success());
    bench.append("app.log", format!("{tag} 20000\n"));
    wait_for_lines(bench, 20_001);
    bench.assert_lines(numbered(&tag, 20_001));
    assert!(standby.log().contains("sender connected"), "{}", standby.log());
    assert!(sender.stop().success());
}
