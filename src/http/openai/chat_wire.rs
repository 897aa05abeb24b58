//! The chat's wire types: requests as OpenAI's clients send them, answers as they read them. No behaviour.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::{Ref, Schema};

use super::super::fields::{OneOrMany, one_or_many_schema};
use super::{StreamOptions, Usage};

/// A conversation to go on from. A field that is absent or null has its default.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ChatRequest {
    /// The served model, or an adapter.
    pub(super) model: String,
    /// The conversation so far.
    pub(super) messages: Vec<ChatMessage>,
    /// Upper bound on new tokens. Without it, what is left of the context.
    #[schema(minimum = 1)]
    pub(super) max_completion_tokens: Option<i64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    pub(super) max_tokens: Option<i64>,
    /// Default 1; 0 is greedy.
    #[schema(minimum = 0, maximum = 100)]
    pub(super) temperature: Option<f64>,
    /// Default 1, which keeps all tokens.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(super) top_p: Option<f64>,
    /// Answers. Default 1.
    #[schema(minimum = 1, maximum = 128)]
    pub(super) n: Option<i64>,
    /// Default false; true answers with server-sent events.
    pub(super) stream: Option<bool>,
    /// Only with `stream`.
    pub(super) stream_options: Option<StreamOptions>,
    /// Default false; true reports the log-probability of each token.
    pub(super) logprobs: Option<bool>,
    /// With `logprobs`: also of this many of the most likely tokens. Default 0.
    #[schema(minimum = 0, maximum = 20)]
    pub(super) top_logprobs: Option<i64>,
    /// Texts that end the answer, which stops before them: one, or a list of at most 16.
    #[schema(schema_with = crate::http::fields::stops_schema)]
    pub(super) stop: Option<OneOrMany<String>>,
    /// The same seed gives the same answers.
    pub(super) seed: Option<i64>,
    /// Beyond OpenAI's API: keep the k most likely tokens. Default 0, which keeps all.
    #[schema(minimum = 0)]
    pub(super) top_k: Option<i64>,
    /// Beyond OpenAI's API: drop tokens less likely than this share of the most likely one. Default 0.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub(super) min_p: Option<f64>,
    /// Beyond OpenAI's API: make tokens that were there already less likely. Default 1, which changes nothing.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    pub(super) repetition_penalty: Option<f64>,
    /// Beyond OpenAI's API: tokens that end the answer, at most 64.
    pub(super) stop_token_ids: Option<Vec<u32>>,
    /// Beyond OpenAI's API: go on after the model's end token. Default false.
    pub(super) ignore_eos: Option<bool>,
    /// Only 0: not supported.
    pub(super) presence_penalty: Option<Value>,
    /// Only 0: not supported.
    pub(super) frequency_penalty: Option<Value>,
    /// Only empty: not supported.
    pub(super) logit_bias: Option<Value>,
    /// Only `{"type":"text"}`.
    pub(super) response_format: Option<Value>,
    /// Only empty: not supported.
    pub(super) tools: Option<Value>,
    /// Only `"none"` and `"auto"`, which without tools ask for nothing.
    pub(super) tool_choice: Option<Value>,
    /// Only empty: not supported.
    pub(super) functions: Option<Value>,
    /// Only `"none"` and `"auto"`.
    pub(super) function_call: Option<Value>,
    /// Only `["text"]`.
    pub(super) modalities: Option<Value>,
    /// Not supported.
    pub(super) audio: Option<Value>,
    /// Not supported.
    pub(super) reasoning_effort: Option<Value>,
    /// Not supported.
    pub(super) verbosity: Option<Value>,
    /// Not supported.
    pub(super) web_search_options: Option<Value>,
    /// Accepted; has no effect without tools.
    #[serde(rename = "parallel_tool_calls")]
    _parallel_tool_calls: Option<Value>,
    /// Accepted; has no effect on the answer.
    #[serde(rename = "prediction")]
    _prediction: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "user")]
    _user: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "safety_identifier")]
    _safety_identifier: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "prompt_cache_key")]
    _prompt_cache_key: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "prompt_cache_retention")]
    _prompt_cache_retention: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "metadata")]
    _metadata: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "store")]
    _store: Option<Value>,
    /// Accepted; has no effect.
    #[serde(rename = "service_tier")]
    _service_tier: Option<Value>,
}

