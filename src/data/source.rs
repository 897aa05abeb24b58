//! What a source of records is, as the connectors file describes it and as a job keeps it: keys that every source
//! has, and those of its kind. Says where data lies and how it is read; opens nothing.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::combined::{FallbackConfig, MixConfig};
use super::filter::Filter;
use super::http::HttpConfig;
use super::hub::HuggingFaceConfig;
use super::local::LocalConfig;
use super::mcp::McpConfig;
use super::qdrant::QdrantConfig;
use super::s3::S3Config;

/// A source of records. It holds names of environment variables, never a secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Map<String, Value>")]
pub struct SourceConfig {
    /// Where the data lies.
    pub location: Location,
    /// How it is written.
    pub format: Format,
    /// Which field of a record is the prompt, the completion and so on: one of [`FIELD_NAMES`] to a field's name
    /// or a path such as `translation.hi`.
    pub fields: BTreeMap<String, String>,
    /// How a record becomes a text, whatever the training settings say.
    pub template: Option<Template>,
    /// Language of `source`, for translation: a code or a name.
    pub source_language: Option<String>,
    /// Language of `target`.
    pub target_language: Option<String>,
    /// Records that are passed over at the start, of those that the filter keeps.
    pub skip: u64,
    /// Share of rows that may be unusable, 0 to 1.
    pub max_bad_rows: f64,
    /// Which records are wanted; without it, all.
    pub filter: Option<Filter>,
    /// Bytes of decoded records that may wait to be taken.
    pub buffer_bytes: u64,
}

/// What `fields` can map.
pub const FIELD_NAMES: [&str; 6] = ["prompt", "completion", "text", "messages", "source", "target"];

/// What a field is called where a source does not say it, the likeliest name first.
pub fn usual_names(field: &str) -> &'static [&'static str] {
    match field {
        "prompt" => &["prompt", "instruction", "question", "input"],
        "completion" => &["completion", "output", "response", "answer"],
        "text" => &["text"],
        "messages" => &["messages"],
        "source" => &["source"],
        "target" => &["target"],
        _ => &[],
    }
}

/// Every kind once: its variant, its keys, and how `type` names it.
macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident($config:ty) = $name:literal,)+) => {
        /// Where data lies.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Location {
            $($(#[$doc])* $variant($config),)+
        }

        /// What `type` can be.
        const KINDS: &[&str] = &[$($name),+];

        impl Location {
            /// The kind as `type` names it.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)+ }
            }

            fn read(kind: &str, keys: Map<String, Value>) -> Result<Self, String> {
                match kind {
                    $($name => {
                        let config: $config = read(keys)?;
                        config.check()?;
                        Ok(Self::$variant(config))
                    })+
                    _ => Err(format!("type: '{}' is unknown; use {}", kind.escape_debug(), KINDS.join(", "))),
                }
            }

            fn keys(&self) -> serde_json::Result<Value> {
                match self { $(Self::$variant(config) => serde_json::to_value(config),)+ }
            }
        }
    };
}

kinds! {
    /// Files of this machine.
    Local(LocalConfig) = "local",
    /// Addresses that are fetched one after another.
    Http(HttpConfig) = "http",
    /// A data set on a hub.
    HuggingFace(HuggingFaceConfig) = "huggingface",
    /// Objects of a bucket.
    S3(S3Config) = "s3",
    /// Points of a Qdrant collection.
    Qdrant(QdrantConfig) = "qdrant",
    /// Resources or a tool of a Model Context Protocol server.
    Mcp(McpConfig) = "mcp",
    /// Several sources by weight.
    Mix(MixConfig) = "mix",
    /// The first of several sources that works.
    Fallback(FallbackConfig) = "fallback",
}

/// How rows are written. All but Parquet may be compressed with gzip or zstd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By the name's extension, else by the first character.
    #[default]
    Auto,
    /// A JSON object a line.
    Jsonl,
    /// An array of JSON objects.
    Json,
    /// Comma-separated with a first row of names; columns without a name are left out.
    Csv,
    /// As csv, with tabs and without quotes.
    Tsv,
    /// A text a line, as the field `text`; empty lines are left out.
    Txt,
    /// A text a paragraph, as the field `text`; empty lines part them.
    Paragraphs,
    /// Columns in row groups; nested ones become objects and lists.
    Parquet,
}

