//! Syslog over UDP, TCP and TLS: what `logger`, syslog-ng and rsyslog send arrives parsed, and what is lost is counted.

use std::fs;
use std::io::{self, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::metrics::Scrape;
use super::support::servers::{SyslogNg, free_port, quick, skip, unpacked, wait_until};
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, Receiver, lines, waybill};

/// A sender's listeners, each on a port of its own.
struct Ports {
    udp: u16,
    tcp: u16,
    tls: u16,
}

impl Ports {
    fn new() -> Ports {
        Ports { udp: free_port(), tcp: free_port(), tls: free_port() }
    }

    /// `waybill send` with all three.
    fn sender(&self, bench: &Bench, receiver: &Receiver, certificates: &Certificates) -> Process {
        let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let sender = bench.sender(
            receiver,
            &[
                "--type=syslog",
                &format!("--syslog-udp=127.0.0.1:{}", self.udp),
                &format!("--syslog-tcp=127.0.0.1:{}", self.tcp),
                &format!("--syslog-tls=127.0.0.1:{}", self.tls),
                &format!("--syslog-tls-cert={}", path(&certificates.certificate)),
                &format!("--syslog-tls-key={}", path(&certificates.key)),
            ],
        );
        wait_until("the sender listens", PATIENCE, || {
            sender.log().matches("listening for").count() == 3
        });
        sender
    }
}

/// A certificate with a name of its own: under that of its authority OpenSSL takes it for one that signed itself.
fn certificates(bench: &Bench) -> Certificates {
    Certificates::make_with(&bench.path(""), &["localhost", "127.0.0.1"], |params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
    })
}

/// `waybill send --config` with this `[[source]]`.
pub fn sender_of(bench: &Bench, receiver: &Receiver, settings: &str, source: &str) -> Process {
    let text = format!(
        "to = {:?}\ntoken_file = 'test.token'\nstate_dir = 'state'\n{settings}\n{source}",
        receiver.url()
    );
    let config = bench.write("sender.toml", text);
    let log = bench.path("sender.log");
    let mut command = waybill();
    command.args(["send", "--config"]).arg(config);
    let sender = Process::start("sender", command, log);
    let sources = source.matches("[[source]]").count();
    wait_until("the sender listens", PATIENCE, || {
        sender.log().matches("listening for").count() == sources
    });
    sender
}

#[track_caller]
fn wait_for_stored(bench: &Bench, count: usize) -> Vec<Value> {
    let mut stored = Vec::new();
    wait_until(&format!("{count} lines are stored"), PATIENCE, || {
        stored = bench.stored();
        stored.len() >= count
    });
    assert_eq!(stored.len(), count);
    stored
}

/// Messages by the name of the program that is said to have written them.
fn by_program(stored: &[Value], program: &str) -> Vec<String> {
    let of = |hit: &&Value| hit["process"]["name"] == program;
    let mut messages: Vec<String> = stored
        .iter()
        .filter(of)
        .map(|hit| hit["message"].as_str().expect("a message").to_owned())
        .collect();
    messages.sort();
    messages
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The sum of a number in the log, such as `lost=7`.
fn sum_of(log: &str, field: &str) -> u64 {
    let field = format!(" {field}=");
    log.split(&field)
        .skip(1)
        .map(|rest| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u64>().expect("a number")
        })
        .sum()
}

// --- logger ----------------------------------------------------------------------------------------------------------

