//! Training a whole model, small enough for it: every weight is a parameter. The passes, the loss, the optimizer
//! and the batches are those of adapters; what differs is which gradients are kept. Runs on the caller's thread
//! and serves nobody meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use crate::adapters::{make_folder, write_file};
use crate::engine::training::{
    AdamW, PassReport, Phases, StepParameters, StepReport, TrainBatch, adamw_step,
};
use crate::model::decoder::Decoder;
use crate::model::decoder::base::{BaseGradients, BaseParameter, Part, base_shapes};
use crate::model::decoder::pass::{Pass, PassSettings};
use crate::model::load::{DeviceChoice, DtypeChoice, load, read_spec};
use crate::nn::add_scaled;
use crate::nn::optim::{AdamWStep, Parameter, squared_norm};
use crate::nn::quant::Quantization;

/// Standard deviation of initial weights (Radford et al. 2019).
const INITIAL_STD: f64 = 0.02;
/// Positions whose logits are held at once.
const LOSS_POSITIONS: usize = 512;
/// Weights and moments, in a folder of their own.
const STATE: &str = "trainer.safetensors";
/// What the caller keeps beside them.
const BESIDE: &str = "beside.bin";

/// A model whose every weight is trained.
pub struct FullTrainer {
    model: Decoder,
    adamw: AdamW,
    names: BTreeMap<BaseParameter, String>,
    parameters: BTreeMap<BaseParameter, Parameter>,
    gradients: BaseGradients,
    /// What the next step divides by.
    normalizer: f64,
    steps: u64,
}

impl FullTrainer {
    /// Reads a model folder, in f32 on the CPU.
    ///
    /// # Errors
    /// A folder that is no model; one of another shape than Llama's with tied embeddings.
    pub fn open(folder: &Path, adamw: AdamW) -> Result<Self> {
        let device = DeviceChoice::Cpu.open()?;
        let (model, _) = load(folder, &device, DtypeChoice::F32, Quantization::None)?;
        let (mut names, mut parameters) = (BTreeMap::new(), BTreeMap::new());
        for (id, (name, value)) in model.base_parameters()? {
            names.insert(id, name);
            parameters.insert(id, Parameter::new(value)?);
        }
        let gradients = BaseGradients::new();
        Ok(Self { model, adamw, names, parameters, gradients, normalizer: 0.0, steps: 0 })
    }

    /// Writes `model.safetensors` with first weights beside the `config.json` of a folder: normal with deviation
    /// 0.02, projections into the residual stream divided by sqrt(2 · layers), norms 1.
    ///
    /// # Errors
    /// A configuration of another shape than Llama's with tied embeddings; what the disk reports.
    pub fn initialise(folder: &Path, seed: u64) -> Result<()> {
        let spec = read_spec(folder)?;
        let into_residual = INITIAL_STD / (2.0 * spec.layers as f64).sqrt();
        let mut tensors = HashMap::new();
        for (number, (name, shape, part)) in base_shapes(&spec)?.into_iter().enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(number as u64);
            let mut draw = |std: f64| (normal(&mut random) * std) as f32;
            let count = shape.iter().product();
            let values: Vec<f32> = match part {
                Part::Norm => vec![1.0; count],
                Part::Matrix => (0..count).map(|_| draw(INITIAL_STD)).collect(),
                Part::IntoResidual => (0..count).map(|_| draw(into_residual)).collect(),
            };
            tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
        Ok(())
    }

