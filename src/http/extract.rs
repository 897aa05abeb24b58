//! A JSON body or a query into a typed request, with errors that name the field: content type, size, UTF-8, syntax,
//! unknown fields, wrong types. Ranges are each endpoint's own affair.

use std::time::Duration;

use axum::body::{BodyDataStream, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use futures::StreamExt;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::state::AppState;

/// How long a client may take to send its body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of a body that is too large is still read, and thrown away. A client that is cut off while it is
/// writing sees a broken connection instead of the 413.
pub(super) const DRAIN_LIMIT_BYTES: usize = 64 << 20;

/// A request body of type `T`.
///
/// The content type has to be JSON: it also keeps web pages of other origins from posting here, since a
/// browser asks before it sends that type elsewhere, and no route answers that question with yes.
pub(super) struct ApiJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "the body must be JSON, sent with the header content-type: application/json",
            ));
        }
        let limit = state.settings.max_body_bytes;
        let body = tokio::time::timeout(BODY_TIMEOUT, read(request, limit)).await.map_err(|_| {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
        })??;
        parse(&body).map(Self)
    }
}

/// The query of the address as type `T`.
pub(super) struct ApiQuery<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(query) = Query::try_from_uri(&parts.uri).map_err(|error| of_query(&error.body_text()))?;
        Ok(Self(query))
    }
}

/// Serde says what is wrong with a query in text alone: `Failed to deserialize query string: limit: invalid digit`.
fn of_query(text: &str) -> ApiError {
    let message = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(text);
    let bad = |code, message| ApiError::new(StatusCode::BAD_REQUEST, code, message);
    if let Some((_, rest)) = message.split_once("unknown field `")
        && let Some((field, rest)) = rest.split_once('`')
    {
        let known = rest.trim_start_matches(", ");
        return bad("unknown_parameter", format!("{field} is not known in this query: {known}")).param(field);
    }
    match message.split_once(": ") {
        Some((field, reason)) => bad("invalid_value", format!("{field}: {reason}")).param(field),
        None => bad("invalid_value", format!("the query of the address is wrong: {message}")),
    }
}

/// A part of the path. Percent-encoded bytes that are no UTF-8 are an error naming it.
pub(super) fn path_text(name: &str, text: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    text.map(|Path(text)| text).map_err(|_| ApiError::invalid(name, "must be UTF-8"))
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

async fn read(request: Request, limit: usize) -> Result<Vec<u8>, ApiError> {
    let headers = request.headers();
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let waits_for_continue = headers.contains_key(header::EXPECT);
    let mut body = request.into_body().into_data_stream();
    if declared.is_some_and(|bytes| bytes > limit) {
        if !waits_for_continue {
            drain(&mut body).await;
        }
        return Err(body_too_large(limit));
    }
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0));
    while let Some(chunk) = body.next().await {
        let chunk: Bytes = chunk.map_err(|error| ApiError::body_failed(&error))?;
        if bytes.len() + chunk.len() > limit {
            drop(bytes);
            drain(&mut body).await;
            return Err(body_too_large(limit));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn drain(body: &mut BodyDataStream) {
    let mut drained = 0;
    while let Some(Ok(chunk)) = body.next().await {
        drained += chunk.len();
        if drained > DRAIN_LIMIT_BYTES {
            return;
        }
    }
}

pub(super) fn body_too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than the {limit} bytes that this server takes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// Reads `T` from JSON text.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let message = format!("the body is not valid UTF-8: byte {} is wrong", error.valid_up_to());
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_utf8", message)
    })?;
    let syntax = |error: &serde_json::Error| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not valid JSON: {error}"))
    };
    // Serde would take a list as a struct's fields in their order.
    if text.trim_start().starts_with('[') {
        let message = "the body must be a JSON object: it is a list";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_type", message));
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        if error.inner().is_data() {
            return of_data(&error);
        }
        // A number beyond all numbers or half a surrogate pair stands in some field.
        match error.path().to_string().as_str() {
            "." | "?" => syntax(error.inner()),
            path => {
                let message = format!("the body is not valid JSON at {path}: {}", error.inner());
                ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message).param(path)
            }
        }
    })?;
    deserializer.end().map_err(|error| syntax(&error))?;
    Ok(value)
}

/// JSON that is well formed and not what the endpoint takes. Serde says what is wrong in text alone, so the
/// three cases that have a code of their own are told apart by how serde begins its sentence.
fn of_data(error: &serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let full = error.inner().to_string();
    let message = full.rsplit_once(" at line ").map_or(full.as_str(), |(message, _)| message);
    let path = match error.path().to_string() {
        root if root == "." => None,
        path => Some(path),
    };
    let quoted = message.split('`').nth(1).unwrap_or_default();
    // The path may or may not end in the field that the message names.
    let field = || match &path {
        None => quoted.to_owned(),
        Some(path) if path == quoted || path.ends_with(&format!(".{quoted}")) => path.clone(),
        Some(path) => format!("{path}.{quoted}"),
    };
    let bad = |code, message| ApiError::new(StatusCode::BAD_REQUEST, code, message);
    if message.starts_with("unknown field") {
        let known = message.split_once(", ").map_or("", |(_, known)| known);
        let message = format!("{} is not a field of this request: {known}", field());
        return bad("unknown_parameter", message).param(field());
    }
    if message.starts_with("missing field") {
        return bad("missing_parameter", format!("{} is required", field())).param(field());
    }
    if message.starts_with("duplicate field") {
        return bad("duplicate_parameter", format!("{} is there twice", field())).param(field());
    }
    let message = in_json_terms(message);
    match path {
        Some(path) => bad("invalid_type", format!("{path}: {message}")).param(path),
        None => bad("invalid_type", format!("the body must be a JSON object: {message}")),
    }
}

