//! Bytes that no sender of ours would send, from a client written here: the connection that sends them ends with the
//! right close code, and nobody else notices.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream as StdTcpStream;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::servers::{free_port, wait_until};
use crate::support::store::{assert_lines, wait_for_lines};
use crate::support::waybill::{Bench, PATIENCE, Process, Receiver, lines};

const INSTANCE: &str = "01890a5d-ac96-774b-bcce-b302099a8057";
const SEGMENT: &str = "01890a5d-ac96-774b-bcce-b302099a8058";

/// A connection after the upgrade.
struct Client {
    socket: WebSocketStream<TcpStream>,
}

impl Client {
    async fn dial(port: u16, token: &str, subprotocol: &str) -> Result<Client, Box<Error>> {
        Client::try_dial(port, token, subprotocol).await.map_err(Box::new)
    }

    async fn try_dial(port: u16, token: &str, subprotocol: &str) -> Result<Client, Error> {
        let mut request = format!("ws://127.0.0.1:{port}/").into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("authorization", format!("Bearer {token}").parse().expect("a header"));
        headers.insert("sec-websocket-protocol", subprotocol.parse().expect("a header"));
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await?;
        Ok(Client { socket })
    }

    /// Says hello, and gives the welcome.
    async fn greet(&mut self) -> Value {
        self.say(
            json!({"type": "hello", "version": 1, "features": ["zstd"], "instance": INSTANCE}),
        )
        .await;
        self.hear().await
    }

    /// Declares a segment under this handle.
    async fn open(&mut self, welcome: &Value, handle: u32) {
        let row = json!({
            "segment": SEGMENT, "source": "s", "path": "/p", "host": "h", "start": 0,
            "day": welcome["days"]["to"], "type": "default",
            "framing": {"kind": "lines", "version": 1, "limit": 1 << 20},
            "sender": welcome["sender"], "rule": welcome["rule"],
        });
        self.say(json!({"type": "open", "handle": handle, "row": row})).await;
    }

    async fn say(&mut self, message: Value) {
        self.send(Message::text(message.to_string())).await;
    }

    /// The other side may have closed already; what it said is heard afterwards.
    async fn send(&mut self, message: Message) {
        let _ = self.socket.send(message).await;
    }

    /// The next control message.
    async fn hear(&mut self) -> Value {
        loop {
            match self.socket.next().await.expect("a message").expect("a message") {
                Message::Text(text) => return serde_json::from_str(&text).expect("JSON"),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("no control message: {other:?}"),
            }
        }
    }

    /// The close code, once it comes; receipts may come before it.
    async fn close_code(&mut self) -> u16 {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Close(Some(frame)))) => return frame.code.into(),
                Some(Ok(Message::Close(None))) => return 1005,
                Some(Ok(_)) => {}
                Some(Err(error)) => panic!("no close frame: {error}"),
                None => panic!("no close frame"),
            }
        }
    }
}

/// A data frame as the protocol has it.
fn frame(flags: u8, handle: u32, offset: u64, declared: u32, body: &[u8]) -> Message {
    let mut bytes = vec![1, flags, 0, 0];
    bytes.extend_from_slice(&handle.to_le_bytes());
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(&1_700_000_000_000_u64.to_le_bytes());
    bytes.extend_from_slice(&declared.to_le_bytes());
    bytes.extend_from_slice(body);
    Message::binary(bytes)
}

fn lines_frame(offset: u64, text: &str) -> Message {
    frame(0, 1, offset, u32::try_from(text.len()).expect("short"), text.as_bytes())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Peak resident memory of a process, in bytes.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    let kilobytes: u64 =
        line.trim().trim_end_matches(" kB").trim().parse().expect("a number of kB");
    kilobytes << 10
}

/// A receiver with a sender that is connected and has sent its first lines, and a token for the client.
struct Scene {
    bench: Bench,
    receiver: Receiver,
    sender: Process,
    token: String,
}

impl Scene {
    fn set() -> Scene {
        let bench = Bench::new();
        let token = fs::read_to_string(bench.token("stranger")).expect("the token");
        bench.token("test");
        let receiver = bench.receiver();
        bench.write("app.log", lines("line", 100));
        let sender = bench.sender(&receiver, &["app.log"]);
        wait_for_lines(&bench, 100);
        Scene { bench, receiver, sender, token: token.trim().to_owned() }
    }

