//! Gzip as a reader that can begin in the middle: members one after another, and at block boundaries the state that
//! going on there needs (as zlib's `zran` keeps it). The inflater is miniz_oxide's.

use std::io::{self, Read};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
};
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress};
use serde::{Deserialize, Serialize};

use super::bytes::{Input, Point, Points};

/// Bytes that a match can reach back.
const REACH: usize = 32 << 10;
/// The ring that is decompressed into; a power of two, as the inflater wants it.
const RING: usize = 256 << 10;
/// Bytes of the file at hand.
const INPUT: usize = 64 << 10;

/// What a point in the middle of a member keeps.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::data) struct Inside {
    /// Bits of the byte before the point that belong behind it: how many, and which.
    bits: u8,
    bit_buffer: u8,
    /// Of the member's bytes before the point: checksum and number.
    crc: u32,
    bytes: u64,
    /// The last of them, as far as a match reaches.
    #[serde(with = "packed")]
    window: Vec<u8>,
}

enum Phase {
    /// Before a member's header.
    Header,
    /// Inside its blocks.
    Blocks,
    /// Behind them.
    Trailer,
    /// Nothing but padding is left.
    Padding,
}

/// A gzip file, decompressed.
pub(super) struct Gunzip<'r> {
    pub(super) input: Input<'r>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    phase: Phase,
    inflater: Box<DecompressorOxide>,
    ring: Vec<u8>,
    /// What of the ring was decompressed and not handed out: from here
    ready: usize,
    /// to here, where decompressing goes on.
    filled: usize,
    /// Decompressed bytes of the whole file.
    output: u64,
    /// Checksum and number of those of this member.
    crc: crc32fast::Hasher,
    bytes: u64,
    pub(super) points: Points,
}

impl<'r> Gunzip<'r> {
    /// From the file's start or from a point on.
    pub(super) fn new(point: Option<&Point>, input: Input<'r>) -> Self {
        let output = point.map_or(0, |point| point.output);
        let mut this = Self {
            input,
            buffer: vec![0; INPUT],
            start: 0,
            end: 0,
            phase: Phase::Header,
            inflater: Box::default(),
            ring: vec![0; RING],
            ready: 0,
            filled: 0,
            output,
            crc: crc32fast::Hasher::new(),
            bytes: 0,
            points: Points::after(output),
        };
        if let Some(inside) = point.and_then(|point| point.inside.as_ref()) {
            let state = BlockBoundaryState {
                num_bits: inside.bits,
                bit_buf: inside.bit_buffer,
                ..BlockBoundaryState::default()
            };
            this.inflater = Box::new(DecompressorOxide::from_block_boundary_state(&state));
            // A window that a damaged checkpoint made too long would not fit.
            let window = &inside.window[inside.window.len().saturating_sub(REACH)..];
            this.ring[..window.len()].copy_from_slice(window);
            (this.ready, this.filled) = (window.len(), window.len());
            this.crc = crc32fast::Hasher::new_with_initial_len(inside.crc, inside.bytes);
            this.bytes = inside.bytes;
            this.phase = Phase::Blocks;
        }
        this
    }

    /// Byte of the file that comes next.
    fn at(&self) -> u64 {
        self.input.at - (self.end - self.start) as u64
    }

