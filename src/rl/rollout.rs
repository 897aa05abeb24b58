//! Answers of the current policy, rewarded: many at once through what serves, so that others' requests and these
//! share its steps. What comes out depends on the prompts, the seeds and the weights alone.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::prompts::Prompt;
use super::reward::{Reward, RewardError, Rewarder, Sample};
use crate::engine::{AdapterHandle, EngineError, EngineHandle, FinishReason, GenerateRequest, Sampling};
use crate::nn::mix64;

/// How long to wait before a full queue is asked again.
const AGAIN: Duration = Duration::from_millis(20);

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// With the end token.
    pub(super) tokens: Vec<u32>,
    /// ln p of each, of the distribution that it was drawn from.
    pub(super) sampled: Vec<f32>,
    /// ln p of each at temperature 1.
    pub(super) logprobs: Vec<f32>,
    pub(super) text: String,
    pub(super) reason: FinishReason,
    pub(super) seconds: f64,
}

impl Answer {
    /// It ended by itself.
    pub(super) fn finished(&self) -> bool {
        self.reason == FinishReason::Stop
    }
}

/// The answers to one prompt, with what each earned.
#[derive(Debug)]
pub(super) struct Group<'p> {
    pub(super) prompt: &'p Prompt,
    pub(super) answers: Vec<Answer>,
    pub(super) rewards: Vec<Result<Reward, RewardError>>,
}

/// How answers are sampled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    /// 0 is greedy.
    pub(super) temperature: f32,
    pub(super) max_new_tokens: usize,
    /// Answers to each prompt.
    pub(super) group_size: usize,
    /// At once; 0 is half of the engine's batch.
    pub(super) max_in_flight: usize,
    /// What the answers' own seeds follow from.
    pub(super) seed: u64,
}

impl Settings {
    /// The seed of an answer's own random stream, by the prompt's place in the step and the answer's in its group.
    pub(super) fn seed_of(self, place: usize, number: usize) -> u64 {
        mix64(self.seed ^ mix64(((place as u64) << 32 | number as u64) + 1))
    }
}

/// Answers each prompt `group_size` times and rewards what came.
///
/// # Errors
/// What the engine reports.
pub(super) async fn rollouts<'p>(
    engine: &EngineHandle,
    adapter: Option<&AdapterHandle>,
    prompts: &[&'p Prompt],
    settings: Settings,
    rewarder: &Rewarder,
) -> Result<Vec<Group<'p>>, EngineError> {
    let at_once = match settings.max_in_flight {
        0 => engine.info().max_batch.div_ceil(2),
        most => most,
    };
    let request = |place: usize, number: usize| GenerateRequest {
        sampling: Sampling {
            temperature: settings.temperature,
            seed: settings.seed_of(place, number),
            ..Sampling::default()
        },
        top_logprobs: Some(0),
        adapter: adapter.cloned(),
        ..GenerateRequest::greedy(prompts[place].tokens.clone(), settings.max_new_tokens)
    };
    let mut left = (0..prompts.len()).flat_map(|place| (0..settings.group_size).map(move |g| (place, g)));
    let mut answers: Vec<Vec<Option<Answer>>> = vec![vec![None; settings.group_size]; prompts.len()];
    let mut running = FuturesUnordered::new();
    loop {
        let room = at_once - running.len();
        running.extend(left.by_ref().take(room).map(|(place, number)| {
            let request = request(place, number);
            async move { answer(engine, request).await.map(|answer| (place, number, answer)) }
        }));
        let Some(done) = running.next().await else { break };
        let (place, number, answer) = done?;
        answers[place][number] = Some(answer);
    }
    let mut groups = Vec::with_capacity(prompts.len());
    for (&prompt, answers) in prompts.iter().zip(answers) {
        let answers: Vec<Answer> = answers.into_iter().flatten().collect();
        let samples: Vec<Sample<'_>> = answers
            .iter()
            .map(|answer| Sample {
                prompt: &prompt.text,
                output: &answer.text,
                language: prompt.language,
                reference: prompt.reference.as_deref(),
                finished: answer.finished(),
            })
            .collect();
        let rewards = rewarder.group(&samples).await;
        groups.push(Group { prompt, answers, rewards });
    }
    Ok(groups)
}

/// One answer; waits where the line of requests is full.
async fn answer(engine: &EngineHandle, request: GenerateRequest) -> Result<Answer, EngineError> {
    let generation = loop {
        match engine.generate(request.clone()) {
            Err(EngineError::QueueFull { .. }) => tokio::time::sleep(AGAIN).await,
            other => break other?,
        }
    };
    let answer = generation.answer().await?;
    let logprobs = answer.tokens.iter().filter_map(|token| token.logprobs.as_ref());
    Ok(Answer {
        tokens: answer.tokens.iter().map(|token| token.id).collect(),
        sampled: logprobs.clone().map(|of| of.sampled).collect(),
        logprobs: logprobs.map(|of| of.chosen).collect(),
        text: answer.text,
        reason: answer.reason,
        seconds: answer.usage.total_ms / 1e3,
    })
}
