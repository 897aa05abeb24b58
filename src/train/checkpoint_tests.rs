//! Tests of [`super`]: what is written is read back bit for bit, and whatever is torn is never taken.

use candle_core::Tensor;

use super::*;
use crate::engine::training::LoraSpec;
use crate::nn::lora::{LoraWeights, SiteWeights};

fn sites() -> Vec<Site> {
    vec![Site { name: "model.layers.0.q_proj".into(), in_features: 2, out_features: 2 }]
}

/// Values whose bits a conversion would lose.
fn tensor(shape: (usize, usize), seed: u32) -> Tensor {
    let values: Vec<f32> =
        (0..shape.0 * shape.1).map(|i| f32::from_bits(0x3F80_0001 + seed * 7919 + i as u32 * 13)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn adapter() -> TrainedAdapter {
    let lora = LoraSpec { rank: 1, alpha: 2.0, dropout: 0.0, rslora: false, sites: vec![0], seed: 0 };
    let part =
        SiteWeights { site: 0, a: tensor((1, 2), 1), b: tensor((2, 1), 2), scale: 2.0, magnitude: None };
    let weights = LoraWeights { sites: vec![part] };
    TrainedAdapter { lora, weights, base_model: "base".into(), family: "llama".into() }
}

fn checkpoint(step: u64) -> Checkpoint {
    let name = "model.layers.0.q_proj.lora_A";
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::from([
        (name.to_owned(), tensor((1, 2), 1)),
        (format!("{name}.m"), tensor((1, 2), step as u32)),
        (format!("{name}.v"), tensor((1, 2), 4)),
    ]);
    // What a moment may hold at an edge.
    let edge = [f32::MIN_POSITIVE / 8.0, -0.0];
    tensors.insert("edge".into(), Tensor::from_slice(&edge, (1, 2), &Device::Cpu).unwrap());
    Checkpoint {
        state: State {
            progress: Progress { step, loss: 0.1 + 0.2, eval_loss: Some(1.0), ..Progress::default() },
            bad_in_a_row: 3,
            evaluated: Some(step),
            best: Some(Best::new(1, f64::from_bits(0x3FD5_5555_5555_5557))),
            without_better: 2,
            finished: true,
            tokens_per_pass: 256,
        },
        trainer: TrainerSnapshot {
            tensors,
            steps: step,
            loss_scale: LossScale { factor: 32768.0, good_steps: 17 },
        },
        dataset: vec![0, 255, 10, 13],
        pending: vec![TrainSequence::new(vec![1, 2, 3], vec![0.0, 0.1, 1.0])],
    }
}

struct Job {
    dir: tempfile::TempDir,
    store: Checkpoints,
}

impl Job {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::open(dir.path().join("job"), 2).unwrap();
        Self { dir, store }
    }

    fn write(&self, step: u64) {
        self.store.write(&checkpoint(step), &adapter(), &sites()).unwrap();
    }

    fn latest_step(&self) -> Option<u64> {
        self.store.latest().unwrap().map(|c| c.state.progress.step)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("job")).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn bits(tensors: &BTreeMap<String, Tensor>) -> Vec<(String, Vec<u32>)> {
    let of = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    tensors.iter().map(|(n, t)| (n.clone(), of(t).into_iter().map(f32::to_bits).collect())).collect()
}

#[test]
fn a_checkpoint_comes_back_bit_for_bit() {
    let job = Job::new();
    assert_eq!(job.latest_step(), None);
    job.write(7);
    let (written, read) = (checkpoint(7), job.store.latest().unwrap().unwrap());
    assert_eq!(bits(&read.trainer.tensors), bits(&written.trainer.tensors));
    assert_eq!((read.trainer.steps, read.trainer.loss_scale), (7, written.trainer.loss_scale));
    assert_eq!(read.state.best, written.state.best);
    assert_eq!((read.state.evaluated, read.state.finished), (Some(7), true));
    assert_eq!((read.state.bad_in_a_row, read.state.without_better), (3, 2));
    assert_eq!(read.state.tokens_per_pass, 256);
    assert_eq!((read.dataset, read.pending), (written.dataset, written.pending));
    // It is an adapter as well.
    let weights = crate::adapters::read_folder(&job.store.path(7), &sites()).unwrap();
    assert_eq!(weights.sites[0].scale, 2.0);
    assert_eq!(job.store.read(7).unwrap().trainer.steps, 7);
    assert!(job.store.read(8).unwrap_err().to_string().contains("checkpoint-8"));
}

#[test]
fn the_newest_two_and_the_best_are_kept() {
    let job = Job::new();
    for step in [1, 2, 3, 20, 100] {
        job.write(step);
    }
    assert_eq!(job.names(), ["checkpoint-1", "checkpoint-100", "checkpoint-20"], "1 is the best");
    assert_eq!(job.latest_step(), Some(100));
    let three = Checkpoints::open(job.dir.path().join("other"), 3).unwrap();
    for step in [2, 3, 20, 100] {
        three.write(&checkpoint(step), &adapter(), &sites()).unwrap();
    }
    assert_eq!(three.steps().unwrap(), [3, 20, 100]);
    // Written again: it is there already.
    job.write(20);
    assert_eq!(job.names(), ["checkpoint-1", "checkpoint-100", "checkpoint-20"]);
}

#[test]
fn a_torn_checkpoint_is_never_taken() {
    for file in ["adapter_config.json", "adapter_model.safetensors", TRAINER, DATASET, PENDING, STATE] {
        type Change = fn(&Path);
        let changes: [(&str, Change); 5] = [
            ("missing", |path| fs::remove_file(path).unwrap()),
            ("empty", |path| fs::write(path, "").unwrap()),
            ("cut", |path| {
                let bytes = fs::read(path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
            }),
            ("changed", |path| {
                let mut bytes = fs::read(path).unwrap();
                let last = bytes.len() - 2;
                bytes[last] ^= 0x10;
                fs::write(path, bytes).unwrap();
            }),
            ("a folder", |path| {
                fs::remove_file(path).unwrap();
                fs::create_dir(path).unwrap();
            }),
        ];
        for (what, change) in changes {
            let job = Job::new();
            job.write(1);
            job.write(2);
            change(&job.store.path(2).join(file));
            assert_eq!(job.latest_step(), Some(1), "{file} {what}");
            assert_eq!(job.names(), ["checkpoint-1"], "{file} {what}");
            // The job comes to the step again.
            job.write(2);
            assert_eq!(job.latest_step(), Some(2));
        }
    }
}

#[test]
fn what_a_crash_leaves_is_cleared() {
    let job = Job::new();
    job.write(3);
    let folder = job.dir.path().join("job");
    // Killed while writing, and while an old one was being removed.
    fs::create_dir(folder.join(".writing-checkpoint-4")).unwrap();
    fs::write(folder.join(".writing-checkpoint-4/trainer.safetensors"), "half").unwrap();
    fs::create_dir(folder.join("checkpoint-2")).unwrap();
    fs::write(folder.join("checkpoint-2/state.json"), "{}").unwrap();
    // Not ours to judge.
    fs::create_dir(folder.join("checkpoint-007")).unwrap();
    fs::write(folder.join("job.json"), "{}").unwrap();
    let Job { dir, store } = job;
    drop(store);
    let job = Job { store: Checkpoints::open(folder, 2).unwrap(), dir };
    assert_eq!(job.latest_step(), Some(3));
    assert_eq!(job.names(), ["checkpoint-007", "checkpoint-2", "checkpoint-3", "job.json"]);
    // A folder by another step's name.
    fs::rename(job.store.path(3), job.store.path(9)).unwrap();
    assert_eq!(job.latest_step(), None);
    assert_eq!(job.names(), ["checkpoint-007", "job.json"]);
}

#[cfg(unix)]
#[test]
fn one_process_has_a_job_at_a_time() {
    let job = Job::new();
    let error = Checkpoints::open(job.dir.path().join("job"), 2).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    let Job { dir, store } = job;
    drop(store);
    assert!(Checkpoints::open(dir.path().join("job"), 2).is_ok());
}

#[test]
fn a_file_in_the_way_is_told() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("jobs"), "").unwrap();
    let error = Checkpoints::open(dir.path().join("jobs/job"), 2).unwrap_err().to_string();
    assert!(error.contains("cannot be used"), "{error}");
}

/// A file system of 64 KiB, where this user may make one.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    use std::io::Write as _;
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(dir.path()).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        let _ = writeln!(io::stderr(), "skipped: this user may not mount a small file system");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let store = Checkpoints::open(dir.path().join("job"), 2).unwrap();
        store.write(&checkpoint(1), &adapter(), &sites()).unwrap();
        let mut large = checkpoint(2);
        large.dataset = vec![7; 80 << 10];
        let error = store.write(&large, &adapter(), &sites()).unwrap_err();
        let TrainError::Io { what, source } = error else { panic!("{error}") };
        assert!(what.contains("the checkpoint of step 2"), "{what}");
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert_eq!(store.latest().unwrap().unwrap().state.progress.step, 1);
        assert_eq!(fs::read_dir(dir.path().join("job")).unwrap().count(), 1, "nothing half-written stays");
        // With room again the job goes on.
        store.write(&checkpoint(2), &adapter(), &sites()).unwrap();
        assert_eq!(store.latest().unwrap().unwrap().state.progress.step, 2);
    });
    let unmount = Command::new("umount").arg(dir.path()).status();
    assert!(unmount.is_ok_and(|status| status.success()));
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
