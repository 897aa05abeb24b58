//! `GET /v1/models`: the served model, then the adapters, as OpenAI's API lists models.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::super::error::{ApiError, ErrorBody};
use super::super::state::AppState;
use super::of_model;
use crate::adapters::AdapterInfo;

/// All models.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelList {
    /// `list`
    object: &'static str,
    /// The base model first.
    data: Vec<Model>,
}

/// A model: the base or an adapter.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct Model {
    /// The name to ask for.
    id: String,
    /// `model`
    object: &'static str,
    /// Seconds since 1970: of an adapter's weights where known, else of the server's start.
    created: u64,
    /// `gurukul`
    owned_by: &'static str,
    /// Of an adapter: the base model.
    parent: Option<String>,
    /// Longest prompt and answer together, in tokens.
    max_model_len: usize,
}

/// List the models
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "openai",
    operation_id = "list_models",
    responses((status = 200, description = "The base model and the adapters that can be used", body = ModelList)),
)]
pub(in crate::http) async fn list(State(state): State<AppState>) -> Result<Json<ModelList>, ApiError> {
    let adapters = state.adapters.list().await?;
    let usable = adapters.iter().filter(|info| info.error.is_none()).map(|info| adapter(&state, info));
    let data = std::iter::once(base(&state)).chain(usable).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// Look at one model
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    tag = "openai",
    operation_id = "retrieve_model",
    params(("id" = String, Path, description = "Name of the base model or of an adapter")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "No such model", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn retrieve(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::invalid("id", "must be UTF-8"))?;
    one(&state, &id).await
}

/// The same for a hub's name, `owner/name`, whose slash a client did not encode.
pub(in crate::http) async fn retrieve_of_owner(
    State(state): State<AppState>,
    id: Result<Path<(String, String)>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path((owner, name)) = id.map_err(|_| ApiError::invalid("id", "must be UTF-8"))?;
    one(&state, &format!("{owner}/{name}")).await
}

async fn one(state: &AppState, id: &str) -> Result<Json<Model>, ApiError> {
    if id == state.settings.model_id {
        return Ok(Json(base(state)));
    }
    match state.adapters.get(id).await {
        Ok(info) => Ok(Json(adapter(state, &info))),
        Err(error) => Err(of_model(state, id, error)),
    }
}

fn base(state: &AppState) -> Model {
    Model {
        id: state.settings.model_id.clone(),
        object: "model",
        created: state.started_unix_s(),
        owned_by: "gurukul",
        parent: None,
        max_model_len: state.engine.info().context_length,
    }
}

fn adapter(state: &AppState, info: &AdapterInfo) -> Model {
    let written = info.created_at.as_deref().and_then(|at| humantime::parse_rfc3339(at).ok());
    let written = written.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    Model {
        id: info.name.clone(),
        created: written.map_or_else(|| state.started_unix_s(), |since| since.as_secs()),
        parent: Some(state.settings.model_id.clone()),
        ..base(state)
    }
}
