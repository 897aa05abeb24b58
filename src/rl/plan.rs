//! What is to be collected: as a request or a command line wants it, then resolved into a [`CollectJob`], which is kept
//! as JSON. An error names the field in the words of the HTTP contract.

use std::ops::Range;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::episode::check_run_id;
use crate::config::adapter::FieldError;
use crate::config::rl::{CollectConfig, PromptConfig, RlConfig};
use crate::engine::{EngineError, Sampling};
use crate::text::{Language, target_of_prompt};

/// Most prompts of one job.
const MAX_PROMPTS: usize = 10_000;
/// Seeds that are chosen or derived survive a client whose numbers are doubles.
const SEED_BITS: u32 = 53;

/// What somebody wants; what is left out has its default.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The prompts; those of the settings when left out.
    pub prompts: Option<Vec<PromptConfig>>,
    /// Episodes in all; one a prompt when left out.
    pub episodes: Option<i64>,
    /// The run; a new one when left out.
    pub run_id: Option<String>,
    /// What they come from.
    pub env_name: Option<String>,
    /// Name of the adapter.
    pub adapter: Option<String>,
    /// Language of the answers; of the settings' prompts, only those in this language are taken.
    pub language: Option<String>,
    /// Upper bound on new tokens.
    pub max_new_tokens: Option<i64>,
    /// 0 is greedy.
    pub temperature: Option<f64>,
    /// Nucleus.
    pub top_p: Option<f64>,
    /// 0 keeps all.
    pub top_k: Option<i64>,
    /// 1 changes nothing.
    pub repetition_penalty: Option<f64>,
    /// Seed of everything that is random; chosen when left out.
    pub seed: Option<i64>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Keep token ids and log-probabilities.
    pub logprobs: bool,
    /// Name of the sink that the episodes go to.
    pub upload: Option<String>,
}

/// A prompt with what is known of a good answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// The text to go on from.
    pub prompt: String,
    /// Code of the language that is wanted.
    pub language: Option<String>,
    /// A good answer.
    pub reference: Option<String>,
}

/// Episodes to collect, resolved. It is kept as JSON, so that a job goes on as it began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectJob {
    /// The run that they belong to.
    pub run_id: String,
    /// What they come from.
    pub env_name: String,
    /// What is answered, in turns.
    pub prompts: Vec<Prompt>,
    /// Episodes in all.
    pub episodes: u64,
    /// Answers to one prompt that are rewarded together.
    pub group_size: usize,
    /// Name of the adapter; the base model without.
    pub adapter: Option<String>,
    /// Upper bound on new tokens; less where the context is shorter.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus.
    pub top_p: f64,
    /// 0 keeps all.
    pub top_k: u64,
    /// 1 changes nothing.
    pub repetition_penalty: f64,
    /// Each episode's seed follows from it.
    pub seed: u64,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Keep token ids and log-probabilities.
    pub logprobs: bool,
    /// Name of the sink that the episodes go to when all are collected.
    #[serde(default)]
    pub upload: Option<String>,
}

fn error(field: &str, message: impl Into<String>) -> FieldError {
    FieldError { field: field.to_owned(), message: message.into() }
}

/// A count that a client gave, in its range.
fn count(field: &str, value: i64, max: u64) -> Result<u64, FieldError> {
    let count = u64::try_from(value).ok().filter(|count| (1..=max).contains(count));
    count.ok_or_else(|| error(field, format!("is {value}; use a number from 1 to {max}")))
}

impl CollectJob {
    /// What is wanted, with the settings behind it.
    ///
    /// # Errors
    /// The field, and what would do.
    pub fn resolve(wanted: Wanted, config: &RlConfig) -> Result<Self, FieldError> {
        let CollectConfig { max_episodes, group_size, .. } = config.collect;
        let defaults = &config.collect;
        let language = wanted.language.as_deref().map(language_of).transpose()?;
        let prompts = match wanted.prompts {
            Some(prompts) => given(prompts, language)?,
            None => of_settings(&config.prompts, language)?,
        };
        let episodes = match wanted.episodes {
            Some(episodes) => count("episodes", episodes, max_episodes)?,
            None => (prompts.len() as u64).min(max_episodes),
        };
        let top_k = match wanted.top_k {
            Some(top_k) => u64::try_from(top_k).map_err(|_| error("top_k", "must be 0 (off) or more"))?,
            None => defaults.top_k as u64,
        };
        let max_new_tokens = match wanted.max_new_tokens {
            Some(tokens) => count("max_new_tokens", tokens, 1_000_000)? as usize,
            None => defaults.max_new_tokens,
        };
        if wanted.stop.iter().any(String::is_empty) {
            return Err(error("stop", "must not hold an empty text"));
        }
        let job = Self {
            run_id: run_id(wanted.run_id)?,
            env_name: env_name(wanted.env_name, defaults)?,
            group_size: group_size.min(episodes.div_ceil(prompts.len() as u64) as usize),
            prompts,
            episodes,
            adapter: wanted.adapter,
            max_new_tokens,
            temperature: wanted.temperature.unwrap_or(defaults.temperature),
            top_p: wanted.top_p.unwrap_or(defaults.top_p),
            top_k,
            repetition_penalty: wanted.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            seed: wanted
                .seed
                .map_or_else(|| narrow(uuid::Uuid::new_v4().as_u64_pair().0), |seed| seed as u64),
            stop: wanted.stop,
            logprobs: wanted.logprobs,
            upload: wanted.upload,
        };
        job.sampling().validate().map_err(|refused| match refused {
            EngineError::InvalidParameter { field, message } => error(field, message),
            other => error("sampling", other.to_string()),
        })?;
        Ok(job)
    }

