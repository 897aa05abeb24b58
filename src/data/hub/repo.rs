//! What a hub says of repositories and their files, as values: kinds, names, listings, sizes and hashes. Makes no
//! request.

use reqwest::Response;

use super::cache::is_inside;
use crate::data::web;

/// What a repository holds; each kind has names of its own on a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

/// A repository on a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repo {
    pub(super) kind: Kind,
    /// `org/name`, or `name` alone for the oldest.
    pub(super) name: String,
}

impl Repo {
    /// Where its kind's repositories are in the hub's interface.
    pub(super) fn collection(&self) -> &'static str {
        match self.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }

    pub(super) fn word(&self) -> &'static str {
        match self.kind {
            Kind::Model => "model",
            Kind::Dataset => "data set",
        }
    }

    /// Its page's path, in parts.
    pub(super) fn page(&self) -> impl Iterator<Item = &str> {
        let prefix = (self.kind == Kind::Dataset).then_some("datasets");
        prefix.into_iter().chain(self.name.split('/'))
    }
}

/// A file in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// From the repository's root.
    pub(super) path: String,
    pub(super) meta: Metadata,
}

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// Full hash.
    pub(super) commit: String,
    /// Names of all files.
    pub(super) files: Vec<String>,
}

/// What the hub promises about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// SHA-256 of the content for large files, git's blob hash for small ones; checked to be fit as a file name.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

/// What the hub itself said of a file, wherever its bytes came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Linked {
    pub(super) etag: Option<String>,
    pub(super) size: Option<u64>,
}

impl Linked {
    pub(super) fn note(&mut self, response: &Response) {
        let etag = web::header(response, "x-linked-etag").map(bare_tag);
        let size = web::header(response, "x-linked-size").and_then(|size| size.parse().ok());
        (self.etag, self.size) = (etag.or(self.etag.take()), size.or(self.size));
    }
}

/// An entity tag without quotes and weakness.
pub(super) fn bare_tag(tag: &str) -> String {
    tag.trim().trim_start_matches("W/").trim_matches('"').to_owned()
}

/// The files of one page of a listing; folders are left out.
pub(super) fn files_of_page(text: &[u8]) -> Result<Vec<Entry>, String> {
    #[derive(serde::Deserialize)]
    struct Large {
        oid: String,
        size: u64,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        r#type: String,
        path: String,
        #[serde(default)]
        oid: String,
        #[serde(default)]
        size: u64,
        lfs: Option<Large>,
    }
    let items: Vec<Item> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let files = items.into_iter().filter(|item| item.r#type == "file" && is_inside(&item.path));
    Ok(files
        .map(|item| {
            let (etag, size) = item.lfs.map_or((item.oid, item.size), |large| (large.oid, large.size));
            Entry { path: item.path, meta: Metadata { etag, size } }
        })
        .collect())
}
