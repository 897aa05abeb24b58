//! `gurukul merge`: the model's folder once more, with an adapter's change in its weights, so that anything that
//! loads the model loads what was taught. One tensor at a time; nothing runs.

mod shards;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use candle_core::{DType, Tensor};
use serde_json::Value;

use self::shards::{Planned, SHARD_BYTES};
use crate::adapters::{self, make_folder, write_file};
use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::model::checkpoint::Checkpoint;
use crate::model::load;
use crate::model::spec::Spec;
use crate::nn::lora::{LoraWeights, Site, SiteWeights};

/// What is merged, and where to.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Adapter in the data folder's adapters/, or the folder of one (./my-adapter, a checkpoint's)
    #[arg(long, value_name = "NAME|FOLDER")]
    adapter: String,
    /// Folder to write; must be empty or not be there yet
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Type of the weights in it; as in the model's folder when left away
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
}

/// Types of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn in_candle(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    /// As `config.json` names it.
    fn in_config(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// What belongs to a model besides weights and `config.json`, where it is there.
const COPIED: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
];

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    free(&args.out).context(CannotStart)?;
    let model = super::runtime()?.block_on(app::model_folder(settings))?;
    let adapter = adapter_folder(&args.adapter, &settings.adapters_dir).context(CannotStart)?;
    let changed = merge(&model, &adapter, &args.out, args.dtype)?;
    let line = format!("{}: the model with {changed} weights changed\n", args.out.display());
    Ok(io::stdout().lock().write_all(line.as_bytes())?)
}

/// A name is looked up among the adapters; what has a separator in it is a path.
fn adapter_folder(adapter: &str, adapters_dir: &Path) -> anyhow::Result<PathBuf> {
    let folder = if adapter.contains(std::path::is_separator) {
        PathBuf::from(adapter)
    } else {
        adapters::check_name(adapter).context("--adapter")?;
        adapters_dir.join(adapter)
    };
    if !folder.is_dir() {
        bail!("--adapter {adapter}: no folder {}", folder.display());
    }
    Ok(folder)
}

/// Refuses to write over anything.
fn free(out: &Path) -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries.count(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(e).with_context(|| format!("--out {}", out.display())),
    };
    match entries {
        0 => Ok(()),
        _ => bail!("--out {}: the folder is not empty; name another", out.display()),
    }
}

/// Writes the merged folder; gives how many weights the adapter changed.
fn merge(model: &Path, adapter: &Path, out: &Path, dtype: Option<Dtype>) -> anyhow::Result<usize> {
    let spec = load::inspect(model)?.spec;
    let checkpoint = Checkpoint::open(model)?;
    let sites = sites(&spec, &checkpoint)?;
    let weights = adapters::read_folder(adapter, &sites)?;
    let merged = Merged::new(&spec, &checkpoint, &sites, &weights, dtype)?;
    let config = config(model, dtype)?;

    let name = out.file_name().with_context(|| format!("--out {} has no name", out.display()))?;
    // A bare name lies in the folder where the program runs.
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("--out {}", out.display()))?;
    let making =
        parent.join(format!(".writing-{}-{}", name.to_string_lossy(), uuid::Uuid::new_v4().simple()));
    make_folder(&making, &parent.join(name), |folder| {
        shards::write(folder, &merged.planned()?, SHARD_BYTES, |name| merged.bytes(name))?;
        write_file(&folder.join("config.json"), config.as_bytes())?;
        for file in COPIED {
            match std::fs::read(model.join(file)) {
                Ok(bytes) => write_file(&folder.join(file), &bytes)?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("{}", model.join(file).display())),
            }
        }
        anyhow::Ok(())
    })
    .with_context(|| format!("--out {}", out.display()))?;
    Ok(weights.sites.len())
}

/// The layers that adapters can change, with the shapes that their weights have on disk.
fn sites(spec: &Spec, checkpoint: &Checkpoint) -> anyhow::Result<Vec<Site>> {
    let site = |name: String| {
        let shape = checkpoint.stored(&format!("{name}.weight"))?.shape;
        let &[rows, columns] = shape.as_slice() else { bail!("{name}.weight is no matrix: {shape:?}") };
        let (out_features, in_features) = if spec.transposed { (columns, rows) } else { (rows, columns) };
        Ok(Site { name, in_features, out_features })
    };
    spec.site_names().into_iter().map(site).collect()
}

