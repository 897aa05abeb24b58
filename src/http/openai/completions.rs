//! `POST /v1/completions`: text goes on, in OpenAI's wire format.

use axum::Json;
use axum::extract::State;
use axum::response::sse::Event as Frame;
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::super::error::ApiError;
use super::super::extract::ApiJson;
use super::super::fields::{MAX_TOP_LOGPROBS, OneOrMany, Prompts, SamplingFields, in_range, stops};
use super::super::generation::{
    ContextFields, MaxTokens, check_prompt_bytes, collect, encode, finite, off_thread, token_text,
};
use super::super::openapi::GenerationErrors;
use super::super::sse::{self, Frames};
use super::super::state::AppState;
use super::{
    Head, Plan, StreamOptions, Usage, adapter_of, choices, empty, include_usage, neutral, stop_tokens,
    submit, zero,
};
use crate::engine::{FinishReason, PositionLogprobs, Usage as EngineUsage};
use crate::model::tokenizer::{AddSpecial, Special};

const FIELDS: ContextFields = ContextFields { prompt: "prompt", max_tokens: "max_tokens" };

/// OpenAI's default where a request does not say how long the answer may be.
const DEFAULT_MAX_TOKENS: usize = 16;

/// What to complete. A field that is absent or null has its default.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CompletionRequest {
    /// The served model, or an adapter.
    model: String,
    /// A text, token ids, or a list of either.
    prompt: Prompts,
    /// Upper bound on new tokens. Default 16.
    #[schema(minimum = 1)]
    max_tokens: Option<i64>,
    /// Default 1; 0 is greedy.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f64>,
    /// Default 1, which keeps all tokens.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Answers to each prompt. Default 1.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<i64>,
    /// Default false; true answers with server-sent events.
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptions>,
    /// Report the log-probability of each token and of this many of the most likely ones.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
    /// Default false; true puts the prompt before the answer. Not together with `logprobs`.
    echo: Option<bool>,
    /// Texts that end the answer, which stops before them: one, or a list of at most 16.
    #[schema(schema_with = crate::http::fields::stops_schema)]
    stop: Option<OneOrMany<String>>,
    /// The same seed gives the same answers.
    seed: Option<i64>,
    /// Beyond OpenAI's API: keep the k most likely tokens. Default 0, which keeps all.
    #[schema(minimum = 0)]
    top_k: Option<i64>,
    /// Beyond OpenAI's API: drop tokens less likely than this share of the most likely one. Default 0.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    min_p: Option<f64>,
    /// Beyond OpenAI's API: make tokens that were there already less likely. Default 1, which changes nothing.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    repetition_penalty: Option<f64>,
    /// Beyond OpenAI's API: tokens that end the answer, at most 64.
    stop_token_ids: Option<Vec<u32>>,
    /// Beyond OpenAI's API: go on after the model's end token. Default false.
    ignore_eos: Option<bool>,
    /// Only 0: not supported.
    presence_penalty: Option<Value>,
    /// Only 0: not supported.
    frequency_penalty: Option<Value>,
    /// Only empty: not supported.
    logit_bias: Option<Value>,
    /// Only empty: not supported.
    suffix: Option<Value>,
    /// Only as many as `n`: choosing the best of more is not supported.
    best_of: Option<i64>,
    /// Accepted; has no effect.
    #[serde(rename = "user")]
    _user: Option<Value>,
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

/// The answers, or a part of them.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct Completion {
    /// The same in every part of a stream.
    id: String,
    /// `text_completion`
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    /// As the request named it.
    model: String,
    /// One a prompt and answer: prompt p, answer i is number `p * n + i`.
    choices: Vec<CompletionChoice>,
    /// There in a whole answer, and in the last part of a stream that asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// One answer, or a part of it.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct CompletionChoice {
    /// Number of the answer.
    index: usize,
    /// Text.
    text: String,
    /// There when asked for.
    logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while the answer goes on.
    finish_reason: Option<&'static str>,
}

/// Log-probabilities: four lists with one entry a token.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(in crate::http) struct CompletionLogprobs {
    /// Texts of the tokens.
    tokens: Vec<String>,
    /// Of each token, natural logarithm.
    token_logprobs: Vec<f32>,
    /// The most likely tokens and the chosen one, by text; null when none were asked for.
    #[schema(value_type = Option<Vec<std::collections::HashMap<String, f32>>>)]
    top_logprobs: Option<Vec<Map<String, Value>>>,
    /// Characters of tokens before each one.
    text_offset: Vec<usize>,
}

