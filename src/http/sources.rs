//! `GET /sources`: what a training job may name as its source. Names and places, and nothing that is secret.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, ErrorBody};
use super::extract::ApiQuery;
use super::state::AppState;
use crate::config::connectors::{self, Connectors};

/// Which file to look at.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct SourcesQuery {
    /// File inside the configs folder that describes the sources. Default `mcp_connectors.yml`.
    #[param(value_type = String, required = false, min_length = 1)]
    mcp_config_path: Option<String>,
}

/// The sources of a connectors file.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SourceList {
    /// The file.
    #[schema(example = "mcp_connectors.yml")]
    file: String,
    /// By name.
    sources: Vec<SourceInfo>,
}

/// One source.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SourceInfo {
    /// What a request gives as `source`.
    #[schema(example = "phrasebook")]
    name: String,
    /// Its `type` in the file.
    #[schema(example = "local")]
    kind: &'static str,
    /// Where its data lies, in one line.
    #[schema(example = "assets/phrasebook/train.jsonl")]
    description: String,
}

/// List the sources
///
/// As the connectors file describes them now. Whether their data can be read is not looked at; `gurukul sources check`
/// does.
#[utoipa::path(
    get,
    path = "/sources",
    tag = "training",
    operation_id = "list_sources",
    params(SourcesQuery),
    responses(
        (status = 200, description = "The sources", body = SourceList),
        (status = 400, description = "The connectors file is not there, or cannot be used; says why", body = ErrorBody),
    ),
)]
pub(super) async fn list(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<SourcesQuery>,
) -> Result<Json<SourceList>, ApiError> {
    let connectors = Connectors::load(&state.settings.configs_dir, query.mcp_config_path.as_deref())?;
    let sources = connectors.iter().map(|(name, source)| SourceInfo {
        name: name.to_owned(),
        kind: source.kind(),
        description: source.description(),
    });
    let sources = sources.collect();
    let file = query.mcp_config_path.unwrap_or_else(|| connectors::FILE_NAME.to_owned());
    Ok(Json(SourceList { file, sources }))
}
