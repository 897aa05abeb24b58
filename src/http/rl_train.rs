//! `POST /rl/train`: accepts a job that learns from rewards, by sampling itself (online) or from logged episodes
//! (offline). Its state, logs, events and end are those of any job.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::extract::ApiJson;
use super::state::AppState;
use super::train::{Accepted, check_adapter_name, made_name, of_resumed};
use crate::adapters::{AdapterError, check_name};
use crate::config::adapter::FieldError;
use crate::config::connectors::Connectors;
use crate::config::rl::{Loss, PromptConfig, RlConfig};
use crate::jobs::NewJob;
use crate::rl::check_run_id;
use crate::rl::learn::{Mode, PromptSource, RlJob};
use crate::text::Language;
use crate::train::TrainError;

/// The kind of job that learns from rewards; what is stored with it is an [`RlJob`].
pub const RL_KIND: &str = "rl";

/// Prompts of one request.
const MAX_PROMPTS: usize = 10_000;

/// An adapter to train by what its answers earn.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RlTrain {
    /// `online` samples answers and learns from them, step by step (GRPO); `offline` learns from a run that was
    /// collected. Required unless `resume_from` is there.
    mode: Option<Mode>,
    /// `importance_sampling` or `ppo_clip`, and offline also `rft` or `dpo`. Default: as the settings say.
    loss: Option<Loss>,
    /// Name of a source in the connectors file whose records are prompts, with `reference` and `language` where they
    /// have them.
    source: Option<String>,
    /// The prompts themselves. Online, without these and `source`, those of the settings; offline, prompts are used to
    /// measure with, and none are needed.
    prompts: Option<Vec<RlPrompt>>,
    /// `offline`: the run whose episodes are learnt from.
    #[schema(example = "first-run")]
    run_id: Option<String>,
    /// Name of the adapter, which requests then give. Default: made from the mode.
    adapter_name: Option<String>,
    /// Adapter to go on from. Default: a new one.
    start_from: Option<String>,
    /// File inside the configs folder to take settings and rewards from. Default `rl_config.yaml`.
    config_path: Option<String>,
    /// File inside the configs folder that describes the sources. Default `mcp_connectors.yml`.
    mcp_config_path: Option<String>,
    /// Any fields of the section `train` of `rl_config.yaml`, which they go before.
    #[schema(value_type = Option<Object>)]
    overrides: Option<Map<String, Value>>,
    /// A failed or cancelled job that shall go on from its last checkpoint, as it was asked for. Stands alone.
    resume_from: Option<String>,
}

/// A prompt: its text, or with what is wanted of the answer.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(super) enum RlPrompt {
    /// The text to go on from.
    Text(String),
    /// The same with what is wanted.
    Full(FullPrompt),
}

/// A prompt with what is wanted of the answer.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FullPrompt {
    /// The text to go on from.
    prompt: String,
    /// A good answer, for the rewards that compare with one.
    reference: Option<String>,
    /// Language of the answer, by code or name. Default: what the prompt asks for.
    language: Option<String>,
}

