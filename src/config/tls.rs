//! A certificate and its key, read from PEM files into what TLS is spoken with. Knows no socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Where the certificate and its key lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM: the server's certificate, then those that lead to a root.
    pub cert: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Reads both; HTTP/2 and HTTP/1.1 are offered.
    ///
    /// # Errors
    /// A file that cannot be read or is no such file, or a key that is not the certificate's; names the file and what to
    /// do. Nothing of a key is repeated.
    pub fn load(&self) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let certificates =
            self.certificates().with_context(|| format!("--tls-cert {}", shown(&self.cert)))?;
        let key = self.private_key().with_context(|| format!("--tls-key {}", shown(&self.key)))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("TLS cannot be set up")?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(|error| {
                anyhow!(
                    "--tls-key {} and --tls-cert {} do not go together: {error}; give the key that the certificate \
                     was made for, and the server's own certificate first in its file",
                    shown(&self.key),
                    shown(&self.cert)
                )
            })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn certificates(&self) -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let text = std::fs::read(&self.cert).context("cannot be read; correct the path or its rights")?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        let certificates = certificates.map_err(|error| anyhow!("is no PEM file: {error}"))?;
        match certificates.is_empty() {
            true => Err(anyhow!("holds no certificate; it must have a block -----BEGIN CERTIFICATE-----")),
            false => Ok(certificates),
        }
    }

    fn private_key(&self) -> anyhow::Result<PrivateKeyDer<'static>> {
        let text = std::fs::read(&self.key).context("cannot be read; correct the path or its rights")?;
        PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
            anyhow!(
                "holds no private key; it must have a block -----BEGIN PRIVATE KEY-----, without a passphrase"
            )
        })
    }
}

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
    }

    fn error(cert: PathBuf, key: PathBuf) -> String {
        format!("{:#}", TlsFiles { cert, key }.load().expect_err("these files are refused"))
    }

    #[test]
    fn a_certificate_and_its_key_are_read() {
        let files = TlsFiles { cert: fixture("cert.pem"), key: fixture("key.pem") };
        assert_eq!(files.load().unwrap().alpn_protocols.len(), 2);
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_the_remedy() {
        let (cert, key) = (fixture("cert.pem"), fixture("key.pem"));
        let message = error(fixture("cert.pem"), fixture("other_key.pem"));
        assert!(message.contains("other_key.pem") && message.contains("do not go together"), "{message}");
        let message = error(key.clone(), key.clone());
        assert!(message.contains("--tls-cert") && message.contains("BEGIN CERTIFICATE"), "{message}");
        let message = error(cert.clone(), cert.clone());
        assert!(message.contains("--tls-key") && message.contains("passphrase"), "{message}");
        let message = error(cert, "/nowhere/key.pem".into());
        assert!(message.contains("/nowhere/key.pem") && message.contains("correct the path"), "{message}");
        let dir = tempfile::tempdir().unwrap();
        let broken = dir.path().join("broken.pem");
        std::fs::write(&broken, "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").unwrap();
        let message = error(broken, key);
        assert!(message.contains("broken.pem") && message.contains("no PEM file"), "{message}");
    }
}
