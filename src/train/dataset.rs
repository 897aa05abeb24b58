//! Examples to learn from: records of a source become tokens with weights, in a seeded order, epoch after epoch.
//! Knows no engine beyond its `TrainSequence`, and no file: what must be remembered is written to a writer.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{TrainError, TrainJob};
use crate::config::adapter::Template;
use crate::engine::training::TrainSequence;
use crate::model::tokenizer::Tokenizer;

/// Number of training examples of one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// How many; an upper bound while not exact.
    pub examples: u64,
    /// Whether the source's end has been seen.
    pub exact: bool,
}

/// What became of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Records read in the current epoch, bad ones included.
    pub records: u64,
    /// Of these: could not be used.
    pub bad: u64,
    /// Of these: nothing supervised was left after cutting.
    pub skipped: u64,
    /// Of these: cut at `max_seq_length`.
    pub truncated: u64,
    /// The first few reasons, each with its place.
    pub reasons: Vec<String>,
    /// Examples handed out in all, repeats included.
    pub examples: u64,
    /// Tokens of these.
    pub tokens: u64,
}

/// The examples of a job.
pub struct Dataset {
    counters: Counters,
    held_out: Vec<TrainSequence>,
}

impl Dataset {
    /// Opens the source, decides the template, fills the buffer and takes the held-out examples.
    ///
    /// # Errors
    /// A source that cannot be read or gives nothing to learn from.
    pub async fn open(
        job: &TrainJob,
        tokenizer: Arc<Tokenizer>,
        eos_token_ids: &[u32],
    ) -> Result<Self, TrainError> {
        let _ = (job, tokenizer, eos_token_ids);
        Err(TrainError::Failed("not built yet".into()))
    }

    /// Continues from what [`Dataset::save`] wrote.
    ///
    /// # Errors
    /// Bytes that are no such state.
    pub fn restore(
        job: &TrainJob,
        tokenizer: Arc<Tokenizer>,
        eos_token_ids: &[u32],
        reader: &mut dyn io::Read,
    ) -> Result<Self, TrainError> {
        let _ = (job, tokenizer, eos_token_ids, reader);
        Err(TrainError::Failed("not built yet".into()))
    }

    /// Writes everything that later batches depend on.
    ///
    /// # Errors
    /// The writer's.
    pub fn save(&self, writer: &mut dyn io::Write) -> io::Result<()> {
        let _ = writer;
        Err(io::Error::other("not built yet"))
    }

    /// Up to `n` examples; fewer at an epoch's end; none at the end.
    ///
    /// # Errors
    /// A source that dies; too many bad records.
    pub async fn next_batch(&mut self, n: usize) -> Result<Vec<TrainSequence>, TrainError> {
        let _ = n;
        Err(TrainError::Failed("not built yet".into()))
    }

    /// Training examples of one epoch.
    pub fn planned_examples(&self) -> Planned {
        Planned { examples: 0, exact: false }
    }

    /// The held-out examples.
    pub fn eval_examples(&self) -> &[TrainSequence] {
        &self.held_out
    }

    /// What became of the records.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The epoch of the latest batch, from 0.
    pub fn epoch(&self) -> u64 {
        0
    }

    /// Passes over the data so far.
    pub fn epoch_fraction(&self) -> f64 {
        0.0
    }

    /// The template, never `Auto`.
    pub fn template(&self) -> Template {
        Template::Auto
    }
}

/// Splits a batch into passes of at most so many tokens and sequences each: first fit, order kept. One that is
/// longer than a pass makes a pass of its own.
pub fn pack(
    batch: Vec<TrainSequence>,
    tokens_per_pass: usize,
    sequences_per_pass: usize,
) -> Vec<Vec<TrainSequence>> {
    let mut passes: Vec<(usize, Vec<TrainSequence>)> = Vec::new();
    for sequence in batch {
        let tokens = sequence.tokens.len();
        let fits = |(used, pass): &&mut (usize, Vec<TrainSequence>)| {
            used.saturating_add(tokens) <= tokens_per_pass && pass.len() < sequences_per_pass
        };
        match passes.iter_mut().find(fits) {
            Some((used, pass)) => {
                *used += tokens;
                pass.push(sequence);
            }
            None => passes.push((tokens, vec![sequence])),
        }
    }
    passes.into_iter().map(|(_, pass)| pass).collect()
}
