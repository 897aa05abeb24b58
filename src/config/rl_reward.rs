//! What an answer earns: the section `rewards` of `rl_config.yaml`. A part with the weight 0 is not computed. Knows
//! neither the formulas nor the network.

use std::ops::Bound;

use serde::{Deserialize, Serialize};

use super::adapter::FieldError;
use super::range::within;
use super::rl::null_is_default;
use crate::data::web::bare;

/// The parts of the reward, each with its weight. The reward is the weighted mean of the parts that apply.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// A length within a band.
    #[serde(deserialize_with = "null_is_default")]
    pub length: LengthConfig,
    /// No echo, no loop, a proper end, no damaged text.
    #[serde(deserialize_with = "null_is_default")]
    pub quality: QualityConfig,
    /// Not the same words over and over, nor the same answer as the others to the prompt.
    #[serde(deserialize_with = "null_is_default")]
    pub diversity: DiversityConfig,
    /// In the language that is wanted; applies where one is.
    #[serde(deserialize_with = "null_is_default")]
    pub language: LanguageConfig,
    /// Likeness to a reference; applies where there is one.
    #[serde(deserialize_with = "null_is_default")]
    pub chrf: ChrfConfig,
    /// The reference itself; applies where there is one.
    #[serde(deserialize_with = "null_is_default")]
    pub exact_match: ExactMatchConfig,
    /// A pattern that the answer holds.
    #[serde(deserialize_with = "null_is_default")]
    pub regex: RegexConfig,
    /// What a service says.
    #[serde(deserialize_with = "null_is_default")]
    pub http: HttpConfig,
}

macro_rules! config {
    ($(#[$of:meta])* $name:ident { $($(#[$field_of:meta])* $field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$of])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field_of])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

config! {
    /// 1 inside the band, less outside.
    LengthConfig {
        /// Weight of the part.
        weight: f64 = 1.0,
        /// Grapheme clusters that an answer should have at least; fewer earn in proportion.
        min_graphemes: usize = 2,
        /// Grapheme clusters that an answer should have at most.
        max_graphemes: usize = 150,
        /// Grapheme clusters beyond the band that halve what is earned.
        half_graphemes: usize = 50,
    }
}

config! {
    /// No echo, no loop, a proper end, no damaged text.
    QualityConfig {
        /// Weight of the part.
        weight: f64 = 1.0,
    }
}

config! {
    /// Other words, other answers.
    DiversityConfig {
        /// Weight of the part.
        weight: f64 = 0.5,
    }
}

config! {
    /// The wanted language.
    LanguageConfig {
        /// Weight of the part.
        weight: f64 = 1.0,
        /// Share that is earned where a script serves several languages and nothing tells which it is, 0 to below 1.
        unreliable: f64 = 0.75,
    }
}

config! {
    /// Likeness to a reference.
    ChrfConfig {
        /// Weight of the part.
        weight: f64 = 2.0,
    }
}

config! {
    /// The reference itself.
    ExactMatchConfig {
        /// Weight of the part.
        weight: f64 = 0.0,
    }
}

config! {
    /// A pattern that the answer holds.
    RegexConfig {
        /// Weight of the part.
        weight: f64 = 0.0,
        /// The pattern, in the syntax of the crate `regex`; empty where the weight is 0.
        pattern: String = String::new(),
    }
}

config! {
    /// A service that judges answers.
    HttpConfig {
        /// Weight of the part.
        weight: f64 = 0.0,
        /// Where answers are posted to; empty where the weight is 0.
        url: String = String::new(),
        /// Variable of the environment with a token, sent as `authorization: Bearer`; empty sends none.
        token_env: String = String::new(),
        /// Seconds that one attempt may take.
        timeout_s: f64 = 10.0,
        /// Further attempts after a failed one.
        retries: usize = 3,
        /// Requests at once.
        max_concurrent: usize = 8,
    }
}

impl RewardConfig {
    /// Weight of each part, by its name.
    pub fn weights(&self) -> [(&'static str, f64); 8] {
        [
            ("length", self.length.weight),
            ("quality", self.quality.weight),
            ("diversity", self.diversity.weight),
            ("language", self.language.weight),
            ("chrf", self.chrf.weight),
            ("exact_match", self.exact_match.weight),
            ("regex", self.regex.weight),
            ("http", self.http.weight),
        ]
    }

    /// Checks every range. For settings that come from elsewhere than the file, too.
    ///
    /// # Errors
    /// The field, as `rewards.length.weight`, and what would do.
    pub fn check(&self) -> Result<(), FieldError> {
        for (part, weight) in self.weights() {
            within(&format!("rewards.{part}.weight"), weight, 0.0..=1e6)?;
        }
        if self.weights().iter().all(|(_, weight)| *weight == 0.0) {
            let message = "has no part with a weight above 0; give one to at least one part".into();
            return Err(FieldError { field: "rewards".into(), message });
        }
        let length = &self.length;
        within("rewards.length.min_graphemes", length.min_graphemes, 0..=1_000_000)?;
        within("rewards.length.max_graphemes", length.max_graphemes, length.min_graphemes..=1_000_000)?;
        within("rewards.length.half_graphemes", length.half_graphemes, 1..=1_000_000)?;
        within("rewards.language.unreliable", self.language.unreliable, 0.0..1.0)?;
        let error = |field: &str, message: String| Err(FieldError { field: field.into(), message });
        if self.regex.weight > 0.0 {
            if self.regex.pattern.is_empty() {
                return error(
                    "rewards.regex.pattern",
                    "is empty; write a pattern, or set the weight to 0".into(),
                );
            }
            if let Err(bad) = regex::Regex::new(&self.regex.pattern) {
                return error("rewards.regex.pattern", format!("is no pattern: {bad}"));
            }
        }
        let http = &self.http;
        if http.weight > 0.0 && !is_web_address(&http.url) {
            return error(
                "rewards.http.url",
                format!("is '{}'; write http://... or https://..., or set the weight to 0", bare(&http.url)),
            );
        }
        within("rewards.http.timeout_s", http.timeout_s, (Bound::Excluded(0.0), Bound::Included(600.0)))?;
        within("rewards.http.retries", http.retries, 0..=20)?;
        within("rewards.http.max_concurrent", http.max_concurrent, 1..=1024)?;
        Ok(())
    }
}

fn is_web_address(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}
