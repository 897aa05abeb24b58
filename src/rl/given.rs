//! An episode that a client brings: what it says of it is checked and sorted into the stored fields. Knows no file.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::collect::new_episode;
use super::episode::{Episode, EpisodeMeta, EpisodeSource, SamplingMeta};
use super::plan::{digits_of_now, env_name, run_id};
use crate::config::adapter::FieldError;
use crate::config::rl::RlConfig;
use crate::text::{Language, target_of_prompt};

/// What a client brings.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// Not empty.
    pub prompt: String,
    /// The answer, which may be empty.
    pub output: String,
    /// What it earned, if that is known.
    pub reward: Option<f64>,
    /// What else is known.
    pub meta: Option<Map<String, Value>>,
    /// The run; one of the day when left out.
    pub run_id: Option<String>,
    /// What it comes from.
    pub env_name: Option<String>,
}

/// An episode on its way to the log.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenEpisode {
    /// The run that it belongs to.
    pub run_id: String,
    /// Without a reward where that is to be computed.
    pub episode: Episode,
}

fn error(field: &str, message: impl Into<String>) -> FieldError {
    FieldError { field: field.to_owned(), message: message.into() }
}

impl Given {
    /// The episode.
    ///
    /// # Errors
    /// The field, and what would do.
    pub fn resolve(self, config: &RlConfig) -> Result<GivenEpisode, FieldError> {
        if self.prompt.trim().is_empty() {
            return Err(error("prompt", "must not be empty"));
        }
        if self.reward.is_some_and(|reward| !reward.is_finite()) {
            return Err(error("reward", "must be a finite number, or left out to have it computed"));
        }
        // One log a day for those who name none, instead of one an episode.
        let run_id = run_id(Some(self.run_id.unwrap_or_else(|| format!("given-{}", digits_of_now(8)))))?;
        let env_name = env_name(self.env_name, &config.collect)?;
        let (meta, latency_s) = meta(self.meta.unwrap_or_default(), &self.prompt, self.reward)?;
        let id = uuid::Uuid::now_v7().to_string();
        let mut episode = new_episode(id, &env_name, &self.prompt, &self.output, meta);
        (episode.reward, episode.latency_s) = (self.reward, latency_s);
        Ok(GivenEpisode { run_id, episode })
    }
}

