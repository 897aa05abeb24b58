//! An object behind a network as bytes to read: tries again with growing waits, goes on after a cut where it
//! stopped, and makes sure that what comes belongs to what came. Knows no protocol; [`Remote`] does.

use std::future::Future;
use std::io::{self, Read};
use std::ops::Range;
use std::time::Duration;

use flate2::Crc;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio_util::bytes::Bytes;

use super::object::{Object, Opening, Stat};
use super::retry::{Failure, Retries};

/// One way to fetch an object.
pub(super) trait Remote: Send {
    /// As messages name it; never with a query or a secret.
    fn shown(&self) -> &str;

    /// Length and version. A server that can only be asked for the whole gives it along.
    fn stat(&mut self) -> impl Future<Output = Result<(Stat, Option<Answer>), Failure>> + Send;

    /// Bytes from `start` on, up to and without `end` where that is given, of this version and no other. A server
    /// that ignores ranges gives the whole, from byte 0.
    fn get(
        &mut self,
        start: u64,
        end: Option<u64>,
        version: Option<&str>,
    ) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// An answer with bytes.
pub(super) struct Answer {
    /// Where in the object its first byte stands.
    pub(super) start: u64,
    /// Whether the server took notice of the range.
    pub(super) ranged: bool,
    /// The object's version and its length in bytes, as this answer has them.
    pub(super) stat: Stat,
    pub(super) body: BoxStream<'static, Result<Bytes, String>>,
}

/// An object that is fetched.
pub(super) struct RemoteObject<R> {
    remote: R,
    opening: Opening,
    stat: Option<Stat>,
    /// The whole, asked for and not read yet.
    first: Option<Answer>,
}

impl<R: Remote> RemoteObject<R> {
    /// Asks nobody yet.
    pub(super) fn new(remote: R, opening: Opening) -> Self {
        Self { remote, opening, stat: None, first: None }
    }

    fn known(&mut self) -> Result<Stat, String> {
        if let Some(stat) = &self.stat {
            return Ok(stat.clone());
        }
        let mut retries = Retries::new(self.opening.patience);
        let remote = &mut self.remote;
        let (stat, first) = self.opening.wait(async {
            loop {
                match remote.stat().await {
                    Ok(known) => return Ok(known),
                    Err(failure) => retries.wait(failure, remote.shown()).await?,
                }
            }
        })?;
        self.first = first;
        self.stat = Some(stat.clone());
        Ok(stat)
    }
}

impl<R: Remote> Object for RemoteObject<R> {
    fn shown(&self) -> &str {
        self.remote.shown()
    }

    fn stat(&mut self) -> Result<Stat, String> {
        self.known()
    }

    fn read_from(&mut self, offset: u64) -> Result<Box<dyn Read + Send + '_>, String> {
        let known = self.known()?;
        if let Some(length) = known.length.filter(|length| *length < offset) {
            return Err(format!("has {length} bytes and cannot be read from byte {offset} on"));
        }
        Ok(Box::new(Reading {
            retries: Retries::new(self.opening.patience),
            answer: self.first.take().map(|answer| (answer.body, answer.start)),
            remote: &mut self.remote,
            opening: &self.opening,
            known,
            begin: offset,
            position: offset,
            crc: Crc::new(),
            again: Crc::new(),
            rest: Bytes::new(),
            ended: false,
            failed: false,
        }))
    }

    fn read_range(&mut self, range: Range<u64>) -> Result<Bytes, String> {
        let known = self.known()?;
        self.first = None;
        let patience = self.opening.patience;
        let mut retries = Retries::new(patience);
        let wanted = (range.end.saturating_sub(range.start)) as usize;
        let mut had: Vec<u8> = Vec::new();
        let remote = &mut self.remote;
        self.opening.wait(async {
            while had.len() < wanted {
                let before = had.len();
                match bring(remote, &range, &known, &mut had, patience.idle).await {
                    Ok(()) => {}
                    Err(failure) => {
                        if had.len() > before {
                            retries = Retries::new(patience);
                        }
                        let place = format!("at byte {}", range.start + had.len() as u64);
                        retries.wait(failure.at(&place), remote.shown()).await?;
                    }
                }
            }
            Ok(())
        })?;
        Ok(had.into())
    }
}

