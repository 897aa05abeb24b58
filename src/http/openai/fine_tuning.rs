//! `/v1/fine_tuning/jobs`: the training jobs as OpenAI's API shows them. They are the same jobs as those of
//! `/adapter/train-lite`, whichever of the two they were asked for on.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Map, Value, json};

use super::super::error::{ApiError, ErrorBody};
use super::super::extract::{ApiJson, ApiQuery, path_text};
use super::super::fields::in_range;
use super::super::state::{AppState, unix_now_s};
use super::super::train::{TRAIN_KIND, Wanted, WantedSource, accept, adapter_config, made_name};
use super::fine_tuning_wire::{
    Auto, CheckpointMetrics, FineTuningCheckpoint, FineTuningCheckpointList, FineTuningError,
    FineTuningEvent, FineTuningEventList, FineTuningJob, FineTuningJobList, FineTuningRequest,
    Hyperparameters, Method, Page, PageQuery, Supervised,
};
use super::{empty, neutral, unix_s};
use crate::jobs::{Event, EventCursor, Job, JobFilter, JobState, JobsError, Level};

/// Before a job's own id.
const JOB_PREFIX: &str = "ftjob-";
/// Before an event's place.
const EVENT_PREFIX: &str = "ftevent-";
/// Longest suffix, in characters, as in OpenAI's API.
const MAX_SUFFIX: usize = 64;
/// What this API calls the settings that it can give.
const NAMES: &[(&str, &str)] = &[
    ("max_samples", "training_file"),
    ("seed", "seed"),
    ("epochs", "hyperparameters.n_epochs"),
    ("batch_size", "hyperparameters.batch_size"),
    ("learning_rate", "hyperparameters.learning_rate_multiplier"),
];
/// Most metadata, as in OpenAI's API.
const MAX_METADATA: usize = 16;

