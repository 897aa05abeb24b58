//! One training job from its first record to the served adapter. What it computes follows from the job, the data
//! and the base weights alone, so a job that was killed and goes on ends with the same bits. Touches no tensor and
//! no record itself.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::checkpoint::{Best, Checkpoint, Checkpoints, State};
use super::dataset::{Dataset, Planned, pack};
use super::evaluation::{Scorer, Sums, evaluate};
use super::schedule::Schedule;
use super::targets::trainer_spec;
use super::{Context, Ending, Progress, Reporter, Stop, TrainError, TrainJob};
use crate::adapters::{TrainedAdapter, check_name};
use crate::config::adapter::AdapterConfig;
use crate::engine::Trainer;
use crate::engine::training::{
    LoraSpec, StepParameters, TrainBatch, TrainSequence, TrainerSnapshot, TrainingPlan,
};
use crate::metrics;
use crate::nn::lora::{LoraWeights, Site, SiteWeights};

/// Steps in a row without a finite loss and gradient after which a job has diverged.
pub(crate) const DIVERGED: u32 = 10;
/// Steps over which the speed is measured.
const WINDOW: usize = 20;

/// Checks a job without starting it: the modules it names, that its adapter fits the quota, and that it fits the memory.
///
/// # Errors
/// The field that does not fit the model; the quota's or the memory's figures and what would fit.
pub async fn check(context: &Context, job: &TrainJob) -> Result<TrainingPlan, TrainError> {
    check_name(&job.adapter_name)?;
    let info = context.engine.info();
    let spec = trainer_spec(&job.config, &info.sites, info.context_length)?;
    context.adapters.check_room(&job.adapter_name, &spec.lora).await?;
    Ok(context.engine.plan_training(spec).await?)
}

