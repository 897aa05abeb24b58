//! Who asks, whether they may, and how much: API keys, scopes, rates and requests under way. Which route needs what
//! stands in the route table's file; what a key is stands in the settings.

use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Span;

use super::error::ApiError;
use super::held::held;
use super::state::HttpSettings;
use super::{Need, need_of};
use crate::config::keys::{ApiKey, ApiKeys, KeyLimits, Scope};
use crate::metrics;

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Seconds after which a client with too many requests under way may try again.
const CONCURRENT_RETRY_S: u64 = 1;
/// What metrics call requests without a key.
const NOBODY: &str = "none";

/// Who may use the server and how much: the keys of now, each with what it has used.
#[derive(Debug)]
pub struct Access {
    defaults: KeyLimits,
    table: RwLock<Arc<Table>>,
}

#[derive(Debug)]
struct Table {
    keys: ApiKeys,
    /// One for each key; where there are no keys, one for everybody.
    limiters: Vec<Arc<Limiter>>,
}

impl Access {
    /// For these keys; `rate_limit` and `max_concurrent` are for keys that say nothing of their own, 0 is no bound.
    pub fn new(keys: ApiKeys, rate_limit: u32, max_concurrent: u32) -> Self {
        let defaults = KeyLimits {
            requests_per_minute: Some(rate_limit),
            burst: None,
            max_concurrent: Some(max_concurrent),
        };
        let table = Arc::new(Table::new(keys, &defaults, None));
        Self { defaults, table: RwLock::new(table) }
    }

    /// Everybody may do everything.
    pub fn open() -> Self {
        Self::new(ApiKeys::default(), 0, 0)
    }

    /// Takes other keys. What stays as it is keeps what it has used; requests under way end as they began.
    pub fn replace(&self, keys: ApiKeys) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        *table = Arc::new(Table::new(keys, &self.defaults, Some(&table)));
    }

    fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets a request in that needs `scope`, with the name of its key.
    fn admit(&self, headers: &HeaderMap, scope: Scope) -> Result<Admitted, Refusal> {
        let table = self.table();
        if table.keys.is_empty() {
            return table.limiters[0].admit(NOBODY.to_owned());
        }
        let secret = secret(headers).ok_or(Refusal::Missing)?;
        let index = table.keys.find(secret).ok_or(Refusal::Unknown)?;
        let key = &table.keys.keys()[index];
        if !key.allows(scope) {
            return Err(Refusal::Scope { key: key.name().to_owned(), scope });
        }
        table.limiters[index].admit(key.name().to_owned())
    }
}

impl Table {
    fn new(keys: ApiKeys, defaults: &KeyLimits, before: Option<&Table>) -> Self {
        let kept = |key: &ApiKey| {
            let before = before?;
            let index = before.keys.keys().iter().position(|other| other == key)?;
            Some(before.limiters[index].clone())
        };
        let own = |key: &ApiKey| kept(key).unwrap_or_else(|| Arc::new(Limiter::new(key.limits(), defaults)));
        let limiters = match keys.is_empty() {
            true => vec![Arc::new(Limiter::new(KeyLimits::default(), defaults))],
            false => keys.keys().iter().map(own).collect(),
        };
        Self { keys, limiters }
    }
}

/// What one key has used.
#[derive(Debug)]
struct Limiter {
    rate: Option<DefaultDirectRateLimiter>,
    requests_per_minute: u32,
    under_way: Option<Arc<Semaphore>>,
    max_concurrent: u32,
}

impl Limiter {
    fn new(own: KeyLimits, defaults: &KeyLimits) -> Self {
        let requests_per_minute = own.requests_per_minute.or(defaults.requests_per_minute).unwrap_or(0);
        let max_concurrent = own.max_concurrent.or(defaults.max_concurrent).unwrap_or(0);
        let rate = NonZeroU32::new(requests_per_minute).map(|rate| {
            let burst = own.burst.and_then(NonZeroU32::new).unwrap_or(rate);
            DefaultDirectRateLimiter::direct(Quota::per_minute(rate).allow_burst(burst))
        });
        let under_way = (max_concurrent > 0).then(|| Arc::new(Semaphore::new(max_concurrent as usize)));
        Self { rate, requests_per_minute, under_way, max_concurrent }
    }

    fn admit(&self, key: String) -> Result<Admitted, Refusal> {
        // First what costs nothing: a request that is refused here has used none of its rate.
        let slot = match &self.under_way {
            None => None,
            Some(slots) => match slots.clone().try_acquire_owned() {
                Ok(slot) => Some(slot),
                Err(_) => return Err(Refusal::Concurrent { key, limit: self.max_concurrent }),
            },
        };
        if let Some(rate) = &self.rate
            && let Err(not_until) = rate.check()
        {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            return Err(Refusal::Rate { key, limit: self.requests_per_minute, wait });
        }
        Ok(Admitted { key, slot })
    }
}

