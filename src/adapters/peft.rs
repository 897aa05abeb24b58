//! The tensors of a PEFT directory, matched to the model's sites: from the bytes of `adapter_config.json` and
//! `adapter_model.safetensors` to [`LoraWeights`], or the reason why not. Knows no path and no engine.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use super::config::LoraConfig;
use crate::nn::lora::{LoraWeights, Site, SiteWeights};

/// Why the files of an adapter cannot be used. Every message names the file's own tensor or field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PeftError {
    /// The configuration is no JSON object.
    #[error("adapter_config.json is not a JSON object: {0}")]
    ConfigSyntax(String),
    /// A field of the configuration is missing or has a value that cannot be used.
    #[error("adapter_config.json: `{field}` {problem}")]
    ConfigField {
        /// The field.
        field: &'static str,
        /// What is wrong and what it should be.
        problem: String,
    },
    /// A feature of PEFT that the engine does not compute.
    #[error("adapter_config.json: `{field}` is set, and {reason}")]
    Unsupported {
        /// The field that switches it on.
        field: &'static str,
        /// What it is, and the remedy where there is one.
        reason: &'static str,
    },
    /// The safetensors file does not hold together.
    #[error("adapter_model.safetensors is truncated or corrupt: {0}")]
    Corrupt(String),
    /// The safetensors file holds nothing.
    #[error("adapter_model.safetensors holds no tensors")]
    Empty,
    /// A tensor that is no part of a low-rank adapter.
    #[error("the tensor `{tensor}` is not supported: {reason}")]
    UnknownTensor {
        /// Its name in the file.
        tensor: String,
        /// What it is, or what was expected.
        reason: &'static str,
    },
    /// Two tensors for one place.
    #[error("the tensors `{first}` and `{second}` are for the same place")]
    Duplicate {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// A module that the model does not have.
    #[error("the tensor `{tensor}` is for a module that this model does not have; it has {targets}{base}")]
    UnknownTarget {
        /// The tensor's name in the file.
        tensor: String,
        /// The last components of the model's sites.
        targets: String,
        /// What the adapter says it was trained on.
        base: BaseHint,
    },
    /// A module that the configuration does not name.
    #[error(
        "the tensor `{tensor}` is for a module that `target_modules` in adapter_config.json does not name"
    )]
    NotTargeted {
        /// The tensor's name in the file.
        tensor: String,
    },
    /// Modules that the configuration names and the file does not hold.
    #[error(
        "adapter_model.safetensors has no tensors for `{module}`{others}, which `target_modules` in \
         adapter_config.json names"
    )]
    MissingModules {
        /// The first of them.
        module: String,
        /// How many more, in words.
        others: String,
    },
    /// A without B, B without A, a DoRA magnitude that is missing or not called for.
    #[error("the tensor `{tensor}` has no `{missing}` beside it")]
    Unpaired {
        /// The tensor that is there.
        tensor: String,
        /// What is missing: `lora_A`, `lora_B` or `lora_magnitude_vector`.
        missing: &'static str,
    },
    /// A magnitude in an adapter that is not DoRA.
    #[error("the tensor `{tensor}` belongs to DoRA, but `use_dora` in adapter_config.json is false")]
    NotDora {
        /// Its name in the file.
        tensor: String,
    },
    /// Another shape than model and rank ask for.
    #[error("the tensor `{tensor}` has the shape {found:?}, but {expected:?} {what} is expected{base}")]
    Shape {
        /// Its name in the file.
        tensor: String,
        /// The shape that fits.
        expected: Vec<usize>,
        /// The shape that is there.
        found: Vec<usize>,
        /// What the dimensions are.
        what: &'static str,
        /// What the adapter says it was trained on.
        base: BaseHint,
    },
    /// Another element type than f32, f16 or bf16.
    #[error("the tensor `{tensor}` is of type {found}; F32, F16 and BF16 are supported")]
    ElementType {
        /// Its name in the file.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A value that is NaN or infinite.
    #[error("the tensor `{tensor}` holds {value} at element {index}; every value must be finite")]
    NotFinite {
        /// Its name in the file.
        tensor: String,
        /// The position, counted over all elements in order.
        index: usize,
        /// `NaN`, `inf` or `-inf`.
        value: String,
    },
}

