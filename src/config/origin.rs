//! Where a setting came from, so that an error about its value can name the place to change. Knows no setting.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::anyhow;

/// The source of one setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// A `GURUKUL_*` variable.
    Environment,
    /// The settings file of this path.
    File(PathBuf),
    /// Nobody said anything.
    Default,
}

/// A setting with its name in the settings file (`max_batch`) and its origin.
#[derive(Debug, Clone)]
pub struct Sourced<T> {
    /// Snake case, as in `server.yaml`.
    pub name: &'static str,
    /// The value.
    pub value: T,
    /// Where it came from.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// The place that the user can edit: `--max-batch`, `GURUKUL_MAX_BATCH`, `max_batch in configs/server.yaml`.
    pub fn place(&self) -> String {
        match &self.origin {
            Origin::Flag | Origin::Default => flag(self.name),
            Origin::Environment => variable(self.name),
            Origin::File(path) => format!("{} in {}", self.name, path.display()),
        }
    }

    /// An error about this setting: the place, then `message`.
    pub fn error(&self, message: impl fmt::Display) -> anyhow::Error {
        anyhow!("{}: {message}", self.place())
    }

    /// The value through `convert`, whose error gets the place in front.
    pub fn convert<U, E: fmt::Display>(&self, convert: impl FnOnce(&T) -> Result<U, E>) -> anyhow::Result<U> {
        convert(&self.value).map_err(|e| self.error(e))
    }
}

impl<T: Copy + PartialOrd + fmt::Display> Sourced<T> {
    /// The value, when it lies in `low..=high`.
    pub fn within(&self, low: T, high: T) -> anyhow::Result<T> {
        // What is no number is in no range.
        if !(low..=high).contains(&self.value) {
            return Err(self.error(format_args!("{} is out of range; use {low} to {high}", self.value)));
        }
        Ok(self.value)
    }
}

/// The first of `flag`, `environment`, `file` that says something, else `default`.
pub(super) fn pick<T: Clone>(
    name: &'static str,
    [flag, environment, file]: [&Option<T>; 3],
    file_path: &Path,
    default: T,
) -> Sourced<T> {
    let said = |value: &Option<T>, origin: Origin| value.clone().map(|value| Sourced { name, value, origin });
    said(flag, Origin::Flag)
        .or_else(|| said(environment, Origin::Environment))
        .or_else(|| said(file, Origin::File(file_path.to_owned())))
        .unwrap_or(Sourced { name, value: default, origin: Origin::Default })
}

/// Reads one variable. An empty one counts as not set: compose files pass variables through empty.
pub(super) fn from_environment<T: FromStr<Err: fmt::Display>>(
    lookup: &dyn Fn(&str) -> Option<String>,
    name: &str,
) -> anyhow::Result<Option<T>> {
    let variable = variable(name);
    match lookup(&variable) {
        Some(text) if !text.trim().is_empty() => {
            text.trim().parse().map(Some).map_err(|e| anyhow!("{variable}: '{text}': {e}"))
        }
        _ => Ok(None),
    }
}

fn flag(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}

fn variable(name: &str) -> String {
    format!("GURUKUL_{}", name.to_ascii_uppercase())
}
