//! Data from where it lies: streams of records to train on, and model files from a hub.

pub mod hub;

use serde::{Deserialize, Serialize};

/// A source of records, as the connectors file describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {}

/// Why a source gives no more records.
#[derive(Debug, Clone, thiserror::Error)]
#[error("source {source_name}: {message}")]
pub struct SourceError {
    /// The source's name.
    pub source_name: String,
    /// Which object and where in it, what is wrong, what to do.
    pub message: String,
}
