//! Granite: Llama with four multipliers.

use anyhow::Result;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::Spec;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "granite", TieDefault::Own)?;
    spec.embedding_scale = config.number_or("embedding_multiplier", 1.0)?;
    spec.attention_scale = config.number_or("attention_multiplier", 1.0)?;
    spec.residual_scale = config.number_or("residual_multiplier", 1.0)?;
    spec.logits_divisor = config.number_or("logits_scaling", 1.0)?;
    Ok(spec)
}
