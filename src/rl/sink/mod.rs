//! Places that uploads go to, one file a kind. Each can do one thing: put a sealed file under a key, so that it is
//! there once and whole, however often that is asked. When it is asked again is the outbox's affair.

mod folder;
mod http;
mod s3;

use std::path::PathBuf;
use std::time::Duration;

use crate::config::rl_sinks::{KeyFacts, SinkConfig};

/// One upload, on its way.
#[derive(Debug, Clone)]
pub(super) struct Parcel {
    /// Id of the promise; a name for temporary files.
    pub(super) id: String,
    /// What it is called at its place.
    pub(super) key: String,
    /// What fills the placeholders of an address.
    pub(super) facts: KeyFacts,
    /// Size of the content.
    pub(super) bytes: u64,
    /// The sealed content.
    pub(super) file: PathBuf,
    /// An earlier attempt may have got through without our knowing.
    pub(super) may_be_there: bool,
}

impl Parcel {
    /// Hash of the content, hexadecimal.
    fn sha256(&self) -> &str {
        &self.facts.sha256
    }
}

/// Why an upload is not there.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum Refusal {
    /// Another attempt may succeed, after `wait` where the place said so.
    #[error("{reason}")]
    Passing {
        /// For people: what went wrong, and what to do about it.
        reason: String,
        /// Not before this.
        wait: Option<Duration>,
    },
    /// None will unless somebody changes something.
    #[error("{0}")]
    Final(String),
}

impl Refusal {
    fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), wait: None }
    }
}

/// A place, ready to take uploads.
#[derive(Debug)]
pub(super) enum Sink {
    /// A bucket.
    S3(s3::S3),
    /// An address.
    Http(http::Http),
    /// A folder.
    Folder(folder::Folder),
}

impl Sink {
    /// Reads what the environment says about the place. Asks nothing of it yet.
    ///
    /// # Errors
    /// A variable that is not set, or what it holds.
    pub(super) async fn open(config: &SinkConfig) -> Result<Self, Refusal> {
        Ok(match config {
            SinkConfig::S3(sink) => Self::S3(s3::S3::open(sink).await?),
            SinkConfig::Http(sink) => Self::Http(http::Http::open(sink)?),
            SinkConfig::Folder(sink) => Self::Folder(folder::Folder::open(sink)),
        })
    }

    /// Puts an upload in its place. Success says that it is there, whole and once, whoever put it there.
    ///
    /// # Errors
    /// It is not, or that is not known.
    pub(super) async fn put(&self, parcel: &Parcel) -> Result<(), Refusal> {
        match self {
            Self::S3(sink) => sink.put(parcel).await,
            Self::Http(sink) => sink.put(parcel).await,
            Self::Folder(sink) => sink.put(parcel).await,
        }
    }
}

/// The sealed content cannot be read.
fn unreadable(parcel: &Parcel, error: &std::io::Error) -> Refusal {
    let reason = format!("the sealed file {} cannot be read: {error}", parcel.file.display());
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            Refusal::Final(format!("{reason}; put it back from a backup, or give this upload up"))
        }
        _ => Refusal::passing(reason),
    }
}

#[cfg(test)]
mod tests;
