//! Safetensors of a model folder, single or sharded, mapped into memory and read one tensor at a time. What is
//! mapped is given back after each tensor, so reading never holds more than one beside the result.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device, Tensor};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype as StoredType, Metadata, SafeTensors, TensorView};

/// The tensors of a model folder.
pub struct Checkpoint {
    shards: Vec<Shard>,
    shard_of: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the data begins: after the header's length and the header.
    data_start: usize,
}

/// Name, shape and type of a stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// f32, f16 or bf16.
    pub dtype: DType,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Files that are missing, cut short or damaged; the message names the file.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let files = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shard_files(dir, &index)?
        } else {
            bail!(
                "{} holds neither model.safetensors nor model.safetensors.index.json; a checkpoint in another \
                 format (.bin, .gguf) must be converted to safetensors",
                dir.display()
            );
        };
        let shards = files.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
        let mut shard_of = HashMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.header.tensors().into_keys() {
                shard_of.insert(name, number);
            }
        }
        Ok(Self { shards, shard_of })
    }

    /// Names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shard_of.keys().map(String::as_str)
    }

    /// The name under which a tensor is stored: as transformers names it, or without the first part
    /// (`transformer.h.0...` is often stored as `h.0...`, `model.layers...` as `layers...`).
    pub fn find(&self, name: &str) -> Option<&str> {
        let short = name.split_once('.').map_or(name, |(_, rest)| rest);
        [name, short].into_iter().find_map(|n| self.shard_of.get_key_value(n)).map(|(n, _)| n.as_str())
    }

    /// Shape and type of a tensor.
    ///
    /// # Errors
    /// A name that is not there, a type that is no 16- or 32-bit float.
    pub fn stored(&self, name: &str) -> Result<Stored> {
        let (shard, name) = self.locate(name)?;
        let info = shard.header.info(name).ok_or_else(|| self.missing(name))?;
        let dtype = match info.dtype {
            StoredType::F32 => DType::F32,
            StoredType::F16 => DType::F16,
            StoredType::BF16 => DType::BF16,
            other => {
                bail!("{}: tensor {name} is {other:?}; f32, f16 and bf16 are supported", shard.path.display())
            }
        };
        Ok(Stored { shape: info.shape.clone(), dtype })
    }

    /// Reads a tensor to the CPU as it is stored.
    ///
    /// # Errors
    /// A name that is not there, another shape than `shape`, a value that is NaN or infinite.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.rows(name, shape, 0..shape.first().copied().unwrap_or(1))
    }

    /// Reads some rows of a tensor, by its first dimension, to the CPU as they are stored.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and rows beyond the last.
    pub fn rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Tensor> {
        let (shard, name) = self.locate(name)?;
        let stored = self.stored(name)?;
        if stored.shape != shape {
            bail!(
                "{}: tensor {name} has shape {:?}, but config.json asks for {shape:?}",
                shard.path.display(),
                stored.shape
            );
        }
        let info = shard.header.info(name).ok_or_else(|| self.missing(name))?;
        let row = shape.iter().skip(1).product::<usize>() * stored.dtype.size_in_bytes();
        let from = shard.data_start + info.data_offsets.0 + rows.start * row;
        let to = from + rows.len() * row;
        let bytes = Some(to)
            .filter(|&to| to <= shard.data_start + info.data_offsets.1)
            .and_then(|to| shard.map.get(from..to))
            .ok_or_else(|| anyhow!("{}: {name} lies outside", shard.path.display()))?;
        if !all_finite(bytes, stored.dtype) {
            bail!(
                "{}: tensor {name} holds NaN or infinite values; the file is damaged",
                shard.path.display()
            );
        }
        let mut shape = shape.to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        let tensor = Tensor::from_raw_buffer(bytes, stored.dtype, &shape, &Device::Cpu)?;
        shard.give_back(from, to - from);
        Ok(tensor)
    }

    /// A tensor as it lies on disk, of whatever type and unchecked.
    ///
    /// # Errors
    /// A name that is not there.
    pub fn raw(&self, name: &str) -> Result<TensorView<'_>> {
        let (shard, name) = self.locate(name)?;
        let info = shard.header.info(name).ok_or_else(|| self.missing(name))?;
        let (from, to) = (shard.data_start + info.data_offsets.0, shard.data_start + info.data_offsets.1);
        let bytes = shard.map.get(from..to).with_context(|| format!("{}: {name}", shard.path.display()))?;
        TensorView::new(info.dtype, info.shape.clone(), bytes)
            .with_context(|| format!("{}: {name}", shard.path.display()))
    }

    fn locate(&self, name: &str) -> Result<(&Shard, &str)> {
        let found = self.find(name).ok_or_else(|| self.missing(name))?;
        let (key, &shard) = self.shard_of.get_key_value(found).ok_or_else(|| self.missing(name))?;
        Ok((&self.shards[shard], key))
    }

    fn missing(&self, name: &str) -> anyhow::Error {
        let file = self.shards.first().map(|s| s.path.display().to_string()).unwrap_or_default();
        anyhow!("{file}: tensor {name} is missing; the checkpoint is incomplete or of another family")
    }
}

impl Shard {
    #[expect(unsafe_code, reason = "a memory map is only as stable as its file")]
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let size = file.metadata()?.len();
        if size < 8 {
            bail!("{} has {size} bytes and is no safetensors file; download it again", path.display());
        }
        // SAFETY: the folder is not written to while a model loads; a file that is cut meanwhile ends the process
        // by a signal, as with every mapped checkpoint.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        let (header_bytes, header) = SafeTensors::read_metadata(&map)
            .with_context(|| format!("{} is truncated or damaged; download it again", path.display()))?;
        let data_start = header_bytes + 8;
        let expected = data_start as u64 + header.data_len() as u64;
        if expected != size {
            bail!(
                "{} has {size} bytes, its header promises {expected}; it is truncated or damaged: download it again",
                path.display()
            );
        }
        Ok(Self { path, map, header, data_start })
    }

    #[expect(unsafe_code, reason = "unchecked advice is only wrong for memory that is written to")]
    fn give_back(&self, offset: usize, length: usize) {
        // SAFETY: the map is read-only and backed by its file: dropped pages are read again when they are touched.
        // A failure costs memory, nothing else.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, length) };
    }
}

fn shard_files(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text = std::fs::read_to_string(index).with_context(|| format!("cannot read {}", index.display()))?;
    let index_file: Index =
        serde_json::from_str(&text).with_context(|| format!("{} is not a valid index", index.display()))?;
    let mut files: Vec<&String> = index_file.weight_map.values().collect();
    files.sort();
    files.dedup();
    files
        .into_iter()
        .map(|file| {
            if file.contains(['/', '\\']) || file.starts_with('.') {
                bail!("{}: {file:?} is not a file name", index.display());
            }
            let path = dir.join(file);
            if !path.is_file() {
                bail!(
                    "{} names {file}, which is not in the folder; the download is incomplete",
                    index.display()
                );
            }
            Ok(path)
        })
        .collect()
}

/// Whether no element has an exponent of all ones.
fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    fn sixteen(bytes: &[u8], exponent: u16) -> bool {
        bytes.chunks_exact(2).all(|b| u16::from_le_bytes([b[0], b[1]]) & exponent != exponent)
    }
    match dtype {
        DType::F16 => sixteen(bytes, 0x7C00),
        DType::BF16 => sixteen(bytes, 0x7F80),
        _ => bytes
            .chunks_exact(4)
            .all(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0x7F80_0000 != 0x7F80_0000),
    }
}
