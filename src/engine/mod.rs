//! The engine: one OS thread owns the device, the weights, the KV cache and the adapters. Everyone else holds
//! an [`EngineHandle`] and sends it commands. This file is the handle and the types around it; `run` is the
//! thread.

mod adapters;
mod answer;
pub mod command;
pub mod detokenize;
pub mod forecast;
mod memory;
mod run;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod trainer;
mod trainer_handle;
pub mod training;
mod training_plan;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc as std_mpsc};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

pub use answer::{Answer, AnswerToken};
pub use command::{
    AdapterHandle, Event, FinishReason, GenerateRequest, Generation, LoadAdapter, PositionLogprobs, Sampling,
    ScoreRequest, TokenLogprob, Usage,
};
use command::{Command, Envelope};
pub use trainer_handle::Trainer;

use crate::model::load::{DeviceChoice, DtypeChoice};
use crate::model::tokenizer::Tokenizer;
use crate::nn::quant::Quantization;

/// Why the engine refuses or gives up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// A parameter out of its range.
    #[error("{field} {message}")]
    InvalidParameter {
        /// The field, by its name in the HTTP contract.
        field: &'static str,
        /// The range and the remedy.
        message: String,
    },
    /// Prompt and answer do not fit the context.
    #[error(
        "the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together more than the \
         {limit} tokens that fit; shorten the prompt or lower max_new_tokens"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_new_tokens: usize,
        /// The smaller of the model's context and what the KV cache holds.
        limit: usize,
    },
    /// The waiting line is full.
    #[error("{waiting} requests are waiting already; try again in {retry_after_s} s")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
        /// A guess from the rate at which requests end.
        retry_after_s: u64,
    },
    /// The adapter does not fit its byte budget beside those in use.
    #[error(
        "the adapter needs {needed_bytes} bytes and the budget is {budget_bytes}, of which {pinned_bytes} are in \
         use; raise --adapter-cache or wait"
    )]
    AdapterMemory {
        /// Bytes of the adapter.
        needed_bytes: u64,
        /// `--adapter-cache`.
        budget_bytes: u64,
        /// Bytes of adapters that running requests hold.
        pinned_bytes: u64,
    },
    /// Training as asked for does not fit the memory.
    #[error("training needs {needed_bytes} bytes and {free_bytes} are free; {remedy}")]
    TrainingMemory {
        /// The least that it would take.
        needed_bytes: u64,
        /// Free now.
        free_bytes: u64,
        /// What would fit.
        remedy: String,
    },
    /// The weights do not fit the model.
    #[error("{0}")]
    AdapterInvalid(String),
    /// The engine is shutting down or its thread has ended.
    #[error("the engine is shutting down")]
    Stopped,
    /// The device failed; the text is the backend's.
    #[error("the device failed: {0}")]
    Device(String),
}

/// How the engine is built. Everything is resolved: no defaults are looked up later.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Folder with `config.json` and the safetensors.
    pub model_dir: PathBuf,
    /// Where to run.
    pub device: DeviceChoice,
    /// How dense weights are held.
    pub dtype: DtypeChoice,
    /// Whether linear weights are quantized while loading.
    pub quantize: Quantization,
    /// Bytes for the KV cache; `None` chooses from the model and the free memory.
    pub kv_cache_bytes: Option<u64>,
    /// Requests that run at once.
    pub max_batch: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens worked on in one step while others are decoding.
    pub prefill_chunk: usize,
    /// Bytes for resident adapters.
    pub adapter_cache_bytes: u64,
    /// Share of the time that training gets while requests run, 0.05 to 0.95.
    pub train_share: f64,
}

/// What is being served; fixed once the engine runs.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Family, as in `config.json`'s `model_type`.
    pub family: String,
    /// Longest sequence: the model's `max_position_embeddings`, or less when the KV cache holds less.
    pub context_length: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Layers.
    pub layers: usize,
    /// Parameters of the checkpoint.
    pub parameters: u64,
    /// Bytes of the weights as they are held.
    pub weight_bytes: u64,
    /// Bytes taken for the KV cache.
    pub kv_cache_bytes: u64,
    /// Tokens that fit the KV cache, all sequences together.
    pub kv_cache_tokens: usize,
    /// How dense weights are held: `f32`, `f16`, `bf16`.
    pub dtype: &'static str,
    /// `none`, `q8_0`, `q4_0` or `q4_k`.
    pub quantization: &'static str,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Linear layers that an adapter can change, in the model's order.
    pub sites: Arc<Vec<crate::nn::lora::Site>>,
    /// `--max-batch`.
    pub max_batch: usize,
    /// `--max-queue`.
    pub max_queue: usize,
    /// `--train-share`.
    pub train_share: f64,
    /// `--adapter-cache`.
    pub adapter_cache_bytes: u64,
}

