//! The HTTP surface: this file is the one route table. Each route is a handler file with the handler, its
//! request and response types and its OpenAPI block together; what all share is in `error` (the envelope),
//! `extract` (JSON bodies), `sse` (streams), `generation` (requests to the engine) and `middleware`.
//!
//! A new endpoint is a handler file and one line in [`router`].

mod adapters;
mod auth;
mod cors;
mod error;
mod extract;
mod fields;
mod gate;
mod generate_lite;
mod generation;
mod health;
mod held;
mod index;
mod job_events;
mod jobs;
mod metrics;
mod middleware;
mod openai;
mod openapi;
mod rl_collect;
mod rl_fields;
mod rl_train;
mod rl_uploads;
mod serve;
mod sources;
mod sse;
mod state;
mod train;

use axum::Router;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::get;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::config::keys::Scope;

pub use auth::Access;
pub use error::{ApiError, ErrorBody, ErrorDetail, ErrorType};
pub use gate::{Gate, Lifecycle, Phase};
pub use rl_collect::COLLECT_KIND;
pub use rl_train::RL_KIND;
pub use serve::{BodyPatience, Patience, ServeSettings, Tls, bind, serve};
pub use state::{AppState, GenerationDefaults, HttpSettings};
pub use train::TRAIN_KIND;

/// Every route, and with it the OpenAPI document.
fn table() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::Base::openapi())
        .routes(routes!(generate_lite::generate_lite))
        .routes(routes!(openai::completions::create))
        .routes(routes!(openai::chat::create))
        .routes(routes!(openai::models::list))
        .routes(routes!(openai::models::retrieve))
        .routes(routes!(openai::files::create, openai::files::list))
        .routes(routes!(openai::files::retrieve, openai::files::delete))
        .routes(routes!(openai::files::content_of))
        .routes(routes!(openai::fine_tuning::create, openai::fine_tuning::list))
        .routes(routes!(openai::fine_tuning::retrieve))
        .routes(routes!(openai::fine_tuning::cancel))
        .routes(routes!(openai::fine_tuning::events))
        .routes(routes!(openai::fine_tuning::checkpoints))
        .routes(routes!(train::train_lite))
        .routes(routes!(rl_train::rl_train))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::status))
        .routes(routes!(jobs::log))
        .routes(routes!(jobs::log_tail))
        .routes(routes!(job_events::events))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::resume))
        .routes(routes!(rl_collect::collect))
        .routes(routes!(rl_uploads::list))
        .routes(routes!(rl_uploads::get))
        .routes(routes!(rl_uploads::retry))
        .routes(routes!(sources::list))
        .routes(routes!(adapters::list))
        .routes(routes!(adapters::get, adapters::delete))
        .routes(routes!(health::health))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::render))
        .routes(routes!(index::index))
        // Not in the document: another spelling of a route above, and the document's own page.
        .route("/v1/models/{owner}/{name}", get(openai::models::retrieve_of_owner))
        .route("/docs", get(openapi::docs_folder))
        .route("/docs/", get(openapi::docs))
        .route("/docs/{*file}", get(openapi::docs_file))
}

/// What a request needs to be let in, where keys are configured at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing.
    Nothing,
    /// A key with this scope.
    Key(Scope),
}

