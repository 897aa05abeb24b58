//! How episodes become an adapter: the section `train` of `rl_config.yaml`. Knows no model.

use serde::{Deserialize, Serialize};

use super::adapter::FieldError;

/// The section `train`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RlTrainConfig {}

impl RlTrainConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// The field, as `train.NAME`, and what would do.
    pub(super) fn check(&self) -> Result<(), FieldError> {
        Ok(())
    }
}
