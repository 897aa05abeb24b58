//! SIGHUP: API keys, the certificate and the connectors are read anew while the server runs. A file that cannot be
//! used changes nothing but the log.

use std::sync::Arc;

use crate::config::connectors::{self, Connectors};
use crate::config::keys::KeySources;
use crate::config::{Security, Settings};
use crate::http::{Access, Tls};

/// What is read anew.
#[derive(Clone)]
pub(super) struct Reload {
    access: Arc<Access>,
    key_sources: KeySources,
    tls: Option<Arc<Tls>>,
    configs_dir: std::path::PathBuf,
}

impl Reload {
    /// Keys and the certificate as they are now.
    ///
    /// # Errors
    /// The certificate's files changed since the settings were resolved, and cannot be used any more.
    pub(super) fn new(settings: &Settings) -> anyhow::Result<Self> {
        let Security { keys, key_sources, rate_limit, max_concurrent, tls, .. } = &settings.security;
        Ok(Self {
            access: Arc::new(Access::new(keys.clone(), *rate_limit, *max_concurrent)),
            key_sources: key_sources.clone(),
            tls: tls.clone().map(Tls::load).transpose()?.map(Arc::new),
            configs_dir: settings.configs_dir.clone(),
        })
    }

    /// Who may use the server.
    pub(super) fn access(&self) -> Arc<Access> {
        self.access.clone()
    }

    /// The certificate.
    pub(super) fn tls(&self) -> Option<Arc<Tls>> {
        self.tls.clone()
    }

    /// Reads all of it anew, one after the other.
    fn reload(&self) {
        match self.key_sources.load() {
            // Nobody who reloads keys means that everybody may do everything from now on.
            Ok(keys) if keys.is_empty() => tracing::info!("there are no API keys to read anew"),
            Ok(keys) => {
                tracing::info!(keys = keys.keys().len(), "API keys were read anew");
                self.access.replace(keys);
            }
            Err(error) => {
                let reason = format!("{error:#}");
                tracing::error!(reason, "API keys stay as they were; correct the file and send SIGHUP again");
            }
        }
        match self.tls.as_ref().map(|tls| tls.reload()) {
            None => {}
            Some(Ok(())) => tracing::info!("the certificate was read anew"),
            Some(Err(error)) => {
                let reason = format!("{error:#}");
                tracing::error!(
                    reason,
                    "the certificate stays as it was; correct the files and send SIGHUP again"
                );
            }
        }
        // Each job reads its sources itself; this tells whether the next one can.
        let file = self.configs_dir.join(connectors::FILE_NAME);
        match Connectors::load(&self.configs_dir, None) {
            Ok(connectors) => {
                tracing::info!(file = %file.display(), sources = connectors.names().count(), "sources can be used");
            }
            Err(error) => {
                tracing::error!(file = %file.display(), reason = %error, "sources cannot be used; correct the file");
            }
        }
    }

    /// Reloads at each SIGHUP for as long as the runtime is there. Elsewhere than on Unix there is no such signal.
    pub(super) fn spawn(self) {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            // Taken at once: a signal without a taker would end the process.
            let mut hangups = match signal(SignalKind::hangup()) {
                Ok(hangups) => hangups,
                Err(error) => {
                    return tracing::error!(%error, "SIGHUP cannot be handled; nothing is read anew");
                }
            };
            tokio::spawn(async move {
                while hangups.recv().await.is_some() {
                    let reload = self.clone();
                    // Files may lie on a disk that takes its time.
                    if let Err(error) = tokio::task::spawn_blocking(move || reload.reload()).await {
                        tracing::error!(%error, "reading files anew panicked; what was there stays");
                    }
                }
            });
        }
    }
}
