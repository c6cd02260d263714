//! Tokens that count with a client certificate only: over the receiver's own TLS, and behind nginx, whose headers are
//! believed over a Unix socket and nowhere else.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use crate::certificates::{Authority, nginx_text};
use crate::support::servers::{Nginx, free_port, have, wait_until};
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, lines, waybill};

/// An authority, a server's certificate, and those of the senders `web-1` and `web-2`.
fn bench() -> (Bench, Authority) {
    let bench = Bench::new();
    let folder = bench.path("");
    let authority = Authority::new(&folder);
    authority.sign(&folder, "localhost", |_| {});
    authority.sign_client(&folder, "web-1", "web-1");
    authority.sign_client(&folder, "web-2", "web-2");
    (bench, authority)
}

/// The token `test`, which needs the certificate in `web-1.pem`.
fn bound_token(bench: &Bench) {
    let output = waybill()
        .args(["token", "test", "--tokens"])
        .arg(bench.path("tokens.toml"))
        .arg("--certificate")
        .arg(bench.path("web-1.pem"))
        .output()
        .expect("waybill token");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let token = bench.write("test.token", output.stdout);
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(token, private).expect("chmod");
}

fn own_tls(bench: &Bench) -> Receiver {
    own_tls_for(bench, "trusted.pem")
}

/// With TLS of its own, and with these authorities for its senders.
fn own_tls_for(bench: &Bench, client_ca: &str) -> Receiver {
    let at = |name: &str| bench.path(name);
    let paths = [
        ("--store", at("store.sqlite")),
        ("--tls-cert", at("server.pem")),
        ("--tls-key", at("server.key")),
        ("--client-ca", at(client_ca)),
    ];
    bench.receiver_with(move |command| {
        for (flag, path) in &paths {
            command.arg(flag).arg(path);
        }
    })
}

