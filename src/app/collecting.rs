//! The work of a job that collects episodes, between two parts that do not know each other: `jobs` runs it, `rl` does
//! it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::training::forward;
use crate::engine::EngineError;
use crate::jobs::{JobHandle, Level, Outcome};
use crate::rl::collect::{Begin, Ending};
use crate::rl::log::FOLDER;
use crate::rl::outbox::{Content, Outbox};
use crate::rl::{CollectError, CollectJob, Collector, Episode};
use crate::train;

/// How often figures go to the store: groups of short answers may come by the hundred a second.
const REPORT: Duration = Duration::from_millis(500);

pub(super) async fn collect(collector: Collector, uploads: Outbox, handle: JobHandle) -> Outcome {
    let job: CollectJob = match serde_json::from_value(handle.spec().clone()) {
        Ok(job) => job,
        Err(error) => {
            return Outcome::Failed(format!(
                "the job was stored by a version that is not understood: {error}"
            ));
        }
    };
    let mut figures = Figures::new(&handle, &job);
    handle
        .log(Level::Info, format!("collecting {} episodes into {FOLDER}/{}.jsonl", job.episodes, job.run_id));
    let (stop, stopped) = watch::channel(train::Stop::No);
    let mut logged = |done, group: &[Episode]| figures.add(done, group);
    let outcome = tokio::select! {
        outcome = collector.run(handle.id(), &job, Begin::Continue, &mut logged, stopped) => outcome,
        // Never through: the work itself decides when it ends.
        never = forward(handle.stop(), stop) => match never {},
    };
    figures.report();
    match outcome {
        Ok(Ending::Completed) => match promised(&collector, &uploads, handle.id(), &job).await {
            Ok(upload) => Outcome::Completed {
                message: format!("{} episodes are in {FOLDER}/{}.jsonl", job.episodes, job.run_id),
                result: json!({
                    "run_id": job.run_id, "episodes": job.episodes, "upload_id": upload, "progress": figures.now(),
                }),
            },
            Err(reason) => {
                handle.log(Level::Error, reason.clone());
                Outcome::Failed(reason)
            }
        },
        Ok(Ending::Cancelled { done }) => {
            Outcome::Cancelled(format!("cancelled; {done} of {} episodes are in the log", job.episodes))
        }
        // The engine goes before the job at the end of the process: the job is not to blame.
        Ok(Ending::Paused) | Err(CollectError::Engine(EngineError::Stopped)) => Outcome::Paused,
        Err(error) => {
            handle.log(Level::Error, error.to_string());
            Outcome::Failed(error.to_string())
        }
    }
}

/// Promises the upload of a job's episodes, where it was asked for; the upload's id. A job that comes here again after
/// a crash promises the same content under the same key.
async fn promised(
    collector: &Collector,
    uploads: &Outbox,
    id: &str,
    job: &CollectJob,
) -> Result<Option<String>, String> {
    let Some(sink) = &job.upload else { return Ok(None) };
    let why = |error: &dyn std::error::Error| {
        format!("every episode is in the log, but not uploaded: {error}; resume the job to try again")
    };
    let to = uploads.destination(Some(sink)).map_err(|error| why(&error))?;
    let lines = collector.lines(id, &job.run_id).await.map_err(|error| why(&error))?;
    let promise = uploads.promise(&to, &job.run_id, Content::Lines(lines));
    promise.await.map(Some).map_err(|error| why(&error))
}

/// What a job reports of its episodes.
struct Figures<'a> {
    handle: &'a JobHandle,
    total: u64,
    /// In the log, those of an earlier run of the job included.
    done: u64,
    /// Of this run of the job alone, as what follows.
    episodes: u64,
    rewarded: u64,
    reward_sum: f64,
    begun: Instant,
    reported: Instant,
}

impl<'a> Figures<'a> {
    fn new(handle: &'a JobHandle, job: &CollectJob) -> Self {
        let now = Instant::now();
        Self {
            handle,
            total: job.episodes,
            done: 0,
            episodes: 0,
            rewarded: 0,
            reward_sum: 0.0,
            begun: now,
            reported: now,
        }
    }

    fn add(&mut self, done: u64, group: &[Episode]) {
        self.done = done;
        self.episodes += group.len() as u64;
        for reward in group.iter().filter_map(|episode| episode.reward) {
            (self.rewarded, self.reward_sum) = (self.rewarded + 1, self.reward_sum + reward);
        }
        if self.reported.elapsed() >= REPORT {
            self.report();
        }
    }

    fn now(&self) -> Value {
        let rate = self.episodes as f64 / self.begun.elapsed().as_secs_f64().max(1e-6);
        json!({
            "step": self.done,
            "total_steps": self.total,
            "episodes_per_s": rate,
            "eta_s": (self.total - self.done.min(self.total)) as f64 / rate.max(1e-6),
            "mean_reward": (self.rewarded > 0).then(|| self.reward_sum / self.rewarded as f64),
            "without_reward": self.episodes - self.rewarded,
        })
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        if self.episodes > 0 {
            self.handle.progress(self.done, self.done as f64 / self.total as f64, self.now());
            self.handle.checkpointed(self.done);
        }
    }
}
