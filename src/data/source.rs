//! What a source of records is, as the connectors file describes it and as a job keeps it. Says where data lies
//! and how it is read; opens nothing.

use std::collections::BTreeMap;

use reqwest::Url;
use reqwest::header::HeaderName;
use serde::{Deserialize, Serialize};

/// A source of records. It holds names of environment variables, never a secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Typed", into = "Typed")]
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
    /// Records that are passed over at the start.
    pub skip: u64,
    /// Share of rows that may be unusable, 0 to 1.
    pub max_bad_rows: f64,
}

/// What `fields` can map.
pub const FIELD_NAMES: [&str; 6] = ["prompt", "completion", "text", "messages", "source", "target"];

/// Where data lies.
#[derive(Debug, Clone, PartialEq)]
pub enum Location {
    /// Files of this machine: a file, a folder, or a pattern such as `data/*.jsonl.gz`.
    Local {
        /// Relative to where the program is started.
        path: String,
    },
    /// Addresses that are fetched one after another.
    Http {
        /// At least one.
        urls: Vec<String>,
        /// Names of headers to names of the environment variables that hold their values.
        headers_env: BTreeMap<String, String>,
    },
}

/// How rows are written. Any of them may be compressed with gzip.
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

impl SourceConfig {
    /// Files of this machine with every other setting at its default.
    pub fn local(path: impl Into<String>) -> Self {
        Self::at(Location::Local { path: path.into() })
    }

    /// One address with every other setting at its default. The address is checked when it is read.
    pub fn http(url: impl Into<String>) -> Self {
        Self::at(Location::Http { urls: vec![url.into()], headers_env: BTreeMap::new() })
    }

    fn at(location: Location) -> Self {
        Self {
            location,
            format: Format::Auto,
            fields: BTreeMap::new(),
            template: None,
            source_language: None,
            target_language: None,
            skip: 0,
            max_bad_rows: MAX_BAD_ROWS,
        }
    }

    /// The kind as `type` names it.
    pub fn kind(&self) -> &'static str {
        match self.location {
            Location::Local { .. } => "local",
            Location::Http { .. } => "http",
        }
    }
}

const MAX_BAD_ROWS: f64 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Local,
    Http,
}

/// A source as it is typed: every kind's fields side by side.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    urls: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    headers_env: Option<BTreeMap<String, String>>,
    #[serde(default)]
    format: Format,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    fields: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    template: Option<Template>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_language: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target_language: Option<String>,
    #[serde(default)]
    skip: u64,
    #[serde(default = "default_max_bad_rows")]
    max_bad_rows: f64,
}

fn default_max_bad_rows() -> f64 {
    MAX_BAD_ROWS
}

impl TryFrom<Typed> for SourceConfig {
    type Error = String;

    fn try_from(typed: Typed) -> Result<Self, String> {
        let location = location(&typed)?;
        for (name, path) in &typed.fields {
            if !FIELD_NAMES.contains(&name.as_str()) {
                return Err(format!("fields: {name} is unknown; use {}", FIELD_NAMES.join(", ")));
            }
            if path.is_empty() {
                return Err(format!("fields: {name} is empty; name a field of the records"));
            }
        }
        for (name, language) in
            [("source_language", &typed.source_language), ("target_language", &typed.target_language)]
        {
            if let Some(text) = language
                && (text.trim().is_empty() || text.len() > 64)
            {
                return Err(format!("{name} must be the code or the name of a language, as in hi or Hindi"));
            }
        }
        if !(0.0..=1.0).contains(&typed.max_bad_rows) {
            return Err(format!(
                "max_bad_rows is a share of all rows, from 0 to 1, not {}",
                typed.max_bad_rows
            ));
        }
        Ok(Self {
            location,
            format: typed.format,
            fields: typed.fields,
            template: typed.template,
            source_language: typed.source_language,
            target_language: typed.target_language,
            skip: typed.skip,
            max_bad_rows: typed.max_bad_rows,
        })
    }
}

fn location(typed: &Typed) -> Result<Location, String> {
    match typed.kind {
        Kind::Local => {
            if typed.url.is_some() || typed.urls.is_some() || typed.headers_env.is_some() {
                return Err("url, urls and headers_env are for type: http; a local source has a path".into());
            }
            let path = typed.path.clone().filter(|path| !path.trim().is_empty());
            let path =
                path.ok_or("path is missing; name a file, a folder or a pattern such as data/*.jsonl")?;
            if path.split('/').any(|part| part == "**") {
                return Err("path: ** is not known; name one folder, or list sources for several".into());
            }
            Ok(Location::Local { path })
        }
        Kind::Http => {
            if typed.path.is_some() {
                return Err("path is for type: local; an http source has a url".into());
            }
            let urls = match (typed.url.clone(), typed.urls.clone()) {
                (Some(url), None) => vec![url],
                (None, Some(urls)) if !urls.is_empty() => urls,
                _ => return Err("give either url, or urls with at least one address".into()),
            };
            for url in &urls {
                check_url(url)?;
            }
            let headers_env = typed.headers_env.clone().unwrap_or_default();
            for (header, variable) in &headers_env {
                check_header(header, variable)?;
            }
            Ok(Location::Http { urls, headers_env })
        }
    }
}

/// Secrets belong into the environment: a source is kept in job files and shown in messages.
pub(crate) fn check_url(text: &str) -> Result<(), String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or_else(|| format!("'{text}' is no http or https address"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!(
            "the address of {} holds a name or a password; put the header's value into an environment variable \
             and name it under headers_env",
            url.host_str().unwrap_or("this host")
        ));
    }
    Ok(())
}

/// Headers that the reading itself depends on.
const OWN_HEADERS: [&str; 6] =
    ["accept-encoding", "content-length", "host", "if-range", "range", "transfer-encoding"];

pub(crate) fn check_header(header: &str, variable: &str) -> Result<(), String> {
    let name = HeaderName::from_bytes(header.as_bytes());
    let name = name.map_err(|_| format!("headers_env: '{header}' is no name of a header"))?;
    if OWN_HEADERS.contains(&name.as_str()) {
        return Err(format!("headers_env: {header} is set by the program itself"));
    }
    let is_name = !variable.is_empty()
        && variable.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !variable.starts_with(|c: char| c.is_ascii_digit());
    if !is_name {
        // What stands there instead may be the secret itself, so it is not repeated.
        return Err(format!(
            "headers_env: {header} must name an environment variable that holds the value, as in DATA_TOKEN"
        ));
    }
    Ok(())
}

impl From<SourceConfig> for Typed {
    fn from(config: SourceConfig) -> Self {
        let (kind, path, url, urls, headers_env) = match config.location {
            Location::Local { path } => (Kind::Local, Some(path), None, None, None),
            Location::Http { mut urls, headers_env } => {
                let headers = Some(headers_env).filter(|headers| !headers.is_empty());
                match urls.len() {
                    1 => (Kind::Http, None, urls.pop(), None, headers),
                    _ => (Kind::Http, None, None, Some(urls), headers),
                }
            }
        };
        Self {
            kind,
            path,
            url,
            urls,
            headers_env,
            format: config.format,
            fields: config.fields,
            template: config.template,
            source_language: config.source_language,
            target_language: config.target_language,
            skip: config.skip,
            max_bad_rows: config.max_bad_rows,
        }
    }
}