/// What a run with `--once` says and ends with; `client` names its certificate.
fn once(bench: &Bench, url: &str, client: Option<&str>) -> (Option<i32>, String) {
    let ca = bench.path("trusted.pem").display().to_string();
    let mut command = bench.send_command(url, &["app.log", "--once", "--ca", &ca]);
    if let Some(client) = client {
        command.arg("--cert").arg(bench.path(&format!("{client}.pem")));
        command.arg("--key").arg(bench.path(&format!("{client}.key")));
    }
    let output = command.output().expect("waybill send");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[track_caller]
fn assert_refused(said: (Option<i32>, String), words: &str) {
    assert_eq!(said.0, Some(1), "{}", said.1);
    assert!(said.1.contains(words), "{}", said.1);
}

const NONE: &str =
    "refused with HTTP status 403, \"this token needs its client certificate, and none was shown\"";
const ANOTHER: &str = "this token needs another client certificate than the one shown";
const UNKNOWN: &str = "the server refuses this sender's client certificate";

/// `stranger/web-1`: the right name by an authority that nobody knows.
fn strange_certificate(bench: &Bench) {
    let folder = bench.path("stranger");
    fs::create_dir(&folder).expect("a folder");
    Authority::new(&folder).sign_client(&folder, "web-1", "web-1");
}

#[test]
fn a_token_bound_to_a_certificate_is_refused_without_it() {
    let (bench, _) = bench();
    bound_token(&bench);
    bench.token("free");
    let receiver = own_tls(&bench);
    let url = format!("wss://localhost:{}/", receiver.port());
    bench.write("app.log", lines("line", 100));

    assert_refused(once(&bench, &url, None), NONE);
    assert_refused(once(&bench, &url, Some("web-2")), ANOTHER);
    strange_certificate(&bench);
    assert_refused(once(&bench, &url, Some("stranger/web-1")), UNKNOWN);
    assert!(bench.messages().is_empty());

    let (code, said) = once(&bench, &url, Some("web-1"));
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(bench.messages().len(), 100);

    // A token that asks for none works without, also where certificates are taken.
    fs::rename(bench.path("free.token"), bench.path("test.token")).expect("the other token");
    fs::remove_dir_all(bench.path("state")).expect("a fresh sender");
    let (code, said) = once(&bench, &url, None);
    assert_eq!(code, Some(0), "{said}");
}

/// A certificate is renewed on both sides without a restart, and one that is struck off ends its connection.
#[test]
fn a_renewed_certificate_is_taken_over_without_a_restart() {
    if !have("openssl", "openssl") {
        return;
    }
    let (bench, authority) = bench();
    bound_token(&bench);
    let receiver = own_tls(&bench);
    bench.write("app.log", lines("line", 100));
    let path = |name: &str| bench.path(name).display().to_string();
    let (ca, cert, key) = (path("trusted.pem"), path("web-1.pem"), path("web-1.key"));
    let arguments = ["app.log", "--ca", &ca, "--cert", &cert, "--key", &key];
    let url = format!("wss://localhost:{}/", receiver.port());
    let command = bench.send_command(&url, &arguments);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    bench.wait_for_lines(100);

    // The entry names the next certificate instead, as openssl prints its fingerprint.
    authority.sign_client(&bench.path(""), "next", "web-1");
    let output = Command::new("openssl")
        .args(["x509", "-noout", "-fingerprint", "-sha256", "-in"])
        .arg(bench.path("next.pem"))
        .output()
        .expect("openssl");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let fingerprint = text.trim().split('=').nth(1).expect("a fingerprint");
    let tokens = fs::read_to_string(bench.path("tokens.toml")).expect("the tokens");
    let changed: Vec<String> = tokens
        .lines()
        .map(|line| match line.starts_with("certificates = ") {
            true => format!("certificates = [\"{fingerprint}\"]"),
            false => line.to_owned(),
        })
        .collect();
    assert!(changed.join("\n").contains(fingerprint), "{tokens}");
    bench.write("tokens.toml", changed.join("\n"));
    sender.wait_for_log(ANOTHER);
    fs::rename(bench.path("next.key"), bench.path("web-1.key")).expect("renewed");
    fs::rename(bench.path("next.pem"), bench.path("web-1.pem")).expect("renewed");
    bench.append("app.log", lines("more", 100));
    bench.wait_for_lines(200);
    assert!(sender.stop().success());
    bench.assert_lines((0..100).flat_map(|n| [format!("line {n}"), format!("more {n}")]));
}

/// The receiver's authorities for senders are replaced without a restart.
#[test]
fn a_replaced_client_ca_is_taken_over_without_a_restart() {
    let (bench, _) = bench();
    bound_token(&bench);
    let other = bench.path("other");
    fs::create_dir(&other).expect("a folder");
    Authority::new(&other);
    fs::rename(other.join("trusted.pem"), bench.path("clients.pem")).expect("another authority");
    let receiver = own_tls_for(&bench, "clients.pem");
    bench.write("app.log", lines("line", 100));
    let path = |name: &str| bench.path(name).display().to_string();
    let (ca, cert, key) = (path("trusted.pem"), path("web-1.pem"), path("web-1.key"));
    let arguments = ["app.log", "--ca", &ca, "--cert", &cert, "--key", &key];
    let url = format!("wss://localhost:{}/", receiver.port());
    let command = bench.send_command(&url, &arguments);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    sender.wait_for_log("the server refuses this sender's client certificate");
    fs::copy(bench.path("trusted.pem"), bench.path("clients.pem")).expect("renewed");
    bench.wait_for_lines(100);
    assert!(sender.stop().success());
}

fn behind_proxy(bench: &Bench, trust: bool) -> Process {
    let mut command = waybill();
    command.arg("receive").arg("--tokens").arg(bench.path("tokens.toml"));
    command.arg("--listen").arg(format!("unix:{}", bench.path("receive.sock").display()));
    command.arg("--store").arg(bench.path("store.sqlite"));
    if trust {
        command.arg("--trust-client-headers");
    }
    let receiver =
        Process::start("receiver", command, bench.path(&format!("receiver-{trust}.log")));
    receiver.wait_for_log("listening");
    receiver
}

/// The first line of the answer to an upgrade with the bound token and a certificate in headers.
fn claim(bench: &Bench, stream: impl Read + Write, verify: &str) -> String {
    claim_for(bench, stream, verify, "waybill.v1")
}

fn claim_for(
    bench: &Bench,
    mut stream: impl Read + Write,
    verify: &str,
    subprotocol: &str,
) -> String {
    let token = fs::read_to_string(bench.path("test.token")).expect("the token");
    let pem = fs::read_to_string(bench.path("web-1.pem")).expect("the certificate");
    let escaped: String = pem.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {subprotocol}\r\nAuthorization: Bearer {}\r\n\
         X-Client-Verify: {verify}\r\nX-Client-Certificate: {escaped}\r\n\r\n",
        token.trim()
    );
    stream.write_all(request.as_bytes()).expect("a request");
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n") && stream.read(&mut byte).expect("an answer") > 0 {
        answer.push(byte[0]);
    }
    String::from_utf8_lossy(&answer).trim_end().to_owned()
}

