//! Files of this machine: which ones a path stands for, and opening them. Knows nothing of rows.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio_util::bytes::Bytes;

use super::Format;
use super::decode::format_of_name;
use super::object::{Object, Objects, Opened, Opening, Rows, Stat};

/// The keys of `type: local`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalConfig {
    /// A file, a folder, or a pattern such as `data/*.jsonl.gz`; relative to where the program is started.
    #[serde(default)]
    pub path: String,
}

impl LocalConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.path.trim().is_empty() {
            return Err("path is missing; name a file, a folder or a pattern such as data/*.jsonl".into());
        }
        if self.path.split('/').any(|part| part == "**") {
            return Err("path: ** is not known; name one folder, or list sources for several".into());
        }
        Ok(())
    }

    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let files = files(&self.path, opening.format)?;
        let objects: Objects = Box::new(files.into_iter().map(|path| Ok(Box::new(OfDisk::new(path)) as _)));
        Ok(Opened { rows: Rows::Files(objects), pin: None })
    }
}

/// A file of this machine.
struct OfDisk {
    path: PathBuf,
    shown: String,
}

impl OfDisk {
    fn new(path: PathBuf) -> Self {
        Self { shown: path.display().to_string(), path }
    }

    fn open(&self, offset: u64) -> Result<File, String> {
        let opened = || -> io::Result<File> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(offset))?;
            Ok(file)
        };
        opened().map_err(|error| cannot_read(&self.path, &error))
    }
}

impl Object for OfDisk {
    fn shown(&self) -> &str {
        &self.shown
    }

    fn stat(&mut self) -> Result<Stat, String> {
        let meta = std::fs::metadata(&self.path).map_err(|error| cannot_read(&self.path, &error))?;
        let time = meta.modified().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let version = time.map(|time| format!("{} bytes of {}", meta.len(), time.as_nanos()));
        Ok(Stat { length: Some(meta.len()), version })
    }

    fn read_from(&mut self, offset: u64) -> Result<Box<dyn Read + Send + '_>, String> {
        Ok(Box::new(self.open(offset)?))
    }

    fn read_range(&mut self, range: Range<u64>) -> Result<Bytes, String> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.open(range.start)?.read_exact(&mut bytes).map_err(|error| cannot_read(&self.path, &error))?;
        Ok(bytes.into())
    }
}

/// The files that `path` stands for, in order of their names: itself, those of a folder (with `format` auto those
/// whose extension tells a format), or those that fit a pattern with `*` and `?`.
fn files(path: &str, format: Format) -> Result<Vec<PathBuf>, String> {
    let exact = Path::new(path);
    let found = match std::fs::metadata(exact) {
        Ok(meta) if meta.is_dir() => in_folder(exact, format)?,
        Ok(_) => vec![exact.to_owned()],
        // A file may have such a character in its name; where it does not, it is a pattern.
        Err(_) if path.contains(['*', '?']) => matching(path)?,
        Err(error) => return Err(cannot_read(exact, &error)),
    };
    for file in &found {
        let meta = std::fs::metadata(file).map_err(|e| cannot_read(file, &e))?;
        if !meta.is_file() {
            return Err(format!("{} is no plain file; name files, or a folder of them", file.display()));
        }
    }
    Ok(found)
}

fn cannot_read(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            let started =
                std::env::current_dir().map_or(String::new(), |dir| format!(" from {}", dir.display()));
            let from = if path.is_relative() { started } else { String::new() };
            format!("there is no {}{from}; correct path", path.display())
        }
        _ => format!("{} cannot be read: {error}", path.display()),
    }
}

fn in_folder(folder: &Path, format: Format) -> Result<Vec<PathBuf>, String> {
    let is_wanted =
        |name: &str| !name.starts_with('.') && (format != Format::Auto || format_of_name(name).is_some());
    let mut found = entries(folder)?;
    found.retain(|(name, path)| is_wanted(name) && !path.is_dir());
    if found.is_empty() {
        return Err(format!(
            "the folder {} has no file with an extension that is known (parquet, jsonl, json, csv, tsv, txt, each \
             but the first also with .gz or .zst); set format, or correct path",
            folder.display()
        ));
    }
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Names and paths in a folder, sorted by name.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, String> {
    let failed = |error: io::Error| cannot_read(folder, &error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    found.sort();
    Ok(found)
}

/// The files that fit a pattern, part by part; parts without `*` and `?` are taken as they are.
fn matching(pattern: &str) -> Result<Vec<PathBuf>, String> {
    let (start, rest) = match pattern.strip_prefix('/') {
        Some(rest) => (PathBuf::from("/"), rest),
        None => (PathBuf::new(), pattern),
    };
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    let mut found = vec![start];
    for (at, part) in parts.iter().enumerate() {
        let is_last = at + 1 == parts.len();
        let mut next = Vec::new();
        for folder in found {
            if !part.contains(['*', '?']) {
                next.push(folder.join(part));
                continue;
            }
            let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
            if at > 0 && !listed.is_dir() {
                continue;
            }
            for (name, path) in entries(listed)? {
                // As in a shell, a pattern does not stand for hidden files unless it says so.
                let hidden = name.starts_with('.') && !part.starts_with('.');
                if !hidden && fits(part, &name) && path.is_dir() != is_last {
                    next.push(folder.join(name));
                }
            }
        }
        found = next;
    }
    found.retain(|path| path.exists());
    found.sort();
    match found.is_empty() {
        true => Err(format!("no file fits {pattern}; correct path")),
        false => Ok(found),
    }
}

/// Whether a name fits a pattern in which `*` is any text and `?` any character.
fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // The latest star, and where in the name it is taken to end.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, end)) => {
                    star = Some((at, end + 1));
                    p = at + 1;
                    n = end + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_in_a_shell() {
        for (pattern, name) in [
            ("*.jsonl.gz", "a.jsonl.gz"),
            ("part-?.csv", "part-1.csv"),
            ("*", "anything"),
            ("a*b*c", "aXXbYYbZc"),
            ("**", ""),
            ("?", "ह"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("*.jsonl", "a.jsonl.gz"),
            ("part-?.csv", "part-10.csv"),
            ("a*b*c", "abcd"),
            ("?", ""),
            ("a", ""),
        ] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }
}
