//! Tests of [`super`]: PEFT's own files from the parity fixtures, and every way in which a file can be wrong.

use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::*;

fn fixtures() -> PathBuf {
    std::env::var_os("GURUKUL_PARITY_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity"), PathBuf::from)
}

/// The linear layers of a fixture, in the order of the file's names. GPT-2 stores them transposed.
fn sites_of(model: &Path) -> Vec<Site> {
    let bytes = std::fs::read(model.join("model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    let transposed = config["model_type"] == "gpt2";
    let mut sites: Vec<Site> = header
        .tensors()
        .into_iter()
        .filter(|(name, info)| {
            info.shape.len() == 2 && !["embed", ".wte.", ".wpe."].iter().any(|e| name.contains(e))
        })
        .map(|(name, info)| {
            let (out_features, in_features) =
                if transposed { (info.shape[1], info.shape[0]) } else { (info.shape[0], info.shape[1]) };
            Site { name: name.trim_end_matches(".weight").to_owned(), in_features, out_features }
        })
        .collect();
    sites.sort_by(|a, b| a.name.cmp(&b.name));
    sites
}

/// As the registry does it: configuration, header, plan, values.
fn load(config: &[u8], tensors: &[u8], sites: &[Site]) -> Result<LoraWeights, PeftError> {
    let config = LoraConfig::parse(config)?;
    let header =
        read_header(&mut &tensors[..], tensors.len() as u64).expect("a slice is read without fail")?;
    Plan::new(&config, &header, sites)?.read(tensors)
}

fn load_dir(dir: &Path, sites: &[Site]) -> Result<LoraWeights, PeftError> {
    let read = |name| std::fs::read(dir.join(name)).unwrap();
    load(&read("adapter_config.json"), &read("adapter_model.safetensors"), sites)
}

/// Site name to (rank, scale).
fn summary(weights: &LoraWeights, sites: &[Site]) -> BTreeMap<String, (usize, f64)> {
    weights.sites.iter().map(|s| (sites[s.site].name.clone(), (s.a.dims()[0], s.scale))).collect()
}

#[test]
fn parity_adapters_load_whole_and_unchanged() {
    let mut families = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let model = entry.unwrap().path();
        if !model.join("adapter").is_dir() {
            continue;
        }
        families += 1;
        let sites = sites_of(&model);
        let weights =
            load_dir(&model.join("adapter"), &sites).unwrap_or_else(|e| panic!("{}: {e}", model.display()));
        let file =
            candle_core::safetensors::load(model.join("adapter/adapter_model.safetensors"), &Device::Cpu)
                .unwrap();
        let used: usize = weights.sites.iter().map(|s| 2 + usize::from(s.magnitude.is_some())).sum();
        assert_eq!(used, file.len(), "{}", model.display());
        let config: Value =
            serde_json::from_slice(&std::fs::read(model.join("adapter/adapter_config.json")).unwrap())
                .unwrap();
        let set =
            |field: &str| config[field] == true || config[field].as_object().is_some_and(|o| !o.is_empty());
        let plain = !["use_rslora", "rank_pattern", "alpha_pattern"].into_iter().any(set);
        let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();
        let mut last = None;
        for site in &weights.sites {
            assert!(last < Some(site.site), "one entry a site, in order");
            last = Some(site.site);
            assert!(!plain || site.scale == scale, "{}", site.scale);
            let end = &sites[site.site].name;
            for (part, tensor) in [("lora_A", &site.a), ("lora_B", &site.b)] {
                let suffix = format!("{end}.{part}.weight");
                let (_, expected) =
                    file.iter().find(|(name, _)| name.ends_with(&suffix)).expect("in the file");
                let read = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(tensor.dims(), expected.dims());
                assert_eq!(read(tensor), read(expected));
            }
        }
        let bytes: usize = file.values().map(|t| 4 * t.elem_count()).sum();
        assert_eq!(weights.bytes(), bytes as u64);
    }
    assert!(families > 0, "no family in {}", fixtures().display());
}

#[test]
fn parity_variants_have_their_ranks_and_scales() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama");
    let sites = sites_of(&model);
    let rslora = summary(&load_dir(&model.join("variants/rslora"), &sites).unwrap(), &sites);
    assert_eq!(rslora.len(), 14);
    assert!(rslora.values().all(|v| *v == (4, 4.0)), "{rslora:?}");

    let patterns = summary(&load_dir(&model.join("variants/patterns"), &sites).unwrap(), &sites);
    let expected = [
        ("model.layers.0.mlp.down_proj", (4, 2.0)),
        ("model.layers.0.self_attn.q_proj", (2, 4.0)),
        ("model.layers.0.self_attn.v_proj", (4, 0.5)),
        ("model.layers.1.mlp.down_proj", (6, 8.0 / 6.0)),
        ("model.layers.1.self_attn.q_proj", (2, 4.0)),
        ("model.layers.1.self_attn.v_proj", (4, 0.5)),
    ];
    assert_eq!(patterns, expected.map(|(k, v)| (k.to_owned(), v)).into());

    let dora = load_dir(&model.join("variants/dora"), &sites).unwrap();
    assert_eq!(dora.sites.len(), 14);
    for site in &dora.sites {
        let magnitude = site.magnitude.as_ref().expect("DoRA has one everywhere");
        assert_eq!(magnitude.dims(), [sites[site.site].out_features]);
    }
}

