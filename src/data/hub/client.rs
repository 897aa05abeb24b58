//! Requests to a hub: the commit behind a revision, a file's size and hash, its bytes. Retries, resumes and
//! checks; the token goes to the endpoint's own host only. Knows nothing of the cache but the path it writes to.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, LOCATION,
    RANGE, RETRY_AFTER,
};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use super::ModelId;
use super::cache::{is_commit, is_inside};

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

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// Full hash.
    pub(super) commit: String,
    /// Names of all files.
    pub(super) files: Vec<String>,
}

/// What the hub promises about a file.
#[derive(Debug)]
pub(super) struct Metadata {
    /// SHA-256 of the content for large files, git's blob hash for small ones; checked to be fit as a file name.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

/// A failure that another attempt may mend.
struct Transient {
    reason: String,
    retry_after: Option<Duration>,
}

enum Failure {
    Transient(Transient),
    Final(FetchError),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    fn transient(reason: impl Into<String>) -> Self {
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
            .with_context(|| format!("HF_ENDPOINT: '{endpoint}' is no http or https URL"))?;
        let authorization = token
            .map(|token| {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .ok()
                    .context("HF_TOKEN holds characters that no token has")?;
                value.set_sensitive(true);
                anyhow::Ok(value)
            })
            .transpose()?;
        // Fails when somebody installed a provider before, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        // A compressed answer would have another length, and ranges of it another meaning.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("gurukul/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(30))
            // Followed by hand: what belongs to a request depends on where it goes.
            .redirect(reqwest::redirect::Policy::none());
        if endpoint.host_str().is_some_and(|host| host == "localhost" || host.starts_with("127.")) {
            builder = builder.no_proxy();
        }
        let http = builder.build().context(
            "cannot set up TLS; install the system's root certificates (Debian: apt-get install ca-certificates) \
             or name a file of them in SSL_CERT_FILE",
        )?;
        Ok(Self { http, endpoint, authorization, backoff })
    }

    /// Pins a revision to its commit and lists the files there.
    pub(super) async fn listing(&self, id: &ModelId, patience: Patience) -> Result<Listing, FetchError> {
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        let url = self
            .url(["api", "models"].into_iter().chain(id.repo.split('/')).chain(["revision", &id.revision]));
        let what = Asked { repo: &id.repo, revision: &id.revision, file: None };
        let answer = self
            .retry(&url, patience, async || {
                let response = self.send(Method::GET, &url, None, &what).await?;
                response.bytes().await.map_err(|e| Failure::transient(chain(e)))
            })
            .await?;
        let Answer { sha, siblings } = serde_json::from_slice(&answer).map_err(|e| {
            FetchError::Unusable(format!("{url} answered with something that is no model: {e}"))
        })?;
        if !is_commit(&sha) {
            return Err(FetchError::Unusable(format!("{url} answered with '{sha}', which is no commit")));
        }
        let files = siblings.into_iter().map(|s| s.rfilename).filter(|name| is_inside(name)).collect();
        Ok(Listing { commit: sha, files })
    }

    /// Size and hash of one file.
    pub(super) async fn metadata(
        &self,
        repo: &str,
        commit: &str,
        name: &str,
    ) -> Result<Metadata, FetchError> {
        let url = self.file_url(repo, commit, name);
        let what = Asked { repo, revision: commit, file: Some(name) };
        let response = self
            .retry(&url, Patience::Long, async || self.send(Method::HEAD, &url, None, &what).await)
            .await?;
        let header = |names: [&str; 2]| {
            names.into_iter().find_map(|n| response.headers().get(n)).and_then(|value| value.to_str().ok())
        };
        let etag = header(["x-linked-etag", ETAG.as_str()])
            .map(|text| text.trim().trim_start_matches("W/").trim_matches('"').to_owned())
            .filter(|etag| is_inside(etag) && !etag.contains('/') && etag.len() <= 128)
            .ok_or_else(|| FetchError::Unusable(format!("{url}: the hub names no usable ETag")))?;
        let size = header(["x-linked-size", CONTENT_LENGTH.as_str()])
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| FetchError::Unusable(format!("{url}: the hub names no size")))?;
        Ok(Metadata { etag, size })
    }

