//! What an answer earns: parts from 0 to 1, each in a file of its own with its formula, and their weighted mean. All
//! but `http` are pure functions of the answers to one prompt.
//!
//! A new part is a file here, a variant of [`Part`], and its settings in `config/rl_reward.rs`.

mod diversity;
mod language;
mod length;
mod quality;
mod reference;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;

use regex::Regex;

use crate::config::adapter::FieldError;
use crate::config::rl::RewardConfig;
use crate::text::Language;

/// An answer to be rewarded.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// The text that was gone on from.
    pub prompt: &'a str,
    /// The answer.
    pub output: &'a str,
    /// Language that is wanted.
    pub language: Option<Language>,
    /// A good answer.
    pub reference: Option<&'a str>,
    /// It ended by itself and was not cut.
    pub finished: bool,
}

/// What an answer earned.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// The mean of the parts, weighted; 0 to 1.
    pub total: f64,
    /// The parts that apply, each 0 to 1.
    pub parts: BTreeMap<String, f64>,
}

/// Why an answer has no reward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RewardError {
    /// No part applies to the answer.
    #[error(
        "no part of the reward applies: the answer has no language and no reference, and rl_config.yaml gives no other \
         part a weight"
    )]
    NoPart,
}

/// What a part does.
enum Part {
    Length(length::Band),
    Quality,
    Diversity,
    Language(language::Judge),
    Chrf,
    ExactMatch,
    Regex(Regex),
}

/// A part, and how much it counts.
struct Weighted {
    name: &'static str,
    weight: f64,
    part: Part,
}

/// Rewards answers. A cheap clone.
#[derive(Clone)]
pub struct Rewarder {
    parts: Arc<Vec<Weighted>>,
}

impl Rewarder {
    /// With the parts that have a weight.
    ///
    /// # Errors
    /// As [`RewardConfig::check`].
    pub fn new(config: &RewardConfig) -> Result<Self, FieldError> {
        config.check()?;
        let mut parts = Vec::new();
        for (name, weight) in config.weights() {
            if weight > 0.0 {
                parts.push(Weighted { name, weight, part: Part::new(name, config)? });
            }
        }
        Ok(Self { parts: Arc::new(parts) })
    }

    /// Rewards the answers to one prompt, which `diversity` compares; as many results as answers.
    pub async fn group(&self, group: &[Sample<'_>]) -> Vec<Result<Reward, RewardError>> {
        let mut rewards: Vec<BTreeMap<String, f64>> = vec![BTreeMap::new(); group.len()];
        let mut sums = vec![(0.0, 0.0); group.len()];
        for Weighted { name, weight, part } in self.parts.iter() {
            for ((value, parts), sum) in part.of(group).into_iter().zip(&mut rewards).zip(&mut sums) {
                let Some(value) = value else { continue };
                parts.insert((*name).to_owned(), value);
                *sum = (sum.0 + weight * value, sum.1 + weight);
            }
        }
        let total = |(parts, (sum, weights)): (BTreeMap<String, f64>, (f64, f64))| match parts.is_empty() {
            true => Err(RewardError::NoPart),
            // Rounding may leave the mean of ones a little above 1.
            false => Ok(Reward { total: (sum / weights).clamp(0.0, 1.0), parts }),
        };
        rewards.into_iter().zip(sums).map(total).collect()
    }
}

impl Part {
    fn new(name: &str, config: &RewardConfig) -> Result<Self, FieldError> {
        Ok(match name {
            "length" => Self::Length(length::Band::new(&config.length)),
            "quality" => Self::Quality,
            "diversity" => Self::Diversity,
            "language" => Self::Language(language::Judge { unreliable: config.language.unreliable }),
            "chrf" => Self::Chrf,
            "exact_match" => Self::ExactMatch,
            "regex" => Self::Regex(Regex::new(&config.regex.pattern).map_err(|error| FieldError {
                field: "rewards.regex.pattern".into(),
                message: format!("is no pattern: {error}"),
            })?),
            _ => unreachable!("RewardConfig::weights names the parts that are here"),
        })
    }

    /// The part of each answer of a group, 0 to 1; `None` where it does not apply.
    fn of(&self, group: &[Sample<'_>]) -> Vec<Option<f64>> {
        let each = |part: &dyn Fn(&Sample<'_>) -> Option<f64>| group.iter().map(part).collect();
        match self {
            Self::Length(band) => each(&|sample| Some(band.of(sample.output))),
            Self::Quality => each(&|sample| Some(quality::of(sample))),
            Self::Diversity => diversity::of(group).into_iter().map(Some).collect(),
            Self::Language(judge) => each(&|sample| Some(judge.of(sample.output, sample.language?))),
            Self::Chrf => each(&|sample| Some(reference::chrf(sample.output, sample.reference?))),
            Self::ExactMatch => {
                each(&|sample| Some(reference::exact_match(sample.output, sample.reference?)))
            }
            Self::Regex(pattern) => each(&|sample| Some(f64::from(pattern.is_match(sample.output)))),
        }
    }
}

#[cfg(test)]
mod tests;
