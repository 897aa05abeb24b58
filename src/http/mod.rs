//! The HTTP surface: this file is the one route table. Each route is a handler file with the handler, its
//! request and response types and its OpenAPI block together; what all share is in `error` (the envelope),
//! `extract` (JSON bodies), `sse` (streams), `generation` (requests to the engine) and `middleware`.
//!
//! A new endpoint is a handler file and one line in [`router`].

mod adapters;
mod error;
mod extract;
mod fields;
mod generate_lite;
mod generation;
mod health;
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
mod sources;
mod sse;
mod state;
mod train;

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::routing::get;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use error::{ApiError, ErrorBody, ErrorDetail, ErrorType};
pub use rl_collect::COLLECT_KIND;
pub use rl_train::RL_KIND;
pub use state::{AppState, GenerationDefaults, HttpSettings};
pub use train::TRAIN_KIND;

/// Every route, and with it the OpenAPI document.
fn table() -> OpenApiRouter<AppState> {
    let mut table = OpenApiRouter::with_openapi(openapi::Base::openapi())
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
        .routes(routes!(metrics::render))
        .routes(routes!(index::index))
        // Not in the document: another spelling of a route above, and the document's own page.
        .route("/v1/models/{owner}/{name}", get(openai::models::retrieve_of_owner))
        .route("/docs", get(openapi::docs_folder))
        .route("/docs/", get(openapi::docs))
        .route("/docs/{*file}", get(openapi::docs_file));
    openapi::add_shared_refusals(table.get_openapi_mut());
    table
}

/// The service, ready to be served.
pub fn router(state: AppState) -> Router {
    let (router, document) = table().split_for_parts();
    router
        .route("/openapi.json", get(openapi::json(&document)))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn(middleware::around))
        .with_state(state)
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
        let document = serde_json::to_value(table().into_openapi()).expect("is JSON");
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
    fn every_operation_has_a_name_of_its_own_and_the_shared_refusals() {
        let document = serde_json::to_value(table().into_openapi()).expect("is JSON");
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
        let mut document = serde_json::to_value(table().into_openapi()).expect("is JSON");
        // A release is no change of the interface.
        document["info"]["version"] = "[version]".into();
        insta::with_settings!({snapshot_path => "../../tests/snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_json_snapshot!("openapi", document);
        });
    }

    #[test]
    fn what_training_can_refuse_with_is_documented() {
        let document = serde_json::to_value(table().into_openapi()).expect("is JSON");
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
        let document = serde_json::to_value(table().into_openapi()).expect("is JSON");
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
