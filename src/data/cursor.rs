//! Where reading goes on: what was taken from a source so far, and where the next record stands. Kept in a job's
//! checkpoint, so that a resumed job reads on from there instead of from the start.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::decode::{Compression, Layout, Point};
use super::object::Stat;

/// What was taken from a stream so far, and where it goes on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// What became of the rows up to the latest record.
    pub counts: Counts,
    pub(super) at: At,
}

/// What became of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Rows that were read, of every kind.
    pub rows: u64,
    /// Of these, the records that were given.
    pub records: u64,
    /// Of the rows, those that could not be used, for the decoder or for the taker.
    pub bad: u64,
    /// Of the rows, records that the source's filter keeps out.
    pub filtered: u64,
    /// Of the rows, records that `skip` passes over.
    pub passed: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.records += other.records;
        self.bad += other.bad;
        self.filtered += other.filtered;
        self.passed += other.passed;
    }
}

/// Where a stream goes on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum At {
    /// At its beginning.
    #[default]
    Start,
    /// Inside a source of its own.
    Mark(Mark),
    /// Inside the sources of a mix: how often was drawn among them, which are exhausted, and each one's cursor.
    Mix { draws: u64, ended: Vec<bool>, parts: Vec<Cursor> },
    /// Inside the source that was chosen.
    Fallback { chosen: usize, part: Box<Cursor> },
}

/// Where the next record of a source stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark {
    /// What the source was pinned to, such as a commit.
    #[serde(with = "shared", default)]
    pub(super) pin: Arc<Option<String>>,
    pub(super) place: MarkPlace,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum MarkPlace {
    /// In a file that is read from its start to its end.
    Rows {
        #[serde(with = "shared")]
        file: Arc<FileMark>,
        #[serde(with = "shared")]
        layout: Arc<Layout>,
        spot: Spot,
    },
    /// In a Parquet file: the row group, and how many of its rows were read.
    Group {
        #[serde(with = "shared")]
        file: Arc<FileMark>,
        group: usize,
        row: u64,
    },
    /// In the page that the token names: how many of its rows were read.
    Page {
        #[serde(with = "shared")]
        token: Arc<Option<Value>>,
        row: u64,
    },
}

/// Which file a source was at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileMark {
    /// Its number among the source's files, from 0.
    pub(super) index: u64,
    pub(super) shown: String,
    pub(super) length: Option<u64>,
    pub(super) version: Option<String>,
}

impl FileMark {
    pub(super) fn new(index: u64, shown: &str, stat: Stat) -> Self {
        Self { index, shown: shown.to_owned(), length: stat.length, version: stat.version }
    }

    /// Why a file cannot be the one that was marked.
    pub(super) fn differs(&self, shown: &str, stat: &Stat) -> Option<String> {
        if self.shown != shown {
            return Some(format!(
                "{shown} stands where {} stood: the files were changed since; start anew",
                self.shown
            ));
        }
        let sizes = match (self.length, stat.length) {
            (Some(then), Some(now)) if then != now => format!(" (it has {now} bytes, it had {then})"),
            _ if self.version.is_some() && stat.version.is_some() && self.version != stat.version => {
                String::new()
            }
            _ => return None,
        };
        Some(format!("{shown} was changed since its first records were taken{sizes}; start anew"))
    }
}

/// Where a row begins in a file that is read from its start to its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spot {
    /// Byte of the decompressed file.
    pub(super) offset: u64,
    /// Line, or element of an array; from 1.
    pub(super) row: u64,
    /// Where decompressing can begin instead of at the file's start.
    #[serde(with = "shared_option", default, skip_serializing_if = "Option::is_none")]
    pub(super) point: Option<Arc<Point>>,
}

impl Spot {
    /// The byte of the file itself from which on it must be read.
    pub(super) fn input(&self, compression: Compression) -> u64 {
        match (compression, &self.point) {
            (Compression::None, _) => self.offset,
            (_, Some(point)) => point.input,
            (_, None) => 0,
        }
    }

    /// The byte of the decompressed file that the byte at [`Spot::input`] begins.
    pub(super) fn output(&self, compression: Compression) -> u64 {
        match (compression, &self.point) {
            (Compression::None, _) => self.offset,
            (_, Some(point)) => point.output,
            (_, None) => 0,
        }
    }
}

/// Values that many marks share, written out where each stands.
mod shared {
    use super::*;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, to: S) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(to)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(from).map(Arc::new)
    }
}

mod shared_option {
    use super::*;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Option<Arc<T>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_deref().serialize(to)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Arc<T>>, D::Error> {
        Ok(Option::<T>::deserialize(from)?.map(Arc::new))
    }
}
