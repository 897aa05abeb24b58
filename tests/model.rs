//! Model folders as they come: in shards, in half precision, damaged, or not of one piece.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use gurukul::engine::{EngineConfig, EngineHandle};
use gurukul::model::decoder::{Batch, Decoder};
use gurukul::model::load::{DeviceChoice, DtypeChoice, load};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::kv_cache::{KvCache, SequenceSpan};
use gurukul::nn::lora::LoraBatch;
use gurukul::nn::quant::Quantization;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

fn tensors() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture().join("model.safetensors"), &Device::Cpu).unwrap()
}

/// The fixture's configuration and tokenizer, without weights.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture().join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn with_weights(tensors: &HashMap<String, Tensor>) -> tempfile::TempDir {
    let dir = folder();
    candle_core::safetensors::save(tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

fn open(dir: &Path, dtype: DtypeChoice) -> anyhow::Result<Decoder> {
    Ok(load(dir, &Device::Cpu, dtype, Quantization::None)?.0)
}

fn refusal(dir: &Path) -> String {
    format!("{:#}", open(dir, DtypeChoice::Auto).err().expect("it is refused"))
}

fn logits(model: &Decoder) -> Vec<Vec<f32>> {
    let mut cache = KvCache::new(model.kv_shape(), 1, model.activations(), model.device()).unwrap();
    let spans = vec![SequenceSpan { rows: 0..6, start: 0, pages: vec![0] }];
    let tokens = vec![5, 77, 300, 41, 8, 199];
    let batch = Batch { tokens, spans, lora: LoraBatch::default(), outputs: (0..6).collect() };
    model.forward(&batch, &mut cache).unwrap().to_vec2().unwrap()
}

/// The weights in two files with an index.
fn sharded() -> tempfile::TempDir {
    let dir = folder();
    let mut names: Vec<String> = tensors().into_keys().collect();
    names.sort();
    let mut map = serde_json::Map::new();
    for (number, part) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", number + 1);
        let shard: HashMap<String, Tensor> = part.iter().map(|n| (n.clone(), tensors()[n].clone())).collect();
        candle_core::safetensors::save(&shard, dir.path().join(&file)).unwrap();
        map.extend(part.iter().map(|n| (n.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

#[test]
fn shards_are_one_model() {
    let whole = logits(&open(&fixture(), DtypeChoice::Auto).unwrap());
    let dir = sharded();
    assert_eq!(logits(&open(dir.path(), DtypeChoice::Auto).unwrap()), whole);

    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    let message = refusal(dir.path());
    assert!(
        message.contains("model-00002-of-00002.safetensors") && message.contains("incomplete"),
        "{message}"
    );

    let index = serde_json::json!({"weight_map": {"lm_head.weight": "../model.safetensors"}});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let message = refusal(dir.path());
    assert!(message.contains("is not a file name"), "{message}");
}

#[test]
fn half_precision_on_disk_stays_so_and_is_multiplied_exactly() {
    for (dtype, name) in [(DType::F16, "f16"), (DType::BF16, "bf16")] {
        let half = tensors().into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
        let dir = with_weights(&half);
        let held = open(dir.path(), DtypeChoice::Auto).unwrap();
        assert_eq!(held.weights_dtype().as_str(), name);
        let wide = open(dir.path(), DtypeChoice::F32).unwrap();
        assert_eq!(wide.weight_bytes(), 2 * held.weight_bytes());
        assert_eq!(logits(&held), logits(&wide), "{name}");
    }
}

#[test]
fn a_damaged_tensor_is_named() {
    let mut damaged = tensors();
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut values = damaged[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[17] = f32::NAN;
    damaged.insert(name.into(), Tensor::from_vec(values, (112, 64), &Device::Cpu).unwrap());
    let message = refusal(with_weights(&damaged).path());
    assert!(message.contains(name) && message.contains("NaN"), "{message}");

    damaged.remove(name);
    let message = refusal(with_weights(&damaged).path());
    assert!(message.contains(name) && message.contains("missing"), "{message}");

    damaged.insert(name.into(), Tensor::zeros((64, 112), DType::F32, &Device::Cpu).unwrap());
    let message = refusal(with_weights(&damaged).path());
    assert!(
        message.contains(name) && message.contains("[64, 112]") && message.contains("[112, 64]"),
        "{message}"
    );

    damaged.insert(name.into(), Tensor::zeros((112, 64), DType::I64, &Device::Cpu).unwrap());
    let message = refusal(with_weights(&damaged).path());
    assert!(message.contains(name) && message.contains("I64"), "{message}");
}

#[test]
fn a_configuration_without_a_field_names_it() {
    let dir = with_weights(&tensors());
    let path = dir.path().join("config.json");
    let whole: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for field in ["model_type", "hidden_size", "num_attention_heads", "vocab_size", "hidden_act"] {
        let mut config = whole.clone();
        config.as_object_mut().unwrap().shift_remove(field);
        std::fs::write(&path, config.to_string()).unwrap();
        let message = refusal(dir.path());
        assert!(message.contains(&format!("\"{field}\"")), "{field}: {message}");
    }
    for (field, value) in [("num_key_value_heads", 3), ("head_dim", 15), ("num_attention_heads", 0)] {
        let mut config = whole.clone();
        config[field] = value.into();
        std::fs::write(&path, config.to_string()).unwrap();
        refusal(dir.path());
    }
}

fn start(dir: &Path, kv_cache_bytes: Option<u64>) -> anyhow::Result<EngineHandle> {
    let config = EngineConfig {
        model_dir: dir.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Auto,
        quantize: Quantization::None,
        kv_cache_bytes,
        max_batch: 2,
        max_queue: 2,
        prefill_chunk: 8,
        adapter_cache_bytes: 1 << 20,
        train_share: 0.5,
    };
    EngineHandle::start(config, Arc::new(Tokenizer::from_dir(dir)?))
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = with_weights(&tensors());
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut extra = added[0].clone();
    extra["id"] = 512.into();
    extra["content"] = "<one too many>".into();
    added.push(extra);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let message = format!("{:#}", start(dir.path(), None).err().expect("refused"));
    assert!(message.contains("513") && message.contains("512"), "{message}");
}

#[test]
fn a_cache_that_cannot_be_is_refused_with_figures() {
    let message = format!("{:#}", start(&fixture(), Some(1 << 50)).err().expect("refused"));
    assert!(message.contains("--kv-cache") && message.contains("MiB"), "{message}");
    let message = format!("{:#}", start(&fixture(), Some(1 << 12)).err().expect("refused"));
    assert!(message.contains("at least 128"), "{message}");
    let small = start(&fixture(), Some(1 << 17)).expect("enough for 128 tokens and more");
    assert!(small.info().context_length < 512, "the cache bounds the context");
}
