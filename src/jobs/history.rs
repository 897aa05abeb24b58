//! What a job leaves behind while it runs: lines of its log, and one set of figures a step. Written in batches by
//! `writer`, read page by page.

use serde_json::Value;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::lifecycle::{json, signed, unsigned};
use super::store::Store;
use super::{JobsError, Level};

/// Lines that are kept of one job's log; older ones go.
pub(super) const LOG_LINES: u64 = 10_000;
/// Characters of one line; the rest is cut off.
const LINE_CHARS: usize = 4_000;

/// A line of a job's log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogLine {
    /// Counts from 0 in the order of writing.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// How much it matters.
    pub level: Level,
    /// The text.
    pub line: String,
}

/// Some lines of a log.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LogPage {
    /// In the order of writing.
    pub lines: Vec<LogLine>,
    /// Lines that were ever written: the number that the next one gets.
    pub total: u64,
    /// The oldest lines, which are no longer kept: the log begins with this number.
    pub dropped: u64,
}

/// The figures of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The step.
    pub step: u64,
    /// When it was first reported, milliseconds since 1970.
    pub at_ms: i64,
    /// The figures.
    pub metrics: Value,
}

/// The place of an event among all of its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventCursor {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Whether it is a point and no log line.
    pub is_point: bool,
    /// The line's number, or the step.
    pub number: u64,
}

/// A log line or a point.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its place.
    pub cursor: EventCursor,
    /// Of a point: info.
    pub level: Level,
    /// The line, or the figures as JSON.
    pub text: String,
}

/// What the writer puts down at once.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    /// A line of the log.
    Log { job: String, at_ms: i64, level: Level, line: String },
    /// Figures; `fraction` is how much is done, 0 to 1.
    Point { job: String, at_ms: i64, step: u64, fraction: f64, metrics: Value },
    /// A checkpoint is complete.
    Checkpoint { job: String, step: u64 },
}

impl Entry {
    pub(super) fn job(&self) -> &str {
        match self {
            Self::Log { job, .. } | Self::Point { job, .. } | Self::Checkpoint { job, .. } => job,
        }
    }
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "warn" => Self::Warn,
            "error" => Self::Error,
            _ => Self::Info,
        }
    }
}