/// What the tensors of [`Case`] begin with: PEFT's prefix, then the class's.
const CLASS: &str = "base_model.model.model.";

/// A model with two layers and an adapter on both projections of each.
struct Case {
    config: Value,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    sites: Vec<Site>,
}

impl Case {
    fn new() -> Self {
        let mut sites = Vec::new();
        let mut tensors = Vec::new();
        for layer in 0..2 {
            for (module, in_features, out_features) in [("self_attn.q_proj", 8, 8), ("mlp.up_proj", 8, 12)] {
                let name = format!("model.layers.{layer}.{module}");
                let prefix = format!("base_model.model.{name}");
                tensors.push(tensor(&format!("{prefix}.lora_A.weight"), &[2, in_features]));
                tensors.push(tensor(&format!("{prefix}.lora_B.weight"), &[out_features, 2]));
                sites.push(Site { name, in_features, out_features });
            }
        }
        let config = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"],
            "base_model_name_or_path": "some/base",
        });
        Self { config, tensors, sites }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn load(&self) -> Result<LoraWeights, PeftError> {
        load(self.config.to_string().as_bytes(), &self.bytes(), &self.sites)
    }

    fn refusal(&self) -> String {
        self.load().expect_err("must be refused").to_string()
    }

    fn rename(&mut self, rule: impl Fn(&str) -> String) {
        for tensor in &mut self.tensors {
            tensor.0 = rule(&tensor.0);
        }
    }
}

fn tensor(name: &str, shape: &[usize]) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    let values = (0..shape.iter().product()).flat_map(|i: usize| (i as f32 - 3.5).to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape.to_vec(), values)
}

#[test]
fn names_of_every_age_lead_to_the_same_sites() {
    let plain = Case::new().load().unwrap();
    assert_eq!(plain.sites.iter().map(|s| s.site).collect::<Vec<_>>(), [0, 1, 2, 3]);
    type Rename = fn(&str) -> String;
    let rules: [(&str, Rename); 7] = [
        ("as saved from a training state", |n| n.replace(".weight", ".default.weight")),
        ("without PEFT's prefix", |n| n.replace("base_model.model.", "")),
        ("without the class's own prefix", |n| n.replace(CLASS, "base_model.model.")),
        ("with a prefix that the checkpoint lacks", |n| {
            n.replace(CLASS, "base_model.model.transformer.model.")
        }),
        ("with another prefix", |n| n.replace(CLASS, "base_model.model.transformer.")),
        ("nested beside a vision tower", |n| n.replace(CLASS, "base_model.model.model.language_model.")),
        ("nested the older way", |n| n.replace(CLASS, "base_model.model.language_model.model.")),
    ];
    for (what, rule) in rules {
        let mut case = Case::new();
        case.rename(rule);
        let weights = case.load().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(summary(&weights, &case.sites), summary(&plain, &case.sites), "{what}");
    }
    // And the model's names without the prefix that the file has, as in BLOOM's checkpoints.
    let mut case = Case::new();
    case.rename(|n| n.replace("base_model.model.model.layers", "base_model.model.transformer.h"));
    for site in &mut case.sites {
        site.name = site.name.replace("model.layers", "h");
    }
    assert_eq!(case.load().unwrap().sites.len(), 4);
}

#[test]
fn patterns_see_the_names_that_peft_sees() {
    let mut case = Case::new();
    case.rename(|n| n.replace(CLASS, "base_model.model.transformer."));
    case.config["target_modules"] = json!(r"transformer\.layers\.\d+\..*_proj");
    assert_eq!(case.load().unwrap().sites.len(), 4);
    case.config["target_modules"] = json!(r"model\.layers\.\d+\..*_proj");
    assert!(case.refusal().contains("does not name"));
}

