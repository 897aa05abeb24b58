//! Rows of an evaluation: JSON lines with a prompt and its completion, or with one sentence in several languages.
//! Every error names file, line and field. Knows no tokens.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

use crate::cli::row;
use crate::text::Language;

/// Fields of a row of the phrasebook that are about its sentence and no sentence themselves.
const ABOUT: [&str; 2] = ["category", "frame"];

/// A prompt with the completion that is known to be right.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// As it is asked.
    pub(super) prompt: String,
    /// What should follow it directly, as in training.
    pub(super) completion: String,
    /// What the completion is in, where the row says so.
    pub(super) language: Option<Language>,
    /// Where it stands in the file, from 1.
    pub(super) line: usize,
}

impl Row {
    /// File and line, for messages.
    pub(super) fn place(&self, file: &Path) -> String {
        format!("{}, line {}", file.display(), self.line)
    }
}

/// The rows of a file in its order: of these languages alone where some are named, and at most `limit`.
///
/// # Errors
/// A file that cannot be read, a line that cannot be used, no row that is left.
pub(super) fn read(file: &Path, languages: &[Language], limit: Option<usize>) -> anyhow::Result<Vec<Row>> {
    let named = || format!("--data {}", file.display());
    let text = std::fs::read_to_string(file).with_context(named)?;
    let mut rows = Vec::new();
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        // Every line is looked at, also behind the limit: a file is good or it is not.
        rows.extend(
            of_line(text, line).map_err(|e| anyhow::anyhow!("line {line}: {e}")).with_context(named)?,
        );
    }
    let read = rows.len();
    rows.retain(|row| languages.is_empty() || row.language.is_some_and(|of| languages.contains(&of)));
    rows.truncate(limit.unwrap_or(usize::MAX));
    match (read, rows.is_empty()) {
        (0, _) => bail!("{} holds no row", named()),
        (_, true) => bail!("{}: none of its {read} rows is in the --languages", named()),
        _ => Ok(rows),
    }
}

/// The rows of one line.
fn of_line(text: &str, line: usize) -> Result<Vec<Row>, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("is no JSON: {e}"))?;
    let fields = value.as_object().ok_or("is no object")?;
    if fields.contains_key("prompt") || fields.contains_key("completion") {
        let language = match fields.get("language") {
            None | Some(Value::Null) => None,
            Some(_) => Some(row::language(fields, "language")?),
        };
        let (prompt, completion) = (row::text(fields, "prompt")?, row::text(fields, "completion")?);
        return Ok(vec![Row { prompt, completion, language, line }]);
    }
    sentence(fields, line)
}

/// One sentence in several languages: a row for each but English.
fn sentence(fields: &Map<String, Value>, line: usize) -> Result<Vec<Row>, String> {
    if !fields.contains_key("en") {
        return Err("has neither prompt and completion nor en, the English sentence".into());
    }
    let english = row::text(fields, "en")?;
    let mut rows = Vec::with_capacity(fields.len() - 1);
    for code in fields.keys().filter(|key| *key != "en" && !ABOUT.contains(&key.as_str())) {
        // The code itself and not a name: a field that is called otherwise is a mistake.
        let language = Language::all().find(|language| language.code() == code).ok_or_else(|| {
            let codes: Vec<&str> = Language::all().map(Language::code).collect();
            format!("{code} is no code of a language that is known here; use {}", codes.join(", "))
        })?;
        let prompt = format!("Translate to {}: {english}", language.title());
        // The space that training's translation pairs have there.
        let completion = format!(" {}", row::text(fields, code)?);
        rows.push(Row { prompt, completion, language: Some(language), line });
    }
    if rows.is_empty() { Err("has no language but English".into()) } else { Ok(rows) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, languages: &[Language], limit: Option<usize>) -> anyhow::Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(&file, text).unwrap();
        read(&file, languages, limit)
    }

    const BOTH: &str = r#"{"prompt": "say a", "completion": " a", "id": 3}

{"prompt": "p", "completion": "पानी", "language": "hi"}
{"category": "home", "frame": "f", "en": "Water.", "hi": "पानी।", "ne": "पानी", "bn": "জল।"}
"#;

    #[test]
    fn both_kinds_of_rows_are_read() {
        let read = rows(BOTH, &[], None).unwrap();
        let row = |prompt: &str, completion: &str, language, line| Row {
            prompt: prompt.into(),
            completion: completion.into(),
            language,
            line,
        };
        let expected = [
            row("say a", " a", None, 1),
            row("p", "पानी", Some(Language::Hindi), 3),
            row("Translate to Hindi: Water.", " पानी।", Some(Language::Hindi), 4),
            row("Translate to Nepali: Water.", " पानी", Some(Language::Nepali), 4),
            row("Translate to Bengali: Water.", " জল।", Some(Language::Bengali), 4),
        ];
        assert_eq!(read, expected);
        assert_eq!(rows(BOTH, &[Language::Hindi], None).unwrap(), expected[1..3]);
        assert_eq!(rows(BOTH, &[Language::Bengali, Language::Hindi], Some(2)).unwrap(), expected[1..3]);
        assert_eq!(rows(BOTH, &[], Some(1)).unwrap(), expected[..1]);
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let good = r#"{"prompt": "p", "completion": "c"}"#;
        for (line, parts) in [
            (r#"{"prompt": "p"}"#, &["completion is missing"][..]),
            (r#"{"completion": "c"}"#, &["prompt is missing"]),
            (r#"{"prompt": "", "completion": "c"}"#, &["prompt is empty"]),
            (r#"{"prompt": "p", "completion": 4}"#, &["completion is no text"]),
            (r#"{"prompt": "p", "completion": "c", "language": "xx"}"#, &["language", "xx"]),
            (r#"{"prompt": "p", "completion": "c", "language": 1}"#, &["language is no text"]),
            (r#"{"hi": "x"}"#, &["neither", "en"]),
            (r#"{"en": "x"}"#, &["no language but English"]),
            (r#"{"en": "x", "hi": ""}"#, &["hi is empty"]),
            (r#"{"en": " ", "hi": "y"}"#, &["en is empty"]),
            (r#"{"en": "x", "fr": "y"}"#, &["fr is no code", "hi, bn"]),
            ("[]", &["no object"]),
            ("{", &["no JSON"]),
        ] {
            let error = format!("{:#}", rows(&format!("{good}\n{line}\n"), &[], Some(1)).unwrap_err());
            assert!(error.contains("rows.jsonl: line 2: "), "{error}");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        let none = rows("\n", &[], None).unwrap_err();
        assert!(none.to_string().contains("no row"), "{none}");
        let others = rows(good, &[Language::Tamil], None).unwrap_err();
        assert!(others.to_string().contains("--languages"), "{others}");
    }
}
