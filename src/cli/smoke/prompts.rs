//! The prompts of the smoke test: read and checked. Every error names the entry and the field. Asks nobody.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use serde_json::{Map, Value};

use crate::cli::row;
use crate::text::Language;

/// The file of the repository, so that the binary needs no folder beside it.
const BUILT_IN: &str = include_str!("../../../test_prompts/prompts_10.json");

/// All that an entry may hold.
const FIELDS: [&str; 6] = ["id", "language", "language_code", "prompt", "reference", "category"];

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompt {
    /// Unlike any other's.
    pub(super) id: String,
    /// What the answer must be in.
    pub(super) language: Language,
    /// As it is sent.
    pub(super) prompt: String,
    /// A good answer.
    pub(super) reference: Option<String>,
    /// What it is about; may be empty.
    pub(super) category: String,
}

/// The prompts of a file, or the built-in ones.
///
/// # Errors
/// A file that cannot be read; the first entry that cannot be used, with the field and the remedy.
pub(super) fn load(file: Option<&Path>) -> anyhow::Result<Vec<Prompt>> {
    let Some(file) = file else { return parse(BUILT_IN).map_err(|e| anyhow!("the built-in prompts: {e}")) };
    let named = || format!("--prompts {}", file.display());
    let text = std::fs::read_to_string(file).with_context(named)?;
    parse(&text).map_err(anyhow::Error::msg).with_context(named)
}

fn parse(text: &str) -> Result<Vec<Prompt>, String> {
    let whole: Value = serde_json::from_str(text).map_err(|e| format!("is no JSON: {e}"))?;
    let list = whole.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or("must hold a list of at least one prompt: [{\"id\": 1, ...}]")?;
    let mut seen = HashSet::new();
    let mut prompts = Vec::with_capacity(list.len());
    for (number, entry) in (1..).zip(list) {
        let entry = entry.as_object().ok_or_else(|| format!("entry {number} is no object"))?;
        let prompt = one(entry).map_err(|reason| match id(entry) {
            Ok(id) => format!("entry {number} (id {id}): {reason}"),
            Err(_) => format!("entry {number}: {reason}"),
        })?;
        if !seen.insert(prompt.id.clone()) {
            return Err(format!("entry {number}: id {} is an earlier entry's as well", prompt.id));
        }
        prompts.push(prompt);
    }
    Ok(prompts)
}

fn one(entry: &Map<String, Value>) -> Result<Prompt, String> {
    let id = id(entry)?;
    let language = row::language(entry, "language_code")?;
    let named = row::language(entry, "language")?;
    if named != language {
        let (code, name) = (language.code(), named.title());
        return Err(format!("language is {name}, but language_code is {code}; make them the same"));
    }
    let optional =
        |field| if entry.contains_key(field) { row::text(entry, field).map(Some) } else { Ok(None) };
    let prompt = row::text(entry, "prompt")?;
    let (reference, category) = (optional("reference")?, optional("category")?.unwrap_or_default());
    match entry.keys().find(|field| !FIELDS.contains(&field.as_str())) {
        Some(field) => Err(format!("{field} is no field; there are {}", FIELDS.join(", "))),
        None => Ok(Prompt { id, language, prompt, reference, category }),
    }
}

/// A number or a text.
fn id(entry: &Map<String, Value>) -> Result<String, String> {
    match entry.get("id") {
        Some(Value::Number(number)) => Ok(number.to_string()),
        _ => row::text(entry, "id"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{identify, is_in, target_of_prompt};

    #[test]
    fn the_built_in_prompts_ask_in_ten_languages_for_what_their_references_give() {
        let prompts = load(None).unwrap();
        let codes: Vec<&str> = prompts.iter().map(|prompt| prompt.language.code()).collect();
        assert_eq!(codes, ["hi", "bn", "ta", "te", "gu", "mr", "ur", "pa", "kn", "ml"]);
        let mut sentences = HashSet::new();
        for prompt in &prompts {
            assert_eq!(target_of_prompt(&prompt.prompt), Some(prompt.language), "{}", prompt.prompt);
            let (request, sentence) = prompt.prompt.split_once(": ").unwrap();
            assert!(is_in(request, prompt.language), "{request}");
            assert!((4..=7).contains(&sentence.split(' ').count()) && sentence.is_ascii(), "{sentence}");
            assert!(sentences.insert(sentence), "{sentence} comes twice");
            let reference = prompt.reference.as_deref().unwrap();
            assert!(is_in(reference, prompt.language) && identify(reference).share == 1.0, "{reference}");
            assert!(!prompt.category.is_empty());
        }
    }

    #[test]
    fn errors_name_entry_and_field() {
        let good =
            r#"{"id": 1, "language": "Hindi", "language_code": "hi", "prompt": "p", "reference": "r"}"#;
        let parsed = parse(&format!("[{good}]")).unwrap();
        assert_eq!((parsed[0].id.as_str(), parsed[0].category.as_str()), ("1", ""));
        let second = |change: &dyn Fn(&mut Map<String, Value>)| {
            let mut entry: Map<String, Value> = serde_json::from_str(good).unwrap();
            entry["id"] = "b".into();
            change(&mut entry);
            parse(&format!("[{good}, {}]", Value::Object(entry))).unwrap_err()
        };
        for field in ["language", "language_code", "prompt"] {
            let error = second(&|entry| drop(entry.remove(field)));
            assert_eq!(error, format!("entry 2 (id b): {field} is missing"));
            let error = second(&|entry| entry[field] = 3.into());
            assert_eq!(error, format!("entry 2 (id b): {field} is no text"));
        }
        for (error, parts) in [
            (second(&|e| drop(e.remove("id"))), &["entry 2: id is missing"][..]),
            (second(&|e| e["id"] = 1.into()), &["entry 2", "id 1", "earlier"]),
            (second(&|e| e["id"] = Value::Null), &["entry 2: id is no text"]),
            (second(&|e| e["language"] = "Klingon".into()), &["entry 2", "language", "Klingon", "hi, bn"]),
            (second(&|e| e["language_code"] = "xx".into()), &["entry 2", "language_code", "xx"]),
            (
                second(&|e| e["language"] = "Tamil".into()),
                &["entry 2", "language is Tamil", "language_code is hi"],
            ),
            (second(&|e| e["reference"] = " ".into()), &["entry 2", "reference is empty"]),
            (second(&|e| drop(e.insert("refrence".into(), "r".into()))), &["entry 2", "refrence"]),
            (parse("[1]").unwrap_err(), &["entry 1 is no object"]),
            (parse("[]").unwrap_err(), &["at least one"]),
            (parse("{}").unwrap_err(), &["list"]),
            (parse("[").unwrap_err(), &["no JSON"]),
        ] {
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        let error = load(Some(Path::new("nowhere.json"))).unwrap_err();
        assert!(format!("{error:#}").contains("--prompts nowhere.json"), "{error:#}");
    }
}
