//! Tests of [`super`]: what is written is read back by our own reader, is in PEFT's own form, and is the same
//! bytes each time.

use candle_core::Device;

use super::*;
use crate::adapters::read_folder;
use crate::nn::lora::SiteWeights;

fn sites() -> Vec<Site> {
    let site = |name: &str, in_features, out_features| Site { name: name.into(), in_features, out_features };
    vec![
        site("transformer.h.0.attn.c_attn", 4, 12),
        site("transformer.h.0.attn.c_proj", 4, 4),
        site("transformer.h.0.mlp.c_proj", 8, 4),
        site("transformer.h.1.attn.c_attn", 4, 12),
    ]
}

fn trained(numbers: &[usize], rslora: bool) -> TrainedAdapter {
    let lora = LoraSpec { rank: 3, alpha: 6.0, dropout: 0.05, rslora, sites: numbers.to_vec(), seed: 1 };
    let values = |rows: usize, columns: usize, from: f32| {
        let values: Vec<f32> = (0..rows * columns).map(|i| from + i as f32 * 0.1).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    };
    let all = sites();
    let part = |&site: &usize| SiteWeights {
        site,
        a: values(3, all[site].in_features, site as f32),
        b: values(all[site].out_features, 3, -(site as f32)),
        scale: lora.scale(),
        magnitude: None,
    };
    let weights = LoraWeights { sites: numbers.iter().map(part).collect() };
    TrainedAdapter { lora, weights, base_model: "org/base".into(), family: "gpt2".into() }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn what_is_written_is_read_back_bit_for_bit() {
    for numbers in [&[0, 1, 2, 3][..], &[0, 3], &[1], &[2], &[0], &[0, 2]] {
        for rslora in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let adapter = trained(numbers, rslora);
            adapter.write(dir.path(), &sites()).unwrap();
            let read = read_folder(dir.path(), &sites()).unwrap();
            assert_eq!(read.sites.iter().map(|s| s.site).collect::<Vec<_>>(), numbers);
            for (found, expected) in read.sites.iter().zip(&adapter.weights.sites) {
                assert_eq!(bits(&found.a), bits(&expected.a));
                assert_eq!(bits(&found.b), bits(&expected.b));
                assert_eq!(found.scale, expected.scale);
            }
        }
    }
}

#[test]
fn modules_are_named_as_briefly_as_is_exact() {
    let names = |numbers: &[usize]| target_modules(numbers, &sites());
    assert_eq!(names(&[0, 1, 2, 3]), ["c_attn", "c_proj"]);
    assert_eq!(names(&[0, 3]), ["c_attn"]);
    assert_eq!(names(&[1]), ["attn.c_proj"]);
    assert_eq!(names(&[2]), ["mlp.c_proj"]);
    // The same ending in another layer was not trained.
    assert_eq!(names(&[0]), ["0.attn.c_attn"]);
}

#[test]
fn the_configuration_has_pefts_fields() {
    let dir = tempfile::tempdir().unwrap();
    trained(&[0, 3], true).write(dir.path(), &sites()).unwrap();
    let ours: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
    let fixture =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/parity/gpt2/adapter/adapter_config.json");
    let theirs: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    for (key, value) in ours.as_object().unwrap() {
        let expected = match key.as_str() {
            "base_model_name_or_path" => json!("org/base"),
            "lora_alpha" => json!(6),
            "lora_dropout" => json!(0.05),
            "r" => json!(3),
            "target_modules" => json!(["c_attn"]),
            "use_rslora" => json!(true),
            _ => theirs.get(key).unwrap_or_else(|| panic!("PEFT has no {key}")).clone(),
        };
        assert_eq!(*value, expected, "{key}");
    }
    let llama = TrainedAdapter { family: "llama".into(), ..trained(&[0], false) };
    assert_eq!(llama.config(&sites())["fan_in_fan_out"], false);
    let half = LoraSpec { alpha: 0.5, ..llama.lora.clone() };
    assert_eq!(TrainedAdapter { lora: half, ..llama }.config(&sites())["lora_alpha"], 0.5);
}

#[test]
fn the_same_weights_are_the_same_bytes() {
    let write = || {
        let dir = tempfile::tempdir().unwrap();
        trained(&[0, 1, 2, 3], false).write(dir.path(), &sites()).unwrap();
        [CONFIG, TENSORS].map(|file| std::fs::read(dir.path().join(file)).unwrap())
    };
    assert_eq!(write(), write());
}

#[test]
fn weights_that_do_not_belong_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |adapter: TrainedAdapter, part: &str| {
        let error = adapter.write(dir.path(), &sites()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let mut other = trained(&[0, 1], false);
    other.lora.sites = vec![0];
    refused(other, "not of [0]");
    let mut scaled = trained(&[0], false);
    scaled.weights.sites[0].scale = 1.0;
    refused(scaled, "not scaled");
    let mut shape = trained(&[0], false);
    shape.weights.sites[0].a = shape.weights.sites[0].b.clone();
    refused(shape, "lora_A is [12, 3], not [3, 4]");
    let mut half = trained(&[0], false);
    half.weights.sites[0].a = half.weights.sites[0].a.to_dtype(DType::F16).unwrap();
    refused(half, "not f32");
    let mut beyond = trained(&[0], false);
    (beyond.lora.sites, beyond.weights.sites[0].site) = (vec![9], 9);
    refused(beyond, "site 9");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
}
