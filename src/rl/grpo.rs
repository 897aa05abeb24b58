//! Learning online: group relative policy optimisation (GRPO, Shao et al. 2024). The adapter answers each prompt
//! several times, what the answers earn is compared within the group, a gradient step follows, and the new weights
//! are served before the next answers, all in one process. One function from the first step to the last.

use super::advantages::{of_group, spread, token_weight};
use super::collect::{new_episode, rewarded};
use super::episode::{Episode, EpisodeMeta, EpisodeSource, SamplingMeta};
use super::learn::{Of, RlFigures, Run};
use super::rollout::{Answer, Group, Settings, rollouts};
use crate::config::rl::{Loss, RlTrainConfig};
use crate::engine::AdapterHandle;
use crate::engine::training::TrainSequence;
use crate::nn::loss::{PolicyToken, TokenLoss};
use crate::nn::mix64;
use crate::train::job::{Pace, due};
use crate::train::{Ending, Stop, TrainError};

/// A ratio may be so far from 1 before the first update: what sampled and what learns are the same weights.
pub(super) const RATIO_ERROR: f64 = 1e-3;

/// Steps in a row without a signal after which the log says what to do about it.
const SILENT: u64 = 5;

/// Runs the job to its end.
///
/// # Errors
/// The prompts, the engine, the disk; answers that get no reward; numbers that are not finite.
pub(super) async fn run(mut run: Run<'_>) -> Result<Ending, TrainError> {
    let job = run.job;
    let (config, engine) = (&job.config, &run.context.training.engine);
    let loss = token_loss(config);
    let prompts = run.prompts().await?;
    let (mut pace, mut silent, mut served) = (Pace::new(), 0, None);
    // Each turn begins between two steps: what is due there first, then one step.
    loop {
        let step = run.state.progress.step;
        let adapter = match served.take() {
            Some(adapter) => adapter,
            None => run.serve().await?,
        };
        if step == 0 || due(config.eval_steps, step) || step >= config.steps {
            run.evaluate(&prompts, &adapter).await?;
        }
        if run.save_is_due() {
            run.save().await?;
        }
        if run.stopping() != Stop::No {
            return run.stopped().await;
        }
        if step >= config.steps {
            return run.complete().await;
        }
        pace.begin();
        let settings = Settings {
            temperature: config.temperature as f32,
            max_new_tokens: config.max_new_tokens,
            group_size: config.group_size,
            max_in_flight: config.max_in_flight,
            // By the step, so that a job that goes on samples what it would have sampled.
            seed: mix64(config.seed ^ mix64(step + 1)),
        };
        let of_step = prompts.of_step(step, config.prompts_per_step, config.seed);
        let groups = tokio::select! {
            groups = rollouts(engine, Some(&adapter), &of_step, settings, &run.rewarder) => groups?,
            () = run.asked() => continue,
        };
        run.log_episodes(&groups, &adapter, settings).await?;
        let mut figures = earned(&groups, &run.memory.figures);
        run.check_rewards(&groups, &mut figures)?;
        let mut batch = learnable(&groups, config, &mut figures);

        run.compare_with_base(&mut batch).await?;
        let mut clipped = (0, 0);
        let updates = if batch.is_empty() { 0 } else { config.updates_per_batch };
        for update in 0..updates {
            let found = run.passes(&batch, loss, Some(1.0), Of::Learning).await?;
            let policy = &found.policy;
            if update == 0 {
                figures.entropy = Some(policy.mean(policy.entropy_sum));
                figures.kl = (config.kl_beta > 0.0).then(|| policy.mean(policy.kl_sum));
                figures.ratio_mean = Some(policy.mean(policy.ratio_sum));
                figures.ratio_error = Some(policy.ratio_error());
            }
            clipped = (clipped.0 + policy.clipped, clipped.1 + policy.tokens);
            let number = step * config.updates_per_batch + update;
            let all = config.steps * config.updates_per_batch;
            run.step(found.loss_sum / batch.len() as f64, number, all).await?;
        }
        figures.clip_share = (clipped.1 > 0).then(|| clipped.0 as f64 / clipped.1 as f64);

        let tokens = |answer: &Answer| answer.tokens.len() as u64;
        let sampled: u64 = groups.iter().flat_map(|group| &group.answers).map(tokens).sum();
        let progress = &mut run.state.progress;
        progress.step += 1;
        progress.total_steps = config.steps;
        progress.epoch = progress.step as f64 * config.prompts_per_step as f64 / prompts.train.len() as f64;
        progress.samples += groups.iter().map(|group| group.answers.len() as u64).sum::<u64>();
        progress.tokens += sampled;
        pace.end(sampled, progress);
        run.memory.figures = figures;
        run.tell();
        run.log_step(updates);
        silent = if updates == 0 { silent + 1 } else { 0 };
        // Without an update the weights are as they were.
        served = (updates == 0).then_some(adapter);
        if silent == SILENT {
            run.reporter.warn(format!(
                "in {SILENT} steps in a row all answers to a prompt earned the same, so there is nothing to learn from; \
                 raise temperature or group_size, or choose prompts and rewards that tell answers apart"
            ));
        }
    }
}

