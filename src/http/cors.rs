//! Which pages of other origins a browser lets use the server: none, unless settings name their origins.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::config::CorsOrigins;

/// How long a browser may keep the answer to its question.
const MAX_AGE: Duration = Duration::from_secs(600);

/// The layer, if pages of other origins may do anything.
pub(super) fn layer(origins: &CorsOrigins) -> Option<CorsLayer> {
    let origins = match origins {
        CorsOrigins::None => return None,
        CorsOrigins::Any => AllowOrigin::any(),
        // The settings let nothing through that is no header's value.
        CorsOrigins::List(list) => {
            AllowOrigin::list(list.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
        }
    };
    let named = |name| HeaderName::from_static(name);
    let asked = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        named("x-api-key"),
        named("x-request-id"),
        named("last-event-id"),
    ];
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(asked)
        .expose_headers([named("x-request-id"), header::RETRY_AFTER])
        .max_age(MAX_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::extract::Request;
    use axum::response::Response;
    use axum::routing::post;
    use tower::ServiceExt;

    use super::*;

    async fn preflight(origins: CorsOrigins, origin: &str) -> Response {
        let router = Router::new().route("/generate-lite", post(async || "fine"));
        let router = match layer(&origins) {
            Some(cors) => router.layer(cors),
            None => router,
        };
        let request = Request::options("/generate-lite")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty());
        router.oneshot(request.expect("is a request")).await.expect("is infallible")
    }

    #[tokio::test]
    async fn only_origins_of_the_list_are_answered() {
        let list = CorsOrigins::List(vec!["https://a.example".into()]);
        let good = preflight(list.clone(), "https://a.example").await;
        assert_eq!(good.headers()["access-control-allow-origin"], "https://a.example");
        let allowed = good.headers()["access-control-allow-headers"].to_str().unwrap().to_owned();
        assert!(allowed.contains("authorization") && allowed.contains("x-api-key"), "{allowed}");
        for (origins, origin) in [(list, "https://b.example"), (CorsOrigins::None, "https://a.example")] {
            let response = preflight(origins, origin).await;
            assert!(!response.headers().contains_key("access-control-allow-origin"), "{origin}");
        }
        let any = preflight(CorsOrigins::Any, "https://b.example").await;
        assert_eq!(any.headers()["access-control-allow-origin"], "*");
        assert!(!any.headers().contains_key("access-control-allow-credentials"));
    }
}
