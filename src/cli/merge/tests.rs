//! Tests of [`super`] on the parity fixtures: every family's merged folder holds the weights that were asked for.
//! That its logits are PEFT's is checked in `tests/merge.rs`.

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity")
}

fn families() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures()).unwrap();
    entries.map(|e| e.unwrap().path()).filter(|p| p.join("adapter").is_dir()).collect()
}

#[test]
fn sites_are_those_of_the_decoder() {
    for dir in families() {
        let spec = load::inspect(&dir).unwrap().spec;
        let sites = sites(&spec, &Checkpoint::open(&dir).unwrap()).unwrap();
        let (decoder, _) = load::load(
            &dir,
            &candle_core::Device::Cpu,
            load::DtypeChoice::F32,
            crate::nn::quant::Quantization::None,
        )
        .unwrap();
        assert_eq!(sites, decoder.sites(), "{}", dir.display());
    }
}

#[test]
fn types_are_as_stored_or_as_asked_for() {
    let (model, dir) = (fixtures().join("gpt2"), tempfile::tempdir().unwrap());
    let adapter = model.join("adapter");
    for (dtype, expected, named) in [
        (None, DType::F32, None),
        (Some(Dtype::F32), DType::F32, Some("float32")),
        (Some(Dtype::F16), DType::F16, Some("float16")),
        (Some(Dtype::Bf16), DType::BF16, Some("bfloat16")),
    ] {
        let out = dir.path().join(format!("{dtype:?}"));
        let changed = merge(&model, &adapter, &out, dtype).unwrap();
        assert!(changed > 0);
        let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
        let mut names: Vec<&str> = before.names().collect();
        names.sort_unstable();
        let mut found: Vec<&str> = after.names().collect();
        found.sort_unstable();
        assert_eq!(found, names);
        let mut different = 0;
        for name in names {
            assert_eq!(after.stored(name).unwrap().dtype, expected, "{name}");
            let shape = before.stored(name).unwrap().shape;
            let old = before.tensor(name, &shape).unwrap().to_dtype(expected).unwrap();
            let new = after.tensor(name, &shape).unwrap();
            different += usize::from(little_endian(&old).unwrap() != little_endian(&new).unwrap());
        }
        assert_eq!(different, changed, "what the adapter names and nothing else");
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let dtype_of = |config: &Value| config.get("dtype").or(config.get("torch_dtype")).cloned();
        if let Some(named) = named {
            assert_eq!(dtype_of(&config).unwrap(), named);
        }
        assert!(out.join("tokenizer.json").is_file() && out.join("generation_config.json").is_file());
        assert!(load::inspect(&out).is_ok());
    }
}

#[test]
fn large_models_are_written_in_shards() {
    let (model, dir) = (fixtures().join("llama"), tempfile::tempdir().unwrap());
    let spec = load::inspect(&model).unwrap().spec;
    let checkpoint = Checkpoint::open(&model).unwrap();
    let sites = sites(&spec, &checkpoint).unwrap();
    let weights = adapters::read_folder(&model.join("adapter"), &sites).unwrap();
    let merged = Merged::new(&spec, &checkpoint, &sites, &weights, None).unwrap();
    let planned = merged.planned().unwrap();
    let mut whole = HashMap::new();
    // One file; several; one a tensor, each of which is larger than the limit.
    for (limit, files) in
        [(u64::MAX, 1..=1), (60_000, 3..=planned.len() - 1), (1, planned.len()..=planned.len())]
    {
        let out = dir.path().join(limit.to_string());
        std::fs::create_dir(&out).unwrap();
        shards::write(&out, &planned, limit, |name| merged.bytes(name)).unwrap();
        let written = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name());
        let written = written.filter(|n| n.to_string_lossy().ends_with(".safetensors")).count();
        assert!(files.contains(&written), "{written} files for {limit}");
        let read = Checkpoint::open(&out).unwrap();
        assert_eq!(read.names().count(), planned.len());
        for tensor in &planned {
            let bytes = read.raw(&tensor.name).unwrap().data().to_vec();
            assert_eq!(*whole.entry(tensor.name.clone()).or_insert(bytes.clone()), bytes);
        }
    }
}

#[test]
fn nothing_is_written_over_and_nothing_half() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixtures().join("llama"), dir.path().join("out"));
    assert!(free(&out).is_ok());
    std::fs::create_dir(&out).unwrap();
    assert!(free(&out).is_ok(), "an empty folder will do");
    // Another family's adapter: refused before anything is written.
    let error = merge(&model, &fixtures().join("bloom/adapter"), &out, None).unwrap_err();
    assert!(format!("{error:#}").contains("does not have"), "{error:#}");
    merge(&model, &model.join("adapter"), &out, None).unwrap();
    assert!(free(&out).unwrap_err().to_string().contains("not empty"));
    assert!(merge(&model, &model.join("adapter"), &out, None).is_err(), "somebody was quicker");
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(free(&dir.path().join("file")).is_err());
    let entries: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(entries.len(), 2, "{entries:?}");
    for (adapter, part) in [("nobody", "no folder"), ("Nobody", "no adapter name"), ("./nobody", "no folder")]
    {
        let error = adapter_folder(adapter, dir.path()).unwrap_err();
        assert!(format!("{error:#}").contains(part), "{error:#}");
    }
}