    fn port(&self) -> u16 {
        self.receiver.port()
    }

    async fn dial(&self) -> Client {
        Client::dial(self.port(), &self.token, "waybill.v1").await.expect("the upgrade")
    }

    /// The connected sender goes on over its one connection, and the receiver is as small as before.
    fn nobody_noticed(mut self) {
        let more: String = (100..200).map(|number| format!("line {number}\n")).collect();
        self.bench.append("app.log", more);
        wait_for_lines(&self.bench, 200);
        assert_lines(&self.bench, "line", 200);
        assert!(self.receiver.process().is_running(), "{}", self.receiver.log());
        assert_eq!(self.sender.log().matches(" connected").count(), 1, "{}", self.sender.log());
        assert!(!self.receiver.log().contains("panicked"), "{}", self.receiver.log());
        let peak = peak_memory(self.receiver.process().id());
        assert!(peak < 150 << 20, "{} MiB", peak >> 20);
    }
}

/// Each message ends its connection with the code; all of them follow a good hello and open.
fn ends_with(messages: Vec<(&str, Message, u16)>) {
    let scene = Scene::set();
    runtime().block_on(async {
        for (what, message, code) in messages {
            let mut client = scene.dial().await;
            let welcome = client.greet().await;
            client.open(&welcome, 1).await;
            client.send(message).await;
            let closing = tokio::time::timeout(PATIENCE, client.close_code()).await;
            assert_eq!(closing.expect(what), code, "{what}");
        }
    });
    scene.nobody_noticed();
}

#[test]
fn malformed_frames_end_their_connection_only() {
    let unknown_kind = {
        let Message::Binary(bytes) = lines_frame(0, "a\n") else { unreachable!("a binary frame") };
        let mut bytes = bytes.to_vec();
        bytes[0] = 9;
        Message::binary(bytes)
    };
    ends_with(vec![
        ("an empty frame", Message::binary(Vec::new()), 1002),
        ("half a header", Message::binary(vec![1; 13]), 1002),
        ("an unknown kind", unknown_kind, 1002),
        ("an unknown flag", frame(0x80, 1, 0, 2, b"a\n"), 1002),
        ("more than declared", frame(0, 1, 0, 1, b"a\n"), 1002),
        ("less than declared", frame(0, 1, 0, 3, b"a\n"), 1002),
        ("an offset past any segment", frame(0, 1, u64::MAX, 2, b"a\n"), 1002),
        ("a handle that is not open", frame(0, 7, 0, 2, b"a\n"), 1002),
    ]);
}

#[test]
fn oversized_frames_and_messages_end_their_connection_only() {
    ends_with(vec![
        ("a frame that declares too much", frame(0, 1, 0, u32::MAX, b"a\n"), 1009),
        ("a frame that declares nothing", frame(0, 1, 0, 0, b""), 1009),
        ("a message of 64 MB", Message::binary(vec![b'x'; 64 << 20]), 1009),
        ("a control message of 2 MB", Message::text("x".repeat(2 << 20)), 1009),
        (
            "a control message of 100 kB",
            Message::text(format!("\"{}\"", "x".repeat(100_000))),
            1009,
        ),
    ]);
}

#[test]
fn a_zstd_bomb_does_not_go_off() {
    let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 19).expect("zstd");
    let declared = 1 << 20;
    ends_with(vec![
        ("a bomb", frame(1, 1, 0, declared, &bomb), 1007),
        ("a bomb that declares two bytes", frame(1, 1, 0, 2, &bomb), 1007),
        ("no zstd at all", frame(1, 1, 0, 2, b"not zstd"), 1007),
    ]);
}