/// Serde names Rust's types; a client knows JSON's.
fn in_json_terms(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once("expected ") else { return message.to_owned() };
    let expected = match expected {
        "i64" | "i32" | "isize" => "an integer",
        "u64" | "u32" | "usize" => "an integer that is not negative",
        "f64" | "f32" => "a number",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "an object",
        other => other,
    };
    format!("{found}expected {expected}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        _prompt: Option<String>,
        #[serde(default)]
        _count: i64,
        #[serde(default)]
        _inner: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        _role: String,
    }

    fn refused(body: &[u8]) -> (String, Option<String>, String) {
        let error = parse::<Outer>(body).expect_err("must be refused").body().error;
        (error.code.to_owned(), error.param, error.message)
    }

    #[test]
    fn errors_name_the_field() {
        let (code, param, message) = refused(br#"{"_prompt":"a","temprature":1}"#);
        assert_eq!((code.as_str(), param.as_deref()), ("unknown_parameter", Some("temprature")));
        assert!(message.contains("`_prompt`"), "names what is known: {message}");
        let (code, param, _) = refused(br#"{"_inner":[{"_role":"a"},{"_role":"b","x":1}]}"#);
        assert_eq!((code.as_str(), param.as_deref()), ("unknown_parameter", Some("_inner[1].x")));
        let (code, param, _) = refused(br#"{"_inner":[{}]}"#);
        assert_eq!((code.as_str(), param.as_deref()), ("missing_parameter", Some("_inner[0]._role")));
        let (code, param, message) = refused(br#"{"_count":"three"}"#);
        assert_eq!((code.as_str(), param.as_deref()), ("invalid_type", Some("_count")));
        assert_eq!(message, "_count: invalid type: string \"three\", expected an integer");
        let (code, param, _) = refused(br#"{"_count":1,"_count":2}"#);
        assert_eq!((code.as_str(), param.as_deref()), ("duplicate_parameter", Some("_count")));
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        for body in [&b"[null]"[..], b"\"text\"", b"7", b"null"] {
            let (code, param, message) = refused(body);
            assert_eq!((code.as_str(), param), ("invalid_type", None));
            assert!(message.contains("JSON object"), "{message}");
        }
    }

    #[test]
    fn syntax_errors_tell_line_and_column() {
        let (code, _, message) = refused(b"{\n  \"_prompt\": }");
        assert_eq!(code, "invalid_json");
        assert!(message.contains("line 2 column 14"), "{message}");
        assert_eq!(refused(b"").0, "invalid_json");
        assert_eq!(refused(b"{} {}").0, "invalid_json");
        let deep = parse::<serde_json::Value>(&b"{\"a\":".repeat(100_000)).expect_err("is too deep");
        assert_eq!(deep.code(), "invalid_json");
    }

    #[test]
    fn invalid_utf8_tells_where() {
        let (code, _, message) = refused(b"{\"_prompt\":\"\xff\"}");
        assert_eq!(code, "invalid_utf8");
        assert!(message.contains("byte 12"), "{message}");
    }

    #[test]
    fn queries_name_what_is_wrong() {
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Page {
            _start: Option<u64>,
            _limit: Option<i64>,
        }
        let refused = |query: &str| {
            let uri: axum::http::Uri = format!("/x?{query}").parse().expect("is an address");
            let Err(error) = Query::<Page>::try_from_uri(&uri) else { panic!("{query} must be refused") };
            let error = of_query(&error.body_text()).body().error;
            (error.code, error.param.unwrap_or_default())
        };
        assert_eq!(refused("_start=-1"), ("invalid_value", "_start".to_owned()));
        assert_eq!(refused("_limit=many"), ("invalid_value", "_limit".to_owned()));
        assert_eq!(refused("limti=3"), ("unknown_parameter", "limti".to_owned()));
        assert_eq!(refused("_limit=1&_limit=2").0, "invalid_value");
    }

    #[test]
    fn json_is_known_by_its_content_type() {
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().expect("is a header value"));
            is_json(&headers)
        };
        assert!(
            with("application/json") && with("Application/JSON; charset=utf-8") && with("application/x+json")
        );
        assert!(
            !with("text/plain") && !with("application/x-www-form-urlencoded") && !is_json(&HeaderMap::new())
        );
    }
}
