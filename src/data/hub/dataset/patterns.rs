//! Which of a repository's files a pattern stands for, and which patterns stand for the splits when nothing is said:
//! the rules of the Python package `datasets`. Pure: names in, names out.

use globset::{GlobBuilder, GlobMatcher};

use super::card::{SplitFiles, is_split};

/// Names that say of what a repository is, and are never data.
const IGNORED: [&str; 6] = [
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
];

/// The splits that file names tell of, in their order, with the words that stand for each.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];
/// A word ends at one of these.
const SEPARATORS: &str = "[-._ 0-9]";
/// In a folder's name.
const IN_FOLDER: [&str; 4] =
    ["**/{word}/**", "**/{word}{sep}*/**", "**/*{sep}{word}/**", "**/*{sep}{word}{sep}*/**"];
/// In a file's name.
const IN_FILE: [&str; 2] = ["**/{word}{sep}*", "**/*{sep}{word}{sep}*"];
const FIVE: &str = "[0-9][0-9][0-9][0-9][0-9]";

/// Whether a pattern is more than a name.
pub(super) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '[', ']', '?'])
}

/// The folder that holds whatever a pattern can stand for, without a slash at its end.
pub(super) fn fixed_folder(pattern: &str) -> &str {
    let fixed = pattern.find(['*', '[', ']', '?']).map_or(pattern, |at| &pattern[..at]);
    fixed.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// Two paths as one.
pub(super) fn join(folder: &str, path: &str) -> String {
    let (folder, path) = (folder.trim_matches('/'), path.trim_start_matches("./").trim_start_matches('/'));
    if folder.is_empty() { path.to_owned() } else { format!("{folder}/{path}") }
}

/// The files that a pattern stands for, in the order of `files`.
pub(super) fn resolve<'a>(pattern: &str, files: &[&'a str]) -> Result<Vec<&'a str>, String> {
    let matcher = matcher(pattern)?;
    let (hidden, special) = (count(pattern, is_hidden), count(parent(pattern), is_special));
    let last = pattern.rsplit('/').next().unwrap_or(pattern);
    let fits = |file: &&str| {
        let name = file.rsplit('/').next().unwrap_or(file);
        matcher.is_match(file)
            && (!IGNORED.contains(&name) || name == last)
            && count(file, is_hidden) == hidden
            && count(parent(file), is_special) == special
    };
    Ok(files.iter().copied().filter(fits).collect())
}

fn matcher(pattern: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).backslash_escape(false).build();
    glob.map(|glob| glob.compile_matcher())
        .map_err(|error| format!("'{pattern}' is no pattern: {}", error.kind()))
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// Parts of a path that are so.
fn count(path: &str, is: fn(&str) -> bool) -> usize {
    path.split('/').filter(|part| is(part)).count()
}

fn is_hidden(part: &str) -> bool {
    part.starts_with('.') && !part.bytes().all(|b| b == b'.')
}

fn is_special(part: &str) -> bool {
    part.starts_with("__")
}

