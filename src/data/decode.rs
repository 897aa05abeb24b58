//! Bytes to rows: gzip, JSON, CSV and plain lines, one row at a time and never more than one bounded row in
//! memory. Knows nothing of where the bytes come from.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use serde::Deserializer as _;
use serde::de::{SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{Format, Row};

/// Bytes that one row may have.
pub(super) const MAX_ROW_BYTES: u64 = 16 << 20;

/// What a row turned out to be.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// A record.
    Record(Map<String, Value>),
    /// Nothing that can be used, and why.
    Bad(String),
}

/// Why decoding ended before the data did.
#[derive(Debug, PartialEq)]
pub(super) struct Broken {
    /// The row that was being read, where one was.
    pub(super) row: Option<Row>,
    /// What is wrong.
    pub(super) message: String,
}

impl Broken {
    fn of(message: impl Into<String>) -> Self {
        Self { row: None, message: message.into() }
    }

    fn at(row: Row, message: impl Into<String>) -> Self {
        Self { row: Some(row), message: message.into() }
    }
}

/// Takes each row as it is found; breaking ends the decoding.
pub(super) type Sink<'a> = dyn FnMut(Row, Found) -> ControlFlow<()> + 'a;

/// Decodes everything in `reader`, which may be compressed. `name` tells the format where `format` does not.
pub(super) fn decode(
    format: Format,
    name: &str,
    reader: impl Read,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    let read_bytes = Rc::new(Cell::new(0));
    let counted = Counted { inner: reader, bytes: read_bytes.clone(), limit: u64::MAX };
    let (magic, reader) = peek(counted, 4).map_err(|e| Broken::of(e.to_string()))?;
    let gzipped = magic.starts_with(&[0x1f, 0x8b]);
    refuse_other_kinds(&magic)?;
    let result = if gzipped {
        decode_plain(format, name, MultiGzDecoder::new(reader), sink)
    } else {
        decode_plain(format, name, reader, sink)
    };
    result.map_err(|broken| match broken {
        Failed::Broken(broken) => broken,
        Failed::Io(row, error) if gzipped => Broken { row, message: gzip_message(&error, read_bytes.get()) },
        Failed::Io(row, error) => Broken { row, message: error.to_string() },
    })
}

/// A failure whose wording depends on what the bytes came through.
enum Failed {
    Broken(Broken),
    Io(Option<Row>, io::Error),
}

impl From<Broken> for Failed {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

fn gzip_message(error: &io::Error, offset: u64) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            format!("the gzip data is cut off: it ends at byte {offset}, in the middle; bring the whole file")
        }
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
            format!("the gzip data is damaged near byte {offset} ({error}); bring the file again")
        }
        _ => error.to_string(),
    }
}

/// Other compressions and formats would give one bad row after another; they are better named.
fn refuse_other_kinds(magic: &[u8]) -> Result<(), Broken> {
    let kinds: [(&[u8], &str); 7] = [
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd data; decompress it or use gzip"),
        (b"BZh", "bzip2 data; decompress it or use gzip"),
        (&[0xfd, b'7', b'z', b'X'], "xz data; decompress it or use gzip"),
        (b"PK\x03\x04", "a zip archive; unpack it or use gzip"),
        (b"PAR1", "a Parquet file; write it as jsonl"),
        (&[0xff, 0xfe], "UTF-16 text; save it as UTF-8"),
        (&[0xfe, 0xff], "UTF-16 text; save it as UTF-8"),
    ];
    match kinds.iter().find(|(start, _)| magic.starts_with(start)) {
        Some((_, what)) => Err(Broken::of(format!("this is {what}"))),
        None => Ok(()),
    }
}

/// The first bytes, at most `n`, and a reader that gives them again before the rest.
fn peek<R: Read>(mut reader: R, n: usize) -> io::Result<(Vec<u8>, impl Read)> {
    let mut first = Vec::with_capacity(n);
    reader.by_ref().take(n as u64).read_to_end(&mut first)?;
    Ok((first.clone(), io::Cursor::new(first).chain(reader)))
}

