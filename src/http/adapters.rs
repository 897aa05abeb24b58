//! The adapters on disk: list, look at one, delete one.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::extract::path_text;
use super::state::AppState;
use crate::adapters::AdapterInfo;

/// All adapters.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AdapterList {
    /// By name; also those that cannot be used, with the reason in `error`.
    adapters: Vec<AdapterInfo>,
}

/// What was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Deleted {
    /// Name of the adapter.
    name: String,
    /// True.
    deleted: bool,
}

/// List the adapters
#[utoipa::path(
    get,
    path = "/adapter/list",
    tag = "adapters",
    operation_id = "list_adapters",
    responses((status = 200, description = "The adapters", body = AdapterList)),
)]
pub(super) async fn list(State(state): State<AppState>) -> Result<Json<AdapterList>, ApiError> {
    Ok(Json(AdapterList { adapters: state.adapters.list().await? }))
}

/// Look at one adapter
#[utoipa::path(
    get,
    path = "/adapter/{name}",
    tag = "adapters",
    operation_id = "get_adapter",
    params(("name" = String, Path, description = "Name of the adapter", example = "hindi-v1")),
    responses(
        (status = 200, description = "The adapter", body = AdapterInfo),
        (status = 400, description = "Not a name that an adapter can have", body = ErrorBody),
        (status = 404, description = "No such adapter", body = ErrorBody),
    ),
)]
pub(super) async fn get(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<AdapterInfo>, ApiError> {
    let name = path_text("name", name)?;
    state.adapters.get(&name).await.map(Json).map_err(in_path)
}

/// Delete an adapter
///
/// From the disk and from the engine. Answers that are being generated with it end as they began.
#[utoipa::path(
    delete,
    path = "/adapter/{name}",
    tag = "adapters",
    operation_id = "delete_adapter",
    params(("name" = String, Path, description = "Name of the adapter", example = "hindi-v1")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 400, description = "Not a name that an adapter can have", body = ErrorBody),
        (status = 404, description = "No such adapter", body = ErrorBody),
    ),
)]
pub(super) async fn delete(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Deleted>, ApiError> {
    let name = path_text("name", name)?;
    state.adapters.delete(&name).await.map_err(in_path)?;
    Ok(Json(Deleted { name, deleted: true }))
}

/// Here the name is in the path, under a parameter called `name`.
fn in_path(error: crate::adapters::AdapterError) -> ApiError {
    ApiError::from(error).param("name")
}
