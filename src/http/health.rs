//! `GET /health`: what the server is and how it does; `/health/live` and `/health/ready`: whether to restart it, whether to
//! send it requests. Reads the engine's last snapshot and the job store, so it answers at once also while the engine is in
//! the middle of a step.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use utoipa::ToSchema;

use super::error::DEFAULT_RETRY_AFTER_S;
use super::gate::{Lifecycle, Phase};
use super::state::AppState;
use crate::engine::Liveness;
use crate::jobs::{Counts, JobFilter, JobState, Jobs, JobsError, rfc3339};

/// State of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`; `stopping` once no request is taken any more; `failed` when the engine's thread has ended by itself.
    status: &'static str,
    /// Of the server.
    version: &'static str,
    /// Seconds since the start.
    uptime_s: f64,
    /// `cpu` or `cuda:N`.
    device: String,
    /// What is served.
    model: ModelHealth,
    /// Bytes.
    memory: MemoryHealth,
    /// Requests that wait.
    queue: QueueHealth,
    /// Requests that are worked on.
    running: RunningHealth,
    /// The cache of keys and values.
    kv_cache: KvCacheHealth,
    /// Adapters on the device.
    adapters: Vec<ResidentAdapter>,
    /// Training jobs.
    jobs: JobsHealth,
}

/// State of a server that does not take requests.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used: the two are answered where they are known")]
pub(super) enum NotServing {
    /// With everything that is known of the model
    Stopping(Box<Health>),
    /// There is no model yet
    Loading(Loading),
}

/// State of a server that has no model yet.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Loading {
    /// `loading`; `stopping` when it was asked to stop meanwhile.
    status: &'static str,
    /// Of the server.
    version: &'static str,
    /// Seconds since the start.
    uptime_s: f64,
}

/// Whether the process is to be left alone.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Live {
    /// `live`; `failed` when only a restart helps.
    status: &'static str,
}

/// Whether requests are answered.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ready {
    /// `ready`, `loading`, `stopping` or `failed`.
    status: &'static str,
    /// Why requests are not answered; null when they are.
    reason: Option<&'static str>,
}

/// What is served.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelHealth {
    /// The name it is served under.
    id: String,
    /// Family, as in its `config.json`.
    family: String,
    /// Parameters of the checkpoint.
    parameters: u64,
    /// Layers.
    layers: usize,
    /// Width.
    hidden_size: usize,
    /// Rows of the embedding.
    vocab_size: usize,
    /// Longest prompt and answer together, in tokens.
    context_length: usize,
    /// How dense weights are held.
    dtype: &'static str,
    /// `none`, or the format of the linear weights.
    quantization: &'static str,
}

/// Bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MemoryHealth {
    /// Of the weights as they are held.
    weight_bytes: u64,
    /// Taken for the KV cache.
    kv_cache_bytes: u64,
    /// Of the adapters on the device.
    adapter_bytes: u64,
    /// Of the whole process in main memory; null where the system does not tell.
    resident_set_bytes: Option<u64>,
}

/// Requests that wait.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct QueueHealth {
    /// Now.
    waiting: usize,
    /// At most; a request beyond gets 429.
    limit: usize,
}

/// Requests that are worked on.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RunningHealth {
    /// Now.
    requests: usize,
    /// At most.
    limit: usize,
    /// Ended since the start.
    finished: u64,
    /// Given up since the start, as their client left.
    cancelled: u64,
}

/// The cache of keys and values.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KvCacheHealth {
    /// Tokens that running requests have reserved.
    reserved_tokens: usize,
    /// Tokens that fit.
    capacity_tokens: usize,
}

/// An adapter on the device.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ResidentAdapter {
    /// Name.
    name: String,
    /// Which weights of that name.
    generation: u64,
    /// On the device.
    bytes: u64,
}

/// Training jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobsHealth {
    /// Now; null while the job store fails.
    running: Option<u64>,
    /// That wait for their turn.
    pending: Option<u64>,
    /// That run at once at most.
    limit: usize,
    /// The job that failed last, of those that are remembered; null when none did.
    last_error: Option<JobFailure>,
    /// Why the job store fails; null when it does not.
    store_error: Option<String>,
}