fn decode_plain(
    format: Format,
    name: &str,
    reader: impl Read,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Failed> {
    let (start, reader) = peek(reader, 3).map_err(|e| Failed::Io(None, e))?;
    let bom = if start == [0xef, 0xbb, 0xbf] { 3 } else { 0 };
    let row_bytes = Rc::new(Cell::new(0));
    let counted = Counted { inner: reader, bytes: row_bytes.clone(), limit: MAX_ROW_BYTES };
    let mut reader = BufReader::new(counted);
    let mut skipped = [0; 3];
    reader.read_exact(&mut skipped[..bom]).map_err(|e| Failed::Io(None, e))?;
    match resolve(format, name, &mut reader, &row_bytes)? {
        Format::Json => decode_array(reader, &row_bytes, sink),
        Format::Csv => decode_table(b',', reader, &row_bytes, sink),
        Format::Tsv => decode_table(b'\t', reader, &row_bytes, sink),
        Format::Txt => decode_lines(reader, &row_bytes, sink, &|line| {
            let text = line.to_owned();
            Ok(Map::from_iter([("text".to_owned(), Value::from(text))]))
        }),
        Format::Jsonl | Format::Auto => decode_lines(reader, &row_bytes, sink, &object_of_line),
    }
}

/// What `auto` means for this name and, where the name does not say, this beginning.
fn resolve(
    format: Format,
    name: &str,
    reader: &mut impl BufRead,
    row_bytes: &Cell<u64>,
) -> Result<Format, Failed> {
    if format != Format::Auto {
        return Ok(format);
    }
    let by_name = format_of_name(name);
    // Many files that are called .json hold an object a line.
    if !matches!(by_name, None | Some(Format::Json)) {
        return Ok(by_name.unwrap_or_default());
    }
    let first = first_character(reader, row_bytes).map_err(|e| Failed::Io(None, e))?;
    match (first, by_name) {
        (Some(b'['), _) => Ok(Format::Json),
        (Some(b'{'), _) => Ok(Format::Jsonl),
        // There is nothing to read, whatever it should be.
        (None, _) => Ok(Format::Txt),
        (Some(_), Some(_)) => {
            Err(Broken::of("is no JSON: it begins neither with [ nor with {; correct it or set format")
                .into())
        }
        (Some(_), None) => {
            let message =
                "its name does not tell how it is written; set format to jsonl, json, csv, tsv or txt";
            Err(Broken::of(message).into())
        }
    }
}

/// The format that a name stands for, by its extension before `.gz`.
pub(super) fn format_of_name(name: &str) -> Option<Format> {
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    match name.rsplit(['/', '\\']).next().and_then(|file| file.rsplit_once('.'))?.1 {
        "jsonl" | "ndjson" | "jsonlines" => Some(Format::Jsonl),
        "json" => Some(Format::Json),
        "csv" => Some(Format::Csv),
        "tsv" => Some(Format::Tsv),
        "txt" | "text" => Some(Format::Txt),
        _ => None,
    }
}

/// The first byte that is no white space, which stays to be read. What precedes it is taken.
fn first_character(reader: &mut impl BufRead, row_bytes: &Cell<u64>) -> io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
        let first = buffer.get(blank).copied();
        reader.consume(blank);
        if first.is_some() {
            return Ok(first);
        }
        row_bytes.set(0);
    }
}

/// Counts what is read; beyond the limit it fails. Whoever reads rows sets the count back at each.
struct Counted<R> {
    inner: R,
    bytes: Rc<Cell<u64>>,
    limit: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.get() > self.limit {
            return Err(io::Error::other(TooLong));
        }
        // Not every decoder above tries again when a signal came in between.
        let n = loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.bytes.set(self.bytes.get().saturating_add(n as u64));
        Ok(n)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("one row has more than {} MB; is a quote or a bracket not closed?", MAX_ROW_BYTES >> 20)]
struct TooLong;

// ---- lines

fn object_of_line(line: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(line).map_err(|error| {
        // The row is named by its place in the file; serde's own count of lines would contradict it.
        let text = error.to_string();
        let reason = text.split(" at line ").next().unwrap_or(&text);
        match error.column() {
            0 => format!("no JSON object: {reason}"),
            column => format!("no JSON object: {reason}, column {column}"),
        }
    })
}

/// One line to a record.
type Parse = dyn Fn(&str) -> Result<Map<String, Value>, String>;

