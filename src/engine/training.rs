//! What the engine can be asked about training: LoRA trainers over the served weights. As in `command`, nothing
//! here touches the device; tensors in snapshots live on the host.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::nn::loss::{PolicyToken, TokenLoss};
use crate::nn::optim::AdamWStep;
use crate::nn::policy::PolicyFigures;

/// A LoRA adapter to train (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Rank of A and B; at least 1.
    pub rank: usize,
    /// The change is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`.
    pub alpha: f64,
    /// Share of the inputs of A that a step leaves out, 0 to below 1.
    pub dropout: f64,
    /// Kalajdzievski 2023.
    pub rslora: bool,
    /// Numbers of the sites that are trained, ascending; see [`super::ModelInfo::sites`].
    pub sites: Vec<usize>,
    /// Seed of A's initial values and of dropout.
    pub seed: u64,
}

impl LoraSpec {
    /// What B·A is multiplied with.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// The largest passes that a job will ask for; what the memory plan is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassShape {
    /// Sequences of one micro-batch.
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub sequence_tokens: usize,
}

/// How much of the forward pass is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// As many layers as fit.
    #[default]
    Auto,
    /// None: every layer is computed again on the way back (gradient checkpointing, Chen et al. 2016).
    Recompute,
    /// All; refused when they do not fit.
    Keep,
}

/// A trainer to make.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerSpec {
    /// What is trained.
    pub lora: LoraSpec,
    /// AdamW.
    pub adamw: AdamW,
    /// The largest passes to come. A batch of more tokens is refused.
    pub pass: PassShape,
    /// Memory against time.
    pub checkpointing: Checkpointing,
}

/// AdamW (Loshchilov and Hutter 2019) as torch has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Bytes that a trainer takes, by what they are for, and the choices that they follow from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct TrainingPlan {
    /// Sequences of the longest length that one pass takes; a larger batch is cut into passes of this size.
    pub sequences_per_pass: usize,
    /// Tokens that one pass takes at most.
    pub tokens_per_pass: usize,
    /// Layers whose forward pass is kept; the others are computed again.
    pub kept_layers: usize,
    /// Weights and cache that are there already.
    pub resident_bytes: u64,
    /// Master weights of A and B, their gradients and both moments.
    pub adapter_bytes: u64,
    /// Inputs of the layers.
    pub hidden_bytes: u64,
    /// What kept layers hold.
    pub kept_bytes: u64,
    /// What working on one layer takes.
    pub layer_bytes: u64,
    /// What a chunk of the loss takes.
    pub loss_bytes: u64,
    /// All of the above but `resident_bytes`.
    pub training_bytes: u64,
    /// Free when the plan was made.
    pub free_bytes: u64,
}

/// One sequence to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSequence {
    /// Tokens, at least two.
    pub tokens: Vec<u32>,
    /// Weight of predicting `tokens[i]` from those before it; 0 where it is not supervised, as always at 0. As
    /// many as tokens.
    pub weights: Vec<f32>,
    /// What the loss of a policy compares each token with: as many as tokens; empty for other losses.
    pub policy: Vec<PolicyToken>,
}

impl TrainSequence {
    /// Tokens with their weights, for a loss that compares with nothing.
    pub fn new(tokens: Vec<u32>, weights: Vec<f32>) -> Self {
        Self { tokens, weights, policy: Vec::new() }
    }
}

/// One pass: sequences that are worked on together, attention and positions kept apart.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainBatch {
    /// At least one sequence, at least one weight that is not 0.
    pub sequences: Vec<TrainSequence>,
    /// What is minimised.
    pub loss: TokenLoss,
    /// What logits are divided by, so that log-probabilities are of the distribution that was sampled from; above 0.
    pub temperature: f64,
    /// What the pass adds to the number that the step divides the gradient by; `None` is the sum of its weights.
    pub normalizer: Option<f64>,
    /// Names this pass among all of the job; dropout draws from it.
    pub pass: u64,
}

impl TrainBatch {
    /// Cross-entropy over these, at the model's own temperature, a mean over the weights.
    pub fn cross_entropy(sequences: Vec<TrainSequence>, pass: u64) -> Self {
        Self { sequences, loss: TokenLoss::CrossEntropy, temperature: 1.0, normalizer: None, pass }
    }
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassKind {
    /// Its gradient is kept for the next step.
    Learn,
    /// Losses and log-probabilities of the adapter as it is, without dropout.
    Evaluate,
    /// The same of the base model, as if there were no adapter.
    EvaluateBase,
}

/// What a pass found.
#[derive(Debug, Clone, PartialEq)]
pub struct PassReport {
    /// Sum over supervised tokens of weight times loss.
    pub loss_sum: f64,
    /// Sum of the weights.
    pub weight_sum: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// All tokens.
    pub tokens: usize,
    /// ln p of every token of every sequence given those before it; 0 where it is not supervised.
    pub logprobs: Vec<Vec<f32>>,
    /// What a policy's loss met on its way; `None` for other losses.
    pub policy: Option<PolicyFigures>,
    /// Seconds of the engine's time.
    pub seconds: f64,
    /// The same by phase.
    pub phases: Phases,
}

/// Seconds of the engine's time by phase.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Phases {
    /// Embedding and layers, forward.
    pub forward: f64,
    /// Final norm, head and loss, both ways.
    pub loss: f64,
    /// Layers, backward, with what is computed again.
    pub backward: f64,
    /// Clipping and AdamW.
    pub optimizer: f64,
}

/// How a step is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepParameters {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Largest norm of the whole gradient; 0 does not clip.
    pub max_grad_norm: f64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// L2 norm of the gradient before clipping; not finite when the step was skipped.
    pub grad_norm: f64,
    /// The gradient was not finite, so nothing was changed but the loss scale.
    pub skipped: bool,
    /// Steps taken, this one included.
    pub steps: u64,
    /// What the loss was multiplied with before the backward pass; 1 but with f16 activations.
    pub loss_scale: f64,
    /// Seconds of the engine's time.
    pub seconds: f64,
}

/// Everything that a trainer must remember between steps, on the host.
#[derive(Debug, Clone)]
pub struct TrainerSnapshot {
    /// Named f32 tensors: `{site}.lora_A`, `{site}.lora_B` and for each the moments `….m` and `….v`, where
    /// `{site}` is the site's name in the model.
    pub tensors: BTreeMap<String, Tensor>,
    /// Steps taken.
    pub steps: u64,
    /// Loss scaling's state.
    pub loss_scale: LossScale,
}

/// Loss scaling for f16 (Micikevicius et al. 2018): halves at an overflow, doubles after many good steps.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LossScale {
    /// The factor; 1 and fixed for f32 and bf16.
    pub factor: f64,
    /// Good steps since it last changed.
    pub good_steps: u64,
}

/// The step to take with a gradient of this norm, which is to be divided by `divisor` first; clipping (Pascanu et
/// al. 2013) is in its factor.
pub(crate) fn adamw_step(
    adamw: AdamW,
    by: StepParameters,
    step: u64,
    grad_norm: f64,
    divisor: f64,
) -> AdamWStep {
    let clip = match by.max_grad_norm {
        most if most > 0.0 => (most / (grad_norm + 1e-6)).min(1.0),
        _ => 1.0,
    };
    AdamWStep {
        learning_rate: by.learning_rate,
        beta1: adamw.beta1,
        beta2: adamw.beta2,
        eps: adamw.eps,
        weight_decay: adamw.weight_decay,
        step,
        gradient_factor: clip / divisor,
    }
}
