//! Logged episodes as something to learn from: which of a run's can be used for a loss, and what they become. Reads
//! the log; touches no engine.

use std::collections::HashMap;

use super::advantages::of_group;
use super::episode::Episode;
use super::grpo::sequence;
use super::learn::{RlContext, RlJob};
use super::log;
use crate::config::adapter::FieldError;
use crate::config::rl::{Loss, RlTrainConfig};
use crate::engine::training::TrainSequence;
use crate::train::TrainError;
use crate::train::evaluation::Pairs;

/// What is learnt from together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Unit {
    /// One, or a better and a worse one.
    pub(super) sequences: Vec<TrainSequence>,
    /// What each earned.
    pub(super) rewards: Vec<f64>,
}

/// What a run is made into.
#[derive(Debug)]
pub(super) struct Examples {
    pub(super) units: Vec<Unit>,
    /// Episodes that were read.
    pub(super) episodes: u64,
    /// Those that cannot be used, by the reason.
    refused: Vec<(&'static str, u64)>,
    /// Those that tell nothing: no other answer to the prompt, or one that earned the same.
    silent: u64,
    loss: Loss,
}

/// An episode that can be used.
struct Usable {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    logprobs: Vec<f32>,
    reward: f64,
}

impl Examples {
    /// Reads the run of a job: its first `most` episodes, or with 0 as many as the settings allow.
    ///
    /// # Errors
    /// A log that cannot be read; no episode that can be learnt from, with the reasons and the remedy.
    pub(super) fn read(context: &RlContext, job: &RlJob, most: u64) -> Result<Self, TrainError> {
        let config = &job.config;
        let run = job.run_id.as_deref().unwrap_or_default();
        let io = |source| TrainError::Io { what: format!("the run {run} cannot be read"), source };
        let most = if most > 0 { most } else { config.max_episodes as u64 };
        let pairs =
            Pairs::new(context.training.tokenizer.clone(), &context.training.engine.info().eos_token_ids);
        let mut refused: HashMap<&'static str, u64> = HashMap::new();
        let (mut usable, mut episodes) = (Vec::new(), 0);
        for episode in log::episodes(context.log.dir(), run)
            .map_err(io)?
            .take(usize::try_from(most).unwrap_or(usize::MAX))
        {
            let episode = episode.map_err(|error| TrainError::Failed(format!("the run {run}: {error}")))?;
            episodes += 1;
            match of_episode(episode, config, &context.training.model_id, &pairs) {
                Ok(episode) => usable.push(episode),
                Err(reason) => *refused.entry(reason).or_default() += 1,
            }
        }
        let mut refused: Vec<_> = refused.into_iter().collect();
        refused.sort_by_key(|(reason, count)| (std::cmp::Reverse(*count), *reason));
        let (units, silent) = match config.loss {
            Loss::ImportanceSampling | Loss::PpoClip => by_advantage(usable, config),
            Loss::Rft => (best(usable, config), 0),
            Loss::Dpo => by_preference(usable, config),
        };
        let examples = Self { units, episodes, refused, silent, loss: config.loss };
        if examples.units.is_empty() {
            return Err(FieldError { field: "run_id".into(), message: examples.nothing(run) }.into());
        }
        Ok(examples)
    }

    /// What became of the episodes, for a person.
    pub(super) fn summary(&self) -> String {
        let what = if self.loss == Loss::Dpo { "pairs" } else { "examples" };
        let refused: String = self.refused.iter().map(|(why, count)| format!("; {count} {why}")).collect();
        format!(
            "{} episodes: {} {what} to learn from, {} that tell nothing beside the others{refused}",
            self.episodes,
            self.units.len(),
            self.silent
        )
    }