/// What each route needs, by method and pattern; `*` at an end is everything below. The first line that fits counts.
const NEEDS: &[(&[Method], &str, Need)] = &[
    (&[Method::GET], "/", Need::Nothing),
    (&[Method::GET], "/health", Need::Nothing),
    (&[Method::GET], "/health/*", Need::Nothing),
    (&[Method::GET], "/docs", Need::Nothing),
    (&[Method::GET], "/docs/*", Need::Nothing),
    (&[Method::GET], "/openapi.json", Need::Nothing),
    (&[Method::POST], "/generate-lite", Need::Key(Scope::Generate)),
    (&[Method::POST], "/v1/completions", Need::Key(Scope::Generate)),
    (&[Method::POST], "/v1/chat/completions", Need::Key(Scope::Generate)),
    (&[Method::GET], "/v1/models", Need::Key(Scope::Generate)),
    (&[Method::GET], "/v1/models/*", Need::Key(Scope::Generate)),
    (&[Method::GET], "/adapter/list", Need::Key(Scope::Generate)),
    (&[Method::GET], "/adapter/{name}", Need::Key(Scope::Generate)),
    (&[Method::DELETE], "/adapter/{name}", Need::Key(Scope::Admin)),
    (&[Method::POST], "/adapter/train-lite", Need::Key(Scope::Train)),
    (&[Method::GET], "/adapter/jobs", Need::Key(Scope::Train)),
    (&[Method::GET], "/adapter/status/{job_id}", Need::Key(Scope::Train)),
    (&[Method::GET], "/adapter/logs/*", Need::Key(Scope::Train)),
    (&[Method::GET], "/adapter/events/{job_id}", Need::Key(Scope::Train)),
    (&[Method::POST], "/adapter/cancel/{job_id}", Need::Key(Scope::Train)),
    (&[Method::POST], "/adapter/resume/{job_id}", Need::Key(Scope::Train)),
    (&[Method::GET, Method::POST], "/v1/files", Need::Key(Scope::Train)),
    (&[Method::GET, Method::DELETE], "/v1/files/*", Need::Key(Scope::Train)),
    (&[Method::GET, Method::POST], "/v1/fine_tuning/*", Need::Key(Scope::Train)),
    (&[Method::GET], "/sources", Need::Key(Scope::Train)),
    (&[Method::GET, Method::POST], "/rl/*", Need::Key(Scope::Rl)),
    (&[Method::GET], "/metrics", Need::Key(Scope::Admin)),
];

/// What a route needs; `None` when [`NEEDS`] forgets it, which leaves it to the administrator.
fn need_of(method: &Method, pattern: &str) -> Option<Need> {
    // axum answers HEAD where there is a GET.
    let method = if *method == Method::HEAD { &Method::GET } else { method };
    let fits = |known: &str| match known.strip_suffix('*') {
        Some(start) => pattern.starts_with(start),
        None => pattern == known,
    };
    NEEDS.iter().find(|(methods, known, _)| methods.contains(method) && fits(known)).map(|(.., need)| *need)
}

/// The routes, and the document that has with each what it needs.
fn parts() -> (Router<AppState>, utoipa::openapi::OpenApi) {
    let (router, mut document) = table().split_for_parts();
    openapi::complete(&mut document, need_of);
    (router, document)
}

/// The service, ready to be served.
pub fn router(state: AppState) -> Router {
    let (router, document) = parts();
    let settings = state.settings.clone();
    let router = router
        .route("/openapi.json", get(openapi::json(&document)))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn_with_state(settings.clone(), auth::guard));
    // Around the keys: a browser asks what it may without one, and has to be able to read a refusal.
    let router = match cors::layer(&settings.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(axum::middleware::from_fn(middleware::around)).with_state(state)
}

async fn no_route(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::not_found("not_found", format!("there is no {path} here; / and /docs/ tell what there is"))
}

