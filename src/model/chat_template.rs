//! Chat templates as models on the hub carry them (Jinja), rendered by minijinja as transformers renders them.
//! Knows nothing of tokens: a conversation goes in, the text of a prompt comes out.

mod json;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde::Serialize;

/// Work that one rendering may do: about a million instructions, or 64 MB of text. A conversation that fills
/// the context of a large model takes less than a hundredth of it.
const FUEL: u64 = 1_000_000;

/// Bytes that `tojson` writes for one unit of work; fewer than are copied for it, as walking a value costs more.
const JSON_BYTES_PER_FUEL: u64 = 4;

/// The name under which the template is kept; without an extension, so that nothing is escaped.
const NAME: &str = "chat_template";

/// Why a conversation has no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template is no valid template, whatever the conversation.
    #[error("the chat template is malformed: {0}")]
    Malformed(String),
    /// The template refuses this conversation, in its own words (`raise_exception`).
    #[error("{0}")]
    Refused(String),
    /// The template goes on for too long.
    #[error("the chat template does too much work on these messages; send fewer or shorter ones")]
    TooMuchWork,
    /// Anything else that went wrong while rendering.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Whether the prompt ends where the assistant's answer is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// For generating the next answer.
    Add,
    /// For a conversation as it stands.
    Omit,
}

/// A compiled template and the special tokens that it may write.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens by their names: `bos_token`, `eos_token`, ….
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are names (`bos_token`, …) and spellings.
    ///
    /// # Errors
    /// [`ChatTemplateError::Malformed`] with the place and the reason: for what does not parse, and for a
    /// function, filter or test that does not exist, as far as a conversation of one message comes to it.
    pub fn new<'a>(
        source: &str,
        special_tokens: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ChatTemplateError> {
        let malformed = |error: Error| ChatTemplateError::Malformed(message_of(&error));
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(malformed)?;
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match value.kind() {
            // As Python writes them.
            ValueKind::None => out.write_str("None").map_err(Error::from),
            ValueKind::Bool => {
                out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from)
            }
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(malformed)?;

        let special_tokens =
            special_tokens.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        let template = Self { environment, special_tokens };
        let probe = Message { role: "user".into(), content: "Hello".into() };
        match template.try_render(&[probe], GenerationPrompt::Add) {
            Err(error) if names_the_unknown(&error) => Err(malformed(error)),
            // A template may refuse this conversation and serve others.
            _ => Ok(template),
        }
    }

    /// The prompt of a conversation. `tools` and `documents` are none.
    ///
    /// # Errors
    /// What the template refuses or fails on.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: GenerationPrompt,
    ) -> Result<String, ChatTemplateError> {
        self.try_render(messages, add_generation_prompt).map_err(|error| {
            if let Some(Refusal(message)) = refusal_in(&error) {
                ChatTemplateError::Refused(message.clone())
            } else if is_out_of_fuel(&error) {
                ChatTemplateError::TooMuchWork
            } else {
                ChatTemplateError::Failed(message_of(&error))
            }
        })
    }

    fn try_render(&self, messages: &[Message], generation: GenerationPrompt) -> Result<String, Error> {
        let given = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(generation == GenerationPrompt::Add)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let special =
            self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        self.environment.get_template(NAME)?.render(Value::from_pairs(given.into_iter().chain(special)))
    }
}

/// The words of a template that refuses a conversation; carried as the source of an error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// Now, in local time, as C's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Zoned::now();
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// As transformers overrides Jinja's filter: nothing is escaped for HTML, characters stay as they are.
fn tojson(state: &mut State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let remaining = state.fuel_levels().map_or(0, |(_, remaining)| remaining);
    let limit = remaining.saturating_mul(JSON_BYTES_PER_FUEL);
    let text = json::dumps(value, &options, usize::try_from(limit).unwrap_or(usize::MAX))?;
    options.assert_all_used()?;
    state.consume_fuel(text.len() as u64 / JSON_BYTES_PER_FUEL)?;
    Ok(Value::from(text))
}

/// The error and what caused it.
fn chain(error: &Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |&error| error.source())
}

fn refusal_in(error: &Error) -> Option<&Refusal> {
    chain(error).find_map(|cause| cause.downcast_ref())
}

fn is_out_of_fuel(error: &Error) -> bool {
    chain(error).any(|cause| cause.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel))
}

fn names_the_unknown(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnknownFilter
            | ErrorKind::UnknownFunction
            | ErrorKind::UnknownTest
            | ErrorKind::UnknownMethod
    )
}

/// The message with its line; without the name that only this file knows.
fn message_of(error: &Error) -> String {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

/// Replaces `{% generation %}` blocks, with which transformers marks the assistant's words for training, by
/// blocks that are always taken: minijinja knows no tags of others.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open + 2);
        out.push_str(before);
        rest = tag;
        let Some(close) = tag.find("%}") else { break };
        let inside = &tag[..close];
        let word = inside.trim_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, replacement, 1));
        rest = &tag[close..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