    /// Why there is nothing to learn from, to be read after the field.
    fn nothing(&self, run: &str) -> String {
        if self.episodes == 0 {
            return format!("is {run:?}, which has no episode; collect some first");
        }
        let remedy = match self.loss {
            Loss::ImportanceSampling | Loss::PpoClip => {
                "collect with logprobs, several episodes a prompt, temperature 1, top_p 1, top_k 0 and \
                 repetition_penalty 1; or use the loss rft or dpo"
            }
            Loss::Rft => "lower rft_threshold or raise rft_top_share",
            Loss::Dpo => "collect several episodes a prompt, or lower dpo_margin",
        };
        format!(
            "is {run:?}, in which nothing can be learnt from by {}: {}; {remedy}",
            self.loss.name(),
            self.summary()
        )
    }
}

/// An episode's tokens and reward, where the loss can use it; else the reason, to be read after a count.
fn of_episode(
    episode: Episode,
    config: &RlTrainConfig,
    model: &str,
    pairs: &Pairs,
) -> Result<Usable, &'static str> {
    let meta = episode.meta;
    let reward = episode.reward.filter(|reward| reward.is_finite()).ok_or("without a reward")?;
    let of_model = meta.base_model.as_deref().is_none_or(|base| base == model);
    let tokens = meta.prompt_token_ids.zip(meta.token_ids).filter(|_| of_model);
    let policy = config.loss.is_policy_gradient();
    if policy && !of_model {
        return Err("of another base model");
    }
    let mut logprobs = Vec::new();
    if policy {
        logprobs = meta.logprobs.ok_or("without log-probabilities")?;
        let sampling = meta.sampling.ok_or("without the settings that they were sampled with")?;
        let whole = sampling.top_p >= 1.0 && sampling.top_k == 0 && sampling.repetition_penalty == 1.0;
        if sampling.temperature != 1.0 || !whole {
            return Err(
                "sampled at a temperature other than 1, or from a distribution that was cut or penalised",
            );
        }
    }
    let (prompt, answer) = match tokens {
        Some(tokens) => tokens,
        None if policy => return Err("without token ids"),
        // What a client brought, or another model sampled: the text is learnt from.
        None => {
            let sample = pairs
                .sample(&episode.prompt, &episode.output)
                .map_err(|_| "with a text that has no tokens")?;
            let first = sample.weights.iter().position(|&w| w != 0.0).unwrap_or(sample.tokens.len());
            (sample.tokens[..first].to_vec(), sample.tokens[first..].to_vec())
        }
    };
    if policy && (logprobs.len() != answer.len() || logprobs.iter().any(|l| !l.is_finite())) {
        return Err("with damaged log-probabilities");
    }
    if prompt.is_empty() || answer.is_empty() {
        return Err("without tokens");
    }
    if prompt.len() + answer.len() > config.max_seq_length {
        return Err("longer than max_seq_length");
    }
    Ok(Usable { prompt, answer, logprobs, reward })
}

impl Usable {
    fn supervised(&self) -> TrainSequence {
        let weights = [vec![0.0; self.prompt.len()], vec![1.0; self.answer.len()]].concat();
        TrainSequence::new([self.prompt.as_slice(), &self.answer].concat(), weights)
    }
}

/// Episodes by their prompts, in the order in which prompts first came.
fn groups(usable: Vec<Usable>) -> Vec<Vec<Usable>> {
    let mut places: HashMap<Vec<u32>, usize> = HashMap::new();
    let mut groups: Vec<Vec<Usable>> = Vec::new();
    for episode in usable {
        let place = *places.entry(episode.prompt.clone()).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[place].push(episode);
    }
    groups
}

fn by_advantage(usable: Vec<Usable>, config: &RlTrainConfig) -> (Vec<Unit>, u64) {
    let (mut units, mut silent) = (Vec::new(), 0);
    for group in groups(usable) {
        let rewards: Vec<f64> = group.iter().map(|episode| episode.reward).collect();
        let Some(advantages) = of_group(&rewards, config.unbiased) else {
            silent += group.len() as u64;
            continue;
        };
        units.extend(group.iter().zip(advantages).map(|(of, advantage)| Unit {
            sequences: vec![sequence(&of.prompt, &of.answer, &of.logprobs, advantage, config)],
            rewards: vec![of.reward],
        }));
    }
    (units, silent)
}

/// The best share of all, as far as it reaches the threshold.
fn best(mut usable: Vec<Usable>, config: &RlTrainConfig) -> Vec<Unit> {
    let kept = (usable.len() as f64 * config.rft_top_share).ceil() as usize;
    // Stable: of equals the earlier ones.
    usable.sort_by(|a, b| b.reward.total_cmp(&a.reward));
    usable
        .iter()
        .take(kept)
        .filter(|of| config.rft_threshold.is_none_or(|threshold| of.reward >= threshold))
        .map(|of| Unit { sequences: vec![of.supervised()], rewards: vec![of.reward] })
        .collect()
}

/// The best answer to a prompt with the worst one, the second with the second last, as long as they are far apart.
fn by_preference(usable: Vec<Usable>, config: &RlTrainConfig) -> (Vec<Unit>, u64) {
    let (mut units, mut silent) = (Vec::new(), 0);
    for mut group in groups(usable) {
        group.sort_by(|a, b| b.reward.total_cmp(&a.reward));
        let count = group.len();
        let apart = |at: &usize| group[*at].reward - group[count - 1 - at].reward >= config.dpo_margin;
        let pairs = (0..count / 2).take_while(apart).count();
        silent += (count - 2 * pairs) as u64;
        units.extend((0..pairs).map(|at| {
            let (better, worse) = (&group[at], &group[count - 1 - at]);
            Unit {
                sequences: vec![better.supervised(), worse.supervised()],
                rewards: vec![better.reward, worse.reward],
            }
        }));
    }
    (units, silent)
}