/// Runs a job, from its last checkpoint in `jobs_dir/{job_id}` if it has one.
///
/// # Errors
/// Why it failed. What was trained until its last checkpoint stays on disk.
pub async fn run(
    context: &Context,
    job_id: &str,
    job: &TrainJob,
    reporter: &dyn Reporter,
    stop: watch::Receiver<Stop>,
) -> Result<Ending, TrainError> {
    check_name(&job.adapter_name)?;
    let (config, info) = (&job.config, context.engine.info());
    let spec = trainer_spec(config, &info.sites, info.context_length)?;
    let (folder, keep_last) = (context.jobs_dir.join(job_id), config.keep_last);
    let store = Arc::new(blocking(move || Checkpoints::open(folder, keep_last)).await?);
    let newest = store.clone();
    let saved = blocking(move || newest.latest()).await?;

    let (tokenizer, eos) = (context.tokenizer.clone(), &info.eos_token_ids);
    let mut data = match &saved {
        None => Dataset::open(job, tokenizer, eos).await?,
        Some(saved) => Dataset::restore(job, tokenizer, eos, &mut saved.dataset.as_slice())?,
    };
    let trainer = Arc::new(context.engine.create_trainer(spec).await?);
    let this = Run { context, job_id, job, reporter, store, trainer, stop };
    this.log_plan();
    this.log_source(&mut data);
    let mut saved_step = saved.as_ref().map(|saved| saved.state.progress.step);
    let (mut state, mut pending) = match saved {
        None => (State::default(), Vec::new()),
        Some(saved) => {
            reporter.log(format!("going on after step {}", saved.state.progress.step));
            this.trainer.restore(saved.trainer).await?;
            (saved.state, saved.pending)
        }
    };
    // The plan follows from the memory that is free now; a job that goes on keeps to its first one.
    let room = this.trainer.plan().tokens_per_pass;
    if state.tokens_per_pass == 0 {
        state.tokens_per_pass = room;
    } else if state.tokens_per_pass > room {
        reporter.log(format!(
            "there is less memory than when the job began: passes of {room} tokens and not {}, which changes the \
             last digits of its sums",
            state.tokens_per_pass
        ));
        state.tokens_per_pass = room;
    }
    let mut pace = Pace::new();
    let schedule =
        Schedule { kind: config.lr_scheduler, peak: config.learning_rate, warmup_ratio: config.warmup_ratio };

    // Each turn begins between two steps: what is due there first, then one step.
    loop {
        let step = state.progress.step;
        let mut save = due(config.save_steps, step);
        if due(config.eval_steps, step) && this.evaluate(&mut state, &data).await? == Evaluated::Better {
            save |= config.early_stopping_patience > 0;
        }
        if (save || state.finished) && saved_step != Some(step) {
            this.save(&state, &data, &pending).await?;
            saved_step = Some(step);
        }
        if this.stopping() != Stop::No {
            return this.stopped(&state, &data, &pending, saved_step).await;
        }
        if state.finished || config.max_steps.is_some_and(|most| step >= most) {
            break;
        }
        pace.begin();
        if pending.is_empty() {
            // A source may take its time. Nothing that it gave until then is lost by not waiting for the rest.
            pending = tokio::select! {
                batch = data.next_batch(config.batch_size * config.gradient_accumulation_steps) => batch?,
                () = this.asked() => continue,
            };
            this.log_notes(&mut data);
        }
        if pending.is_empty() {
            break;
        }
        let total = total_steps(config, data.planned_examples()).max(step + 1);
        let learning_rate = schedule.at(step, total);
        let Some(found) = this.gradient(&state, &pending).await? else {
            this.trainer.discard_gradient().await?;
            continue;
        };
        let parameters = StepParameters { learning_rate, max_grad_norm: config.max_grad_norm };
        let taken = this.trainer.optim_step(parameters).await?;
        pending.clear();

        let progress = &mut state.progress;
        progress.step += 1;
        progress.total_steps = total;
        progress.epoch = data.epoch_fraction();
        progress.learning_rate = learning_rate;
        progress.samples += found.samples;
        progress.tokens += found.tokens;
        progress.skipped_steps += u64::from(taken.skipped);
        let loss = found.loss();
        if loss.is_finite() && !taken.skipped {
            (progress.loss, progress.grad_norm) = (loss, taken.grad_norm);
            state.bad_in_a_row = 0;
        } else {
            state.bad_in_a_row += 1;
        }
        pace.end(found.tokens, progress);
        reporter.progress(progress);
        if due(config.logging_steps, progress.step) || taken.skipped || !loss.is_finite() {
            reporter.log(step_line(progress, loss, taken.skipped));
        }
        if state.bad_in_a_row >= DIVERGED {
            return Err(TrainError::Failed(format!(
                "training diverged: in {DIVERGED} steps in a row the loss or its gradient was not a finite number \
                 (learning_rate {}); lower learning_rate, or raise warmup_ratio",
                config.learning_rate
            )));
        }
    }

    let step = state.progress.step;
    if step == 0 {
        return Err(TrainError::Failed(format!(
            "the source {} gave no example to learn from",
            job.source_name
        )));
    }
    state.progress.total_steps = step;
    state.progress.eta_s = 0.0;
    this.evaluate(&mut state, &data).await?;
    if saved_step != Some(step) {
        this.save(&state, &data, &pending).await?;
        saved_step = Some(step);
    }
    if this.stopping() != Stop::No {
        return this.stopped(&state, &data, &pending, saved_step).await;
    }
    let generation = this.publish(&state).await?;
    reporter.progress(&state.progress);
    Ok(Ending::Completed { progress: state.progress, generation })
}

/// What the parts of a run share.
struct Run<'a> {
    context: &'a Context,
    job_id: &'a str,
    job: &'a TrainJob,
    reporter: &'a dyn Reporter,
    store: Arc<Checkpoints>,
    trainer: Arc<Trainer>,
    stop: watch::Receiver<Stop>,
}

/// What an evaluation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evaluated {
    /// The best so far.
    Better,
    /// Not the best, or there was nothing to do.
    NotBetter,
}

