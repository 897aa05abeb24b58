//! The phrasebook keeps its promises: complete, in the right scripts, nothing twice, nothing of what is examined
//! among what is taught.

#[path = "../examples/pretrain_demo/phrasebook.rs"]
mod phrasebook;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use gurukul::text::language::Language;
use phrasebook::{Entry, LANGUAGES, TAUGHT};

/// What may stand between letters: spaces, marks of every script that is used, the joiner of Telugu and Kannada.
const MARKS: &str = " .?!,-।،۔؟\u{200c}";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/phrasebook")
}

fn part(name: &str) -> Vec<Entry> {
    phrasebook::read_rows(&folder().join(name)).unwrap()
}

fn smoke_sentences() -> BTreeSet<String> {
    let text = include_str!("../test_prompts/prompts_10.json");
    let prompts: Vec<BTreeMap<String, String>> = serde_json::from_str(text).unwrap();
    prompts.iter().map(|prompt| prompt["prompt"].split_once(": ").unwrap().1.to_owned()).collect()
}

fn codes() -> Vec<&'static str> {
    LANGUAGES.iter().map(|(code, _)| *code).chain([TAUGHT]).collect()
}

#[test]
fn its_parts_are_what_sentences_and_frames_make() {
    for (name, text) in phrasebook::parts(&folder(), &smoke_sentences()).unwrap() {
        let found = std::fs::read_to_string(folder().join(name)).unwrap();
        assert!(
            found == text,
            "{name} is not up to date; run cargo run --release --example pretrain_demo -- --phrasebook-only"
        );
    }
}

#[test]
fn every_language_has_every_sentence() {
    let all: Vec<Entry> = [part("train.jsonl"), part("heldout.jsonl")].concat();
    let written = all.iter().filter(|entry| entry.frame.is_none()).count();
    assert!(written >= 400, "{written} sentences are written out");
    assert!(all.len() >= 1500, "{} pairs a language", all.len());
    for entry in &all {
        for code in codes() {
            let text = entry.texts.get(code).unwrap_or_else(|| panic!("{}: no {code}", entry.english()));
            let script = code.parse::<Language>().unwrap().script();
            let letters = text.chars().filter(|c| !MARKS.contains(*c));
            assert!(letters.clone().count() > 1, "{}: {code} is {text:?}", entry.english());
            for c in letters {
                assert!(script.contains(c), "{}: {c:?} in {code}: {text}", entry.english());
            }
        }
        assert_eq!(entry.texts.len(), codes().len() + 1, "{}", entry.english());
        assert!(
            entry.english().is_ascii() && entry.english().ends_with(['.', '?', '!']),
            "{}",
            entry.english()
        );
    }
}

#[test]
fn nothing_stands_there_twice() {
    let all: Vec<Entry> = [part("train.jsonl"), part("heldout.jsonl")].concat();
    let mut seen = BTreeSet::new();
    for entry in &all {
        for (code, text) in &entry.texts {
            assert!(seen.insert((code.clone(), text.clone())), "{code}: {text}");
        }
    }
}

#[test]
fn nothing_that_is_examined_is_taught() {
    let (train, held_out) = (part("train.jsonl"), part("heldout.jsonl"));
    let share = held_out.len() as f64 / (train.len() + held_out.len()) as f64;
    assert!((0.08..0.12).contains(&share), "{share} is held out");
    let taught: BTreeSet<&str> = train.iter().map(Entry::english).collect();
    for sentence in held_out.iter().map(|e| e.english().to_owned()).chain(smoke_sentences()) {
        assert!(!taught.contains(sentence.as_str()), "{sentence}");
    }
    assert!(train.iter().all(|entry| !entry.is_held_out()) && held_out.iter().all(Entry::is_held_out));
}
