//! The one error of the HTTP surface: a status, and the envelope
//! `{"error":{"message","type","param","code"}}`. Everything that can go wrong below is turned into it here,
//! so no handler chooses a status for another module's error. It must not know any single endpoint.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::serve::TooSlow;
use crate::adapters::AdapterError;
use crate::config::adapter::FieldError;
use crate::data::SourceError;
use crate::engine::EngineError;
use crate::jobs::JobsError;
use crate::model::chat_template::ChatTemplateError;
use crate::model::tokenizer::TokenizerError;
use crate::rl::outbox::OutboxError;
use crate::rl::{CollectError, LogError};
use crate::train::TrainError;

/// Seconds after which a client may come back where nothing better is known.
pub(super) const DEFAULT_RETRY_AFTER_S: u64 = 5;

/// Whose fault it is, in the words of OpenAI's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorType {
    /// The request has to change before it can succeed.
    InvalidRequestError,
    /// The same request can succeed later: the queue is full.
    RateLimitError,
    /// The same request can succeed later, or on another server.
    ServiceUnavailableError,
    /// The server failed.
    ServerError,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For a person: what is wrong, and what to do about it.
    #[schema(example = "temperature must be between 0 (greedy) and 100")]
    pub message: String,
    /// Whose fault it is.
    pub r#type: ErrorType,
    /// The field of the request that is to blame, where there is one.
    #[schema(example = "temperature")]
    pub param: Option<String>,
    /// For a program: stable from version to version.
    #[schema(example = "invalid_value")]
    pub code: &'static str,
}

/// An error on its way to the client.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    kind: ErrorType,
    message: String,
    param: Option<String>,
    code: &'static str,
    retry_after_s: Option<u64>,
}

impl ApiError {
    /// An error that the request is to blame for.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = ErrorType::InvalidRequestError;
        Self { status, kind, message: message.into(), param: None, code, retry_after_s: None }
    }

    /// 400: `param` has a value out of its range. The message starts with the name of the field.
    pub(super) fn invalid(param: &str, message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", format!("{param} {message}")).param(param)
    }

    /// 400: `param` asks for something that this server does not do.
    pub(super) fn unsupported(param: &str, message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", format!("{param} {message}")).param(param)
    }

    /// 413: `param` is longer than the server takes.
    pub(super) fn too_large(param: &str, bytes: usize, limit: usize) -> Self {
        let message = format!("{param} has {bytes} bytes, more than the {limit} that this server takes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "prompt_too_large", message).param(param)
    }

    /// 404: a route, an adapter or a model that is not there.
    pub(super) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// 500. The reason is logged here and nowhere else, and does not reach the client.
    pub(super) fn internal(reason: impl std::fmt::Display) -> Self {
        tracing::error!(%reason, "request failed");
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: ErrorType::ServerError,
            message: "the server failed; its log has the reason beside this answer's x-request-id".into(),
            param: None,
            code: "internal_error",
            retry_after_s: None,
        }
    }

    /// 429 with the time after which to come back.
    pub(super) fn too_many(code: &'static str, message: String, retry_after_s: u64) -> Self {
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            kind: ErrorType::RateLimitError,
            message,
            param: None,
            code,
            retry_after_s: Some(retry_after_s),
        }
    }

    /// 504: the answer took too long to begin.
    pub(super) fn timed_out(message: String) -> Self {
        Self {
            status: StatusCode::GATEWAY_TIMEOUT,
            kind: ErrorType::ServiceUnavailableError,
            message,
            param: None,
            code: "request_timeout",
            retry_after_s: None,
        }
    }

    /// 408 where the client sent its body too slowly, else 400: it ended before it was complete.
    pub(super) fn body_failed(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(inner) = cause {
            if let Some(slow) = inner.downcast_ref::<TooSlow>() {
                return Self::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", slow.to_string());
            }
            cause = inner.source();
        }
        let message = "the body ended before it was complete";
        Self::new(StatusCode::BAD_REQUEST, "incomplete_body", message)
    }

    /// 507: the disk is full, and nothing of the request was stored.
    fn storage_full(message: String) -> Self {
        Self::no_room("storage_full", message)
    }

    /// 507: there is no room on disk.
    fn no_room(code: &'static str, message: String) -> Self {
        Self {
            status: StatusCode::INSUFFICIENT_STORAGE,
            kind: ErrorType::ServiceUnavailableError,
            message,
            param: None,
            code,
            retry_after_s: None,
        }
    }

    /// 503 with a hint when to come back.
    pub(super) fn unavailable(code: &'static str, message: String) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: ErrorType::ServiceUnavailableError,
            message,
            param: None,
            code,
            retry_after_s: Some(DEFAULT_RETRY_AFTER_S),
        }
    }

    /// Names the field that is to blame.
    pub(super) fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The stable code.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The body, as it also goes into an event stream that has begun already.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                r#type: self.kind,
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::InvalidParameter { field, message } => Self::invalid(field, message),
            EngineError::ContextLength { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).param("prompt")
            }
            EngineError::QueueFull { retry_after_s, .. } => {
                Self::too_many("queue_full", message, retry_after_s)
            }
            EngineError::AdapterMemory { .. } => Self::unavailable("adapter_memory", message),
            EngineError::AdapterInvalid(_) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "adapter_invalid", message).param("adapter")
            }
            EngineError::TrainingMemory { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "training_memory", message)
            }
            EngineError::Stopped => Self::unavailable("shutting_down", message),
            EngineError::Device(_) => Self::internal(message),
        }
    }
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let message = error.to_string();
        match error {
            AdapterError::InvalidName { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_adapter_name", message).param("adapter")
            }
            AdapterError::NotFound { .. } => Self::not_found("adapter_not_found", message).param("adapter"),
            AdapterError::Invalid { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "adapter_invalid", message).param("adapter")
            }
            AdapterError::Quota { .. } => Self::no_room("adapter_quota", message),
            AdapterError::Engine(error) => error.into(),
            AdapterError::Io { .. } => Self::internal(message),
        }
    }
}

