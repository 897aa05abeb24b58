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
pub(crate) fn make_folder<E: From<io::Error>>(
    making: &Path,
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let make = || {
        fs::create_dir_all(making)?;
        fill(making)?;
        sync_folder(making)?;
        Ok(fs::rename(making, target)?)
    };
    if let Err(error) = make() {
        // The reason is told; what remains in spite of this is cleared at the next start.
        let _ = fs::remove_dir_all(making);
        return Err(error);
    }
    Ok(target.parent().map_or(Ok(()), sync_folder)?)
}