    /// Brings a file to `partial`, going on where an earlier attempt stopped, and checks it. On success `partial`
    /// holds exactly what `meta` promises; it is not synced yet.
    pub(super) async fn download(
        &self,
        repo: &str,
        commit: &str,
        name: &str,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), FetchError> {
        let url = self.file_url(repo, commit, name);
        let what = Asked { repo, revision: commit, file: Some(name) };
        let mut had = length(partial);
        // Bytes that this call did not bring may be of another file: then the check fails, and one more try from
        // the first byte is due.
        let mut inherited = had > 0;
        loop {
            self.bring(&url, &what, meta, partial, bar).await?;
            let (path, etag, size) = (partial.to_owned(), meta.etag.clone(), meta.size);
            let sound = tokio::task::spawn_blocking(move || has_content(&path, &etag, size))
                .await
                .expect("hashing does not panic")
                .map_err(|e| FetchError::local(partial, e))?;
            if sound {
                return Ok(());
            }
            std::fs::remove_file(partial).map_err(|e| FetchError::local(partial, e))?;
            if !inherited {
                let etag = &meta.etag;
                return Err(FetchError::Unusable(format!(
                    "{url}: what arrived does not have the hash {etag} that the hub promised; try again, and if it \
                     stays so, the hub or something on the way to it changes the file"
                )));
            }
            tracing::warn!(
                file = name,
                bytes = had,
                "an earlier partial download was damaged; starting over"
            );
            (inherited, had) = (false, 0);
        }
    }

    /// Requests until `partial` has `meta.size` bytes.
    async fn bring(
        &self,
        url: &Url,
        what: &Asked<'_>,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), FetchError> {
        let mut failures = 0;
        loop {
            let before = length(partial);
            if before == meta.size && partial.exists() {
                return Ok(());
            }
            match self.bring_once(url, what, meta, partial, bar).await {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(failure)) => {
                    failures = if length(partial) > before { 1 } else { failures + 1 };
                    self.wait_or_give_up(url, failures, ATTEMPTS, failure).await?;
                }
            }
        }
    }

    async fn bring_once(
        &self,
        url: &Url,
        what: &Asked<'_>,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let local = |e| FetchError::local(partial, e);
        let mut file = tokio::fs::File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(partial)
            .await
            .map_err(local)?;
        let mut position = file.metadata().await.map_err(local)?.len();
        if position > meta.size {
            file.set_len(0).await.map_err(local)?;
            position = 0;
        }
        let range = (position > 0).then_some(position);
        let mut response = self.send(Method::GET, url, range, what).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response, position, meta.size) => {}
            // The whole file, although a part was asked for: the server does not know ranges.
            StatusCode::OK => {
                let announced = header_number(&response, CONTENT_LENGTH.as_str());
                if announced.is_some_and(|bytes| bytes != meta.size) {
                    return Err(wrong_size(url, meta.size, announced.unwrap_or_default()).into());
                }
                if position > 0 {
                    tracing::info!(url = %url, "the server ignores ranges; starting over");
                    file.set_len(0).await.map_err(local)?;
                    position = 0;
                }
            }
            status => {
                if position > 0 {
                    file.set_len(0).await.map_err(local)?;
                }
                return Err(Failure::transient(format!("answered a range with {status} and another range")));
            }
        }
        file.seek(io::SeekFrom::Start(position)).await.map_err(local)?;
        bar.set_position(position);
        let cut = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    position += chunk.len() as u64;
                    if position > meta.size {
                        drop(file);
                        std::fs::remove_file(partial).map_err(local)?;
                        return Err(wrong_size(url, meta.size, position).into());
                    }
                    file.write_all(&chunk).await.map_err(local)?;
                    bar.set_position(position);
                }
                Ok(None) => break None,
                Err(error) => break Some(chain(error)),
            }
        };
        // tokio's file writes in the background: what failed there is reported here.
        file.flush().await.map_err(local)?;
        if position < meta.size {
            let reason = cut.unwrap_or_else(|| "the connection ended".into());
            return Err(Failure::transient(format!("{reason} (after {position} of {} bytes)", meta.size)));
        }
        Ok(())
    }

    /// Sends a request and follows redirects. The answer is a success, or for `HEAD` the redirect that leaves the
    /// hub: it is the hub, not where it sends, that knows a file's hash.
    async fn send(
        &self,
        method: Method,
        url: &Url,
        range_start: Option<u64>,
        what: &Asked<'_>,
    ) -> Result<Response, Failure> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let home = url.origin() == self.endpoint.origin();
            let mut request = self.http.request(method.clone(), url.clone());
            if let Some(authorization) = self.authorization.as_ref().filter(|_| home) {
                request = request.header(AUTHORIZATION, authorization);
            }
            if let Some(start) = range_start {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            let response = request.send().await.map_err(|e| Failure::transient(chain(e)))?;
            let status = response.status();
            if !status.is_redirection() {
                return self.judge(response, what);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = target.and_then(|text| url.join(text).ok()).ok_or_else(|| {
                FetchError::Unusable(format!("{url} answered {status} without saying where to go"))
            })?;
            if method == Method::HEAD
                && (target.origin() != self.endpoint.origin()
                    || response.headers().contains_key("x-linked-etag"))
            {
                return Ok(response);
            }
            if url.scheme() == "https" && target.scheme() != "https" {
                return Err(
                    FetchError::Unusable(format!("{url} leads from https to {}", target.scheme())).into()
                );
            }
            url = target;
        }
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
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        if status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT
            || status.is_server_error()
        {
            let retry_after = header(RETRY_AFTER.as_str())
                .and_then(|text| text.trim().parse().ok())
                .map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
            return Err(Failure::Transient(Transient { reason: format!("answered {status}"), retry_after }));
        }
        let said = header("x-error-message").map(|text| format!(" The hub says: {text}")).unwrap_or_default();
        let host = response.url().host_str().unwrap_or_default().to_owned();
        let Asked { repo, revision, file } = what;
        let endpoint = self.endpoint.as_str().trim_end_matches('/');
        let message = match (status, header("x-error-code")) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) if self.authorization.is_some() => format!(
                "{host} answered {status} for {repo}: the token in HF_TOKEN (or $HF_HOME/token) may not read it. \
                 Accept the model's terms at {endpoint}/{repo}, or use another token.{said}"
            ),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => format!(
                "{host} answered {status} for {repo}: there is no such model, or it needs a token. Check the \
                 spelling, or set HF_TOKEN.{said}"
            ),
            (StatusCode::NOT_FOUND, code) => match file {
                Some(file) => format!("{endpoint} has no file {file} in {repo} at {revision} (404).{said}"),
                None if code == Some("RevisionNotFound") => {
                    format!(
                        "{endpoint} has no revision '{revision}' of {repo} (404); leave @{revision} away for main."
                    )
                }
                None => format!(
                    "{endpoint} has no model {repo} with a revision '{revision}' (404); check the spelling, and \
                     HF_ENDPOINT where it is set.{said}"
                ),
            },
            _ => format!("{host} answered {status} for {repo}.{said}"),
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
            return Err(FetchError::Unreachable { url: url.clone(), reason });
        }
        let wait = retry_after.unwrap_or(self.backoff * 2_u32.pow(failures - 1));
        tracing::warn!(%url, reason, wait_s = wait.as_secs_f64(), "the hub failed; trying again");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn file_url(&self, repo: &str, commit: &str, name: &str) -> Url {
        self.url(repo.split('/').chain(["resolve", commit]).chain(name.split('/')))
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
    repo: &'a str,
    revision: &'a str,
    file: Option<&'a str>,
}