impl From<FieldError> for ApiError {
    fn from(FieldError { field, message }: FieldError) -> Self {
        Self::invalid(&field, message)
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "source_unusable", error.to_string()).param("source")
    }
}

impl From<TrainError> for ApiError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Field(error) => error.into(),
            TrainError::Source(error) => error.into(),
            TrainError::Engine(error) => error.into(),
            TrainError::Adapter(error) => Self::from(error).param("adapter_name"),
            TrainError::Failed(reason) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "training_refused", reason)
            }
            TrainError::Io { .. } => Self::internal(error),
        }
    }
}

impl From<JobsError> for ApiError {
    fn from(error: JobsError) -> Self {
        let message = error.to_string();
        match error {
            JobsError::NotFound { .. } => Self::not_found("job_not_found", message).param("job_id"),
            JobsError::FileNotFound { .. } => Self::not_found("file_not_found", message).param("file_id"),
            JobsError::NameTaken { .. } => {
                Self::new(StatusCode::CONFLICT, "adapter_name_in_use", message).param("adapter_name")
            }
            JobsError::WrongState { .. } => {
                Self::new(StatusCode::CONFLICT, "job_state", message).param("job_id")
            }
            JobsError::FileInUse { .. } => {
                Self::new(StatusCode::CONFLICT, "file_in_use", message).param("file_id")
            }
            JobsError::PromiseNotFound { .. } => {
                Self::not_found("upload_not_found", message).param("upload_id")
            }
            JobsError::NotRefused { .. } => {
                Self::new(StatusCode::CONFLICT, "upload_state", message).param("upload_id")
            }
            JobsError::Store(reason) => {
                tracing::error!(%reason, "the job store failed");
                Self::unavailable(
                    "job_store_failed",
                    format!("{message}; nothing was changed, try again later"),
                )
            }
            JobsError::Full(reason) => {
                tracing::error!(%reason, "the job store has no room");
                Self::storage_full(format!("{message}; nothing was changed, make room in the data folder"))
            }
            JobsError::Stopping => Self::unavailable("shutting_down", message),
        }
    }
}

impl From<CollectError> for ApiError {
    fn from(error: CollectError) -> Self {
        match error {
            CollectError::Field(error) => error.into(),
            CollectError::Adapter(error) => error.into(),
            CollectError::Engine(error) => error.into(),
            CollectError::Tokenizer(error) => error.into(),
            CollectError::Log(LogError::Name(invalid)) => Self::invalid("run_id", invalid),
            // Whoever reads this has the disk's reason; the log was told it where it happened.
            CollectError::Log(error @ LogError::Full(_)) => Self::storage_full(error.to_string()),
            CollectError::Log(error @ LogError::Io(_)) => {
                Self::unavailable("episode_log_failed", error.to_string())
            }
            CollectError::Read(_) => Self::internal(error),
        }
    }
}

