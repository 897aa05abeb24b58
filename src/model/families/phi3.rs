//! Phi-3: Llama with one matrix for q, k, v and one for gate and up.

use anyhow::Result;

use super::llama::{TieDefault, base};
use crate::model::config::ModelConfig;
use crate::model::spec::{Mlp, Qkv, Spec};

pub(super) fn spec(config: &ModelConfig) -> Result<Spec> {
    let mut spec = base(config, "phi3", TieDefault::Own)?;
    let windowed = config.get("sliding_window").is_some();
    spec.windows = config.windows(spec.layers, |_| windowed)?;
    spec.layer.qkv = Qkv::Fused("self_attn.qkv_proj");
    spec.layer.mlp = Mlp::FusedGated {
        gate_up: "mlp.gate_up_proj",
        down: "mlp.down_proj",
        width: config.size(&["intermediate_size"])?,
    };
    Ok(spec)
}