/// The stored fields and the latency out of what a client says; what is not known stays as it is.
fn meta(
    mut said: Map<String, Value>,
    prompt: &str,
    reward: Option<f64>,
) -> Result<(EpisodeMeta, Option<f64>), FieldError> {
    for field in ["source", "reward_error"] {
        if said.contains_key(field) {
            return Err(error(&format!("meta.{field}"), "is written by the server; leave it out"));
        }
    }
    let mut meta = EpisodeMeta::new(EpisodeSource::Given);
    meta.language = match take::<String>(&mut said, "language")? {
        Some(text) => {
            let language: Language =
                text.parse().map_err(|unknown| error("meta.language", format!("is not known: {unknown}")))?;
            Some(language)
        }
        None => target_of_prompt(prompt),
    }
    .map(|language| language.code().to_owned());
    meta.base_model = take(&mut said, "base_model")?;
    meta.adapter = take(&mut said, "adapter")?;
    meta.adapter_generation = take(&mut said, "adapter_generation")?;
    meta.reference = take(&mut said, "reference")?;
    meta.finish_reason = take::<Finish>(&mut said, "finish_reason")?.map(|finish| match finish {
        Finish::Stop => "stop".to_owned(),
        Finish::Length => "length".to_owned(),
    });
    meta.prompt_token_ids = take(&mut said, "prompt_token_ids")?;
    meta.token_ids = take(&mut said, "token_ids")?;
    meta.logprobs = take(&mut said, "logprobs")?;
    meta.sampling = take::<SamplingMeta>(&mut said, "sampling")?;
    meta.rewards = take::<BTreeMap<String, f64>>(&mut said, "rewards")?.unwrap_or_default();
    let latency_s: Option<f64> = take(&mut said, "latency_s")?;
    if !meta.rewards.is_empty() && reward.is_none() {
        return Err(error(
            "meta.rewards",
            "are the parts of a reward; give reward as well, or leave both out",
        ));
    }
    if latency_s.is_some_and(|seconds| seconds < 0.0) {
        return Err(error("meta.latency_s", "must not be negative"));
    }
    match (&meta.token_ids, &meta.logprobs) {
        (None, Some(_)) => return Err(error("meta.logprobs", "belong to meta.token_ids; give both")),
        (Some(tokens), Some(logprobs)) if tokens.len() != logprobs.len() => {
            let message = format!(
                "are {}, and meta.token_ids are {}; give one for each token",
                logprobs.len(),
                tokens.len()
            );
            return Err(error("meta.logprobs", message));
        }
        (_, Some(logprobs)) if logprobs.iter().any(|logprob| !logprob.is_finite() || *logprob > 0.0) => {
            return Err(error("meta.logprobs", "must be logarithms of probabilities: finite, and at most 0"));
        }
        _ => {}
    }
    meta.extra = said;
    Ok((meta, latency_s))
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Finish {
    Stop,
    Length,
}

/// A field out of a client's object; null counts as left out.
fn take<T: DeserializeOwned>(said: &mut Map<String, Value>, name: &str) -> Result<Option<T>, FieldError> {
    let Some(value) = said.shift_remove(name).filter(|value| !value.is_null()) else { return Ok(None) };
    serde_path_to_error::deserialize(value).map_err(|wrong| {
        let field = match wrong.path().to_string().as_str() {
            "." | "?" => format!("meta.{name}"),
            path if path.starts_with('[') => format!("meta.{name}{path}"),
            path => format!("meta.{name}.{path}"),
        };
        error(&field, format!("cannot be used: {}", wrong.into_inner()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolve(reward: Option<f64>, meta: Value) -> Result<GivenEpisode, FieldError> {
        let meta = meta.as_object().cloned();
        let prompt = "Translate to Hindi: water".to_owned();
        Given { prompt, output: "पानी।".into(), reward, meta, ..Given::default() }
            .resolve(&RlConfig::default())
    }

    #[test]
    fn what_is_known_is_sorted_and_the_rest_is_kept() {
        let GivenEpisode { run_id, episode } = resolve(
            Some(-2.5),
            json!({"adapter": "a", "adapter_generation": 3, "token_ids": [1, 2], "logprobs": [-0.5, 0.0],
                   "latency_s": 1.5, "user": {"id": 7}, "base_model": null, "rewards": {"human": 1.0}}),
        )
        .unwrap();
        assert!(run_id.starts_with("given-20") && run_id.len() == "given-20261231".len(), "{run_id}");
        assert_eq!((episode.reward, episode.latency_s), (Some(-2.5), Some(1.5)));
        let meta = episode.meta;
        assert_eq!((meta.language.as_deref(), meta.adapter.as_deref()), (Some("hi"), Some("a")));
        assert_eq!((meta.token_ids, meta.logprobs), (Some(vec![1, 2]), Some(vec![-0.5, 0.0])));
        assert_eq!(Value::from(meta.extra), json!({"user": {"id": 7}}));
        assert_eq!(meta.rewards["human"], 1.0);
    }

    #[test]
    fn errors_name_the_field() {
        for (field, meta) in [
            ("meta.source", json!({"source": "generated"})),
            ("meta.reward_error", json!({"reward_error": "x"})),
            ("meta.language", json!({"language": "klingon"})),
            ("meta.language", json!({"language": 3})),
            ("meta.adapter_generation", json!({"adapter_generation": -1})),
            ("meta.token_ids[1]", json!({"token_ids": [1, -2]})),
            ("meta.logprobs", json!({"logprobs": [-1.0]})),
            ("meta.logprobs", json!({"token_ids": [1, 2], "logprobs": [-1.0]})),
            ("meta.logprobs", json!({"token_ids": [1], "logprobs": [0.5]})),
            ("meta.finish_reason", json!({"finish_reason": "tired"})),
            ("meta.sampling", json!({"sampling": {"heat": 1}})),
            ("meta.rewards", json!({"rewards": {"length": 1.0}})),
            ("meta.latency_s", json!({"latency_s": -1})),
        ] {
            let error = resolve(None, meta).unwrap_err();
            assert!(error.field.starts_with(field), "{field}: {error}");
        }
        assert_eq!(resolve(Some(f64::NAN), json!({})).unwrap_err().field, "reward");
        let of = |given: Given| given.resolve(&RlConfig::default()).unwrap_err().field;
        assert_eq!(of(Given { prompt: " ".into(), ..Given::default() }), "prompt");
        let named =
            |run_id: &str| Given { prompt: "p".into(), run_id: Some(run_id.into()), ..Given::default() };
        assert_eq!(of(named("../../etc/passwd")), "run_id");
    }
}