    /// The groups: a prompt by its place, and the episodes that are answers to it.
    pub(super) fn groups(&self) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        let (size, episodes, prompts) =
            (self.group_size.max(1) as u64, self.episodes, self.prompts.len() as u64);
        (0..episodes.div_ceil(size))
            .map(move |group| ((group % prompts) as usize, group * size..((group + 1) * size).min(episodes)))
    }

    /// How tokens are chosen, but for the seed.
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature as f32,
            top_k: usize::try_from(self.top_k).unwrap_or(usize::MAX),
            top_p: self.top_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
            ..Sampling::default()
        }
    }

    /// An episode's own seed: SplitMix64 (Steele et al. 2014) of the job's seed and the episode's number, so that any
    /// one can be sampled again with `/generate-lite`.
    pub fn seed_of(&self, index: u64) -> u64 {
        let mut z = self.seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        narrow(z ^ (z >> 31))
    }
}

impl Prompt {
    /// In the language that is wanted, else in the one that the prompt asks for.
    fn new(PromptConfig { prompt, reference, .. }: PromptConfig, wanted: Option<Language>) -> Self {
        let language = wanted.or_else(|| target_of_prompt(&prompt));
        Self { language: language.map(|language| language.code().to_owned()), prompt, reference }
    }

    /// The language that is wanted.
    pub(super) fn language(&self) -> Option<Language> {
        self.language.as_deref().and_then(Language::parse)
    }
}

fn narrow(seed: u64) -> u64 {
    seed >> (u64::BITS - SEED_BITS)
}

/// The run's id as given, else a new one.
///
/// # Errors
/// It is none.
pub fn run_id(given: Option<String>) -> Result<String, FieldError> {
    let run_id = given.unwrap_or_else(|| {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        format!("run-{}-{}", digits_of_now(14), &unique[..6])
    });
    check_run_id(&run_id).map_err(|invalid| error("run_id", invalid.to_string()))?;
    Ok(run_id)
}

/// Year, month, day, hour, minute and second of now in UTC, as many digits of them as are wanted.
pub(super) fn digits_of_now(digits: usize) -> String {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    now.chars().filter(char::is_ascii_digit).take(digits).collect()
}

/// The environment as given, else that of the settings.
///
/// # Errors
/// It is no name.
pub fn env_name(given: Option<String>, defaults: &CollectConfig) -> Result<String, FieldError> {
    let env_name = given.unwrap_or_else(|| defaults.env_name.clone());
    check_run_id(&env_name).map_err(|invalid| error("env_name", invalid.to_string()))?;
    Ok(env_name)
}

fn language_of(text: &str) -> Result<Language, FieldError> {
    text.parse().map_err(|unknown| error("language", format!("is not known: {unknown}")))
}

fn given(prompts: Vec<PromptConfig>, language: Option<Language>) -> Result<Vec<Prompt>, FieldError> {
    if prompts.is_empty() {
        return Err(error(
            "prompts",
            "is empty; give at least one, or leave it out to take those of the settings",
        ));
    }
    if prompts.len() > MAX_PROMPTS {
        return Err(error("prompts", format!("holds {} texts; give at most {MAX_PROMPTS}", prompts.len())));
    }
    let one = |(at, given): (usize, PromptConfig)| {
        if given.prompt.trim().is_empty() {
            return Err(error(&format!("prompts[{at}]"), "must not be empty"));
        }
        let own = given.language.as_deref().map(|text| {
            text.parse::<Language>().map_err(|unknown| {
                error(&format!("prompts[{at}].language"), format!("is not known: {unknown}"))
            })
        });
        let wanted = own.transpose()?.or(language);
        Ok(Prompt::new(given, wanted))
    };
    prompts.into_iter().enumerate().map(one).collect()
}