impl Run<'_> {
    /// Puts the answers into the log of episodes, where the settings name a run for them. A step that is done again
    /// after a crash logs its answers again, under other ids.
    async fn log_episodes(
        &self,
        groups: &[Group<'_>],
        adapter: &AdapterHandle,
        settings: Settings,
    ) -> Result<(), TrainError> {
        let config = &self.job.config;
        if config.log_run_id.is_empty() {
            return Ok(());
        }
        let mut episodes = Vec::new();
        for (place, group) in groups.iter().enumerate() {
            for (number, (answer, reward)) in group.answers.iter().zip(&group.rewards).enumerate() {
                let meta = EpisodeMeta {
                    language: group.prompt.language.map(|language| language.code().to_owned()),
                    base_model: Some(self.context.training.model_id.clone()),
                    adapter: Some(adapter.name.clone()),
                    adapter_generation: Some(adapter.generation),
                    reference: group.prompt.reference.clone(),
                    finish_reason: Some(answer.reason.as_str().to_owned()),
                    prompt_token_ids: Some(group.prompt.tokens.clone()),
                    token_ids: Some(answer.tokens.clone()),
                    logprobs: Some(answer.logprobs.clone()),
                    sampling: Some(SamplingMeta {
                        temperature: config.temperature,
                        top_p: 1.0,
                        top_k: 0,
                        repetition_penalty: 1.0,
                        max_new_tokens: config.max_new_tokens as u64,
                        seed: settings.seed_of(place, number),
                    }),
                    ..EpisodeMeta::new(EpisodeSource::Generated)
                };
                let id = uuid::Uuid::now_v7().to_string();
                let mut episode = Episode {
                    latency_s: Some(answer.seconds),
                    ..new_episode(id, "rl-train", &group.prompt.text, &answer.text, meta)
                };
                rewarded(&mut episode, reward.clone());
                episodes.push(episode);
            }
        }
        let appended = self.context.log.append(&config.log_run_id, episodes).await;
        appended.map(|_| ()).map_err(|error| TrainError::Failed(error.to_string()))
    }

    /// Counts rewards that could not be had, and tells the first reason.
    ///
    /// # Errors
    /// More than half of the step's could not.
    fn check_rewards(&self, groups: &[Group<'_>], figures: &mut RlFigures) -> Result<(), TrainError> {
        let all: Vec<_> = groups.iter().flat_map(|group| &group.rewards).collect();
        let mut failed = all.iter().filter_map(|reward| reward.as_ref().err());
        let Some(first) = failed.next() else { return Ok(()) };
        let count = 1 + failed.count();
        figures.failed_rewards += count as u64;
        let step = self.state.progress.step + 1;
        let line = format!("step {step}: {count} of {} answers have no reward: {first}", all.len());
        if 2 * count > all.len() {
            return Err(TrainError::Failed(line));
        }
        self.reporter.warn(line);
        Ok(())
    }

    fn log_step(&self, updates: u64) {
        let (progress, figures) = (&self.state.progress, &self.memory.figures);
        if let Some(error) = figures.ratio_error.filter(|error| *error > RATIO_ERROR) {
            self.reporter.warn(format!(
                "step {}: before the first update an importance ratio is {error:.1e} away from 1, more than \
                 {RATIO_ERROR:.0e}: what samples and what learns differ in their arithmetic; serve the model in f32 and \
                 not quantized",
                progress.step
            ));
        }
        if !due(self.job.config.logging_steps, progress.step) && progress.step != 1 {
            return;
        }
        let number = |value: Option<f64>| value.map_or("none".to_owned(), |value| format!("{value:.4}"));
        let parts: Vec<String> =
            figures.rewards.iter().map(|(name, mean)| format!("{name} {mean:.3}")).collect();
        let learnt = match updates {
            0 => "nothing learnt, no group has a signal".to_owned(),
            _ => format!(
                "loss {:.4}, gradient norm {:.3}, entropy {}, KL {}, clipped {}, ratio error {}",
                progress.loss,
                progress.grad_norm,
                number(figures.entropy),
                number(figures.kl),
                number(figures.clip_share),
                figures.ratio_error.map_or("none".to_owned(), |error| format!("{error:.1e}")),
            ),
        };
        self.reporter.log(format!(
            "step {}/{}: reward {} (spread {}; {}), {learnt}; {} tokens an answer, {} finished, {} of the groups \
             without signal, {:.0} tokens/s",
            progress.step,
            progress.total_steps,
            number(figures.reward),
            number(figures.reward_std),
            parts.join(", "),
            number(figures.answer_tokens),
            number(figures.finished_share),
            number(figures.no_signal_share),
            progress.tokens_per_s,
        ));
    }
}

/// The loss that the settings name.
pub(super) fn token_loss(config: &RlTrainConfig) -> TokenLoss {
    let kl = config.kl_beta as f32;
    match config.loss {
        Loss::ImportanceSampling => TokenLoss::ImportanceSampling { kl },
        Loss::PpoClip => {
            TokenLoss::PpoClip { low: config.clip_low as f32, high: config.clip_high as f32, kl }
        }
        Loss::Rft | Loss::Dpo => TokenLoss::CrossEntropy,
    }
}

/// What the answers of a step came to; what is measured otherwise stays as it was `before`.
fn earned(groups: &[Group<'_>], before: &RlFigures) -> RlFigures {
    let mut figures = RlFigures {
        eval_reward: before.eval_reward,
        failed_rewards: before.failed_rewards,
        ..RlFigures::default()
    };
    let mut totals = Vec::new();
    let mut parts: std::collections::BTreeMap<String, (f64, f64)> = std::collections::BTreeMap::new();
    for reward in groups.iter().flat_map(|group| &group.rewards).flatten() {
        totals.push(reward.total);
        for (name, value) in &reward.parts {
            let sum = parts.entry(name.clone()).or_default();
            *sum = (sum.0 + value, sum.1 + 1.0);
        }
    }
    let mean =
        |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
    figures.reward = mean(&totals);
    figures.reward_std = figures.reward.map(|_| spread(&totals));
    figures.rewards = parts.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect();
    let answers = || groups.iter().flat_map(|group| &group.answers);
    figures.answer_tokens = mean(&answers().map(|answer| answer.tokens.len() as f64).collect::<Vec<_>>());
    figures.finished_share =
        mean(&answers().map(|answer| f64::from(u8::from(answer.finished()))).collect::<Vec<_>>());
    figures
}

/// The answers that something can be learnt from, with their advantages.
fn learnable(groups: &[Group<'_>], config: &RlTrainConfig, figures: &mut RlFigures) -> Vec<TrainSequence> {
    let (mut batch, mut silent) = (Vec::new(), 0);
    for group in groups {
        let rewarded: Vec<(&Answer, f64)> = group
            .answers
            .iter()
            .zip(&group.rewards)
            .filter_map(|(answer, reward)| Some((answer, reward.as_ref().ok()?.total)))
            .collect();
        let rewards: Vec<f64> = rewarded.iter().map(|(_, reward)| *reward).collect();
        let Some(advantages) = of_group(&rewards, config.unbiased) else {
            silent += 1;
            continue;
        };
        for ((answer, _), advantage) in rewarded.into_iter().zip(advantages) {
            batch.push(sequence(&group.prompt.tokens, &answer.tokens, &answer.sampled, advantage, config));
        }
    }
    figures.no_signal_share = Some(f64::from(silent) / groups.len().max(1) as f64);
    batch
}

/// A prompt and an answer with what the loss compares each of the answer's tokens with.
pub(super) fn sequence(
    prompt: &[u32],
    answer: &[u32],
    sampled: &[f32],
    advantage: f64,
    config: &RlTrainConfig,
) -> TrainSequence {
    let weight = token_weight(answer.len(), config.max_new_tokens, config.unbiased);
    let token = |&old: &f32| PolicyToken { old, advantage: advantage as f32, reference: 0.0 };
    TrainSequence {
        tokens: [prompt, answer].concat(),
        weights: [vec![0.0; prompt.len()], vec![weight; answer.len()]].concat(),
        policy: [vec![PolicyToken::default(); prompt.len()], sampled.iter().map(token).collect()].concat(),
    }
}
