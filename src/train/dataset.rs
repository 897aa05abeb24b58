//! Examples to learn from: records of a source become tokens with weights, in a seeded order, epoch after epoch.
//! Knows no engine beyond its `TrainSequence`, and no file: what must be remembered is written to a writer.

mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use futures::StreamExt as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use self::state::Position;
use super::template::{self, Examples, Made, Shape};
use super::{TrainError, TrainJob};
use crate::config::adapter::Template;
use crate::data::{Cursor, Record, RecordStream, SourceError};
use crate::engine::training::TrainSequence;
use crate::model::tokenizer::Tokenizer;

/// Examples that are held out at most.
const MAX_HELD_OUT: u64 = 256;
/// Bytes of a record from which on it is tokenized on a thread of its own.
const LONG_RECORD_BYTES: usize = 8 << 10;
/// Records after which others get their turn on this thread.
const RECORDS_IN_A_ROW: u64 = 16;

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
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Rows read in the current epoch, bad ones included.
    pub records: u64,
    /// Of these: could not be used.
    pub bad: u64,
    /// Of these: the source's filter keeps them out.
    #[serde(default)]
    pub filtered: u64,
    /// Of these: nothing supervised was left after cutting.
    pub skipped: u64,
    /// Of these: cut at `max_seq_length`.
    pub truncated: u64,
    /// The first few reasons of bad ones, each with its place.
    pub reasons: Vec<String>,
    /// Examples handed out in all, repeats included.
    pub examples: u64,
    /// Tokens of these.
    pub tokens: u64,
}

/// The examples of a job.
pub struct Dataset {
    job: TrainJob,
    examples: Arc<Examples>,
    /// The source in the current epoch; `None` before it is needed and after its end.
    stream: Option<RecordStream>,
    /// A record that was taken from the stream and is not in `position` yet: whoever stops waiting in the middle
    /// loses nothing.
    in_hand: Option<Arc<Record>>,
    /// What becomes of it, where that is worked out on another thread.
    making: Option<JoinHandle<Result<Made, String>>>,
    random: ChaCha8Rng,
    /// What is drawn from.
    buffer: Vec<TrainSequence>,
    held_out: Vec<TrainSequence>,
    /// What was drawn and not handed out yet.
    batch: Vec<TrainSequence>,
    position: Position,
    /// What the source said that whoever watches the job should know.
    notes: Vec<String>,
}

impl Dataset {
    /// Opens the source, decides the template, fills the buffer once and takes the held-out examples. Must be
    /// called inside the asynchronous runtime.
    ///
    /// # Errors
    /// A source that cannot be read, has too many bad records, or gives nothing to learn from.
    pub async fn open(
        job: &TrainJob,
        tokenizer: Arc<Tokenizer>,
        eos_token_ids: &[u32],
    ) -> Result<Self, TrainError> {
        let mut position = Position::default();
        let mut stream = job.source.open(&job.source_name, position.cursor.clone());
        let mut in_hand = None;
        let template = match template_of(job) {
            Template::Auto => loop {
                let Some(record) = stream.next().await.transpose()? else {
                    position.note_rows(&stream);
                    return Err(nothing_to_learn(job, &position.counters));
                };
                match template::decide(&job.source, &record) {
                    Ok(template) => {
                        in_hand = Some(Arc::new(record));
                        break template;
                    }
                    Err(reason) => refuse(&mut stream, &record, &reason)?,
                }
            },
            template => template,
        };
        position.template = Some(template);
        let examples = examples(job, template, tokenizer, eos_token_ids)?;
        let mut dataset = Self {
            job: job.clone(),
            examples: Arc::new(examples),
            stream: Some(stream),
            in_hand,
            making: None,
            random: random(job.config.seed, 0),
            buffer: Vec::new(),
            held_out: Vec::new(),
            batch: Vec::new(),
            position,
            notes: Vec::new(),
        };
        dataset.fill().await?;
        if dataset.buffer.is_empty() {
            return Err(nothing_to_learn(job, &dataset.position.counters));
        }
        Ok(dataset)
    }

