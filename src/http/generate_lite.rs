//! `POST /generate-lite`: one prompt, one answer, cleaned for its language, with the raw text beside it. It must
//! not know OpenAI's wire format.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::Event as Frame;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ApiError;
use super::extract::ApiJson;
use super::fields::{MAX_TOP_LOGPROBS, OneOrMany, SamplingFields, in_range, stops};
use super::generation::{
    Answer, AnswerToken, ContextFields, MaxTokens, collect, encode, finite, max_new_tokens, token_text,
};
use super::openapi::GenerationErrors;
use super::sse::{self, Frames};
use super::state::AppState;
use crate::engine::{
    AdapterHandle, FinishReason, GenerateRequest, PositionLogprobs, Sampling, Usage as EngineUsage,
};
use crate::model::tokenizer::AddSpecial;
use crate::text::clean::clean;
use crate::text::language::Language;
use crate::text::prompt::target_of_prompt;

const FIELDS: ContextFields = ContextFields { prompt: "prompt", max_tokens: "max_new_tokens" };

/// What to generate. A field that is absent or null has its default.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GenerateLite {
    /// The text to go on from; not empty.
    #[schema(example = "Translate English to Hindi: Good morning")]
    prompt: String,
    /// Upper bound on new tokens. Without it 100, or what is left of the context.
    #[schema(minimum = 1)]
    max_new_tokens: Option<i64>,
    /// Default 0.7; 0 is greedy.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f64>,
    /// Keep the smallest set of tokens whose probabilities reach this share. Default 0.9; 1 keeps all.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Keep the k most likely tokens. Default 50; 0 keeps all.
    #[schema(minimum = 0)]
    top_k: Option<i64>,
    /// Make tokens that were there already less likely. Default 1.1; 1 changes nothing.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    repetition_penalty: Option<f64>,
    /// Default true; false always takes the most likely token, whatever the temperature.
    do_sample: Option<bool>,
    /// The same seed gives the same answer. Chosen, and reported in `parameters`, when absent.
    seed: Option<i64>,
    /// Texts that end the answer, which stops before them: one, or a list of at most 16.
    #[schema(schema_with = super::fields::stops_schema)]
    stop: Option<OneOrMany<String>>,
    /// Name of the adapter to answer with; `""` and `"none"` are the base model.
    #[schema(example = "hindi-v1")]
    adapter: Option<String>,
    /// The adapter as older clients name it: `adapters/NAME` or `NAME`.
    #[schema(example = "adapters/hindi-v1")]
    adapter_path: Option<String>,
    /// Refuse unless this is the base model that is loaded.
    base_model: Option<String>,
    /// Language of the answer, for cleaning: `hi`, `bn`, `ta`, ... or its English name. Without it, what the prompt asks
    /// for ("Translate English to Tamil: ...").
    #[schema(example = "hi")]
    language: Option<String>,
    /// Default true: `generated_text` is cleaned. `raw_text` never is.
    clean: Option<bool>,
    /// Default false; true answers with server-sent events: `token` events `{"text"}` with the raw text as it
    /// grows, one `result` event with the whole body, then `[DONE]`.
    stream: Option<bool>,
    /// Report the log-probability of each token and of this many of the most likely ones.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GenerateLiteResponse {
    /// The prompt, as it came.
    prompt: String,
    /// The answer, cleaned unless `clean` is false.
    generated_text: String,
    /// The answer as the model gave it.
    raw_text: String,
    /// Language that the answer was cleaned for.
    #[schema(example = "hi")]
    language: Option<&'static str>,
    /// Adapter that answered; null is the base model.
    adapter: Option<String>,
    /// Which weights of that name; grows whenever they change.
    adapter_generation: Option<u64>,
    /// `stop` (an end token or a stop text) or `length` (`max_new_tokens`).
    #[schema(example = "stop")]
    finish_reason: &'static str,
    /// Token counts.
    usage: LiteUsage,
    /// Seconds from the request's arrival to the end of the answer.
    latency_s: f64,
    /// What took effect, defaults and the chosen seed included.
    parameters: Parameters,
    /// One entry a generated token; there when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<LiteLogprob>>,
}

