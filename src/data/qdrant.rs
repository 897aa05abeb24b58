//! The points of a Qdrant collection as records: their payloads, page by page through the REST interface. Each page
//! is asked for while the one before it is being taken. Knows nothing of vectors.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use reqwest::header::{HeaderValue, RETRY_AFTER};
use reqwest::{Response, StatusCode, Url};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use super::http::{check_url, check_variable};
use super::object::{Opened, Opening, Page, Pages, Patience, Rows};
use super::retry::{Failure, Retries};
use super::web::{client, words};

/// Points of a page that does not say how many.
const PAGE_SIZE: u32 = 256;
/// More would be one large answer after another.
const MAX_PAGE_SIZE: u32 = 10_000;
/// Bytes that a page may have, as JSON.
const MAX_PAGE_BYTES: usize = 64 << 20;
/// A page that trickles in for longer than this many times the wait for its next bytes is given up.
const IDLE_TIMES_PER_PAGE: u32 = 4;

/// The keys of `type: qdrant`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QdrantConfig {
    /// Address of the server, as in `http://localhost:6333`.
    pub url: String,
    /// Name of the collection.
    pub collection: String,
    /// Name of the environment variable that holds the key, where the server wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Which points to read: a filter in Qdrant's own words, with `must`, `should`, `must_not`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points_filter: Option<Map<String, Value>>,
    /// Fields of the payload to ask for; those that `fields` names where it is left away, else all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub with_payload: Vec<String>,
    /// Points of a page.
    #[serde(default = "default_page_size")]
    pub page_size: u32,
}

fn default_page_size() -> u32 {
    PAGE_SIZE
}

impl QdrantConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        check_url(&self.url).map_err(|why| format!("url: {why}"))?;
        if self.url.contains(['?', '#']) {
            return Err("url: give the server's address alone, as in http://localhost:6333".into());
        }
        if self.collection.trim().is_empty() {
            return Err("collection is missing; name a collection of the server".into());
        }
        if self.collection.len() > 255
            || self.collection.contains(['/', '\\'])
            || self.collection.contains(char::is_control)
        {
            return Err("collection: a name has at most 255 bytes and no slashes".into());
        }
        if let Some(variable) = &self.api_key_env {
            check_variable("api_key_env", variable, "QDRANT_API_KEY")?;
        }
        if !(1..=MAX_PAGE_SIZE).contains(&self.page_size) {
            return Err(format!("page_size must be from 1 to {MAX_PAGE_SIZE}, not {}", self.page_size));
        }
        if self.with_payload.iter().any(String::is_empty) {
            return Err("with_payload: a name is empty; name fields of the payload".into());
        }
        Ok(())
    }

    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let server = Url::parse(&self.url).map_err(|error| format!("url: {error}"))?;
        let mut url = server.clone();
        url.path_segments_mut()
            .map_err(|()| format!("url: '{server}' cannot have a path"))?
            .pop_if_empty()
            .extend(["collections", &self.collection, "points", "scroll"]);
        let key = match &self.api_key_env {
            None => None,
            Some(variable) => Some(api_key(variable)?),
        };
        let mut body = Map::new();
        body.insert("limit".into(), self.page_size.into());
        body.insert("with_payload".into(), self.payload(&opening.fields));
        body.insert("with_vector".into(), false.into());
        if let Some(filter) = &self.points_filter {
            body.insert("filter".into(), Value::Object(filter.clone()));
        }
        let asker = Asker {
            client: client(&url, opening.patience)?,
            shown: format!("collection {} at {}", self.collection, server.as_str().trim_end_matches('/')),
            url,
            key,
            key_variable: self.api_key_env.clone(),
            collection: self.collection.clone(),
            body,
            patience: opening.patience,
        };
        let points = Points { asker: Arc::new(asker), opening: opening.clone(), ahead: None };
        Ok(Opened { rows: Rows::Pages(Box::new(points)), pin: None })
    }

    /// What of the payload to ask for. Fields are named by their first step, `translation` for `translation.hi`: a
    /// payload's own names for what is inside it are spelt otherwise.
    fn payload(&self, fields: &[String]) -> Value {
        if !self.with_payload.is_empty() {
            return json!(self.with_payload);
        }
        let plain = |name: &str| name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
        let mut names: Vec<&str> = fields.iter().map(|path| path.split('.').next().unwrap_or(path)).collect();
        names.sort_unstable();
        names.dedup();
        match names.is_empty() || !names.iter().all(|name| plain(name)) {
            true => Value::Bool(true),
            false => json!(names),
        }
    }
}

fn api_key(variable: &str) -> Result<HeaderValue, String> {
    let key = std::env::var(variable).map_err(|_| {
        format!("api_key_env: the environment variable {variable} is not set; put the key into it")
    })?;
    let mut key = HeaderValue::from_str(key.trim())
        .map_err(|_| format!("api_key_env: {variable} holds characters that no header can have"))?;
    key.set_sensitive(true);
    Ok(key)
}

/// The pages, one of them on its way.
struct Points {
    asker: Arc<Asker>,
    opening: Opening,
    ahead: Option<Ahead>,
}

