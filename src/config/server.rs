//! The server's settings: [`Typed`] as flags, environment and `server.yaml` give them, [`Settings`] as resolved.
//! Precedence: flags, `GURUKUL_*`, `server.yaml`, defaults. It reads one file and opens no model and no socket.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;

use super::duration::TimeSpan;
use super::keys;
use super::origin::{Origin, Sourced, from_environment, pick};
use super::security::{Security, TypedSecurity};
use super::server_values::{parse_device, parse_dtype, parse_host, parse_quantize};
use super::size::ByteSize;
use super::size_or::{CacheSize, QuotaSize};
use crate::engine::EngineConfig;
use crate::model::load::{DeviceChoice, DtypeChoice};
use crate::nn::quant::Quantization;

/// The settings file inside the configs folder.
pub const FILE_NAME: &str = "server.yaml";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        clap::ValueEnum::from_str(text, false).map_err(|_| "use text or json".to_owned())
    }
}

/// One layer of settings as typed: everything optional, nothing checked yet but the syntax.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Typed {
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8110]
    #[arg(long, global = true)]
    pub port: Option<u16>,
    /// Where to run: auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, global = true)]
    pub device: Option<String>,
    /// Folder of everything that is kept: adapters/, jobs, uploads [default: .]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Model folder, or hub id as org/name or org/name@revision
    #[arg(long, global = true, value_name = "FOLDER_OR_HUB_ID")]
    pub model: Option<String>,
    /// How dense weights are held: auto, f32, f16 or bf16 [default: auto]
    #[arg(long, global = true)]
    pub dtype: Option<String>,
    /// Quantize linear weights while loading: none, q8_0, q4_0 or q4_k [default: none]
    #[arg(long, global = true)]
    pub quantize: Option<String>,
    /// Memory for the KV cache: auto, or a size such as 512MiB [default: auto]
    #[arg(long, global = true, value_name = "SIZE")]
    pub kv_cache: Option<CacheSize>,
    /// Requests that run at once [default: 8]
    #[arg(long, global = true, value_name = "N")]
    pub max_batch: Option<usize>,
    /// Requests that may wait; more are refused with 429 [default: 64]
    #[arg(long, global = true, value_name = "N")]
    pub max_queue: Option<usize>,
    /// Prompt tokens worked on in one step while other requests are decoding [default: 64]
    #[arg(long, global = true, value_name = "TOKENS")]
    pub prefill_chunk: Option<usize>,
    /// Memory for loaded adapters [default: 1GiB]
    #[arg(long, global = true, value_name = "SIZE")]
    pub adapter_cache: Option<ByteSize>,
    /// Share of the engine's time that training gets while requests run, 0.05 to 0.95 [default: 0.5]
    #[arg(long, global = true, value_name = "SHARE")]
    pub train_share: Option<f64>,
    /// Training jobs that run at once [default: 1]
    #[arg(long, global = true, value_name = "N")]
    pub max_parallel_jobs: Option<usize>,
    /// Ended jobs that are remembered [default: 1000]
    #[arg(long, global = true, value_name = "N")]
    pub keep_jobs: Option<u32>,
    /// Bytes on disk that the adapters may have together before training is refused: none, or a size [default: none]
    #[arg(long, global = true, value_name = "SIZE")]
    pub adapter_quota: Option<QuotaSize>,
    /// Largest request body [default: 1MiB]
    #[arg(long, global = true, value_name = "SIZE")]
    pub max_body: Option<ByteSize>,
    /// Largest file of training data that can be uploaded [default: 64MiB]
    #[arg(long, global = true, value_name = "SIZE")]
    pub max_upload: Option<ByteSize>,
    /// Longest prompt, in bytes of UTF-8 [default: 256KiB]
    #[arg(long, global = true, value_name = "SIZE")]
    pub max_prompt: Option<ByteSize>,
    /// Time that running requests and jobs get after the signal to stop [default: 30s]
    #[arg(long, global = true, value_name = "TIME")]
    pub grace: Option<TimeSpan>,
    /// YAML file with API keys; the variable GURUKUL_API_KEYS can hold keys as well
    #[arg(long, alias = "api-keys", global = true, value_name = "FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Requests a minute for each API key; 0 is no bound [default: 0]
    #[arg(long, global = true, value_name = "N")]
    pub rate_limit: Option<u32>,
    /// Requests that each API key may have under way; 0 is no bound [default: 0]
    #[arg(long, global = true, value_name = "N")]
    pub max_concurrent: Option<u32>,
    /// Connections at once [default: 2048]
    #[arg(long, global = true, value_name = "N")]
    pub max_connections: Option<u32>,
    /// Seconds until an answer must begin [default: 300]
    #[arg(long, global = true, value_name = "SECONDS")]
    pub request_timeout: Option<u64>,
    /// Origins whose pages may read answers in a browser: a list with commas, or * [default: none]
    #[arg(long, global = true, value_name = "ORIGINS")]
    pub cors_origins: Option<String>,
    /// Speak TLS with this certificate, a PEM file; needs --tls-key
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, a PEM file
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Log lines on stderr as text or json [default: text]
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log: Option<LogFormat>,
    /// Listen on an address that other machines reach, although nobody has to identify
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_name = "true|false")]
    pub insecure_no_auth: Option<bool>,
}

