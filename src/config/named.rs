//! Names that requests may say: of files of the configs folder, where a name stays a name whatever it tries to be,
//! and of the entries in them. Knows nothing of what the entries are.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _};
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};

use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::adapter::FieldError;

/// Bytes that such a file may have.
const MAX_BYTES: u64 = 1 << 20;

/// A map in which no name comes twice; of two, one would be lost without a word.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Named<T>(BTreeMap<String, T>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Deref for Named<T> {
    type Target = BTreeMap<String, T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for Entries<T> {
            type Value = BTreeMap<String, T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("entries by their names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("two entries are called {name}")));
                    }
                    entries.insert(name, map.next_value_seed(Entry(PhantomData))?);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData)).map(Self)
    }
}

/// One entry. It is made of its fields while the reader still knows its place, so that whatever is wrong with it is
/// said with its name and its line.
struct Entry<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for Entry<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for Entry<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("fields by their names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let mut fields = serde_json::Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format!("{name} is given twice")));
            }
            fields.insert(name, map.next_value()?);
        }
        T::deserialize(serde_json::Value::Object(fields)).map_err(A::Error::custom)
    }
}

/// Whether a text can be the name of an entry.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && name.len() <= 64 && name.bytes().all(fits)
}

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