    /// Parameters in all.
    pub fn parameter_count(&self) -> usize {
        self.parameters.values().map(|p| p.value.elem_count()).sum()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Forward and backward passes, each on a thread of its own; the gradient is added to that of the passes since
    /// the last step, in the order of the batches.
    ///
    /// The kernels use threads as well: where there are as many batches as cores, `RAYON_NUM_THREADS=1` keeps
    /// those from waiting for each other.
    ///
    /// # Errors
    /// What the device reports.
    pub fn forward_backward(&mut self, batches: &[TrainBatch]) -> Result<Vec<PassReport>> {
        let done: Vec<Result<(PassReport, BaseGradients)>> = std::thread::scope(|scope| {
            let pass =
                |batch| self.pass(batch, true).map(|(report, pass)| (report, pass.into_base_gradients()));
            let running: Vec<_> = batches.iter().map(|batch| scope.spawn(move || pass(batch))).collect();
            let joined = running.into_iter().map(|thread| match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        });
        let mut reports = Vec::with_capacity(done.len());
        for (done, batch) in done.into_iter().zip(batches) {
            let (report, gradients) = done?;
            for (id, part) in gradients {
                let sum = match self.gradients.remove(&id) {
                    Some(sum) => add_scaled(&sum, &part, 1.0)?,
                    None => part,
                };
                self.gradients.insert(id, sum);
            }
            self.normalizer += batch.normalizer.unwrap_or(report.weight_sum);
            reports.push(report);
        }
        Ok(reports)
    }

    /// Loss and log-probabilities, without a gradient.
    ///
    /// # Errors
    /// What the device reports.
    pub fn evaluate(&self, batch: &TrainBatch) -> Result<PassReport> {
        Ok(self.pass(batch, false)?.0)
    }

    fn pass(&self, batch: &TrainBatch, learn: bool) -> Result<(PassReport, Pass)> {
        let settings = PassSettings {
            gradient_scale: learn.then_some(1.0),
            kept_layers: self.model.spec().layers,
            loss_positions: LOSS_POSITIONS,
            dropout: 0.0,
            key: 0,
            loss: batch.loss,
            temperature: batch.temperature,
            base_learns: learn,
        };
        let sites = Arc::new(self.model.sites().iter().map(|_| None).collect());
        let sequences = batch.sequences.iter().map(|s| (&s.tokens[..], &s.weights[..], &s.policy[..]));
        let mut pass = Pass::begin(&self.model, sites, sequences, settings)?;
        ensure!(pass.supervised() > 0, "the batch has no weight but 0: there is nothing to learn in it");
        while pass.advance(&self.model)? {}
        let (loss_sum, weight_sum) = pass.sums();
        let of = pass.seconds();
        let report = PassReport {
            loss_sum,
            weight_sum,
            supervised: pass.supervised(),
            tokens: pass.tokens(),
            logprobs: pass.logprobs(),
            policy: pass.figures(),
            seconds: of.forward + of.loss + of.backward,
            phases: Phases { forward: of.forward, loss: of.loss, backward: of.backward, optimizer: 0.0 },
        };
        Ok((report, pass))
    }

    /// Divides the gradient by the sum of the normalizers since the last step, clips it and takes an AdamW step.
    /// Norms and embeddings do not decay. A gradient that is not finite changes nothing.
    ///
    /// # Errors
    /// No pass since the last step; what the device reports.
    pub fn optim_step(&mut self, by: StepParameters) -> Result<StepReport> {
        ensure!(!self.gradients.is_empty(), "there is no gradient; make a pass before a step");
        let began = std::time::Instant::now();
        let divisor = self.normalizer.abs().max(f64::MIN_POSITIVE);
        let grad_norm = squared_norm(self.gradients.values())?.sqrt() / divisor;
        let skipped = !grad_norm.is_finite();
        if !skipped {
            self.steps += 1;
            let step = adamw_step(self.adamw, by, self.steps, grad_norm, divisor);
            for (id, parameter) in &mut self.parameters {
                if let Some(gradient) = self.gradients.get(id) {
                    let decays = matches!(id, BaseParameter::Linear(_));
                    let weight_decay = if decays { step.weight_decay } else { 0.0 };
                    parameter.step(gradient, &AdamWStep { weight_decay, ..step })?;
                    self.model.set_base_parameter(*id, &parameter.value)?;
                }
            }
        }
        self.gradients.clear();
        self.normalizer = 0.0;
        let seconds = began.elapsed().as_secs_f64();
        Ok(StepReport { grad_norm, skipped, steps: self.steps, loss_scale: 1.0, seconds })
    }

    /// Writes weights, moments and `beside` into the folder `target`, which is there as a whole or not at all.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn save(&self, target: &Path, beside: &[u8]) -> Result<()> {
        let mut tensors = HashMap::new();
        for (id, name) in &self.names {
            let of = &self.parameters[id];
            for (suffix, tensor) in [("", &of.value), (".m", &of.first), (".v", &of.second)] {
                tensors.insert(format!("{name}{suffix}"), tensor.clone());
            }
        }
        tensors.insert("steps".into(), Tensor::new(&[self.steps as i64], &Device::Cpu)?);
        let making = target.with_extension("writing");
        let old = target.with_extension("old");
        let _ = fs::remove_dir_all(&making);
        let _ = fs::remove_dir_all(&old);
        if target.exists() {
            fs::rename(target, &old)?;
        }
        make_folder(&making, target, |folder| {
            candle_core::safetensors::save(&tensors, folder.join(STATE)).map_err(anyhow::Error::from)?;
            anyhow::Ok(write_file(&folder.join(BESIDE), beside)?)
        })
        .with_context(|| format!("the state could not be written to {}", target.display()))?;
        let _ = fs::remove_dir_all(&old);
        Ok(())
    }

    /// Puts everything back that [`FullTrainer::save`] wrote to a folder; gives what was beside it, and `None`
    /// where there is nothing.
    ///
    /// # Errors
    /// A state of another model; what the disk reports.
    pub fn restore(&mut self, target: &Path) -> Result<Option<Vec<u8>>> {
        let old = target.with_extension("old");
        // A crash between the two renames of `save` leaves the older one.
        let folder = [target, old.as_path()].into_iter().find(|folder| folder.is_dir());
        let Some(folder) = folder else { return Ok(None) };
        let tensors = candle_core::safetensors::load(folder.join(STATE), &Device::Cpu)?;
        let get = |name: String, like: &Tensor| -> Result<Tensor> {
            let found = tensors.get(&name).with_context(|| format!("{name} is missing"))?;
            ensure!(
                found.shape() == like.shape(),
                "{name} is {:?}, expected {:?}",
                found.dims(),
                like.dims()
            );
            Ok(found.clone())
        };
        for (id, name) in &self.names {
            let of = &self.parameters[id];
            let restored = Parameter {
                value: get(name.clone(), &of.value)?,
                first: get(format!("{name}.m"), &of.first)?,
                second: get(format!("{name}.v"), &of.second)?,
            };
            self.model.set_base_parameter(*id, &restored.value)?;
            self.parameters.insert(*id, restored);
        }
        self.steps = tensors.get("steps").context("steps is missing")?.to_vec1::<i64>()?[0] as u64;
        self.gradients.clear();
        self.normalizer = 0.0;
        Ok(Some(fs::read(folder.join(BESIDE))?))
    }

    /// Writes `model.safetensors` into a folder, in this type.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn export(&self, folder: &Path, dtype: DType) -> Result<()> {
        let mut tensors = HashMap::new();
        for (id, name) in &self.names {
            tensors.insert(name.clone(), self.parameters[id].value.to_dtype(dtype)?);
        }
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
        Ok(())
    }
}

/// A standard normal draw (Box and Muller 1958).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let mut unit = || (f64::from(random.next_u32() >> 8) + 0.5) / f64::from(1u32 << 24);
    let (u, v) = (unit(), unit());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
#[path = "full_tests.rs"]
mod tests;
