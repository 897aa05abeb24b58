//! A source as a stream of records. Counts rows that cannot be used and gives up when they are too many; dropping the
//! stream ends the thread that reads.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::DropGuard;

use super::combined::{Fallback, Mix};
use super::cursor::{At, Counts, Cursor};
use super::object::{Opened, Opening, Patience};
use super::reader::{self, Message, Parcel};
use super::{Location, Record, SourceConfig, SourceError};

/// Rows after which the share of bad ones counts; fewer say too little.
const ENOUGH_ROWS: u64 = 100;
/// Reasons that are kept.
const MAX_REASONS: usize = 5;

/// Rows that were read, and those among them that cannot be used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BadRows {
    /// Rows so far.
    pub rows: u64,
    /// Bad ones among them.
    pub bad: u64,
    /// Records among them that the filter keeps out.
    pub filtered: u64,
    /// The first few reasons of bad ones, each with its place.
    pub reasons: Vec<String>,
}

impl BadRows {
    fn of(counts: &Counts) -> Self {
        Self { rows: counts.rows, bad: counts.bad, filtered: counts.filtered, reasons: Vec::new() }
    }

    /// Counts those of a part of the source in.
    pub(super) fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.bad += other.bad;
        self.filtered += other.filtered;
        self.reasons.extend(other.reasons.iter().take(MAX_REASONS - self.reasons.len()).cloned());
    }

    fn note(&mut self, reason: String) {
        self.bad += 1;
        if self.reasons.len() < MAX_REASONS {
            self.reasons.push(reason);
        }
    }

    fn too_many(&self, share: f64, at_end: bool) -> Result<(), String> {
        let counts = at_end || self.rows >= ENOUGH_ROWS;
        if self.bad == 0 || !counts || self.bad as f64 <= share * self.rows as f64 {
            return Ok(());
        }
        let reasons = match self.reasons.is_empty() {
            true => String::new(),
            false => format!(": {}", self.reasons.join("; ")),
        };
        Err(format!(
            "{} of {} rows cannot be used, more than max_bad_rows ({share}) allows{reasons}",
            self.bad, self.rows
        ))
    }
}

/// A stream of records. Rows that cannot be used are counted; what ends it early is its last item.
pub struct RecordStream {
    name: String,
    origin: Origin,
}

/// Where the records come from.
enum Origin {
    Reading(Box<Reading>),
    Mix(Box<Mix>),
    Fallback(Box<Fallback>),
    /// What cannot be opened, and then nothing.
    Nowhere(Option<String>, BadRows),
}

/// What a stream's records are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// What the source's settings name, where they name everything that a template takes.
    Named,
    /// Every field.
    All,
}

impl SourceConfig {
    /// Begins to read from `cursor` on. What cannot be opened is the stream's first item. Where the settings name all
    /// that a template takes, records of Parquet files hold nothing else. Must be called inside the asynchronous
    /// runtime.
    pub fn open(&self, name: &str, cursor: Cursor) -> RecordStream {
        self.open_patiently(name, cursor, Patience::default())
    }

    pub(super) fn open_patiently(&self, name: &str, cursor: Cursor, patience: Patience) -> RecordStream {
        self.open_as(name, cursor, patience, Wanted::Named)
    }

    /// As [`SourceConfig::open`] at the start, with every field of every record.
    pub fn open_whole(&self, name: &str) -> RecordStream {
        self.open_as(name, Cursor::default(), Patience::default(), Wanted::All)
    }

    pub(super) fn open_as(
        &self,
        name: &str,
        cursor: Cursor,
        patience: Patience,
        wanted: Wanted,
    ) -> RecordStream {
        let origin = match &self.location {
            Location::Mix(mix) => {
                Mix::open(mix, cursor, patience, wanted).map(|mix| Origin::Mix(Box::new(mix)))
            }
            Location::Fallback(fallback) => Fallback::open(fallback, cursor, patience, wanted)
                .map(|fallback| Origin::Fallback(Box::new(fallback))),
            _ => Reading::open(self, cursor, patience, wanted)
                .map(|reading| Origin::Reading(Box::new(reading))),
        };
        let origin = origin.unwrap_or_else(|error| Origin::Nowhere(Some(error), BadRows::default()));
        RecordStream { name: name.to_owned(), origin }
    }
}

