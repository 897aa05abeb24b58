//! Rows that are the elements of one JSON array. Finds where each ends without a parser, so that an element can be
//! bad without the next ones being lost, and reading can go on behind any of them.

use std::ops::ControlFlow;

use super::bytes::{TooLong, Window};
use super::lines::no_object;
use super::{Broken, Found, MAX_ROW_BYTES, Sink};
use crate::data::Row;
use crate::data::cursor::Spot;

pub(super) fn decode(
    window: &mut Window,
    mut spot: Spot,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    let mut is_first = spot.row == 1;
    if is_first {
        match next_character(window, spot.row)? {
            None => return Ok(ControlFlow::Continue(())),
            Some(b'[') => window.consume(1),
            Some(_) => {
                return Err(broken(spot.row, "expected [; for an object a line, set format to jsonl"));
            }
        }
    }
    loop {
        let row = Row::Element(spot.row);
        match next_character(window, spot.row)? {
            Some(b']') => {
                window.consume(1);
                return match next_character(window, spot.row)? {
                    None => Ok(ControlFlow::Continue(())),
                    Some(_) => Err(broken(
                        spot.row,
                        "trailing characters; for an object a line, set format to jsonl",
                    )),
                };
            }
            Some(b',') if !is_first => window.consume(1),
            Some(_) if is_first => {}
            Some(_) => return Err(broken(spot.row, "expected , or ] behind an element")),
            None => return Err(cut_off(spot.row)),
        }
        is_first = false;
        match next_character(window, spot.row)? {
            Some(b']' | b'}' | b',') => return Err(broken(spot.row, "expected a value")),
            Some(_) => {}
            None => return Err(cut_off(spot.row)),
        }
        let length = element(window, row)?.ok_or_else(|| cut_off(spot.row))?;
        let element = &window.data()[..length];
        let found = match serde_json::from_slice(element) {
            Ok(fields) => Found::Record(fields),
            Err(_) if element[0] != b'{' => Found::Bad("the element is no object".into()),
            Err(error) => Found::Bad(no_object(&error)),
        };
        window.consume(length);
        let offset = window.offset();
        spot = Spot { offset, row: spot.row + 1, point: window.point_before(offset) };
        if sink(row, found, spot.clone()).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
}

fn next_character(window: &mut Window, row: u64) -> Result<Option<u8>, Broken> {
    window.first_character().map_err(|error| Broken::io(Some(Row::Element(row)), &error))
}

fn broken(row: u64, why: &str) -> Broken {
    Broken::at(Row::Element(row), format!("no array of JSON objects: {why}"))
}

fn cut_off(row: u64) -> Broken {
    broken(row, "EOF inside the array; the file is cut off")
}

/// Bytes of the element that the window begins with; `None` where the file ends before it does. What is inside is
/// left to a parser.
fn element(window: &mut Window, row: Row) -> Result<Option<usize>, Broken> {
    const MOST: usize = MAX_ROW_BYTES as usize;
    let (mut at, mut depth) = (0, 0_u64);
    let mut is_inside_text = false;
    let mut is_escaped = false;
    loop {
        let data = window.data();
        let data = &data[..data.len().min(MOST)];
        while let Some(&byte) = data.get(at) {
            if is_inside_text {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' => is_escaped = true,
                    b'"' => is_inside_text = false,
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => is_inside_text = true,
                    b'{' | b'[' => depth += 1,
                    // The array's own end, behind a number or a word.
                    b']' | b'}' | b',' if depth == 0 => return Ok(Some(at)),
                    b']' | b'}' => {
                        depth -= 1;
                        if depth == 0 {
                            return Ok(Some(at + 1));
                        }
                    }
                    _ => {}
                }
            }
            at += 1;
        }
        if at == MOST {
            return Err(Broken::at(row, TooLong.to_string()));
        }
        if !window.more().map_err(|error| Broken::io(Some(row), &error))? {
            return Ok(None);
        }
    }
}
