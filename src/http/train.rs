//! `POST /adapter/train-lite`: accepts a training job. What is common to all ways of asking for one (settings and
//! source resolved, memory planned, the job stored) is [`accept`].

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::extract::ApiJson;
use super::state::AppState;
use crate::adapters::check_name;
use crate::config::adapter::{AdapterConfig, FieldError};
use crate::config::connectors::Connectors;
use crate::data::SourceConfig;
use crate::engine::training::TrainingPlan;
use crate::jobs::{Job, JobState, JobsError, NewJob, UploadedFile, rfc3339};
use crate::train::TrainJob;

/// The kind of job that trains an adapter; what is stored with it is a [`TrainJob`].
pub const TRAIN_KIND: &str = "train";

/// Examples of a request that does not say how many.
const MAX_SAMPLES: u64 = 200;

/// An adapter of such a name could not be asked for: the names are routes beside `/adapter/{name}`, or stand for the
/// base model.
const RESERVED: [&str; 9] =
    ["cancel", "events", "jobs", "list", "logs", "none", "resume", "status", "train-lite"];

/// An adapter to train.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TrainLite {
    /// Name of a source in the connectors file. Required unless `resume_from` is there.
    #[schema(example = "phrasebook")]
    source: Option<String>,
    /// Examples taken from the source. Default 200.
    #[schema(minimum = 1)]
    max_samples: Option<u64>,
    /// File inside the configs folder to take the training settings from. Default `adapter_config.yaml`.
    config_path: Option<String>,
    /// File inside the configs folder that describes the sources. Default `mcp_connectors.yml`.
    mcp_config_path: Option<String>,
    /// Name of the adapter, which requests then give. Default: made from the source's name.
    #[schema(example = "hindi-v2")]
    adapter_name: Option<String>,
    /// Any fields of `adapter_config.yaml`, which they go before.
    #[schema(value_type = Option<Object>)]
    overrides: Option<Map<String, Value>>,
    /// A failed or cancelled job that shall go on from its last checkpoint, as it was asked for. Stands alone.
    resume_from: Option<String>,
}

/// A job that was accepted: it is stored, and runs when its turn comes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Accepted {
    /// To ask for its state with.
    job_id: String,
    /// `pending`
    status: JobState,
    /// For a person.
    message: String,
    /// RFC 3339.
    created_at: String,
    /// Name of the adapter that it makes.
    adapter_name: String,
    /// The memory that it will take.
    #[schema(value_type = Option<TrainingPlan>)]
    plan: Value,
}

impl From<Job> for Accepted {
    fn from(job: Job) -> Self {
        Self {
            job_id: job.id,
            status: job.status,
            message: job.message,
            created_at: rfc3339(job.created_ms),
            adapter_name: job.name,
            plan: job.plan,
        }
    }
}

/// Train an adapter
///
/// The job is accepted when its settings are in their ranges, its source is known and its memory fits; it survives a
/// restart of the server from then on. The finished adapter is served at once under its name.
#[utoipa::path(
    post,
    path = "/adapter/train-lite",
    tag = "training",
    operation_id = "train_lite",
    request_body = TrainLite,
    responses(
        (status = 202, description = "The job is accepted", body = Accepted),
        (status = 400, description = "A field is unknown, missing, of the wrong type or out of its range", body = ErrorBody),
        (status = 404, description = "`resume_from` names no job", body = ErrorBody),
        (status = 409, description = "Another job makes an adapter of that name, or the job cannot be resumed", body = ErrorBody),
        (status = 413, description = "The body is longer than the server takes", body = ErrorBody),
        (status = 415, description = "The body is not sent as application/json", body = ErrorBody),
        (status = 422, description = "The memory does not suffice, with figures and what would fit; or the source cannot be used", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The adapter would not fit --adapter-quota, or the disk is full", body = ErrorBody),
    )
)]
pub(super) async fn train_lite(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<TrainLite>,
) -> Result<(StatusCode, Json<Accepted>), ApiError> {
    let job = match request.resume_from {
        Some(ref id) => {
            stands_alone(&request)?;
            state.jobs.resume(id).await.map_err(of_resumed)?
        }
        None => accept(&state, wanted(request)?).await?,
    };
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}

