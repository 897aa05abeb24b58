//! Jobs that learn from rewards: what one is, what it tells, and what both recipes do alike: a trainer from a
//! checkpoint, an adapter or nothing; checkpoints; the end. The recipes are `grpo` (online) and `offline`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::episodes::Examples;
use super::log::EpisodeLog;
pub use super::prompts::PromptSource;
use super::prompts::Prompts;
use super::reward::Rewarder;
use super::rollout::{Settings, rollouts};
use super::start::{spec, start};
use super::{grpo, offline};
use crate::adapters::{AdapterError, TrainedAdapter, check_name};
use crate::config::rl::{PromptConfig, RewardConfig, RlTrainConfig};
use crate::engine::training::{
    PassReport, StepParameters, TrainBatch, TrainSequence, TrainerSnapshot, TrainingPlan,
};
use crate::engine::{AdapterHandle, Trainer};
use crate::nn::loss::TokenLoss;
use crate::nn::policy::PolicyFigures;
use crate::train::checkpoint::{Checkpoint, Checkpoints, State};
use crate::train::dataset::pack_places;
use crate::train::job::{DIVERGED, blocking, due, plan_line, weights_of};
use crate::train::schedule::Schedule;
use crate::train::{Context, Ending, Progress, Stop, TrainError};

/// Where a job's episodes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Sampled by the adapter that learns, step by step.
    Online,
    /// Logged before.
    Offline,
}

/// One job, resolved: what it does depends on this, what it reads and the base weights alone. It is kept as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RlJob {
    /// Name of the adapter that it makes.
    pub adapter_name: String,
    /// Where its episodes come from.
    pub mode: Mode,
    /// Adapter to go on from; a new one without.
    pub start_from: Option<String>,
    /// Name of the prompts' source or of the run, for a person.
    pub source_name: String,
    /// What is answered: to learn from (online), or to measure with (offline). May be empty offline.
    pub prompts: PromptSource,
    /// `offline`: the run whose episodes are learnt from.
    pub run_id: Option<String>,
    /// Every setting.
    pub config: RlTrainConfig,
    /// What answers earn.
    pub rewards: RewardConfig,
}

/// Where a job stands: what every training tells, and what rewards are about.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RlProgress {
    /// As for any job; `samples` are episodes, `tokens` those that were sampled or learnt from.
    #[serde(flatten)]
    pub progress: Progress,
    /// The rest.
    #[serde(flatten)]
    pub figures: RlFigures,
}

/// Figures of the latest step; null before they are there, and where they have no meaning.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct RlFigures {
    /// Mean reward of the step's answers.
    pub reward: Option<f64>,
    /// Mean of each part of the reward.
    pub rewards: BTreeMap<String, f64>,
    /// Standard deviation of the rewards, over all answers of the step.
    pub reward_std: Option<f64>,
    /// Mean reward of the held-out prompts' greedy answers, at the latest evaluation.
    pub eval_reward: Option<f64>,
    /// Answers without a reward, because it could not be had.
    pub failed_rewards: u64,
    /// Share of the groups whose answers all earned the same, so that nothing was learnt from them.
    pub no_signal_share: Option<f64>,
    /// KL divergence from the base model a token (k3), where there is a penalty for it.
    pub kl: Option<f64>,
    /// Share of the tokens that the bounds kept from changing anything, over all updates of the step.
    pub clip_share: Option<f64>,
    /// Mean entropy of the policy at a token, in nats.
    pub entropy: Option<f64>,
    /// Mean importance ratio before the step's first update.
    pub ratio_mean: Option<f64>,
    /// How far the ratio that was farthest from 1 was away from it, before the step's first update.
    pub ratio_error: Option<f64>,
    /// Mean tokens of an answer.
    pub answer_tokens: Option<f64>,
    /// Share of the answers that ended by themselves.
    pub finished_share: Option<f64>,
    /// `dpo`: share of the pairs that the policy orders as the rewards do, more than the base does.
    pub preference_accuracy: Option<f64>,
}

/// Where a job tells what it does. Called from the job's task; must not block.
pub trait RlReporter: Send + Sync {
    /// A line for the job's log.
    fn log(&self, line: String);
    /// Something that is not as it should be.
    fn warn(&self, line: String);
    /// The latest figures.
    fn progress(&self, progress: &RlProgress);
    /// A checkpoint of this step is complete on disk.
    fn checkpointed(&self, step: u64);
}

