//! Llama 2 and 3 and what shares their shape. Also the starting point of the families that differ from it in a
//! few fields.

use anyhow::Result;

use super::Sizes;
use crate::model::config::ModelConfig;
use crate::model::spec::{LayerNames, LayerNorms, Mlp, Names, NormKind, Qkv, Spec};

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    base(config, "llama", TieDefault::Own)
}

/// What a missing `tie_word_embeddings` means; each family has its own default in transformers.
pub(super) enum TieDefault {
    Own,
    Tied,
}

/// A pre-norm decoder with RMSNorm, rotary embedding, separate projections and a gated feed-forward part.
pub(super) fn base(config: &ModelConfig, family: &'static str, tie: TieDefault) -> Result<Spec> {
    let sizes = Sizes::read(config)?;
    let tied = config.flag("tie_word_embeddings", matches!(tie, TieDefault::Tied))?;
    Ok(Spec {
        family,
        vocab_size: config.size(&["vocab_size"])?,
        hidden_size: sizes.hidden_size,
        layers: sizes.layers,
        max_positions: config.size(&["max_position_embeddings"])?,
        heads: sizes.heads,
        kv_heads: sizes.kv_heads,
        head_dim: sizes.head_dim,
        attention_scale: (sizes.head_dim as f64).powf(-0.5),
        alibi: false,
        windows: vec![None; sizes.layers],
        ropes: vec![config.rope("full_attention", "rope_theta", 10_000.0)?],
        rope_of_layer: vec![Some(0); sizes.layers],
        norm: NormKind::Rms,
        norm_eps: config.number_or("rms_norm_eps", 1e-6)?,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_divisor: 1.0,
        transposed: false,
        names: Names {
            embedding: "model.embed_tokens",
            positions: None,
            embedding_norm: None,
            layers: "model.layers",
            final_norm: "model.norm",
            head: (!tied).then_some("lm_head"),
        },
        layer: LayerNames {
            norms: LayerNorms {
                before_attention: Some("input_layernorm"),
                before_mlp: Some("post_attention_layernorm"),
                ..LayerNorms::default()
            },
            qkv: Qkv::Separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            qk_norm: None,
            attention_out: "self_attn.o_proj",
            mlp: Mlp::Gated {
                gate: "mlp.gate_proj",
                up: "mlp.up_proj",
                down: "mlp.down_proj",
                width: sizes.intermediate_size,
            },
            activation: config.activation(&["hidden_act", "hidden_activation"])?,
        },
    })
}
