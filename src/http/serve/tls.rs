//! The certificate that connections are answered with, which can be another one while the server runs.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;

use crate::config::TlsFiles;

/// A certificate with the files that it is read from.
pub struct Tls {
    files: TlsFiles,
    config: RwLock<Arc<rustls::ServerConfig>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// As [`TlsFiles::load`].
    pub fn load(files: TlsFiles) -> anyhow::Result<Self> {
        Ok(Self { config: RwLock::new(files.load()?), files })
    }

    /// Reads the files anew for the connections to come. What was there stays where they cannot be used.
    ///
    /// # Errors
    /// As [`TlsFiles::load`].
    pub fn reload(&self) -> anyhow::Result<()> {
        let config = self.files.load()?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}
