//! `GET /metrics`: Prometheus text. What requests leave behind is counted as they go; what the engine knows is
//! read from its last snapshot when somebody asks.

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use super::health::resident_set_bytes;
use super::state::AppState;
use crate::metrics::{self, EngineSnapshot};

/// Metrics
///
/// In the text format of Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "server",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain")),
)]
pub(super) async fn render(State(state): State<AppState>) -> impl IntoResponse {
    let (info, stats) = (state.engine.info(), state.engine.stats());
    metrics::engine(&EngineSnapshot {
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
    });
    metrics::process(state.started.elapsed().as_secs_f64(), resident_set_bytes());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.prometheus.render())
}