/// Token counts.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct LiteUsage {
    /// Tokens of the prompt, special tokens included.
    prompt_tokens: usize,
    /// Tokens generated, the end token included.
    completion_tokens: usize,
}

/// The parameters that took effect.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Parameters {
    /// Upper bound on new tokens.
    max_new_tokens: usize,
    /// 0 when greedy.
    temperature: f64,
    /// Nucleus.
    top_p: f64,
    /// 0 is off.
    top_k: i64,
    /// 1 is off.
    repetition_penalty: f64,
    /// False when greedy.
    do_sample: bool,
    /// As given, or as chosen.
    seed: i64,
    /// Stop texts.
    stop: Vec<String>,
    /// Whether `generated_text` is cleaned.
    clean: bool,
}

/// A generated token with its log-probability.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct LiteLogprob {
    /// Its text; a part of a character shows as U+FFFD.
    token: String,
    /// Its id.
    token_id: u32,
    /// Natural logarithm, of the model's own distribution: temperature 1, nothing cut.
    logprob: f32,
    /// The most likely tokens, likeliest first.
    top: Vec<LiteTopLogprob>,
}

/// A likely token.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct LiteTopLogprob {
    /// Its text.
    token: String,
    /// Its id.
    token_id: u32,
    /// Natural logarithm.
    logprob: f32,
}

/// Generate text
///
/// One prompt, one answer, with the adapter that the request names.
#[utoipa::path(
    post,
    path = "/generate-lite",
    tag = "generate",
    request_body = GenerateLite,
    responses(
        (status = 200, description = "The answer; with `stream` its parts as server-sent events", content(
            (GenerateLiteResponse = "application/json"),
            (String = "text/event-stream"),
        )),
        GenerationErrors,
        (status = 409, description = "`base_model` is not the one that is loaded", body = super::error::ErrorBody),
    )
)]
pub(super) async fn generate_lite(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<GenerateLite>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let (request, job) = prepare(&state, request, arrived).await?;
    let streams = job.streams;
    let generation = state.engine.generate(request)?;
    if streams {
        let frames = LiteFrames { state, job, raw_text: String::new(), logprobs: Vec::new() };
        return Ok(sse::respond(vec![generation], frames));
    }
    let answer = collect(generation).await?;
    let logprobs = logprobs_of(&state, &answer.tokens)?;
    let Answer { text, reason, usage, .. } = answer;
    Ok(Json(job.response(text, logprobs, reason, usage)).into_response())
}

/// What is known of a request once it is checked, and needed again when it ends.
struct Job {
    arrived: Instant,
    prompt: String,
    language: Option<Language>,
    adapter: Option<AdapterHandle>,
    parameters: Parameters,
    with_logprobs: bool,
    streams: bool,
}

async fn prepare(
    state: &AppState,
    request: GenerateLite,
    arrived: Instant,
) -> Result<(GenerateRequest, Job), ApiError> {
    let defaults = &state.settings.generation;
    if request.prompt.is_empty() {
        return Err(ApiError::invalid("prompt", "must not be empty"));
    }
    check_base_model(&state.settings.model_id, request.base_model.as_deref())?;
    let temperature = request.temperature.unwrap_or(defaults.temperature);
    let do_sample = request.do_sample.unwrap_or(defaults.do_sample) && temperature != 0.0;
    let mut fields = SamplingFields {
        temperature,
        top_p: request.top_p.unwrap_or(defaults.top_p),
        top_k: request.top_k.unwrap_or(i64::try_from(defaults.top_k).unwrap_or(i64::MAX)),
        min_p: 0.0,
        repetition_penalty: request.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        seed: request.seed,
    };
    let mut sampling = fields.resolve()?;
    if !do_sample {
        // Only now: a temperature out of its range is an error also where it would have no effect.
        fields.temperature = 0.0;
        sampling.temperature = 0.0;
    }
    let stop = stops(request.stop)?;
    let top_logprobs = request.logprobs.map(|k| in_range("logprobs", k, 0..=MAX_TOP_LOGPROBS)).transpose()?;
    let language = language(request.language.as_deref(), &request.prompt)?;
    let adapter = match adapter_name(request.adapter, request.adapter_path)? {
        Some(name) => Some(state.adapters.acquire(&name).await?),
        None => None,
    };
    let tokens = encode(state, FIELDS.prompt, request.prompt.clone(), AddSpecial::Yes).await?;
    let asked = request.max_new_tokens.map_or(MaxTokens::AtMost(defaults.max_new_tokens), MaxTokens::Exactly);
    let max_new_tokens = max_new_tokens(state, FIELDS, tokens.len(), asked)?;
    let parameters = Parameters {
        max_new_tokens,
        temperature: fields.temperature,
        top_p: fields.top_p,
        top_k: fields.top_k,
        repetition_penalty: fields.repetition_penalty,
        do_sample,
        seed: seed_of(&sampling),
        stop: stop.clone(),
        clean: request.clean.unwrap_or(defaults.clean),
    };
    let job = Job {
        arrived,
        prompt: request.prompt,
        language,
        adapter: adapter.clone(),
        parameters,
        with_logprobs: top_logprobs.is_some(),
        streams: request.stream.unwrap_or(false),
    };
    let request = GenerateRequest {
        sampling,
        stop,
        top_logprobs,
        adapter,
        ..GenerateRequest::greedy(tokens, max_new_tokens)
    };
    Ok((request, job))
}

