//! Where logged episodes are uploaded to: the section `sinks` of `rl_config.yaml`. Opens no connection.

use serde::{Deserialize, Serialize};

use super::adapter::FieldError;

/// The section `sinks`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SinksConfig {}

impl SinksConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// The field, as `sinks.NAME`, and what would do.
    pub(super) fn check(&self) -> Result<(), FieldError> {
        Ok(())
    }
}