/// A moment of the engine, refreshed after every step and readable without waiting for one.
#[derive(Debug, Clone, Default)]
pub struct EngineStats {
    /// Requests that have slots.
    pub running: usize,
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// KV-cache tokens reserved by running requests.
    pub kv_tokens_reserved: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Prompt tokens worked through since the start.
    pub prompt_tokens: u64,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// Requests ended since the start, by any reason but cancellation.
    pub finished: u64,
    /// Requests whose client left.
    pub cancelled: u64,
    /// Seconds spent inside steps since the start.
    pub busy_s: f64,
    /// Seconds spent on training since the start.
    pub train_s: f64,
    /// Pieces that training was cut into since the start.
    pub train_pieces: u64,
    /// Seconds of the longest of them.
    pub longest_train_piece_s: f64,
    /// Tokens of finished training passes since the start.
    pub train_tokens: u64,
    /// Optimizer steps since the start.
    pub train_steps: u64,
    /// Trainers that hold memory.
    pub trainers: usize,
    /// Bytes that were planned for them.
    pub train_planned_bytes: u64,
    /// Resident adapters: name, generation, bytes.
    pub adapters: Vec<(String, u64, u64)>,
}

/// Whether the engine's thread is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It takes requests.
    Accepting,
    /// It was told to end.
    ShutDown,
    /// It ended by itself.
    Dead,
}

/// A cheap clone that anyone may hold.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

