//! How a new adapter takes its name: complete or not at all, an older one of the same name until the very moment
//! that the new one is there. What a crash leaves between is finished or cleared by [`recover`]. Knows no tensor
//! and no engine; all of it blocks.
//!
//! ```text
//! .writing-NAME-…   being written; goes at the next start
//! .staged-NAME      complete; takes NAME at the next start if nothing has that name
//! .removed-NAME-…   on its way out; goes at the next start
//! ```

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;

use super::check_name;
use super::durable::{make_folder, sync_folder};
use super::files::REMOVED;

const WRITING: &str = ".writing-";
const STAGED: &str = ".staged-";

/// Puts the folder that `fill` writes in the place of `name`, whatever is there. `around` runs what it is given,
/// the two renames between which the name is nobody's. After a failure what was there is still there.
pub(super) fn put(
    root: &Path,
    name: &str,
    fill: impl FnOnce(&Path) -> io::Result<()>,
    around: impl FnOnce(&mut dyn FnMut() -> io::Result<()>) -> io::Result<()>,
) -> io::Result<()> {
    fs::create_dir_all(root)?;
    // Another process that starts meanwhile must not take this for what a crash left.
    let _held = lock(root)?;
    let id = uuid::Uuid::new_v4().simple();
    let (target, staged) = (root.join(name), root.join(format!("{STAGED}{name}")));
    if staged.exists() {
        fs::remove_dir_all(&staged)?;
    }
    make_folder(&root.join(format!("{WRITING}{name}-{id}")), &staged, fill)?;
    let grave = root.join(format!("{REMOVED}{name}-{id}"));
    around(&mut || {
        match fs::rename(&target, &grave) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        fs::rename(&staged, &target).inspect_err(|_| {
            // What was there goes back; if even that fails, the next start puts the new one there.
            let _ = fs::rename(&grave, &target);
        })
    })?;
    sync_folder(root)?;
    bury(&grave);
    Ok(())
}

/// Finishes or clears what interrupted calls of [`put`] and of a deletion left behind.
pub(super) fn recover(root: &Path) {
    let Ok(folder) = File::open(root) else { return };
    if let Err(TryLockError::WouldBlock) = folder.try_lock() {
        // Another process is putting an adapter there; what it leaves, it clears.
        return;
    }
    let hidden = |prefix: &'static str| {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        entries.filter_map(move |entry| {
            let name = entry.file_name().to_string_lossy().strip_prefix(prefix)?.to_owned();
            Some((entry.path(), name))
        })
    };
    for (path, name) in hidden(STAGED) {
        let free =
            matches!(fs::symlink_metadata(root.join(&name)), Err(e) if e.kind() == io::ErrorKind::NotFound);
        if free && check_name(&name).is_ok() {
            match fs::rename(&path, root.join(&name)).and_then(|()| sync_folder(root)) {
                Ok(()) => tracing::info!(adapter = name, "finished putting a new adapter in its place"),
                Err(error) => tracing::warn!(adapter = name, %error, "a new adapter cannot take its place"),
            }
        } else {
            bury(&path);
        }
    }
    hidden(WRITING).chain(hidden(REMOVED)).for_each(|(path, _)| bury(&path));
}

/// Removes what nobody can reach any more. A link goes, what it points to stays.
pub(super) fn bury(path: &Path) {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    };
    if let Err(error) = removed {
        // Only its bytes are left, until the next start.
        tracing::warn!(path = %path.display(), %error, "an old adapter's files remain");
    }
}

/// Waits for other processes that put adapters into this folder. Held until the handle is dropped.
fn lock(root: &Path) -> io::Result<Option<File>> {
    if cfg!(not(unix)) {
        return Ok(None);
    }
    let folder = File::open(root)?;
    match folder.lock() {
        Ok(()) => Ok(Some(folder)),
        // Some network file systems have no locks; then nothing but a start at this very moment can disturb.
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
