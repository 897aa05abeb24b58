//! Measuring on examples without learning from them: the loss a supervised token, by a trainer's own passes or by
//! what is served. Touches no tensor and knows no source.

use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesOrdered;

use super::dataset::pack;
use super::template::{Examples, Made, Shape};
use crate::engine::training::{PassReport, TrainBatch, TrainSequence};
use crate::engine::{AdapterHandle, EngineError, EngineHandle, ScoreRequest, Trainer};
use crate::model::tokenizer::Tokenizer;

/// Sums over examples; those of several groups are added up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Σ weight · loss over supervised tokens, in nats.
    pub loss_sum: f64,
    /// Σ weight.
    pub weight_sum: f64,
    /// Examples.
    pub samples: u64,
    /// Tokens, prompts included.
    pub tokens: u64,
}

impl Sums {
    /// Of one pass.
    pub fn of(report: &PassReport) -> Self {
        Self {
            loss_sum: report.loss_sum,
            weight_sum: report.weight_sum,
            samples: report.logprobs.len() as u64,
            tokens: report.tokens as u64,
        }
    }

    /// Adds those of another group.
    pub fn add(&mut self, other: &Self) {
        self.loss_sum += other.loss_sum;
        self.weight_sum += other.weight_sum;
        self.samples += other.samples;
        self.tokens += other.tokens;
    }

    /// Mean loss a supervised token, in nats; not a number without any.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.weight_sum
    }

    /// exp of the loss: among how many equally likely tokens the model is left to choose.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

/// Whose predictions are measured.
#[derive(Clone, Copy)]
pub enum Scorer<'a> {
    /// A trainer's weights as they are now, in passes of at most so many tokens.
    Trainer {
        /// The trainer.
        trainer: &'a Trainer,
        /// As its plan has it, or fewer.
        tokens_per_pass: usize,
    },
    /// What answers requests, whatever kind of adapter it is; examples share steps with each other and with requests.
    Served {
        /// The engine.
        engine: &'a EngineHandle,
        /// `None` is the base model.
        adapter: Option<&'a AdapterHandle>,
    },
}

/// The loss over examples by cross-entropy, without dropout. `None`: `stopping` became true on the way.
///
/// # Errors
/// An example that does not fit, a queue that others keep full; what the device reports.
pub async fn evaluate(
    scorer: Scorer<'_>,
    samples: &[TrainSequence],
    stopping: impl Fn() -> bool,
) -> Result<Option<Sums>, EngineError> {
    let mut sums = Sums::default();
    match scorer {
        Scorer::Trainer { trainer, tokens_per_pass } => {
            let passes = pack(samples.to_vec(), tokens_per_pass, usize::MAX);
            for (number, sequences) in passes.into_iter().enumerate() {
                if stopping() {
                    return Ok(None);
                }
                let batch = TrainBatch::cross_entropy(sequences, number as u64);
                sums.add(&Sums::of(&trainer.evaluate(batch).await?));
            }
        }
        Scorer::Served { engine, adapter } => {
            // As many as run at once, so that the waiting line stays free for others. In order: a sum of floats
            // depends on it.
            let (mut left, mut running) = (samples.iter(), FuturesOrdered::new());
            loop {
                let room = engine.info().max_batch - running.len();
                running.extend(left.by_ref().take(room).map(|sample| served(engine, adapter, sample)));
                let Some(of_one) = running.next().await else { break };
                sums.add(&of_one?);
                if stopping() {
                    return Ok(None);
                }
            }
        }
    }
    Ok(Some(sums))
}

/// One example's, by the log-probabilities that serving gives.
async fn served(
    engine: &EngineHandle,
    adapter: Option<&AdapterHandle>,
    sample: &TrainSequence,
) -> Result<Sums, EngineError> {
    let tokens = sample.tokens.len();
    let mut sums = Sums { samples: 1, tokens: tokens as u64, ..Sums::default() };
    let from = prompt_of(sample).len();
    if from < tokens {
        let request = ScoreRequest { tokens: sample.tokens.clone(), from, adapter: adapter.cloned() };
        let logprobs = engine.score(request).await?;
        for (&weight, &logprob) in sample.weights[from..].iter().zip(&logprobs) {
            sums.loss_sum -= f64::from(weight) * f64::from(logprob);
            sums.weight_sum += f64::from(weight);
        }
    }
    Ok(sums)
}

/// The tokens of an example before the first supervised one; at least its first, which nothing predicts.
pub fn prompt_of(sample: &TrainSequence) -> &[u32] {
    let first = sample.weights.iter().skip(1).position(|&weight| weight != 0.0);
    &sample.tokens[..first.map_or(sample.tokens.len(), |at| at + 1)]
}

/// Prompts with their completions, as tokens: what training makes of a record with the two, uncut.
pub struct Pairs {
    examples: Examples,
}

impl Pairs {
    /// For a model with these end tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, eos_token_ids: &[u32]) -> Self {
        let shape = Shape::new(usize::MAX, true, &tokenizer, eos_token_ids);
        Self { examples: Examples::of_pairs(tokenizer, shape) }
    }

    /// The tokens; supervised are those of the completion and the end token.
    ///
    /// # Errors
    /// Why the tokenizer has no tokens for it, to be read after what names the pair.
    pub fn sample(&self, prompt: &str, completion: &str) -> Result<TrainSequence, String> {
        match self.examples.pair(prompt, completion)? {
            Made::Example { sequence, .. } => Ok(sequence),
            Made::Skipped => Err("has a completion without tokens".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(weights: &[f32]) -> TrainSequence {
        TrainSequence::new((1..=weights.len() as u32).collect(), weights.to_vec())
    }

    #[test]
    fn a_prompt_ends_where_learning_begins() {
        assert_eq!(prompt_of(&sample(&[0.0, 0.0, 1.0, 0.0, 1.0])), [1, 2]);
        assert_eq!(prompt_of(&sample(&[1.0, 1.0, 1.0])), [1], "nothing predicts the first token");
        assert_eq!(prompt_of(&sample(&[0.0, 0.0])), [1, 2]);
    }

    #[test]
    fn groups_are_added_up_and_not_averaged() {
        let mut sums = Sums { loss_sum: 6.0, weight_sum: 2.0, samples: 1, tokens: 5 };
        sums.add(&Sums { loss_sum: 2.0, weight_sum: 6.0, samples: 3, tokens: 9 });
        assert_eq!(sums, Sums { loss_sum: 8.0, weight_sum: 8.0, samples: 4, tokens: 14 });
        assert_eq!((sums.loss(), sums.perplexity()), (1.0, std::f64::consts::E));
        assert!(Sums::default().loss().is_nan());
    }
}