/// The engine takes the seed's bits as unsigned; requests give them as JSON's signed integers.
fn seed_of(sampling: &Sampling) -> i64 {
    sampling.seed as i64
}

fn check_base_model(loaded: &str, asked: Option<&str>) -> Result<(), ApiError> {
    match asked.map(str::trim) {
        Some(asked) if !asked.is_empty() && asked != loaded => {
            let message = format!(
                "base_model is {asked}, but this server has {loaded} loaded; leave base_model out, or ask a \
                 server that was started with it"
            );
            Err(ApiError::new(StatusCode::CONFLICT, "base_model_not_loaded", message).param("base_model"))
        }
        _ => Ok(()),
    }
}

fn language(asked: Option<&str>, prompt: &str) -> Result<Option<Language>, ApiError> {
    match asked.map(str::trim).filter(|code| !code.is_empty()) {
        Some(code) => match code.parse() {
            Ok(language) => Ok(Some(language)),
            Err(error) => Err(ApiError::invalid("language", format!("is not known: {error}"))),
        },
        None => Ok(target_of_prompt(prompt)),
    }
}

/// The adapter's name, or `None` for the base. Whether it is a good name is the registry's to say.
fn adapter_name(adapter: Option<String>, path: Option<String>) -> Result<Option<String>, ApiError> {
    let named = |name: &str| (!name.is_empty() && name != "none").then(|| name.to_owned());
    let from_path = path.as_deref().map(|path| {
        let path = path.strip_prefix("./").unwrap_or(path);
        let name = path.strip_prefix("adapters/").unwrap_or(path);
        named(name.strip_suffix('/').unwrap_or(name))
    });
    match (adapter.as_deref().map(named), from_path) {
        (Some(adapter), Some(path)) if adapter != path => Err(ApiError::invalid(
            "adapter_path",
            "names another adapter than adapter; leave one of them out",
        )),
        (Some(name), _) | (None, Some(name)) => Ok(name),
        (None, None) => Ok(None),
    }
}

impl Job {
    fn response(
        &self,
        raw_text: String,
        logprobs: Vec<LiteLogprob>,
        reason: FinishReason,
        usage: EngineUsage,
    ) -> GenerateLiteResponse {
        let generated_text = if self.parameters.clean {
            clean(&raw_text, &self.prompt, self.language)
        } else {
            raw_text.clone()
        };
        GenerateLiteResponse {
            prompt: self.prompt.clone(),
            generated_text,
            raw_text,
            language: self.language.map(|language| language.code()),
            adapter: self.adapter.as_ref().map(|adapter| adapter.name.clone()),
            adapter_generation: self.adapter.as_ref().map(|adapter| adapter.generation),
            finish_reason: reason.as_str(),
            usage: LiteUsage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            },
            latency_s: self.arrived.elapsed().as_secs_f64(),
            parameters: self.parameters.clone(),
            logprobs: self.with_logprobs.then_some(logprobs),
        }
    }
}

