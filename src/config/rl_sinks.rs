//! Where logged episodes are uploaded to: the section `sinks` of `rl_config.yaml`, and what an upload's place is
//! called there. Holds names of environment variables, never a secret; opens no connection.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::adapter::FieldError;
use super::named::{Named, is_name};
use crate::data::{check_header, check_url};

/// Key of an upload where a sink names none: the same content has the same key, whenever it is sent.
const DEFAULT_KEY: &str = "rl/{run_id}/{sha256}.jsonl";
/// Characters of a key as it is typed.
const MAX_KEY_BYTES: usize = 512;
/// Headers of an upload that the program sets itself.
const OWN_HEADERS: [&str; 3] = ["content-type", "idempotency-key", "if-none-match"];

/// The sinks by their names, and the one that is meant where nobody names one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SinksConfig {
    sinks: Named<SinkConfig>,
    /// A section of its own.
    #[serde(skip)]
    default_sink: Option<String>,
}

/// A place for uploads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum SinkConfig {
    /// A bucket of Amazon S3 or of what speaks its language.
    S3(S3Sink),
    /// An address that takes PUT or POST.
    Http(HttpSink),
    /// A folder of this machine, such as a mounted NAS.
    Folder(FolderSink),
}

/// A bucket. Credentials come from the environment and what AWS' own programs read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3Sink {
    /// Its name.
    pub bucket: String,
    /// Its region; that of the environment when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The server, where it is not Amazon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<String>,
    /// Put the bucket into the path and not into the host's name, as most servers of one's own want it.
    #[serde(default)]
    pub force_path_style: bool,
    /// What an upload's object is called.
    #[serde(default)]
    pub key: KeyTemplate,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSink {
    /// How it is sent.
    #[serde(default)]
    pub method: HttpMethod,
    /// The address, with placeholders as a key has them; without a secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The environment variable that holds the address, for those that are signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_env: Option<String>,
    /// Names of headers to the environment variables that hold their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers_env: BTreeMap<String, String>,
}

/// How an upload is sent to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HttpMethod {
    /// The address names what is stored.
    #[default]
    Put,
    /// The address takes batches of lines.
    Post,
}

/// A folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderSink {
    /// The folder, which must be there: an empty mount point is not to be filled.
    pub path: String,
    /// Where in it an upload's file goes.
    #[serde(default)]
    pub key: KeyTemplate,
}

/// A key with placeholders: `{run_id}`, `{date}` and `{time}` (of the promise, UTC), `{sha256}` (of the content),
/// `{name}` (of the sink).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyTemplate(String);

/// What fills a key's placeholders.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyFacts {
    /// The run.
    pub run_id: String,
    /// `2026-01-31`
    pub date: String,
    /// `235959`
    pub time: String,
    /// Hexadecimal.
    pub sha256: String,
    /// Of the sink.
    pub name: String,
}

/// Where one upload goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    /// Name of the sink.
    pub name: String,
    /// What it is.
    pub sink: SinkConfig,
    /// It is in no file but was made for this run, so whoever delivers later has to be told what it is.
    pub is_ad_hoc: bool,
}

impl Default for KeyTemplate {
    fn default() -> Self {
        Self(DEFAULT_KEY.to_owned())
    }
}

impl From<KeyTemplate> for String {
    fn from(key: KeyTemplate) -> Self {
        key.0
    }
}

impl TryFrom<String> for KeyTemplate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        check_placeholders("key", &text)?;
        let is_whole = !text.is_empty() && text.len() <= MAX_KEY_BYTES && !text.chars().any(char::is_control);
        let goes_down =
            text.split('/').all(|part| !matches!(part, "" | "." | "..")) && !text.contains(['\\', ':']);
        if !is_whole || !goes_down {
            return Err(format!(
                "key: '{}' is no key; use parts with '/' between them, as in {DEFAULT_KEY}, of at most \
                 {MAX_KEY_BYTES} bytes, without '..', '\\' and ':'",
                text.chars().take(80).collect::<String>().escape_debug()
            ));
        }
        Ok(Self(text))
    }
}

impl KeyTemplate {
    /// The key of one upload.
    fn render(&self, facts: &KeyFacts) -> String {
        render(&self.0, facts)
    }

