//! Adapter folders on disk: finding them without leaving the folder of adapters, telling whether they changed,
//! reading them whole, listing and removing them. Knows no engine; all of it blocks.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::config::LoraConfig;
use super::durable::write_file;
use super::peft::{self, Plan};
use super::place::bury;
use super::write::{CONFIG, TENSORS};
use super::{AdapterError, AdapterInfo, check_name};
use crate::nn::lora::{LoraWeights, Site};

/// What our own training leaves beside PEFT's files.
const MANIFEST: &str = "gurukul.json";
/// Folders on their way out; no adapter name begins with a dot.
pub(super) const REMOVED: &str = ".removed-";
/// PEFT's configurations have a few kilobytes.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// Tells one state of an adapter's files from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp([FileStamp; 2]);

#[derive(Debug, Clone, PartialEq, Eq)]
struct FileStamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

/// The two files of an adapter, known to lie inside the folder of adapters.
#[derive(Debug)]
pub(super) struct Located {
    config: PathBuf,
    tensors: PathBuf,
    manifest: Option<PathBuf>,
}

/// An adapter read from disk.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) weights: LoraWeights,
    /// Fields of its configuration that are set and unknown here.
    pub(super) unknown_fields: Vec<String>,
}

/// Our own notes beside an adapter.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) training_job: Option<String>,
    pub(super) metrics: Option<serde_json::Value>,
    /// The generation that the adapter was published under.
    pub(super) generation: Option<u64>,
    /// The files that this generation is of.
    pub(super) files: Option<[Written; 2]>,
}

/// What of a file's state outlives the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Written {
    bytes: u64,
    modified_ns: u64,
}

impl Manifest {
    /// The generation that was published, and whether the files are still those. A number that no counting leads
    /// to is nobody's.
    fn published(&self, stamp: &Stamp) -> Option<Published> {
        let generation = self.generation.filter(|&g| g > 0 && g < 1 << 53)?;
        Some(Published { generation, untouched: self.files.as_ref() == Some(&stamp.written()) })
    }
}

/// The generation that an adapter was last published under, by this process or one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) generation: u64,
    /// Whether the files are those that were published.
    pub(super) untouched: bool,
}

impl Stamp {
    fn written(&self) -> [Written; 2] {
        self.0.each_ref().map(|file| {
            let since = file.modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
            Written { bytes: file.bytes, modified_ns: since.as_nanos() as u64 }
        })
    }
}

/// Whether something of this name lies in the folder, whatever it is.
pub(super) fn exists(root: &Path, name: &str) -> Result<bool, AdapterError> {
    match fs::symlink_metadata(root.join(name)) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(AdapterError::unreadable(name, &e)),
    }
}

/// Resolves the files of an adapter. The name has passed [`check_name`]; links are followed only while they stay
/// inside `root`.
pub(super) fn locate(root: &Path, name: &str) -> Result<Located, AdapterError> {
    let failed = |e: io::Error| AdapterError::unreadable(name, &e);
    if !exists(root, name)? {
        return Err(AdapterError::NotFound { name: name.to_owned() });
    }
    let inside_of = root.canonicalize().map_err(failed)?;
    locate_in(&root.join(name), Some(&inside_of), name)
}

