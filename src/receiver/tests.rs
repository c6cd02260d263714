//! A receiver over real sockets, with a sender written by hand and a destination in the test.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::*;
use crate::config::{DestinationConfig, EmbeddedConfig, Endpoint, EndpointAddress, Listen};
use crate::destination::Frame;
use crate::protocol::{
    Control, DataFrame, FrameFlags, Hello, MESSAGE_BYTES_MAX, Open, Receipt, RefusalCode, Run,
    SUBPROTOCOL, VERSION, Verdict, Welcome,
};
use crate::record::{Day, Format, Framing, IndexRule, Prefix, Row, SegmentId, SenderId};
use crate::transport::{
    ConnectError, Incoming, Offer, Outgoing, SocketReceiver, SocketSender, close, connect,
};

const LONG: Duration = Duration::from_secs(60);
const CREDIT: u64 = 2 << 20;

struct Server {
    _dir: TempDir,
    tokens: PathBuf,
    token: String,
    address: SocketAddr,
    queue: Arc<Queue>,
    shutdown: Shutdown,
    running: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}

fn config(dir: &TempDir) -> ReceiveConfig {
    ReceiveConfig {
        listen: Some(Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)))),
        tls: None,
        dials: Vec::new(),
        client_ca: None,
        trust_client_headers: false,
        tokens: dir.path().join("tokens.toml"),
        destination: DestinationConfig::Embedded(EmbeddedConfig {
            file: dir.path().join("store.sqlite"),
            keep_days: None,
            keep_bytes: None,
        }),
        rule: IndexRule::default(),
        former_rules: vec![IndexRule::parse("old-{type}").expect("rule")],
        days: (-400, 2),
        credit: CREDIT,
        memory_bytes_max: 64 << 20,
        drain_timeout: LONG,
        metrics: None,
    }
}

fn serve_with(change: impl FnOnce(&mut ReceiveConfig, &mut Duration)) -> Server {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut config = config(&dir);
    let mut hello_timeout = HELLO_TIMEOUT;
    change(&mut config, &mut hello_timeout);
    let token = tokens::mint(&config.tokens, "web-1", tokens::Terms::default()).expect("mint");
    let (queue, shutdown) = (Arc::new(Queue::default()), Shutdown::new());
    let store = crate::destination::Destination::open(&config.destination).expect("store");
    let lookup = Lookup::new(&config.destination).expect("lookup");
    let (profile, metrics) = (store.profile(), Arc::default());
    let new =
        Receiver::new(&config, &profile, lookup, Arc::clone(&queue), shutdown.clone(), metrics);
    let mut receiver = new.expect("receiver");
    receiver.hello_timeout = hello_timeout;
    receiver.tokens_interval = Duration::from_millis(5);
    let listener = Listener::bind(&config.listen.expect("an address"), None).expect("bind");
    let address = listener.local_addr().expect("address");
    let running = tokio::spawn(receiver.run(Some(listener), Vec::new()));
    Server { _dir: dir, tokens: config.tokens, token, address, queue, shutdown, running }
}

fn serve() -> Server {
    serve_with(|_, _| {})
}

/// Answers each frame as stored, one line per frame.
fn destination(queue: &Arc<Queue>) {
    let queue = Arc::clone(queue);
    tokio::spawn(async move {
        while let Some(frame) = queue.pop().await {
            stored(&frame);
        }
    });
}

fn stored(frame: &Frame) {
    let to = frame.offset + frame.records.len() as u64;
    frame.reply.send_one(frame.offset, to, 1, Verdict::Stored);
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        url: format!("ws://{address}/"),
        tls: false,
        address: EndpointAddress::Tcp { host: address.ip().to_string(), port: address.port() },
        host: address.to_string(),
        path: "/".to_owned(),
        proxy: None,
    }
}

async fn dial(server: &Server, token: &str) -> Result<Client, ConnectError> {
    let socket =
        connect(&endpoint(server.address), None, &Offer::new(token, SUBPROTOCOL), LONG).await?;
    let (sender, receiver) = socket.split();
    Ok(Client { sender, receiver })
}