#[test]
fn headers_about_certificates_are_believed_over_a_unix_socket_only_where_configured() {
    let (bench, _) = bench();
    bound_token(&bench);
    const REFUSED: &str = "HTTP/1.1 403 Forbidden";
    let connect = || UnixStream::connect(bench.path("receive.sock")).expect("connect");

    let mut receiver = behind_proxy(&bench, false);
    assert_eq!(claim(&bench, connect(), "SUCCESS"), REFUSED, "not configured");
    assert!(receiver.stop().success());
    let receiver = behind_proxy(&bench, true);
    for verify in ["NONE", "FAILED:certificate has expired", "success"] {
        assert_eq!(claim(&bench, connect(), verify), REFUSED, "{verify}");
    }
    const TAKEN: &str = "HTTP/1.1 101 Switching Protocols";
    assert_eq!(claim(&bench, connect(), "SUCCESS"), TAKEN);
    assert_eq!(claim_for(&bench, connect(), "NONE", "waybill.text.v1"), REFUSED);
    assert_eq!(claim_for(&bench, connect(), "SUCCESS", "waybill.text.v1"), TAKEN);
    drop(receiver);

    let receiver = bench.receiver();
    let tcp = TcpStream::connect(("127.0.0.1", receiver.port())).expect("connect");
    assert_eq!(claim(&bench, tcp, "SUCCESS"), REFUSED, "over TCP");
    let output = waybill()
        .args(["receive", "--listen", "127.0.0.1:0", "--trust-client-headers", "--tokens"])
        .arg(bench.path("tokens.toml"))
        .output()
        .expect("waybill receive");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("could forge these headers"), "{said}");
}

/// `receiver.conf` with the lines about client certificates: what nginx verified comes through, what a client claims
/// does not.
fn through_nginx(path: &Path, port: u16, with_certificates: bool) -> String {
    let mut text = nginx_text(path, port);
    if with_certificates {
        for (from, to) in [
            (
                "#ssl_client_certificate /etc/ssl/certs/waybill-clients.pem;",
                format!("ssl_client_certificate {};", path.join("trusted.pem").display()),
            ),
            ("#ssl_verify_client ", "ssl_verify_client ".to_owned()),
        ] {
            assert!(text.contains(from), "the shipped file no longer holds {from:?}");
            text = text.replace(from, &to);
        }
    }
    text
}

#[test]
fn a_certificate_that_nginx_verified_lets_its_token_in() {
    if !have("curl", "curl") {
        return;
    }
    let (bench, _) = bench();
    bound_token(&bench);
    let port = free_port();
    let folder = bench.path("");
    let Some(nginx) = Nginx::start(&through_nginx(&folder, port, true)) else { return };
    let _receiver = behind_proxy(&bench, true);
    let url = format!("wss://localhost:{port}/");
    bench.write("app.log", lines("line", 100));

    assert_refused(once(&bench, &url, None), NONE);
    assert_refused(once(&bench, &url, Some("web-2")), ANOTHER);
    strange_certificate(&bench);
    let (code, said) = once(&bench, &url, Some("stranger/web-1"));
    assert!(code == Some(1) && said.contains("SSL certificate error"), "{said}");
    // What a client claims is replaced, whether nginx asks for certificates or not.
    assert_eq!(forged(&bench, port), "403");
    nginx.reload(&through_nginx(&folder, port, false));
    wait_until("nginx asks for no certificate", PATIENCE, || {
        once(&bench, &url, Some("web-1")).1.contains(NONE)
    });
    assert_eq!(forged(&bench, port), "403");
    assert!(bench.messages().is_empty());

    nginx.reload(&through_nginx(&folder, port, true));
    wait_until("the certificate counts", PATIENCE, || {
        once(&bench, &url, Some("web-1")).0 == Some(0)
    });
    assert_eq!(bench.messages().len(), 100);
}

/// The status of an upgrade through nginx with forged headers.
fn forged(bench: &Bench, port: u16) -> String {
    let token = fs::read_to_string(bench.path("test.token")).expect("the token");
    let pem = fs::read_to_string(bench.path("web-1.pem")).expect("the certificate");
    let escaped: String = pem.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let output = Command::new("curl")
        .args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20"])
        .args(["-H", "Connection: Upgrade", "-H", "Upgrade: websocket"])
        .args(["-H", "Sec-WebSocket-Version: 13", "-H", "Sec-WebSocket-Protocol: waybill.v1"])
        .args(["-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="])
        .args(["-H", &format!("Authorization: Bearer {}", token.trim())])
        .args(["-H", "X-Client-Verify: SUCCESS"])
        .args(["-H", &format!("X-Client-Certificate: {escaped}")])
        .arg(format!("https://localhost:{port}/"))
        .output()
        .expect("curl");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
