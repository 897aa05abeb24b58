//! A Hugging Face style hub. The files of a model come into the cache, in the layout of the Python package
//! `huggingface_hub`, so that both share one; those of a data set are streamed. Knows names of files, not what they
//! hold (but for the list of shards in `model.safetensors.index.json` and what a data set's README says of its parts).
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` mean what they mean there.

mod cache;
mod client;
mod dataset;
mod repo;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

pub(super) use self::dataset::of_readme;
pub use self::dataset::{HuggingFaceConfig, Patterns};
use cache::RepoCache;
use client::{Client, FetchError};
use repo::{Kind, Listing, Repo};

/// Whether downloads draw a bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// One bar a file on stderr, when stderr is a terminal; log lines in any case.
    Bar,
    /// Log lines only.
    Log,
}

/// The folder of the model that `spec` names: an existing folder, or `org/name` or `org/name@revision` on a hub,
/// downloaded into the cache where it is not there yet.
///
/// # Errors
/// No such folder, no such model, no access, nothing reachable and nothing cached, no space, a file that arrives
/// different from what the hub promised. The message names the remedy.
pub async fn resolve_model(spec: &str, progress: Progress) -> anyhow::Result<PathBuf> {
    match parse_spec(spec)? {
        Spec::Folder(folder) => Ok(folder),
        Spec::Hub(id) => Hub::new(HubSettings::from_env()?)?.model(&id, progress).await,
    }
}

/// What `--model` means.
#[derive(Debug, PartialEq, Eq)]
enum Spec {
    Folder(PathBuf),
    Hub(ModelId),
}

fn parse_spec(spec: &str) -> anyhow::Result<Spec> {
    let path = Path::new(spec);
    if path.is_dir() {
        return Ok(Spec::Folder(path.to_owned()));
    }
    ensure!(
        !path.is_file(),
        "model: {spec} is a file; name the folder that holds config.json, tokenizer.json and the safetensors"
    );
    match spec.parse() {
        Ok(id) => Ok(Spec::Hub(id)),
        Err(BadModelId) => bail!(
            "model: no folder {spec}, and it is no hub id either; name an existing folder, or a model as org/name \
             or org/name@revision"
        ),
    }
}

/// A model on a hub at a revision (branch, tag or commit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// `org/name`, or `name` alone for the hub's oldest models.
    pub repo: String,
    /// `main` unless given.
    pub revision: String,
}

/// A text that is no model id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not of the form org/name or org/name@revision")]
pub struct BadModelId;

impl FromStr for ModelId {
    type Err = BadModelId;

    fn from_str(text: &str) -> Result<Self, BadModelId> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        // The hub's own rules; they also keep the id from being a path anywhere else.
        let word = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("--")
                && !part.contains("..")
        };
        let repo_fits = repo.len() <= 96 && repo.split('/').count() <= 2 && repo.split('/').all(word);
        let revision_fits = revision.len() <= 255
            && revision.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
            && revision.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./+".contains(&b));
        if !repo_fits || !revision_fits {
            return Err(BadModelId);
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

/// Which hub, with whose token, cached where.
#[derive(Clone)]
pub struct HubSettings {
    /// `HF_ENDPOINT`, `https://huggingface.co` when not set.
    pub endpoint: String,
    /// `HF_TOKEN`, or the content of `$HF_HOME/token`.
    pub token: Option<String>,
    /// `HF_HUB_CACHE`, or `$HF_HOME/hub`; `HF_HOME` is `~/.cache/huggingface` when not set.
    pub cache_dir: PathBuf,
    /// `HF_HUB_OFFLINE`: ask nobody.
    pub offline: bool,
    /// Wait before the first retry; doubles with each.
    pub backoff: Duration,
}

impl HubSettings {
    /// From the process's environment.
    ///
    /// # Errors
    /// When neither `HF_HOME` nor a home folder is known.
    pub fn from_env() -> anyhow::Result<Self> {
        Self::from_lookup(&|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let get = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let truth = |name: &str| {
            get(name).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let home = get("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| get("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("huggingface")))
            .or_else(|| get("HOME").map(|dir| Path::new(&dir).join(".cache/huggingface")))
            .context("no folder for downloaded models: set HF_HOME")?;
        let token = get("HF_TOKEN").or_else(|| {
            let text = std::fs::read_to_string(home.join("token")).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        });
        Ok(Self {
            endpoint: get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token,
            cache_dir: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: truth("HF_HUB_OFFLINE") || truth("TRANSFORMERS_OFFLINE"),
            backoff: Duration::from_secs(1),
        })
    }
}

/// A hub with its cache.
pub struct Hub {
    client: Client,
    cache_dir: PathBuf,
    offline: bool,
}

impl Hub {
    /// Makes no request yet.
    ///
    /// # Errors
    /// An endpoint that is no URL, a token that is no header value, TLS that cannot be set up.
    pub fn new(settings: HubSettings) -> anyhow::Result<Self> {
        let client = Client::new(&settings.endpoint, settings.token.as_deref(), settings.backoff)?;
        Ok(Self { client, cache_dir: settings.cache_dir, offline: settings.offline })
    }