/// What a checkpoint holds beyond that of other training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    /// The prompts, as they were when the job began.
    pub(super) prompts: Vec<PromptConfig>,
    /// Episodes of the run that the job reads, as many as there were when it began.
    pub(super) episodes: u64,
    /// The latest figures.
    pub(super) figures: RlFigures,
}

/// What every job that learns from rewards works with.
#[derive(Clone)]
pub struct RlContext {
    /// Engine, tokenizer, adapters, folders.
    pub training: Arc<Context>,
    /// The runs' logs.
    pub log: EpisodeLog,
}

/// Checks a job without starting it: the modules it names, the adapter it goes on from, and that it fits the memory.
///
/// # Errors
/// The field that does not fit the model; the adapter; the quota's or the memory's figures and what would fit.
pub async fn check(context: &RlContext, job: &RlJob) -> Result<TrainingPlan, TrainError> {
    check_name(&job.adapter_name)?;
    Rewarder::new(&job.rewards)?;
    if job.mode == Mode::Offline {
        let (context, job) = (context.clone(), job.clone());
        blocking(move || Examples::read(&context, &job, 0)).await?;
    }
    let context = &context.training;
    let start = start(context, job).await?;
    let spec = spec(context, job, start.as_ref())?;
    context.adapters.check_room(&job.adapter_name, &spec.lora).await?;
    Ok(context.engine.plan_training(spec).await?)
}

/// Runs a job, from its last checkpoint in `jobs_dir/{job_id}` if it has one. Until it is completed the adapter is
/// served without files, from the trainer's weights; where it ends otherwise, the name means what it meant before.
///
/// # Errors
/// Why it failed. What was trained until its last checkpoint stays on disk.
pub async fn run(
    context: &RlContext,
    job_id: &str,
    job: &RlJob,
    reporter: &dyn RlReporter,
    stop: watch::Receiver<Stop>,
) -> Result<Ending, TrainError> {
    check_name(&job.adapter_name)?;
    let outcome = match Run::open(context, job_id, job, reporter, stop).await {
        Err(error) => Err(error),
        Ok(run) => match job.mode {
            Mode::Online => grpo::run(run).await,
            Mode::Offline => offline::run(run).await,
        },
    };
    if !matches!(outcome, Ok(Ending::Completed { .. })) {
        let withdrawn = context.training.adapters.withdraw(&job.adapter_name).await;
        if let Err(error) = withdrawn {
            // The engine has stopped, and its adapters with it.
            tracing::debug!(%error, "the adapter of an ended job was not withdrawn");
        }
    }
    outcome
}

/// What the parts of a run share.
pub(super) struct Run<'a> {
    pub(super) context: &'a RlContext,
    pub(super) job_id: &'a str,
    pub(super) job: &'a RlJob,
    pub(super) reporter: &'a dyn RlReporter,
    pub(super) trainer: Arc<Trainer>,
    pub(super) rewarder: Rewarder,
    pub(super) state: State,
    pub(super) memory: Memory,
    pub(super) saved_step: Option<u64>,
    store: Arc<Checkpoints>,
    schedule: Schedule,
    stop: watch::Receiver<Stop>,
}

/// What the passes of an update found.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) loss_sum: f64,
    pub(super) tokens: u64,
    pub(super) policy: PolicyFigures,
    /// By sequence, in the order of the batch.
    pub(super) logprobs: Vec<Vec<f32>>,
}

/// What a pass does with its sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Learning,
    Policy,
    Base,
}

