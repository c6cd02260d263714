use std::net::SocketAddr;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::*;
use crate::config::{Listen, value};
use crate::protocol::{ChainKey, Control};
use crate::sender::Metrics;
use crate::sender::connection::Pace;
use crate::sender::link::Links;
use crate::spool::Budget;
use crate::transport::{ConnectError, Incoming, Offer, connect};

const LONG: Duration = Duration::from_secs(60);

struct Sender {
    _dir: TempDir,
    tokens: PathBuf,
    address: SocketAddr,
    running: JoinHandle<()>,
    stop: CancellationToken,
}

fn listen() -> Sender {
    let dir = tempfile::tempdir().expect("a folder");
    let tokens = dir.path().join("tokens.toml");
    std::fs::write(&tokens, "").expect("written");
    let stop = CancellationToken::new();
    let (links, _) = watch::channel(Links::default());
    let instance = Uuid::from_u128(7);
    let stopping = stop.clone();
    let metrics = Arc::new(Metrics::new(Arc::new(Budget::new(1 << 20))));
    let connections = Connections {
        instance,
        run: Uuid::from_u128(8),
        compress: false,
        pace: Pace::new(None),
        chain: None,
        links,
        stop: stopping,
        metrics,
    };
    let listen = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
    let config = ListenConfig { listen, tls: None, tokens: tokens.clone() };
    let listening = Listening::open(config, None).expect("bound");
    let address = listening.listener.local_addr().expect("an address");
    Sender { _dir: dir, tokens, address, running: tokio::spawn(listening.run(connections)), stop }
}

impl Sender {
    fn mint(&self, name: &str) -> String {
        tokens::mint(&self.tokens, name, tokens::Terms::default()).expect("minted")
    }

    async fn dial(&self, token: &str) -> Result<Socket, ConnectError> {
        let endpoint = value::endpoint(&format!("ws://{}/", self.address)).expect("a URL");
        connect(&endpoint, None, &Offer::new(token, SUBPROTOCOL), LONG).await
    }

