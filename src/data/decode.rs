//! Bytes to rows: compression, lines, tables and JSON arrays, one row at a time and never more than one bounded row
//! in memory; after each row it is known where the next begins. Knows nothing of where the bytes come from. Parquet,
//! which is read by ranges, is in [`parquet`].

mod array;
mod bytes;
mod gzip;
mod lines;
pub(super) mod parquet;
mod table;

use std::io::{self, Read};
use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(super) use self::bytes::{Compression, Point};
use self::bytes::{Unpacked, Window};
use super::cursor::Spot;
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
    pub(super) fn of(message: impl Into<String>) -> Self {
        Self { row: None, message: message.into() }
    }

    pub(super) fn at(row: Row, message: impl Into<String>) -> Self {
        Self { row: Some(row), message: message.into() }
    }

    /// Of a reader, whose errors are in words already.
    fn io(row: Option<Row>, error: &io::Error) -> Self {
        Self { row, message: error.to_string() }
    }
}

/// Takes each row as it is found, with where the next one begins; breaking ends the decoding.
pub(super) type Sink<'a> = dyn FnMut(Row, Found, Spot) -> ControlFlow<()> + 'a;

/// How a file is written, as its beginning told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layout {
    pub(super) compression: Compression,
    /// Never `Auto`.
    pub(super) format: Format,
    /// Names of a table's columns; without a name a column is left out.
    pub(super) columns: Vec<String>,
}

/// What the beginning of a file turned out to be.
pub(super) enum Begun<'r> {
    /// Rows in their order.
    Rows(Decoder<'r>),
    /// A file that must be read by ranges.
    Parquet,
}

/// A file whose rows are about to be read.
pub(super) struct Decoder<'r> {
    layout: Layout,
    spot: Spot,
    window: Window<'r>,
}

impl<'r> Decoder<'r> {
    /// From a file's first byte on. `name` tells the format where `format` does not.
    pub(super) fn begin(
        format: Format,
        name: &str,
        mut reader: impl Read + Send + 'r,
    ) -> Result<Begun<'r>, Broken> {
        let failed = |error: io::Error| Broken::io(None, &error);
        let mut magic = Vec::new();
        reader.by_ref().take(4).read_to_end(&mut magic).map_err(failed)?;
        if magic == parquet::MAGIC && format == Format::Auto {
            return Ok(Begun::Parquet);
        }
        refuse_other_kinds(&magic)?;
        let compression = Compression::of(&magic);
        let whole = io::Cursor::new(magic).chain(reader);
        let mut window = Window::new(Unpacked::begin(compression, whole), 0);
        // A byte order mark is no part of the text.
        if window.starts_with(b"\xef\xbb\xbf") {
            window.consume(3);
        }
        let format = resolve(format, name, &mut window)?;
        let (columns, row) = match table::delimiter(format) {
            Some(delimiter) => table::columns(delimiter, &mut window)?,
            None => (Vec::new(), 1),
        };
        let spot = Spot { offset: window.offset(), row, point: None };
        Ok(Begun::Rows(Self { layout: Layout { compression, format, columns }, spot, window }))
    }

    /// From the spot on that an earlier reading stopped at. The reader's first byte is that of [`Spot::input`].
    pub(super) fn resume(layout: Layout, spot: Spot, reader: impl Read + Send + 'r) -> Result<Self, Broken> {
        let start = spot.output(layout.compression);
        let input = spot.input(layout.compression);
        let unpacked = Unpacked::resume(layout.compression, spot.point.as_deref(), input, reader);
        let mut window = Window::new(unpacked, start);
        window.keep(spot.point.clone());
        window.pass_to(spot.offset).map_err(|error| Broken::io(None, &error))?;
        Ok(Self { layout, spot, window })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Gives every row that is left; how many bytes were read to get there, where all were.
    pub(super) fn run(self, sink: &mut Sink) -> Result<ControlFlow<(), u64>, Broken> {
        let Self { layout, spot, mut window } = self;
        let flow = match layout.format {
            Format::Json => array::decode(&mut window, spot, sink)?,
            Format::Txt => lines::texts(&mut window, spot, sink)?,
            Format::Paragraphs => lines::paragraphs(&mut window, spot, sink)?,
            format => match table::delimiter(format) {
                Some(delimiter) => table::decode(delimiter, &layout.columns, &mut window, spot, sink)?,
                None => lines::objects(&mut window, spot, sink)?,
            },
        };
        Ok(match flow {
            ControlFlow::Break(()) => ControlFlow::Break(()),
            ControlFlow::Continue(()) => ControlFlow::Continue(window.input()),
        })
    }
}

/// Other compressions and formats would give one bad row after another; they are better named.
fn refuse_other_kinds(magic: &[u8]) -> Result<(), Broken> {
    let kinds: [(&[u8], &str); 6] = [
        (b"BZh", "bzip2 data; decompress it, or use gzip or zstd"),
        (&[0xfd, b'7', b'z', b'X'], "xz data; decompress it, or use gzip or zstd"),
        (b"PK\x03\x04", "a zip archive; unpack it, or use gzip or zstd"),
        (parquet::MAGIC, "a Parquet file; set format to parquet or auto"),
        (&[0xff, 0xfe], "UTF-16 text; save it as UTF-8"),
        (&[0xfe, 0xff], "UTF-16 text; save it as UTF-8"),
    ];
    match kinds.iter().find(|(start, _)| magic.starts_with(start)) {
        Some((_, what)) => Err(Broken::of(format!("this is {what}"))),
        None => Ok(()),
    }
}

/// What `auto` means for this name and, where the name does not say, this beginning.
fn resolve(format: Format, name: &str, window: &mut Window) -> Result<Format, Broken> {
    if format != Format::Auto {
        return Ok(format);
    }
    let by_name = format_of_name(name);
    // Many files that are called .json hold an object a line.
    if let Some(format) = by_name.filter(|format| *format != Format::Json) {
        return Ok(format);
    }
    let first = window.first_character().map_err(|error| Broken::io(None, &error))?;
    match (first, by_name) {
        (Some(b'['), _) => Ok(Format::Json),
        (Some(b'{'), _) => Ok(Format::Jsonl),
        // There is nothing to read, whatever it should be.
        (None, _) => Ok(Format::Txt),
        (Some(_), Some(_)) => {
            Err(Broken::of("is no JSON: it begins neither with [ nor with {; correct it or set format"))
        }
        (Some(_), None) => Err(Broken::of(
            "its name does not tell how it is written; set format to jsonl, json, csv, tsv, txt, paragraphs or \
             parquet",
        )),
    }
}

/// Extensions of compressed files.
const PACKED: [&str; 3] = [".gz", ".zst", ".zstd"];

/// The format that a name stands for, by its extension before that of a compression.
pub(super) fn format_of_name(name: &str) -> Option<Format> {
    let name = name.to_ascii_lowercase();
    let name = PACKED.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    match name.rsplit(['/', '\\']).next().and_then(|file| file.rsplit_once('.'))?.1 {
        "jsonl" | "ndjson" | "jsonlines" => Some(Format::Jsonl),
        "json" => Some(Format::Json),
        "csv" => Some(Format::Csv),
        "tsv" => Some(Format::Tsv),
        "txt" | "text" => Some(Format::Txt),
        "parquet" => Some(Format::Parquet),
        _ => None,
    }
}