/// `config.json`, with the weights' new type in it.
fn config(model: &Path, dtype: Option<Dtype>) -> anyhow::Result<String> {
    let path = model.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let Some(dtype) = dtype else { return Ok(text) };
    let mut config: Value = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let fields = config.as_object_mut().context("config.json is no object")?;
    // Newer versions of transformers write `dtype`, and read either.
    let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    fields.insert(key.to_owned(), dtype.in_config().into());
    Ok(serde_json::to_string_pretty(&config)?)
}

/// The model's tensors as they will be.
struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    /// By the name under which the weight is stored.
    changes: HashMap<String, &'a SiteWeights>,
    transposed: bool,
    dtype: Option<Dtype>,
}

impl<'a> Merged<'a> {
    fn new(
        spec: &Spec,
        checkpoint: &'a Checkpoint,
        sites: &[Site],
        weights: &'a LoraWeights,
        dtype: Option<Dtype>,
    ) -> anyhow::Result<Self> {
        let mut changes = HashMap::new();
        for part in &weights.sites {
            let name = format!("{}.weight", sites[part.site].name);
            let stored = checkpoint.find(&name).with_context(|| format!("{name} is missing"))?;
            changes.insert(stored.to_owned(), part);
        }
        Ok(Self { checkpoint, changes, transposed: spec.transposed, dtype })
    }

    /// Every tensor of the model by its name, with the type and shape that it will have.
    fn planned(&self) -> anyhow::Result<Vec<Planned>> {
        let mut names: Vec<&str> = self.checkpoint.names().collect();
        names.sort_unstable();
        let planned = |name: &str| {
            let view = self.checkpoint.raw(name)?;
            let dtype = match (self.dtype, self.checkpoint.stored(name)) {
                (Some(dtype), Ok(_)) => dtype.in_candle().into(),
                // Masks and counters keep their type, as weights do when no type is asked for.
                _ => view.dtype(),
            };
            Ok(Planned { name: name.to_owned(), dtype, shape: view.shape().to_vec() })
        };
        names.into_iter().map(planned).collect()
    }

    /// The bytes of one tensor, as they go into the file.
    fn bytes(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let change = self.changes.get(name);
        let Ok(stored) = self.checkpoint.stored(name) else {
            return Ok(self.checkpoint.raw(name)?.data().to_vec());
        };
        let wanted = self.dtype.map_or(stored.dtype, Dtype::in_candle);
        if change.is_none() && wanted == stored.dtype {
            return Ok(self.checkpoint.raw(name)?.data().to_vec());
        }
        let mut weight = self.checkpoint.tensor(name, &stored.shape)?;
        if let Some(change) = change {
            weight = self.changed(&weight, change).with_context(|| format!("{name} cannot be merged"))?;
        }
        little_endian(&weight.to_dtype(wanted)?).with_context(|| name.to_owned())
    }

    /// The weight with the adapter in it, computed in f32.
    fn changed(&self, weight: &Tensor, part: &SiteWeights) -> candle_core::Result<Tensor> {
        let turned = |t: &Tensor| if self.transposed { t.t()?.contiguous() } else { Ok(t.clone()) };
        let base = turned(&weight.to_dtype(DType::F32)?)?; // [out, in]
        let merged = (base + (part.b.matmul(&part.a)? * part.scale)?)?;
        let merged = match &part.magnitude {
            None => merged,
            // DoRA: every row has the length that was learned (Liu et al. 2024).
            Some(magnitude) => {
                let norm = merged.sqr()?.sum(1)?.sqrt()?;
                let factor = (magnitude.flatten_all()? / norm)?.unsqueeze(1)?; // [out, 1]
                merged.broadcast_mul(&factor)?
            }
        };
        turned(&merged)
    }
}

fn little_endian(tensor: &Tensor) -> anyhow::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => flat.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        other => bail!("{other:?} is no type of weights"),
    })
}