#[test]
fn control_garbage_ends_its_connection_only() {
    ends_with(vec![
        ("no JSON", Message::text("hello"), 1007),
        ("no object", Message::text("[]"), 1007),
        ("an unknown type", Message::text(r#"{"type":"nonsense"}"#), 1007),
        (
            "a second hello",
            Message::text(format!(r#"{{"type":"hello","version":1,"instance":"{INSTANCE}"}}"#)),
            1002,
        ),
        (
            "a receipt from the sender",
            Message::text(r#"{"type":"receipt","handle":1,"from":0,"to":1,"runs":[]}"#),
            1002,
        ),
        ("nesting without end", Message::text("[".repeat(60_000)), 1007),
    ]);
}

/// Nobody takes the lines, so that no receipt returns credit.
#[test]
fn more_bytes_than_the_credit_end_the_connection() {
    let bench = Bench::new();
    let token = fs::read_to_string(bench.token("stranger")).expect("the token");
    let mut receiver = bench.receiver_into(&format!("http://127.0.0.1:{}", free_port()), "nobody");
    runtime().block_on(async {
        let dialled = Client::dial(receiver.port(), token.trim(), "waybill.v1").await;
        let mut client = dialled.expect("the upgrade");
        let welcome = client.greet().await;
        client.open(&welcome, 1).await;
        let credit = welcome["credit"].as_u64().expect("a credit");
        let piece = format!("{}\n", "x".repeat((1 << 20) - 1));
        let mut sent = 0;
        while sent <= credit {
            client.send(lines_frame(sent, &piece)).await;
            sent += piece.len() as u64;
        }
        let closing = tokio::time::timeout(PATIENCE, client.close_code()).await;
        assert_eq!(closing.expect("an end"), 1008);
    });
    assert!(receiver.process().is_running(), "{}", receiver.log());
    let peak = peak_memory(receiver.process().id());
    assert!(peak < 200 << 20, "{} MiB", peak >> 20);
}

#[test]
fn an_unknown_subprotocol_is_refused_at_the_handshake() {
    let scene = Scene::set();
    runtime().block_on(async {
        let refused = Client::dial(scene.port(), &scene.token, "waybill.v9").await;
        match refused.err().map(|error| *error) {
            Some(Error::Http(answer)) => assert_eq!(answer.status(), 400),
            other => panic!("no refusal: {other:?}"),
        }
        let refused = Client::dial(scene.port(), "waybill_nobody", "waybill.v1").await;
        match refused.err().map(|error| *error) {
            Some(Error::Http(answer)) => assert_eq!(answer.status(), 401),
            other => panic!("no refusal: {other:?}"),
        }
    });
    scene.nobody_noticed();
}

#[test]
fn a_client_that_says_nothing_is_shown_out_and_holds_up_nobody() {
    let scene = Scene::set();
    // Before the upgrade: connections that send nothing, or half a request.
    let silent: Vec<StdTcpStream> = (0..50)
        .map(|number| {
            let mut stream = StdTcpStream::connect(("127.0.0.1", scene.port())).expect("connected");
            if number % 2 == 0 {
                stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nx: ").expect("written");
            }
            stream
        })
        .collect();
    runtime().block_on(async {
        let mut client = scene.dial().await;
        let closing = tokio::time::timeout(PATIENCE, client.close_code()).await;
        assert_eq!(closing.expect("it is shown out"), 1008);
    });
    // Those before the upgrade are closed as well.
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut rest = Vec::new();
        // A reset is an end, too.
        let ended = stream.read_to_end(&mut rest);
        assert!(
            !ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
            "still open"
        );
    }
    scene.nobody_noticed();
}

#[test]
fn a_client_that_is_no_websocket_gets_an_answer() {
    let scene = Scene::set();
    for (request, status) in [
        ("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "426"),
        ("POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\nab", "404"),
        ("GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "200"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03\r\n\r\n", "400"),
    ] {
        let mut stream = StdTcpStream::connect(("127.0.0.1", scene.port())).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream.write_all(request.as_bytes()).expect("written");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let wanted = format!("HTTP/1.1 {status}");
        assert!(answer.starts_with(&wanted) || status == "400", "{request:?}: {answer:?}");
    }
    scene.nobody_noticed();
}

#[test]
fn the_other_end_of_a_wrong_port_is_named() {
    // Something listens there that is no receiver.
    let bench = Bench::new();
    bench.token("test");
    let port = free_port();
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).expect("a port");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut head = [0; 4096];
            let _ = stream.read(&mut head);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
        }
    });
    bench.write("app.log", "a line\n");
    let command = bench.send_command(&format!("ws://127.0.0.1:{port}/"), &["app.log"]);
    let sender = Process::start("sender", command, bench.path("sender.log"));
    sender.wait_for_log("check host and path");
    wait_until("nothing is receipted", PATIENCE, || !sender.log().contains(" connected"));
}
