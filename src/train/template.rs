//! One record to one sequence of tokens with weights: which fields it takes, how they become a prompt and an
//! answer, what of it is learnt. The prompt's tokens are those that serving makes of the same prompt. Knows no
//! order, no epochs and no files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use crate::config::adapter::{FieldError, Template};
use crate::data::{Record, SourceConfig, usual_names};
use crate::engine::training::TrainSequence;
use crate::model::chat_template::{GenerationPrompt, Message};
use crate::model::tokenizer::{AddSpecial, Tokenizer};
use crate::text::language::Language;

/// What a record became.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Made {
    /// An example.
    Example {
        /// Tokens and weights.
        sequence: TrainSequence,
        /// Whether its end was cut off.
        cut: bool,
    },
    /// Nothing that is learnt was left after cutting.
    Skipped,
}

/// How examples are made.
pub(super) struct Shape {
    /// Longer ones are cut.
    pub(super) max_tokens: usize,
    /// Learn the answer only.
    pub(super) completion_only: bool,
    /// Tokens at which serving ends an answer; the first is what a text is ended with.
    pub(super) eos: Vec<u32>,
}

impl Shape {
    /// For a model with these end tokens.
    pub(super) fn new(
        max_tokens: usize,
        completion_only: bool,
        tokenizer: &Tokenizer,
        eos_token_ids: &[u32],
    ) -> Self {
        // Of several the tokenizer's own comes first; a model that names none has the tokenizer's.
        let own = tokenizer.eos_token_id();
        let own = own.filter(|id| eos_token_ids.is_empty() || eos_token_ids.contains(id));
        let others = eos_token_ids.iter().copied().filter(|id| Some(*id) != own);
        Self { max_tokens, completion_only, eos: own.into_iter().chain(others).collect() }
    }
}

/// Turns records into examples; immutable.
pub(super) struct Examples {
    tokenizer: Arc<Tokenizer>,
    fields: BTreeMap<String, String>,
    template: Template,
    /// What precedes the text to translate.
    request: String,
    shape: Shape,
}

/// The fields that a template takes.
fn fields_of(template: Template) -> &'static [&'static str] {
    match template {
        Template::Auto => &[],
        Template::PromptCompletion => &["prompt", "completion"],
        Template::Chat => &["messages"],
        Template::Text => &["text"],
        Template::Translation => &["source", "target"],
    }
}

/// The templates, in the order in which they are tried.
const TEMPLATES: [Template; 4] =
    [Template::Chat, Template::PromptCompletion, Template::Translation, Template::Text];

/// The template whose fields a record has: first among those that the source maps fields for, then among all.
///
/// # Errors
/// None fits; the fields that there are.
pub fn decide(source: &SourceConfig, record: &Record) -> Result<Template, String> {
    let fits = |template: &Template| {
        fields_of(*template).iter().all(|field| find(&source.fields, record, field).is_ok())
    };
    let mapped =
        |template: &Template| fields_of(*template).iter().any(|field| source.fields.contains_key(*field));
    let by_map = TEMPLATES.into_iter().filter(mapped).find(fits);
    by_map.or_else(|| TEMPLATES.into_iter().find(fits)).ok_or_else(|| {
        format!(
            "has none of the fields that a template needs (messages; prompt and completion; source and target; \
             text), it has {}; name them under fields in the source",
            names_of(record)
        )
    })
}

/// The value of a field, by the source's map or else by its usual names.
fn find<'r>(fields: &BTreeMap<String, String>, record: &'r Record, field: &str) -> Result<&'r Value, String> {
    if let Some(path) = fields.get(field) {
        return record.at(path).filter(|value| !value.is_null()).ok_or_else(|| {
            format!("has no field {path}, which the source names as its {field}; it has {}", names_of(record))
        });
    }
    let names = usual_names(field);
    let found = names.iter().find_map(|name| record.at(name).filter(|value| !value.is_null()));
    found.ok_or_else(|| {
        let others = match &names[1..] {
            [] => String::new(),
            others => format!(" (nor {})", others.join(", ")),
        };
        format!(
            "has no field {field}{others}; it has {}; name it under fields in the source",
            names_of(record)
        )
    })
}

fn names_of(record: &Record) -> String {
    const SHOWN: usize = 20;
    let names: Vec<String> =
        record.fields.keys().take(SHOWN).map(|name| name.chars().take(64).collect()).collect();
    match (names.is_empty(), record.fields.len() > SHOWN) {
        (true, _) => "none".into(),
        (false, true) => format!("{}, …", names.join(", ")),
        (false, false) => names.join(", "),
    }
}

/// A value as text; numbers and truth values as they are written.
fn text_of(value: &Value, field: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        _ => Err(format!("has a {field} that is no text")),
    }
}

