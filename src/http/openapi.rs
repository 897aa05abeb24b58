//! The OpenAPI document, collected from the handlers' own blocks, and the page that shows it. The page's assets
//! are in the binary; it asks no other host for anything.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{self, Content, OpenApi as Document, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, OpenApi, ToSchema as _};

use super::Need;
use super::error::{ApiError, ErrorBody};
use super::state::AppState;
use crate::config::keys::Scope;

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
        crate::rl::learn::RlProgress,
        crate::train::Progress,
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

/// Names of the security schemes in the document.
const SCHEMES: [&str; 2] = ["bearer", "api_key"];

/// Adds to every operation what no handler has to name: how to identify, and what can be refused by what all of them
/// share: a part of the path or a body that does not arrive as it should, a key that does not suffice, a failure of the
/// server, a server that stops. What a handler says itself stays. The endpoints about the server itself read neither
/// bodies nor the disk.
pub(super) fn complete(document: &mut Document, need_of: fn(&Method, &str) -> Option<Need>) {
    let components = document.components.get_or_insert_default();
    let mut bearer = Http::new(HttpAuthScheme::Bearer);
    bearer.description =
        Some("An API key, where the server has any; without keys nobody has to identify".to_owned());
    let header = ApiKeyValue::with_description("x-api-key", "The same key in a header of its own");
    components.add_security_scheme(SCHEMES[0], SecurityScheme::Http(bearer));
    components.add_security_scheme(SCHEMES[1], SecurityScheme::ApiKey(ApiKey::Header(header)));
    for (path, item) in &mut document.paths.paths {
        let operations = [
            (Method::GET, &mut item.get),
            (Method::POST, &mut item.post),
            (Method::PUT, &mut item.put),
            (Method::DELETE, &mut item.delete),
            (Method::PATCH, &mut item.patch),
        ];
        for (method, operation) in operations {
            let Some(operation) = operation else { continue };
            let is_about_server = operation.tags.iter().flatten().any(|tag| tag == "server");
            let mut refusals = Vec::new();
            if path.contains('{') {
                refusals.push(("400", "A part of the path is not UTF-8"));
            }
            if operation.request_body.is_some() {
                refusals.push(("408", "The body came too slowly"));
            }
            if !is_about_server {
                refusals.extend([
                    ("500", "The server failed; its log has the reason"),
                    ("503", "The server is stopping, or its disk refuses; try again later"),
                ]);
            }
            // What is not in the table needs the administrator's key, as everywhere.
            if let Need::Key(scope) = need_of(&method, path).unwrap_or(Need::Key(Scope::Admin)) {
                let scopes = || [scope.as_str()];
                let one_of = SCHEMES.map(|name| SecurityRequirement::new(name, scopes()));
                operation.security = Some(one_of.into());
                refusals.extend([
                    ("401", "No API key, or one that is not known"),
                    ("403", "The API key lacks the scope that this needs"),
                    ("429", "More than the API key may ask for; Retry-After tells when to come back"),
                    ("504", "The answer did not begin in time"),
                ]);
            }
            for (status, why) in refusals {
                let known = &mut operation.responses.responses;
                known.entry(status.to_owned()).or_insert_with(|| refusal(why).into());
            }
        }
    }
}

/// An error in the envelope.
fn refusal(why: &str) -> openapi::Response {
    let body = Ref::from_schema_name(ErrorBody::name());
    let content = Content::new(Some(RefOr::Ref(body)));
    ResponseBuilder::new().description(why).content("application/json", content).build()
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
