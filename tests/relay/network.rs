//! Networks as they are: lossy, slow, half-open, renumbered, behind a proxy. Nothing is lost, and nothing needs a
//! restart.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use waybill::protocol::DEAD_AFTER;

use crate::support::dns::{Answer, Dns};
use crate::support::network::{FAR, NEAR, Wire};
use crate::support::servers::{have, wait_until};
use crate::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, numbered, waybill};

/// On the far host, where nobody else has a port.
const PORT: u16 = 8443;

const NAME: &str = "logs.example.test";

/// A receiver with TLS on the far host.
fn receiver(bench: &Bench, wire: &Wire, listen: &str) -> Process {
    bench.token("test");
    certificates(bench);
    receiver_again(bench, wire, listen)
}

/// One more with the same token, certificate and store.
fn receiver_again(bench: &Bench, wire: &Wire, listen: &str) -> Process {
    let mut command = waybill();
    command.args(["receive", "--listen", &format!("{listen}:{PORT}"), "--tokens"]);
    command.arg(bench.path("tokens.toml")).arg("--store").arg(bench.path("store.sqlite"));
    command.arg("--tls-cert").arg(bench.path("server.pem"));
    command.arg("--tls-key").arg(bench.path("server.key"));
    let receiver = Process::start("receiver", wire.far(&command), bench.path("receiver.log"));
    receiver.wait_for_log("listening");
    receiver
}

fn certificates(bench: &Bench) {
    Certificates::make_with(&bench.path(""), &[NAME, FAR, "127.0.0.1"], |_| {});
}

fn send(bench: &Bench, to: &str, arguments: &[&str]) -> Command {
    let ca: PathBuf = bench.path("ca.pem");
    let mut command = bench.send_command(&format!("wss://{to}/"), arguments);
    command.arg("--ca").arg(ca);
    command
}

/// Silence is noticed by the pings, and what follows is a matter of seconds: without them, TCP itself would take a quarter
/// of an hour.
#[track_caller]
fn assert_within_the_bound(since: Instant) {
    const SLACK: Duration = Duration::from_secs(30);
    let took = since.elapsed();
    assert!(took < DEAD_AFTER + SLACK, "{took:?}");
}

#[test]
fn one_percent_loss_and_a_tenth_of_a_second_each_way() {
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let mut receiver = receiver(&bench, &wire, "127.0.0.1");
    wire.delay(PORT + 1, PORT, Duration::from_millis(100));
    wire.lose_one_percent();
    bench.write("app.log", lines("first", 50_000));
    let command = send(&bench, &format!("{FAR}:{}", PORT + 1), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(1);
    bench.append("app.log", lines("second", 50_000));
    bench.wait_for_lines(60_000);
    sender.kill_hard();
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(100_000);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 50_000).chain(numbered("second", 50_000)));
    assert!(wire.lost() > 0, "the wire lost packets");
    assert!(receiver.stop().success());
}

/// The wire is dead and nobody says so: both sides notice by the pings, within 45 seconds of
/// silence, and the sender goes on once the wire is mended: a dial into the dead wire ends after 20 s, and the pause
/// behind it is 15 s at most.
#[test]
fn a_half_open_connection_is_noticed_by_both_sides() {
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let receiver = receiver(&bench, &wire, FAR);
    bench.write("app.log", lines("before", 100));
    let command = send(&bench, &format!("{FAR}:{PORT}"), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(100);
    wire.cut();
    let cut = Instant::now();
    bench.append("app.log", lines("meanwhile", 100));
    sender.wait_for_log("the receiver was silent for too long");
    receiver.wait_for_log("connection dead");
    assert_within_the_bound(cut);
    wire.mend();
    let mended = Instant::now();
    bench.append("app.log", lines("after", 100));
    bench.wait_for_lines(300);
    assert_within_the_bound(mended);
    assert!(sender.stop().success());
    let all = numbered("before", 100).chain(numbered("meanwhile", 100));
    bench.assert_lines(all.chain(numbered("after", 100)));
}

/// Each side pings every 20 s, give or take a tenth, and answers the other's pings; the wire carries nothing else.
#[test]
fn an_idle_connection_costs_a_ping_from_each_side() {
    /// What is promised, less its tenth.
    const INTERVAL_LEAST: Duration = Duration::from_secs(18);
    const IDLE: Duration = Duration::from_secs(40);
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let receiver = receiver(&bench, &wire, FAR);
    bench.write("app.log", "line 0\n");
    let arguments = ["app.log", "--receipts", "receipts.jsonl"];
    let command = send(&bench, &format!("{FAR}:{PORT}"), &arguments);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    wait_until("the receipt", PATIENCE, || bench.size_of("receipts.jsonl") > 0);
    let idle = Instant::now();
    wire.count_data();
    // There is nothing to wait for: what must not be sent would be sent by then.
    thread::sleep(IDLE);
    let data = wire.data();
    let pings = 1 + idle.elapsed().as_secs() / INTERVAL_LEAST.as_secs();
    // On either side the other's pings come in, and the pongs to its own.
    assert!(data.iter().all(|count| (2..=2 * pings).contains(count)), "{data:?}, {pings} pings");
    assert_eq!(receiver.log().matches("sender connected").count(), 1, "{}", receiver.log());
    assert!(sender.stop().success());
}

/// DNS first fails, then answers, then answers otherwise: the name is resolved anew at each
/// attempt.
#[test]
fn a_receiver_that_moves_is_found_under_its_name() {
    const ELSEWHERE: &str = "10.83.0.77";
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let _receiver = receiver(&bench, &wire, "0.0.0.0");
    bench.write("app.log", lines("first", 100));
    let command = send(&bench, &format!("{NAME}:{PORT}"), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    sender.wait_for_log("does not resolve");
    wire.set_near_hosts(&format!("{FAR} {NAME}\n"));
    bench.wait_for_lines(100);
    wire.move_far(FAR, ELSEWHERE);
    let moved = Instant::now();
    wire.set_near_hosts(&format!("{ELSEWHERE} {NAME}\n"));
    bench.append("app.log", lines("second", 100));
    bench.wait_for_lines(200);
    assert_within_the_bound(moved);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 100).chain(numbered("second", 100)));
}

