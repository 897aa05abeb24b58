//! Takes accepted jobs in the order of their acceptance, some at once, and does the work that belongs to their
//! kind. What that is, it is told ([`Work`]).
//!
//! Everything that changes a job's state goes through here, one after another, in a task of its own: a client that
//! leaves must not cut a change in half.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::FutureExt as _;
use serde_json::Value;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::field::Empty;
use tracing::{Instrument as _, Span};

use super::files::Files;
use super::history::{Entry, Event, EventCursor, LogPage, Point};
use super::lifecycle::{Cancelled, Counts, Job, JobFilter, NewJob};
use super::promises::Promises;
use super::store::{OpenError, Store};
use super::writer::{self, Message};
use super::{JobsError, Level, Outcome, Stop, Work, is_job_id, now_ms};

/// How long to wait before the store is asked again after it failed.
const RETRY: Duration = Duration::from_secs(1);
/// How long the last entries may take on their way to the disk.
const LAST_WRITE: Duration = Duration::from_secs(2);

/// How jobs are kept and run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the database, the jobs' folders and the uploads are.
    pub data_dir: PathBuf,
    /// Jobs that run at once, at least 1.
    pub max_parallel: usize,
    /// Ended jobs that are remembered.
    pub keep_ended: u32,
}

/// The jobs. A cheap clone.
#[derive(Clone)]
pub struct Jobs {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    files: Files,
    promises: Promises,
    settings: Settings,
    /// Held while a job changes its state, so that memory and store agree.
    turn: tokio::sync::Mutex<()>,
    /// The stop signals of what runs.
    running: Mutex<HashMap<String, watch::Sender<Stop>>>,
    /// Wakes whoever follows a job; entries go when nobody does.
    watched: Mutex<HashMap<String, watch::Sender<()>>>,
    /// Wakes the dispatcher.
    work_waits: Notify,
    /// True once no job begins any more.
    stopping: watch::Sender<bool>,
    reports: Mutex<Option<mpsc::UnboundedSender<Message>>>,
    tasks: Mutex<Option<Tasks>>,
}

/// The two tasks, cut where they are when this is dropped.
struct Tasks {
    dispatcher: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.dispatcher.abort();
        self.writer.abort();
    }
}

/// One job as its work sees it.
pub struct JobHandle {
    id: String,
    spec: Value,
    stop: watch::Receiver<Stop>,
    reports: mpsc::UnboundedSender<Message>,
}

impl JobHandle {
    /// The job's id, which is a name for a folder too.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What was accepted.
    pub fn spec(&self) -> &Value {
        &self.spec
    }

    /// Whether it is asked to end.
    pub fn stop(&self) -> watch::Receiver<Stop> {
        self.stop.clone()
    }

    /// A line for the log. Does not wait.
    pub fn log(&self, level: Level, line: String) {
        // The end of the job tells of an error.
        match level {
            Level::Info => tracing::debug!("{line}"),
            Level::Warn => tracing::warn!("{line}"),
            Level::Error => {}
        }
        self.tell(Entry::Log { job: self.id.clone(), at_ms: now_ms(), level, line });
    }

    /// The figures of a step; `fraction` is how much of the job is done. Does not wait.
    pub fn progress(&self, step: u64, fraction: f64, metrics: Value) {
        let fraction = if fraction.is_finite() { fraction.clamp(0.0, 1.0) } else { 0.0 };
        self.tell(Entry::Point { job: self.id.clone(), at_ms: now_ms(), step, fraction, metrics });
    }

    /// The job could go on from this step. Does not wait.
    pub fn checkpointed(&self, step: u64) {
        self.tell(Entry::Checkpoint { job: self.id.clone(), step });
    }

    fn tell(&self, entry: Entry) {
        // The writer outlives every handle but at the end of the process.
        let _ = self.reports.send(Message::Entry(entry));
    }
}