struct Shared {
    /// `None` once shutdown has begun: dropping the sender is what ends the thread.
    commands: Mutex<Option<std_mpsc::Sender<Envelope>>>,
    info: ModelInfo,
    in_flight: Arc<AtomicUsize>,
    stats: Arc<Mutex<EngineStats>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl EngineHandle {
    /// Starts the thread, loads the model there and returns once it can answer.
    ///
    /// # Errors
    /// What [`crate::model::load`] refuses, and a KV cache that does not fit.
    pub fn start(config: EngineConfig, tokenizer: Arc<Tokenizer>) -> anyhow::Result<Self> {
        let (commands, inbox) = std_mpsc::channel();
        let (ready, loaded) = std_mpsc::channel();
        let in_flight = Arc::new(AtomicUsize::new(0));
        let stats = Arc::new(Mutex::new(EngineStats::default()));
        let for_thread = (in_flight.clone(), stats.clone());
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            run::thread(config, tokenizer, inbox, ready, for_thread.0, for_thread.1);
        })?;
        let info = loaded
            .recv()
            .map_err(|_| anyhow::anyhow!("the engine thread ended while loading the model"))??;
        Ok(Self {
            shared: Arc::new(Shared {
                commands: Mutex::new(Some(commands)),
                info,
                in_flight,
                stats,
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// What is being served.
    pub fn info(&self) -> &ModelInfo {
        &self.shared.info
    }

    /// The latest snapshot; never waits for a step.
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.shared.stats.lock().expect("no holder of the stats lock panics").clone();
        stats.waiting = self.shared.in_flight.load(Ordering::Relaxed).saturating_sub(stats.running);
        stats
    }

    /// Whether the thread is there to answer. Never waits.
    pub fn liveness(&self) -> Liveness {
        let is_open = self.shared.commands.lock().expect("no holder of the sender lock panics").is_some();
        let thread = self.shared.thread.lock().expect("no holder of the thread lock panics");
        match thread.as_ref() {
            Some(thread) if is_open && !thread.is_finished() => Liveness::Accepting,
            // Nobody told it to end: it panicked.
            Some(thread) if is_open && thread.is_finished() => Liveness::Dead,
            _ => Liveness::ShutDown,
        }
    }

    /// Ends every request that runs or waits with [`EngineError::Stopped`], before the next step. Others are still taken.
    pub fn cut(&self) {
        // An engine that has stopped has nothing left to cut.
        let _ = self.send(Command::Cut);
    }

    /// Submits a request. Returns at once; what happens comes as events.
    ///
    /// # Errors
    /// A parameter out of range, a prompt that cannot fit, a full queue, an engine that has stopped.
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, EngineError> {
        let invalid = |field, message: String| Err(EngineError::InvalidParameter { field, message });
        request.sampling.validate()?;
        let info = &self.shared.info;
        if request.prompt.is_empty() {
            return invalid("prompt", "must not be empty".into());
        }
        if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= info.vocab_size) {
            return invalid(
                "prompt",
                format!("holds token {token}, but the vocabulary has {}", info.vocab_size),
            );
        }
        if request.max_new_tokens == 0 {
            return invalid("max_new_tokens", "must be at least 1".into());
        }
        if request.prompt.len().saturating_add(request.max_new_tokens) > info.context_length {
            return Err(EngineError::ContextLength {
                prompt_tokens: request.prompt.len(),
                max_new_tokens: request.max_new_tokens,
                limit: info.context_length,
            });
        }
        let (events_tx, events) = mpsc::unbounded_channel();
        self.admit()?;
        self.send(Command::Generate(Box::new(request), events_tx, Instant::now())).inspect_err(|_| {
            self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        })?;
        Ok(Generation { events })
    }

    /// ln p of every token from `from` on, given those before it: `tokens.len() - from` values.
    ///
    /// # Errors
    /// As [`EngineHandle::generate`].
    pub async fn score(&self, request: ScoreRequest) -> Result<Vec<f32>, EngineError> {
        let info = &self.shared.info;
        if request.tokens.len() < 2 || request.tokens.len() > info.context_length {
            return Err(EngineError::InvalidParameter {
                field: "tokens",
                message: format!("must hold 2 to {} tokens", info.context_length),
            });
        }
        if !(1..request.tokens.len()).contains(&request.from) {
            return Err(EngineError::InvalidParameter {
                field: "from",
                message: format!("must be 1 to {}, the number of the last token", request.tokens.len() - 1),
            });
        }
        if request.tokens.iter().any(|&t| t as usize >= info.vocab_size) {
            return Err(EngineError::InvalidParameter {
                field: "tokens",
                message: format!("must be below {}", info.vocab_size),
            });
        }
        let (reply, answer) = oneshot::channel();
        self.admit()?;
        self.send(Command::Score(request, reply)).inspect_err(|_| {
            self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        })?;
        answer.await.map_err(|_| EngineError::Stopped)?
    }

    /// Puts an adapter on the device, evicting others that nobody uses when the budget asks for it.
    ///
    /// # Errors
    /// Weights that do not fit the model, or a budget that is pinned by running requests.
    pub async fn load_adapter(&self, adapter: LoadAdapter) -> Result<AdapterHandle, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::LoadAdapter(adapter, reply))?;
        answer.await.map_err(|_| EngineError::Stopped)?
    }

    /// Forgets an adapter. Requests that run with it end as they began.
    pub async fn unload_adapter(&self, adapter: AdapterHandle) -> Result<(), EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::UnloadAdapter(adapter, reply))?;
        answer.await.map_err(|_| EngineError::Stopped)
    }

    /// Stops admitting, lets running requests end, and waits for the thread. Blocks; call it once, at the end.
    pub fn shutdown(&self) {
        drop(self.shared.commands.lock().expect("no holder of the sender lock panics").take());
        let thread = self.shared.thread.lock().expect("no holder of the thread lock panics").take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the engine thread had panicked");
        }
    }

    /// Takes a place in the engine; the engine gives it back when the request ends.
    fn admit(&self) -> Result<(), EngineError> {
        let ModelInfo { max_queue, max_batch, .. } = self.shared.info;
        let taken = self.shared.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < max_queue + max_batch).then_some(n + 1)
        });
        match taken {
            Ok(_) => Ok(()),
            Err(in_flight) => {
                let waiting = in_flight.saturating_sub(max_batch);
                let stats = self.stats();
                // Seconds of engine time that a request took so far; a newcomer waits for all of the line.
                let per_request = stats.busy_s / stats.finished.max(1) as f64;
                let retry_after_s = (per_request * waiting.max(1) as f64).ceil().clamp(1.0, 60.0) as u64;
                Err(EngineError::QueueFull { waiting, retry_after_s })
            }
        }
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        let sender = self.shared.commands.lock().expect("no holder of the sender lock panics");
        let envelope = Envelope { command, span: tracing::Span::current() };
        sender.as_ref().ok_or(EngineError::Stopped)?.send(envelope).map_err(|_| EngineError::Stopped)
    }
}