async fn refused(server: &Server, token: &str) -> u16 {
    match dial(server, token).await {
        Err(ConnectError::Refused { status, .. }) => status,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("let in"),
    }
}

/// A sender written by hand.
struct Client {
    sender: SocketSender,
    receiver: SocketReceiver,
}

impl Client {
    async fn send(&mut self, message: Outgoing) {
        self.sender.feed(message).await.expect("feed");
        self.sender.flush().await.expect("flush");
    }

    async fn text(&mut self, text: &str) {
        self.send(Outgoing::Text(text.to_owned())).await;
    }

    async fn frame(&mut self, handle: u32, offset: u64, records: Vec<u8>) {
        let flags = FrameFlags::default();
        let frame = DataFrame { handle, flags, offset, read_at: 5, records: records.into() };
        self.send(Outgoing::Binary(frame.encode(false))).await;
    }

    async fn control(&mut self) -> Control {
        loop {
            match self.receiver.next().await {
                Some(Ok(Incoming::Text(text))) => return Control::decode(&text).expect("control"),
                Some(Ok(Incoming::Ping | Incoming::Pong(_))) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn receipt(&mut self) -> Receipt {
        match self.control().await {
            Control::Receipt(receipt) => receipt,
            other => panic!("{other:?}"),
        }
    }

    async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.receiver.next().await {
                Some(Ok(Incoming::Close { code, reason })) => return (code, reason),
                Some(Ok(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn hello(&mut self) -> Welcome {
        let hello = Hello {
            version: VERSION,
            features: vec!["zstd".to_owned(), "later".to_owned()],
            instance: Uuid::from_u128(7),
            run: None,
            agent: "test".to_owned(),
            chain: None,
        };
        self.text(&Control::Hello(hello).encode()).await;
        match self.control().await {
            Control::Welcome(welcome) => welcome,
            other => panic!("{other:?}"),
        }
    }

    async fn open(&mut self, handle: u32, row: Row) {
        self.text(&Control::Open(Box::new(Open { handle, row })).encode()).await;
    }

    async fn refusal(&mut self) -> (RefusalCode, String) {
        match self.control().await {
            Control::Refused(refused) => (refused.code, refused.reason),
            other => panic!("{other:?}"),
        }
    }
}

fn row(sender: SenderId) -> Row {
    Row {
        segment: SegmentId::mint(),
        source: "app".to_owned(),
        path: "/var/log/app.log".to_owned(),
        host: "web".to_owned(),
        device: 0,
        inode: 0,
        start: 0,
        end: None,
        cuts: Vec::new(),
        day: Day::today(),
        type_name: "nginx".parse().expect("type"),
        tags: Vec::new(),
        labels: BTreeMap::new(),
        framing: Framing::LINES,
        format: Format::Auto,
        timezone: "UTC".to_owned(),
        sender: Some(sender),
        rule: Some(IndexRule::default()),
        first_bytes: Prefix::default(),
    }
}

/// A connected sender with one segment open under handle 1.
async fn ready(server: &Server) -> Client {
    let mut client = dial(server, &server.token).await.expect("connect");
    let sender = client.hello().await.sender;
    client.open(1, row(sender)).await;
    client
}

#[tokio::test]
async fn a_frame_reaches_the_destination_and_its_receipt_comes_back() {
    let server = serve();
    let mut client = dial(&server, &server.token).await.expect("connect");
    let welcome = client.hello().await;
    assert_eq!((welcome.name.as_str(), welcome.credit), ("web-1", CREDIT));
    assert_eq!(welcome.features, ["zstd"], "only what both sides know");
    assert_eq!(welcome.days.from, Day::today().plus(-400));
    client.open(1, row(welcome.sender)).await;
    client.frame(1, 100, b"one\ntwo\n".to_vec()).await;

    let frame = server.queue.pop().await.expect("frame");
    assert_eq!(&*frame.records, b"one\ntwo\n");
    assert_eq!((frame.offset, frame.read_at, frame.continues), (100, 5, false));
    assert_eq!(frame.segment.sender, welcome.sender);
    assert!(frame.segment.index.starts_with("waybill-nginx-"), "{}", frame.segment.index);
    stored(&frame);
    let receipt = client.receipt().await;
    assert_eq!((receipt.handle, receipt.from, receipt.to), (1, 100, 108));
    assert_eq!(receipt.runs[0].verdict, Verdict::Stored);
}

#[tokio::test]
async fn only_a_valid_token_is_let_in() {
    let server = serve();
    assert_eq!(refused(&server, "wb_wrong").await, 401);
    assert_eq!(refused(&server, "").await, 401);
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(dial(&server, &server.token).await.expect("connect"));
    }
    assert_eq!(refused(&server, &server.token).await, 429);
    let mut last = open.pop().expect("a connection");
    last.sender.close(close::NORMAL, "").await.expect("close");
    last.closed().await;
    // Its slot comes back once the task has ended, shortly after the handshake.
    while dial(&server, &server.token).await.is_err() {
        tokio::task::yield_now().await;
    }
}

async fn http(server: &Server, request: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(server.address).await.expect("connect");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("read");
    String::from_utf8(answer).expect("text")
}

#[tokio::test]
async fn plain_requests_get_health_or_a_word() {
    let server = serve();
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(http(&server, &get("/health/live")).await.starts_with("HTTP/1.1 200"));
    assert!(http(&server, &get("/health/ready")).await.starts_with("HTTP/1.1 200"));
    let lost = http(&server, &get("/")).await;
    assert!(lost.starts_with("HTTP/1.1 426") && lost.contains("Waybill receiver"), "{lost}");
    let post = http(&server, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert!(post.starts_with("HTTP/1.1 404"), "{post}");
    let nameless = |more: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
        )
    };
    let protocol = "Sec-WebSocket-Protocol: waybill.v1\r\n";
    assert!(http(&server, &nameless(protocol)).await.starts_with("HTTP/1.1 401"));
    let upgrade =
        |more: &str| nameless(&format!("Authorization: Bearer {}\r\n{more}", server.token));
    let page = upgrade("Sec-WebSocket-Protocol: waybill.v1\r\nOrigin: http://x\r\n");
    assert!(http(&server, &page).await.starts_with("HTTP/1.1 403"));
    let other = http(&server, &upgrade("Sec-WebSocket-Protocol: chat, waybill.v9\r\n")).await;
    assert!(other.starts_with("HTTP/1.1 400") && other.contains("waybill.v1"), "{other}");
    let none = http(&server, &upgrade("")).await;
    assert!(none.starts_with("HTTP/1.1 400"), "{none}");
}

#[tokio::test]
async fn a_sender_that_says_nothing_is_closed() {
    let server = serve_with(|_, hello| *hello = Duration::from_millis(10));
    let mut client = dial(&server, &server.token).await.expect("connect");
    assert_eq!(client.closed().await, (close::POLICY, "said nothing".to_owned()));
}

#[tokio::test]
async fn each_kind_of_nonsense_has_its_close_code() {
    let server = serve();
    for (text, code) in [
        ("{", close::BAD_DATA),
        (r#"{"type":"nonsense"}"#, close::BAD_DATA),
        (r#"{"type":"credit","bytes":5}"#, close::PROTOCOL),
        (
            r#"{"type":"hello","version":9,"instance":"01890a5d-ac96-774b-bcce-b302099a8057"}"#,
            close::PROTOCOL,
        ),
    ] {
        let mut client = dial(&server, &server.token).await.expect("connect");
        client.text(text).await;
        assert_eq!(client.closed().await.0, code, "{text}");
    }
    let good = DataFrame {
        handle: 1,
        flags: FrameFlags::default(),
        offset: 0,
        read_at: 0,
        records: vec![b'\n'; 100].into(),
    };
    let good = good.encode(false);
    let mut bomb = good.to_vec();
    bomb[1] = 1;
    let mut huge = good.to_vec();
    huge[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    for (bytes, code) in [
        (b"short".to_vec(), close::PROTOCOL),
        (vec![0xff; 100], close::PROTOCOL),
        (bomb, close::BAD_DATA),
        (huge, close::TOO_BIG),
    ] {
        let mut client = ready(&server).await;
        client.send(Outgoing::Binary(bytes.clone().into())).await;
        assert_eq!(client.closed().await.0, code, "{bytes:?}");
    }
    let mut client = ready(&server).await;
    client.frame(2, 0, b"x\n".to_vec()).await;
    let (code, reason) = client.closed().await;
    assert!(code == close::PROTOCOL && reason.contains("not open"), "{reason}");
    let mut client = dial(&server, &server.token).await.expect("connect");
    client.send(Outgoing::Text("x".repeat(MESSAGE_BYTES_MAX))).await;
    assert_eq!(client.closed().await.0, close::TOO_BIG);
    assert!(server.queue.try_pop().is_none(), "nothing of it went further");
}

#[tokio::test]
async fn a_refused_segment_names_the_line_that_mends_it_and_the_others_go_on() {
    let server = serve();
    let mut client = dial(&server, &server.token).await.expect("connect");
    let sender = client.hello().await.sender;
    let good = row(sender);
    let rule = |text| Some(IndexRule::parse(text).expect("rule"));
    let cases = [
        (Row { sender: Some(SenderId::mint()), ..good.clone() }, RefusalCode::Sender, "another"),
        (Row { sender: None, ..good.clone() }, RefusalCode::Sender, "another"),
        (
            Row { rule: rule("mine-{type}"), ..good.clone() },
            RefusalCode::Rule,
            r#"former_index = ["mine-{type}"]"#,
        ),
        (
            Row { type_name: "secret".parse().expect("type"), ..good.clone() },
            RefusalCode::Type,
            r#""secret"]"#,
        ),
        (Row { day: Day::today().plus(9), ..good.clone() }, RefusalCode::Day, "clock"),
        (Row { day: Day::today().plus(-500), ..good.clone() }, RefusalCode::Day, "days_before"),
        (
            Row { framing: Framing::Lines { version: 9, limit: 5 }, ..good.clone() },
            RefusalCode::Framing,
            "update",
        ),
        (Row { tags: vec!["x".to_owned(); 65], ..good.clone() }, RefusalCode::Row, "shorten"),
        (Row { path: "x".repeat(20_000), ..good.clone() }, RefusalCode::Row, "shorten"),
    ];
    for (handle, (row, code, words)) in (10..).zip(cases) {
        client.open(handle, row).await;
        let (found, reason) = client.refusal().await;
        assert_eq!(found, code, "{reason}");
        assert!(reason.contains(words), "{reason}");
        client.frame(handle, 0, b"dropped\n".to_vec()).await;
    }
    client.open(1, Row { rule: rule("old-{type}"), ..good }).await;
    client.frame(1, 0, b"kept\n".to_vec()).await;
    let frame = server.queue.pop().await.expect("frame");
    assert_eq!((&*frame.records, frame.segment.index.as_str()), (&b"kept\n"[..], "old-nginx"));
}

#[tokio::test]
async fn credit_comes_back_with_receipts_and_its_violation_closes() {
    let server = serve();
    let mut client = ready(&server).await;
    let size = 1 << 20;
    for turn in 0..6 {
        client.frame(1, turn * size, vec![b'x'; size as usize]).await;
        stored(&server.queue.pop().await.expect("frame"));
        assert_eq!(client.receipt().await.to, (turn + 1) * size);
    }
    for turn in 6..9 {
        client.frame(1, turn * size, vec![b'x'; size as usize]).await;
    }
    let (code, reason) = client.closed().await;
    assert!(code == close::POLICY && reason.contains("credit"), "{code} {reason}");
}

/// I7: rows are kept as long as their connection, whether they are accepted or not.
#[tokio::test]
async fn rows_of_too_many_bytes_ask_for_a_new_connection() {
    let server = serve();
    let mut client = dial(&server, &server.token).await.expect("connect");
    let sender = client.hello().await.sender;
    client.open(0, row(sender)).await;
    client.frame(0, 0, b"a line\n".to_vec()).await;
    for handle in 1..850 {
        client.open(handle, Row { path: "x".repeat(10_000), ..row(sender) }).await;
    }
    // Not before what came is answered, or the next connection might get no further.
    let closed = tokio::time::timeout(Duration::from_millis(200), client.closed()).await;
    assert!(closed.is_err(), "{closed:?}");
    stored(&server.queue.pop().await.expect("frame"));
    assert_eq!(client.receipt().await.to, 7);
    let (code, reason) = client.closed().await;
    assert!(code == close::RESTART && reason.contains("connect again"), "{code} {reason}");
}

/// I7: short lines with different verdicts are long receipts.
#[tokio::test]
async fn while_very_many_lines_await_a_receipt_nothing_is_read() {
    let server = serve();
    let mut client = ready(&server).await;
    let lines = b"x\n\n".repeat(100_000);
    let to = lines.len() as u64;
    client.frame(1, 0, lines).await;
    // Read at once, this would end the connection without the receipt.
    client.text("{").await;
    let frame = server.queue.pop().await.expect("frame");
    let run = |verdict, to| Run { to, lines: 1, verdict };
    let runs = (0..100_000)
        .flat_map(|n| [run(Verdict::Stored, 3 * n + 2), run(Verdict::Skipped, 3 * n + 3)]);
    frame.reply.send(0, runs);
    let receipt = client.receipt().await;
    assert!(receipt.from == 0 && receipt.to < to, "{} of {to}", receipt.to);
    assert_eq!(client.closed().await.0, close::BAD_DATA);
}

/// I7: a frame waits for memory, and the connection lives on meanwhile.
#[tokio::test]
async fn a_full_receiver_stops_reading_and_still_gives_receipts() {
    let server = serve_with(|config, _| config.memory_bytes_max = 1);
    let mut client = ready(&server).await;
    let size = 1 << 20;
    client.frame(1, 0, vec![b'x'; size]).await;
    client.frame(1, size as u64, vec![b'y'; size]).await;
    let first = server.queue.pop().await.expect("frame");
    stored(&first);
    assert_eq!(client.receipt().await.to, size as u64);
    assert!(server.queue.try_pop().is_none(), "the second waits for the memory of the first");
    drop(first);
    let second = server.queue.pop().await.expect("frame");
    assert_eq!(second.offset, size as u64);
}

#[tokio::test]
async fn a_revoked_token_ends_its_live_connection_and_a_new_one_works_without_a_restart() {
    let server = serve();
    destination(&server.queue);
    let mut client = ready(&server).await;
    client.frame(1, 0, b"x\n".to_vec()).await;
    client.receipt().await;

    let other = tokens::mint(&server.tokens, "web-2", tokens::Terms::default()).expect("mint");
    while dial(&server, &other).await.is_err() {
        tokio::task::yield_now().await;
    }
    client.frame(1, 2, b"y\n".to_vec()).await;
    assert_eq!(client.receipt().await.to, 4, "another's token disturbs nobody");

    tokens::revoke(&server.tokens, "web-1").expect("revoke");
    let (code, reason) = client.closed().await;
    assert!(code == close::POLICY && reason.contains("revoked"), "{code} {reason}");
    assert_eq!(refused(&server, &server.token).await, 401);
}

#[tokio::test]
async fn an_entry_edited_by_hand_is_taken_over() {
    let server = serve();
    let mut before = dial(&server, &server.token).await.expect("connect");
    assert_eq!(before.hello().await.name, "web-1");
    let text = std::fs::read_to_string(&server.tokens).expect("read");
    std::fs::write(&server.tokens, text.replace("web-1", "renamed")).expect("write");
    let (code, reason) = before.closed().await;
    assert!(code == close::RESTART && reason.contains("connect again"), "{code} {reason}");
    let mut after = dial(&server, &server.token).await.expect("connect");
    assert_eq!(after.hello().await.name, "renamed");
}

#[tokio::test]
async fn a_drain_answers_what_came_and_takes_nobody_new() {
    let mut server = serve();
    let mut client = ready(&server).await;
    let mut idle = dial(&server, &server.token).await.expect("connect");
    idle.hello().await;
    client.frame(1, 0, b"x\n".to_vec()).await;
    let frame = server.queue.pop().await.expect("frame");
    server.shutdown.request();
    assert_eq!(idle.closed().await.0, close::GOING_AWAY);
    assert!(matches!(client.control().await, Control::Drain(drain) if drain.within == LONG));
    assert_eq!(refused(&server, &server.token).await, 503);
    stored(&frame);
    assert_eq!(client.receipt().await.to, 2);
    assert_eq!(client.closed().await.0, close::GOING_AWAY);
    drop((client, idle));
    (&mut server.running).await.expect("ends");
}

#[tokio::test]
async fn a_drain_gives_up_at_its_deadline() {
    let mut server = serve_with(|config, _| config.drain_timeout = Duration::from_millis(20));
    let mut client = ready(&server).await;
    client.frame(1, 0, b"x\n".to_vec()).await;
    let _held = server.queue.pop().await.expect("frame");
    server.shutdown.request();
    let (code, reason) = client.closed().await;
    assert!(code == close::GOING_AWAY && reason.contains("before all"), "{code} {reason}");
    drop(client);
    (&mut server.running).await.expect("ends");
}

#[tokio::test]
async fn a_receipt_of_very_many_runs_comes_in_parts() {
    let server = serve();
    let mut client = ready(&server).await;
    let size = 1 << 16;
    client.frame(1, 0, vec![b'\n'; size]).await;
    let frame = server.queue.pop().await.expect("frame");
    let runs = (0..size as u64).map(|at| crate::protocol::Run {
        to: at + 1,
        lines: 1,
        verdict: if at % 2 == 0 { Verdict::Stored } else { Verdict::Skipped },
    });
    frame.reply.send(0, runs);
    let (mut at, mut parts, mut runs) = (0, 0, 0);
    while at < size as u64 {
        let receipt = client.receipt().await;
        assert_eq!(receipt.from, at, "in order, without a gap");
        assert!(Control::Receipt(receipt.clone()).encode().len() <= 64 << 10);
        (at, parts, runs) = (receipt.to, parts + 1, runs + receipt.runs.len());
    }
    assert_eq!((at, runs), (size as u64, size));
    assert!(parts > 1);
}

/// Whatever the configuration says: over TCP a header is a claim, and a token that needs its
/// certificate is refused.
#[tokio::test]
async fn a_certificate_in_a_header_counts_for_nothing_over_tcp() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let server = serve_with(|config, _| config.trust_client_headers = true);
    let key = rcgen::KeyPair::generate().expect("key");
    let params = rcgen::CertificateParams::new(["web-2".to_owned()]).expect("params");
    let pem = params.self_signed(&key).expect("certificate").pem();
    let fingerprint = crate::tls::fingerprint_of_pem(pem.as_bytes()).expect("a fingerprint");
    let terms = tokens::Terms { certificates: vec![fingerprint], ..tokens::Terms::default() };
    let token = tokens::mint(&server.tokens, "web-2", terms).expect("mint");
    while refused(&server, &token).await != 403 {
        tokio::task::yield_now().await;
    }
    let escaped = percent_encoding::utf8_percent_encode(&pem, percent_encoding::NON_ALPHANUMERIC);
    let request = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nAuthorization: Bearer {token}\r\n\
         X-Client-Verify: SUCCESS\r\nX-Client-Certificate: {escaped}\r\n\r\n"
    );
    let mut stream = tokio::net::TcpStream::connect(server.address).await.expect("connect");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(answer.contains("none was shown"), "{answer}");
}
