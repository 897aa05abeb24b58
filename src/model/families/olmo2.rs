//! OLMo 2: normalises after attention and feed-forward part instead of before, and queries and keys as a whole.

use anyhow::Result;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::{LayerNorms, Spec};

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "olmo2", TieDefault::Own)?;
    spec.layer.norms = LayerNorms {
        after_attention: Some("post_attention_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
        ..LayerNorms::default()
    };
    spec.layer.qk_norm = Some(("self_attn.q_norm", "self_attn.k_norm"));
    Ok(spec)
}