#[test]
fn logger_by_udp_tcp_and_octet_count_in_both_formats() {
    if quick() || Command::new("logger").arg("--version").output().is_err() {
        return skip("logger is missing; install it: apt-get install bsdutils");
    }
    let bench = Bench::new();
    let receiver = bench.receiver();
    let ports = Ports::new();
    let _sender = ports.sender(&bench, &receiver, &certificates(&bench));
    let logger = |tag: &str, port: u16, arguments: &[&str]| {
        let status = Command::new("logger")
            .args(["-n", "127.0.0.1", "-P", &port.to_string(), "-t", tag, "-p", "local3.warning"])
            .args(["--id=4711"])
            .args(arguments)
            .arg(format!("from {tag}, with ünïcode"))
            .status();
        assert!(status.expect("logger").success());
    };
    logger("udp5424", ports.udp, &["-d", "--rfc5424", "--msgid", "ID47"]);
    logger("udp3164", ports.udp, &["-d", "--rfc3164"]);
    logger("tcp5424", ports.tcp, &["-T", "--rfc5424", "--msgid", "ID47"]);
    logger("tcp3164", ports.tcp, &["-T", "--rfc3164"]);
    logger("count5424", ports.tcp, &["-T", "--octet-count", "--rfc5424", "--msgid", "ID47"]);
    logger("count3164", ports.tcp, &["-T", "--octet-count", "--rfc3164"]);
    let stored = wait_for_stored(&bench, 6);
    for tag in ["udp5424", "udp3164", "tcp5424", "tcp3164", "count5424", "count3164"] {
        assert_eq!(by_program(&stored, tag), [format!("from {tag}, with ünïcode")]);
        let hit = stored.iter().find(|hit| hit["process"]["name"] == tag).expect("found");
        let syslog = &hit["log"]["syslog"];
        assert_eq!(syslog["facility"]["name"], "local3", "{hit}");
        assert_eq!(syslog["severity"]["name"], "warning", "{hit}");
        assert_eq!(hit["process"]["pid"], 4711, "{hit}");
        assert_eq!(syslog["hostname"], hit["host"]["name"], "{hit}");
        assert_eq!(hit["waybill"]["type"], "syslog");
        if tag.ends_with("5424") {
            assert_eq!(syslog["version"], "1", "{hit}");
            assert_eq!(syslog["msgid"], "ID47", "{hit}");
            assert!(syslog["structured_data"]["timeQuality"].is_object(), "{hit}");
        }
    }
}

// --- syslog-ng -------------------------------------------------------------------------------------------------------

/// Destinations of syslog-ng, still without their closing parenthesis, by the program's name that marks their lines.
pub fn syslog_ng_configuration(destinations: &[(&str, String)]) -> String {
    let mut text = "@version: 3.35\noptions { time-reopen(1); stats-freq(0); };\n\
        source s { file(\"@FOLDER@/in.log\" flags(no-parse) follow-freq(0.1)); };\n"
        .to_owned();
    for (mark, destination) in destinations {
        text += &format!(
            "log {{ source(s); rewrite {{ set(\"{mark}\" value(\"PROGRAM\")); }}; \
             destination {{ {destination} persist-name(\"{mark}\")); }}; flags(flow-control); }};\n"
        );
    }
    text
}

#[test]
fn syslog_ng_by_network_and_syslog_over_udp_tcp_and_tls() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let ports = Ports::new();
    let certificates = certificates(&bench);
    let mut sender = ports.sender(&bench, &receiver, &certificates);
    let tls = format!(
        "transport(\"tls\") port({}) tls(ca-file(\"{}\") peer-verify(required-trusted))",
        ports.tls,
        certificates.ca.display()
    );
    let (udp, tcp) = (ports.udp, ports.tcp);
    let destinations = [
        ("network-udp", format!("network(\"localhost\" transport(\"udp\") port({udp})")),
        ("network-tcp", format!("network(\"localhost\" transport(\"tcp\") port({tcp})")),
        ("network-tls", format!("network(\"localhost\" {tls}")),
        ("syslog-udp", format!("syslog(\"localhost\" transport(\"udp\") port({udp})")),
        ("syslog-tcp", format!("syslog(\"localhost\" transport(\"tcp\") port({tcp})")),
        ("syslog-tls", format!("syslog(\"localhost\" {tls}")),
    ];
    let Some(syslog_ng) = SyslogNg::start(&syslog_ng_configuration(&destinations)) else { return };
    let text = lines("line of syslog-ng", 500);
    fs::write(syslog_ng.folder().join("in.log"), &text).expect("write");
    let stored = wait_for_stored(&bench, 6 * 500);
    for (mark, _) in &destinations {
        assert_eq!(by_program(&stored, mark), sorted(&text), "{mark}");
    }
    for hit in &stored {
        let is_5424 = hit["process"]["name"].as_str().expect("a name").starts_with("syslog-");
        let version = hit["log"]["syslog"].get("version");
        assert_eq!(version, is_5424.then_some(&json!("1")), "{hit}");
        assert_eq!(hit["log"]["syslog"]["hostname"], hit["host"]["name"], "{hit}");
    }
    assert!(sender.stop().success());
    assert_eq!(sum_of(&sender.log(), "lost"), 0, "{}", sender.log());
}

