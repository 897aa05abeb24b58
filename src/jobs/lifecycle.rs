//! A job's way through its states, each step one transaction: accepted, taken, ended, cancelled, resumed,
//! forgotten.
//!
//! ```text
//! pending ──▶ running ──▶ completed
//!    │ ▲         ├──────▶ failed ────┐
//!    │ └─────────┼─ (start after a crash)
//!    └──────────▶└──────▶ cancelled ─┤
//!      ▲                             │
//!      └────────── resume ───────────┘
//! ```

use serde::Serialize;
use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, Sqlite, Transaction};

use super::store::Store;
use super::{JobsError, Outcome, new_id, now_ms};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Accepted; waits for its turn.
    Pending,
    /// Worked on.
    Running,
    /// Through.
    Completed,
    /// Ended with an error.
    Failed,
    /// Ended as asked.
    Cancelled,
}

impl JobState {
    /// As it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    pub fn parse(text: &str) -> Option<Self> {
        let all = [Self::Pending, Self::Running, Self::Completed, Self::Failed, Self::Cancelled];
        all.into_iter().find(|state| state.as_str() == text)
    }

    /// Whether nothing more happens unless somebody asks.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// A job to accept.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// Which work it is.
    pub kind: &'static str,
    /// What it makes; no two jobs that have not ended share one.
    pub name: String,
    /// Everything that the work needs to know.
    pub spec: Value,
    /// What whoever asked wants to see again.
    pub meta: Value,
    /// What was planned for it.
    pub plan: Value,
    /// The upload that it reads, which must be there still.
    pub file: Option<String>,
}

/// A job as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Ids sort by the time of acceptance.
    pub id: String,
    /// Which work it is.
    pub kind: String,
    /// What it makes.
    pub name: String,
    /// Everything that the work needs to know.
    pub spec: Value,
    /// What whoever asked wants to see again.
    pub meta: Value,
    /// What was planned for it.
    pub plan: Value,
    /// The upload that it reads.
    pub file: Option<String>,
    /// Where it stands.
    pub status: JobState,
    /// Somebody asked for its end.
    pub cancel_requested: bool,
    /// A sentence for people.
    pub message: String,
    /// Why it failed.
    pub error: Option<String>,
    /// How much is done, 0 to 1.
    pub fraction: f64,
    /// The latest figures; null before the first.
    pub progress: Value,
    /// What came of it; null until it is completed.
    pub result: Value,
    /// The step that it would continue from.
    pub checkpoint_step: Option<u64>,
    /// Accepted, milliseconds since 1970.
    pub created_ms: i64,
    /// First taken.
    pub started_ms: Option<i64>,
    /// Ended.
    pub finished_ms: Option<i64>,
}

/// Which jobs are listed.
#[derive(Debug, Clone, Copy, Default)]
pub struct JobFilter<'a> {
    /// Of this kind.
    pub kind: Option<&'a str>,
    /// In this state.
    pub status: Option<JobState>,
    /// Accepted before this one.
    pub before: Option<&'a str>,
}

/// How many jobs there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// By state.
    pub pending: u64,
    /// By state.
    pub running: u64,
    /// By state.
    pub completed: u64,
    /// By state.
    pub failed: u64,
    /// By state.
    pub cancelled: u64,
}

/// What asking for a job's end led to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cancelled {
    /// It had not begun, so it has ended.
    AtOnce(Job),
    /// It runs, and has to be told.
    Requested(Job),
}

impl Store {
    /// Accepts a job; once this returns, it survives whatever happens to the process.
    pub(super) async fn accept(&self, new: &NewJob) -> Result<Job, JobsError> {
        let mut transaction = self.write().await?;
        free_name(&mut transaction, &new.name).await?;
        if let Some(file) = &new.file
            && !has_file(&mut transaction, file).await?
        {
            return Err(JobsError::file_not_found(file));
        }
        let insert = "INSERT INTO jobs (id, kind, name, spec, meta, plan, file, status, message, created_ms)
            VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', 'waits for its turn', ?) RETURNING *";
        let insert = sqlx::query(insert)
            .bind(new_id())
            .bind(new.kind)
            .bind(&new.name)
            .bind(new.spec.to_string())
            .bind(new.meta.to_string())
            .bind(new.plan.to_string())
            .bind(&new.file)
            .bind(now_ms());
        let job = job(&insert.fetch_one(&mut *transaction).await?)?;
        transaction.commit().await?;
        Ok(job)
    }

    /// The pending job that was accepted first, running from now on.
    pub(super) async fn take(&self) -> Result<Option<Job>, JobsError> {
        let mut transaction = self.write().await?;
        let update = "UPDATE jobs SET status = 'running', message = 'running',
                started_ms = COALESCE(started_ms, ?), finished_ms = NULL
            WHERE number = (SELECT MIN(number) FROM jobs WHERE status = 'pending') RETURNING *";
        let row = sqlx::query(update).bind(now_ms()).fetch_optional(&mut *transaction).await?;
        let taken = row.as_ref().map(job).transpose()?;
        transaction.commit().await?;
        Ok(taken)
    }