impl Run<'_> {
    fn stopping(&self) -> Stop {
        *self.stop.borrow()
    }

    /// Waits until the job is asked to end.
    async fn asked(&self) {
        if self.stop.clone().wait_for(|stop| *stop != Stop::No).await.is_err() {
            // Nobody is left who could ask.
            std::future::pending().await
        }
    }

    fn sites(&self) -> &Arc<Vec<Site>> {
        &self.context.engine.info().sites
    }

    /// Examples in passes that fit the plan, the micro-batches of a step together: only tokens take memory, and
    /// what a step comes to does not depend on how its examples were grouped.
    fn passes(&self, state: &State, examples: &[TrainSequence]) -> Vec<Vec<TrainSequence>> {
        pack(examples.to_vec(), state.tokens_per_pass, usize::MAX)
    }

    /// The gradient of a step's examples, summed in the trainer. `None`: asked to stop on the way.
    async fn gradient(&self, state: &State, examples: &[TrainSequence]) -> Result<Option<Sums>, TrainError> {
        let mut found = Sums::default();
        for (number, sequences) in self.passes(state, examples).into_iter().enumerate() {
            if self.stopping() != Stop::No {
                return Ok(None);
            }
            // Numbered by the step, so that a job that goes on draws what it would have drawn.
            let pass = (state.progress.step << 20) | number as u64;
            let batch = TrainBatch::cross_entropy(sequences, pass);
            found.add(&Sums::of(&self.trainer.forward_backward(batch).await?));
        }
        Ok(Some(found))
    }

    /// Mean loss over the held-out examples, once a step; decides about the best and about the end.
    async fn evaluate(&self, state: &mut State, data: &Dataset) -> Result<Evaluated, TrainError> {
        let (step, examples) = (state.progress.step, data.eval_examples());
        if examples.is_empty() || state.evaluated == Some(step) {
            return Ok(Evaluated::NotBetter);
        }
        let scorer = Scorer::Trainer { trainer: &self.trainer, tokens_per_pass: state.tokens_per_pass };
        let stopping = || self.stopping() != Stop::No;
        let Some(found) = evaluate(scorer, examples, stopping).await? else {
            // Not evaluated, as far as a checkpoint of this step is concerned.
            return Ok(Evaluated::NotBetter);
        };
        let loss = found.loss();
        state.evaluated = Some(step);
        if loss.is_finite() {
            state.progress.eval_loss = Some(loss);
        }
        let better = loss.is_finite() && state.best.is_none_or(|best| loss < best.loss());
        if better {
            state.best = Some(Best::new(step, loss));
            state.without_better = 0;
        } else {
            state.without_better += 1;
        }
        let best = state.best.map_or(String::new(), |best| format!(", best {:.4}", best.loss()));
        self.reporter
            .log(format!("step {step}: evaluation loss {loss:.4} over {} examples{best}", examples.len()));
        let patience = self.job.config.early_stopping_patience;
        if patience > 0 && state.without_better >= patience {
            state.finished = true;
            let count = state.without_better;
            self.reporter.log(format!("step {step}: ending early, no better evaluation in {count}"));
        }
        self.reporter.progress(&state.progress);
        Ok(if better { Evaluated::Better } else { Evaluated::NotBetter })
    }

    /// Writes a checkpoint. The engine only copies its numbers out; the disk is waited for elsewhere.
    async fn save(&self, state: &State, data: &Dataset, pending: &[TrainSequence]) -> Result<(), TrainError> {
        let step = state.progress.step;
        let trainer = self.trainer.snapshot().await?;
        let adapter = self.trained(&trainer)?;
        let mut dataset = Vec::new();
        data.save(&mut dataset).map_err(|source| TrainError::Io {
            what: format!("the data's place at step {step} cannot be kept"),
            source,
        })?;
        let checkpoint = Checkpoint { state: state.clone(), trainer, dataset, pending: pending.to_vec() };
        let (store, sites) = (self.store.clone(), self.sites().clone());
        blocking(move || store.write(&checkpoint, &adapter, &sites)).await?;
        self.reporter.checkpointed(step);
        self.reporter.log(format!("step {step}: checkpoint in {}", self.store.path(step).display()));
        Ok(())
    }

    /// The end that was asked for, with a checkpoint to go on from.
    async fn stopped(
        &self,
        state: &State,
        data: &Dataset,
        pending: &[TrainSequence],
        saved_step: Option<u64>,
    ) -> Result<Ending, TrainError> {
        let step = state.progress.step;
        if saved_step != Some(step) {
            self.save(state, data, pending).await?;
        }
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

    /// Writes the adapter and has it served: the best evaluated one where early stopping watched, else the last.
    async fn publish(&self, state: &State) -> Result<u64, TrainError> {
        let step = state.progress.step;
        let watched = self.job.config.early_stopping_patience > 0;
        if let Some(best) = state.best.filter(|best| watched && best.step != step) {
            let store = self.store.clone();
            let saved = blocking(move || store.read(best.step)).await?;
            self.trainer.restore(saved.trainer).await?;
            let (at, loss) = (best.step, best.loss());
            self.reporter
                .log(format!("taking the weights of step {at}, whose evaluation loss {loss:.4} is the best"));
        }
        let adapter = self.trained(&self.trainer.snapshot().await?)?;
        let metrics = figures(state, watched);
        let (trainer, name) = (self.trainer.clone(), self.job.adapter_name.clone());
        let serve = move |generation| async move { trainer.publish(&name, generation).await };
        let registry = &self.context.adapters;
        let published =
            registry.publish(&self.job.adapter_name, adapter, self.job_id, metrics, serve).await?;
        if let Some(reason) = published.not_resident {
            self.reporter.log(format!("the adapter is not loaded yet: {reason}"));
        }
        self.reporter.log(format!(
            "done after step {step}: adapter {} of generation {} in {}",
            self.job.adapter_name,
            published.generation,
            published.path.display()
        ));
        Ok(published.generation)
    }

    fn trained(&self, snapshot: &TrainerSnapshot) -> Result<TrainedAdapter, TrainError> {
        let lora = self.trainer.spec().lora.clone();
        let weights = weights_of(snapshot, &lora, self.sites())?;
        let family = self.context.engine.info().family.clone();
        Ok(TrainedAdapter { lora, weights, base_model: self.context.model_id.clone(), family })
    }

    fn log_plan(&self) {
        self.reporter.log(plan_line(&self.trainer, self.context.engine.info().layers));
    }

    fn log_source(&self, data: &mut Dataset) {
        self.log_notes(data);
        let (planned, counters) = (data.planned_examples(), data.counters());
        self.reporter.log(format!(
            "source {}: {:?} template; {}{} examples an epoch, {} held out; so far {} records read, {} unusable, {} \
             kept out by the filter, {} without anything to learn, {} cut",
            self.job.source_name,
            data.template(),
            if planned.exact { "" } else { "up to " },
            planned.examples,
            data.eval_examples().len(),
            counters.records,
            counters.bad,
            counters.filtered,
            counters.skipped,
            counters.truncated,
        ));
        for reason in &counters.reasons {
            self.reporter.log(format!("source {}: {reason}", self.job.source_name));
        }
    }

    /// What the source has to say, such as that another one is read instead.
    fn log_notes(&self, data: &mut Dataset) {
        for note in data.take_notes() {
            self.reporter.log(format!("source {}: {note}", self.job.source_name));
        }
    }
}

