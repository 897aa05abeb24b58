//! A source as a stream of records: a thread reads and decodes, a bounded channel hands over, and dropping the
//! stream ends the thread. Counts rows that cannot be used and gives up when they are too many.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::decode::{Broken, Found, decode};
use super::object::{Object, Opened, Opening, Page, Pages, Patience, Rows};
use super::{Format, Location, Place, Record, Row, SourceConfig, SourceError};

/// Rows of one message between thread and stream.
const BATCH_ROWS: usize = 64;
/// Bytes of decoded text after which a message is sent although it has room.
const BATCH_BYTES: usize = 1 << 20;
/// Rows after which the share of bad ones counts; fewer say too little.
const ENOUGH_ROWS: u64 = 100;
/// Reasons that are kept.
const MAX_REASONS: usize = 5;

/// Where reading goes on: what was taken from a stream so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Records that the stream has given.
    pub records: u64,
    /// Of these, those that the taker had no use for.
    pub refused: u64,
}

/// Rows that cannot be used, among all.
#[derive(Debug, Clone, PartialEq)]
pub struct BadRows {
    /// Rows so far.
    pub rows: u64,
    /// Bad ones among them.
    pub bad: u64,
    /// The first few reasons, each with its place.
    pub reasons: Vec<String>,
    share: f64,
}

impl BadRows {
    fn note(&mut self, reason: String) {
        self.bad += 1;
        if self.reasons.len() < MAX_REASONS {
            self.reasons.push(reason);
        }
    }

    fn too_many(&self, at_end: bool) -> Option<String> {
        let counts = at_end || self.rows >= ENOUGH_ROWS;
        if self.bad == 0 || !counts || self.bad as f64 <= self.share * self.rows as f64 {
            return None;
        }
        let reasons = match self.reasons.is_empty() {
            true => String::new(),
            false => format!(": {}", self.reasons.join("; ")),
        };
        Some(format!(
            "{} of {} rows cannot be used, more than max_bad_rows ({}) allows{reasons}",
            self.bad, self.rows, self.share
        ))
    }
}

/// What the thread says.
enum Message {
    Record(Record),
    Bad(String),
    /// Something that ends the stream; in words.
    Failed(String),
    /// All is read.
    End,
}

/// A stream of records. Rows that cannot be used are counted; what ends it early is its last item.
pub struct RecordStream {
    name: String,
    receiver: mpsc::Receiver<Vec<Message>>,
    ready: VecDeque<Message>,
    /// Records to pass over: those that the cursor and `skip` name.
    pass: u64,
    cursor: Cursor,
    rows: BadRows,
    ended: bool,
    _stop: DropGuard,
}

impl SourceConfig {
    /// Begins to read from `cursor` on. What cannot be opened is the stream's first item. Must be called inside
    /// the asynchronous runtime.
    pub fn open(&self, name: &str, cursor: Cursor) -> RecordStream {
        self.open_patiently(name, cursor, Patience::default())
    }

    pub(super) fn open_patiently(&self, name: &str, cursor: Cursor, patience: Patience) -> RecordStream {
        let (sender, receiver) = mpsc::channel(2);
        let opening = Opening::new(self, patience);
        let stop = opening.stop.clone();
        let reader = Reader {
            config: self.clone(),
            opening,
            batch: Batch { messages: Vec::new(), bytes: 0, sender },
        };
        tokio::task::spawn_blocking(move || reader.run());
        RecordStream {
            name: name.to_owned(),
            receiver,
            ready: VecDeque::new(),
            pass: self.skip.saturating_add(cursor.records),
            cursor,
            // Rows before the cursor are read again, and those that are bad found again.
            rows: BadRows { rows: 0, bad: cursor.refused, reasons: Vec::new(), share: self.max_bad_rows },
            ended: false,
            _stop: stop.drop_guard(),
        }
    }
}

impl RecordStream {
    /// What was taken so far.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Rows so far and those among them that cannot be used.
    pub fn rows(&self) -> &BadRows {
        &self.rows
    }

    /// Counts the latest record as bad after all: the taker has no use for it.
    ///
    /// # Errors
    /// Too many are.
    pub fn refuse(&mut self, reason: String) -> Result<(), SourceError> {
        self.cursor.refused += 1;
        self.rows.note(reason);
        self.check(false)
    }

    /// To be called when enough was taken, with or without the source's end: the rows so far are all there are.
    ///
    /// # Errors
    /// Too many of them are bad.
    pub fn finish(&self) -> Result<(), SourceError> {
        self.check(true)
    }

    fn check(&self, at_end: bool) -> Result<(), SourceError> {
        match self.rows.too_many(at_end) {
            Some(message) => Err(self.error(message)),
            None => Ok(()),
        }
    }

    fn error(&self, message: String) -> SourceError {
        SourceError { source_name: self.name.clone(), message }
    }

    fn end_with(&mut self, message: String) -> Poll<Option<Result<Record, SourceError>>> {
        self.ended = true;
        Poll::Ready(Some(Err(self.error(message))))
    }
}

