//! What an answer earns: parts from 0 to 1, each in a file of its own with its formula, and their weighted mean. All
//! but `http` are pure functions of the answers to one prompt.
//!
//! A new part is a file here, a variant of `Part`, and its settings in `config/rl_reward.rs`.

mod diversity;
mod http;
mod language;
mod length;
mod quality;
mod reference;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
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
    /// The service that judges answers could not be asked, or said what is no reward.
    #[error("the reward service failed: {0}")]
    Service(String),
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
    Http(Box<http::Service>),
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
        let mut add = |name, weight: f64, part: &dyn Fn() -> Result<Part, FieldError>| {
            if weight > 0.0 {
                parts.push(Weighted { name, weight, part: part()? });
            }
            Ok::<(), FieldError>(())
        };
        let RewardConfig { length, quality, diversity, language, chrf, exact_match, regex, http } = config;
        add("length", length.weight, &|| Ok(Part::Length(length::Band::new(length))))?;
        add("quality", quality.weight, &|| Ok(Part::Quality))?;
        add("diversity", diversity.weight, &|| Ok(Part::Diversity))?;
        let judge = || language::Judge { unreliable: language.unreliable };
        add("language", language.weight, &|| Ok(Part::Language(judge())))?;
        add("chrf", chrf.weight, &|| Ok(Part::Chrf))?;
        add("exact_match", exact_match.weight, &|| Ok(Part::ExactMatch))?;
        add("regex", regex.weight, &|| pattern(&regex.pattern).map(Part::Regex))?;
        add("http", http.weight, &|| http::Service::new(http).map(|service| Part::Http(Box::new(service))))?;
        Ok(Self { parts: Arc::new(parts) })
    }

    /// Rewards the answers to one prompt, which `diversity` compares; as many results as answers.
    pub async fn group(&self, group: &[Sample<'_>]) -> Vec<Result<Reward, RewardError>> {
        let mut earned: Vec<Result<Earned, RewardError>> =
            group.iter().map(|_| Ok(Earned::default())).collect();
        for Weighted { name, weight, part } in self.parts.iter() {
            for (earned, value) in earned.iter_mut().zip(part.of(group).await) {
                match value {
                    Ok(None) => {}
                    Ok(Some(value)) => {
                        if let Ok(earned) = earned {
                            earned.add(name, *weight, value);
                        }
                    }
                    // One part that cannot be had leaves no reward: a mean of the others would be another measure.
                    Err(error) => *earned = Err(error),
                }
            }
        }
        earned.into_iter().map(|earned| earned?.reward()).collect()
    }
}

/// Sums of one answer.
#[derive(Default)]
struct Earned {
    parts: BTreeMap<String, f64>,
    sum: f64,
    weights: f64,
}

impl Earned {
    fn add(&mut self, name: &str, weight: f64, value: f64) {
        self.parts.insert(name.to_owned(), value);
        self.sum += weight * value;
        self.weights += weight;
    }

    fn reward(self) -> Result<Reward, RewardError> {
        if self.parts.is_empty() {
            return Err(RewardError::NoPart);
        }
        // Rounding may leave the mean of ones a little above 1.
        Ok(Reward { total: (self.sum / self.weights).clamp(0.0, 1.0), parts: self.parts })
    }
}

fn pattern(text: &str) -> Result<Regex, FieldError> {
    Regex::new(text).map_err(|error| FieldError {
        field: "rewards.regex.pattern".into(),
        message: format!("is no pattern: {error}"),
    })
}

impl Part {
    /// The part of each answer of a group, 0 to 1; `None` where it does not apply.
    async fn of(&self, group: &[Sample<'_>]) -> Vec<Result<Option<f64>, RewardError>> {
        let each =
            |part: &dyn Fn(&Sample<'_>) -> Option<f64>| group.iter().map(|sample| Ok(part(sample))).collect();
        match self {
            Self::Length(band) => each(&|sample| Some(band.of(sample.output))),
            Self::Quality => each(&|sample| Some(quality::of(sample))),
            Self::Diversity => diversity::of(group).into_iter().map(|value| Ok(Some(value))).collect(),
            Self::Language(judge) => each(&|sample| Some(judge.of(sample.output, sample.language?))),
            Self::Chrf => each(&|sample| Some(reference::chrf(sample.output, sample.reference?))),
            Self::ExactMatch => {
                each(&|sample| Some(reference::exact_match(sample.output, sample.reference?)))
            }
            Self::Regex(pattern) => each(&|sample| Some(f64::from(pattern.is_match(sample.output)))),
            Self::Http(service) => {
                let asked: Vec<_> = group.iter().map(|sample| service.of(sample)).collect();
                let asked = join_all(asked).await;
                asked.into_iter().map(|reward| reward.map(Some)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests;
