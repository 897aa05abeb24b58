//! `GET /adapter/events/{job_id}`: a job as a stream of events, from its first step or from the one after
//! `Last-Event-ID`. What is sent is read from the store, each step once and in order; news only wake the reader, so
//! none can be missed or come twice.

use std::collections::VecDeque;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use axum::response::sse::Event as Frame;
use futures::stream::{self, Stream};
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, ErrorBody};
use super::extract::path_text;
use super::jobs::{JobStatus, figures_schema};
use super::sse;
use super::state::AppState;
use crate::jobs::{Job, JobState, Point, Watch, rfc3339};

/// Digits of the largest step that a client can have seen; any such number is one that a u64 holds.
const MAX_DIGITS: usize = 18;

/// Points read at once.
const PAGE: u32 = 256;

/// Data of a `progress` event; the event's id is the step.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProgressEvent {
    /// Of the job.
    job_id: String,
    /// The step.
    step: u64,
    /// When it was taken, RFC 3339.
    time: String,
    /// How much is done, 0 to 1.
    progress: f64,
    /// The figures of this step.
    #[schema(schema_with = figures_schema)]
    metrics: Value,
}

/// Where the events go on. The header is read by hand, since browsers send an empty one.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "the field is read by the derive alone")]
struct LastEventId {
    /// The last step that was seen; empty when there was none.
    #[param(rename = "Last-Event-ID", value_type = String, required = false, pattern = "^[0-9]{0,18}$", example = "17")]
    last_event_id: Option<String>,
}

impl ProgressEvent {
    fn new(id: &str, point: Point) -> Self {
        let total = point.metrics["total_steps"].as_f64().filter(|total| *total > 0.0);
        Self {
            job_id: id.to_owned(),
            step: point.step,
            time: rfc3339(point.at_ms),
            progress: total.map_or(0.0, |total| (point.step as f64 / total).min(1.0)),
            metrics: point.metrics,
        }
    }
}

/// Follow a job
///
/// Server-sent events: `progress` for each step, with the step as its id; `heartbeat` with the job's state every ten
/// seconds; at the end `complete` with the state of a completed or cancelled job, or `error` with that of a failed one.
/// With the header `Last-Event-ID` it begins after that step. A job that has ended is told from the start. The stream
/// ends without `complete` when the server stops: the job goes on with the next start, and so can the client.
#[utoipa::path(
    get,
    path = "/adapter/events/{job_id}",
    tag = "training",
    operation_id = "job_events",
    params(
        ("job_id" = String, Path, description = "The job"),
        LastEventId,
    ),
    responses(
        (status = 200, description = "The events; the data of `progress` is a `ProgressEvent`, that of the others a `JobStatus`", body = String, content_type = "text/event-stream"),
        (status = 400, description = "Last-Event-ID is no step", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn events(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = path_text("job_id", id)?;
    let last = last_event_id(&headers)?;
    state.jobs.get(&id).await?;
    let period = state.settings.heartbeat;
    let mut heartbeat = tokio::time::interval_at(Instant::now() + period, period);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The watch begins before anything is read: what changes from here on wakes it.
    let watch = state.jobs.watch(&id);
    let follow = Follow { state, id, watch, last, heartbeat, ready: VecDeque::new(), is_over: false };
    Ok(sse::stream_of(follow.into_stream()))
}

/// An empty id is what a browser sends when it has seen none.
fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get("last-event-id").filter(|value| !value.is_empty()) else { return Ok(None) };
    let digits = value
        .to_str()
        .ok()
        .map(str::trim)
        .filter(|text| text.len() <= MAX_DIGITS && text.bytes().all(|byte| byte.is_ascii_digit()));
    let step = digits.and_then(|text| text.parse().ok());
    step.map(Some)
        .ok_or_else(|| ApiError::invalid("Last-Event-ID", "must be a step: the id of a progress event"))
}

struct Follow {
    state: AppState,
    id: String,
    watch: Watch,
    /// The last step that was sent, or that the client has.
    last: Option<u64>,
    heartbeat: Interval,
    /// Frames that wait to be sent.
    ready: VecDeque<Frame>,
    is_over: bool,
}

impl Follow {
    fn into_stream(self) -> impl Stream<Item = Frame> + Send + 'static {
        stream::unfold(self, |mut follow| async move {
            loop {
                if let Some(frame) = follow.ready.pop_front() {
                    return Some((frame, follow));
                }
                if follow.is_over {
                    return None;
                }
                if let Err(error) = follow.read().await {
                    // The status is long sent: the envelope goes into the stream, and nothing after it.
                    follow.ready.push_back(sse::named("error", &error.body()));
                    follow.is_over = true;
                }
            }
        })
    }

    /// Puts what is new into `ready`, or waits for something new.
    async fn read(&mut self) -> Result<(), ApiError> {
        // In this order: a job that had ended when it was read has all its points in the store.
        let job = self.state.jobs.get(&self.id).await?;
        let points = self.state.jobs.points(&self.id, self.last, PAGE).await?;
        if let Some(newest) = points.last() {
            self.last = Some(newest.step);
            let frames = points.into_iter().map(|point| {
                let step = point.step.to_string();
                sse::named("progress", &ProgressEvent::new(&self.id, point)).id(step)
            });
            self.ready.extend(frames);
        } else if job.status.has_ended() {
            self.ready.push_back(end(job));
            self.is_over = true;
        } else {
            tokio::select! {
                changed = self.watch.changed() => self.is_over = !changed,
                _ = self.heartbeat.tick() => {
                    self.ready.push_back(sse::named("heartbeat", &JobStatus::from(job)));
                }
            }
        }
        Ok(())
    }
}

fn end(job: Job) -> Frame {
    let name = if job.status == JobState::Failed { "error" } else { "complete" };
    sse::named(name, &JobStatus::from(job))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_event_is_a_step_or_nothing() {
        let of = |value: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert("last-event-id", value.parse().expect("is a header value"));
            }
            last_event_id(&headers).map_err(|error| error.status().as_u16())
        };
        assert_eq!(of(None), Ok(None));
        assert_eq!(of(Some("")), Ok(None));
        assert_eq!(of(Some("17")), Ok(Some(17)));
        for wrong in ["-1", "+1", "x", "1.5", "9999999999999999999"] {
            assert_eq!(of(Some(wrong)), Err(400), "{wrong}");
        }
    }

    #[test]
    fn progress_is_a_share_even_where_the_total_is_not_known() {
        let of = |metrics: Value| ProgressEvent::new("x", Point { step: 5, at_ms: 0, metrics }).progress;
        assert_eq!(of(serde_json::json!({"total_steps": 10})), 0.5);
        assert_eq!(of(serde_json::json!({"total_steps": 4})), 1.0);
        assert_eq!(of(serde_json::json!({"total_steps": 0})), 0.0);
        assert_eq!(of(Value::Null), 0.0);
    }
}
