//! From a model folder to weights on a device: which device, which format, what the folder says about itself.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::decoder::{Decoder, Holding};
use super::{families, spec::Spec};
use crate::nn::quant::{Quantization, Role};

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA when this build has it and a card is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA card of this number.
    Cuda(usize),
}

/// How dense weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// As on disk on the CPU; bf16, or f16 below compute capability 8.0, on CUDA.
    #[default]
    Auto,
    /// 32-bit.
    F32,
    /// 16-bit, 10 bits of mantissa.
    F16,
    /// 16-bit, 7 bits of mantissa.
    Bf16,
}

impl DeviceChoice {
    /// Opens the device. Must be called on the thread that will use it: on CUDA a stream of its own is made.
    ///
    /// # Errors
    /// A card that is not there, a build without CUDA.
    pub fn open(self) -> Result<Device> {
        let cuda = |number: usize| {
            Device::new_cuda_with_stream(number).with_context(|| {
                format!("cannot open cuda:{number}; check nvidia-smi, or choose --device cpu")
            })
        };
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !cfg!(feature = "cuda") => {
                bail!(
                    "--device cuda: this build has no CUDA; build with --features cuda, or choose --device cpu"
                )
            }
            Self::Cuda(number) => cuda(number),
            Self::Auto if cfg!(feature = "cuda") => Ok(cuda(0).unwrap_or_else(|error| {
                tracing::warn!("no CUDA card, running on the CPU: {error:#}");
                Device::Cpu
            })),
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

/// `cpu` or `cuda:N`.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        _ => "cpu".into(),
    }
}

/// What a model folder says about itself, without its weights being read.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The family's description.
    pub spec: Spec,
    /// Tokens that end an answer, from `generation_config.json`, else from `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Type of the token embedding on disk.
    pub stored: DType,
    /// Parameters of all tensors on disk.
    pub parameters: u64,
}

impl Folder {
    /// Bytes of the weights as they will be held: rows of blocks where they are quantized, else the dense type.
    pub fn held_bytes(&self, dtype: DtypeChoice, quantize: Quantization, device: &Device) -> u64 {
        let bytes = |parameters: u64, role: Role| match quantize.format(role, self.spec.hidden_size) {
            Some(format) => parameters * format.type_size() as u64 / format.block_size() as u64,
            None => parameters * dtype.on(device, self.stored).size_in_bytes() as u64,
        };
        let tables = 1 + u64::from(self.spec.names.head.is_some());
        let vocabulary = tables * (self.spec.vocab_size * self.spec.hidden_size) as u64;
        bytes(vocabulary, Role::Vocabulary) + bytes(self.parameters.saturating_sub(vocabulary), Role::Layer)
    }
}

impl DtypeChoice {
    /// The type of dense weights that are `stored` on disk.
    fn on(self, device: &Device, stored: DType) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Auto if device.is_cpu() => stored,
            Self::Auto if has_bf16(device) => DType::BF16,
            Self::Auto => DType::F16,
        }
    }
}

/// Reads a folder's configuration and the headers of its weights.
///
/// # Errors
/// Files that are missing or damaged, a family or setting that is not supported.
pub fn inspect(dir: &Path) -> Result<Folder> {
    let config = read_config(dir)?;
    let spec = families::spec(&config)?;
    let checkpoint = Checkpoint::open(dir)?;
    let stored = checkpoint.stored(&format!("{}.weight", spec.names.embedding))?.dtype;
    let mut parameters = 0;
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.stored(name) {
            parameters += tensor.shape.iter().product::<usize>() as u64;
        }
    }
    let eos_token_ids = eos_token_ids(dir, &config)?;
    Ok(Folder { spec, eos_token_ids, stored, parameters })
}

/// Loads a model; with it come the tokens that end an answer.
///
/// # Errors
/// As [`inspect`], and tensors that are missing, misshapen or not finite.
pub fn load(
    dir: &Path,
    device: &Device,
    dtype: DtypeChoice,
    quantize: Quantization,
) -> Result<(Decoder, Vec<u32>)> {
    let folder = inspect(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = dtype.on(device, folder.stored);
    let activations = if device.is_cpu() { DType::F32 } else { weights };
    let positions = folder.spec.max_positions;
    let holding = Holding { weights, activations, quantize };
    let decoder = Decoder::load(folder.spec, &checkpoint, holding, positions, device)?;
    Ok((decoder, folder.eos_token_ids))
}

/// What a folder's `config.json` describes, whether or not there are weights.
///
/// # Errors
/// A file that is missing or damaged, a family or setting that is not supported.
pub fn read_spec(dir: &Path) -> Result<Spec> {
    families::spec(&read_config(dir)?)
}

/// Reads `config.json`.
fn read_config(dir: &Path) -> Result<ModelConfig> {
    if !dir.is_dir() {
        bail!("{} is not a folder", dir.display());
    }
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; a model folder needs config.json", path.display()))?;
    ModelConfig::parse(&text).with_context(|| format!("{}", path.display()))
}

fn eos_token_ids(dir: &Path, config: &ModelConfig) -> Result<Vec<u32>> {
    let path = dir.join("generation_config.json");
    let generation = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str::<Value>(&text)
            .with_context(|| format!("{} is not valid JSON", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Null,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let found =
        generation.get("eos_token_id").filter(|v| !v.is_null()).or_else(|| config.get("eos_token_id"));
    let id = |v: &Value| {
        v.as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .with_context(|| format!("eos_token_id {v} is no token"))
    };
    match found {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}

/// Ampere and newer compute in bf16; Turing (T4) has f16 alone.
#[cfg(feature = "cuda")]
fn has_bf16(device: &Device) -> bool {
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
    let Ok(cuda) = device.as_cuda_device() else { return false };
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    cuda.cuda_stream().context().attribute(attribute).is_ok_and(|major| major >= 8)
}

#[cfg(not(feature = "cuda"))]
fn has_bf16(_: &Device) -> bool {
    false
}