/// The splits of files that nothing else tells of, by the names under `folder`.
pub(super) fn by_names(folder: &str, files: &[&str]) -> Result<Vec<SplitFiles>, String> {
    let shards = |split: &str| join(folder, &format!("data/{split}-{FIVE}-of-{FIVE}*.*"));
    let sharded = resolve(&shards("*"), files)?;
    if !sharded.is_empty() {
        let mut splits: Vec<&str> = sharded.iter().filter_map(|file| split_of_shard(file)).collect();
        if let Some(bad) = splits.iter().find(|split| !is_split(split)) {
            return Err(format!(
                "'{bad}' in the name of a file cannot name a split; name the files with data_files"
            ));
        }
        // The usual ones first, the others by name.
        let usual =
            |split: &str| KEYWORDS.iter().position(|(name, _)| *name == split).unwrap_or(KEYWORDS.len());
        splits.sort_by_key(|split| (usual(split), *split));
        splits.dedup();
        let of = |split: &str| SplitFiles { split: split.to_owned(), patterns: vec![shards(split)] };
        return Ok(splits.into_iter().map(of).collect());
    }
    for forms in [IN_FOLDER.as_slice(), &IN_FILE] {
        let mut splits = Vec::new();
        for (split, words) in KEYWORDS {
            let patterns: Vec<String> = words
                .iter()
                .flat_map(|word| forms.iter().map(move |form| (word, form)))
                .map(|(word, form)| join(folder, &form.replace("{word}", word).replace("{sep}", SEPARATORS)))
                .collect();
            let mut any = false;
            for pattern in &patterns {
                any = any || !resolve(pattern, files)?.is_empty();
            }
            if any {
                splits.push(SplitFiles { split: split.into(), patterns });
            }
        }
        if !splits.is_empty() {
            return Ok(splits);
        }
    }
    let all = join(folder, "**");
    let any = !resolve(&all, files)?.is_empty();
    Ok(any.then(|| SplitFiles { split: "train".into(), patterns: vec![all] }).into_iter().collect())
}

/// `train` of `data/train-00000-of-00002.parquet`.
fn split_of_shard(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next()?;
    let digits = |text: &str| text.len() >= 5 && text.as_bytes()[..5].iter().all(u8::is_ascii_digit);
    name.rmatch_indices("-of-").find_map(|(at, _)| {
        let (before, after) = (&name[..at], &name[at + 4..]);
        let (split, number) = before.rsplit_once('-')?;
        (number.len() == 5 && digits(number) && digits(after) && !split.is_empty()).then_some(split)
    })
}

/// What reads a file, by the extensions of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Module {
    Parquet,
    Json,
    Csv,
    Tsv,
    Text,
    /// Something that cannot be read here.
    Other,
}

/// Extensions that the Python package reads one way or another, with what reads them.
fn module_of(extension: &str) -> Option<Module> {
    match extension {
        "parquet" => Some(Module::Parquet),
        "json" | "jsonl" | "ndjson" => Some(Module::Json),
        "csv" => Some(Module::Csv),
        "tsv" => Some(Module::Tsv),
        "txt" => Some(Module::Text),
        "arrow" | "tar" | "xml" | "hdf5" | "h5" | "zip" | "pdf" | "lance" | "vortex" | "conll" | "conllu"
        | "gpq" => Some(Module::Other),
        "png" | "jpg" | "jpeg" | "gif" | "webp" | "wav" | "mp3" | "flac" | "ogg" | "mp4" | "avi" | "mkv" => {
            Some(Module::Other)
        }
        _ => None,
    }
}

fn extensions(file: &str) -> impl Iterator<Item = String> {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').skip(1).map(str::to_ascii_lowercase)
}

/// What most files are to be read by; `None` where no extension says.
pub(super) fn module(files: &[&str]) -> Option<Module> {
    let mut counts: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    for extension in files.iter().flat_map(|file| extensions(file)) {
        *counts.entry(extension).or_default() += 1;
    }
    // In a draw these come first, and of the others the last by name.
    let favourite = |extension: &str| {
        ["csv", "json", "jsonl", "arrow", "vortex", "lance", "parquet"]
            .iter()
            .position(|name| *name == extension)
    };
    let mut ranked: Vec<(String, usize)> = counts.into_iter().collect();
    ranked.sort_by(|(a, m), (b, n)| (n, favourite(b), b).cmp(&(m, favourite(a), a)));
    ranked.iter().find_map(|(extension, _)| module_of(extension))
}

/// Whether a file is to be read by it.
pub(super) fn is_of(file: &str, module: Module) -> bool {
    // One reader with two separators.
    let same = |a: Module, b: Module| a == b || [a, b].iter().all(|m| matches!(m, Module::Csv | Module::Tsv));
    extensions(file).filter_map(|extension| module_of(&extension)).any(|found| same(found, module))
}
