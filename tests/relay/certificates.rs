//! TLS: a certificate that is not right is named with its remedy, and costs no line.

use std::fs;
use std::path::Path;

use crate::support::servers::{root, wait_until};
use crate::support::store::{assert_lines, assert_slow_retries, wait_for_lines};
use crate::support::waybill::{Bench, Certificates, PATIENCE, Process, Receiver, lines, waybill};

/// An authority that outlives the certificates it signs.
pub struct Authority {
    params: rcgen::CertificateParams,
    key: rcgen::KeyPair,
}

impl Authority {
    /// Writes `trusted.pem`.
    pub fn new(folder: &Path) -> Authority {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("names");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        fs::write(folder.join("trusted.pem"), params.self_signed(&key).expect("a CA").pem())
            .expect("written");
        Authority { params, key }
    }

    /// Replaces `server.pem` and `server.key`.
    pub fn sign(
        &self,
        folder: &Path,
        name: &str,
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) {
        self.sign_as(folder, "server", name, change);
    }

    /// Replaces `FILE.pem` and `FILE.key`, for a sender of this name.
    pub fn sign_client(&self, folder: &Path, file: &str, name: &str) {
        self.sign_as(folder, file, name, |params| {
            // OpenSSL takes a certificate with its issuer's name for a self-signed one.
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
        });
    }

    fn sign_as(
        &self,
        folder: &Path,
        file: &str,
        name: &str,
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) {
        let issuer = rcgen::Issuer::from_params(&self.params, &self.key);
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("names");
        change(&mut params);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        let keyed = folder.join(format!("{file}.key"));
        fs::write(folder.join(format!("{file}.pem")), certificate.pem()).expect("written");
        fs::write(&keyed, key.serialize_pem()).expect("written");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&keyed, private).expect("chmod");
    }
}

fn receiver(bench: &Bench) -> Receiver {
    let paths = ["store.sqlite", "server.pem", "server.key"].map(|name| bench.path(name));
    bench.receiver_with(move |command| {
        command.arg("--store").arg(&paths[0]);
        command.arg("--tls-cert").arg(&paths[1]).arg("--tls-key").arg(&paths[2]);
    })
}

fn sender(bench: &Bench, port: u16) -> Process {
    let url = format!("wss://localhost:{port}/");
    let ca = bench.path("trusted.pem").display().to_string();
    let command = bench.send_command(&url, &["app.log", "--ca", &ca]);
    Process::start("sender", command, bench.path("sender.log"))
}

/// The sender says what is wrong, keeps trying slowly, and sends everything once the certificate is right.
fn refused(break_it: impl FnOnce(&Authority, &Path), said: &[&str]) {
    let bench = Bench::new();
    let folder = bench.path("");
    let authority = Authority::new(&folder);
    break_it(&authority, &folder);
    let mut receiver = receiver(&bench);
    bench.write("app.log", lines("line", 1_000));
    let mut sender = sender(&bench, receiver.port());
    for text in said {
        sender.wait_for_log(text);
    }
    assert_slow_retries(&sender.log(), said[0]);

    authority.sign(&folder, "localhost", |_| {});
    receiver.restart();
    wait_for_lines(&bench, 1_000);
    assert_lines(&bench, "line", 1_000);
    assert!(sender.stop().success());
}

#[test]
fn an_expired_certificate_is_named_and_nothing_is_lost() {
    refused(
        |authority, folder| {
            authority.sign(folder, "localhost", |params| {
                params.not_before = rcgen::date_time_ymd(2020, 1, 1);
                params.not_after = rcgen::date_time_ymd(2021, 1, 1);
            });
        },
        &["the server's certificate has expired", "renew it"],
    );
}

#[test]
fn a_certificate_for_another_name_is_named_and_nothing_is_lost() {
    refused(
        |authority, folder| authority.sign(folder, "logs.example.org", |_| {}),
        &["the server's certificate is for another name", "logs.example.org"],
    );
}

#[test]
fn a_certificate_of_an_unknown_authority_is_named_and_nothing_is_lost() {
    refused(
        |_, folder| {
            Certificates::make(folder);
        },
        &["the server's certificate is signed by no authority in", "trusted.pem"],
    );
}

#[test]
fn a_certificate_that_is_wrong_ends_once_at_once() {
    let bench = Bench::new();
    let authority = Authority::new(&bench.path(""));
    authority.sign(&bench.path(""), "logs.example.org", |_| {});
    let receiver = receiver(&bench);
    bench.write("app.log", "a line\n");
    let url = format!("wss://localhost:{}/", receiver.port());
    let ca = bench.path("trusted.pem").display().to_string();
    let output = bench
        .send_command(&url, &["app.log", "--ca", &ca, "--once"])
        .output()
        .expect("waybill send");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the server's certificate is for another name"), "{said}");
}