fn logprobs_of(state: &AppState, tokens: &[AnswerToken]) -> Result<Vec<LiteLogprob>, ApiError> {
    let wanted = tokens.iter().filter_map(|t| t.logprobs.as_ref().map(|logprobs| (t.id, logprobs)));
    wanted.map(|(id, logprobs)| logprob_of(state, id, logprobs)).collect()
}

fn logprob_of(state: &AppState, id: u32, logprobs: &PositionLogprobs) -> Result<LiteLogprob, ApiError> {
    let text = |id| token_text(&state.tokenizer, id);
    let top = logprobs
        .top
        .iter()
        .map(|t| Ok(LiteTopLogprob { token: text(t.token)?, token_id: t.token, logprob: finite(t.logprob) }));
    Ok(LiteLogprob {
        token: text(id)?,
        token_id: id,
        logprob: finite(logprobs.chosen),
        top: top.collect::<Result<_, ApiError>>()?,
    })
}

/// One event of the stream.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenEvent {
    /// Raw text that became certain: whole characters.
    text: String,
    /// There when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<LiteLogprob>,
}

struct LiteFrames {
    state: AppState,
    job: Job,
    raw_text: String,
    logprobs: Vec<LiteLogprob>,
}

impl LiteFrames {
    fn text_frame(&mut self, text: String, logprobs: Option<LiteLogprob>) -> Vec<Frame> {
        if text.is_empty() && logprobs.is_none() {
            return Vec::new();
        }
        self.raw_text.push_str(&text);
        vec![sse::named("token", &TokenEvent { text, logprobs })]
    }
}

impl Frames for LiteFrames {
    fn open(&mut self) -> Vec<Frame> {
        Vec::new()
    }

    fn token(
        &mut self,
        _choice: usize,
        token: u32,
        text: String,
        logprobs: Option<PositionLogprobs>,
    ) -> Result<Vec<Frame>, ApiError> {
        let logprobs = logprobs.map(|l| logprob_of(&self.state, token, &l)).transpose()?;
        self.logprobs.extend(logprobs.clone());
        Ok(self.text_frame(text, logprobs))
    }

    fn finished(
        &mut self,
        _choice: usize,
        text: String,
        reason: FinishReason,
        usage: EngineUsage,
    ) -> Vec<Frame> {
        let mut frames = self.text_frame(text, None);
        let raw_text = std::mem::take(&mut self.raw_text);
        let logprobs = std::mem::take(&mut self.logprobs);
        frames.push(sse::named("result", &self.job.response(raw_text, logprobs, reason, usage)));
        frames
    }

    fn close(&mut self) -> Vec<Frame> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(adapter: Option<&str>, path: Option<&str>) -> Option<String> {
        adapter_name(adapter.map(str::to_owned), path.map(str::to_owned)).expect("is clear")
    }

    #[test]
    fn older_clients_name_adapters_by_their_path() {
        for path in ["hindi", "adapters/hindi", "./adapters/hindi", "adapters/hindi/"] {
            assert_eq!(name(None, Some(path)).as_deref(), Some("hindi"), "{path}");
        }
        for base in ["", "none"] {
            assert_eq!(name(None, Some(base)), None);
            assert_eq!(name(Some(base), None), None);
        }
        assert_eq!(name(Some("hindi"), Some("adapters/hindi")).as_deref(), Some("hindi"));
        assert_eq!(name(None, None), None);
        assert!(adapter_name(Some("hindi".into()), Some("tamil".into())).is_err());
        assert!(adapter_name(Some("hindi".into()), Some("none".into())).is_err());
        // Not this function's to repair: the registry refuses the name.
        assert_eq!(name(None, Some("adapters/../../etc")).as_deref(), Some("../../etc"));
    }

    #[test]
    fn another_base_model_is_a_conflict_that_names_the_loaded_one() {
        assert!(check_base_model("a/b", None).is_ok());
        assert!(check_base_model("a/b", Some("a/b")).is_ok());
        let error = check_base_model("a/b", Some("c/d")).expect_err("is another");
        assert_eq!(error.status(), StatusCode::CONFLICT);
        assert!(error.body().error.message.contains("a/b"));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_str::<GenerateLite>(r#"{"prompt":"a","max_tokens":3}"#);
        assert!(error.expect_err("is unknown").to_string().contains("max_tokens"));
    }
}
