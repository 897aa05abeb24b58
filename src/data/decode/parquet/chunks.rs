//! A Parquet file as its reader wants it: any bytes at any time. What it asks for runs along each column, so each
//! column has a piece of its own at hand, which grows while it is read on.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{ChunkReader, Length};
use tokio_util::bytes::Bytes;

use super::MAGIC;
use crate::data::object::Object;

/// Bytes of a column's first piece: enough to begin soon.
const FIRST_PIECE: u64 = 256 << 10;
/// Bytes of its largest one, with memory for it.
const LARGEST_PIECE: u64 = 8 << 20;
/// Bytes at the end that are read at once, because the footer is there.
const TAIL: u64 = 64 << 10;

/// Cheap to clone; all clones read the same file.
#[derive(Clone)]
pub(super) struct Chunks {
    length: u64,
    state: Arc<Mutex<State>>,
}

struct State {
    object: Box<dyn Object>,
    memory: u64,
    tail: Option<Piece>,
    /// What is being read through, in order, each with the piece at hand.
    columns: Vec<Column>,
    failure: Option<String>,
}

struct Column {
    range: Range<u64>,
    piece: Option<Piece>,
    next_piece: u64,
}

struct Piece {
    start: u64,
    bytes: Bytes,
}

impl Piece {
    /// What it has from a place on, at most so many bytes.
    fn part(&self, start: u64, length: u64) -> Option<Bytes> {
        let from = start.checked_sub(self.start)?;
        let have = self.bytes.len() as u64;
        (from < have).then(|| self.bytes.slice(from as usize..from.saturating_add(length).min(have) as usize))
    }
}

impl Chunks {
    pub(super) fn new(object: Box<dyn Object>, length: u64, memory: u64) -> Self {
        let state = State { object, memory, tail: None, columns: Vec::new(), failure: None };
        Self { length, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the file could not be read, in words for the user, where that is what failed.
    pub(super) fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Whether the file begins and ends as Parquet does.
    pub(super) fn check_ends(&self) -> std::result::Result<(), String> {
        let magic = MAGIC.len() as u64;
        let what = if self.length < 3 * magic {
            "is too short to be one"
        } else if *self.read(self.length - magic, magic)? == *MAGIC {
            return Ok(());
        } else if *self.read(0, magic)? == *MAGIC {
            "does not end as one: it is cut off, or its end is damaged"
        } else {
            "neither begins nor ends as one"
        };
        Err(format!("is no whole Parquet file; it {what}; bring the file again"))
    }

    /// What will be read next, each range from its start to its end.
    pub(super) fn expect(&self, ranges: Vec<Range<u64>>) -> std::result::Result<(), String> {
        if let Some(range) = ranges.iter().find(|range| range.end > self.length) {
            return Err(format!(
                "a column ends at byte {} of a file that has {} bytes",
                range.end, self.length
            ));
        }
        let column = |range| Column { range, piece: None, next_piece: FIRST_PIECE };
        self.state().columns = ranges.into_iter().map(column).collect();
        Ok(())
    }

    /// Exactly these bytes.
    fn read(&self, start: u64, length: u64) -> std::result::Result<Bytes, String> {
        let end = start.checked_add(length).filter(|end| *end <= self.length);
        let end = end.ok_or_else(|| {
            format!("bytes {start} to {} are asked for, of {}", start.saturating_add(length), self.length)
        })?;
        let mut state = self.state();
        let state = &mut *state;
        if let Some(part) = state.at_hand(start, length) {
            return Ok(part);
        }
        if start + TAIL >= self.length && state.columns.is_empty() {
            let from = self.length.saturating_sub(TAIL);
            let bytes = state.fetch(from..self.length)?;
            state.tail = Some(Piece { start: from, bytes });
        } else if let Some(at) = state.columns.iter().position(|column| column.range.contains(&start)) {
            let largest = (state.memory / 2 / state.columns.len() as u64).clamp(FIRST_PIECE, LARGEST_PIECE);
            let column = &state.columns[at];
            let piece_end = (start + column.next_piece.max(length)).min(column.range.end.max(end));
            let next_piece = (2 * column.next_piece).min(largest);
            let bytes = state.fetch(start..piece_end)?;
            let column = &mut state.columns[at];
            column.piece = Some(Piece { start, bytes });
            column.next_piece = next_piece;
        } else {
            return state.fetch(start..end);
        }
        state.at_hand(start, length).ok_or_else(|| "a piece has fewer bytes than it should".to_owned())
    }

    /// Some of the bytes from a place on, without more being read than has to be.
    fn read_some(&self, start: u64) -> std::result::Result<Bytes, String> {
        let part = self.state().at_hand_some(start);
        match part {
            Some(part) => Ok(part),
            None => self.read(start, (self.length - start).min(1)),
        }
    }
}

impl State {
    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.columns.iter().filter_map(|column| column.piece.as_ref()).chain(&self.tail)
    }

    fn at_hand(&self, start: u64, length: u64) -> Option<Bytes> {
        self.pieces().find_map(|piece| piece.part(start, length).filter(|part| part.len() as u64 == length))
    }

    fn at_hand_some(&self, start: u64) -> Option<Bytes> {
        // A page's header has some dozens of bytes; more are rarely asked for.
        self.pieces().find_map(|piece| piece.part(start, 1 << 10))
    }

    fn fetch(&mut self, range: Range<u64>) -> std::result::Result<Bytes, String> {
        let wanted = range.end - range.start;
        let read = self.object.read_range(range).and_then(|bytes| match bytes.len() as u64 == wanted {
            true => Ok(bytes),
            false => Err(format!("{} bytes came where {wanted} were asked for", bytes.len())),
        });
        if let Err(reason) = &read {
            self.failure = Some(reason.clone());
        }
        read
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Chunks {
    type T = From;

    fn get_read(&self, start: u64) -> Result<From> {
        Ok(From { chunks: self.clone(), at: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.read(start, length as u64).map_err(ParquetError::General)
    }
}

/// The bytes from a place on; nothing is asked for before it is read.
pub(super) struct From {
    chunks: Chunks,
    at: u64,
}

impl Read for From {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.at >= self.chunks.length {
            return Ok(0);
        }
        let part = self.chunks.read_some(self.at).map_err(io::Error::other)?;
        let n = part.len().min(buffer.len());
        buffer[..n].copy_from_slice(&part[..n]);
        self.at += n as u64;
        Ok(n)
    }
}
