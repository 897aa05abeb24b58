//! Files at http and https addresses, as the configuration writes them. Knows nothing of rows.

mod template;

use std::collections::BTreeMap;

use futures::StreamExt as _;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode, Url};
use serde::{Deserialize, Serialize};

use self::template::expand;
use super::object::{Object, Opened, Opening, Rows, Stat};
use super::remote::{Answer, Failure, Remote, RemoteObject};
use super::web;

/// More redirects than this go in a circle.
const MAX_REDIRECTS: usize = 10;
/// Longest wait that a server can ask for.
const MAX_RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(60);

/// The keys of `type: http`.
///
/// A connection that breaks goes on where it stopped. That works best with a server that knows ranges and gives a
/// strong `ETag` or a `Last-Modified`; without them the file is read again from its start and compared. Parquet files
/// need ranges.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// One address, or many written as one: `part-{00000..00042}.jsonl.gz` stands for 43, `{hi,ta}.csv` for two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Or several such, read one after another.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Names of headers to names of the environment variables that hold their values. They are sent to each address's
    /// own host, and to no other that it redirects to.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers_env: BTreeMap<String, String>,
}

impl HttpConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.url.is_some() != self.urls.is_empty() {
            return Err("give either url, or urls with at least one address".into());
        }
        self.addresses()?.iter().try_for_each(|url| check_url(url))?;
        self.headers_env.iter().try_for_each(|(header, variable)| check_header(header, variable))
    }

    fn addresses(&self) -> Result<Vec<String>, String> {
        let mut addresses = Vec::new();
        for template in self.url.iter().chain(&self.urls) {
            addresses.extend(expand(template)?);
            if addresses.len() > template::MAX_ADDRESSES {
                return Err(format!("urls: they stand for more than {} addresses", template::MAX_ADDRESSES));
            }
        }
        Ok(addresses)
    }

    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let headers = headers(&self.headers_env)?;
        let addresses = self.addresses()?;
        let opening = opening.clone();
        // One for all, so that files of one host share its connections. Hosts of this machine get no proxy.
        let mut client: Option<(String, reqwest::Client)> = None;
        let objects = addresses.into_iter().map(move |address| {
            let url =
                Url::parse(&address).map_err(|e| format!("'{}' is no address: {e}", web::bare(&address)))?;
            let host = url.host_str().unwrap_or_default().to_owned();
            let patience = opening.patience;
            let http = match &client {
                Some((known, http)) if *known == host => http.clone(),
                _ => {
                    let http = web::client(&url, patience.connect, patience.idle)?;
                    client.insert((host, http)).1.clone()
                }
            };
            let address = Address { http, shown: shown(&url), url, headers: headers.clone() };
            Ok(Box::new(RemoteObject::new(address, opening.clone())) as Box<dyn Object>)
        });
        Ok(Opened { rows: Rows::Files(Box::new(objects)), pin: None })
    }
}

/// Secrets belong into the environment: a source is kept in job files and shown in messages.
pub(crate) fn check_url(text: &str) -> Result<(), String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or_else(|| format!("'{}' is no http or https address", web::bare(text)))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!(
            "the address of {} holds a name or a password; put the header's value into an environment variable \
             and name it under headers_env",
            url.host_str().unwrap_or("this host")
        ));
    }
    Ok(())
}

/// Headers that the reading itself depends on.
const OWN_HEADERS: [&str; 6] =
    ["accept-encoding", "content-length", "host", "if-range", "range", "transfer-encoding"];

pub(crate) fn check_header(header: &str, variable: &str) -> Result<(), String> {
    let name = HeaderName::from_bytes(header.as_bytes());
    let name = name.map_err(|_| format!("headers_env: '{header}' is no name of a header"))?;
    if OWN_HEADERS.contains(&name.as_str()) {
        return Err(format!("headers_env: {header} is set by the program itself"));
    }
    check_variable(&format!("headers_env: {header}"), variable, "DATA_TOKEN")
}

/// That `variable` can be the name of an environment variable; `key` is where it is named.
pub(super) fn check_variable(key: &str, variable: &str, example: &str) -> Result<(), String> {
    let is_name = !variable.is_empty()
        && variable.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !variable.starts_with(|c: char| c.is_ascii_digit());
    if !is_name {
        // What stands there instead may be the secret itself, so it is not repeated.
        return Err(format!("{key} must name an environment variable that holds the value, as in {example}"));
    }
    Ok(())
}

