//! What crashed writes leave in the data folder, where no part has a look at its own: jobs that `gurukul train` did not
//! finish keeping, and copies of the demo model. Adapters, checkpoints, uploads, episodes and what is to be uploaded are
//! cleared by the parts that write them.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How old something unfinished must be: another process may be writing it at this moment.
const OLD: Duration = Duration::from_secs(3600);

/// What is being written has a name that begins like this, until it is complete.
const WRITING: &str = ".writing-";

/// Removes what was left unfinished in the folders of jobs and of models. What cannot be removed stays, with a line in
/// the log.
pub(super) fn sweep(data_dir: &Path) {
    for folder in ["jobs", "models"] {
        sweep_folder(&data_dir.join(folder), SystemTime::now());
    }
}

fn sweep_folder(folder: &Path, now: SystemTime) {
    // One that is not there has nothing left over.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(WRITING) {
            continue;
        }
        let modified = entry.metadata().and_then(|meta| meta.modified());
        let is_old =
            modified.is_ok_and(|modified| now.duration_since(modified).is_ok_and(|since| since > OLD));
        if !is_old {
            continue;
        }
        let path = entry.path();
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Ok(()) => tracing::info!(path = %path.display(), "removed what a crash had left"),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "what a crash has left cannot be removed")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_old_and_unfinished_goes() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".writing-old", "finished", ".removed-x"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("file"), "x").unwrap();
        }
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        sweep_folder(folder.path(), SystemTime::now());
        assert_eq!(names().len(), 3, "it may still be written");
        sweep_folder(folder.path(), SystemTime::now() + 2 * OLD);
        assert_eq!(names(), [".removed-x", "finished"]);
        sweep_folder(&folder.path().join("nowhere"), SystemTime::now());
    }
}
