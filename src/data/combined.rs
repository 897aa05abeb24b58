//! Sources that are made of others: a mix of several by weight, and a list of which the first that works is read. The
//! others are named in the connectors file and kept inside the source, so that a job needs no file to go on.

use std::task::{Context, Poll, ready};

use futures::StreamExt as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::cursor::{At, Counts, Cursor};
use super::object::Patience;
use super::stream::{BadRows, RecordStream, Wanted};
use super::{Location, Record, SourceConfig, value_at};

/// Sources that one may be made of, those of its sources included.
const MAX_PARTS: usize = 64;

/// The keys of `type: mix`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixConfig {
    /// What is drawn from, until each is exhausted.
    #[serde(default)]
    pub sources: Vec<MixPart>,
    /// Of the draws.
    #[serde(default)]
    pub seed: u64,
    /// What the names stand for, once they are looked up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    resolved: Vec<SourceConfig>,
}

/// One source of a mix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixPart {
    /// Its name.
    pub source: String,
    /// How often it is drawn, in proportion to the others.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// The keys of `type: fallback`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FallbackConfig {
    /// Names of sources, the preferred one first.
    #[serde(default)]
    pub sources: Vec<String>,
    /// What the names stand for, once they are looked up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    resolved: Vec<SourceConfig>,
}

impl MixConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        check_names(self.sources.iter().map(|part| part.source.as_str()), self.resolved.len())?;
        match self.sources.iter().find(|part| !(part.weight > 0.0 && part.weight <= 1e6)) {
            Some(part) => Err(format!(
                "sources: the weight of {} must be more than 0 and at most a million, not {}",
                part.source, part.weight
            )),
            None => Ok(()),
        }
    }
}

impl FallbackConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        check_names(self.sources.iter().map(String::as_str), self.resolved.len())
    }
}

fn check_names<'n>(names: impl Iterator<Item = &'n str> + Clone, resolved: usize) -> Result<(), String> {
    let count = names.clone().count();
    if count == 0 {
        return Err("sources is missing; name at least one source of this file".into());
    }
    if let Some((_, twice)) =
        names.clone().enumerate().find(|(at, name)| names.clone().take(*at).any(|n| n == *name))
    {
        return Err(format!("sources: {twice} is named twice"));
    }
    if resolved != 0 && resolved != count {
        return Err("resolved is written by the program itself; leave it out".into());
    }
    Ok(())
}

impl Location {
    /// The sources that one is made of, with their names; none where it has data of its own.
    pub(super) fn parts(&self) -> Vec<(&str, &SourceConfig)> {
        match self {
            Self::Mix(mix) => {
                mix.sources.iter().map(|part| part.source.as_str()).zip(&mix.resolved).collect()
            }
            Self::Fallback(list) => list.sources.iter().map(String::as_str).zip(&list.resolved).collect(),
            _ => Vec::new(),
        }
    }
}

impl SourceConfig {
    /// The source with the sources that it is made of inside. `find` gives one by its name, as it is typed; `name` is
    /// its own.
    ///
    /// # Errors
    /// Names that nothing is called, sources that are made of themselves or of too many, and sources that do not go
    /// together, with the names.
    pub fn with_parts<'c>(
        &self,
        name: &'c str,
        find: &dyn Fn(&str) -> Option<(&'c str, &'c SourceConfig)>,
    ) -> Result<Self, String> {
        with_parts(self, &mut vec![name], &mut 0, find)
    }
}

fn with_parts<'c>(
    source: &SourceConfig,
    trail: &mut Vec<&'c str>,
    parts: &mut usize,
    find: &dyn Fn(&str) -> Option<(&'c str, &'c SourceConfig)>,
) -> Result<SourceConfig, String> {
    *parts += 1;
    if *parts > MAX_PARTS {
        return Err(format!("{} is made of more than {MAX_PARTS} sources", trail[0]));
    }
    let mut resolved = source.clone();
    let (names, into): (Vec<&str>, _) = match &mut resolved.location {
        Location::Mix(mix) => {
            (mix.sources.iter().map(|part| part.source.as_str()).collect(), &mut mix.resolved)
        }
        Location::Fallback(list) => (list.sources.iter().map(String::as_str).collect(), &mut list.resolved),
        _ => return Ok(resolved),
    };
    if !into.is_empty() {
        return Err("resolved is written by the program itself; leave it out".into());
    }
    for wanted in &names {
        let Some((name, part)) = find(wanted) else {
            return Err(format!("names the source {}, which there is not", wanted.escape_debug()));
        };
        if trail.contains(&name) {
            return Err(format!("is made of itself: {} → {name}", trail.join(" → ")));
        }
        trail.push(name);
        into.push(with_parts(part, trail, parts, find)?);
        trail.pop();
    }
    let parts: Vec<(&str, SourceConfig)> = names.into_iter().zip(into.clone()).collect();
    resolved.template = common("template", source.template, &parts, |part| part.template)?;
    resolved.source_language = common("source_language", source.source_language.clone(), &parts, |part| {
        part.source_language.clone()
    })?;
    resolved.target_language = common("target_language", source.target_language.clone(), &parts, |part| {
        part.target_language.clone()
    })?;
    Ok(resolved)
}

