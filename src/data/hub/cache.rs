//! The cache folder of `huggingface_hub`: content by ETag in `blobs/`, names for it in `snapshots/COMMIT/`, what
//! a branch or tag stands for in `refs/`. Makes no request.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which weights are in which of several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What no model can do without, besides weights.
pub(super) const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];

/// Whether a repository's file belongs to a model, its weights apart.
pub(super) fn is_small_model_file(name: &str) -> bool {
    REQUIRED.contains(&name)
        || ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"].contains(&name)
        || (name.starts_with("chat_template.") && !name.contains('/'))
}

/// Whether a text is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether a name stays inside the folder that it is joined to.
pub(super) fn is_inside(name: &str) -> bool {
    !name.contains(['\\', '\0', ':'])
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Names of the files with weights, from the index in a model's folder.
pub(super) fn shards(snapshot: &Path) -> anyhow::Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let text = fs::read(snapshot.join(INDEX)).with_context(|| format!("cannot read {INDEX}"))?;
    let index: Index =
        serde_json::from_slice(&text).with_context(|| format!("{INDEX} is not what it should be"))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| !is_inside(name) || !name.ends_with(".safetensors")) {
        bail!("{INDEX} names '{name}', which is no safetensors file of this repository");
    }
    if names.is_empty() {
        bail!("{INDEX} names no file");
    }
    Ok(names)
}

/// The cache of one repository.
pub(super) struct RepoCache {
    /// `models--org--name`.
    pub(super) folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(&name) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// A download that is not through, under a name that the next attempt finds. For the holder of the lock.
    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The same under a name of its own, where there is no lock to keep others from writing to it.
    pub(super) fn unshared_partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.{}.incomplete", uuid::Uuid::new_v4().simple()))
    }

    /// The snapshot of a revision, when all that a model needs is there.
    pub(super) fn complete_snapshot(&self, revision: &str) -> anyhow::Result<PathBuf> {
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let path = self.folder.join("refs").join(revision);
            let text = fs::read_to_string(&path)
                .with_context(|| format!("no revision '{revision}' in {}", self.folder.display()))?;
            text.trim().to_owned()
        };
        if !is_commit(&commit) {
            bail!("'{commit}' in {} is no commit", self.folder.join("refs").join(revision).display());
        }
        let snapshot = self.snapshot(&commit);
        let mut missing: Vec<String> = REQUIRED
            .iter()
            .filter(|name| !snapshot.join(name).exists())
            .map(|name| (*name).to_owned())
            .collect();
        if !snapshot.join(SINGLE).exists() {
            if snapshot.join(INDEX).exists() {
                missing.extend(shards(&snapshot)?.into_iter().filter(|name| !snapshot.join(name).exists()));
            } else {
                missing.push(format!("{SINGLE} or {INDEX}"));
            }
        }
        if !missing.is_empty() {
            bail!("{} has no {}", snapshot.display(), missing.join(", "));
        }
        Ok(snapshot)
    }

    /// Makes the folders that a download writes to.
    pub(super) fn prepare(&self) -> io::Result<()> {
        fs::create_dir_all(self.folder.join("blobs"))
    }

    /// Holds other processes off one blob, `huggingface_hub`'s included, until the answer is dropped. `None`
    /// where the file system has no locks.
    pub(super) async fn lock(&self, etag: &str) -> Option<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = move || {
            fs::create_dir_all(path.parent().expect("the lock's path has a folder"))?;
            let file = File::options().create(true).write(true).truncate(false).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    tracing::info!(lock = %path.display(), "waiting for another process that downloads this file");
                    file.lock()?;
                }
                Err(fs::TryLockError::Error(error)) => return Err(error),
            }
            io::Result::Ok(file)
        };
        match tokio::task::spawn_blocking(lock).await.expect("locking does not panic") {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::debug!(%error, "no lock on the cache");
                None
            }
        }
    }

    /// Gives a blob its name in a snapshot.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> io::Result<()> {
        let path = self.snapshot(commit).join(name);
        let folder = path.parent().expect("a file in a snapshot has a folder");
        fs::create_dir_all(folder)?;
        // A link that leads nowhere would make the next call fail.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Relative, so that the cache can be moved: up from the file's folder to the repository's.
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + name.matches('/').count());
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &path)?;
        }
        // `huggingface_hub` does the same where links need special rights.
        #[cfg(not(unix))]
        fs::copy(self.blob(etag), &path)?;
        sync_folder(folder)
    }

    /// Notes which commit a branch or tag stands for.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> io::Result<()> {
        let path = self.folder.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        fs::create_dir_all(path.parent().expect("a ref has a folder"))?;
        let temporary = path.with_file_name(format!(".{}.tmp", uuid::Uuid::new_v4()));
        fs::write(&temporary, commit)?;
        publish(&temporary, &path)
    }
}

/// Puts a complete file under its name: content first, then the name.
pub(super) fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    File::open(temporary)?.sync_all()?;
    fs::rename(temporary, path)?;
    sync_folder(path.parent().expect("a file of the cache has a folder"))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    // Elsewhere a folder cannot be opened as a file, and renames need no such call.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