    fn is_by_content(&self) -> bool {
        self.0.contains("{sha256}")
    }
}

/// Fills the placeholders of a key or an address. What is filled in needs no escaping in either.
pub fn render(template: &str, facts: &KeyFacts) -> String {
    template
        .replace("{run_id}", &facts.run_id)
        .replace("{date}", &facts.date)
        .replace("{time}", &facts.time)
        .replace("{sha256}", &facts.sha256)
        .replace("{name}", &facts.name)
}

fn check_placeholders(field: &str, text: &str) -> Result<(), String> {
    const KNOWN: &str = "{run_id}, {date}, {time}, {sha256} and {name}";
    let x = || "x".to_owned();
    let rest = render(text, &KeyFacts { run_id: x(), date: x(), time: x(), sha256: x(), name: x() });
    if rest.contains(['{', '}']) {
        return Err(format!("{field}: a placeholder is unknown or not closed; there are {KNOWN}"));
    }
    Ok(())
}

impl SinkConfig {
    /// The kind as `type` names it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::S3(_) => "s3",
            Self::Http(_) => "http",
            Self::Folder(_) => "folder",
        }
    }

    /// What an upload is called there. An address that may be secret is not part of it.
    pub fn key(&self, facts: &KeyFacts) -> String {
        match self {
            Self::S3(sink) => sink.key.render(facts),
            Self::Folder(sink) => sink.key.render(facts),
            Self::Http(sink) => match &sink.url {
                Some(url) => render(url, facts),
                None => KeyTemplate::default().render(facts),
            },
        }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Self::S3(sink) => {
                sink.check()?;
                by_content(&sink.key)
            }
            Self::Folder(sink) if sink.path.trim().is_empty() => {
                Err("path is empty; name a folder that is there".into())
            }
            Self::Folder(sink) => by_content(&sink.key),
            Self::Http(sink) => sink.check(),
        }
    }
}

/// Two uploads must not meet under one key.
fn by_content(key: &KeyTemplate) -> Result<(), String> {
    if key.is_by_content() {
        return Ok(());
    }
    Err(format!("key must contain {{sha256}}, as in {DEFAULT_KEY}; else a second upload meets the first"))
}

impl S3Sink {
    fn check(&self) -> Result<(), String> {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
        if !(3..=63).contains(&self.bucket.len()) || !self.bucket.bytes().all(fits) {
            let shown: String = self.bucket.chars().take(80).collect();
            return Err(format!(
                "'{}' is no name of a bucket; use 3 to 63 small letters, digits, '.' and '-'",
                shown.escape_debug()
            ));
        }
        if let Some(region) = &self.region
            && !is_name(region)
        {
            return Err("region must be a name such as eu-central-1".into());
        }
        self.endpoint_url
            .as_deref()
            .map_or(Ok(()), |url| check_url(url).map_err(|e| format!("endpoint_url: {e}")))
    }
}

impl HttpSink {
    fn check(&self) -> Result<(), String> {
        match (&self.url, &self.url_env) {
            (Some(url), None) => {
                check_url(url)?;
                check_placeholders("url", url)?;
                if self.method == HttpMethod::Put && !url.contains("{sha256}") {
                    return Err("url must contain {sha256} for method: put; else a second upload meets the \
                                first. One that is signed for a single object belongs into url_env"
                        .into());
                }
            }
            (None, Some(variable)) if is_variable(variable) => {}
            (None, Some(_)) => {
                // What stands there instead may be the signed address itself, so it is not repeated.
                return Err("url_env must name an environment variable that holds the address".into());
            }
            _ => return Err("give either url, or url_env with the variable that holds it".into()),
        }
        for (header, variable) in &self.headers_env {
            check_header(header, variable)?;
            if OWN_HEADERS.contains(&header.to_ascii_lowercase().as_str()) {
                return Err(format!("headers_env: {header} is set by the program itself"));
            }
        }
        Ok(())
    }
}

fn is_variable(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !text.starts_with(|c: char| c.is_ascii_digit())
}

impl SinksConfig {
    /// The same sinks, of which the one of this name is meant where none is named.
    pub(super) fn with_default(self, default_sink: Option<String>) -> Self {
        Self { default_sink, ..self }
    }

