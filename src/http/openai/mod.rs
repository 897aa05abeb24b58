//! The part of OpenAI's API that its official clients use to generate and to train: what the endpoints below have in
//! common.
//! The served model and each adapter are models; an unknown name is an error, never the base.

pub(super) mod chat;
pub(super) mod chat_wire;
pub(super) mod completions;
pub(super) mod files;
pub(super) mod fine_tuning;
mod fine_tuning_wire;
pub(super) mod models;
mod training_file;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ApiError;
use super::fields::in_range;
use super::generation::{ContextFields, MaxTokens, max_new_tokens};
use super::state::{AppState, unix_now_s};
use crate::adapters::AdapterError;
use crate::engine::{
    AdapterHandle, EngineError, GenerateRequest, Generation, Sampling, Usage as EngineUsage,
};

/// Most answers to one prompt, as in OpenAI's API.
const MAX_N: i64 = 128;
/// Most stop tokens in one request.
const MAX_STOP_TOKENS: usize = 64;

/// What the stream carries besides the answer.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    /// A last chunk without choices has the token counts of the whole request.
    include_usage: Option<bool>,
    /// Accepted; this server adds no obfuscation.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

/// Token counts of a whole request: each prompt once, all answers together.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Tokens of the prompts.
    prompt_tokens: usize,
    /// Tokens generated.
    completion_tokens: usize,
    /// Both.
    total_tokens: usize,
}

impl Usage {
    /// Counts an answer in. `choice` is its index; with `n` answers a prompt, every `n`th brings a new prompt.
    fn add(&mut self, choice: usize, n: usize, answer: &EngineUsage) {
        if choice.is_multiple_of(n) {
            self.prompt_tokens += answer.prompt_tokens;
        }
        self.completion_tokens += answer.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// What every object of one answer repeats.
#[derive(Debug, Clone)]
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(prefix: &str, model: String) -> Self {
        Self { id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()), created: unix_now_s(), model }
    }
}

/// Whether the stream ends with the counts. Options for a stream that is not asked for are an error, as in
/// OpenAI's API.
fn include_usage(stream: bool, options: Option<StreamOptions>) -> Result<bool, ApiError> {
    match options {
        Some(_) if !stream => Err(ApiError::invalid("stream_options", "needs stream to be true")),
        options => Ok(options.unwrap_or_default().include_usage.unwrap_or(false)),
    }
}

/// The adapter that a model's name stands for; `None` is the base.
async fn adapter_of(state: &AppState, model: &str) -> Result<Option<AdapterHandle>, ApiError> {
    if model == state.settings.model_id {
        return Ok(None);
    }
    match state.adapters.acquire(model).await {
        Ok(adapter) => Ok(Some(adapter)),
        Err(error) => Err(of_model(state, model, error)),
    }
}

/// An adapter's error where the adapter was asked for as a model.
fn of_model(state: &AppState, model: &str, error: AdapterError) -> ApiError {
    match error {
        AdapterError::NotFound { .. } | AdapterError::InvalidName { .. } => {
            let base = &state.settings.model_id;
            let message = format!(
                "the model {model:?} does not exist: this server has {base} and the adapters that /v1/models lists"
            );
            ApiError::not_found("model_not_found", message).param("model")
        }
        error => ApiError::from(error).param("model"),
    }
}

/// A field that this server has no use for: refused unless its value asks for nothing. OpenAI's clients send many of
/// them as null or with their default.
fn neutral(name: &str, value: Option<&Value>, is_neutral: fn(&Value) -> bool) -> Result<(), ApiError> {
    match value {
        Some(value) if !is_neutral(value) => {
            Err(ApiError::unsupported(name, "is not supported by this server; leave it out"))
        }
        _ => Ok(()),
    }
}

/// Times are whole seconds in this API.
fn unix_s(ms: i64) -> u64 {
    u64::try_from(ms / 1000).unwrap_or_default()
}

/// Nothing but null is neutral.
fn never(_: &Value) -> bool {
    false
}

/// `0`
fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

