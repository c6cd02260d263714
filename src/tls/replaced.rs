//! Files that are replaced while this process runs are taken over for the connections that follow.
//! What is broken is refused, and the former goes on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tracing::field::display;
use tracing::{info, warn};

use super::{ClientConfig, ServerConfig, TlsError, certified, client_config};
use crate::config::Identity;
use crate::record::escape_path;
use crate::stamp::Stamp;

/// How often a server's certificate and key are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a side that dials trusts, the authorities in a file or the machine's own, and the certificate
/// that it shows to servers that ask for one. The files are read anew when they have changed.
#[derive(Debug)]
pub struct ClientTrust {
    ca: Option<PathBuf>,
    identity: Option<Identity>,
    known: Mutex<(Vec<Option<Stamp>>, Arc<ClientConfig>)>,
}

impl ClientTrust {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// Where they cannot be used.
    pub fn open(
        ca: Option<&Path>,
        identity: Option<&Identity>,
    ) -> Result<Arc<ClientTrust>, TlsError> {
        let stamps = stamps(identity, ca);
        let known = Mutex::new((stamps, client_config(ca, identity)?));
        let (ca, identity) = (ca.map(Path::to_owned), identity.cloned());
        Ok(Arc::new(ClientTrust { ca, identity, known }))
    }

    /// For the next connection. A file that is broken by now is named, and what was known before
    /// holds on.
    pub fn config(&self) -> Arc<ClientConfig> {
        let (ca, identity) = (self.ca.as_deref(), self.identity.as_ref());
        let mut known = lock(&self.known);
        // Taken before the files are read: an edit in between is met the next time.
        let stamps = stamps(identity, ca);
        if known.0 != stamps {
            known.0 = stamps;
            match client_config(ca, identity) {
                Ok(config) => {
                    let shown = |path: &Path| display(escape_path(path));
                    let certificate = identity.map(|files| shown(&files.certificate));
                    info!(ca = ca.map(shown), certificate, "TLS files taken over");
                    known.1 = config;
                }
                Err(error) => warn!(%error, "the TLS files known before are used on"),
            }
        }
        known.1.clone()
    }
}

/// A server's certificate and key, which may be replaced while it serves.
#[derive(Debug)]
pub struct ServerCertificate {
    files: Identity,
    /// The authorities whose client certificates are taken.
    client_ca: Option<PathBuf>,
    /// WebSockets: HTTP/1.1 is announced (RFC 7301).
    http: bool,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    not_after: Option<Timestamp>,
    /// Of the files as they were read last.
    read: Vec<Option<Stamp>>,
    /// Of the files at the last look.
    seen: Vec<Option<Stamp>>,
}

impl ServerCertificate {
    /// For listening to WebSockets.
    ///
    /// With `client_ca` (PEM) peers are asked for a certificate. One that these authorities did not
    /// sign ends the handshake; a peer without any goes on, and what it may do is decided elsewhere.
    ///
    /// # Errors
    ///
    /// Where certificate, key or authorities are missing, broken or no pair.
    pub fn for_http(
        files: &Identity,
        client_ca: Option<&Path>,
    ) -> Result<Arc<ServerCertificate>, TlsError> {
        ServerCertificate::open(files, client_ca, true).map(Arc::new)
    }

    /// The same as `known` where it is of these files, else opened from them; `None` without files.
    ///
    /// # Errors
    ///
    /// As [`ServerCertificate::for_http`].
    pub fn again(
        known: Option<&Arc<ServerCertificate>>,
        files: Option<&Identity>,
        client_ca: Option<&Path>,
    ) -> Result<Option<Arc<ServerCertificate>>, TlsError> {
        let Some(files) = files else { return Ok(None) };
        let same = |known: &&Arc<ServerCertificate>| {
            known.files == *files && known.client_ca.as_deref() == client_ca
        };
        match known.filter(same) {
            Some(known) => Ok(Some(known.clone())),
            None => ServerCertificate::for_http(files, client_ca).map(Some),
        }
    }

    fn open(
        files: &Identity,
        client_ca: Option<&Path>,
        http: bool,
    ) -> Result<ServerCertificate, TlsError> {
        let read = stamps(Some(files), client_ca);
        let (config, not_after) = certified(files, client_ca, http)?;
        let current = Mutex::new(Current { config, not_after, seen: read.clone(), read });
        let (files, client_ca) = (files.clone(), client_ca.map(Path::to_owned));
        Ok(ServerCertificate { files, client_ca, http, current })
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        lock(&self.current).config.clone()
    }

    /// When the certificate ends, where that could be read.
    pub fn not_after(&self) -> Option<Timestamp> {
        lock(&self.current).not_after
    }

    /// Looks at the files now and then, for ever. Dropping the future loses nothing.
    pub async fn watch(&self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            self.look();
        }
    }

    /// Takes over files that have changed and then stayed so from one look to the next: the two of
    /// a pair are hardly ever replaced at the same moment.
    fn look(&self) {
        let now = stamps(Some(&self.files), self.client_ca.as_deref());
        let mut current = lock(&self.current);
        let settled = current.seen == now;
        current.seen.clone_from(&now);
        if !settled || current.read == now {
            return;
        }
        current.read = now;
        let certificate = display(escape_path(&self.files.certificate));
        match certified(&self.files, self.client_ca.as_deref(), self.http) {
            Ok((config, not_after)) => {
                let ends = not_after.map(display);
                info!(certificate, ends, "certificate taken over");
                current.config = config;
                current.not_after = not_after;
            }
            Err(error) => {
                let key = display(escape_path(&self.files.key));
                warn!(%error, certificate, key, "the certificate known before is served on");
            }
        }
    }
}

/// Of a certificate, its key and a file of authorities, as far as there are any.
fn stamps(identity: Option<&Identity>, ca: Option<&Path>) -> Vec<Option<Stamp>> {
    let pair = identity.map(|files| [files.certificate.as_path(), &files.key]);
    pair.into_iter().flatten().chain(ca).map(Stamp::of).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks after a certificate where there is one; for ever.
pub async fn watch(certificate: Option<&ServerCertificate>) {
    match certificate {
        Some(certificate) => certificate.watch().await,
        None => std::future::pending().await,
    }
}

/// Takes TLS connections that carry something else than HTTP, such as syslog (RFC 5425).
#[derive(Clone)]
pub struct Acceptor(Arc<ServerCertificate>);

/// A connection whose handshake is done.
pub type ServerStream<S> = tokio_rustls::server::TlsStream<S>;

impl Acceptor {
    /// With this certificate, for peers of TLS 1.2 or 1.3.
    pub fn new(files: &Identity) -> Result<Acceptor, TlsError> {
        ServerCertificate::open(files, None, false).map(|opened| Acceptor(Arc::new(opened)))
    }

    /// The certificate that it shows.
    pub fn certificate(&self) -> &ServerCertificate {
        &self.0
    }

    /// Does the handshake, which the caller bounds in time.
    ///
    /// # Errors
    ///
    /// Where the peer goes, speaks no TLS, or does not trust the certificate.
    pub async fn accept<S>(&self, stream: S) -> io::Result<ServerStream<S>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        tokio_rustls::TlsAcceptor::from(self.0.config()).accept(stream).await
    }
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}