/// Reads the headers' values from the environment.
pub(crate) fn headers(headers_env: &BTreeMap<String, String>) -> Result<HeaderMap, String> {
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

/// What lies at one address.
struct Address {
    http: reqwest::Client,
    url: Url,
    shown: String,
    headers: HeaderMap,
}

impl Remote for Address {
    fn shown(&self) -> &str {
        &self.shown
    }

    /// By asking for the first byte: not every server answers `HEAD`, and signed addresses are good for one method. A
    /// server that ignores ranges begins with the whole, which is what will be read.
    async fn stat(&mut self) -> Result<(Stat, Option<Answer>), Failure> {
        let response = self.send(Some("bytes=0-0"), None).await?;
        let version = web::version(&response).map(str::to_owned);
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let length = web::content_range(&response).and_then(|(_, _, total)| total);
                let stat = Stat { length, version };
                // Read to its end, so that the connection serves the next request; unless more comes than was asked
                // for.
                if web::content_length(&response).is_some_and(|bytes| bytes <= 1) {
                    response.bytes().await.map_err(|error| Failure::passing(web::words(error)))?;
                }
                Ok((stat, None))
            }
            // No byte is there to be the first.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let total =
                    web::header(&response, "content-range").and_then(|text| text.strip_prefix("bytes */"));
                match total.map(str::parse) {
                    Some(Ok(0)) | None => Ok((Stat { length: Some(0), version }, None)),
                    _ => Err(Failure::passing("the server has no first byte of a file that is not empty")),
                }
            }
            _ => {
                let answer = whole(response)?;
                Ok((answer.stat.clone(), Some(answer)))
            }
        }
    }

    async fn get(&mut self, start: u64, end: Option<u64>, version: Option<&str>) -> Result<Answer, Failure> {
        let range = match (start, end) {
            (0, None) => None,
            (start, None) => Some(format!("bytes={start}-")),
            (start, Some(end)) => Some(format!("bytes={start}-{}", end.saturating_sub(1))),
        };
        let response = self.send(range.as_deref(), version).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range.is_some() => {
                let (start, _, length) = web::content_range(&response)
                    .ok_or_else(|| Failure::passing("the server does not say which bytes it sends"))?;
                let stat = Stat { length, version: web::version(&response).map(str::to_owned) };
                Ok(Answer { start, ranged: true, stat, body: body(response) })
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(Failure::changed()),
            _ => Ok(Answer { ranged: range.is_none(), ..whole(response)? }),
        }
    }
}

/// An answer with all bytes.
fn whole(response: Response) -> Result<Answer, Failure> {
    if response.status() != StatusCode::OK {
        let status = response.status();
        return Err(Failure::Final(format!("the server answered {status}, which is no file")));
    }
    let version = web::version(&response).map(str::to_owned);
    let stat = Stat { length: web::content_length(&response), version };
    Ok(Answer { start: 0, ranged: false, stat, body: body(response) })
}

fn body(response: Response) -> futures::stream::BoxStream<'static, Result<tokio_util::bytes::Bytes, String>> {
    response.bytes_stream().map(|bytes| bytes.map_err(web::words)).boxed()
}

impl Address {
    /// Sends the request and follows redirects; the answer is a success or a range that cannot be.
    async fn send(&self, range: Option<&str>, version: Option<&str>) -> Result<Response, Failure> {
        let mut url = self.url.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.http.get(url.clone());
            if url.origin() == self.url.origin() {
                request = request.headers(self.headers.clone());
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
                // Another version is then sent as a whole, and noticed.
                if let Some(version) = version {
                    request = request.header(IF_RANGE, version);
                }
            }
            let response = request.send().await.map_err(|e| Failure::passing(web::words(e)))?;
            if !response.status().is_redirection() {
                return judge(response);
            }
            url = web::redirect(&response, &url).map_err(Failure::Final)?;
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
        return Err(Failure::Passing { reason, wait: web::retry_after(&response, MAX_RETRY_AFTER) });
    }
    let remedy = match status.as_u16() {
        401 | 403 => "; name the header that it asks for under headers_env",
        404 | 410 => "; correct the address",
        _ => "",
    };
    Err(Failure::Final(format!("{reason}{remedy}")))
}
