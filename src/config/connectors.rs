//! The sources that requests may name: `mcp_connectors.yml`. Reads one file of the configs folder and opens no
//! source.

use std::path::Path;

use serde::Deserialize;

use super::adapter::FieldError;
use super::named::{self, Named, is_name};
use crate::data::SourceConfig;

/// The connectors file inside the configs folder that is read when none is named.
pub const FILE_NAME: &str = "mcp_connectors.yml";

/// Sources by their names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Connectors {
    sources: Named<SourceConfig>,
    file: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    #[serde(default)]
    sources: Option<Named<SourceConfig>>,
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
                None => Ok(Self { sources: Named::default(), file: name.to_owned() }),
            };
        };
        let typed: Option<Typed> =
            serde_yaml::from_str(&text).map_err(|error| named::unusable(FIELD, name, &error))?;
        let sources = typed.and_then(|typed| typed.sources).unwrap_or_default();
        if let Some(source) = sources.keys().find(|source| !is_name(source)) {
            let why = format!(
                "'{}' is no name for a source; use at most 64 letters, digits, '.', '-' and '_'",
                source.chars().take(80).collect::<String>().escape_debug()
            );
            return Err(named::unusable(FIELD, name, &why));
        }
        Ok(Self { sources, file: name.to_owned() })
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

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }
}

#[cfg(test)]
#[path = "connectors_tests.rs"]
mod tests;
