//! LoRA adapters as PEFT directories on disk: their names, what is in them, and the [`Registry`] that hands
//! them to the engine. This file holds the types that callers see; it reads nothing. Nothing in this module
//! knows HTTP.
//!
//! ```text
//! adapters/
//!   hindi-v2/
//!     adapter_config.json          PEFT's
//!     adapter_model.safetensors    PEFT's
//!     gurukul.json                 optional, ours: {"training_job": "...", "metrics": {...}, "generation": 3, ...}
//! ```

mod config;
mod durable;
mod files;
mod peft;
mod place;
mod quota;
mod registry;
mod write;

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::engine::EngineError;
use crate::nn::lora::{LoraWeights, Site};

pub(crate) use durable::{make_folder, sync_folder, write_file};
pub use registry::{Published, Registry};
pub use write::TrainedAdapter;
pub(crate) use write::safetensors_bytes;

/// Why an adapter cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AdapterError {
    /// The name breaks the rule of [`check_name`]; no path was built from it.
    #[error(
        "{name:?} is no adapter name: 1 to 64 characters of a-z, 0-9, '.', '_' and '-', the first a letter or a digit, \
         and no device of Windows such as con or com1"
    )]
    InvalidName {
        /// The name as it came, shortened when it is long.
        name: String,
    },
    /// No such folder.
    #[error("there is no adapter {name:?}; GET /adapter/list names those there are")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The folder is there, but it is no adapter for this model.
    #[error("the adapter {name:?} cannot be used: {reason}")]
    Invalid {
        /// The name.
        name: String,
        /// What is wrong, with tensor or field, what was expected and what was found.
        reason: String,
    },
    /// It would not fit `--adapter-quota`.
    #[error(
        "the adapter {name:?} takes {planned} bytes on disk and the others take {used}, together more than the \
         {quota_bytes} of --adapter-quota; remove some (DELETE /adapter/NAME), lower r, or raise --adapter-quota"
    )]
    Quota {
        /// The name.
        name: String,
        /// Bytes that it takes.
        planned: u64,
        /// Bytes of the others.
        used: u64,
        /// `--adapter-quota`.
        quota_bytes: u64,
    },
    /// The engine refused it, for want of memory or because it is shutting down.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The disk failed.
    #[error("{what}: {message}")]
    Io {
        /// What could not be done: `the adapter "x" could not be read`.
        what: String,
        /// Kind of the failure.
        kind: io::ErrorKind,
        /// The system's words.
        message: String,
    },
}

impl AdapterError {
    fn io(what: impl Into<String>, error: &io::Error) -> Self {
        Self::Io { what: what.into(), kind: error.kind(), message: error.to_string() }
    }

    fn unreadable(name: &str, error: &io::Error) -> Self {
        Self::io(format!("the adapter {name:?} could not be read"), error)
    }

    fn invalid(name: &str, reason: impl Into<String>) -> Self {
        Self::Invalid { name: name.to_owned(), reason: reason.into() }
    }
}

/// Reads the adapter `name` in the folder `root` for a model with these sites, without an engine.
///
/// # Errors
/// Every [`AdapterError`] but that of the engine.
pub fn read(root: &Path, name: &str, sites: &[Site]) -> Result<LoraWeights, AdapterError> {
    let (_, loaded) = files::locate(root, name)?.load(name, sites)?;
    Ok(loaded.weights)
}

/// Reads an adapter from any folder: a checkpoint's, or one that a person names. Links are followed.
///
/// # Errors
/// Every [`AdapterError`] but that of the engine; the folder stands in the place of the name.
pub fn read_folder(folder: &Path, sites: &[Site]) -> Result<LoraWeights, AdapterError> {
    let name = folder.display().to_string();
    let (_, loaded) = files::locate_in(folder, None, &name)?.load(&name, sites)?;
    Ok(loaded.weights)
}

