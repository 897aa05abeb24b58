//! `gurukul merge` and adapters that we write, against PEFT: the merged folder's logits are those that PEFT gave
//! with the adapter. The fixtures hold PEFT's answers; with `GURUKUL_TORCH_PYTHON`, an interpreter that has torch,
//! transformers and peft, these load our folders themselves (`peft_check.py`).
#![expect(clippy::print_stderr, reason = "a test that skips says so, and one that fails shows why")]

#[path = "support/parity.rs"]
#[expect(dead_code, reason = "what the parity tests compare besides")]
mod parity;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use gurukul::adapters::TrainedAdapter;
use gurukul::engine::training::LoraSpec;
use gurukul::engine::{EngineConfig, EngineHandle, ScoreRequest};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;

fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    command.current_dir(folder);
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", folder.join("hf")).env("HF_HUB_OFFLINE", "1");
    command
}

fn merge(folder: &Path, model: &Path, adapter: &str, out: &str) -> Output {
    let mut command = gurukul(folder);
    command.args(["merge", "--adapter", adapter, "--out", out, "--model"]).arg(model);
    command.output().unwrap()
}

fn assert_merged(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn engine(dir: &Path) -> EngineHandle {
    let config = EngineConfig {
        model_dir: dir.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(16 << 20),
        max_batch: 4,
        max_queue: 64,
        prefill_chunk: 64,
        adapter_cache_bytes: 1 << 28,
        train_share: 0.5,
    };
    EngineHandle::start(config, Arc::new(Tokenizer::from_dir(dir).unwrap())).unwrap()
}

/// An adapter of the fixtures with the file that has PEFT's logits for it.
fn cases() -> Vec<(PathBuf, PathBuf, PathBuf)> {
    let mut cases = Vec::new();
    for model in parity::families() {
        cases.push((model.clone(), model.join("adapter"), model.join("logits_adapter.safetensors")));
        for entry in std::fs::read_dir(model.join("variants")).into_iter().flatten() {
            let adapter = entry.unwrap().path();
            cases.push((model.clone(), adapter.clone(), adapter.join("logits.safetensors")));
        }
    }
    cases
}

/// Every family, and rsLoRA, DoRA and patterns besides: the merged model by itself scores as PEFT's logits say.
#[tokio::test]
async fn parity_of_merged_models_with_peft() {
    for (model, adapter, answers) in cases() {
        let dir = tempfile::tempdir().unwrap();
        assert_merged(&merge(dir.path(), &model, adapter.to_str().unwrap(), "merged"));
        let answers = parity::tensors(&answers);
        let rows = parity::id_rows(&answers["input_ids"]);
        let logits = answers["logits"].to_vec3::<f32>().unwrap();
        let engine = engine(&dir.path().join("merged"));
        for (row, logits) in rows.iter().zip(logits) {
            let scores =
                engine.score(ScoreRequest { tokens: row.clone(), from: 1, adapter: None }).await.unwrap();
            for (at, score) in scores.iter().enumerate() {
                let total = logits[at].iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
                let expected = f64::from(logits[at][row[at + 1] as usize]) - total;
                let found = f64::from(*score);
                assert!((found - expected).abs() < 1e-4, "{}: {found} for {expected}", adapter.display());
            }
        }
        tokio::task::spawn_blocking(move || engine.shutdown()).await.unwrap();
    }
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = parity::root().join("llama");
    std::fs::create_dir(dir.path().join("full")).unwrap();
    std::fs::write(dir.path().join("full/file"), "kept").unwrap();
    let adapter = model.join("adapter");
    for (adapter, out, part) in [
        (adapter.to_str().unwrap(), "full", "not empty"),
        ("nobody", "out", "nobody"),
        ("../nobody", "out", "no folder"),
        (model.to_str().unwrap(), "out", "adapter_config.json"),
    ] {
        let output = merge(dir.path(), &model, adapter, out);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(part), "{stderr}");
        assert!(!dir.path().join("out").exists() && !stderr.contains("panicked"), "{stderr}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("full")).unwrap().count(), 1);
}

/// Writes the fixture's adapter once more, as a training would.
fn written_by_us(engine: &EngineHandle, model: &Path, folder: &Path) {
    let config = parity::json(&model.join("adapter/adapter_config.json"));
    let info = engine.info();
    let weights = gurukul::adapters::read(model, "adapter", &info.sites).unwrap();
    let lora = LoraSpec {
        rank: config["r"].as_u64().unwrap() as usize,
        alpha: config["lora_alpha"].as_f64().unwrap(),
        dropout: 0.0,
        rslora: false,
        sites: weights.sites.iter().map(|s| s.site).collect(),
        seed: 0,
    };
    std::fs::create_dir_all(folder).unwrap();
    let base_model = model.to_str().unwrap().to_owned();
    let adapter = TrainedAdapter { lora, weights, base_model, family: info.family.clone() };
    adapter.write(folder, &info.sites).unwrap();
}

#[test]
fn peft_loads_what_we_write_and_transformers_what_we_merge() {
    let Some(python) = std::env::var_os("GURUKUL_TORCH_PYTHON") else {
        eprintln!("skipped: GURUKUL_TORCH_PYTHON names no interpreter with torch, transformers and peft");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut arguments = Vec::new();
    for family in ["llama", "gpt2", "bloom"] {
        let model = parity::root().join(family);
        let engine = engine(&model);
        written_by_us(&engine, &model, &dir.path().join("adapters").join(family));
        engine.shutdown();
        let out = format!("merged-{family}");
        assert_merged(&merge(dir.path(), &model, family, &out));
        arguments.push(model.clone());
        arguments.push(model.join("adapter"));
        arguments.push(dir.path().join("adapters").join(family));
        arguments.push(dir.path().join(out));
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peft_check.py");
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("{out}{err}");
    assert!(output.status.success(), "PEFT is not content");
    assert!(out.trim_end().ends_with("all checks passed"), "the script did not come to its end");
}