/// A page that was asked for before anybody wanted it.
struct Ahead {
    token: Value,
    page: JoinHandle<Result<Page, String>>,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.page.abort();
    }
}

impl Pages for Points {
    fn page(&mut self, token: Option<&Value>) -> Result<Page, String> {
        let page = match self.ahead.take() {
            Some(mut ahead) if Some(&ahead.token) == token => self
                .opening
                .wait(async { (&mut ahead.page).await.unwrap_or_else(|error| Err(error.to_string())) })?,
            _ => self.opening.wait(self.asker.page(token.cloned()))?,
        };
        if let Some(token) = page.next.clone() {
            let (asker, wanted) = (self.asker.clone(), token.clone());
            let page = self.opening.runtime.spawn(async move { asker.page(Some(wanted)).await });
            self.ahead = Some(Ahead { token, page });
        }
        Ok(page)
    }
}

/// Asks for pages.
struct Asker {
    client: reqwest::Client,
    url: Url,
    key: Option<HeaderValue>,
    key_variable: Option<String>,
    collection: String,
    /// Of each request, but for its offset.
    body: Map<String, Value>,
    shown: String,
    patience: Patience,
}

/// An answer with points.
#[derive(Deserialize)]
struct Scrolled {
    result: Scroll,
}

#[derive(Deserialize)]
struct Scroll {
    points: Vec<Point>,
    /// A number or a UUID.
    next_page_offset: Option<Value>,
}

#[derive(Deserialize)]
struct Point {
    id: Value,
    payload: Option<Map<String, Value>>,
}

impl Asker {
    async fn page(&self, token: Option<Value>) -> Result<Page, String> {
        let mut body = self.body.clone();
        let shown = match &token {
            None => self.shown.clone(),
            Some(token) => format!("{}, from point {}", self.shown, name_of(token)),
        };
        if let Some(token) = token {
            body.insert("offset".into(), token);
        }
        let body = Value::Object(body);
        let limit = self.patience.idle * IDLE_TIMES_PER_PAGE;
        let mut retries = Retries::new(self.patience);
        let scroll = loop {
            let failure = match tokio::time::timeout(limit, self.ask(&body)).await {
                Ok(Ok(scroll)) => break scroll,
                Ok(Err(failure)) => failure,
                Err(_) => Failure::passing(format!("no whole page came within {} s", limit.as_secs_f64())),
            };
            retries.wait(failure, &shown).await.map_err(|reason| format!("{shown}: {reason}"))?;
        };
        let rows = scroll.points.into_iter().map(|point| {
            let empty = || format!("point {} has no payload", name_of(&point.id));
            point.payload.filter(|payload| !payload.is_empty()).ok_or_else(empty)
        });
        Ok(Page { shown, rows: rows.collect(), next: scroll.next_page_offset })
    }

    async fn ask(&self, body: &Value) -> Result<Scroll, Failure> {
        let mut request = self.client.post(self.url.clone()).json(body);
        if let Some(key) = &self.key {
            request = request.header("api-key", key.clone());
        }
        let mut response = request.send().await.map_err(|e| Failure::passing(words(e)))?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| Failure::passing(words(e)))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_PAGE_BYTES {
                return Err(Failure::Final(format!(
                    "a page has more than {} MB; lower page_size, or name the fields that are needed under with_payload",
                    MAX_PAGE_BYTES >> 20
                )));
            }
        }
        if response.status() != StatusCode::OK {
            return Err(self.refused(&response, &bytes));
        }
        let scrolled: Scrolled = serde_json::from_slice(&bytes).map_err(|error| {
            Failure::Final(format!(
                "the answer is no page of points ({error}); is url the address of a Qdrant server?"
            ))
        })?;
        Ok(scrolled.result)
    }

    /// What an answer without points means.
    fn refused(&self, response: &Response, body: &[u8]) -> Failure {
        let status = response.status();
        let said = error_of(body);
        let because = said.as_ref().map_or(String::new(), |said| format!(" ({said})"));
        if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
            let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
            return Failure::after(format!("the server answered {status}{because}"), wait);
        }
        Failure::Final(match (status.as_u16(), &self.key_variable) {
            (401 | 403, None) => format!(
                "the server answered {status}{because}; put its key into an environment variable and name the \
                 variable under api_key_env"
            ),
            (401 | 403, Some(variable)) => {
                format!(
                    "the server does not accept the key in {variable}: {status}{because}; correct the variable"
                )
            }
            (404, _) if said.is_some() => {
                format!("there is no collection {}{because}; correct collection", self.collection)
            }
            (400 | 422, _) => {
                format!(
                    "the server does not understand the request{because}; correct points_filter or with_payload"
                )
            }
            _ => format!("the server answered {status}{because}; is url the address of a Qdrant server?"),
        })
    }
}

/// What Qdrant says went wrong; `None` where somebody else answers.
fn error_of(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let text = value.pointer("/status/error")?.as_str()?;
    Some(text.chars().filter(|c| !c.is_control()).take(300).collect())
}

/// A point's number or UUID.
fn name_of(id: &Value) -> String {
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}
