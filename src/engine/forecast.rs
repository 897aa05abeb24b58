//! What serving and training a model would take of a machine, from its description alone: no weights, no device. The
//! figures are those that the engine plans with once the model is loaded.

use candle_core::DType;

use super::EngineError;
use super::memory::default_pages;
use super::training::{TrainerSpec, TrainingPlan};
use super::training_plan::{Circumstances, plan};
use crate::model::spec::Spec;
use crate::nn::kv_cache::KvShape;
use crate::nn::quant::Quantization;

/// A machine that a model may run on, and how it would be held there.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Threads of a CPU; `None` is a card.
    pub threads: Option<usize>,
    /// Memory that is free before the model is loaded.
    pub free_bytes: u64,
    /// Type of dense weights, and on a card of activations and the KV cache; on a CPU those are f32.
    pub dense: DType,
    /// How linear layers and vocabulary are held.
    pub quantize: Quantization,
    /// Bytes of the KV cache; `None` is what the engine takes by itself.
    pub kv_cache_bytes: Option<u64>,
    /// Requests that run at once.
    pub max_batch: usize,
}

/// What a model and a training job take.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Forecast {
    /// Embeddings and linear layers.
    pub weight_bytes: u64,
    /// Keys and values.
    pub kv_cache_bytes: u64,
    /// Of the job beside them.
    pub plan: TrainingPlan,
    /// All together, at the job's peak.
    pub total_bytes: u64,
}

/// Plans a job beside a model that is not loaded.
///
/// # Errors
/// A field out of its range; weights and cache that do not fit, or a job beside them, with the figures.
pub fn forecast(model: &Spec, spec: &TrainerSpec, machine: &Machine) -> Result<Forecast, EngineError> {
    let weight_bytes = model.weight_bytes(machine.dense, machine.quantize);
    let activations = if machine.threads.is_some() { DType::F32 } else { machine.dense };
    let shape = KvShape { layers: model.layers, kv_heads: model.kv_heads, head_dim: model.head_dim };
    let page_bytes = shape.page_bytes(activations);
    let too_much = |needed_bytes| EngineError::TrainingMemory {
        needed_bytes,
        free_bytes: machine.free_bytes,
        remedy: "the model itself does not fit: hold it with --quantize q8_0 or q4_k, or take a smaller one"
            .into(),
    };
    let beside = machine.free_bytes.checked_sub(weight_bytes).ok_or_else(|| too_much(weight_bytes))?;
    let pages = match machine.kv_cache_bytes {
        Some(bytes) => bytes / page_bytes,
        None => default_pages(machine.max_batch, model.max_positions).min(beside / 3 / page_bytes),
    };
    let kv_cache_bytes = pages * page_bytes;
    let resident_bytes = weight_bytes + kv_cache_bytes;
    let free = machine.free_bytes.checked_sub(resident_bytes).ok_or_else(|| too_much(resident_bytes))?;
    let about = Circumstances::of(machine.threads, machine.dense, resident_bytes, Some(free));
    let plan = plan(model, &model.sites(), spec, about)?;
    Ok(Forecast { weight_bytes, kv_cache_bytes, total_bytes: resident_bytes + plan.training_bytes, plan })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::model::load::{DeviceChoice, DtypeChoice, load, read_spec};

    #[test]
    fn a_description_tells_what_loading_would() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity");
        let mut seen = 0;
        for entry in std::fs::read_dir(fixtures).expect("there are fixtures") {
            let folder = entry.expect("can be read").path();
            if !folder.join("model.safetensors").is_file() {
                continue;
            }
            let spec = read_spec(&folder).expect("is a model");
            for quantize in [Quantization::None, Quantization::Q8_0, Quantization::Q4K] {
                let device: Device = DeviceChoice::Cpu.open().expect("is there");
                let (model, _) = load(&folder, &device, DtypeChoice::F32, quantize).expect("loads");
                assert_eq!(spec.sites(), model.sites(), "{}", folder.display());
                let told = spec.weight_bytes(DType::F32, quantize);
                // Which layers have a bias only the checkpoint tells.
                let biases: u64 = spec.sites().iter().map(|site| 4 * site.out_features as u64).sum();
                let loaded = model.weight_bytes();
                assert!(
                    (told..=told + biases).contains(&loaded),
                    "{} {}: {loaded} where {told} were told",
                    folder.display(),
                    quantize.name()
                );
            }
            seen += 1;
        }
        assert!(seen >= 8, "{seen} fixtures");
    }
}
