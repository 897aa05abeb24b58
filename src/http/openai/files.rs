//! `/v1/files`: training data by upload, as OpenAI's clients send it. A file is looked through while it arrives; what
//! is kept is complete and can be trained on. What a client calls it is never a path.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Json;
use axum::body::Body;
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;
use utoipa::{IntoParams, ToSchema};

use super::super::error::{ApiError, ErrorBody};
use super::super::extract::{ApiQuery, BODY_TIMEOUT, DRAIN_LIMIT_BYTES, path_text};
use super::super::fields::in_range;
use super::super::state::AppState;
use super::training_file::TrainingFile;
use crate::jobs::{Upload, UploadedFile};

/// The one purpose that a file can have here.
const PURPOSE: &str = "fine-tune";
/// Of a body besides the file: the other fields and the lines between them.
const FRAME_BYTES: usize = 64 << 10;
/// Longest name of a file, in characters.
const MAX_FILENAME: usize = 255;
/// Longest text of another field.
const MAX_TEXT_BYTES: usize = 1 << 10;

/// A file, as OpenAI's API shows it.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FileObject {
    /// To name it in a request.
    id: String,
    /// `file`
    object: &'static str,
    /// Size.
    bytes: u64,
    /// Seconds since 1970.
    created_at: u64,
    /// As it was uploaded.
    filename: String,
    /// `fine-tune`
    purpose: String,
    /// `processed`: what is not valid is never kept.
    status: &'static str,
}

impl From<UploadedFile> for FileObject {
    fn from(file: UploadedFile) -> Self {
        Self {
            id: file.id,
            object: "file",
            bytes: file.bytes,
            created_at: super::unix_s(file.created_ms),
            filename: file.filename,
            purpose: file.purpose,
            status: "processed",
        }
    }
}

/// Files, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FileList {
    /// `list`
    object: &'static str,
    /// Newest first.
    data: Vec<FileObject>,
    /// Whether there are older ones.
    has_more: bool,
    /// Of `data`.
    first_id: Option<String>,
    /// Of `data`; goes into `after` for the next page.
    last_id: Option<String>,
}

/// What was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FileDeleted {
    /// The file.
    id: String,
    /// `file`
    object: &'static str,
    /// True.
    deleted: bool,
}

/// A file to upload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the fields are read by the derive alone")]
pub(in crate::http) struct FileUpload {
    /// A JSON object a line, with `messages` or with `prompt` and `completion`.
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
    /// `fine-tune`
    #[schema(example = "fine-tune")]
    purpose: String,
}

/// Which files.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct FilesQuery {
    /// Older than this file.
    #[param(value_type = String, required = false)]
    after: Option<String>,
    /// Files at most, 1 to 10000. Default 10000.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 10000)]
    limit: Option<i64>,
    /// `desc`
    #[param(value_type = String, required = false, pattern = "^desc$")]
    order: Option<String>,
    /// With this purpose.
    #[param(value_type = String, required = false)]
    purpose: Option<String>,
}

