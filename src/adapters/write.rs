//! A trained adapter as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`. The same weights
//! give the same bytes. Knows no engine thread and no name of an adapter; where the folder lies is the caller's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;

use candle_core::{DType, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::durable::write_file;
use crate::engine::training::LoraSpec;
use crate::nn::lora::{LoraWeights, Site};

/// PEFT's configuration.
pub(super) const CONFIG: &str = "adapter_config.json";
/// PEFT's tensors.
pub(super) const TENSORS: &str = "adapter_model.safetensors";

/// An adapter that was trained here.
#[derive(Debug, Clone)]
pub struct TrainedAdapter {
    /// How it was trained.
    pub lora: LoraSpec,
    /// What came of it: an entry for each of `lora.sites`.
    pub weights: LoraWeights,
    /// Name of the base model.
    pub base_model: String,
    /// Family of the base model, as [`crate::engine::ModelInfo::family`].
    pub family: String,
}

impl TrainedAdapter {
    /// Writes PEFT's two files into a folder, each synced; the folder itself is the caller's to sync. `sites`
    /// are the model's.
    ///
    /// # Errors
    /// What the system reports; weights that do not belong to `lora` or to the model.
    pub fn write(&self, folder: &Path, sites: &[Site]) -> io::Result<()> {
        let tensors = self.tensors(sites)?;
        let config = serde_json::to_string_pretty(&self.config(sites))?;
        write_file(&folder.join(TENSORS), &safetensors_bytes(&tensors)?)?;
        write_file(&folder.join(CONFIG), config.as_bytes())
    }

    /// The fields that every version of PEFT with rsLoRA knows, in its order.
    fn config(&self, sites: &[Site]) -> Value {
        let LoraSpec { rank, alpha, dropout, rslora, .. } = self.lora;
        // PEFT types alpha as an integer and takes any number.
        let alpha =
            if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            // GPT-2's Conv1D holds its weight as [in, out]; A and B lie the same way in any case.
            "fan_in_fan_out": self.family == "gpt2",
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": target_modules(&self.lora.sites, sites),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": rslora,
        })
    }

    fn tensors(&self, sites: &[Site]) -> io::Result<BTreeMap<String, Tensor>> {
        let trained: Vec<usize> = self.weights.sites.iter().map(|part| part.site).collect();
        if trained != self.lora.sites {
            return Err(invalid(format!("weights of the sites {trained:?}, not of {:?}", self.lora.sites)));
        }
        let mut tensors = BTreeMap::new();
        for part in &self.weights.sites {
            let site = sites
                .get(part.site)
                .ok_or_else(|| invalid(format!("site {} is not in the model", part.site)))?;
            if part.magnitude.is_some() || part.scale != self.lora.scale() {
                return Err(invalid(format!("{}: not scaled as the configuration says", site.name)));
            }
            let expected = [[self.lora.rank, site.in_features], [site.out_features, self.lora.rank]];
            for (tensor, part, shape) in [(&part.a, "lora_A", expected[0]), (&part.b, "lora_B", expected[1])]
            {
                if tensor.dims() != shape {
                    return Err(invalid(format!(
                        "{}.{part} is {:?}, not {shape:?}",
                        site.name,
                        tensor.dims()
                    )));
                }
                tensors.insert(format!("base_model.model.{}.{part}.weight", site.name), tensor.clone());
            }
        }
        Ok(tensors)
    }
}

/// Names under which PEFT finds exactly the trained modules: for each the fewest last parts of its name that no
/// module has that was not trained.
fn target_modules(trained: &[usize], sites: &[Site]) -> Vec<String> {
    let trained: BTreeSet<usize> = trained.iter().copied().collect();
    // How many modules have this ending, and how many of them were trained.
    let mut endings: HashMap<&str, (usize, usize)> = HashMap::new();
    for (number, site) in sites.iter().enumerate() {
        for ending in endings_of(&site.name) {
            let (all, of_them) = endings.entry(ending).or_default();
            *all += 1;
            *of_them += usize::from(trained.contains(&number));
        }
    }
    let names: BTreeSet<&str> = trained
        .iter()
        .filter_map(|&number| sites.get(number))
        .filter_map(|site| endings_of(&site.name).find(|ending| endings[ending].0 == endings[ending].1))
        .collect();
    names.into_iter().map(str::to_owned).collect()
}

/// `c`, `b.c`, `a.b.c` of `a.b.c`.
fn endings_of(name: &str) -> impl Iterator<Item = &str> {
    name.rmatch_indices('.').map(|(at, _)| &name[at + 1..]).chain([name])
}

/// A safetensors file of f32 tensors, as torch's side writes it.
///
/// # Errors
/// A tensor that is not f32.
pub(crate) fn safetensors_bytes(tensors: &BTreeMap<String, Tensor>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if tensor.dtype() != DType::F32 {
            return Err(invalid(format!("{name} is {:?}, not f32", tensor.dtype())));
        }
        let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).map_err(io::Error::other)?;
        bytes.push(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    }
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, tensor), bytes)| {
            Ok((name, TensorView::new(Dtype::F32, tensor.dims().to_vec(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views.and_then(|views| safetensors::serialize(views, Some(metadata))).map_err(io::Error::other)
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
