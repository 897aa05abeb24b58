//! Rows that are lines, or lines up to an empty one.

use std::io::{self, BufRead as _};
use std::ops::ControlFlow;

use serde_json::{Map, Value};

use super::bytes::Window;
use super::{Broken, Found, MAX_ROW_BYTES, Sink};
use crate::data::Row;
use crate::data::cursor::Spot;

/// A line of the window.
struct Line {
    /// Bytes from the window's start to behind the line's end.
    end: usize,
    /// More than a row may have; what is at hand of it is its beginning.
    too_long: bool,
}

/// The line that begins so many bytes into the window; `None` where nothing is left. `limit` bounds what may be at
/// hand.
fn line(window: &mut Window, from: usize, limit: u64) -> io::Result<Option<Line>> {
    let mut searched = from;
    loop {
        let mut rest = &window.data()[searched..];
        let read = rest.skip_until(b'\n')?;
        searched += read;
        let found = read > 0 && window.data()[searched - 1] == b'\n';
        if found || searched as u64 >= limit {
            return Ok(Some(Line { end: searched, too_long: searched as u64 > limit || !found }));
        }
        if !window.more()? {
            return Ok((searched > from).then_some(Line { end: searched, too_long: false }));
        }
    }
}

/// Takes everything up to and with the next end of a line.
fn pass_line(window: &mut Window) -> io::Result<()> {
    loop {
        let mut rest = window.data();
        let read = rest.skip_until(b'\n')?;
        let found = read > 0 && window.data()[read - 1] == b'\n';
        window.consume(read);
        if found || !window.more()? {
            return Ok(());
        }
    }
}

fn too_long(what: &str) -> Found {
    Found::Bad(format!("the {what} has more than {} MB", MAX_ROW_BYTES >> 20))
}

fn without_end(mut line: &[u8]) -> &[u8] {
    while let [rest @ .., b'\n' | b'\r'] = line {
        line = rest;
    }
    line
}

fn of_text(text: String) -> Found {
    Found::Record(Map::from_iter([("text".to_owned(), Value::from(text))]))
}

/// A record of each line's text; lines of white space are none.
pub(super) fn texts(window: &mut Window, spot: Spot, sink: &mut Sink) -> Result<ControlFlow<()>, Broken> {
    each(window, spot, sink, &mut |line| match std::str::from_utf8(line) {
        Ok(text) if text.trim().is_empty() => None,
        Ok(text) => Some(of_text(text.to_owned())),
        Err(error) => Some(no_utf8(&error, "line")),
    })
}

/// A record of each line's JSON object.
pub(super) fn objects(window: &mut Window, spot: Spot, sink: &mut Sink) -> Result<ControlFlow<()>, Broken> {
    each(window, spot, sink, &mut |line| {
        // The parser checks the encoding of what it takes, so that nothing is gone through twice.
        match serde_json::from_slice(line) {
            Ok(fields) => Some(Found::Record(fields)),
            Err(_) if line.trim_ascii().is_empty() => None,
            Err(error) => Some(match std::str::from_utf8(line) {
                Ok(text) if text.trim().is_empty() => return None,
                Ok(_) => Found::Bad(no_object(&error)),
                Err(error) => no_utf8(&error, "line"),
            }),
        }
    })
}

fn no_utf8(error: &std::str::Utf8Error, what: &str) -> Found {
    Found::Bad(format!("no UTF-8 at byte {} of the {what}", error.valid_up_to() + 1))
}

pub(super) fn no_object(error: &serde_json::Error) -> String {
    // The row is named by its place in the file; serde's own count of lines would contradict it.
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text);
    match error.column() {
        0 => format!("no JSON object: {reason}"),
        column => format!("no JSON object: {reason}, column {column}"),
    }
}

fn each(
    window: &mut Window,
    mut spot: Spot,
    sink: &mut Sink,
    found: &mut dyn FnMut(&[u8]) -> Option<Found>,
) -> Result<ControlFlow<()>, Broken> {
    loop {
        let row = Row::Line(spot.row);
        let io_failed = |error: io::Error| Broken::io(Some(row), &error);
        let Some(line) = line(window, 0, MAX_ROW_BYTES).map_err(io_failed)? else {
            return Ok(ControlFlow::Continue(()));
        };
        let found = if line.too_long {
            pass_line(window).map_err(io_failed)?;
            Some(too_long("line"))
        } else {
            let found = found(without_end(&window.data()[..line.end]));
            window.consume(line.end);
            found
        };
        spot = next(window, spot.row + 1);
        if let Some(found) = found
            && sink(row, found, spot.clone()).is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
    }
}

/// The spot that the window stands at.
fn next(window: &mut Window, row: u64) -> Spot {
    let offset = window.offset();
    Spot { offset, row, point: window.point_before(offset) }
}

/// A record of each paragraph's text; it ends at a line of white space.
pub(super) fn paragraphs(
    window: &mut Window,
    mut spot: Spot,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    loop {
        let row = Row::Line(spot.row);
        let io_failed = |error: io::Error| Broken::io(Some(row), &error);
        // Bytes of the paragraph, and with the empty line behind it.
        let (mut text, mut whole) = (0, 0);
        let (mut lines, mut is_long) = (0, false);
        while let Some(line) = line(window, text, MAX_ROW_BYTES).map_err(io_failed)? {
            lines += 1;
            if line.too_long {
                is_long = true;
                window.consume(text);
                pass_line(window).map_err(io_failed)?;
                (text, whole) = (0, 0);
                continue;
            }
            whole = line.end;
            if window.data()[text..whole].trim_ascii().is_empty() {
                break;
            }
            text = whole;
        }
        if lines == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        let found = match text {
            _ if is_long => Some(too_long("paragraph")),
            0 => None,
            _ => Some(paragraph(without_end(&window.data()[..text]))),
        };
        window.consume(whole);
        spot = next(window, spot.row + lines);
        if let Some(found) = found
            && sink(row, found, spot.clone()).is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
    }
}

fn paragraph(text: &[u8]) -> Found {
    match std::str::from_utf8(text) {
        Ok(text) if text.contains('\r') => of_text(text.replace("\r\n", "\n")),
        Ok(text) => of_text(text.to_owned()),
        Err(error) => no_utf8(&error, "paragraph"),
    }
}