/// Wakes whenever something of one job is new in the store.
pub struct Watch {
    changed: watch::Receiver<()>,
    stopping: watch::Receiver<bool>,
}

impl Watch {
    /// Waits for news. False when there will be none, as the process ends.
    pub async fn changed(&mut self) -> bool {
        tokio::select! {
            changed = self.changed.changed() => changed.is_ok(),
            _ = self.stopping.wait_for(|stopping| *stopping) => false,
        }
    }
}

impl Jobs {
    /// Opens the store. No job begins before [`Jobs::start`].
    ///
    /// # Errors
    /// A database or a folder that cannot be used, with the remedy.
    pub async fn open(settings: Settings) -> Result<Self, OpenError> {
        let store = Arc::new(Store::open(&settings.data_dir).await?);
        let files = Files::open(settings.data_dir.join("files"), store.clone()).await?;
        let shared = Shared {
            promises: Promises::new(store.clone()),
            store,
            files,
            settings,
            turn: tokio::sync::Mutex::default(),
            running: Mutex::default(),
            watched: Mutex::default(),
            work_waits: Notify::new(),
            stopping: watch::Sender::new(false),
            reports: Mutex::default(),
            tasks: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Begins to take jobs, those first that an earlier process left. Needs a runtime; to be called once.
    ///
    /// # Errors
    /// The store failed.
    pub async fn start(&self, kinds: BTreeMap<&'static str, Work>) -> Result<(), JobsError> {
        let again = self.shared.store.recover().await?;
        if again > 0 {
            tracing::info!(jobs = again, "jobs that were interrupted go on");
        }
        let (reports, inbox) = mpsc::unbounded_channel();
        *self.shared.reports() = Some(reports);
        let shared = self.shared.clone();
        let writer = tokio::spawn(writer::run(shared.store.clone(), inbox, move |job| shared.wake(job)));
        let dispatcher = tokio::spawn(self.shared.clone().dispatch(kinds));
        *self.shared.tasks() = Some(Tasks { dispatcher, writer });
        Ok(())
    }

    /// Lets running jobs pause for at most `grace`; no other begins. Those that are not through by then are cut; all
    /// go on at the next start. What was stored can be read until [`Jobs::close`].
    pub async fn shutdown(&self, grace: Duration) {
        self.shutdown_until(tokio::time::sleep(grace)).await;
    }

    /// The same, with what ends the time that they have.
    pub async fn shutdown_until(&self, cut: impl Future<Output = ()>) {
        self.shared.stopping.send_replace(true);
        for stop in self.shared.running().values() {
            // One that is to be cancelled is to be cancelled still.
            stop.send_if_modified(|stop| std::mem::replace(stop, paused(*stop)) == Stop::No);
        }
        // The writer ends with the last sender: this one, or that of the last job.
        drop(self.shared.reports().take());
        let Some(mut tasks) = self.shared.tasks().take() else { return };
        tokio::select! {
            // Those that have paused by now are not cut, however short the time was.
            biased;
            _ = &mut tasks.dispatcher => {}
            () = cut => {
                let jobs = self.shared.running().len();
                tracing::warn!(jobs, "jobs did not pause in time; they go on from their last checkpoints");
                tasks.dispatcher.abort();
            }
        }
        // An error means that it took too long: then it is cut as this returns.
        let _ = tokio::time::timeout(LAST_WRITE, &mut tasks.writer).await;
    }

    /// Closes the store, once requests are through.
    pub async fn close(&self) {
        if tokio::time::timeout(LAST_WRITE, self.shared.store.close()).await.is_err() {
            tracing::warn!("the job store is still in use; what was acknowledged is in it");
        }
    }

    /// The folder in which a job has one of its own, named by its id, for what it needs to go on. Made by whoever
    /// needs it.
    pub fn dir(&self) -> PathBuf {
        jobs_dir(&self.shared.settings.data_dir)
    }

    /// Uploaded files.
    pub fn files(&self) -> &Files {
        &self.shared.files
    }

    /// Promised deliveries.
    pub fn promises(&self) -> Promises {
        self.shared.promises.clone()
    }

    /// Jobs that run at once.
    pub fn max_parallel(&self) -> usize {
        self.shared.settings.max_parallel
    }

    /// Accepts a job: once this returns, it survives whatever happens to the process.
    ///
    /// # Errors
    /// Another job that has not ended has the name; the file that it reads is gone; the store failed.
    pub async fn submit(&self, new: NewJob) -> Result<Job, JobsError> {
        self.change(move |shared| async move {
            let job = shared.store.accept(&new).await?;
            Span::current().record("job_id", &job.id);
            tracing::info!(kind = job.kind, name = job.name, "job accepted");
            shared.work_waits.notify_one();
            Ok(job)
        })
        .await
    }

    /// Ends a job: at once when it waits, at its next step when it runs.
    ///
    /// # Errors
    /// No such job; it has ended already; the store failed.
    pub async fn cancel(&self, id: &str) -> Result<Job, JobsError> {
        let id = noted(checked(id)?);
        self.change(move |shared| async move {
            let job = match shared.store.cancel(&id).await? {
                Cancelled::AtOnce(job) => job,
                Cancelled::Requested(job) => {
                    // Not there when its work has just ended: then that end counts.
                    if let Some(stop) = shared.running().get(&id) {
                        stop.send_replace(Stop::Cancel);
                    }
                    job
                }
            };
            tracing::info!("job asked to end");
            shared.wake(&id);
            Ok(job)
        })
        .await
    }

    /// Lets a failed or cancelled job go on from its last checkpoint, when its turn comes.
    ///
    /// # Errors
    /// No such job; it is in another state; another job has its name; the file that it reads is gone; the store
    /// failed.
    pub async fn resume(&self, id: &str) -> Result<Job, JobsError> {
        let id = noted(checked(id)?);
        self.change(move |shared| async move {
            let job = shared.store.resume(&id).await?;
            tracing::info!("job resumed");
            shared.work_waits.notify_one();
            shared.wake(&id);
            Ok(job)
        })
        .await
    }

    /// Deletes an uploaded file.
    ///
    /// # Errors
    /// No such file; a job that has not ended reads it; the store failed.
    pub async fn delete_file(&self, id: &str) -> Result<(), JobsError> {
        let id = id.to_owned();
        self.change(move |shared| async move { shared.files.delete(&id).await }).await
    }

    /// One job.
    ///
    /// # Errors
    /// No such job; the store failed.
    pub async fn get(&self, id: &str) -> Result<Job, JobsError> {
        self.shared.store.job(&noted(checked(id)?)).await
    }

    /// At most `limit` jobs, newest first.
    ///
    /// # Errors
    /// The job to begin after does not exist; the store failed.
    pub async fn list(&self, filter: JobFilter<'_>, limit: u32) -> Result<Vec<Job>, JobsError> {
        if let Some(before) = filter.before {
            self.get(before).await?;
        }
        self.shared.store.jobs(filter, limit).await
    }

    /// How many jobs there are in each state.
    ///
    /// # Errors
    /// The store failed.
    pub async fn counts(&self) -> Result<Counts, JobsError> {
        self.shared.store.counts().await
    }

    /// At most `limit` lines of a job's log from number `start` on.
    ///
    /// # Errors
    /// No such job; the store failed.
    pub async fn log(&self, id: &str, start: u64, limit: u32) -> Result<(Job, LogPage), JobsError> {
        let job = self.get(id).await?;
        let page = self.shared.store.log(&job.id, start, limit).await?;
        Ok((job, page))
    }

    /// The last `n` lines of a job's log.
    ///
    /// # Errors
    /// No such job; the store failed.
    pub async fn log_tail(&self, id: &str, n: u32) -> Result<(Job, LogPage), JobsError> {
        let job = self.get(id).await?;
        let page = self.shared.store.log_tail(&job.id, n).await?;
        Ok((job, page))
    }

    /// At most `limit` points of a job after step `after`.
    ///
    /// # Errors
    /// The store failed.
    pub async fn points(&self, id: &str, after: Option<u64>, limit: u32) -> Result<Vec<Point>, JobsError> {
        self.shared.store.points(&checked(id)?, after, limit).await
    }

    /// At most `limit` log lines and points of a job, newest first, older than `before`.
    ///
    /// # Errors
    /// No such job; the store failed.
    pub async fn events(
        &self,
        id: &str,
        before: Option<EventCursor>,
        limit: u32,
    ) -> Result<Vec<Event>, JobsError> {
        let job = self.get(id).await?;
        self.shared.store.events(&job.id, before, limit).await
    }

    /// Wakes with every change of a job from now on. Read the store after this call and nothing is missed.
    pub fn watch(&self, id: &str) -> Watch {
        let mut watched = self.shared.watched();
        watched.retain(|_, sender| sender.receiver_count() > 0);
        let sender = watched.entry(id.to_owned()).or_insert_with(|| watch::Sender::new(()));
        Watch { changed: sender.subscribe(), stopping: self.shared.stopping.subscribe() }
    }

    /// Runs a change to its end, whether or not the caller waits for it, one change at a time.
    async fn change<T: Send + 'static, F: Future<Output = Result<T, JobsError>> + Send>(
        &self,
        change: impl FnOnce(Arc<Shared>) -> F + Send + 'static,
    ) -> Result<T, JobsError> {
        let shared = self.shared.clone();
        let change = async move {
            if *shared.stopping.borrow() {
                return Err(JobsError::Stopping);
            }
            let turn = shared.clone();
            let _turn = turn.turn.lock().await;
            change(shared).await
        };
        match tokio::spawn(change.in_current_span()).await {
            Ok(outcome) => outcome,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(JobsError::Stopping),
        }
    }
}

impl Shared {
    /// Takes jobs until the process ends, then waits for those that run.
    async fn dispatch(self: Arc<Self>, kinds: BTreeMap<&'static str, Work>) {
        let mut runs = JoinSet::new();
        let mut stopping = self.stopping.subscribe();
        self.trim().await;
        while !*stopping.borrow() {
            let mut retry = false;
            while runs.len() < self.settings.max_parallel && !*stopping.borrow() {
                match self.take().await {
                    Ok(Some((job, stop))) => {
                        // What is empty here is recorded by the work.
                        let span = tracing::info_span!(
                            parent: None,
                            "job",
                            job_id = job.id,
                            kind = job.kind,
                            name = job.name,
                            adapter = Empty,
                            generation = Empty,
                        );
                        runs.spawn(self.clone().run(job, stop, kinds.clone()).instrument(span));
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "no job can be taken now");
                        retry = true;
                        break;
                    }
                }
            }
            tokio::select! {
                () = self.work_waits.notified() => {}
                Some(_) = runs.join_next() => {}
                _ = stopping.changed() => {}
                () = tokio::time::sleep(RETRY), if retry => {}
            }
        }
        while runs.join_next().await.is_some() {}
    }

