//! Files of the configs folder that a request may name: a name stays a name, whatever it tries to be. Knows
//! nothing of what is in them.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use super::adapter::FieldError;

/// Bytes that such a file may have.
const MAX_BYTES: u64 = 1 << 20;

fn error(field: &str, message: impl Into<String>) -> FieldError {
    FieldError { field: field.to_owned(), message: message.into() }
}

/// The error for a file that somebody asked for and that is not there.
pub(super) fn missing(field: &str, name: &str) -> FieldError {
    error(
        field,
        format!("names {name}, which is not in the configs folder; correct the name or create the file"),
    )
}

/// The error for a file that is not what it should be.
pub(super) fn unusable(field: &str, name: &str, why: &dyn fmt::Display) -> FieldError {
    error(field, format!("names {name}, which cannot be used: {why}"))
}

/// The text of the file `name` inside the folder; `None` when there is none. `field` is what the name came in.
pub(super) fn read(configs_dir: &Path, field: &str, name: &str) -> Result<Option<String>, FieldError> {
    let inside = relative(configs_dir, field, name)?;
    let not_found =
        |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    let resolve = || -> io::Result<(PathBuf, PathBuf)> {
        let folder = configs_dir.canonicalize()?;
        let file = folder.join(&inside).canonicalize()?;
        Ok((folder, file))
    };
    let (folder, file) = match resolve() {
        Ok(found) => found,
        Err(error) if not_found(&error) => return Ok(None),
        Err(error) => return Err(unusable(field, name, &error)),
    };
    // A link may lead anywhere.
    if !file.starts_with(&folder) {
        return Err(error(field, format!("names {name}, which leads out of the configs folder")));
    }
    let text = || -> io::Result<Option<String>> {
        let meta = std::fs::metadata(&file)?;
        if !meta.is_file() {
            return Err(io::Error::other("it is no plain file"));
        }
        let mut bytes = Vec::new();
        std::fs::File::open(&file)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(io::Error::other("it has more than 1 MiB"));
        }
        String::from_utf8(bytes).map(Some).map_err(|_| io::Error::other("it is no UTF-8 text"))
    };
    text().map_err(|error| unusable(field, name, &error))
}

/// The name as a path below the folder.
fn relative(configs_dir: &Path, field: &str, name: &str) -> Result<PathBuf, FieldError> {
    let parts: Option<Vec<&std::ffi::OsStr>> = Path::new(name)
        .components()
        .filter(|part| *part != Component::CurDir)
        .map(|part| match part {
            Component::Normal(part) => Some(part),
            _ => None,
        })
        .collect();
    let is_name = !name.is_empty() && name.len() <= 255 && !name.chars().any(char::is_control);
    let Some(parts) = parts.filter(|parts| is_name && !parts.is_empty()) else {
        return Err(error(
            field,
            format!(
                "must name a file inside the configs folder, such as my_settings.yaml, not '{}'",
                name.chars().take(80).collect::<String>().escape_debug()
            ),
        ));
    };
    // Older clients send the folder with the name: configs/adapter_config.yaml.
    let folder = configs_dir.canonicalize().ok();
    let names_folder = |part| {
        configs_dir.file_name() == Some(part) || folder.as_deref().and_then(Path::file_name) == Some(part)
    };
    let skipped = usize::from(parts.len() > 1 && names_folder(parts[0]));
    Ok(parts[skipped..].iter().collect())
}
