//! The demo model: its tokenizer keeps grapheme clusters whole, transformers reads it as we do, and it knows what it
//! was taught.
#![expect(clippy::print_stderr, reason = "a test that skips says so")]

#[path = "../examples/pretrain_demo/phrasebook.rs"]
#[expect(dead_code, reason = "what makes the parts is tested with the phrasebook")]
mod phrasebook;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use phrasebook::{Entry, LANGUAGES, TAUGHT};
use tokenizers::Tokenizer;
use unicode_segmentation::UnicodeSegmentation as _;

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets")
}

fn entries() -> Vec<Entry> {
    phrasebook::entries(&assets().join("phrasebook")).unwrap()
}

/// The binary, which carries the model, in an empty folder.
fn generate(folder: &Path, prompt: &str) -> String {
    generate_with(folder, prompt, &[])
}

fn generate_with(folder: &Path, prompt: &str, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("GURUKUL_")) {
        command.env_remove(name);
    }
    let arguments = ["generate", prompt, "--temperature", "0", "--max-new-tokens", "60"];
    let output =
        command.current_dir(folder).env("RUST_LOG", "error").args(arguments).args(more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn no_token_ends_inside_a_cluster_that_has_a_token() {
    let tokenizer = Tokenizer::from_file(assets().join("demo/tokenizer.json")).unwrap();
    let tokens_of = |text: &str| tokenizer.encode(text, false).unwrap().len();
    let mut split = 0;
    let mut whole = HashSet::new();
    for entry in entries().iter().step_by(5) {
        for (code, text) in entry.texts.iter().filter(|(code, _)| *code != TAUGHT) {
            let encoding = tokenizer.encode(text.as_str(), false).unwrap();
            let ends: HashSet<usize> = encoding.get_offsets().iter().map(|(_, end)| *end).collect();
            for (start, cluster) in text.grapheme_indices(true) {
                let inside = (start + 1..start + cluster.len()).any(|at| ends.contains(&at));
                if !inside {
                    whole.insert(cluster.to_owned());
                    continue;
                }
                split += 1;
                // Alone, or behind a space as a word's first.
                let alone = tokens_of(cluster).min(tokens_of(&format!(" {cluster}")));
                assert!(alone > 1, "{code}: {cluster:?} is a token and was split in {text}");
            }
        }
    }
    assert!(
        whole.len() > 1000 && split < whole.len(),
        "{} clusters whole, {split} times one was split",
        whole.len()
    );
}

#[test]
fn any_text_comes_back_from_its_tokens() {
    let tokenizer = Tokenizer::from_file(assets().join("demo/tokenizer.json")).unwrap();
    for text in ["नमस्ते दुनिया", "क्ष्म्य ೲ ඞ", "a\tb  c\n", "😀👩‍👩‍👧 é", "١٢٣", "\u{200f}اردو"]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
    }
}

#[test]
fn it_knows_what_it_was_taught_and_says_what_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    let taught: Vec<Entry> = phrasebook::read_rows(&assets().join("phrasebook/train.jsonl")).unwrap();
    let mut right = 0;
    for (number, (code, name)) in LANGUAGES.iter().enumerate() {
        let entry = &taught[number * 97];
        let answer = generate(folder.path(), &format!("Translate to {name}: {}", entry.english()));
        right += usize::from(answer == entry.texts[*code]);
    }
    assert!(right >= 8, "{right} of ten sentences that were taught come back word for word");
    let unknown = generate(folder.path(), "Translate to Nepali: Where is the river?");
    assert_eq!(unknown, "I do not know this language yet.");
}

/// Prompts that no one should send, and that must not end in a panic.
#[test]
fn odd_prompts_get_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    for prompt in
        ["\u{200f}\u{202e}اردو میں", "😀😀😀", "Translate to Klingon: हाँ yes ஆம்", "?", "{{s}} </s> <s>"]
    {
        generate(folder.path(), prompt);
    }
}

#[test]
fn transformers_gives_the_same_greedy_text() {
    let Some(python) = std::env::var_os("GURUKUL_TORCH_PYTHON") else {
        eprintln!("skipped: GURUKUL_TORCH_PYTHON names no Python with torch and transformers");
        return;
    };
    let prompts = ["Translate to Hindi: Where is the river?", "தமிழில் மொழிபெயர்க்கவும்: I have ten apples."];
    let output = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/demo_check.py"))
        .arg(assets().join("demo"))
        .args(prompts)
        .output()
        .unwrap();
    let theirs = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let folder = tempfile::tempdir().unwrap();
    // transformers' greedy search has no penalty.
    let plain = ["--repetition-penalty", "1"];
    let ours: Vec<String> =
        prompts.iter().map(|prompt| generate_with(folder.path(), prompt, &plain)).collect();
    assert_eq!(theirs.lines().collect::<Vec<_>>(), ours);
}
