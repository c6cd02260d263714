//! Certificates and rustls configurations, for the transport and for syslog over TLS.
//!
//! The crypto provider is passed explicitly: no global state decides which one is used.

mod leaf;
mod replaced;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use jiff::Timestamp;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
pub use rustls::{ClientConfig, ServerConfig};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tracing::warn;

use crate::config::Identity;
use crate::record::escape_path;

pub use leaf::Leaf;
pub use replaced::{Acceptor, ClientTrust, ServerCertificate, ServerStream, watch};

/// What is wrong with a certificate, a key or a CA file.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("{what} {file:?} cannot be read: {source}; check the path and its permissions")]
    Unreadable {
        /// `certificate`, `key` or `CA file`.
        what: &'static str,
        /// Its path.
        file: PathBuf,
        /// From the operating system.
        source: io::Error,
    },
    /// No PEM block of the right kind.
    #[error("{what} {file:?} has no {block} block in it; it must be PEM")]
    Empty {
        /// `certificate`, `key` or `CA file`.
        what: &'static str,
        /// Its path.
        file: PathBuf,
        /// The PEM label that was looked for.
        block: &'static str,
    },
    /// A PEM block that is none.
    #[error("{what} {file:?} is broken: {reason}")]
    Broken {
        /// `certificate`, `key` or `CA file`.
        what: &'static str,
        /// Its path.
        file: PathBuf,
        /// From the parser.
        reason: String,
    },
    /// Certificate and key are not a pair.
    #[error(
        "key {key:?} does not belong to certificate {certificate:?}; the chain's first must be its own"
    )]
    Mismatch {
        /// Path of the certificate.
        certificate: PathBuf,
        /// Path of the key.
        key: PathBuf,
    },
    /// The machine has no authorities of its own.
    #[error(
        "this machine has no certificate authorities ({reason}): install ca-certificates, or name a file with --ca"
    )]
    NoAuthorities {
        /// From the look-up.
        reason: String,
    },
    /// rustls takes none of it.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] rustls::Error),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes ring the process's provider, for libraries that cannot be handed one. Once, at the start;
/// a second call changes nothing.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// For dialling: trusts the authorities in `ca` (PEM), else the machine's own, and presents the
/// certificate of `identity` to servers that ask for one.
pub fn client_config(
    ca: Option<&Path>,
    identity: Option<&Identity>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = match ca {
        Some(file) => roots_of(file)?,
        None => native_roots()?,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(files) => {
            let Pair { chain, key, .. } = pair(files)?;
            builder.with_client_auth_cert(chain, key).map_err(|error| pair_fault(files, error))?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn roots_of(file: &Path) -> Result<RootCertStore, TlsError> {
    const WHAT: &str = "CA file";
    let mut roots = RootCertStore::empty();
    for certificate in certificates(WHAT, file)? {
        roots.add(certificate).map_err(|error| TlsError::Broken {
            what: WHAT,
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn native_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Machines carry odd certificates; those that do not parse could sign nothing anyway.
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let reason = found.errors.first().map_or("none found".to_owned(), ToString::to_string);
        return Err(TlsError::NoAuthorities { reason });
    }
    Ok(roots)
}

/// What a server shows and asks for, and when its certificate ends, where that can be read.
fn certified(
    files: &Identity,
    client_ca: Option<&Path>,
    http: bool,
) -> Result<(Arc<ServerConfig>, Option<Timestamp>), TlsError> {
    let clients = match client_ca {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(file) => {
            let roots = Arc::new(roots_of(file)?);
            WebPkiClientVerifier::builder_with_provider(roots, provider())
                .allow_unauthenticated()
                .build()
                .map_err(|error| TlsError::Broken {
                    what: "CA file",
                    file: file.to_owned(),
                    reason: error.to_string(),
                })?
        }
    };
    let Pair { chain, key, leaf } = pair(files)?;
    if let Some(fault) = leaf.as_ref().filter(|_| http).and_then(Leaf::refusal) {
        let certificate = escape_path(&files.certificate);
        warn!(%certificate, "the other side will refuse the certificate: it {fault}");
    }
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|error| pair_fault(files, error))?;
    if http {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
    }
    Ok((Arc::new(config), leaf.as_ref().map(Leaf::not_after)))
}

struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// The first of the chain, where it can be read.
    leaf: Option<Leaf>,
}

/// A certificate whose time is over is shown all the same, with a warning: its peers say what is
/// wrong, and those that trust it anyway go on working.
fn pair(files: &Identity) -> Result<Pair, TlsError> {
    let chain = certificates("certificate", &files.certificate)?;
    let key = private_key(&files.key)?;
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::MAX);
    let leaf = chain.first().and_then(|own| Leaf::from_der(own));
    if let Some(expired) = leaf.as_ref().map(Leaf::not_after).filter(|end| *end < now) {
        warn!(
            certificate = %escape_path(&files.certificate), %expired,
            "the certificate has expired and peers refuse it: renew it; it is taken over by itself"
        );
    }
    Ok(Pair { chain, key, leaf })
}

fn pair_fault(files: &Identity, error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::Mismatch { certificate: files.certificate.clone(), key: files.key.clone() }
        }
        rustls::Error::InvalidCertificate(fault) => TlsError::Broken {
            what: "certificate",
            file: files.certificate.clone(),
            reason: match leaf_of_file(&files.certificate)
                .ok()
                .flatten()
                .and_then(|leaf| leaf.refusal())
            {
                Some(refusal) => format!("it {refusal}"),
                None => fault.to_string(),
            },
        },
        other => TlsError::Setup(other),
    }
}