#[test]
fn dora_magnitudes_come_under_four_names() {
    for suffix in ["", ".weight", ".default", ".default.weight"] {
        let mut case = Case::new();
        case.config["use_dora"] = json!(true);
        if suffix.contains("default") {
            case.rename(|n| n.replace(".weight", ".default.weight"));
        }
        for site in &case.sites {
            let name = format!("base_model.model.{}.lora_magnitude_vector{suffix}", site.name);
            case.tensors.push(tensor(&name, &[site.out_features]));
        }
        let weights = case.load().unwrap_or_else(|e| panic!("{suffix:?}: {e}"));
        assert!(weights.sites.iter().all(|s| s.magnitude.is_some()));

        case.config["use_dora"] = json!(false);
        assert!(case.refusal().contains("`use_dora`"));
        case.config["use_dora"] = json!(true);
        case.tensors.pop();
        assert!(case.refusal().contains("has no `lora_magnitude_vector` beside it"));
        let site = case.sites[3].clone();
        let name = format!("base_model.model.{}.lora_magnitude_vector{suffix}", site.name);
        case.tensors.push(tensor(&name, &[site.out_features + 1]));
        assert!(case.refusal().contains("has the shape [13], but [12] (out_features) is expected"));
    }
}

#[test]
fn half_precision_is_widened_exactly() {
    for (dtype, one_and_a_half) in [(Dtype::F16, 0x3e00u16), (Dtype::BF16, 0x3fc0)] {
        let mut case = Case::new();
        case.tensors[0].1 = dtype;
        case.tensors[0].3 = [one_and_a_half.to_le_bytes(); 16].concat();
        let weights = case.load().unwrap();
        assert_eq!(weights.sites[0].a.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.5; 16]);
        let infinity = if dtype == Dtype::F16 { 0x7c00u16 } else { 0x7f80 };
        case.tensors[0].3[8..10].copy_from_slice(&infinity.to_le_bytes());
        let message = case.refusal();
        assert!(
            message.contains("layers.0.self_attn.q_proj.lora_A.weight` holds inf at element 4"),
            "{message}"
        );
    }
    let mut case = Case::new();
    case.tensors[1].1 = Dtype::F64;
    case.tensors[1].3 = vec![0; 8 * 16];
    assert!(case.refusal().contains("q_proj.lora_B.weight` is of type F64; F32, F16 and BF16 are supported"));
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut case = Case::new();
        case.tensors[7].3[20..24].copy_from_slice(&value.to_le_bytes());
        let message = case.refusal();
        assert!(
            message.contains(&format!("layers.1.mlp.up_proj.lora_B.weight` holds {shown} at element 5")),
            "{message}"
        );
    }
}

#[test]
fn shapes_must_fit_model_and_rank() {
    let mut case = Case::new();
    case.tensors[0] = tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 9]);
    assert_eq!(
        case.refusal(),
        "the tensor `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` has the shape [2, 9], but \
         [2, 8] (rank, in_features) is expected; the adapter was trained on \"some/base\""
    );
    let mut case = Case::new();
    case.tensors[3] = tensor("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", &[2, 12]);
    assert!(case.refusal().contains("has the shape [2, 12], but [12, 2] (out_features, rank)"));
    // Rank 0 in the file, and a rank that the configuration does not give.
    let mut case = Case::new();
    case.tensors[0] = tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[0, 8]);
    assert!(case.refusal().contains("[0, 8], but [2, 8]"));
    let mut case = Case::new();
    case.config["r"] = json!(3);
    case.config["base_model_name_or_path"] = json!(null);
    assert!(
        case.refusal().ends_with("has the shape [2, 8], but [3, 8] (rank, in_features) is expected"),
        "{}",
        case.refusal()
    );
    let mut case = Case::new();
    case.config["rank_pattern"] = json!({"layers.1.mlp.up_proj": 1});
    assert!(case.refusal().contains("layers.1.mlp.up_proj.lora_A.weight` has the shape [2, 8], but [1, 8]"));
    let mut case = Case::new();
    case.tensors[0] = tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[16]);
    assert!(case.refusal().contains("has the shape [16]"));
}

