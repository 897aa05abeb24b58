//! `GET /metrics`: Prometheus text. What requests leave behind is counted as they go; what the engine knows is
//! read from its last snapshot when somebody asks, and what jobs and uploads are at from their store.

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use super::health::resident_set_bytes;
use super::rl_collect::COLLECT_KIND;
use super::state::{AppState, unix_now_s};
use crate::engine::{EngineStats, ModelInfo};
use crate::jobs::{Counts, JobFilter, JobState, JobsError, PromiseCounts};
use crate::metrics::{self, Build, EngineSnapshot, MemoryPart, RunningJob};

/// Metrics
///
/// In the text format of Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "server",
    operation_id = "metrics",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain")),
)]
pub(super) async fn render(State(state): State<AppState>) -> impl IntoResponse {
    let (info, stats) = (state.engine.info(), state.engine.stats());
    let engine = metrics::engine(&EngineSnapshot {
        running: stats.running,
        waiting: stats.waiting,
        queue_limit: info.max_queue,
        kv_tokens_reserved: stats.kv_tokens_reserved,
        kv_tokens_capacity: info.kv_cache_tokens,
        steps: stats.steps,
        busy_s: stats.busy_s,
        prompt_tokens: stats.prompt_tokens,
        generated_tokens: stats.generated_tokens,
        finished: stats.finished,
        cancelled: stats.cancelled,
        adapters: stats.adapters.len(),
        adapter_bytes: stats.adapters.iter().map(|(_, _, bytes)| bytes).sum(),
        training_s: stats.train_s,
        training_tokens: stats.train_tokens,
        training_steps: stats.train_steps,
        trainers: stats.trainers,
        training_share: info.train_share,
        memory: memory(info, &stats),
    });
    let uptime_s = state.lifecycle.started().elapsed().as_secs_f64();
    let build = Build { device: &info.device, started_unix_s: state.started_unix_s() as f64 };
    metrics::process(&build, uptime_s, resident_set_bytes());
    let running = match jobs(&state).await {
        Ok(running) => running,
        Err(error) => {
            tracing::error!(%error, "the metrics are without the jobs");
            Vec::new()
        }
    };
    match state.uploads.counts().await {
        Ok(counts) => uploads(counts),
        Err(error) => tracing::error!(%error, "the metrics are without the uploads"),
    }
    match state.uploads.pending_by_sink().await {
        Ok(by_sink) => metrics::uploads_pending(&by_sink),
        Err(error) => tracing::error!(%error, "the metrics are without the sinks of the uploads"),
    }
    let text = state.prometheus.render() + &engine + &metrics::running_jobs(&running);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// Training tells what it was promised alone: what it takes of that is part of the process's memory.
fn memory(info: &ModelInfo, stats: &EngineStats) -> [MemoryPart; 4] {
    let of = |part, planned_bytes, used_bytes| MemoryPart { part, planned_bytes, used_bytes };
    let reserved = info.kv_cache_bytes / info.kv_cache_tokens.max(1) as u64 * stats.kv_tokens_reserved as u64;
    let adapters = stats.adapters.iter().map(|(_, _, bytes)| bytes).sum();
    [
        of("weights", info.weight_bytes, Some(info.weight_bytes)),
        of("kv_cache", info.kv_cache_bytes, Some(reserved)),
        of("adapters", info.adapter_cache_bytes, Some(adapters)),
        of("training", stats.train_planned_bytes, None),
    ]
}

fn uploads(PromiseCounts { pending, done, failed, oldest_pending_ms }: PromiseCounts) {
    let now_ms = unix_now_s().saturating_mul(1000) as i64;
    let age_s = oldest_pending_ms.map_or(0.0, |oldest| (now_ms - oldest).max(0) as f64 / 1000.0);
    metrics::uploads([("pending", pending), ("done", done), ("failed", failed)], age_s);
}

/// Shows how many jobs there are, and returns those that run.
async fn jobs(state: &AppState) -> Result<Vec<RunningJob>, JobsError> {
    let Counts { pending, running, completed, failed, cancelled } = state.jobs.counts().await?;
    metrics::jobs_by_state([
        ("pending", pending),
        ("running", running),
        ("completed", completed),
        ("failed", failed),
        ("cancelled", cancelled),
    ]);
    let filter = JobFilter { status: Some(JobState::Running), ..JobFilter::default() };
    let limit = u32::try_from(state.jobs.max_parallel()).unwrap_or(u32::MAX);
    let running = state.jobs.list(filter, limit).await?;
    // What collects makes no adapter.
    let training = running.into_iter().filter(|job| job.kind != COLLECT_KIND);
    let figures = training.map(|job| RunningJob {
        tokens_per_s: job.progress["tokens_per_s"].as_f64(),
        step: job.progress["step"].as_f64(),
        total_steps: job.progress["total_steps"].as_f64(),
        loss: job.progress["loss"].as_f64(),
        adapter: job.name,
    });
    Ok(figures.collect())
}
