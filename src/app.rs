//! Builds everything once, in order (listener with its gate, jobs, model folder, tokenizer, engine, adapters, routes), and
//! takes it down in order. What each part does is known to the part.

mod collecting;
mod demo;
mod housekeeping;
mod reload;
mod training;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::adapters::Registry;
use crate::config::Settings;
use crate::config::rl::{self, RlConfig, SinksConfig};
use crate::data::hub::{self, Progress};
use crate::engine::EngineHandle;
use crate::http::{self, AppState, Gate, HttpSettings, ServeSettings};
use crate::jobs::{self, Jobs};
use crate::metrics;
use crate::model::tokenizer::Tokenizer;
use crate::rl::learn::RlContext;
use crate::rl::log::FOLDER;
use crate::rl::outbox::{Outbox, Patience};
use crate::rl::{Collector, EpisodeLog};
use crate::train::Context;
use reload::Reload;

/// How long uploads that are on their way may go on after the signal to stop, where the grace period is not shorter: they
/// begin anew at the next start.
const UPLOAD_GRACE: Duration = Duration::from_secs(5);
/// How long what is cut may take to say so, and connections to close after it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Marks, in an error's chain, what went wrong before anything ran: settings, model, port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot start")]
pub struct CannotStart;

/// A model that answers, without HTTP.
#[derive(Clone)]
pub struct Loaded {
    /// The engine.
    pub engine: EngineHandle,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The adapters in the data folder.
    pub adapters: Arc<Registry>,
    /// The name that the base model is served under: its hub id, or its folder's name.
    pub model_id: String,
}

/// The folder of the model that the settings name, downloaded where it has to be; of the demo model where they name
/// none.
///
/// # Errors
/// As [`hub::resolve_model`]; a data folder that the demo model cannot be written to. The chain holds
/// [`CannotStart`].
pub async fn model_folder(settings: &Settings) -> anyhow::Result<PathBuf> {
    match &settings.model {
        Some(spec) => hub::resolve_model(spec, Progress::Bar).await.context(CannotStart),
        None => demo::unpack(&settings.data_dir.join("models")).context(CannotStart),
    }
}

/// Loads the model and the tokenizer, and starts the engine.
///
/// # Errors
/// What [`model_folder`], [`Tokenizer::from_dir`] and [`EngineHandle::start`] refuse. The chain holds
/// [`CannotStart`].
pub async fn load(settings: &Settings) -> anyhow::Result<Loaded> {
    let folder = model_folder(settings).await?;
    let spec = settings.model.as_deref();
    let model_id = spec.map_or_else(|| demo::NAME.to_owned(), |spec| model_id(spec, &folder));
    let config = settings.engine.for_model(folder.clone());
    // Reading and quantizing weights takes its time, which a runtime thread does not have.
    let load = move || {
        let tokenizer = Arc::new(Tokenizer::from_dir(&folder)?);
        let engine = EngineHandle::start(config, tokenizer.clone())?;
        anyhow::Ok((engine, tokenizer))
    };
    let loaded = tokio::task::spawn_blocking(load).await.context("loading the model panicked");
    let (engine, tokenizer) = loaded
        .and_then(|l| l)
        .with_context(|| format!("--model {}", spec.unwrap_or(demo::NAME)))
        .context(CannotStart)?;
    let (folder, quota) = (settings.adapters_dir.clone(), settings.adapter_quota_bytes);
    let adapters = Arc::new(Registry::with_quota(folder, engine.clone(), quota));
    Ok(Loaded { engine, tokenizer, adapters, model_id })
}

/// What `rl_config.yaml` of the settings' configs folder says.
///
/// # Errors
/// It cannot be used. The chain holds [`CannotStart`].
pub fn rl_config(settings: &Settings) -> anyhow::Result<RlConfig> {
    RlConfig::load(&settings.configs_dir, None)
        .with_context(|| format!("{}", settings.configs_dir.join(rl::FILE_NAME).display()))
        .context(CannotStart)
}