    /// Continues from what [`Dataset::save`] wrote: later batches are those that would have come. `job` must be
    /// the same. Must be called inside the asynchronous runtime; reads no record yet.
    ///
    /// # Errors
    /// Bytes that are no such state, are damaged, or are of another job.
    pub fn restore(
        job: &TrainJob,
        tokenizer: Arc<Tokenizer>,
        eos_token_ids: &[u32],
        reader: &mut dyn io::Read,
    ) -> Result<Self, TrainError> {
        let state::State { position, buffer, held_out, batch } = state::read(job, reader)
            .map_err(|reason| TrainError::Failed(format!("the checkpoint's training data: {reason}")))?;
        let template = position.template.unwrap_or(Template::Text);
        let examples = examples(job, template, tokenizer, eos_token_ids)?;
        let mut random = random(job.config.seed, position.reading_epoch);
        random.set_word_pos(position.random_words.into());
        Ok(Self {
            job: job.clone(),
            examples: Arc::new(examples),
            stream: None,
            in_hand: None,
            making: None,
            random,
            buffer,
            held_out,
            batch,
            position,
            notes: Vec::new(),
        })
    }

    /// Writes everything that later batches depend on.
    ///
    /// # Errors
    /// The writer's.
    pub fn save(&self, writer: &mut dyn io::Write) -> io::Result<()> {
        let mut position = self.position.clone();
        // A draw takes two words of the stream; what 64 bits cannot count is beyond any training.
        position.random_words = self.random.get_word_pos() as u64;
        state::write(&self.job, &position, [&self.buffer, &self.held_out, &self.batch], writer)
    }

    /// Up to `n` examples, at least one asked for; fewer at an epoch's end; none at the end of the last epoch.
    /// Dropping the future in the middle loses nothing: the next call goes on.
    ///
    /// # Errors
    /// A source that dies or has too many bad records.
    pub async fn next_batch(&mut self, n: usize) -> Result<Vec<TrainSequence>, TrainError> {
        let n = n.max(1);
        while !self.position.finished {
            while self.batch.len() < n {
                self.fill().await?;
                if self.buffer.is_empty() {
                    break;
                }
                let drawn = below(&mut self.random, self.buffer.len());
                self.batch.push(self.buffer.swap_remove(drawn));
            }
            if !self.batch.is_empty() {
                return Ok(self.hand_out());
            }
            self.next_epoch()?;
        }
        Ok(Vec::new())
    }

    fn hand_out(&mut self) -> Vec<TrainSequence> {
        let batch = std::mem::take(&mut self.batch);
        let position = &mut self.position;
        position.given += batch.len() as u64;
        position.latest_epoch = position.reading_epoch;
        position.counters.examples += batch.len() as u64;
        position.counters.tokens += batch.iter().map(|example| example.tokens.len() as u64).sum::<u64>();
        batch
    }

    fn next_epoch(&mut self) -> Result<(), TrainError> {
        if self.position.given == 0 {
            return Err(nothing_to_learn(&self.job, &self.position.counters));
        }
        let config = &self.job.config;
        let next = self.position.reading_epoch + 1;
        // Steps that are asked for are taken, however often that goes through the data.
        if config.max_steps.is_none() && next >= config.epochs {
            self.position.finished = true;
            return Ok(());
        }
        self.position.begin_epoch(next);
        self.random = random(config.seed, next);
        self.stream = None;
        Ok(())
    }

