//! Both ends over real sockets on port 0, with certificates made for the occasion.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ClientConfig;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::config::{Endpoint, EndpointAddress, Identity, Listen};
use crate::protocol::{MESSAGE_BYTES_MAX, SUBPROTOCOL};
use crate::tls;

const LONG: Duration = Duration::from_secs(60);

/// Accepts the token `good` and sends back what comes.
struct Echo;

impl Handler for Echo {
    type Session = ();

    fn answer(&self, request: &Request) -> Answer<()> {
        match request.header("authorization") {
            Some("Bearer good") if request.offers(SUBPROTOCOL) => Answer::Accept {
                subprotocol: SUBPROTOCOL,
                challenge: None,
                types: None,
                session: (),
            },
            Some("Bearer busy") => Answer::Refuse(Refuse {
                retry_after: Some(Duration::from_secs(7)),
                ..Refuse::new(429, "too many\n")
            }),
            Some("Bearer good") => Answer::Refuse(Refuse::new(400, "waybill.v1 is spoken here\n")),
            _ => Answer::Refuse(Refuse::new(401, "unknown token\x1b[31m\n")),
        }
    }

    async fn serve(self: Arc<Self>, (): (), socket: Socket) {
        let (mut sender, mut receiver) = socket.split();
        while let Some(message) = receiver.next().await {
            let sent = match message {
                Ok(Incoming::Text(text)) => sender.feed(Outgoing::Text(text.to_string())).await,
                Ok(Incoming::Binary(bytes)) => sender.feed(Outgoing::Binary(bytes)).await,
                Ok(_) => Ok(()),
                Err(error) => match error.close_code() {
                    Some(code) => sender.close(code, &error.to_string()).await,
                    None => return,
                },
            };
            if sent.is_err() || sender.flush().await.is_err() {
                return;
            }
        }
    }
}

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn serve(tls: Option<Arc<tls::ServerCertificate>>) -> Server {
    let any = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
    run(Listener::bind(&any, tls).expect("bind"))
}

fn run(listener: Listener) -> Server {
    let address = listener.local_addr().expect("address");
    let stop = CancellationToken::new();
    tokio::spawn(listener.run(Arc::new(Echo), TaskTracker::new(), stop.clone()));
    Server { address, stop }
}

fn endpoint(address: SocketAddr, tls: bool) -> Endpoint {
    Endpoint {
        url: format!("{}://localhost:{}/", if tls { "wss" } else { "ws" }, address.port()),
        tls,
        address: EndpointAddress::Tcp { host: "127.0.0.1".to_owned(), port: address.port() },
        host: format!("localhost:{}", address.port()),
        path: "/".to_owned(),
        proxy: None,
    }
}

async fn dial(
    server: &Server,
    tls: Option<Arc<ClientConfig>>,
    token: &str,
) -> Result<Socket, ConnectError> {
    connect(&endpoint(server.address, tls.is_some()), tls, &Offer::new(token, SUBPROTOCOL), LONG)
        .await
}

/// An authority, and what it signs.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let dir = tempfile::tempdir().expect("tempdir");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("certificate");
        std::fs::write(dir.path().join("ca.pem"), certificate.pem()).expect("write");
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    fn client(&self) -> Arc<ClientConfig> {
        tls::client_config(Some(&self.dir.path().join("ca.pem")), None).expect("client")
    }

    fn files(&self, name: &str, years: (i32, i32)) -> Identity {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new([name.to_owned()]).expect("params");
        params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let path = |suffix: &str| self.dir.path().join(format!("{name}.{}.{suffix}", years.1));
        let files = Identity { certificate: path("crt"), key: path("key") };
        std::fs::write(&files.certificate, certificate.pem()).expect("write");
        std::fs::write(&files.key, key.serialize_pem()).expect("write");
        files
    }

    fn server(&self, name: &str, years: (i32, i32)) -> Server {
        serve(Some(
            tls::ServerCertificate::for_http(&self.files(name, years), None).expect("server"),
        ))
    }
}

