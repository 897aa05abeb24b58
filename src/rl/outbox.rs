//! The outbox: uploads that were promised. A promise is kept across restarts until its content is at its place.
//!
//! ```text
//! promise ─▶ seal the content: rl_runs/outbox/{sha256}.jsonl, on disk ─▶ a row in the store ─▶ answer
//!                                    a task of its own ─▶ sink ─▶ done ─▶ the sealed file goes
//! ```
//!
//! Collecting never waits for a sink: what it waits for is the disk alone.

mod deliver;

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, RwLock, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::adapters::sync_folder;
use crate::config::adapter::FieldError;
use crate::config::rl_sinks::{Destination, KeyFacts, SinksConfig};
use crate::jobs::{JobsError, NewPromise, Promise, PromiseCounts, PromiseState, Promises, rfc3339};

/// Before the name of a file that is being sealed.
const WRITING: &str = ".writing-";
/// After the hash, in the name of one that is.
const SEALED: &str = ".jsonl";
/// Bytes that are copied at once.
const BLOCK: usize = 256 << 10;

/// How long one that waits for deliveries lets more of them end.
const GATHER: Duration = Duration::from_millis(20);

/// What is promised.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Lines of JSON.
    Lines(Vec<u8>),
    /// A file as it is now; what is added to it later is not part of the promise.
    File(PathBuf),
}

/// How patient deliveries are.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Before the second attempt; doubles with each further one.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
    /// Deliveries to one sink at once.
    pub at_once: usize,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: Duration::from_millis(500), longest: Duration::from_secs(300), at_once: 4 }
    }
}

/// Why an upload is not promised. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// There is nothing to upload.
    #[error("there is nothing to upload: the content is empty")]
    Empty,
    /// The content cannot be sealed.
    #[error("the upload cannot be sealed in {}: {source}; the data folder must be writable and have room", folder.display())]
    Seal {
        /// Where sealed files are.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] JobsError),
}

/// The outbox. A cheap clone.
#[derive(Clone)]
pub struct Outbox {
    shared: Arc<Shared>,
}

