//! The OpenAPI document, collected from the handlers' own blocks, and the page that shows it. The page's assets
//! are in the binary; it asks no other host for anything.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use utoipa::openapi::{ContentBuilder, OpenApi as Document, Ref, ResponseBuilder};
use utoipa::{IntoResponses, OpenApi, ToSchema as _};

use super::error::{ApiError, ErrorBody};
use super::state::AppState;

/// What the document says besides the endpoints; those come with their routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Gurukul",
        description = "Serves a small language model and its LoRA adapters, and trains them. Every error has the body \
                       `{\"error\":{\"message\",\"type\",\"param\",\"code\"}}`; every response has the header \
                       `x-request-id`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "generate", description = "Text from a prompt"),
        (name = "openai", description = "Compatible with OpenAI's clients"),
        (name = "adapters", description = "LoRA adapters"),
        (name = "training", description = "Jobs that train adapters"),
        (name = "rl", description = "Episodes: collected, uploaded and learnt from"),
        (name = "server", description = "The server itself"),
    ),
    components(schemas(
        super::generate_lite::TokenEvent,
        super::job_events::ProgressEvent,
        super::openai::chat_wire::ContentPart,
    )),
)]
pub(super) struct Base;

/// What any generating endpoint can refuse with.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "the fields are read by the derive alone")]
pub(super) enum GenerationErrors {
    /// A field is unknown, missing, of the wrong type or out of its range, or the prompt does not fit the context
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// No such adapter or model
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The body or the prompt is longer than the server takes
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not sent as application/json
    #[response(status = 415)]
    MediaType(ErrorBody),
    /// The request is fine, but cannot be done: the adapter's files do not fit the model
    #[response(status = 422)]
    CannotBeDone(ErrorBody),
    /// The queue is full; Retry-After tells when to come back
    #[response(status = 429)]
    QueueFull(ErrorBody),
    /// The server failed
    #[response(status = 500)]
    Failed(ErrorBody),
    /// The server is stopping or has no memory for the adapter now; Retry-After tells when to come back
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

/// Adds the refusals that no handler has to name, because what all of them share can refuse: a part of the path or a
/// body that does not arrive as it should, a failure of the server, a server that stops. What a handler says itself
/// stays. The endpoints about the server itself read neither bodies nor the disk.
pub(super) fn add_shared_refusals(document: &mut Document) {
    for (path, item) in &mut document.paths.paths {
        for operation in [&mut item.get, &mut item.post, &mut item.delete].into_iter().flatten() {
            let is_about_server = operation.tags.iter().flatten().any(|tag| tag == "server");
            for (applies, status, description) in [
                (path.contains('{'), "400", "A part of the path is not UTF-8"),
                (operation.request_body.is_some(), "408", "The body did not arrive in time"),
                (!is_about_server, "500", "The server failed; its log has the reason"),
                (!is_about_server, "503", "The server is stopping, or its disk refuses; try again later"),
            ] {
                if applies {
                    let refusal = || error_response(description).into();
                    operation.responses.responses.entry(status.to_owned()).or_insert_with(refusal);
                }
            }
        }
    }
}

fn error_response(description: &str) -> utoipa::openapi::Response {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
    ResponseBuilder::new().description(description).content("application/json", body).build()
}

/// Answers with the document, which is written out once.
pub(super) fn json(document: &Document) -> impl Fn() -> std::future::Ready<Response> + Clone + use<> {
    let text: Arc<str> = document.to_json().expect("a document that is no JSON is a bug").into();
    move || {
        let headers = [(header::CONTENT_TYPE, "application/json")];
        std::future::ready((headers, text.to_string()).into_response())
    }
}

/// The page's files have paths relative to a folder.
pub(super) async fn docs_folder() -> Redirect {
    Redirect::permanent("/docs/")
}

/// The page.
pub(super) async fn docs(state: State<AppState>) -> Response {
    docs_file(state, Path(String::new())).await
}

/// A file of the page.
pub(super) async fn docs_file(_: State<AppState>, Path(file): Path<String>) -> Response {
    // Swagger's page would ask a validator on the internet to look at the document.
    let config = utoipa_swagger_ui::Config::from("/openapi.json").validator_url("none");
    match utoipa_swagger_ui::serve(&file, Arc::new(config)) {
        Ok(Some(asset)) => {
            let mut headers = vec![(header::CONTENT_TYPE, asset.content_type)];
            if asset.gzpipped {
                headers.push((header::CONTENT_ENCODING, "gzip".into()));
            }
            (StatusCode::OK, axum::response::AppendHeaders(headers), asset.bytes.into_owned()).into_response()
        }
        Ok(None) => ApiError::not_found("not_found", "the documentation has no such file").into_response(),
        Err(error) => ApiError::internal(error).into_response(),
    }
}
