//! What a job that learns from rewards begins with: an adapter to go on from as a trainer's state, and the trainer to
//! make. Touches no checkpoint.

use std::collections::BTreeMap;

use super::learn::{Mode, RlJob};
use crate::adapters::AdapterError;
use crate::config::adapter::FieldError;
use crate::config::rl::{Loss, RlTrainConfig};
use crate::engine::training::{LoraSpec, LossScale, TrainerSnapshot, TrainerSpec};
use crate::nn::lora::{LoraWeights, Site};
use crate::train::targets::trainer_spec;
use crate::train::{Context, TrainError};

/// Sequences that the memory of a pass is planned for at most.
const PASS_SEQUENCES: usize = 64;

/// What the adapter to go on from gives a trainer; `None` begins anew.
pub(super) async fn start(context: &Context, job: &RlJob) -> Result<Option<TrainerSnapshot>, TrainError> {
    let Some(name) = &job.start_from else { return Ok(None) };
    let weights = context.adapters.read(name).await?;
    let invalid = |reason: &str| AdapterError::Invalid { name: name.clone(), reason: reason.into() };
    Ok(Some(snapshot_of(&weights, &job.config, &context.engine.info().sites).map_err(|why| invalid(&why))?))
}

/// An adapter as a trainer's state, its moments 0. B takes over what its scale differs from the settings'.
fn snapshot_of(
    weights: &LoraWeights,
    config: &RlTrainConfig,
    sites: &[Site],
) -> Result<TrainerSnapshot, String> {
    let device = |error: candle_core::Error| error.to_string();
    let mut tensors = BTreeMap::new();
    let mut rank = None;
    for of in &weights.sites {
        let name = &sites[of.site].name;
        let own = of.a.dim(0).map_err(device)?;
        if of.magnitude.is_some() {
            return Err(
                "it is a DoRA adapter, and only plain LoRA is trained; begin anew without start_from".into(),
            );
        }
        if *rank.get_or_insert(own) != own {
            return Err("its modules have different ranks; begin anew without start_from".into());
        }
        let scale = lora(config, own, Vec::new()).scale();
        let b = (&of.b * (of.scale / scale)).map_err(device)?;
        for (part, tensor) in [("lora_A", of.a.clone()), ("lora_B", b)] {
            let zeros = tensor.zeros_like().map_err(device)?;
            tensors.insert(format!("{name}.{part}.m"), zeros.clone());
            tensors.insert(format!("{name}.{part}.v"), zeros);
            tensors.insert(format!("{name}.{part}"), tensor);
        }
    }
    Ok(TrainerSnapshot { tensors, steps: 0, loss_scale: LossScale { factor: 1.0, good_steps: 0 } })
}

fn lora(config: &RlTrainConfig, rank: usize, sites: Vec<usize>) -> LoraSpec {
    LoraSpec {
        rank,
        alpha: config.lora_alpha,
        // The policy that learns must be the one that sampled.
        dropout: 0.0,
        rslora: config.use_rslora,
        sites,
        seed: config.seed,
    }
}

/// The trainer to make. What goes on from a state has its rank and modules.
pub(super) fn spec(
    context: &Context,
    job: &RlJob,
    state: Option<&TrainerSnapshot>,
) -> Result<TrainerSpec, FieldError> {
    let (config, info) = (&job.config, context.engine.info());
    let sequences = match (job.mode, config.loss) {
        (Mode::Online, _) => config.prompts_per_step * config.group_size,
        (Mode::Offline, Loss::Dpo) => 2 * config.batch_size,
        (Mode::Offline, _) => config.batch_size,
    };
    let mut spec =
        trainer_spec(&config.adapter(sequences.min(PASS_SEQUENCES)), &info.sites, info.context_length)?;
    if let Some(state) = state {
        let rank_at =
            |site: &Site| state.tensors.get(&format!("{}.lora_A", site.name))?.dims().first().copied();
        let ranks: Vec<(usize, usize)> =
            info.sites.iter().enumerate().filter_map(|(at, site)| Some((at, rank_at(site)?))).collect();
        let Some(&(_, rank)) = ranks.first() else { return Ok(spec) };
        spec.lora = lora(config, rank, ranks.iter().map(|(at, _)| *at).collect());
    }
    Ok(spec)
}
