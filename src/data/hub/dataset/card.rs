//! What a data set's README says of its parts: the `configs` of its YAML head, as the Python package `datasets`
//! reads them. Bounded: a README comes from strangers. Knows nothing of files.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_yaml::Value;

/// Bytes that a README or `.huggingface.yaml` may have; the longest known have a tenth of it.
pub(in crate::data::hub) const MAX_BYTES: usize = 4 << 20;
/// What the YAML may hold once its aliases are followed, with a text of 64 bytes as one more.
const MAX_NODES: usize = 500_000;

/// A part of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data) struct Config {
    /// What `config` names.
    pub(in crate::data::hub) name: String,
    /// Which files are in which split; by their names where it is not said.
    pub(in crate::data::hub) data_files: Option<Vec<SplitFiles>>,
    /// The folder that patterns begin in.
    pub(in crate::data::hub) data_dir: Option<String>,
    /// Whether it is meant when none is named.
    pub(in crate::data::hub) default: bool,
}

/// The patterns of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data::hub) struct SplitFiles {
    pub(in crate::data::hub) split: String,
    pub(in crate::data::hub) patterns: Vec<String>,
}

/// The configs in a README's head; `None` where it has no head or the head no `configs`.
pub(in crate::data) fn of_readme(text: &[u8]) -> Result<Option<Vec<Config>>, String> {
    let text = String::from_utf8_lossy(text);
    match front_matter(&text) {
        Some(yaml) => of_yaml(yaml.as_bytes()),
        None => Ok(None),
    }
}

/// What stands between a first line `---` and the next such line.
fn front_matter(text: &str) -> Option<&str> {
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let rest = text.strip_prefix("---")?;
    let rest = rest.strip_prefix("\r\n").or_else(|| rest.strip_prefix(['\n', '\r']))?;
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == "---" {
            return Some(&rest[..at]);
        }
        at += line.len();
    }
    None
}

/// The configs of a `.huggingface.yaml` or of a README's head.
pub(in crate::data::hub) fn of_yaml(text: &[u8]) -> Result<Option<Vec<Config>>, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("has more than {MAX_BYTES} bytes"));
    }
    let left = Cell::new(MAX_NODES);
    // Counted first and built then: a few lines of aliases can stand for more than any memory holds.
    Count(&left).deserialize(serde_yaml::Deserializer::from_slice(text)).map_err(|e| e.to_string())?;
    let document: Value = serde_yaml::from_slice(text).map_err(|e| e.to_string())?;
    match document.get("configs") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Sequence(items)) if items.is_empty() => Ok(None),
        Some(Value::Sequence(items)) => items.iter().map(config).collect::<Result<_, _>>().map(Some),
        Some(_) => Err("configs must be a list".into()),
    }
}

fn config(item: &Value) -> Result<Config, String> {
    let name = item.get("config_name").and_then(scalar);
    let name = name.ok_or("configs: each entry needs a config_name")?;
    let at = |message: String| format!("configs: {name}: {message}");
    let data_files = match item.get("data_files") {
        None | Some(Value::Null) => None,
        Some(files) => Some(data_files(files).map_err(at)?),
    };
    let data_dir = match item.get("data_dir") {
        None | Some(Value::Null) => None,
        Some(dir) => Some(scalar(dir).ok_or_else(|| at("data_dir must be a text".into()))?),
    };
    let default = item.get("default").and_then(Value::as_bool).unwrap_or(false);
    Ok(Config { name, data_files, data_dir, default })
}

/// A text, a list of texts, or a list of `{split, path}`.
fn data_files(value: &Value) -> Result<Vec<SplitFiles>, String> {
    let wrong = || {
        "data_files must be a text, a list of texts, or a list of entries with split and path and nothing else"
            .to_owned()
    };
    if let Some(patterns) = texts(value) {
        return Ok(vec![SplitFiles { split: "train".into(), patterns }]);
    }
    let Value::Sequence(items) = value else { return Err(wrong()) };
    let mut splits: Vec<SplitFiles> = Vec::new();
    for item in items {
        let Value::Mapping(keys) = item else { return Err(wrong()) };
        let split = item.get("split").and_then(scalar).filter(|split| is_split(split));
        let patterns = item.get("path").and_then(texts);
        let (Some(split), Some(patterns), 2) = (split, patterns, keys.len()) else { return Err(wrong()) };
        if splits.iter().any(|known| known.split == split) {
            return Err(format!("data_files names the split {split} twice"));
        }
        splits.push(SplitFiles { split, patterns });
    }
    Ok(splits)
}

fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Sequence(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// A text, also where it reads as a number, as in `config_name: 2023`.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

/// Whether a text can name a split: words joined by dots.
pub(super) fn is_split(text: &str) -> bool {
    text.split('.').all(|word| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_'))
}

/// Goes through a document, keeps nothing, and fails when it holds more than is left.
#[derive(Clone, Copy)]
struct Count<'a>(&'a Cell<usize>);

impl Count<'_> {
    fn take<E: serde::de::Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(1 + bytes / 64);
        self.0.set(left.ok_or_else(|| E::custom("it holds too much; are its aliases nested?"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Count<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i128<E: serde::de::Error>(self, _: i128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u128<E: serde::de::Error>(self, _: u128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.take(text.len())
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<(), D::Error> {
        inner.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.take(0)?;
        while items.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.take(0)?;
        while entries.next_key_seed(self)?.is_some() {
            entries.next_value_seed(self)?;
        }
        Ok(())
    }

    fn visit_enum<A: serde::de::EnumAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom("it has tags; configs need none"))
    }
}
