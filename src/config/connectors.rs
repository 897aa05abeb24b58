//! The sources that requests may name: `mcp_connectors.yml`. Reads one file of the configs folder and opens no
//! source.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::adapter::FieldError;
use super::{named, yaml};
use crate::data::SourceConfig;

/// The connectors file inside the configs folder that is read when none is named.
pub const FILE_NAME: &str = "mcp_connectors.yml";

/// Sources by their names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Connectors {
    sources: BTreeMap<String, SourceConfig>,
    file: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    #[serde(default)]
    sources: Option<Named>,
}

/// A map in which no name comes twice; of two, one would be lost without a word.
struct Named(BTreeMap<String, SourceConfig>);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sources;
        impl<'de> Visitor<'de> for Sources {
            type Value = BTreeMap<String, SourceConfig>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("sources by their names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut sources = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if sources.contains_key(&name) {
                        return Err(serde::de::Error::custom(format!("two sources are called {name}")));
                    }
                    sources.insert(name, map.next_value()?);
                }
                Ok(sources)
            }
        }
        deserializer.deserialize_map(Sources).map(Self)
    }
}

impl Connectors {
    /// Reads the file that a request names inside the configs folder, else [`FILE_NAME`], without which there are
    /// no sources.
    ///
    /// # Errors
    /// A file that is not there, lies outside, or is no such file, with its place and reason.
    pub fn load(configs_dir: &Path, file: Option<&str>) -> Result<Self, FieldError> {
        const FIELD: &str = "mcp_config_path";
        let name = file.unwrap_or(FILE_NAME);
        let Some(text) = named::read(configs_dir, FIELD, name)? else {
            return match file {
                Some(_) => Err(named::missing(FIELD, name)),
                None => Ok(Self { sources: BTreeMap::new(), file: name.to_owned() }),
            };
        };
        let typed: Option<Typed> = yaml::read(&text).map_err(|error| named::unusable(FIELD, name, &error))?;
        let sources = typed.and_then(|typed| typed.sources).map(|named| named.0).unwrap_or_default();
        if let Some(source) = sources.keys().find(|source| !is_name(source)) {
            let why = format!(
                "'{}' is no name for a source; use at most 64 letters, digits, '.', '-' and '_'",
                source.chars().take(80).collect::<String>().escape_debug()
            );
            return Err(named::unusable(FIELD, name, &why));
        }
        let find = |wanted: &str| sources.get_key_value(wanted).map(|(name, source)| (name.as_str(), source));
        let resolved: Result<BTreeMap<String, SourceConfig>, FieldError> = sources
            .iter()
            .map(|(source, config)| match config.with_parts(source, &find) {
                Ok(config) => Ok((source.clone(), config)),
                Err(why) => Err(named::unusable(FIELD, name, &format!("sources.{source}: {why}"))),
            })
            .collect();
        Ok(Self { sources: resolved?, file: name.to_owned() })
    }

    /// A source by its name.
    ///
    /// # Errors
    /// There is none; the names that there are.
    pub fn source(&self, name: &str) -> Result<&SourceConfig, FieldError> {
        self.sources.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            let known = match names.is_empty() {
                true => format!("{} in the configs folder has none yet", self.file),
                false => format!("{} has {}", self.file, names.join(", ")),
            };
            let shown: String = name.chars().take(80).collect();
            FieldError {
                field: "source".into(),
                message: format!("is '{}', which is no source that is known; {known}", shown.escape_debug()),
            }
        })
    }

    /// The sources with their names, in the order of these.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &SourceConfig)> {
        self.sources.iter().map(|(name, source)| (name.as_str(), source))
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }
}

fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && name.len() <= 64 && name.bytes().all(fits)
}

#[cfg(test)]
#[path = "connectors_tests.rs"]
mod tests;
