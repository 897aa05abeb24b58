//! The thread that reads a source: opens its files or pages where reading is to go on, decodes and filters them, and
//! hands the rows over as far as there is room.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc};

use super::cursor::{FileMark, Mark, MarkPlace};
use super::decode::{Begun, Broken, Decoder, Found, format_of_name, parquet};
use super::filter::{Sieve, Verdict};
use super::object::{Object, Objects, Opening, Page, Pages, Rows, Stat};
use super::{Format, Place, Record, Row, SourceConfig};

/// Bytes of decoded text after which rows are handed over, as far as `buffer_bytes` has room for several such parcels.
const PARCEL_BYTES: usize = 256 << 10;
/// Rows after which they are.
const PARCEL_ROWS: usize = 512;
/// How long a row may wait for others while nothing else waits to be taken.
const WAIT: Duration = Duration::from_millis(2);
/// Pages in a row that have no rows; more are taken for a circle.
const MAX_EMPTY_PAGES: u32 = 1000;
/// What a record takes beside its texts, about.
const RECORD_BYTES: usize = 256;

/// What the thread says.
pub(super) enum Message {
    /// A record, and where the next one stands.
    Record(Record, Mark),
    Bad(String),
    /// A record that the filter keeps out.
    Filtered,
    /// Something that ends the stream; in words.
    Failed(String),
    /// All is read.
    End,
}

/// Messages, and the room that they take until they are dropped.
pub(super) struct Parcel {
    pub(super) messages: Vec<Message>,
    pub(super) room: OwnedSemaphorePermit,
}

/// Begins to read on a thread of its own, which ends when nobody wants more.
pub(super) fn start(
    config: &SourceConfig,
    opening: Opening,
    from: Option<Mark>,
) -> mpsc::UnboundedReceiver<Parcel> {
    let (sender, receiver) = mpsc::unbounded_channel();
    // In KiB, of which a semaphore can count as many as any machine has.
    let all = (config.buffer_bytes >> 10) as usize;
    let outlet = Outlet {
        messages: Vec::new(),
        bytes: 0,
        parcel_bytes: PARCEL_BYTES.min(all << 8),
        room: Arc::new(Semaphore::new(all)),
        all,
        sent: Instant::now(),
        opening: opening.clone(),
        sender,
    };
    let sieve = config.filter.as_ref().map(|filter| Sieve::new(filter, config));
    let reader = Reader { config: config.clone(), opening, sieve, outlet };
    tokio::task::spawn_blocking(move || reader.run(from));
    receiver
}

struct Outlet {
    messages: Vec<Message>,
    bytes: usize,
    parcel_bytes: usize,
    room: Arc<Semaphore>,
    all: usize,
    sent: Instant,
    opening: Opening,
    sender: mpsc::UnboundedSender<Parcel>,
}

impl Outlet {
    /// Breaks when nobody listens any more.
    fn push(&mut self, message: Message, bytes: usize) -> ControlFlow<()> {
        self.messages.push(message);
        self.bytes += bytes + RECORD_BYTES;
        let is_full = self.messages.len() >= PARCEL_ROWS || self.bytes >= self.parcel_bytes;
        let is_awaited = || self.room.available_permits() == self.all && self.sent.elapsed() > WAIT;
        if is_full || is_awaited() { self.send() } else { ControlFlow::Continue(()) }
    }

