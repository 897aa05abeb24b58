//! Data sets of a Hugging Face style hub, streamed file by file at one commit. Finds the files as the Python package
//! `datasets` does; runs no code of a repository. Knows nothing of rows.

mod card;
mod file;
mod patterns;
mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::card::Config;
pub(in crate::data) use self::card::of_readme;
use self::file::HubFile;
use self::plan::{Wanted, converted, plan};
use super::client::{Client, FetchError, Patience};
use super::repo::{Entry, Kind, Repo};
use super::{HubSettings, ModelId};
use crate::data::Format;
use crate::data::decode::format_of_name;
use crate::data::object::{Object, Opened, Opening, Rows};
use crate::data::remote::RemoteObject;

/// Files that one source may have.
const MAX_FILES: usize = 200_000;
/// The branch with what the hub itself made of a data set.
const CONVERTED: &str = "refs/convert/parquet";
/// Before the commit in a pin, when it is one of that branch.
const CONVERTED_PIN: &str = "parquet:";

/// The keys of `type: huggingface`.
///
/// `HF_ENDPOINT` says which hub, `HF_TOKEN` (or the file `$HF_HOME/token`) opens what is private or gated. The commit
/// that the revision stands for when a job begins is kept with the job, which reads at that commit to its end,
/// whatever becomes of the branch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HuggingFaceConfig {
    /// `org/name`.
    pub repo: String,
    /// The part of the data set, as its page lists them under Subset; needed where there are several and none is the
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// Such as `train`, `validation`, `test`.
    pub split: String,
    /// Branch, tag or commit; `main` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// A file of the repository, a pattern such as `hi/*.jsonl.gz` (`**` for any folders), or a list of these. Goes
    /// before what the README says, so there is no `config` and no other split than `train` beside it.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub data_files: Patterns,
    /// The folder to look in instead of what the README says; `data_files` begins there too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<String>,
    /// Always true: files are read where they lie. A data set that shall be on this machine's disk is brought by
    /// `hf download` and read with `type: local`.
    pub streaming: bool,
}

impl Default for HuggingFaceConfig {
    fn default() -> Self {
        Self {
            repo: String::new(),
            config: None,
            split: "train".into(),
            revision: None,
            data_files: Patterns::default(),
            data_dir: None,
            streaming: true,
        }
    }
}

/// One pattern or several.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrMany")]
pub struct Patterns(pub Vec<String>);

impl Patterns {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for Patterns {
    fn from(typed: OneOrMany) -> Self {
        match typed {
            OneOrMany::One(pattern) => Self(vec![pattern]),
            OneOrMany::Many(patterns) => Self(patterns),
        }
    }
}

impl HuggingFaceConfig {
    pub(in crate::data) fn check(&self) -> Result<(), String> {
        if self.repo.is_empty() {
            return Err("repo is missing; name a data set as org/name".into());
        }
        if self.repo.contains('@') || self.repo.parse::<ModelId>().is_err() {
            let repo = &self.repo;
            return Err(format!(
                "repo: '{repo}' is no data set on a hub; write it as org/name, without an address"
            ));
        }
        if format!("a/b@{}", self.revision()).parse::<ModelId>().is_err() {
            let revision = self.revision();
            return Err(format!("revision: '{revision}' is no branch, tag or commit"));
        }
        if !card::is_split(&self.split) {
            let split = &self.split;
            return Err(format!(
                "split: '{split}' is no name of a split; write it as in train, and bound the number of records with \
                 max_samples and skip"
            ));
        }
        let inside = |path: &String| {
            !path.trim().is_empty() && !path.contains("://") && !path.split('/').any(|part| part == "..")
        };
        if let Some(path) = self.data_files.0.iter().find(|path| !inside(path)) {
            return Err(format!(
                "data_files: '{path}' is no file of the repository; write it as in data/hi-*.jsonl"
            ));
        }
        if let Some(path) = self.data_dir.as_ref().filter(|path| !inside(path)) {
            return Err(format!("data_dir: '{path}' is no folder of the repository; write it as in data/hi"));
        }
        let named = !self.data_files.is_empty() || self.data_dir.is_some();
        if named && self.config.is_some() {
            return Err(
                "config and data_files or data_dir exclude one another; leave one of them away".into()
            );
        }
        if !self.data_files.is_empty() && self.split != "train" {
            return Err("split: files that data_files names are all of one split; leave split away".into());
        }
        if !self.streaming {
            return Err(
                "streaming: false is not known; bring the files with `hf download --repo-type dataset` and \
                        read them with type: local, or leave streaming away"
                    .into(),
            );
        }
        Ok(())
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    pub(in crate::data) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let mut settings = HubSettings::from_env().map_err(|error| format!("{error:#}"))?;
        settings.backoff = opening.patience.backoff;
        self.open_at(&settings, opening)
    }