/// Collects episodes into the data folder's log, whose torn lines are repaired. The caller holds the folder's lock.
///
/// # Errors
/// A log that cannot be opened, or a reward that cannot be had. The chain holds [`CannotStart`].
pub fn collector(settings: &Settings, config: Arc<RlConfig>, loaded: &Loaded) -> anyhow::Result<Collector> {
    let folder = settings.data_dir.join(FOLDER);
    let open = || -> anyhow::Result<Collector> {
        let log = EpisodeLog::open(&folder, config.log.max_file_bytes()?)
            .with_context(|| format!("the log of episodes {}", folder.display()))?;
        let Loaded { engine, tokenizer, adapters, model_id } = loaded.clone();
        Ok(Collector::new(engine, tokenizer, adapters, model_id, config, log)?)
    };
    open().context(CannotStart)
}

/// The uploads that were promised, which go on once it is started.
///
/// # Errors
/// A folder or a store that cannot be used. The chain holds [`CannotStart`].
pub async fn outbox(settings: &Settings, jobs: &Jobs, sinks: SinksConfig) -> anyhow::Result<Outbox> {
    let opened = Outbox::open(&settings.data_dir, jobs.promises(), sinks, Patience::default()).await;
    opened.context(CannotStart)
}

/// A server that has its port and answers that the model is not there yet.
pub struct Front {
    address: SocketAddr,
    url: String,
    gate: Gate,
    server: Server,
    reload: Reload,
}

/// The task that accepts connections; cut where it is when this is dropped.
struct Server {
    task: JoinHandle<io::Result<()>>,
    /// Dropped, it is the sign to accept no more.
    stop: Option<oneshot::Sender<()>>,
}

