//! How adapters are trained: `adapter_config.yaml` with a request's overrides, as typed and as resolved.

use serde::{Deserialize, Serialize};

pub use crate::data::Template;

/// Every setting of a training job, resolved and in its range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    /// Scale: alpha / r, or alpha / sqrt(r).
    pub lora_alpha: f64,
    /// Share of inputs left out.
    pub lora_dropout: f64,
    /// Scale by sqrt(r).
    pub use_rslora: bool,
    /// Last parts of module names, or `all-linear` alone.
    pub target_modules: Vec<String>,
    /// Seed of everything that is random.
    pub seed: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How it moves.
    pub lr_scheduler: Scheduler,
    /// Share of all steps that warm up.
    pub warmup_ratio: f64,
    /// AdamW's decay.
    pub weight_decay: f64,
    /// AdamW.
    pub adam_beta1: f64,
    /// AdamW.
    pub adam_beta2: f64,
    /// AdamW.
    pub adam_epsilon: f64,
    /// Largest norm of the gradient; 0 does not clip.
    pub max_grad_norm: f64,
    /// Examples of one micro-batch.
    pub batch_size: usize,
    /// Micro-batches of one step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data.
    pub epochs: u64,
    /// End after this many steps, whatever the data.
    pub max_steps: Option<u64>,
    /// Examples taken from the source; of the request, else of the file.
    pub max_samples: usize,
    /// Longer examples are cut at the end.
    pub max_seq_length: usize,
    /// `auto`, `recompute` or `keep`.
    pub checkpointing: Checkpointing,
    /// How a record becomes a text.
    pub template: Template,
    /// Learn the answer only, where a template has a prompt and an answer.
    pub completion_only: bool,
    /// Examples that are drawn from at random.
    pub shuffle_buffer: usize,
    /// Share of the examples that is held out.
    pub eval_share: f64,
    /// Steps between evaluations; 0 evaluates at the end alone.
    pub eval_steps: u64,
    /// Evaluations without a better loss after which training ends; 0 goes on.
    pub early_stopping_patience: u64,
    /// Steps between checkpoints; 0 writes one at the end alone.
    pub save_steps: u64,
    /// Steps between lines in the job's log.
    pub logging_steps: u64,
}

/// Learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Half a cosine to 0.
    Cosine,
    /// A line to 0.
    Linear,
    /// As it is.
    Constant,
}

/// Memory against time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// As many layers are kept as fit.
    Auto,
    /// None.
    Recompute,
    /// All.
    Keep,
}

/// A field that cannot be used, and what would do instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {message}")]
pub struct FieldError {
    /// The field, with the file or `overrides` it stands in where that helps: `learning_rate`, `source`.
    pub field: String,
    /// What is wrong and the remedy, to be read after the field's name.
    pub message: String,
}
