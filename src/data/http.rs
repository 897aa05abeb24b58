//! Bytes of an http or https address as a blocking reader. A body that is cut goes on where it stopped; what
//! changes in between, or stays cut, is an error. Knows nothing of rows.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::time::Duration;

use flate2::Crc;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_RANGE,
    LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Response, StatusCode, Url};
use tokio_util::sync::CancellationToken;

/// More redirects than this go in a circle.
const MAX_REDIRECTS: usize = 10;
/// Longest wait that a server can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How long to wait for a server, and how often to try again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For a connection.
    pub(crate) connect: Duration,
    /// For the next bytes.
    pub(crate) idle: Duration,
    /// Attempts after the first, as long as no new byte comes.
    pub(crate) retries: u32,
    /// Before the first of them; doubles with each.
    pub(crate) backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            retries: 3,
            backoff: Duration::from_secs(1),
        }
    }
}

/// Opens addresses, all with the same headers.
pub(super) struct Fetcher {
    headers: HeaderMap,
    patience: Patience,
    stop: CancellationToken,
}

impl Fetcher {
    /// Reads the headers' values from the environment.
    pub(super) fn new(
        headers_env: &BTreeMap<String, String>,
        patience: Patience,
        stop: CancellationToken,
    ) -> Result<Self, String> {
        let headers = headers_from(headers_env)?;
        Ok(Self { headers, patience, stop })
    }

    /// The bytes of one address; nothing is asked before the first read.
    pub(super) fn object(&self, url: &str, runtime: tokio::runtime::Handle) -> Result<Object, String> {
        let url = Url::parse(url).map_err(|e| format!("'{url}' is no address: {e}"))?;
        let body = Body {
            client: client(&url, self.patience)?,
            shown: shown(&url),
            url,
            headers: self.headers.clone(),
            patience: self.patience,
            response: None,
            position: 0,
            crc: Crc::new(),
            again: None,
            etag: None,
            total: None,
            knows_ranges: true,
            failures: 0,
        };
        Ok(Object { body, runtime, stop: self.stop.clone(), rest: io::Cursor::default(), ended: false })
    }
}

/// Headers with their values from the environment, which no message shows.
///
/// # Errors
/// A variable that is not set or holds what no header can have.
pub(crate) fn headers_from(headers_env: &BTreeMap<String, String>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (header, variable) in headers_env {
        let value = std::env::var(variable).map_err(|_| {
            format!("headers_env: {header} needs the environment variable {variable}; set it")
        })?;
        let mut value = HeaderValue::from_str(value.trim())
            .map_err(|_| format!("headers_env: {variable} holds characters that no header can have"))?;
        value.set_sensitive(true);
        let name = HeaderName::from_bytes(header.as_bytes())
            .map_err(|_| format!("headers_env: '{header}' is no name of a header"))?;
        headers.insert(name, value);
    }
    Ok(headers)
}

/// The address without its query, which may hold what is not for messages.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

/// A client for one address.
///
/// # Errors
/// TLS cannot be set up.
pub(crate) fn client(url: &Url, patience: Patience) -> Result<reqwest::Client, String> {
    // Fails when somebody installed a provider before, which then serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut headers = HeaderMap::new();
    // A compressed answer would have another length, and ranges of it another meaning.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("gurukul/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .connect_timeout(patience.connect)
        .read_timeout(patience.idle)
        // Followed by hand: headers with secrets go to the address's own host only.
        .redirect(reqwest::redirect::Policy::none());
    if url.host_str().is_some_and(|host| host == "localhost" || host.starts_with("127.") || host == "[::1]") {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| {
        format!(
            "cannot set up TLS ({}); install the system's root certificates (Debian: apt-get install \
             ca-certificates) or name a file of them in SSL_CERT_FILE",
            words(error)
        )
    })
}

/// An error with its causes and without the address, whose query may hold what is not for messages.
pub(crate) fn words(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// An address as a reader, for a thread that may block.
pub(super) struct Object {
    body: Body,
    runtime: tokio::runtime::Handle,
    stop: CancellationToken,
    rest: io::Cursor<Vec<u8>>,
    ended: bool,
}

impl Object {
    /// The address as messages have it.
    pub(super) fn shown(&self) -> &str {
        &self.body.shown
    }
}

impl Read for Object {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.rest.read(buffer)?;
            if n > 0 || self.ended || buffer.is_empty() {
                return Ok(n);
            }
            let next = self.runtime.block_on(async {
                tokio::select! {
                    // The one that reads may wait for a slow server when nobody wants its records any more.
                    () = self.stop.cancelled() => Err("nobody wants more".to_owned()),
                    next = self.body.next() => next,
                }
            });
            match next.map_err(io::Error::other)? {
                Some(bytes) => self.rest = io::Cursor::new(bytes),
                None => self.ended = true,
            }
        }
    }
}

/// What went wrong with one attempt.
enum Failure {
    /// Another attempt may mend it.
    Passing { reason: String, wait: Option<Duration> },
    /// Nothing will.
    Final(String),
}

impl Failure {
    fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), wait: None }
    }

    fn changed() -> Self {
        Self::Final("the data was changed while it was read; start anew".into())
    }
}

/// Bytes that a repeated answer begins with and that were handed on before.
struct Again {
    left: u64,
    crc: Crc,
}

struct Body {
    client: reqwest::Client,
    url: Url,
    shown: String,
    headers: HeaderMap,
    patience: Patience,
    response: Option<Response>,
    /// Bytes handed on.
    position: u64,
    /// Their checksum.
    crc: Crc,
    again: Option<Again>,
    /// A strong one, fit for ranges.
    etag: Option<HeaderValue>,
    /// Bytes of the whole, where the server says.
    total: Option<u64>,
    knows_ranges: bool,
    /// Attempts in a row that brought nothing new.
    failures: u32,
}

