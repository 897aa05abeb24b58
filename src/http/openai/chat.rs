//! `POST /v1/chat/completions`: a conversation goes on, in OpenAI's wire format and by the model's own chat
//! template.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::Event as Frame;
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::extract::ApiJson;
use super::super::fields::{MAX_TOP_LOGPROBS, OneOrMany, SamplingFields, in_range, stops};
use super::super::generation::{
    ContextFields, MaxTokens, check_prompt_bytes, collect, finite, off_thread, token_text,
};
use super::super::openapi::GenerationErrors;
use super::super::sse::{self, Frames};
use super::super::state::AppState;
use super::chat_wire::{
    AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChatLogprob, ChatLogprobs, ChatMessage,
    ChatRequest, ChatTopLogprob, ChunkChoice, Delta,
};
use super::{
    Head, Plan, Usage, adapter_of, choices, empty, include_usage, neutral, never, stop_tokens, submit, zero,
};
use crate::engine::{FinishReason, PositionLogprobs, Usage as EngineUsage};
use crate::model::chat_template::{GenerationPrompt, Message};
use crate::model::tokenizer::AddSpecial;

/// Go on with a conversation
///
/// OpenAI's chat completions; an adapter is chosen as `model`.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "openai",
    operation_id = "create_chat_completion",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers; with `stream` their parts as server-sent events", content(
            (ChatCompletion = "application/json"),
            (ChatChunk = "text/event-stream"),
        )),
        GenerationErrors,
    )
)]
pub(in crate::http) async fn create(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<ChatRequest>,
) -> Result<Response, ApiError> {
    refuse_unsupported(&request)?;
    let n = choices(request.n)?;
    let stream = request.stream.unwrap_or(false);
    let with_usage = include_usage(stream, request.stream_options)?;
    let top_logprobs = top_logprobs(request.logprobs, request.top_logprobs)?;
    let (fields, max_tokens) = max_tokens(request.max_tokens, request.max_completion_tokens)?;
    let sampling = SamplingFields {
        temperature: request.temperature.unwrap_or(1.0),
        top_p: request.top_p.unwrap_or(1.0),
        top_k: request.top_k.unwrap_or(0),
        min_p: request.min_p.unwrap_or(0.0),
        repetition_penalty: request.repetition_penalty.unwrap_or(1.0),
        seed: request.seed,
    };
    let plan = Plan {
        sampling: sampling.resolve()?,
        stop: stops(request.stop)?,
        stop_token_ids: stop_tokens(&state, request.stop_token_ids)?,
        ignore_eos: request.ignore_eos.unwrap_or(false),
        top_logprobs,
        adapter: adapter_of(&state, &request.model).await?,
        n,
        max_tokens,
        fields,
    };
    let prompt = prompt_of(&state, messages(request.messages)?).await?;
    let generations = submit(&state, vec![prompt], &plan)?;
    let head = Head::new("chatcmpl", request.model);
    if stream {
        return Ok(sse::respond(
            generations,
            ChunkFrames { state, head, n, usage: Usage::default(), with_usage },
        ));
    }
    let answers = try_join_all(generations.into_iter().map(collect)).await?;
    let mut usage = Usage::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        usage.add(index, n, &answer.usage);
        let positions = answer.tokens.iter().filter_map(|t| Some((t.id, t.logprobs.as_ref()?)));
        let logprobs = top_logprobs.map(|_| chat_logprobs(&state, positions)).transpose()?;
        let message = AnswerMessage { role: "assistant", content: answer.text, refusal: () };
        choices.push(ChatChoice { index, message, logprobs, finish_reason: answer.reason.as_str() });
    }
    let Head { id, created, model } = head;
    Ok(Json(ChatCompletion { id, object: "chat.completion", created, model, choices, usage }).into_response())
}

fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    let without_tools: fn(&Value) -> bool = |v| v == "none" || v == "auto";
    neutral("presence_penalty", request.presence_penalty.as_ref(), zero)?;
    neutral("frequency_penalty", request.frequency_penalty.as_ref(), zero)?;
    neutral("logit_bias", request.logit_bias.as_ref(), empty)?;
    neutral("response_format", request.response_format.as_ref(), |v| *v == json!({"type": "text"}))?;
    neutral("tools", request.tools.as_ref(), empty)?;
    neutral("tool_choice", request.tool_choice.as_ref(), without_tools)?;
    neutral("functions", request.functions.as_ref(), empty)?;
    neutral("function_call", request.function_call.as_ref(), without_tools)?;
    neutral("modalities", request.modalities.as_ref(), |v| *v == json!(["text"]))?;
    neutral("audio", request.audio.as_ref(), never)?;
    neutral("reasoning_effort", request.reasoning_effort.as_ref(), never)?;
    neutral("verbosity", request.verbosity.as_ref(), never)?;
    neutral("web_search_options", request.web_search_options.as_ref(), never)
}