    /// Until the file's change was noticed.
    async fn enter(&self, token: &str) -> Socket {
        loop {
            match self.dial(token).await {
                Ok(socket) => return socket,
                Err(ConnectError::Refused { status: 401, .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn http(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    }
}

#[tokio::test]
async fn who_may_not_enter_is_told_why() {
    let sender = listen();
    let token = sender.mint("central");
    drop(sender.enter(&token).await);
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(sender.http(&get("/health/live")).await.starts_with("HTTP/1.1 200"));
    let lost = sender.http(&get("/")).await;
    assert!(lost.starts_with("HTTP/1.1 426") && lost.contains("Waybill sender"), "{lost}");
    let post = sender.http("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert!(post.starts_with("HTTP/1.1 404"), "{post}");
    let upgrade = |token: &str, more: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Authorization: Bearer {token}\r\n{more}\r\n"
        )
    };
    let offer = "Sec-WebSocket-Protocol: waybill.v1\r\n";
    let wrong = sender.http(&upgrade("wb_wrong", offer)).await;
    assert!(wrong.starts_with("HTTP/1.1 401"), "{wrong}");
    let page = sender.http(&upgrade(&token, &format!("{offer}Origin: http://x\r\n"))).await;
    assert!(page.starts_with("HTTP/1.1 403"), "{page}");
    let none = sender.http(&upgrade(&token, "")).await;
    assert!(none.starts_with("HTTP/1.1 400") && none.contains("waybill.v1"), "{none}");
}

/// By a request that is no upgrade, which takes nobody's seat.
#[tokio::test]
async fn whether_a_token_lets_in_can_be_asked_while_a_receiver_is_connected() {
    let sender = listen();
    let chain = tokens::ChainTerm::Require(ChainKey::mint().expect("random bytes"));
    let with_key = tokens::Terms { chain, ..tokens::Terms::default() };
    let bound = tokens::mint(&sender.tokens, "chained", with_key).expect("minted");
    let (token, other) = (sender.mint("central"), sender.mint("standby"));
    let (_writing, mut reading) = sender.enter(&token).await.split();
    assert!(matches!(reading.next().await, Some(Ok(Incoming::Text(_)))), "hello");
    let get = |token: &str, more: &str| {
        format!("GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{more}\r\n")
    };
    for (request, status, words) in [
        (get(&token, ""), 200, TOKEN_LETS_IN),
        (get(&other, ""), 200, TOKEN_LETS_IN),
        (get("wb_wrong", ""), 401, "unknown"),
        (get(&bound, ""), 403, "chain key"),
        (get(&token, "Origin: http://x\r\n"), 403, "web pages"),
        (get(&token, "").replacen("GET", "POST", 1), 404, "no uploads"),
    ] {
        let answer = sender.http(&request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(answer.contains(words), "{answer}");
        assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
    }
    let same = sender.dial(&other).await;
    assert!(matches!(same, Err(ConnectError::Refused { status: 503, .. })), "its seat is kept");
}

/// Neither is checked here: what is bound to a certificate or a key is not let in by its token alone.
#[tokio::test]
async fn a_token_that_needs_a_certificate_or_a_key_opens_nothing() {
    let sender = listen();
    let key = ChainKey::mint().expect("random bytes");
    let with_certificate =
        tokens::Terms { certificates: vec![[7; 32]], ..tokens::Terms::default() };
    let chain = tokens::ChainTerm::Require(key);
    let with_key = tokens::Terms { chain, ..tokens::Terms::default() };
    let mut bound = Vec::new();
    for (name, terms) in [("certified", with_certificate), ("chained", with_key)] {
        bound.push(tokens::mint(&sender.tokens, name, terms).expect("minted"));
    }
    let token = sender.mint("central");
    drop(sender.enter(&token).await);
    for token in bound {
        match sender.dial(&token).await {
            Err(ConnectError::Refused { status: 403, .. }) => {}
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("it entered"),
        }
    }
}

#[tokio::test]
async fn a_receiver_hears_hello_whoever_dialled_and_the_end() {
    let sender = listen();
    let token = sender.mint("central");
    let (_writing, mut reading) = sender.enter(&token).await.split();
    match reading.next().await {
        Some(Ok(Incoming::Text(text))) => {
            assert!(
                matches!(Control::decode(&text), Ok(Control::Hello(hello)) if hello.instance == Uuid::from_u128(7))
            );
        }
        other => panic!("{other:?}"),
    }
    sender.stop.cancel();
    sender.running.await.expect("no panic");
    assert!(TcpStream::connect(sender.address).await.is_err(), "the listener is gone");
}

#[tokio::test]
async fn one_entry_takes_over_from_itself_and_another_one_stands_by() {
    let sender = listen();
    let (token, other) = (sender.mint("central"), sender.mint("standby"));
    let (_writing, mut old) = sender.enter(&token).await.split();
    match sender.dial(&other).await {
        Err(ConnectError::Refused { status: 503, retry_after, .. }) => {
            assert_eq!(retry_after, Some(STANDBY));
        }
        outcome => panic!("{outcome:?}"),
    }
    let new = sender.dial(&token).await.expect("it takes over");
    // The old one ends, and the new one is served.
    while let Some(Ok(_)) = old.next().await {}
    let (writing, mut reading) = new.split();
    assert!(matches!(reading.next().await, Some(Ok(Incoming::Text(_)))));
    drop((writing, reading));
    // Its seat is free once its end was noticed.
    loop {
        match sender.dial(&other).await {
            Ok(_) => break,
            Err(ConnectError::Refused { status: 503, .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn the_seat_is_shared_within_an_entry_and_free_when_its_last_connection_ends() {
    let seat = Arc::default();
    let (one, other) = (SenderId::mint(), SenderId::mint());
    let old = take(&seat, one).expect("it is free");
    let new = take(&seat, one).expect("the same receiver again");
    assert!(take(&seat, other).is_none(), "it stands by");
    drop(old);
    assert!(take(&seat, other).is_none(), "the new connection lives");
    drop(new);
    assert!(take(&seat, other).is_some());
}
