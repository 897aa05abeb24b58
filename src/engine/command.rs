//! What the engine can be asked, and what it answers: the closed set of commands, and the types that cross
//! the thread boundary. Nothing here touches a tensor, so callers never need one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};

use crate::engine::EngineError;
use crate::engine::training::{
    PassKind, PassReport, StepParameters, StepReport, TrainBatch, TrainerSnapshot, TrainerSpec, TrainingPlan,
};
use crate::nn::lora::LoraWeights;

/// How the next token is chosen. Every field is already validated (see [`Sampling::validate`]).
///
/// The order of operations is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p,
/// min-p, then one draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 means greedy: the most likely token, ties to the lowest id. No draw is made.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities reach this share; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Divide (positive) or multiply (negative) the logits of tokens seen in prompt and answer; 1 changes
    /// nothing (Keskar et al. 2019, as transformers applies it).
    pub repetition_penalty: f32,
    /// Seed of this request's own random stream.
    pub seed: u64,
    /// Which of the streams of `seed`: the index of a choice when `n` answers are wanted.
    pub stream: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            stream: 0,
        }
    }
}

impl Sampling {
    /// Checks every range. The error names the field and the range, in the words of the HTTP contract.
    pub fn validate(&self) -> Result<(), EngineError> {
        let bad =
            |field, message: &str| Err(EngineError::InvalidParameter { field, message: message.into() });
        if !(0.0..=100.0).contains(&self.temperature) {
            return bad("temperature", "must be between 0 (greedy) and 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", "must be above 0 and at most 1 (1 keeps all tokens)");
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return bad("min_p", "must be at least 0 (off) and below 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0) {
            return bad("repetition_penalty", "must be above 0 and at most 10 (1 changes nothing)");
        }
        Ok(())
    }
}

/// One answer to generate.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Prompt tokens, special tokens included. At least one.
    pub prompt: Vec<u32>,
    /// Upper bound on new tokens; `prompt.len() + max_new_tokens` must fit the context.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer; the answer stops before them.
    pub stop: Vec<String>,
    /// Tokens that end the answer, besides the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end tokens (benchmarks).
    pub ignore_eos: bool,
    /// `Some(k)`: report the log-probability of each chosen token and of the `k` most likely ones. They are of
    /// the model's own distribution: temperature 1, before any penalty or truncation.
    pub top_logprobs: Option<usize>,
    /// The adapter, pinned for as long as this request holds it; `None` is the base model.
    pub adapter: Option<AdapterHandle>,
}

impl GenerateRequest {
    /// A greedy request with nothing special.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            max_new_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            top_logprobs: None,
            adapter: None,
        }
    }
}

/// An adapter that is resident on the device. While a clone of the handle lives outside the engine, the adapter
/// is pinned: it is not evicted, and it keeps the generation it has.
pub type AdapterHandle = Arc<AdapterKey>;

/// The identity of a resident adapter: anything cached about an adapter is keyed by (name, generation).
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct AdapterKey {
    /// Name, as requests give it.
    pub name: String,
    /// Grows by one whenever the weights behind the name change.
    pub generation: u64,
    serial: u64,
}

impl AdapterKey {
    /// A new identity; no two have the same serial number in one process.
    pub(crate) fn new(name: String, generation: u64) -> AdapterHandle {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self { name, generation, serial: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// Unique in this process, also where name and generation come again.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop token or a stop text.
    Stop,
    /// `max_new_tokens` reached.
    Length,
}

/// A token with its log-probability (natural logarithm).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// ln p(token | everything before), temperature 1.
    pub logprob: f32,
}

/// The log-probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionLogprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The same at the temperature that it was drawn with, before any penalty or truncation: what a policy gradient
    /// compares with. 0 when greedy, as no other token could have come.
    pub sampled: f32,
    /// The most likely tokens, likeliest first.
    pub top: Vec<TokenLogprob>,
}

