//! Rows that are those of a table with a first row of names.

use std::io::{self, Chain, Read};
use std::ops::ControlFlow;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::Value;

use super::bytes::{TooLong, Window};
use super::{Broken, Found, MAX_ROW_BYTES, Sink};
use crate::data::cursor::Spot;
use crate::data::{Format, Row};

/// What stands between the columns; `None` where the format is no table.
pub(super) fn delimiter(format: Format) -> Option<u8> {
    match format {
        Format::Csv => Some(b','),
        Format::Tsv => Some(b'\t'),
        _ => None,
    }
}

/// An empty line stands before the bytes: the reader would take a byte order mark at its beginning away, which in the
/// middle of a file is text.
type Lines<R> = Chain<&'static [u8], R>;

fn reader<R: Read>(delimiter: u8, bytes: R) -> Reader<Lines<R>> {
    let mut builder = ReaderBuilder::new();
    // The first row has the names' length only where reading begins at the start, so rows are measured here.
    builder.delimiter(delimiter).quoting(delimiter == b',').has_headers(false).flexible(true);
    builder.buffer_capacity(64 << 10).from_reader(b"\n".chain(bytes))
}

/// Reads a window and takes nothing from it.
struct Ahead<'w, 'r> {
    window: &'w mut Window<'r>,
    at: usize,
}

impl Read for Ahead<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at as u64 > MAX_ROW_BYTES {
            return Err(io::Error::other(TooLong));
        }
        if self.at == self.window.data().len() && !self.window.more()? {
            return Ok(0);
        }
        let n = (&self.window.data()[self.at..]).read(buffer)?;
        self.at += n;
        Ok(n)
    }
}

/// The names of the first row, which is taken, and the number of the line behind it.
pub(super) fn columns(delimiter: u8, window: &mut Window) -> Result<(Vec<String>, u64), Broken> {
    let first = Row::Line(1);
    let mut reader = reader(delimiter, Ahead { window, at: 0 });
    let mut record = StringRecord::new();
    let any = reader.read_record(&mut record).map_err(|error| failed(first, &error))?;
    let position = reader.position().clone();
    window.consume(position.byte() as usize - 1);
    let names: Vec<String> = record.iter().map(|name| name.trim().to_owned()).collect();
    // An empty file has no names and no rows.
    if any && names.iter().all(String::is_empty) {
        return Err(Broken::at(first, "the first row must hold the names of the columns"));
    }
    for (at, name) in names.iter().enumerate() {
        if !name.is_empty() && names[..at].contains(name) {
            return Err(Broken::at(first, format!("two columns are called {name}; rename one")));
        }
    }
    Ok((names, position.line() - 1))
}

pub(super) fn decode(
    delimiter: u8,
    columns: &[String],
    window: &mut Window,
    spot: Spot,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    window.begin_row();
    let mut reader = reader(delimiter, window);
    let mut record = StringRecord::new();
    loop {
        // The reader counts from where it began, and the empty line as well.
        let row = Row::Line(spot.row + reader.position().line().max(2) - 2);
        let found = match reader.read_record(&mut record) {
            Ok(false) => return Ok(ControlFlow::Continue(())),
            Ok(true) if record.len() != columns.len() => Found::Bad(format!(
                "the row has {} columns, the first row {}; quote what holds a separator",
                record.len(),
                columns.len()
            )),
            Ok(true) => {
                let named = columns.iter().zip(&record).filter(|(name, _)| !name.is_empty());
                Found::Record(named.map(|(name, cell)| (name.clone(), Value::from(cell))).collect())
            }
            Err(error) => match error.kind() {
                ErrorKind::Utf8 { err, .. } => Found::Bad(format!("no UTF-8 in column {}", err.field() + 1)),
                _ => return Err(failed(row, &error)),
            },
        };
        let (offset, line) = (reader.position().byte(), reader.position().line());
        let offset = spot.offset + offset - 1;
        let window = reader.get_mut().get_mut().1;
        window.begin_row();
        let next = Spot { offset, row: spot.row + line - 2, point: window.point_before(offset) };
        if sink(row, found, next).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
}

fn failed(row: Row, error: &csv::Error) -> Broken {
    match error.kind() {
        ErrorKind::Io(error) => Broken::io(Some(row), error),
        _ => Broken::at(row, error.to_string()),
    }
}