fn top_logprobs(logprobs: Option<bool>, top: Option<i64>) -> Result<Option<usize>, ApiError> {
    let top = top.map(|k| in_range("top_logprobs", k, 0..=MAX_TOP_LOGPROBS)).transpose()?;
    match (logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "needs logprobs to be true")),
    }
}

/// The bound, under the name that the request gave it.
fn max_tokens(older: Option<i64>, newer: Option<i64>) -> Result<(ContextFields, MaxTokens), ApiError> {
    let fields = |max_tokens| ContextFields { prompt: "messages", max_tokens };
    match (older, newer) {
        (Some(older), Some(newer)) if older != newer => Err(ApiError::invalid(
            "max_tokens",
            "is the older name of max_completion_tokens and says something else; leave it out",
        )),
        (_, Some(n)) => Ok((fields("max_completion_tokens"), MaxTokens::Exactly(n))),
        (Some(n), None) => Ok((fields("max_tokens"), MaxTokens::Exactly(n))),
        (None, None) => Ok((fields("max_completion_tokens"), MaxTokens::AtMost(usize::MAX))),
    }
}

/// The conversation as the template takes it.
fn messages(messages: Vec<ChatMessage>) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "must not be empty"));
    }
    messages.into_iter().enumerate().map(|(i, message)| message_of(i, message)).collect()
}

fn message_of(index: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    neutral(&at("name"), message.name.as_ref(), never)?;
    neutral(&at("tool_calls"), message.tool_calls.as_ref(), empty)?;
    neutral(&at("tool_call_id"), message.tool_call_id.as_ref(), never)?;
    neutral(&at("function_call"), message.function_call.as_ref(), never)?;
    neutral(&at("refusal"), message.refusal.as_ref(), never)?;
    neutral(&at("annotations"), message.annotations.as_ref(), empty)?;
    neutral(&at("audio"), message.audio.as_ref(), never)?;
    let role = match message.role.as_str() {
        // OpenAI's newer name; the templates of open models know the older one.
        "developer" => "system",
        role @ ("system" | "user" | "assistant") => role,
        role => {
            let reason = format!("is {role:?}; this server takes system, developer, user and assistant");
            return Err(ApiError::invalid(&at("role"), reason));
        }
    };
    let content = match message.content {
        None => return Err(ApiError::invalid(&at("content"), "must be a text or a list of text parts")),
        Some(OneOrMany::One(text)) => text,
        Some(OneOrMany::Many(parts)) => {
            if let Some(i) = parts.iter().position(|part| part.r#type != "text") {
                let field = at(&format!("content[{i}].type"));
                return Err(ApiError::unsupported(&field, "must be text: this server reads nothing else"));
            }
            parts.into_iter().map(|part| part.text).collect()
        }
    };
    Ok(Message { role: role.to_owned(), content })
}

async fn prompt_of(state: &AppState, messages: Vec<Message>) -> Result<Vec<u32>, ApiError> {
    let bytes = messages.iter().map(|m| m.content.len()).sum();
    check_prompt_bytes(state, "messages", bytes)?;
    if state.tokenizer.chat_template().is_none() {
        let message = format!("{} has no chat template; use /v1/completions", state.settings.model_id);
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "no_chat_template", message).param("model"));
    }
    // A template is a program that came with the model: it may take its time.
    off_thread(state, move |tokenizer| {
        let template = tokenizer.chat_template().expect("a template that is there does not go away: a bug");
        let text = template.render(&messages, GenerationPrompt::Add)?;
        Ok(tokenizer.encode(&text, AddSpecial::No)?)
    })
    .await
}

fn chat_logprobs<'a>(
    state: &AppState,
    positions: impl Iterator<Item = (u32, &'a PositionLogprobs)>,
) -> Result<ChatLogprobs, ApiError> {
    let text = |id| token_text(&state.tokenizer, id);
    let one = |(id, logprobs): (u32, &PositionLogprobs)| {
        let top = logprobs.top.iter().map(|t| {
            let token = text(t.token)?;
            Ok(ChatTopLogprob { bytes: bytes_of(&token), token, logprob: finite(t.logprob) })
        });
        let token = text(id)?;
        Ok(ChatLogprob {
            bytes: bytes_of(&token),
            token,
            logprob: finite(logprobs.chosen),
            top_logprobs: top.collect::<Result<_, ApiError>>()?,
        })
    };
    Ok(ChatLogprobs { content: positions.map(one).collect::<Result<_, ApiError>>()?, refusal: () })
}

