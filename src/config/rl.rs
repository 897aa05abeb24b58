//! Reinforcement learning: `rl_config.yaml` as typed, then resolved and checked once. Reads one file of the configs
//! folder; opens no log, no model and no connection. `rl_reward.rs`, `rl_sinks.rs` and `rl_train.rs` have the larger
//! sections.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::adapter::FieldError;
use super::named;
use super::range::within;
pub use super::rl_reward::RewardConfig;
pub use super::rl_sinks::SinksConfig;
pub use super::rl_train::{Loss, RlTrainConfig};
use super::size::ByteSize;
use crate::text::Language;

/// The settings file inside the configs folder that is read when none is named.
pub const FILE_NAME: &str = "rl_config.yaml";

/// The file as it is delivered, whose prompts are the default.
const DELIVERED: &str = include_str!("../../configs/rl_config.yaml");

/// Everything that collecting and learning from episodes can be told.
#[derive(Debug, Clone, PartialEq)]
pub struct RlConfig {
    /// What is answered where a request brings no prompts; never empty. In turns by language.
    pub prompts: Vec<PromptConfig>,
    /// How answers are collected.
    pub collect: CollectConfig,
    /// How they are rewarded.
    pub rewards: RewardConfig,
    /// How they are logged.
    pub log: LogConfig,
    /// Where the log can be uploaded to.
    pub sinks: SinksConfig,
    /// How an adapter learns from them.
    pub train: RlTrainConfig,
}

/// One prompt of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptConfig {
    /// The text to go on from.
    pub prompt: String,
    /// Language of the answer by code or name; what the prompt asks for when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// A good answer, for the rewards that compare with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

impl PromptConfig {
    /// A prompt of which nothing else is known.
    pub fn new(prompt: String) -> Self {
        Self { prompt, language: None, reference: None }
    }
}

/// Defaults and bounds of collecting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollectConfig {
    /// What episodes are said to come from where a request does not say.
    pub env_name: String,
    /// Most episodes of one request.
    pub max_episodes: u64,
    /// Answers to one prompt that are collected and rewarded together, where there are more episodes than prompts.
    pub group_size: usize,
    /// Answers that are generated at once, all collecting together; 0 is half of the server's batch.
    pub max_in_flight: usize,
    /// Upper bound on new tokens.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus; 1 keeps all tokens.
    pub top_p: f64,
    /// 0 keeps all tokens.
    pub top_k: usize,
    /// 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self {
            env_name: "gurukul".into(),
            max_episodes: 100_000,
            group_size: 8,
            max_in_flight: 0,
            max_new_tokens: 64,
            temperature: 0.8,
            top_p: 1.0,
            top_k: 0,
            repetition_penalty: 1.0,
        }
    }
}

/// How the log is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes after which a run's file is put aside and another one begun.
    pub max_file: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { max_file: "64MiB".into() }
    }
}

impl LogConfig {
    /// `max_file` in bytes.
    ///
    /// # Errors
    /// It is no size, or out of its range.
    pub fn max_file_bytes(&self) -> Result<u64, FieldError> {
        let field = "log.max_file";
        let bytes: ByteSize = self.max_file.parse().map_err(|error| FieldError {
            field: field.into(),
            message: format!("cannot be used: {error}"),
        })?;
        within(field, bytes.0, 1024..=1 << 40)
    }
}

/// The file, section by section. A section whose lines are all comments is the YAML value null.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Typed {
    prompts: Option<Vec<PromptConfig>>,
    collect: Option<CollectConfig>,
    rewards: Option<RewardConfig>,
    log: Option<LogConfig>,
    sinks: Option<SinksConfig>,
    default_sink: Option<String>,
    train: Option<RlTrainConfig>,
}