/// What the whole says, else what its parts agree on: a job makes texts of all its records in one way.
fn common<T: Clone + PartialEq>(
    key: &str,
    own: Option<T>,
    parts: &[(&str, SourceConfig)],
    of: impl Fn(&SourceConfig) -> Option<T>,
) -> Result<Option<T>, String> {
    let mut said: Option<(&str, T)> = None;
    for (name, part) in parts {
        match (of(part), &said) {
            (Some(value), Some((other, earlier))) if value != *earlier && own.is_none() => {
                return Err(format!("{other} and {name} have another {key}; say one here, or mix others"));
            }
            (Some(value), None) => said = Some((name, value)),
            _ => {}
        }
    }
    Ok(own.or(said.map(|(_, value)| value)))
}

/// One of the sources, open.
struct Part {
    name: String,
    config: SourceConfig,
    stream: RecordStream,
}

impl Part {
    fn open(name: &str, config: &SourceConfig, cursor: Cursor, patience: Patience, wanted: Wanted) -> Self {
        let stream = config.open_as(name, cursor, patience, wanted);
        Self { name: name.to_owned(), config: config.clone(), stream }
    }

    /// Its next record, with the fields that its settings name under the names that all sources share.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Record, String>>> {
        let item = ready!(self.stream.poll_next_unpin(context));
        Poll::Ready(item.map(|item| {
            let mut record = item.map_err(|error| error.to_string())?;
            for (name, path) in self.config.fields.iter().filter(|(name, path)| name != path) {
                if let Some(value) = value_at(&record.fields, path).cloned() {
                    record.fields.insert(name.clone(), value);
                }
            }
            Ok(record)
        }))
    }
}

fn unresolved() -> String {
    "its sources were not looked up; name it in the connectors file".to_owned()
}

/// Draws among several sources until all are exhausted.
pub(super) struct Mix {
    parts: Vec<Part>,
    weights: Vec<f64>,
    ended: Vec<bool>,
    random: ChaCha8Rng,
    draws: u64,
    /// What was drawn and has not given its record yet.
    drawn: Option<usize>,
    /// What gave the latest record.
    latest: usize,
    /// Draws, and what was exhausted, when the latest record was given.
    given: (u64, Vec<bool>),
    rows: BadRows,
    failed: bool,
}

impl Mix {
    pub(super) fn open(
        config: &MixConfig,
        cursor: Cursor,
        patience: Patience,
        wanted: Wanted,
    ) -> Result<Self, String> {
        let count = config.sources.len();
        if config.resolved.len() != count {
            return Err(unresolved());
        }
        let (draws, ended, cursors) = match cursor.at {
            At::Start => (0, vec![false; count], vec![Cursor::default(); count]),
            At::Mix { draws, ended, parts } if ended.len() == count && parts.len() == count => {
                (draws, ended, parts)
            }
            _ => return Err("the cursor is of another source; start anew".into()),
        };
        let mut random = ChaCha8Rng::seed_from_u64(config.seed);
        // A draw takes two words.
        random.set_word_pos(u128::from(draws) * 2);
        let parts = config.sources.iter().zip(&config.resolved).zip(cursors);
        let parts =
            parts.map(|((part, source), cursor)| Part::open(&part.source, source, cursor, patience, wanted));
        let mut mix = Self {
            parts: parts.collect(),
            weights: config.sources.iter().map(|part| part.weight).collect(),
            ended: ended.clone(),
            random,
            draws,
            drawn: None,
            latest: 0,
            given: (draws, ended),
            rows: BadRows::default(),
            failed: false,
        };
        mix.count();
        Ok(mix)
    }

    pub(super) fn cursor(&self) -> Cursor {
        let parts: Vec<Cursor> = self.parts.iter().map(|part| part.stream.cursor()).collect();
        let mut counts = Counts::default();
        parts.iter().for_each(|part| counts.add(&part.counts));
        if counts == Counts::default() {
            return Cursor::default();
        }
        let (draws, ended) = self.given.clone();
        Cursor { counts, at: At::Mix { draws, ended, parts } }
    }

    pub(super) fn rows(&self) -> &BadRows {
        &self.rows
    }

    fn count(&mut self) {
        self.rows = BadRows::default();
        self.parts.iter().for_each(|part| self.rows.add(part.stream.rows()));
    }

    pub(super) fn take_notes(&mut self) -> Vec<String> {
        self.parts.iter_mut().flat_map(|part| part.stream.take_notes()).collect()
    }