impl Typed {
    /// The layer of the environment; `lookup` gives the value of a variable.
    fn from_environment(lookup: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        // The struct expression makes a field that is missing here a compile error.
        macro_rules! read {
            ($($field:ident),* $(,)?) => { Self { $($field: from_environment(lookup, stringify!($field))?),* } };
        }
        Ok(read!(
            host,
            port,
            device,
            data_dir,
            model,
            dtype,
            quantize,
            kv_cache,
            max_batch,
            max_queue,
            prefill_chunk,
            adapter_cache,
            train_share,
            max_parallel_jobs,
            keep_jobs,
            adapter_quota,
            max_body,
            max_upload,
            max_prompt,
            grace,
            api_keys_file,
            rate_limit,
            max_concurrent,
            max_connections,
            request_timeout,
            cors_origins,
            tls_cert,
            tls_key,
            log,
            insecure_no_auth,
        ))
    }

    /// The layer of the settings file; a file that is not there says nothing.
    fn from_file(path: &Path) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        // A file whose lines are all comments is the YAML value null.
        let typed: Option<Self> =
            serde_yaml::from_str(&text).with_context(|| format!("{}", path.display()))?;
        Ok(typed.unwrap_or_default())
    }
}

/// The command line's share: the typed layer and the folder with the settings files, which no file can name.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServerFlags {
    /// Everything that `server.yaml` can say too.
    #[command(flatten)]
    pub typed: Typed,
    /// Folder with server.yaml [default: configs]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub configs: Option<PathBuf>,
}

/// What the engine needs besides the model's folder.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineSettings {
    /// `--device`.
    pub device: DeviceChoice,
    /// `--dtype`.
    pub dtype: DtypeChoice,
    /// `--quantize`.
    pub quantize: Quantization,
    /// `--kv-cache`; `None` is `auto`.
    pub kv_cache_bytes: Option<u64>,
    /// `--max-batch`.
    pub max_batch: usize,
    /// `--max-queue`.
    pub max_queue: usize,
    /// `--prefill-chunk`.
    pub prefill_chunk: usize,
    /// `--adapter-cache`.
    pub adapter_cache_bytes: u64,
    /// `--train-share`.
    pub train_share: f64,
}

impl EngineSettings {
    /// The engine's configuration for a model folder.
    pub fn for_model(&self, model_dir: PathBuf) -> EngineConfig {
        let Self {
            device,
            dtype,
            quantize,
            kv_cache_bytes,
            max_batch,
            max_queue,
            prefill_chunk,
            adapter_cache_bytes,
            train_share,
        } = *self;
        EngineConfig {
            model_dir,
            device,
            dtype,
            quantize,
            kv_cache_bytes,
            max_batch,
            max_queue,
            prefill_chunk,
            adapter_cache_bytes,
            train_share,
        }
    }
}

/// Resolved settings: every value is in its range, every default is filled in.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Folder of everything that the server keeps.
    pub data_dir: PathBuf,
    /// `data_dir/adapters`.
    pub adapters_dir: PathBuf,
    /// Folder of the settings files.
    pub configs_dir: PathBuf,
    /// Model folder or hub id; `None` when nobody named one.
    pub model: Option<String>,
    /// The engine's share.
    pub engine: EngineSettings,
    /// Training jobs that run at once.
    pub max_parallel_jobs: usize,
    /// Ended jobs that are remembered.
    pub keep_jobs: u32,
    /// Bytes on disk that the adapters may have together; `None` is without a bound.
    pub adapter_quota_bytes: Option<u64>,
    /// Largest request body, bytes.
    pub max_body_bytes: usize,
    /// Largest uploaded file, bytes.
    pub max_upload_bytes: usize,
    /// Longest prompt, bytes of UTF-8.
    pub max_prompt_bytes: usize,
    /// Time that running requests and jobs get after the signal to stop.
    pub grace: Duration,
    /// Who may use the server, how much, and over what.
    pub security: Security,
    /// How log lines look.
    pub log: LogFormat,
    /// Key, value and origin of every setting, in the order of `server.yaml`.
    pub(crate) lines: Vec<(&'static str, String, Origin)>,
}