/// Adds the bytes of a range that `had` lacks.
async fn bring<R: Remote>(
    remote: &mut R,
    range: &Range<u64>,
    known: &Stat,
    had: &mut Vec<u8>,
    idle: Duration,
) -> Result<(), Failure> {
    let start = range.start + had.len() as u64;
    let mut answer = remote.get(start, Some(range.end), known.version.as_deref()).await?;
    same(known, &answer.stat)?;
    if !answer.ranged {
        return Err(Failure::Final(
            "the server ignores ranges, without which a Parquet file cannot be read; download the file and use \
             type: local, or bring it as jsonl"
                .into(),
        ));
    }
    if answer.start != start {
        return Err(Failure::passing("the server answered with another range"));
    }
    let wanted = (range.end - range.start) as usize;
    had.reserve_exact(wanted - had.len());
    while had.len() < wanted {
        let Some(bytes) = next(&mut answer.body, idle).await? else {
            return Err(Failure::passing("the connection ended"));
        };
        let room = wanted - had.len();
        had.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
    Ok(())
}

async fn next(
    body: &mut BoxStream<'static, Result<Bytes, String>>,
    idle: Duration,
) -> Result<Option<Bytes>, Failure> {
    match tokio::time::timeout(idle, body.next()).await {
        Ok(next) => next.transpose().map_err(Failure::passing),
        Err(_) => Err(Failure::passing(format!("timed out: no byte for {} s", idle.as_secs_f32()))),
    }
}

/// Whether an answer is of the same bytes, as far as both say.
fn same(known: &Stat, answered: &Stat) -> Result<(), Failure> {
    fn differ<T: PartialEq>(a: &Option<T>, b: &Option<T>) -> bool {
        a.is_some() && b.is_some() && a != b
    }
    if differ(&known.version, &answered.version) || differ(&known.length, &answered.length) {
        return Err(Failure::changed());
    }
    Ok(())
}

/// An object from some byte on to its end.
struct Reading<'a, R> {
    remote: &'a mut R,
    opening: &'a Opening,
    known: Stat,
    /// The answer's bytes and where in the object the next of them stands.
    answer: Option<(BoxStream<'static, Result<Bytes, String>>, u64)>,
    /// The first byte that was wanted.
    begin: u64,
    /// The next byte to hand on.
    position: u64,
    /// Checksum of the bytes between the two.
    crc: Crc,
    /// The same of a repeated answer, as far as it has come.
    again: Crc,
    rest: Bytes,
    ended: bool,
    retries: Retries,
    /// Since the last byte that was new.
    failed: bool,
}

impl<R: Remote> Read for Reading<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.rest.is_empty() && !self.ended {
            let opening = self.opening;
            match opening.wait(self.next()).map_err(io::Error::other)? {
                Some(bytes) => self.rest = bytes,
                None => self.ended = true,
            }
        }
        let n = buffer.len().min(self.rest.len());
        buffer[..n].copy_from_slice(&self.rest.split_to(n));
        Ok(n)
    }
}

impl<R: Remote> Reading<'_, R> {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            match self.attempt().await {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => {
                    self.answer = None;
                    let of = self.known.length.map_or(String::new(), |length| format!(" of {length}"));
                    let place = format!("after {}{of} bytes", self.position);
                    self.failed = true;
                    self.retries.wait(failure.at(&place), self.remote.shown()).await?;
                }
            }
        }
    }

    async fn attempt(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.answer.is_none() {
            if self.known.length == Some(self.position) {
                return Ok(None);
            }
            self.answer = Some(self.ask().await?);
            self.again = Crc::new();
        }
        loop {
            let Some((body, at)) = &mut self.answer else { return Ok(None) };
            let Some(mut bytes) = next(body, self.opening.patience.idle).await? else {
                return self.end();
            };
            // What stands before the first byte that was wanted, and what was handed on before.
            let unwanted = self.begin.saturating_sub(*at).min(bytes.len() as u64);
            let _ = bytes.split_to(unwanted as usize);
            *at += unwanted;
            let repeated = self.position.saturating_sub(*at).min(bytes.len() as u64);
            if repeated > 0 {
                self.again.update(&bytes.split_to(repeated as usize));
                *at += repeated;
                if *at == self.position && self.again.sum() != self.crc.sum() {
                    return Err(Failure::changed());
                }
            }
            if bytes.is_empty() {
                continue;
            }
            *at += bytes.len() as u64;
            self.position = *at;
            self.crc.update(&bytes);
            if let Some(length) = self.known.length.filter(|length| self.position > *length) {
                return Err(Failure::Final(format!(
                    "more bytes came than the {length} that were announced; ask whoever runs the server"
                )));
            }
            if std::mem::take(&mut self.failed) {
                self.retries = Retries::new(self.opening.patience);
            }
            return Ok(Some(bytes));
        }
    }

    /// The answer is over: is it complete?
    fn end(&self) -> Result<Option<Bytes>, Failure> {
        let reached = self.answer.as_ref().map_or(0, |(_, at)| *at);
        match self.known.length {
            Some(length) if self.position < length => Err(Failure::passing("the connection ended")),
            None if reached < self.position => Err(Failure::changed()),
            _ => Ok(None),
        }
    }

    /// Asks for what is still to come, and makes sure that it belongs to what came before.
    async fn ask(&mut self) -> Result<(BoxStream<'static, Result<Bytes, String>>, u64), Failure> {
        // What nothing but its content tells from another version is asked for as a whole and compared.
        let pinned = self.known.version.is_some() || self.position == self.begin;
        let start = if pinned { self.position } else { 0 };
        let answer = self.remote.get(start, None, self.known.version.as_deref()).await?;
        same(&self.known, &answer.stat)?;
        if answer.start != start && (answer.ranged || answer.start > self.begin) {
            return Err(Failure::passing("the server answered with another range"));
        }
        if answer.start < self.position {
            tracing::warn!(
                object = self.remote.shown(),
                bytes = self.position,
                "the server ignores ranges; reading from the start and passing over what is not needed"
            );
        }
        self.known.length = self.known.length.or(answer.stat.length);
        Ok((answer.body, answer.start))
    }
}