const VALID: (i32, i32) = (2020, 2090);

async fn echoes(socket: Socket) {
    let (mut sender, mut receiver) = socket.split();
    let big = Bytes::from(vec![b'x'; MESSAGE_BYTES_MAX]);
    let sending = async {
        sender.feed(Outgoing::Text("{}".to_owned())).await.expect("feed");
        for _ in 0..8 {
            sender.feed(Outgoing::Binary(big.clone())).await.expect("feed");
        }
        sender.flush().await.expect("flush");
    };
    let receiving = async {
        match receiver.next().await {
            Some(Ok(Incoming::Text(text))) => assert_eq!(&*text, "{}"),
            other => panic!("{other:?}"),
        }
        for _ in 0..8 {
            match receiver.next().await {
                Some(Ok(Incoming::Binary(bytes))) => assert_eq!(bytes, big),
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::join!(sending, receiving);
    sender.close(close::NORMAL, "done").await.expect("close");
    match receiver.next().await {
        Some(Ok(Incoming::Close { code, .. })) => assert_eq!(code, close::NORMAL),
        other => panic!("{other:?}"),
    }
    assert!(receiver.next().await.is_none());
}

#[tokio::test]
async fn messages_of_the_largest_size_go_both_ways_over_tls() {
    let authority = Authority::new();
    let server = authority.server("localhost", VALID);
    echoes(dial(&server, Some(authority.client()), "good").await.expect("connect")).await;
}

#[tokio::test]
async fn messages_go_both_ways_over_tcp_and_unix() {
    let server = serve(None);
    echoes(dial(&server, None, "good").await.expect("connect")).await;

    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("waybill.sock");
    let listener = Listener::bind(&Listen::Unix(path.clone()), None).expect("bind");
    let stop = CancellationToken::new();
    let run = tokio::spawn(listener.run(Arc::new(Echo), TaskTracker::new(), stop.clone()));
    let unix = Endpoint {
        address: EndpointAddress::Unix(path.clone()),
        ..endpoint(server.address, false)
    };
    echoes(connect(&unix, None, &Offer::new("good", SUBPROTOCOL), LONG).await.expect("connect"))
        .await;
    stop.cancel();
    run.await.expect("run");
    assert!(!path.exists(), "the socket file goes with its listener");
}

async fn tls_fault(server: &Server, client: Arc<ClientConfig>) -> TlsFault {
    match dial(server, Some(client), "good").await {
        Err(ConnectError::Tls { fault, .. }) => fault,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn each_fault_of_a_certificate_has_its_name() {
    let authority = Authority::new();
    let client = authority.client();
    let expired = authority.server("localhost", (2019, 2020));
    assert_eq!(tls_fault(&expired, client.clone()).await, TlsFault::Expired);
    let early = authority.server("localhost", (2089, 2090));
    assert_eq!(tls_fault(&early, client.clone()).await, TlsFault::NotYetValid);
    let other = authority.server("other.example", VALID);
    let fault = tls_fault(&other, client.clone()).await;
    assert!(
        matches!(&fault, TlsFault::WrongName(detail) if detail.contains("other.example")),
        "{fault}"
    );
    let stranger = Authority::new().server("localhost", VALID);
    assert_eq!(tls_fault(&stranger, client.clone()).await, TlsFault::UnknownAuthority);
    let unknown = || ConnectError::Tls { host: "h".to_owned(), fault: TlsFault::UnknownAuthority };
    assert!(unknown().trusting(None).to_string().contains("name its CA with --ca"));
    let named = unknown().trusting(Some(Path::new("/own/ca.pem"))).to_string();
    assert!(named.contains("/own/ca.pem") && !named.contains("--ca"), "{named}");
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(["localhost".to_owned()]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let path = |name: &str| authority.dir.path().join(name);
    let files = Identity { certificate: path("self.crt"), key: path("self.key") };
    let certificate = params.self_signed(&key).expect("signed").pem();
    std::fs::write(&files.certificate, certificate).expect("write");
    std::fs::write(&files.key, key.serialize_pem()).expect("write");
    let itself = serve(Some(tls::ServerCertificate::for_http(&files, None).expect("server")));
    assert_eq!(tls_fault(&itself, client.clone()).await, TlsFault::AuthorityItself);
    let plain = serve(None);
    assert_eq!(tls_fault(&plain, client).await, TlsFault::NotTls);
}

#[tokio::test]
async fn refusals_carry_status_body_and_delay() {
    let server = serve(None);
    match dial(&server, None, "bad").await {
        Err(ConnectError::Refused { status: 401, body, retry_after: None }) => {
            assert_eq!(body, "unknown token\u{fffd}[31m", "no control character gets through (I8)");
        }
        other => panic!("{other:?}"),
    }
    match dial(&server, None, "busy").await {
        Err(ConnectError::Refused { status: 429, retry_after, .. }) => {
            assert_eq!(retry_after, Some(Duration::from_secs(7)));
        }
        other => panic!("{other:?}"),
    }
    match connect(&endpoint(server.address, false), None, &Offer::new("good", "waybill.v9"), LONG)
        .await
    {
        Err(ConnectError::Refused { status: 400, body, .. }) => {
            assert!(body.contains("waybill.v1"))
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(dial(&server, None, "a\nb").await, Err(ConnectError::Token)));
}

/// Answers one connection with fixed bytes.
async fn canned(answer: &'static str) -> Result<Socket, ConnectError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.expect("read"));
        }
        stream.write_all(answer.as_bytes()).await.expect("write");
        // Open until the client leaves: it must not wait for the end.
        let _ = stream.read_u8().await;
    });
    let result =
        connect(&endpoint(address, false), None, &Offer::new("good", SUBPROTOCOL), LONG).await;
    server.await.expect("server");
    result
}

#[tokio::test]
async fn what_is_no_receiver_is_recognised() {
    let page =
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 14\r\n\r\n<html>hi</html>";
    match canned(page).await {
        Err(ConnectError::NotWaybill { status: 200, body, .. }) => assert!(body.contains("<html>")),
        other => panic!("{other:?}"),
    }
    let redirect =
        "HTTP/1.1 301 Moved\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n";
    match canned(redirect).await {
        Err(ConnectError::Redirected { status: 301, location }) => {
            assert_eq!(location, "https://elsewhere/");
        }
        other => panic!("{other:?}"),
    }
    let no_key = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                  Sec-WebSocket-Accept: AAAA\r\nSec-WebSocket-Protocol: waybill.v1\r\n\r\n";
    assert!(matches!(canned(no_key).await, Err(ConnectError::NotWaybill { status: 101, .. })));
    let not_http = "220 mail.example ESMTP\r\n\r\n";
    assert!(matches!(canned(not_http).await, Err(ConnectError::NotHttp)));
    // A body that never comes costs a second, not the answer.
    let silent = "HTTP/1.1 503 Wait\r\nRetry-After: 3\r\nContent-Length: 100\r\n\r\n";
    match canned(silent).await {
        Err(ConnectError::Refused { status: 503, retry_after, .. }) => {
            assert_eq!(retry_after, Some(Duration::from_secs(3)));
        }
        other => panic!("{other:?}"),
    }
}

/// Accepts every WebSocket, and chooses a subprotocol that nobody offered.
struct Other;

impl Handler for Other {
    type Session = ();

    fn answer(&self, _: &Request) -> Answer<()> {
        Answer::Accept { subprotocol: "chat", challenge: None, types: None, session: () }
    }

    async fn serve(self: Arc<Self>, (): (), _: Socket) {}
}

#[tokio::test]
async fn a_server_with_another_subprotocol_is_refused() {
    let any = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
    let listener = Listener::bind(&any, None).expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(listener.run(Arc::new(Other), TaskTracker::new(), CancellationToken::new()));
    match connect(&endpoint(address, false), None, &Offer::new("good", SUBPROTOCOL), LONG).await {
        Err(ConnectError::Subprotocol { chosen, .. }) => {
            assert_eq!(chosen.as_deref(), Some("chat"))
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_dropped() {
    let any = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
    let mut listener = Listener::bind(&any, None).expect("bind");
    listener.handshake_timeout = Duration::from_millis(10);
    let server = run(listener);
    let mut silent = tokio::net::TcpStream::connect(server.address).await.expect("connect");
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).await.expect("closed");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_header_without_end_is_refused() {
    let server = serve(None);
    let mut stream = tokio::net::TcpStream::connect(server.address).await.expect("connect");
    let header = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(64 << 10));
    let _ = stream.write_all(header.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{answer:?}");
}

#[tokio::test]
async fn a_message_over_the_limit_is_answered_with_1009() {
    let server = serve(None);
    let (mut sender, mut receiver) = dial(&server, None, "good").await.expect("connect").split();
    let big = Bytes::from(vec![0; MESSAGE_BYTES_MAX + 1]);
    let sending = async {
        let _ = sender.feed(Outgoing::Binary(big)).await;
        let _ = sender.flush().await;
    };
    let (answer, ()) = tokio::join!(receiver.next(), sending);
    match answer {
        Some(Ok(Incoming::Close { code, .. })) => assert_eq!(code, close::TOO_BIG),
        // The server closed with bytes unread, which a kernel may answer with a reset.
        Some(Err(SocketError::Broken(_) | SocketError::Gone)) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn binding_says_what_is_in_the_way() {
    let server = serve(None);
    let taken = Listener::bind(&Listen::Tcp(server.address), None).expect_err("taken");
    assert!(
        matches!(&taken, BindError::InUse { address } if *address == server.address.to_string())
    );

    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("waybill.sock");
    let listen = Listen::Unix(path.clone());
    let bound = Listener::bind(&listen, None).expect("bind");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&path).expect("meta").permissions(),
    );
    assert_eq!(mode & 0o777, 0o660);
    assert!(
        matches!(Listener::bind(&listen, None), Err(BindError::InUse { .. })),
        "somebody answers"
    );
    drop(bound);
    assert!(!path.exists());

    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket left behind"));
    assert!(path.exists());
    drop(Listener::bind(&listen, None).expect("a stale socket is replaced"));

    std::fs::write(&path, "precious").expect("write");
    assert!(matches!(Listener::bind(&listen, None), Err(BindError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).expect("kept"), b"precious");
}

#[test]
fn faults_of_certificate_files_are_told_apart() {
    use crate::tls::TlsError;
    let authority = Authority::new();
    let good = authority.files("localhost", VALID);
    let other = authority.files("other.example", VALID);
    let missing = authority.dir.path().join("missing.pem");
    let empty = authority.dir.path().join("empty.pem");
    std::fs::write(&empty, "no PEM here\n").expect("write");
    let fault = |certificate: &Path, key: &Path| {
        let files = Identity { certificate: certificate.into(), key: key.into() };
        tls::ServerCertificate::for_http(&files, None).expect_err("a fault")
    };
    assert!(matches!(fault(&missing, &good.key), TlsError::Unreadable { what: "certificate", .. }));
    assert!(matches!(fault(&empty, &good.key), TlsError::Empty { what: "certificate", .. }));
    assert!(matches!(
        fault(&good.certificate, &good.certificate),
        TlsError::Empty { what: "key", .. }
    ));
    assert!(matches!(fault(&good.certificate, &other.key), TlsError::Mismatch { .. }));
    assert!(matches!(
        tls::client_config(Some(&empty), None),
        Err(TlsError::Empty { what: "CA file", .. })
    ));
}