/// Tokens a second over the latest steps.
pub(crate) struct Pace {
    steps: VecDeque<(Duration, u64)>,
    begun: Instant,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self { steps: VecDeque::new(), begun: Instant::now() }
    }

    /// A step begins now. What happens between steps does not count.
    pub(crate) fn begin(&mut self) {
        self.begun = Instant::now();
    }

    /// The step ends now; fills in what follows from it.
    pub(crate) fn end(&mut self, tokens: u64, progress: &mut Progress) {
        let elapsed = self.begun.elapsed();
        metrics::learning_step(elapsed.as_secs_f64());
        self.steps.push_back((elapsed, tokens));
        if self.steps.len() > WINDOW {
            self.steps.pop_front();
        }
        let seconds: f64 = self.steps.iter().map(|(time, _)| time.as_secs_f64()).sum();
        let tokens: u64 = self.steps.iter().map(|(_, tokens)| tokens).sum();
        let left = progress.total_steps.saturating_sub(progress.step);
        progress.tokens_per_s = tokens as f64 / seconds.max(1e-9);
        progress.eta_s = seconds / self.steps.len() as f64 * left as f64;
    }
}

/// Whether something that happens every so many steps happens after this one.
pub(crate) fn due(every: u64, step: u64) -> bool {
    every > 0 && step > 0 && step.is_multiple_of(every)
}

