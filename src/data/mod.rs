//! Data from where it lies: streams of records to train on, and model files from a hub. Knows nothing of what the
//! records are for.

mod decode;
pub(crate) mod http;
pub mod hub;
mod local;
pub(crate) mod s3;
mod source;
mod stream;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

pub use self::source::{FIELD_NAMES, Format, Location, SourceConfig, Template};
pub(crate) use self::source::{check_header, check_url};
pub use self::stream::{BadRows, Cursor, RecordStream};

/// One record: a row, an object, a line of text.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Names and values, in the order they came.
    pub fields: Map<String, Value>,
    /// Where it stood.
    pub place: Place,
}

impl Record {
    /// About how many bytes the record takes.
    pub fn bytes(&self) -> usize {
        self.fields.iter().map(|(name, value)| name.len() + bytes_of(value)).sum()
    }

    /// The value at a path: the field of exactly this name, else step by step into nested objects, as in
    /// `translation.hi`, and lists, as in `answers.0`.
    pub fn at(&self, path: &str) -> Option<&Value> {
        if let Some(value) = self.fields.get(path) {
            return Some(value);
        }
        let mut steps = path.split('.');
        let first = self.fields.get(steps.next()?)?;
        steps.try_fold(first, |value, step| match value {
            Value::Object(fields) => fields.get(step),
            Value::Array(items) => items.get(step.parse::<usize>().ok()?),
            _ => None,
        })
    }
}

fn bytes_of(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| 32 + bytes_of(item)).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| 64 + name.len() + bytes_of(value)).sum(),
        _ => 8,
    }
}

/// Where a record stands in its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// File or address.
    pub object: Arc<str>,
    /// Line, or element of a JSON array; from 1.
    pub row: Row,
}

/// How rows are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// Lines of the decompressed file.
    Line(u64),
    /// Elements of an array.
    Element(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.object, self.row)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Element(element) => write!(f, "element {element}"),
        }
    }
}

/// Why a source gives no more records.
#[derive(Debug, Clone, thiserror::Error)]
#[error("source {source_name}: {message}")]
pub struct SourceError {
    /// The source's name.
    pub source_name: String,
    /// Which object and where in it, what is wrong, what to do.
    pub message: String,
}
