//! The real Elasticsearch behind Debian's nginx and behind a proxy that lies: nothing is receipted that is not stored,
//! nothing is lost, nothing is stored twice.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::support::documents::{assert_documents, prefix, receipts, wait_for_documents};
use crate::support::proxy::{Act, Proxy};
use crate::support::servers::{Elasticsearch, Nginx, free_port, http, wait_until};
use crate::support::waybill::{Bench, Certificates, PATIENCE, Process, Receiver, lines};

const LINES: usize = 2_000;

/// A receiver through `url` under a prefix, with further arguments.
fn receiver(bench: &Bench, url: &str, prefix: &str, more: &[&str]) -> Receiver {
    let more: Vec<String> = more.iter().map(|text| (*text).to_owned()).collect();
    let (url, prefix) = (url.to_owned(), prefix.to_owned());
    bench.receiver_with(move |command: &mut Command| {
        command.args(["--elasticsearch", &url]).args(&more);
        command.args(["--index", &format!("{prefix}-{{type}}-{{yyyy.MM.dd}}")]);
        command.args(["--dead-letter-index", &format!("{prefix}-dead")]);
    })
}

fn wait_for_receiver(receiver: &Receiver, text: &str) {
    wait_until(&format!("the receiver says {text:?}"), PATIENCE, || receiver.log().contains(text));
}

fn sender(bench: &Bench, receiver: &Receiver) -> Process {
    bench.write("app.log", lines("line", LINES));
    bench.sender(receiver, &["app.log", "--receipts", "receipts.jsonl"])
}

/// Everything is there once, and every receipt stands for a document.
#[track_caller]
fn assert_whole(bench: &Bench, node: &Elasticsearch, prefix: &str, mut sender: Process) {
    let pattern = format!("{prefix}-default-*");
    wait_for_documents(node, &pattern, LINES);
    let file = bench.path("receipts.jsonl");
    wait_until("a receipt for each line", PATIENCE, || {
        fs::read_to_string(&file).unwrap_or_default().lines().count() >= LINES
    });
    assert!(sender.stop().success());
    assert_documents(node, &pattern, "line", LINES);
    let ids: Vec<String> = receipts(&file).into_keys().collect();
    let mut stored = node.all_ids(&pattern);
    stored.sort();
    assert!(ids == stored, "receipts and documents differ");
    assert_eq!(node.count(&format!("{prefix}-dead")), 0, "nothing is parked");
}

/// nginx with TLS in front of a node; `location` is what stands in its only location.
fn front(folder: &Path, port: u16, server: &str, location: &str) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    format!(
        "events {{}}\nhttp {{\n  access_log off;\n  server {{\n    listen 127.0.0.1:{port} ssl;\n    \
         ssl_certificate {};\n    ssl_certificate_key {};\n    {server}\n    \
         location / {{\n      {location}\n    }}\n  }}\n}}\n",
        at("server.pem"),
        at("server.key"),
    )
}

fn pass_to(node: &str) -> String {
    format!("proxy_pass http://{node}; proxy_http_version 1.1; proxy_set_header Connection \"\";")
}

/// While nginx refuses, the receiver says how and nothing is receipted; once it does not, everything arrives.
fn refused_by_nginx(name: &str, bad: (&str, &dyn Fn(&str) -> String), good: &str, said: &[&str]) {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    let (port, prefix) = (free_port(), prefix(name));
    let Some(nginx) = Nginx::start(&front(&folder, port, bad.0, &bad.1(node.host_port()))) else {
        return;
    };
    let ca = bench.path("ca.pem").display().to_string();
    let receiver =
        receiver(&bench, &format!("https://localhost:{port}"), &prefix, &["--es-ca", &ca]);
    let sender = sender(&bench, &receiver);
    for text in said {
        wait_for_receiver(&receiver, text);
    }
    assert_eq!(node.count(&format!("{prefix}-*")), 0);
    assert!(receipts(&bench.path("receipts.jsonl")).is_empty(), "a false receipt");
    nginx.reload(&front(&folder, port, good, &pass_to(node.host_port())));
    assert_whole(&bench, node, &prefix, sender);
    assert!(receiver.log().contains("Elasticsearch takes documents"), "{}", receiver.log());
}

#[test]
fn status_401_holds_everything_and_loses_nothing() {
    let location = |_: &str| "return 401;".to_owned();
    refused_by_nginx("s401", ("", &location), "", &["HTTP status 401"]);
}