/// `base_model_name_or_path`, told where a misfit makes another base likely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BaseHint(Option<String>);

impl std::fmt::Display for BaseHint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(base) => write!(f, "; the adapter was trained on {base:?}"),
            None => Ok(()),
        }
    }
}

/// What one module of the file becomes.
#[derive(Debug)]
struct SitePlan {
    site: usize,
    scale: f64,
    a: String,
    b: String,
    magnitude: Option<String>,
}

/// An adapter whose names and shapes fit the model; its values have not been looked at.
#[derive(Debug)]
pub(super) struct Plan {
    sites: Vec<SitePlan>,
}

/// Which of a module's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Magnitude,
}

/// The names of one module's tensors in the file.
#[derive(Debug, Default)]
struct Parts {
    a: Option<String>,
    b: Option<String>,
    magnitude: Option<String>,
}

/// How a module's name in the file becomes the name of a site. Checkpoints and classes disagree on a leading
/// `model.` or `transformer.`, and a model with a vision tower nests its text model one level deeper.
#[derive(Debug, Clone, Copy)]
struct Naming {
    strip: &'static str,
    add: &'static str,
}

const STRIP: [&str; 6] =
    ["", "transformer.", "model.", "language_model.", "model.language_model.", "language_model.model."];
const ADD: [&str; 3] = ["", "transformer.", "model."];

impl Naming {
    fn site_name(self, module: &str) -> Option<String> {
        module.strip_prefix(self.strip).map(|rest| format!("{}{rest}", self.add))
    }

    /// The other way: the name that PEFT would give to a site.
    fn module_name(self, site: &str) -> Option<String> {
        site.strip_prefix(self.add).map(|rest| format!("{}{rest}", self.strip))
    }
}

