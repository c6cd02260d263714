//! Tunnels through an HTTP proxy by `CONNECT` (RFC 9110 §9.3.6).

use bytes::Bytes;
use http_body_util::Empty;
use hyper::header::{HOST, HeaderValue, PROXY_AUTHORIZATION, USER_AGENT};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::connect::{AGENT, HEADER_BYTES_MAX, excerpt};
use super::fault::ConnectError;
use crate::config::Proxy;

/// Asks a proxy, over a fresh connection to it, for a tunnel to `host` and `port`; the proxy
/// resolves the name.
pub(super) async fn tunnel(
    stream: TcpStream,
    proxy: &Proxy,
    host: &str,
    port: u16,
) -> Result<TcpStream, ConnectError> {
    let broken = |source| ConnectError::ProxyBroken { proxy: proxy.to_string(), source };
    let target =
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let (mut client, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(HEADER_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let connection = connection.with_upgrades();
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(&target)
        .header(HOST, &target)
        .header(USER_AGENT, AGENT);
    if let Some(authorization) = &proxy.authorization
        && let Ok(mut value) = HeaderValue::from_str(authorization)
    {
        value.set_sensitive(true);
        request = request.header(PROXY_AUTHORIZATION, value);
    }
    let invalid =
        ConnectError::Endpoint { url: target, reason: "its host cannot be named to an HTTP proxy" };
    let Ok(request) = request.body(Empty::<Bytes>::new()) else { return Err(invalid) };
    let exchange = async {
        let response = client.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if !status.is_success() {
            let body = excerpt(response.into_body()).await;
            return Err(ConnectError::ProxyRefused {
                proxy: proxy.to_string(),
                status: status.as_u16(),
                body,
            });
        }
        hyper::upgrade::on(response).await.map_err(broken)
    };
    let mut exchange = std::pin::pin!(exchange);
    // Both run here, so that a dropped attempt leaves no task behind.
    let upgraded = tokio::select! {
        biased;
        upgraded = &mut exchange => upgraded,
        _ = connection => exchange.await,
    };
    let parts = upgraded?.downcast::<TokioIo<TcpStream>>();
    match parts {
        // We speak first: what comes before that is not from the receiver.
        Ok(parts) if parts.read_buf.is_empty() => Ok(parts.io.into_inner()),
        _ => Err(ConnectError::ProxyRefused {
            proxy: proxy.to_string(),
            status: 200,
            body: "it sent bytes of its own into the tunnel".to_owned(),
        }),
    }
}
