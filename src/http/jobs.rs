//! The jobs that train adapters or collect episodes: their state, their logs, their list; ending one and letting one go on.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::openapi::Ref;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, ErrorBody};
use super::extract::{ApiQuery, path_text};
use super::fields::in_range;
use super::rl_collect::COLLECT_KIND;
use super::state::AppState;
use crate::engine::training::TrainingPlan;
use crate::jobs::{Job, JobFilter, JobState, Level, LogLine, LogPage, rfc3339};
use crate::rl::learn::RlProgress;
use crate::train::Progress;

/// Most lines or jobs of one answer.
const MAX_PAGE: i64 = 1000;

/// Where a job stands.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobStatus {
    /// Of the job.
    job_id: String,
    /// What it does: `train` or `collect`.
    #[schema(example = "train")]
    kind: String,
    /// Where it stands.
    status: JobState,
    /// How much is done, 0 to 1.
    progress: f64,
    /// For a person.
    message: String,
    /// When it was accepted, RFC 3339.
    created_at: String,
    /// When it first began.
    started_at: Option<String>,
    /// When it ended, in whichever way.
    completed_at: Option<String>,
    /// Why it failed.
    error: Option<String>,
    /// Name of the adapter that it makes, or that it samples from; null is the base model.
    adapter_name: Option<String>,
    /// The run that it collects episodes into.
    #[serde(skip_serializing_if = "Option::is_none")]
    run_id: Option<String>,
    /// Generation that the finished adapter is served with.
    adapter_generation: Option<u64>,
    /// Name of the source.
    source: Option<String>,
    /// The latest figures; an empty object before the first step.
    #[schema(schema_with = figures_schema)]
    metrics: Value,
    /// The memory that was planned for it.
    #[schema(value_type = Option<TrainingPlan>)]
    plan: Value,
    /// Step of its last checkpoint, from which it would go on.
    checkpoint_step: Option<u64>,
    /// It runs, and was asked to end.
    cancel_requested: bool,
}

impl From<Job> for JobStatus {
    fn from(job: Job) -> Self {
        let adapter_name = match job.kind.as_str() {
            COLLECT_KIND => job.spec["adapter"].as_str().map(str::to_owned),
            _ => Some(job.name),
        };
        Self {
            source: job.spec["source_name"].as_str().map(str::to_owned),
            adapter_generation: job.result["generation"].as_u64(),
            job_id: job.id,
            status: job.status,
            progress: job.fraction,
            message: job.message,
            created_at: rfc3339(job.created_ms),
            started_at: job.started_ms.map(rfc3339),
            completed_at: job.finished_ms.map(rfc3339),
            error: job.error,
            adapter_name,
            run_id: job.spec["run_id"].as_str().map(str::to_owned),
            kind: job.kind,
            metrics: figures(job.progress),
            plan: job.plan,
            checkpoint_step: job.checkpoint_step,
            cancel_requested: job.cancel_requested,
        }
    }
}

/// What figures are depends on the job's kind.
pub(super) fn figures_schema() -> AnyOfBuilder {
    let of = |name| Ref::from_schema_name(name);
    let others = ObjectBuilder::new().description(Some(
        "Of a job that collects: step and total_steps (episodes), episodes_per_s, eta_s, mean_reward, without_reward; of \
         any before its first step: nothing",
    ));
    AnyOfBuilder::new()
        .description(Some(
            "The latest figures: Progress of a job that trains, RlProgress of one that learns from rewards",
        ))
        .item(of(Progress::name()))
        .item(of(RlProgress::name()))
        .item(others)
}

/// Figures as an object, whether or not there are any.
fn figures(progress: Value) -> Value {
    if progress.is_object() { progress } else { Map::new().into() }
}

/// Jobs, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobList {
    /// Newest first.
    jobs: Vec<JobStatus>,
}

/// Lines of a job's log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobLog {
    /// Of the job.
    job_id: String,
    /// Where the job stands.
    status: JobState,
    /// The lines, oldest first.
    logs: Vec<JobLogLine>,
    /// Lines that were ever written.
    total: u64,
    /// The oldest of them, which are no longer kept: the log begins with the line of this number.
    dropped: u64,
    /// The `start` that goes on after these lines.
    next: u64,
}

/// A line of a job's log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobLogLine {
    /// Counts from 0.
    number: u64,
    /// RFC 3339.
    time: String,
    /// How much it matters.
    level: Level,
    /// The text.
    line: String,
}

impl From<LogLine> for JobLogLine {
    fn from(line: LogLine) -> Self {
        Self { number: line.number, time: rfc3339(line.at_ms), level: line.level, line: line.line }
    }
}

impl JobLog {
    fn new(job: Job, page: LogPage, start: u64) -> Self {
        let next = page.lines.last().map_or(start.clamp(page.dropped, page.total), |line| line.number + 1);
        Self {
            job_id: job.id,
            status: job.status,
            logs: page.lines.into_iter().map(JobLogLine::from).collect(),
            total: page.total,
            dropped: page.dropped,
            next,
        }
    }
}

