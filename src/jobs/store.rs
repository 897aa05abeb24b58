//! The database file: how it is opened, checked and brought to the present schema. What is asked of it is in
//! `lifecycle` (jobs), `history` (logs and figures), `files` (what clients sent) and `promises` (what is sent elsewhere).

use std::fs::{File, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Sqlite, SqlitePool, Transaction};

use super::JobsError;

/// The database inside the data folder.
const DATABASE: &str = "gurukul.db";
/// Held by the process that uses the data folder.
const LOCK: &str = "gurukul.lock";
/// How long a statement waits for another connection's transaction.
const BUSY: Duration = Duration::from_secs(10);
/// How long a request waits for a connection.
const ACQUIRE: Duration = Duration::from_secs(10);
/// Writers take turns anyway; the others read.
const CONNECTIONS: u32 = 4;

/// The steps from an empty file to the present schema; `PRAGMA user_version` counts those that were taken. A step
/// that was released is never changed.
const SCHEMA: [&str; 2] = [FIRST, UPLOADS];

const FIRST: &str = "
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        spec TEXT NOT NULL,
        meta TEXT,
        plan TEXT,
        file TEXT,
        status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        message TEXT NOT NULL,
        error TEXT,
        fraction REAL NOT NULL DEFAULT 0,
        progress TEXT,
        result TEXT,
        checkpoint_step INTEGER,
        created_ms INTEGER NOT NULL,
        started_ms INTEGER,
        finished_ms INTEGER
    ) STRICT;
    CREATE UNIQUE INDEX one_active_job_a_name ON jobs (name) WHERE status IN ('pending', 'running');
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE TABLE logs (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        level TEXT NOT NULL,
        line TEXT NOT NULL,
        PRIMARY KEY (job, number)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE points (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        metrics TEXT NOT NULL,
        PRIMARY KEY (job, step)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        records INTEGER NOT NULL,
        created_ms INTEGER NOT NULL
    ) STRICT;
";

const UPLOADS: &str = "
    CREATE TABLE uploads (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        sink TEXT NOT NULL,
        target TEXT,
        run TEXT NOT NULL,
        key TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('pending', 'done', 'failed')),
        attempts INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        created_ms INTEGER NOT NULL,
        next_ms INTEGER NOT NULL,
        ended_ms INTEGER
    ) STRICT;
    CREATE INDEX uploads_in_turn ON uploads (state, sink, next_ms, number);
    CREATE INDEX uploads_by_content ON uploads (sha256);
";

/// Why the database cannot be used, with the remedy.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}; {remedy}", path.display())]
pub struct OpenError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
    /// What to do about it.
    pub remedy: &'static str,
}

const REMEDY_FOLDER: &str = "the data folder must be writable and have room; see --data-dir";
const REMEDY_CORRUPT: &str =
    "put a backup in its place, or move it away together with its -wal and -shm files to begin without jobs";
const REMEDY_NEWER: &str = "start the newer version that wrote it, or name another --data-dir";
const REMEDY_LOCKED: &str = "stop that one, or name another --data-dir";

/// The open database. Ends when it is dropped; what was committed stays.
pub struct Store {
    pub(super) pool: SqlitePool,
    _lock: FolderLock,
}

/// One process has the data folder for itself. Released by the system when the process ends in whatever way.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl Store {
    /// Opens the database in the data folder, creating it where there is none, and brings it to the present schema.
    ///
    /// # Errors
    /// A folder that cannot be written, a damaged file, one of a newer version, another process that uses it.
    pub async fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let lock = FolderLock::take(data_dir)?;
        let path = data_dir.join(DATABASE);
        let fault = |error: sqlx::Error| OpenError {
            path: path.clone(),
            remedy: if is_damage(&error) { REMEDY_CORRUPT } else { REMEDY_FOLDER },
            reason: error.to_string(),
        };
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What is acknowledged survives a power cut too, not only a killed process.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY)
            .disable_statement_logging();
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(ACQUIRE)
            // On a full disk SQLite takes a transaction back by itself (<https://sqlite.org/lang_transaction.html>), the
            // driver's own rollback then fails, and its connection, which could begin no other, has to be replaced.
            .before_acquire(|connection, _| {
                let usable = !connection.is_in_transaction();
                Box::pin(async move { Ok(usable) })
            })
            .connect_with(options);
        let pool = pool.await.map_err(fault)?;
        let found: String =
            sqlx::query_scalar("PRAGMA quick_check(1)").fetch_one(&pool).await.map_err(fault)?;
        if found != "ok" {
            return Err(OpenError { path, reason: found, remedy: REMEDY_CORRUPT });
        }
        let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&pool).await.map_err(fault)?;
        let known = SCHEMA.len();
        let taken = usize::try_from(version).unwrap_or(usize::MAX);
        if taken > known {
            let reason =
                format!("it has schema {version}, and this version of gurukul knows those up to {known}");
            return Err(OpenError { path, reason, remedy: REMEDY_NEWER });
        }
        for (step, statements) in SCHEMA.iter().enumerate().skip(taken) {
            migrate(&pool, step, statements).await.map_err(fault)?;
        }
        Ok(Self { pool, _lock: lock })
    }

    /// A transaction that has the right to write from its beginning, so that it cannot fail half-way for want of it.
    pub(super) async fn write(&self) -> Result<Transaction<'static, Sqlite>, JobsError> {
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Finishes what is under way and closes the file.
    pub(super) async fn close(&self) {
        self.pool.close().await;
    }
}

async fn migrate(pool: &SqlitePool, step: usize, statements: &'static str) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::raw_sql(statements).execute(&mut *transaction).await?;
    let version = format!("PRAGMA user_version = {}", step + 1);
    // The only dynamic part is a number of our own, and a pragma takes no bound values.
    sqlx::raw_sql(sqlx::AssertSqlSafe(version)).execute(&mut *transaction).await?;
    transaction.commit().await
}

impl FolderLock {
    /// Takes the data folder.
    ///
    /// # Errors
    /// Another process has it, with its id; a folder that cannot be written.
    pub fn take(data_dir: &Path) -> Result<Self, OpenError> {
        let path = data_dir.join(LOCK);
        let fault = |reason: String, remedy| OpenError { path: path.clone(), reason, remedy };
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = file.map_err(|error| fault(error.to_string(), REMEDY_FOLDER))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // For a person alone; a holder of an older version, or one that has just begun, has not written it.
                let _ = file.read_to_string(&mut holder);
                let process = holder.trim().parse::<u32>();
                let process = process.map_or(String::new(), |id| format!(" (process {id})"));
                let reason = format!("another gurukul{process} uses this data folder");
                return Err(fault(reason, REMEDY_LOCKED));
            }
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "this file system has no locks; let one server alone use the folder");
            }
            Err(TryLockError::Error(error)) => return Err(fault(error.to_string(), REMEDY_FOLDER)),
        }
        // A disk without room for it is told by whatever needs the room.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

/// SQLITE_CORRUPT and SQLITE_NOTADB.
fn is_damage(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<u32>().ok());
    code.is_some_and(|code| matches!(code & 0xff, 11 | 26))
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