impl Settings {
    /// Resolves the flags, the process's environment and the settings file.
    ///
    /// # Errors
    /// An unknown key or a value that does not parse or is out of its range; the message names the flag, the
    /// variable or the file's key, and the range.
    pub fn resolve(flags: &ServerFlags) -> anyhow::Result<Self> {
        Self::resolve_with(flags, &|name| std::env::var(name).ok())
    }

    fn resolve_with(flags: &ServerFlags, lookup: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let from_variable = from_environment(lookup, "configs")?;
        let configs =
            pick("configs", [&flags.configs, &from_variable, &None], Path::new(""), "configs".into());
        if configs.origin != Origin::Default && !configs.value.is_dir() {
            return Err(configs.error(format_args!("no folder {}", configs.value.display())));
        }
        let path = configs.value.join(FILE_NAME);
        let file = Typed::from_file(&path)?;
        let environment = Typed::from_environment(lookup)?;
        let keys = lookup(keys::VARIABLE);
        Self::from_layers(&flags.typed, &environment, &file, keys, configs.value, &path)
    }

    fn from_layers(
        flags: &Typed,
        environment: &Typed,
        file: &Typed,
        keys: Option<String>,
        configs_dir: PathBuf,
        path: &Path,
    ) -> anyhow::Result<Self> {
        macro_rules! pick {
            ($field:ident, $default:expr) => {
                pick(
                    stringify!($field),
                    [&flags.$field, &environment.$field, &file.$field],
                    path,
                    $default.into(),
                )
            };
        }
        // Without a default of its own: `None` means that nobody named one.
        macro_rules! pick_named {
            ($field:ident) => {{
                let [flag, environment, file] = [flags, environment, file]
                    .map(|layer| layer.$field.as_ref().map(|value| Some(value.clone())));
                pick(stringify!($field), [&flag, &environment, &file], path, None)
            }};
        }
        let host = pick!(host, "127.0.0.1");
        let port = pick!(port, 8110_u16);
        let device = pick!(device, "auto");
        let data_dir = pick!(data_dir, ".");
        let model = pick_named!(model);
        let dtype = pick!(dtype, "auto");
        let quantize = pick!(quantize, "none");
        let kv_cache = pick!(kv_cache, CacheSize::Auto);
        let max_batch = pick!(max_batch, 8_usize);
        let max_queue = pick!(max_queue, 64_usize);
        let prefill_chunk = pick!(prefill_chunk, 64_usize);
        let adapter_cache = pick!(adapter_cache, ByteSize(1 << 30));
        let train_share = pick!(train_share, 0.5);
        let max_parallel_jobs = pick!(max_parallel_jobs, 1_usize);
        let keep_jobs = pick!(keep_jobs, 1000_u32);
        let adapter_quota = pick!(adapter_quota, QuotaSize::None);
        let max_body = pick!(max_body, ByteSize(1 << 20));
        let max_upload = pick!(max_upload, ByteSize(64 << 20));
        let mut max_prompt = pick!(max_prompt, ByteSize(256 << 10));
        let grace = pick!(grace, TimeSpan::seconds(30));
        let api_keys_file = pick_named!(api_keys_file);
        let rate_limit = pick!(rate_limit, 0_u32);
        let max_concurrent = pick!(max_concurrent, 0_u32);
        let max_connections = pick!(max_connections, 2048_u32);
        let request_timeout = pick!(request_timeout, 300_u64);
        let cors_origins = pick!(cors_origins, "");
        let tls_cert = pick_named!(tls_cert);
        let tls_key = pick_named!(tls_key);
        let log = pick!(log, LogFormat::Text);
        let insecure_no_auth = pick!(insecure_no_auth, false);

        let address = host.convert(|text| parse_host(text))?;
        let security = Security::resolve(TypedSecurity {
            keys,
            api_keys_file: &api_keys_file,
            rate_limit: &rate_limit,
            max_concurrent: &max_concurrent,
            max_connections: &max_connections,
            request_timeout: &request_timeout,
            cors_origins: &cors_origins,
            tls_cert: &tls_cert,
            tls_key: &tls_key,
        })?;
        security.check_host(&host, address, insecure_no_auth.value)?;
        if let Some(spec) = &model.value
            && spec.trim().is_empty()
        {
            return Err(model.error("is empty; name a model folder or a hub id"));
        }
        if !data_dir.value.is_dir() {
            return Err(
                data_dir.error(format_args!("no folder {}; create it first", data_dir.value.display()))
            );
        }
        let max_body_bytes = max_body.within(ByteSize(1 << 10), ByteSize(1 << 30))?;
        // A smaller body limit lowers a prompt limit that nobody chose; one that somebody chose must be reachable.
        if max_prompt.origin == Origin::Default {
            max_prompt.value = max_prompt.value.min(max_body_bytes);
        }
        let engine = EngineSettings {
            device: device.convert(|text| parse_device(text))?,
            dtype: dtype.convert(|text| parse_dtype(text))?,
            quantize: quantize.convert(|text| parse_quantize(text))?,
            kv_cache_bytes: match kv_cache.value {
                CacheSize::Auto => None,
                CacheSize::Bytes(value) => {
                    let size = Sourced { name: "kv_cache", value, origin: kv_cache.origin.clone() };
                    Some(size.within(ByteSize(1 << 16), ByteSize(1 << 44))?.0)
                }
            },
            max_batch: max_batch.within(1, 1024)?,
            max_queue: max_queue.within(0, 65_536)?,
            prefill_chunk: prefill_chunk.within(1, 65_536)?,
            adapter_cache_bytes: adapter_cache.within(ByteSize(1 << 10), ByteSize(1 << 44))?.0,
            train_share: train_share.within(0.05, 0.95)?,
        };
        let max_prompt_bytes = max_prompt.within(ByteSize(1), max_body_bytes).map_err(|e| {
            e.context("a prompt comes inside a request body, so --max-prompt cannot be above --max-body")
        })?;

        macro_rules! lines {
            ($($setting:ident: $shown:expr),* $(,)?) => {
                vec![$((stringify!($setting), $shown, $setting.origin.clone())),*]
            };
        }
        let lines = lines![
            host: quoted(&address.to_string()),
            port: port.value.to_string(),
            device: quoted(&device.value),
            data_dir: quoted(&data_dir.value.to_string_lossy()),
            model: model.value.as_deref().map_or("null".into(), quoted),
            dtype: quoted(&dtype.value),
            quantize: quoted(&quantize.value),
            kv_cache: quoted(&kv_cache.value.to_string()),
            max_batch: max_batch.value.to_string(),
            max_queue: max_queue.value.to_string(),
            prefill_chunk: prefill_chunk.value.to_string(),
            adapter_cache: quoted(&adapter_cache.value.to_string()),
            train_share: train_share.value.to_string(),
            max_parallel_jobs: max_parallel_jobs.value.to_string(),
            keep_jobs: keep_jobs.value.to_string(),
            adapter_quota: quoted(&adapter_quota.value.to_string()),
            max_body: quoted(&max_body.value.to_string()),
            max_upload: quoted(&max_upload.value.to_string()),
            max_prompt: quoted(&max_prompt.value.to_string()),
            grace: quoted(&grace.value.to_string()),
            api_keys_file: shown_path(&api_keys_file.value),
            rate_limit: rate_limit.value.to_string(),
            max_concurrent: max_concurrent.value.to_string(),
            max_connections: max_connections.value.to_string(),
            request_timeout: request_timeout.value.to_string(),
            cors_origins: quoted(&cors_origins.value),
            tls_cert: shown_path(&tls_cert.value),
            tls_key: shown_path(&tls_key.value),
            log: match log.value { LogFormat::Text => "text".into(), LogFormat::Json => "json".into() },
            insecure_no_auth: insecure_no_auth.value.to_string(),
        ];
        Ok(Self {
            host: address,
            port: port.value,
            adapters_dir: data_dir.value.join("adapters"),
            data_dir: data_dir.value,
            configs_dir,
            model: model.value,
            engine,
            max_parallel_jobs: max_parallel_jobs.within(1, 16)?,
            keep_jobs: keep_jobs.within(1, 1_000_000)?,
            adapter_quota_bytes: match adapter_quota.value {
                QuotaSize::None => None,
                QuotaSize::Bytes(value) => {
                    let size = Sourced { name: "adapter_quota", value, origin: adapter_quota.origin.clone() };
                    Some(size.within(ByteSize(1 << 10), ByteSize(1 << 50))?.0)
                }
            },
            max_body_bytes: max_body_bytes.0 as usize,
            max_upload_bytes: max_upload.within(ByteSize(1 << 10), ByteSize(1 << 34))?.0 as usize,
            max_prompt_bytes: max_prompt_bytes.0 as usize,
            grace: grace.within(TimeSpan::seconds(0), TimeSpan::seconds(24 * 3600))?.0,
            security,
            log: log.value,
            lines,
        })
    }

    /// The resolved settings as a `server.yaml`, each with a comment saying where it came from.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        for (name, value, origin) in &self.lines {
            let from = match origin {
                Origin::Flag => "flag".to_owned(),
                Origin::Environment => format!("GURUKUL_{}", name.to_ascii_uppercase()),
                Origin::File(path) => path.display().to_string(),
                Origin::Default => "default".to_owned(),
            };
            text.push_str(&format!("{name}: {value}  # {from}\n"));
        }
        text
    }
}

fn shown_path(path: &Option<PathBuf>) -> String {
    path.as_deref().map_or("null".into(), |path| quoted(&path.to_string_lossy()))
}

/// A YAML scalar in double quotes, whose escapes are those of JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