/// Complete a text
///
/// OpenAI's completions; an adapter is chosen as `model`.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "openai",
    operation_id = "create_completion",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answers; with `stream` their parts as server-sent events", content(
            (Completion = "application/json"),
            (String = "text/event-stream"),
        )),
        GenerationErrors,
    )
)]
pub(in crate::http) async fn create(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<CompletionRequest>,
) -> Result<Response, ApiError> {
    refuse_unsupported(&request)?;
    let n = choices(request.n)?;
    if request.best_of.is_some_and(|best_of| usize::try_from(best_of) != Ok(n)) {
        return Err(ApiError::unsupported(
            "best_of",
            "must equal n: choosing the best of more is not supported",
        ));
    }
    let stream = request.stream.unwrap_or(false);
    let with_usage = include_usage(stream, request.stream_options)?;
    let echo = request.echo.unwrap_or(false);
    if echo && request.logprobs.is_some() {
        return Err(ApiError::unsupported("echo", "is not supported together with logprobs; leave one out"));
    }
    let top = request.logprobs.map(|k| in_range("logprobs", k, 0..=MAX_TOP_LOGPROBS)).transpose()?;
    let fields = SamplingFields {
        temperature: request.temperature.unwrap_or(1.0),
        top_p: request.top_p.unwrap_or(1.0),
        top_k: request.top_k.unwrap_or(0),
        min_p: request.min_p.unwrap_or(0.0),
        repetition_penalty: request.repetition_penalty.unwrap_or(1.0),
        seed: request.seed,
    };
    let plan = Plan {
        sampling: fields.resolve()?,
        stop: stops(request.stop)?,
        stop_token_ids: stop_tokens(&state, request.stop_token_ids)?,
        ignore_eos: request.ignore_eos.unwrap_or(false),
        top_logprobs: top,
        adapter: adapter_of(&state, &request.model).await?,
        n,
        max_tokens: request.max_tokens.map_or(MaxTokens::AtMost(DEFAULT_MAX_TOKENS), MaxTokens::Exactly),
        fields: FIELDS,
    };
    let (prompts, echoes) = read_prompts(&state, request.prompt, echo).await?;
    let generations = submit(&state, prompts, &plan)?;
    let writer = Writer { state, head: Head::new("cmpl", request.model), echoes, n, top };
    if stream {
        let offsets = vec![0; generations.len()];
        let frames = ChunkFrames { writer, offsets, usage: Usage::default(), with_usage };
        return Ok(sse::respond(generations, frames));
    }
    let answers = try_join_all(generations.into_iter().map(collect)).await?;
    let mut usage = Usage::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        usage.add(index, n, &answer.usage);
        let mut logprobs = top.map(|_| CompletionLogprobs::default());
        let mut offset = 0;
        if let Some(all) = &mut logprobs {
            for token in &answer.tokens {
                writer.extend(all, &mut offset, token.id, token.logprobs.as_ref())?;
            }
        }
        let text = writer.echo(index) + &answer.text;
        let finish_reason = Some(answer.reason.as_str());
        choices.push(CompletionChoice { index, text, logprobs, finish_reason });
    }
    Ok(Json(writer.body(choices, Some(usage))).into_response())
}

fn refuse_unsupported(request: &CompletionRequest) -> Result<(), ApiError> {
    neutral("presence_penalty", request.presence_penalty.as_ref(), zero)?;
    neutral("frequency_penalty", request.frequency_penalty.as_ref(), zero)?;
    neutral("logit_bias", request.logit_bias.as_ref(), empty)?;
    neutral("suffix", request.suffix.as_ref(), empty)
}

