//! HTTP to Elasticsearch: authentication, failover, size limits. Knows nothing of frames.
//!
//! Called by the bulk workers, `setup` and `search`. It never depends on `GET /`, a product header
//! or a type in a path, and never lets an answer grow without bound (I7).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue};
use reqwest::tls::TlsInfo;
use reqwest::{Method, Url};
use serde_json::Value;
use thiserror::Error;

use crate::config::{ElasticsearchAuth, ElasticsearchConfig};

use super::answer::error_of_request;

/// A whole bulk request, its answer included. Longer than Elasticsearch waits for a shard.
const BULK_TIMEOUT: Duration = Duration::from_secs(120);

/// Any other request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Below the 75 s after which nginx closes an idle connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// The longest answer to anything but a bulk request, in bytes.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Each item of the answer keeps its place, because `_index` and `status` stand in every one.
/// The timeout bounds how long a red index holds up the others of the same request (I6).
const BULK_PATH: &str = "/_bulk?timeout=10s&filter_path=errors,items.*._index,items.*.status,\
                         items.*.result,items.*.failure_store,items.*.error.type,\
                         items.*.error.reason";

/// What is wrong with the configuration of Elasticsearch, found before the first connection.
#[derive(Debug, Error)]
pub enum ConfigureError {
    /// No URL at all.
    #[error("no Elasticsearch URL is given: name one, such as https://127.0.0.1:9200")]
    NoUrl,
    /// Not an `http` or `https` URL, or one with a password in it.
    #[error("Elasticsearch URL {url:?} cannot be used: {reason}")]
    Url {
        /// As configured; a password in it is masked.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    File {
        /// The secret's or the authority's file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A secret that is empty or has characters that no header may have.
    #[error("{path} does not hold {expected}", path = path.display())]
    Secret {
        /// The secret's file.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
    /// A file of authorities without a certificate.
    #[error("{path} holds no certificate in PEM form", path = path.display())]
    Authority {
        /// The file.
        path: PathBuf,
    },
    /// The HTTP client could not be built.
    #[error("cannot prepare HTTPS: {0}")]
    Http(#[source] reqwest::Error),
}

/// Why a request has no usable answer.
#[derive(Debug, Error)]
pub enum RequestError {
    /// No connection, so nothing was done.
    #[error("cannot connect to {url}: {reason}")]
    Connect {
        /// Base URL.
        url: String,
        /// The chain of causes.
        reason: String,
    },
    /// Cut or timed out on the way: what was asked may or may not be done.
    #[error("no whole answer from {url}: {reason}")]
    Unknown {
        /// Base URL.
        url: String,
        /// The chain of causes.
        reason: String,
    },
    /// An answer over the limit of its request.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    /// An HTTP status that is no success.
    #[error("HTTP status {status}: {reason}")]
    Status {
        /// The status.
        status: u16,
        /// The error's type and reason.
        reason: String,
    },
    /// A success that is not JSON.
    #[error("the answer is not JSON: is {0} really Elasticsearch or OpenSearch?")]
    NotJson(String),
}

impl RequestError {
    /// The HTTP status, where there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            RequestError::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether another node of the cluster may do better.
    fn is_of_the_node(&self) -> bool {
        match self {
            RequestError::Connect { .. } | RequestError::Unknown { .. } => true,
            RequestError::Status { status, .. } => matches!(status, 502..=504),
            RequestError::TooLong(_) | RequestError::NotJson(_) => false,
        }
    }
}

/// An answer with what stands beside its body.
#[derive(Debug)]
pub(super) struct Look {
    /// JSON, where the status is a success.
    pub body: Result<Value, RequestError>,
    /// The `Date` header: proxies send it, Elasticsearch does not.
    pub date: Option<String>,
    /// The server's own certificate (DER), over TLS.
    pub certificate: Option<Vec<u8>>,
}

/// A connection pool to one cluster.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    /// Without a slash at the end; never empty.
    bases: Vec<String>,
    /// Which of them answered last.
    current: AtomicUsize,
    auth: ElasticsearchAuth,
    header: RwLock<Option<HeaderValue>>,
}

impl Client {
    /// Reads the secret and the authorities; connects to nothing.
    pub fn new(config: &ElasticsearchConfig) -> Result<Client, ConfigureError> {
        Client::build(config, false)
    }

    /// The same, for one whose [`Look`] shows certificates.
    pub(super) fn noting(config: &ElasticsearchConfig) -> Result<Client, ConfigureError> {
        Client::build(config, true)
    }

    fn build(config: &ElasticsearchConfig, tls_info: bool) -> Result<Client, ConfigureError> {
        let bases = config.urls.iter().map(|url| base(url)).collect::<Result<Vec<_>, _>>()?;
        if bases.is_empty() {
            return Err(ConfigureError::NoUrl);
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("waybill/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            // A redirect would carry lines and secret to where nobody configured.
            .redirect(reqwest::redirect::Policy::none())
            // Retries are decided where their consequences are known.
            .retry(reqwest::retry::never())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tls_info(tls_info)
            .pool_max_idle_per_host(config.requests.max(1) + 1)
            .tcp_keepalive(Duration::from_secs(20));
        if let Some(path) = &config.ca {
            builder = builder.tls_certs_only(authorities(path)?);
        }
        let http = builder.build().map_err(ConfigureError::Http)?;
        let header = RwLock::new(read_secret(&config.auth)?);
        let auth = config.auth.clone();
        Ok(Client { http, bases, current: AtomicUsize::new(0), auth, header })
    }

    /// Searches the indices that match a wildcard; `body` is a search request in Elasticsearch's
    /// language. The wildcard may be a list with commas.
    pub async fn search(&self, wildcard: &str, body: Value) -> Result<Value, RequestError> {
        let path = format!("/{wildcard}/_search?ignore_unavailable=true&allow_no_indices=true");
        self.json(Method::POST, &path, Some(&body)).await
    }

    /// The base URLs, in order.
    pub(super) fn bases(&self) -> &[String] {
        &self.bases
    }

    /// One `GET` to one URL, with what its answer says beside its body. Any status is an answer.
    pub(super) async fn look(&self, node: usize, path: &str) -> Result<Look, RequestError> {
        let request = self.request(node, Method::GET, path).timeout(CONNECT_TIMEOUT);
        let response = request.send().await.map_err(|error| self.fault(node, &error))?;
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
        let date = date.map(str::to_owned);
        let tls = response.extensions().get::<TlsInfo>();
        let certificate = tls.and_then(TlsInfo::peer_certificate).map(<[u8]>::to_vec);
        let mut reply = Vec::new();
        let status = self.read(node, response, &mut reply, REPLY_BYTES_MAX).await?;
        let body = if (200..300).contains(&status) {
            serde_json::from_slice(&reply)
                .map_err(|_| RequestError::NotJson(self.bases[node].clone()))
        } else {
            Err(RequestError::Status { status, reason: error_of_request(&reply) })
        };
        Ok(Look { body, date, certificate })
    }

    /// How many URLs are configured.
    pub(super) fn nodes(&self) -> usize {
        self.bases.len()
    }

    /// Number of the URL whose turn it is.
    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// One bulk request to this URL. `reply` is cleared, then holds the answer's body.
    pub(super) async fn bulk(
        &self,
        node: usize,
        body: Bytes,
        reply: &mut Vec<u8>,
        reply_bytes_max: usize,
    ) -> Result<u16, RequestError> {
        let request = self
            .request(node, Method::POST, BULK_PATH)
            .header(CONTENT_TYPE, "application/x-ndjson")
            .timeout(BULK_TIMEOUT)
            .body(body);
        self.exchange(node, request, reply, reply_bytes_max).await
    }

    /// The URL after this one takes over, unless another request has seen to that already.
    pub(super) fn fail_over(&self, from: usize) {
        let next = (from + 1) % self.bases.len();
        // Lost races are fine: whoever won moved on from the same URL.
        let _ = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Reads the secret's file again: it may have been rotated. A file that is gone or bad leaves
    /// the old secret in place.
    pub(super) fn reload_secret(&self) {
        match read_secret(&self.auth) {
            Ok(header) => {
                *self.header.write().unwrap_or_else(PoisonError::into_inner) = header;
            }
            Err(error) => tracing::warn!(%error, "keeping the old Elasticsearch secret"),
        }
    }

    /// One request for JSON, tried at each URL until a node answers.
    pub(super) async fn json(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, RequestError> {
        let mut attempts = self.nodes();
        loop {
            let node = self.current();
            attempts -= 1;
            match self.json_at(node, method.clone(), path, body).await {
                Err(error) if error.is_of_the_node() => {
                    self.fail_over(node);
                    if attempts == 0 {
                        return Err(error);
                    }
                }
                answer => return answer,
            }
        }
    }

    async fn json_at(
        &self,
        node: usize,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, RequestError> {
        let mut request = self.request(node, method, path).timeout(REQUEST_TIMEOUT);
        if let Some(body) = body {
            request = request.json(body);
        }
        let mut reply = Vec::new();
        let status = self.exchange(node, request, &mut reply, REPLY_BYTES_MAX).await?;
        if !(200..300).contains(&status) {
            return Err(RequestError::Status { status, reason: error_of_request(&reply) });
        }
        serde_json::from_slice(&reply).map_err(|_| RequestError::NotJson(self.bases[node].clone()))
    }

    fn request(&self, node: usize, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.bases[node]));
        match &*self.header.read().unwrap_or_else(PoisonError::into_inner) {
            Some(header) => request.header(AUTHORIZATION, header.clone()),
            None => request,
        }
    }

    async fn exchange(
        &self,
        node: usize,
        request: reqwest::RequestBuilder,
        reply: &mut Vec<u8>,
        reply_bytes_max: usize,
    ) -> Result<u16, RequestError> {
        reply.clear();
        let response = request.send().await.map_err(|error| self.fault(node, &error))?;
        self.read(node, response, reply, reply_bytes_max).await
    }

    async fn read(
        &self,
        node: usize,
        mut response: reqwest::Response,
        reply: &mut Vec<u8>,
        reply_bytes_max: usize,
    ) -> Result<u16, RequestError> {
        while let Some(chunk) = response.chunk().await.map_err(|error| self.fault(node, &error))? {
            if reply.len() + chunk.len() > reply_bytes_max {
                return Err(RequestError::TooLong(reply_bytes_max));
            }
            reply.extend_from_slice(&chunk);
        }
        Ok(response.status().as_u16())
    }

    fn fault(&self, node: usize, error: &reqwest::Error) -> RequestError {
        let url = self.bases[node].clone();
        // The innermost cause names what failed; reqwest's own text only repeats the URL.
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        let reason = cause.to_string();
        if error.is_connect() || error.is_builder() {
            RequestError::Connect { url, reason }
        } else {
            RequestError::Unknown { url, reason }
        }
    }
}

fn base(text: &str) -> Result<String, ConfigureError> {
    let fault = |url: String, reason| Err(ConfigureError::Url { url, reason });
    let Ok(url) = Url::parse(text) else {
        return fault(text.to_owned(), "it is not a URL: write https://HOST:9200");
    };
    if !url.username().is_empty() || url.password().is_some() {
        let mut masked = url;
        // Both fail only for URLs that cannot have a user, and this one has.
        let _ = masked.set_username("***");
        let _ = masked.set_password(None);
        return fault(masked.into(), "put user and password into a file of their own");
    }
    match url.scheme() {
        "http" | "https" if url.query().is_some() || url.fragment().is_some() => {
            fault(url.into(), "a query or fragment has no place in it")
        }
        "http" | "https" => Ok(String::from(url).trim_end_matches('/').to_owned()),
        _ => fault(url.into(), "it starts neither with http:// nor with https://"),
    }
}

fn authorities(path: &Path) -> Result<Vec<reqwest::Certificate>, ConfigureError> {
    let pem = read(path)?;
    match reqwest::Certificate::from_pem_bundle(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(ConfigureError::Authority { path: path.to_owned() }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigureError> {
    std::fs::read(path).map_err(|source| ConfigureError::File { path: path.to_owned(), source })
}

fn read_secret(auth: &ElasticsearchAuth) -> Result<Option<HeaderValue>, ConfigureError> {
    match auth {
        ElasticsearchAuth::None => Ok(None),
        ElasticsearchAuth::ApiKey(path) => {
            secret(path, "an API key (id:key, or its base64)", api_key).map(Some)
        }
        ElasticsearchAuth::Basic(path) => {
            secret(path, "user:password in its first line", basic).map(Some)
        }
    }
}

fn secret(
    path: &Path,
    expected: &'static str,
    value: fn(&str) -> Option<String>,
) -> Result<HeaderValue, ConfigureError> {
    let bytes = read(path)?;
    let header = std::str::from_utf8(&bytes)
        .ok()
        .and_then(|text| value(text.lines().next()?.trim_end()))
        .and_then(|value| HeaderValue::try_from(value).ok());
    let mut header =
        header.ok_or_else(|| ConfigureError::Secret { path: path.to_owned(), expected })?;
    header.set_sensitive(true);
    Ok(header)
}

fn api_key(line: &str) -> Option<String> {
    let key = line.trim();
    match key.split_once(':') {
        // Base64 has no colon, so that the two forms cannot be confused.
        Some((id, key)) if !id.is_empty() && !key.is_empty() => {
            Some(format!("ApiKey {}", STANDARD.encode(format!("{id}:{key}"))))
        }
        None if !key.is_empty() => Some(format!("ApiKey {key}")),
        _ => None,
    }
}

fn basic(line: &str) -> Option<String> {
    let (user, _) = line.split_once(':')?;
    (!user.is_empty()).then(|| format!("Basic {}", STANDARD.encode(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_key_is_taken_in_both_forms() {
        assert_eq!(api_key("id:key").as_deref(), Some("ApiKey aWQ6a2V5"));
        assert_eq!(api_key(" aWQ6a2V5 ").as_deref(), Some("ApiKey aWQ6a2V5"));
        assert_eq!(api_key(""), None);
        assert_eq!(api_key("id:"), None);
        assert_eq!(basic("elastic:a:b").as_deref(), Some("Basic ZWxhc3RpYzphOmI="));
        assert_eq!(basic("elastic"), None);
    }

    #[test]
    fn urls_are_checked_and_never_hold_secrets() {
        assert_eq!(base("https://es:9200/").expect("a URL"), "https://es:9200");
        assert_eq!(base("http://proxy/es/").expect("a URL"), "http://proxy/es");
        for bad in ["es:9200", "ftp://es", "nonsense", "http://es/?a=b"] {
            assert!(base(bad).is_err(), "{bad}");
        }
        let error = base("https://elastic:hunter2@es:9200").expect_err("a password").to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_missing_or_empty_secret_says_which_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let auth = ElasticsearchAuth::ApiKey(path.clone());
        assert!(matches!(read_secret(&auth), Err(ConfigureError::File { .. })));
        std::fs::write(&path, "\n").expect("written");
        let error = read_secret(&auth).expect_err("empty").to_string();
        assert!(error.contains(path.to_str().expect("UTF-8")), "{error}");
        std::fs::write(&path, "id:key\n").expect("written");
        let header = read_secret(&auth).expect("a secret").expect("a header");
        assert!(!format!("{header:?}").contains("aWQ6"), "secrets print masked");
    }
}