struct Shared {
    promises: Promises,
    sinks: SinksConfig,
    folder: PathBuf,
    patience: Patience,
    /// Read by whoever seals and promises, written by whoever removes a sealed file: two promises may share one.
    seals: RwLock<()>,
    /// Wakes the task.
    work_waits: Notify,
    /// Says that a promise changed its state.
    changed: watch::Sender<()>,
    /// True once nothing is to begin any more.
    stopping: watch::Sender<bool>,
    /// Promises from before this moment may have been delivered without a record.
    opened_ms: i64,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Outbox {
    /// Opens the outbox in a data folder, whose store holds `promises`, and removes sealed files that nobody needs.
    /// Nothing is delivered before [`Outbox::start`].
    ///
    /// # Errors
    /// A folder that cannot be used; the store failed.
    pub async fn open(
        data_dir: &Path,
        promises: Promises,
        sinks: SinksConfig,
        patience: Patience,
    ) -> Result<Self, OutboxError> {
        let folder = data_dir.join("rl_runs").join("outbox");
        let refused = |source| OutboxError::Seal { folder: folder.clone(), source };
        let pending = promises.recover().await?;
        if pending > 0 {
            tracing::info!(uploads = pending, "uploads that are not through go on");
        }
        // A folder that is not there holds nothing; the first promise makes it.
        for (path, sha256) in entries(&folder).map_err(refused)? {
            let is_left_over = match sha256 {
                Some(sha256) => !promises.needs(&sha256).await?,
                None => true,
            };
            if is_left_over {
                fs::remove_file(&path).map_err(refused)?;
                tracing::debug!(file = %path.display(), "removed a sealed upload that nobody needs");
            }
        }
        let shared = Shared {
            promises,
            sinks,
            folder,
            patience,
            seals: RwLock::default(),
            work_waits: Notify::new(),
            changed: watch::Sender::new(()),
            stopping: watch::Sender::new(false),
            opened_ms: now_ms(),
            task: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Begins to deliver. Needs a runtime; to be called once.
    pub fn start(&self) {
        *self.shared.task() = Some(tokio::spawn(deliver::run(self.shared.clone())));
    }

    /// Begins no further delivery, and lets those under way end for at most `grace`. What is not through goes on at
    /// the next start.
    pub async fn shutdown(&self, grace: Duration) {
        self.shutdown_until(tokio::time::sleep(grace)).await;
    }

    /// The same, with what ends the time that they have.
    pub async fn shutdown_until(&self, cut: impl Future<Output = ()>) {
        self.shared.stopping.send_replace(true);
        let Some(mut task) = self.shared.task().take() else { return };
        tokio::select! {
            biased;
            _ = &mut task => {}
            () = cut => {
                task.abort();
                // Until the store is closed nothing may use it; an error is the end that was asked for.
                let _ = task.await;
            }
        }
    }

    /// The sink of this name; without one, the default sink, or the only one.
    ///
    /// # Errors
    /// There is none; the names that there are.
    pub fn destination(&self, name: Option<&str>) -> Result<Destination, FieldError> {
        self.shared.sinks.destination(name)
    }

    /// A bucket and a key that whoever starts the program names for this run, as
    /// [`SinksConfig::s3_destination`].
    ///
    /// # Errors
    /// What is no bucket or no key, by its flag.
    pub fn s3_destination(&self, bucket: &str, key: Option<&str>) -> Result<Destination, FieldError> {
        self.shared.sinks.s3_destination(bucket, key)
    }

    /// Promises an upload, and returns its id: once this returns, the content is on disk under its hash and will get
    /// to its place, whatever happens to the process. `run_id` must be a checked name, as it may become part of a
    /// path. Does not wait for the sink.
    ///
    /// # Errors
    /// The disk or the store refuses; then nothing is promised.
    pub async fn promise(
        &self,
        to: &Destination,
        run_id: &str,
        content: Content,
    ) -> Result<String, OutboxError> {
        let (shared, to, run_id) = (self.shared.clone(), to.clone(), run_id.to_owned());
        // To its end, whether or not the caller waits: a row must not be written when its file may go already.
        let promised = tokio::spawn(async move {
            let _seal = shared.seals.read().await;
            shared.promise(to, run_id, content).await
        });
        match promised.await {
            Ok(outcome) => outcome,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(JobsError::Stopping.into()),
        }
    }

    /// Waits for at most `patience` until nothing is pending, and says what is then.
    ///
    /// # Errors
    /// The store failed.
    pub async fn settle(&self, patience: Duration) -> Result<PromiseCounts, JobsError> {
        let deadline = Instant::now() + patience;
        let mut changed = self.shared.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let counts = self.counts().await?;
            if counts.pending == 0 {
                return Ok(counts);
            }
            match tokio::time::timeout_at(deadline, changed.changed()).await {
                // Many end at about the same time, and counting them takes its time.
                Ok(Ok(())) => tokio::time::sleep(GATHER).await,
                Ok(Err(_)) | Err(_) => return self.counts().await,
            }
        }
    }

    /// How many pending uploads there are to each sink of the settings, and to any other that has some.
    ///
    /// # Errors
    /// The store failed.
    pub async fn pending_by_sink(&self) -> Result<Vec<(String, u64)>, JobsError> {
        let mut pending = self.shared.promises.pending_by_sink().await?;
        let idle = self.shared.sinks.names().filter(|name| pending.iter().all(|(sink, _)| sink != name));
        let idle: Vec<_> = idle.map(|name| (name.to_owned(), 0)).collect();
        pending.extend(idle);
        Ok(pending)
    }

    /// How many promises are in each state.
    ///
    /// # Errors
    /// The store failed.
    pub async fn counts(&self) -> Result<PromiseCounts, JobsError> {
        self.shared.promises.counts().await
    }

    /// One promise.
    ///
    /// # Errors
    /// No such promise; the store failed.
    pub async fn get(&self, id: &str) -> Result<Promise, JobsError> {
        self.shared.promises.get(id).await
    }

    /// At most `limit` promises, newest first, given before the one named.
    ///
    /// # Errors
    /// The promise to begin after does not exist; the store failed.
    pub async fn list(
        &self,
        state: Option<PromiseState>,
        before: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Promise>, JobsError> {
        self.shared.promises.list(state, before, limit).await
    }

    /// Lets one that was refused for good be tried again.
    ///
    /// # Errors
    /// No such promise; it was not refused; the store failed.
    pub async fn retry(&self, id: &str) -> Result<Promise, JobsError> {
        let promise = self.shared.promises.retry(id).await?;
        self.shared.work_waits.notify_one();
        Ok(promise)
    }
}

impl Shared {
    async fn promise(
        &self,
        to: Destination,
        run_id: String,
        content: Content,
    ) -> Result<String, OutboxError> {
        let folder = self.folder.clone();
        let sealed = tokio::task::spawn_blocking(move || seal(&folder, content)).await;
        let sealed = sealed.unwrap_or_else(|error| Err(io::Error::other(error)));
        let (sha256, bytes) =
            sealed.map_err(|source| OutboxError::Seal { folder: self.folder.clone(), source })?;
        if bytes == 0 {
            return Err(OutboxError::Empty);
        }
        let created_ms = now_ms();
        let target = match to.is_ad_hoc {
            true => Some(serde_json::to_value(&to.sink).expect("a sink that is no JSON is a bug")),
            false => None,
        };
        let new = NewPromise {
            key: to.sink.key(&facts(&run_id, created_ms, &sha256, &to.name)),
            sink: to.name,
            target,
            run: run_id,
            sha256,
            bytes,
            created_ms,
        };
        let id = self.promises.give(&new).await?;
        self.work_waits.notify_one();
        Ok(id)
    }

    fn sealed(&self, sha256: &str) -> PathBuf {
        self.folder.join(format!("{sha256}{SEALED}"))
    }

    fn task(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.task.lock().expect("no holder of the task lock panics")
    }
}

fn facts(run_id: &str, created_ms: i64, sha256: &str, sink: &str) -> KeyFacts {
    let time = rfc3339(created_ms);
    KeyFacts {
        run_id: run_id.to_owned(),
        date: time[..10].to_owned(),
        time: time[11..19].replace(':', ""),
        sha256: sha256.to_owned(),
        name: sink.to_owned(),
    }
}

/// Writes the content under its hash, and waits until the disk has it. Returns hash and size.
fn seal(folder: &Path, content: Content) -> io::Result<(String, u64)> {
    fs::create_dir_all(folder)?;
    let part = folder.join(format!("{WRITING}{}", uuid::Uuid::new_v4().simple()));
    let write = || -> io::Result<(String, u64)> {
        let (sha256, bytes) = match content {
            Content::Lines(lines) => copy(&mut lines.as_slice(), &part)?,
            Content::File(path) => {
                let file = File::open(path)?;
                let bytes = file.metadata()?.len();
                copy(&mut file.take(bytes), &part)?
            }
        };
        if bytes > 0 {
            fs::rename(&part, folder.join(format!("{sha256}{SEALED}")))?;
            sync_folder(folder)?;
        }
        Ok((sha256, bytes))
    };
    let sealed = write();
    if !matches!(sealed, Ok((_, 1..))) {
        // The reason is told; what remains in spite of this goes at the next start.
        let _ = fs::remove_file(&part);
    }
    sealed
}

fn copy(content: &mut dyn Read, to: &Path) -> io::Result<(String, u64)> {
    let mut file = File::create_new(to)?;
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut bytes = 0;
    let mut block = vec![0; BLOCK];
    loop {
        let n = match content.read(&mut block) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&block[..n]);
        file.write_all(&block[..n])?;
        bytes += n as u64;
    }
    file.sync_all()?;
    Ok((hex(hash.finish().as_ref()), bytes))
}

/// The files of the outbox that were made here: path and, where it is sealed, hash.
fn entries(folder: &Path) -> io::Result<Vec<(PathBuf, Option<String>)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_hash = |text: &&str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match name.strip_suffix(SEALED).filter(is_hash).map(str::to_owned) {
            Some(sha256) => found.push((path, Some(sha256))),
            None if name.starts_with(WRITING) => found.push((path, None)),
            None => {}
        }
    }
    Ok(found)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests;
