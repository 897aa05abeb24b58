//! What a dataset must remember between two batches, as bytes: a line that says what it is, a JSON header, the
//! examples as little-endian numbers, a checksum.

use std::io::{self, Read, Write};

use flate2::Crc;
use serde::{Deserialize, Serialize};

use super::Counters;
use crate::config::adapter::Template;
use crate::data::{Cursor, RecordStream};
use crate::engine::training::TrainSequence;
use crate::train::TrainJob;

/// The first bytes; the number changes with the format.
const MAGIC: &[u8] = b"gurukul training data 2\n";
/// Bytes of a header; counters and five reasons are far fewer.
const MAX_HEADER_BYTES: u64 = 1 << 24;

/// Reasons that are kept.
const MAX_REASONS: usize = 5;

/// Where a dataset stands, but for the examples that it holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    /// As decided at the first record.
    pub(super) template: Option<Template>,
    /// The epoch that is being read, from 0.
    pub(super) reading_epoch: u64,
    /// The epoch of the latest batch.
    pub(super) latest_epoch: u64,
    /// All epochs are through.
    pub(super) finished: bool,
    /// This epoch has no more records.
    pub(super) source_done: bool,
    /// Up to where the source is read.
    pub(super) cursor: Cursor,
    /// Examples taken from the source in this epoch, held-out ones included.
    pub(super) taken: u64,
    /// Examples handed out in this epoch.
    pub(super) given: u64,
    /// Training examples of an epoch, once known.
    pub(super) exact: Option<u64>,
    /// Words of the epoch's random numbers that are used.
    pub(super) random_words: u64,
    pub(super) counters: Counters,
}

impl Position {
    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        self.reading_epoch = epoch;
        self.source_done = false;
        self.cursor = Cursor::default();
        (self.taken, self.given) = (0, 0);
        let counters = &mut self.counters;
        (counters.records, counters.bad, counters.filtered) = (0, 0, 0);
        (counters.skipped, counters.truncated) = (0, 0);
    }

    /// Takes over the stream's counts.
    pub(super) fn note_rows(&mut self, stream: &RecordStream) {
        let rows = stream.rows();
        self.counters.records = rows.rows;
        self.counters.bad = rows.bad;
        self.counters.filtered = rows.filtered;
        // A stream that goes on at a cursor finds some of them again, and does not know the taker's earlier ones.
        for reason in &rows.reasons {
            if self.counters.reasons.len() < MAX_REASONS && !self.counters.reasons.contains(reason) {
                self.counters.reasons.push(reason.clone());
            }
        }
    }
}

/// Everything.
pub(super) struct State {
    pub(super) position: Position,
    pub(super) buffer: Vec<TrainSequence>,
    pub(super) held_out: Vec<TrainSequence>,
    pub(super) batch: Vec<TrainSequence>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Checksum of the job as JSON.
    job: u32,
    /// Numbers of examples: buffer, held out, batch.
    examples: [u64; 3],
    position: Position,
}

fn fingerprint(job: &TrainJob) -> Result<u32, serde_json::Error> {
    let mut crc = Crc::new();
    crc.update(&serde_json::to_vec(job)?);
    Ok(crc.sum())
}

pub(super) fn write(
    job: &TrainJob,
    position: &Position,
    examples: [&[TrainSequence]; 3],
    writer: &mut dyn Write,
) -> io::Result<()> {
    let header = Header {
        job: fingerprint(job)?,
        examples: examples.map(|list| list.len() as u64),
        position: position.clone(),
    };
    let header = serde_json::to_vec(&header)?;
    let mut crc = Crc::new();
    let mut put = |bytes: &[u8]| {
        crc.update(bytes);
        writer.write_all(bytes)
    };
    put(MAGIC)?;
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    let mut bytes = Vec::new();
    for example in examples.into_iter().flatten() {
        bytes.clear();
        bytes.extend((example.tokens.len() as u64).to_le_bytes());
        bytes.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(example.weights.iter().flat_map(|weight| weight.to_le_bytes()));
        put(&bytes)?;
    }
    let sum = crc.sum();
    writer.write_all(&sum.to_le_bytes())
}

/// Reads what [`write()`] wrote for the same job; the error says what is wrong and what to do.
pub(super) fn read(job: &TrainJob, reader: &mut dyn Read) -> Result<State, String> {
    let mut reader = Checked { inner: reader, crc: Crc::new() };
    if reader.bytes(MAGIC.len() as u64)? != MAGIC {
        return Err("is not of this program, or of another version of it".into());
    }
    let length = reader.number()?;
    if length > MAX_HEADER_BYTES {
        return Err(damaged());
    }
    let header: Header = serde_json::from_slice(&reader.bytes(length)?).map_err(|_| damaged())?;
    let mut lists = [Vec::new(), Vec::new(), Vec::new()];
    for (list, &examples) in lists.iter_mut().zip(&header.examples) {
        for _ in 0..examples {
            list.push(reader.example()?);
        }
    }
    let sum = reader.crc.sum();
    if reader.bytes(4)? != sum.to_le_bytes() {
        return Err(damaged());
    }
    if fingerprint(job).ok() != Some(header.job) {
        return Err("is of another job, or of this one with other settings; start anew".into());
    }
    let [buffer, held_out, batch] = lists;
    Ok(State { position: header.position, buffer, held_out, batch })
}

fn damaged() -> String {
    "is damaged; continue from an older checkpoint or start anew".into()
}

struct Checked<'a> {
    inner: &'a mut dyn Read,
    crc: Crc,
}

impl Checked<'_> {
    /// Exactly so many bytes. A length that is damaged takes no more memory than there are bytes.
    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let read = (&mut *self.inner).take(length).read_to_end(&mut bytes);
        let read = read.map_err(|error| format!("cannot be read: {error}"))?;
        if read as u64 != length {
            return Err(damaged());
        }
        self.crc.update(&bytes);
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, String> {
        let bytes = self.bytes(8)?.try_into().map_err(|_| damaged())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn example(&mut self) -> Result<TrainSequence, String> {
        let length = self.number()?.checked_mul(4).ok_or_else(damaged)?;
        let (tokens, weights) = (self.bytes(length)?, self.bytes(length)?);
        let words = |bytes: Vec<u8>| -> Vec<[u8; 4]> { bytes.as_chunks::<4>().0.to_vec() };
        let tokens = words(tokens).into_iter().map(u32::from_le_bytes).collect();
        Ok(TrainSequence::new(tokens, words(weights).into_iter().map(f32::from_le_bytes).collect()))
    }
}
