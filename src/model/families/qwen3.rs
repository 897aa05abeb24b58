//! Qwen3: Qwen2 with queries and keys normalised a head at a time.

use anyhow::Result;

use super::llama::{TieDefault, base};
use super::qwen2;
use crate::model::config::ModelConfig;
use crate::model::spec::Spec;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "qwen3", TieDefault::Own)?;
    spec.head_dim = config.optional_size(&["head_dim"])?.unwrap_or(128);
    spec.attention_scale = (spec.head_dim as f64).powf(-0.5);
    spec.windows = qwen2::windows(config, spec.layers)?;
    spec.layer.qk_norm = Some(("self_attn.q_norm", "self_attn.k_norm"));
    Ok(spec)
}