#[test]
fn status_403_holds_everything_and_loses_nothing() {
    let location = |node: &str| format!("deny all; {}", pass_to(node));
    refused_by_nginx("s403", ("", &location), "", &["HTTP status 403"]);
}

#[test]
fn status_502_of_a_proxy_whose_node_is_down_loses_nothing() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let location = move |_: &str| pass_to(&nobody);
    refused_by_nginx("s502", ("", &location), "", &["HTTP status 502"]);
}

#[test]
fn status_413_makes_requests_smaller_until_they_fit() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    let (port, prefix) = (free_port(), prefix("s413"));
    let text = front(&folder, port, "client_max_body_size 100k;", &pass_to(node.host_port()));
    let Some(_nginx) = Nginx::start(&text) else {
        return;
    };
    let ca = bench.path("ca.pem").display().to_string();
    let receiver =
        receiver(&bench, &format!("https://localhost:{port}"), &prefix, &["--es-ca", &ca]);
    let sender = sender(&bench, &receiver);
    assert_whole(&bench, node, &prefix, sender);
    wait_for_receiver(&receiver, "a bulk request was too large, sending smaller ones");
}

#[test]
fn a_line_too_large_for_the_proxy_alone_is_parked_in_pieces_or_waits_and_its_neighbours_are_stored()
{
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    let (port, prefix) = (free_port(), prefix("large"));
    // Room for a piece of a parked line (256 KiB) and not for the whole line.
    let text = front(&folder, port, "client_max_body_size 400k;", &pass_to(node.host_port()));
    let Some(_nginx) = Nginx::start(&text) else {
        return;
    };
    let ca = bench.path("ca.pem").display().to_string();
    let receiver =
        receiver(&bench, &format!("https://localhost:{port}"), &prefix, &["--es-ca", &ca]);
    let long = "x".repeat(700 << 10);
    bench.write("app.log", format!("{}{long}\n{}", lines("before", 50), lines("after", 50)));
    let sent = bench.send_once(&receiver, &["app.log"]);
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    assert!(sent.stderr.contains("parked"), "{}", sent.stderr);
    wait_for_documents(node, &format!("{prefix}-default-*"), 100);
    let mut pieces: Vec<_> = node.all_documents(&format!("{prefix}-dead")).into_values().collect();
    pieces.sort_by_key(|piece| piece["piece"].as_u64());
    let whole: String = pieces.iter().filter_map(|piece| piece["line"].as_str()).collect();
    assert!(whole == long, "{} pieces, {} bytes", pieces.len(), whole.len());
}

#[test]
fn basic_authentication_over_tls_with_a_password_that_changes() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    bench.write("htpasswd", "waybill:{PLAIN}second\n");
    bench.write("user", "waybill:first\n");
    let (port, prefix) = (free_port(), prefix("basic"));
    let auth =
        format!("auth_basic logs; auth_basic_user_file {};", bench.path("htpasswd").display());
    let Some(_nginx) = Nginx::start(&front(&folder, port, &auth, &pass_to(node.host_port())))
    else {
        return;
    };
    let (ca, user) = (bench.path("ca.pem"), bench.path("user"));
    let arguments =
        ["--es-ca", &ca.display().to_string(), "--es-user-file", &user.display().to_string()]
            .map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let url = format!("https://localhost:{port}");
    let receiver = receiver(&bench, &url, &prefix, &arguments);
    let sender = sender(&bench, &receiver);
    wait_for_receiver(&receiver, "HTTP status 401");
    assert!(receipts(&bench.path("receipts.jsonl")).is_empty(), "a false receipt");
    // No restart: the file is read again.
    bench.write("user", "waybill:second\n");
    assert_whole(&bench, node, &prefix, sender);
    assert!(!receiver.log().contains("first"), "a password in the log");
}

#[test]
fn an_api_key_over_tls() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    bench.write("api-key", "key-id:key-secret\n");
    let (port, prefix) = (free_port(), prefix("key"));
    // base64 of key-id:key-secret
    let check = "if ($http_authorization != \"ApiKey a2V5LWlkOmtleS1zZWNyZXQ=\") { return 401; }";
    let Some(_nginx) = Nginx::start(&front(&folder, port, check, &pass_to(node.host_port())))
    else {
        return;
    };
    let (ca, key) = (bench.path("ca.pem"), bench.path("api-key"));
    let arguments =
        ["--es-ca", &ca.display().to_string(), "--api-key-file", &key.display().to_string()]
            .map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let url = format!("https://localhost:{port}");
    let receiver = receiver(&bench, &url, &prefix, &arguments);
    let sender = sender(&bench, &receiver);
    assert_whole(&bench, node, &prefix, sender);
}

