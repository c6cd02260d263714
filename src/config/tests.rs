use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use super::*;

mod dialled;

/// A folder with the files that a configuration names, and defaults that depend on nothing else.
struct Desk {
    dir: TempDir,
}

impl Desk {
    fn new() -> Desk {
        let desk = Desk { dir: tempfile::tempdir().expect("a folder") };
        desk.write("token", "secret");
        desk.write("tokens.toml", "# nobody yet");
        desk.write("ca.pem", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n");
        desk.write("key.pem", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n");
        desk
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its mode");
    }

    fn environment(&self) -> Environment {
        Environment {
            state_directory: Some("/state".into()),
            current_dir: self.dir.path().to_owned(),
            ..Environment::default()
        }
    }

    fn send(&self, flags: SendLayer, text: &str) -> Result<Loaded<SendConfig>, ConfigError> {
        self.write("c.toml", text);
        load_send(flags, Some(Path::new("c.toml")), &self.environment())
    }

    fn receive(
        &self,
        flags: ReceiveLayer,
        text: &str,
    ) -> Result<Loaded<ReceiveConfig>, ConfigError> {
        self.write("c.toml", text);
        load_receive(flags, Some(Path::new("c.toml")), &self.environment())
    }
}

fn dialling(config: &SendConfig) -> &DialConfig {
    match &config.connection {
        ConnectionConfig::Dial(dial) => dial,
        ConnectionConfig::Listen(listen) => panic!("{listen:?}"),
    }
}

const SEND: &str = "to = 'wss://h/'\ntoken_file = 'token'\n";
const SOURCE: &str = "[[source]]\nfiles = '/var/log/x.log'\n";
const RECEIVE: &str = "listen = '127.0.0.1:0'\ntokens = 'tokens.toml'\n";

#[test]
fn a_small_sender_gets_the_documented_defaults() {
    let desk = Desk::new();
    let loaded = desk.send(SendLayer::default(), &format!("{SEND}{SOURCE}")).expect("good");
    let config = loaded.config;
    assert_eq!(config.state_dir, Path::new("/state"));
    assert_eq!(dialling(&config).token_file, desk.dir.path().join("token"));
    assert_eq!(config.drain_timeout, Duration::from_secs(10));
    assert_eq!(config.once_timeout, Duration::from_secs(300));
    assert_eq!((config.spool_bytes_max, config.kept_bytes_max), (1 << 30, 1 << 30));
    assert!(!config.once && !config.compress && !config.progress);
    let source = &config.sources[0];
    assert_eq!(source.name, "/var/log/x.log");
    assert_eq!(source.timezone, "UTC");
    assert_eq!(source.type_name.as_str(), "default");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn bad_senders_say_where_and_what_is_allowed() {
    let desk = Desk::new();
    desk.write("empty", " \n");
    fs::create_dir(desk.dir.path().join("folder")).expect("a folder");
    let folder = desk.dir.path().join("folder").display().to_string();
    let base = desk.dir.path().display().to_string();
    let with_source = |lines: &str| format!("{SEND}{SOURCE}{lines}");
    let long = format!("[[source]]\nunix_stream = '/{}'\n", "x".repeat(107));
    for (text, expected) in [
        (
            format!("tokn_file = 'x'\n{SEND}{SOURCE}"),
            "c.toml:1:1: tokn_file: unknown key; did you mean token_file? Allowed here: balance, ca, cert, chain_key_file, compress, \
             drain_timeout, idle_close, insecure_plaintext, kept_bytes_max, key, listen, log_format, log_level, \
             metrics, once_timeout, proxy, rate_limit, receipts, source, spool_bytes_max, state_dir, tls_cert, \
             tls_key, to, token_file, tokens"
                .to_owned(),
        ),
        (
            with_source("  typ = 'nginx'\n"),
            "c.toml:5:3: source.typ: unknown key; did you mean type? Allowed here: files, follow_symlinks, format, \
             http_intake, labels, mode, name, receive_buffer, rotated, start, stdin, supervisor_events, syslog_tcp, \
             syslog_tls, syslog_udp, tags, timezone, tls_cert, tls_key, type, unix_datagram, unix_stream"
                .to_owned(),
        ),
        (
            with_source("type = 7\n"),
            "c.toml:5:1: source.type: must be a string, not a whole number".to_owned(),
        ),
        (
            with_source("type = 'No'\n"),
            "c.toml:5:1: source.type: type \"No\" must be 1 to 64 characters of a-z, 0-9, '_' and \
             '-'"
            .to_owned(),
        ),
        (
            with_source("timezone = 'Mars'\n"),
            "c.toml:5:1: source.timezone: time zone \"Mars\" is not known: use UTC or an IANA name \
             such as Europe/Berlin"
                .to_owned(),
        ),
        (
            with_source("tags = ['a', 7]\n"),
            "c.toml:5:14: source.tags: must be a string, not a whole number".to_owned(),
        ),
        (
            with_source(&format!("tags = ['a']\nlabels = {{ a = '{}' }}\n", "x".repeat(4095))),
            "c.toml:5:9: source.tags: 1 tags and 1 labels of 4097 bytes: each line repeats them, so at \
             most 64 of each and 4096 bytes in all are allowed"
                .to_owned(),
        ),
        (
            with_source("mode = '0600'\n"),
            "c.toml:5:1: source.mode: only a Unix socket has a mode: remove it".to_owned(),
        ),
        (
            with_source("receive_buffer = '1MiB'\n"),
            "c.toml:5:1: source.receive_buffer: only syslog_udp has a receive buffer: remove it"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nsyslog_tcp = '[::]:514'\ntls_key = 'x'\n"),
            "c.toml:5:1: source.tls_key: only syslog_tls has a certificate: remove it".to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nsyslog_tls = '[::]:6514'\ntls_key = 'x'\n"),
            "c.toml:4:1: source.syslog_tls: syslog over TLS needs a certificate and its key: give \
             --syslog-tls-cert FILE and --syslog-tls-key FILE (tls_cert, tls_key)"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nsyslog_udp = '514'\n"),
            "c.toml:4:1: source.syslog_udp: address \"514\" must be HOST:PORT or [IPv6]:PORT, such \
             as 0.0.0.0:514"
                .to_owned(),
        ),
        (
            with_source("unix_stream = '/run/x'\n"),
            "c.toml:5:1: source.unix_stream: a source has exactly one of files, unix_datagram, \
             unix_stream, http_intake, syslog_udp, syslog_tcp, syslog_tls, stdin, supervisor_events"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nhttp_intake = '192.0.2.1:8514'\n"),
            "c.toml:4:1: source.http_intake: 192.0.2.1:8514 would take lines from anybody who \
             reaches it, unencrypted: use 127.0.0.1, or allow it with --insecure-plaintext \
             (insecure_plaintext = true)"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nname = 'x'\n"),
            "c.toml:3:1: source: a source has exactly one of files, unix_datagram, unix_stream, \
             http_intake, syslog_udp, syslog_tcp, syslog_tls, stdin, supervisor_events"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nfiles = '/a[b'\n"),
            "c.toml:4:1: source.files: pattern \"/a[b\" is wrong at character 3: invalid range \
             pattern; write [[] for a literal '['"
                .to_owned(),
        ),
        (
            format!("{SEND}[[source]]\nfiles = 'folder'\n"),
            format!(
                "c.toml:4:1: source.files: {folder} is a directory: name files, such as \
                 {folder}/*.log"
            ),
        ),
        (
            format!("{SEND}[[source]]\nname = 'a'\nfiles = '/a'\n[[source]]\nname = 'a'\nfiles = '/b'\n"),
            "c.toml:6:1: source: name \"a\" is taken by c.toml:3:1: source: names are unique"
                .to_owned(),
        ),
        (
            format!("{SEND}{SOURCE}[[source]]\nname = 'b'\nfiles = '/var/log/x.log'\n"),
            "c.toml:5:1: source: the same is read by source \"/var/log/x.log\" already".to_owned(),
        ),
        (
            format!("{SEND}{long}"),
            format!(
                "c.toml:4:1: source.unix_stream: a socket's path has at most 107 bytes, and \
                 /{} has 108",
                "x".repeat(107)
            ),
        ),
        (
            format!("to = 'wss://h/'\ntoken_file = 'none'\n{SOURCE}"),
            format!(
                "c.toml:2:1: token_file: cannot read {base}/none: No such file or directory (os \
                 error 2)"
            ),
        ),
        (
            format!("to = 'wss://h/'\ntoken_file = 'empty'\n{SOURCE}"),
            format!("c.toml:2:1: token_file: {base}/empty is empty"),
        ),
        (
            format!("to = 'wss://h/'\ntoken_file = 'folder'\n{SOURCE}"),
            format!("c.toml:2:1: token_file: {folder} is not a regular file"),
        ),
        (
            format!("ca = 'token'\n{SEND}{SOURCE}"),
            format!("c.toml:1:1: ca: {base}/token has no PEM block -----BEGIN CERTIFICATE-----"),
        ),
        (
            format!("to = 'ws://h/'\ntoken_file = 'token'\n{SOURCE}"),
            "c.toml:1:1: to: ws://h/ would send the token and every line unencrypted: use wss://, \
             or allow it with --insecure-plaintext (insecure_plaintext = true)"
                .to_owned(),
        ),
        (
            format!("spool_bytes_max = 5\n{SEND}{SOURCE}"),
            "c.toml:1:1: spool_bytes_max: must be at least 4MiB, to hold a few of the longest lines"
                .to_owned(),
        ),
        (
            format!("{SEND}source = 'x'\n"),
            "c.toml:3:1: source: must be an array of tables: write [[source]], not a string".to_owned(),
        ),
        (
            format!("{SEND}[source]\nfiles = 'a.log'\n"),
            "c.toml:3:2: source: write [[source]] instead of [source], with two brackets on either \
             side: each is one of several"
                .to_owned(),
        ),
        (
            SEND.to_owned(),
            "configuration: nothing to send: name a FILE, a pattern, '-' or a socket, or a \
             [[source]] in the file"
                .to_owned(),
        ),
    ] {
        let error = desk.send(SendLayer::default(), &text).expect_err(&text);
        assert_eq!(error.to_string(), expected, "{text}");
    }
}

#[test]
fn broken_toml_says_where() {
    let desk = Desk::new();
    let error = desk.send(SendLayer::default(), "to = 'wss://h/'\ncompress = yes\n");
    let message = error.expect_err("not TOML").to_string();
    assert!(message.starts_with("c.toml:2:12: "), "{message}");
    assert!(!message.contains('\n'), "{message}");
    let missing = load_send(SendLayer::default(), Some(Path::new("no.toml")), &desk.environment());
    assert_eq!(
        missing.expect_err("not there").to_string(),
        "configuration file no.toml: No such file or directory (os error 2)"
    );
}

#[test]
fn every_fault_is_told_at_once_in_order() {
    let desk = Desk::new();
    let text =
        "to = 'http://h/'\ntoken_file = 'none'\n[[source]]\nfiles = '/x'\ntype = 'No'\nx = 1\n";
    let message = desk.send(SendLayer::default(), text).expect_err("bad").to_string();
    let places: Vec<_> = message.lines().map(|l| l.split(": ").next().unwrap_or("")).collect();
    assert_eq!(places, ["c.toml:1:1", "c.toml:2:1", "c.toml:5:1", "c.toml:6:1"]);
}

#[test]
fn flags_go_before_the_file() {
    let desk = Desk::new();
    let flags = SendLayer {
        to: vec![At::flag("--to", value::endpoint("wss://flag/").expect("a URL"))],
        spool_bytes_max: Some(At::flag("--spool-bytes-max", 8 << 20)),
        ..SendLayer::default()
    };
    let text = format!(
        "spool_bytes_max = '5MiB'\nkept_bytes_max = 77\ndrain_timeout = '3s'\n\
         once_timeout = '1m'\n{SEND}{SOURCE}"
    );
    let config = desk.send(flags, &text).expect("good").config;
    assert_eq!(dialling(&config).to.len(), 1);
    assert_eq!(dialling(&config).to[0].url, "wss://flag/");
    assert_eq!(config.spool_bytes_max, 8 << 20);
    assert_eq!(config.kept_bytes_max, 77);
    assert_eq!(config.drain_timeout, Duration::from_secs(3));
    assert_eq!(config.once_timeout, Duration::from_secs(60));

    let file = file_argument("b.log".as_ref(), desk.dir.path()).expect("a file");
    let place = Place::Flag("FILE");
    let source = SourceLayer {
        place: place.clone(),
        name: None,
        inputs: vec![At { value: file, place }],
        refused: false,
        mode: None,
        rotated: Vec::new(),
        syslog: SyslogSettings::default(),
        settings: SourceSettings::default(),
    };
    let flags = SendLayer { sources: vec![source], ..SendLayer::default() };
    let config = desk.send(flags, &format!("{SEND}{SOURCE}")).expect("good").config;
    assert_eq!(config.sources.len(), 1);
    assert_eq!(config.sources[0].name, desk.dir.path().join("b.log").display().to_string());
}

#[test]
fn plain_websocket_stays_on_this_machine_unless_the_danger_is_named() {
    let desk = Desk::new();
    let send = |to: &str, danger: &str| {
        let text = format!("to = '{to}'\ntoken_file = 'token'\n{danger}\n{SOURCE}");
        desk.send(SendLayer::default(), &text)
    };
    for to in ["ws://127.0.0.1:1/", "ws://[::1]:1/", "ws://localhost/", "ws+unix:/run/x.sock"] {
        assert!(send(to, "").is_ok_and(|loaded| loaded.warnings.is_empty()), "{to}");
    }
    for to in ["ws://10.0.0.1/", "ws://logs.example.com/", "ws://localhost.example.com/"] {
        assert!(send(to, "").is_err(), "{to}");
        assert!(send(to, "insecure_plaintext = false").is_err(), "{to}");
        let loaded = send(to, "insecure_plaintext = true").expect("the danger is named");
        assert!(loaded.warnings[0].contains("unencrypted"), "{to}");
    }
    let receive = |listen: &str, rest: &str| {
        let text = format!("listen = '{listen}'\ntokens = 'tokens.toml'\n{rest}\n");
        desk.receive(ReceiveLayer::default(), &text)
    };
    for listen in ["127.0.0.1:0", "[::1]:0", "unix:/run/x.sock"] {
        assert!(receive(listen, "").is_ok(), "{listen}");
    }
    for listen in ["0.0.0.0:0", "[::]:0", "10.0.0.1:8443"] {
        let message = receive(listen, "").expect_err(listen).to_string();
        assert!(message.contains("--tls-cert"), "{message}");
        assert!(receive(listen, "insecure_plaintext = true").is_ok(), "{listen}");
        assert!(receive(listen, "tls_cert = 'ca.pem'\ntls_key = 'key.pem'").is_ok(), "{listen}");
    }
}

#[test]
fn a_small_receiver_gets_the_documented_defaults() {
    let desk = Desk::new();
    let config = desk.receive(ReceiveLayer::default(), RECEIVE).expect("good").config;
    let DestinationConfig::Embedded(store) = config.destination else { panic!("not embedded") };
    assert_eq!(store.file, Path::new("/state/store.sqlite"));
    assert_eq!((store.keep_days, store.keep_bytes), (None, None));
    assert_eq!(config.rule, IndexRule::default());
    assert_eq!(config.days, (-400, 2));
    assert!(config.credit <= config.memory_bytes_max);
}

#[test]
fn bad_receivers_say_where_and_what_is_allowed() {
    let desk = Desk::new();
    for (text, expected) in [
        (
            format!("{RECEIVE}tls_cert = 'ca.pem'\n"),
            "c.toml:3:1: tls_cert: a certificate needs its key: give --tls-key FILE (tls_key)",
        ),
        (
            format!("{RECEIVE}tls_key = 'ca.pem'\ntls_cert = 'ca.pem'\n"),
            "has no PEM block -----BEGIN PRIVATE KEY-----",
        ),
        (
            format!("{RECEIVE}index = 'Logs'\n"),
            "c.toml:3:1: index: index rule \"Logs\" makes a name that Elasticsearch refuses",
        ),
        (
            format!("{RECEIVE}[elasticsearch]\nurls = ['http://a']\n[store]\nfile = 'x'\n"),
            "c.toml:6:1: store.file: there is one destination",
        ),
        (
            format!("{RECEIVE}[elasticsearch]\nurls = ['http://a']\n[store]\nkeep_days = 3\n"),
            "c.toml:6:1: store.keep_days: only the embedded store is bounded here",
        ),
        (
            format!("{RECEIVE}[elasticsearch]\nca = 'ca.pem'\n"),
            "c.toml:4:1: elasticsearch.ca: no Elasticsearch is named",
        ),
        (
            format!("{RECEIVE}[elasticsearch]\nurls = ['http://u:p@a']\n"),
            "c.toml:4:9: elasticsearch.urls: a URL must carry no user or password",
        ),
        (
            format!("{RECEIVE}[store]\nkeep_days = 0\n"),
            "c.toml:4:1: store.keep_days: must be from 1 to 36500",
        ),
        (
            format!("{RECEIVE}[store]\nkeep_day = 1\n"),
            "c.toml:4:1: store.keep_day: unknown key; did you mean keep_days? Allowed here: file, keep_bytes, \
             keep_days",
        ),
        (
            format!("{RECEIVE}[store]\ncolour = 1\n"),
            "c.toml:4:1: store.colour: unknown key; allowed here: file, keep_bytes, keep_days",
        ),
        (
            format!(
                "{RECEIVE}[elasticsearch]\nurls = 'http://a'\napi_key_file = 'token'\nuser_file = 'token'\n"
            ),
            "c.toml:6:1: elasticsearch.user_file: give an API key or a user, not both",
        ),
        (
            format!("{RECEIVE}credit = '1KiB'\n"),
            "c.toml:3:1: credit: must be at least one largest frame",
        ),
        ("listen = '8443'\ntokens = 'tokens.toml'\n".to_owned(), "must be HOST:PORT"),
        (
            "listen = '127.0.0.1:1'\ntokens = 'none'\n".to_owned(),
            "is not there: make it with 'waybill token NAME --tokens ",
        ),
    ] {
        let error = desk.receive(ReceiveLayer::default(), &text).expect_err(&text).to_string();
        assert!(error.contains(expected), "{text}\n{error}");
    }
}

#[test]
fn naming_a_destination_on_the_command_line_drops_the_other_of_the_file() {
    let desk = Desk::new();
    let store = StoreLayer {
        file: Some(At::flag("--store", "/flag.sqlite".into())),
        ..StoreLayer::default()
    };
    let flags = ReceiveLayer { store, ..ReceiveLayer::default() };
    let text = format!("{RECEIVE}[elasticsearch]\nurls = ['http://a']\nca = 'ca.pem'\n");
    let config = desk.receive(flags, &text).expect("good").config;
    assert!(matches!(config.destination, DestinationConfig::Embedded(_)));

    let elasticsearch = ElasticsearchLayer {
        urls: vec![At::flag("--elasticsearch", "http://b".to_owned())],
        ..ElasticsearchLayer::default()
    };
    let flags = ReceiveLayer { elasticsearch, ..ReceiveLayer::default() };
    let text = format!("{RECEIVE}[store]\nfile = 'x'\nkeep_days = 3\n");
    let config = desk.receive(flags, &text).expect("good").config;
    let DestinationConfig::Elasticsearch(found) = config.destination else { panic!("embedded") };
    assert_eq!(found.urls, ["http://b"]);
    assert_eq!(found.dead_letter_index, DEAD_LETTER_INDEX);
}

#[test]
fn secrets_that_everyone_can_read_are_warned_of() {
    let desk = Desk::new();
    let token = desk.dir.path().join("token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).expect("its mode");
    let loaded = desk.send(SendLayer::default(), &format!("{SEND}{SOURCE}")).expect("good");
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].contains("chmod 600"), "{:?}", loaded.warnings);
}

#[test]
fn a_file_whose_name_looks_like_a_pattern_is_that_file_too() {
    let desk = Desk::new();
    desk.write("app[1].log", "x\n");
    desk.write("app1.log", "x\n");
    let path = desk.dir.path().join("app[1].log");
    let TypedInput::Files { pattern, name, literal } =
        file_argument("app[1].log".as_ref(), desk.dir.path()).expect("a file")
    else {
        panic!("not files")
    };
    // Whoever makes such a file does not switch off the others.
    let found: Vec<_> = glob::glob(&pattern).expect("a pattern").flatten().collect();
    assert_eq!(found, [desk.dir.path().join("app1.log")]);
    assert_eq!(literal.as_ref(), Some(&path));
    assert_eq!(name, path.display().to_string());
}

#[test]
fn client_certificates_are_configured_in_pairs_and_where_they_can_be_checked() {
    let desk = Desk::new();
    let tls = format!("{RECEIVE}tls_cert = 'ca.pem'\ntls_key = 'key.pem'\nclient_ca = 'ca.pem'\n");
    let loaded = desk.receive(ReceiveLayer::default(), &tls).expect("good");
    assert_eq!(loaded.config.client_ca, Some(desk.dir.path().join("ca.pem")));
    assert!(!loaded.config.trust_client_headers);
    let unix = "listen = 'unix:/run/r.sock'\ntokens = 'tokens.toml'\ntrust_client_headers = true\n";
    let loaded = desk.receive(ReceiveLayer::default(), unix).expect("good");
    assert!(loaded.config.trust_client_headers);
    for (text, says) in [
        (format!("{RECEIVE}client_ca = 'ca.pem'\n"), "client certificates come with TLS"),
        (format!("{RECEIVE}trust_client_headers = true\n"), "could forge these headers"),
    ] {
        let error = desk.receive(ReceiveLayer::default(), &text).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }

    let both = format!("{SEND}cert = 'ca.pem'\nkey = 'key.pem'\n{SOURCE}");
    let loaded = desk.send(SendLayer::default(), &both).expect("good");
    let ConnectionConfig::Dial(dial) = loaded.config.connection else { panic!("it dials") };
    assert_eq!(dial.identity.expect("one").key, desk.dir.path().join("key.pem"));
    for (text, says) in [
        (format!("{SEND}cert = 'ca.pem'\n{SOURCE}"), "a certificate needs its key: give --key"),
        (format!("{SEND}key = 'key.pem'\n{SOURCE}"), "a key needs its certificate: give --cert"),
        (both.replace("wss://h/", "ws://127.0.0.1/"), "over wss:// only"),
    ] {
        let error = desk.send(SendLayer::default(), &text).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_listener_has_no_end_and_is_refused_with_once() {
    let desk = Desk::new();
    let once = || SendLayer { once: true, ..SendLayer::default() };
    desk.write("here.log", "");
    for source in [
        "unix_datagram = '/run/a.sock'",
        "unix_stream = '/run/a.sock'",
        "http_intake = '127.0.0.1:8514'",
        "syslog_udp = '127.0.0.1:5514'",
        "syslog_tcp = '127.0.0.1:5514'",
        "syslog_tls = '127.0.0.1:5514'\ntls_cert = 'ca.pem'\ntls_key = 'key.pem'",
        "supervisor_events = true",
    ] {
        let text = format!("{SEND}[[source]]\nfiles = 'here.log'\n[[source]]\n{source}\n");
        desk.send(SendLayer::default(), &text).expect("good without");
        let error = desk.send(once(), &text).expect_err(source).to_string();
        assert!(error.contains("a listener has no end") && error.contains(":6:"), "{error}");
    }
    let files = format!("{SEND}[[source]]\nfiles = 'here.log'\n[[source]]\nstdin = true\n");
    desk.send(once(), &files).expect("files and standard input end");
}

#[test]
fn once_wants_its_files_and_a_terminal_for_progress() {
    let desk = Desk::new();
    let load = |once, terminal| {
        let mut environment = desk.environment();
        environment.stderr_is_terminal = terminal;
        desk.write("c.toml", &format!("{SEND}[[source]]\nfiles = 'token'\n"));
        let flags = SendLayer { once, ..SendLayer::default() };
        load_send(flags, Some(Path::new("c.toml")), &environment).expect("good").config.progress
    };
    assert!(load(true, true));
    assert!(!load(true, false));
    assert!(!load(false, true));
    let flags = SendLayer { once: true, ..SendLayer::default() };
    let error = desk.send(flags, &format!("{SEND}[[source]]\nfiles = 'typo.log'\n"));
    assert!(error.expect_err("a typo").to_string().contains("typo.log is not there"));
}

/// Each example is loaded as it stands, with the files that it names beside it.
#[test]
fn the_documented_examples_load() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples");
    let read = |name| fs::read_to_string(examples.join(name)).expect("an example");
    let desk = Desk::new();
    desk.write("chain.pem", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n");
    desk.write("api-key", "id:key");

    let loaded = desk.send(SendLayer::default(), &read("sender.toml")).expect("a sender");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    assert_eq!(loaded.config.sources.len(), 6);
    assert_eq!(
        loaded.config.sources[2].input,
        Input::UnixStream { path: "/run/waybill/syslog.sock".into(), mode: 0o660 }
    );
    let address = "127.0.0.1:8514".parse().expect("an address");
    assert_eq!(loaded.config.sources[3].input, Input::HttpIntake { address });

    let loaded = desk.receive(ReceiveLayer::default(), &read("receiver.toml")).expect("a receiver");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    assert!(matches!(loaded.config.destination, DestinationConfig::Elasticsearch(_)));
}

/// What is commented out must be right too: each `# key = value` is loaded.
#[test]
fn the_keys_commented_out_in_the_examples_are_known() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples");
    let mut found = 0;
    for name in ["sender.toml", "receiver.toml"] {
        let text = fs::read_to_string(examples.join(name)).expect("an example");
        let mut lines = String::new();
        for line in text.lines() {
            let bare = line.strip_prefix("# ").filter(|rest| {
                rest.starts_with('[')
                    || rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
            });
            found += usize::from(bare.is_some());
            lines.push_str(bare.unwrap_or(line));
            lines.push('\n');
        }
        let desk = Desk::new();
        let error = match name {
            "sender.toml" => desk.send(SendLayer::default(), &lines).err(),
            _ => desk.receive(ReceiveLayer::default(), &lines).err(),
        };
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(!error.contains("unknown key") && !error.contains("must be a"), "{error}");
    }
    assert!(found >= 9, "only {found} keys found");
}