impl From<OutboxError> for ApiError {
    fn from(error: OutboxError) -> Self {
        match error {
            OutboxError::Store(error) => error.into(),
            OutboxError::Empty => Self::invalid("upload", "has no content"),
            OutboxError::Seal { source, .. } => {
                tracing::error!(reason = %source, "an upload cannot be sealed");
                let message = format!(
                    "the upload cannot be kept until it is sent: {source}; the server's data folder must be writable \
                     and have room"
                );
                Self::storage_full(message)
            }
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        // Any text can be tokenized: a failure is the tokenizer's, not the client's.
        Self::internal(error)
    }
}

impl From<ChatTemplateError> for ApiError {
    fn from(error: ChatTemplateError) -> Self {
        let message = format!("messages do not suit the model's chat template: {error}");
        Self::new(StatusCode::BAD_REQUEST, "chat_template_refused", message).param("messages")
    }
}

impl From<tokio::task::JoinError> for ApiError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::internal(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry_after(error: EngineError) -> (u16, Option<String>) {
        let response = ApiError::from(error).into_response();
        let header = response.headers().get(header::RETRY_AFTER);
        (response.status().as_u16(), header.map(|v| v.to_str().expect("is ASCII").to_owned()))
    }

    #[test]
    fn statuses_follow_the_contract() {
        let full = EngineError::QueueFull { waiting: 3, retry_after_s: 7 };
        assert_eq!(retry_after(full), (429, Some("7".into())));
        assert_eq!(retry_after(EngineError::Stopped), (503, Some("5".into())));
        let memory = EngineError::AdapterMemory { needed_bytes: 2, budget_bytes: 1, pinned_bytes: 1 };
        assert_eq!(retry_after(memory), (503, Some("5".into())));
        let long = EngineError::ContextLength { prompt_tokens: 600, max_new_tokens: 1, limit: 512 };
        assert_eq!(retry_after(long), (400, None));
        assert_eq!(retry_after(EngineError::AdapterInvalid("shape".into())), (422, None));
        let range = EngineError::InvalidParameter { field: "top_p", message: "must be above 0".into() };
        assert_eq!(retry_after(range), (400, None));
    }

    #[test]
    fn jobs_and_training_have_their_statuses() {
        let of = |error: ApiError| (error.status().as_u16(), error.code(), error.param.clone());
        let missing = ApiError::from(JobsError::NotFound { id: "x".into() });
        assert_eq!(of(missing), (404, "job_not_found", Some("job_id".into())));
        let taken = JobsError::NameTaken { name: "a".into(), job: "0190-other".into() };
        assert!(ApiError::from(taken.clone()).message.contains("0190-other"));
        assert_eq!(of(taken.into()), (409, "adapter_name_in_use", Some("adapter_name".into())));
        let store = ApiError::from(JobsError::Store("database or disk is full".into()));
        assert!(store.message.contains("disk is full"), "{}", store.message);
        assert_eq!(of(store), (503, "job_store_failed", None));
        let memory =
            EngineError::TrainingMemory { needed_bytes: 9, free_bytes: 5, remedy: "lower batch_size".into() };
        let memory = ApiError::from(TrainError::Engine(memory));
        assert!(memory.message.contains('9') && memory.message.contains("batch_size"), "{}", memory.message);
        assert_eq!(of(memory), (422, "training_memory", None));
        let field = FieldError { field: "r".into(), message: "must be at least 1".into() };
        assert_eq!(of(TrainError::Field(field).into()), (400, "invalid_value", Some("r".into())));
        let secret = TrainError::Io { what: "/root/x".into(), source: std::io::Error::other("SECRET") };
        let body = serde_json::to_string(&ApiError::from(secret).body()).expect("the envelope is JSON");
        assert!(!body.contains("SECRET") && !body.contains("/root/x"), "{body}");
    }

    #[test]
    fn a_full_disk_is_told_from_one_that_fails() {
        let of = |error: LogError| {
            let error = ApiError::from(CollectError::Log(error));
            (error.status().as_u16(), error.code(), error.message.clone())
        };
        let (status, code, message) = of(LogError::Full("No space left on device".into()));
        assert_eq!((status, code), (507, "storage_full"));
        assert!(message.contains("make room"), "{message}");
        assert_eq!(of(LogError::Io("Input/output error".into())).0, 503);
    }

    #[test]
    fn an_internal_reason_stays_inside() {
        let error = ApiError::from(EngineError::Device("CUDA_ERROR_SECRET at /root/x".into()));
        assert_eq!(error.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&error.body()).expect("the envelope is JSON");
        assert!(!body.contains("SECRET"), "{body}");
    }

    #[test]
    fn the_envelope_has_its_four_fields() {
        let body =
            serde_json::to_value(ApiError::invalid("top_p", "must be above 0").body()).expect("is JSON");
        let expected = serde_json::json!({"error": {
            "message": "top_p must be above 0",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_value",
        }});
        assert_eq!(body, expected);
    }
}
