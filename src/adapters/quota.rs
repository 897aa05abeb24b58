//! What adapters take on disk, and whether another one still fits. Deletes nothing; all of it blocks.

use std::fs;
use std::io;
use std::path::Path;

use super::AdapterError;
use crate::engine::training::LoraSpec;
use crate::nn::lora::Site;

/// What a tensor's entry in the header of its file takes at most, in bytes.
const ENTRY: u64 = 256;
/// What the configuration and our own notes take at most, in bytes.
const NOTES: u64 = 16 << 10;

/// Bytes that an adapter of this kind takes on disk, a little more than it will be.
pub(crate) fn planned_bytes(lora: &LoraSpec, sites: &[Site]) -> u64 {
    let trained = lora.sites.iter().filter_map(|&site| sites.get(site));
    let of = |site: &Site| {
        // f32 of A and B.
        4 * (lora.rank * (site.in_features + site.out_features)) as u64 + 2 * ENTRY
    };
    trained.map(of).sum::<u64>() + NOTES
}

/// Whether an adapter of `planned` bytes fits beside those in `root`; what has its name now will be replaced.
pub(super) fn check(root: &Path, name: &str, planned: u64, quota_bytes: u64) -> Result<(), AdapterError> {
    let used = used_beside(root, name)
        .map_err(|error| AdapterError::io("the folder of adapters could not be measured", &error))?;
    if used.saturating_add(planned) > quota_bytes {
        return Err(AdapterError::Quota { name: name.to_owned(), planned, used, quota_bytes });
    }
    Ok(())
}

/// Bytes of all adapters' files but those of `name`. Hidden folders are on their way in or out.
fn used_beside(root: &Path, name: &str) -> io::Result<u64> {
    let mut bytes = 0;
    let missing_is_empty = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    };
    let Some(entries) = fs::read_dir(root).map(Some).or_else(missing_is_empty)? else { return Ok(0) };
    for entry in entries {
        let entry = entry?;
        let folder = entry.file_name();
        if folder == name || folder.to_string_lossy().starts_with('.') || !entry.file_type()?.is_dir() {
            continue;
        }
        // One that is deleted meanwhile takes nothing any more.
        let Some(files) = fs::read_dir(entry.path()).map(Some).or_else(missing_is_empty)? else { continue };
        for file in files.flatten() {
            bytes += file.metadata().map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_count_and_what_is_replaced_does_not() {
        let root = tempfile::tempdir().unwrap();
        assert!(check(&root.path().join("missing"), "new", 10, 10).is_ok());
        for (name, bytes) in [("a", 100), ("b", 50), (".writing-c-1", 1000)] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("adapter_model.safetensors"), vec![0; bytes]).unwrap();
        }
        fs::write(root.path().join("notes.txt"), "not an adapter").unwrap();
        assert!(check(root.path(), "new", 50, 200).is_ok());
        let message = check(root.path(), "new", 51, 200).unwrap_err().to_string();
        for part in ["\"new\"", "51", "150", "200", "--adapter-quota", "DELETE /adapter/"] {
            assert!(message.contains(part), "{part} is missing in: {message}");
        }
        assert!(check(root.path(), "a", 150, 200).is_ok(), "a is replaced");
        assert!(root.path().join("a").exists(), "nothing is deleted");
    }
}
