//! `--metrics`: `/metrics`, `/health/live` and `/health/ready` over HTTP.
//!
//! Whoever reaches the address may read and nothing else: it is loopback unless plaintext is
//! allowed. It answers until the process ends, also while it drains.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use super::Page;

/// Connections served at a time; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16;

/// How long a connection may last, for one request and its answer: whoever is slower must not keep a
/// probe of health out for longer.
const CONNECTION_LASTS: Duration = Duration::from_secs(10);

/// Pause after a failed accept: out of descriptors stays so for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What is served.
pub trait Report: Send + Sync + 'static {
    /// Writes all families.
    fn write(&self, page: &mut Page);

    /// Why this process cannot do its work now; `None` where it can.
    fn not_ready(&self) -> Option<&'static str>;
}

/// Why metrics cannot be served.
#[derive(Debug, Error)]
#[error("metrics cannot be served at {address}: {source}; choose another --metrics HOST:PORT")]
pub struct MetricsError {
    address: SocketAddr,
    source: io::Error,
}

/// A served address; dropping it stops serving.
#[derive(Debug)]
pub struct Endpoint {
    /// As configured.
    address: SocketAddr,
    _stop: DropGuard,
}

impl Endpoint {
    /// Serves at `address`, where one is given; `current` goes on where it is there already. Port 0
    /// takes a free one, which is logged.
    ///
    /// # Errors
    ///
    /// Where the address cannot be bound.
    pub fn at(
        address: Option<SocketAddr>,
        current: Option<&Arc<Endpoint>>,
        report: &Arc<impl Report>,
    ) -> Result<Option<Arc<Endpoint>>, MetricsError> {
        let Some(address) = address else { return Ok(None) };
        match current.filter(|current| current.address == address) {
            Some(current) => Ok(Some(current.clone())),
            None => Endpoint::start(address, report.clone()).map(|new| Some(Arc::new(new))),
        }
    }

    fn start(address: SocketAddr, report: Arc<dyn Report>) -> Result<Endpoint, MetricsError> {
        let failed = |source| MetricsError { address, source };
        let listener = StdListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        info!(address = %bound, "serving metrics");
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, report)));
        Ok(Endpoint { address, _stop: stop.drop_guard() })
    }
}

async fn accept(listener: TcpListener, report: Arc<dyn Report>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Connections end with this future.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let permit = permits.clone().acquire_owned().await;
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let report = report.clone();
                connections.spawn(async move {
                    serve(stream, report).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "a scrape could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, report: Arc<dyn Report>) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &*report);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_LASTS, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a scrape's connection ended early"),
        Err(_) => debug!("a scrape took too long"),
    }
}

fn respond(method: &Method, path: &str, report: &dyn Report) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    if !matches!(*method, Method::GET | Method::HEAD) {
        return answer(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "only GET\n".to_owned());
    }
    match path {
        "/metrics" => {
            let mut page = Page::default();
            report.write(&mut page);
            let version = "text/plain; version=0.0.4; charset=utf-8";
            answer(StatusCode::OK, version, page.into_text())
        }
        "/health/live" => answer(StatusCode::OK, PLAIN, "live\n".to_owned()),
        "/health/ready" => match report.not_ready() {
            None => answer(StatusCode::OK, PLAIN, "ready\n".to_owned()),
            Some(why) => answer(StatusCode::SERVICE_UNAVAILABLE, PLAIN, format!("{why}\n")),
        },
        _ => {
            let known = "/metrics, /health/live and /health/ready are here\n";
            answer(StatusCode::NOT_FOUND, PLAIN, known.to_owned())
        }
    }
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
