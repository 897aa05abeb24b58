//! What every kind of source gives: files that can be read from any byte on, or pages of rows. Blocking: the
//! reading thread alone calls it. Knows neither a kind nor a format.

use std::future::Future;
use std::io::Read;
use std::ops::Range;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio_util::bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{Format, SourceConfig};

/// A file of a source, wherever it lies.
pub(super) trait Object: Send {
    /// As messages name it; never with a query or a secret.
    fn shown(&self) -> &str;

    /// Its length and what tells this version from another; asked before the first read.
    fn stat(&mut self) -> Result<Stat, String>;

    /// How its rows are written, where the place that it comes from says so; known after [`Object::stat`].
    fn format(&self) -> Option<Format> {
        None
    }

    /// All bytes from `offset` on. A connection that breaks goes on by itself within its patience; errors carry the
    /// words for the user.
    fn read_from(&mut self, offset: u64) -> Result<Box<dyn Read + Send + '_>, String>;

    /// Exactly these bytes, as Parquet's footer and column chunks need them. A server that ignores ranges is an
    /// error.
    fn read_range(&mut self, range: Range<u64>) -> Result<Bytes, String>;
}

/// What is known of an object before it is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Stat {
    /// In bytes, where it is known.
    pub(super) length: Option<u64>,
    /// Entity tag, commit and path, or size and time: two readings with the same one read the same bytes.
    pub(super) version: Option<String>,
}

/// The files of a source in their order, listed as they are needed.
pub(super) type Objects = Box<dyn Iterator<Item = Result<Box<dyn Object>, String>> + Send>;

/// A place that gives rows page by page.
pub(super) trait Pages: Send {
    /// The page that `token` names; the first where it is `None`.
    fn page(&mut self, token: Option<&Value>) -> Result<Page, String>;
}

/// Some rows in their order.
pub(super) struct Page {
    /// As messages name it; never with a secret.
    pub(super) shown: String,
    /// Rows, and those that cannot be used, each with its reason.
    pub(super) rows: Vec<Result<Map<String, Value>, String>>,
    /// What the following page is asked with; `None` after the last.
    pub(super) next: Option<Value>,
}

/// An opened source.
pub(super) struct Opened {
    /// What it gives.
    pub(super) rows: Rows,
    /// What a later opening needs so that it reads the same data, such as a commit. It is kept with the job's
    /// cursor and handed to that opening as [`Opening::pin`].
    pub(super) pin: Option<String>,
}

/// What an opened source gives.
pub(super) enum Rows {
    /// Files, to be decoded.
    Files(Objects),
    /// Rows as they are.
    Pages(Box<dyn Pages>),
}

/// What opening a source needs. Cheap to clone: an object keeps its own.
#[derive(Clone)]
pub(super) struct Opening {
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) patience: Patience,
    /// Cancelled when nobody wants records any more.
    pub(super) stop: CancellationToken,
    /// As the source's settings have it; a folder lists other files with `auto` than without.
    pub(super) format: Format,
    /// Fields of the records that are needed, as paths; empty where all are.
    pub(super) fields: Vec<String>,
    /// [`Opened::pin`] of the opening that is continued.
    pub(super) pin: Option<String>,
}

impl Opening {
    /// For reading everything from the beginning. Must be called inside the asynchronous runtime.
    pub(super) fn new(source: &SourceConfig, patience: Patience) -> Self {
        Self {
            runtime: tokio::runtime::Handle::current(),
            patience,
            stop: CancellationToken::new(),
            format: source.format,
            fields: Vec::new(),
            pin: None,
        }
    }

    /// Waits on the reading thread for something asynchronous, but no longer than somebody wants records.
    pub(super) fn wait<T>(&self, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        self.runtime.block_on(async {
            tokio::select! {
                // First: where the runtime ends, nothing of it may be asked any more.
                biased;
                () = self.stop.cancelled() => Err("nobody wants more".to_owned()),
                done = work => done,
            }
        })
    }
}

/// How long to wait for a server, and how often to try again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For a connection.
    pub(super) connect: Duration,
    /// For the next bytes.
    pub(super) idle: Duration,
    /// Attempts after the first, as long as no new byte comes.
    pub(super) retries: u32,
    /// Before the first of them; doubles with each.
    pub(super) backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            retries: 3,
            backoff: Duration::from_secs(1),
        }
    }
}