/// The prompts as tokens, and, where they are to be echoed, as texts.
async fn read_prompts(
    state: &AppState,
    prompts: Prompts,
    echo: bool,
) -> Result<(Vec<Vec<u32>>, Vec<String>), ApiError> {
    match prompts {
        Prompts::Texts(texts) => {
            let bytes = texts.iter().map(String::len).sum();
            check_prompt_bytes(state, FIELDS.prompt, bytes)?;
            let echoes = if echo { texts.clone() } else { Vec::new() };
            let mut tokens = Vec::with_capacity(texts.len());
            for text in texts {
                tokens.push(encode(state, FIELDS.prompt, text, AddSpecial::Yes).await?);
            }
            Ok((tokens, echoes))
        }
        Prompts::Tokens(lists) if echo => {
            off_thread(state, move |tokenizer| {
                let texts = lists.iter().map(|ids| tokenizer.decode(ids, Special::Keep));
                let texts = texts.collect::<Result<Vec<_>, _>>()?;
                Ok((lists, texts))
            })
            .await
        }
        Prompts::Tokens(lists) => Ok((lists, Vec::new())),
    }
}

/// What both ways to answer share.
struct Writer {
    state: AppState,
    head: Head,
    /// Texts of the prompts, when they are to stand before the answers.
    echoes: Vec<String>,
    n: usize,
    top: Option<usize>,
}

impl Writer {
    fn body(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        let Head { id, created, model } = self.head.clone();
        Completion { id, object: "text_completion", created, model, choices, usage }
    }

    fn echo(&self, choice: usize) -> String {
        self.echoes.get(choice / self.n).cloned().unwrap_or_default()
    }

    /// Adds one token to the four lists.
    fn extend(
        &self,
        all: &mut CompletionLogprobs,
        offset: &mut usize,
        id: u32,
        logprobs: Option<&PositionLogprobs>,
    ) -> Result<(), ApiError> {
        let Some(logprobs) = logprobs else { return Ok(()) };
        let tokenizer = &self.state.tokenizer;
        let text = token_text(tokenizer, id)?;
        if self.top.is_some_and(|k| k > 0) {
            let mut by_text = Map::new();
            for likely in &logprobs.top {
                // Two tokens can have one text, as parts of characters do: the likelier one stands for it.
                let text = token_text(tokenizer, likely.token)?;
                by_text.entry(text).or_insert_with(|| finite(likely.logprob).into());
            }
            by_text.entry(text.clone()).or_insert_with(|| finite(logprobs.chosen).into());
            all.top_logprobs.get_or_insert_default().push(by_text);
        }
        all.text_offset.push(*offset);
        *offset += text.chars().count();
        all.token_logprobs.push(finite(logprobs.chosen));
        all.tokens.push(text);
        Ok(())
    }
}

struct ChunkFrames {
    writer: Writer,
    /// Characters of tokens so far, of each choice.
    offsets: Vec<usize>,
    usage: Usage,
    with_usage: bool,
}

impl ChunkFrames {
    fn chunk(
        &self,
        index: usize,
        text: String,
        logprobs: Option<CompletionLogprobs>,
        finish_reason: Option<&'static str>,
    ) -> Frame {
        sse::data(&self.writer.body(vec![CompletionChoice { index, text, logprobs, finish_reason }], None))
    }
}

impl Frames for ChunkFrames {
    fn open(&mut self) -> Vec<Frame> {
        let echoes = (0..self.offsets.len()).map(|index| (index, self.writer.echo(index)));
        echoes.filter(|(_, text)| !text.is_empty()).map(|(i, text)| self.chunk(i, text, None, None)).collect()
    }

    fn token(
        &mut self,
        choice: usize,
        token: u32,
        text: String,
        logprobs: Option<PositionLogprobs>,
    ) -> Result<Vec<Frame>, ApiError> {
        if text.is_empty() && logprobs.is_none() {
            return Ok(Vec::new());
        }
        let mut all = logprobs.is_some().then(CompletionLogprobs::default);
        if let Some(all) = &mut all {
            self.writer.extend(all, &mut self.offsets[choice], token, logprobs.as_ref())?;
        }
        Ok(vec![self.chunk(choice, text, all, None)])
    }

    fn finished(
        &mut self,
        choice: usize,
        text: String,
        reason: FinishReason,
        usage: EngineUsage,
    ) -> Vec<Frame> {
        self.usage.add(choice, self.writer.n, &usage);
        vec![self.chunk(choice, text, None, Some(reason.as_str()))]
    }

    fn close(&mut self) -> Vec<Frame> {
        if !self.with_usage {
            return Vec::new();
        }
        vec![sse::data(&self.writer.body(Vec::new(), Some(self.usage)))]
    }
}
