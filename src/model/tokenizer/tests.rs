//! Tokenizers: against transformers' own ids and texts (`parity`), and against files that are not as they
//! should be.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;

/// The folder of reference data: `$GURUKUL_PARITY_DIR`, or the copy in the repository.
fn parity_root() -> PathBuf {
    std::env::var_os("GURUKUL_PARITY_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity"), PathBuf::from)
}

/// Every folder with tokenizer samples, by the name of its style.
pub(crate) fn parity_styles() -> Vec<(String, PathBuf)> {
    let root = parity_root().join("tokenizers");
    let entries = std::fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut styles: Vec<(String, PathBuf)> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("samples.json").exists())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path))
        .collect();
    styles.sort();
    assert!(!styles.is_empty(), "{} holds no samples", root.display());
    styles
}

pub(crate) fn samples(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("samples.json")).unwrap()).unwrap()
}

pub(crate) fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The repository's sentencepiece-like tokenizer as JSON, to be changed.
pub(crate) fn spm_json() -> Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tokenizers/spm");
    serde_json::from_slice(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap()
}

pub(crate) fn from_json(tokenizer: &Value) -> anyhow::Result<Tokenizer> {
    Tokenizer::from_parts(&serde_json::to_vec(tokenizer).unwrap(), None, None)
}

fn with_config(config: Value) -> anyhow::Result<Tokenizer> {
    let tokenizer = serde_json::to_vec(&spm_json()).unwrap();
    Tokenizer::from_parts(&tokenizer, Some(&serde_json::to_vec(&config).unwrap()), None)
}

#[test]
fn parity_samples_encode_and_decode() {
    for (style, dir) in parity_styles() {
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let samples = samples(&dir);
        let rows = samples["samples"].as_array().unwrap();
        assert!(!rows.is_empty(), "{style} has no samples");
        for row in rows {
            let (text, ids) = (row["text"].as_str().unwrap(), ids_of(&row["ids"]));
            assert_eq!(tokenizer.encode(text, AddSpecial::No).unwrap(), ids, "{style}: {text}");
            let special = tokenizer.encode(text, AddSpecial::Yes).unwrap();
            assert_eq!(special, ids_of(&row["ids_special"]), "{style}: {text}");
            assert_eq!(tokenizer.decode(&ids, Special::Skip).unwrap(), row["decoded"], "{style}: {text}");
            let kept = tokenizer.decode(&ids, Special::Keep).unwrap();
            assert_eq!(kept, row["decoded_keep_special"], "{style}: {text}");
        }
    }
}

#[test]
fn parity_chats_render_and_encode() {
    for (style, dir) in parity_styles() {
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let chat = &samples(&dir)["chat"];
        let messages: Vec<_> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| crate::model::chat_template::Message {
                role: message["role"].as_str().unwrap().into(),
                content: message["content"].as_str().unwrap().into(),
            })
            .collect();
        let template = tokenizer.chat_template().expect("the fixtures have chat templates");
        let rendered =
            template.render(&messages, crate::model::chat_template::GenerationPrompt::Add).unwrap();
        assert_eq!(rendered, chat["rendered"], "{style}");
        assert_eq!(tokenizer.encode(&rendered, AddSpecial::No).unwrap(), ids_of(&chat["ids"]), "{style}");
    }
}

#[test]
fn parity_families_have_tokenizers_that_load() {
    let mut families = 0;
    for entry in std::fs::read_dir(parity_root()).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("tokenizer.json").exists() {
            continue;
        }
        families += 1;
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let text_config = config.get("text_config").unwrap_or(&config);
        let rows = text_config["vocab_size"].as_u64().unwrap() as usize;
        assert!(tokenizer.vocab_size() <= rows, "{}: {} > {rows}", dir.display(), tokenizer.vocab_size());
        for id in [tokenizer.bos_token_id(), tokenizer.eos_token_id(), tokenizer.pad_token_id()] {
            assert!(id.is_some_and(|id| (id as usize) < rows), "{}", dir.display());
        }
    }
    assert!(families > 0, "{} holds no model folder", parity_root().display());
}

#[test]
fn pieces_and_roles_by_id_and_by_name() {
    let tokenizer =
        with_config(json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null}))
            .unwrap();
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));
    assert_eq!(tokenizer.pad_token_id(), None);
    assert_eq!(tokenizer.token(14).as_deref(), Some("<0x0A>"));
    assert_eq!(tokenizer.token_id("<0x0A>"), Some(14));
    assert_eq!((tokenizer.token(4_000_000), tokenizer.token_id("no such token")), (None, None));
    assert_eq!(tokenizer.vocab_size(), 512);
    assert_eq!(tokenizer.decode(&[4_000_000], Special::Keep).unwrap(), "");
    assert_eq!(tokenizer.decode(&[1, 2], Special::Keep).unwrap(), "<s></s>");
    assert_eq!(tokenizer.decode(&[1, 2], Special::Skip).unwrap(), "");
    assert!(tokenizer.chat_template().is_none());
}

#[test]
fn the_post_processor_alone_decides_what_is_added() {
    // As transformers 5 does where there is a tokenizer.json.
    let mut json = spm_json();
    json["post_processor"] = Value::Null;
    let bytes = serde_json::to_vec(&json).unwrap();
    let config =
        br#"{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true}"#;
    let plain = Tokenizer::from_parts(&bytes, Some(config), None).unwrap();
    assert_eq!(plain.encode("a", AddSpecial::Yes).unwrap(), plain.encode("a", AddSpecial::No).unwrap());
    let with_bos = with_config(json!({"bos_token": "<s>", "add_bos_token": false})).unwrap();
    assert_eq!(with_bos.encode("a", AddSpecial::Yes).unwrap()[0], 1);
}

