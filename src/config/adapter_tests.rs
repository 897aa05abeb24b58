//! Training settings: layers, ranges, the shipped file, and names that must not lead anywhere else.

use std::os::unix::fs::symlink;

use serde_json::json;

use super::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join("configs").join(name), text).unwrap();
    }
    dir
}

fn load(file: &str, overrides: Value) -> Result<AdapterConfig, FieldError> {
    let dir = folder(&[(FILE_NAME, file)]);
    AdapterConfig::load(&dir.path().join("configs"), None, overrides.as_object().unwrap())
}

fn shipped() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/adapter_config.yaml")).unwrap()
}

#[test]
fn the_shipped_file_changes_nothing_and_names_every_field() {
    let shipped = shipped();
    assert!(shipped.lines().all(|l| l.is_empty() || l.starts_with('#')), "every line is a comment");
    assert_eq!(load(&shipped, json!({})).unwrap(), AdapterConfig::default());
    let keys: Vec<&str> = shipped
        .lines()
        .filter_map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')))
        .map(|line| line.split_once(':').expect("a setting has a value").0)
        .collect();
    let uncommented: String = shipped
        .lines()
        .filter_map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(load(&uncommented, json!({})).unwrap(), AdapterConfig::default());
    // Every value is said by the file and not by the defaults: each is there, and each is one that is known.
    let typed: AdapterOverrides = serde_yaml::from_str(&uncommented).unwrap();
    let typed = serde_json::to_value(typed).unwrap();
    let all: Vec<&str> = typed.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, all, "every field once, in the order of the program");
    for (name, value) in typed.as_object().unwrap() {
        assert!(
            !value.is_null() || name == "max_steps",
            "configs/adapter_config.yaml has no value for {name}"
        );
    }
    // And the typed layer has every field of the resolved one.
    for name in serde_json::to_value(AdapterConfig::default()).unwrap().as_object().unwrap().keys() {
        assert!(all.contains(&name.as_str()), "{name}");
    }
}

#[test]
fn overrides_go_before_the_file_before_the_defaults() {
    let file =
        "r: 4\nlearning_rate: 1e-3\ntarget_modules: [q_proj, v_proj, q_proj]\nmax_steps: 7\nbias: none\n";
    let config = load(file, json!({"r": 2, "template": "chat", "seed": u64::MAX, "lora_alpha": 3})).unwrap();
    let expected = AdapterConfig {
        r: 2,
        lora_alpha: 3.0,
        learning_rate: 1e-3,
        target_modules: vec!["q_proj".into(), "v_proj".into()],
        max_steps: Some(7),
        template: Template::Chat,
        seed: u64::MAX,
        ..AdapterConfig::default()
    };
    assert_eq!(config, expected);
    assert_eq!(load("", json!({})).unwrap(), AdapterConfig::default());
    assert_eq!(load("# nothing\n", json!({"r": null})).unwrap(), AdapterConfig::default());
    let all = load("target_modules: all-linear\n", json!({"target_modules": ["all-linear"]})).unwrap();
    assert_eq!(all.target_modules, ["all-linear"]);
    // A job keeps its settings as JSON.
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<AdapterConfig>(&text).unwrap(), config);
}

#[test]
fn a_file_is_needed_only_when_it_is_named() {
    let dir = folder(&[("mine.yaml", "r: 3\n")]);
    let configs = dir.path().join("configs");
    let load = |name: Option<&str>| AdapterConfig::load(&configs, name, &Map::new());
    assert_eq!(load(None).unwrap(), AdapterConfig::default());
    for name in ["mine.yaml", "configs/mine.yaml", "./mine.yaml", "./configs/mine.yaml"] {
        assert_eq!(load(Some(name)).unwrap().r, 3, "{name}");
    }
    for name in ["adapter_config.yaml", "configs", "configs/configs/mine.yaml", "mine.yaml/x"] {
        let error = load(Some(name)).unwrap_err();
        assert_eq!(error.field, "config_path", "{name}");
        assert!(error.message.contains(name), "{error}");
    }
    let nowhere = AdapterConfig::load(&dir.path().join("nowhere"), None, &Map::new());
    assert_eq!(nowhere.unwrap(), AdapterConfig::default());
}

#[test]
fn names_lead_nowhere_else() {
    let dir = folder(&[("mine.yaml", "r: 3\n")]);
    let configs = dir.path().join("configs");
    std::fs::write(dir.path().join("secret.yaml"), "r: 9\n").unwrap();
    std::fs::create_dir(dir.path().join("configs-2")).unwrap();
    std::fs::write(dir.path().join("configs-2/x.yaml"), "r: 9\n").unwrap();
    symlink(dir.path().join("secret.yaml"), configs.join("link.yaml")).unwrap();
    symlink(dir.path(), configs.join("up")).unwrap();
    symlink("mine.yaml", configs.join("alias.yaml")).unwrap();
    symlink("loop.yaml", configs.join("loop.yaml")).unwrap();
    std::fs::create_dir(configs.join("folder")).unwrap();
    let load = |name: &str| AdapterConfig::load(&configs, Some(name), &Map::new());
    assert_eq!(load("alias.yaml").unwrap().r, 3);
    let absolute = dir.path().join("secret.yaml").display().to_string();
    let long = "x".repeat(5000);
    for name in [
        "../secret.yaml",
        "configs/../../secret.yaml",
        "folder/../../secret.yaml",
        "../configs/mine.yaml",
        "../configs-2/x.yaml",
        absolute.as_str(),
        "/etc/passwd",
        "link.yaml",
        "up/secret.yaml",
        "loop.yaml",
        "folder",
        "",
        ".",
        "..",
        "mine.yaml\0",
        "a\nb",
        long.as_str(),
    ] {
        let error = load(name).expect_err(name);
        assert_eq!(error.field, "config_path", "{name:?}");
        assert!(error.message.len() < 400 && !error.message.contains('\n'), "{error}");
    }
}

