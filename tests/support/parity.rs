//! Reading the parity fixtures: tiny models of every family with answers from transformers and PEFT.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

/// The folder with the fixtures: `$GURUKUL_PARITY_DIR`, else the copy in the repository.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("GURUKUL_PARITY_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity"),
    }
}

/// Every folder with a model and its logits.
pub(crate) fn families() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(root())
        .expect("the fixture folder exists")
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.join("logits.safetensors").is_file())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no family under {}", root().display());
    found
}

/// The folder's name.
pub(crate) fn name(dir: &Path) -> String {
    dir.file_name().expect("a named folder").to_string_lossy().into_owned()
}

/// Tensors of a fixture file on the CPU.
pub(crate) fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// JSON of a fixture file.
pub(crate) fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("valid JSON")
}

/// Token ids of a JSON array.
pub(crate) fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("an array").iter().map(|v| v.as_u64().expect("a token id") as u32).collect()
}

/// Rows of `[batch, length]` token ids.
pub(crate) fn id_rows(tensor: &Tensor) -> Vec<Vec<u32>> {
    tensor.to_dtype(candle_core::DType::U32).and_then(|t| t.to_vec2()).expect("a matrix of ids")
}

/// A copy of a model folder in which `config.json` is the given file of it.
pub(crate) fn with_config(dir: &Path, config: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder");
    for file in ["model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(dir.join(file), copy.path().join(file)).expect("the fixture has the file");
    }
    std::fs::copy(dir.join(config), copy.path().join("config.json")).expect("the fixture has the file");
    copy
}