/// Train an adapter on an uploaded file
///
/// Settings that OpenAI's API has no field for are those of `adapter_config.yaml`. The finished adapter is the
/// `model` of other requests.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs",
    tag = "openai",
    operation_id = "create_fine_tuning_job",
    request_body = FineTuningRequest,
    responses(
        (status = 200, description = "The job is accepted", body = FineTuningJob),
        (status = 400, description = "A field is unknown, missing, of the wrong type or out of its range", body = ErrorBody),
        (status = 404, description = "No such file, or `model` is not the served one", body = ErrorBody),
        (status = 413, description = "The body is longer than the server takes", body = ErrorBody),
        (status = 415, description = "The body is not sent as application/json", body = ErrorBody),
        (status = 422, description = "The memory does not suffice, with figures and what would fit", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The adapter would not fit --adapter-quota, or the disk is full", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn create(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<FineTuningRequest>,
) -> Result<Json<FineTuningJob>, ApiError> {
    if request.model != state.settings.model_id {
        let message = format!(
            "the model {:?} cannot be trained here: this server has {}",
            request.model, state.settings.model_id
        );
        return Err(ApiError::not_found("model_not_found", message).param("model"));
    }
    let hyperparameters = checked(&request)?;
    let file = state.jobs.files().get(&request.training_file).await;
    let file = file.map_err(|error| of_file(error, "training_file"))?;
    let overrides = overrides(&state, &request, hyperparameters, file.records).await?;
    let meta = json!({
        "suffix": request.suffix,
        "metadata": request.metadata,
        "hyperparameters": hyperparameters,
    });
    let wanted = Wanted {
        adapter_name: made_name(request.suffix.as_deref().unwrap_or("ft")),
        source: WantedSource::Upload(file),
        config_path: None,
        overrides,
        names: NAMES,
        meta,
    };
    Ok(Json(view(&state, accept(&state, wanted).await?)))
}

/// Everything that can be checked without looking anywhere; the hyperparameters from either of their places.
fn checked(request: &FineTuningRequest) -> Result<Hyperparameters, ApiError> {
    if request.validation_file.is_some() {
        let message = "is not supported by this server: a share of training_file is held out for evaluation, \
                       eval_share in adapter_config.yaml; leave it out";
        return Err(ApiError::unsupported("validation_file", message));
    }
    neutral("integrations", request.integrations.as_ref(), empty)?;
    if request.suffix.as_ref().is_some_and(|suffix| suffix.chars().count() > MAX_SUFFIX) {
        return Err(ApiError::invalid("suffix", format!("must have at most {MAX_SUFFIX} characters")));
    }
    if let Some(metadata) = &request.metadata {
        let is_long =
            |(key, value): (&String, &String)| key.chars().count() > 64 || value.chars().count() > 512;
        if metadata.len() > MAX_METADATA || metadata.iter().any(is_long) {
            let message = format!(
                "must hold at most {MAX_METADATA} texts of at most 512 characters, with names of at most 64"
            );
            return Err(ApiError::invalid("metadata", message));
        }
    }
    let mut hyperparameters = request.hyperparameters;
    if let Some(method) = &request.method {
        if method.r#type != "supervised" || method.dpo.is_some() || method.reinforcement.is_some() {
            return Err(ApiError::unsupported("method.type", "must be supervised; there is no other here"));
        }
        let of_method = method.supervised.as_ref().and_then(|supervised| supervised.hyperparameters);
        if hyperparameters.is_some() && of_method.is_some() && hyperparameters != of_method {
            let message = "and method.supervised.hyperparameters differ; give one of them";
            return Err(ApiError::invalid("hyperparameters", message));
        }
        hyperparameters = hyperparameters.or(of_method);
    }
    let hyperparameters = hyperparameters.unwrap_or_default();
    let multiplier = hyperparameters.learning_rate_multiplier.number();
    if multiplier.is_some_and(|multiplier| !(multiplier > 0.0 && multiplier.is_finite())) {
        return Err(ApiError::invalid("hyperparameters.learning_rate_multiplier", "must be above 0"));
    }
    for (name, number) in [("n_epochs", hyperparameters.n_epochs), ("batch_size", hyperparameters.batch_size)]
    {
        if number.number() == Some(0) {
            return Err(ApiError::invalid(&format!("hyperparameters.{name}"), "must be at least 1"));
        }
    }
    Ok(hyperparameters)
}

/// The request in the words of `adapter_config.yaml`.
async fn overrides(
    state: &AppState,
    request: &FineTuningRequest,
    hyperparameters: Hyperparameters,
    examples: u64,
) -> Result<Map<String, Value>, ApiError> {
    let mut overrides = Map::new();
    // The whole file.
    overrides.insert("max_samples".into(), examples.into());
    if let Some(seed) = request.seed {
        overrides.insert("seed".into(), seed.into());
    }
    if let Some(epochs) = hyperparameters.n_epochs.number() {
        overrides.insert("epochs".into(), epochs.into());
    }
    if let Some(size) = hyperparameters.batch_size.number() {
        overrides.insert("batch_size".into(), size.into());
        overrides.insert("gradient_accumulation_steps".into(), 1.into());
    }
    if let Some(multiplier) = hyperparameters.learning_rate_multiplier.number() {
        let (state, so_far) = (state.clone(), overrides.clone());
        let config =
            tokio::task::spawn_blocking(move || adapter_config(&state, None, &so_far, NAMES)).await??;
        overrides.insert("learning_rate".into(), (config.learning_rate * multiplier).into());
    }
    Ok(overrides)
}