/// Train an adapter by what its answers earn
///
/// The job is accepted when its settings are in their ranges, what it reads is there and its memory fits; it survives a
/// restart of the server from then on. Online, the adapter is served under its name from the first step, with new
/// weights after each. State, logs, events and end are those of a training job: `/adapter/status/{job_id}` and the
/// others.
#[utoipa::path(
    post,
    path = "/rl/train",
    tag = "rl",
    operation_id = "rl_train",
    request_body = RlTrain,
    responses(
        (status = 202, description = "The job is accepted", body = Accepted),
        (status = 400, description = "A field is unknown, missing, of the wrong type or out of its range; the run has nothing to learn from", body = ErrorBody),
        (status = 404, description = "`resume_from` names no job, or `start_from` no adapter", body = ErrorBody),
        (status = 409, description = "Another job makes an adapter of that name, or the job cannot be resumed", body = ErrorBody),
        (status = 413, description = "The body is longer than the server takes", body = ErrorBody),
        (status = 415, description = "The body is not sent as application/json", body = ErrorBody),
        (status = 422, description = "The memory does not suffice, with figures and what would fit; or the source or the adapter cannot be used", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The adapter would not fit --adapter-quota, or the disk is full", body = ErrorBody),
    )
)]
pub(super) async fn rl_train(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<RlTrain>,
) -> Result<(StatusCode, Json<Accepted>), ApiError> {
    if let Some(id) = &request.resume_from {
        stands_alone(&request)?;
        let job = state.jobs.resume(id).await.map_err(of_resumed)?;
        return Ok((StatusCode::ACCEPTED, Json(job.into())));
    }
    let for_task = state.clone();
    // Settings are read from files.
    let job = tokio::task::spawn_blocking(move || resolve(&for_task, request)).await??;
    check_adapter_name(&state, &job.adapter_name)?;
    if let Some(name) = &job.start_from {
        check_name(name).map_err(|error| ApiError::from(error).param("start_from"))?;
    }
    let plan = crate::rl::learn::check(&state.learning, &job).await.map_err(of_checked)?;
    let json = |value: Result<Value, serde_json::Error>| value.map_err(ApiError::internal);
    let new = NewJob {
        kind: RL_KIND,
        name: job.adapter_name.clone(),
        spec: json(serde_json::to_value(&job))?,
        meta: Value::Null,
        plan: json(serde_json::to_value(&plan))?,
        file: None,
    };
    let job = state.jobs.submit(new).await?;
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}

/// The one adapter that a check reads is that of `start_from`.
fn of_checked(error: TrainError) -> ApiError {
    match error {
        error @ TrainError::Adapter(AdapterError::NotFound { .. } | AdapterError::Invalid { .. }) => {
            ApiError::from(error).param("start_from")
        }
        error => error.into(),
    }
}

/// Beside `resume_from` nothing has a meaning: the job goes on as it began.
fn stands_alone(request: &RlTrain) -> Result<(), ApiError> {
    let given = [
        ("mode", request.mode.is_some()),
        ("loss", request.loss.is_some()),
        ("source", request.source.is_some()),
        ("prompts", request.prompts.is_some()),
        ("run_id", request.run_id.is_some()),
        ("adapter_name", request.adapter_name.is_some()),
        ("start_from", request.start_from.is_some()),
        ("config_path", request.config_path.is_some()),
        ("mcp_config_path", request.mcp_config_path.is_some()),
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

fn resolve(state: &AppState, request: RlTrain) -> Result<RlJob, ApiError> {
    let missing = |field: &str, message: &str| {
        ApiError::new(StatusCode::BAD_REQUEST, "missing_parameter", message).param(field)
    };
    let Some(mode) = request.mode else {
        return Err(missing("mode", "mode is required: online or offline"));
    };
    match (mode, &request.run_id) {
        (Mode::Online, Some(_)) => {
            return Err(ApiError::invalid(
                "run_id",
                "belongs to the mode offline; online samples its own episodes",
            ));
        }
        (Mode::Offline, None) => {
            return Err(missing(
                "run_id",
                "run_id is required offline: the run whose episodes are learnt from",
            ));
        }
        (Mode::Offline, Some(run)) => {
            check_run_id(run).map_err(|error| ApiError::invalid("run_id", error.to_string()))?;
        }
        (Mode::Online, None) => {}
    }
    let mut settings = RlConfig::load(&state.settings.configs_dir, request.config_path.as_deref())
        .map_err(|error| renamed(error, "rl_config_path", "config_path"))?;
    let mut overrides = request.overrides.unwrap_or_default();
    if let Some(loss) = request.loss {
        if overrides.contains_key("loss") {
            return Err(ApiError::invalid("loss", "is in overrides too; give it once"));
        }
        overrides.insert("loss".into(), loss.name().into());
    }
    let config = settings.train.with(&overrides)?;
    if mode == Mode::Online && !config.loss.is_policy_gradient() {
        let message = format!(
            "is {}, which learns from logged episodes; use importance_sampling or ppo_clip, or the mode offline",
            config.loss.name()
        );
        return Err(ApiError::invalid("loss", message));
    }
    if !config.log_run_id.is_empty() {
        check_run_id(&config.log_run_id)
            .map_err(|error| ApiError::invalid("overrides.log_run_id", error.to_string()))?;
    }
    let (source_name, prompts) = match (request.source, request.prompts) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("prompts", "cannot stand beside source; give one of the two"));
        }
        (Some(name), None) => {
            let connectors =
                Connectors::load(&state.settings.configs_dir, request.mcp_config_path.as_deref())?;
            let source = connectors.source(&name)?.clone();
            (name.clone(), PromptSource::Source { name, source: Box::new(source) })
        }
        (None, Some(prompts)) => ("prompts of the request".to_owned(), PromptSource::List(checked(prompts)?)),
        (None, None) if mode == Mode::Online => {
            ("prompts of the settings".to_owned(), PromptSource::List(std::mem::take(&mut settings.prompts)))
        }
        (None, None) => ("no prompts".to_owned(), PromptSource::List(Vec::new())),
    };
    let stem = match (&request.run_id, mode) {
        (Some(run), _) => run.clone(),
        (None, _) => "grpo".to_owned(),
    };
    Ok(RlJob {
        adapter_name: request.adapter_name.unwrap_or_else(|| made_name(&stem)),
        mode,
        start_from: request.start_from,
        source_name: request.run_id.clone().unwrap_or(source_name),
        prompts,
        run_id: request.run_id,
        config,
        rewards: settings.rewards,
    })
}