async fn no_method(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("{path} does not take this method; the header Allow names those it does");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_endpoint_of_the_contract() {
        let document = serde_json::to_value(parts().1).expect("is JSON");
        assert!(
            document["openapi"].as_str().is_some_and(|v| v.starts_with("3.1")),
            "{}",
            document["openapi"]
        );
        for (path, method) in [
            ("/generate-lite", "post"),
            ("/adapter/train-lite", "post"),
            ("/adapter/status/{job_id}", "get"),
            ("/adapter/logs/{job_id}", "get"),
            ("/adapter/logs/{job_id}/tail", "get"),
            ("/adapter/events/{job_id}", "get"),
            ("/adapter/cancel/{job_id}", "post"),
            ("/adapter/resume/{job_id}", "post"),
            ("/adapter/jobs", "get"),
            ("/v1/files", "post"),
            ("/v1/files", "get"),
            ("/v1/files/{file_id}", "get"),
            ("/v1/files/{file_id}", "delete"),
            ("/v1/files/{file_id}/content", "get"),
            ("/v1/fine_tuning/jobs", "post"),
            ("/v1/fine_tuning/jobs", "get"),
            ("/v1/fine_tuning/jobs/{fine_tuning_job_id}", "get"),
            ("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", "post"),
            ("/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", "get"),
            ("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", "get"),
            ("/rl/uploads", "get"),
            ("/rl/uploads/{upload_id}", "get"),
            ("/rl/uploads/{upload_id}/retry", "post"),
            ("/sources", "get"),
            ("/adapter/list", "get"),
            ("/adapter/{name}", "get"),
            ("/adapter/{name}", "delete"),
            ("/rl/collect", "post"),
            ("/health", "get"),
            ("/health/live", "get"),
            ("/health/ready", "get"),
            ("/metrics", "get"),
            ("/", "get"),
            ("/v1/models", "get"),
            ("/v1/models/{id}", "get"),
            ("/v1/completions", "post"),
            ("/v1/chat/completions", "post"),
        ] {
            let operation = &document["paths"][path][method];
            let accepts =
                ["/adapter/train-lite", "/adapter/resume/{job_id}", "/rl/uploads/{upload_id}/retry"]
                    .contains(&path);
            let good = if accepts { "202" } else { "200" };
            assert!(operation["responses"][good].is_object(), "{method} {path}");
            if operation["tags"][0] == "generate" || path.ends_with("completions") {
                for status in ["400", "404", "413", "415", "422", "429", "500", "503"] {
                    let schema = &operation["responses"][status]["content"]["application/json"]["schema"];
                    assert_eq!(schema["$ref"], "#/components/schemas/ErrorBody", "{method} {path} {status}");
                }
            }
        }
    }

    #[test]
    fn every_route_says_what_it_needs() {
        let mut routes = 0;
        for (pattern, item) in parts().1.paths.paths {
            let methods = [
                (Method::GET, item.get),
                (Method::POST, item.post),
                (Method::PUT, item.put),
                (Method::DELETE, item.delete),
                (Method::PATCH, item.patch),
            ];
            for (method, operation) in methods {
                let Some(operation) = operation else { continue };
                routes += 1;
                let need = need_of(&method, &pattern);
                let need = need.unwrap_or_else(|| panic!("{method} {pattern} has no line in NEEDS"));
                let open = operation.security.is_none();
                assert_eq!(open, need == Need::Nothing, "{method} {pattern}: the document says otherwise");
                for status in ["401", "403", "408", "429", "504"] {
                    let documented = operation.responses.responses.contains_key(status);
                    assert!(
                        documented || open || status == "408" || status == "504",
                        "{method} {pattern} {status}"
                    );
                }
            }
        }
        assert!(routes > 30, "{routes}");
        // Those that are not in the document.
        let undocumented =
            include_str!("mod.rs").lines().filter_map(|line| line.trim().strip_prefix(".route(\""));
        let mut seen = 0;
        for pattern in undocumented.filter_map(|rest| rest.split('"').next()) {
            assert!(need_of(&Method::GET, pattern).is_some(), "{pattern} has no line in NEEDS");
            seen += 1;
        }
        assert!(seen >= 5, "{seen}");
    }

    #[test]
    fn needs_are_those_of_the_contract() {
        for (method, pattern, need) in [
            (Method::GET, "/health/ready", Some(Need::Nothing)),
            (Method::HEAD, "/health", Some(Need::Nothing)),
            (Method::GET, "/v1/models/{owner}/{name}", Some(Need::Key(Scope::Generate))),
            (Method::GET, "/adapter/{name}", Some(Need::Key(Scope::Generate))),
            (Method::DELETE, "/adapter/{name}", Some(Need::Key(Scope::Admin))),
            (Method::GET, "/adapter/logs/{job_id}/tail", Some(Need::Key(Scope::Train))),
            (Method::DELETE, "/v1/files/{file_id}", Some(Need::Key(Scope::Train))),
            (Method::POST, "/rl/uploads/{upload_id}/retry", Some(Need::Key(Scope::Rl))),
            (Method::GET, "/metrics", Some(Need::Key(Scope::Admin))),
            (Method::POST, "/health", None),
            (Method::GET, "/healthy", None),
            (Method::GET, "/adapter/new", None),
        ] {
            assert_eq!(need_of(&method, pattern), need, "{method} {pattern}");
        }
    }

    #[test]
    fn every_operation_has_a_name_of_its_own_and_the_shared_refusals() {
        let document = serde_json::to_value(parts().1).expect("is JSON");
        let mut names = std::collections::BTreeSet::new();
        for (path, item) in document["paths"].as_object().expect("has paths") {
            for (method, operation) in item.as_object().expect("has methods") {
                let name = operation["operationId"].as_str().expect("has a name");
                assert!(
                    names.insert(name.to_owned()),
                    "{method} {path}: {name} is the name of another one too"
                );
                let has = |status: &str| operation["responses"][status]["description"].is_string();
                assert_eq!(has("408"), operation["requestBody"].is_object(), "{method} {path}");
                assert!(has("400") || !path.contains('{'), "{method} {path}");
                assert!(operation["tags"][0] == "server" || (has("500") && has("503")), "{method} {path}");
            }
        }
        // What a handler says itself is not written over.
        let kept = &document["paths"]["/generate-lite"]["post"]["responses"]["503"]["description"];
        assert!(kept.as_str().is_some_and(|text| text.contains("Retry-After")), "{kept}");
    }

    #[test]
    fn the_document_is_as_it_was() {
        let mut document = serde_json::to_value(parts().1).expect("is JSON");
        // A release is no change of the interface.
        document["info"]["version"] = "[version]".into();
        insta::with_settings!({snapshot_path => "../../tests/snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_json_snapshot!("openapi", document);
        });
    }

    #[test]
    fn what_training_can_refuse_with_is_documented() {
        let document = serde_json::to_value(parts().1).expect("is JSON");
        for (path, method, statuses) in [
            ("/adapter/train-lite", "post", &["400", "404", "409", "413", "415", "422", "503"][..]),
            ("/rl/train", "post", &["400", "404", "409", "413", "415", "422", "503"]),
            ("/adapter/status/{job_id}", "get", &["404", "503"]),
            ("/adapter/cancel/{job_id}", "post", &["404", "409", "503"]),
            ("/adapter/resume/{job_id}", "post", &["404", "409", "503"]),
            ("/rl/collect", "post", &["400", "404", "409", "413", "415", "422", "503", "507"]),
            ("/rl/uploads", "get", &["400", "404", "503"]),
            ("/rl/uploads/{upload_id}/retry", "post", &["404", "409", "503"]),
            ("/v1/files", "post", &["400", "413", "415", "503"]),
            ("/v1/files/{file_id}", "delete", &["404", "409"]),
            ("/v1/fine_tuning/jobs", "post", &["400", "404", "413", "415", "422", "503"]),
        ] {
            let responses = &document["paths"][path][method]["responses"];
            for status in statuses {
                let schema = &responses[status]["content"]["application/json"]["schema"];
                assert_eq!(schema["$ref"], "#/components/schemas/ErrorBody", "{method} {path} {status}");
            }
        }
    }

    #[test]
    fn every_reference_of_the_document_has_its_schema() {
        let document = serde_json::to_value(parts().1).expect("is JSON");
        let mut stack = vec![&document];
        while let Some(value) = stack.pop() {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(reference) = map.get("$ref").and_then(|r| r.as_str()) {
                        let pointer = reference.trim_start_matches('#');
                        assert!(document.pointer(pointer).is_some(), "{reference} points nowhere");
                    }
                    stack.extend(map.values());
                }
                serde_json::Value::Array(list) => stack.extend(list),
                _ => {}
            }
        }
    }
}