/// Resolves the files of an adapter's folder; links are followed only while they stay in `inside_of`, or
/// anywhere. `name` is for messages.
pub(super) fn locate_in(
    folder: &Path,
    inside_of: Option<&Path>,
    name: &str,
) -> Result<Located, AdapterError> {
    let failed = |e: io::Error| AdapterError::unreadable(name, &e);
    let inside = |path: &Path, what: &str| -> Result<Option<PathBuf>, AdapterError> {
        match path.canonicalize() {
            Ok(real) if inside_of.is_none_or(|root| real.starts_with(root)) => Ok(Some(real)),
            Ok(_) => Err(AdapterError::invalid(
                name,
                format!("{what} is a link that leaves the adapters folder; copy the files into it"),
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(e)),
        }
    };
    let folder =
        inside(folder, "it")?.ok_or_else(|| AdapterError::invalid(name, "it is a link to nothing"))?;
    if !folder.is_dir() {
        return Err(AdapterError::invalid(name, "it is not a folder"));
    }
    let file = |file_name: &str| -> Result<Option<PathBuf>, AdapterError> {
        let found = inside(&folder.join(file_name), file_name)?;
        match found {
            // A pipe or a device would block the reader for ever.
            Some(path) if !path.is_file() => {
                Err(AdapterError::invalid(name, format!("{file_name} is not a regular file")))
            }
            found => Ok(found),
        }
    };
    let config = file(CONFIG)?.ok_or_else(|| AdapterError::invalid(name, format!("it has no {CONFIG}")))?;
    let tensors = file(TENSORS)?.ok_or_else(|| {
        let pickled = folder.join("adapter_model.bin").exists();
        let remedy =
            if pickled { "; adapter_model.bin is not read: save with safe_serialization=True" } else { "" };
        AdapterError::invalid(name, format!("it has no {TENSORS}{remedy}"))
    })?;
    Ok(Located { config, tensors, manifest: file(MANIFEST)? })
}

/// Writes our notes beside PEFT's two files in `folder`, of which they are to be the notes.
pub(super) fn write_manifest(folder: &Path, mut manifest: Manifest) -> io::Result<()> {
    manifest.files = Some(stamp_of(&folder.join(CONFIG), &folder.join(TENSORS))?.written());
    write_file(&folder.join(MANIFEST), serde_json::to_string_pretty(&manifest)?.as_bytes())
}

fn stamp_of(config: &Path, tensors: &Path) -> io::Result<Stamp> {
    let of = |path: &Path| -> io::Result<FileStamp> {
        let meta = fs::metadata(path)?;
        Ok(FileStamp { modified: meta.modified().ok(), bytes: meta.len(), inode: inode(&meta) })
    };
    Ok(Stamp([of(config)?, of(tensors)?]))
}

impl Located {
    /// The present state of both files.
    pub(super) fn stamp(&self, name: &str) -> Result<Stamp, AdapterError> {
        stamp_of(&self.config, &self.tensors).map_err(|e| AdapterError::unreadable(name, &e))
    }

    /// The generation that the notes tell; none where there are no notes or they cannot be read.
    pub(super) fn published(&self, name: &str, stamp: &Stamp) -> Option<Published> {
        self.manifest(name)?.published(stamp)
    }

    fn manifest(&self, name: &str) -> Option<Manifest> {
        let path = self.manifest.as_ref()?;
        let notes = read_small(path).and_then(|json| Ok(serde_json::from_slice::<Manifest>(&json)?));
        // The weights do not depend on it, so the adapter stays usable.
        notes.inspect_err(|error| tracing::warn!(adapter = name, %error, "{MANIFEST} cannot be read")).ok()
    }

    /// Reads everything once, checked, with the stamp that belongs to it.
    pub(super) fn load(&self, name: &str, sites: &[Site]) -> Result<(Stamp, Loaded), AdapterError> {
        let failed = |e: io::Error| AdapterError::unreadable(name, &e);
        let stamp = self.stamp(name)?;
        let read = || -> Result<Loaded, AdapterError> {
            let (config, plan, mut file) = self.open(name, sites)?;
            let mut bytes = Vec::with_capacity(stamp.0[1].bytes as usize);
            // The plan has read the header; the values come from one pass over the whole file.
            io::Seek::rewind(&mut file).map_err(failed)?;
            file.read_to_end(&mut bytes).map_err(failed)?;
            let weights = plan.read(&bytes).map_err(|e| AdapterError::invalid(name, e.to_string()))?;
            Ok(Loaded { weights, unknown_fields: config.unknown })
        };
        let loaded = read();
        if self.stamp(name)? != stamp {
            let reason = "its files changed while they were read; try again when they are written";
            return Err(AdapterError::invalid(name, reason));
        }
        Ok((stamp, loaded?))
    }

    /// Configuration and header, checked against the model; the open file stands after its header.
    fn open(&self, name: &str, sites: &[Site]) -> Result<(LoraConfig, Plan, File), AdapterError> {
        let config = self.config(name)?;
        let failed = |e: io::Error| AdapterError::unreadable(name, &e);
        let mut file = File::open(&self.tensors).map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        let header = peft::read_header(&mut file, file_bytes).map_err(failed)?;
        let plan = header.and_then(|header| Plan::new(&config, &header, sites));
        Ok((config, plan.map_err(|e| AdapterError::invalid(name, e.to_string()))?, file))
    }

    fn config(&self, name: &str) -> Result<LoraConfig, AdapterError> {
        let json = read_small(&self.config).map_err(|e| AdapterError::unreadable(name, &e))?;
        LoraConfig::parse(&json).map_err(|e| AdapterError::invalid(name, e.to_string()))
    }
}

/// What the disk says of one adapter, broken or not, and the state that it was read in.
///
/// # Errors
/// [`AdapterError::NotFound`]; everything else goes into [`AdapterInfo::error`].
pub(super) fn describe(
    root: &Path,
    name: &str,
    sites: &[Site],
) -> Result<(AdapterInfo, Option<Stamp>), AdapterError> {
    let mut info = AdapterInfo::named(name);
    let located = match locate(root, name) {
        Ok(located) => located,
        Err(e @ AdapterError::NotFound { .. }) => return Err(e),
        Err(e) => {
            info.error = Some(e.to_string());
            return Ok((info, None));
        }
    };
    let stamp = match located.stamp(name) {
        Ok(stamp) => stamp,
        Err(e) => {
            info.error = Some(e.to_string());
            return Ok((info, None));
        }
    };
    info.bytes = stamp.0[1].bytes;
    info.created_at =
        stamp.0[1].modified.map(|t| humantime::format_rfc3339_seconds(t.max(UNIX_EPOCH)).to_string());
    if let Ok(config) = located.config(name) {
        info.rank = Some(config.r);
        info.alpha = Some(config.lora_alpha);
        info.target_modules = config.target_names();
        info.base_model = config.base_model;
    }
    info.error = located.open(name, sites).err().map(|e| e.to_string());
    if let Some(notes) = located.manifest(name) {
        info.generation = notes.published(&stamp).filter(|p| p.untouched).map(|p| p.generation);
        (info.training_job, info.metrics) = (notes.training_job, notes.metrics);
    }
    Ok((info, Some(stamp)))
}

/// Everything in the folder, by name. A folder that nobody made yet has none.
pub(super) fn describe_all(root: &Path, sites: &[Site]) -> io::Result<Vec<(AdapterInfo, Option<Stamp>)>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Hidden entries and loose files are nobody's adapters; a link may lead to one.
        if name.starts_with('.') || entry.file_type().is_ok_and(|t| t.is_file()) {
            continue;
        }
        let described = match check_name(&name) {
            Ok(()) => describe(root, &name, sites),
            Err(e) => Ok((AdapterInfo { error: Some(e.to_string()), ..AdapterInfo::named(&name) }, None)),
        };
        // An adapter that is deleted between the listing and the look is not there.
        all.extend(described.ok());
    }
    all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    Ok(all)
}

/// Removes an adapter: gone under its name at once, then from the disk.
pub(super) fn remove(root: &Path, name: &str) -> Result<(), AdapterError> {
    let failed = |e: io::Error| AdapterError::io(format!("the adapter {name:?} could not be deleted"), &e);
    let grave = root.join(format!("{REMOVED}{name}-{}", uuid::Uuid::new_v4().simple()));
    match fs::rename(root.join(name), &grave) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(AdapterError::NotFound { name: name.to_owned() });
        }
        Err(e) => return Err(failed(e)),
    }
    // The name is free only when the folder's own entry is on disk.
    if let Ok(folder) = File::open(root) {
        folder.sync_all().map_err(failed)?;
    }
    bury(&grave);
    Ok(())
}

fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_JSON_BYTES} bytes")));
    }
    Ok(bytes)
}

#[cfg(unix)]
fn inode(meta: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(meta)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