/// The receiver is killed while DNS has a fault, so that the sender meets it at its first dial, which it tells of.
#[test]
fn each_fault_of_dns_is_told_and_outlived() {
    const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 83, 0, 99);
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let right = Answer::Address(FAR.parse().expect("an address"));
    let dns = Dns::start(&wire, right);
    let mut receiver = receiver(&bench, &wire, FAR);
    bench.write("app.log", "line 0\n");
    let command = send(&bench, &format!("{NAME}:{PORT}"), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(1);
    let unresolved = format!("{NAME:?} does not resolve");
    let faults = [
        (Answer::Failure, unresolved.clone()),
        (Answer::Silence, unresolved),
        (Answer::Address(NOBODY), format!("{NOBODY}:{PORT} does not answer")),
    ];
    for (number, (fault, said)) in (1..).zip(&faults) {
        let told = || sender.log().matches(said.as_str()).count();
        let before = told();
        dns.set(*fault);
        receiver.kill_hard();
        wait_until(&format!("{fault:?}: {said}"), PATIENCE, || told() > before);
        assert!(dns.asked() > 0, "{fault:?}");
        dns.set(right);
        receiver = receiver_again(&bench, &wire, FAR);
        bench.append("app.log", format!("line {number}\n"));
        bench.wait_for_lines(number + 1);
    }
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 1 + faults.len()));
}

/// The name has two addresses, and a firewall drops what is sent to the first: that one is tried, and the other does not
/// wait for its end.
#[test]
fn an_address_behind_a_firewall_holds_up_no_other_address_of_the_name() {
    const ELSEWHERE: &str = "10.83.0.77";
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let _receiver = receiver(&bench, &wire, "0.0.0.0");
    wire.add_far(ELSEWHERE);
    wire.swallow(FAR);
    // First is the one that has more bits in common with the near host's own (RFC 6724 §5, rule 9).
    wire.set_near_hosts(&format!("{FAR} {NAME}\n{ELSEWHERE} {NAME}\n"));
    bench.write("app.log", lines("line", 100));
    let command = send(&bench, &format!("{NAME}:{PORT}"), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(100);
    assert!(wire.swallowed() > 0, "the first address was tried");
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 100));

    let mut check = waybill();
    check.args(["check", "send"]).args(command.get_args().skip(1)).current_dir(bench.path(""));
    let checked = wire.near(&check).output().expect("waybill check");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(said.contains(&format!("{NAME} is {FAR}, {ELSEWHERE}")), "{said}");
    assert!(checked.status.success(), "{said}");
}

/// Its old connection has an address that nobody has any more.
#[test]
fn a_sender_that_moves_connects_from_its_new_address() {
    const ELSEWHERE: &str = "10.83.0.78";
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let receiver = receiver(&bench, &wire, FAR);
    bench.write("app.log", lines("first", 100));
    let command = send(&bench, &format!("{FAR}:{PORT}"), &["app.log"]);
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(100);
    wire.move_near(NEAR, ELSEWHERE);
    let moved = Instant::now();
    bench.append("app.log", lines("second", 100));
    bench.wait_for_lines(200);
    receiver.wait_for_log("connection dead");
    assert_within_the_bound(moved);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 100).chain(numbered("second", 100)));
}

