//! The log of episodes: one append-only file of JSON lines a run, on disk before [`EpisodeLog::append`] returns. One
//! thread a file writes it; what is handed over while it waits for the disk shares the next write and fsync (group
//! commit). `files` has the names and the repair after a crash, `read` goes through the lines, `writer` is the thread.
//!
//! One process has the folder: whoever opens a log holds the data folder's lock.

mod files;
mod read;
mod writer;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use tokio::sync::oneshot;

pub use read::{Episodes, Unreadable, episodes, parts, runs};

use super::episode::{Episode, InvalidName, check_run_id};

/// The folder of the log inside the data folder.
pub const FOLDER: &str = "rl_runs";

/// Why episodes are not in the log. None of those that were handed over is.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The run's id is none.
    #[error("run_id {0}")]
    Name(#[from] InvalidName),
    /// No room on the disk.
    #[error("the episodes cannot be stored: {0}; make room in the data folder and try again")]
    Full(String),
    /// The disk refuses otherwise.
    #[error("the episodes cannot be stored: {0}")]
    Io(String),
}

impl From<io::Error> for LogError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match error.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => Self::Full(error.to_string()),
            _ => Self::Io(error.to_string()),
        }
    }
}

/// Where episodes went.
#[derive(Debug, Clone, PartialEq)]
pub struct Appended {
    /// The file that they are in.
    pub path: PathBuf,
    /// The episodes, with their numbers.
    pub episodes: Vec<Episode>,
}

/// The log. A cheap clone.
#[derive(Clone)]
pub struct EpisodeLog {
    shared: Arc<Shared>,
}

/// What is written together, and who waits for it.
struct Entry {
    episodes: Vec<Episode>,
    reply: oneshot::Sender<Result<Appended, LogError>>,
}

struct Shared {
    dir: PathBuf,
    max_file_bytes: u64,
    /// The threads that write, by their runs; one that has nothing to do ends.
    writers: Mutex<HashMap<String, mpsc::Sender<Entry>>>,
}

impl EpisodeLog {
    /// Opens the folder, which is made where it is missing, and repairs what a killed process left. A file of
    /// `max_file_bytes` or more is put aside before the next write.
    ///
    /// # Errors
    /// What the system reports.
    pub fn open(dir: &Path, max_file_bytes: u64) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        for (run, part) in files::list(dir)? {
            files::repair(dir, &run, part)?;
        }
        let dir = std::path::absolute(dir)?;
        Ok(Self { shared: Arc::new(Shared { dir, max_file_bytes, writers: Mutex::default() }) })
    }

    /// Where the files are.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Puts episodes behind those of a run, in their order and with nothing between them, and waits until they are on
    /// disk. Their `run_id` and `episode_index` are set here.
    ///
    /// # Errors
    /// No run's id; a disk that refuses. Then none of them is in the log.
    pub async fn append(&self, run_id: &str, mut episodes: Vec<Episode>) -> Result<Appended, LogError> {
        check_run_id(run_id)?;
        for episode in &mut episodes {
            run_id.clone_into(&mut episode.run_id);
        }
        let (reply, answer) = oneshot::channel();
        self.hand_over(run_id, Entry { episodes, reply })?;
        let gone = || LogError::Io("the thread that writes the log has ended".into());
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    fn hand_over(&self, run_id: &str, entry: Entry) -> io::Result<()> {
        let mut writers = self.shared.writers();
        let entry = match writers.get(run_id) {
            None => entry,
            Some(writer) => match writer.send(entry) {
                Ok(()) => return Ok(()),
                // It panicked; a new one takes over.
                Err(mpsc::SendError(entry)) => entry,
            },
        };
        let (sender, inbox) = mpsc::channel();
        let (shared, run) = (Arc::downgrade(&self.shared), run_id.to_owned());
        // Sent before the thread can look, and lost with the channel when there is no thread.
        let sent = sender.send(entry);
        debug_assert!(sent.is_ok(), "the inbox is here");
        let settings = writer::Settings {
            dir: self.shared.dir.clone(),
            run: run.clone(),
            max_file_bytes: self.shared.max_file_bytes,
        };
        std::thread::Builder::new().name("episode-log".into()).spawn(move || {
            writer::run(settings, &inbox, || {
                // Nobody can hand anything over while the list is held.
                let Some(shared) = shared.upgrade() else { return inbox.try_recv().ok() };
                let mut writers = shared.writers();
                let last = inbox.try_recv().ok();
                if last.is_none() {
                    writers.remove(&run);
                }
                last
            });
        })?;
        writers.insert(run_id.to_owned(), sender);
        Ok(())
    }
}

impl Shared {
    fn writers(&self) -> MutexGuard<'_, HashMap<String, mpsc::Sender<Entry>>> {
        self.writers.lock().expect("no holder of the writers lock panics")
    }
}

#[cfg(test)]
mod tests;
