//! Everything the demo makes: one folder with certificate, token, logs, state and store.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// The demo's folder.
pub(super) struct Workshop {
    dir: PathBuf,
}

impl Workshop {
    /// Makes the folder: `keep`, which must be new or empty, or one under the temporary folder.
    pub(super) fn make(keep: Option<&Path>) -> anyhow::Result<Workshop> {
        let dir = match keep {
            Some(dir) => {
                fs::create_dir_all(dir)
                    .with_context(|| format!("cannot make {}", dir.display()))?;
                let dir = dir.canonicalize()?;
                if fs::read_dir(&dir)?.next().is_some() {
                    bail!("{} is not empty: name a new folder with --keep", dir.display());
                }
                dir
            }
            None => tempfile::Builder::new()
                .prefix("waybill-demo-")
                .tempdir()
                .context("cannot make a temporary folder")?
                .keep(),
        };
        let workshop = Workshop { dir };
        fs::create_dir(workshop.path("logs"))?;
        Ok(workshop)
    }

    /// A file of the folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The same, for a command line.
    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// An authority of its own, and a certificate of it for this machine.
    pub(super) fn make_certificates(&self) -> anyhow::Result<()> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name.push(DnType::CommonName, "Waybill demo authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut server = CertificateParams::new(names)?;
        server.distinguished_name.push(DnType::CommonName, "Waybill demo receiver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = server.signed_by(&key, &authority)?;

        fs::write(self.path("ca.pem"), authority.pem())?;
        fs::write(self.path("receiver.pem"), certificate.pem())?;
        self.write_secret("receiver.key", &key.serialize_pem())
    }

    /// A file that its owner alone can read.
    pub(super) fn write_secret(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The sender's configuration, a file to learn from.
    pub(super) fn write_sender_config(
        &self,
        receiver: &str,
        sources: &str,
    ) -> anyhow::Result<String> {
        ensure!(!sources.is_empty(), "the demo has no source");
        let text = format!(
            "# Written by waybill demo. Relative paths start at this folder.\n\
             to = [\"wss://{receiver}/\"]\n\
             ca = \"ca.pem\"\n\
             token_file = \"token\"\n\
             state_dir = \"state\"\n\
             receipts = \"-\"\n\
             log_format = \"json\"\n{sources}"
        );
        let path = self.path("sender.toml");
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_something_in_it_is_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        fs::write(dir.path().join("mine"), "x").expect("a file");
        let refused = Workshop::make(Some(dir.path())).map(|_| ());
        assert!(refused.expect_err("refused").to_string().contains("--keep"));
    }

    #[test]
    fn certificates_are_those_the_configuration_wants() {
        let dir = tempfile::tempdir().expect("a folder");
        let workshop = Workshop::make(Some(&dir.path().join("new"))).expect("a workshop");
        workshop.make_certificates().expect("certificates");
        for (name, label) in [
            ("ca.pem", "CERTIFICATE"),
            ("receiver.pem", "CERTIFICATE"),
            ("receiver.key", "PRIVATE KEY"),
        ] {
            let text = fs::read_to_string(workshop.path(name)).expect("a file");
            assert!(text.starts_with(&format!("-----BEGIN {label}-----")), "{name}");
        }
    }
}