    async fn take(&self) -> Result<Option<(Job, watch::Receiver<Stop>)>, JobsError> {
        let _turn = self.turn.lock().await;
        let Some(job) = self.store.take().await? else { return Ok(None) };
        let (sender, stop) = watch::channel(Stop::No);
        // `shutdown` sets the flag before it goes through the list: one of the two sees the other.
        self.running().insert(job.id.clone(), sender.clone());
        if *self.stopping.borrow() {
            sender.send_replace(Stop::Pause);
        }
        self.wake(&job.id);
        Ok(Some((job, stop)))
    }

    async fn run(
        self: Arc<Self>,
        job: Job,
        stop: watch::Receiver<Stop>,
        kinds: BTreeMap<&'static str, Work>,
    ) {
        let Some(reports) = self.reports().clone() else {
            // Taken while the process was ending; it is taken again at the next start.
            self.running().remove(&job.id);
            return;
        };
        tracing::info!("job begins");
        let handle = JobHandle { id: job.id.clone(), spec: job.spec.clone(), stop, reports: reports.clone() };
        let mut outcome = match kinds.get(job.kind.as_str()) {
            Some(work) => match AssertUnwindSafe(async { work(handle).await }).catch_unwind().await {
                Ok(outcome) => outcome,
                Err(panic) => Outcome::Failed(format!("the work panicked: {}", panic_text(&*panic))),
            },
            None => Outcome::Failed(format!("this version does not know jobs of the kind {:?}", job.kind)),
        };
        if outcome == Outcome::Paused && !*self.stopping.borrow() {
            outcome = Outcome::Failed("it stopped although the server goes on; resume it".into());
        }
        match &outcome {
            Outcome::Failed(error) => tracing::warn!(error, "job failed"),
            outcome => tracing::info!(?outcome, "job ended"),
        }
        // What the job said comes before its end.
        let (done, flushed) = oneshot::channel();
        if reports.send(Message::Flush(done)).is_ok() {
            // An error means that the writer is gone, as at the end of the process.
            let _ = flushed.await;
        }
        drop(reports);
        loop {
            let turn = self.turn.lock().await;
            match self.store.end(&job.id, &outcome).await {
                Ok(()) => {
                    self.running().remove(&job.id);
                    break;
                }
                Err(error) => tracing::error!(%error, "the job's end cannot be stored now"),
            }
            drop(turn);
            // Unrecorded, it runs again at the next start and comes to the same end.
            tokio::time::sleep(RETRY).await;
        }
        self.wake(&job.id);
        self.trim().await;
    }