impl RecordStream {
    /// What was taken so far.
    pub fn cursor(&self) -> Cursor {
        match &self.origin {
            Origin::Reading(reading) => reading.cursor.clone(),
            Origin::Mix(mix) => mix.cursor(),
            Origin::Fallback(fallback) => fallback.cursor(),
            Origin::Nowhere(..) => Cursor::default(),
        }
    }

    /// Rows so far and those among them that cannot be used.
    pub fn rows(&self) -> &BadRows {
        match &self.origin {
            Origin::Reading(reading) => &reading.rows,
            Origin::Mix(mix) => mix.rows(),
            Origin::Fallback(fallback) => fallback.rows(),
            Origin::Nowhere(_, rows) => rows,
        }
    }

    /// What happened since the last call that whoever watches the job should know, such as the switch to another
    /// source.
    pub fn take_notes(&mut self) -> Vec<String> {
        match &mut self.origin {
            Origin::Reading(_) | Origin::Nowhere(..) => Vec::new(),
            Origin::Mix(mix) => mix.take_notes(),
            Origin::Fallback(fallback) => fallback.take_notes(),
        }
    }

    /// Counts the latest record as bad after all: the taker has no use for it.
    ///
    /// # Errors
    /// Too many are.
    pub fn refuse(&mut self, reason: String) -> Result<(), SourceError> {
        let refused = match &mut self.origin {
            Origin::Reading(reading) => reading.refuse(reason),
            Origin::Mix(mix) => mix.refuse(reason),
            Origin::Fallback(fallback) => fallback.refuse(reason),
            Origin::Nowhere(..) => Ok(()),
        };
        refused.map_err(|message| self.error(message))
    }

    /// To be called when enough was taken, with or without the source's end: the rows so far are all there are.
    ///
    /// # Errors
    /// Too many of them are bad.
    pub fn finish(&self) -> Result<(), SourceError> {
        let finished = match &self.origin {
            Origin::Reading(reading) => reading.rows.too_many(reading.share, true),
            Origin::Mix(mix) => mix.finish(),
            Origin::Fallback(fallback) => fallback.finish(),
            Origin::Nowhere(..) => Ok(()),
        };
        finished.map_err(|message| self.error(message))
    }

    /// Rows that are decoded and not taken yet.
    #[cfg(test)]
    pub(super) fn waiting(&mut self) -> usize {
        let Origin::Reading(reading) = &mut self.origin else { return 0 };
        while let Ok(Parcel { messages, room }) = reading.receiver.try_recv() {
            reading.ready.extend(messages);
            match &mut reading.room {
                Some(kept) => kept.merge(room),
                none => *none = Some(room),
            }
        }
        reading.ready.len()
    }

    fn error(&self, message: String) -> SourceError {
        SourceError { source_name: self.name.clone(), message }
    }
}

impl Stream for RecordStream {
    type Item = Result<Record, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = match &mut self.origin {
            Origin::Reading(reading) => ready!(reading.poll(context)),
            Origin::Mix(mix) => ready!(mix.poll(context)),
            Origin::Fallback(fallback) => ready!(fallback.poll(context)),
            Origin::Nowhere(error, _) => error.take().map(Err),
        };
        Poll::Ready(item.map(|item| item.map_err(|message| self.error(message))))
    }
}