/// A value that is null counts as left out: all of its lines are comments.
pub(super) fn null_is_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl RlConfig {
    /// The file that is named inside the configs folder, else [`FILE_NAME`], else the defaults.
    ///
    /// # Errors
    /// A file that is not there, lies outside or is no such file; an unknown field, a value of another type or out
    /// of its range: the field, the file and the range.
    pub fn load(configs_dir: &Path, file: Option<&str>) -> Result<Self, FieldError> {
        const FIELD: &str = "rl_config_path";
        let name = file.unwrap_or(FILE_NAME);
        let typed = match named::read(configs_dir, FIELD, name)? {
            Some(text) => parse(&text).map_err(|error| named::unusable(FIELD, name, &error))?,
            None if file.is_some() => return Err(named::missing(FIELD, name)),
            None => Typed::default(),
        };
        resolve(typed).map_err(|error| FieldError {
            field: format!("{} in {name}", error.field),
            message: error.message,
        })
    }
}

impl Default for RlConfig {
    fn default() -> Self {
        resolve(Typed::default()).expect("the defaults are in their ranges, which a test holds")
    }
}

fn parse(text: &str) -> Result<Typed, serde_yaml::Error> {
    Ok(serde_yaml::from_str::<Option<Typed>>(text)?.unwrap_or_default())
}

fn resolve(typed: Typed) -> Result<RlConfig, FieldError> {
    let delivered = || parse(DELIVERED).expect("the delivered file can be read, which a test holds").prompts;
    let config = RlConfig {
        prompts: in_turns(typed.prompts.or_else(delivered).unwrap_or_default()),
        collect: typed.collect.unwrap_or_default(),
        rewards: typed.rewards.unwrap_or_default(),
        log: typed.log.unwrap_or_default(),
        sinks: typed.sinks.unwrap_or_default().with_default(typed.default_sink),
        train: typed.train.unwrap_or_default(),
    };
    check_prompts(&config.prompts)?;
    check_collect(&config.collect)?;
    config.rewards.check()?;
    config.log.max_file_bytes()?;
    config.sinks.check()?;
    config.train.check()?;
    Ok(config)
}

fn check_prompts(prompts: &[PromptConfig]) -> Result<(), FieldError> {
    let error = |field: String, message: String| Err(FieldError { field, message });
    if prompts.is_empty() {
        return error("prompts".into(), "is empty; name at least one, or leave the section out".into());
    }
    for (at, prompt) in prompts.iter().enumerate() {
        if prompt.prompt.trim().is_empty() {
            return error(
                format!("prompts[{at}].prompt"),
                "is empty; write a prompt or take the entry out".into(),
            );
        }
        if let Some(language) = &prompt.language
            && let Err(unknown) = language.parse::<Language>()
        {
            return error(format!("prompts[{at}].language"), format!("is not known: {unknown}"));
        }
    }
    Ok(())
}

fn check_collect(collect: &CollectConfig) -> Result<(), FieldError> {
    within("collect.max_episodes", collect.max_episodes, 1..=10_000_000)?;
    within("collect.group_size", collect.group_size, 1..=64)?;
    within("collect.max_in_flight", collect.max_in_flight, 0..=4096)?;
    within("collect.max_new_tokens", collect.max_new_tokens, 1..=1_000_000)?;
    within("collect.temperature", collect.temperature, 0.0..=100.0)?;
    within("collect.top_p", collect.top_p, (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(1.0)))?;
    within("collect.top_k", collect.top_k, 0..=1_000_000_000)?;
    let above_0 = (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(10.0));
    within("collect.repetition_penalty", collect.repetition_penalty, above_0)?;
    Ok(())
}

/// The prompts so that few episodes see many languages: the first of each language, then the second of each.
fn in_turns(prompts: Vec<PromptConfig>) -> Vec<PromptConfig> {
    let mut languages: Vec<Option<String>> = Vec::new();
    let mut numbered: Vec<(usize, usize, PromptConfig)> = Vec::new();
    let mut counts: Vec<usize> = Vec::new();
    for prompt in prompts {
        let place = languages.iter().position(|language| *language == prompt.language).unwrap_or_else(|| {
            languages.push(prompt.language.clone());
            counts.push(0);
            languages.len() - 1
        });
        numbered.push((counts[place], place, prompt));
        counts[place] += 1;
    }
    numbered.sort_by_key(|(turn, place, _)| (*turn, *place));
    numbered.into_iter().map(|(_, _, prompt)| prompt).collect()
}

#[cfg(test)]
#[path = "rl_tests.rs"]
mod tests;
