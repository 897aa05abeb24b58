//! Checkpoints of a job on disk: everything that the steps after one depend on, in a folder that PEFT and our own
//! registry read as an adapter. Knows no engine and no data source; all of it blocks.
//!
//! ```text
//! JOB/checkpoint-120/
//!   adapter_config.json, adapter_model.safetensors   PEFT's
//!   trainer.safetensors                              weights and moments, f32
//!   dataset.bin                                      where the data goes on
//!   pending.json                                     examples that were taken and not learned from
//!   state.json                                       the rest, and sizes and hashes of the files above
//! ```
//!
//! A folder has its name only when everything in it is on disk; `state.json` tells whether it still is.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{Progress, TrainError};
use crate::adapters::{TrainedAdapter, make_folder, safetensors_bytes, sync_folder, write_file};
use crate::engine::training::{LossScale, TrainSequence, TrainerSnapshot};
use crate::nn::lora::Site;

const NAME: &str = "checkpoint-";
const WRITING: &str = ".writing-";
const TRAINER: &str = "trainer.safetensors";
const DATASET: &str = "dataset.bin";
const PENDING: &str = "pending.json";
const STATE: &str = "state.json";

/// What a job remembers between two steps, besides its trainer and its data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The latest figures, all finite.
    pub progress: Progress,
    /// Steps without a finite gradient and loss since the last good one.
    pub bad_in_a_row: u32,
    /// Step of the latest evaluation.
    pub evaluated: Option<u64>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub without_better: u64,
    /// Training ended early; what is left is to publish.
    pub finished: bool,
    /// Tokens that a pass takes at most, as the job began: the order of sums follows from it. 0 before that.
    pub tokens_per_pass: usize,
}

/// An evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// The bits of its loss: text would not give back every value.
    loss_bits: u64,
}

impl Best {
    /// The evaluation of this step.
    pub fn new(step: u64, loss: f64) -> Self {
        Self { step, loss_bits: loss.to_bits() }
    }

    /// Mean loss a supervised token.
    pub fn loss(self) -> f64 {
        f64::from_bits(self.loss_bits)
    }
}

/// One moment of a job, between two steps.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Counters and decisions.
    pub state: State,
    /// Weights and moments.
    pub trainer: TrainerSnapshot,
    /// What `Dataset::save` wrote.
    pub dataset: Vec<u8>,
    /// Examples that were taken from the data for the next step.
    pub pending: Vec<TrainSequence>,
}

/// `state.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    state: State,
    trainer_steps: u64,
    loss_scale: LossScale,
    files: BTreeMap<String, Written>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    bytes: u64,
    sha256: String,
}

/// The checkpoints of one job. While it lives, no other process takes the job.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep_last: usize,
    _lock: Option<File>,
}

/// Why a checkpoint is not read.
enum Unread {
    /// Something of it is missing or changed.
    Torn(String),
    Io(io::Error),
}

impl Checkpoints {
    /// Opens a job's folder, makes it where it is not there, and clears what a crash left half-written. The newest
    /// `keep_last` checkpoints will be kept, besides the best.
    ///
    /// # Errors
    /// A folder that cannot be made or read; a job that another process works on.
    pub fn open(folder: PathBuf, keep_last: usize) -> Result<Self, TrainError> {
        let failed = |source| TrainError::Io {
            what: format!("the job's folder {} cannot be used", folder.display()),
            source,
        };
        fs::create_dir_all(&folder).map_err(failed)?;
        let lock = lock(&folder).map_err(failed)?.ok_or_else(|| {
            TrainError::Failed(format!("another process works on the job in {}", folder.display()))
        })?;
        for entry in fs::read_dir(&folder).map_err(failed)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(WRITING) {
                remove(&entry.path());
            }
        }
        Ok(Self { folder, keep_last, _lock: lock })
    }

    /// Writes a checkpoint and lets go of those that are not needed any more. One of this step that is there
    /// already stays: the same job at the same step has the same bits.
    ///
    /// # Errors
    /// What the disk reports; the checkpoints before it are as they were.
    pub fn write(
        &self,
        checkpoint: &Checkpoint,
        adapter: &TrainedAdapter,
        sites: &[Site],
    ) -> Result<(), TrainError> {
        let step = checkpoint.state.progress.step;
        let target = self.path(step);
        if !target.exists() {
            let making = self.folder.join(format!("{WRITING}{NAME}{step}"));
            make_folder(&making, &target, |folder| fill(folder, checkpoint, adapter, sites)).map_err(
                |source| TrainError::Io {
                    what: format!(
                        "the checkpoint of step {step} could not be written to {}",
                        target.display()
                    ),
                    source,
                },
            )?;
        }
        let best = checkpoint.state.best.map(|best| best.step);
        let older = self.steps().unwrap_or_default();
        for &old in older.iter().rev().skip(self.keep_last).filter(|&&old| Some(old) != best && old != step) {
            remove(&self.path(old));
        }
        Ok(())
    }

    /// The newest checkpoint that is whole; newer ones that are not are removed.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn latest(&self) -> Result<Option<Checkpoint>, TrainError> {
        let failed = |source| TrainError::Io {
            what: format!("the checkpoints in {} cannot be read", self.folder.display()),
            source,
        };
        for step in self.steps().map_err(failed)?.into_iter().rev() {
            match read(&self.path(step)) {
                Ok(checkpoint) if checkpoint.state.progress.step == step => return Ok(Some(checkpoint)),
                Ok(_) => self.drop_torn(step, "it is of another step"),
                Err(Unread::Torn(reason)) => self.drop_torn(step, &reason),
                Err(Unread::Io(source)) => return Err(failed(source)),
            }
        }
        Ok(None)
    }

    /// The checkpoint of one step.
    ///
    /// # Errors
    /// It is not there, or not whole.
    pub fn read(&self, step: u64) -> Result<Checkpoint, TrainError> {
        let path = self.path(step);
        read(&path).map_err(|unread| {
            let source = match unread {
                Unread::Torn(reason) => io::Error::new(io::ErrorKind::InvalidData, reason),
                Unread::Io(source) => source,
            };
            TrainError::Io { what: format!("the checkpoint {} cannot be read", path.display()), source }
        })
    }

    /// The folder of a step's checkpoint, whether or not it is there.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{NAME}{step}"))
    }

    /// Steps that have a folder, ascending.
    fn steps(&self) -> io::Result<Vec<u64>> {
        let mut steps = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            let step = name.strip_prefix(NAME).and_then(|step| step.parse::<u64>().ok());
            // `checkpoint-007` is nobody's.
            steps.extend(step.filter(|step| name == format!("{NAME}{step}")));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn drop_torn(&self, step: u64, reason: &str) {
        let path = self.path(step);
        tracing::warn!(path = %path.display(), reason, "a checkpoint is not whole and is removed");
        remove(&path);
    }
}