    /// Checks every sink, and that the default one is there.
    ///
    /// # Errors
    /// The field, as `sinks.NAME`, and what would do.
    pub(super) fn check(&self) -> Result<(), FieldError> {
        for (name, sink) in self.sinks.iter() {
            let field = format!("sinks.{}", name.chars().take(80).collect::<String>().escape_debug());
            if !is_name(name) {
                let message =
                    "is no name for a sink; use at most 64 letters, digits, '.', '-' and '_'".into();
                return Err(FieldError { field, message });
            }
            sink.check()
                .map_err(|message| FieldError { field, message: format!("cannot be used: {message}") })?;
        }
        match &self.default_sink {
            Some(name) => self.named("default_sink", name).map(drop),
            None => Ok(()),
        }
    }

    /// The sink of this name; without one, the default sink, or the only one.
    ///
    /// # Errors
    /// There is none; the names that there are.
    pub fn destination(&self, name: Option<&str>) -> Result<Destination, FieldError> {
        let only = || {
            let mut names = self.names();
            names.next().filter(|_| names.next().is_none())
        };
        match name.or(self.default_sink.as_deref()).or_else(only) {
            Some(name) => self.named("sink", name),
            None if self.sinks.is_empty() => Err(FieldError {
                field: "sink".into(),
                message: "is not there: rl_config.yaml has no sinks; add one under sinks, or do not upload"
                    .into(),
            }),
            None => Err(FieldError {
                field: "sink".into(),
                message: format!(
                    "must be named, as there are several: {}; or set default_sink",
                    self.listed()
                ),
            }),
        }
    }

    /// A bucket and a key for one run, as the command line gives them. Server, region and style are those of the
    /// configured sink for the same bucket, else of the only s3 sink, else of the environment.
    ///
    /// # Errors
    /// What is no bucket or no key, by its flag.
    pub fn s3_destination(&self, bucket: &str, key: Option<&str>) -> Result<Destination, FieldError> {
        let configured: Vec<&S3Sink> = self
            .sinks
            .values()
            .filter_map(|sink| match sink {
                SinkConfig::S3(sink) => Some(sink),
                _ => None,
            })
            .collect();
        let same = configured.iter().find(|sink| sink.bucket == bucket);
        let like = same.or(configured.first().filter(|_| configured.len() == 1)).copied();
        let error = |flag: &str, message| FieldError { field: flag.to_owned(), message };
        let key = match key {
            Some(key) => KeyTemplate::try_from(key.to_owned())
                .map_err(|message| error("--s3-key", format!("cannot be used: {message}")))?,
            None => same.map(|sink| sink.key.clone()).unwrap_or_default(),
        };
        let sink = S3Sink {
            bucket: bucket.to_owned(),
            region: like.and_then(|sink| sink.region.clone()),
            endpoint_url: like.and_then(|sink| sink.endpoint_url.clone()),
            force_path_style: like.is_some_and(|sink| sink.force_path_style),
            key,
        };
        sink.check().map_err(|message| error("--s3-bucket", format!("cannot be used: {message}")))?;
        Ok(Destination { name: format!("s3://{bucket}"), sink: SinkConfig::S3(sink), is_ad_hoc: true })
    }

    /// A sink by its name.
    pub fn sink(&self, name: &str) -> Option<&SinkConfig> {
        self.sinks.get(name)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sinks.keys().map(String::as_str)
    }

    fn named(&self, field: &str, name: &str) -> Result<Destination, FieldError> {
        let Some(sink) = self.sink(name) else {
            let shown: String = name.chars().take(80).collect();
            let message = format!(
                "is '{}', which is no sink of rl_config.yaml; it has {}",
                shown.escape_debug(),
                self.listed()
            );
            return Err(FieldError { field: field.to_owned(), message });
        };
        Ok(Destination { name: name.to_owned(), sink: sink.clone(), is_ad_hoc: false })
    }

    fn listed(&self) -> String {
        let names: Vec<&str> = self.names().collect();
        if names.is_empty() { "none yet".into() } else { names.join(", ") }
    }
}

#[cfg(test)]
#[path = "rl_sinks_tests.rs"]
mod tests;
