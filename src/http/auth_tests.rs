//! Tests of who is let in: keys, scopes, rates, requests under way, and what a reload keeps.

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use serde_json::Value;
use tower::ServiceExt;

use super::*;
use crate::config::keys::KeySources;

const READER: &str = "reader-key-0123456789";
const TEACHER: &str = "teacher-key-0123456789";
const OPS: &str = "ops-key-0123456789abc";

fn keys() -> ApiKeys {
    let text = format!("reader:generate={READER},teacher:train+rl={TEACHER},ops={OPS}");
    KeySources::new(Some(&text), None).and_then(|sources| sources.load()).expect("these are keys")
}

fn headers(name: &'static str, value: &str) -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_str(value).expect("is a value"))])
}

fn bearer(key: &str) -> HeaderMap {
    headers("authorization", &format!("Bearer {key}"))
}

#[test]
fn a_key_comes_in_either_header() {
    let access = Access::new(keys(), 0, 0);
    let name = |headers: &HeaderMap| access.admit(headers, Scope::Generate).map(|a| a.key);
    assert_eq!(name(&bearer(READER)), Ok("reader".to_owned()));
    assert_eq!(name(&headers("authorization", &format!("bearer   {READER} "))), Ok("reader".to_owned()));
    assert_eq!(name(&headers("x-api-key", READER)), Ok("reader".to_owned()));
    assert_eq!(name(&HeaderMap::new()), Err(Refusal::Missing));
    assert_eq!(name(&headers("authorization", READER)), Err(Refusal::Missing));
    assert_eq!(name(&headers("authorization", "Basic dXNlcjpwYXNz")), Err(Refusal::Missing));
    assert_eq!(name(&bearer("")), Err(Refusal::Missing));
    for wrong in [&READER[..READER.len() - 1], "reader-key-012345678 9", &format!("{READER}0"), "é"] {
        assert_eq!(name(&bearer(wrong)), Err(Refusal::Unknown), "{wrong}");
    }
    let mut both = bearer("unused");
    both.extend(headers("x-api-key", READER));
    assert_eq!(name(&both), Err(Refusal::Unknown), "Bearer goes first");
}

#[test]
fn a_key_does_what_its_scopes_say() {
    let access = Access::new(keys(), 0, 0);
    let may = |key, scope| match access.admit(&bearer(key), scope) {
        Ok(_) => true,
        Err(Refusal::Scope { .. }) => false,
        Err(other) => panic!("{other:?}"),
    };
    for (key, scopes) in [
        (READER, &[Scope::Generate][..]),
        (TEACHER, &[Scope::Train, Scope::Rl]),
        (OPS, &[Scope::Generate, Scope::Train, Scope::Rl, Scope::Admin]),
    ] {
        for scope in Scope::ALL {
            assert_eq!(may(key, scope), scopes.contains(&scope), "{key} {scope:?}");
        }
    }
    let open = Access::open();
    assert!(open.admit(&HeaderMap::new(), Scope::Admin).is_ok());
    assert!(open.admit(&bearer("unused"), Scope::Admin).is_ok(), "OpenAI's client always sends one");
}

#[test]
fn a_rate_is_for_each_key_and_tells_when_to_come_back() {
    let access = Access::new(keys(), 3, 0);
    let ask = |key: &str| access.admit(&bearer(key), Scope::Generate);
    for _ in 0..3 {
        assert!(ask(READER).is_ok());
    }
    let Err(Refusal::Rate { key, limit, wait }) = ask(READER) else { panic!("the fourth is refused") };
    assert_eq!((key.as_str(), limit), ("reader", 3));
    assert!(wait > Duration::from_secs(15) && wait <= Duration::from_secs(20), "{wait:?}");
    assert!(ask(OPS).is_ok(), "another key has its own");
    // A reload changes nothing for a key that stays as it is.
    access.replace(keys());
    assert!(matches!(ask(READER), Err(Refusal::Rate { .. })));
    let fewer = format!("reader:generate+rl={READER}");
    access.replace(KeySources::new(Some(&fewer), None).unwrap().load().unwrap());
    assert!(ask(READER).is_ok(), "one that changed begins anew");
    assert!(matches!(ask(OPS), Err(Refusal::Unknown)), "one that is gone is unknown");
}

#[test]
fn a_keys_own_limits_go_before_the_servers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    let text = format!(
        "keys:\n  - {{name: free, key: {READER}, scopes: [rl], requests_per_minute: 0, max_concurrent: 0}}\n  \
         - {{name: slow, key: {OPS}, scopes: [rl], requests_per_minute: 60, burst: 1, max_concurrent: 1}}\n"
    );
    std::fs::write(&path, text).unwrap();
    let access = Access::new(KeySources::new(None, Some(path)).unwrap().load().unwrap(), 1, 1);
    let held: Vec<_> = (0..20).map(|_| access.admit(&bearer(READER), Scope::Rl).expect("is free")).collect();
    assert!(held.iter().all(|admitted| admitted.slot.is_none()));
    let first = access.admit(&bearer(OPS), Scope::Rl).expect("is the first");
    let again = access.admit(&bearer(OPS), Scope::Rl);
    assert_eq!(again.unwrap_err(), Refusal::Concurrent { key: "slow".into(), limit: 1 });
    drop(first);
    let again = access.admit(&bearer(OPS), Scope::Rl);
    assert!(matches!(again, Err(Refusal::Rate { .. })), "{again:?}");
}

#[test]
fn without_keys_limits_are_for_all_together() {
    let access = Access::new(ApiKeys::default(), 2, 0);
    assert!(access.admit(&HeaderMap::new(), Scope::Rl).is_ok());
    assert!(access.admit(&bearer("anything"), Scope::Rl).is_ok());
    assert!(matches!(access.admit(&HeaderMap::new(), Scope::Rl), Err(Refusal::Rate { .. })));
}

