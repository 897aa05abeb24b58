//! BLOOM and BLOOMZ: ALiBi, LayerNorm with one right after the embedding, and one matrix for q, k, v that is
//! interleaved by head.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::model::config::ModelConfig;
use crate::model::spec::{LayerNames, LayerNorms, Mlp, Names, NormKind, Qkv, Spec};
use crate::nn::Activation;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    config.refuse("apply_residual_connection_post_layernorm", &Value::Bool(false))?;
    let hidden_size = config.size(&["hidden_size", "n_embed"])?;
    let heads = config.size(&["n_head", "num_attention_heads"])?;
    let layers = config.size(&["n_layer", "num_hidden_layers"])?;
    if heads == 0 || !hidden_size.is_multiple_of(heads) {
        bail!("config.json: {heads} heads do not divide the width {hidden_size}");
    }
    let head_dim = hidden_size / heads;
    let tied = config.flag("tie_word_embeddings", true)?;
    Ok(Spec {
        family: "bloom",
        vocab_size: config.size(&["vocab_size"])?,
        hidden_size,
        layers,
        // ALiBi has no end of its own; 2048 is what BLOOM was trained on.
        max_positions: config.optional_size(&["seq_length", "max_position_embeddings"])?.unwrap_or(2048),
        heads,
        kv_heads: heads,
        head_dim,
        attention_scale: (head_dim as f64).powf(-0.5),
        alibi: true,
        windows: vec![None; layers],
        ropes: Vec::new(),
        rope_of_layer: vec![None; layers],
        norm: NormKind::Layer,
        norm_eps: config.number_or("layer_norm_epsilon", 1e-5)?,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_divisor: 1.0,
        transposed: false,
        names: Names {
            embedding: "transformer.word_embeddings",
            positions: None,
            embedding_norm: Some("transformer.word_embeddings_layernorm"),
            layers: "transformer.h",
            final_norm: "transformer.ln_f",
            head: (!tied).then_some("lm_head"),
        },
        layer: LayerNames {
            norms: LayerNorms {
                before_attention: Some("input_layernorm"),
                before_mlp: Some("post_attention_layernorm"),
                ..LayerNorms::default()
            },
            qkv: Qkv::InterleavedByHead("self_attention.query_key_value"),
            qk_norm: None,
            attention_out: "self_attention.dense",
            mlp: Mlp::Plain { up: "mlp.dense_h_to_4h", down: "mlp.dense_4h_to_h", width: 4 * hidden_size },
            activation: Activation::GeluTanh,
        },
    })
}