fn of_settings(prompts: &[PromptConfig], wanted: Option<Language>) -> Result<Vec<Prompt>, FieldError> {
    let all = prompts
        .iter()
        .map(|prompt| Prompt::new(prompt.clone(), prompt.language.as_deref().and_then(Language::parse)));
    let taken: Vec<Prompt> =
        all.filter(|prompt| wanted.is_none_or(|wanted| prompt.language() == Some(wanted))).collect();
    match wanted {
        Some(language) if taken.is_empty() => {
            let name = language.title();
            Err(error(
                "language",
                format!("is {name}, in which rl_config.yaml has no prompt; give prompts of your own"),
            ))
        }
        _ => Ok(taken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(wanted: Wanted) -> Result<CollectJob, FieldError> {
        CollectJob::resolve(wanted, &RlConfig::default())
    }

    #[test]
    fn without_a_word_every_prompt_of_the_settings_is_answered_once() {
        let job = resolve(Wanted::default()).unwrap();
        assert_eq!((job.episodes, job.prompts.len(), job.group_size), (60, 60, 1));
        assert!(job.run_id.starts_with("run-20") && check_run_id(&job.run_id).is_ok(), "{}", job.run_id);
        assert_eq!(job.env_name, "gurukul");
        assert!(job.prompts.iter().all(|prompt| prompt.reference.is_some()));
        let hindi = resolve(Wanted { language: Some("Hindi".into()), ..Wanted::default() }).unwrap();
        assert_eq!(hindi.prompts.len(), 6);
    }

    #[test]
    fn groups_cover_every_episode_once_and_change_their_prompts() {
        let prompts: Vec<PromptConfig> = (0..3).map(|n| PromptConfig::new(format!("prompt {n}"))).collect();
        for (episodes, size, first) in [(1, 1, 0..1), (3, 1, 0..1), (7, 3, 0..3), (100, 8, 0..8)] {
            let wanted =
                Wanted { prompts: Some(prompts.clone()), episodes: Some(episodes), ..Wanted::default() };
            let job = resolve(wanted).unwrap();
            assert_eq!(job.group_size, size);
            let groups: Vec<_> = job.groups().collect();
            assert_eq!(groups[0].1, first);
            let all: Vec<u64> = groups.iter().flat_map(|(_, indexes)| indexes.clone()).collect();
            assert_eq!(all, (0..episodes as u64).collect::<Vec<_>>());
            for (at, (prompt, _)) in groups.iter().enumerate() {
                assert_eq!(*prompt, at % 3);
            }
        }
    }

    #[test]
    fn every_episode_has_a_seed_of_its_own() {
        let job = resolve(Wanted { seed: Some(7), ..Wanted::default() }).unwrap();
        let seeds: std::collections::BTreeSet<u64> = (0..10_000).map(|index| job.seed_of(index)).collect();
        assert_eq!(seeds.len(), 10_000);
        assert!(seeds.iter().all(|seed| *seed < 1 << SEED_BITS));
        assert_eq!(
            job.seed_of(3),
            resolve(Wanted { seed: Some(7), ..Wanted::default() }).unwrap().seed_of(3)
        );
        assert_ne!(
            job.seed_of(3),
            resolve(Wanted { seed: Some(8), ..Wanted::default() }).unwrap().seed_of(3)
        );
    }

    #[test]
    fn errors_name_the_field() {
        let wanted = Wanted::default;
        let one = || Some(vec![PromptConfig::new("a".into())]);
        let many = |text: &str, n| Some(vec![PromptConfig::new(text.into()); n]);
        for (field, wanted) in [
            ("episodes", Wanted { episodes: Some(0), ..wanted() }),
            ("episodes", Wanted { episodes: Some(-1), ..wanted() }),
            ("episodes", Wanted { episodes: Some(1_000_000), ..wanted() }),
            ("prompts", Wanted { prompts: Some(vec![]), ..wanted() }),
            ("prompts", Wanted { prompts: many("a", MAX_PROMPTS + 1), ..wanted() }),
            ("prompts[0]", Wanted { prompts: many(" \n", 1), ..wanted() }),
            ("run_id", Wanted { run_id: Some("../x".into()), ..wanted() }),
            ("env_name", Wanted { env_name: Some("a b".into()), ..wanted() }),
            ("language", Wanted { language: Some("xx".into()), ..wanted() }),
            ("language", Wanted { language: Some("ne".into()), ..wanted() }),
            ("max_new_tokens", Wanted { max_new_tokens: Some(0), prompts: one(), ..wanted() }),
            ("temperature", Wanted { temperature: Some(f64::NAN), ..wanted() }),
            ("top_p", Wanted { top_p: Some(0.0), ..wanted() }),
            ("top_k", Wanted { top_k: Some(-1), ..wanted() }),
            ("repetition_penalty", Wanted { repetition_penalty: Some(0.0), ..wanted() }),
            ("stop", Wanted { stop: vec![String::new()], ..wanted() }),
        ] {
            let error = resolve(wanted).unwrap_err();
            assert_eq!(error.field, field, "{error}");
        }
    }

    #[test]
    fn a_job_is_kept_as_json() {
        let job = resolve(Wanted { seed: Some(-1), adapter: Some("a".into()), ..Wanted::default() }).unwrap();
        let text = serde_json::to_string(&job).unwrap();
        assert_eq!(serde_json::from_str::<CollectJob>(&text).unwrap(), job);
    }
}
