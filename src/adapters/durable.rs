//! Files that are on disk when a call returns: each written whole and synced, folders made under a hidden name
//! and renamed into place. Knows nothing of what is in them; all of it blocks.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

/// Writes a file and waits until the disk has it.
///
/// # Errors
/// What the system reports; the file may then be there in part, which is why it belongs into a hidden folder.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Waits until a folder's own entries are on disk: what was made, renamed or removed in it.
///
/// # Errors
/// What the system reports.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    // Where folders cannot be opened (Windows), their entries are written with the files.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Makes the folder `target` as a whole: `fill` writes into the hidden folder `making` beside it, which takes the
/// target's name when everything is on disk. A target that is there already is an error.
///
/// # Errors
/// What `fill` or the system reports; nothing of it stays then.
pub(crate) fn make_folder(
    making: &Path,
    target: &Path,
    fill: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let made = fs::create_dir_all(making)
        .and_then(|()| fill(making))
        .and_then(|()| sync_folder(making))
        .and_then(|()| fs::rename(making, target));
    if made.is_err() {
        // The reason is told by the error above; remains are cleared at the next start.
        let _ = fs::remove_dir_all(making);
    }
    made?;
    target.parent().map_or(Ok(()), sync_folder)
}
