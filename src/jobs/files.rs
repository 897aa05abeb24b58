//! Uploaded files: the content in a folder, what is known of it in the database. A row is written last and deleted
//! first, so that what is listed is complete; what a crash left without a row goes at the next start. What is in a
//! file is not known here.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use tokio::fs;
use tokio::io::AsyncWriteExt as _;

use super::lifecycle::{signed, unsigned};
use super::store::{OpenError, Store};
use super::{JobsError, now_ms};

/// Before the hexadecimal part of an id.
const PREFIX: &str = "file-";
/// Of complete files.
const COMPLETE: &str = "jsonl";
/// Of those that are still being written.
const PART: &str = "part";

/// An uploaded file.
#[derive(Debug, Clone, PartialEq)]
pub struct UploadedFile {
    /// Minted here; never what a client said.
    pub id: String,
    /// As the client named it; for people alone.
    pub filename: String,
    /// What for.
    pub purpose: String,
    /// Size.
    pub bytes: u64,
    /// Records in it.
    pub records: u64,
    /// Milliseconds since 1970.
    pub created_ms: i64,
}

/// The uploads of one data folder.
pub struct Files {
    dir: PathBuf,
    store: Arc<Store>,
}

/// A file that is being received. Dropped before its end, it leaves nothing.
pub struct Upload {
    id: String,
    part: PathBuf,
    complete: PathBuf,
    file: fs::File,
    bytes: u64,
    store: Arc<Store>,
    is_finished: bool,
}

impl Files {
    /// Makes the folder and removes what a crash left in it.
    pub(super) async fn open(dir: PathBuf, store: Arc<Store>) -> Result<Self, OpenError> {
        let fault = |reason: String| OpenError {
            path: dir.clone(),
            reason,
            remedy: "the data folder must be writable and have room; see --data-dir",
        };
        // Jobs keep the path, and may run when the server is started from another folder.
        let dir = std::path::absolute(&dir).map_err(|error| fault(error.to_string()))?;
        fs::create_dir_all(&dir).await.map_err(|error| fault(error.to_string()))?;
        let files = Self { dir, store };
        files.sweep().await.map_err(|error| fault(error.to_string()))?;
        Ok(files)
    }

    async fn sweep(&self) -> Result<(), JobsError> {
        let fault = |error| JobsError::io("the folder of uploads cannot be read", &error);
        let mut entries = fs::read_dir(&self.dir).await.map_err(fault)?;
        while let Some(entry) = entries.next_entry().await.map_err(fault)? {
            let path = entry.path();
            let id = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let extension = path.extension().and_then(|extension| extension.to_str());
            // Nothing but what was made here is removed.
            let is_left_over = is_file_id(id)
                && match extension {
                    Some(PART) => true,
                    Some(COMPLETE) => matches!(self.get(id).await, Err(JobsError::FileNotFound { .. })),
                    _ => false,
                };
            if is_left_over {
                fs::remove_file(&path).await.map_err(fault)?;
                tracing::info!(id, "removed an upload that was not finished");
            }
        }
        Ok(())
    }

    /// Begins to receive a file.
    ///
    /// # Errors
    /// The disk refuses.
    pub async fn begin(&self) -> Result<Upload, JobsError> {
        let id = format!("{PREFIX}{}", uuid::Uuid::new_v4().simple());
        let part = self.path(&id).with_extension(PART);
        let file = fs::File::create_new(&part).await.map_err(|e| refused(&e))?;
        Ok(Upload {
            complete: self.path(&id),
            id,
            part,
            file,
            bytes: 0,
            store: self.store.clone(),
            is_finished: false,
        })
    }

    /// What is known of a file.
    ///
    /// # Errors
    /// No such file; the store failed.
    pub async fn get(&self, id: &str) -> Result<UploadedFile, JobsError> {
        if !is_file_id(id) {
            return Err(JobsError::file_not_found(id));
        }
        let select = sqlx::query("SELECT * FROM files WHERE id = ?").bind(id);
        let row = select.fetch_optional(&self.store.pool).await?;
        file(&row.ok_or_else(|| JobsError::file_not_found(id))?)
    }