impl Body {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, String> {
        loop {
            match self.attempt().await {
                Ok(bytes) => return Ok(bytes),
                Err(Failure::Final(reason)) => return Err(reason),
                Err(Failure::Passing { reason, wait }) => {
                    self.response = None;
                    self.failures += 1;
                    if self.failures > self.patience.retries {
                        let of = self.total.map_or(String::new(), |total| format!(" of {total}"));
                        return Err(format!(
                            "{reason} (after {}{of} bytes and {} attempts)",
                            self.position, self.failures
                        ));
                    }
                    let backoff = self.patience.backoff * 2_u32.saturating_pow(self.failures - 1);
                    let wait = wait.unwrap_or(backoff);
                    tracing::warn!(address = self.shown, reason, wait_s = wait.as_secs_f64(), "trying again");
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    async fn attempt(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        if self.response.is_none() {
            self.response = Some(self.ask().await?);
        }
        loop {
            let Some(response) = &mut self.response else { return Ok(None) };
            let Some(mut bytes) = response.chunk().await.map_err(|e| Failure::passing(words(e)))? else {
                return self.end();
            };
            if let Some(again) = &mut self.again {
                let known = bytes.split_to(again.left.min(bytes.len() as u64) as usize);
                again.crc.update(&known);
                again.left -= known.len() as u64;
                if again.left > 0 {
                    continue;
                }
                if again.crc.sum() != self.crc.sum() {
                    return Err(Failure::changed());
                }
                self.again = None;
            }
            if bytes.is_empty() {
                continue;
            }
            self.position += bytes.len() as u64;
            self.crc.update(&bytes);
            self.failures = 0;
            return Ok(Some(bytes.into()));
        }
    }

    /// The answer is over: is it complete?
    fn end(&self) -> Result<Option<Vec<u8>>, Failure> {
        match self.total {
            Some(total) if self.position < total => Err(Failure::passing("the connection ended")),
            Some(total) if self.position > total => Err(Failure::Final(format!(
                "{} bytes came where {total} were announced; ask whoever runs the server",
                self.position
            ))),
            None if self.again.is_some() => Err(Failure::changed()),
            _ => Ok(None),
        }
    }

    /// Asks for what is still to come, and makes sure that it belongs to what came before.
    async fn ask(&mut self) -> Result<Response, Failure> {
        let range = self.etag.clone().filter(|_| self.position > 0 && self.knows_ranges);
        let asked_range = range.is_some();
        let response = self.send(range).await?;
        self.again = None;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if asked_range => {
                let (start, total) = range_of(&response).unwrap_or((u64::MAX, None));
                if start != self.position || (self.total.is_some() && self.total != total) {
                    self.knows_ranges = false;
                    return Err(Failure::passing("the server answered with another range"));
                }
                self.total = total;
            }
            StatusCode::RANGE_NOT_SATISFIABLE if asked_range => return Err(Failure::changed()),
            StatusCode::OK => {
                let etag = strong_etag(&response);
                let total = number(&response, CONTENT_LENGTH.as_str());
                if self.position == 0 {
                    (self.etag, self.total) = (etag, total);
                } else if (self.etag.is_some() && etag.is_some() && self.etag != etag)
                    || (self.total.is_some() && total.is_some() && self.total != total)
                {
                    return Err(Failure::changed());
                } else {
                    self.again = Some(Again { left: self.position, crc: Crc::new() });
                }
            }
            status => return Err(Failure::Final(format!("the server answered {status}, which is no file"))),
        }
        Ok(response)
    }

    /// Sends the request and follows redirects; the answer is a success or a range that cannot be.
    async fn send(&self, range: Option<HeaderValue>) -> Result<Response, Failure> {
        let mut url = self.url.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.client.get(url.clone());
            if url.origin() == self.url.origin() {
                request = request.headers(self.headers.clone());
            }
            if let Some(etag) = &range {
                request = request.header(RANGE, format!("bytes={}-", self.position)).header(IF_RANGE, etag);
            }
            let response = request.send().await.map_err(|e| Failure::passing(words(e)))?;
            if !response.status().is_redirection() {
                return judge(response);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = target.and_then(|text| url.join(text).ok());
            let target = target
                .filter(|url| matches!(url.scheme(), "http" | "https"))
                .ok_or_else(|| Failure::Final(format!("answered {} to nowhere", response.status())))?;
            if url.scheme() == "https" && target.scheme() != "https" {
                return Err(Failure::Final("leads from https to http; correct the address".into()));
            }
            url = target;
        }
        Err(Failure::Final(format!("more than {MAX_REDIRECTS} redirects; correct the address")))
    }
}

/// Sorts answers that are no redirect.
fn judge(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
        return Ok(response);
    }
    let reason = format!("the server answered {status}");
    if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
        let wait = number(&response, RETRY_AFTER.as_str());
        let wait = wait.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        return Err(Failure::Passing { reason, wait });
    }
    let remedy = match status.as_u16() {
        401 | 403 => "; name the header that it asks for under headers_env",
        404 | 410 => "; correct the address",
        _ => "",
    };
    Err(Failure::Final(format!("{reason}{remedy}")))
}

pub(crate) fn number(response: &Response, header: &str) -> Option<u64> {
    response.headers().get(header)?.to_str().ok()?.trim().parse().ok()
}

/// The entity tag, unless it is a weak one, which says nothing about bytes.
fn strong_etag(response: &Response) -> Option<HeaderValue> {
    response.headers().get(ETAG).filter(|value| value.as_bytes().starts_with(b"\"")).cloned()
}

/// First byte and length of the whole, of an answer with a range.
fn range_of(response: &Response) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()))
}