/// `{}`, `[]` or `""`
fn empty(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Everything but the prompts that the engine needs for a request.
struct Plan {
    sampling: Sampling,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    ignore_eos: bool,
    top_logprobs: Option<usize>,
    adapter: Option<AdapterHandle>,
    n: usize,
    max_tokens: MaxTokens,
    fields: ContextFields,
}

/// Answers to one prompt, or 400.
fn choices(n: Option<i64>) -> Result<usize, ApiError> {
    in_range("n", n.unwrap_or(1), 1..=MAX_N)
}

fn stop_tokens(state: &AppState, ids: Option<Vec<u32>>) -> Result<Vec<u32>, ApiError> {
    let ids = ids.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        return Err(ApiError::invalid(
            "stop_token_ids",
            format!("must hold at most {MAX_STOP_TOKENS} tokens"),
        ));
    }
    let vocab = state.engine.info().vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("holds token {id}, but the vocabulary has {vocab}");
        return Err(ApiError::invalid("stop_token_ids", message));
    }
    Ok(ids)
}

/// Submits `n` requests a prompt; the answer to prompt p, number i, is choice `p * n + i`. Where one is refused, those
/// before it are cancelled, as they are dropped.
fn submit(state: &AppState, prompts: Vec<Vec<u32>>, plan: &Plan) -> Result<Vec<Generation>, ApiError> {
    let info = state.engine.info();
    let (total, capacity) = (prompts.len().saturating_mul(plan.n), info.max_batch + info.max_queue);
    if total > capacity {
        let message = format!(
            "the request asks for {total} answers, and this server holds {capacity} at once; ask for fewer"
        );
        return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "too_many_choices", message).param("n"));
    }
    let mut generations = Vec::with_capacity(total);
    for prompt in prompts {
        let max_new_tokens = max_new_tokens(state, plan.fields, prompt.len(), plan.max_tokens)?;
        for choice in 0..plan.n {
            let request = GenerateRequest {
                prompt: prompt.clone(),
                max_new_tokens,
                sampling: Sampling { stream: choice as u64, ..plan.sampling.clone() },
                stop: plan.stop.clone(),
                stop_token_ids: plan.stop_token_ids.clone(),
                ignore_eos: plan.ignore_eos,
                top_logprobs: plan.top_logprobs,
                adapter: plan.adapter.clone(),
            };
            generations.push(state.engine.generate(request).map_err(|error| of_engine(plan.fields, error))?);
        }
    }
    Ok(generations)
}

/// The engine speaks of the prompt; a chat calls it `messages`.
fn of_engine(fields: ContextFields, error: EngineError) -> ApiError {
    match error {
        EngineError::InvalidParameter { field: "prompt", message } => {
            ApiError::invalid(fields.prompt, message)
        }
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_without_support_pass_only_when_they_ask_for_nothing() {
        assert!(neutral("presence_penalty", Some(&json!(0)), zero).is_ok());
        assert!(neutral("presence_penalty", Some(&json!(0.0)), zero).is_ok());
        assert!(neutral("presence_penalty", None, zero).is_ok());
        assert!(neutral("logit_bias", Some(&json!({})), empty).is_ok());
        assert!(neutral("tools", Some(&json!([])), empty).is_ok());
        for (name, value, is_neutral) in [
            ("presence_penalty", json!(0.5), zero as fn(&Value) -> bool),
            ("presence_penalty", json!("0"), zero),
            ("logit_bias", json!({"5": 1}), empty),
            ("audio", json!({}), never),
        ] {
            let error = neutral(name, Some(&value), is_neutral).expect_err("asks for something").body().error;
            assert_eq!((error.code, error.param.as_deref()), ("unsupported_parameter", Some(name)));
        }
    }

    #[test]
    fn usage_counts_each_prompt_once() {
        let answer = EngineUsage {
            prompt_tokens: 5,
            completion_tokens: 3,
            queue_ms: 0.0,
            first_token_ms: 0.0,
            total_ms: 0.0,
        };
        let mut usage = Usage::default();
        for choice in 0..4 {
            usage.add(choice, 2, &answer);
        }
        assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (10, 12, 22));
    }

    #[test]
    fn stream_options_need_a_stream() {
        let with = StreamOptions { include_usage: Some(true), _include_obfuscation: None };
        assert!(include_usage(true, Some(with)).expect("is fine"));
        assert!(!include_usage(true, None).expect("is fine"));
        assert!(include_usage(false, Some(with)).is_err());
    }
}