/// A job that failed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobFailure {
    /// The job.
    job_id: String,
    /// When, RFC 3339.
    at: Option<String>,
    /// Why.
    error: String,
}

impl JobsHealth {
    async fn of(jobs: &Jobs) -> Self {
        let limit = jobs.max_parallel();
        match Self::read(jobs).await {
            Ok((counts, last_error)) => Self {
                running: Some(counts.running),
                pending: Some(counts.pending),
                limit,
                last_error,
                store_error: None,
            },
            // The rest of the server is as well as it is.
            Err(error) => Self {
                running: None,
                pending: None,
                limit,
                last_error: None,
                store_error: Some(error.to_string()),
            },
        }
    }

    async fn read(jobs: &Jobs) -> Result<(Counts, Option<JobFailure>), JobsError> {
        let failed = JobFilter { status: Some(JobState::Failed), ..JobFilter::default() };
        let last = jobs.list(failed, 1).await?.pop().map(|job| JobFailure {
            job_id: job.id,
            at: job.finished_ms.map(rfc3339),
            error: job.error.unwrap_or_default(),
        });
        Ok((jobs.counts().await?, last))
    }
}

/// State of the server
#[utoipa::path(
    get,
    path = "/health",
    tag = "server",
    responses(
        (status = 200, description = "The server takes requests", body = Health),
        (status = 503, description = "The server is loading the model or stopping, or its engine has failed", body = NotServing),
    )
)]
pub(super) async fn health(State(state): State<AppState>) -> (StatusCode, Json<Health>) {
    let (info, stats) = (state.engine.info(), state.engine.stats());
    let ready = readiness(state.lifecycle.phase(), state.engine.liveness());
    let (code, status) = match ready.status {
        "ready" => (StatusCode::OK, "ok"),
        status => (StatusCode::SERVICE_UNAVAILABLE, status),
    };
    let resident = |(name, generation, bytes)| ResidentAdapter { name, generation, bytes };
    let health = Health {
        status,
        version: env!("CARGO_PKG_VERSION"),
        uptime_s: state.lifecycle.started().elapsed().as_secs_f64(),
        device: info.device.clone(),
        model: ModelHealth {
            id: state.settings.model_id.clone(),
            family: info.family.clone(),
            parameters: info.parameters,
            layers: info.layers,
            hidden_size: info.hidden_size,
            vocab_size: info.vocab_size,
            context_length: info.context_length,
            dtype: info.dtype,
            quantization: info.quantization,
        },
        memory: MemoryHealth {
            weight_bytes: info.weight_bytes,
            kv_cache_bytes: info.kv_cache_bytes,
            adapter_bytes: stats.adapters.iter().map(|(_, _, bytes)| bytes).sum(),
            resident_set_bytes: resident_set_bytes(),
        },
        queue: QueueHealth { waiting: stats.waiting, limit: info.max_queue },
        running: RunningHealth {
            requests: stats.running,
            limit: info.max_batch,
            finished: stats.finished,
            cancelled: stats.cancelled,
        },
        kv_cache: KvCacheHealth {
            reserved_tokens: stats.kv_tokens_reserved,
            capacity_tokens: info.kv_cache_tokens,
        },
        adapters: stats.adapters.into_iter().map(resident).collect(),
        jobs: JobsHealth::of(&state.jobs).await,
    };
    (code, Json(health))
}

/// Whether the process lives
///
/// 200 from the moment that the port is taken, also while the model is loaded and while the server stops. 503 means that
/// only a restart helps.
#[utoipa::path(
    get,
    path = "/health/live",
    tag = "server",
    responses(
        (status = 200, description = "Leave it alone", body = Live),
        (status = 503, description = "The engine's thread has ended by itself: restart the server", body = Live),
    )
)]
pub(super) async fn live(State(state): State<AppState>) -> (StatusCode, Json<Live>) {
    match state.engine.liveness() {
        Liveness::Dead => (StatusCode::SERVICE_UNAVAILABLE, Json(Live { status: "failed" })),
        Liveness::Accepting | Liveness::ShutDown => (StatusCode::OK, Json(Live { status: "live" })),
    }
}

