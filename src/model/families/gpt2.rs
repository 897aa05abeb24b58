//! GPT-2: learned positions, LayerNorm, weights that lie as [in, out].

use anyhow::{Result, bail};
use serde_json::Value;

use crate::model::config::ModelConfig;
use crate::model::spec::{LayerNames, LayerNorms, Mlp, Names, NormKind, Qkv, Spec};

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    config.refuse("scale_attn_by_inverse_layer_idx", &Value::Bool(false))?;
    config.refuse("add_cross_attention", &Value::Bool(false))?;
    let hidden_size = config.size(&["n_embd", "hidden_size"])?;
    let heads = config.size(&["n_head", "num_attention_heads"])?;
    let layers = config.size(&["n_layer", "num_hidden_layers"])?;
    if heads == 0 || !hidden_size.is_multiple_of(heads) {
        bail!("config.json: {heads} heads do not divide the width {hidden_size}");
    }
    let head_dim = hidden_size / heads;
    let scaled = config.flag("scale_attn_weights", true)?;
    let tied = config.flag("tie_word_embeddings", true)?;
    Ok(Spec {
        family: "gpt2",
        vocab_size: config.size(&["vocab_size"])?,
        hidden_size,
        layers,
        max_positions: config.size(&["n_positions", "max_position_embeddings"])?,
        heads,
        kv_heads: heads,
        head_dim,
        attention_scale: if scaled { (head_dim as f64).powf(-0.5) } else { 1.0 },
        alibi: false,
        windows: vec![None; layers],
        ropes: Vec::new(),
        rope_of_layer: vec![None; layers],
        norm: NormKind::Layer,
        norm_eps: config.number_or("layer_norm_epsilon", 1e-5)?,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_divisor: 1.0,
        transposed: true,
        names: Names {
            embedding: "transformer.wte",
            positions: Some("transformer.wpe"),
            embedding_norm: None,
            layers: "transformer.h",
            final_norm: "transformer.ln_f",
            head: (!tied).then_some("lm_head"),
        },
        layer: LayerNames {
            norms: LayerNorms {
                before_attention: Some("ln_1"),
                before_mlp: Some("ln_2"),
                ..LayerNorms::default()
            },
            qkv: Qkv::Fused("attn.c_attn"),
            qk_norm: None,
            attention_out: "attn.c_proj",
            mlp: Mlp::Plain {
                up: "mlp.c_fc",
                down: "mlp.c_proj",
                width: config.optional_size(&["n_inner"])?.unwrap_or(4 * hidden_size),
            },
            activation: config.activation(&["activation_function"])?,
        },
    })
}
