//! A TLS server that only counts: what `openssl s_client` writes into it is the yardstick for a
//! sender.

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Prints its port, takes one connection, and ends once so many bytes came.
pub fn run(certificate: &Path, key: &Path, bytes: u64) -> anyhow::Result<()> {
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let listener = TcpListener::bind("127.0.0.1:0").context("the TLS sink needs a port")?;
    println!("{}", listener.local_addr()?.port());
    let (stream, _) = listener.accept()?;
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::new(config))?, stream);
    let mut buffer = vec![0; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        let read = tls.read(&mut buffer)? as u64;
        ensure!(read > 0 && read <= left, "the client sent another number of bytes");
        left -= read;
    }
    // Closing is what ends a client that was told to ignore the end of its input.
    tls.conn.send_close_notify();
    tls.conn.write_tls(&mut tls.sock)?;
    Ok(())
}