/// Upload a file
#[utoipa::path(
    post,
    path = "/v1/files",
    tag = "openai",
    operation_id = "create_file",
    request_body(content = FileUpload, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "It is kept", body = FileObject),
        (status = 400, description = "A field is missing or wrong, or a line of the file is, with its number", body = ErrorBody),
        (status = 413, description = "The file is larger than the server takes", body = ErrorBody),
        (status = 415, description = "The body is not sent as multipart/form-data", body = ErrorBody),
        (status = 503, description = "The disk refuses", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn create(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let limit = state.settings.max_upload_bytes;
    let (mut form, too_large) = form(request, limit.saturating_add(FRAME_BYTES)).await?;
    let outcome = receive(&state, &mut form, limit).await;
    if outcome.is_err() {
        // A client that is cut off while it is writing sees a broken connection instead of the reason.
        drain(&mut form).await;
    }
    match outcome {
        Err(_) if too_large.load(Ordering::Relaxed) => Err(file_too_large(limit)),
        outcome => Ok(Json(outcome?.into())),
    }
}

/// The parts of a form whose body has a limit of its own; the flag tells that it was passed.
async fn form(request: Request, limit: usize) -> Result<(Multipart, Arc<AtomicBool>), ApiError> {
    let too_large = Arc::new(AtomicBool::new(false));
    let (head, body) = request.into_parts();
    let (flag, seen) = (too_large.clone(), AtomicUsize::new(0));
    let limited = body.into_data_stream().filter_map(move |chunk| {
        let kept = match chunk {
            Err(error) => Some(Err(std::io::Error::other(error))),
            Ok(chunk) => {
                let bytes = seen.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len();
                if bytes > limit {
                    flag.store(true, Ordering::Relaxed);
                }
                // What is too much is read for a while and thrown away, so that the client hears why.
                match bytes.saturating_sub(limit) {
                    0 => Some(Ok(chunk)),
                    beyond if beyond <= DRAIN_LIMIT_BYTES => None,
                    _ => Some(Err(std::io::Error::other("the body is too large"))),
                }
            }
        };
        std::future::ready(kept)
    });
    let mut request = Request::from_parts(head, Body::from_stream(limited));
    DefaultBodyLimit::disable().apply(&mut request);
    let form = Multipart::from_request(request, &()).await.map_err(|_| {
        ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body must be a form, sent with the header content-type: multipart/form-data; boundary=...",
        )
    })?;
    Ok((form, too_large))
}

/// Reads the parts in whatever order they come, and keeps the file when all is well.
async fn receive(state: &AppState, form: &mut Multipart, limit: usize) -> Result<UploadedFile, ApiError> {
    let mut purpose = None;
    let mut received = None;
    while let Some(mut field) = timely(form.next_field()).await? {
        match field.name().unwrap_or_default() {
            "purpose" if purpose.is_none() => purpose = Some(text(&mut field).await?),
            "file" if received.is_none() => {
                let filename = field.file_name().unwrap_or("upload.jsonl");
                let filename: String = filename.chars().take(MAX_FILENAME).collect();
                let mut upload = state.jobs.files().begin().await?;
                let examples = content(&mut field, &mut upload, limit).await?;
                received = Some((upload, filename, examples));
            }
            name @ ("purpose" | "file") => {
                let message = format!("{name} is there twice");
                let error = ApiError::new(StatusCode::BAD_REQUEST, "duplicate_parameter", message);
                return Err(error.param(name));
            }
            name => {
                let name: String = name.chars().take(80).collect();
                let message = format!("{name} is not a field of this request: expected `file`, `purpose`");
                let error = ApiError::new(StatusCode::BAD_REQUEST, "unknown_parameter", message);
                return Err(error.param(name));
            }
        }
    }
    let missing = |name: &str| {
        let message = format!("{name} is required");
        ApiError::new(StatusCode::BAD_REQUEST, "missing_parameter", message).param(name)
    };
    let purpose = purpose.ok_or_else(|| missing("purpose"))?;
    if purpose != PURPOSE {
        return Err(ApiError::unsupported("purpose", "must be fine-tune: files are for training alone here"));
    }
    let (upload, filename, examples) = received.ok_or_else(|| missing("file"))?;
    Ok(upload.finish(filename, purpose, examples).await?)
}

/// Writes the file while it comes, and looks through it; the number of its examples.
async fn content(field: &mut Field<'_>, upload: &mut Upload, limit: usize) -> Result<u64, ApiError> {
    let invalid = |message: String| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_file",
            format!("the file cannot be trained on: {message}"),
        )
        .param("file")
    };
    let mut lines = TrainingFile::default();
    while let Some(chunk) = timely(field.chunk()).await? {
        if upload.bytes().saturating_add(chunk.len() as u64) > limit as u64 {
            return Err(file_too_large(limit));
        }
        lines.feed(&chunk).map_err(invalid)?;
        upload.write(&chunk).await?;
    }
    lines.end().map_err(invalid)
}

/// A short field.
async fn text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = timely(field.chunk()).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_TEXT_BYTES {
            return Err(ApiError::invalid(&name, "is too long"));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(&name, "must be UTF-8"))
}