/// Beside `resume_from` nothing has a meaning: the job goes on as it began.
fn stands_alone(request: &TrainLite) -> Result<(), ApiError> {
    let given = [
        ("source", request.source.is_some()),
        ("max_samples", request.max_samples.is_some()),
        ("config_path", request.config_path.is_some()),
        ("mcp_config_path", request.mcp_config_path.is_some()),
        ("adapter_name", request.adapter_name.is_some()),
        ("overrides", request.overrides.is_some()),
    ];
    match given.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((field, _)) => Err(ApiError::invalid(
            field,
            "cannot stand beside resume_from: a resumed job goes on as it began",
        )),
    }
}

/// In this request the job is called `resume_from`.
pub(super) fn of_resumed(error: JobsError) -> ApiError {
    match error {
        error @ (JobsError::NotFound { .. } | JobsError::WrongState { .. }) => {
            ApiError::from(error).param("resume_from")
        }
        error => error.into(),
    }
}

fn wanted(request: TrainLite) -> Result<Wanted, ApiError> {
    let Some(source) = request.source else {
        let message = "source is required: the name of a source in the connectors file";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "missing_parameter", message).param("source"));
    };
    let mut overrides = request.overrides.unwrap_or_default();
    let mut names: &[(&str, &str)] = &[];
    match request.max_samples {
        Some(_) if overrides.contains_key("max_samples") => {
            return Err(ApiError::invalid("max_samples", "is in overrides too; give it once"));
        }
        Some(samples) => {
            overrides.insert("max_samples".into(), samples.into());
            names = &[("max_samples", "max_samples")];
        }
        None => {
            overrides.entry("max_samples").or_insert_with(|| MAX_SAMPLES.into());
        }
    }
    Ok(Wanted {
        adapter_name: request.adapter_name.unwrap_or_else(|| made_name(&source)),
        source: WantedSource::Connector { name: source, file: request.mcp_config_path },
        config_path: request.config_path,
        overrides,
        names,
        meta: Value::Null,
    })
}

/// A training job as a request describes it.
pub(super) struct Wanted {
    /// Name of the adapter.
    pub(super) adapter_name: String,
    /// Where the examples come from.
    pub(super) source: WantedSource,
    /// File inside the configs folder; `None` is the usual one.
    pub(super) config_path: Option<String>,
    /// Fields that go before the file's.
    pub(super) overrides: Map<String, Value>,
    /// Those of them that the request has under another name, with that name.
    pub(super) names: &'static [(&'static str, &'static str)],
    /// What the request's endpoint wants to see again.
    pub(super) meta: Value,
}

/// Where examples come from.
pub(super) enum WantedSource {
    /// A source of the connectors file; `None` is the usual file.
    Connector {
        /// The source.
        name: String,
        /// File inside the configs folder.
        file: Option<String>,
    },
    /// An upload.
    Upload(UploadedFile),
}

/// Resolves a job, plans its memory and stores it.
pub(super) async fn accept(state: &AppState, wanted: Wanted) -> Result<Job, ApiError> {
    check_adapter_name(state, &wanted.adapter_name)?;
    let file = match &wanted.source {
        WantedSource::Upload(file) => Some(file.id.clone()),
        WantedSource::Connector { .. } => None,
    };
    let meta = wanted.meta.clone();
    let for_task = state.clone();
    // Settings are read from files.
    let job = tokio::task::spawn_blocking(move || resolve(&for_task, wanted)).await??;
    let plan = crate::train::job::check(&state.training, &job).await?;
    let json = |value: Result<Value, serde_json::Error>| value.map_err(ApiError::internal);
    let new = NewJob {
        kind: TRAIN_KIND,
        name: job.adapter_name.clone(),
        spec: json(serde_json::to_value(&job))?,
        meta,
        plan: json(serde_json::to_value(&plan))?,
        file,
    };
    Ok(state.jobs.submit(new).await?)
}