impl Location {
    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        match self {
            Self::Local(config) => config.open(opening),
            Self::Http(config) => config.open(opening),
            Self::HuggingFace(config) => config.open(opening),
            Self::S3(config) => config.open(opening),
            Self::Qdrant(config) => config.open(opening),
            Self::Mcp(config) => config.open(opening),
            Self::Mix(_) | Self::Fallback(_) => Err("has no data of its own".into()),
        }
    }
}

/// A source that is read by a thread of its own.
struct Reading {
    receiver: mpsc::UnboundedReceiver<Parcel>,
    ready: VecDeque<Message>,
    /// That of the parcel that `ready` came in.
    room: Option<OwnedSemaphorePermit>,
    skip: u64,
    share: f64,
    /// What was given.
    cursor: Cursor,
    /// What was read to give it, and since then.
    rows: BadRows,
    passed: u64,
    ended: bool,
    _stop: DropGuard,
}

impl Reading {
    fn open(
        config: &SourceConfig,
        cursor: Cursor,
        patience: Patience,
        wanted: Wanted,
    ) -> Result<Self, String> {
        let from = match &cursor.at {
            At::Start => None,
            At::Mark(mark) => Some(mark.clone()),
            At::Mix { .. } | At::Fallback { .. } => {
                return Err("the cursor is one of several sources; start anew".into());
            }
        };
        let mut opening = Opening::new(config, patience);
        opening.pin = from.as_ref().and_then(|mark| mark.pin.as_ref().clone());
        if wanted == Wanted::Named {
            opening.fields = config.needed();
        }
        let stop = opening.stop.clone();
        Ok(Self {
            receiver: reader::start(config, opening, from),
            ready: VecDeque::new(),
            room: None,
            skip: config.skip,
            share: config.max_bad_rows,
            rows: BadRows::of(&cursor.counts),
            passed: cursor.counts.passed,
            cursor,
            ended: false,
            _stop: stop.drop_guard(),
        })
    }

    fn refuse(&mut self, reason: String) -> Result<(), String> {
        self.cursor.counts.bad += 1;
        self.rows.note(reason);
        self.rows.too_many(self.share, false)
    }

    fn end_with(&mut self, message: String) -> Poll<Option<Result<Record, String>>> {
        self.ended = true;
        Poll::Ready(Some(Err(message)))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Record, String>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let Some(message) = self.ready.pop_front() else {
                self.room = None;
                match ready!(self.receiver.poll_recv(context)) {
                    Some(Parcel { messages, room }) => {
                        self.ready = messages.into();
                        self.room = Some(room);
                    }
                    None => return self.end_with("reading stopped for no known reason; see the log".into()),
                }
                continue;
            };
            match message {
                Message::Record(record, mark) => {
                    self.rows.rows += 1;
                    if self.passed < self.skip {
                        self.passed += 1;
                        continue;
                    }
                    // It may be this row with which there are enough to judge by.
                    if let Err(message) = self.rows.too_many(self.share, false) {
                        return self.end_with(message);
                    }
                    self.cursor.counts = Counts {
                        rows: self.rows.rows,
                        records: self.cursor.counts.records + 1,
                        bad: self.rows.bad,
                        filtered: self.rows.filtered,
                        passed: self.passed,
                    };
                    self.cursor.at = At::Mark(mark);
                    return Poll::Ready(Some(Ok(record)));
                }
                Message::Bad(reason) => {
                    self.rows.rows += 1;
                    self.rows.note(reason);
                    if let Err(message) = self.rows.too_many(self.share, false) {
                        return self.end_with(message);
                    }
                }
                Message::Filtered => {
                    self.rows.rows += 1;
                    self.rows.filtered += 1;
                }
                Message::Failed(reason) => {
                    let message = format!("{reason} (after record {})", self.cursor.counts.records);
                    return self.end_with(message);
                }
                Message::End => {
                    self.ended = true;
                    if let Err(message) = self.rows.too_many(self.share, true) {
                        return Poll::Ready(Some(Err(message)));
                    }
                }
            }
        }
    }
}