    /// Records how a running job ended. A paused one stays as it is.
    pub(super) async fn end(&self, id: &str, outcome: &Outcome) -> Result<(), JobsError> {
        let (status, message, error, result) = match outcome {
            Outcome::Completed { result, message } => {
                ("completed", message.as_str(), None, Some(result.to_string()))
            }
            Outcome::Failed(error) => ("failed", "failed", Some(error.as_str()), None),
            Outcome::Cancelled(message) => ("cancelled", message.as_str(), None, None),
            Outcome::Paused => return Ok(()),
        };
        let update = "UPDATE jobs SET status = ?, message = ?, error = ?, result = ?, finished_ms = ?,
                cancel_requested = 0, fraction = CASE ? WHEN 'completed' THEN 1.0 ELSE fraction END
            WHERE id = ? AND status = 'running'";
        let update = sqlx::query(update).bind(status).bind(message).bind(error).bind(result).bind(now_ms());
        update.bind(status).bind(id).execute(&self.pool).await?;
        Ok(())
    }

    /// Ends a job that waits; asks one that runs to end.
    pub(super) async fn cancel(&self, id: &str) -> Result<Cancelled, JobsError> {
        let mut transaction = self.write().await?;
        let before = job_in(&mut transaction, id).await?;
        let cancelled = match before.status {
            JobState::Pending => {
                let update = "UPDATE jobs SET status = 'cancelled', message = 'cancelled before it began',
                    finished_ms = ? WHERE id = ? RETURNING *";
                let row = sqlx::query(update).bind(now_ms()).bind(id).fetch_one(&mut *transaction).await?;
                Cancelled::AtOnce(job(&row)?)
            }
            JobState::Running => {
                let update = "UPDATE jobs SET cancel_requested = 1, message = 'is being cancelled'
                    WHERE id = ? RETURNING *";
                let row = sqlx::query(update).bind(id).fetch_one(&mut *transaction).await?;
                Cancelled::Requested(job(&row)?)
            }
            ended => {
                let message = format!("cannot be cancelled: it is {} already", ended.as_str());
                return Err(JobsError::WrongState { id: id.to_owned(), message });
            }
        };
        transaction.commit().await?;
        Ok(cancelled)
    }

    /// Puts a failed or cancelled job back into the line.
    pub(super) async fn resume(&self, id: &str) -> Result<Job, JobsError> {
        let mut transaction = self.write().await?;
        let before = job_in(&mut transaction, id).await?;
        if !matches!(before.status, JobState::Failed | JobState::Cancelled) {
            let message = format!(
                "cannot be resumed: it is {}; only a failed or cancelled one can",
                before.status.as_str()
            );
            return Err(JobsError::WrongState { id: id.to_owned(), message });
        }
        free_name(&mut transaction, &before.name).await?;
        if let Some(file) = &before.file
            && !has_file(&mut transaction, file).await?
        {
            let message = format!("cannot be resumed: the file {file} that it reads was deleted");
            return Err(JobsError::WrongState { id: id.to_owned(), message });
        }
        let message = match before.checkpoint_step {
            Some(step) => format!("waits for its turn, to go on from step {step}"),
            None => "waits for its turn, to begin anew: it has no checkpoint".to_owned(),
        };
        let update = "UPDATE jobs SET status = 'pending', message = ?, error = NULL, finished_ms = NULL,
            cancel_requested = 0 WHERE id = ? RETURNING *";
        let row = sqlx::query(update).bind(message).bind(id).fetch_one(&mut *transaction).await?;
        let resumed = job(&row)?;
        transaction.commit().await?;
        Ok(resumed)
    }

    /// At the start: what ran when the process ended waits again, or has ended if that was asked for.
    /// Returns how many wait again.
    pub(super) async fn recover(&self) -> Result<u64, JobsError> {
        let mut transaction = self.write().await?;
        let cancelled = "UPDATE jobs SET status = 'cancelled', cancel_requested = 0, finished_ms = ?,
                message = 'cancelled; the server ended before the job did'
            WHERE status = 'running' AND cancel_requested = 1";
        sqlx::query(cancelled).bind(now_ms()).execute(&mut *transaction).await?;
        let again = "UPDATE jobs SET status = 'pending', message = 'waits for its turn after a restart'
            WHERE status = 'running'";
        let again = sqlx::query(again).execute(&mut *transaction).await?.rows_affected();
        transaction.commit().await?;
        Ok(again)
    }

    /// One job.
    pub(super) async fn job(&self, id: &str) -> Result<Job, JobsError> {
        let row = sqlx::query("SELECT * FROM jobs WHERE id = ?").bind(id).fetch_optional(&self.pool).await?;
        job(&row.ok_or_else(|| JobsError::job_not_found(id))?)
    }

