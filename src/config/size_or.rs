//! Sizes that may be a word instead: `auto` for a cache, `none` for a quota. Knows no setting and no range.

use std::fmt;
use std::str::FromStr;

use super::size::{ByteSize, SizeError};

/// A byte size, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheSize {
    /// The engine plans it from the model and the free memory.
    Auto,
    /// This much.
    Bytes(ByteSize),
}

/// A byte size, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaSize {
    /// No bound.
    None,
    /// This much.
    Bytes(ByteSize),
}

macro_rules! size_or {
    ($type:ident, $variant:ident, $word:literal) => {
        impl FromStr for $type {
            type Err = SizeError;
            fn from_str(text: &str) -> Result<Self, SizeError> {
                if text.trim() == $word { Ok(Self::$variant) } else { text.parse().map(Self::Bytes) }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    Self::$variant => f.write_str($word),
                    Self::Bytes(size) => size.fmt(f),
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                match Form::deserialize(deserializer)? {
                    Form::Number(bytes) => Ok(Self::Bytes(ByteSize(bytes))),
                    Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
                }
            }
        }
    };
}

/// How a file may say it.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Form {
    Number(u64),
    Text(String),
}

size_or!(CacheSize, Auto, "auto");
size_or!(QuotaSize, None, "none");
