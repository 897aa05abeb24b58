//! Uploads to an http or https address: PUT of a file, or POST of a batch of lines. A repeat does no harm where the
//! address heeds `If-None-Match` or `Idempotency-Key`.

use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, IF_NONE_MATCH, RETRY_AFTER};
use reqwest::{Method, Url};
use tokio_util::io::ReaderStream;

use super::{Parcel, Refusal, unreadable};
use crate::config::rl_sinks::{HttpMethod, HttpSink, render};
use crate::data::http::{Patience, client, headers_from, number, shown, words};

/// How long an upload may take beside its bytes.
const PATIENCE: Duration = Duration::from_secs(60);
/// The slowest connection that is waited for.
const SLOWEST_BYTES_PER_S: u64 = 32 << 10;
/// Longest wait that a server can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The address, with its headers.
#[derive(Debug)]
pub(in crate::rl) struct Http {
    client: reqwest::Client,
    method: HttpMethod,
    /// With placeholders; it may hold what is not for messages.
    address: String,
    headers: HeaderMap,
}

impl Http {
    pub(super) fn open(sink: &HttpSink) -> Result<Self, Refusal> {
        let address = match (&sink.url, &sink.url_env) {
            (Some(url), _) => url.clone(),
            (None, Some(variable)) => std::env::var(variable).map_err(|_| {
                Refusal::Final(format!("url_env: the environment variable {variable} is not set; set it"))
            })?,
            (None, None) => return Err(Refusal::Final("the sink has no address; give it a url".into())),
        };
        let client = client(&parse(&address)?, Patience::default()).map_err(Refusal::Final)?;
        let headers = headers_from(&sink.headers_env).map_err(Refusal::Final)?;
        Ok(Self { client, method: sink.method, address, headers })
    }

    /// As [`super::Sink::put`].
    pub(super) async fn put(&self, parcel: &Parcel) -> Result<(), Refusal> {
        let address = render(&self.address, &parcel.facts);
        let url = parse(&address)?;
        let is_by_content = address.contains(parcel.sha256());
        let file = tokio::fs::File::open(&parcel.file).await.map_err(|error| unreadable(parcel, &error))?;
        let method = match self.method {
            HttpMethod::Put => Method::PUT,
            HttpMethod::Post => Method::POST,
        };
        let mut request = self
            .client
            .request(method, url.clone())
            .headers(self.headers.clone())
            .timeout(PATIENCE + Duration::from_secs(parcel.bytes / SLOWEST_BYTES_PER_S))
            .header(CONTENT_TYPE, "application/x-ndjson")
            // Without it the body would go in chunks, which signed addresses refuse.
            .header(CONTENT_LENGTH, parcel.bytes)
            .header("idempotency-key", parcel.sha256());
        if self.method == HttpMethod::Put {
            request = request.header(IF_NONE_MATCH, "*");
        }
        let body = reqwest::Body::wrap_stream(ReaderStream::new(file));
        let response = request.body(body).send().await.map_err(|error| Refusal::passing(words(error)))?;
        let status = response.status();
        let reason = format!("{} answered {status}", shown(&url));
        match status.as_u16() {
            200..=299 => Ok(()),
            409 | 412 if self.method == HttpMethod::Post || is_by_content || parcel.may_be_there => Ok(()),
            409 | 412 => Err(Refusal::Final(format!(
                "{reason}: something is there already, and whether it is this upload cannot be known; name \
                 another address"
            ))),
            408 | 425 | 429 | 500..=599 => {
                let wait = number(&response, RETRY_AFTER.as_str());
                let wait = wait.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
                Err(Refusal::Passing { reason, wait })
            }
            300..=399 => Err(Refusal::Final(format!("{reason}; write the address that it leads to"))),
            401 | 403 => Err(Refusal::Final(format!(
                "{reason}; name the header that it asks for under headers_env, or have the address signed anew"
            ))),
            404 | 405 | 410 => Err(Refusal::Final(format!("{reason}; correct the address or the method"))),
            _ => Err(Refusal::Final(reason)),
        }
    }
}

fn parse(address: &str) -> Result<Url, Refusal> {
    let url = Url::parse(address.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    // What stands there instead may be secret too.
    url.ok_or_else(|| {
        Refusal::Final("the variable of url_env holds no http or https address; correct it".into())
    })
}
