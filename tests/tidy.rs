//! Rules of the repository that no compiler knows: heads and lengths of files, which module may import which,
//! no large files in the tree. Reads files and knows nothing of the crate. Each rule is shown to fail on a bad
//! sample.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that a source file may have.
const MAX_LINES: usize = 600;

/// Longer files, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Bytes that a file in the tree may have.
const MAX_BYTES: u64 = 1_000_000;

/// Where larger files belong.
const LARGE_FILES: &[&str] = &["tests/fixtures", "assets/demo", "assets/phrasebook"];

/// What each module at the top may import, as DESIGN says: downward only.
const IMPORTS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    (
        "cli",
        &[
            "app", "config", "adapters", "data", "engine", "jobs", "metrics", "model", "nn", "rl", "text",
            "train",
        ],
    ),
    ("app", &["http", "config", "adapters", "data", "engine", "jobs", "metrics", "model", "rl", "train"]),
    ("http", &["adapters", "config", "data", "engine", "jobs", "metrics", "model", "rl", "text", "train"]),
    ("rl", &["adapters", "config", "data", "engine", "jobs", "metrics", "model", "nn", "text", "train"]),
    ("train", &["adapters", "config", "data", "engine", "metrics", "model", "nn", "text"]),
    ("jobs", &["metrics"]),
    // Settings resolve to the types of what they set.
    ("config", &["data", "engine", "model", "nn", "text"]),
    ("adapters", &["engine", "metrics", "model", "nn"]),
    ("engine", &["metrics", "model", "nn"]),
    ("model", &["nn"]),
    ("nn", &[]),
    ("data", &["text"]),
    ("text", &[]),
    ("metrics", &[]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files under a folder, by their paths from the repository's root.
fn files(folder: &Path, skip: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let entry = entry.unwrap();
        let path = entry.path();
        let relative = path.strip_prefix(root()).unwrap();
        // Links are not followed: what they lead to is not in the tree.
        let kind = entry.file_type().unwrap();
        if skip(relative) {
            continue;
        } else if kind.is_dir() {
            found.extend(files(&path, skip));
        } else if kind.is_file() {
            found.push(relative.to_owned());
        }
    }
    found
}

fn sources(folder: &str) -> Vec<(String, String)> {
    let folder = root().join(folder);
    if !folder.is_dir() {
        return Vec::new();
    }
    let rust =
        files(&folder, &|_| false).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    rust.map(|path| {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        (path.to_str().unwrap().replace('\\', "/"), text)
    })
    .collect()
}

fn assert_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

// ---- heads and lengths

fn bad_head(path: &str, text: &str) -> Option<String> {
    (!text.starts_with("//! ")).then(|| format!("{path}: does not open with `//!` and what the file is"))
}

fn too_long(path: &str, text: &str, exceptions: &[(&str, &str)]) -> Option<String> {
    let lines = text.lines().count();
    let excused = exceptions.iter().any(|(file, _)| *file == path);
    match (lines > MAX_LINES, excused) {
        (true, false) => Some(format!("{path}: {lines} lines; split it, or give a reason in LONG_FILES")),
        (false, true) => Some(format!("{path}: {lines} lines; it needs no place in LONG_FILES")),
        _ => None,
    }
}

#[test]
fn every_source_file_says_what_it_is() {
    let all = ["src", "tests", "benches", "examples"].into_iter().flat_map(sources);
    assert_none(all.filter_map(|(path, text)| bad_head(&path, &text)).collect());
}

#[test]
fn source_files_have_a_length_that_can_be_read() {
    assert!(LONG_FILES.iter().all(|(path, reason)| root().join(path).is_file() && reason.len() > 10));
    let all = ["src", "tests", "benches", "examples"].into_iter().flat_map(sources);
    assert_none(all.filter_map(|(path, text)| too_long(&path, &text, LONG_FILES)).collect());
}