/// List the jobs
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs",
    tag = "openai",
    operation_id = "list_fine_tuning_jobs",
    params(PageQuery),
    responses(
        (status = 200, description = "The jobs, newest first", body = FineTuningJobList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "`after` names no job", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn list(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<FineTuningJob>>, ApiError> {
    let limit = page_size(query.limit)?;
    let before = query.after.as_deref().map(own_id);
    let filter = JobFilter { kind: Some(TRAIN_KIND), before, ..JobFilter::default() };
    let jobs = state.jobs.list(filter, limit as u32 + 1).await;
    let jobs = jobs.map_err(|error| of_job(error, "after"))?;
    let views = jobs.into_iter().map(|job| view(&state, job)).collect();
    Ok(Json(page(views, limit)))
}

/// Look at one job
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}",
    tag = "openai",
    operation_id = "retrieve_fine_tuning_job",
    params(("fine_tuning_job_id" = String, Path, description = "The job")),
    responses(
        (status = 200, description = "The job", body = FineTuningJob),
        (status = 404, description = "No such job", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn retrieve(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FineTuningJob>, ApiError> {
    let id = path_text(ID, id)?;
    let job = state.jobs.get(own_id(&id)).await.map_err(|error| of_job(error, ID))?;
    Ok(Json(view(&state, job)))
}

/// End a job
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel",
    tag = "openai",
    operation_id = "cancel_fine_tuning_job",
    params(("fine_tuning_job_id" = String, Path, description = "The job")),
    responses(
        (status = 200, description = "It has ended, or will at its next step", body = FineTuningJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It has ended already", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn cancel(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FineTuningJob>, ApiError> {
    let id = path_text(ID, id)?;
    let job = state.jobs.cancel(own_id(&id)).await.map_err(|error| of_job(error, ID))?;
    Ok(Json(view(&state, job)))
}

/// Events of a job
///
/// The lines of its log, and the figures of each step.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    tag = "openai",
    operation_id = "list_fine_tuning_events",
    params(("fine_tuning_job_id" = String, Path, description = "The job"), PageQuery),
    responses(
        (status = 200, description = "The events, newest first", body = FineTuningEventList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn events(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<FineTuningEvent>>, ApiError> {
    let id = path_text(ID, id)?;
    let limit = page_size(query.limit)?;
    let before = query.after.as_deref().map(|after| {
        cursor(after).ok_or_else(|| ApiError::invalid("after", "must be the id of an event of this job"))
    });
    let events = state.jobs.events(own_id(&id), before.transpose()?, limit as u32 + 1).await;
    let events = events.map_err(|error| of_job(error, ID))?;
    Ok(Json(page(events.into_iter().map(event).collect(), limit)))
}

/// Checkpoints of a job
///
/// A checkpoint is a model that can be asked for, and of one job that is the finished adapter: a job that has not
/// succeeded has none.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints",
    tag = "openai",
    operation_id = "list_fine_tuning_checkpoints",
    params(("fine_tuning_job_id" = String, Path, description = "The job"), PageQuery),
    responses(
        (status = 200, description = "The checkpoints", body = FineTuningCheckpointList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn checkpoints(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<FineTuningCheckpoint>>, ApiError> {
    let id = path_text(ID, id)?;
    let limit = page_size(query.limit)?;
    let job = state.jobs.get(own_id(&id)).await.map_err(|error| of_job(error, ID))?;
    let checkpoint_id = format!("ftckpt-{}", job.id);
    let mut data = Vec::new();
    if job.status == JobState::Completed && query.after.as_ref() != Some(&checkpoint_id) {
        let step = job.progress["step"].as_u64().unwrap_or_default();
        data.push(FineTuningCheckpoint {
            id: checkpoint_id,
            object: "fine_tuning.job.checkpoint",
            created_at: unix_s(job.finished_ms.unwrap_or(job.created_ms)),
            fine_tuned_model_checkpoint: job.name,
            fine_tuning_job_id: format!("{JOB_PREFIX}{}", job.id),
            step_number: step,
            metrics: CheckpointMetrics {
                step,
                train_loss: job.progress["loss"].as_f64(),
                full_valid_loss: job.progress["eval_loss"].as_f64(),
            },
        });
    }
    Ok(Json(page(data, limit)))
}

/// The parameter of the path.
const ID: &str = "fine_tuning_job_id";

fn page_size(limit: Option<i64>) -> Result<usize, ApiError> {
    in_range("limit", limit.unwrap_or(20), 1..=100)
}

/// `entries` has one more than `limit` where there are more.
fn page<T>(mut entries: Vec<T>, limit: usize) -> Page<T> {
    let has_more = entries.len() > limit;
    entries.truncate(limit);
    Page { object: "list", data: entries, has_more }
}

/// The job's id as everywhere else.
fn own_id(id: &str) -> &str {
    id.strip_prefix(JOB_PREFIX).unwrap_or(id)
}

/// Here the job and the file have other names.
fn of_job(error: JobsError, param: &str) -> ApiError {
    match error {
        error @ (JobsError::NotFound { .. } | JobsError::WrongState { .. }) => {
            ApiError::from(error).param(param)
        }
        error => error.into(),
    }
}

fn of_file(error: JobsError, param: &str) -> ApiError {
    match error {
        error @ JobsError::FileNotFound { .. } => ApiError::from(error).param(param),
        error => error.into(),
    }
}

fn view(state: &AppState, job: Job) -> FineTuningJob {
    let config = &job.spec["config"];
    let number = |field: &str| config[field].as_u64();
    // A job of another endpoint has no hyperparameters but those of its settings.
    let asked = job.meta["hyperparameters"].clone();
    let hyperparameters: Hyperparameters =
        serde_json::from_value(asked).unwrap_or_else(|_| Hyperparameters {
            n_epochs: number("epochs").map_or(Auto::Auto, Auto::Number),
            batch_size: number("batch_size")
                .zip(number("gradient_accumulation_steps"))
                .map_or(Auto::Auto, |(batch, steps)| Auto::Number(batch.saturating_mul(steps))),
            learning_rate_multiplier: Auto::Auto,
        });
    let has_succeeded = job.status == JobState::Completed;
    let eta_s = job.progress["eta_s"].as_f64().filter(|eta| eta.is_finite() && *eta >= 0.0);
    FineTuningJob {
        id: format!("{JOB_PREFIX}{}", job.id),
        object: "fine_tuning.job",
        created_at: unix_s(job.created_ms),
        error: job.error.map(|message| FineTuningError { code: "training_failed", message, param: None }),
        finished_at: job.finished_ms.filter(|_| has_succeeded).map(unix_s),
        hyperparameters,
        method: Method {
            r#type: "supervised".into(),
            supervised: Some(Supervised { hyperparameters: Some(hyperparameters) }),
            dpo: None,
            reinforcement: None,
        },
        model: state.settings.model_id.clone(),
        organization_id: "gurukul",
        result_files: [],
        seed: number("seed").unwrap_or_default(),
        status: match job.status {
            JobState::Pending => "queued",
            JobState::Running => "running",
            JobState::Completed => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        },
        trained_tokens: has_succeeded.then(|| job.progress["tokens"].as_u64()).flatten(),
        training_file: job.spec["source_name"].as_str().unwrap_or_default().to_owned(),
        validation_file: None,
        estimated_finish: eta_s
            .filter(|_| job.status == JobState::Running)
            .map(|eta| unix_now_s().saturating_add(eta as u64)),
        integrations: [],
        metadata: serde_json::from_value(job.meta["metadata"].clone()).unwrap_or_default(),
        user_provided_suffix: job.meta["suffix"].as_str().map(str::to_owned),
        fine_tuned_model: has_succeeded.then_some(job.name),
    }
}

fn event(event: Event) -> FineTuningEvent {
    let EventCursor { at_ms, is_point, number } = event.cursor;
    let figures: Option<Value> = if is_point { serde_json::from_str(&event.text).ok() } else { None };
    let message = match &figures {
        None => event.text,
        Some(figures) => match figures["loss"].as_f64() {
            Some(loss) => format!("Step {number}/{}: training loss={loss:.4}", figures["total_steps"]),
            None => format!("Step {number}/{}", figures["total_steps"]),
        },
    };
    FineTuningEvent {
        id: format!("{EVENT_PREFIX}{at_ms}-{}-{number}", u8::from(is_point)),
        object: "fine_tuning.job.event",
        created_at: unix_s(at_ms),
        level: if is_point { Level::Info } else { event.level },
        message,
        r#type: if is_point { "metrics" } else { "message" },
        data: figures,
    }
}

fn cursor(id: &str) -> Option<EventCursor> {
    let mut parts = id.strip_prefix(EVENT_PREFIX)?.splitn(3, '-');
    let at_ms = parts.next()?.parse().ok()?;
    let is_point = match parts.next()? {
        "0" => false,
        "1" => true,
        _ => return None,
    };
    Some(EventCursor { at_ms, is_point, number: parts.next()?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(more: Value) -> FineTuningRequest {
        let mut body = json!({"model": "m", "training_file": "f"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(body).unwrap_or_else(|error| panic!("{more}: {error}"))
    }

    #[test]
    fn hyperparameters_come_from_either_place() {
        let of = |more| checked(&request(more)).map_err(|error| error.body().error.param.unwrap_or_default());
        assert_eq!(of(json!({})), Ok(Hyperparameters::default()));
        let three = json!({"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2});
        let expected = Hyperparameters {
            n_epochs: Auto::Number(3),
            batch_size: Auto::Auto,
            learning_rate_multiplier: Auto::Number(2.0),
        };
        let method = |h: &Value| json!({"type": "supervised", "supervised": {"hyperparameters": h}});
        assert_eq!(of(json!({"hyperparameters": three})), Ok(expected));
        assert_eq!(of(json!({"method": method(&three)})), Ok(expected));
        assert_eq!(of(json!({"hyperparameters": three, "method": method(&three)})), Ok(expected));
        let other = json!({"n_epochs": 4});
        assert_eq!(
            of(json!({"hyperparameters": three, "method": method(&other)})),
            Err("hyperparameters".into())
        );
        assert_eq!(of(json!({"method": {"type": "dpo", "dpo": {}}})), Err("method.type".into()));
        assert_eq!(of(json!({"validation_file": "file-x"})), Err("validation_file".into()));
        assert_eq!(of(json!({"integrations": [{"type": "wandb"}]})), Err("integrations".into()));
        assert!(of(json!({"integrations": [], "validation_file": null})).is_ok());
        assert_eq!(of(json!({"suffix": "x".repeat(65)})), Err("suffix".into()));
        assert_eq!(of(json!({"hyperparameters": {"n_epochs": 0}})), Err("hyperparameters.n_epochs".into()));
        let zero = json!({"hyperparameters": {"learning_rate_multiplier": 0}});
        assert_eq!(of(zero), Err("hyperparameters.learning_rate_multiplier".into()));
    }

    #[test]
    fn auto_is_written_as_it_is_read() {
        let all = Hyperparameters {
            n_epochs: Auto::Number(3),
            batch_size: Auto::Auto,
            learning_rate_multiplier: Auto::Number(0.5),
        };
        let text = serde_json::to_value(all).unwrap();
        assert_eq!(text, json!({"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}));
        assert_eq!(serde_json::from_value::<Hyperparameters>(text).unwrap(), all);
        for wrong in
            [json!({"n_epochs": "three"}), json!({"n_epochs": 1.5}), json!({"n_epochs": -1}), json!({"x": 1})]
        {
            assert!(serde_json::from_value::<Hyperparameters>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_events_id_is_its_place() {
        let place = EventCursor { at_ms: 1_700_000_000_123, is_point: true, number: 42 };
        let text = r#"{"step":42,"total_steps":50,"loss":1.25}"#.to_owned();
        let shown = event(Event { cursor: place, level: Level::Info, text });
        assert_eq!(cursor(&shown.id), Some(place));
        assert_eq!((shown.message.as_str(), shown.r#type), ("Step 42/50: training loss=1.2500", "metrics"));
        for wrong in ["", "ftevent-", "ftevent-1-2-3", "ftevent-1-1", "1-1-1", "ftevent-x-1-1"] {
            assert_eq!(cursor(wrong), None, "{wrong}");
        }
    }
}
