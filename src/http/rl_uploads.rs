//! `/rl/uploads`: the uploads that were promised, and where they stand. What they hold and how they are sent is not
//! known here.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, ErrorBody};
use super::extract::{ApiQuery, path_text};
use super::fields::in_range;
use super::state::AppState;
use crate::jobs::{Promise, PromiseCounts, PromiseState, rfc3339};

/// Most uploads of one answer.
const MAX_PAGE: i64 = 1000;

/// A promised upload.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Upload {
    /// Of the upload.
    upload_id: String,
    /// Where it stands.
    state: PromiseState,
    /// The run that it belongs to.
    run_id: String,
    /// The sink that it goes to.
    sink: String,
    /// What it is called there.
    key: String,
    /// Hash of its content, hexadecimal.
    sha256: String,
    /// Size of its content.
    bytes: u64,
    /// Attempts that did not succeed.
    attempts: u32,
    /// Why the latest of them did not.
    error: Option<String>,
    /// When it was promised, RFC 3339.
    created_at: String,
    /// When the next attempt is due; null when none is.
    next_attempt_at: Option<String>,
    /// When it was delivered, or refused for good.
    completed_at: Option<String>,
}

impl From<Promise> for Upload {
    fn from(promise: Promise) -> Self {
        let is_pending = promise.state == PromiseState::Pending;
        Self {
            upload_id: promise.id,
            state: promise.state,
            run_id: promise.run,
            sink: promise.sink,
            key: promise.key,
            sha256: promise.sha256,
            bytes: promise.bytes,
            attempts: promise.attempts,
            error: promise.error,
            created_at: rfc3339(promise.created_ms),
            next_attempt_at: is_pending.then(|| rfc3339(promise.next_ms)),
            completed_at: promise.ended_ms.map(rfc3339),
        }
    }
}

/// Uploads, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UploadList {
    /// Newest first.
    uploads: Vec<Upload>,
    /// The `before` that goes on after these; null when there are no more.
    next: Option<String>,
    /// How many there are in each state, whatever was asked for.
    counts: UploadCounts,
}

/// How many uploads there are.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UploadCounts {
    /// Not delivered yet.
    pending: u64,
    /// Delivered, of those that are remembered.
    done: u64,
    /// Refused for good.
    failed: u64,
}

impl From<PromiseCounts> for UploadCounts {
    fn from(counts: PromiseCounts) -> Self {
        Self { pending: counts.pending, done: counts.done, failed: counts.failed }
    }
}

/// Which uploads.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UploadQuery {
    /// Only those that are pending, done or failed.
    #[param(value_type = PromiseState, required = false)]
    state: Option<String>,
    /// Only those promised before the upload of this id.
    #[param(value_type = String, required = false)]
    before: Option<String>,
    /// Uploads at most, 1 to 1000. Default 50.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 1000)]
    limit: Option<i64>,
}

/// List the uploads
///
/// Each was promised with an episode that was collected, and is tried until it is through. One that a sink refuses
/// for good is `failed`; it is kept, and tried again when the server starts anew or when somebody asks.
#[utoipa::path(
    get,
    path = "/rl/uploads",
    tag = "rl",
    operation_id = "list_uploads",
    params(UploadQuery),
    responses(
        (status = 200, description = "The uploads, newest first", body = UploadList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "The upload to begin after does not exist", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn list(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<UploadQuery>,
) -> Result<Json<UploadList>, ApiError> {
    let limit = in_range("limit", query.limit.unwrap_or(50), 1..=MAX_PAGE)?;
    let limit = u32::try_from(limit).map_err(|_| ApiError::invalid("limit", "is too large"))?;
    let states = "must be pending, done or failed";
    let parse = |text: String| PromiseState::parse(&text).ok_or_else(|| ApiError::invalid("state", states));
    let which = query.state.map(parse).transpose()?;
    let mut promises = state.uploads.list(which, query.before.as_deref(), limit + 1).await?;
    let has_more = promises.len() > limit as usize;
    promises.truncate(limit as usize);
    let uploads: Vec<Upload> = promises.into_iter().map(Upload::from).collect();
    let next = uploads.last().filter(|_| has_more).map(|upload| upload.upload_id.clone());
    Ok(Json(UploadList { uploads, next, counts: state.uploads.counts().await?.into() }))
}

/// State of an upload
#[utoipa::path(
    get,
    path = "/rl/uploads/{upload_id}",
    tag = "rl",
    operation_id = "upload_status",
    params(("upload_id" = String, Path, description = "The upload")),
    responses(
        (status = 200, description = "Where it stands", body = Upload),
        (status = 404, description = "No such upload", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
    ),
)]
pub(super) async fn get(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Upload>, ApiError> {
    Ok(Json(state.uploads.get(&path_text("upload_id", id)?).await?.into()))
}

/// Try a failed upload again
#[utoipa::path(
    post,
    path = "/rl/uploads/{upload_id}/retry",
    tag = "rl",
    operation_id = "retry_upload",
    params(("upload_id" = String, Path, description = "The upload")),
    responses(
        (status = 202, description = "It is tried at once", body = Upload),
        (status = 404, description = "No such upload", body = ErrorBody),
        (status = 409, description = "It is not failed", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub(super) async fn retry(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<(StatusCode, Json<Upload>), ApiError> {
    let promise = state.uploads.retry(&path_text("upload_id", id)?).await?;
    Ok((StatusCode::ACCEPTED, Json(promise.into())))
}
