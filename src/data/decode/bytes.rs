//! The bytes of a file as they were before compression, in a window that slides over them, with the points at which
//! decompressing can begin in the middle. Knows nothing of rows.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zstd::stream::raw::{Decoder as RawZstd, InBuffer, Operation as _, OutBuffer};

use super::MAX_ROW_BYTES;
use super::gzip::{Gunzip, Inside};

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::data) enum Compression {
    /// Not at all.
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By a file's first bytes.
    pub(super) fn of(magic: &[u8]) -> Self {
        // A frame that is to be skipped may precede zstd's own.
        let skippable = magic.len() == 4 && magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18];
        match magic {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            _ if skippable => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// A place at which decompressing can begin.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::data) struct Point {
    /// Byte of the file.
    pub(in crate::data) input: u64,
    /// Byte of the decompressed file.
    pub(in crate::data) output: u64,
    /// What a gzip member needs when it is entered in the middle; `None` at the start of a member or frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) inside: Option<Inside>,
}

/// Decompressed bytes between two points, about. More points, and going on in the middle reads less again; each
/// takes the 32 KiB of a window while it is kept.
const EVERY: u64 = 1 << 20;

/// Points in their order. They depend on the file alone, not on where its reading began, so that a reading which was
/// interrupted gives the same cursors as one that was not.
#[derive(Default)]
pub(super) struct Points {
    next_at: u64,
    found: VecDeque<Arc<Point>>,
}

impl Points {
    /// After the point that reading began at.
    pub(super) fn after(output: u64) -> Self {
        Self { next_at: (output / EVERY + 1) * EVERY, found: VecDeque::new() }
    }

    pub(super) fn is_due(&self, output: u64) -> bool {
        output >= self.next_at.max(EVERY)
    }

    pub(super) fn note(&mut self, point: Point) {
        self.next_at = (point.output / EVERY + 1) * EVERY;
        self.found.push_back(Arc::new(point));
    }
}

/// Reads, again when a signal came in between.
pub(super) fn read_some(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// A file's bytes, counted.
pub(super) struct Input<'r> {
    reader: Box<dyn Read + Send + 'r>,
    /// Byte of the file that comes next.
    pub(super) at: u64,
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = read_some(&mut self.reader, buffer)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// A file's bytes, decompressed.
pub(super) enum Unpacked<'r> {
    Plain(Input<'r>),
    Gzip(Box<Gunzip<'r>>),
    Zstd(Box<Unzstd<'r>>),
}

impl<'r> Unpacked<'r> {
    pub(super) fn begin(compression: Compression, reader: impl Read + Send + 'r) -> Self {
        Self::new(compression, None, Input { reader: Box::new(reader), at: 0 })
    }

    /// From a point on; without one, an uncompressed file from wherever the reader is.
    pub(super) fn resume(
        compression: Compression,
        point: Option<&Point>,
        offset: u64,
        reader: impl Read + Send + 'r,
    ) -> Self {
        Self::new(compression, point, Input { reader: Box::new(reader), at: offset })
    }

    fn new(compression: Compression, point: Option<&Point>, input: Input<'r>) -> Self {
        match compression {
            Compression::None => Self::Plain(input),
            Compression::Gzip => Self::Gzip(Box::new(Gunzip::new(point, input))),
            Compression::Zstd => Self::Zstd(Box::new(Unzstd::new(point, input))),
        }
    }

    fn points(&mut self) -> Option<&mut Points> {
        match self {
            Self::Plain(_) => None,
            Self::Gzip(gunzip) => Some(&mut gunzip.points),
            Self::Zstd(unzstd) => Some(&mut unzstd.points),
        }
    }

    /// Bytes of the file that were read.
    fn input(&self) -> u64 {
        match self {
            Self::Plain(input) => input.at,
            Self::Gzip(gunzip) => gunzip.input.at,
            Self::Zstd(unzstd) => unzstd.input.at,
        }
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buffer),
            Self::Gzip(gunzip) => gunzip.read(buffer),
            Self::Zstd(unzstd) => unzstd.read(buffer),
        }
    }
}

/// Frames of zstd, one after another. Each begins anew, so that a point needs no state.
pub(super) struct Unzstd<'r> {
    input: Input<'r>,
    decoder: io::Result<RawZstd<'static>>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Decompressed bytes so far.
    output: u64,
    /// Inside a frame.
    inside: bool,
    points: Points,
}

impl<'r> Unzstd<'r> {
    fn new(point: Option<&Point>, input: Input<'r>) -> Self {
        let output = point.map_or(0, |point| point.output);
        Self {
            input,
            decoder: RawZstd::new(),
            buffer: vec![0; 128 << 10],
            start: 0,
            end: 0,
            output,
            inside: false,
            points: Points::after(output),
        }
    }
}

impl Read for Unzstd<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let decoder = match &mut self.decoder {
            Ok(decoder) => decoder,
            Err(error) => return Err(io::Error::other(format!("zstd cannot be set up: {error}"))),
        };
        loop {
            if self.start == self.end {
                (self.start, self.end) = (0, self.input.read(&mut self.buffer)?);
                if self.end == 0 && !self.inside {
                    return Ok(0);
                }
            }
            let at = self.input.at - (self.end - self.start) as u64;
            if !self.inside && self.points.is_due(self.output) {
                self.points.note(Point { input: at, output: self.output, inside: None });
            }
            let mut input = InBuffer::around(&self.buffer[self.start..self.end]);
            let mut output = OutBuffer::around(&mut *buffer);
            let hint = decoder.run(&mut input, &mut output).map_err(|error| {
                io::Error::other(format!(
                    "the zstd data is damaged near byte {at} ({error}); bring the file again"
                ))
            })?;
            let (read, written) = (input.pos(), output.pos());
            self.start += read;
            self.output += written as u64;
            self.inside = hint != 0;
            if written > 0 || buffer.is_empty() {
                return Ok(written);
            }
            if self.end == 0 && self.inside {
                return Err(io::Error::other(format!(
                    "the zstd data is cut off: it ends at byte {at}, in the middle; bring the whole file"
                )));
            }
        }
    }
}