/// What makes [`tinyproxy`] want a password.
const LOGIN: &str = "BasicAuth me secret\n";

/// The real one on the far host; only it can resolve the name there.
fn tinyproxy(bench: &Bench, wire: &Wire, log: &str, login: &str) -> Process {
    wire.set_far_hosts(&format!("127.0.0.1 {NAME}\n"));
    let configuration = bench.write(
        "tinyproxy.conf",
        format!(
            "Port 3128\nListen {FAR}\nTimeout 600\n{login}ConnectPort {PORT}\n\
             MaxClients 20\nLogLevel Info\n"
        ),
    );
    let mut command = Command::new("tinyproxy");
    command.arg("-d").arg("-c").arg(configuration);
    Process::start("tinyproxy", wire.far(&command), bench.path(log))
}

/// Only the proxy is on the wire, and only it can resolve the receiver's name.
#[test]
fn an_http_proxy_is_passed_by_connect() {
    if !have("tinyproxy", "tinyproxy-bin") {
        return;
    }
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let _receiver = receiver(&bench, &wire, "127.0.0.1");
    let mut running = tinyproxy(&bench, &wire, "proxy-1.log", LOGIN);

    bench.write("app.log", lines("first", 1_000));
    let to = format!("{NAME}:{PORT}");
    let mut without = send(&bench, &to, &["app.log", "--once"]);
    without.args(["--proxy", &format!("http://{FAR}:3128")]);
    let refused = wire.near(&without).output().expect("waybill send");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("opens no tunnel: HTTP status 40") && said.contains("HTTPS_PROXY"),
        "{said}"
    );
    assert!(!said.contains("does not resolve"), "{said}");

    let mut command = send(&bench, &to, &["app.log"]);
    command.env("HTTPS_PROXY", format!("http://me:secret@{FAR}:3128"));
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(1_000);
    running.kill_hard();
    bench.append("app.log", lines("second", 1_000));
    sender.wait_for_log("does not answer");
    let _running = tinyproxy(&bench, &wire, "proxy-2.log", LOGIN);
    bench.wait_for_lines(2_000);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("first", 1_000).chain(numbered("second", 1_000)));
    assert!(!sender.log().contains("secret"), "a password is not logged");
}

/// The same where the receiver is behind the proxy, and dials.
#[test]
fn a_receiver_that_dials_passes_the_proxy_too() {
    if !have("tinyproxy", "tinyproxy-bin") {
        return;
    }
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    bench.token("test");
    certificates(&bench);
    let mut mint = waybill();
    mint.args(["token", "central", "--tokens", "receivers.toml"]).current_dir(bench.path(""));
    let token = bench.write("central.token", mint.output().expect("a token").stdout);
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(token, private).expect("chmod");
    bench.write("app.log", lines("first", 1_000));
    let mut send = waybill();
    send.args(["send", "app.log", "--listen", &format!("127.0.0.1:{PORT}")]);
    send.args(["--state-dir", "state", "--tokens", "receivers.toml"]);
    send.args(["--tls-cert", "server.pem", "--tls-key", "server.key"]).current_dir(bench.path(""));
    let mut sender = Process::start("sender", wire.far(&send), bench.path("sender.log"));
    let mut running = tinyproxy(&bench, &wire, "proxy-1.log", LOGIN);

    let mut receive = waybill();
    receive.args([
        "receive",
        "--tokens",
        "tokens.toml",
        "--store",
        "store.sqlite",
        "--ca",
        "ca.pem",
    ]);
    receive.args([
        "--dial",
        &format!("test=wss://{NAME}:{PORT}/"),
        "--token-file",
        "central.token",
    ]);
    receive.current_dir(bench.path(""));
    let proxy = format!("http://{FAR}:3128");
    let mut command = wire.near(&receive);
    command.args(["--proxy", &proxy]);
    let mut receiver = Process::start("receiver", command, bench.path("receiver-1.log"));
    receiver.wait_for_log("opens no tunnel: HTTP status 40");
    assert!(!receiver.log().contains("does not resolve"), "{}", receiver.log());
    assert!(receiver.stop().success());

    // A flag goes before a key, and the environment is asked where neither is.
    let file = bench.write("receiver.toml", "proxy = 'none'\n");
    let mut command = wire.near(&receive);
    command.arg("--config").arg(&file);
    let mut receiver = Process::start("receiver", command, bench.path("receiver-2.log"));
    receiver.wait_for_log("does not resolve");
    assert!(receiver.stop().success());
    receive.env("HTTPS_PROXY", format!("http://me:secret@{FAR}:3128"));
    let command = wire.near(&receive);
    let mut receiver = Process::start("receiver", command, bench.path("receiver-3.log"));
    bench.wait_for_lines(1_000);
    running.kill_hard();
    bench.append("app.log", lines("second", 1_000));
    receiver.wait_for_log("does not answer");
    let _running = tinyproxy(&bench, &wire, "proxy-2.log", LOGIN);
    bench.wait_for_lines(2_000);
    assert!(sender.stop().success() && receiver.stop().success());
    bench.assert_lines(numbered("first", 1_000).chain(numbered("second", 1_000)));
    assert!(!receiver.log().contains("secret"), "a password is not logged");
}

