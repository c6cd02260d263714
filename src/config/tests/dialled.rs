//! Either side dials: what each of them needs then.

use super::*;

const LISTEN: &str = "listen = '127.0.0.1:0'\ntokens = 'tokens.toml'\n";

#[test]
fn a_sender_dials_or_is_dialled() {
    let desk = Desk::new();
    let text = format!("{LISTEN}tls_cert = 'ca.pem'\ntls_key = 'key.pem'\n{SOURCE}");
    let config = desk.send(SendLayer::default(), &text).expect("good").config;
    let ConnectionConfig::Listen(listen) = config.connection else { panic!("it dials") };
    assert_eq!(listen.tokens, desk.dir.path().join("tokens.toml"));
    assert!(listen.tls.is_some());
    for (text, expected) in [
        (
            format!("{LISTEN}{SEND}{SOURCE}"),
            "c.toml:3:1: to: a sender dials or is dialled: give 'to' or 'listen', not both",
        ),
        (
            format!("{LISTEN}idle_close = '5m'\n{SOURCE}"),
            "c.toml:3:1: idle_close: a sender that cannot dial keeps its connection: remove it",
        ),
        (
            format!("{LISTEN}ca = 'ca.pem'\n{SOURCE}"),
            "c.toml:3:1: ca: only a sender that dials checks a certificate: remove it",
        ),
        (
            format!("listen = '127.0.0.1:0'\n{SOURCE}"),
            "configuration: no tokens: give --tokens FILE, or 'tokens' in the file; without one \
             nobody may enter",
        ),
        (
            format!("{SEND}tokens = 'tokens.toml'\n{SOURCE}"),
            "c.toml:3:1: tokens: only a sender that is dialled needs it: give --listen HOST:PORT \
             (listen)",
        ),
    ] {
        let error = desk.send(SendLayer::default(), &text).expect_err(&text).to_string();
        assert_eq!(error, expected, "{text}");
    }
    let open = format!("listen = '0.0.0.0:0'\ntokens = 'tokens.toml'\n{SOURCE}");
    let error = desk.send(SendLayer::default(), &open).expect_err("plaintext").to_string();
    assert!(error.contains("--tls-cert"), "{error}");
}

#[test]
fn naming_the_other_side_to_dial_on_the_command_line_drops_the_one_of_the_file() {
    let desk = Desk::new();
    let flags = SendLayer {
        listen: Some(At::flag("--listen", Listen::Unix("/run/x.sock".into()))),
        tokens: Some(At::flag("--tokens", desk.dir.path().join("tokens.toml"))),
        ..SendLayer::default()
    };
    let text = format!("{SEND}ca = 'ca.pem'\nidle_close = '5m'\n{SOURCE}");
    let config = desk.send(flags, &text).expect("good").config;
    assert!(matches!(config.connection, ConnectionConfig::Listen(_)));
    let flags = SendLayer {
        to: vec![At::flag("--to", value::endpoint("wss://flag/").expect("a URL"))],
        token_file: Some(At::flag("--token-file", desk.dir.path().join("token"))),
        ..SendLayer::default()
    };
    let config = desk.send(flags, &format!("{LISTEN}{SOURCE}")).expect("good").config;
    assert_eq!(dialling(&config).to[0].url, "wss://flag/");
}

const DIAL: &str = "[[dial]]\nsender = 'web-1'\nurl = 'wss://web-1/'\n";

#[test]
fn senders_are_dialled_beside_listening_or_instead_of_it() {
    let desk = Desk::new();
    desk.write("other", "secret");
    let text = format!(
        "tokens = 'tokens.toml'\ntoken_file = 'token'\nca = 'ca.pem'\n{DIAL}\
         [[dial]]\nsender = 'web-2'\nurl = 'ws://127.0.0.1:1/'\ntoken_file = 'other'\n"
    );
    let config = desk.receive(ReceiveLayer::default(), &text).expect("good").config;
    assert_eq!(config.listen, None);
    let [one, two] = &config.dials[..] else { panic!("{:?}", config.dials) };
    assert_eq!((one.name.as_str(), one.endpoint.url.as_str()), ("web-1", "wss://web-1/"));
    assert_eq!(one.token_file, desk.dir.path().join("token"));
    assert_eq!(two.token_file, desk.dir.path().join("other"));
    assert_eq!(two.ca, Some(desk.dir.path().join("ca.pem")));
    let both = format!("{RECEIVE}token_file = 'token'\n{DIAL}");
    let config = desk.receive(ReceiveLayer::default(), &both).expect("good").config;
    assert!(config.listen.is_some() && config.dials.len() == 1);

    for (text, expected) in [
        ("tokens = 'tokens.toml'\n".to_owned(), "configuration: no address: give --listen"),
        (format!("tokens = 'tokens.toml'\n{DIAL}"), "configuration: no token for the senders"),
        (format!("{both}{DIAL}"), "c.toml:8:1: dial.sender: \"web-1\" is dialled by c.toml:4:1"),
        (
            format!("{RECEIVE}token_file = 'token'\n[[dial]]\nsender = 'web-1'\n"),
            "c.toml:4:1: dial: needs 'sender', an entry of the tokens file, and 'url'",
        ),
        (
            both.replace("wss:", "ws:"),
            "c.toml:6:1: dial.url: ws://web-1/ would send the token and every line unencrypted",
        ),
        (format!("{RECEIVE}proxy = 'none'\n"), "c.toml:3:1: proxy: only a receiver that dials"),
        (format!("{RECEIVE}ca = 'ca.pem'\n"), "c.toml:3:1: ca: only a receiver that dials"),
    ] {
        let error = desk.receive(ReceiveLayer::default(), &text).expect_err(&text).to_string();
        assert!(error.contains(expected), "{text}\n{error}");
    }
    let through = |text: &str, https_proxy: Option<&str>| {
        desk.write("p.toml", text);
        let environment =
            Environment { https_proxy: https_proxy.map(str::to_owned), ..desk.environment() };
        let loaded = load_receive(ReceiveLayer::default(), Some(Path::new("p.toml")), &environment);
        let dials = loaded.expect("good").config.dials;
        dials[0].endpoint.proxy.as_ref().map(ToString::to_string)
    };
    let lan = Some("http://lan:3128");
    assert_eq!(through(&both, lan).as_deref(), Some("lan:3128"));
    assert_eq!(through(&format!("proxy = 'none'\n{both}"), lan), None);
    let own = format!("proxy = 'http://other:1'\n{both}");
    assert_eq!(through(&own, lan).as_deref(), Some("other:1"));
    for bad in ["web-1", "=wss://h/", "web-1=h"] {
        assert!(value::dialled_sender(bad).is_err(), "{bad}");
    }
}
