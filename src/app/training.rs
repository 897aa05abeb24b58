//! The work of a training job, between two parts that do not know each other: `jobs` runs it, `train` does it.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::FutureExt as _;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;

use super::collecting;
use crate::engine::EngineError;
use crate::http::{COLLECT_KIND, RL_KIND, TRAIN_KIND};
use crate::jobs::{self, JobHandle, Level, Outcome, Work};
use crate::rl::Collector;
use crate::rl::learn::{self, RlContext, RlJob, RlProgress, RlReporter};
use crate::rl::outbox::Outbox;
use crate::train::{self, Context, Ending, Progress, Reporter, TrainError, TrainJob};

/// The work for each kind of job.
pub(super) fn kinds(
    context: Arc<RlContext>,
    collector: Collector,
    uploads: Outbox,
) -> BTreeMap<&'static str, Work> {
    let training = context.training.clone();
    let train: Work = Arc::new(move |handle| train_one(training.clone(), handle).boxed());
    let learn: Work = Arc::new(move |handle| learn_one(context.clone(), handle).boxed());
    let collect: Work =
        Arc::new(move |handle| collecting::collect(collector.clone(), uploads.clone(), handle).boxed());
    BTreeMap::from([(TRAIN_KIND, train), (RL_KIND, learn), (COLLECT_KIND, collect)])
}

/// What was accepted.
fn spec<T: DeserializeOwned>(handle: &JobHandle) -> Result<T, Outcome> {
    serde_json::from_value(handle.spec().clone()).map_err(|error| {
        Outcome::Failed(format!("the job was stored by a version that is not understood: {error}"))
    })
}

async fn train_one(context: Arc<Context>, handle: JobHandle) -> Outcome {
    let job: TrainJob = match spec(&handle) {
        Ok(job) => job,
        Err(outcome) => return outcome,
    };
    tracing::Span::current().record("adapter", &job.adapter_name);
    let (stop, stopped) = watch::channel(train::Stop::No);
    let told = Told(&handle);
    let outcome = tokio::select! {
        outcome = train::job::run(&context, handle.id(), &job, &told, stopped) => outcome,
        // Never through: the work itself decides when it ends.
        never = forward(handle.stop(), stop) => match never {},
    };
    ended(&handle, &job.adapter_name, outcome)
}

async fn learn_one(context: Arc<RlContext>, handle: JobHandle) -> Outcome {
    let job: RlJob = match spec(&handle) {
        Ok(job) => job,
        Err(outcome) => return outcome,
    };
    tracing::Span::current().record("adapter", &job.adapter_name);
    let (stop, stopped) = watch::channel(train::Stop::No);
    let told = Told(&handle);
    let outcome = tokio::select! {
        outcome = learn::run(&context, handle.id(), &job, &told, stopped) => outcome,
        // Never through: the work itself decides when it ends.
        never = forward(handle.stop(), stop) => match never {},
    };
    ended(&handle, &job.adapter_name, outcome)
}

fn ended(handle: &JobHandle, adapter: &str, outcome: Result<Ending, TrainError>) -> Outcome {
    match outcome {
        Ok(Ending::Completed { progress, generation }) => Outcome::Completed {
            message: format!("the adapter {adapter} is served as generation {generation}"),
            result: json!({ "generation": generation, "progress": progress }),
        },
        Ok(Ending::Cancelled { step }) => Outcome::Cancelled(format!("cancelled at step {step}")),
        // The engine goes before the job at the end of the process: the job is not to blame.
        Ok(Ending::Paused { .. }) | Err(TrainError::Engine(EngineError::Stopped)) => Outcome::Paused,
        Err(error) => {
            handle.log(Level::Error, error.to_string());
            Outcome::Failed(error.to_string())
        }
    }
}

/// Hands the runner's wishes on for as long as it is polled.
pub(super) async fn forward(
    mut wish: watch::Receiver<jobs::Stop>,
    stop: watch::Sender<train::Stop>,
) -> std::convert::Infallible {
    loop {
        stop.send_replace(match *wish.borrow_and_update() {
            jobs::Stop::No => train::Stop::No,
            jobs::Stop::Cancel => train::Stop::Cancel,
            jobs::Stop::Pause => train::Stop::Pause,
        });
        if wish.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// What training tells, told to the job.
struct Told<'a>(&'a JobHandle);

impl Reporter for Told<'_> {
    fn log(&self, line: String) {
        self.0.log(Level::Info, line);
    }

    fn progress(&self, progress: &Progress) {
        self.figures(progress, progress);
    }

    fn checkpointed(&self, step: u64) {
        self.0.checkpointed(step);
    }
}

impl RlReporter for Told<'_> {
    fn log(&self, line: String) {
        self.0.log(Level::Info, line);
    }

    fn warn(&self, line: String) {
        self.0.log(Level::Warn, line);
    }

    fn progress(&self, progress: &RlProgress) {
        self.figures(&progress.progress, progress);
    }

    fn checkpointed(&self, step: u64) {
        self.0.checkpointed(step);
    }
}

impl Told<'_> {
    fn figures(&self, progress: &Progress, all: &impl serde::Serialize) {
        let fraction = progress.step as f64 / progress.total_steps.max(1) as f64;
        match serde_json::to_value(all) {
            Ok(metrics) => self.0.progress(progress.step, fraction, metrics),
            Err(error) => tracing::error!(%error, "figures that are no JSON are a bug"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wishes_are_handed_on() {
        let (wish, wished) = watch::channel(jobs::Stop::No);
        let (stop, mut stopped) = watch::channel(train::Stop::Cancel);
        let forwarding = tokio::spawn(async move { match forward(wished, stop).await {} });
        let mut next = async || {
            stopped.changed().await.expect("the sender lives");
            *stopped.borrow_and_update()
        };
        assert_eq!(next().await, train::Stop::No, "what is wished at the start");
        wish.send_replace(jobs::Stop::Pause);
        assert_eq!(next().await, train::Stop::Pause);
        wish.send_replace(jobs::Stop::Cancel);
        assert_eq!(next().await, train::Stop::Cancel);
        drop(wish);
        tokio::task::yield_now().await;
        assert!(!forwarding.is_finished(), "the wish stays when nobody wishes any more");
        forwarding.abort();
    }
}