impl Plan {
    /// Matches names, shapes and element types; needs the header of the safetensors file alone.
    pub(super) fn new(config: &LoraConfig, header: &Metadata, sites: &[Site]) -> Result<Self, PeftError> {
        let tensors: BTreeMap<String, &TensorInfo> = header.tensors().into_iter().collect();
        if tensors.is_empty() {
            return Err(PeftError::Empty);
        }
        let modules = modules(tensors.keys())?;
        let base = || BaseHint(config.base_model.clone());

        let by_name: BTreeMap<&str, usize> =
            sites.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        let lookup = |naming: Naming, module: &str| {
            naming.site_name(module).and_then(|name| by_name.get(name.as_str()).copied())
        };
        // One rule for the whole file: the one under which most modules are found, the plainest on a tie.
        let mut naming = Naming { strip: "", add: "" };
        let mut most = 0;
        for candidate in STRIP.iter().flat_map(|strip| ADD.iter().map(|add| Naming { strip, add })) {
            let found = modules.keys().filter(|module| lookup(candidate, module).is_some()).count();
            if found > most {
                (naming, most) = (candidate, found);
            }
        }

        let mut planned = Vec::with_capacity(modules.len());
        for (module, parts) in &modules {
            let any = parts.a.as_ref().or(parts.b.as_ref()).or(parts.magnitude.as_ref());
            let any = any.expect("a module is entered with its first tensor: anything else is a bug");
            let Some(site) = lookup(naming, module) else {
                return Err(PeftError::UnknownTarget {
                    tensor: any.clone(),
                    targets: describe_targets(sites),
                    base: base(),
                });
            };
            if !config.targets_module(module) {
                return Err(PeftError::NotTargeted { tensor: any.clone() });
            }
            let unpaired = |missing| PeftError::Unpaired { tensor: any.clone(), missing };
            let a = parts.a.clone().ok_or_else(|| unpaired("lora_A"))?;
            let b = parts.b.clone().ok_or_else(|| unpaired("lora_B"))?;
            match (&parts.magnitude, config.use_dora) {
                (None, true) => return Err(unpaired("lora_magnitude_vector")),
                (Some(tensor), false) => return Err(PeftError::NotDora { tensor: tensor.clone() }),
                _ => {}
            }
            let Site { in_features, out_features, .. } = sites[site];
            let r = config.rank_of(module);
            let check = |tensor: &str, expected: &[usize], what: &'static str| {
                let info = tensors[tensor];
                if info.shape != expected {
                    return Err(PeftError::Shape {
                        tensor: tensor.to_owned(),
                        expected: expected.to_vec(),
                        found: info.shape.clone(),
                        what,
                        base: base(),
                    });
                }
                match info.dtype {
                    Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
                    other => Err(PeftError::ElementType {
                        tensor: tensor.to_owned(),
                        found: format!("{other:?}").to_uppercase(),
                    }),
                }
            };
            check(&a, &[r, in_features], "(rank, in_features)")?;
            check(&b, &[out_features, r], "(out_features, rank)")?;
            if let Some(magnitude) = &parts.magnitude {
                check(magnitude, &[out_features], "(out_features)")?;
            }
            let magnitude = parts.magnitude.clone();
            planned.push(SitePlan { site, scale: config.scale_of(module), a, b, magnitude });
        }
        planned.sort_by_key(|p| p.site);
        check_complete(config, sites, naming, &planned)?;
        Ok(Self { sites: planned })
    }

    /// Reads the values, widened to f32. `file` is the whole safetensors file that the plan was made for.
    pub(super) fn read(&self, file: &[u8]) -> Result<LoraWeights, PeftError> {
        let (header_bytes, header) =
            SafeTensors::read_metadata(file).map_err(|e| PeftError::Corrupt(e.to_string()))?;
        let data = &file[8 + header_bytes..];
        let read = |name: &str| -> Result<Tensor, PeftError> {
            let info = header.info(name).ok_or_else(|| {
                PeftError::Corrupt(format!("the tensor `{name}` went away while the file was read"))
            })?;
            let values = widen(name, info.dtype, &data[info.data_offsets.0..info.data_offsets.1])?;
            Tensor::from_vec(values, info.shape.as_slice(), &Device::Cpu)
                .map_err(|e| PeftError::Corrupt(format!("`{name}`: {e}")))
        };
        let sites = self.sites.iter().map(|plan| {
            Ok(SiteWeights {
                site: plan.site,
                a: read(&plan.a)?,
                b: read(&plan.b)?,
                scale: plan.scale,
                magnitude: plan.magnitude.as_deref().map(read).transpose()?,
            })
        });
        Ok(LoraWeights { sites: sites.collect::<Result<_, PeftError>>()? })
    }
}

/// The header of a safetensors file of `file_bytes` bytes, from its first bytes on.
pub(super) fn read_header(
    file: &mut impl std::io::Read,
    file_bytes: u64,
) -> std::io::Result<Result<Metadata, PeftError>> {
    /// The header of an adapter on every linear layer of a 100-layer model takes about 200 kB.
    const MAX_HEADER_BYTES: u64 = 16 << 20;
    let corrupt = |reason: String| Ok(Err(PeftError::Corrupt(reason)));
    if file_bytes < 8 {
        return corrupt(format!("it has {file_bytes} bytes"));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - 8 {
        return corrupt(format!("its header would take {header_bytes} bytes of {file_bytes}"));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header)?;
    let header: Metadata = match serde_json::from_slice(&header) {
        Ok(header) => header,
        Err(e) => return corrupt(format!("its header cannot be read: {e}")),
    };
    let expected = 8 + header_bytes + header.data_len() as u64;
    if expected != file_bytes {
        return corrupt(format!("it has {file_bytes} bytes, but its header describes {expected}"));
    }
    Ok(Ok(header))
}

/// Groups the tensors of a file by module.
fn modules<'a>(names: impl Iterator<Item = &'a String>) -> Result<BTreeMap<String, Parts>, PeftError> {
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    let mut adapter_names: BTreeSet<String> = BTreeSet::new();
    for name in names {
        let (module, part, adapter) = parse_name(name)?;
        adapter_names.extend(adapter);
        if adapter_names.len() > 1 {
            let reason = "the file holds several adapters; save one adapter a folder";
            return Err(PeftError::UnknownTensor { tensor: name.clone(), reason });
        }
        let parts = modules.entry(module).or_default();
        let place = match part {
            Part::A => &mut parts.a,
            Part::B => &mut parts.b,
            Part::Magnitude => &mut parts.magnitude,
        };
        if let Some(first) = place.replace(name.clone()) {
            return Err(PeftError::Duplicate { first, second: name.clone() });
        }
    }
    Ok(modules)
}

