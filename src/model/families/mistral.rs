//! Mistral: Llama with a window over every layer.

use anyhow::Result;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::Spec;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "mistral", TieDefault::Own)?;
    let windowed = config.get("sliding_window").is_some();
    spec.windows = config.windows(spec.layers, |_| windowed)?;
    Ok(spec)
}