    /// Forgets the ended jobs that are too many.
    async fn trim(&self) {
        let ids = match self.store.beyond(self.settings.keep_ended).await {
            Ok(ids) => ids,
            Err(error) => return tracing::error!(%error, "old jobs cannot be listed"),
        };
        for id in ids {
            let _turn = self.turn.lock().await;
            match self.store.forget(&id).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    tracing::error!(job_id = id, %error, "an old job cannot be forgotten");
                    continue;
                }
            }
            if let Err(error) = tokio::fs::remove_dir_all(self.folder(&id)).await
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(job_id = id, %error, "the folder of an old job cannot be removed");
            }
        }
    }

    fn folder(&self, id: &str) -> PathBuf {
        jobs_dir(&self.settings.data_dir).join(id)
    }

    fn wake(&self, id: &str) {
        if let Some(sender) = self.watched().get(id) {
            sender.send_replace(());
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Stop>>> {
        self.running.lock().expect("no holder of the running lock panics")
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<()>>> {
        self.watched.lock().expect("no holder of the watched lock panics")
    }

    fn tasks(&self) -> MutexGuard<'_, Option<Tasks>> {
        self.tasks.lock().expect("no holder of the tasks lock panics")
    }

    fn reports(&self) -> MutexGuard<'_, Option<mpsc::UnboundedSender<Message>>> {
        self.reports.lock().expect("no holder of the reports lock panics")
    }
}

/// The folder of the jobs' folders inside a data folder.
fn jobs_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("jobs")
}

fn paused(stop: Stop) -> Stop {
    if stop == Stop::No { Stop::Pause } else { stop }
}

/// The id, if it can be one: nothing else is looked up.
fn checked(id: &str) -> Result<String, JobsError> {
    if is_job_id(id) { Ok(id.to_owned()) } else { Err(JobsError::job_not_found(id)) }
}

/// The id, which what is logged from here on names.
fn noted(id: String) -> String {
    Span::current().record("job_id", &id);
    id
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
