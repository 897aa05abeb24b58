//! One file a family: it reads `config.json` and says which parts the shared decoder uses.

mod bloom;
mod gemma3;
mod gpt2;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;

use anyhow::{Result, bail};

use super::config::ModelConfig;
use super::spec::Spec;

/// Every supported `model_type`.
pub const SUPPORTED: [&str; 11] = [
    "bloom",
    "gemma3_text",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
];

/// Reads a configuration.
///
/// # Errors
/// A family that is not supported (the message lists those that are), a missing field, a setting that would
/// change the numbers and is not implemented, sizes that do not fit each other.
pub fn spec(config: &ModelConfig) -> Result<Spec> {
    let spec = match config.model_type()? {
        "bloom" => bloom::spec(config),
        "gemma3_text" => gemma3::spec(config),
        "gpt2" => gpt2::spec(config),
        "granite" => granite::spec(config),
        "llama" => llama::spec(config),
        "mistral" => mistral::spec(config),
        "olmo2" => olmo2::spec(config),
        "phi3" => phi3::spec(config),
        "qwen2" => qwen2::spec(config),
        "qwen3" => qwen3::spec(config),
        "smollm3" => smollm3::spec(config),
        other => {
            bail!("model_type {other:?} is not supported; supported: {}", SUPPORTED.join(", "))
        }
    }?;
    check(&spec)?;
    Ok(spec)
}

fn check(spec: &Spec) -> Result<()> {
    let sizes = [
        ("vocab_size", spec.vocab_size),
        ("hidden_size", spec.hidden_size),
        ("num_hidden_layers", spec.layers),
        ("max_position_embeddings", spec.max_positions),
        ("num_attention_heads", spec.heads),
        ("num_key_value_heads", spec.kv_heads),
        ("head_dim", spec.head_dim),
    ];
    for (name, size) in sizes {
        if size == 0 {
            bail!("config.json: {name} must be at least 1");
        }
    }
    if !spec.heads.is_multiple_of(spec.kv_heads) {
        bail!(
            "config.json: {} query heads cannot share {} key/value heads evenly",
            spec.heads,
            spec.kv_heads
        );
    }
    if !spec.ropes.is_empty() && !spec.head_dim.is_multiple_of(2) {
        bail!("config.json: rotary embedding needs an even head_dim, not {}", spec.head_dim);
    }
    Ok(())
}

/// Sizes that most families spell alike.
struct Sizes {
    hidden_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
}

impl Sizes {
    fn read(config: &ModelConfig) -> Result<Self> {
        let hidden_size = config.size(&["hidden_size"])?;
        let heads = config.size(&["num_attention_heads"])?;
        if heads == 0 {
            bail!("config.json: num_attention_heads must be at least 1");
        }
        Ok(Self {
            hidden_size,
            layers: config.size(&["num_hidden_layers"])?,
            heads,
            kv_heads: config.optional_size(&["num_key_value_heads"])?.unwrap_or(heads),
            head_dim: config.optional_size(&["head_dim"])?.unwrap_or(hidden_size / heads),
            intermediate_size: config.size(&["intermediate_size"])?,
        })
    }
}
