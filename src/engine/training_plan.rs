//! How much memory training takes, computed before any of it is taken, and the choices that make it fit. Pure
//! arithmetic over shapes.

use candle_core::DType;

use super::EngineError;
use super::training::{Checkpointing, TrainerSpec, TrainingPlan};
use crate::model::spec::{Mlp, Spec};
use crate::nn::TrainScratch;
use crate::nn::lora::Site;

/// Tokens that one pass aims at on a CPU: enough to make the products efficient, few enough that a piece of the
/// work takes about as long as a token takes to generate.
const CPU_PASS_TOKENS: usize = 256;
/// The same elsewhere.
const DEVICE_PASS_TOKENS: usize = 4096;
/// Logits of one chunk of the loss take about this much.
const LOSS_CHUNK_BYTES: u64 = 64 << 20;
/// Positions of one chunk.
const LOSS_POSITIONS: std::ops::RangeInclusive<usize> = 16..=512;

/// What the plan is made for besides the job.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// Bytes that weights and cache take.
    pub(super) resident_bytes: u64,
    /// Bytes that are free, if the system says.
    pub(super) free_bytes: Option<u64>,
    /// Bytes of one element of an activation.
    pub(super) activation_bytes: u64,
    /// Whether our kernels run, with their scratch memory, and how many threads they use.
    pub(super) kernel_threads: Option<usize>,
}

/// Positions whose logits are held at once.
pub(super) fn loss_positions(vocabulary: usize) -> usize {
    let fit = LOSS_CHUNK_BYTES as usize / (4 * vocabulary.max(1));
    fit.clamp(*LOSS_POSITIONS.start(), *LOSS_POSITIONS.end())
}

/// Elements that each token takes while a pass is made, by what for.
struct PerToken {
    hidden: usize,
    kept: usize,
    working: usize,
}

impl PerToken {
    fn of(model: &Spec, rank: usize, trained_per_layer: usize) -> Self {
        let hidden = model.hidden_size;
        let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
        let (halves, width) = match model.layer.mlp {
            Mlp::Gated { width, .. } | Mlp::FusedGated { width, .. } => (2, width),
            Mlp::Plain { width, .. } => (1, width),
        };
        let norms = &model.layer.norms;
        let after = [norms.after_attention, norms.after_mlp].into_iter().flatten().count();
        let raw = if model.layer.qk_norm.is_some() { q + kv } else { 0 };
        let attention = 2 * q + 2 * kv + raw + model.heads + hidden;
        let kept = attention + halves * width + after * hidden + rank * trained_per_layer;
        // The way back through the feed-forward part: its inner state, the gradients by that and by both halves,
        // the normed input and the gradients by it, the flow before and after.
        let mlp = (2 + halves) * width + 5 * hidden;
        // The way back through attention: the gradients by what was mixed and by q, k, v, twice where they turn.
        let by_attention = 3 * q + 4 * kv + 5 * hidden;
        Self { hidden, kept, working: mlp.max(by_attention) }
    }
}

impl Circumstances {
    /// On a CPU with our kernels and so many threads, where activations are f32; on another device in the type of the
    /// weights.
    pub(super) fn of(
        kernel_threads: Option<usize>,
        dense: DType,
        resident_bytes: u64,
        free: Option<u64>,
    ) -> Self {
        let activations = if kernel_threads.is_some() { DType::F32 } else { dense };
        Self {
            resident_bytes,
            free_bytes: free,
            activation_bytes: activations.size_in_bytes() as u64,
            kernel_threads,
        }
    }
}

/// Makes the plan.
///
/// # Errors
/// A field out of its range; nothing that fits, with the figures.
pub(super) fn plan(
    model: &Spec,
    sites: &[Site],
    spec: &TrainerSpec,
    about: Circumstances,
) -> Result<TrainingPlan, EngineError> {
    check(model, sites, spec)?;
    let aim = if about.kernel_threads.is_some() { CPU_PASS_TOKENS } else { DEVICE_PASS_TOKENS };
    let longest = spec.pass.sequence_tokens;
    let most = (aim / longest).clamp(1, spec.pass.sequences);
    let free = about.free_bytes.unwrap_or(u64::MAX);
    let at = |sequences: usize, kept: usize| bytes(model, sites, spec, about, sequences, kept);
    let fits = |plan: &TrainingPlan| plan.training_bytes <= free;
    let least = at(1, if spec.checkpointing == Checkpointing::Keep { model.layers } else { 0 });
    for sequences in (1..=most).rev() {
        let plan = match spec.checkpointing {
            Checkpointing::Keep => at(sequences, model.layers),
            Checkpointing::Recompute => at(sequences, 0),
            // Half of what is free stays free for others; the search is over a few dozen layers.
            Checkpointing::Auto => {
                let spare = |kept: &usize| at(sequences, *kept).training_bytes <= free / 2;
                at(sequences, (0..=model.layers).rev().find(spare).unwrap_or(0))
            }
        };
        if fits(&plan) {
            return Ok(plan);
        }
    }
    Err(EngineError::TrainingMemory {
        needed_bytes: least.training_bytes,
        free_bytes: free,
        remedy: remedy(model, sites, spec, about, free),
    })
}

