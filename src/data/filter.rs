//! Which records of a source are wanted, by the text that is learnt: its language, its script, its length.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use unicode_segmentation::UnicodeSegmentation as _;

use super::{SourceConfig, Template, usual_names, value_at};
use crate::text::identify::{SHARE, is_in};
use crate::text::language::Language;
use crate::text::script::Script;

/// What a record's text must be like. All that is said must hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// The field that is looked at, or a path; without it, the text that is learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The language it must be in, as far as that can be told of it: a code or a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// The script that its letters must be in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// Share of its letters that must be, 0 to 1; 0.8 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_script_share: Option<f64>,
    /// Characters that it must have, as a reader counts them (grapheme clusters: क्षि is one).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_chars: Option<u64>,
    /// Characters that it may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_chars: Option<u64>,
}

fn script_of(name: &str) -> Result<Script, String> {
    let names = Script::ALL.map(|script| format!("{script:?}"));
    let found = names.iter().position(|known| known.eq_ignore_ascii_case(name.trim()));
    found.map(|at| Script::ALL[at]).ok_or_else(|| {
        format!("filter: script '{}' is unknown; use one of {}", name.escape_debug(), names.join(", "))
    })
}

fn language_of(name: &str) -> Result<Language, String> {
    Language::parse(name).ok_or_else(|| {
        let codes: Vec<&str> = Language::all().map(Language::code).collect();
        format!("filter: language '{}' is unknown; use one of {}", name.escape_debug(), codes.join(", "))
    })
}

impl Filter {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.field.as_deref() == Some("") {
            return Err("filter: field is empty; name a field of the records".into());
        }
        self.language.as_deref().map(language_of).transpose()?;
        self.script.as_deref().map(script_of).transpose()?;
        match self.min_script_share {
            Some(share) if !(0.0..=1.0).contains(&share) => {
                return Err(format!("filter: min_script_share is a share, from 0 to 1, not {share}"));
            }
            Some(_) if self.script.is_none() => {
                return Err("filter: min_script_share needs a script, as in script: Devanagari".into());
            }
            _ => {}
        }
        if let (Some(least), Some(most)) = (self.min_chars, self.max_chars)
            && least > most
        {
            return Err(format!("filter: min_chars ({least}) is more than max_chars ({most})"));
        }
        let says = self.language.is_some()
            || self.script.is_some()
            || self.min_chars.is_some()
            || self.max_chars.is_some();
        if says { Ok(()) } else { Err("filter: give language, script, min_chars or max_chars".into()) }
    }
}

/// What becomes of a record.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Keep,
    /// It is not what was asked for.
    Leave,
    /// It cannot be told, and why.
    Bad(String),
}

/// A filter that is ready to judge.
pub(super) struct Sieve {
    field: Option<String>,
    language: Option<Language>,
    script: Option<(Script, f32)>,
    chars: Option<(u64, u64)>,
    /// Of the source: what its fields are called, and how records become texts.
    names: Vec<(&'static str, Vec<String>)>,
}

impl Sieve {
    /// For a filter that was checked.
    pub(super) fn new(filter: &Filter, source: &SourceConfig) -> Self {
        let script = filter.script.as_deref().and_then(|name| script_of(name).ok());
        let share = filter.min_script_share.map_or(SHARE, |share| share as f32);
        // In the order in which templates are tried, what each learns.
        let learnt: &[&'static str] = match source.template {
            None | Some(Template::Auto) => &["messages", "completion", "target", "text"],
            Some(Template::Chat) => &["messages"],
            Some(Template::PromptCompletion) => &["completion"],
            Some(Template::Translation) => &["target"],
            Some(Template::Text) => &["text"],
        };
        let names = learnt.iter().map(|&field| match source.fields.get(field) {
            Some(path) => (field, vec![path.clone()]),
            None => (field, usual_names(field).iter().map(|&name| name.to_owned()).collect()),
        });
        let is_long = filter.min_chars.is_some() || filter.max_chars.is_some();
        Self {
            field: filter.field.clone(),
            language: filter.language.as_deref().and_then(Language::parse),
            script: script.map(|script| (script, share)),
            chars: is_long.then(|| (filter.min_chars.unwrap_or(0), filter.max_chars.unwrap_or(u64::MAX))),
            names: names.collect(),
        }
    }

    pub(super) fn judge(&self, record: &Map<String, Value>) -> Verdict {
        let text = match &self.field {
            Some(path) => match value_at(record, path) {
                Some(Value::String(text)) => Cow::from(text),
                Some(_) => return Verdict::Bad(format!("the field {path} to filter by is no text")),
                None => return Verdict::Bad(format!("there is no field {path} to filter by")),
            },
            None => match self.learnt(record) {
                Some(text) => text,
                // Whoever learns from it says what is missing.
                None => return Verdict::Keep,
            },
        };
        let fits = self.chars.is_none_or(|(least, most)| has_chars(&text, least, most))
            && self.script.is_none_or(|(script, share)| script.share_of_letters(&text) >= share)
            && self.language.is_none_or(|language| is_in(&text, language));
        if fits { Verdict::Keep } else { Verdict::Leave }
    }

    fn learnt<'r>(&self, record: &'r Map<String, Value>) -> Option<Cow<'r, str>> {
        self.names.iter().find_map(|(field, names)| {
            let value = names.iter().find_map(|name| value_at(record, name).filter(|v| !v.is_null()))?;
            match value {
                Value::String(text) => Some(Cow::from(text)),
                Value::Array(messages) if *field == "messages" => Some(Cow::from(answers(messages))),
                _ => None,
            }
        })
    }
}

/// What the assistant says in a conversation.
fn answers(messages: &[Value]) -> String {
    let of_assistant = messages.iter().filter(|message| message["role"] == "assistant");
    let texts: Vec<&str> = of_assistant.filter_map(|message| message["content"].as_str()).collect();
    texts.join("\n")
}

/// Whether a text has so many grapheme clusters. Most texts tell by their bytes alone.
fn has_chars(text: &str, least: u64, most: u64) -> bool {
    let bytes = text.len() as u64;
    if bytes < least {
        return false;
    }
    // No text has more characters than bytes.
    let enough = if bytes <= most { least } else { most.saturating_add(1) };
    if enough <= 1 && bytes <= most {
        return true;
    }
    let chars = text.graphemes(true).take(usize::try_from(enough).unwrap_or(usize::MAX)).count() as u64;
    (least..=most).contains(&chars)
}
