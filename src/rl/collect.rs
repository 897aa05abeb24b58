//! Collecting: prompts are answered through the engine's batch, a group of answers to one prompt at a time is
//! rewarded, and each group is in the log before it counts. Knows neither HTTP nor jobs: `plan` has what a job is.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt as _;
use futures::future::try_join_all;
use tokio::sync::{Semaphore, watch};

use super::episode::{Episode, EpisodeMeta, EpisodeSource, SCHEMA, SamplingMeta};
use super::log::{EpisodeLog, LogError, episodes};
use super::plan::{CollectJob, Prompt};
use super::reward::{Reward, RewardError, Rewarder, Sample};
use crate::adapters::{AdapterError, Registry};
use crate::config::adapter::FieldError;
use crate::config::rl::RlConfig;
use crate::engine::{
    AdapterHandle, Answer, EngineError, EngineHandle, FinishReason, GenerateRequest, Sampling,
};
use crate::metrics;
use crate::model::tokenizer::{AddSpecial, Tokenizer, TokenizerError};
use crate::train::Stop;

/// Waits before the engine is asked again when its queue is full.
const FULL_QUEUE: Range<Duration> = Duration::from_millis(20)..Duration::from_secs(1);

/// Why collecting ends early. What is in the log stays there.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A field that cannot be used.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The adapter cannot be had.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The engine refuses or has stopped.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The prompt cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The episodes cannot be stored.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The run's earlier episodes cannot be read.
    #[error("the log of the run cannot be read: {0}")]
    Read(std::io::Error),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Every episode is in the log.
    Completed,
    /// Asked to end for good, with so many in the log.
    Cancelled {
        /// Episodes.
        done: u64,
    },
    /// Asked to go on at the next start.
    Paused,
}

/// Whether some of a run's episodes may be in the log already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// None is.
    Anew,
    /// Those that are there are not collected again.
    Continue,
}

/// What collecting works with. A cheap clone.
#[derive(Clone)]
pub struct Collector {
    parts: Arc<Parts>,
}

struct Parts {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    adapters: Arc<Registry>,
    model_id: String,
    config: Arc<RlConfig>,
    rewarder: Rewarder,
    log: EpisodeLog,
    /// Answers that are generated at once, whoever collects.
    in_flight: Semaphore,
    max_in_flight: usize,
}

impl Collector {
    /// Over a model that is served under `model_id`.
    ///
    /// # Errors
    /// As [`Rewarder::new`].
    pub fn new(
        engine: EngineHandle,
        tokenizer: Arc<Tokenizer>,
        adapters: Arc<Registry>,
        model_id: String,
        config: Arc<RlConfig>,
        log: EpisodeLog,
    ) -> Result<Self, FieldError> {
        let rewarder = Rewarder::new(&config.rewards)?;
        let max_in_flight = match config.collect.max_in_flight {
            // Half of the batch is left to others.
            0 => (engine.info().max_batch / 2).max(1),
            bound => bound,
        };
        let in_flight = Semaphore::new(max_in_flight);
        let parts =
            Parts { engine, tokenizer, adapters, model_id, config, rewarder, log, in_flight, max_in_flight };
        Ok(Self { parts: Arc::new(parts) })
    }

    /// The settings.
    pub fn config(&self) -> &RlConfig {
        &self.parts.config
    }

    /// What rewards the answers.
    pub fn rewarder(&self) -> &Rewarder {
        &self.parts.rewarder
    }

    /// Where the episodes go.
    pub fn log(&self) -> &EpisodeLog {
        &self.parts.log
    }

    /// Name of the base model.
    pub fn model_id(&self) -> &str {
        &self.parts.model_id
    }

