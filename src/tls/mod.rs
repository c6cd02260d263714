//! Certificates and rustls configurations, for the transport and for syslog over TLS.
//!
//! The crypto provider is passed explicitly: no global state decides which one is used.

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
    let Pair { chain, key, end } = pair(files)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|error| pair_fault(files, error))?;
    if http {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
    }
    Ok((Arc::new(config), end))
}

struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// When the certificate ends, where that can be read.
    end: Option<Timestamp>,
}

/// A certificate whose time is over is shown all the same, with a warning: its peers say what is
/// wrong, and those that trust it anyway go on working.
fn pair(files: &Identity) -> Result<Pair, TlsError> {
    let chain = certificates("certificate", &files.certificate)?;
    let key = private_key(&files.key)?;
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::MAX);
    let end = chain.first().and_then(|own| not_after(own));
    if let Some(expired) = end.filter(|end| *end < now) {
        warn!(
            certificate = %escape_path(&files.certificate), %expired,
            "the certificate has expired and peers refuse it: renew it; it is taken over by itself"
        );
    }
    Ok(Pair { chain, key, end })
}

fn pair_fault(files: &Identity, error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::Mismatch { certificate: files.certificate.clone(), key: files.key.clone() }
        }
        rustls::Error::InvalidCertificate(fault) => TlsError::Broken {
            what: "certificate",
            file: files.certificate.clone(),
            reason: fault.to_string(),
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

/// When the first certificate of a PEM file ends; `None` where its DER has another shape.
pub fn end_of(file: &Path) -> Result<Option<Timestamp>, TlsError> {
    let chain = certificates("certificate", file)?;
    Ok(chain.first().and_then(|own| not_after(own)))
}

/// When a certificate ends (RFC 5280 §4.1.2.5), read from its DER; `None` where that has another
/// shape. Only a warning hangs on it: rustls checks what counts.
pub fn not_after(certificate: &[u8]) -> Option<Timestamp> {
    let (certificate, _) = element(certificate, 0x30)?;
    let (mut fields, _) = element(certificate, 0x30)?;
    if let Some((_, rest)) = element(fields, 0xa0) {
        fields = rest; // version
    }
    for tag in [0x02, 0x30, 0x30] {
        (_, fields) = element(fields, tag)?; // serial number, signature, issuer
    }
    let (validity, _) = element(fields, 0x30)?;
    let (_, rest) = element(validity, 0x17).or_else(|| element(validity, 0x18))?;
    let digits = |text: &[u8]| std::str::from_utf8(text).ok().map(str::to_owned);
    let text = match element(rest, 0x17) {
        // UTCTime has two digits of the year, 50 to 49 (RFC 5280 §4.1.2.5.1).
        Some((text, _)) => {
            let text = digits(text)?;
            format!("{}{text}", if text.as_bytes().first()? < &b'5' { "20" } else { "19" })
        }
        None => digits(element(rest, 0x18)?.0)?,
    };
    let civil = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", text).ok()?;
    civil.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
}

/// Takes one DER element with this tag off the front: its content, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    if found != tag {
        return None;
    }
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let count = usize::from(first & 0x7f);
        if count > 3 {
            return None;
        }
        length = 0;
        for _ in 0..count {
            let (&byte, after) = rest.split_first()?;
            length = length << 8 | usize::from(byte);
            rest = after;
        }
    }
    rest.split_at_checked(length)
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

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_read_in_both_forms_of_time() {
        for year in [2019, 2049, 2050, 2090] {
            let mut params = CertificateParams::new(["localhost".to_owned()]).expect("params");
            params.not_after = date_time_ymd(year, 3, 1);
            let certificate = params.self_signed(&KeyPair::generate().expect("key"));
            let end = not_after(certificate.expect("certificate").der()).expect("an end");
            assert_eq!(end.to_string(), format!("{year}-03-01T00:00:00Z"));
        }
    }

    #[test]
    fn bytes_that_are_no_certificate_have_no_end() {
        let certificate = [0x30, 0x82, 0xff, 0xff, 0x30, 0x05, 0x02];
        for length in 0..certificate.len() {
            assert_eq!(not_after(&certificate[..length]), None);
        }
    }
}