/// What is known of an adapter without running it.
#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
pub struct AdapterInfo {
    /// Name, as requests give it.
    pub name: String,
    /// Generation that the engine was last given, or that training published; absent until the adapter is first
    /// used where its files came from elsewhere.
    pub generation: Option<u64>,
    /// `r`, before any pattern.
    pub rank: Option<usize>,
    /// `lora_alpha`, before any pattern.
    pub alpha: Option<f64>,
    /// `target_modules`: names, or one regular expression, or `all-linear`.
    pub target_modules: Vec<String>,
    /// Size of `adapter_model.safetensors`.
    pub bytes: u64,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// When the weights were written, RFC 3339.
    pub created_at: Option<String>,
    /// Whether the engine holds it now.
    pub resident: bool,
    /// The job that trained it, if one of ours did.
    pub training_job: Option<String>,
    /// What that job measured.
    pub metrics: Option<serde_json::Value>,
    /// Why it cannot be used; absent when its names and shapes fit the model.
    pub error: Option<String>,
}

impl AdapterInfo {
    /// An entry of which only the name is known.
    fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            generation: None,
            rank: None,
            alpha: None,
            target_modules: Vec::new(),
            bytes: 0,
            base_model: None,
            created_at: None,
            resident: false,
            training_job: None,
            metrics: None,
            error: None,
        }
    }
}

/// Whether Windows takes a name, in any folder and with any ending, for one of its devices.
pub fn is_device_name(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    let numbered = |device: &str| {
        stem.strip_prefix(device).is_some_and(|n| n.len() == 1 && n.bytes().all(|b| b.is_ascii_digit()))
    };
    matches!(stem, "con" | "prn" | "aux" | "nul") || numbered("com") || numbered("lpt")
}

/// Accepts `[a-z0-9][a-z0-9._-]{0,63}` but for devices ([`is_device_name`]). No such name is a path of more than one component, `.` or `..`, and no
/// two of them are one name on a file system that ignores case.
///
/// # Errors
/// [`AdapterError::InvalidName`].
pub fn check_name(name: &str) -> Result<(), AdapterError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let valid = name.len() <= 64
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(|b| plain(b) || matches!(b, b'.' | b'_' | b'-'))
        && !is_device_name(name);
    if valid { Ok(()) } else { Err(AdapterError::InvalidName { name: name.chars().take(80).collect() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_follow_the_rule() {
        for name in
            ["a", "0", "hindi", "hindi-v2.1_final", "a..b", "console", "com", "com10", &"x".repeat(64)]
        {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            ".hidden",
            "-rf",
            "_x",
            "A",
            "Hindi",
            "a/b",
            "../a",
            "a/../../etc",
            "a\\b",
            "a\0",
            "\0",
            "a b",
            "a\n",
            "a%2fb",
            "a:b",
            "~",
            "हिंदी",
            "con",
            "nul.v2",
            "com1",
            "lpt9.a.b",
            "\u{430}dapter",
            "a\u{200b}b",
            "a\u{2215}b",
            "\u{ff41}",
            "a\u{2024}b",
            &"x".repeat(65),
        ] {
            assert!(matches!(check_name(name), Err(AdapterError::InvalidName { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_refused_name_is_shown_escaped_and_short() {
        let error = check_name(&"\0\u{202e}".repeat(1000)).unwrap_err().to_string();
        assert!(error.len() < 1000 && !error.contains('\0') && !error.contains('\u{202e}'), "{error}");
    }

    proptest! {
        #[test]
        fn a_good_name_is_one_component(name in "\\PC{0,70}") {
            if check_name(&name).is_ok() {
                let mut parts = std::path::Path::new(&name).components();
                prop_assert!(matches!(parts.next(), Some(std::path::Component::Normal(p)) if p == name.as_str()));
                prop_assert!(parts.next().is_none());
            }
        }

        #[test]
        fn every_name_of_the_rule_is_good(name in "[a-z0-9][a-z0-9._-]{0,63}") {
            prop_assert_eq!(check_name(&name).is_ok(), !is_device_name(&name));
        }
    }
}