    /// That a job can be begun: its adapter can be had and its prompts leave room for an answer.
    ///
    /// # Errors
    /// The adapter's, or the prompt that does not fit.
    pub async fn check(&self, job: &CollectJob) -> Result<(), CollectError> {
        self.adapter(job).await?;
        for (at, prompt) in job.prompts.iter().enumerate() {
            let tokens = self.tokens(prompt)?.len();
            let limit = self.parts.engine.info().context_length;
            if tokens >= limit {
                let message = format!(
                    "has {tokens} tokens, which leaves no room for an answer in the {limit} tokens that fit; shorten it"
                );
                return Err(FieldError { field: format!("prompts[{at}]"), message }.into());
            }
            if at % 64 == 63 {
                // Many prompts take their time, which others may use.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Collects a job's episodes. `id` is the job's: the episodes are `ID-0`, `ID-1`, ..., which is how they are known
    /// again after a crash. `logged` is told of each group once it is on disk, and how many episodes are there in all.
    ///
    /// # Errors
    /// See [`CollectError`].
    pub async fn run(
        &self,
        id: &str,
        job: &CollectJob,
        begin: Begin,
        logged: &mut (dyn FnMut(u64, &[Episode]) + Send),
        mut stop: watch::Receiver<Stop>,
    ) -> Result<Ending, CollectError> {
        let already = match begin {
            Begin::Anew => BTreeSet::new(),
            Begin::Continue => self.already(id, &job.run_id).await?,
        };
        let adapter = self.adapter(job).await?;
        let mut done = already.len() as u64;
        let mut missing: Vec<(usize, Range<u64>)> = job.groups().collect();
        missing.retain(|(_, indexes)| indexes.clone().any(|index| !already.contains(&index)));
        let groups = missing.into_iter().map(|(prompt, indexes)| {
            self.group(id, job, &job.prompts[prompt], indexes, &already, adapter.clone())
        });
        // More groups than this would only wait for their turn.
        let at_once = self.parts.max_in_flight.div_ceil(job.group_size) + 1;
        let mut groups = std::pin::pin!(futures::stream::iter(groups).buffer_unordered(at_once));
        loop {
            let asked = async { stop.wait_for(|stop| *stop != Stop::No).await.map(|stop| *stop) };
            let group = tokio::select! {
                group = groups.next() => group,
                asked = asked => match asked {
                    Ok(Stop::Pause) => return Ok(Ending::Paused),
                    Ok(_) => return Ok(Ending::Cancelled { done }),
                    // Nobody can ask any more.
                    Err(_) => groups.next().await,
                },
            };
            let Some(group) = group else { return Ok(Ending::Completed) };
            let group = group?;
            done += group.len() as u64;
            logged(done, &group);
        }
    }

    /// Logs one episode that a client brings, rewarded where it brings no reward.
    ///
    /// # Errors
    /// It cannot be stored.
    pub async fn given(&self, run_id: &str, mut episode: Episode) -> Result<Episode, CollectError> {
        if episode.reward.is_none() {
            let sample = Sample {
                prompt: &episode.prompt,
                output: &episode.output,
                language: episode.meta.language.as_deref().and_then(|code| code.parse().ok()),
                reference: episode.meta.reference.as_deref(),
                finished: episode.meta.finish_reason.as_deref() != Some(FinishReason::Length.as_str()),
            };
            let reward = self.reward(&[sample]).await.pop();
            reward.into_iter().for_each(|reward| rewarded(&mut episode, reward));
        }
        let appended = self.parts.log.append(run_id, vec![episode]).await?;
        collected(&appended.episodes);
        appended
            .episodes
            .into_iter()
            .next()
            .ok_or_else(|| LogError::Io("the log kept the episode".into()).into())
    }

    /// The lines of a job's episodes as the log has them.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn lines(&self, id: &str, run_id: &str) -> Result<Vec<u8>, CollectError> {
        Ok(self.look(id, run_id, |_, line| line.to_vec()).await?.concat())
    }

    async fn reward(&self, group: &[Sample<'_>]) -> Vec<Result<Reward, RewardError>> {
        let begun = Instant::now();
        let rewards = self.parts.rewarder.group(group).await;
        metrics::group_rewarded(begun.elapsed().as_secs_f64());
        rewards
    }

    async fn adapter(&self, job: &CollectJob) -> Result<Option<AdapterHandle>, AdapterError> {
        match &job.adapter {
            Some(name) => self.parts.adapters.acquire(name).await.map(Some),
            None => Ok(None),
        }
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, TokenizerError> {
        self.parts.tokenizer.encode(&prompt.prompt, AddSpecial::Yes)
    }

    /// Which episodes of a job the log has.
    async fn already(&self, id: &str, run_id: &str) -> Result<BTreeSet<u64>, CollectError> {
        Ok(self.look(id, run_id, |index, _| index).await?.into_iter().collect())
    }

    /// Goes through a run's log, and takes something of each of a job's episodes: of its number and its line.
    async fn look<T: Send + 'static>(
        &self,
        id: &str,
        run_id: &str,
        mut take: impl FnMut(u64, &[u8]) -> T + Send + 'static,
    ) -> Result<Vec<T>, CollectError> {
        let (dir, run, prefix) = (self.parts.log.dir().to_owned(), run_id.to_owned(), format!("{id}-"));
        let look = move || -> std::io::Result<Vec<T>> {
            let mut found = Vec::new();
            let mut of_run = episodes(&dir, &run)?;
            while let Some(episode) = of_run.next() {
                let number = episode.map(|episode| episode.episode_id.strip_prefix(&prefix)?.parse().ok());
                match number {
                    Ok(Some(number)) => found.push(take(number, of_run.line())),
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%error, "a line of the log is passed over"),
                }
            }
            Ok(found)
        };
        let found = tokio::task::spawn_blocking(look).await;
        found.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(CollectError::Read)
    }

    /// The answers to one prompt: generated, rewarded together, logged. Those that the log has are generated again,
    /// which gives the same, because the others are compared with them.
    async fn group(
        &self,
        id: &str,
        job: &CollectJob,
        prompt: &Prompt,
        indexes: Range<u64>,
        already: &BTreeSet<u64>,
        adapter: Option<AdapterHandle>,
    ) -> Result<Vec<Episode>, CollectError> {
        let tokens = self.tokens(prompt)?;
        let room = self.parts.engine.info().context_length.saturating_sub(tokens.len());
        let max_new_tokens = job.max_new_tokens.min(room);
        let answers = indexes.clone().map(|index| {
            let request = GenerateRequest {
                sampling: Sampling { seed: job.seed_of(index), ..job.sampling() },
                stop: job.stop.clone(),
                top_logprobs: job.logprobs.then_some(0),
                adapter: adapter.clone(),
                ..GenerateRequest::greedy(tokens.clone(), max_new_tokens)
            };
            self.answer(request)
        });
        let answers = try_join_all(answers).await?;
        let samples: Vec<Sample<'_>> = answers
            .iter()
            .map(|answer| Sample {
                prompt: &prompt.prompt,
                output: &answer.text,
                language: prompt.language(),
                reference: prompt.reference.as_deref(),
                finished: answer.reason == FinishReason::Stop,
            })
            .collect();
        let rewards = self.reward(&samples).await;
        let mut group = Vec::with_capacity(answers.len());
        for ((index, answer), reward) in indexes.zip(&answers).zip(rewards) {
            if already.contains(&index) {
                continue;
            }
            let sampling = SamplingMeta {
                temperature: job.temperature,
                top_p: job.top_p,
                top_k: job.top_k,
                repetition_penalty: job.repetition_penalty,
                max_new_tokens: max_new_tokens as u64,
                seed: job.seed_of(index),
            };
            let meta = EpisodeMeta {
                language: prompt.language().map(|language| language.code().to_owned()),
                base_model: Some(self.parts.model_id.clone()),
                adapter: adapter.as_ref().map(|adapter| adapter.name.clone()),
                adapter_generation: adapter.as_ref().map(|adapter| adapter.generation),
                reference: prompt.reference.clone(),
                finish_reason: Some(answer.reason.as_str().to_owned()),
                sampling: Some(sampling),
                ..EpisodeMeta::new(EpisodeSource::Generated)
            };
            let mut episode = Episode {
                latency_s: Some(answer.usage.total_ms / 1e3),
                ..new_episode(format!("{id}-{index}"), &job.env_name, &prompt.prompt, &answer.text, meta)
            };
            if job.logprobs {
                episode.meta.prompt_token_ids = Some(tokens.clone());
                keep_tokens(&mut episode.meta, answer);
            }
            rewarded(&mut episode, reward);
            group.push(episode);
        }
        let appended = self.parts.log.append(&job.run_id, group).await?;
        collected(&appended.episodes);
        Ok(appended.episodes)
    }

    /// One answer. A full queue means waiting: whoever collects has time.
    async fn answer(&self, request: GenerateRequest) -> Result<Answer, EngineError> {
        let _turn = self.parts.in_flight.acquire().await.map_err(|_| EngineError::Stopped)?;
        let mut wait = FULL_QUEUE.start;
        loop {
            match self.parts.engine.generate(request.clone()) {
                Ok(generation) => {
                    let answer = generation.answer().await?;
                    let usage = &answer.usage;
                    metrics::answer_finished(
                        usage.queue_ms / 1e3,
                        usage.first_token_ms / 1e3,
                        usage.total_ms / 1e3,
                    );
                    return Ok(answer);
                }
                Err(EngineError::QueueFull { .. }) => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(FULL_QUEUE.end);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// An episode of now, whose place in the log is not known yet.
pub fn new_episode(
    episode_id: String,
    env_name: &str,
    prompt: &str,
    output: &str,
    meta: EpisodeMeta,
) -> Episode {
    Episode {
        schema: SCHEMA,
        episode_id,
        run_id: String::new(),
        episode_index: 0,
        timestamp: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        env_name: env_name.to_owned(),
        prompt: prompt.to_owned(),
        output: output.to_owned(),
        reward: None,
        latency_s: None,
        meta,
    }
}

/// A reward that could not be had is null with its reason, and never 0.
pub(super) fn rewarded(episode: &mut Episode, reward: Result<Reward, RewardError>) {
    match reward {
        Ok(Reward { total, parts }) => (episode.reward, episode.meta.rewards) = (Some(total), parts),
        Err(error) => episode.meta.reward_error = Some(error.to_string()),
    }
}

fn keep_tokens(meta: &mut EpisodeMeta, answer: &Answer) {
    meta.token_ids = Some(answer.tokens.iter().map(|token| token.id).collect());
    // All tokens have one where one is asked for, and that of a token that was chosen is finite.
    let logprobs = answer.tokens.iter().map(|token| token.logprobs.as_ref().map(|logprobs| logprobs.chosen));
    meta.logprobs = logprobs.collect();
}

fn collected(episodes: &[Episode]) {
    for episode in episodes {
        metrics::episode_collected(episode.meta.source.as_str(), episode.reward);
    }
}
