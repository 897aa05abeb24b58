//! Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window on the upper layers where it is switched on.

use anyhow::Result;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::Spec;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "qwen2", TieDefault::Own)?;
    spec.windows = windows(config, spec.layers)?;
    Ok(spec)
}

/// Qwen's rule: `layer_types` where it stands, else the layers from `max_window_layers` on.
pub(super) fn windows(config: &ModelConfig, layers: usize) -> Result<Vec<Option<usize>>> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; layers]);
    }
    let from = config.optional_size(&["max_window_layers"])?.unwrap_or(28);
    config.windows(layers, |layer| layer >= from)
}
