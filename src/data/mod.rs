//! Data from where it lies: streams of records to train on, and model files from a hub. Knows nothing of what the
//! records are for.

mod combined;
mod cursor;
mod decode;
#[doc(hidden)]
pub mod decoding;
mod describe;
mod filter;
mod http;
pub mod hub;
mod local;
mod mcp;
mod object;
mod qdrant;
mod reader;
mod remote;
mod retry;
pub(crate) mod s3;
mod source;
mod stream;
mod survey;
#[cfg(test)]
mod tests;
mod web;

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

pub use self::combined::{FallbackConfig, MixConfig, MixPart};
pub use self::cursor::{Counts, Cursor};
pub use self::filter::Filter;
pub use self::http::HttpConfig;
pub use self::local::LocalConfig;
pub use self::mcp::McpConfig;
pub use self::qdrant::QdrantConfig;
pub use self::s3::{S3Access, S3Config};
pub use self::source::{FIELD_NAMES, Format, Location, SourceConfig, Template, usual_names};
pub use self::stream::{BadRows, RecordStream};
pub use self::survey::{Part, Survey};

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
        value_at(&self.fields, path)
    }
}

fn value_at<'r>(fields: &'r Map<String, Value>, path: &str) -> Option<&'r Value> {
    if let Some(value) = fields.get(path) {
        return Some(value);
    }
    let mut steps = path.split('.');
    let first = fields.get(steps.next()?)?;
    steps.try_fold(first, |value, step| match value {
        Value::Object(fields) => fields.get(step),
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        _ => None,
    })
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
    /// Line, element of a JSON array, or row of a table; from 1.
    pub row: Row,
}

/// How rows are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// Lines of the decompressed file.
    Line(u64),
    /// Elements of an array, or of a page of rows.
    Element(u64),
    /// Rows of a Parquet file.
    Row(u64),
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
            Self::Row(row) => write!(f, "row {row}"),
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