    /// Reads until the buffer is full or the epoch has no more examples.
    async fn fill(&mut self) -> Result<(), TrainError> {
        while self.buffer.len() < self.job.config.shuffle_buffer && !self.position.source_done {
            let Some(record) = self.record().await? else {
                self.end_of_source();
                break;
            };
            let made = self.make(&record).await?;
            self.take(&record, made)?;
            if self.position.cursor.counts.records.is_multiple_of(RECORDS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    fn end_of_source(&mut self) {
        self.stream = None;
        self.position.source_done = true;
        // Nothing is read from it any more, and the next epoch begins at its start.
        self.position.cursor = Cursor::default();
        self.position.exact = Some(self.position.taken - self.held_out_of(self.position.taken));
    }

    /// The next record, which stays in hand until it is taken.
    async fn record(&mut self) -> Result<Option<Arc<Record>>, SourceError> {
        if let Some(record) = &self.in_hand {
            return Ok(Some(record.clone()));
        }
        let job = &self.job;
        let stream = self
            .stream
            .get_or_insert_with(|| job.source.open(&job.source_name, self.position.cursor.clone()));
        let next = stream.next().await.transpose();
        self.notes.extend(stream.take_notes());
        let record = next?.map(Arc::new);
        if record.is_none() {
            self.position.note_rows(stream);
        }
        self.in_hand = record.clone();
        Ok(record)
    }

    async fn make(&mut self, record: &Arc<Record>) -> Result<Result<Made, String>, TrainError> {
        if record.bytes() < LONG_RECORD_BYTES {
            return Ok(self.examples.make(record));
        }
        let making = self.making.get_or_insert_with(|| {
            let (examples, record) = (self.examples.clone(), record.clone());
            tokio::task::spawn_blocking(move || examples.make(&record))
        });
        let made = making.await;
        self.making = None;
        made.map_err(|_| TrainError::Failed("tokenizing a record failed; see the log".into()))
    }

    /// Puts what a record became in its place.
    fn take(&mut self, record: &Record, made: Result<Made, String>) -> Result<(), TrainError> {
        self.in_hand = None;
        if let Some(stream) = &mut self.stream {
            let refused = match &made {
                Err(reason) => refuse(stream, record, reason),
                Ok(_) => Ok(()),
            };
            self.position.cursor = stream.cursor();
            self.position.note_rows(stream);
            refused?;
        }
        match made {
            Ok(Made::Example { sequence, cut }) => {
                self.position.counters.truncated += u64::from(cut);
                let number = self.position.taken;
                self.position.taken += 1;
                if !self.is_held_out(number) {
                    self.buffer.push(sequence);
                } else if self.position.reading_epoch == 0 {
                    self.held_out.push(sequence);
                }
            }
            Ok(Made::Skipped) => self.position.counters.skipped += 1,
            Err(_) => {}
        }
        if self.position.taken >= self.job.config.max_samples as u64 {
            if let Some(stream) = &self.stream {
                stream.finish()?;
            }
            self.end_of_source();
        }
        Ok(())
    }

    /// Whether an example, by its number among an epoch's, is for evaluation: every k-th of those that fill the
    /// buffer first. It is so in every epoch.
    fn is_held_out(&self, number: u64) -> bool {
        self.held_out_of(number + 1) > self.held_out_of(number)
    }

    /// How many of the first examples of an epoch are held out.
    fn held_out_of(&self, examples: u64) -> u64 {
        let config = &self.job.config;
        if config.eval_share <= 0.0 {
            return 0;
        }
        let every = ((1.0 / config.eval_share).round() as u64).max(2);
        (examples.min(config.shuffle_buffer as u64) / every).min(MAX_HELD_OUT)
    }

    /// Training examples of one epoch; an upper bound until the source's end has been seen.
    pub fn planned_examples(&self) -> Planned {
        match self.position.exact {
            Some(examples) => Planned { examples, exact: true },
            None => {
                let most = self.job.config.max_samples as u64;
                Planned { examples: most - self.held_out_of(most), exact: false }
            }
        }
    }

    /// The held-out examples; none where the first buffer is too small for the share.
    pub fn eval_examples(&self) -> &[TrainSequence] {
        &self.held_out
    }

    /// What became of the records.
    pub fn counters(&self) -> &Counters {
        &self.position.counters
    }

    /// What happened to the source since the last call that whoever watches the job should know, such as the switch to
    /// another one.
    pub fn take_notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        if let Some(stream) = &mut self.stream {
            notes.extend(stream.take_notes());
        }
        notes
    }

    /// The epoch of the latest batch, from 0.
    pub fn epoch(&self) -> u64 {
        self.position.latest_epoch
    }

    /// Passes over the data so far.
    pub fn epoch_fraction(&self) -> f64 {
        let planned = self.planned_examples().examples.max(1);
        self.position.reading_epoch as f64 + (self.position.given as f64 / planned as f64).min(1.0)
    }

    /// The template, never `Auto`.
    pub fn template(&self) -> Template {
        self.examples.template()
    }
}

/// What the source says, else the settings.
fn template_of(job: &TrainJob) -> Template {
    job.source.template.filter(|template| *template != Template::Auto).unwrap_or(job.config.template)
}

fn examples(
    job: &TrainJob,
    template: Template,
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: &[u32],
) -> Result<Examples, TrainError> {
    let config = &job.config;
    let shape = Shape::new(config.max_seq_length, config.completion_only, &tokenizer, eos_token_ids);
    Ok(Examples::new(&job.source, template, tokenizer, shape)?)
}

fn refuse(stream: &mut RecordStream, record: &Record, reason: &str) -> Result<(), SourceError> {
    let number = stream.cursor().counts.records;
    stream.refuse(format!("record {number} ({}) {reason}", record.place))
}

/// Why an epoch has no example.
fn nothing_to_learn(job: &TrainJob, counters: &Counters) -> TrainError {
    let name = &job.source_name;
    TrainError::Failed(if counters.records == 0 {
        format!("source {name} is empty: it has no record to learn from")
    } else if counters.skipped > 0 {
        format!(
            "no example of source {name} has a supervised token: {} of {} records are cut off before their answer \
             begins; raise max_seq_length ({}) or use shorter prompts",
            counters.skipped, counters.records, job.config.max_seq_length
        )
    } else if counters.filtered > 0 && counters.bad == 0 {
        format!(
            "the filter of source {name} keeps out all of its records ({} of {}); widen it",
            counters.filtered, counters.records
        )
    } else if counters.bad > 0 {
        format!("no record of source {name} can be used: {}", counters.reasons.join("; "))
    } else {
        format!("source {name} has no record left to learn from; lower skip ({})", job.source.skip)
    })
}

/// The random numbers of an epoch.
fn random(seed: u64, epoch: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(epoch);
    random
}

/// A number below `n`.
fn below(random: &mut ChaCha8Rng, n: usize) -> usize {
    ((u128::from(random.next_u64()) * n as u128) >> 64) as usize
}

/// Splits a batch into passes of at most so many tokens and sequences each: first fit, order kept. One that is
/// longer than a pass makes a pass of its own.
pub fn pack(
    batch: Vec<TrainSequence>,
    tokens_per_pass: usize,
    sequences_per_pass: usize,
) -> Vec<Vec<TrainSequence>> {
    let lengths = batch.iter().map(|sequence| sequence.tokens.len());
    let places = pack_places(lengths, tokens_per_pass, sequences_per_pass);
    let mut batch: Vec<Option<TrainSequence>> = batch.into_iter().map(Some).collect();
    places.iter().map(|pass| pass.iter().filter_map(|&at| batch[at].take()).collect()).collect()
}

/// The same by the sequences' lengths: the places of those that each pass takes.
pub(crate) fn pack_places(
    lengths: impl IntoIterator<Item = usize>,
    tokens_per_pass: usize,
    sequences_per_pass: usize,
) -> Vec<Vec<usize>> {
    let mut passes: Vec<(usize, Vec<usize>)> = Vec::new();
    for (place, tokens) in lengths.into_iter().enumerate() {
        let fits = |(used, pass): &&mut (usize, Vec<usize>)| {
            used.saturating_add(tokens) <= tokens_per_pass && pass.len() < sequences_per_pass
        };
        match passes.iter_mut().find(fits) {
            Some((used, pass)) => {
                *used += tokens;
                pass.push(place);
            }
            None => passes.push((tokens, vec![place])),
        }
    }
    passes.into_iter().map(|(_, pass)| pass).collect()
}