/// How a record becomes a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// From the fields of the first record.
    Auto,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `messages`, through the model's chat template.
    Chat,
    /// `text`.
    Text,
    /// `source` and `target`, with the languages' names.
    Translation,
}

impl Template {
    /// As settings name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PromptCompletion => "prompt_completion",
            Self::Chat => "chat",
            Self::Text => "text",
            Self::Translation => "translation",
        }
    }
}

impl SourceConfig {
    /// Files of this machine with every other setting at its default.
    pub fn local(path: impl Into<String>) -> Self {
        Self::at(Location::Local(LocalConfig { path: path.into() }))
    }

    /// One address with every other setting at its default. The address is checked when it is read.
    pub fn http(url: impl Into<String>) -> Self {
        Self::at(Location::Http(HttpConfig { url: Some(url.into()), ..HttpConfig::default() }))
    }

    fn at(location: Location) -> Self {
        Self::of(location, Common::default())
    }

    fn of(location: Location, common: Common) -> Self {
        Self {
            location,
            format: common.format,
            fields: common.fields,
            template: common.template,
            source_language: common.source_language,
            target_language: common.target_language,
            skip: common.skip,
            max_bad_rows: common.max_bad_rows,
            filter: common.filter,
            buffer_bytes: common.buffer_bytes,
        }
    }

    /// The kind as `type` names it.
    pub fn kind(&self) -> &'static str {
        self.location.kind()
    }

    /// Fields of a record that are enough, as paths, the filter's included; none where it is not known which are. A
    /// template whose fields are mapped in part takes the others by their usual names.
    pub(super) fn needed(&self) -> Vec<String> {
        const TAKEN: [(Template, &[&str]); 4] = [
            (Template::Chat, &["messages"]),
            (Template::PromptCompletion, &["prompt", "completion"]),
            (Template::Translation, &["source", "target"]),
            (Template::Text, &["text"]),
        ];
        let named = |fields: &[&str]| fields.iter().all(|field| self.fields.contains_key(*field));
        let template = self.template.filter(|template| *template != Template::Auto);
        let may_be = |of: Template| template.is_none_or(|template| template == of);
        match TAKEN.iter().any(|(of, fields)| may_be(*of) && named(fields)) {
            true => {
                let filtered = self.filter.iter().filter_map(|filter| filter.field.as_ref());
                self.fields.values().chain(filtered).cloned().collect()
            }
            false => Vec::new(),
        }
    }
}

/// A source's keys as they are typed; none comes twice, since of two one would be lost without a word.
struct Keys(Map<String, Value>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Source;
        impl<'de> Visitor<'de> for Source {
            type Value = Map<String, Value>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a source with its type and keys")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut keys = Map::new();
                while let Some(name) = map.next_key::<String>()? {
                    if keys.contains_key(&name) {
                        return Err(serde::de::Error::custom(format!("{name} is said twice")));
                    }
                    keys.insert(name, map.next_value()?);
                }
                Ok(keys)
            }
        }
        deserializer.deserialize_map(Source).map(Self)
    }
}

/// The keys that a source of any kind may have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Common {
    format: Format,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    fields: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    template: Option<Template>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_language: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_language: Option<String>,
    skip: u64,
    max_bad_rows: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    filter: Option<Filter>,
    buffer_bytes: u64,
}

/// Their names.
const COMMON: [&str; 9] = [
    "format",
    "fields",
    "template",
    "source_language",
    "target_language",
    "skip",
    "max_bad_rows",
    "filter",
    "buffer_bytes",
];

impl Default for Common {
    fn default() -> Self {
        Self {
            format: Format::Auto,
            fields: BTreeMap::new(),
            template: None,
            source_language: None,
            target_language: None,
            skip: 0,
            max_bad_rows: 0.01,
            filter: None,
            buffer_bytes: 64 << 20,
        }
    }
}

