//! Learning offline: the same losses over episodes that were logged before, the best of them as examples (`rft`), or
//! pairs of them (`dpo`). One function from the first step to the last.

use super::advantages::spread;
use super::episodes::{Examples, Unit};
use super::grpo::token_loss;
use super::learn::{Of, RlFigures, Run};
use super::prompts::order;
use crate::config::rl::Loss;
use crate::engine::training::TrainSequence;
use crate::nn::loss::TokenLoss;
use crate::nn::policy::dpo;
use crate::train::job::{Pace, blocking, due};
use crate::train::{Ending, Stop, TrainError};

/// Runs the job to its end.
///
/// # Errors
/// Episodes that cannot be learnt from; the engine, the disk; numbers that are not finite.
pub(super) async fn run(mut run: Run<'_>) -> Result<Ending, TrainError> {
    let job = run.job;
    let config = &job.config;
    let examples = {
        let (context, job, most) = (run.context.clone(), job.clone(), run.memory.episodes);
        blocking(move || Examples::read(&context, &job, most)).await?
    };
    run.memory.episodes = examples.episodes;
    run.reporter.log(examples.summary());
    let prompts = run.prompts().await?;
    let count = examples.units.len();
    let of_epoch = count.div_ceil(config.batch_size) as u64;
    let total = of_epoch * config.epochs;
    let mut pace = Pace::new();
    // Each turn begins between two steps: what is due there first, then one step.
    loop {
        let step = run.state.progress.step;
        let measured = step == 0 || due(config.eval_steps, step) || step >= total;
        if measured && !prompts.held_out.is_empty() {
            let adapter = run.serve().await?;
            run.evaluate(&prompts, &adapter).await?;
        }
        if run.save_is_due() {
            run.save().await?;
        }
        if run.stopping() != Stop::No {
            return run.stopped().await;
        }
        if step >= total {
            return run.complete().await;
        }
        pace.begin();
        let order = order(count, config.seed, step / of_epoch);
        let first = (step % of_epoch) as usize * config.batch_size;
        let units: Vec<&Unit> =
            order[first..].iter().take(config.batch_size).map(|&at| &examples.units[at]).collect();
        let rewards: Vec<f64> = units.iter().flat_map(|unit| unit.rewards.iter().copied()).collect();
        let mut figures = RlFigures {
            reward: Some(rewards.iter().sum::<f64>() / rewards.len() as f64),
            reward_std: Some(spread(&rewards)),
            eval_reward: run.memory.figures.eval_reward,
            ..RlFigures::default()
        };
        let batch: Vec<TrainSequence> =
            units.iter().flat_map(|unit| unit.sequences.iter().cloned()).collect();
        let (loss, tokens) = match config.loss {
            Loss::ImportanceSampling | Loss::PpoClip => run.by_policy(batch, &mut figures).await?,
            Loss::Rft => {
                let weights: f64 = batch.iter().flat_map(|s| &s.weights).map(|&w| f64::from(w)).sum();
                let found = run.passes(&batch, TokenLoss::CrossEntropy, None, Of::Learning).await?;
                (found.loss_sum / weights, found.tokens)
            }
            Loss::Dpo => run.by_preference(batch, &mut figures).await?,
        };
        run.step(loss, step, total).await?;

        let progress = &mut run.state.progress;
        progress.step += 1;
        progress.total_steps = total;
        progress.epoch = progress.step as f64 / of_epoch as f64;
        progress.samples += rewards.len() as u64;
        progress.tokens += tokens;
        pace.end(tokens, progress);
        run.memory.figures = figures;
        run.tell();
        let (progress, figures) = (&run.state.progress, &run.memory.figures);
        if due(config.logging_steps, progress.step) {
            let told = [
                ("clipped", figures.clip_share),
                ("KL", figures.kl),
                ("entropy", figures.entropy),
                ("farthest ratio", figures.ratio_error),
                ("preferences met", figures.preference_accuracy),
            ];
            let told = told.iter().filter_map(|(name, value)| Some(format!(", {name} {:.4}", (*value)?)));
            run.reporter.log(format!(
                "step {}/{total}: loss {loss:.4}{}, gradient norm {:.3}, {:.0} tokens/s",
                progress.step,
                told.collect::<String>(),
                progress.grad_norm,
                progress.tokens_per_s
            ));
        }
    }
}

impl Run<'_> {
    /// The gradient of a policy's loss; gives the loss an episode and the tokens.
    async fn by_policy(
        &self,
        mut batch: Vec<TrainSequence>,
        figures: &mut RlFigures,
    ) -> Result<(f64, u64), TrainError> {
        let config = &self.job.config;
        self.compare_with_base(&mut batch).await?;
        let found = self.passes(&batch, token_loss(config), Some(1.0), Of::Learning).await?;
        let policy = &found.policy;
        figures.entropy = Some(policy.mean(policy.entropy_sum));
        figures.kl = (config.kl_beta > 0.0).then(|| policy.mean(policy.kl_sum));
        figures.ratio_mean = Some(policy.mean(policy.ratio_sum));
        figures.ratio_error = Some(policy.ratio_error());
        figures.clip_share = Some(policy.mean(policy.clipped as f64));
        Ok((found.loss_sum / batch.len() as f64, found.tokens))
    }

    /// The gradient of preferences. The loss of a pair is no function of one token's log-probability, so a first pass
    /// without a gradient gets the sums that the weight of the pair's tokens follows from.
    async fn by_preference(
        &self,
        mut batch: Vec<TrainSequence>,
        figures: &mut RlFigures,
    ) -> Result<(f64, u64), TrainError> {
        let pairs = batch.len() / 2;
        let sums = |logprobs: Vec<Vec<f32>>| -> Vec<f64> {
            logprobs.iter().map(|of| of.iter().map(|&l| f64::from(l)).sum()).collect()
        };
        let policy = sums(self.passes(&batch, TokenLoss::CrossEntropy, None, Of::Policy).await?.logprobs);
        let base = sums(self.passes(&batch, TokenLoss::CrossEntropy, None, Of::Base).await?.logprobs);
        let (mut loss_sum, mut met) = (0.0, 0);
        for pair in 0..pairs {
            let (better, worse) = (2 * pair, 2 * pair + 1);
            let beta = self.job.config.dpo_beta;
            let (loss, weight) = dpo(beta, (policy[better], base[better]), (policy[worse], base[worse]));
            loss_sum += loss;
            met += u32::from(policy[better] - base[better] > policy[worse] - base[worse]);
            // A pair that is far apart has next to no weight, but its tokens stay supervised.
            let weight = (weight as f32).max(f32::MIN_POSITIVE);
            for (sequence, sign) in [(better, 1.0), (worse, -1.0)] {
                batch[sequence].weights.iter_mut().for_each(|w| *w *= sign * weight);
            }
        }
        // Two sequences make a pair.
        let found = self.passes(&batch, TokenLoss::CrossEntropy, Some(0.5), Of::Learning).await?;
        figures.preference_accuracy = Some(f64::from(met) / pairs as f64);
        Ok((loss_sum / pairs as f64, found.tokens))
    }
}