impl<'a> Run<'a> {
    async fn open(
        context: &'a RlContext,
        job_id: &'a str,
        job: &'a RlJob,
        reporter: &'a dyn RlReporter,
        stop: watch::Receiver<Stop>,
    ) -> Result<Self, TrainError> {
        let (config, training) = (&job.config, &context.training);
        let (folder, keep_last) = (training.jobs_dir.join(job_id), config.keep_last);
        let store = Arc::new(blocking(move || Checkpoints::open(folder, keep_last)).await?);
        let newest = store.clone();
        let saved = blocking(move || newest.latest()).await?;
        let saved_step = saved.as_ref().map(|saved| saved.state.progress.step);
        let (mut state, memory, snapshot) = match saved {
            Some(saved) => {
                let memory = serde_json::from_slice(&saved.dataset).map_err(|error| {
                    TrainError::Failed(format!(
                        "the checkpoint is of a version that is not understood: {error}"
                    ))
                })?;
                reporter.log(format!("going on after step {}", saved.state.progress.step));
                (saved.state, memory, Some(saved.trainer))
            }
            None => (State::default(), Memory::default(), start(training, job).await?),
        };
        let trainer = training.engine.create_trainer(spec(training, job, snapshot.as_ref())?).await?;
        if let Some(snapshot) = snapshot {
            trainer.restore(snapshot).await?;
        }
        reporter.log(plan_line(&trainer, training.engine.info().layers));
        // The plan follows from the memory that is free now; a job that goes on keeps to its first one.
        let room = trainer.plan().tokens_per_pass;
        if state.tokens_per_pass == 0 {
            state.tokens_per_pass = room;
        } else if state.tokens_per_pass > room {
            reporter.warn(format!(
                "there is less memory than when the job began: passes of {room} tokens and not {}, which changes the \
                 last digits of its sums",
                state.tokens_per_pass
            ));
            state.tokens_per_pass = room;
        }
        let (kind, peak, warmup_ratio) = (config.lr_scheduler, config.learning_rate, config.warmup_ratio);
        Ok(Self {
            context,
            job_id,
            job,
            reporter,
            trainer: Arc::new(trainer),
            rewarder: Rewarder::new(&job.rewards)?,
            state,
            memory,
            saved_step,
            store,
            schedule: Schedule { kind, peak, warmup_ratio },
            stop,
        })
    }

    /// What the job is asked to do.
    pub(super) fn stopping(&self) -> Stop {
        *self.stop.borrow()
    }

    /// Waits until the job is asked to end.
    pub(super) async fn asked(&self) {
        if self.stop.clone().wait_for(|stop| *stop != Stop::No).await.is_err() {
            // Nobody is left who could ask.
            std::future::pending().await
        }
    }

    /// The job's prompts: those of its checkpoint, else read now. Gives how many are too long.
    pub(super) async fn prompts(&mut self) -> Result<Prompts, TrainError> {
        if self.memory.prompts.is_empty() {
            self.memory.prompts = self.job.prompts.read(self.job.config.max_prompts).await?;
        }
        let tokenizer = &self.context.training.tokenizer;
        let (prompts, too_long) = match self.job.mode {
            Mode::Online => Prompts::new(&self.memory.prompts, &self.job.config, tokenizer)?,
            Mode::Offline => Prompts::to_measure(&self.memory.prompts, &self.job.config, tokenizer)?,
        };
        self.reporter.log(format!(
            "{}: {} prompts to learn on, {} held out, {too_long} without tokens or too long",
            self.job.source_name,
            prompts.train.len(),
            prompts.held_out.len()
        ));
        Ok(prompts)
    }

    /// Serves the trainer's weights under the adapter's name, with no file.
    pub(super) async fn serve(&self) -> Result<AdapterHandle, TrainError> {
        let (trainer, name) = (self.trainer.clone(), self.job.adapter_name.clone());
        let serve = move |generation| async move { trainer.publish(&name, generation).await };
        let served = self.context.training.adapters.publish_live(&self.job.adapter_name, serve).await;
        served.map_err(|error| match error {
            AdapterError::Engine(error) => TrainError::Engine(error),
            error => error.into(),
        })
    }

    /// What log-probabilities are of: answers are sampled at the job's temperature, episodes were at 1.
    fn temperature(&self) -> f64 {
        match self.job.mode {
            Mode::Online => self.job.config.temperature,
            Mode::Offline => 1.0,
        }
    }