/// `base_model.model.<module>.lora_A.weight` and its relatives: the module, the part, and the adapter's name
/// where the file was saved from a whole training state (`.lora_A.default.weight`).
fn parse_name(tensor: &str) -> Result<(String, Part, Option<String>), PeftError> {
    let unknown = |reason| Err(PeftError::UnknownTensor { tensor: tensor.to_owned(), reason });
    let full = tensor.strip_prefix("base_model.model.").unwrap_or(tensor);
    let segments: Vec<&str> = full.split('.').collect();
    if segments.iter().any(|s| *s == "modules_to_save" || *s == "original_module") {
        return unknown("it is a whole retrained module (`modules_to_save`)");
    }
    if segments.iter().any(|s| s.starts_with("lora_embedding_")) {
        return unknown("adapters on embeddings are not; train the adapter again without the embedding");
    }
    let found = segments.iter().enumerate().rev().find_map(|(i, segment)| match *segment {
        "lora_A" => Some((i, Part::A)),
        "lora_B" => Some((i, Part::B)),
        "lora_magnitude_vector" => Some((i, Part::Magnitude)),
        _ => None,
    });
    let Some((at, part)) = found.filter(|(at, _)| *at > 0) else {
        return unknown("only lora_A, lora_B and lora_magnitude_vector of a module are");
    };
    let adapter = match (part, &segments[at + 1..]) {
        (_, ["weight"]) | (Part::Magnitude, []) => None,
        (Part::A | Part::B, ["bias"] | [_, "bias"]) => {
            return unknown("a bias on lora_B (`lora_bias`) is not");
        }
        (_, [adapter, "weight"]) | (Part::Magnitude, [adapter]) => Some((*adapter).to_owned()),
        _ => return unknown("its name should end in `.weight`"),
    };
    Ok((segments[..at].join("."), part, adapter))
}

/// Refuses a file that lacks modules its configuration names: half an adapter would answer, but wrongly.
fn check_complete(
    config: &LoraConfig,
    sites: &[Site],
    naming: Naming,
    planned: &[SitePlan],
) -> Result<(), PeftError> {
    let present: BTreeSet<usize> = planned.iter().map(|p| p.site).collect();
    let all_linear = matches!(config.targets, super::config::Targets::AllLinear);
    let missing: Vec<&Site> = sites
        .iter()
        .enumerate()
        .filter(|(index, site)| {
            // PEFT leaves the output head out of "all-linear".
            let head = all_linear && matches!(site.name.rsplit('.').next(), Some("lm_head" | "embed_out"));
            let targeted =
                naming.module_name(&site.name).is_some_and(|module| config.targets_module(&module));
            !present.contains(index) && targeted && !head
        })
        .map(|(_, site)| site)
        .collect();
    match missing.as_slice() {
        [] => Ok(()),
        [first, rest @ ..] => Err(PeftError::MissingModules {
            module: first.name.clone(),
            others: if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) },
        }),
    }
}

/// What an adapter for this model can name.
fn describe_targets(sites: &[Site]) -> String {
    let names: BTreeSet<&str> = sites.iter().filter_map(|s| s.name.rsplit('.').next()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    match (sites.first(), sites.last()) {
        (Some(first), Some(last)) => {
            format!("modules named {}, from `{}` to `{}`", names.join(", "), first.name, last.name)
        }
        _ => "no module that an adapter can change".to_owned(),
    }
}

/// Little-endian values as f32.
fn widen(tensor: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, PeftError> {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let values: Vec<f32> = match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
        Dtype::BF16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        other => {
            return Err(PeftError::ElementType {
                tensor: tensor.to_owned(),
                found: format!("{other:?}").to_uppercase(),
            });
        }
    };
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => {
            Err(PeftError::NotFinite { tensor: tensor.to_owned(), index, value: values[index].to_string() })
        }
        None => Ok(values),
    }
}

#[cfg(test)]
#[path = "peft_tests.rs"]
mod tests;