#[test]
fn bad_heads_and_lengths_are_found() {
    assert!(bad_head("a.rs", "use std::fs;\n").is_some());
    assert!(bad_head("a.rs", "// a comment\n").is_some());
    assert!(bad_head("a.rs", "").is_some());
    assert!(bad_head("a.rs", "//! What it is.\n").is_none());
    let long = "x\n".repeat(MAX_LINES + 1);
    assert!(too_long("a.rs", &long, &[]).is_some());
    assert!(too_long("a.rs", &long, &[("a.rs", "a table")]).is_none());
    assert!(too_long("a.rs", "x\n", &[("a.rs", "a table")]).is_some());
    assert!(too_long("a.rs", "x\n", &[]).is_none());
}

// ---- imports between modules at the top

/// The module at the top that a file belongs to: `engine` for `src/engine/run.rs`.
fn top_module(path: &str) -> &str {
    let inside = path.strip_prefix("src/").expect("a path in src");
    inside.split('/').next().expect("a path has a first part").trim_end_matches(".rs")
}

/// How many modules a file is deep: 1 for `src/app.rs` and `src/http/mod.rs`, 2 for `src/http/sse.rs`.
fn depth(path: &str) -> usize {
    path.trim_end_matches("/mod.rs").matches('/').count()
}

/// The first identifier of each path that begins at the crate's root, whichever way it is written.
fn imported(path: &str, text: &str, own_children: &BTreeSet<String>) -> BTreeSet<String> {
    let code: String =
        text.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect();
    let identifier = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    };
    let mut found = BTreeSet::new();
    for (start, _) in code.match_indices("crate::") {
        // `$crate::` and `gurukul_crate::` are something else.
        if code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = code[start + "crate::".len()..].trim_start();
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(identifier(rest));
            continue;
        };
        // `crate::{a, b::{c, d}, e}`: the identifiers at the group's own level.
        let mut level = 1;
        let mut expects = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => level += 1,
                '}' => level -= 1,
                ',' if level == 1 => expects = true,
                c if level == 1 && expects && !c.is_whitespace() => {
                    found.insert(identifier(&group[at..]));
                    expects = false;
                }
                _ => {}
            }
            if level == 0 {
                break;
            }
        }
    }
    // `super::super::engine` from `src/http/sse.rs`. Inside a file's own inner modules the same words mean a
    // child of the file, so a name that a child has does not count.
    let step = "super::";
    let mut rest = code.as_str();
    while let Some(start) = rest.find(step) {
        let chain = &rest[start..];
        let mut after = chain;
        let mut steps = 0;
        while let Some(next) = after.strip_prefix(step) {
            (after, steps) = (next, steps + 1);
        }
        let name = identifier(after);
        if steps >= depth(path) && !own_children.contains(&name) {
            found.insert(name);
        }
        rest = after;
    }
    found
}

fn bad_imports(path: &str, text: &str, own_children: &BTreeSet<String>) -> Vec<String> {
    let own = top_module(path);
    let Some((_, allowed)) = IMPORTS.iter().find(|(module, _)| *module == own) else {
        return vec![format!("{path}: the module {own} has no line in IMPORTS")];
    };
    let is_top = |name: &str| IMPORTS.iter().any(|(module, _)| *module == name);
    imported(path, text, own_children)
        .into_iter()
        .filter(|name| is_top(name) && name != own && !allowed.contains(&name.as_str()))
        .map(|name| format!("{path}: {own} must not import {name}; see ARCHITECTURE.md"))
        .collect()
}

#[test]
fn modules_import_downward_only() {
    let all = sources("src");
    let children = |path: &str| -> BTreeSet<String> {
        let folder =
            path.trim_end_matches("mod.rs").trim_end_matches(".rs").trim_end_matches('/').to_owned() + "/";
        let inside = all.iter().filter_map(|(other, _)| other.strip_prefix(&folder));
        inside.filter_map(|rest| Some(rest.split('/').next()?.trim_end_matches(".rs").to_owned())).collect()
    };
    let files = all.iter().filter(|(path, _)| path != "src/lib.rs");
    assert_none(files.flat_map(|(path, text)| bad_imports(path, text, &children(path))).collect());
}