fn bytes_of(token: &str) -> Option<Vec<u8>> {
    (!token.contains('\u{fffd}')).then(|| token.as_bytes().to_vec())
}

struct ChunkFrames {
    state: AppState,
    head: Head,
    n: usize,
    usage: Usage,
    with_usage: bool,
}

impl ChunkFrames {
    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> Frame {
        let Head { id, created, model } = self.head.clone();
        sse::data(&ChatChunk { id, object: "chat.completion.chunk", created, model, choices, usage })
    }

    fn delta(&self, index: usize, delta: Delta, logprobs: Option<ChatLogprobs>) -> Frame {
        self.chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason: None }], None)
    }
}

impl Frames for ChunkFrames {
    fn open(&mut self) -> Vec<Frame> {
        let first = || Delta { role: Some("assistant"), content: Some(String::new()) };
        (0..self.n).map(|index| self.delta(index, first(), None)).collect()
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
        let logprobs = match &logprobs {
            Some(logprobs) => Some(chat_logprobs(&self.state, std::iter::once((token, logprobs)))?),
            None => None,
        };
        Ok(vec![self.delta(choice, Delta { role: None, content: Some(text) }, logprobs)])
    }

    fn finished(
        &mut self,
        choice: usize,
        text: String,
        reason: FinishReason,
        usage: EngineUsage,
    ) -> Vec<Frame> {
        self.usage.add(choice, self.n, &usage);
        let delta = Delta { role: None, content: (!text.is_empty()).then_some(text) };
        let finish_reason = Some(reason.as_str());
        vec![self.chunk(vec![ChunkChoice { index: choice, delta, logprobs: None, finish_reason }], None)]
    }

    fn close(&mut self) -> Vec<Frame> {
        if !self.with_usage {
            return Vec::new();
        }
        vec![self.chunk(Vec::new(), Some(self.usage))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<Vec<Message>, ApiError> {
        messages(serde_json::from_value(json).expect("has the right types"))
    }

    #[test]
    fn content_is_a_text_or_text_parts() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let read = read(json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "c", "refusal": null, "annotations": [], "tool_calls": null},
        ]))
        .expect("is a conversation");
        let seen: Vec<_> = read.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(seen, [("system", "be brief"), ("user", "ab"), ("assistant", "c")]);
    }

    #[test]
    fn what_a_message_cannot_hold_is_refused_by_name() {
        for (message, param) in [
            (json!({"role": "tool", "content": "a"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": null}), "messages[0].content"),
            (json!({"role": "user", "content": "a", "name": "b"}), "messages[0].name"),
            (json!({"role": "user", "content": "a", "tool_calls": [1]}), "messages[0].tool_calls"),
            (
                json!({"role": "user", "content": [{"type": "image", "text": "a"}]}),
                "messages[0].content[0].type",
            ),
        ] {
            let Err(error) = read(json!([message.clone()])) else { panic!("{message} must be refused") };
            assert_eq!(error.body().error.param.as_deref(), Some(param));
        }
        assert!(read(json!([])).is_err());
    }

    #[test]
    fn max_tokens_has_two_names() {
        let asked = |older, newer| max_tokens(older, newer).map(|(fields, _)| fields.max_tokens);
        assert_eq!(asked(Some(3), None).expect("is fine"), "max_tokens");
        assert_eq!(asked(None, Some(3)).expect("is fine"), "max_completion_tokens");
        assert_eq!(asked(Some(3), Some(3)).expect("is fine"), "max_completion_tokens");
        assert!(asked(Some(3), Some(4)).is_err());
    }

    #[test]
    fn top_logprobs_need_logprobs() {
        assert_eq!(top_logprobs(None, None).expect("is fine"), None);
        assert_eq!(top_logprobs(Some(true), None).expect("is fine"), Some(0));
        assert_eq!(top_logprobs(Some(true), Some(5)).expect("is fine"), Some(5));
        assert!(top_logprobs(None, Some(5)).is_err());
        assert!(top_logprobs(Some(true), Some(21)).is_err());
    }
}