    fn open_at(&self, settings: &HubSettings, opening: &Opening) -> Result<Opened, String> {
        let repo = Repo { kind: Kind::Dataset, name: self.repo.clone() };
        if settings.offline {
            return Err(format!(
                "data set {}: HF_HUB_OFFLINE is set, and data sets are read from the hub; unset it, or use type: local",
                repo.name
            ));
        }
        let client = Client::new(&settings.endpoint, settings.token.as_deref(), settings.backoff);
        let client = Arc::new(client.map_err(|error| format!("{error:#}"))?);
        let wanted = Wanted {
            config: self.config.as_deref(),
            split: &self.split,
            data_files: &self.data_files.0,
            data_dir: self.data_dir.as_deref(),
            by_extension: opening.format == Format::Auto,
        };
        let finding = Finding { client: &client, repo: &repo, wanted };
        let pin = opening.pin.as_deref();
        let found = opening.wait(async {
            let found = finding.files(self.revision(), pin).await;
            found.map_err(|error| format!("data set {}: {error}", self.repo))
        })?;
        tracing::info!(
            repo = self.repo,
            commit = found.commit,
            files = found.files.len(),
            "found the files of the data set"
        );
        let pin = match found.converted {
            true => format!("{CONVERTED_PIN}{}", found.commit),
            false => found.commit.clone(),
        };
        let opening = opening.clone();
        let objects = found.files.into_iter().map(move |entry| {
            let shown = format!("hf://datasets/{}@{}/{}", repo.name, &found.commit[..8], entry.path);
            let (client, repo, commit) = (client.clone(), repo.clone(), found.commit.clone());
            let file = HubFile { client, repo, commit, entry, shown, by: None };
            Ok(Box::new(RemoteObject::new(file, opening.clone())) as Box<dyn Object>)
        });
        Ok(Opened { rows: Rows::Files(Box::new(objects)), pin: Some(pin) })
    }
}

/// The files of a split, at a commit.
struct Found {
    commit: String,
    files: Vec<Entry>,
    /// Whether they are of the branch that the hub made.
    converted: bool,
}

/// Why no files were found.
#[derive(Debug, thiserror::Error)]
enum NotFound {
    #[error("{0}")]
    Hub(#[from] FetchError),
    #[error("{0}")]
    Settings(String),
}

impl From<String> for NotFound {
    fn from(message: String) -> Self {
        Self::Settings(message)
    }
}

struct Finding<'a> {
    client: &'a Client,
    repo: &'a Repo,
    wanted: Wanted<'a>,
}

impl Finding<'_> {
    /// The files at a revision, or at the commit that an earlier opening found them at.
    async fn files(&self, revision: &str, pin: Option<&str>) -> Result<Found, NotFound> {
        if let Some(commit) = pin.and_then(|pin| pin.strip_prefix(CONVERTED_PIN)) {
            return self.converted(commit).await;
        }
        let listing = self.client.listing(self.repo, pin.unwrap_or(revision), Patience::Long).await?;
        let commit = listing.commit;
        if revision == CONVERTED {
            return self.converted(&commit).await;
        }
        let by_settings = !self.wanted.data_files.is_empty() || self.wanted.data_dir.is_some();
        let script = format!("{}.py", self.repo.name.rsplit('/').next().unwrap_or_default());
        if listing.files.contains(&script) && !by_settings {
            return Err(NotFound::Settings(format!(
                "it is made by the script {script}, and code of others is not run; name its files with data_files, or \
                 set revision: {CONVERTED}, where the hub may have made Parquet files of it"
            )));
        }
        // What cannot be read here the hub may have made readable.
        let may_be_made = !by_settings && revision == "main";
        let readable = listing.files.is_empty()
            || !self.wanted.by_extension
            || listing.files.iter().any(|name| format_of_name(name).is_some());
        if may_be_made
            && !readable
            && let Some(made) = self.made_by_hub().await?
        {
            return Ok(made);
        }
        let configs = self.configs(&commit, &listing.files).await?;
        let plan = plan(&configs, &self.wanted)?;
        let mut entries = Vec::new();
        for folder in plan.folders() {
            entries.extend(self.client.tree(self.repo, &commit, folder, MAX_FILES).await?);
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        let names: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        let chosen = plan.choose(&self.wanted, &names)?;
        if !chosen.is_empty() {
            return Ok(Found { files: pick(entries, &chosen), commit, converted: false });
        }
        if may_be_made
            && readable
            && let Some(made) = self.made_by_hub().await?
        {
            return Ok(made);
        }
        let looked = if by_settings { "what data_files and data_dir name" } else { "the repository" };
        Err(NotFound::Settings(format!(
            "{looked} holds no file that can be read here (parquet, jsonl, json, csv, tsv, txt, also with .gz or .zst); \
             name files with data_files, and set format where their names do not tell it"
        )))
    }

    /// The files of the branch that the hub makes of what it can convert; `None` where it made none.
    async fn made_by_hub(&self) -> Result<Option<Found>, NotFound> {
        match self.client.listing(self.repo, CONVERTED, Patience::Long).await {
            Ok(made) => self.converted(&made.commit).await.map(Some),
            Err(FetchError::Refused(reason)) => {
                tracing::debug!(reason, "the hub made nothing of the data set");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the README and `.huggingface.yaml` say; the latter goes before.
    async fn configs(&self, commit: &str, files: &[String]) -> Result<Vec<Config>, NotFound> {
        type Read = fn(&[u8]) -> Result<Option<Vec<Config>>, String>;
        let sources: [(&str, Read); 2] =
            [(".huggingface.yaml", card::of_yaml), ("README.md", card::of_readme)];
        for (name, read) in sources {
            // Where the hub lists no files, it may have them all the same.
            if !files.is_empty() && !files.iter().any(|file| file == name) {
                continue;
            }
            if let Some(text) = self.client.small_file(self.repo, commit, name, card::MAX_BYTES).await?
                && let Some(configs) =
                    read(&text).map_err(|reason| format!("its {name} is not usable: {reason}"))?
            {
                return Ok(configs);
            }
        }
        Ok(Vec::new())
    }

    async fn converted(&self, commit: &str) -> Result<Found, NotFound> {
        let mut entries = self.client.tree(self.repo, commit, "", MAX_FILES).await?;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        let names: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        let chosen = converted(&self.wanted, &names)?;
        if chosen.iter().any(|file| file.contains("/partial-")) {
            tracing::warn!(
                repo = self.repo.name,
                "the hub made Parquet files of the beginning of this split only"
            );
        }
        Ok(Found { files: pick(entries, &chosen), commit: commit.to_owned(), converted: true })
    }
}

/// The entries of these names, in the names' order.
fn pick(entries: Vec<Entry>, names: &[String]) -> Vec<Entry> {
    let by_name: std::collections::HashMap<&str, &Entry> =
        entries.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    names.iter().filter_map(|name| by_name.get(name.as_str()).map(|entry| (*entry).clone())).collect()
}
