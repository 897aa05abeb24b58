//! `GET /`: where things are, for somebody who opens the server's address.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::state::AppState;

/// Where things are.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Index {
    /// `gurukul`
    name: &'static str,
    /// Of the server.
    version: &'static str,
    /// The base model.
    model: String,
    /// Page to read about the endpoints and to try them.
    docs: &'static str,
    /// The same for programs: OpenAPI 3.1.
    openapi: &'static str,
    /// State of the server.
    health: &'static str,
    /// The endpoints that generate.
    generate: [&'static str; 3],
    /// The endpoints that train.
    train: [&'static str; 2],
}

/// Where things are
#[utoipa::path(get, path = "/", tag = "server", responses((status = 200, description = "An index", body = Index)))]
pub(super) async fn index(State(state): State<AppState>) -> Json<Index> {
    Json(Index {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        model: state.settings.model_id.clone(),
        docs: "/docs/",
        openapi: "/openapi.json",
        health: "/health",
        generate: ["/generate-lite", "/v1/completions", "/v1/chat/completions"],
        train: ["/adapter/train-lite", "/v1/fine_tuning/jobs"],
    })
}