/// Steps of the whole job, as far as it is known.
fn total_steps(config: &AdapterConfig, planned: Planned) -> u64 {
    let group = (config.batch_size * config.gradient_accumulation_steps) as u64;
    config.max_steps.unwrap_or_else(|| config.epochs.saturating_mul(planned.examples.div_ceil(group)))
}

/// The memory that a trainer was planned with, for a person.
pub(crate) fn plan_line(trainer: &Trainer, layers: usize) -> String {
    let (plan, modules) = (trainer.plan(), trainer.spec().lora.sites.len());
    format!(
        "plan: {} for training ({} adapter with its moments, {} inputs of layers, {} kept, {} one layer, {} loss) \
         beside {} of weights and cache, {} free; {} of {layers} layers kept; passes of up to {} tokens; {modules} \
         modules",
        mib(plan.training_bytes),
        mib(plan.adapter_bytes),
        mib(plan.hidden_bytes),
        mib(plan.kept_bytes),
        mib(plan.layer_bytes),
        mib(plan.loss_bytes),
        mib(plan.resident_bytes),
        mib(plan.free_bytes),
        plan.kept_layers,
        plan.tokens_per_pass,
    )
}

/// A trainer's tensors as an adapter.
pub(crate) fn weights_of(
    snapshot: &TrainerSnapshot,
    lora: &LoraSpec,
    sites: &[Site],
) -> Result<LoraWeights, TrainError> {
    let parts = lora.sites.iter().map(|&site| {
        let name = &sites[site].name;
        let tensor = |part: &str| {
            let found = snapshot.tensors.get(&format!("{name}.{part}")).cloned();
            found.ok_or_else(|| TrainError::Failed(format!("the trainer has no {name}.{part}")))
        };
        let (a, b) = (tensor("lora_A")?, tensor("lora_B")?);
        Ok(SiteWeights { site, a, b, scale: lora.scale(), magnitude: None })
    });
    Ok(LoraWeights { sites: parts.collect::<Result<_, TrainError>>()? })
}

/// What `gurukul.json` tells of the training. No times, so that the same job leaves the same figures.
fn figures(state: &State, watched: bool) -> serde_json::Value {
    let Progress { step, epoch, loss, samples, tokens, skipped_steps, eval_loss, .. } = &state.progress;
    let mut metrics = serde_json::json!({
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "eval_loss": eval_loss,
        "samples": samples,
        "tokens": tokens,
        "skipped_steps": skipped_steps,
    });
    if let Some(best) = state.best.filter(|_| watched) {
        metrics["best_step"] = best.step.into();
        metrics["best_eval_loss"] = best.loss().into();
    }
    metrics
}

fn step_line(progress: &Progress, loss: f64, skipped: bool) -> String {
    let Progress { step, total_steps, learning_rate, grad_norm, tokens_per_s, .. } = progress;
    let eta = humantime::format_duration(Duration::from_secs(progress.eta_s.clamp(0.0, 1e9) as u64));
    if skipped {
        return format!("step {step}/{total_steps}: skipped, the gradient is not finite (loss {loss:.4})");
    }
    format!(
        "step {step}/{total_steps}: loss {loss:.4}, learning rate {learning_rate:.3e}, gradient norm \
         {grad_norm:.3}, {tokens_per_s:.0} tokens/s, {eta} left"
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TrainError> + Send + 'static,
) -> Result<T, TrainError> {
    // What is logged there belongs to the same job.
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(TrainError::Failed("the program is shutting down".into())),
    }
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