/// `--once` with an authority of its own: whether it gets in.
fn gets_in(bench: &Bench, receiver: &Receiver, ca: &Path, line: &str) -> bool {
    let name = format!("{line}.log");
    bench.write(&name, format!("{line}\n"));
    let url = format!("wss://localhost:{}/", receiver.port());
    let mut command = waybill();
    command.arg("send").arg(bench.path(&name)).args(["--once", "--to", &url, "--token-file"]);
    command.arg(bench.path("test.token")).arg("--ca").arg(ca);
    command.arg("--state-dir").arg(bench.path(&format!("{line}.state")));
    command.output().expect("waybill send").status.success()
}

#[test]
fn a_replaced_certificate_is_shown_to_new_connections_and_drops_none() {
    let bench = Bench::new();
    let folder = bench.path("");
    let authority = Authority::new(&folder);
    authority.sign(&folder, "localhost", |_| {});
    let receiver = receiver(&bench);
    bench.write("app.log", lines("line", 10));
    let mut sender = sender(&bench, receiver.port());
    wait_for_lines(&bench, 10);

    // Another authority's: what it is shown tells a new connection apart from the old one.
    let other = bench.path("other");
    fs::create_dir(&other).expect("a folder");
    let others = Authority::new(&other);
    assert!(!gets_in(&bench, &receiver, &other.join("trusted.pem"), "early"));
    others.sign(&folder, "localhost", |_| {});
    wait_until("it is taken over", PATIENCE, || receiver.log().contains("certificate taken over"));
    assert!(gets_in(&bench, &receiver, &other.join("trusted.pem"), "new"));

    // Half of a pair, and rubbish: refused, and the one before is served on.
    let refused = || receiver.log().matches("the certificate known before is served on").count();
    let pair = ["server.pem", "server.key"].map(|name| fs::read(bench.path(name)).expect("read"));
    for (name, text) in [
        ("server.key", rcgen::KeyPair::generate().expect("a key").serialize_pem()),
        ("server.pem", "no certificate".to_owned()),
    ] {
        let before = refused();
        bench.write(name, text);
        wait_until("the broken pair is refused", PATIENCE, || refused() > before);
    }
    assert!(receiver.log().contains("does not belong to certificate"), "{}", receiver.log());
    assert!(gets_in(&bench, &receiver, &other.join("trusted.pem"), "still"));

    // The old connection has lived through all of it.
    bench.append("app.log", "line 10\n");
    wait_for_lines(&bench, 13);
    assert_eq!(sender.log().matches(" connected").count(), 1, "{}", sender.log());
    bench.write("server.pem", &pair[0]);
    bench.write("server.key", &pair[1]);
    assert!(sender.stop().success());
}

#[test]
fn a_replaced_ca_is_trusted_without_a_restart() {
    let bench = Bench::new();
    let folder = bench.path("");
    Authority::new(&folder).sign(&folder, "localhost", |_| {});
    let mut receiver = receiver(&bench);
    bench.write("app.log", lines("line", 10));
    let mut sender = sender(&bench, receiver.port());
    wait_for_lines(&bench, 10);
    let other = bench.path("other");
    fs::create_dir(&other).expect("a folder");
    Authority::new(&other).sign(&folder, "localhost", |_| {});
    receiver.restart();
    sender.wait_for_log("the server's certificate is signed by no authority in");
    // A broken file is named, and trusts nobody new.
    bench.write("trusted.pem", "rubbish");
    sender.wait_for_log("the TLS files known before are used on");
    fs::copy(other.join("trusted.pem"), bench.path("trusted.pem")).expect("copy");
    sender.wait_for_log("TLS files taken over");
    bench.append("app.log", "line 10\n");
    wait_for_lines(&bench, 11);
    assert_lines(&bench, "line", 11);
    assert!(sender.stop().success());
}

/// The shipped configuration with the paths of this test.
pub fn nginx_text(folder: &Path, port: u16) -> String {
    let mut text =
        fs::read_to_string(root().join("nginx/receiver.conf")).expect("the shipped file");
    let at = |name: &str| folder.join(name).display().to_string();
    for (from, to) in [
        ("/etc/ssl/certs/logs.example.org.pem", at("server.pem")),
        ("/etc/ssl/private/logs.example.org.key", at("server.key")),
        ("listen 443 ssl;", format!("listen 127.0.0.1:{port} ssl;")),
        ("    listen [::]:443 ssl;\n", String::new()),
        ("unix:/run/waybill/receive.sock:", format!("unix:{}:", at("receive.sock"))),
    ] {
        assert!(text.contains(from), "the shipped file no longer holds {from:?}");
        text = text.replace(from, &to);
    }
    format!("events {{}}\nhttp {{\n{text}}}\n")
}
