//! Teaching: the recipe that turns a source of records into a LoRA adapter. Flat asynchronous functions over the
//! engine's trainer; nothing here touches the device, knows HTTP, or knows where jobs are kept.

pub mod checkpoint;
pub mod dataset;
pub mod evaluation;
pub mod full;
pub mod job;
pub mod schedule;
pub mod targets;
pub mod template;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::adapters::{AdapterError, Registry};
use crate::config::adapter::{AdapterConfig, FieldError};
use crate::data::{SourceConfig, SourceError};
use crate::engine::{EngineError, EngineHandle};
use crate::model::tokenizer::Tokenizer;

/// What every job works with.
#[derive(Clone)]
pub struct Context {
    /// The engine that serves and trains.
    pub engine: EngineHandle,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Where finished adapters go.
    pub adapters: Arc<Registry>,
    /// Name of the base model, for `adapter_config.json`.
    pub model_id: String,
    /// `data_dir/jobs`: each job has the folder `{job_id}` in it, made when it is first needed.
    pub jobs_dir: PathBuf,
}

/// One training job, resolved: what it does depends on this, the source's records and the base weights alone. It
/// is kept as JSON, so that a job continues as it began whatever happens to the configuration files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainJob {
    /// Name of the adapter that it makes.
    pub adapter_name: String,
    /// Name of the source, as the connectors file has it.
    pub source_name: String,
    /// The source itself. Holds names of environment variables, never a secret.
    pub source: SourceConfig,
    /// Every setting.
    pub config: AdapterConfig,
}

/// Where a job stands; one is reported after every optimizer step, and again when an evaluation is through.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: u64,
    /// Steps in all; exact once the source's length is known, until then as many as `max_samples` gives.
    pub total_steps: u64,
    /// Passes over the data, as a fraction.
    pub epoch: f64,
    /// Mean loss a supervised token in the latest step.
    pub loss: f64,
    /// The same over the held-out examples at the latest evaluation.
    pub eval_loss: Option<f64>,
    /// Learning rate of the latest step.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Examples trained on, repeats included.
    pub samples: u64,
    /// Tokens trained on, prompts included.
    pub tokens: u64,
    /// Tokens a second over the latest steps.
    pub tokens_per_s: f64,
    /// Seconds until the end at this rate.
    pub eta_s: f64,
    /// Steps that were skipped because their gradient was not finite.
    pub skipped_steps: u64,
}

/// Where a job tells what it does. Called from the job's task; must not block.
pub trait Reporter: Send + Sync {
    /// A line for the job's log.
    fn log(&self, line: String);
    /// The latest figures.
    fn progress(&self, progress: &Progress);
    /// A checkpoint of this step is complete on disk.
    fn checkpointed(&self, step: u64);
}

/// Whether a running job is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stop {
    /// No.
    #[default]
    No,
    /// For good: what was trained stays as a checkpoint and as an adapter-shaped folder in it.
    Cancel,
    /// For now: the process ends; a checkpoint is written, and the job continues from it at the next start.
    Pause,
}

/// How a job ended, if it did not fail.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// The adapter is in its place and served.
    Completed {
        /// The last figures.
        progress: Progress,
        /// The generation that serving gives it.
        generation: u64,
    },
    /// As asked; `step` is that of the checkpoint that stays.
    Cancelled {
        /// Steps taken.
        step: u64,
    },
    /// As asked; `step` is that of the checkpoint to continue from.
    Paused {
        /// Steps taken.
        step: u64,
    },
}

/// Why a job cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A setting.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The engine, with a plan that does not fit among its reasons.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Where the finished adapter should go.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The data or the numbers: no supervised token, a loss that is not finite.
    #[error("{0}")]
    Failed(String),
    /// The disk.
    #[error("{what}: {source}")]
    Io {
        /// What could not be done.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
}