#[test]
fn modules_must_be_the_models_and_the_configurations() {
    // A module that the model lacks.
    let mut case = Case::new();
    case.rename(|n| n.replace("layers.1.mlp.up_proj", "layers.1.mlp.w1"));
    let message = case.refusal();
    assert!(
        message.contains("layers.1.mlp.w1.lora_A.weight` is for a module that this model does not have"),
        "{message}"
    );
    assert!(message.contains("modules named q_proj, up_proj") && message.contains("some/base"), "{message}");
    // A layer that the model lacks.
    let mut case = Case::new();
    case.sites.truncate(2);
    assert!(case.refusal().contains("layers.1.") && case.refusal().contains("does not have"));
    // Another family altogether.
    let mut case = Case::new();
    case.rename(|n| n.replace("model.layers", "decoder.blocks"));
    assert!(case.refusal().contains("does not have"));
    // A model without sites.
    let mut case = Case::new();
    case.sites.clear();
    assert!(case.refusal().contains("no module that an adapter can change"));
    // A module that the configuration does not name.
    let mut case = Case::new();
    case.config["target_modules"] = json!(["q_proj"]);
    assert!(case.refusal().contains("up_proj.lora_A.weight` is for a module that `target_modules`"));
    // Modules that the configuration names and the file lacks.
    let mut case = Case::new();
    case.tensors.truncate(2);
    assert_eq!(
        case.refusal(),
        "adapter_model.safetensors has no tensors for `model.layers.0.mlp.up_proj` and 2 more, which \
         `target_modules` in adapter_config.json names"
    );
    // A name in the list that no model module has: PEFT takes such lists, made for several families.
    let mut case = Case::new();
    case.config["target_modules"] = json!(["q_proj", "up_proj", "query_key_value"]);
    assert_eq!(case.load().unwrap().sites.len(), 4);
    // "all-linear" leaves the head alone.
    let mut case = Case::new();
    case.config["target_modules"] = json!("all-linear");
    case.sites.push(Site { name: "lm_head".into(), in_features: 8, out_features: 32 });
    assert_eq!(case.load().unwrap().sites.len(), 4);
    case.sites.push(Site { name: "model.layers.0.mlp.down_proj".into(), in_features: 12, out_features: 8 });
    assert!(case.refusal().contains("no tensors for `model.layers.0.mlp.down_proj`,"));
}

#[test]
fn halves_and_strangers_are_refused() {
    let mut case = Case::new();
    case.tensors.remove(1);
    assert!(case.refusal().contains("q_proj.lora_A.weight` has no `lora_B` beside it"));
    let mut case = Case::new();
    case.tensors.remove(0);
    assert!(case.refusal().contains("q_proj.lora_B.weight` has no `lora_A` beside it"));

    let strangers = [
        ("base_model.model.lm_head.modules_to_save.weight", "retrained module"),
        ("base_model.model.lm_head.original_module.weight", "retrained module"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapters on embeddings"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "`lora_bias`"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "only lora_A"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_diag.weight", "only lora_A"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", "should end in `.weight`"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.a.b.weight", "should end in `.weight`"),
        ("lora_A.weight", "only lora_A"),
        ("", "only lora_A"),
        ("model.norm.weight", "only lora_A"),
    ];
    for (name, reason) in strangers {
        let mut case = Case::new();
        case.tensors.push(tensor(name, &[2, 8]));
        let message = case.refusal();
        assert!(message.contains(reason) && message.contains(&format!("`{name}`")), "{name}: {message}");
    }

    let mut case = Case::new();
    case.tensors.push(tensor("model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 8]));
    assert!(case.refusal().contains("are for the same place"));
    let mut case = Case::new();
    case.tensors[0].0 = case.tensors[0].0.replace(".weight", ".first.weight");
    case.tensors[1].0 = case.tensors[1].0.replace(".weight", ".second.weight");
    assert!(case.refusal().contains("several adapters"));
    let mut case = Case::new();
    case.tensors.clear();
    assert_eq!(case.refusal(), "adapter_model.safetensors holds no tensors");
}

#[test]
fn damaged_files_are_refused_at_every_length() {
    let case = Case::new();
    let config = case.config.to_string();
    let whole = case.bytes();
    for length in 0..whole.len() {
        let error = load(config.as_bytes(), &whole[..length], &case.sites).expect_err("cut short");
        assert!(matches!(error, PeftError::Corrupt(_)), "{length}: {error}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(load(config.as_bytes(), &longer, &case.sites), Err(PeftError::Corrupt(_))));
    for (at, with) in [(0, [0xff; 8]), (8, *b"garbage!")] {
        let mut damaged = whole.clone();
        damaged[at..at + 8].copy_from_slice(&with);
        let error = load(config.as_bytes(), &damaged, &case.sites).expect_err("damaged");
        assert!(matches!(error, PeftError::Corrupt(_)), "{error}");
    }
    // No byte of the header may bring the reader down.
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            let _ = load(config.as_bytes(), &damaged, &case.sites);
        }
    }
}

#[test]
fn a_duplicated_header_entry_does_not_slip_through() {
    // serde keeps the last of two equal keys; the offsets then leave a hole, which is refused.
    let header = r#"{"base_model.model.x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"base_model.model.x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&[0; 8]);
    let read = read_header(&mut &bytes[..], bytes.len() as u64).unwrap();
    assert!(matches!(read, Err(PeftError::Corrupt(_))));
}

#[test]
fn sites_keep_their_order_whatever_the_file_says() {
    let mut case = Case::new();
    case.tensors.reverse();
    let indices: Vec<usize> = case.load().unwrap().sites.iter().map(|s| s.site).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}