/// An orderly stop tells syslog-ng to end its connection, so that it sends the rest to the next one.
#[test]
fn syslog_ng_loses_nothing_over_orderly_restarts_in_a_stream_of_lines() {
    const LINES: usize = 30_000;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let source = format!("[[source]]\nsyslog_tcp = '127.0.0.1:{port}'\nformat = 'syslog'\n");
    let mut sender = sender_of(&bench, &receiver, "", &source);
    let network = format!("network(\"127.0.0.1\" transport(\"tcp\") port({port})");
    let Some(syslog_ng) = SyslogNg::start(&syslog_ng_configuration(&[("tcp", network)])) else {
        return;
    };
    let input = syslog_ng.folder().join("in.log");
    let writer = std::thread::spawn(move || {
        let mut file = fs::File::options().create(true).append(true).open(input).expect("open");
        for number in 0..LINES {
            file.write_all(format!("line {number}\n").as_bytes()).expect("write");
            if number % 100 == 0 {
                // Spreads the lines over the restarts; nothing depends on how.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    });
    for _ in 0..3 {
        let before = bench.stored().len();
        wait_until("some lines more are stored", PATIENCE, || {
            let stored = bench.stored().len();
            stored > before || stored == LINES
        });
        assert!(sender.stop().success());
        sender = sender_of(&bench, &receiver, "", &source);
    }
    writer.join().expect("written");
    wait_for_stored(&bench, LINES);
    assert_eq!(bench.messages(), sorted(&lines("line", LINES)));
}

/// kill -9 takes what the kernel had acknowledged and we had not synced; all else comes, once.
#[test]
fn syslog_ng_dials_again_after_a_kill_and_nothing_stored_is_doubled() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let source = format!("[[source]]\nsyslog_tcp = '127.0.0.1:{port}'\nformat = 'syslog'\n");
    let mut sender = sender_of(&bench, &receiver, "", &source);
    let syslog = format!("syslog(\"127.0.0.1\" transport(\"tcp\") port({port})");
    let Some(syslog_ng) = SyslogNg::start(&syslog_ng_configuration(&[("tcp", syslog)])) else {
        return;
    };
    let input = syslog_ng.folder().join("in.log");
    let append = |tag: &str| {
        let file = fs::File::options().create(true).append(true).open(&input);
        file.expect("open").write_all(lines(tag, 1000).as_bytes()).expect("write");
    };
    append("before");
    wait_for_stored(&bench, 1000);
    sender.kill_hard();
    // The kernel closed the connection, which syslog-ng sees before it has lines for it.
    wait_until("syslog-ng to see the end", PATIENCE, || syslog_ng.log().contains("EOF occurred"));
    append("away");
    sender = sender_of(&bench, &receiver, "", &source);
    wait_for_stored(&bench, 2000);
    append("after");
    wait_for_stored(&bench, 3000);
    let all = [lines("before", 1000), lines("away", 1000), lines("after", 1000)].concat();
    assert_eq!(bench.messages(), sorted(&all));
    assert!(sender.stop().success());
}

// --- rsyslog ---------------------------------------------------------------------------------------------------------

/// rsyslog's daemon with its folders of modules and libraries: the one on the PATH, else the one that `scripts/test`
/// unpacked beside syslog-ng.
pub fn rsyslogd(configuration: &Path, work: &Path) -> Option<Command> {
    let root = unpacked("rsyslog", "usr/sbin/rsyslogd")?;
    let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
    let mut command = Command::new(root.join("usr/sbin/rsyslogd"));
    command
        .env("LD_LIBRARY_PATH", &libraries)
        .arg("-n")
        .arg("-i")
        .arg(work.join("rsyslogd.pid"))
        .arg("-f")
        .arg(configuration)
        .arg(format!("-M{}", libraries.join("rsyslog").display()));
    Some(command)
}

#[test]
fn rsyslog_by_omfwd_over_udp_tcp_and_octet_count() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let ports = Ports::new();
    let mut sender = ports.sender(&bench, &receiver, &certificates(&bench));
    let folder = bench.path("");
    let mut text = format!(
        "global(workDirectory=\"{0}\")\nmodule(load=\"imfile\" mode=\"polling\" pollingInterval=\"1\")\n\
         input(type=\"imfile\" file=\"{0}/in.log\" tag=\"source:\" facility=\"local5\" severity=\"notice\")\n",
        folder.display()
    );
    let mut marks = Vec::new();
    for (protocol, framing, port) in [
        ("udp", "traditional", ports.udp),
        ("tcp", "traditional", ports.tcp),
        ("tcp", "octet-counted", ports.tcp),
    ] {
        for format in [
            "RSYSLOG_ForwardFormat",
            "RSYSLOG_SyslogProtocol23Format",
            "RSYSLOG_TraditionalForwardFormat",
        ] {
            let mark = format!("{protocol}-{framing}-{}", marks.len());
            // The formats of rsyslog itself, with a mark for the program.
            text += &match format {
                "RSYSLOG_SyslogProtocol23Format" => format!(
                    "template(name=\"{mark}\" type=\"string\" string=\"<%PRI%>1 %TIMESTAMP:::date-rfc3339% %HOSTNAME% \
                     {mark} %PROCID% %MSGID% %STRUCTURED-DATA% %msg%\\n\")\n"
                ),
                "RSYSLOG_ForwardFormat" => format!(
                    "template(name=\"{mark}\" type=\"string\" string=\"<%PRI%>%TIMESTAMP:::date-rfc3339% %HOSTNAME% \
                     {mark}:%msg:::sp-if-no-1st-sp%%msg%\")\n"
                ),
                _ => format!(
                    "template(name=\"{mark}\" type=\"string\" string=\"<%PRI%>%TIMESTAMP% %HOSTNAME% \
                     {mark}:%msg:::sp-if-no-1st-sp%%msg%\")\n"
                ),
            };
            text += &format!(
                "action(type=\"omfwd\" target=\"127.0.0.1\" port=\"{port}\" protocol=\"{protocol}\" \
                 TCP_Framing=\"{framing}\" template=\"{mark}\" queue.type=\"LinkedList\")\n"
            );
            marks.push(mark);
        }
    }
    let configuration = bench.write("rsyslog.conf", text);
    let Some(command) = rsyslogd(&configuration, &folder) else { return };
    let rsyslog = Process::start("rsyslogd", command, bench.path("rsyslogd.log"));
    let input = lines("line of rsyslog", 300);
    bench.append("in.log", &input);
    let stored = wait_for_stored(&bench, marks.len() * 300);
    for mark in &marks {
        assert_eq!(by_program(&stored, mark), sorted(&input), "{mark}");
    }
    for hit in &stored {
        let syslog = &hit["log"]["syslog"];
        assert_eq!(syslog["facility"]["name"], "local5", "{hit}");
        assert_eq!(syslog["severity"]["name"], "notice", "{hit}");
        assert!(syslog["hostname"].is_string(), "{hit}");
    }
    drop(rsyslog);
    assert!(sender.stop().success());
}

// --- Losses ----------------------------------------------------------------------------------------------------------

/// A stopped process takes nothing; what then finds the small receive buffer full is dropped by the kernel.
#[test]
fn what_the_kernel_drops_of_udp_is_counted_to_the_last_datagram() {
    const SENT: u64 = 20_000;
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let source = format!("[[source]]\nsyslog_udp = '127.0.0.1:{port}'\nreceive_buffer = '64KiB'\n");
    let metrics = free_port();
    let settings = format!("metrics = '127.0.0.1:{metrics}'\n");
    let mut sender = sender_of(&bench, &receiver, &settings, &source);
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client.connect(("127.0.0.1", port)).expect("connect");
    sender.freeze();
    for number in 0..SENT {
        let line = format!("{:x<200}", format!("<13>Nov 21 08:00:00 host app: line {number} "));
        assert_eq!(client.send(line.as_bytes()).expect("loopback takes all"), line.len());
    }
    sender.signal("-CONT");
    sender.wait_for_log("the kernel dropped datagrams");
    let lost = sum_of(&sender.log(), "lost");
    // docs/sources.md has 102; what the kernel charges for its bookkeeping varies.
    assert!((51..=204).contains(&(SENT - lost)), "{lost} lost of {SENT}");
    let stored = wait_for_stored(&bench, usize::try_from(SENT - lost).expect("a few"));
    // The kernel keeps what came first.
    let first =
        |hit: &Value| hit["message"].as_str().is_some_and(|text| text.starts_with("line 0 "));
    assert!(stored.iter().any(first));
    let sample = format!("waybill_dropped_datagrams_total{{source=\"udp:127.0.0.1:{port}\"}}");
    assert_eq!(Scrape::of(metrics).get(&sample), lost as f64);
    assert!(sender.stop().success());
    assert_eq!(sum_of(&sender.log(), "lost"), lost, "a loss is reported once");
}

/// While the receiver is away and the spool is full, TCP holds its peers back and UDP's losses are counted.
#[test]
fn a_full_spool_holds_tcp_back_and_counts_what_udp_loses() {
    const LINES: usize = 12_000;
    const DATAGRAMS: u64 = 5_000;
    let bench = Bench::new();
    let mut receiver = bench.receiver();
    let (tcp, udp) = (free_port(), free_port());
    let source = format!(
        "[[source]]\nsyslog_tcp = '127.0.0.1:{tcp}'\nformat = 'raw'\n\
         [[source]]\nsyslog_udp = '127.0.0.1:{udp}'\nformat = 'raw'\nreceive_buffer = '64KiB'\n"
    );
    receiver.stop();
    let mut sender = sender_of(&bench, &receiver, "spool_bytes_max = '4MiB'", &source);
    // Far more than the spool and the buffers of the kernel hold.
    let padding = "x".repeat(2000);
    let text: String = (0..LINES).map(|number| format!("line {number} {padding}\n")).collect();
    let mut peer = TcpStream::connect(("127.0.0.1", tcp)).expect("connect");
    peer.set_write_timeout(Some(Duration::from_millis(500))).expect("timeout");
    let mut written = 0;
    let blocked = loop {
        match peer.write(&text.as_bytes()[written..]) {
            Ok(0) => break false,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(blocked, "{written} of {} bytes were taken", text.len());
    sender.wait_for_log("spool is full");
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client.connect(("127.0.0.1", udp)).expect("connect");
    for number in 0..DATAGRAMS {
        client.send(format!("datagram {number}").as_bytes()).expect("send");
    }
    // Reported while the spool is still full.
    sender.wait_for_log("the kernel dropped datagrams");
    receiver.start();
    peer.set_write_timeout(None).expect("no timeout");
    peer.write_all(&text.as_bytes()[written..]).expect("room again");
    drop(peer);
    let lost = sum_of(&sender.log(), "lost");
    let taken = usize::try_from(DATAGRAMS - lost).expect("a few");
    let stored = wait_for_stored(&bench, LINES + taken);
    let datagrams =
        |hit: &&Value| hit["message"].as_str().is_some_and(|text| text.starts_with("datagram "));
    assert_eq!(stored.iter().filter(datagrams).count(), taken);
    assert!(sender.stop().success());
    assert_eq!(sum_of(&sender.log(), "lost"), lost);
    assert_eq!(sum_of(&sender.log(), "lost_datagrams"), lost, "in the totals too");
}

// --- Bad peers and bad places ----------------------------------------------------------------------------------------

#[test]
fn a_port_in_use_ends_the_sender_with_a_message_that_helps() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let (tcp, udp) = (tcp.local_addr().map(|at| (at, tcp)), udp.local_addr().map(|at| (at, udp)));
    for (flag, address) in [
        ("--syslog-tcp", tcp.as_ref().expect("address").0),
        ("--syslog-udp", udp.as_ref().expect("address").0),
    ] {
        let address = address.to_string();
        let output =
            bench.send_command(&receiver.url(), &[flag, &address]).output().expect("waybill send");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("{address} is in use: stop what listens there")), "{said}");
    }
}

#[test]
fn a_lying_octet_count_and_an_endless_line_leave_other_peers_alone() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let port = free_port();
    let source = format!("[[source]]\nsyslog_tcp = '127.0.0.1:{port}'\n");
    let mut sender = sender_of(&bench, &receiver, "", &source);
    let connect = || TcpStream::connect(("127.0.0.1", port)).expect("connect");
    let mut liar = connect();
    liar.write_all(b"21 <13>1 - - app - - - a9999999 <13>1 - - app - - - b").expect("write");
    sender.wait_for_log("octet count 9999999 is over the limit");
    let mut endless = connect();
    // Twice the longest record, and never a newline.
    endless.write_all(&vec![b'x'; 2 << 20]).expect("write");
    let mut honest = connect();
    honest.write_all(b"<13>1 - - app - - - honest\n").expect("write");
    wait_for_stored(&bench, 4);
    // Only its end tells that nothing more comes.
    drop(endless);
    let stored = wait_for_stored(&bench, 5);
    assert_eq!(by_program(&stored, "app"), ["a", "b", "honest"]);
    let longest = stored.iter().filter_map(|hit| hit["message"].as_str()).map(str::len).max();
    assert_eq!(longest, Some(1 << 20));
    drop((liar, honest));
    assert!(sender.stop().success());
}

#[test]
fn a_peer_without_tls_is_told_of_in_the_log_and_others_go_on() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let ports = Ports::new();
    let certificates = certificates(&bench);
    let sender = ports.sender(&bench, &receiver, &certificates);
    let mut plain = TcpStream::connect(("127.0.0.1", ports.tls)).expect("connect");
    plain.write_all(b"<13>1 - - app - - - in the clear\n").expect("write");
    sender.wait_for_log("let the peer speak TLS");
    let mut client = Command::new("openssl")
        .args(["s_client", "-quiet", "-verify_return_error", "-CAfile"])
        .arg(&certificates.ca)
        .args(["-connect", &format!("localhost:{}", ports.tls), "-verify_hostname", "localhost"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn();
    let Ok(client) = &mut client else {
        return skip("openssl is missing; install it: apt-get install openssl");
    };
    let mut input = client.stdin.take().expect("piped");
    input.write_all(b"<13>1 - - app - - - enciphered\n").expect("write");
    let stored = wait_for_stored(&bench, 1);
    assert_eq!(stored[0]["message"], "enciphered");
    drop(input);
    let _ = client.kill();
    let _ = client.wait();
}