    /// At most `limit` jobs, newest first.
    pub(super) async fn jobs(&self, filter: JobFilter<'_>, limit: u32) -> Result<Vec<Job>, JobsError> {
        let select = "SELECT * FROM jobs WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR status = ?2)
                AND (?3 IS NULL OR number < (SELECT number FROM jobs WHERE id = ?3))
            ORDER BY number DESC LIMIT ?4";
        let select = sqlx::query(select)
            .bind(filter.kind)
            .bind(filter.status.map(JobState::as_str))
            .bind(filter.before)
            .bind(limit);
        select.fetch_all(&self.pool).await?.iter().map(job).collect()
    }

    /// How many jobs there are in each state.
    pub(super) async fn counts(&self) -> Result<Counts, JobsError> {
        let rows = sqlx::query("SELECT status, COUNT(*) AS jobs FROM jobs GROUP BY status");
        let mut counts = Counts::default();
        for row in rows.fetch_all(&self.pool).await? {
            let jobs = unsigned(row.try_get("jobs")?);
            match JobState::parse(row.try_get("status")?) {
                Some(JobState::Pending) => counts.pending = jobs,
                Some(JobState::Running) => counts.running = jobs,
                Some(JobState::Completed) => counts.completed = jobs,
                Some(JobState::Failed) => counts.failed = jobs,
                Some(JobState::Cancelled) => counts.cancelled = jobs,
                None => {}
            }
        }
        Ok(counts)
    }

    /// The ended jobs that are not among the `keep` that ended last.
    pub(super) async fn beyond(&self, keep: u32) -> Result<Vec<String>, JobsError> {
        let select = "SELECT id FROM jobs WHERE status IN ('completed', 'failed', 'cancelled')
            ORDER BY finished_ms DESC, number DESC LIMIT -1 OFFSET ?";
        Ok(sqlx::query_scalar(select).bind(keep).fetch_all(&self.pool).await?)
    }

    /// Forgets a job that has ended, with its logs and figures. False when it goes on again.
    pub(super) async fn forget(&self, id: &str) -> Result<bool, JobsError> {
        let delete = "DELETE FROM jobs WHERE id = ? AND status IN ('completed', 'failed', 'cancelled')";
        Ok(sqlx::query(delete).bind(id).execute(&self.pool).await?.rows_affected() > 0)
    }
}

/// The partial index holds this too; asked first, so that the error can name the other job.
async fn free_name(transaction: &mut Transaction<'_, Sqlite>, name: &str) -> Result<(), JobsError> {
    let select = "SELECT id FROM jobs WHERE name = ? AND status IN ('pending', 'running')";
    let other: Option<String> =
        sqlx::query_scalar(select).bind(name).fetch_optional(&mut **transaction).await?;
    match other {
        None => Ok(()),
        Some(job) => Err(JobsError::NameTaken { name: name.to_owned(), job }),
    }
}

async fn has_file(transaction: &mut Transaction<'_, Sqlite>, id: &str) -> Result<bool, JobsError> {
    let found: Option<i64> = sqlx::query_scalar("SELECT 1 FROM files WHERE id = ?")
        .bind(id)
        .fetch_optional(&mut **transaction)
        .await?;
    Ok(found.is_some())
}

async fn job_in(transaction: &mut Transaction<'_, Sqlite>, id: &str) -> Result<Job, JobsError> {
    let select = sqlx::query("SELECT * FROM jobs WHERE id = ?").bind(id);
    job(&select.fetch_optional(&mut **transaction).await?.ok_or_else(|| JobsError::job_not_found(id))?)
}

fn job(row: &SqliteRow) -> Result<Job, JobsError> {
    let status: &str = row.try_get("status")?;
    let status = JobState::parse(status)
        .ok_or_else(|| JobsError::Store(format!("a job has the state {status:?}, which is not known")))?;
    Ok(Job {
        id: row.try_get("id")?,
        kind: row.try_get("kind")?,
        name: row.try_get("name")?,
        spec: json(row.try_get("spec")?)?,
        meta: json(row.try_get("meta")?)?,
        plan: json(row.try_get("plan")?)?,
        file: row.try_get("file")?,
        status,
        cancel_requested: row.try_get("cancel_requested")?,
        message: row.try_get("message")?,
        error: row.try_get("error")?,
        fraction: row.try_get("fraction")?,
        progress: json(row.try_get("progress")?)?,
        result: json(row.try_get("result")?)?,
        checkpoint_step: row.try_get::<Option<i64>, _>("checkpoint_step")?.map(unsigned),
        created_ms: row.try_get("created_ms")?,
        started_ms: row.try_get("started_ms")?,
        finished_ms: row.try_get("finished_ms")?,
    })
}

/// A column of JSON; nothing is null.
pub(super) fn json(text: Option<&str>) -> Result<Value, JobsError> {
    let parse = |text| serde_json::from_str(text).map_err(|error| JobsError::Store(error.to_string()));
    text.map_or(Ok(Value::Null), parse)
}

/// SQLite's integers have a sign; ours that are stored have none.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

/// The other way; no count of ours comes near the end.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