    fn send(&mut self) -> ControlFlow<()> {
        if self.messages.is_empty() {
            return ControlFlow::Continue(());
        }
        // One row may be larger than all the room there is.
        let wanted = (self.bytes / 1024 + 1).min(self.all) as u32;
        let room = match self.room.clone().try_acquire_many_owned(wanted) {
            Ok(room) => room,
            Err(TryAcquireError::Closed) => return ControlFlow::Break(()),
            Err(TryAcquireError::NoPermits) => {
                let room = self.room.clone().acquire_many_owned(wanted);
                match self.opening.wait(async { room.await.map_err(|error| error.to_string()) }) {
                    Ok(room) => room,
                    Err(_) => return ControlFlow::Break(()),
                }
            }
        };
        self.bytes = 0;
        self.sent = Instant::now();
        let messages = std::mem::take(&mut self.messages);
        match self.sender.send(Parcel { messages, room }) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

struct Reader {
    config: SourceConfig,
    opening: Opening,
    sieve: Option<Sieve>,
    outlet: Outlet,
}

impl Reader {
    fn run(mut self, from: Option<Mark>) {
        // Libraries that decode may panic at damaged data; whoever waits is told.
        let read = catch_unwind(AssertUnwindSafe(|| self.read(from)));
        let last = match read {
            Ok(Ok(ControlFlow::Continue(()))) => Message::End,
            Ok(Ok(ControlFlow::Break(()))) => return,
            Ok(Err(message)) => Message::Failed(message),
            Err(_) => Message::Failed(
                "reading panicked, which damaged data can be the reason of; the server's log has more".into(),
            ),
        };
        self.outlet.messages.push(last);
        // Whoever no longer listens needs no end either.
        let _ = self.outlet.send();
    }

    fn read(&mut self, from: Option<Mark>) -> Result<ControlFlow<()>, String> {
        let opened = self.config.location.open(&self.opening)?;
        let pin = Arc::new(opened.pin);
        let from = from.map(|mark| mark.place);
        match opened.rows {
            Rows::Files(objects) => self.files(objects, from, &pin),
            Rows::Pages(mut pages) => self.pages(pages.as_mut(), from, &pin),
        }
    }

    fn files(
        &mut self,
        objects: Objects,
        mut from: Option<MarkPlace>,
        pin: &Arc<Option<String>>,
    ) -> Result<ControlFlow<()>, String> {
        let marked = match &from {
            None => None,
            Some(MarkPlace::Rows { file, .. } | MarkPlace::Group { file, .. }) => Some(file.clone()),
            Some(MarkPlace::Page { .. }) => return Err("gives files where it gave pages; start anew".into()),
        };
        let first = marked.as_ref().map_or(0, |marked| marked.index);
        let mut files = 0;
        for (index, object) in (0..).zip(objects) {
            let mut object = object?;
            files = index + 1;
            if index < first {
                continue;
            }
            let shown = object.shown().to_owned();
            let stat = object.stat().map_err(|error| named(&shown, error))?;
            if let Some(marked) = marked.as_ref().filter(|marked| marked.index == index)
                && let Some(why) = marked.differs(&shown, &stat)
            {
                return Err(why);
            }
            let file = File {
                shown: shown.as_str().into(),
                mark: Arc::new(FileMark::new(index, &shown, stat.clone())),
                pin: pin.clone(),
            };
            if self.file(object, &stat, &file, from.take())?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        match marked {
            Some(marked) if files <= first => Err(format!(
                "holds {files} files where {} was the one to go on in: it was changed since; start anew",
                marked.shown
            )),
            _ => Ok(ControlFlow::Continue(())),
        }
    }

    fn file(
        &mut self,
        mut object: Box<dyn Object>,
        stat: &Stat,
        file: &File,
        from: Option<MarkPlace>,
    ) -> Result<ControlFlow<()>, String> {
        let format = match self.config.format {
            Format::Auto => object.format().unwrap_or_default(),
            format => format,
        };
        let is_parquet = format == Format::Parquet
            || (format == Format::Auto && format_of_name(&file.shown) == Some(Format::Parquet));
        let input = match &from {
            Some(MarkPlace::Group { group, row, .. }) => {
                let start = parquet::Start { group: *group, row: *row };
                return self.parquet(object, stat, file, start);
            }
            Some(MarkPlace::Rows { layout, spot, .. }) => spot.input(layout.compression),
            _ if is_parquet => return self.parquet(object, stat, file, parquet::Start::default()),
            _ => 0,
        };
        let reader = object.read_from(input).map_err(|error| named(&file.shown, error))?;
        let begun = match from {
            Some(MarkPlace::Rows { layout, spot, .. }) => {
                Decoder::resume(layout.as_ref().clone(), spot, reader).map(Begun::Rows)
            }
            _ => Decoder::begin(format, &file.shown, reader),
        };
        match begun.map_err(|broken| file.words(broken))? {
            Begun::Rows(decoder) => return self.rows(decoder, stat, file),
            // Its name did not tell.
            Begun::Parquet => {}
        }
        self.parquet(object, stat, file, parquet::Start::default())
    }

    fn rows(&mut self, decoder: Decoder, stat: &Stat, file: &File) -> Result<ControlFlow<()>, String> {
        let layout = Arc::new(decoder.layout().clone());
        let mut sink = |row, found, spot| {
            let place = MarkPlace::Rows { file: file.mark.clone(), layout: layout.clone(), spot };
            self.found(file, row, found, place)
        };
        let read = match decoder.run(&mut sink).map_err(|broken| file.words(broken))? {
            ControlFlow::Break(()) => return Ok(ControlFlow::Break(())),
            ControlFlow::Continue(read) => read,
        };
        match stat.length {
            Some(length) if length != read => Err(format!(
                "{}: {read} bytes came where {length} were announced; bring the whole file",
                file.shown
            )),
            _ => Ok(ControlFlow::Continue(())),
        }
    }

    fn parquet(
        &mut self,
        object: Box<dyn Object>,
        stat: &Stat,
        file: &File,
        start: parquet::Start,
    ) -> Result<ControlFlow<()>, String> {
        let length = stat.length.ok_or_else(|| {
            format!("{}: nothing tells how long it is, which Parquet needs; use another format", file.shown)
        })?;
        let columns = self.opening.fields.clone();
        let memory = self.config.buffer_bytes;
        let mut sink = |row, found, next: parquet::Start| {
            let place = MarkPlace::Group { file: file.mark.clone(), group: next.group, row: next.row };
            self.found(file, row, found, place)
        };
        parquet::decode(object, length, &columns, start, memory, &mut sink)
            .map_err(|broken| file.words(broken))
    }

    fn pages(
        &mut self,
        pages: &mut dyn Pages,
        from: Option<MarkPlace>,
        pin: &Arc<Option<String>>,
    ) -> Result<ControlFlow<()>, String> {
        let (mut token, mut passed) = match from {
            None => (Arc::new(None), 0),
            Some(MarkPlace::Page { token, row }) => (token, row),
            Some(_) => return Err("gives pages where it gave files; start anew".into()),
        };
        let mut empty = 0;
        loop {
            let Page { shown, rows, next } = pages.page(token.as_ref().as_ref())?;
            let count = rows.len() as u64;
            if count < passed {
                return Err(format!(
                    "{shown} has {count} rows where {passed} were taken before: it was changed since; start anew"
                ));
            }
            let file = File {
                shown: shown.as_str().into(),
                mark: Arc::new(FileMark::new(0, &shown, Stat::default())),
                pin: pin.clone(),
            };
            let next: Arc<Option<Value>> = Arc::new(next);
            for (row, number) in rows.into_iter().zip(1..).skip(passed as usize) {
                let place = match number == count && next.is_some() {
                    true => MarkPlace::Page { token: next.clone(), row: 0 },
                    false => MarkPlace::Page { token: token.clone(), row: number },
                };
                let found = row.map_or_else(Found::Bad, Found::Record);
                if self.found(&file, Row::Element(number), found, place).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            // The next page may be long in coming.
            if self.outlet.send().is_break() {
                return Ok(ControlFlow::Break(()));
            }
            if next.is_none() {
                return Ok(ControlFlow::Continue(()));
            }
            if next == token {
                return Err(format!("{shown} names itself as its next page; ask whoever runs the server"));
            }
            empty = if count == 0 { empty + 1 } else { 0 };
            if empty == MAX_EMPTY_PAGES {
                return Err(format!(
                    "{shown}: {empty} pages in a row have no rows; ask whoever runs the server"
                ));
            }
            (token, passed) = (next, 0);
        }
    }

    fn found(&mut self, file: &File, row: Row, found: Found, place: MarkPlace) -> ControlFlow<()> {
        let at = Place { object: file.shown.clone(), row };
        let bad = match found {
            Found::Bad(reason) => reason,
            Found::Record(fields) => match self.sieve.as_ref().map(|sieve| sieve.judge(&fields)) {
                None | Some(Verdict::Keep) => {
                    let record = Record { fields, place: at };
                    let bytes = record.bytes();
                    let mark = Mark { pin: file.pin.clone(), place };
                    return self.outlet.push(Message::Record(record, mark), bytes);
                }
                Some(Verdict::Leave) => return self.outlet.push(Message::Filtered, 0),
                Some(Verdict::Bad(reason)) => reason,
            },
        };
        let bytes = bad.len();
        self.outlet.push(Message::Bad(format!("{at}: {bad}")), bytes)
    }
}

/// What is said with every row of a file or page.
struct File {
    shown: Arc<str>,
    mark: Arc<FileMark>,
    pin: Arc<Option<String>>,
}

impl File {
    fn words(&self, Broken { row, message }: Broken) -> String {
        match row {
            Some(row) => format!("{}: {message}", Place { object: self.shown.clone(), row }),
            None => named(&self.shown, message),
        }
    }
}

/// With the object's name, unless the message has it already.
fn named(shown: &str, message: String) -> String {
    if message.contains(shown) { message } else { format!("{shown}: {message}") }
}
