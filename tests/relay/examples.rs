//! The documented configurations, run: with paths, ports and names of a test, otherwise as they stand.

use std::fs;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Command, Stdio};

use crate::support::documents::{prefix, wait_for_documents};
use crate::support::servers::{Elasticsearch, free_port, have, http, root, spawn_bound};
use crate::support::waybill::{Bench, Certificates, Process, waybill};

/// The example with these changes, each of which finds something to change.
fn example(name: &str, changes: &[(&str, String)]) -> String {
    let text = fs::read_to_string(root().join("docs/examples").join(name)).expect("an example");
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{name} has no {from:?}");
        text.replace(from, to)
    })
}

fn start(bench: &Bench, side: &str, file: &str) -> Process {
    let mut command = waybill();
    command.args([side, "--config"]).arg(bench.path(file));
    Process::start(side, command, bench.path(&format!("{side}.log")))
}

#[test]
fn the_documented_configurations_carry_a_line_of_each_source_that_they_show() {
    if !have("openssl", "openssl") {
        return;
    }
    let Some(node) = Elasticsearch::shared_8_17() else { return };
    let bench = Bench::new();
    let prefix = prefix("examples");
    let [receiver, intake, udp, tcp, tls] = [(); 5].map(|()| free_port());
    let at = |port: u16| format!("\"127.0.0.1:{port}\"");
    let names = ["localhost", "127.0.0.1"];
    let paths = Certificates::make_with(&bench.path(""), &names, |params| {
        // Named like its authority, openssl would take it for that.
        params.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
    });
    fs::rename(&paths.certificate, bench.path("chain.pem")).expect("renamed");
    fs::rename(&paths.key, bench.path("key.pem")).expect("renamed");
    fs::rename(bench.token("test"), bench.path("token")).expect("renamed");
    // Elasticsearch on loopback asks for none, and takes it.
    let key = bench.write("api-key", "id:key\n");
    fs::set_permissions(key, PermissionsExt::from_mode(0o600)).expect("chmod");
    let urls = "\"https://es-1.example.com:9200\", \"https://es-2.example.com:9200\"";
    let text = example(
        "receiver.toml",
        &[
            ("\"0.0.0.0:8443\"", at(receiver)),
            (urls, format!("{:?}", node.url())),
            ("\"waybill-{type}", format!("\"{prefix}-{{type}}")),
            ("\"waybill-parked\"", format!("\"{prefix}-parked\"")),
        ],
    );
    bench.write("receiver.toml", text);
    let mut receiving = start(&bench, "receive", "receiver.toml");
    receiving.wait_for_log(" listening");

    let over_tls = "# [[source]]\n# syslog_tls = \"0.0.0.0:6514\"\n# tls_cert = \"chain.pem\"\n# tls_key = \"key.pem\"";
    let folder = bench.path("").display().to_string();
    let text = example(
        "sender.toml",
        &[
            ("wss://logs.example.com/", format!("wss://localhost:{receiver}/")),
            ("# ca = ", "ca = ".to_owned()),
            ("# state_dir = \"/var/lib/waybill\"", "state_dir = \"state\"".to_owned()),
            ("/var/log/nginx/", format!("{folder}nginx/")),
            ("/run/waybill/", folder),
            ("\"127.0.0.1:8514\"", at(intake)),
            ("syslog_udp = \"127.0.0.1:5514\"", format!("syslog_udp = {}", at(udp))),
            ("syslog_tcp = \"127.0.0.1:5514\"", format!("syslog_tcp = {}", at(tcp))),
            (over_tls, over_tls.replace("# ", "").replace("\"0.0.0.0:6514\"", &at(tls))),
        ],
    );
    // Nothing is left that needs a network or a folder of this machine.
    let shown = text.lines().filter(|line| !line.starts_with('#'));
    let sources = shown.filter(|line| *line == "[[source]]").count();
    bench.write("sender.toml", text);
    bench.write("nginx/access.log", "by file\n");
    let mut sending = start(&bench, "send", "sender.toml");
    // Its sockets are bound before it connects.
    sending.wait_for_log(" connected");

    let datagram = UnixDatagram::unbound().expect("a socket");
    datagram.send_to(b"<13>app: by datagram", bench.path("nginx.sock")).expect("sent");
    let write = |mut stream: Box<dyn Write>, text: &str| {
        stream.write_all(format!("<13>app: {text}\n").as_bytes()).expect("written");
    };
    let stream = UnixStream::connect(bench.path("syslog.sock")).expect("connect");
    write(Box::new(stream), "by stream");
    let posted = http(&format!("127.0.0.1:{intake}"), "POST", "/", "text/plain", b"by http\n");
    assert_eq!(posted.expect("an answer").0, 200);
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.send_to(b"<13>app: by udp", ("127.0.0.1", udp)).expect("sent");
    write(Box::new(TcpStream::connect(("127.0.0.1", tcp)).expect("connect")), "by tcp");
    let mut command = Command::new("openssl");
    command.args(["s_client", "-quiet", "-verify_return_error", "-CAfile"]).arg(&paths.ca);
    command.args(["-connect", &format!("localhost:{tls}"), "-verify_hostname", "localhost"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut client = spawn_bound(command).expect("openssl");
    let mut input = client.stdin.take().expect("piped");
    input.write_all(b"<13>app: by tls\n").expect("written");

    let pattern = format!("{prefix}-*");
    wait_for_documents(node, &pattern, sources);
    drop(input);
    let _ = client.kill();
    let _ = client.wait();
    let documents = node.all_documents(&pattern);
    let mut messages: Vec<&str> =
        documents.values().filter_map(|document| document["message"].as_str()).collect();
    messages.sort_unstable();
    let expected = ["by datagram", "by file", "by http", "by stream", "by tcp", "by tls", "by udp"];
    assert_eq!(messages, expected);
    assert!(sending.stop().success());
    assert!(receiving.stop().success());
}
