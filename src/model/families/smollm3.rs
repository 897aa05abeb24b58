//! SmolLM3: Llama in which some layers have no rotary embedding.

use anyhow::{Result, bail};
use serde_json::Value;

use super::llama::{TieDefault, base};
use super::qwen2;
use crate::model::config::ModelConfig;
use crate::model::spec::Spec;

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "smollm3", TieDefault::Tied)?;
    spec.windows = qwen2::windows(config, spec.layers)?;
    spec.rope_of_layer = match config.get("no_rope_layers") {
        // Despite its name the list holds 1 where a layer does have rotary embedding.
        Some(Value::Array(list)) if list.len() == spec.layers => {
            list.iter().map(|has| (has.as_u64() == Some(1)).then_some(0)).collect()
        }
        Some(_) => {
            bail!("config.json: \"no_rope_layers\" must list 0 or 1 for each of the {} layers", spec.layers)
        }
        None => {
            let interval = config.optional_size(&["no_rope_layer_interval"])?.unwrap_or(4).max(1);
            (0..spec.layers).map(|layer| (!(layer + 1).is_multiple_of(interval)).then_some(0)).collect()
        }
    };
    Ok(spec)
}
