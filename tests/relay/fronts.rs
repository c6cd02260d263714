//! What stands before a receiver and is not it: each kind is named in the sender's log, tried again, and left behind by
//! itself when the right thing answers.

use std::net::TcpListener;

use super::support::servers::{Nginx, free_port, wait_until};
use super::support::waybill::{Bench, Certificates, PATIENCE, Process, lines, waybill};

/// One wrong front: what nginx does at its port, and what the sender says.
struct Front {
    port: u16,
    name: &'static str,
    /// Which certificate it shows.
    certificate: &'static str,
    location: String,
    /// Starts of its messages; the first word that is not fixed ends one.
    says: &'static str,
}

fn fronts(hanging: u16, dead: u16) -> Vec<Front> {
    let front = |name, location: &str, says| Front {
        port: free_port(),
        name,
        certificate: "good",
        location: location.to_owned(),
        says,
    };
    let page = "default_type text/html; return 200 '<html>Log in to this network</html>';";
    vec![
        front(
            "502",
            &format!("proxy_pass http://127.0.0.1:{dead}/;"),
            "refused with HTTP status 502, \"<html> <head><title>502 Bad Gateway</title></head> <body> \
             <center><h1>502 Bad Gateway</h1></center> <hr><center>nginx</center> </body> </html>\"; \
             the proxy does not reach what is behind it ",
        ),
        front(
            "504",
            &format!("proxy_pass http://127.0.0.1:{hanging}/; proxy_read_timeout 1s;"),
            "refused with HTTP status 504, \"<html> <head><title>504 Gateway Time-out</title></head> <body> \
             <center><h1>504 Gateway Time-out</h1></center> <hr><center>nginx</center> </body> </html>\"; \
             the proxy does not reach what is behind it ",
        ),
        front(
            "page",
            page,
            "the server answered a page instead of a WebSocket (HTTP status 200, \
             \"<html>Log in to this network</html>\"); check host and path ",
        ),
        front(
            "301",
            "return 301 https://elsewhere.example/login;",
            "redirected with HTTP status 301 to \"https://elsewhere.example/login\"; a token is never \
             carried elsewhere: set that address if it is right ",
        ),
        front(
            "302",
            "return 302 https://elsewhere.example/login;",
            "redirected with HTTP status 302 to \"https://elsewhere.example/login\"; a token is never \
             carried elsewhere: set that address if it is right ",
        ),
        front(
            "307",
            "return 307 https://elsewhere.example/login;",
            "redirected with HTTP status 307 to \"https://elsewhere.example/login\"; a token is never \
             carried elsewhere: set that address if it is right ",
        ),
        Front {
            certificate: "portal",
            ..front(
                "portal",
                page,
                "no TLS with \"localhost\": the server's certificate is for another name: certificate \
                 not valid for name \"localhost\"; certificate is only valid for \
                 DnsName(\"login.hotel.example\"); use a name that it lists ",
            )
        },
    ]
}

/// nginx with every front, as it is or mended.
fn configuration(bench: &Bench, fronts: &[Front], mended: Option<u16>) -> String {
    let mut text = String::from("events {}\nhttp {\nserver_tokens off;\n");
    for front in fronts {
        let location = match mended {
            None => front.location.clone(),
            Some(receiver) => format!(
                "proxy_pass http://127.0.0.1:{receiver}/; proxy_http_version 1.1; \
                 proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
            ),
        };
        let certificate = if mended.is_some() { "good" } else { front.certificate };
        let files = bench.path(certificate).display().to_string();
        text += &format!(
            "server {{ listen 127.0.0.1:{} ssl; ssl_certificate {files}/server.pem; \
             ssl_certificate_key {files}/server.key; access_log off; location / {{ {location} }} }}\n",
            front.port
        );
    }
    text + "}\n"
}

#[test]
fn each_wrong_front_is_named_tried_again_and_recovered_from() {
    const LINES: usize = 50;
    let bench = Bench::new();
    for (folder, name) in [("good", "localhost"), ("portal", "login.hotel.example")] {
        std::fs::create_dir(bench.path(folder)).expect("a folder");
        Certificates::make_with(&bench.path(folder), &[name], |_| {});
    }
    // Both authorities are trusted, so that the name alone is wrong.
    let authorities = ["good", "portal"].map(|folder| {
        std::fs::read_to_string(bench.path(folder).join("ca.pem")).expect("an authority")
    });
    bench.write("ca.pem", authorities.concat());
    let receiver = bench.receiver();
    // Takes connections into the kernel's queue, and answers none.
    let hanging = TcpListener::bind("127.0.0.1:0").expect("bind");
    let fronts = fronts(hanging.local_addr().expect("an address").port(), free_port());
    let Some(nginx) = Nginx::start(&configuration(&bench, &fronts, None)) else { return };

    let mut senders = Vec::new();
    for front in &fronts {
        bench.write(&format!("{}.log", front.name), lines(front.name, LINES));
        let mut command = waybill();
        command.arg("send").arg(bench.path(&format!("{}.log", front.name)));
        command.args(["--to", &format!("wss://localhost:{}/", front.port)]);
        command.arg("--ca").arg(bench.path("ca.pem"));
        command.arg("--token-file").arg(bench.path("test.token"));
        command.arg("--state-dir").arg(bench.path(&format!("state-{}", front.name)));
        let log = bench.path(&format!("sender-{}.log", front.name));
        senders.push(Process::start(front.name, command, log));
    }
    for (front, sender) in fronts.iter().zip(&senders) {
        // The second message of one that only a person can mend, else of the second attempt.
        wait_until(&format!("{} is said twice", front.name), PATIENCE, || {
            sender.log().matches(front.says).count() >= 2
        });
        assert!(!sender.log().contains("connected"), "{}", front.name);
    }
    assert!(bench.messages().is_empty(), "nothing went to a wrong front");

    nginx.reload(&configuration(&bench, &fronts, Some(receiver.port())));
    wait_until("every line", PATIENCE, || bench.messages().len() >= LINES * fronts.len());
    bench.assert_lines(
        fronts.iter().flat_map(|front| {
            lines(front.name, LINES).lines().map(str::to_owned).collect::<Vec<_>>()
        }),
    );
    for sender in &mut senders {
        assert!(sender.is_running(), "without a restart");
        assert!(sender.stop().success());
    }
}