    /// Sequences through passes that fit the plan, each adding `normalizer` a sequence to what the step divides by
    /// (`None`: the weights).
    pub(super) async fn passes(
        &self,
        sequences: &[TrainSequence],
        loss: TokenLoss,
        normalizer: Option<f64>,
        of: Of,
    ) -> Result<Found, TrainError> {
        let mut found = Found { logprobs: vec![Vec::new(); sequences.len()], ..Found::default() };
        let lengths = sequences.iter().map(|sequence| sequence.tokens.len());
        for (number, places) in
            pack_places(lengths, self.state.tokens_per_pass, usize::MAX).into_iter().enumerate()
        {
            let temperature = self.temperature();
            let sequences: Vec<TrainSequence> = places.iter().map(|&at| sequences[at].clone()).collect();
            let normalizer = normalizer.map(|each| each * sequences.len() as f64);
            let pass = (self.state.progress.step << 20) | number as u64;
            let batch = TrainBatch { sequences, loss, temperature, normalizer, pass };
            let report: PassReport = match of {
                Of::Learning => self.trainer.forward_backward(batch).await?,
                Of::Policy => self.trainer.evaluate(batch).await?,
                Of::Base => self.trainer.evaluate_base(batch).await?,
            };
            found.loss_sum += report.loss_sum;
            found.tokens += report.tokens as u64;
            if let Some(policy) = &report.policy {
                found.policy.add(policy);
            }
            for (place, logprobs) in places.into_iter().zip(report.logprobs) {
                found.logprobs[place] = logprobs;
            }
        }
        Ok(found)
    }

    /// Fills in the base model's log-probabilities, where the loss has a penalty for leaving it.
    pub(super) async fn compare_with_base(&self, batch: &mut [TrainSequence]) -> Result<(), TrainError> {
        if batch.is_empty() || self.job.config.kl_beta == 0.0 {
            return Ok(());
        }
        let base = self.passes(batch, TokenLoss::CrossEntropy, None, Of::Base).await?;
        for (sequence, logprobs) in batch.iter_mut().zip(base.logprobs) {
            for (token, logprob) in sequence.policy.iter_mut().zip(logprobs) {
                token.reference = logprob;
            }
        }
        Ok(())
    }

    /// A step with the gradient of the passes since the last one; `of_all` is the number of steps in all.
    ///
    /// # Errors
    /// The job has diverged.
    pub(super) async fn step(&mut self, loss: f64, number: u64, of_all: u64) -> Result<(), TrainError> {
        let config = &self.job.config;
        let learning_rate = self.schedule.at(number, of_all);
        let by = StepParameters { learning_rate, max_grad_norm: config.max_grad_norm };
        let taken = self.trainer.optim_step(by).await?;
        let progress = &mut self.state.progress;
        progress.learning_rate = learning_rate;
        progress.skipped_steps += u64::from(taken.skipped);
        if loss.is_finite() && !taken.skipped {
            (progress.loss, progress.grad_norm) = (loss, taken.grad_norm);
            self.state.bad_in_a_row = 0;
            return Ok(());
        }
        self.reporter.warn(format!(
            "step {}: skipped, the loss ({loss}) or its gradient is not a finite number",
            progress.step + 1
        ));
        self.state.bad_in_a_row += 1;
        match self.state.bad_in_a_row >= DIVERGED {
            true => Err(TrainError::Failed(format!(
                "training diverged: {DIVERGED} times in a row the loss or its gradient was not a finite number \
                 (learning_rate {}); lower learning_rate",
                config.learning_rate
            ))),
            false => Ok(()),
        }
    }

    /// Mean reward of the held-out prompts' greedy answers, once a step. Ends early, with nothing, when the job is
    /// asked to end.
    pub(super) async fn evaluate(
        &mut self,
        prompts: &Prompts,
        adapter: &AdapterHandle,
    ) -> Result<(), TrainError> {
        let step = self.state.progress.step;
        if prompts.held_out.is_empty() || self.state.evaluated == Some(step) {
            return Ok(());
        }
        let config = &self.job.config;
        let settings = Settings {
            temperature: 0.0,
            max_new_tokens: config.max_new_tokens,
            group_size: 1,
            max_in_flight: config.max_in_flight,
            seed: config.seed,
        };
        let held_out: Vec<_> = prompts.held_out.iter().collect();
        let engine = &self.context.training.engine;
        let groups = tokio::select! {
            groups = rollouts(engine, Some(adapter), &held_out, settings, &self.rewarder) => groups?,
            () = self.asked() => return Ok(()),
        };
        let rewards: Vec<f64> =
            groups.iter().flat_map(|group| &group.rewards).flatten().map(|reward| reward.total).collect();
        self.state.evaluated = Some(step);
        if rewards.is_empty() {
            self.reporter.warn(format!("step {step}: no held-out answer has a reward"));
            return Ok(());
        }
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        self.memory.figures.eval_reward = Some(mean);
        self.reporter.log(format!(
            "step {step}: mean held-out reward {mean:.4} over {} of {} prompts",
            rewards.len(),
            groups.len()
        ));
        self.tell();
        Ok(())
    }

