//! Long-running work that outlives a request and a crash: its states, its store (SQLite) and the runner that
//! takes accepted jobs one after another. What a job does is not known here, and neither is HTTP.
//!
//! ```text
//! data_dir/
//!   gurukul.db        jobs, their logs and figures, uploaded files, promised deliveries
//!   gurukul.lock      held by the one process that uses the folder
//!   jobs/{id}/        what a job keeps while it runs and after; removed when the job is forgotten
//!   files/{id}.jsonl  uploads
//! ```

mod files;
mod history;
mod lifecycle;
mod promises;
mod runner;
mod store;
mod writer;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use serde::Serialize;
use serde_json::Value;

pub use files::{Files, Upload, UploadedFile};
pub use history::{Event, EventCursor, LogLine, LogPage, Point};
pub use lifecycle::{Counts, Job, JobFilter, JobState, NewJob};
pub use promises::{NewPromise, Promise, PromiseCounts, PromiseState, Promises};
pub use runner::{JobHandle, Jobs, Settings, Watch};
pub use store::{FolderLock, OpenError, Store};

/// What is done for one kind of job. It continues by itself where an earlier run of the same job ended.
pub type Work = Arc<dyn Fn(JobHandle) -> BoxFuture<'static, Outcome> + Send + Sync>;

/// How a run of a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Through, with what came of it and a sentence for people.
    Completed {
        /// What came of it.
        result: Value,
        /// For people.
        message: String,
    },
    /// It cannot be done; the reason.
    Failed(String),
    /// Ended as asked; a sentence for people.
    Cancelled(String),
    /// Interrupted as asked; it goes on at the next start.
    Paused,
}

/// Whether a running job is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stop {
    /// No.
    #[default]
    No,
    /// For good.
    Cancel,
    /// Until the next start: the process ends.
    Pause,
}

/// How much a line of a log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What happens.
    Info,
    /// Something is not as it should be, and the work goes on.
    Warn,
    /// The work ends.
    Error,
}

/// Why something cannot be done with a job or a file.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JobsError {
    /// No such job.
    #[error("there is no job {id}; GET /adapter/jobs lists those there are")]
    NotFound {
        /// As asked for, shortened.
        id: String,
    },
    /// Another job that is not through has the name.
    #[error("the job {job} is making {name:?} already; wait for it, cancel it, or choose another name")]
    NameTaken {
        /// The name.
        name: String,
        /// The other job.
        job: String,
    },
    /// The job's state does not allow it.
    #[error("the job {id} {message}")]
    WrongState {
        /// The job.
        id: String,
        /// To be read after the id.
        message: String,
    },
    /// No such file.
    #[error("there is no file {id}; GET /v1/files lists those there are")]
    FileNotFound {
        /// As asked for, shortened.
        id: String,
    },
    /// A job that is not through reads the file.
    #[error("the file {id} is read by the job {job}; cancel it or wait for its end first")]
    FileInUse {
        /// The file.
        id: String,
        /// The job.
        job: String,
    },
    /// No such promised delivery.
    #[error("there is no upload {id}; GET /rl/uploads lists those there are")]
    PromiseNotFound {
        /// As asked for, shortened.
        id: String,
    },
    /// It was not refused.
    #[error("the upload {id} is {state}; only a failed one can be tried again")]
    NotRefused {
        /// The promise.
        id: String,
        /// Where it stands.
        state: &'static str,
    },
    /// The database or the disk refused; nothing was changed.
    #[error("the job store failed: {0}")]
    Store(String),
    /// The disk, or what the process may take of it, is full; nothing was changed.
    #[error("the disk is full: {0}")]
    Full(String),
    /// The process is ending.
    #[error("the server is shutting down")]
    Stopping,
}

impl From<sqlx::Error> for JobsError {
    fn from(error: sqlx::Error) -> Self {
        // SQLITE_FULL, whatever its extended code.
        let is_full = error
            .as_database_error()
            .and_then(|error| error.code()?.parse::<u32>().ok())
            .is_some_and(|code| code & 0xff == 13);
        if is_full { Self::Full(error.to_string()) } else { Self::Store(error.to_string()) }
    }
}

impl JobsError {
    fn job_not_found(id: &str) -> Self {
        Self::NotFound { id: id.chars().take(80).collect() }
    }

    fn file_not_found(id: &str) -> Self {
        Self::FileNotFound { id: id.chars().take(80).collect() }
    }

    fn io(what: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let reason = format!("{what}: {error}");
        match error.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => Self::Full(reason),
            _ => Self::Store(reason),
        }
    }
}

/// A new job's id: ids sort by their time.
fn new_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// Whether a text can be the id of a job. Nothing else reaches the database or a path.
pub fn is_job_id(text: &str) -> bool {
    uuid::Uuid::try_parse(text)
        .is_ok_and(|id| id.get_version_num() == 7 && id.hyphenated().to_string() == text)
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// RFC 3339 of milliseconds since 1970.
pub fn rfc3339(ms: i64) -> String {
    let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or_default());
    humantime::format_rfc3339_millis(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_ids_are_ids() {
        let id = new_id();
        assert!(is_job_id(&id));
        for other in [
            "",
            "..",
            "../../etc/passwd",
            "0",
            &id.to_uppercase(),
            &id.replace('-', ""),
            &format!("{{{id}}}"),
            &format!("urn:uuid:{id}"),
            &format!("{id}/"),
            &uuid::Uuid::new_v4().to_string(),
        ] {
            assert!(!is_job_id(other), "{other}");
        }
    }

    #[test]
    fn times_are_rfc3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(-5), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
    }
}