/// Which lines of a log.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// Number of the first line. Default 0.
    #[param(value_type = i64, required = false, minimum = 0)]
    start: Option<i64>,
    /// Lines at most, 1 to 1000. Default 100.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 1000)]
    limit: Option<i64>,
}

/// How much of a log's end.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TailQuery {
    /// Lines at most, 1 to 1000. Default 50.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 1000)]
    n: Option<i64>,
}

/// Which jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Jobs at most, 1 to 1000. Default 50.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 1000)]
    limit: Option<i64>,
    /// Only those that are pending, running, completed, failed or cancelled.
    #[param(value_type = JobState, required = false)]
    status: Option<String>,
}

fn page(field: &str, value: Option<i64>, default: i64) -> Result<u32, ApiError> {
    let size = in_range(field, value.unwrap_or(default), 1..=MAX_PAGE)?;
    u32::try_from(size).map_err(|_| ApiError::invalid(field, "is too large"))
}

/// State of a job
#[utoipa::path(
    get,
    path = "/adapter/status/{job_id}",
    tag = "training",
    operation_id = "job_status",
    params(("job_id" = String, Path, description = "The job")),
    responses(
        (status = 200, description = "Where it stands", body = JobStatus),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn status(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<JobStatus>, ApiError> {
    Ok(Json(state.jobs.get(&path_text("job_id", id)?).await?.into()))
}

/// Log of a job
#[utoipa::path(
    get,
    path = "/adapter/logs/{job_id}",
    tag = "training",
    operation_id = "job_log",
    params(("job_id" = String, Path, description = "The job"), LogQuery),
    responses(
        (status = 200, description = "Lines from `start` on", body = JobLog),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn log(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    ApiQuery(query): ApiQuery<LogQuery>,
) -> Result<Json<JobLog>, ApiError> {
    let start = in_range("start", query.start.unwrap_or(0), 0..=i64::MAX)? as u64;
    let limit = page("limit", query.limit, 100)?;
    let (job, lines) = state.jobs.log(&path_text("job_id", id)?, start, limit).await?;
    Ok(Json(JobLog::new(job, lines, start)))
}

/// End of a job's log
#[utoipa::path(
    get,
    path = "/adapter/logs/{job_id}/tail",
    tag = "training",
    operation_id = "job_log_tail",
    params(("job_id" = String, Path, description = "The job"), TailQuery),
    responses(
        (status = 200, description = "The last lines", body = JobLog),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn log_tail(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    ApiQuery(query): ApiQuery<TailQuery>,
) -> Result<Json<JobLog>, ApiError> {
    let n = page("n", query.n, 50)?;
    let (job, lines) = state.jobs.log_tail(&path_text("job_id", id)?, n).await?;
    Ok(Json(JobLog::new(job, lines, 0)))
}

/// End a job
///
/// One that waits ends at once; one that runs ends at its next step, and what was trained stays as a checkpoint.
#[utoipa::path(
    post,
    path = "/adapter/cancel/{job_id}",
    tag = "training",
    operation_id = "cancel_job",
    params(("job_id" = String, Path, description = "The job")),
    responses(
        (status = 200, description = "It has ended, or will at its next step", body = JobStatus),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It has ended already", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub(super) async fn cancel(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<JobStatus>, ApiError> {
    Ok(Json(state.jobs.cancel(&path_text("job_id", id)?).await?.into()))
}

/// Let a job go on
///
/// A failed or cancelled one, from its last checkpoint, when its turn comes.
#[utoipa::path(
    post,
    path = "/adapter/resume/{job_id}",
    tag = "training",
    operation_id = "resume_job",
    params(("job_id" = String, Path, description = "The job")),
    responses(
        (status = 202, description = "It waits for its turn", body = JobStatus),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It has not ended, it is completed, or another job has its adapter's name", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub(super) async fn resume(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<(StatusCode, Json<JobStatus>), ApiError> {
    Ok((StatusCode::ACCEPTED, Json(state.jobs.resume(&path_text("job_id", id)?).await?.into())))
}

/// List the jobs
#[utoipa::path(
    get,
    path = "/adapter/jobs",
    tag = "training",
    operation_id = "list_jobs",
    params(ListQuery),
    responses(
        (status = 200, description = "The jobs, newest first", body = JobList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn list(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Json<JobList>, ApiError> {
    let limit = page("limit", query.limit, 50)?;
    let states = "must be pending, running, completed, failed or cancelled";
    let parse = |text: String| JobState::parse(&text).ok_or_else(|| ApiError::invalid("status", states));
    let filter = JobFilter { status: query.status.map(parse).transpose()?, ..JobFilter::default() };
    let jobs = state.jobs.list(filter, limit).await?;
    Ok(Json(JobList { jobs: jobs.into_iter().map(JobStatus::from).collect() }))
}