#[test]
fn allowed_imports_have_no_circle() {
    // Repeatedly take away the modules that import nothing any more; a circle would stay.
    let mut left: Vec<_> = IMPORTS.to_vec();
    while !left.is_empty() {
        let names: Vec<&str> = left.iter().map(|(module, _)| *module).collect();
        let before = left.len();
        left.retain(|(_, allowed)| allowed.iter().any(|module| names.contains(module)));
        assert!(left.len() < before, "these import each other: {names:?}");
    }
}

#[test]
fn bad_imports_are_found() {
    let none = BTreeSet::new();
    let bad = |path: &str, text: &str| bad_imports(path, text, &none).len();
    for text in [
        "use crate::engine::EngineHandle;",
        "let x = crate::engine::command::Command;",
        "use crate::{\n    nn::{lora, quant},\n    engine,\n};",
        "use crate :: {engine};".replace(" :: ", "::").as_str(),
        "use super::super::engine::EngineHandle;",
        "pub(in crate::http) use crate::engine;",
    ] {
        assert_eq!(bad("src/model/load.rs", text).min(1), 1, "{text}");
    }
    assert_eq!(bad("src/text/mod.rs", "use super::engine;"), 1);
    assert_eq!(bad("src/nn/ops/gemm.rs", "use super::super::super::model::load;"), 1);
    assert_eq!(bad("src/unheard_of.rs", ""), 1);
    for text in [
        "use crate::nn::quant::Quantization;",
        "use crate::model::tokenizer::Tokenizer;",
        "use super::tokenizer::Tokenizer;",
        "use super::super::nn::lora;",
        "/// See [`crate::engine`].",
        "// crate::http is above.",
        "use crate::{nn::{lora, engine}};",
    ] {
        assert_eq!(bad("src/model/load.rs", text), 0, "{text}");
    }
    // In an inner module, `super` is the file itself.
    let children = BTreeSet::from(["adapters".to_owned()]);
    assert!(bad_imports("src/engine/mod.rs", "use super::adapters::Resident;", &children).is_empty());
}

// ---- large files

fn too_large(path: &Path, bytes: u64) -> bool {
    bytes > MAX_BYTES && !LARGE_FILES.iter().any(|folder| path.starts_with(folder))
}

/// The files that git tracks; without git, as in a container, all but the build folder.
fn tracked() -> Vec<PathBuf> {
    let git = std::process::Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    match git {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            String::from_utf8(output.stdout).unwrap().split_terminator('\0').map(PathBuf::from).collect()
        }
        _ => files(root(), &|path| path.starts_with(".git") || path.starts_with("target")),
    }
}

#[test]
fn the_tree_holds_no_large_files() {
    let tracked = tracked();
    assert!(
        tracked.iter().any(|path| path == Path::new("tests/tidy.rs")),
        "the list of files is not complete"
    );
    let large = tracked.into_iter().filter(|path| {
        let bytes = fs::symlink_metadata(root().join(path)).map_or(0, |m| m.len());
        too_large(path, bytes)
    });
    assert_none(large.map(|path| format!("{}: over {MAX_BYTES} bytes", path.display())).collect());
}

#[test]
fn large_files_are_found() {
    assert!(too_large(Path::new("models/model.safetensors"), MAX_BYTES + 1));
    assert!(too_large(Path::new("assets/demonstration.bin"), MAX_BYTES + 1));
    assert!(!too_large(Path::new("tests/fixtures/parity/model.safetensors"), MAX_BYTES + 1));
    assert!(!too_large(Path::new("Cargo.lock"), MAX_BYTES));
}