/// What a running request sends back.
#[derive(Debug, Clone)]
pub enum Event {
    /// One more token.
    Token {
        /// Its id.
        token: u32,
        /// The text that became certain with it: whole grapheme clusters, often empty for one token and longer
        /// for the next.
        text: String,
        /// Present when the request asked for log-probabilities.
        logprobs: Option<PositionLogprobs>,
    },
    /// The end: text that was held back until now, the reason and the counts.
    Finished {
        /// Rest of the text.
        text: String,
        /// Why it ended.
        reason: FinishReason,
        /// Tokens and times.
        usage: Usage,
    },
    /// The request failed; no event follows.
    Failed(EngineError),
}

/// Counts and times of one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the end token included when there was one.
    pub completion_tokens: usize,
    /// Milliseconds from submission to the first step that worked on it.
    pub queue_ms: f64,
    /// Milliseconds from submission to its first token.
    pub first_token_ms: f64,
    /// Milliseconds from submission to its end.
    pub total_ms: f64,
}

/// A running request. Dropping it cancels the request: its slot and its cache are free before the next step.
#[derive(Debug)]
pub struct Generation {
    /// Events, in order; ends with `Finished` or `Failed`.
    pub events: mpsc::UnboundedReceiver<Event>,
}

/// A command on its way, with the span of whoever asks: what the engine logs about it names the request or the job.
#[derive(Debug)]
pub(crate) struct Envelope {
    /// What is asked.
    pub(crate) command: Command,
    /// Who asks.
    pub(crate) span: tracing::Span,
}

/// Everything the engine thread can be asked.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate one answer.
    Generate(Box<GenerateRequest>, mpsc::UnboundedSender<Event>, std::time::Instant),
    /// Log-probability of each token of a text given those before it.
    Score(ScoreRequest, oneshot::Sender<Result<Vec<f32>, EngineError>>),
    /// End all requests with an error: the process stops and waits no longer.
    Cut,
    /// Put an adapter on the device.
    LoadAdapter(LoadAdapter, oneshot::Sender<Result<AdapterHandle, EngineError>>),
    /// Forget an adapter; running requests keep it until they end.
    UnloadAdapter(AdapterHandle, oneshot::Sender<()>),
    /// What training would take, without taking it.
    PlanTraining(Box<TrainerSpec>, Reply<TrainingPlan>),
    /// Take the memory for a trainer and initialise its weights.
    CreateTrainer(TrainerId, Box<TrainerSpec>, Reply<TrainingPlan>),
    /// One pass over a batch.
    Pass(TrainerId, Box<TrainBatch>, PassKind, Reply<PassReport>),
    /// Take a step with the gradient of the passes since the last one.
    OptimStep(TrainerId, StepParameters, Reply<StepReport>),
    /// Forget the gradient of the passes since the last step.
    DiscardGradient(TrainerId, Reply<()>),
    /// Copy a trainer's state out.
    Snapshot(TrainerId, Reply<TrainerSnapshot>),
    /// Put a trainer's state back.
    Restore(TrainerId, Box<TrainerSnapshot>, Reply<()>),
    /// Copy a trainer's adapter out.
    TrainedWeights(TrainerId, Reply<LoraWeights>),
    /// Serve a trainer's weights as they are, under a name and a generation.
    Publish(TrainerId, String, u64, Reply<AdapterHandle>),
    /// Free a trainer; a pass that is under way is given up.
    DropTrainer(TrainerId),
}

/// Names a trainer among all of the process.
pub(crate) type TrainerId = u64;

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// A text to score.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// At least two tokens.
    pub tokens: Vec<u32>,
    /// The first token that is scored, at least 1: nothing precedes the first one. What stands before it costs no
    /// logits.
    pub from: usize,
    /// As in [`GenerateRequest`].
    pub adapter: Option<AdapterHandle>,
}

/// Weights of an adapter on their way to the device.
#[derive(Debug)]
pub struct LoadAdapter {
    /// Name.
    pub name: String,
    /// Generation that it will have.
    pub generation: u64,
    /// Host tensors, one entry a site of the model that the adapter changes.
    pub weights: LoraWeights,
}