/// What `buffer_bytes` may be: a row or two of the usual kind, and what a machine can spare.
const BUFFER_BYTES: std::ops::RangeInclusive<u64> = 1 << 16..=1 << 34;

impl Common {
    fn check(&self) -> Result<(), String> {
        for (name, path) in &self.fields {
            if !FIELD_NAMES.contains(&name.as_str()) {
                return Err(format!("fields: {name} is unknown; use {}", FIELD_NAMES.join(", ")));
            }
            if path.is_empty() {
                return Err(format!("fields: {name} is empty; name a field of the records"));
            }
        }
        for (name, language) in
            [("source_language", &self.source_language), ("target_language", &self.target_language)]
        {
            if let Some(text) = language
                && (text.trim().is_empty() || text.len() > 64)
            {
                return Err(format!("{name} must be the code or the name of a language, as in hi or Hindi"));
            }
        }
        if !(0.0..=1.0).contains(&self.max_bad_rows) {
            return Err(format!(
                "max_bad_rows is a share of all rows, from 0 to 1, not {}",
                self.max_bad_rows
            ));
        }
        if let Some(filter) = &self.filter {
            filter.check()?;
        }
        if !BUFFER_BYTES.contains(&self.buffer_bytes) {
            let (least, most) = (BUFFER_BYTES.start(), BUFFER_BYTES.end());
            return Err(format!("buffer_bytes must be from {least} to {most}, not {}", self.buffer_bytes));
        }
        Ok(())
    }
}

impl Common {
    /// What a source that is made of others may say: how texts are made of all their records. The rest belongs to
    /// each of them.
    fn check_combined(&self) -> Result<(), String> {
        let allowed = Self {
            template: self.template,
            source_language: self.source_language.clone(),
            target_language: self.target_language.clone(),
            ..Self::default()
        };
        match *self == allowed {
            true => Ok(()),
            false => Err(
                "format, fields, skip, max_bad_rows, filter and buffer_bytes belong to the sources that it names"
                    .into(),
            ),
        }
    }
}

/// Keys as a struct; the error names the key.
fn read<T: DeserializeOwned>(keys: Map<String, Value>) -> Result<T, String> {
    serde_path_to_error::deserialize(Value::Object(keys)).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        if message.starts_with("unknown field") {
            format!("{message}; any source may have {}", COMMON.join(", "))
        } else if message.starts_with("missing field") || path == "." {
            message
        } else {
            format!("{path}: {message}")
        }
    })
}

impl TryFrom<Keys> for SourceConfig {
    type Error = String;

    fn try_from(Keys(mut keys): Keys) -> Result<Self, String> {
        let kind = match keys.shift_remove("type") {
            Some(Value::String(kind)) => kind,
            Some(_) => return Err(format!("type must be one of {}", KINDS.join(", "))),
            None => return Err(format!("type is missing; use {}", KINDS.join(", "))),
        };
        let (common, own): (Map<_, _>, Map<_, _>) =
            keys.into_iter().partition(|(name, _)| COMMON.contains(&name.as_str()));
        let location = Location::read(&kind, own)?;
        let common: Common = read(common)?;
        common.check()?;
        if matches!(location, Location::Mix(_) | Location::Fallback(_)) {
            common.check_combined()?;
        }
        Ok(Self::of(location, common))
    }
}

impl From<SourceConfig> for Map<String, Value> {
    fn from(config: SourceConfig) -> Self {
        let mut keys = Map::from_iter([("type".to_owned(), Value::from(config.kind()))]);
        let common = Common {
            format: config.format,
            fields: config.fields,
            template: config.template,
            source_language: config.source_language,
            target_language: config.target_language,
            skip: config.skip,
            max_bad_rows: config.max_bad_rows,
            filter: config.filter,
            buffer_bytes: config.buffer_bytes,
        };
        for part in [config.location.keys(), serde_json::to_value(common)] {
            // Names and values that JSON has; no map has keys of another kind.
            let Ok(Value::Object(part)) = part else { unreachable!("a source's keys are JSON") };
            keys.extend(part);
        }
        keys
    }
}
