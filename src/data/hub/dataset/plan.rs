//! Which files of a data set's repository are the wanted split: from what its README says, what the source's settings
//! say, and the names of the files. Pure; nothing is asked here.

use super::card::{Config, SplitFiles};
use super::patterns::{Module, by_names, fixed_folder, is_of, is_pattern, join, module, resolve};

/// Names that a message lists.
const MAX_NAMES: usize = 40;

/// What the source's settings say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) config: Option<&'a str>,
    pub(super) split: &'a str,
    pub(super) data_files: &'a [String],
    pub(super) data_dir: Option<&'a str>,
    /// Whether only files whose names tell of a known format count.
    pub(super) by_extension: bool,
}

/// Where the files are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// What these patterns stand for, from the repository's root.
    Patterns(Vec<String>),
    /// What the names under this folder tell.
    Names(String),
}

impl Plan {
    /// The folders that hold everything that the plan can find; none lies in another.
    pub(super) fn folders(&self) -> Vec<&str> {
        let mut folders: Vec<&str> = match self {
            Self::Names(folder) => vec![folder],
            Self::Patterns(patterns) => patterns.iter().map(|pattern| fixed_folder(pattern)).collect(),
        };
        folders.sort_unstable();
        let inside = |folder: &str, outer: &str| {
            outer.is_empty()
                || folder.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let mut outermost: Vec<&str> = Vec::new();
        for folder in folders {
            if !outermost.iter().any(|outer| inside(folder, outer)) {
                outermost.push(folder);
            }
        }
        outermost
    }

    /// The files of the split, in the order that they are read in. Empty where the repository has none that can be
    /// read.
    pub(super) fn choose(&self, wanted: &Wanted, files: &[&str]) -> Result<Vec<String>, String> {
        let patterns = match self {
            Self::Patterns(patterns) => patterns.clone(),
            Self::Names(folder) => {
                let splits = by_names(folder, files)?;
                if splits.is_empty() {
                    return Ok(Vec::new());
                }
                of_split(&splits, wanted.split)?.to_vec()
            }
        };
        let mut chosen: Vec<&str> = Vec::new();
        for pattern in &patterns {
            let found = resolve(pattern, files)?;
            if found.is_empty() && !is_pattern(pattern) {
                return Err(format!(
                    "there is no file {pattern}; correct data_files, or the data set's README"
                ));
            }
            // A file may fit two patterns, and is read once.
            let new: Vec<&str> = found.into_iter().filter(|file| !chosen.contains(file)).collect();
            chosen.extend(new);
        }
        if wanted.by_extension {
            match module(&chosen) {
                None | Some(Module::Other) => chosen.clear(),
                Some(module) => chosen.retain(|file| is_of(file, module)),
            }
        }
        Ok(chosen.into_iter().map(str::to_owned).collect())
    }
}

/// What to look for, by the README's configs and the settings.
pub(super) fn plan(configs: &[Config], wanted: &Wanted) -> Result<Plan, String> {
    let base = wanted.data_dir.unwrap_or_default();
    if !wanted.data_files.is_empty() {
        return Ok(Plan::Patterns(wanted.data_files.iter().map(|pattern| join(base, pattern)).collect()));
    }
    if wanted.data_dir.is_some() {
        return Ok(Plan::Names(join("", base.trim_end_matches('/'))));
    }
    if configs.is_empty() {
        // What `datasets` calls the only config of a repository that names none.
        return match wanted.config {
            None | Some("default") => Ok(Plan::Names(String::new())),
            Some(name) => Err(unknown("config", name, &["default"])),
        };
    }
    let names: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
    let config = match wanted.config {
        Some(name) => configs
            .iter()
            .find(|config| config.name == name)
            .ok_or_else(|| unknown("config", name, &names))?,
        None => {
            let mut meant = configs.iter().filter(|config| config.default || config.name == "default");
            match (configs, meant.next(), meant.next()) {
                ([only], ..) | (_, Some(only), None) => only,
                _ => return Err(format!("config is missing; it has {}", list(&names))),
            }
        }
    };
    let folder = config.data_dir.as_deref().unwrap_or_default();
    match &config.data_files {
        None => Ok(Plan::Names(join("", folder.trim_end_matches('/')))),
        Some(splits) => {
            let patterns = of_split(splits, wanted.split)?;
            Ok(Plan::Patterns(patterns.iter().map(|pattern| join(folder, pattern)).collect()))
        }
    }
}

/// What the hub itself made of a data set: `CONFIG/SPLIT/NNNN.parquet`, where a split of which only the beginning was
/// made is called `partial-SPLIT`.
pub(super) fn converted(wanted: &Wanted, files: &[&str]) -> Result<Vec<String>, String> {
    let parts = |file: &&str| {
        let mut parts = file.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(config), Some(split), Some(name), None) if name.ends_with(".parquet") => {
                Some((config.to_owned(), split.trim_start_matches("partial-").to_owned()))
            }
            _ => None,
        }
    };
    let mut configs: Vec<String> = files.iter().filter_map(parts).map(|(config, _)| config).collect();
    configs.sort();
    configs.dedup();
    let names: Vec<&str> = configs.iter().map(String::as_str).collect();
    let config = match (wanted.config, names.as_slice()) {
        (Some(name), names) if !names.contains(&name) => return Err(unknown("config", name, names)),
        (Some(name), _) => name,
        (None, [only]) => only,
        (None, names) if names.contains(&"default") => "default",
        (None, names) => return Err(format!("config is missing; it has {}", list(names))),
    };
    let of_config: Vec<(&str, String)> = files
        .iter()
        .filter_map(|file| parts(file).filter(|(c, _)| c == config).map(|(_, split)| (*file, split)))
        .collect();
    let mut splits: Vec<&str> = of_config.iter().map(|(_, split)| split.as_str()).collect();
    splits.sort_unstable();
    splits.dedup();
    if !splits.contains(&wanted.split) {
        return Err(unknown("split", wanted.split, &splits));
    }
    let chosen = of_config.iter().filter(|(_, split)| split == wanted.split);
    Ok(chosen.map(|(file, _)| (*file).to_owned()).collect())
}

fn of_split<'a>(splits: &'a [SplitFiles], name: &str) -> Result<&'a [String], String> {
    let found = splits.iter().find(|files| files.split == name);
    found.map(|files| files.patterns.as_slice()).ok_or_else(|| {
        let names: Vec<&str> = splits.iter().map(|files| files.split.as_str()).collect();
        unknown("split", name, &names)
    })
}

fn unknown(key: &str, name: &str, names: &[&str]) -> String {
    format!("{key}: there is no '{name}'; it has {}", list(names))
}

fn list(names: &[&str]) -> String {
    let shown = names.iter().take(MAX_NAMES).copied().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(MAX_NAMES) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}
