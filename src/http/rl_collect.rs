//! `POST /rl/collect`: logs an episode that a client brings, or answers prompts and logs what comes of it. Few episodes
//! are collected before the answer goes out, many as a job.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::extract::ApiJson;
use super::fields::{OneOrMany, stops};
use super::generation::check_prompt_bytes;
use super::rl_fields::{PromptField, Upload};
use super::state::AppState;
use crate::config::adapter::FieldError;
use crate::config::rl::PromptConfig;
use crate::config::rl_sinks::Destination;
use crate::jobs::{JobsError, NewJob};
use crate::rl::collect::{Begin, Ending};
use crate::rl::episode::lines;
use crate::rl::given::{Given, GivenEpisode};
use crate::rl::log::FOLDER;
use crate::rl::outbox::{Content, OutboxError};
use crate::rl::{CollectError, CollectJob, Episode, Wanted};
use crate::train::Stop;

/// The kind of job that collects episodes; what is stored with it is a [`CollectJob`].
pub const COLLECT_KIND: &str = "collect";

/// What an answer says of the upload.
const NOT_UPLOADED: &str = "none";
const QUEUED: &str = "queued";

/// More episodes become a job.
const MAX_AT_ONCE: u64 = 64;

/// An episode to log, which has an `output`; or what to collect. A field that is absent or null has its default.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Collect {
    /// The prompt of the episode, or the one prompt to answer.
    #[schema(example = "Translate to Hindi: Good morning.")]
    prompt: Option<String>,
    /// The answer that shall be logged. Without it answers are generated.
    output: Option<String>,
    /// With `output`: what the answer earned. Computed as the settings say when absent.
    reward: Option<f64>,
    /// With `output`: what else is known: `language`, `reference`, `base_model`, `adapter`, `adapter_generation`,
    /// `finish_reason`, `latency_s`, `prompt_token_ids`, `token_ids`, `logprobs`, `rewards`, `sampling`, and anything of
    /// your own.
    #[schema(value_type = Option<Object>)]
    meta: Option<Map<String, Value>>,
    /// The run, which is the name of the log: `[a-z0-9][a-z0-9._-]{0,63}`. Without it a run of its own, or for an
    /// episode with an `output` one of the day.
    #[schema(example = "hindi-1")]
    run_id: Option<String>,
    /// What the episodes come from, a name like a run's. Default as in the settings.
    env_name: Option<String>,
    /// The prompts to answer, in turns: texts, or objects with `prompt`, `language` and `reference`. Without them and
    /// `prompt` those of `rl_config.yaml`.
    prompts: Option<Vec<PromptField>>,
    /// Answers in all; more than 64 become a job. Default: one a prompt.
    #[schema(minimum = 1)]
    episodes: Option<i64>,
    /// Name of the adapter to sample from; `""` and `"none"` are the base model.
    adapter: Option<String>,
    /// Language of the answers, by code or name. Of the prompts of `rl_config.yaml`, only those in it are answered.
    #[schema(example = "hi")]
    language: Option<String>,
    /// Upper bound on new tokens; less where the context is shorter.
    #[schema(minimum = 1)]
    max_new_tokens: Option<i64>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f64>,
    /// Keep the smallest set of tokens whose probabilities reach this share; 1 keeps all.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all.
    #[schema(minimum = 0)]
    top_k: Option<i64>,
    /// Make tokens that were there already less likely; 1 changes nothing.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    repetition_penalty: Option<f64>,
    /// The seeds of the episodes follow from it. Chosen when absent.
    seed: Option<i64>,
    /// Texts that end an answer, which stops before them: one, or a list of at most 16.
    #[schema(schema_with = super::fields::stops_schema)]
    stop: Option<OneOrMany<String>>,
    /// Default false; true keeps token ids and log-probabilities, which learning from the log needs.
    logprobs: Option<bool>,
    /// Upload the episodes of this request: true to the sink that the settings have for it, or the name of a sink.
    upload: Option<Upload>,
}

/// The sink that is meant, if one is.
fn destination(state: &AppState, upload: Option<&Upload>) -> Result<Option<Destination>, FieldError> {
    let name = match upload {
        None | Some(Upload::Flag(false)) => return Ok(None),
        Some(Upload::Flag(true)) => None,
        Some(Upload::Sink(name)) => Some(name.as_str()),
    };
    let to = state.uploads.destination(name);
    to.map(Some).map_err(|error| FieldError { field: "upload".into(), message: error.message })
}

/// Promises the upload of logged episodes, as the log has them. What the answer says of it.
async fn promise(
    state: &AppState,
    to: Option<&Destination>,
    run_id: &str,
    episodes: &[Episode],
) -> Result<&'static str, OutboxError> {
    let Some(to) = to else { return Ok(NOT_UPLOADED) };
    let lines = lines(episodes);
    state.uploads.promise(to, run_id, Content::Lines(lines)).await?;
    Ok(QUEUED)
}

