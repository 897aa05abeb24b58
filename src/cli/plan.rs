//! `gurukul plan`: what a model and a training job would take of a machine's memory, from `config.json` alone, as JSON.
//! Loads no weights and opens no device, so it also tells of a card that is not there.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use candle_core::DType;
use serde_json::json;

use super::train::given;
use crate::app::CannotStart;
use crate::config::adapter::AdapterConfig;
use crate::config::{ByteSize, Settings};
use crate::engine::forecast::{Machine, forecast};
use crate::model::load::{DeviceChoice, DtypeChoice, read_spec};
use crate::train::targets::trainer_spec;

/// The machine and the job; the model, its quantization, the device and the KV cache are settings.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Memory that is free before the model is loaded: of the card with --device cuda, else of the machine
    #[arg(long, value_name = "SIZE")]
    memory: ByteSize,
    /// Threads of the CPU; those of this machine when left away
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// A setting of the training, before those of configs/adapter_config.yaml; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Prints the plan.
///
/// # Errors
/// [`CannotStart`]: a folder or a setting that cannot be used. Without it: what does not fit, with what would.
pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let Some(folder) = &settings.model else {
        return Err(anyhow!("--model is missing: a folder with config.json").context(CannotStart));
    };
    let model =
        read_spec(Path::new(folder)).with_context(|| format!("--model {folder}")).context(CannotStart)?;
    let overrides = given(&args.set).context(CannotStart)?;
    let config = AdapterConfig::load(&settings.configs_dir, None, &overrides);
    let config = config.map_err(|e| anyhow!("training settings: {e}").context(CannotStart))?;
    let spec = trainer_spec(&config, &model.sites(), model.max_positions);
    let spec = spec.map_err(|e| anyhow!("training settings: {e}").context(CannotStart))?;
    let on_card = matches!(settings.engine.device, DeviceChoice::Cuda(_));
    let own_threads = || std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let machine = Machine {
        threads: (!on_card).then(|| args.threads.map_or_else(own_threads, usize::from)),
        free_bytes: args.memory.0,
        dense: match settings.engine.dtype {
            DtypeChoice::F32 => DType::F32,
            DtypeChoice::F16 => DType::F16,
            // What most checkpoints are stored in, and what cards take; f16 is as large.
            DtypeChoice::Bf16 | DtypeChoice::Auto => DType::BF16,
        },
        quantize: settings.engine.quantize,
        kv_cache_bytes: settings.engine.kv_cache_bytes,
        max_batch: settings.engine.max_batch,
    };
    let forecast = match forecast(&model, &spec, &machine) {
        Ok(forecast) => forecast,
        Err(error) => bail!("{folder} on {}: {error}", if on_card { "a card" } else { "a CPU" }),
    };
    let report = json!({
        "family": model.family,
        "device": if on_card { "cuda" } else { "cpu" },
        "quantize": settings.engine.quantize.name(),
        "memory_bytes": args.memory.0,
        "weight_bytes": forecast.weight_bytes,
        "kv_cache_bytes": forecast.kv_cache_bytes,
        "training_bytes": forecast.plan.training_bytes,
        "total_bytes": forecast.total_bytes,
        "plan": forecast.plan,
    });
    super::print(&format!("{report:#}\n"))
}
