//! Deliveries that were promised: what has to get where, and how far that is. Once a promise is in here, it survives
//! whatever happens to the process. What is delivered, and how, is not known here.

use std::sync::Arc;

use serde_json::Value;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use tokio::sync::Mutex;

use super::lifecycle::{signed, unsigned};
use super::store::Store;
use super::{JobsError, is_job_id, new_id, now_ms};

/// Delivered promises that are remembered.
const KEPT_DONE: u32 = 100_000;

/// The promises of one data folder. A cheap clone.
#[derive(Clone)]
pub struct Promises {
    store: Arc<Store>,
    /// Writers wait here in a row: SQLite would let them poll.
    turn: Arc<Mutex<()>>,
}

/// Where a promise stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PromiseState {
    /// Not delivered yet.
    Pending,
    /// Delivered.
    Done,
    /// Refused for good; it is tried again at the next start, and when somebody asks.
    Failed,
}

impl PromiseState {
    /// As it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// The state of this name.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Pending, Self::Done, Self::Failed].into_iter().find(|state| state.as_str() == text)
    }
}

/// A promise to give.
#[derive(Debug, Clone, PartialEq)]
pub struct NewPromise {
    /// Name of the place that it goes to.
    pub sink: String,
    /// What that place is, where its name alone will not say.
    pub target: Option<Value>,
    /// The run that it belongs to.
    pub run: String,
    /// Its name there.
    pub key: String,
    /// Hash of the content, hexadecimal.
    pub sha256: String,
    /// Size of the content.
    pub bytes: u64,
    /// Now, milliseconds since 1970; the key may contain it.
    pub created_ms: i64,
}

/// A promise as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Promise {
    /// Ids sort by the time of the promise.
    pub id: String,
    /// Name of the place that it goes to.
    pub sink: String,
    /// What that place is, where its name alone does not say.
    pub target: Option<Value>,
    /// The run that it belongs to.
    pub run: String,
    /// Its name there.
    pub key: String,
    /// Hash of the content, hexadecimal.
    pub sha256: String,
    /// Size of the content.
    pub bytes: u64,
    /// Where it stands.
    pub state: PromiseState,
    /// Attempts that did not succeed, since it last became pending.
    pub attempts: u32,
    /// Why the latest of them did not.
    pub error: Option<String>,
    /// When it was given, milliseconds since 1970.
    pub created_ms: i64,
    /// When the next attempt is due.
    pub next_ms: i64,
    /// When it was delivered or refused.
    pub ended_ms: Option<i64>,
}

/// How many promises there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PromiseCounts {
    /// Not delivered yet.
    pub pending: u64,
    /// Delivered, of those that are remembered.
    pub done: u64,
    /// Refused for good.
    pub failed: u64,
    /// When the oldest pending one was given, milliseconds since 1970.
    pub oldest_pending_ms: Option<i64>,
}

