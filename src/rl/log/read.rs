//! Reading the log: the episodes of a run, in their order, while others may be written. Needs no lock.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use super::files;
use crate::rl::episode::Episode;

/// A line that is no episode.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// The file cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        error: io::Error,
    },
    /// Something else stands there.
    #[error("{}, line {line}: {error}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counts from 1.
        line: u64,
        /// What is wrong.
        error: serde_json::Error,
    },
}

/// Names of the runs in the log's folder, in order.
///
/// # Errors
/// What the system reports.
pub fn runs(dir: &Path) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = files::list(dir)?.into_iter().map(|(run, _)| run).collect();
    names.dedup();
    Ok(names)
}

/// The files of a run, in the order of their lines: those that were put aside, then the one that is written to.
///
/// # Errors
/// What the system reports.
pub fn parts(dir: &Path, run: &str) -> io::Result<Vec<PathBuf>> {
    let of_run = files::list(dir)?.into_iter().filter(|(other, _)| other == run);
    Ok(of_run.map(|(_, part)| files::path(dir, run, part)).collect())
}

/// The episodes of a run, in their order; none where there is no such run.
///
/// # Errors
/// What the system reports.
pub fn episodes(dir: &Path, run: &str) -> io::Result<Episodes> {
    let mut parts = parts(dir, run)?;
    parts.reverse();
    Ok(Episodes { parts, open: None, line: Vec::new() })
}

/// See [`episodes`].
pub struct Episodes {
    /// What is still to be read, the next one last.
    parts: Vec<PathBuf>,
    open: Option<(PathBuf, BufReader<File>, u64)>,
    line: Vec<u8>,
}

impl Episodes {
    /// The line of the episode that came last, with its end, byte for byte.
    pub fn line(&self) -> &[u8] {
        &self.line
    }
}

impl Iterator for Episodes {
    type Item = Result<Episode, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((path, reader, number)) = &mut self.open else {
                let path = self.parts.pop()?;
                match File::open(&path) {
                    Ok(file) => self.open = Some((path, BufReader::new(file), 0)),
                    Err(error) => return Some(Err(Unreadable::Io { path, error })),
                }
                continue;
            };
            self.line.clear();
            let read = reader.read_until(b'\n', &mut self.line);
            *number += 1;
            match read {
                // A line without its end is being written, or is what a killed process left.
                Ok(_) if self.line.last() != Some(&b'\n') => self.open = None,
                Ok(_) => {
                    let episode = serde_json::from_slice(&self.line);
                    return Some(episode.map_err(|error| Unreadable::Line {
                        path: path.clone(),
                        line: *number,
                        error,
                    }));
                }
                Err(error) => {
                    let path = path.clone();
                    self.open = None;
                    return Some(Err(Unreadable::Io { path, error }));
                }
            }
        }
    }
}