impl Examples {
    /// For a source whose template is known.
    ///
    /// # Errors
    /// A template that the model or the source has no part for: no chat template, no target language.
    pub(super) fn new(
        source: &SourceConfig,
        template: Template,
        tokenizer: Arc<Tokenizer>,
        shape: Shape,
    ) -> Result<Self, FieldError> {
        if template == Template::Chat && tokenizer.chat_template().is_none() {
            return Err(FieldError {
                field: "template".into(),
                message:
                    "is chat, but the model has no chat template; use a model that has one, or records with \
                          prompt and completion"
                        .into(),
            });
        }
        let request = match template {
            Template::Translation => request(source)?,
            _ => String::new(),
        };
        Ok(Self { tokenizer, fields: source.fields.clone(), template, request, shape })
    }

    /// For pairs of texts that come from no source; see [`Examples::pair`].
    pub(super) fn of_pairs(tokenizer: Arc<Tokenizer>, shape: Shape) -> Self {
        let (fields, request) = (BTreeMap::new(), String::new());
        Self { tokenizer, fields, template: Template::PromptCompletion, request, shape }
    }

    pub(super) fn template(&self) -> Template {
        self.template
    }

    /// # Errors
    /// Why the record cannot be used, to be read after its number.
    pub(super) fn make(&self, record: &Record) -> Result<Made, String> {
        let (tokens, learnt) = match self.template {
            Template::PromptCompletion => {
                return self.pair(&self.prompt(record)?, &self.text(record, "completion")?);
            }
            Template::Translation => {
                let (source, target) = (self.text(record, "source")?, self.text(record, "target")?);
                let prompt = format!("{}{source}", self.request);
                self.answer(&prompt, &format!(" {}", target.trim_start()))?
            }
            Template::Chat => self.chat(find(&self.fields, record, "messages")?)?,
            Template::Text | Template::Auto => {
                let tokens = self.encode(&self.text(record, "text")?, AddSpecial::Yes)?;
                let tokens = self.ended(tokens);
                let learnt = 0..tokens.len();
                (tokens, vec![learnt])
            }
        };
        Ok(self.sequence(tokens, &learnt))
    }

    /// A prompt and what is to be answered, neither empty.
    ///
    /// # Errors
    /// As [`Examples::make`].
    pub(super) fn pair(&self, prompt: &str, completion: &str) -> Result<Made, String> {
        let (tokens, learnt) = self.answer(prompt, completion)?;
        Ok(self.sequence(tokens, &learnt))
    }

    /// Weights, and what does not fit cut off.
    fn sequence(&self, mut tokens: Vec<u32>, learnt: &[Range<usize>]) -> Made {
        let cut = tokens.len() > self.shape.max_tokens;
        tokens.truncate(self.shape.max_tokens);
        let has_answer_only = self.shape.completion_only && self.template != Template::Text;
        let is_learnt = |at: &usize| learnt.iter().any(|range| range.contains(at));
        // Nothing precedes the first token that it could be predicted from.
        let weights: Vec<f32> = (0..tokens.len())
            .map(|at| if at > 0 && (!has_answer_only || is_learnt(&at)) { 1.0 } else { 0.0 })
            .collect();
        match weights.contains(&1.0) {
            true => Made::Example { sequence: TrainSequence::new(tokens, weights), cut },
            false => Made::Skipped,
        }
    }