/// The field as this request calls it.
fn renamed(mut error: FieldError, from: &str, to: &str) -> FieldError {
    if error.field == from {
        to.clone_into(&mut error.field);
    }
    error
}

fn checked(prompts: Vec<RlPrompt>) -> Result<Vec<PromptConfig>, ApiError> {
    if !(1..=MAX_PROMPTS).contains(&prompts.len()) {
        let message = format!("has {} entries; give 1 to {MAX_PROMPTS}", prompts.len());
        return Err(ApiError::invalid("prompts", message));
    }
    let checked = prompts.into_iter().enumerate().map(|(at, prompt)| {
        let prompt = match prompt {
            RlPrompt::Text(prompt) => PromptConfig { prompt, language: None, reference: None },
            RlPrompt::Full(FullPrompt { prompt, reference, language }) => {
                PromptConfig { prompt, language, reference }
            }
        };
        if prompt.prompt.trim().is_empty() {
            return Err(ApiError::invalid(
                &format!("prompts[{at}]"),
                "is empty; write a prompt or take it out",
            ));
        }
        if let Some(Err(unknown)) = prompt.language.as_deref().map(str::parse::<Language>) {
            let message = format!("is not known: {unknown}");
            return Err(ApiError::invalid(&format!("prompts[{at}].language"), message));
        }
        Ok(prompt)
    });
    checked.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_job_takes_no_other_field() {
        let request = |json: Value| serde_json::from_value::<RlTrain>(json).expect("is a request");
        assert!(stands_alone(&request(serde_json::json!({"resume_from": "x"}))).is_ok());
        for (field, value) in [
            ("mode", Value::from("online")),
            ("loss", "dpo".into()),
            ("source", "a".into()),
            ("prompts", serde_json::json!(["a"])),
            ("run_id", "a".into()),
            ("adapter_name", "a".into()),
            ("start_from", "a".into()),
            ("config_path", "a".into()),
            ("mcp_config_path", "a".into()),
            ("overrides", serde_json::json!({})),
        ] {
            let error = stands_alone(&request(serde_json::json!({"resume_from": "x", field: value})));
            assert_eq!(error.expect_err("is refused").body().error.param.as_deref(), Some(field));
        }
    }

    #[test]
    fn prompts_are_texts_or_objects_and_checked() {
        let of = |json: Value| checked(serde_json::from_value(json).expect("are prompts"));
        let good =
            of(serde_json::json!(["a", {"prompt": "b", "language": "Hindi", "reference": "c"}])).unwrap();
        assert_eq!((good[0].prompt.as_str(), good[1].reference.as_deref()), ("a", Some("c")));
        for (bad, field) in [
            (serde_json::json!([]), "prompts"),
            (serde_json::json!(["a", " "]), "prompts[1]"),
            (serde_json::json!([{"prompt": "b", "language": "Klingon"}]), "prompts[0].language"),
        ] {
            assert_eq!(of(bad).unwrap_err().body().error.param.as_deref(), Some(field));
        }
    }
}
