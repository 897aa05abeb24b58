//! The thread that writes one run's file. It takes everything that waits, writes it with one call and one fsync, and
//! answers. What fails is taken back, so that the file always ends with a whole line that was acknowledged.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::files::{self, Part};
use super::{Appended, Entry, LogError};
use crate::adapters::sync_folder;
use crate::metrics;
use crate::rl::episode::lines;

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(5);
/// Episodes that share a write; more wait for the next.
const GROUP: usize = 1024;

pub(super) struct Settings {
    pub(super) dir: PathBuf,
    pub(super) run: String,
    pub(super) max_file_bytes: u64,
}

/// Writes until nothing comes for a while and `leave` agrees, by having nothing either.
pub(super) fn run(settings: Settings, inbox: &mpsc::Receiver<Entry>, leave: impl Fn() -> Option<Entry>) {
    let mut writer = Writer { settings, open: None };
    loop {
        let first = match inbox.recv_timeout(IDLE) {
            Ok(entry) => entry,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => match leave() {
                Some(entry) => entry,
                None => return,
            },
        };
        let mut episodes = first.episodes.len();
        let mut group = vec![first];
        while episodes < GROUP
            && let Ok(entry) = inbox.try_recv()
        {
            episodes += entry.episodes.len();
            group.push(entry);
        }
        let outcome = writer.write(&mut group);
        if let Err(error) = &outcome {
            tracing::error!(run = writer.settings.run, %error, episodes, "episodes cannot be logged");
        }
        for Entry { episodes, reply } in group {
            let answer = outcome.clone().map(|path| Appended { path, episodes });
            // Whoever does not wait any more finds them in the log.
            let _ = reply.send(answer);
        }
    }
}

struct Writer {
    settings: Settings,
    open: Option<Open>,
}

/// The current file.
struct Open {
    file: File,
    /// Bytes that were acknowledged.
    length: u64,
    next_index: u64,
    /// What follows the acknowledged bytes was not, and could not be cut off yet.
    cut_first: bool,
}

impl Writer {
    /// Writes a group whole or not at all; the file that it is in.
    fn write(&mut self, group: &mut [Entry]) -> Result<PathBuf, LogError> {
        let path = files::path(&self.settings.dir, &self.settings.run, Part::Current);
        let mut open = match self.open.take() {
            // Somebody may have moved or removed the file: what is written to one without a name is lost.
            Some(open) if is_at(&open.file, &path) => open,
            _ => self.reopen()?,
        };
        if open.cut_first {
            open.file.set_len(open.length)?;
            open.cut_first = false;
        }
        if open.length >= self.settings.max_file_bytes {
            open = self.put_aside(open)?;
        }
        let lines = numbered(group, open.next_index);
        let begun = Instant::now();
        let written = open.file.write_all(&lines).and_then(|()| open.file.sync_data());
        if let Err(error) = written {
            open.cut_first = open.file.set_len(open.length).and_then(|()| open.file.sync_data()).is_err();
            self.open = Some(open);
            return Err(error.into());
        }
        let episodes: usize = group.iter().map(|entry| entry.episodes.len()).sum();
        metrics::episodes_synced(episodes, begun.elapsed().as_secs_f64());
        open.length += lines.len() as u64;
        open.next_index += episodes as u64;
        self.open = Some(open);
        Ok(path)
    }

    fn reopen(&self) -> io::Result<Open> {
        let Settings { dir, run, .. } = &self.settings;
        files::repair(dir, run, Part::Current)?;
        let next_index = self.next_index()?;
        let file = create(dir, run)?;
        let length = file.metadata()?.len();
        Ok(Open { file, length, next_index, cut_first: false })
    }

    /// One more than the index of the run's last episode.
    fn next_index(&self) -> io::Result<u64> {
        let Settings { dir, run, .. } = &self.settings;
        let of_run = files::list(dir)?.into_iter().filter(|(other, _)| other == run);
        let paths: Vec<PathBuf> = of_run.map(|(_, part)| files::path(dir, run, part)).collect();
        for path in paths.iter().rev() {
            let Some(line) = files::last_line(path)? else { continue };
            #[derive(Deserialize)]
            struct Numbered {
                episode_index: u64,
            }
            if let Ok(Numbered { episode_index }) = serde_json::from_slice(&line) {
                return Ok(episode_index + 1);
            }
            tracing::warn!(file = %path.display(), "the log's last line is no episode; counting its lines instead");
            let count = |path: &PathBuf| -> io::Result<u64> {
                Ok(fs::read(path)?.iter().filter(|byte| **byte == b'\n').count() as u64)
            };
            return paths.iter().map(count).sum();
        }
        Ok(0)
    }

    fn put_aside(&self, full: Open) -> io::Result<Open> {
        let Settings { dir, run, .. } = &self.settings;
        let aside = files::list(dir)?.into_iter().filter_map(|(other, part)| match part {
            Part::Aside(n) if other == *run => Some(n),
            _ => None,
        });
        let next = Part::Aside(aside.max().unwrap_or(0) + 1);
        fs::rename(files::path(dir, run, Part::Current), files::path(dir, run, next))?;
        let file = create(dir, run)?;
        Ok(Open { file, length: 0, ..full })
    }
}

/// The current file, there for good even when it is new.
fn create(dir: &std::path::Path, run: &str) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(files::path(dir, run, Part::Current))?;
    sync_folder(dir)?;
    Ok(file)
}

/// The lines of a group, whose episodes get their numbers.
fn numbered(group: &mut [Entry], mut next: u64) -> Vec<u8> {
    let mut all = Vec::new();
    for entry in group {
        for episode in &mut entry.episodes {
            episode.episode_index = next;
            next += 1;
        }
        all.extend(lines(&entry.episodes));
    }
    all
}

/// Whether a file is still the one of this path.
#[cfg(unix)]
fn is_at(file: &File, path: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if identity(&a) == identity(&b))
}

/// Elsewhere an open file cannot be moved away.
#[cfg(not(unix))]
fn is_at(_: &File, path: &std::path::Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_apart_and_what_was_written_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { dir: dir.path().to_owned(), run: "r".into(), max_file_bytes: 1 << 20 };
        let mut writer = Writer { settings, open: None };
        let mut group = [super::super::tests::entry(3)];
        writer.write(&mut group).unwrap();
        let path = dir.path().join("r.jsonl");
        let good = fs::read(&path).unwrap();
        // The device takes no byte.
        let full = File::options().append(true).open("/dev/full").unwrap();
        let open = writer.open.as_mut().unwrap();
        let real = std::mem::replace(&mut open.file, full);
        fs::rename(&path, dir.path().join("kept")).unwrap();
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let error = writer.write(&mut group).unwrap_err();
        assert!(matches!(error, LogError::Full(_)), "{error}");
        assert!(error.to_string().contains("make room"), "{error}");
        // There is room again: the next write goes where the last good one ended.
        fs::remove_file(&path).unwrap();
        fs::rename(dir.path().join("kept"), &path).unwrap();
        writer.open.as_mut().unwrap().file = real;
        writer.write(&mut group).unwrap();
        assert_eq!(group[0].episodes[0].episode_index, 3);
        let all = fs::read(&path).unwrap();
        assert!(all.starts_with(&good) && all.iter().filter(|b| **b == b'\n').count() == 6);
    }
}