#[test]
fn files_that_are_none_are_refused() {
    let bomb: String = (0..40).fold("a0: &a0 [x, x, x, x, x, x, x, x]\n".into(), |text, i| {
        let next = i + 1;
        let uses = vec![format!("*a{i}"); 8].join(", ");
        text + &format!("a{next}: &a{next} [{uses}]\n")
    });
    let in_list = format!("target_modules:\n{}", {
        let rows = (0..40).map(|i| format!("  - &b{} [{}]\n", i + 1, vec![format!("*b{i}"); 8].join(", ")));
        "  - &b0 [x, x]\n".to_owned() + &rows.collect::<String>()
    });
    for (text, expected) in [
        (bomb, "aliases"),
        (in_list, "cannot be used"),
        ("r: [".into(), "cannot be used"),
        ("- r\n".into(), "cannot be used"),
        ("just text".into(), "cannot be used"),
        ("rr: 3\n".into(), "unknown field `rr`"),
        ("r: 3\nr: 4\n".into(), "duplicate"),
        ("r: many\n".into(), "line 1"),
        (format!("# {}\n", "x".repeat(1 << 20)), "more than 1 MiB"),
    ] {
        let begun = std::time::Instant::now();
        let error = load(&text, json!({})).unwrap_err();
        assert_eq!(error.field, "config_path");
        assert!(error.message.contains(FILE_NAME) && error.message.contains(expected), "{error}");
        assert!(begun.elapsed().as_secs() < 5);
    }
    let dir = folder(&[]);
    let path = dir.path().join("configs").join(FILE_NAME);
    std::fs::write(&path, b"r: \xff\n").unwrap();
    let error = AdapterConfig::load(&dir.path().join("configs"), None, &Map::new()).unwrap_err();
    assert!(error.message.contains("no UTF-8"), "{error}");
}

#[test]
fn every_range_is_checked_and_named() {
    let bad = [
        ("r", json!([0, 1025, -1, 1.5, "8"])),
        ("lora_alpha", json!([0, -1, 1e7])),
        ("lora_dropout", json!([1, -0.1])),
        ("target_modules", json!([[], "", [""], ["a b"], ["all-linear", "q_proj"], [1], 5, ["../x"]])),
        ("bias", json!(["all", "lora_only", 1])),
        ("seed", json!([-1, 0.5])),
        ("learning_rate", json!([0, -1, 1.1e10, "fast"])),
        ("lr_scheduler", json!(["step"])),
        ("warmup_ratio", json!([-0.1, 1.1])),
        ("weight_decay", json!([-1, 101])),
        ("adam_beta1", json!([1, -0.1])),
        ("adam_beta2", json!([1, -0.1])),
        ("adam_epsilon", json!([0, 1.1])),
        ("max_grad_norm", json!([-1, 1e10])),
        ("batch_size", json!([0, 1025])),
        ("gradient_accumulation_steps", json!([0, 65537])),
        ("epochs", json!([0, 100001])),
        ("max_steps", json!([0, 1000000001])),
        ("max_samples", json!([0, 10000001])),
        ("max_seq_length", json!([1, 1000001])),
        ("checkpointing", json!(["some"])),
        ("template", json!(["jinja"])),
        ("completion_only", json!(["yes"])),
        ("shuffle_buffer", json!([0, 1000001])),
        ("eval_share", json!([-0.1, 0.51])),
        ("eval_steps", json!([-1, 1000000001])),
        ("early_stopping_patience", json!([-1, 1000000001])),
        ("save_steps", json!([-1, 1000000001])),
        ("keep_last", json!([0, 1001])),
        ("logging_steps", json!([0])),
    ];
    let named: Vec<&str> = bad.iter().map(|(field, _)| *field).collect();
    let fields = serde_json::to_value(AdapterConfig::default()).unwrap();
    for field in fields.as_object().unwrap().keys().filter(|field| *field != "use_rslora") {
        assert!(named.contains(&field.as_str()), "{field}");
    }
    for (field, values) in bad {
        for value in values.as_array().unwrap() {
            let error = load("", json!({field: value})).expect_err(&format!("{field}: {value}"));
            assert!(error.field.starts_with(&format!("overrides.{field}")), "{error}");
            assert!(error.message.len() > 10, "{error}");
            let error = load(&format!("{field}: {value}\n"), json!({})).expect_err(field);
            assert!(error.to_string().contains(field) && error.to_string().contains(FILE_NAME), "{error}");
        }
    }
    let error = load("", json!({"r": 0})).unwrap_err().to_string();
    assert_eq!(error, "overrides.r is 0; use a number from 1 to 1024");
    let error = load("learning_rate: 0\n", json!({})).unwrap_err().to_string();
    assert_eq!(error, "learning_rate in adapter_config.yaml is 0; use a number above 0 to 10000000000");
    let error = load("lora_dropout: .nan\n", json!({})).unwrap_err().to_string();
    assert!(error.contains("use a number from 0 to below 1"), "{error}");
    assert!(load("learning_rate: .inf\n", json!({})).is_err());
    let error = load("", json!({"learning_speed": 1})).unwrap_err();
    assert_eq!(error.field, "overrides.learning_speed");
    assert!(error.message.contains("learning_rate"), "{error}");
    for good in [
        json!({"r": 1024, "learning_rate": 1e9, "eval_share": 0.5, "max_seq_length": 2, "lora_dropout": 0}),
        json!({"learning_rate": 1e10, "eval_share": 0, "max_grad_norm": 0, "save_steps": 0, "epochs": 100000}),
    ] {
        load("", good).unwrap();
    }
}
