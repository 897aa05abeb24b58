//! An episode as it is stored: one line of JSON. What is written once stays readable: fields are added, never renamed,
//! and `schema` counts the changes that a reader has to know. Knows no file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapters::is_device_name;

/// Version of the line.
pub const SCHEMA: u32 = 1;

/// Longest run id and environment name, in characters.
const MAX_NAME: usize = 64;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Episode {
    /// [`SCHEMA`] of whoever wrote the line.
    pub schema: u32,
    /// Of this episode alone, in all logs.
    pub episode_id: String,
    /// The run that it belongs to, which is the name of the log.
    pub run_id: String,
    /// Number of the episode in its run, in the order of the log; counts from 0.
    pub episode_index: u64,
    /// When it was logged, RFC 3339 in UTC with milliseconds.
    pub timestamp: String,
    /// What it comes from: a task, an application.
    pub env_name: String,
    /// The text that was gone on from.
    pub prompt: String,
    /// The answer as the model gave it, not cleaned.
    pub output: String,
    /// 0 to 1 where it was computed here, any finite number where it was given; null where it could not be had.
    pub reward: Option<f64>,
    /// Seconds from the start of the generation to its end; null where the episode was given without it.
    pub latency_s: Option<f64>,
    /// What else is known.
    pub meta: EpisodeMeta,
}

/// Where an episode's output is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EpisodeSource {
    /// Sampled here.
    Generated,
    /// Brought by a client.
    Given,
}

impl EpisodeSource {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generated => "generated",
            Self::Given => "given",
        }
    }
}

/// What else is known of an episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpisodeMeta {
    /// Where the output is from.
    pub source: EpisodeSource,
    /// Language that was wanted, by its code.
    pub language: Option<String>,
    /// Name of the base model.
    pub base_model: Option<String>,
    /// Name of the adapter; null is the base model.
    pub adapter: Option<String>,
    /// Which weights of that name.
    pub adapter_generation: Option<u64>,
    /// The parts of the reward, each 0 to 1.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
    /// Why there is no reward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_error: Option<String>,
    /// A good answer, as the prompt brought it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// `stop` or `length`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
    /// Tokens of the prompt, special tokens included; where token ids were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Tokens of the output, the end token included; where they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// ln p of each of them, of the model's own distribution: temperature 1, nothing cut. As many as `token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f32>>,
    /// How the tokens were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingMeta>,
    /// What a client said beyond these.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl EpisodeMeta {
    /// Of an episode of which nothing else is known.
    pub fn new(source: EpisodeSource) -> Self {
        Self {
            source,
            language: None,
            base_model: None,
            adapter: None,
            adapter_generation: None,
            rewards: BTreeMap::new(),
            reward_error: None,
            reference: None,
            finish_reason: None,
            prompt_token_ids: None,
            token_ids: None,
            logprobs: None,
            sampling: None,
            extra: Map::new(),
        }
    }
}

/// How the tokens of an episode were chosen: enough to sample the same answer again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingMeta {
    /// 0 when greedy.
    pub temperature: f64,
    /// Nucleus; 1 is off.
    pub top_p: f64,
    /// 0 is off.
    pub top_k: u64,
    /// 1 is off.
    pub repetition_penalty: f64,
    /// Upper bound on new tokens.
    pub max_new_tokens: u64,
    /// Seed of the episode's own random stream.
    pub seed: u64,
}

/// Episodes as they stand in the log, one line each.
pub fn lines(episodes: &[Episode]) -> Vec<u8> {
    let mut lines = Vec::new();
    for episode in episodes {
        serde_json::to_writer(&mut lines, episode)
            .expect("an episode has no map with keys that are no texts");
        lines.push(b'\n');
    }
    lines
}

/// A name that cannot be a run's or an environment's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is {0:?}; use 1 to 64 characters of a-z, 0-9, '.', '_' and '-', the first a letter or a digit")]
pub struct InvalidName(pub String);

/// Whether a text can be a run's id: `[a-z0-9][a-z0-9._-]{0,63}`. Nothing else becomes a path.
///
/// # Errors
/// It cannot; the rule.
pub fn check_run_id(name: &str) -> Result<(), InvalidName> {
    let first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let fits = |b: u8| first(b) || b"._-".contains(&b);
    match name.as_bytes() {
        [begin, rest @ ..]
            if first(*begin)
                && name.len() <= MAX_NAME
                && rest.iter().all(|b| fits(*b))
                && !is_device_name(name) =>
        {
            Ok(())
        }
        _ => Err(InvalidName(name.chars().take(80).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_and_no_paths() {
        for name in ["a", "0", "run-2026.11_x", &"x".repeat(64)] {
            assert!(check_run_id(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "-a",
            ".a",
            "A",
            "ä",
            "a b",
            "a~1",
            "a\0",
            "nul",
            "com1.x",
            &"x".repeat(65),
        ] {
            let message = check_run_id(name).unwrap_err().to_string();
            assert!(message.contains("a-z"), "{message}");
        }
    }

    #[test]
    fn a_line_is_read_back_with_what_a_client_added() {
        let text = r#"{"schema":1,"episode_id":"e","run_id":"r","episode_index":3,"timestamp":"t","env_name":"n",
            "prompt":"p","output":"o","reward":0.5,"latency_s":null,"meta":{"source":"given","language":"hi",
            "base_model":null,"adapter":null,"adapter_generation":null,"rewards":{"length":1.0},"user":"u-7"}}"#;
        let episode: Episode = serde_json::from_str(text).unwrap();
        assert_eq!(episode.meta.extra["user"], "u-7");
        let value: Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&episode).unwrap(), value);
    }
}
