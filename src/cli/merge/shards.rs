//! Safetensors of a whole model, written one tensor at a time: one file, or shards with the index that
//! transformers reads. Knows names, types and sizes alone.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, ensure};
use safetensors::Dtype;
use serde_json::{Map, json};

use crate::adapters::write_file;

/// A file holds at most so many bytes, as transformers would save it; a larger tensor has a file of its own.
pub(super) const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Planned {
    fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&d| d as u64).product();
        elements * self.dtype.bitsize() as u64 / 8
    }
}

/// Writes `model.safetensors`, or shards and `model.safetensors.index.json`, each file synced. `read` gives the
/// bytes of a tensor by its name.
pub(super) fn write(
    folder: &Path,
    tensors: &[Planned],
    shard_bytes: u64,
    read: impl Fn(&str) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<()> {
    let shards = split(tensors, shard_bytes);
    if let [only] = shards.as_slice() {
        return write_one(&folder.join("model.safetensors"), only, &read);
    }
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_one(&folder.join(&file), shard, &read)?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone().into())));
    }
    let total: u64 = tensors.iter().map(Planned::bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    Ok(write_file(
        &folder.join("model.safetensors.index.json"),
        serde_json::to_string_pretty(&index)?.as_bytes(),
    )?)
}

/// Tensors in their order, as many a shard as fit; at least one shard.
fn split(tensors: &[Planned], shard_bytes: u64) -> Vec<&[Planned]> {
    let mut shards = Vec::new();
    let (mut first, mut used) = (0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        if at > first && used + bytes > shard_bytes {
            shards.push(&tensors[first..at]);
            (first, used) = (at, 0);
        }
        used += bytes;
    }
    shards.push(&tensors[first..]);
    shards
}

fn write_one(
    path: &Path,
    tensors: &[Planned],
    read: &impl Fn(&str) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<()> {
    let io = |error: io::Error| anyhow::Error::new(error).context(format!("{}", path.display()));
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    // The values begin at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    for tensor in tensors {
        let bytes = read(&tensor.name)?;
        ensure!(
            bytes.len() as u64 == tensor.bytes(),
            "{}: {} bytes were planned",
            tensor.name,
            tensor.bytes()
        );
        file.write_all(&bytes).map_err(io)?;
    }
    let file = file.into_inner().map_err(|e| e.into_error()).map_err(io)?;
    file.sync_all().with_context(|| format!("{}", path.display()))
}