fn fill(folder: &Path, checkpoint: &Checkpoint, adapter: &TrainedAdapter, sites: &[Site]) -> io::Result<()> {
    adapter.write(folder, sites)?;
    write_file(&folder.join(TRAINER), &safetensors_bytes(&checkpoint.trainer.tensors)?)?;
    write_file(&folder.join(DATASET), &checkpoint.dataset)?;
    write_file(&folder.join(PENDING), &pending_json(&checkpoint.pending)?)?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, written(&fs::read(entry.path())?));
    }
    let manifest = Manifest {
        version: 1,
        state: checkpoint.state.clone(),
        trainer_steps: checkpoint.trainer.steps,
        loss_scale: checkpoint.trainer.loss_scale,
        files,
    };
    write_file(&folder.join(STATE), serde_json::to_string_pretty(&manifest)?.as_bytes())
}

fn read(folder: &Path) -> Result<Checkpoint, Unread> {
    let file = |name: &str| {
        fs::read(folder.join(name)).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                Unread::Torn(format!("{name} is missing"))
            }
            _ => Unread::Io(e),
        })
    };
    let torn = |name: &str, why: &dyn std::fmt::Display| Unread::Torn(format!("{name}: {why}"));
    let manifest: Manifest = serde_json::from_slice(&file(STATE)?).map_err(|e| torn(STATE, &e))?;
    if manifest.version != 1 {
        return Err(torn(STATE, &format!("version {} is not known here", manifest.version)));
    }
    let mut contents = BTreeMap::new();
    for (name, expected) in &manifest.files {
        let bytes = file(name)?;
        if written(&bytes) != *expected {
            return Err(torn(name, &"it is not as it was written"));
        }
        contents.insert(name.as_str(), bytes);
    }
    let mut take = |name: &str| contents.remove(name).ok_or_else(|| torn(STATE, &format!("names no {name}")));
    let tensors = candle_core::safetensors::load_buffer(&take(TRAINER)?, &Device::Cpu);
    let tensors = tensors.map_err(|e| torn(TRAINER, &e))?;
    Ok(Checkpoint {
        trainer: TrainerSnapshot {
            tensors: tensors.into_iter().collect(),
            steps: manifest.trainer_steps,
            loss_scale: manifest.loss_scale,
        },
        dataset: take(DATASET)?,
        pending: pending_from(&take(PENDING)?).map_err(|e| torn(PENDING, &e))?,
        state: manifest.state,
    })
}

/// Tokens and the bits of their weights, a pair an example.
fn pending_json(pending: &[TrainSequence]) -> io::Result<Vec<u8>> {
    let bits = |sequence: &TrainSequence| sequence.weights.iter().map(|w| w.to_bits()).collect();
    let pairs: Vec<(&[u32], Vec<u32>)> =
        pending.iter().map(|sequence| (sequence.tokens.as_slice(), bits(sequence))).collect();
    Ok(serde_json::to_vec(&pairs)?)
}

fn pending_from(json: &[u8]) -> serde_json::Result<Vec<TrainSequence>> {
    let pairs: Vec<(Vec<u32>, Vec<u32>)> = serde_json::from_slice(json)?;
    let sequence = |(tokens, bits): (Vec<u32>, Vec<u32>)| {
        TrainSequence::new(tokens, bits.into_iter().map(f32::from_bits).collect())
    };
    Ok(pairs.into_iter().map(sequence).collect())
}

fn written(bytes: &[u8]) -> Written {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let sha256 = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Written { bytes: bytes.len() as u64, sha256 }
}

/// Takes a folder for this process until the handle is dropped. `None`: another has it. `Some(None)`: there are
/// no locks here.
fn lock(folder: &Path) -> io::Result<Option<Option<File>>> {
    if cfg!(not(unix)) {
        return Ok(Some(None));
    }
    let file = File::open(folder)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Some(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Ok(Some(None)),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

fn remove(path: &Path) {
    let removed = fs::remove_dir_all(path).and_then(|()| path.parent().map_or(Ok(()), sync_folder));
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "an old checkpoint remains");
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
