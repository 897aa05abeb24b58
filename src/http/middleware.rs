//! Around every request: its id, its tracing span, its metrics, and a net under panics.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt as _;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::error::ApiError;
use super::held::held;
use crate::metrics::{self, InFlight};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that is taken over from a client.
const MAX_ID_BYTES: usize = 128;

/// Wraps one request.
pub(super) async fn around(request: Request, next: Next) -> Response {
    let id = client_id(request.headers()).unwrap_or_else(new_id);
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_owned();
    let method = method_label(request.method());
    // What is empty here is recorded by whoever comes to know it.
    let span = tracing::info_span!(
        "request",
        request_id = id.to_str().unwrap_or_default(),
        method,
        route,
        adapter = Empty,
        generation = Empty,
        job_id = Empty,
        key = Empty,
    );
    let mut watch = Watch {
        arrived: Instant::now(),
        route,
        method,
        // What is logged when the client leaves before there is an answer.
        status: 499,
        span: span.clone(),
        _in_flight: InFlight::enter(),
    };
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span.clone()).await;
    let mut response = match answer {
        Ok(response) => response,
        Err(panic) => span.in_scope(|| ApiError::internal(panic_text(&*panic))).into_response(),
    };
    watch.status = response.status().as_u16();
    response.headers_mut().insert(REQUEST_ID, id);
    if is_event_stream(response.headers()) {
        // The answer is complete when the stream is: the watch ends with it.
        return response.map(|body| held(body, watch));
    }
    response
}

/// A request under way; its end is noted when this is dropped.
struct Watch {
    arrived: Instant,
    route: String,
    method: &'static str,
    status: u16,
    span: Span,
    _in_flight: InFlight,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let elapsed_s = self.arrived.elapsed().as_secs_f64();
        metrics::http_answered(&self.route, self.method, self.status, elapsed_s);
        self.span.in_scope(|| tracing::info!(status = self.status, elapsed_s, "answered"));
    }
}

/// The client's own id, when it is short and plain enough for a log.
fn client_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(REQUEST_ID)?;
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    let bytes = value.as_bytes();
    ((1..=MAX_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(plain)).then(|| value.clone())
}

fn new_id() -> HeaderValue {
    HeaderValue::from_str(&uuid::Uuid::now_v7().to_string()).expect("a UUID that is no header value is a bug")
}

/// A label must not grow with what clients think up.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"text/event-stream"))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a handler panicked: {}", text.as_deref().unwrap_or("no message"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt;

    async fn ask(id: Option<&str>, path: &str) -> Response {
        async fn broken() -> &'static str {
            panic!("the secret of the handler")
        }
        let router = Router::new().route("/fine", get(async || "fine")).route("/broken", get(broken));
        let mut request = Request::get(path);
        if let Some(id) = id {
            request = request.header(REQUEST_ID, id);
        }
        let request = request.body(Body::empty()).expect("is a request");
        router.layer(axum::middleware::from_fn(around)).oneshot(request).await.expect("is infallible")
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_in_the_envelope() {
        let response = ask(None, "/broken").await;
        assert_eq!(response.status().as_u16(), 500);
        assert!(response.headers().contains_key(REQUEST_ID));
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("the body ends");
        let body = String::from_utf8(bytes.to_vec()).expect("is text");
        assert!(body.contains("internal_error") && !body.contains("secret"), "{body}");
    }

    #[tokio::test]
    async fn a_sane_request_id_comes_back_and_another_is_replaced() {
        let id_of = async |id| {
            let response = ask(id, "/fine").await;
            response.headers()[REQUEST_ID].to_str().expect("is ASCII").to_owned()
        };
        assert_eq!(id_of(Some("client-7:a.b_c")).await, "client-7:a.b_c");
        let long = "x".repeat(129);
        for insane in ["", "a b", "a\"b", "a\tb", long.as_str()] {
            let id = id_of(Some(insane)).await;
            assert!(uuid::Uuid::parse_str(&id).is_ok(), "{insane:?} became {id}");
        }
        assert_ne!(id_of(None).await, id_of(None).await);
    }
}