/// What was logged, or the job that will log it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Collected {
    /// `completed`, or `pending` for a job.
    #[schema(example = "completed")]
    status: &'static str,
    /// The run.
    run_id: String,
    /// With an `output`: the episode's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    episode_id: Option<String>,
    /// The episodes' ids, in the order of the prompts; empty for a job.
    episode_ids: Vec<String>,
    /// What each earned; null where that could not be had, with the reason in the log's `meta.reward_error`.
    rewards: Vec<Option<f64>>,
    /// Of a job: to ask for its state with, at `/adapter/status/{job_id}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    job_id: Option<String>,
    /// The log, below the data folder.
    #[schema(example = "rl_runs/hindi-1.jsonl")]
    output_path: String,
    /// `none`, or `queued`: it arrives, whatever happens to the server. A job's is queued when all are collected.
    #[schema(example = "none")]
    upload: &'static str,
}

impl Collected {
    fn new(status: &'static str, run_id: &str) -> Self {
        Self {
            status,
            output_path: format!("{FOLDER}/{run_id}.jsonl"),
            run_id: run_id.to_owned(),
            episode_id: None,
            episode_ids: Vec::new(),
            rewards: Vec::new(),
            job_id: None,
            upload: NOT_UPLOADED,
        }
    }
}

/// Collect episodes
///
/// With an `output`, logs that one episode. Without, answers prompts, rewards the answers and logs them. What is
/// answered with 200 is on disk.
#[utoipa::path(
    post,
    path = "/rl/collect",
    tag = "rl",
    operation_id = "rl_collect",
    request_body = Collect,
    responses(
        (status = 200, description = "The episodes are in the log", body = Collected),
        (status = 202, description = "A job collects them", body = Collected),
        (status = 400, description = "A field is unknown, missing, of the wrong type or out of its range, or has no meaning beside another", body = ErrorBody),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 409, description = "A job collects into that run already", body = ErrorBody),
        (status = 413, description = "The body or a prompt is longer than the server takes", body = ErrorBody),
        (status = 415, description = "The body is not sent as application/json", body = ErrorBody),
        (status = 422, description = "The adapter's files do not fit the model", body = ErrorBody),
        (status = 503, description = "The server is stopping, or its disk refuses", body = ErrorBody),
        (status = 507, description = "The disk is full; no episode of the request was lost that was acknowledged, and the log stays readable", body = ErrorBody),
    )
)]
pub(super) async fn collect(
    State(state): State<AppState>,
    ApiJson(request): ApiJson<Collect>,
) -> Result<(StatusCode, Json<Collected>), ApiError> {
    if request.output.is_some() {
        return Ok((StatusCode::OK, Json(given(&state, request).await?)));
    }
    let one_prompt = request.prompts.is_none() && request.prompt.is_some();
    let to = destination(&state, request.upload.as_ref())?;
    let wanted = Wanted { upload: to.as_ref().map(|to| to.name.clone()), ..wanted(&state, request)? };
    let outcome = generated(&state, wanted, to.as_ref()).await;
    outcome.map_err(|error| match one_prompt {
        // Whoever gives one prompt knows no list of them.
        true => ApiError::from(in_words_of_one(error)),
        false => error.into(),
    })
}

async fn given(state: &AppState, request: Collect) -> Result<Collected, ApiError> {
    only_with("output is given", &generating(&request))?;
    let to = destination(state, request.upload.as_ref())?;
    let Collect { prompt, output, reward, meta, run_id, env_name, .. } = request;
    let missing = || {
        let message = "prompt is required beside output";
        ApiError::new(StatusCode::BAD_REQUEST, "missing_parameter", message).param("prompt")
    };
    let prompt = prompt.ok_or_else(missing)?;
    check_prompt_bytes(state, "prompt", prompt.len())?;
    let given = Given { prompt, output: output.unwrap_or_default(), reward, meta, run_id, env_name };
    let GivenEpisode { run_id, episode } = given.resolve(state.collector.config())?;
    let episode = state.collector.given(&run_id, episode).await?;
    let upload = promise(state, to.as_ref(), &run_id, std::slice::from_ref(&episode)).await?;
    Ok(Collected {
        upload,
        episode_id: Some(episode.episode_id.clone()),
        episode_ids: vec![episode.episode_id],
        rewards: vec![episode.reward],
        ..Collected::new("completed", &run_id)
    })
}