/// SHA-256 of a certificate's DER, as `openssl x509 -fingerprint -sha256` prints it.
pub type Fingerprint = [u8; 32];

/// The fingerprint of a certificate in DER.
pub fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Sha256::digest(certificate).into()
}

/// The fingerprint of the first certificate in a PEM text; `None` where there is none.
pub fn fingerprint_of_pem(pem: &[u8]) -> Option<Fingerprint> {
    CertificateDer::from_pem_slice(pem).ok().map(|certificate| fingerprint(&certificate))
}

/// The fingerprint of the first certificate in a PEM file.
pub fn fingerprint_of_file(file: &Path) -> Result<Fingerprint, TlsError> {
    certificates("certificate", file).map(|chain| fingerprint(&chain[0]))
}

fn read(what: &'static str, file: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(file).map_err(|source| TlsError::Unreadable {
        what,
        file: file.to_owned(),
        source,
    })
}

fn certificates(what: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(what, file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| TlsError::Broken {
        what,
        file: file.to_owned(),
        reason: error.to_string(),
    })?;
    if found.is_empty() {
        return Err(TlsError::Empty { what, file: file.to_owned(), block: "CERTIFICATE" });
    }
    Ok(found)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use rustls::pki_types::pem::Error;
    const WHAT: &str = "key";
    let pem = read(WHAT, file)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        Error::NoItemsFound => {
            TlsError::Empty { what: WHAT, file: file.to_owned(), block: "PRIVATE KEY" }
        }
        other => TlsError::Broken { what: WHAT, file: file.to_owned(), reason: other.to_string() },
    })
}

/// The first certificate of a PEM file; `None` where its DER has another shape.
///
/// # Errors
///
/// Where the file cannot be read, or holds no certificate.
pub fn leaf_of_file(file: &Path) -> Result<Option<Leaf>, TlsError> {
    certificates("certificate", file).map(|chain| Leaf::from_der(&chain[0]))
}

/// Connects as a peer does that trusts `authority`, to a certificate of `localhost`.
#[cfg(test)]
pub(crate) async fn dial_for_test(
    address: &str,
    authority: &Path,
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    let config = client_config(Some(authority), None).expect("a configuration");
    let stream = tokio::net::TcpStream::connect(address).await.expect("connect");
    let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await.expect("a handshake")
}