#[test]
fn an_unknown_authority_of_elasticsearch_is_said() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let folder = bench.path("");
    Certificates::make(&folder);
    let port = free_port();
    let Some(_nginx) = Nginx::start(&front(&folder, port, "", &pass_to(node.host_port()))) else {
        return;
    };
    let url = format!("https://localhost:{port}");
    let receiver = receiver(&bench, &url, &prefix("ca"), &[]);
    wait_for_receiver(&receiver, "takes no documents");
    wait_for_receiver(&receiver, "certificate");
}

#[test]
fn elasticsearch_that_is_absent_is_said_and_waited_for() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let (port, prefix) = (free_port(), prefix("absent"));
    let receiver = receiver(&bench, &format!("http://127.0.0.1:{port}"), &prefix, &[]);
    let sender = sender(&bench, &receiver);
    wait_for_receiver(&receiver, "Elasticsearch takes no documents");
    let ready = || {
        let address = format!("127.0.0.1:{}", receiver.port());
        http(&address, "GET", "/health/ready", "text/plain", b"").expect("an answer").0
    };
    assert_eq!(ready(), 503);
    assert!(receipts(&bench.path("receipts.jsonl")).is_empty(), "a false receipt");
    let _proxy = Proxy::start_at(port, node.host_port(), &[]);
    assert_whole(&bench, node, &prefix, sender);
    wait_until("the receiver is ready", PATIENCE, || ready() == 200);
}

/// Each act meets a request, and in the end everything is there once.
fn through(name: &str, acts: &[Act]) {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix(name);
    let proxy = Proxy::start(node.host_port(), acts);
    let receiver = receiver(&bench, &proxy.url(), &prefix, &[]);
    let sender = sender(&bench, &receiver);
    assert_whole(&bench, node, &prefix, sender);
    assert_eq!(proxy.left(), 0, "acts that met no request");
}

#[test]
fn half_an_answer_is_no_answer() {
    through("half", &[Act::HalfAnswer, Act::HalfAnswer]);
}

#[test]
fn a_connection_cut_before_or_after_the_work_is_no_answer() {
    through("cut", &[Act::Cut, Act::NoAnswer, Act::Cut, Act::NoAnswer]);
}

#[test]
fn an_answer_with_fewer_items_is_no_answer() {
    through("fewer", &[Act::FewerItems]);
}

#[test]
fn an_answer_that_is_no_bulk_answer_is_no_answer() {
    through(
        "page",
        &[
            Act::Answer(200, "<html>welcome</html>"),
            Act::Answer(200, ""),
            Act::Answer(200, "{\"errors\":false,\"items\":[]}"),
        ],
    );
}

#[test]
fn status_429_and_503_of_the_whole_request_are_tried_again() {
    through(
        "whole",
        &[
            Act::Answer(
                429,
                "{\"error\":{\"type\":\"circuit_breaking_exception\"},\"status\":429}",
            ),
            Act::Answer(503, "unavailable"),
            Act::Answer(500, "broken"),
        ],
    );
}

#[test]
fn items_with_429_503_and_500_are_tried_again_alone() {
    through(
        "items",
        &[
            Act::EveryOther(429, "es_rejected_execution_exception"),
            Act::EveryOther(503, "cluster_block_exception"),
            Act::EveryOther(500, "some_exception"),
        ],
    );
}

#[test]
fn an_item_that_its_index_refuses_waits_and_is_stored_later() {
    through("itemindex", &[Act::EveryOther(403, "cluster_block_exception")]);
}

#[test]
fn elasticsearch_killed_in_the_middle_loses_and_doubles_nothing() {
    const MANY: usize = 60_000;
    let Some(node) = Elasticsearch::start("8.17") else {
        return;
    };
    let bench = Bench::new();
    let receiver = bench.receiver_into(&node.url(), "kill");
    bench.write("app.log", lines("line", MANY));
    let mut sender = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    let file = bench.path("receipts.jsonl");
    let receipted = || fs::read_to_string(&file).unwrap_or_default().lines().count();
    wait_until("first receipts", PATIENCE, || receipted() > 0);
    node.kill_hard();
    wait_for_receiver(&receiver, "Elasticsearch takes no documents");
    node.restart();
    wait_until("a receipt for each line", PATIENCE, || receipted() >= MANY);
    assert!(sender.stop().success());
    assert_documents(&node, "kill-default-*", "line", MANY);
    let ids: Vec<String> = receipts(&file).into_keys().collect();
    assert!(ids == node.all_ids("kill-default-*"), "receipts and documents differ");
}

