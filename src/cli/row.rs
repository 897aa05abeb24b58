//! Fields of the rows that people write for `smoke` and `eval`. Every error names the field. Knows no file.

use serde_json::{Map, Value};

use crate::text::Language;

/// A field's text, which must have more than spaces.
pub(super) fn text(row: &Map<String, Value>, field: &str) -> Result<String, String> {
    match row.get(field) {
        None => Err(format!("{field} is missing")),
        Some(Value::String(text)) if text.trim().is_empty() => Err(format!("{field} is empty")),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("{field} is no text")),
    }
}

/// The language that a field names or has the code of.
pub(super) fn language(row: &Map<String, Value>, field: &str) -> Result<Language, String> {
    text(row, field)?.parse().map_err(|error| format!("{field} is not known: {error}"))
}