/// A request that was let in; its slot is free again when this is dropped.
#[derive(Debug)]
struct Admitted {
    key: String,
    slot: Option<OwnedSemaphorePermit>,
}

/// Why a request was not let in.
#[derive(Debug, PartialEq)]
enum Refusal {
    Missing,
    Unknown,
    Scope { key: String, scope: Scope },
    Rate { key: String, limit: u32, wait: Duration },
    Concurrent { key: String, limit: u32 },
}

impl Refusal {
    /// Counts it, names its key in the log, and words it.
    fn into_response(self) -> Response {
        let (key, outcome) = match &self {
            Self::Missing => (NOBODY, "no_key"),
            Self::Unknown => (NOBODY, "unknown_key"),
            Self::Scope { key, .. } => (key.as_str(), "scope"),
            Self::Rate { key, .. } => (key.as_str(), "rate"),
            Self::Concurrent { key, .. } => (key.as_str(), "concurrent"),
        };
        metrics::key_request(key, outcome);
        Span::current().record("key", key);
        let (error, challenge) = match self {
            Self::Missing => {
                let message =
                    "an API key is needed; send it as Authorization: Bearer KEY or as x-api-key: KEY";
                let error = ApiError::new(StatusCode::UNAUTHORIZED, "missing_api_key", message);
                (error, Some("Bearer realm=\"gurukul\"".to_owned()))
            }
            Self::Unknown => {
                let message =
                    "the API key is not known to this server; correct it, or ask who runs the server";
                let error = ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
                (error, Some("Bearer realm=\"gurukul\", error=\"invalid_token\"".to_owned()))
            }
            Self::Scope { key, scope } => {
                let scope = scope.as_str();
                let message = format!(
                    "the API key {key} lacks the scope {scope}, which this needs; ask who runs the server for a key \
                     that has it"
                );
                let error = ApiError::new(StatusCode::FORBIDDEN, "insufficient_permissions", message);
                let challenge =
                    format!("Bearer realm=\"gurukul\", error=\"insufficient_scope\", scope=\"{scope}\"");
                (error, Some(challenge))
            }
            Self::Rate { limit, wait, .. } => {
                let seconds = wait.as_millis().div_ceil(1000).max(1) as u64;
                let message = format!(
                    "more than {limit} requests a minute; come back in {seconds} s, or send fewer at once"
                );
                (ApiError::too_many("rate_limit_exceeded", message, seconds), None)
            }
            Self::Concurrent { limit, .. } => {
                let message = format!(
                    "{limit} requests of this key are under way, which is as many as it may have; wait for one to end"
                );
                (ApiError::too_many("too_many_concurrent_requests", message, CONCURRENT_RETRY_S), None)
            }
        };
        let mut response = error.into_response();
        if let Some(challenge) = challenge.and_then(|text| HeaderValue::try_from(text).ok()) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

/// The key that a request brings. `Bearer` goes before `x-api-key`, as OpenAI's clients send it.
fn secret(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, rest) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
    });
    let plain = || headers.get(API_KEY).map(|value| value.as_bytes().trim_ascii());
    bearer.or_else(plain).filter(|secret| !secret.is_empty())
}

/// Around every route: refuses who may not, and ends what takes too long to begin.
pub(super) async fn guard(
    State(settings): State<Arc<HttpSettings>>,
    mut request: Request,
    next: Next,
) -> Response {
    // What is no route has nothing to protect.
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let Some(path) = path else { return next.run(request).await };
    let need = need_of(request.method(), &path).unwrap_or(Need::Key(Scope::Admin));
    let admitted = match need {
        Need::Nothing => None,
        Need::Key(scope) => match settings.access.admit(request.headers(), scope) {
            Ok(admitted) => Some(admitted),
            Err(refusal) => return refusal.into_response(),
        },
    };
    if let Some(admitted) = &admitted {
        metrics::key_request(&admitted.key, "admitted");
        Span::current().record("key", admitted.key.as_str());
    }
    // No handler needs it, and what is not there is in no log.
    request.headers_mut().remove(header::AUTHORIZATION);
    request.headers_mut().remove(API_KEY);
    // A file may take as long as its bytes do, which are watched themselves.
    let timed = need != Need::Nothing && path != "/v1/files";
    let answer = match timed {
        false => next.run(request).await,
        true => match tokio::time::timeout(settings.request_timeout, next.run(request)).await {
            Ok(answer) => answer,
            Err(_) => timed_out(settings.request_timeout).into_response(),
        },
    };
    match admitted.and_then(|admitted| admitted.slot) {
        None => answer,
        Some(slot) => answer.map(|body| held(body, slot)),
    }
}

fn timed_out(limit: Duration) -> ApiError {
    let message = format!(
        "no answer within {} s, so the request was cancelled; ask for less, or for a stream, or raise \
         --request-timeout",
        limit.as_secs()
    );
    ApiError::timed_out(message)
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