    /// Tells the figures.
    pub(super) fn tell(&self) {
        let (progress, figures) = (self.state.progress.clone(), self.memory.figures.clone());
        self.reporter.progress(&RlProgress { progress, figures });
    }

    /// Whether a checkpoint is due between two steps.
    pub(super) fn save_is_due(&self) -> bool {
        let step = self.state.progress.step;
        // The one before the first step holds what the job began with.
        self.saved_step != Some(step) && (step == 0 || due(self.job.config.save_steps, step))
    }

    /// Writes a checkpoint, if there is none of this step.
    pub(super) async fn save(&mut self) -> Result<(), TrainError> {
        let step = self.state.progress.step;
        if self.saved_step == Some(step) {
            return Ok(());
        }
        let trainer = self.trainer.snapshot().await?;
        let adapter = self.trained(&trainer)?;
        let dataset = serde_json::to_vec(&self.memory)
            .map_err(|error| TrainError::Failed(format!("the job's memory is no JSON: {error}")))?;
        let checkpoint = Checkpoint { state: self.state.clone(), trainer, dataset, pending: Vec::new() };
        let (store, sites) = (self.store.clone(), self.context.training.engine.info().sites.clone());
        blocking(move || store.write(&checkpoint, &adapter, &sites)).await?;
        self.reporter.checkpointed(step);
        self.reporter.log(format!("step {step}: checkpoint in {}", self.store.path(step).display()));
        self.saved_step = Some(step);
        Ok(())
    }

    /// The end that was asked for, with a checkpoint to go on from.
    pub(super) async fn stopped(mut self) -> Result<Ending, TrainError> {
        let step = self.state.progress.step;
        self.save().await?;
        Ok(match self.stopping() {
            Stop::Pause => {
                self.reporter.log(format!("paused after step {step}"));
                Ending::Paused { step }
            }
            Stop::Cancel | Stop::No => {
                self.reporter.log(format!("cancelled after step {step}"));
                Ending::Cancelled { step }
            }
        })
    }

    /// Writes the adapter to its place and has it served from there.
    pub(super) async fn complete(mut self) -> Result<Ending, TrainError> {
        let step = self.state.progress.step;
        (self.state.progress.total_steps, self.state.progress.eta_s) = (step, 0.0);
        self.save().await?;
        if self.stopping() != Stop::No {
            return self.stopped().await;
        }
        let adapter = self.trained(&self.trainer.snapshot().await?)?;
        let figures = &self.memory.figures;
        let metrics = serde_json::json!({
            "step": step,
            "loss": self.state.progress.loss,
            "reward": figures.reward,
            "eval_reward": figures.eval_reward,
            "samples": self.state.progress.samples,
            "tokens": self.state.progress.tokens,
            "skipped_steps": self.state.progress.skipped_steps,
        });
        let (trainer, name) = (self.trainer.clone(), self.job.adapter_name.clone());
        let serve = move |generation| async move { trainer.publish(&name, generation).await };
        let registry = &self.context.training.adapters;
        let published =
            registry.publish(&self.job.adapter_name, adapter, self.job_id, metrics, serve).await?;
        if let Some(reason) = published.not_resident {
            self.reporter.warn(format!("the adapter is not loaded yet: {reason}"));
        }
        self.reporter.log(format!(
            "done after step {step}: adapter {} of generation {} in {}",
            self.job.adapter_name,
            published.generation,
            published.path.display()
        ));
        self.tell();
        Ok(Ending::Completed { progress: self.state.progress, generation: published.generation })
    }

    fn trained(&self, snapshot: &TrainerSnapshot) -> Result<TrainedAdapter, TrainError> {
        let (lora, info) = (self.trainer.spec().lora.clone(), self.context.training.engine.info());
        let weights = weights_of(snapshot, &lora, &info.sites)?;
        let (base_model, family) = (self.context.training.model_id.clone(), info.family.clone());
        Ok(TrainedAdapter { lora, weights, base_model, family })
    }
}