    /// At most `limit` files, newest first, older than `before`.
    ///
    /// # Errors
    /// The file to begin after does not exist; the store failed.
    pub async fn list(&self, before: Option<&str>, limit: u32) -> Result<Vec<UploadedFile>, JobsError> {
        if let Some(before) = before {
            self.get(before).await?;
        }
        let select = "SELECT * FROM files
            WHERE ?1 IS NULL OR number < (SELECT number FROM files WHERE id = ?1)
            ORDER BY number DESC LIMIT ?2";
        let rows = sqlx::query(select).bind(before).bind(limit).fetch_all(&self.store.pool).await?;
        rows.iter().map(file).collect()
    }

    /// Where the content of a file is, which must have been asked for with [`Files::get`].
    pub fn path_of(&self, file: &UploadedFile) -> PathBuf {
        self.path(&file.id)
    }

    /// Opens the content.
    ///
    /// # Errors
    /// Somebody removed or locked it.
    pub async fn content(&self, file: &UploadedFile) -> Result<fs::File, JobsError> {
        let path = self.path(&file.id);
        fs::File::open(path).await.map_err(|error| JobsError::io("the file's content cannot be read", &error))
    }

    /// Deletes a file that no active job reads.
    pub(super) async fn delete(&self, id: &str) -> Result<(), JobsError> {
        self.get(id).await?;
        let mut transaction = self.store.write().await?;
        let select = "SELECT id FROM jobs WHERE file = ? AND status IN ('pending', 'running')";
        let reader: Option<String> =
            sqlx::query_scalar(select).bind(id).fetch_optional(&mut *transaction).await?;
        if let Some(job) = reader {
            return Err(JobsError::FileInUse { id: id.to_owned(), job });
        }
        sqlx::query("DELETE FROM files WHERE id = ?").bind(id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if let Err(error) = fs::remove_file(self.path(id)).await {
            // It goes at the next start.
            tracing::warn!(id, %error, "the content of a deleted file is still there");
        }
        Ok(())
    }

    /// `id` must have passed [`is_file_id`].
    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(id).with_extension(COMPLETE)
    }
}

impl Upload {
    /// Adds to the content.
    ///
    /// # Errors
    /// The disk refuses.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), JobsError> {
        self.file.write_all(bytes).await.map_err(|error| refused(&error))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Puts the complete file in its place; from now on it is listed, whatever happens to the process.
    ///
    /// # Errors
    /// The disk or the store refuses; then nothing is left of it.
    pub async fn finish(
        mut self,
        filename: String,
        purpose: String,
        records: u64,
    ) -> Result<UploadedFile, JobsError> {
        self.file.flush().await.map_err(|error| refused(&error))?;
        self.file.sync_all().await.map_err(|error| refused(&error))?;
        fs::rename(&self.part, &self.complete).await.map_err(|error| refused(&error))?;
        sync_folder_of(&self.complete).await.map_err(|error| refused(&error))?;
        let insert = "INSERT INTO files (id, filename, purpose, bytes, records, created_ms)
            VALUES (?, ?, ?, ?, ?, ?) RETURNING *";
        let insert = sqlx::query(insert)
            .bind(&self.id)
            .bind(filename)
            .bind(purpose)
            .bind(signed(self.bytes))
            .bind(signed(records))
            .bind(now_ms());
        let row = insert.fetch_one(&self.store.pool).await?;
        self.is_finished = true;
        file(&row)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_finished {
            // One of the two is there. Where removing fails, the next start tries again.
            let _ = std::fs::remove_file(&self.part);
            let _ = std::fs::remove_file(&self.complete);
        }
    }
}

/// Whether a text can be the id of a file. Nothing else becomes a path.
pub(super) fn is_file_id(text: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.strip_prefix(PREFIX).is_some_and(|rest| rest.len() == 32 && rest.bytes().all(hex))
}

fn refused(error: &io::Error) -> JobsError {
    JobsError::io("the file cannot be stored", error)
}

#[cfg(unix)]
async fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::File::open(folder).await?.sync_all().await
}

/// Elsewhere a folder cannot be opened, and a rename is as safe as it gets.
#[cfg(not(unix))]
async fn sync_folder_of(_: &Path) -> io::Result<()> {
    Ok(())
}

fn file(row: &SqliteRow) -> Result<UploadedFile, JobsError> {
    Ok(UploadedFile {
        id: row.try_get("id")?,
        filename: row.try_get("filename")?,
        purpose: row.try_get("purpose")?,
        bytes: unsigned(row.try_get("bytes")?),
        records: unsigned(row.try_get("records")?),
        created_ms: row.try_get("created_ms")?,
    })
}
