//! A whole server in this process for the HTTP tests: engine, registry and routes over a fixture model, on a
//! port of its own. It must not know what any test checks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gurukul::adapters::Registry;
use gurukul::config::rl_sinks::SinksConfig;
use gurukul::engine::{EngineConfig, EngineHandle};
use gurukul::http::{
    AppState, HttpSettings, Lifecycle, Phase, ServeSettings, TRAIN_KIND, bind, router, serve,
};
use gurukul::jobs::{self, Jobs, Work};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::rl::learn::RlContext;
use gurukul::rl::outbox::{Outbox, Patience};
use gurukul::rl::{Collector, EpisodeLog};
use gurukul::train::Context;
use serde_json::Value;

/// Name of the base model.
pub(crate) const MODEL: &str = "fixtures/llama";
/// Name of the one adapter.
pub(crate) const ADAPTER: &str = "hindi-v1";
/// Context of the fixture model, in tokens.
pub(crate) const CONTEXT: usize = 512;

/// Largest upload, in bytes.
pub(crate) const MAX_UPLOAD: usize = 1 << 20;

/// A running server; stops when dropped.
pub(crate) struct Server {
    /// `http://127.0.0.1:PORT`
    pub(crate) base: String,
    pub(crate) state: AppState,
    pub(crate) client: reqwest::Client,
    pub(crate) data: Arc<tempfile::TempDir>,
    task: tokio::task::JoinHandle<()>,
}

/// What a test may want otherwise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_batch: usize,
    pub(crate) max_queue: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_batch: 4, max_queue: 32 }
    }
}

/// A folder of the parity fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name)
}

impl Server {
    /// Starts over the llama fixture with its adapter. Jobs are accepted, and fail for want of work.
    pub(crate) async fn start(limits: Limits) -> Self {
        Self::start_in(limits, Arc::new(tempfile::tempdir().expect("a temporary folder can be made")), None)
            .await
    }

    /// Starts in a data folder, with what is to be done for a training job. Files that requests name are looked for in
    /// its folder `configs`.
    pub(crate) async fn start_in(
        limits: Limits,
        data: Arc<tempfile::TempDir>,
        training: Option<Work>,
    ) -> Self {
        let adapters = data.path().join("adapters");
        copy_adapter(&adapters.join(ADAPTER));
        let tokenizer =
            Arc::new(Tokenizer::from_dir(&fixture("llama")).expect("the fixture has a tokenizer"));
        let config = EngineConfig {
            model_dir: fixture("llama"),
            device: DeviceChoice::Cpu,
            dtype: DtypeChoice::F32,
            quantize: Quantization::None,
            kv_cache_bytes: Some(64 << 20),
            max_batch: limits.max_batch,
            max_queue: limits.max_queue,
            prefill_chunk: 64,
            adapter_cache_bytes: 64 << 20,
            train_share: 0.5,
        };
        let engine = EngineHandle::start(config, tokenizer.clone()).expect("the engine starts");
        let adapters = Arc::new(Registry::new(adapters, engine.clone()));
        let jobs = jobs::Settings { data_dir: data.path().to_owned(), max_parallel: 1, keep_ended: 100 };
        let jobs = Jobs::open(jobs).await.expect("the store can be opened");
        let log = EpisodeLog::open(&data.path().join("rl_runs"), 1 << 20).expect("the log can be opened");
        let collector = Collector::new(
            engine.clone(),
            tokenizer.clone(),
            adapters.clone(),
            MODEL.to_owned(),
            Arc::default(),
            log,
        );
        let collector = collector.expect("the default rewards can be had");
        let kinds = training.map(|work| BTreeMap::from([(TRAIN_KIND, work)])).unwrap_or_default();
        jobs.start(kinds).await.expect("the store can be read");
        let uploads = Outbox::open(data.path(), jobs.promises(), SinksConfig::default(), Patience::default());
        let uploads = uploads.await.expect("the outbox can be opened");
        uploads.start();
        let training = Arc::new(Context {
            engine: engine.clone(),
            tokenizer: tokenizer.clone(),
            adapters: adapters.clone(),
            model_id: MODEL.to_owned(),
            jobs_dir: jobs.dir(),
        });
        let settings = HttpSettings {
            configs_dir: data.path().join("configs"),
            max_upload_bytes: MAX_UPLOAD,
            heartbeat: Duration::from_millis(300),
            ..HttpSettings::new(MODEL)
        };
        let state = AppState {
            adapters,
            engine,
            tokenizer,
            jobs,
            uploads,
            learning: Arc::new(RlContext { training: training.clone(), log: collector.log().clone() }),
            training,
            collector,
            settings: Arc::new(settings),
            prometheus: gurukul::metrics::install().expect("metrics can be recorded"),
            lifecycle: Lifecycle::new(Phase::Serving),
        };
        let listener = bind("127.0.0.1:0".parse().expect("is an address")).expect("a port is free");
        let base = format!("http://{}", listener.local_addr().expect("is bound"));
        let service = router(state.clone());
        let task = tokio::spawn(async move {
            let served = serve(listener, service, ServeSettings::default(), std::future::pending()).await;
            served.expect("the server runs until it is aborted");
        });
        // The test may be the second in its process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { base, state, client: reqwest::Client::new(), data, task }
    }

    /// Status and JSON of a GET.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        read(self.client.get(format!("{}{path}", self.base)).send().await.expect("the server answers")).await
    }

    /// Status and JSON of a POST.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        read(self.send(path, body).await).await
    }

    /// The whole response of a POST.
    pub(crate) async fn send(&self, path: &str, body: &Value) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.base)).json(body);
        request.send().await.expect("the server answers")
    }

    /// The `data:` lines of a stream, in order.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let response = self.send(path, body).await;
        assert_eq!(response.status().as_u16(), 200, "{path}");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.expect("the stream ends");
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// Ends the server as the program does, and gives its data folder back.
    pub(crate) async fn stop(self) -> Arc<tempfile::TempDir> {
        let (jobs, data) = (self.state.jobs.clone(), self.data.clone());
        self.state.uploads.shutdown(Duration::from_secs(20)).await;
        jobs.shutdown(Duration::from_secs(20)).await;
        drop(self);
        jobs.close().await;
        data
    }

    /// Waits until the engine has nothing to do.
    pub(crate) async fn idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            let stats = self.state.engine.stats();
            if stats.running + stats.waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("requests are left over: {:?}", self.state.engine.stats());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Puts the fixture's adapter into `folder`.
pub(crate) fn copy_adapter(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder can be made");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("llama/adapter").join(file), folder.join(file)).expect("the fixture is there");
    }
}

async fn read(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.expect("the body is complete");
    let body = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status} without JSON: {text}"));
    (status, body)
}