/// Fields that ask for answers, and whether they are there.
fn generating(request: &Collect) -> [(&'static str, bool); 12] {
    [
        ("prompts", request.prompts.is_some()),
        ("episodes", request.episodes.is_some()),
        ("adapter", request.adapter.is_some()),
        ("language", request.language.is_some()),
        ("max_new_tokens", request.max_new_tokens.is_some()),
        ("temperature", request.temperature.is_some()),
        ("top_p", request.top_p.is_some()),
        ("top_k", request.top_k.is_some()),
        ("repetition_penalty", request.repetition_penalty.is_some()),
        ("seed", request.seed.is_some()),
        ("stop", request.stop.is_some()),
        ("logprobs", request.logprobs.is_some()),
    ]
}

fn only_with(why: &str, fields: &[(&'static str, bool)]) -> Result<(), ApiError> {
    match fields.iter().find(|(_, is_there)| *is_there) {
        None => Ok(()),
        Some((field, _)) => {
            let remedy = match *field {
                "language" | "adapter" => format!("; meta.{field} is the place for it"),
                _ => "; leave it out".to_owned(),
            };
            Err(ApiError::invalid(field, format!("has no meaning where {why}{remedy}")))
        }
    }
}

fn wanted(state: &AppState, request: Collect) -> Result<Wanted, ApiError> {
    only_with(
        "no output is given",
        &[("reward", request.reward.is_some()), ("meta", request.meta.is_some())],
    )?;
    let prompts = match (request.prompts, request.prompt) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("prompt", "cannot stand beside prompts; give one of them"));
        }
        (None, Some(prompt)) => Some(vec![PromptConfig::new(prompt)]),
        (prompts, None) => {
            prompts.map(|prompts| prompts.into_iter().map(|field| field.0).collect::<Vec<_>>())
        }
    };
    for prompt in prompts.iter().flatten() {
        check_prompt_bytes(state, "prompts", prompt.prompt.len())?;
    }
    Ok(Wanted {
        prompts,
        episodes: request.episodes,
        run_id: request.run_id,
        env_name: request.env_name,
        adapter: request.adapter.filter(|name| !name.is_empty() && name != "none"),
        language: request.language,
        max_new_tokens: request.max_new_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        repetition_penalty: request.repetition_penalty,
        seed: request.seed,
        stop: stops(request.stop)?,
        logprobs: request.logprobs.unwrap_or(false),
        upload: None,
    })
}

/// Why a request for answers cannot be done.
enum Refused {
    Collect(CollectError),
    Jobs(JobsError),
    Upload(OutboxError),
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Collect(error) => error.into(),
            Refused::Jobs(error @ JobsError::NameTaken { .. }) => {
                Self::new(StatusCode::CONFLICT, "run_id_in_use", error.to_string()).param("run_id")
            }
            Refused::Jobs(error) => error.into(),
            Refused::Upload(error) => error.into(),
        }
    }
}

fn in_words_of_one(mut refused: Refused) -> Refused {
    if let Refused::Collect(CollectError::Field(error)) = &mut refused
        && error.field == "prompts[0]"
    {
        error.field = "prompt".into();
    }
    refused
}

async fn generated(
    state: &AppState,
    wanted: Wanted,
    to: Option<&Destination>,
) -> Result<(StatusCode, Json<Collected>), Refused> {
    let collect = Refused::Collect;
    let job = CollectJob::resolve(wanted, state.collector.config()).map_err(|error| collect(error.into()))?;
    state.collector.check(&job).await.map_err(collect)?;
    if job.episodes > MAX_AT_ONCE {
        return Ok((StatusCode::ACCEPTED, Json(accept(state, &job).await.map_err(Refused::Jobs)?)));
    }
    let id = uuid::Uuid::now_v7().to_string();
    let mut all: Vec<Episode> = Vec::new();
    let mut keep = |_, group: &[Episode]| all.extend_from_slice(group);
    // Nobody asks it to stop: a client that leaves drops it.
    let (_running, stop) = watch::channel(Stop::No);
    let ending = state.collector.run(&id, &job, Begin::Anew, &mut keep, stop).await.map_err(collect)?;
    debug_assert_eq!(ending, Ending::Completed);
    // Groups come as they are through.
    let number =
        |episode: &Episode| episode.episode_id.rsplit('-').next().and_then(|n| n.parse::<u64>().ok());
    all.sort_by_key(number);
    let upload = promise(state, to, &job.run_id, &all).await.map_err(Refused::Upload)?;
    let collected = Collected {
        upload,
        rewards: all.iter().map(|episode| episode.reward).collect(),
        episode_ids: all.into_iter().map(|episode| episode.episode_id).collect(),
        ..Collected::new("completed", &job.run_id)
    };
    Ok((StatusCode::OK, Json(collected)))
}

async fn accept(state: &AppState, job: &CollectJob) -> Result<Collected, JobsError> {
    let new = NewJob {
        kind: COLLECT_KIND,
        // No adapter's name has a slash: what trains and what collects do not get into each other's way.
        name: format!("{FOLDER}/{}", job.run_id),
        spec: serde_json::to_value(job).map_err(|error| JobsError::Store(error.to_string()))?,
        meta: Value::Null,
        plan: Value::Null,
        file: None,
    };
    let accepted = state.jobs.submit(new).await?;
    let upload = if job.upload.is_some() { QUEUED } else { NOT_UPLOADED };
    Ok(Collected { job_id: Some(accepted.id), upload, ..Collected::new("pending", &job.run_id) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_other_mode_are_named() {
        let request = Collect { output: Some("o".into()), temperature: Some(1.0), ..Collect::default() };
        let error = only_with("output is given", &generating(&request)).expect_err("is refused").body().error;
        assert_eq!(error.param.as_deref(), Some("temperature"));
        let request = Collect { output: Some("o".into()), language: Some("hi".into()), ..Collect::default() };
        let error = only_with("output is given", &generating(&request)).expect_err("is refused").body().error;
        assert!(error.message.contains("meta.language"), "{}", error.message);
    }
}