impl Stream for RecordStream {
    type Item = Result<Record, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let Some(message) = self.ready.pop_front() else {
                match ready!(self.receiver.poll_recv(context)) {
                    Some(messages) => self.ready.extend(messages),
                    None => return self.end_with("reading stopped for no known reason; see the log".into()),
                }
                continue;
            };
            match message {
                Message::Record(record) => {
                    self.rows.rows += 1;
                    if self.pass > 0 {
                        self.pass -= 1;
                        continue;
                    }
                    // It may be this row with which there are enough to judge by.
                    if let Some(message) = self.rows.too_many(false) {
                        return self.end_with(message);
                    }
                    self.cursor.records += 1;
                    return Poll::Ready(Some(Ok(record)));
                }
                Message::Bad(reason) => {
                    self.rows.rows += 1;
                    self.rows.note(reason);
                    // While passing over, the same rows were good enough the first time.
                    if self.pass == 0
                        && let Some(message) = self.rows.too_many(false)
                    {
                        return self.end_with(message);
                    }
                }
                Message::Failed(reason) => {
                    let message = format!("{reason} (after record {})", self.cursor.records);
                    return self.end_with(message);
                }
                Message::End => {
                    if self.pass > 0 && self.cursor.records > 0 {
                        let taken = self.cursor.records;
                        return self.end_with(format!(
                            "holds fewer records than the {taken} that were taken before; the data was changed \
                             since, so start anew"
                        ));
                    }
                    self.ended = true;
                    if let Err(error) = self.check(true) {
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
        }
    }
}

/// Messages that are not sent yet.
struct Batch {
    messages: Vec<Message>,
    bytes: usize,
    sender: mpsc::Sender<Vec<Message>>,
}

impl Batch {
    fn found(&mut self, object: &Arc<str>, row: Row, found: Found) -> ControlFlow<()> {
        let place = Place { object: object.clone(), row };
        match found {
            Found::Record(fields) => {
                let record = Record { fields, place };
                let bytes = record.bytes();
                self.push(Message::Record(record), bytes)
            }
            Found::Bad(reason) => {
                let bytes = reason.len();
                self.push(Message::Bad(format!("{place}: {reason}")), bytes)
            }
        }
    }

    /// Breaks when nobody listens any more.
    fn push(&mut self, message: Message, bytes: usize) -> ControlFlow<()> {
        self.messages.push(message);
        self.bytes += bytes;
        if self.messages.len() < BATCH_ROWS && self.bytes < BATCH_BYTES {
            return ControlFlow::Continue(());
        }
        self.send()
    }

    fn send(&mut self) -> ControlFlow<()> {
        self.bytes = 0;
        match self.sender.blocking_send(std::mem::take(&mut self.messages)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

impl Location {
    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        match self {
            Self::Local(config) => config.open(opening),
            Self::Http(config) => config.open(opening),
            Self::Qdrant(config) => config.open(opening),
            Self::Mcp(config) => config.open(opening),
        }
    }
}

/// The thread's side.
struct Reader {
    config: SourceConfig,
    opening: Opening,
    batch: Batch,
}

impl Reader {
    fn run(mut self) {
        let last = match self.read() {
            Ok(ControlFlow::Continue(())) => Message::End,
            Ok(ControlFlow::Break(())) => return,
            Err(message) => Message::Failed(message),
        };
        self.batch.messages.push(last);
        // Whoever no longer listens needs no end either.
        let _ = self.batch.send();
    }

    fn read(&mut self) -> Result<ControlFlow<()>, String> {
        match self.config.location.open(&self.opening)?.rows {
            Rows::Files(objects) => {
                for object in objects {
                    if self.object(object?.as_mut())?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Ok(ControlFlow::Continue(()))
            }
            Rows::Pages(mut pages) => self.pages(pages.as_mut()),
        }
    }

    fn object(&mut self, object: &mut dyn Object) -> Result<ControlFlow<()>, String> {
        let shown: Arc<str> = object.shown().into();
        object.stat()?;
        let format = match self.config.format {
            Format::Auto => object.format().unwrap_or_default(),
            format => format,
        };
        let bytes = object.read_from(0)?;
        let batch = &mut self.batch;
        let mut sink = |row, found| batch.found(&shown, row, found);
        decode(format, &shown, bytes, &mut sink).map_err(|Broken { row, message }| match row {
            Some(row) => format!("{}: {message}", Place { object: shown.clone(), row }),
            None => format!("{shown}: {message}"),
        })
    }

    fn pages(&mut self, pages: &mut dyn Pages) -> Result<ControlFlow<()>, String> {
        let mut token = None;
        loop {
            let Page { shown, rows, next } = pages.page(token.as_ref())?;
            let shown: Arc<str> = shown.into();
            for (row, element) in rows.into_iter().zip(1..) {
                let found = row.map_or_else(Found::Bad, Found::Record);
                if self.batch.found(&shown, Row::Element(element), found).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            token = next;
            if token.is_none() {
                return Ok(ControlFlow::Continue(()));
            }
        }
    }
}
