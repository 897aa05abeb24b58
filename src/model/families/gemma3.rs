//! Gemma 3, text: four norms a layer that multiply with 1 + w, scaled embeddings, windowed and full layers with a
//! rotary base of their own each.

use anyhow::Result;
use serde_json::Value;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::{LayerNorms, NormKind, Spec};

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    config.refuse("attn_logit_softcapping", &Value::Null)?;
    config.refuse("final_logit_softcapping", &Value::Null)?;
    config.refuse("use_bidirectional_attention", &Value::Bool(false))?;
    let mut spec = base(config, "gemma3_text", TieDefault::Tied)?;
    let pattern =
        config.optional_size(&["sliding_window_pattern", "_sliding_window_pattern"])?.unwrap_or(6).max(1);
    spec.windows = config.windows(spec.layers, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let full = config.rope("full_attention", "rope_theta", 1_000_000.0)?;
    let mut sliding = config.rope("sliding_attention", "rope_local_base_freq", 10_000.0)?;
    if config.get("rope_parameters").is_none() {
        // In the older spelling the scaling is that of the full layers alone.
        sliding.scaling = crate::nn::rope::RopeScaling::None;
    }
    spec.ropes = vec![full, sliding];
    spec.rope_of_layer = spec.windows.iter().map(|w| Some(usize::from(w.is_some()))).collect();
    spec.attention_scale = config.number(&["query_pre_attn_scalar"])?.powf(-0.5);
    spec.embedding_scale = (spec.hidden_size as f64).sqrt();
    spec.norm = NormKind::RmsPlusOne;
    spec.layer.norms = LayerNorms {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
    };
    spec.layer.qk_norm = Some(("self_attn.q_norm", "self_attn.k_norm"));
    Ok(spec)
}
