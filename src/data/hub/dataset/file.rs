//! One file of a data set, read by ranges at its commit: from the hub to where it keeps the bytes, and back to the hub
//! when an address there has run out. Knows nothing of rows.

use std::sync::Arc;

use futures::StreamExt as _;
use reqwest::{Response, StatusCode, Url};

use super::super::client::{self, Client, FetchError};
use super::super::repo::{Entry, Linked, Repo};
use crate::data::object::Stat;
use crate::data::remote::{Answer, Remote};
use crate::data::retry::Failure;
use crate::data::web;

/// A file of a repository at a commit.
pub(super) struct HubFile {
    pub(super) client: Arc<Client>,
    pub(super) repo: Repo,
    pub(super) commit: String,
    pub(super) entry: Entry,
    pub(super) shown: String,
    /// Where the hub sent to last; signed, and good for a while.
    pub(super) by: Option<Url>,
}

impl HubFile {
    async fn ask(&mut self, range: Option<&str>) -> Result<Response, Failure> {
        let (repo, commit, path) = (&self.repo, &self.commit, &self.entry.path);
        if let Some(by) = self.by.take() {
            match self.client.range(repo, commit, path, range, Some(&by)).await {
                Ok(response) => {
                    self.by = Some(by);
                    return Ok(response);
                }
                Err(client::Failure::Transient(failure)) => return Err(passing(failure)),
                // The signature has run out, or the place is another now: the hub knows.
                Err(client::Failure::Final(_)) => {}
            }
        }
        let response = match self.client.range(repo, commit, path, range, None).await {
            Ok(response) => response,
            Err(client::Failure::Transient(failure)) => return Err(passing(failure)),
            Err(client::Failure::Final(FetchError::Withheld(reason))) => {
                return Err(Failure::passing(reason));
            }
            Err(client::Failure::Final(error)) => return Err(Failure::Final(error.to_string())),
        };
        if !self.client.is_home(response.url()) {
            self.by = Some(response.url().clone());
        }
        Ok(response)
    }
}

fn passing(failure: client::Transient) -> Failure {
    Failure::Passing { reason: failure.reason, wait: failure.retry_after }
}

impl Remote for HubFile {
    fn shown(&self) -> &str {
        &self.shown
    }

    async fn stat(&mut self) -> Result<(Stat, Option<Answer>), Failure> {
        let meta = &self.entry.meta;
        Ok((Stat { length: Some(meta.size), version: Some(meta.etag.clone()) }, None))
    }

    async fn get(&mut self, start: u64, end: Option<u64>, _: Option<&str>) -> Result<Answer, Failure> {
        let range = match (start, end) {
            (0, None) => None,
            (start, None) => Some(format!("bytes={start}-")),
            (start, Some(end)) => Some(format!("bytes={start}-{}", end.saturating_sub(1))),
        };
        let response = self.ask(range.as_deref()).await?;
        let host = response.url().host_str().unwrap_or_default().to_owned();
        let size = self.entry.meta.size;
        let (first, total) = match response.status() {
            StatusCode::OK if range.is_none() => (0, web::content_length(&response)),
            StatusCode::OK => {
                return Err(Failure::Final(format!(
                    "{host} ignores ranges (asked for bytes from {start} on, it sends the whole file), so the file \
                     cannot be read from there; set HF_ENDPOINT to a hub that knows ranges"
                )));
            }
            StatusCode::PARTIAL_CONTENT => {
                let found = web::content_range(&response);
                let (first, last, total) = found
                    .ok_or_else(|| Failure::passing(format!("{host} does not say which bytes it sends")))?;
                if end.is_some_and(|end| last < end.min(size)) {
                    return Err(Failure::passing(format!("{host} sends fewer bytes than it was asked for")));
                }
                (first, total)
            }
            status => return Err(Failure::passing(format!("{host} answered a range with {status}"))),
        };
        let linked = response.extensions().get::<Linked>().cloned().unwrap_or_default();
        // The hub's own words, where it was asked on the way.
        let etag = linked.etag.as_ref().is_none_or(|etag| *etag == self.entry.meta.etag);
        if !etag || [linked.size, total].iter().flatten().any(|bytes| *bytes != size) {
            let bytes = total.or(linked.size).unwrap_or_default();
            return Err(Failure::Final(format!(
                "the hub lists the file with {size} bytes at commit {}, and sends {bytes} or other ones; try again \
                 later, or set revision",
                self.commit
            )));
        }
        let stat = Stat { length: total, version: None };
        let body = response.bytes_stream().map(|bytes| bytes.map_err(web::words)).boxed();
        Ok(Answer { start: first, ranged: true, stat, body })
    }
}