impl Store {
    /// Writes entries in their order, all or none. Those of a job that was forgotten meanwhile are left out.
    pub(super) async fn put(&self, entries: &[Entry]) -> Result<(), JobsError> {
        let mut transaction = self.write().await?;
        for entry in entries {
            let query = match entry {
                Entry::Log { job, at_ms, level, line } => {
                    let insert = "INSERT INTO logs (job, number, at_ms, level, line)
                        SELECT ?1, (SELECT COALESCE(MAX(number), -1) + 1 FROM logs WHERE job = ?1), ?2, ?3, ?4
                        WHERE EXISTS (SELECT 1 FROM jobs WHERE id = ?1)";
                    let line: String = line.chars().take(LINE_CHARS).collect();
                    sqlx::query(insert).bind(job).bind(at_ms).bind(level.as_str()).bind(line)
                }
                Entry::Point { job, at_ms, step, fraction, metrics } => {
                    let metrics = metrics.to_string();
                    let update =
                        "UPDATE jobs SET progress = ?, fraction = ? WHERE id = ? AND status = 'running'";
                    let update = sqlx::query(update).bind(metrics.clone()).bind(fraction).bind(job);
                    update.execute(&mut *transaction).await?;
                    // A step that is reported again (with an evaluation, or after a crash) keeps its time.
                    let insert = "INSERT INTO points (job, step, at_ms, metrics) SELECT ?1, ?2, ?3, ?4
                        WHERE EXISTS (SELECT 1 FROM jobs WHERE id = ?1)
                        ON CONFLICT (job, step) DO UPDATE SET metrics = excluded.metrics";
                    sqlx::query(insert).bind(job).bind(signed(*step)).bind(at_ms).bind(metrics)
                }
                Entry::Checkpoint { job, step } => {
                    let update = "UPDATE jobs SET checkpoint_step = ? WHERE id = ?";
                    sqlx::query(update).bind(signed(*step)).bind(job)
                }
            };
            query.execute(&mut *transaction).await?;
        }
        let mut logged: Vec<&str> =
            entries.iter().filter(|e| matches!(e, Entry::Log { .. })).map(Entry::job).collect();
        logged.sort_unstable();
        logged.dedup();
        for job in logged {
            let delete = "DELETE FROM logs WHERE job = ?1
                AND number <= (SELECT MAX(number) FROM logs WHERE job = ?1) - ?2";
            let delete = sqlx::query(delete).bind(job).bind(signed(LOG_LINES));
            delete.execute(&mut *transaction).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// At most `limit` lines from number `start` on.
    pub(super) async fn log(&self, job: &str, start: u64, limit: u32) -> Result<LogPage, JobsError> {
        // One transaction, so that lines and counts are of one moment.
        let mut transaction = self.pool.begin().await?;
        let bounds = sqlx::query("SELECT MIN(number) AS first, MAX(number) AS last FROM logs WHERE job = ?");
        let bounds = bounds.bind(job).fetch_one(&mut *transaction).await?;
        let first: Option<i64> = bounds.try_get("first")?;
        let last: Option<i64> = bounds.try_get("last")?;
        let select = "SELECT * FROM logs WHERE job = ? AND number >= ? ORDER BY number LIMIT ?";
        let select = sqlx::query(select).bind(job).bind(signed(start)).bind(limit);
        let lines = select.fetch_all(&mut *transaction).await?.iter().map(line).collect::<Result<_, _>>()?;
        Ok(LogPage {
            lines,
            total: last.map_or(0, |last| unsigned(last) + 1),
            dropped: first.map_or(0, unsigned),
        })
    }

    /// The last `n` lines.
    pub(super) async fn log_tail(&self, job: &str, n: u32) -> Result<LogPage, JobsError> {
        let last: Option<i64> = sqlx::query_scalar("SELECT MAX(number) FROM logs WHERE job = ?")
            .bind(job)
            .fetch_one(&self.pool)
            .await?;
        let start = last.map_or(0, |last| (unsigned(last) + 1).saturating_sub(u64::from(n)));
        self.log(job, start, n).await
    }

    /// At most `limit` points after step `after`; `None` begins with the first.
    pub(super) async fn points(
        &self,
        job: &str,
        after: Option<u64>,
        limit: u32,
    ) -> Result<Vec<Point>, JobsError> {
        let select = "SELECT * FROM points WHERE job = ? AND step > ? ORDER BY step LIMIT ?";
        let select = sqlx::query(select).bind(job).bind(after.map_or(-1, signed)).bind(limit);
        let point = |row: &SqliteRow| {
            Ok(Point {
                step: unsigned(row.try_get("step")?),
                at_ms: row.try_get("at_ms")?,
                metrics: json(row.try_get("metrics")?)?,
            })
        };
        select.fetch_all(&self.pool).await?.iter().map(point).collect()
    }

    /// At most `limit` log lines and points, newest first, older than `before`.
    pub(super) async fn events(
        &self,
        job: &str,
        before: Option<EventCursor>,
        limit: u32,
    ) -> Result<Vec<Event>, JobsError> {
        let select = "SELECT * FROM (
                SELECT at_ms, 0 AS is_point, number, level, line AS text FROM logs WHERE job = ?1
                UNION ALL
                SELECT at_ms, 1, step, 'info', metrics FROM points WHERE job = ?1
            ) WHERE (at_ms, is_point, number) < (?2, ?3, ?4)
            ORDER BY at_ms DESC, is_point DESC, number DESC LIMIT ?5";
        let before = before.unwrap_or(EventCursor { at_ms: i64::MAX, is_point: true, number: u64::MAX });
        let select = sqlx::query(select)
            .bind(job)
            .bind(before.at_ms)
            .bind(i64::from(before.is_point))
            .bind(signed(before.number))
            .bind(limit);
        let event = |row: &SqliteRow| {
            let cursor = EventCursor {
                at_ms: row.try_get("at_ms")?,
                is_point: row.try_get::<i64, _>("is_point")? == 1,
                number: unsigned(row.try_get("number")?),
            };
            Ok(Event { cursor, level: Level::parse(row.try_get("level")?), text: row.try_get("text")? })
        };
        select.fetch_all(&self.pool).await?.iter().map(event).collect()
    }
}

fn line(row: &SqliteRow) -> Result<LogLine, JobsError> {
    Ok(LogLine {
        number: unsigned(row.try_get("number")?),
        at_ms: row.try_get("at_ms")?,
        level: Level::parse(row.try_get("level")?),
        line: row.try_get("line")?,
    })
}