#[test]
fn truncation_and_padding_are_off() {
    let mut json = spm_json();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
    let text = "The teacher opened the school.";
    let expected = from_json(&spm_json()).unwrap().encode(text, AddSpecial::Yes).unwrap();
    assert!(expected.len() > 4 && expected.len() < 64);
    assert_eq!(from_json(&json).unwrap().encode(text, AddSpecial::Yes).unwrap(), expected);
}

#[test]
fn tokens_that_only_the_configuration_declares() {
    let tokenizer =
        with_config(json!({"added_tokens_decoder": {"512": {"content": "<|end|>", "special": true}}}))
            .unwrap();
    assert_eq!(tokenizer.vocab_size(), 513);
    assert_eq!(tokenizer.token_id("<|end|>"), Some(512));
    assert_eq!(tokenizer.encode("<|end|>", AddSpecial::No).unwrap(), [512]);
    assert_eq!(tokenizer.decode(&[512], Special::Skip).unwrap(), "");

    let wrong =
        with_config(json!({"added_tokens_decoder": {"9000": {"content": "<|end|>", "special": true}}}));
    let error = format!("{:#}", wrong.err().unwrap());
    assert!(error.contains("9000") && error.contains("<|end|>"), "{error}");

    // A plain piece of the vocabulary that the configuration names as the end of a text becomes special.
    let piece = from_json(&spm_json()).unwrap().token(300).unwrap();
    let tokenizer = with_config(json!({"eos_token": piece})).unwrap();
    assert_eq!(tokenizer.eos_token_id(), Some(300));
    assert_eq!(tokenizer.decode(&[300], Special::Skip).unwrap(), "");
}

#[test]
fn the_default_of_named_templates_is_taken() {
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"},
    ]});
    let render = |tokenizer: &Tokenizer| {
        let template = tokenizer.chat_template().unwrap();
        template.render(&[], crate::model::chat_template::GenerationPrompt::Omit).unwrap()
    };
    assert_eq!(render(&with_config(named.clone()).unwrap()), "plain");
    let tokenizer = serde_json::to_vec(&spm_json()).unwrap();
    let config = serde_json::to_vec(&named).unwrap();
    let of_file = Tokenizer::from_parts(&tokenizer, Some(&config), Some("of the file")).unwrap();
    assert_eq!(render(&of_file), "of the file");
    let no_default = json!({"chat_template": [{"name": "tool_use", "template": "tools"}]});
    assert!(with_config(no_default).unwrap().chat_template().is_none());
}

#[test]
fn a_folder_is_read_with_its_optional_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("tokenizer.json", &spm_json().to_string());
    let plain = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((plain.eos_token_id(), plain.chat_template().is_none()), (None, true));
    write("special_tokens_map.json", r#"{"eos_token": {"content": "</s>"}}"#);
    write("chat_template.json", r#"{"chat_template": "{{ eos_token }}"}"#);
    let legacy = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(legacy.eos_token_id(), Some(2));
    let omit = crate::model::chat_template::GenerationPrompt::Omit;
    assert_eq!(legacy.chat_template().unwrap().render(&[], omit).unwrap(), "</s>");
    write("chat_template.jinja", "newer");
    let newer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(newer.chat_template().unwrap().render(&[], omit).unwrap(), "newer");
}

#[test]
fn bad_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let refused = || format!("{:#}", Tokenizer::from_dir(dir.path()).err().unwrap());
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    assert!(refused().contains("no tokenizer.json"), "{}", refused());
    let whole = spm_json().to_string();
    for bad in [&whole.as_bytes()[..whole.len() / 2], b"", b"{}", b"\xff\xfe", b"[1, 2]"] {
        write("tokenizer.json", bad);
        assert!(refused().contains("tokenizer.json cannot be read"), "{}", refused());
    }
    write("tokenizer.json", whole.as_bytes());
    write("tokenizer_config.json", b"{\"eos_token\": 5}");
    assert!(refused().contains("eos_token in tokenizer_config.json"), "{}", refused());
    write("tokenizer_config.json", b"{\"eos_token\":");
    assert!(refused().contains("tokenizer_config.json is not valid"), "{}", refused());
    write("tokenizer_config.json", b"{}");
    write("special_tokens_map.json", b"nonsense");
    assert!(refused().contains("special_tokens_map.json is not valid"), "{}", refused());
    write("special_tokens_map.json", b"{}");
    write("chat_template.jinja", b"{% for m in messages %}");
    let error = refused();
    assert!(error.contains("chat template") && error.contains("malformed"), "{error}");
    write("chat_template.jinja", b"\xff");
    assert!(refused().contains("chat_template.jinja is not UTF-8"), "{}", refused());
}

#[test]
fn a_decoder_that_strips_ends_is_refused() {
    let mut json = spm_json();
    json["decoder"] = json!({"type": "Strip", "content": " ", "start": 0, "stop": 1});
    let error = format!("{:#}", from_json(&json).err().unwrap());
    assert!(error.contains("Strip"), "{error}");
}
