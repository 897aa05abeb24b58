//! The work of a training job, between two parts that do not know each other: `jobs` runs it, `train` does it.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::FutureExt as _;
use serde_json::json;
use tokio::sync::watch;

use super::collecting;
use crate::engine::EngineError;
use crate::http::{COLLECT_KIND, TRAIN_KIND};
use crate::jobs::{self, JobHandle, Level, Outcome, Work};
use crate::rl::Collector;
use crate::rl::outbox::Outbox;
use crate::train::{self, Context, Ending, Progress, Reporter, TrainError, TrainJob};

/// The work for each kind of job.
pub(super) fn kinds(
    context: Arc<Context>,
    collector: Collector,
    uploads: Outbox,
) -> BTreeMap<&'static str, Work> {
    let train: Work = Arc::new(move |handle| train_one(context.clone(), handle).boxed());
    let collect: Work =
        Arc::new(move |handle| collecting::collect(collector.clone(), uploads.clone(), handle).boxed());
    BTreeMap::from([(TRAIN_KIND, train), (COLLECT_KIND, collect)])
}

async fn train_one(context: Arc<Context>, handle: JobHandle) -> Outcome {
    let job: TrainJob = match serde_json::from_value(handle.spec().clone()) {
        Ok(job) => job,
        Err(error) => {
            return Outcome::Failed(format!(
                "the job was stored by a version that is not understood: {error}"
            ));
        }
    };
    let (stop, stopped) = watch::channel(train::Stop::No);
    let told = Told(&handle);
    let outcome = tokio::select! {
        outcome = train::job::run(&context, handle.id(), &job, &told, stopped) => outcome,
        // Never through: the work itself decides when it ends.
        never = forward(handle.stop(), stop) => match never {},
    };
    match outcome {
        Ok(Ending::Completed { progress, generation }) => Outcome::Completed {
            message: format!("the adapter {} is served as generation {generation}", job.adapter_name),
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
        let fraction = progress.step as f64 / progress.total_steps.max(1) as f64;
        match serde_json::to_value(progress) {
            Ok(metrics) => self.0.progress(progress.step, fraction, metrics),
            Err(error) => tracing::error!(%error, "figures that are no JSON are a bug"),
        }
    }

    fn checkpointed(&self, step: u64) {
        self.0.checkpointed(step);
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