fn check(model: &Spec, sites: &[Site], spec: &TrainerSpec) -> Result<(), EngineError> {
    let bad = |field, message: String| Err(EngineError::InvalidParameter { field, message });
    let lora = &spec.lora;
    if lora.rank == 0 {
        return bad("r", "must be at least 1".into());
    }
    if !(0.0..1.0).contains(&lora.dropout) {
        return bad("lora_dropout", "must be at least 0 and below 1".into());
    }
    if !lora.alpha.is_finite() || lora.alpha <= 0.0 {
        return bad("lora_alpha", "must be above 0".into());
    }
    if lora.sites.is_empty() {
        return bad("target_modules", "must name at least one linear layer".into());
    }
    if !lora.sites.is_sorted_by(|a, b| a < b) || lora.sites.last().is_some_and(|&s| s >= sites.len()) {
        return bad("target_modules", format!("must be ascending numbers below {}", sites.len()));
    }
    let length = spec.pass.sequence_tokens;
    if length < 2 || length > model.max_positions {
        let message = format!("must be 2 to {}, which is the model's context", model.max_positions);
        return bad("max_seq_length", message);
    }
    if spec.pass.sequences == 0 {
        return bad("batch_size", "must be at least 1".into());
    }
    Ok(())
}

fn bytes(
    model: &Spec,
    sites: &[Site],
    spec: &TrainerSpec,
    about: Circumstances,
    sequences: usize,
    kept_layers: usize,
) -> TrainingPlan {
    let (rank, trained) = (spec.lora.rank, &spec.lora.sites);
    let tokens = sequences * spec.pass.sequence_tokens;
    let per_token = PerToken::of(model, rank, trained.len().div_ceil(model.layers));
    let elements = |n: usize| n as u64 * about.activation_bytes;
    let parameters: usize =
        trained.iter().map(|&s| rank * (sites[s].in_features + sites[s].out_features)).sum();
    let widest = sites.iter().map(|s| s.in_features.max(s.out_features)).max().unwrap_or(0);
    let longest = spec.pass.sequence_tokens;
    let scratch = about.kernel_threads.map_or(0, |threads| {
        TrainScratch { tokens, widest, rank, longest, head_dim: model.head_dim, threads }.bytes()
    });
    let positions = loss_positions(model.vocab_size).min(tokens);
    let plan = TrainingPlan {
        sequences_per_pass: sequences,
        tokens_per_pass: tokens,
        kept_layers,
        resident_bytes: about.resident_bytes,
        // Value, two moments, the sum of gradients and those of the pass under way, all f32.
        adapter_bytes: 5 * 4 * parameters as u64,
        hidden_bytes: elements((model.layers + 1) * tokens * per_token.hidden),
        kept_bytes: elements(kept_layers * tokens * per_token.kept),
        layer_bytes: elements(tokens * (per_token.kept + per_token.working)) + scratch,
        loss_bytes: 4 * (positions * model.vocab_size) as u64
            + elements(6 * positions * model.hidden_size + 3 * tokens * model.hidden_size),
        training_bytes: 0,
        free_bytes: about.free_bytes.unwrap_or(0),
    };
    // The loss and the layers do not work at the same time.
    let working = plan.layer_bytes.max(plan.loss_bytes);
    let training_bytes = plan.adapter_bytes + plan.hidden_bytes + plan.kept_bytes + working;
    TrainingPlan { training_bytes, ..plan }
}

/// What would fit, in words.
fn remedy(model: &Spec, sites: &[Site], spec: &TrainerSpec, about: Circumstances, free: u64) -> String {
    let mut shorter = spec.clone();
    shorter.checkpointing = Checkpointing::Recompute;
    while shorter.pass.sequence_tokens >= 16 {
        shorter.pass.sequence_tokens /= 2;
        if bytes(model, sites, &shorter, about, 1, 0).training_bytes <= free {
            let tokens = shorter.pass.sequence_tokens;
            return format!("it would fit with checkpointing recompute and max_seq_length {tokens}");
        }
    }
    "free some memory, lower r, or serve the model with --quantize q8_0".to_owned()
}