fn wrong_size(url: &Url, promised: u64, sent: u64) -> FetchError {
    FetchError::Unusable(format!("{url}: the hub promised {promised} bytes and {sent} came; try again"))
}

/// reqwest's own text leaves the cause out, and has the URL that [`FetchError`] has already.
fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

fn header_number(response: &Response, name: &str) -> Option<u64> {
    response.headers().get(name)?.to_str().ok()?.parse().ok()
}

/// Whether a 206 answer is the rest of a file of `size` bytes from `position` on.
fn starts_at(response: &Response, position: u64, size: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let parsed =
        range.and_then(|text| text.strip_prefix("bytes ")?.split_once('/')).and_then(|(range, total)| {
            let start: u64 = range.split_once('-')?.0.parse().ok()?;
            Some((start, total))
        });
    parsed.is_some_and(|(start, total)| start == position && (total == "*" || total.parse() == Ok(size)))
}

/// Whether a file has the size and the hash: SHA-256 for an ETag of 64 hexadecimal digits, git's blob hash for
/// one of 40. Other ETags are no hash of the content, and then the size alone is checked.
fn has_content(path: &Path, etag: &str, size: u64) -> io::Result<bool> {
    let mut file = std::fs::File::open(path)?;
    if file.metadata()?.len() != size {
        return Ok(false);
    }
    let hexadecimal = etag.bytes().all(|b| b.is_ascii_hexdigit());
    let mut hash = match etag.len() {
        64 if hexadecimal => ring::digest::Context::new(&ring::digest::SHA256),
        40 if hexadecimal => {
            let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
            hash.update(format!("blob {size}\0").as_bytes());
            hash
        }
        _ => return Ok(true),
    };
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let found: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(found.eq_ignore_ascii_case(etag))
}