impl Server {
    /// Serves `routes` on its own task.
    fn start(listener: TcpListener, routes: axum::Router, settings: ServeSettings) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            // An error means that the sender is gone, which is the sign.
            let _ = stopped.await;
        };
        let server = http::serve(listener, routes, settings, stopped);
        Self { task: tokio::spawn(server), stop: Some(stop) }
    }

    /// Waits until it ends, which it does by itself only when the listener fails.
    async fn ended(&mut self) -> anyhow::Result<()> {
        match (&mut self.task).await {
            Ok(outcome) => outcome.context("the listener failed"),
            Err(error) => Err(anyhow::Error::new(error).context("the listener failed")),
        }
    }

    /// Accepts no more, and waits for the connections to close, for a short time.
    async fn close(mut self) -> anyhow::Result<()> {
        drop(self.stop.take());
        // Connections that are idle or do not read are cut.
        tokio::time::timeout(LAST_WORDS, self.ended()).await.unwrap_or(Ok(()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Front {
    /// Takes the port and answers there that the model is not there yet.
    ///
    /// # Errors
    /// A port in use, an address that is not to be had, a certificate that cannot be used. The chain holds
    /// [`CannotStart`].
    pub async fn open(settings: &Settings) -> anyhow::Result<Self> {
        let listener = listen(SocketAddr::new(settings.host, settings.port)).await.context(CannotStart)?;
        let address = listener.local_addr().context("the listener has no address").context(CannotStart)?;
        let reload = Reload::new(settings).context(CannotStart)?;
        reload.clone().spawn();
        let serving = ServeSettings {
            max_connections: settings.security.max_connections,
            tls: reload.tls(),
            ..ServeSettings::default()
        };
        let scheme = if serving.tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{address}");
        let gate = Gate::loading();
        let server = Server::start(listener, gate.clone().router(), serving);
        tracing::info!("taking connections on {url}; requests are answered once the model is loaded");
        Ok(Self { address, url, gate, server, reload })
    }

    /// Opens the jobs, loads the model and lays out the routes; from then on requests are answered, and jobs that an
    /// earlier process left go on.
    ///
    /// # Errors
    /// A job store that cannot be used, or what [`load`] refuses. The chain holds [`CannotStart`].
    pub async fn load(self, settings: &Settings) -> anyhow::Result<App> {
        let Self { address, url, gate, server, reload } = self;
        let rl = Arc::new(rl_config(settings)?);
        let jobs = open_jobs(settings).await.context(CannotStart)?;
        housekeeping::sweep(&settings.data_dir);
        let loaded = load(settings).await?;
        let collector = collector(settings, rl.clone(), &loaded)?;
        let Loaded { engine, tokenizer, adapters, model_id } = loaded;
        let training = Arc::new(Context {
            engine: engine.clone(),
            tokenizer: tokenizer.clone(),
            adapters: adapters.clone(),
            model_id: model_id.clone(),
            jobs_dir: jobs.dir(),
        });
        let uploads = outbox(settings, &jobs, rl.sinks.clone()).await?;
        uploads.start();
        let learning = Arc::new(RlContext { training: training.clone(), log: collector.log().clone() });
        let kinds = training::kinds(learning.clone(), collector.clone(), uploads.clone());
        jobs.start(kinds).await.context(CannotStart)?;
        let http = HttpSettings {
            access: reload.access(),
            request_timeout: settings.security.request_timeout,
            cors_origins: settings.security.cors_origins.clone(),
            max_body_bytes: settings.max_body_bytes,
            max_prompt_bytes: settings.max_prompt_bytes,
            max_upload_bytes: settings.max_upload_bytes,
            configs_dir: settings.configs_dir.clone(),
            ..HttpSettings::new(model_id)
        };
        let prometheus = metrics::install().context(CannotStart)?;
        // Without it, histograms would grow for as long as nobody reads /metrics. It ends with the runtime.
        tokio::spawn(metrics::upkeep(prometheus.clone()));
        gate.open(http::router(AppState {
            engine: engine.clone(),
            tokenizer,
            adapters: adapters.clone(),
            jobs: jobs.clone(),
            uploads: uploads.clone(),
            training,
            collector,
            learning,
            settings: Arc::new(http),
            prometheus,
            lifecycle: gate.lifecycle(),
        }));
        Ok(App { address, url, gate, server, engine, adapters, jobs, uploads, grace: settings.grace })
    }
}

/// A server that answers.
pub struct App {
    address: SocketAddr,
    url: String,
    gate: Gate,
    server: Server,
    engine: EngineHandle,
    adapters: Arc<Registry>,
    jobs: Jobs,
    uploads: Outbox,
    grace: Duration,
}

impl App {
    /// [`Front::open`] and [`Front::load`].
    ///
    /// # Errors
    /// As those two.
    pub async fn build(settings: &Settings) -> anyhow::Result<Self> {
        Front::open(settings).await?.load(settings).await
    }

    /// A handle to the engine, for its shutdown after the runtime's.
    pub fn engine(&self) -> EngineHandle {
        self.engine.clone()
    }

    /// The adapters that it serves.
    pub fn adapters(&self) -> Arc<Registry> {
        self.adapters.clone()
    }

    /// Where it listens; tells the port that was chosen for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as an address for clients, `http://127.0.0.1:8110`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Answers until `stop` is through. Then it is not ready any more and refuses new requests, and waits until the
    /// running ones have ended and the running jobs have written their checkpoints, at most for the grace period or
    /// until `stop`'s answer is through: the second signal. What runs then is cut, with a proper end of its answer.
    ///
    /// # Errors
    /// The listener failed.
    pub async fn run<Again: Future<Output = ()>>(
        mut self,
        stop: impl Future<Output = Again>,
    ) -> anyhow::Result<()> {
        let info = self.engine.info();
        tracing::info!(
            family = info.family,
            parameters = info.parameters,
            device = info.device,
            quantization = info.quantization,
            context_tokens = info.context_length,
            "listening on {}",
            self.url
        );
        let again = tokio::select! {
            outcome = self.server.ended() => {
                self.gate.close();
                tokio::join!(self.jobs.shutdown(self.grace), self.uploads.shutdown(UPLOAD_GRACE));
                self.jobs.close().await;
                return outcome;
            }
            again = stop => again,
        };
        self.gate.close();
        let running = self.engine.stats().running;
        let grace_s = self.grace.as_secs_f64();
        tracing::info!(running, grace_s, "stopping; running requests may end, jobs pause");
        self.drain(again).await;
        let outcome = self.server.close().await;
        self.jobs.close().await;
        tracing::info!("stopped");
        outcome
    }

    /// Lets requests end, jobs pause and uploads arrive; cuts what still runs when the time for it is over.
    async fn drain(&self, again: impl Future<Output = ()>) {
        let (cutting, cut) = watch::channel(false);
        // Together: whoever follows a job's events is told that they end, and lets go of the server.
        let end = async {
            tokio::join!(
                self.answers(is_cut(cut.clone())),
                self.jobs.shutdown_until(is_cut(cut.clone())),
                self.uploads.shutdown_until(uploads_are_cut(cut)),
            )
        };
        let mut end = pin!(end);
        tokio::select! {
            _ = &mut end => {}
            reason = self.patience(again) => {
                tracing::warn!("{reason}; cutting what still runs");
                cutting.send_replace(true);
                end.await;
            }
        }
    }

    /// Waits until running requests may run no longer; gives the reason.
    async fn patience(&self, again: impl Future<Output = ()>) -> &'static str {
        tokio::select! {
            () = tokio::time::sleep(self.grace) => "the grace period is over",
            () = again => "asked again to stop",
        }
    }

    /// Waits for the running requests to end; has the engine end them once `cut` is through.
    async fn answers(&self, cut: impl Future<Output = ()>) {
        tokio::select! {
            () = self.gate.drained() => return,
            () = cut => self.engine.cut(),
        }
        if tokio::time::timeout(LAST_WORDS, self.gate.drained()).await.is_err() {
            tracing::warn!("some clients did not take the end of their answers in time");
        }
    }
}

/// Waits until what runs is to be cut.
async fn is_cut(mut cut: watch::Receiver<bool>) {
    // An error means that nobody will say so any more, as the end has come.
    let _ = cut.wait_for(|cut| *cut).await;
}

/// The same for uploads, which get a shorter time.
async fn uploads_are_cut(cut: watch::Receiver<bool>) {
    // Through in time or not, they are cut now.
    let _ = tokio::time::timeout(UPLOAD_GRACE, is_cut(cut)).await;
}

/// The jobs of the data folder, which is locked for as long as they are there; none runs yet.
///
/// # Errors
/// A store that cannot be used, or another process that has the folder.
pub async fn open_jobs(settings: &Settings) -> Result<Jobs, jobs::OpenError> {
    let settings = jobs::Settings {
        data_dir: settings.data_dir.clone(),
        max_parallel: settings.max_parallel_jobs,
        keep_ended: settings.keep_jobs,
    };
    Jobs::open(settings).await
}

/// A future that waits for ctrl-c or SIGTERM; its answer waits for the next one. From this call on, neither ends
/// the process by itself. Needs the runtime around it.
///
/// # Errors
/// The system does not let signals be handled.
#[expect(clippy::async_yields_async, reason = "the first wait's answer is the wait for the second signal")]
pub fn stop_signal() -> anyhow::Result<impl Future<Output = impl Future<Output = ()>>> {
    let mut signals = Signals::handle().context("signals cannot be handled").context(CannotStart)?;
    Ok(async move {
        signals.next().await;
        async move { signals.next().await }
    })
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn handle() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(windows)]
struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
impl Signals {
    fn handle() -> io::Result<Self> {
        tokio::signal::windows::ctrl_c().map(Self)
    }

    async fn next(&mut self) {
        self.0.recv().await;
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    http::bind(address).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "another program listens there; stop it, or choose another --port (0 takes a free one)"
            }
            io::ErrorKind::PermissionDenied => "ports below 1024 need special rights; choose another --port",
            io::ErrorKind::AddrNotAvailable => {
                "this machine does not have that address; choose another --host"
            }
            _ => "choose another --host or --port",
        };
        anyhow::anyhow!("cannot listen on {address}: {error}; {remedy}")
    })
}

/// A hub id without its revision, or the name of a folder.
fn model_id(spec: &str, folder: &Path) -> String {
    if !Path::new(spec).is_dir() {
        return spec.split('@').next().unwrap_or(spec).to_owned();
    }
    let absolute = std::fs::canonicalize(folder);
    let name = absolute.as_deref().unwrap_or(folder).file_name();
    name.map_or_else(|| spec.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let message = listen(address).await.unwrap_err().to_string();
        assert!(message.contains(&address.to_string()) && message.contains("--port"), "{message}");
    }

    #[test]
    fn models_are_served_under_their_names() {
        assert_eq!(model_id("org/name@v1", Path::new("/cache/snapshots/abc")), "org/name");
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("my-model");
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(model_id(&format!("{}/", folder.display()), &folder), "my-model");
        assert_eq!(model_id(folder.join("../my-model/.").to_str().unwrap(), &folder), "my-model");
    }
}