/// Routes of which one never ends, behind the guard.
fn router(settings: HttpSettings) -> Router {
    let settings = Arc::new(settings);
    async fn stream() -> Body {
        Body::from_stream(futures::stream::pending::<Result<&'static str, std::io::Error>>())
    }
    Router::new()
        .route("/v1/models", get(async |headers: HeaderMap| format!("{}", headers.len())))
        .route("/health", get(async || "fine"))
        .route("/generate-lite", axum::routing::post(std::future::pending::<()>))
        .route("/adapter/events/{job_id}", get(stream))
        .route("/not-in-the-table", get(async || "secret"))
        .layer(axum::middleware::from_fn_with_state(settings, guard))
}

async fn ask(router: &Router, method: &str, path: &str, headers: HeaderMap) -> Response {
    let mut request = Request::builder().method(method).uri(path).body(Body::empty()).expect("is a request");
    *request.headers_mut() = headers;
    router.clone().oneshot(request).await.expect("is infallible")
}

async fn body(response: Response) -> Value {
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("the body ends");
    serde_json::from_slice(&bytes).expect("is JSON")
}

#[tokio::test]
async fn refusals_have_status_code_and_challenge() {
    let access = Arc::new(Access::new(keys(), 0, 0));
    let router = router(HttpSettings { access, ..HttpSettings::new("m") });
    let missing = ask(&router, "GET", "/v1/models", HeaderMap::new()).await;
    assert_eq!(missing.status().as_u16(), 401);
    assert_eq!(missing.headers()["www-authenticate"], "Bearer realm=\"gurukul\"");
    assert_eq!(body(missing).await["error"]["code"], "missing_api_key");
    let unknown = ask(&router, "GET", "/v1/models", bearer("s3cr3t-0123456789")).await;
    assert_eq!(unknown.status().as_u16(), 401);
    let error = body(unknown).await;
    assert_eq!(error["error"]["code"], "invalid_api_key");
    assert!(!error.to_string().contains("s3cr3t"), "{error}");
    let scope = ask(&router, "GET", "/v1/models", bearer(TEACHER)).await;
    assert_eq!(scope.status().as_u16(), 403);
    let error = body(scope).await;
    assert_eq!(error["error"]["code"], "insufficient_permissions");
    assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains("generate")), "{error}");
    let let_in = ask(&router, "GET", "/v1/models", bearer(READER)).await;
    assert_eq!(let_in.status().as_u16(), 200);
    assert_eq!(body(let_in).await, 0, "the key does not reach a handler");
    assert_eq!(ask(&router, "GET", "/health", HeaderMap::new()).await.status().as_u16(), 200);
    assert_eq!(ask(&router, "HEAD", "/v1/models", HeaderMap::new()).await.status().as_u16(), 401);
    assert_eq!(ask(&router, "HEAD", "/v1/models", bearer(READER)).await.status().as_u16(), 200);
    assert_eq!(ask(&router, "GET", "/nowhere", HeaderMap::new()).await.status().as_u16(), 404);
    // A route that the table does not know is the administrator's.
    assert_eq!(ask(&router, "GET", "/not-in-the-table", bearer(READER)).await.status().as_u16(), 403);
    assert_eq!(ask(&router, "GET", "/not-in-the-table", bearer(OPS)).await.status().as_u16(), 200);
}

#[tokio::test]
async fn a_stream_is_under_way_until_its_client_leaves() {
    let access = Arc::new(Access::new(keys(), 0, 1));
    let router = router(HttpSettings { access, ..HttpSettings::new("m") });
    let stream = ask(&router, "GET", "/adapter/events/x", bearer(TEACHER)).await;
    assert_eq!(stream.status().as_u16(), 200);
    let second = ask(&router, "GET", "/adapter/events/x", bearer(TEACHER)).await;
    assert_eq!(second.status().as_u16(), 429);
    assert_eq!(second.headers()["retry-after"], "1");
    assert_eq!(body(second).await["error"]["code"], "too_many_concurrent_requests");
    assert_eq!(ask(&router, "GET", "/v1/models", bearer(OPS)).await.status().as_u16(), 200);
    drop(stream);
    assert_eq!(ask(&router, "GET", "/adapter/events/x", bearer(TEACHER)).await.status().as_u16(), 200);
}

#[tokio::test]
async fn an_answer_that_does_not_begin_is_given_up() {
    let request_timeout = Duration::from_millis(50);
    let router = router(HttpSettings { request_timeout, ..HttpSettings::new("m") });
    let response = ask(&router, "POST", "/generate-lite", HeaderMap::new()).await;
    assert_eq!(response.status().as_u16(), 504);
    assert_eq!(body(response).await["error"]["code"], "request_timeout");
}

#[tokio::test]
async fn a_rate_limit_is_429_with_a_time() {
    let access = Arc::new(Access::new(ApiKeys::default(), 1, 0));
    let router = router(HttpSettings { access, ..HttpSettings::new("m") });
    assert_eq!(ask(&router, "GET", "/v1/models", HeaderMap::new()).await.status().as_u16(), 200);
    let second = ask(&router, "GET", "/v1/models", HeaderMap::new()).await;
    assert_eq!(second.status().as_u16(), 429);
    let seconds: u64 = second.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((50..=60).contains(&seconds), "{seconds}");
    assert_eq!(body(second).await["error"]["code"], "rate_limit_exceeded");
    assert_eq!(
        ask(&router, "GET", "/health", HeaderMap::new()).await.status().as_u16(),
        200,
        "is not counted"
    );
}
