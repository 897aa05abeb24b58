//! The demo model that this binary carries: a toy of seven million parameters that translates short sentences into
//! ten languages, for a first try on a machine without a network. `examples/pretrain_demo` makes it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::adapters::{make_folder, write_file};

/// The name that it is served under.
pub(super) const NAME: &str = "gurukul-demo";

/// Its files.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../assets/demo/config.json")),
    ("generation_config.json", include_bytes!("../../assets/demo/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../assets/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../assets/demo/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../assets/demo/model.safetensors")),
];

/// The model's folder in the folder `models`, where it is written unless it is there already. Every version of
/// the model has a folder of its own, so that processes of two versions do not disturb each other.
///
/// # Errors
/// A folder that cannot be written.
pub(super) fn unpack(models: &Path) -> Result<PathBuf> {
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    FILES.iter().for_each(|(_, bytes)| hash.update(bytes));
    let version: String = hash.finish().as_ref()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = models.join(format!("{NAME}-{version}"));
    if is_whole(&folder) {
        return Ok(folder);
    }
    write(models, &folder).with_context(|| {
        format!(
            "the demo model cannot be written to {}; choose another --data-dir, or name a model with --model",
            folder.display()
        )
    })?;
    Ok(folder)
}

fn write(models: &Path, folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(models)?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    // Two processes may begin at once; each writes its own, and the first to be done gives it the name.
    let making = models.join(format!(".writing-{NAME}-{}", std::process::id()));
    let made = make_folder(&making, folder, |making| {
        FILES.iter().try_for_each(|(name, bytes)| write_file(&making.join(name), bytes))
    });
    if is_whole(folder) { Ok(()) } else { made }
}

fn is_whole(folder: &Path) -> bool {
    FILES.iter().all(|(name, bytes)| fs::read(folder.join(name)).is_ok_and(|found| found == *bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_once_and_mended_when_it_is_damaged() {
        let models = tempfile::tempdir().unwrap();
        let folder = unpack(models.path()).unwrap();
        let written = fs::metadata(folder.join("model.safetensors")).unwrap().modified().unwrap();
        assert_eq!(unpack(models.path()).unwrap(), folder);
        assert_eq!(fs::metadata(folder.join("model.safetensors")).unwrap().modified().unwrap(), written);

        fs::write(folder.join("tokenizer.json"), "{").unwrap();
        assert_eq!(unpack(models.path()).unwrap(), folder);
        assert!(is_whole(&folder));
        assert_eq!(fs::read_dir(models.path()).unwrap().count(), 1, "nothing else stays");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named_with_the_remedy() {
        let models = tempfile::NamedTempFile::new().unwrap();
        let error = format!("{:#}", unpack(models.path()).unwrap_err());
        assert!(error.contains("--data-dir") && error.contains(NAME), "{error}");
    }
}
