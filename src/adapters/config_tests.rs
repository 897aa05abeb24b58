//! Tests of [`super`]: PEFT's matching rules, and every field that is refused.

use super::*;
use serde_json::json;

fn with(changes: Value) -> Result<LoraConfig, PeftError> {
    let mut config = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "mlp.down_proj"],
        "bias": "none", "modules_to_save": null, "peft_version": "0.21.2",
    });
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    LoraConfig::parse(config.to_string().as_bytes())
}

fn refusal(changes: Value) -> String {
    with(changes).expect_err("must be refused").to_string()
}

#[test]
fn names_match_as_suffixes_at_a_dot() {
    let config = with(json!({})).unwrap();
    assert!(config.targets_module("model.layers.0.self_attn.q_proj"));
    assert!(config.targets_module("q_proj"));
    assert!(config.targets_module("model.layers.0.mlp.down_proj"));
    assert!(!config.targets_module("model.layers.0.self_attn.seq_proj"));
    assert!(!config.targets_module("model.layers.0.down_proj"));
    assert_eq!(config.target_names(), ["mlp.down_proj", "q_proj"]);
}

#[test]
fn expressions_match_whole_names() {
    let config = with(json!({"target_modules": r".*\.layers\.[01]\..*(q|v)_proj"})).unwrap();
    assert!(config.targets_module("model.layers.1.self_attn.v_proj"));
    assert!(!config.targets_module("model.layers.2.self_attn.v_proj"));
    assert!(!config.targets_module("model.layers.1.self_attn.v_proj.extra"));
    let config = with(json!({"target_modules": "all-linear"})).unwrap();
    assert!(config.targets_module("anything.at.all"));
    let config = with(json!({"target_modules": "All-Linear", "exclude_modules": ["k_proj"]})).unwrap();
    assert!(!config.targets_module("model.layers.0.self_attn.k_proj"));
    assert!(config.targets_module("model.layers.0.self_attn.q_proj"));
}

#[test]
fn excluded_modules_win() {
    let config = with(json!({"exclude_modules": r".*\.layers\.0\..*"})).unwrap();
    assert!(!config.targets_module("model.layers.0.self_attn.q_proj"));
    assert!(config.targets_module("model.layers.1.self_attn.q_proj"));
}

#[test]
fn layers_are_chosen_by_their_first_number() {
    let config = with(json!({"layers_to_transform": [1, 3]})).unwrap();
    assert!(config.targets_module("model.layers.1.self_attn.q_proj"));
    assert!(!config.targets_module("model.layers.0.self_attn.q_proj"));
    assert!(!config.targets_module("model.layers.0.experts.1.q_proj"));
    let config = with(json!({"layers_to_transform": 2, "layers_pattern": ["h", "blocks"]})).unwrap();
    assert!(config.targets_module("transformer.h.2.q_proj"));
    assert!(config.targets_module("blocks.2.q_proj"));
    assert!(!config.targets_module("model.layers.2.q_proj"));
    assert!(refusal(json!({"layers_pattern": "h"})).contains("without `layers_to_transform`"));
    assert!(
        refusal(json!({"layers_to_transform": [0], "target_modules": ".*"})).contains("only with a list")
    );
}

#[test]
fn patterns_choose_rank_and_alpha_in_order() {
    let config = with(json!({
        "rank_pattern": {"layers.1.mlp.down_proj": 6, "down_proj": 2, "^q_proj": 16},
        "alpha_pattern": {"layers\\.[0-9]+\\.mlp\\.down_proj": 3},
    }))
    .unwrap();
    assert_eq!(config.rank_of("model.layers.1.mlp.down_proj"), 6);
    assert_eq!(config.rank_of("model.layers.0.mlp.down_proj"), 2);
    assert_eq!(config.rank_of("model.layers.0.mlp.updown_proj"), 4);
    assert_eq!(config.scale_of("model.layers.1.mlp.down_proj"), 0.5);
    assert_eq!(config.scale_of("model.layers.0.self_attn.q_proj"), 2.0);
    let config = with(json!({"use_rslora": true, "rank_pattern": {"q_proj": 16}})).unwrap();
    assert_eq!(config.scale_of("x.q_proj"), 2.0);
    assert_eq!(config.scale_of("x.v_proj"), 4.0);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let set = [
        ("modules_to_save", json!(["lm_head"])),
        ("lora_bias", json!(true)),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("layer_replication", json!([[0, 4], [2, 5]])),
        ("alora_invocation_tokens", json!([5])),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("arrow_config", json!({"top_k": 2})),
        ("kasa_config", json!({"beta": 1.0})),
        ("monteclora_config", json!({"x": 1})),
        ("megatron_config", json!({"x": 1})),
    ];
    assert_eq!(set.len(), REFUSED.len());
    for (field, value) in set {
        let message = refusal(json!({field: value}));
        assert!(message.contains(&format!("`{field}`")) && message.contains("not supported"), "{message}");
    }
    for unset in [json!(null), json!(false), json!([]), json!({})] {
        for (field, _) in REFUSED {
            with(json!({field: unset})).unwrap();
        }
    }
    for init in ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"] {
        assert!(refusal(json!({"init_lora_weights": init})).contains("path_initial_model"), "{init}");
    }
    for init in [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")] {
        with(json!({"init_lora_weights": init})).unwrap();
    }
    assert!(refusal(json!({"bias": "lora_only"})).contains("`bias`"));
    assert!(refusal(json!({"peft_type": "IA3"})).contains("\"IA3\""));
}

#[test]
fn bad_values_name_their_field() {
    for (field, value) in [
        ("peft_type", json!(null)),
        ("peft_type", json!(3)),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!(4.5)),
        ("r", json!(null)),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(null)),
        ("use_dora", json!("yes")),
        ("use_rslora", json!(1)),
        ("target_modules", json!(null)),
        ("target_modules", json!([])),
        ("target_modules", json!([1])),
        ("target_modules", json!({"q_proj": 1})),
        ("target_modules", json!("(unclosed")),
        ("target_modules", json!("(?!.*vision).*q_proj")),
        ("exclude_modules", json!(7)),
        ("rank_pattern", json!([4])),
        ("rank_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"(": 1})),
        ("layers_to_transform", json!(["0"])),
        ("base_model_name_or_path", json!(["x"])),
    ] {
        let message = refusal(json!({field: value}));
        assert!(message.contains(&format!("`{field}`")), "{field} = {value}: {message}");
    }
    for text in ["", "{", "[]", "{\"r\": NaN}", "\u{feff}{}"] {
        assert!(matches!(LoraConfig::parse(text.as_bytes()), Err(PeftError::ConfigSyntax(_))), "{text:?}");
    }
    assert!(matches!(LoraConfig::parse(&[0xff, 0xfe]), Err(PeftError::ConfigSyntax(_))));
}

#[test]
fn fields_from_the_future_are_told() {
    let config = with(json!({"use_newlora": true, "other": null})).unwrap();
    assert_eq!(config.unknown, ["use_newlora"]);
}