    pub(super) fn refuse(&mut self, reason: String) -> Result<(), String> {
        let refused = self.parts[self.latest].stream.refuse(reason);
        self.count();
        refused.map_err(|error| error.to_string())
    }

    pub(super) fn finish(&self) -> Result<(), String> {
        self.parts.iter().try_for_each(|part| part.stream.finish().map_err(|error| error.to_string()))
    }

    /// Draws one that is not exhausted; `None` where all are.
    fn draw(&mut self) -> Option<usize> {
        let weight = |at: usize| if self.ended[at] { 0.0 } else { self.weights[at] };
        let total: f64 = (0..self.weights.len()).map(weight).sum();
        let last = (0..self.weights.len()).rev().find(|&at| weight(at) > 0.0)?;
        // 53 bits, as many as the number can hold; below one.
        let share = (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = share * total;
        let mut drawn = None;
        for at in 0..self.weights.len() {
            let weight = weight(at);
            if weight > 0.0 && left < weight {
                drawn = Some(at);
                break;
            }
            left -= weight;
        }
        self.draws += 1;
        // Rounding may leave a little behind the last one.
        Some(drawn.unwrap_or(last))
    }

    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Record, String>>> {
        while !self.failed {
            let Some(at) = self.drawn.or_else(|| self.draw()) else { break };
            self.drawn = Some(at);
            let item = ready!(self.parts[at].poll(context));
            self.drawn = None;
            self.count();
            match item {
                None => self.ended[at] = true,
                Some(Ok(record)) => {
                    self.latest = at;
                    self.given = (self.draws, self.ended.clone());
                    return Poll::Ready(Some(Ok(record)));
                }
                Some(Err(error)) => {
                    self.failed = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(None)
    }
}

/// Reads the first of several sources that gives a record.
pub(super) struct Fallback {
    config: FallbackConfig,
    patience: Patience,
    wanted: Wanted,
    chosen: usize,
    part: Part,
    /// Whether the chosen one has given a record, now or before an interruption.
    settled: bool,
    failures: Vec<String>,
    notes: Vec<String>,
    ended: bool,
}

impl Fallback {
    pub(super) fn open(
        config: &FallbackConfig,
        cursor: Cursor,
        patience: Patience,
        wanted: Wanted,
    ) -> Result<Self, String> {
        if config.resolved.is_empty() || config.resolved.len() != config.sources.len() {
            return Err(unresolved());
        }
        let (chosen, cursor, settled) = match cursor.at {
            At::Start => (0, Cursor::default(), false),
            At::Fallback { chosen, part } if chosen < config.sources.len() => (chosen, *part, true),
            _ => return Err("the cursor is of another source; start anew".into()),
        };
        let part = Part::open(&config.sources[chosen], &config.resolved[chosen], cursor, patience, wanted);
        Ok(Self {
            config: config.clone(),
            patience,
            wanted,
            chosen,
            part,
            settled,
            failures: Vec::new(),
            notes: Vec::new(),
            ended: false,
        })
    }

    pub(super) fn cursor(&self) -> Cursor {
        if !self.settled {
            return Cursor::default();
        }
        let part = self.part.stream.cursor();
        Cursor { counts: part.counts, at: At::Fallback { chosen: self.chosen, part: Box::new(part) } }
    }

    pub(super) fn rows(&self) -> &BadRows {
        self.part.stream.rows()
    }

    pub(super) fn take_notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        notes.extend(self.part.stream.take_notes());
        notes
    }

    pub(super) fn refuse(&mut self, reason: String) -> Result<(), String> {
        self.part.stream.refuse(reason).map_err(|error| error.to_string())
    }

    pub(super) fn finish(&self) -> Result<(), String> {
        self.part.stream.finish().map_err(|error| error.to_string())
    }

    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Record, String>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let failure = match ready!(self.part.poll(context)) {
                Some(Ok(record)) => {
                    self.settled = true;
                    return Poll::Ready(Some(Ok(record)));
                }
                // Once its records are learnt from, those of another would come twice.
                Some(Err(error)) if self.settled => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None if self.settled => {
                    self.ended = true;
                    return Poll::Ready(None);
                }
                Some(Err(error)) => error,
                None => format!("source {}: has no record", self.part.name),
            };
            let next = self.chosen + 1;
            let Some(name) = self.config.sources.get(next) else {
                self.failures.push(failure);
                self.ended = true;
                return Poll::Ready(Some(Err(format!(
                    "none of its sources works: {}",
                    self.failures.join("; ")
                ))));
            };
            let note = format!("{failure}; going on with source {name}");
            tracing::warn!(note, "falling back");
            self.notes.push(note);
            self.failures.push(failure);
            self.part =
                Part::open(name, &self.config.resolved[next], Cursor::default(), self.patience, self.wanted);
            self.chosen = next;
        }
    }
}