/// While it stalls the receiver still pings: nobody takes its silence, or the sender's, for a dead connection.
#[test]
fn elasticsearch_that_stalls_for_longer_than_a_ping_ends_no_connection() {
    const DEAD_AFTER: Duration = Duration::from_secs(45);
    let Some(node) = Elasticsearch::start("8.17") else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("stalled");
    let receiver = receiver(&bench, &node.url(), &prefix, &[]);
    bench.write("app.log", "line 0\n");
    let sender = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    wait_for_documents(&node, &format!("{prefix}-default-*"), 1);
    node.pause();
    let rest: String = (1..LINES).map(|number| format!("line {number}\n")).collect();
    bench.append("app.log", rest);
    // What is to be seen is that nothing happens.
    thread::sleep(DEAD_AFTER + Duration::from_secs(5));
    node.resume();
    wait_for_documents(&node, &format!("{prefix}-default-*"), LINES);
    assert_eq!(sender.log().matches(" connected").count(), 1, "{}", sender.log());
    assert_whole(&bench, &node, &prefix, sender);
}

/// nginx in front of a node, without TLS, with a log of what it passed on.
fn plain_front(node: &Elasticsearch) -> Option<(String, Nginx)> {
    let port = free_port();
    let text = format!(
        "events {{}}\nhttp {{\n  access_log access.log;\n  client_max_body_size 100m;\n  server {{\n    \
         listen 127.0.0.1:{port};\n    location / {{ {} }}\n  }}\n}}\n",
        pass_to(node.host_port())
    );
    Some((format!("http://127.0.0.1:{port}"), Nginx::start(&text)?))
}

#[test]
fn two_urls_fail_over_in_the_middle_of_a_stream_and_back() {
    let Some(node) = Elasticsearch::shared_8_17() else {
        return;
    };
    let (Some((first_url, first)), Some((second_url, second))) =
        (plain_front(node), plain_front(node))
    else {
        return;
    };
    let bench = Bench::new();
    let prefix = prefix("failover");
    let receiver = receiver(&bench, &first_url, &prefix, &["--elasticsearch", &second_url]);
    bench.write("app.log", "");
    let mut sender = bench.sender(&receiver, &["app.log", "--receipts", "receipts.jsonl"]);
    let file = bench.path("receipts.jsonl");
    let receipted = || fs::read_to_string(&file).unwrap_or_default().lines().count();
    let passed = |nginx: &Nginx| {
        let log = fs::read_to_string(nginx.folder().join("access.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains("\"POST /_bulk") && line.contains(" 200 ")).count()
    };
    let mut written = 0;
    let mut write = |count: usize| {
        let text: String = (written..written + count).map(|n| format!("line {n}\n")).collect();
        bench.append("app.log", text);
        written += count;
        written
    };
    let mut both = [first, second];
    for turn in 0..4 {
        let (down, up) = (turn % 2, (turn + 1) % 2);
        let before = receipted();
        write(40_000);
        wait_until("first receipts of many", PATIENCE, || receipted() > before);
        both[down].kill_hard();
        let passed_before = passed(&both[up]);
        let all = write(100);
        let what = format!("turn {turn}: a receipt for each line, with one URL");
        wait_until(&what, PATIENCE, || receipted() >= all);
        wait_until("the other one passed them", PATIENCE, || passed(&both[up]) > passed_before);
        both[down].restart();
    }
    assert!(sender.stop().success());
    let pattern = format!("{prefix}-default-*");
    assert_documents(node, &pattern, "line", written);
    let ids: Vec<String> = receipts(&file).into_keys().collect();
    assert!(ids == node.all_ids(&pattern), "receipts and documents differ");
    assert_eq!(node.count(&format!("{prefix}-dead")), 0, "nothing is parked");
    // A cluster of which one URL answers is not down.
    let log = receiver.log();
    assert!(log.matches("trying the next").count() >= 4, "{log}");
    assert!(!log.contains("nothing is receipted until it does"), "{log}");
}