fn resolve(state: &AppState, wanted: Wanted) -> Result<TrainJob, ApiError> {
    let config = adapter_config(state, wanted.config_path.as_deref(), &wanted.overrides, wanted.names)?;
    let (source_name, source) = match wanted.source {
        WantedSource::Connector { name, file } => {
            let connectors = Connectors::load(&state.settings.configs_dir, file.as_deref())?;
            let source = connectors.source(&name)?.clone();
            (name, source)
        }
        WantedSource::Upload(file) => {
            let path = state.jobs.files().path_of(&file);
            let path =
                path.to_str().ok_or_else(|| ApiError::internal("the data folder's name is not UTF-8"))?;
            (file.id, SourceConfig::local(path))
        }
    };
    Ok(TrainJob { adapter_name: wanted.adapter_name, source_name, source, config })
}

/// The settings of a request: a file of the configs folder, and what goes before it. An error names the field as the
/// request does, with `names` as in [`Wanted`].
pub(super) fn adapter_config(
    state: &AppState,
    config_path: Option<&str>,
    overrides: &Map<String, Value>,
    names: &[(&str, &str)],
) -> Result<AdapterConfig, FieldError> {
    AdapterConfig::load(&state.settings.configs_dir, config_path, overrides).map_err(|mut error| {
        let own = error.field.strip_prefix("overrides.");
        if let Some((_, name)) = names.iter().find(|(field, _)| Some(*field) == own) {
            error.field = (*name).to_owned();
        }
        error
    })
}

pub(super) fn check_adapter_name(state: &AppState, name: &str) -> Result<(), ApiError> {
    check_name(name).map_err(|error| ApiError::from(error).param("adapter_name"))?;
    let reason = if RESERVED.contains(&name) {
        "has a meaning of its own in this interface"
    } else if name == state.settings.model_id {
        "is the base model's own"
    } else {
        return Ok(());
    };
    let message = format!("the name {name:?} {reason}; choose another adapter_name");
    Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_adapter_name", message).param("adapter_name"))
}

/// A name from what the adapter is made from and something that no other has.
pub(super) fn made_name(from: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
    let lower = from.chars().map(|c| c.to_ascii_lowercase());
    let kept: String = lower.map(|c| if plain(c) { c } else { '-' }).collect();
    let stem: String = kept.trim_matches(['.', '_', '-']).chars().take(50).collect();
    let stem = stem.trim_end_matches(['.', '_', '-']);
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}", if stem.is_empty() { "adapter" } else { stem }, &unique[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_names_are_names_and_differ() {
        for from in
            ["phrasebook", "My Source!", "हिंदी", "../../etc/passwd", "", "-", &"x".repeat(300), "A_b.c"]
        {
            let name = made_name(from);
            assert!(check_name(&name).is_ok(), "{from:?} became {name:?}");
            assert_ne!(made_name(from), name);
        }
        assert!(made_name("My Source!").starts_with("my-source-"));
        assert!(made_name("हिंदी").starts_with("adapter-"));
    }

    #[test]
    fn reserved_names_are_otherwise_good_names() {
        assert!(RESERVED.iter().all(|name| check_name(name).is_ok()));
    }

    fn request(json: Value) -> TrainLite {
        serde_json::from_value(json).expect("is a request")
    }

    #[test]
    fn samples_are_given_once_and_are_200_by_default() {
        let of = |json| Some(wanted(request(json)).ok()?.overrides["max_samples"].clone());
        assert_eq!(of(serde_json::json!({"source": "a"})), Some(200.into()));
        assert_eq!(of(serde_json::json!({"source": "a", "max_samples": 7})), Some(7.into()));
        assert_eq!(of(serde_json::json!({"source": "a", "overrides": {"max_samples": 9}})), Some(9.into()));
        let both = serde_json::json!({"source": "a", "max_samples": 7, "overrides": {"max_samples": 9}});
        assert_eq!(of(both), None);
    }

    #[test]
    fn a_resumed_job_takes_no_other_field() {
        assert!(stands_alone(&request(serde_json::json!({"resume_from": "x"}))).is_ok());
        for (field, value) in [
            ("source", Value::from("a")),
            ("max_samples", 3.into()),
            ("config_path", "a".into()),
            ("mcp_config_path", "a".into()),
            ("adapter_name", "a".into()),
            ("overrides", serde_json::json!({})),
        ] {
            let error = stands_alone(&request(serde_json::json!({"resume_from": "x", field: value})));
            assert_eq!(error.expect_err("is refused").body().error.param.as_deref(), Some(field));
        }
    }
}