/// The part of the decompressed file that is at hand.
pub(super) struct Window<'r> {
    source: Unpacked<'r>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Byte of the decompressed file at `start`.
    offset: u64,
    ended: bool,
    /// What ended a look ahead; it is told when it is in the way.
    failed: Option<io::Error>,
    /// The latest point that precedes a row which was found.
    point: Option<Arc<Point>>,
    /// Bytes that were taken through [`Read`] since the row began, for readers that do not bound a row themselves.
    of_row: u64,
}

/// Bytes that are asked for at once.
const PIECE: usize = 128 << 10;

#[derive(Debug, thiserror::Error)]
#[error("one row has more than {} MB; is a quote or a bracket not closed?", MAX_ROW_BYTES >> 20)]
pub(super) struct TooLong;

impl<'r> Window<'r> {
    pub(super) fn new(source: Unpacked<'r>, offset: u64) -> Self {
        let buffer = vec![0; 2 * PIECE];
        Self { source, buffer, start: 0, end: 0, offset, ended: false, failed: None, point: None, of_row: 0 }
    }

    pub(super) fn keep(&mut self, point: Option<Arc<Point>>) {
        self.point = point;
    }

    /// Byte of the decompressed file that [`Window::data`] begins with.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        self.offset += bytes as u64;
    }

    /// Adds bytes to what is at hand; false at the end.
    pub(super) fn more(&mut self) -> io::Result<bool> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.ended {
            return Ok(false);
        }
        if self.buffer.len() - self.end < PIECE {
            let held = self.end - self.start;
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, held);
            // Grows with a long row and shrinks after it.
            let wanted = (2 * PIECE).max((held + PIECE).next_power_of_two());
            self.buffer.resize(wanted, 0);
            self.buffer.shrink_to(wanted);
        }
        let n = read_some(&mut self.source, &mut self.buffer[self.end..])?;
        self.end += n;
        self.ended = n == 0;
        Ok(n > 0)
    }

    /// Whether the window begins with a text, which stays to be read.
    pub(super) fn starts_with(&mut self, text: &[u8]) -> bool {
        while self.data().len() < text.len() {
            match self.more() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        self.data().starts_with(text)
    }

    /// The first byte that is no white space, which stays to be read. What precedes it is taken.
    pub(super) fn first_character(&mut self) -> io::Result<Option<u8>> {
        loop {
            let blank = self.data().iter().take_while(|b| b.is_ascii_whitespace()).count();
            self.consume(blank);
            if let Some(first) = self.data().first() {
                return Ok(Some(*first));
            }
            if !self.more()? {
                return Ok(None);
            }
        }
    }

    /// Takes everything before a byte of the decompressed file.
    pub(super) fn pass_to(&mut self, offset: u64) -> io::Result<()> {
        while self.offset < offset {
            let held = (self.data().len() as u64).min(offset - self.offset) as usize;
            self.consume(held);
            if self.offset < offset && !self.more()? {
                return Err(io::Error::other(format!(
                    "holds {} bytes where {offset} were read before: it was changed since; start anew",
                    self.offset
                )));
            }
        }
        Ok(())
    }

    /// The latest point that is not behind a byte of the decompressed file. Later calls ask for later bytes.
    pub(super) fn point_before(&mut self, offset: u64) -> Option<Arc<Point>> {
        if let Some(points) = self.source.points() {
            while let Some(point) = points.found.pop_front_if(|point| point.output <= offset) {
                self.point = Some(point);
            }
        }
        self.point.clone()
    }

    /// Bytes of the file that were read.
    pub(super) fn input(&self) -> u64 {
        self.source.input()
    }

    /// What is taken through [`Read`] from now on belongs to another row.
    pub(super) fn begin_row(&mut self) {
        self.of_row = 0;
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.of_row > MAX_ROW_BYTES {
            return Err(io::Error::other(TooLong));
        }
        if self.data().is_empty() && !self.more()? {
            return Ok(0);
        }
        let n = buffer.len().min(self.data().len());
        buffer[..n].copy_from_slice(&self.data()[..n]);
        self.consume(n);
        self.of_row += n as u64;
        Ok(n)
    }
}