/// One message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ChatMessage {
    /// `system` (or `developer`), `user` or `assistant`.
    #[schema(example = "user")]
    pub(super) role: String,
    /// A text, or a list of parts, each a text.
    #[schema(schema_with = content_schema)]
    pub(super) content: Option<OneOrMany<ContentPart>>,
    /// Not supported.
    pub(super) name: Option<Value>,
    /// Only empty: not supported.
    pub(super) tool_calls: Option<Value>,
    /// Not supported.
    pub(super) tool_call_id: Option<Value>,
    /// Not supported.
    pub(super) function_call: Option<Value>,
    /// Only null, as an answer of this server has it.
    pub(super) refusal: Option<Value>,
    /// Only empty, as an answer of this server has it.
    pub(super) annotations: Option<Value>,
    /// Not supported.
    pub(super) audio: Option<Value>,
}

fn content_schema() -> Schema {
    one_or_many_schema(Ref::from_schema_name("ContentPart").into())
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ContentPart {
    /// Only `text`.
    #[schema(example = "text")]
    pub(super) r#type: String,
    /// Its text.
    pub(super) text: String,
}

/// The answers.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletion {
    /// Of this answer alone.
    pub(super) id: String,
    /// `chat.completion`
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// As the request named it.
    pub(super) model: String,
    /// The answers.
    pub(super) choices: Vec<ChatChoice>,
    /// Token counts.
    pub(super) usage: Usage,
}

/// One answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatChoice {
    /// Number of the answer.
    pub(super) index: usize,
    /// The message that goes on from the conversation.
    pub(super) message: AnswerMessage,
    /// There when asked for.
    pub(super) logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub(super) finish_reason: &'static str,
}

/// A message of the model.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct AnswerMessage {
    /// `assistant`
    pub(super) role: &'static str,
    /// The answer.
    pub(super) content: String,
    /// Always null.
    #[schema(value_type = Option<String>)]
    pub(super) refusal: (),
}

/// A part of an answer, in a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatChunk {
    /// The same in every part.
    pub(super) id: String,
    /// `chat.completion.chunk`
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// As the request named it.
    pub(super) model: String,
    /// One choice, or none in the part with the counts.
    pub(super) choices: Vec<ChunkChoice>,
    /// In the last part of a stream that asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
}

/// What one part adds to one answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChunkChoice {
    /// Number of the answer.
    pub(super) index: usize,
    /// What is new.
    pub(super) delta: Delta,
    /// Of the token of this part.
    pub(super) logprobs: Option<ChatLogprobs>,
    /// `stop` or `length` in an answer's last part.
    pub(super) finish_reason: Option<&'static str>,
}

/// What is new in a message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct Delta {
    /// In the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
}

/// Log-probabilities of an answer's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatLogprobs {
    /// One entry a token.
    pub(super) content: Vec<ChatLogprob>,
    /// Always null.
    #[schema(value_type = Option<String>)]
    pub(super) refusal: (),
}

/// A token with its log-probability.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatLogprob {
    /// Its text.
    pub(super) token: String,
    /// Natural logarithm.
    pub(super) logprob: f32,
    /// Its UTF-8; null where the token is only a part of a character.
    pub(super) bytes: Option<Vec<u8>>,
    /// The most likely tokens.
    pub(super) top_logprobs: Vec<ChatTopLogprob>,
}

/// A likely token.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatTopLogprob {
    /// Its text.
    pub(super) token: String,
    /// Natural logarithm.
    pub(super) logprob: f32,
    /// Its UTF-8; null where the token is only a part of a character.
    pub(super) bytes: Option<Vec<u8>>,
}