/// The flag's proxy wants no password; it goes before that of the environment, which nobody runs.
#[test]
fn lines_pass_the_proxy_that_a_flag_names() {
    if !have("tinyproxy", "tinyproxy-bin") {
        return;
    }
    let Some(wire) = Wire::lay() else { return };
    let bench = Bench::new();
    let _receiver = receiver(&bench, &wire, "127.0.0.1");
    let _running = tinyproxy(&bench, &wire, "proxy.log", "");
    bench.write("app.log", lines("line", 1_000));
    let proxy = format!("http://{FAR}:3128");
    let mut command = send(&bench, &format!("{NAME}:{PORT}"), &["app.log", "--proxy", &proxy]);
    command.env("HTTPS_PROXY", format!("http://{FAR}:1"));
    let mut sender = Process::start("sender", wire.near(&command), bench.path("sender.log"));
    bench.wait_for_lines(1_000);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 1_000));
}

/// A slower machine only takes longer.
#[test]
fn a_rate_limit_bounds_what_is_written_per_second() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let text = lines(&"x".repeat(90), 10_000);
    bench.write("app.log", &text);
    let start = Instant::now();
    bench.send_once(&receiver, &["app.log", "--rate-limit", "256KiB"]).ok();
    let least = Duration::from_secs_f64(text.len() as f64 / f64::from(256 << 10));
    // The first second's worth need not wait.
    assert!(start.elapsed() + Duration::from_secs(1) >= least, "{:?}", start.elapsed());
    bench.assert_lines(numbered(&"x".repeat(90), 10_000));
}

#[test]
fn a_rate_limit_holds_for_all_receivers_together() {
    const FILES: usize = 20;
    let bench = Bench::new();
    let receivers = ["one.sqlite", "two.sqlite"].map(|store| {
        let store = bench.path(store);
        bench.receiver_with(move |command| {
            command.arg("--store").arg(&store);
        })
    });
    let tag = "x".repeat(90);
    let names: Vec<String> = (0..FILES).map(|number| format!("app-{number}.log")).collect();
    let text = lines(&tag, 1_000);
    names.iter().for_each(|name| drop(bench.write(name, &text)));
    let second = receivers[1].url();
    let arguments = ["--balance", "--rate-limit", "256KiB", "--to", &second];
    let arguments: Vec<&str> = names.iter().map(String::as_str).chain(arguments).collect();
    let start = Instant::now();
    bench.send_once(&receivers[0], &arguments).ok();
    let least = Duration::from_secs_f64((FILES * text.len()) as f64 / f64::from(256 << 10));
    assert!(start.elapsed() + Duration::from_secs(1) >= least, "{:?}", start.elapsed());
    let stored = ["one.sqlite", "two.sqlite"].map(|store| {
        let mut search = waybill();
        search.args(["search", "--json", "--limit", "1000000", "--store"]).arg(bench.path(store));
        let output = search.output().expect("waybill search");
        output.stdout.iter().filter(|byte| **byte == b'\n').count()
    });
    assert!(stored.iter().all(|count| *count > 0), "both had their share: {stored:?}");
    assert_eq!(stored.iter().sum::<usize>(), FILES * 1_000);
}

#[test]
fn an_idle_connection_is_closed_and_the_next_line_opens_it_again() {
    let bench = Bench::new();
    let receiver = bench.receiver();
    let configuration = bench.write(
        "sender.toml",
        format!(
            "to = ['{}']\ntoken_file = 'test.token'\nstate_dir = 'state'\nidle_close = '300ms'\n\
             [[source]]\nfiles = '{}'\n",
            receiver.url(),
            bench.path("app.log").display()
        ),
    );
    bench.write("app.log", "line 0\n");
    let mut command = waybill();
    command.args(["send", "--config"]).arg(configuration);
    let mut sender = Process::start("sender", command, bench.path("sender.log"));
    for number in 1..4 {
        bench.wait_for_lines(number);
        let closed = || sender.log().matches("closed the idle connection").count() >= number;
        wait_until("it is closed", Duration::from_secs(60), closed);
        bench.append("app.log", format!("line {number}\n"));
    }
    bench.wait_for_lines(4);
    assert!(sender.stop().success());
    bench.assert_lines(numbered("line", 4));
}