fn decode_lines(
    mut reader: impl BufRead,
    row_bytes: &Cell<u64>,
    sink: &mut Sink,
    parse: &Parse,
) -> Result<ControlFlow<()>, Failed> {
    let mut line = Vec::new();
    for number in 1.. {
        let row = Row::Line(number);
        line.clear();
        row_bytes.set(0);
        let io_failed = |error| Failed::Io(Some(row), error);
        // As much as the reader gives for one row, so that after a longer line the next can still be found.
        let read = reader.by_ref().take(MAX_ROW_BYTES).read_until(b'\n', &mut line).map_err(io_failed)?;
        if read == 0 {
            break;
        }
        let found = if read as u64 == MAX_ROW_BYTES && line.last() != Some(&b'\n') {
            skip_line(&mut reader, row_bytes).map_err(io_failed)?;
            Found::Bad(format!("the line has more than {} MB", MAX_ROW_BYTES >> 20))
        } else {
            match std::str::from_utf8(&line) {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => parse(text.trim_end_matches(['\n', '\r'])).map_or_else(Found::Bad, Found::Record),
                Err(error) => Found::Bad(format!("no UTF-8 at byte {} of the line", error.valid_up_to() + 1)),
            }
        };
        if sink(row, found).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Reads up to and with the next end of a line, keeping nothing.
fn skip_line(reader: &mut impl BufRead, row_bytes: &Cell<u64>) -> io::Result<()> {
    loop {
        row_bytes.set(0);
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|&b| b == b'\n');
        let taken = end.map_or(buffer.len(), |at| at + 1);
        reader.consume(taken);
        if end.is_some() || taken == 0 {
            return Ok(());
        }
    }
}

// ---- tables

fn decode_table(
    delimiter: u8,
    reader: impl Read,
    row_bytes: &Cell<u64>,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Failed> {
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).quoting(delimiter == b',').from_reader(reader);
    let first = Row::Line(1);
    let names: Vec<String> = match reader.headers() {
        Ok(names) => names.iter().map(|name| name.trim().to_owned()).collect(),
        Err(error) => return Err(table_failed(first, error)),
    };
    if names.iter().all(String::is_empty) {
        // An empty file has no names and no rows. Names that are all empty are none either.
        return if reader.is_done() {
            Ok(ControlFlow::Continue(()))
        } else {
            Err(Broken::at(first, "the first row must hold the names of the columns").into())
        };
    }
    for (at, name) in names.iter().enumerate() {
        if !name.is_empty() && names[..at].contains(name) {
            return Err(Broken::at(first, format!("two columns are called {name}; rename one")).into());
        }
    }
    let mut record = csv::StringRecord::new();
    loop {
        row_bytes.set(0);
        let start = reader.position().line();
        let (line, found) = match reader.read_record(&mut record) {
            Ok(false) => return Ok(ControlFlow::Continue(())),
            Ok(true) => {
                let named = names.iter().zip(&record).filter(|(name, _)| !name.is_empty());
                let fields = named.map(|(name, cell)| (name.clone(), Value::from(cell))).collect();
                (record.position().map(csv::Position::line), Found::Record(fields))
            }
            Err(error) => {
                let reason = match error.kind() {
                    csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
                        "the row has {len} columns, the first row {expected_len}; quote what holds a separator"
                    ),
                    csv::ErrorKind::Utf8 { err, .. } => format!("no UTF-8 in column {}", err.field() + 1),
                    _ => return Err(table_failed(Row::Line(start), error)),
                };
                (error.position().map(csv::Position::line), Found::Bad(reason))
            }
        };
        if sink(Row::Line(line.unwrap_or(start)), found).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
}

fn table_failed(row: Row, error: csv::Error) -> Failed {
    let text = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(error) => Failed::Io(Some(row), error),
        _ => Broken::at(row, text).into(),
    }
}

// ---- arrays

fn decode_array(
    reader: impl Read,
    row_bytes: &Cell<u64>,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Failed> {
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let mut elements = 0;
    let mut stopped = false;
    let visitor = Elements { row_bytes, sink, elements: &mut elements, stopped: &mut stopped };
    let result = deserializer.deserialize_seq(visitor).and_then(|()| deserializer.end());
    match result {
        _ if stopped => Ok(ControlFlow::Break(())),
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) => {
            let row = Row::Element(elements + 1);
            let text = format!("no array of JSON objects: {error}");
            match error.classify() {
                serde_json::error::Category::Io => Err(Failed::Io(Some(row), io::Error::from(error))),
                serde_json::error::Category::Eof => {
                    Err(Broken::at(row, format!("{text}; the file is cut off")).into())
                }
                _ => {
                    Err(Broken::at(row, format!("{text}; for an object a line, set format to jsonl")).into())
                }
            }
        }
    }
}

/// Hands on each element as soon as it is complete.
struct Elements<'a, 'b> {
    row_bytes: &'a Cell<u64>,
    sink: &'a mut Sink<'b>,
    elements: &'a mut u64,
    stopped: &'a mut bool,
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        self.row_bytes.set(0);
        while let Some(value) = array.next_element::<Value>()? {
            *self.elements += 1;
            self.row_bytes.set(0);
            let found = match value {
                Value::Object(fields) => Found::Record(fields),
                _ => Found::Bad("the element is no object".into()),
            };
            if (self.sink)(Row::Element(*self.elements), found).is_break() {
                *self.stopped = true;
                return Err(serde::de::Error::custom("nobody wants more"));
            }
        }
        Ok(())
    }
}