    /// Sees to it that a byte is at hand; false at the file's end.
    fn fill(&mut self) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, self.input.read(&mut self.buffer)?);
        }
        Ok(self.start < self.end)
    }

    fn byte(&mut self) -> io::Result<u8> {
        if !self.fill()? {
            return Err(self.cut_off());
        }
        self.start += 1;
        Ok(self.buffer[self.start - 1])
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.byte()?;
        }
        Ok(bytes)
    }

    fn cut_off(&self) -> io::Error {
        io::Error::other(format!(
            "the gzip data is cut off: it ends at byte {}, in the middle; bring the whole file",
            self.at()
        ))
    }

    fn damaged(&self, why: &str) -> io::Error {
        io::Error::other(format!(
            "the gzip data is damaged near byte {} ({why}); bring the file again",
            self.at()
        ))
    }

    /// Reads a member's header (RFC 1952); what it tells of the original file is of no use here.
    fn header(&mut self) -> io::Result<()> {
        let [id1, id2, method, flags, ..] = self.bytes::<10>()?;
        if [id1, id2, method] != [0x1f, 0x8b, 8] {
            return Err(self.damaged("no header of a member"));
        }
        if flags & 0x04 != 0 {
            let length = u16::from_le_bytes(self.bytes()?);
            for _ in 0..length {
                self.byte()?;
            }
        }
        for flag in [0x08, 0x10] {
            while flags & flag != 0 && self.byte()? != 0 {}
        }
        if flags & 0x02 != 0 {
            self.bytes::<2>()?;
        }
        self.inflater.init();
        self.crc = crc32fast::Hasher::new();
        self.bytes = 0;
        self.phase = Phase::Blocks;
        Ok(())
    }

    /// Reads what follows a member's blocks, and finds out whether another one comes.
    fn trailer(&mut self) -> io::Result<()> {
        let crc = u32::from_le_bytes(self.bytes()?);
        let length = u32::from_le_bytes(self.bytes()?);
        if crc != self.crc.clone().finalize() {
            return Err(self.damaged("its checksum is another"));
        }
        // The format keeps the length's lower 32 bits.
        if length != self.bytes as u32 {
            return Err(self.damaged("its length is another"));
        }
        let is_padding = self.fill()? && self.buffer[self.start] == 0;
        self.phase = if is_padding { Phase::Padding } else { Phase::Header };
        Ok(())
    }

    /// Decompresses some more into the ring, all of which was handed out.
    fn inflate(&mut self) -> io::Result<()> {
        if self.filled == RING {
            (self.ready, self.filled) = (0, 0);
        }
        let is_last = !self.fill()?;
        let mut flags = TINFL_FLAG_IGNORE_ADLER32 | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        if !is_last {
            flags |= TINFL_FLAG_HAS_MORE_INPUT;
        }
        let input = &self.buffer[self.start..self.end];
        let (status, read, written) =
            decompress(&mut self.inflater, input, &mut self.ring, self.filled, flags);
        self.start += read;
        let fresh = &self.ring[self.filled..self.filled + written];
        self.crc.update(fresh);
        self.filled += written;
        self.bytes += written as u64;
        self.output += written as u64;
        match status {
            TINFLStatus::Done => {
                self.phase = Phase::Trailer;
                Ok(())
            }
            TINFLStatus::BlockBoundary => {
                if self.points.is_due(self.output) {
                    self.note_point();
                }
                Ok(())
            }
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => Ok(()),
            // What precedes the fault is handed out first.
            _ if written > 0 => Ok(()),
            _ if is_last => Err(self.cut_off()),
            _ => Err(self.damaged("no valid block")),
        }
    }

    /// Between two blocks.
    fn note_point(&mut self) {
        let Some(state) = self.inflater.block_boundary_state() else { return };
        let mut window = Vec::with_capacity(REACH);
        let wanted = REACH.min(usize::try_from(self.bytes).unwrap_or(REACH));
        // The ring's end precedes its start. After going on at a point, it holds no more than that point's window.
        let before = wanted.saturating_sub(self.filled);
        window.extend_from_slice(&self.ring[RING - before..]);
        window.extend_from_slice(&self.ring[self.filled - (wanted - before)..self.filled]);
        let inside = Inside {
            bits: state.num_bits,
            bit_buffer: state.bit_buf,
            crc: self.crc.clone().finalize(),
            bytes: self.bytes,
            window,
        };
        self.points.note(Point { input: self.at(), output: self.output, inside: Some(inside) });
    }
}

impl Read for Gunzip<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.ready == self.filled && !buffer.is_empty() {
            match self.phase {
                Phase::Header => {
                    // A file of several members ends behind one of them.
                    if !self.fill()? {
                        return Ok(0);
                    }
                    if self.points.is_due(self.output) {
                        self.points.note(Point { input: self.at(), output: self.output, inside: None });
                    }
                    self.header()?;
                }
                Phase::Blocks => self.inflate()?,
                Phase::Trailer => self.trailer()?,
                Phase::Padding => {
                    if !self.fill()? {
                        return Ok(0);
                    }
                    if self.byte()? != 0 {
                        return Err(self.damaged("something follows its end"));
                    }
                }
            }
        }
        let n = buffer.len().min(self.filled - self.ready);
        buffer[..n].copy_from_slice(&self.ring[self.ready..self.ready + n]);
        self.ready += n;
        Ok(n)
    }
}

/// A window as text: compressed, since it is the text that was learnt from, in hexadecimal digits.
mod packed {
    use flate2::Compression;
    use flate2::read::DeflateDecoder;
    use flate2::write::DeflateEncoder;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};
    use std::io::{Read as _, Write as _};

    pub(super) fn serialize<S: Serializer>(window: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        let packed = encoder.write_all(window).and_then(|()| encoder.finish()).map_err(S::Error::custom)?;
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
        let text: String = packed.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let value = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        let packed: Option<Vec<u8>> =
            pairs.iter().map(|&[high, low]| Some(value(high)? << 4 | value(low)?)).collect();
        let packed =
            packed.filter(|_| rest.is_empty()).ok_or_else(|| D::Error::custom("no window of gzip data"))?;
        let mut window = Vec::new();
        let most = super::REACH as u64;
        DeflateDecoder::new(packed.as_slice())
            .take(most)
            .read_to_end(&mut window)
            .map_err(D::Error::custom)?;
        Ok(window)
    }
}
