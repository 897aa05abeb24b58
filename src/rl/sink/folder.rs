//! Uploads into a folder of this machine, such as a mounted NAS: a file has its name only when it is whole and on
//! disk, and no file is ever written over.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::{Parcel, Refusal, unreadable};
use crate::adapters::sync_folder;
use crate::config::rl_sinks::FolderSink;
use crate::rl::outbox::hex;

/// Bytes that are compared at once.
const BLOCK: usize = 64 << 10;

/// The folder.
#[derive(Debug)]
pub(in crate::rl) struct Folder {
    root: PathBuf,
}

impl Folder {
    pub(super) fn open(sink: &FolderSink) -> Self {
        Self { root: PathBuf::from(&sink.path) }
    }

    /// As [`super::Sink::put`].
    pub(super) async fn put(&self, parcel: &Parcel) -> Result<(), Refusal> {
        let (root, parcel) = (self.root.clone(), parcel.clone());
        let put = tokio::task::spawn_blocking(move || put(&root, &parcel));
        put.await.unwrap_or_else(|error| Err(Refusal::passing(format!("the copying ended: {error}"))))
    }
}

fn put(root: &Path, parcel: &Parcel) -> Result<(), Refusal> {
    if !root.is_dir() {
        let root = root.display();
        return Err(Refusal::passing(format!("{root} is no folder that is there; mount or make it")));
    }
    let target = root.join(&parcel.key);
    let refused =
        |error: io::Error| Refusal::passing(format!("{} cannot be written: {error}", target.display()));
    if target.symlink_metadata().is_ok() {
        return compare(parcel, &target);
    }
    let mut content = File::open(&parcel.file).map_err(|error| unreadable(parcel, &error))?;
    let folder = target.parent().unwrap_or(root);
    fs::create_dir_all(folder).map_err(refused)?;
    // What an earlier attempt left under this name is written over.
    let part = folder.join(format!(".writing-{}", parcel.id));
    let written = write(&mut content, &part, parcel.bytes).and_then(|()| name(&part, &target));
    // Gone already where it was renamed; where removing fails, the next upload of this id writes it over.
    let _ = fs::remove_file(&part);
    match written {
        Ok(()) => {
            // Folders that were made on the way are in the folders above them.
            for above in folder.ancestors().take_while(|above| above.starts_with(root)) {
                sync_folder(above).map_err(refused)?;
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => compare(parcel, &target),
        Err(error) => Err(refused(error)),
    }
}

fn write(content: &mut File, part: &Path, bytes: u64) -> io::Result<()> {
    let mut file = File::create(part)?;
    let copied = io::copy(content, &mut file)?;
    if copied != bytes {
        return Err(io::Error::other(format!("{copied} bytes came where {bytes} were sealed")));
    }
    file.sync_all()
}

/// Gives the file its name, unless another has it.
fn name(part: &Path, target: &Path) -> io::Result<()> {
    match fs::hard_link(part, target) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) =>
        {
            // Some file systems know no links. Then only this process is kept from writing over a file.
            match target.symlink_metadata() {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => fs::rename(part, target),
            }
        }
        linked => linked,
    }
}

/// Whether the file that is there is this upload.
fn compare(parcel: &Parcel, target: &Path) -> Result<(), Refusal> {
    let is_same = || -> io::Result<bool> {
        let meta = fs::metadata(target)?;
        if !meta.is_file() || meta.len() != parcel.bytes {
            return Ok(false);
        }
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        let mut file = File::open(target)?;
        let mut block = vec![0; BLOCK];
        loop {
            match file.read(&mut block)? {
                0 => break,
                n => hash.update(&block[..n]),
            }
        }
        Ok(hex(hash.finish().as_ref()) == parcel.sha256())
    };
    match is_same() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::Final(format!(
            "{} holds something else already, and nothing is written over; move it away",
            target.display()
        ))),
        Err(error) => Err(Refusal::passing(format!("{} cannot be read: {error}", target.display()))),
    }
}
