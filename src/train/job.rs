//! One training job from its first record to the served adapter.

use tokio::sync::watch;

use super::{Context, Ending, Reporter, Stop, TrainError, TrainJob};
use crate::engine::training::TrainingPlan;

/// Checks a job without starting it: the modules it names, and that it fits the memory.
///
/// # Errors
/// The field that does not fit the model; the memory's figures and what would fit.
pub async fn check(context: &Context, job: &TrainJob) -> Result<TrainingPlan, TrainError> {
    let _ = (context, job);
    Err(TrainError::Failed("not built yet".into()))
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
    let _ = (context, job_id, job, reporter, stop);
    Err(TrainError::Failed("not built yet".into()))
}
