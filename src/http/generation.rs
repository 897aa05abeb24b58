//! What the generating endpoints do alike: prompt text to tokens, room in the context, a running request to a
//! whole answer, tokens as texts. It must not know how any one API words its answers.

pub(super) use crate::engine::{Answer, AnswerToken};
use crate::engine::{Generation, Usage};
use crate::metrics;
use crate::model::tokenizer::{AddSpecial, Special, Tokenizer};

use super::error::ApiError;
use super::state::AppState;

/// Longer texts are tokenized off the threads that serve connections: some 4 KiB take about a millisecond.
const INLINE_BYTES: usize = 4 << 10;

/// The names that an API gives to the fields that share the context.
#[derive(Debug, Clone, Copy)]
pub(super) struct ContextFields {
    /// `prompt` or `messages`.
    pub(super) prompt: &'static str,
    /// `max_new_tokens`, `max_tokens` or `max_completion_tokens`.
    pub(super) max_tokens: &'static str,
}

/// How many tokens an answer may have.
#[derive(Debug, Clone, Copy)]
pub(super) enum MaxTokens {
    /// As the request says; an error where that does not fit.
    Exactly(i64),
    /// This many, or what is left of the context where that is less.
    AtMost(usize),
}

/// Tokens of a text, which `field` brought.
pub(super) async fn encode(
    state: &AppState,
    field: &'static str,
    text: String,
    special: AddSpecial,
) -> Result<Vec<u32>, ApiError> {
    check_prompt_bytes(state, field, text.len())?;
    if text.len() <= INLINE_BYTES {
        return Ok(state.tokenizer.encode(&text, special)?);
    }
    off_thread(state, move |tokenizer| Ok(tokenizer.encode(&text, special)?)).await
}

/// Runs work on the tokenizer where it blocks no connection.
pub(super) async fn off_thread<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&Tokenizer) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let tokenizer = state.tokenizer.clone();
    tokio::task::spawn_blocking(move || work(&tokenizer)).await?
}

/// 413 for a prompt longer than the server takes.
pub(super) fn check_prompt_bytes(
    state: &AppState,
    field: &'static str,
    bytes: usize,
) -> Result<(), ApiError> {
    let limit = state.settings.max_prompt_bytes;
    if bytes > limit { Err(ApiError::too_large(field, bytes, limit)) } else { Ok(()) }
}

/// The upper bound on new tokens after a prompt of `prompt_tokens`.
pub(super) fn max_new_tokens(
    state: &AppState,
    fields: ContextFields,
    prompt_tokens: usize,
    asked: MaxTokens,
) -> Result<usize, ApiError> {
    room_for(state.engine.info().context_length, fields, prompt_tokens, asked)
}

fn room_for(
    context: usize,
    fields: ContextFields,
    prompt_tokens: usize,
    asked: MaxTokens,
) -> Result<usize, ApiError> {
    let too_long = |message| {
        let status = axum::http::StatusCode::BAD_REQUEST;
        ApiError::new(status, "context_length_exceeded", message).param(fields.prompt)
    };
    if let MaxTokens::Exactly(n) = asked {
        // Before the prompt is looked at: a value that never fits is that field's fault alone.
        let limit = i64::try_from(context).unwrap_or(i64::MAX);
        super::fields::in_range(fields.max_tokens, n, 1..=limit)?;
    }
    let room = context.saturating_sub(prompt_tokens);
    let ContextFields { prompt, max_tokens } = fields;
    if room == 0 {
        return Err(too_long(format!(
            "{prompt} has {prompt_tokens} tokens, which leaves no room for an answer in the {context} tokens \
             that fit; shorten it"
        )));
    }
    match asked {
        MaxTokens::AtMost(n) => Ok(n.min(room)),
        MaxTokens::Exactly(n) => usize::try_from(n).ok().filter(|&n| n <= room).ok_or_else(|| {
            too_long(format!(
                "{prompt} has {prompt_tokens} tokens and {max_tokens} is {n}, together more than the {context} \
                 tokens that fit; shorten the prompt or lower {max_tokens}"
            ))
        }),
    }
}

/// Waits for the end of an answer. Dropping the future cancels the request.
pub(super) async fn collect(generation: Generation) -> Result<Answer, ApiError> {
    let answer = generation.answer().await?;
    observe(&answer.usage);
    Ok(answer)
}

/// Puts the times of a finished answer into the metrics.
pub(super) fn observe(usage: &Usage) {
    metrics::answer_finished(usage.queue_ms / 1e3, usage.first_token_ms / 1e3, usage.total_ms / 1e3);
}

/// A log-probability that JSON can say: it has no word for the logarithm of 0.
pub(super) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// The text of one token as it stands inside a text. Decoded alone, a token of some tokenizers loses the space
/// it begins with; decoded twice in a row, the second one keeps it.
pub(super) fn token_text(tokenizer: &Tokenizer, id: u32) -> Result<String, ApiError> {
    let once = tokenizer.decode(&[id], Special::Keep)?;
    let twice = tokenizer.decode(&[id, id], Special::Keep)?;
    Ok(second_half(once, &twice))
}

fn second_half(once: String, twice: &str) -> String {
    match twice.strip_prefix(once.as_str()) {
        Some(second) if second.ends_with(once.as_str()) => second.to_owned(),
        _ => once,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: ContextFields = ContextFields { prompt: "messages", max_tokens: "max_tokens" };

    #[test]
    fn room_in_the_context() {
        let room = |prompt, asked| room_for(512, FIELDS, prompt, asked).map_err(|e| e.body().error);
        assert_eq!(room(12, MaxTokens::Exactly(500)).expect("just fits"), 500);
        assert_eq!(room(500, MaxTokens::AtMost(100)).expect("is cut"), 12);
        assert_eq!(room(10, MaxTokens::AtMost(100)).expect("fits"), 100);
        let error = room(13, MaxTokens::Exactly(500)).expect_err("is one too many");
        assert_eq!((error.code, error.param.as_deref()), ("context_length_exceeded", Some("messages")));
        assert!(error.message.contains("max_tokens is 500"), "{}", error.message);
        let error = room(512, MaxTokens::AtMost(100)).expect_err("has no room");
        assert_eq!((error.code, error.param.as_deref()), ("context_length_exceeded", Some("messages")));
        for n in [0, -1, 513, 1_000_000] {
            let error = room(1, MaxTokens::Exactly(n)).expect_err("is out of range");
            assert_eq!((error.code, error.param.as_deref()), ("invalid_value", Some("max_tokens")));
        }
    }

    #[test]
    fn a_token_keeps_its_space() {
        assert_eq!(second_half("hello".into(), "hello hello"), " hello");
        assert_eq!(second_half(" hello".into(), " hello hello"), " hello");
        assert_eq!(second_half("\u{fffd}".into(), "\u{fffd}\u{fffd}"), "\u{fffd}");
        assert_eq!(second_half("\u{fffd}".into(), "\u{fffd}"), "\u{fffd}", "two halves may join");
        assert_eq!(second_half(String::new(), ""), "");
    }
}