impl Promises {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store, turn: Arc::default() }
    }

    /// At the start: what was refused is tried once more, as settings and credentials may be others now; the oldest
    /// delivered promises are forgotten. Returns how many are pending.
    ///
    /// # Errors
    /// The store failed.
    pub async fn recover(&self) -> Result<u64, JobsError> {
        let _turn = self.turn.lock().await;
        let mut transaction = self.store.write().await?;
        let again = "UPDATE uploads SET state = 'pending', attempts = 0, next_ms = ?, ended_ms = NULL
            WHERE state = 'failed'";
        sqlx::query(again).bind(now_ms()).execute(&mut *transaction).await?;
        // Times of an earlier process may be far, and clocks change.
        let soon = "UPDATE uploads SET next_ms = ?1 WHERE state = 'pending' AND next_ms > ?1";
        sqlx::query(soon).bind(now_ms()).execute(&mut *transaction).await?;
        let forget = "DELETE FROM uploads WHERE state = 'done' AND number <=
            (SELECT number FROM uploads WHERE state = 'done' ORDER BY number DESC LIMIT 1 OFFSET ?)";
        sqlx::query(forget).bind(KEPT_DONE).execute(&mut *transaction).await?;
        let pending: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM uploads WHERE state = 'pending'")
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(unsigned(pending))
    }

    /// Gives a promise, and returns its id.
    ///
    /// # Errors
    /// The store failed; then nothing is promised.
    pub async fn give(&self, new: &NewPromise) -> Result<String, JobsError> {
        let id = new_id();
        let insert = "INSERT INTO uploads
                (id, sink, target, run, key, sha256, bytes, state, created_ms, next_ms)
            VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', ?, ?)";
        let insert = sqlx::query(insert)
            .bind(&id)
            .bind(&new.sink)
            .bind(new.target.as_ref().map(Value::to_string))
            .bind(&new.run)
            .bind(&new.key)
            .bind(&new.sha256)
            .bind(signed(new.bytes))
            .bind(new.created_ms)
            .bind(new.created_ms);
        let _turn = self.turn.lock().await;
        insert.execute(&self.store.pool).await?;
        Ok(id)
    }

    /// The sinks that have something to come.
    ///
    /// # Errors
    /// The store failed.
    pub async fn waiting_sinks(&self) -> Result<Vec<String>, JobsError> {
        let select = "SELECT DISTINCT sink FROM uploads WHERE state = 'pending'";
        Ok(sqlx::query_scalar(select).fetch_all(&self.store.pool).await?)
    }

    /// At most `limit` pending promises to one sink, those first whose turn comes first, due or not.
    ///
    /// # Errors
    /// The store failed.
    pub async fn next(&self, sink: &str, limit: u32) -> Result<Vec<Promise>, JobsError> {
        let select = "SELECT * FROM uploads WHERE state = 'pending' AND sink = ?
            ORDER BY next_ms, number LIMIT ?";
        let select = sqlx::query(select).bind(sink).bind(limit);
        select.fetch_all(&self.store.pool).await?.iter().map(promise).collect()
    }

    /// It is there.
    ///
    /// # Errors
    /// The store failed.
    pub async fn delivered(&self, id: &str) -> Result<(), JobsError> {
        let update = "UPDATE uploads SET state = 'done', error = NULL, ended_ms = ?
            WHERE id = ? AND state = 'pending'";
        self.update(sqlx::query(update).bind(now_ms()).bind(id)).await
    }

    /// An attempt did not succeed; another is due after `wait_ms`.
    ///
    /// # Errors
    /// The store failed.
    pub async fn deferred(&self, id: &str, reason: &str, wait_ms: u64) -> Result<(), JobsError> {
        let update = "UPDATE uploads SET attempts = attempts + 1, error = ?, next_ms = ?
            WHERE id = ? AND state = 'pending'";
        let next_ms = now_ms().saturating_add(signed(wait_ms));
        self.update(sqlx::query(update).bind(reason).bind(next_ms).bind(id)).await
    }

    /// It was refused for good.
    ///
    /// # Errors
    /// The store failed.
    pub async fn refused(&self, id: &str, reason: &str) -> Result<(), JobsError> {
        let update = "UPDATE uploads SET state = 'failed', attempts = attempts + 1, error = ?, ended_ms = ?
            WHERE id = ? AND state = 'pending'";
        self.update(sqlx::query(update).bind(reason).bind(now_ms()).bind(id)).await
    }

    /// Lets one that was refused be tried again, at once.
    ///
    /// # Errors
    /// No such promise; it was not refused; the store failed.
    pub async fn retry(&self, id: &str) -> Result<Promise, JobsError> {
        let before = self.get(id).await?;
        let update = "UPDATE uploads SET state = 'pending', attempts = 0, next_ms = ?, ended_ms = NULL
            WHERE id = ? AND state = 'failed' RETURNING *";
        let _turn = self.turn.lock().await;
        let update = sqlx::query(update).bind(now_ms()).bind(id);
        match update.fetch_optional(&self.store.pool).await? {
            Some(row) => promise(&row),
            None => Err(JobsError::NotRefused { id: before.id, state: before.state.as_str() }),
        }
    }

    /// One promise.
    ///
    /// # Errors
    /// No such promise; the store failed.
    pub async fn get(&self, id: &str) -> Result<Promise, JobsError> {
        let missing = || JobsError::PromiseNotFound { id: id.chars().take(80).collect() };
        if !is_job_id(id) {
            return Err(missing());
        }
        let select = sqlx::query("SELECT * FROM uploads WHERE id = ?").bind(id);
        promise(&select.fetch_optional(&self.store.pool).await?.ok_or_else(missing)?)
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
        if let Some(before) = before {
            self.get(before).await?;
        }
        let select = "SELECT * FROM uploads WHERE (?1 IS NULL OR state = ?1)
                AND (?2 IS NULL OR number < (SELECT number FROM uploads WHERE id = ?2))
            ORDER BY number DESC LIMIT ?3";
        let select = sqlx::query(select).bind(state.map(PromiseState::as_str)).bind(before).bind(limit);
        select.fetch_all(&self.store.pool).await?.iter().map(promise).collect()
    }

    /// How many there are in each state.
    ///
    /// # Errors
    /// The store failed.
    pub async fn counts(&self) -> Result<PromiseCounts, JobsError> {
        let select =
            "SELECT state, COUNT(*) AS promises, MIN(created_ms) AS oldest FROM uploads GROUP BY state";
        let mut counts = PromiseCounts::default();
        for row in sqlx::query(select).fetch_all(&self.store.pool).await? {
            let promises = unsigned(row.try_get("promises")?);
            match PromiseState::parse(row.try_get("state")?) {
                Some(PromiseState::Pending) => {
                    counts.pending = promises;
                    counts.oldest_pending_ms = row.try_get("oldest")?;
                }
                Some(PromiseState::Done) => counts.done = promises,
                Some(PromiseState::Failed) => counts.failed = promises,
                None => {}
            }
        }
        Ok(counts)
    }

    /// How many pending promises there are to each sink that has any.
    ///
    /// # Errors
    /// The store failed.
    pub async fn pending_by_sink(&self) -> Result<Vec<(String, u64)>, JobsError> {
        let select = "SELECT sink, COUNT(*) AS promises FROM uploads WHERE state = 'pending' GROUP BY sink";
        let rows = sqlx::query(select).fetch_all(&self.store.pool).await?;
        rows.iter().map(|row| Ok((row.try_get("sink")?, unsigned(row.try_get("promises")?)))).collect()
    }

    /// Whether a promise that is not delivered needs this content.
    ///
    /// # Errors
    /// The store failed.
    pub async fn needs(&self, sha256: &str) -> Result<bool, JobsError> {
        let select = "SELECT EXISTS (SELECT 1 FROM uploads WHERE sha256 = ? AND state <> 'done')";
        let found: i64 = sqlx::query_scalar(select).bind(sha256).fetch_one(&self.store.pool).await?;
        Ok(found == 1)
    }

    async fn update(
        &self,
        update: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<(), JobsError> {
        let _turn = self.turn.lock().await;
        update.execute(&self.store.pool).await?;
        Ok(())
    }
}

fn promise(row: &SqliteRow) -> Result<Promise, JobsError> {
    let state: &str = row.try_get("state")?;
    let state = PromiseState::parse(state)
        .ok_or_else(|| JobsError::Store(format!("an upload has the state {state:?}, which is not known")))?;
    let target: Option<&str> = row.try_get("target")?;
    let target = target.map(|text| super::lifecycle::json(Some(text))).transpose()?;
    Ok(Promise {
        id: row.try_get("id")?,
        sink: row.try_get("sink")?,
        target,
        run: row.try_get("run")?,
        key: row.try_get("key")?,
        sha256: row.try_get("sha256")?,
        bytes: unsigned(row.try_get("bytes")?),
        state,
        attempts: row.try_get("attempts")?,
        error: row.try_get("error")?,
        created_ms: row.try_get("created_ms")?,
        next_ms: row.try_get("next_ms")?,
        ended_ms: row.try_get("ended_ms")?,
    })
}

#[cfg(test)]
#[path = "promises_tests.rs"]
mod tests;