    fn encode(&self, text: &str, special: AddSpecial) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, special).map_err(|error| format!("cannot be used: {error}"))
    }

    /// With the token that ends an answer, unless it is there already.
    fn ended(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        if !tokens.last().is_some_and(|last| self.shape.eos.contains(last)) {
            tokens.extend(self.shape.eos.first());
        }
        tokens
    }

    /// A field's text, which must not be empty.
    fn text(&self, record: &Record, field: &str) -> Result<String, String> {
        let text = text_of(find(&self.fields, record, field)?, field)?;
        if text.trim().is_empty() { Err(format!("has an empty {field}")) } else { Ok(text) }
    }

    /// The prompt; where the record has an instruction and an input to it, both.
    fn prompt(&self, record: &Record) -> Result<String, String> {
        let prompt = self.text(record, "prompt")?;
        if self.fields.contains_key("prompt") || record.fields.contains_key("prompt") {
            return Ok(prompt);
        }
        match (record.at("instruction"), record.at("input")) {
            (Some(Value::String(_)), Some(Value::String(input))) if !input.trim().is_empty() => {
                Ok(format!("{prompt}\n{input}"))
            }
            _ => Ok(prompt),
        }
    }

    /// Prompt and answer. The prompt's tokens come out as they do without the answer.
    fn answer(&self, prompt: &str, answer: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
        let alone = self.encode(prompt, AddSpecial::Yes)?;
        let together = self.encode(&format!("{prompt}{answer}"), AddSpecial::Yes)?;
        let tokens = match together.starts_with(&alone) && together.len() > alone.len() {
            // As the tokenizer writes such a text on.
            true => together,
            // Letters on both sides of the boundary would share a token, which serving could not end a prompt in.
            false => [alone.clone(), self.encode(answer, AddSpecial::No)?].concat(),
        };
        let tokens = self.ended(tokens);
        let learnt = alone.len()..tokens.len();
        Ok((tokens, vec![learnt]))
    }

    /// A conversation as the model's chat template writes it, up to the assistant's last turn. What is learnt are
    /// the assistant's turns with the token that ends each.
    fn chat(&self, messages: &Value) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
        let messages = conversation(messages)?;
        let turns: Vec<usize> = (0..messages.len()).filter(|&at| messages[at].role == "assistant").collect();
        let last = *turns.last().ok_or("has messages without a turn of the assistant")?;
        let whole = self.render(&messages[..=last], GenerationPrompt::Omit)?;

        // Ends of prompts and of answers, in bytes of the whole.
        let mut bounds = Vec::with_capacity(turns.len() * 2);
        for &turn in &turns {
            let prompt = self.render(&messages[..turn], GenerationPrompt::Add)?;
            let answer = self.render(&messages[..=turn], GenerationPrompt::Omit)?;
            let number = turn + 1;
            if !answer.starts_with(&prompt) {
                return Err(format!(
                    "has a message {number} that the model's chat template does not begin as it asks for answers; \
                     use prompt and completion for such records"
                ));
            }
            if !whole.starts_with(&answer) {
                return Err(format!(
                    "has a message {number} that the model's chat template writes otherwise when more messages \
                     follow; make records that end with the answer to learn"
                ));
            }
            bounds.extend([prompt.len(), answer.len()]);
        }
        let (mut tokens, ends) = self.split(&whole, &bounds)?;
        let mut learnt: Vec<Range<usize>> = ends.chunks(2).map(|pair| pair[0]..pair[1]).collect();
        for range in &mut learnt {
            // Serving stops at that token, whatever the template writes after it.
            if let Some(at) = tokens[range.clone()].iter().rposition(|token| self.shape.eos.contains(token)) {
                range.end = range.start + at + 1;
            }
        }
        if let Some(range) = learnt.last_mut() {
            tokens.truncate(range.end);
            tokens = self.ended(tokens);
            range.end = tokens.len();
        }
        Ok((tokens, learnt))
    }

    fn render(&self, messages: &[Message], generation: GenerationPrompt) -> Result<String, String> {
        let template =
            self.tokenizer.chat_template().ok_or("needs a chat template, which the model has not")?;
        template.render(messages, generation).map_err(|error| format!("is refused: {error}"))
    }

    /// The tokens of a text and how many of them each of its beginnings has. Where the text's tokens do not
    /// begin with those of a beginning, the pieces between are tokenized one by one.
    fn split(&self, whole: &str, bounds: &[usize]) -> Result<(Vec<u32>, Vec<usize>), String> {
        let tokens = self.encode(whole, AddSpecial::No)?;
        let mut ends = Vec::with_capacity(bounds.len());
        for &bound in bounds {
            let beginning = self.encode(&whole[..bound], AddSpecial::No)?;
            if !tokens.starts_with(&beginning) {
                break;
            }
            ends.push(beginning.len());
        }
        if ends.len() == bounds.len() {
            return Ok((tokens, ends));
        }
        let (mut tokens, mut from) = (Vec::new(), 0);
        ends.clear();
        for &bound in bounds {
            tokens.extend(self.encode(&whole[from..bound], AddSpecial::No)?);
            ends.push(tokens.len());
            from = bound;
        }
        Ok((tokens, ends))
    }
}

/// The messages of a record. A content may be a list of texts, as OpenAI's files have it.
fn conversation(value: &Value) -> Result<Vec<Message>, String> {
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or("has messages that are no list")?;
    let mut messages = Vec::with_capacity(list.len());
    for (at, message) in list.iter().enumerate() {
        let number = at + 1;
        let role = message.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| format!("has a message {number} without a role"))?;
        let content = match message.get("content") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(parts)) => {
                let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
                texts.map(|texts| texts.concat())
            }
            _ => None,
        };
        let content = content.ok_or_else(|| format!("has a message {number} whose content is no text"))?;
        messages.push(Message { role: role.to_owned(), content });
    }
    Ok(messages)
}

/// The words before a text that is to be translated, as people ask for it.
fn request(source: &SourceConfig) -> Result<String, FieldError> {
    let language = |named: &Option<String>, field: &str| {
        let path = || source.fields.get(field).and_then(|path| path.rsplit('.').next());
        match named {
            // A language that is not known here is asked for by the name it is given.
            Some(name) => Some(Language::parse(name).map_or_else(|| name.trim().to_owned(), Language::title)),
            // `translation.hi` says it as well.
            None => path().and_then(Language::parse).map(Language::title),
        }
    };
    let target = language(&source.target_language, "target").ok_or_else(|| FieldError {
        field: "target_language".into(),
        message: "is missing; the source must name the language that target is in, as in target_language: hi"
            .into(),
    })?;
    Ok(match language(&source.source_language, "source") {
        Some(from) => format!("Translate from {from} to {target}: "),
        None => format!("Translate to {target}: "),
    })
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
