//! Requests to a hub: the commit behind a revision, the files there, a file's size and hash, its bytes. Retries,
//! resumes and checks; the token goes to the endpoint's own host only. Knows nothing of the cache but the path it
//! writes to.

mod download;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, HeaderValue, LINK, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::cache::{is_commit, is_inside};
use super::repo::{Entry, Kind, Linked, Listing, Metadata, Repo, bare_tag, files_of_page};
use crate::data::web;

/// Requests in a row that may fail without bringing a byte.
const ATTEMPTS: u32 = 5;
/// More redirects than this go in a circle.
const MAX_REDIRECTS: usize = 10;
/// Longest wait that a server can ask for; the hub counts requests in windows of five minutes.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    /// Nobody answered, or only with failures that may pass.
    #[error("{url}: {reason}")]
    Unreachable { url: Url, reason: String },
    /// The hub said no.
    #[error("{0}")]
    Refused(String),
    /// Where the hub keeps its files does not give one out; the hub itself would.
    #[error("{0}")]
    Withheld(String),
    /// The repository has no such file or folder.
    #[error("{0}")]
    NoEntry(String),
    /// The repository or a file of it is not what it should be.
    #[error("{0}")]
    Unusable(String),
    /// This machine's disk.
    #[error("cannot write {}: {source}{}", path.display(), remedy(source))]
    Local { path: PathBuf, source: io::Error },
}

impl FetchError {
    pub(super) fn local(path: &Path, source: io::Error) -> Self {
        Self::Local { path: path.to_owned(), source }
    }

    /// Whether the cache may stand in.
    pub(super) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space, or set HF_HOME to a folder on a larger disk"
        }
        io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::NotADirectory => "; set HF_HOME to a folder that can be written",
        _ => "",
    }
}

/// How long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// Once.
    Short,
    /// [`ATTEMPTS`] times.
    Long,
}

/// A failure that another attempt may mend.
pub(super) struct Transient {
    pub(super) reason: String,
    pub(super) retry_after: Option<Duration>,
}

pub(super) enum Failure {
    Transient(Transient),
    Final(FetchError),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    pub(super) fn transient(reason: impl Into<String>) -> Self {
        Self::Transient(Transient { reason: reason.into(), retry_after: None })
    }
}

pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    /// `Bearer ...`, marked as sensitive.
    authorization: Option<HeaderValue>,
    backoff: Duration,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<&str>, backoff: Duration) -> anyhow::Result<Self> {
        let endpoint = Url::parse(endpoint.trim_end_matches('/'))
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .with_context(|| format!("HF_ENDPOINT: '{}' is no http or https URL", web::bare(endpoint)))?;
        let authorization = token
            .map(|token| {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .ok()
                    .context("HF_TOKEN holds characters that no token has")?;
                value.set_sensitive(true);
                anyhow::Ok(value)
            })
            .transpose()?;
        let http = web::client(&endpoint, Duration::from_secs(10), Duration::from_secs(30))
            .map_err(anyhow::Error::msg)?;
        Ok(Self { http, endpoint, authorization, backoff })
    }

    /// Pins a revision to its commit and lists the files there.
    pub(super) async fn listing(
        &self,
        repo: &Repo,
        revision: &str,
        patience: Patience,
    ) -> Result<Listing, FetchError> {
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            sha: String,
            // Data sets with very many files are listed folder by folder instead.
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        let url = self.api_url(repo, ["revision", revision].into_iter());
        let what = Asked { repo, revision, file: None };
        let answer = self
            .retry(&url, patience, async || {
                let response = self.send(Method::GET, &url, None, &what).await?;
                response.bytes().await.map_err(|e| Failure::transient(web::words(e)))
            })
            .await?;
        let Answer { sha, siblings } = serde_json::from_slice(&answer).map_err(|e| {
            FetchError::Unusable(format!("{url} answered with something that is no {}: {e}", repo.word()))
        })?;
        if !is_commit(&sha) {
            return Err(FetchError::Unusable(format!("{url} answered with '{sha}', which is no commit")));
        }
        let files = siblings.into_iter().map(|s| s.rfilename).filter(|name| is_inside(name)).collect();
        Ok(Listing { commit: sha, files })
    }

    /// All files under a folder (the root where it is empty) at a commit, page by page; none where there is no
    /// such folder.
    pub(super) async fn tree(
        &self,
        repo: &Repo,
        commit: &str,
        folder: &str,
        most: usize,
    ) -> Result<Vec<Entry>, FetchError> {
        let parts = ["tree", commit].into_iter().chain(folder.split('/').filter(|part| !part.is_empty()));
        let mut url = self.api_url(repo, parts);
        url.query_pairs_mut().append_pair("recursive", "true").append_pair("expand", "false");
        let what = Asked { repo, revision: commit, file: Some(folder) };
        let mut entries = Vec::new();
        let mut next = Some(url);
        while let Some(url) = next {
            let page = self
                .retry(&url, Patience::Long, async || {
                    let response = self.send(Method::GET, &url, None, &what).await?;
                    let next = next_page(&response);
                    let text = response.bytes().await.map_err(|e| Failure::transient(web::words(e)))?;
                    Ok((text, next))
                })
                .await;
            let (text, following) = match page {
                Err(FetchError::NoEntry(_)) => return Ok(entries),
                other => other?,
            };
            entries.extend(files_of_page(&text).map_err(|reason| {
                FetchError::Unusable(format!("{url} answered with something that is no listing: {reason}"))
            })?);
            if entries.len() > most {
                return Err(FetchError::Unusable(format!(
                    "{} has more than {most} files in its folder '{folder}'; name a smaller part with data_dir or \
                     data_files",
                    repo.name
                )));
            }
            next = following;
        }
        Ok(entries)
    }

    /// The content of a small file; `None` where there is no such file.
    pub(super) async fn small_file(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
        most: usize,
    ) -> Result<Option<Vec<u8>>, FetchError> {
        let url = self.file_url(repo, commit, name);
        let what = Asked { repo, revision: commit, file: Some(name) };
        let content = self
            .retry(&url, Patience::Long, async || {
                let mut response = self.send(Method::GET, &url, None, &what).await?;
                let mut content = Vec::new();
                while let Some(chunk) =
                    response.chunk().await.map_err(|e| Failure::transient(web::words(e)))?
                {
                    content.extend_from_slice(&chunk);
                    if content.len() > most {
                        return Err(FetchError::Unusable(format!("{url} has more than {most} bytes")).into());
                    }
                }
                Ok(content)
            })
            .await;
        match content {
            Ok(content) => Ok(Some(content)),
            Err(FetchError::NoEntry(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Size and hash of one file.
    pub(super) async fn metadata(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
    ) -> Result<Metadata, FetchError> {
        let url = self.file_url(repo, commit, name);
        let what = Asked { repo, revision: commit, file: Some(name) };
        let response = self
            .retry(&url, Patience::Long, async || self.send(Method::HEAD, &url, None, &what).await)
            .await?;
        let header = |names: [&str; 2]| names.into_iter().find_map(|name| web::header(&response, name));
        let etag = header(["x-linked-etag", ETAG.as_str()])
            .map(bare_tag)
            .filter(|etag| is_inside(etag) && !etag.contains('/') && etag.len() <= 128)
            .ok_or_else(|| FetchError::Unusable(format!("{url}: the hub names no usable ETag")))?;
        let size = header(["x-linked-size", CONTENT_LENGTH.as_str()])
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| FetchError::Unusable(format!("{url}: the hub names no size")))?;
        Ok(Metadata { etag, size })
    }

    /// Bytes of a file by a range, by way of the hub or by an address that it sent to before. The answer's address
    /// is where it sends to now. What the hub said of the file on the way is a [`Linked`] among the extensions.
    pub(super) async fn range(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
        range: Option<&str>,
        by: Option<&Url>,
    ) -> Result<Response, Failure> {
        let what = Asked { repo, revision: commit, file: Some(name) };
        let url = by.cloned().unwrap_or_else(|| self.file_url(repo, commit, name));
        self.send(Method::GET, &url, range, &what).await
    }

    /// Whether an address is the hub's own.
    pub(super) fn is_home(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// Sends a request and follows redirects. The answer is a success, or for `HEAD` the redirect that leaves the
    /// hub: it is the hub, not where it sends, that knows a file's hash.
    async fn send(
        &self,
        method: Method,
        url: &Url,
        range: Option<&str>,
        what: &Asked<'_>,
    ) -> Result<Response, Failure> {
        let mut url = url.clone();
        let mut linked = Linked::default();
        for _ in 0..MAX_REDIRECTS {
            let home = self.is_home(&url);
            let mut request = self.http.request(method.clone(), url.clone());
            if let Some(authorization) = self.authorization.as_ref().filter(|_| home) {
                request = request.header(AUTHORIZATION, authorization);
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let mut response = request.send().await.map_err(|e| Failure::transient(web::words(e)))?;
            if home {
                linked.note(&response);
            }
            if !response.status().is_redirection() {
                response.extensions_mut().insert(linked);
                return self.judge(response, what);
            }
            let target = web::redirect(&response, &url)
                .map_err(|reason| FetchError::Unusable(format!("{}: {reason}", without_query(&url))))?;
            if method == Method::HEAD
                && (!self.is_home(&target) || response.headers().contains_key("x-linked-etag"))
            {
                return Ok(response);
            }
            url = target;
        }
        let url = without_query(&url);
        Err(FetchError::Unusable(format!("{url}: more than {MAX_REDIRECTS} redirects")).into())
    }

    /// Sorts answers that are no redirect into success, a failure that may pass, and a refusal.
    fn judge(&self, response: Response, what: &Asked<'_>) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let header = |name: &str| web::header(&response, name);
        if status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT
            || status.is_server_error()
        {
            let retry_after = web::retry_after(&response, MAX_RETRY_AFTER);
            return Err(Failure::Transient(Transient { reason: format!("answered {status}"), retry_after }));
        }
        let said = header("x-error-message").map(|text| format!(" The hub says: {text}")).unwrap_or_default();
        let host = response.url().host_str().unwrap_or_default().to_owned();
        let Asked { repo, revision, file } = what;
        let word = repo.word();
        let endpoint = self.endpoint.as_str().trim_end_matches('/');
        let page = self.url(repo.page());
        let Repo { name, .. } = repo;
        let message = match (status, header("x-error-code")) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) if !self.is_home(response.url()) => {
                let message = format!(
                    "{host}, where the hub keeps the files of {name}, answered {status}; try again later, or set \
                     HF_TOKEN to another token"
                );
                return Err(FetchError::Withheld(message).into());
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) if self.authorization.is_some() => format!(
                "{host} answered {status} for {name}: the token in HF_TOKEN (or $HF_HOME/token) may not read it. \
                 Accept the {word}'s terms at {page}, or use another token.{said}"
            ),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, Some("GatedRepo")) => format!(
                "{host} answered {status} for {name}: it is for those alone who accepted its terms. Accept them at \
                 {page}, and set HF_TOKEN.{said}"
            ),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => format!(
                "{host} answered {status} for {name}: there is no such {word}, or it needs a token. Check the \
                 spelling, or set HF_TOKEN.{said}"
            ),
            (StatusCode::NOT_FOUND, code) => match file {
                Some(file) => {
                    let message =
                        format!("{endpoint} has no file {file} in {name} at {revision} (404).{said}");
                    return Err(FetchError::NoEntry(message).into());
                }
                None if code == Some("RevisionNotFound") => {
                    let leave = match repo.kind {
                        Kind::Model => format!("@{revision}"),
                        Kind::Dataset => "revision".to_owned(),
                    };
                    format!(
                        "{endpoint} has no revision '{revision}' of {name} (404); leave {leave} away for main."
                    )
                }
                None => format!(
                    "{endpoint} has no {word} {name} with a revision '{revision}' (404); check the spelling, and \
                     HF_ENDPOINT where it is set.{said}"
                ),
            },
            _ => format!("{host} answered {status} for {name}.{said}"),
        };
        Err(FetchError::Refused(message).into())
    }

    async fn retry<T>(
        &self,
        url: &Url,
        patience: Patience,
        attempt: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, FetchError> {
        let attempts = if patience == Patience::Short { 1 } else { ATTEMPTS };
        let mut failures = 0;
        loop {
            match attempt().await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(failure)) => {
                    failures += 1;
                    self.wait_or_give_up(url, failures, attempts, failure).await?;
                }
            }
        }
    }

    async fn wait_or_give_up(
        &self,
        url: &Url,
        failures: u32,
        attempts: u32,
        failure: Transient,
    ) -> Result<(), FetchError> {
        let Transient { reason, retry_after } = failure;
        if failures >= attempts {
            return Err(FetchError::Unreachable { url: without_query(url), reason });
        }
        // Jittered: many clients that were told no at once should not come back at once.
        let mut waits = ExponentialBuilder::new()
            .with_jitter()
            .with_min_delay(self.backoff)
            .with_max_times(ATTEMPTS as usize)
            .build();
        let wait = retry_after.or(waits.nth(failures as usize - 1)).unwrap_or(MAX_RETRY_AFTER);
        tracing::warn!(%url, reason, wait_s = wait.as_secs_f64(), "the hub failed; trying again");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn file_url(&self, repo: &Repo, commit: &str, name: &str) -> Url {
        self.url(repo.page().chain(["resolve", commit]).chain(name.split('/')))
    }

    fn api_url<'a>(&self, repo: &'a Repo, parts: impl Iterator<Item = &'a str>) -> Url {
        self.url(["api", repo.collection()].into_iter().chain(repo.name.split('/')).chain(parts))
    }

    /// The endpoint with segments behind it, each escaped: a `/` inside one does not split it.
    fn url<'a>(&self, segments: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut().expect("an http URL has a path").pop_if_empty().extend(segments);
        url
    }
}

/// What a request is about, for messages.
struct Asked<'a> {
    repo: &'a Repo,
    revision: &'a str,
    /// A file or a folder.
    file: Option<&'a str>,
}

/// Signatures stand in queries.
fn without_query(url: &Url) -> Url {
    let mut url = url.clone();
    url.set_query(None);
    url
}

/// The next page, as the answer's `Link` header has it: at the host that was asked, whatever a mirror writes there.
fn next_page(response: &Response) -> Option<Url> {
    let link = web::header(response, LINK.as_str())?;
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let target = response.url().join(next.trim().strip_prefix('<')?.split_once('>')?.0).ok()?;
    let mut url = response.url().clone();
    url.set_path(target.path());
    url.set_query(target.query());
    Some(url)
}