/// Waits for the next part of a form, but not for ever.
async fn timely<T>(part: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, part).await {
        Ok(Ok(part)) => Ok(part),
        Ok(Err(error)) => {
            let of_body = ApiError::body_failed(&error);
            if of_body.status() == StatusCode::REQUEST_TIMEOUT {
                return Err(of_body);
            }
            let message = format!("the form cannot be read: {}", error.body_text());
            Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_form", message))
        }
        Err(_) => {
            let message = format!("nothing of the body arrived for {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message))
        }
    }
}

async fn drain(form: &mut Multipart) {
    while let Ok(Some(mut field)) = timely(form.next_field()).await {
        while let Ok(Some(_)) = timely(field.chunk()).await {}
    }
}

fn file_too_large(limit: usize) -> ApiError {
    let message =
        format!("the file is larger than the {limit} bytes that this server takes; see --max-upload");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "file_too_large", message).param("file")
}

/// List the files
#[utoipa::path(
    get,
    path = "/v1/files",
    tag = "openai",
    operation_id = "list_files",
    params(FilesQuery),
    responses(
        (status = 200, description = "The files, newest first", body = FileList),
        (status = 400, description = "A parameter is unknown or out of its range", body = ErrorBody),
        (status = 404, description = "`after` names no file", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn list(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<FilesQuery>,
) -> Result<Json<FileList>, ApiError> {
    let limit = in_range("limit", query.limit.unwrap_or(10_000), 1..=10_000)?;
    if query.order.is_some_and(|order| order != "desc") {
        return Err(ApiError::unsupported("order", "must be desc: files are listed newest first"));
    }
    let mut files = match query.purpose {
        Some(purpose) if purpose != PURPOSE => Vec::new(),
        // One more than is asked for tells whether there are more.
        _ => state.jobs.files().list(query.after.as_deref(), limit as u32 + 1).await?,
    };
    let has_more = files.len() > limit;
    files.truncate(limit);
    let data: Vec<FileObject> = files.into_iter().map(FileObject::from).collect();
    let id = |file: Option<&FileObject>| file.map(|file| file.id.clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    Ok(Json(FileList { object: "list", data, has_more, first_id, last_id }))
}

/// Look at one file
#[utoipa::path(
    get,
    path = "/v1/files/{file_id}",
    tag = "openai",
    operation_id = "retrieve_file",
    params(("file_id" = String, Path, description = "The file")),
    responses(
        (status = 200, description = "The file", body = FileObject),
        (status = 404, description = "No such file", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn retrieve(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FileObject>, ApiError> {
    Ok(Json(state.jobs.files().get(&path_text("file_id", id)?).await?.into()))
}

/// Content of a file
#[utoipa::path(
    get,
    path = "/v1/files/{file_id}/content",
    tag = "openai",
    operation_id = "download_file",
    params(("file_id" = String, Path, description = "The file")),
    responses(
        (status = 200, description = "The bytes that were uploaded", body = String, content_type = "application/jsonl"),
        (status = 404, description = "No such file", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn content_of(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let files = state.jobs.files();
    let file = files.get(&path_text("file_id", id)?).await?;
    let content = ReaderStream::new(files.content(&file).await?);
    // A browser is to keep it, not to show it: what is in it is not ours.
    let headers = [
        (header::CONTENT_TYPE, "application/jsonl".to_owned()),
        (header::CONTENT_LENGTH, file.bytes.to_string()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}.jsonl\"", file.id)),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, Body::from_stream(content)).into_response())
}

/// Delete a file
#[utoipa::path(
    delete,
    path = "/v1/files/{file_id}",
    tag = "openai",
    operation_id = "delete_file",
    params(("file_id" = String, Path, description = "The file")),
    responses(
        (status = 200, description = "It is gone", body = FileDeleted),
        (status = 404, description = "No such file", body = ErrorBody),
        (status = 409, description = "A job that has not ended reads it", body = ErrorBody),
    ),
)]
pub(in crate::http) async fn delete(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FileDeleted>, ApiError> {
    let id = path_text("file_id", id)?;
    state.jobs.delete_file(&id).await?;
    Ok(Json(FileDeleted { id, object: "file", deleted: true }))
}