    /// The folder with the model's files at the commit that the revision stands for now.
    ///
    /// # Errors
    /// As [`resolve_model`].
    pub async fn model(&self, id: &ModelId, progress: Progress) -> anyhow::Result<PathBuf> {
        let cache = RepoCache::new(&self.cache_dir, &id.repo);
        let repo = Repo { kind: Kind::Model, name: id.repo.clone() };
        let cached = cache.complete_snapshot(&id.revision);
        if let Ok(snapshot) = &cached
            && cache::is_commit(&id.revision)
        {
            return Ok(snapshot.clone());
        }
        if self.offline {
            return cached.with_context(|| {
                format!(
                    "model {}: HF_HUB_OFFLINE is set, and the cache does not have all of it; unset it once",
                    id.repo
                )
            });
        }
        // With a copy at hand nobody should wait through all the retries.
        let patience = if cached.is_ok() { client::Patience::Short } else { client::Patience::Long };
        let listing = match (self.client.listing(&repo, &id.revision, patience).await, cached) {
            (Ok(listing), _) => listing,
            (Err(error), Ok(snapshot)) if error.is_unreachable() => {
                tracing::warn!(
                    error = %error, snapshot = %snapshot.display(), "the hub does not answer; using the cached model"
                );
                return Ok(snapshot);
            }
            (Err(error), Err(missing)) if error.is_unreachable() => {
                return Err(anyhow::Error::new(error).context(format!(
                    "model {}: the hub does not answer, and the cache does not have all of it ({missing:#})",
                    id.repo
                )));
            }
            (Err(error), _) => return Err(anyhow::Error::new(error).context(format!("model {}", id.repo))),
        };
        let snapshot = self.download(&repo, &cache, &listing, progress).await.map_err(|error| {
            anyhow::Error::new(error).context(format!("model {} at {}", id.repo, listing.commit))
        })?;
        // Last, so that the name stands for a complete snapshot. The files are there without it.
        if id.revision != listing.commit
            && let Err(error) = cache.write_ref(&id.revision, &listing.commit)
        {
            tracing::warn!(%error, "the cache cannot remember which commit {} is", id.revision);
        }
        Ok(snapshot)
    }

    async fn download(
        &self,
        repo: &Repo,
        cache: &RepoCache,
        listing: &Listing,
        progress: Progress,
    ) -> Result<PathBuf, FetchError> {
        let has = |name: &str| listing.files.iter().any(|file| file == name);
        for name in cache::REQUIRED {
            if !has(name) {
                return Err(FetchError::Unusable(format!("the repository has no {name}")));
            }
        }
        let snapshot = cache.snapshot(&listing.commit);
        for name in listing.files.iter().filter(|name| cache::is_small_model_file(name)) {
            self.file(repo, cache, &listing.commit, name, progress).await?;
        }
        if has(cache::SINGLE) {
            self.file(repo, cache, &listing.commit, cache::SINGLE, progress).await?;
        } else if has(cache::INDEX) {
            self.file(repo, cache, &listing.commit, cache::INDEX, progress).await?;
            for name in cache::shards(&snapshot).map_err(|e| FetchError::Unusable(format!("{e:#}")))? {
                if !has(&name) {
                    let message =
                        format!("{} names {name}, which the repository does not have", cache::INDEX);
                    return Err(FetchError::Unusable(message));
                }
                self.file(repo, cache, &listing.commit, &name, progress).await?;
            }
        } else {
            let other: Vec<&str> = listing
                .files
                .iter()
                .filter(|f| {
                    [".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack"].iter().any(|e| f.ends_with(e))
                })
                .map(String::as_str)
                .collect();
            return Err(FetchError::Unusable(format!(
                "the repository has neither {} nor {}; only safetensors can be loaded (it has: {})",
                cache::SINGLE,
                cache::INDEX,
                if other.is_empty() { "no weights".into() } else { other.join(", ") }
            )));
        }
        Ok(snapshot)
    }

    /// Puts one file into the snapshot.
    async fn file(
        &self,
        repo: &Repo,
        cache: &RepoCache,
        commit: &str,
        name: &str,
        progress: Progress,
    ) -> Result<(), FetchError> {
        if cache.snapshot(commit).join(name).exists() {
            return Ok(());
        }
        let meta = self.client.metadata(repo, commit, name).await?;
        cache.prepare().map_err(|e| FetchError::local(&cache.folder, e))?;
        let lock = cache.lock(&meta.etag).await;
        let blob = cache.blob(&meta.etag);
        // Another process may have brought it while this one waited for the lock.
        if std::fs::metadata(&blob).map(|m| m.len()).ok() != Some(meta.size) {
            tracing::info!(file = name, bytes = meta.size, "downloading");
            let bar = match progress {
                Progress::Bar => progress_bar(name, meta.size),
                Progress::Log => indicatif::ProgressBar::hidden(),
            };
            let partial = match &lock {
                Some(_) => cache.partial(&meta.etag),
                None => cache.unshared_partial(&meta.etag),
            };
            let fetched = self.client.download(repo, commit, name, &meta, &partial, &bar).await;
            bar.finish_and_clear();
            if fetched.is_err() && lock.is_none() {
                // No later attempt would find it. That it may not be there to remove is fine.
                let _ = std::fs::remove_file(&partial);
            }
            fetched?;
            cache::publish(&partial, &blob).map_err(|e| FetchError::local(&blob, e))?;
        }
        cache.link(commit, name, &meta.etag).map_err(|e| FetchError::local(&cache.snapshot(commit), e))
    }
}

/// Draws nothing where stderr is no terminal.
fn progress_bar(name: &str, bytes: u64) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template(
        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    )
    .expect("the template is fixed");
    indicatif::ProgressBar::new(bytes).with_style(style).with_message(name.to_owned())
}
