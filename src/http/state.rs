//! What every handler can reach: handles and settings, cheap to clone. Nothing here does any work.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics_exporter_prometheus::PrometheusHandle;

use super::auth::Access;
use super::gate::Lifecycle;
use crate::adapters;
use crate::config::CorsOrigins;
use crate::engine::EngineHandle;
use crate::jobs::Jobs;
use crate::model::tokenizer::Tokenizer;
use crate::rl::Collector;
use crate::rl::learn::RlContext;
use crate::rl::outbox::Outbox;
use crate::train;

/// State of the routes.
#[derive(Clone)]
pub struct AppState {
    /// The engine.
    pub engine: EngineHandle,
    /// The served model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Adapters on disk.
    pub adapters: Arc<adapters::Registry>,
    /// Training jobs.
    pub jobs: Jobs,
    /// Uploads of episodes.
    pub uploads: Outbox,
    /// What training jobs work with, to check one before it is accepted.
    pub training: Arc<train::Context>,
    /// Collects and logs episodes.
    pub collector: Collector,
    /// What jobs that learn from rewards work with, to check one before it is accepted.
    pub learning: Arc<RlContext>,
    /// Resolved settings of this surface.
    pub settings: Arc<HttpSettings>,
    /// Renders what `/metrics` answers.
    pub prometheus: PrometheusHandle,
    /// What the process is at, and since when it is.
    pub lifecycle: Lifecycle,
}

impl AppState {
    /// Seconds since 1970 at the start of the server.
    pub(super) fn started_unix_s(&self) -> u64 {
        unix_now_s().saturating_sub(self.lifecycle.started().elapsed().as_secs())
    }
}

/// Seconds since 1970.
pub(super) fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Resolved settings of the HTTP surface.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// The name that the base model is served under: its hub id, or its folder's name.
    pub model_id: String,
    /// Longest request body, in bytes.
    pub max_body_bytes: usize,
    /// Longest prompt, in bytes of UTF-8; all messages together for a chat.
    pub max_prompt_bytes: usize,
    /// Largest uploaded file, in bytes.
    pub max_upload_bytes: usize,
    /// Folder of the settings files that requests name.
    pub configs_dir: PathBuf,
    /// Who may use the server, and how much.
    pub access: Arc<Access>,
    /// Until an answer must begin.
    pub request_timeout: Duration,
    /// Origins whose pages may read answers in a browser.
    pub cors_origins: CorsOrigins,
    /// Time between signs of life on a stream of a job's events.
    pub heartbeat: Duration,
    /// What `/generate-lite` uses where a request says nothing.
    pub generation: GenerationDefaults,
}

impl HttpSettings {
    /// The defaults, for a model of this name.
    pub fn new(model_id: impl Into<String>) -> Self {
        Self {
            model_id: model_id.into(),
            max_body_bytes: 1 << 20,
            max_prompt_bytes: 256 << 10,
            max_upload_bytes: 64 << 20,
            configs_dir: PathBuf::from("configs"),
            access: Arc::new(Access::open()),
            request_timeout: Duration::from_secs(300),
            cors_origins: CorsOrigins::None,
            heartbeat: Duration::from_secs(10),
            generation: GenerationDefaults::default(),
        }
    }
}

/// Defaults of `/generate-lite`; the OpenAI endpoints have those of OpenAI's API.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationDefaults {
    /// Upper bound on new tokens; less where the context is shorter.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus; 1 keeps all tokens.
    pub top_p: f64,
    /// 0 keeps all tokens.
    pub top_k: usize,
    /// 1 changes nothing.
    pub repetition_penalty: f64,
    /// Sample, or always take the most likely token.
    pub do_sample: bool,
    /// Clean the text.
    pub clean: bool,
}

impl Default for GenerationDefaults {
    fn default() -> Self {
        Self {
            max_new_tokens: 100,
            temperature: 0.7,
            top_p: 0.9,
            top_k: 50,
            repetition_penalty: 1.1,
            do_sample: true,
            clean: true,
        }
    }
}