/// Whether requests are answered
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "server",
    responses(
        (status = 200, description = "The model answers", body = Ready),
        (status = 503, description = "Not now, with the reason; Retry-After tells when to ask again", body = Ready),
    )
)]
pub(super) async fn ready(State(state): State<AppState>) -> (StatusCode, HeaderMap, Json<Ready>) {
    told(readiness(state.lifecycle.phase(), state.engine.liveness()))
}

/// The same paths for a process that has no model yet.
pub(super) fn without_a_model() -> Router<Lifecycle> {
    let not_yet = |lifecycle: &Lifecycle| readiness(lifecycle.phase(), Liveness::Accepting);
    let health = async move |State(lifecycle): State<Lifecycle>| {
        let health = Loading {
            status: not_yet(&lifecycle).status,
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: lifecycle.started().elapsed().as_secs_f64(),
        };
        (StatusCode::SERVICE_UNAVAILABLE, retry_after(), Json(health))
    };
    Router::new()
        .route("/health", get(health))
        .route("/health/live", get(async || Json(Live { status: "live" })))
        .route(
            "/health/ready",
            get(async move |State(lifecycle): State<Lifecycle>| told(not_yet(&lifecycle))),
        )
}

fn readiness(phase: Phase, engine: Liveness) -> Ready {
    let (status, reason) = match (phase, engine) {
        (Phase::Loading, _) => ("loading", Some("the model is being downloaded or loaded")),
        (_, Liveness::Dead) => (
            "failed",
            Some("the engine's thread has ended by itself; the log has the reason; restart the server"),
        ),
        (Phase::Stopping, _) | (_, Liveness::ShutDown) => {
            ("stopping", Some("the server takes no more requests"))
        }
        (Phase::Serving, Liveness::Accepting) => ("ready", None),
    };
    Ready { status, reason }
}

fn told(ready: Ready) -> (StatusCode, HeaderMap, Json<Ready>) {
    match ready.reason {
        None => (StatusCode::OK, HeaderMap::new(), Json(ready)),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, retry_after(), Json(ready)),
    }
}

fn retry_after() -> HeaderMap {
    HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from(DEFAULT_RETRY_AFTER_S))])
}

/// Bytes of this process in main memory, as Linux tells it.
pub(super) fn resident_set_bytes() -> Option<u64> {
    resident_set_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn resident_set_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_ready_when_it_serves_and_its_engine_lives() {
        for (phase, engine, status) in [
            (Phase::Loading, Liveness::Accepting, "loading"),
            (Phase::Serving, Liveness::Accepting, "ready"),
            (Phase::Serving, Liveness::Dead, "failed"),
            (Phase::Serving, Liveness::ShutDown, "stopping"),
            (Phase::Stopping, Liveness::Accepting, "stopping"),
            (Phase::Stopping, Liveness::Dead, "failed"),
        ] {
            let (code, headers, Json(ready)) = told(readiness(phase, engine));
            assert_eq!(ready.status, status, "{phase:?} {engine:?}");
            assert_eq!(code == StatusCode::OK, status == "ready", "{phase:?} {engine:?}");
            assert_eq!(
                headers.contains_key(header::RETRY_AFTER),
                ready.reason.is_some(),
                "{phase:?} {engine:?}"
            );
        }
    }

    #[test]
    fn the_resident_set_is_read_from_the_status() {
        assert_eq!(resident_set_of("VmPeak:\t  10 kB\nVmRSS:\t    1234 kB\n"), Some(1234 * 1024));
        assert_eq!(resident_set_of("Name:\tgurukul\n"), None);
        assert_eq!(resident_set_of("VmRSS:\t lots\n"), None);
        if cfg!(target_os = "linux") {
            assert!(resident_set_bytes().is_some_and(|bytes| bytes > 1 << 20));
        }
    }
}
