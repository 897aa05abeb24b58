//! The trainers on the engine's thread: what commands about training do, and one piece of training at a time for
//! the loop to fit between two steps of serving.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::EngineError;
use super::command::{Reply, TrainerId};
use super::training::{
    LossScale, PassKind, PassReport, Phases, StepParameters, StepReport, TrainBatch, TrainSequence,
    TrainerSnapshot, TrainerSpec, TrainingPlan, adamw_step,
};
use super::training_plan::loss_positions;
use crate::model::decoder::Decoder;
use crate::model::decoder::pass::{Gradients, Pass, PassSettings, TrainSites};
use crate::nn::lora::{LoraWeights, SiteGradient, SiteWeights, TrainSite};
use crate::nn::mix64;
use crate::nn::optim::{Parameter, squared_norm};

/// Good steps after which the loss scale doubles.
const LOSS_SCALE_INTERVAL: u64 = 200;
/// Where loss scaling begins, and what it does not exceed.
const LOSS_SCALE_MOST: f64 = 65_536.0;

/// All trainers.
#[derive(Default)]
pub(super) struct Trainers {
    all: BTreeMap<TrainerId, Trainer>,
    /// Whose pass is under way, or was last.
    current: TrainerId,
}

/// What a piece of training did.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Piece {
    /// Tokens of the pass that it ended.
    pub(super) tokens: usize,
}

struct Waiting {
    batch: TrainBatch,
    kind: PassKind,
    reply: Reply<PassReport>,
}

struct Running {
    pass: Pass,
    kind: PassKind,
    normalizer: Option<f64>,
    reply: Reply<PassReport>,
    seconds: f64,
}

struct Trainer {
    spec: TrainerSpec,
    plan: TrainingPlan,
    /// By site: A and B with their moments. B lies transposed.
    parameters: BTreeMap<usize, [Parameter; 2]>,
    /// The values of `parameters`, as passes take them.
    sites: Arc<TrainSites>,
    gradients: Gradients,
    /// What the next step divides by.
    normalizer: f64,
    passes: usize,
    steps: u64,
    loss_scale: LossScale,
    waiting: VecDeque<Waiting>,
    running: Option<Running>,
}

impl Trainers {
    /// Bytes that are promised to trainers.
    pub(super) fn planned_bytes(&self) -> u64 {
        self.all.values().map(|t| t.plan.training_bytes).sum()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Whether a piece of work is waiting.
    pub(super) fn has_work(&self) -> bool {
        self.all.values().any(|t| t.running.is_some() || !t.waiting.is_empty())
    }

    pub(super) fn create(
        &mut self,
        id: TrainerId,
        spec: TrainerSpec,
        plan: TrainingPlan,
        model: &Decoder,
    ) -> std::result::Result<TrainingPlan, EngineError> {
        let trainer = Trainer::new(spec, plan.clone(), model).map_err(device)?;
        self.all.insert(id, trainer);
        Ok(plan)
    }

    pub(super) fn forget(&mut self, id: TrainerId) {
        self.all.remove(&id);
    }

    /// Puts a pass in the trainer's line, or says why not.
    pub(super) fn submit(
        &mut self,
        id: TrainerId,
        batch: TrainBatch,
        kind: PassKind,
        reply: Reply<PassReport>,
        model: &Decoder,
    ) {
        let checked = match self.all.get(&id) {
            None => Err(unknown()),
            Some(trainer) => check(&batch, &trainer.plan, model.spec().vocab_size),
        };
        match (checked, self.all.get_mut(&id)) {
            (Ok(()), Some(trainer)) => trainer.waiting.push_back(Waiting { batch, kind, reply }),
            (Err(error), _) => drop(reply.send(Err(error))),
            (Ok(()), None) => drop(reply.send(Err(unknown()))),
        }
    }

    /// Runs `f` on a trainer that has no pass waiting or under way.
    pub(super) fn between_passes<T>(
        &mut self,
        id: TrainerId,
        f: impl FnOnce(&mut Idle<'_>) -> std::result::Result<T, EngineError>,
    ) -> std::result::Result<T, EngineError> {
        let trainer = self.all.get_mut(&id).ok_or_else(unknown)?;
        if trainer.running.is_some() || !trainer.waiting.is_empty() {
            return Err(EngineError::InvalidParameter {
                field: "trainer",
                message: "has a pass under way; wait for its answer first".into(),
            });
        }
        f(&mut Idle(trainer))
    }

    /// Does one piece of the pass that is under way, or begins the next: trainers take turns, pass by pass.
    pub(super) fn advance(&mut self, model: &Decoder) -> Piece {
        let busy = |t: &Trainer| t.running.is_some() || !t.waiting.is_empty();
        let under_way = self.all.iter().find(|(_, t)| t.running.is_some()).map(|(&id, _)| id);
        let next = || self.all.range(self.current + 1..).find(|(_, t)| busy(t)).map(|(&id, _)| id);
        let first = || self.all.iter().find(|(_, t)| busy(t)).map(|(&id, _)| id);
        let Some(id) = under_way.or_else(next).or_else(first) else { return Piece::default() };
        self.current = id;
        let trainer = self.all.get_mut(&id).expect("it was just found");
        trainer.advance(model)
    }

    /// Gives up what is under way after a panic.
    pub(super) fn give_up(&mut self, error: &EngineError) {
        for trainer in self.all.values_mut() {
            if let Some(running) = trainer.running.take() {
                // Whoever asked may have gone.
                let _ = running.reply.send(Err(error.clone()));
            }
        }
    }
}

/// A trainer between two passes.
pub(super) struct Idle<'t>(&'t mut Trainer);

impl Idle<'_> {
    pub(super) fn step(&mut self, by: StepParameters) -> std::result::Result<StepReport, EngineError> {
        if self.0.passes == 0 {
            return Err(EngineError::InvalidParameter {
                field: "trainer",
                message: "has no gradient; make a pass before a step".into(),
            });
        }
        self.0.step(by).map_err(device)
    }

    pub(super) fn discard(&mut self) -> std::result::Result<(), EngineError> {
        self.0.clear_gradients();
        Ok(())
    }

    pub(super) fn snapshot(&self, model: &Decoder) -> std::result::Result<TrainerSnapshot, EngineError> {
        if self.0.passes != 0 {
            return Err(EngineError::InvalidParameter {
                field: "trainer",
                message: "has a gradient that a snapshot would lose; take a step first".into(),
            });
        }
        self.0.snapshot(model).map_err(device)
    }

    pub(super) fn restore(
        &mut self,
        snapshot: &TrainerSnapshot,
        model: &Decoder,
    ) -> std::result::Result<(), EngineError> {
        self.0.restore(snapshot, model).map_err(device)
    }

    pub(super) fn weights(&self) -> std::result::Result<LoraWeights, EngineError> {
        self.0.weights().map_err(device)
    }
}

fn unknown() -> EngineError {
    EngineError::InvalidParameter { field: "trainer", message: "does not exist any more".into() }
}

fn device(error: candle_core::Error) -> EngineError {
    EngineError::Device(error.to_string())
}

fn check(batch: &TrainBatch, plan: &TrainingPlan, vocabulary: usize) -> std::result::Result<(), EngineError> {
    let bad = |field, message: String| Err(EngineError::InvalidParameter { field, message });
    let tokens: usize = batch.sequences.iter().map(|s| s.tokens.len()).sum();
    if batch.sequences.iter().any(|s| s.tokens.len() != s.weights.len() || s.tokens.len() < 2) {
        return bad("sequences", "must each hold at least two tokens, and as many weights".into());
    }
    if !(batch.temperature.is_finite() && batch.temperature > 0.0) {
        return bad("temperature", format!("is {}; it must be above 0", batch.temperature));
    }
    if batch.normalizer.is_some_and(|normalizer| !normalizer.is_finite()) {
        return bad("normalizer", "must be a finite number".into());
    }
    let compared = |s: &TrainSequence| s.policy.len() == s.tokens.len();
    if batch.loss.is_policy() && !batch.sequences.iter().all(compared) {
        return bad("policy", "must hold as many as there are tokens, for this loss".into());
    }
    if tokens > plan.tokens_per_pass {
        let message = format!("hold {tokens} tokens, and the plan is for {}", plan.tokens_per_pass);
        return bad("sequences", message);
    }
    let supervised = batch.sequences.iter().any(|s| s.weights.iter().skip(1).any(|&w| w != 0.0));
    if !supervised {
        return bad("weights", "are all 0: there is nothing to learn in this batch".into());
    }
    if let Some(token) = batch.sequences.iter().flat_map(|s| &s.tokens).find(|&&t| t as usize >= vocabulary) {
        return bad("sequences", format!("hold token {token}, but the vocabulary has {vocabulary}"));
    }
    Ok(())
}

impl Trainer {
    fn new(spec: TrainerSpec, plan: TrainingPlan, model: &Decoder) -> Result<Self> {
        let on = model.device();
        let mut parameters = BTreeMap::new();
        for &site in &spec.lora.sites {
            let shape = &model.sites()[site];
            let a = initial_a(spec.lora.seed, site, spec.lora.rank, shape.in_features)?.to_device(on)?;
            let b = Tensor::zeros((spec.lora.rank, shape.out_features), DType::F32, on)?;
            parameters.insert(site, [Parameter::new(a)?, Parameter::new(b)?]);
        }
        let scaled = model.activations() == DType::F16;
        let factor = if scaled { LOSS_SCALE_MOST } else { 1.0 };
        let mut trainer = Self {
            spec,
            plan,
            parameters,
            sites: Arc::default(),
            gradients: Vec::new(),
            normalizer: 0.0,
            passes: 0,
            steps: 0,
            loss_scale: LossScale { factor, good_steps: 0 },
            waiting: VecDeque::new(),
            running: None,
        };
        trainer.sites = trainer.current_sites(model.sites().len());
        trainer.clear_gradients();
        Ok(trainer)
    }

    fn current_sites(&self, count: usize) -> Arc<TrainSites> {
        let scale = self.spec.lora.scale();
        let site = |site: usize| {
            let [a, b] = self.parameters.get(&site)?;
            Some(TrainSite { a: a.value.clone(), b: b.value.clone(), scale })
        };
        Arc::new((0..count).map(site).collect())
    }

    fn clear_gradients(&mut self) {
        self.gradients = self.sites.iter().map(|_| None).collect();
        self.normalizer = 0.0;
        self.passes = 0;
    }

    fn advance(&mut self, model: &Decoder) -> Piece {
        let began = Instant::now();
        if self.running.as_ref().is_some_and(|r| r.reply.is_closed()) {
            // Nobody waits for it any more, so nobody will take a step with it.
            self.running = None;
            self.clear_gradients();
            return Piece::default();
        }
        let outcome = match self.running.take() {
            None => self.begin(model),
            Some(mut running) => match running.pass.advance(model) {
                Ok(more) => {
                    running.seconds += began.elapsed().as_secs_f64();
                    if !more {
                        return self.end(running);
                    }
                    self.running = Some(running);
                    Ok(())
                }
                Err(error) => Err((error, running.reply)),
            },
        };
        if let Err((error, reply)) = outcome {
            let _ = reply.send(Err(device(error)));
        }
        Piece::default()
    }

    fn begin(&mut self, model: &Decoder) -> std::result::Result<(), (candle_core::Error, Reply<PassReport>)> {
        let Some(Waiting { batch, kind, reply }) = self.waiting.pop_front() else { return Ok(()) };
        let settings = PassSettings {
            gradient_scale: (kind == PassKind::Learn).then_some(self.loss_scale.factor),
            kept_layers: self.plan.kept_layers,
            loss_positions: loss_positions(model.spec().vocab_size),
            dropout: self.spec.lora.dropout,
            key: mix64(self.spec.lora.seed ^ mix64(batch.pass)),
            loss: batch.loss,
            temperature: batch.temperature,
            base_learns: false,
        };
        let sequences = batch.sequences.iter().map(|s| (&s.tokens[..], &s.weights[..], &s.policy[..]));
        let sites = match kind {
            PassKind::Learn | PassKind::Evaluate => self.sites.clone(),
            PassKind::EvaluateBase => Arc::new(self.sites.iter().map(|_| None).collect()),
        };
        match Pass::begin(model, sites, sequences, settings) {
            Ok(pass) => {
                let normalizer = batch.normalizer;
                self.running = Some(Running { pass, kind, normalizer, reply, seconds: 0.0 });
                Ok(())
            }
            Err(error) => Err((error, reply)),
        }
    }

    fn end(&mut self, running: Running) -> Piece {
        let Running { pass, kind, normalizer, reply, seconds } = running;
        let with_gradient = kind == PassKind::Learn;
        let (loss_sum, weight_sum) = pass.sums();
        let of = pass.seconds();
        let report = PassReport {
            loss_sum,
            weight_sum,
            supervised: pass.supervised(),
            tokens: pass.tokens(),
            logprobs: pass.logprobs(),
            policy: pass.figures(),
            seconds,
            phases: Phases { forward: of.forward, loss: of.loss, backward: of.backward, optimizer: 0.0 },
        };
        let piece = Piece { tokens: pass.tokens() };
        let added = if with_gradient { self.add(pass.into_gradients()) } else { Ok(()) };
        if with_gradient && added.is_ok() {
            self.normalizer += normalizer.unwrap_or(weight_sum);
            self.passes += 1;
        }
        if reply.send(added.map(|()| report).map_err(device)).is_err() {
            // Whoever asked has gone in the meantime and will take no step with it.
            self.clear_gradients();
        }
        piece
    }

    fn add(&mut self, new: Gradients) -> Result<()> {
        for (sum, new) in self.gradients.iter_mut().zip(new) {
            *sum = match (sum.take(), new) {
                (Some(sum), Some(new)) => Some(SiteGradient { a: (sum.a + new.a)?, b: (sum.b + new.b)? }),
                (sum, new) => sum.or(new),
            };
        }
        Ok(())
    }

    fn step(&mut self, by: StepParameters) -> Result<StepReport> {
        let began = Instant::now();
        let tensors = self.gradients.iter().flatten().flat_map(|g| [&g.a, &g.b]);
        let divisor = self.normalizer.abs().max(f64::MIN_POSITIVE) * self.loss_scale.factor;
        let grad_norm = squared_norm(tensors)?.sqrt() / divisor;
        let used_scale = self.loss_scale.factor;
        let skipped = !grad_norm.is_finite();
        if !skipped {
            let step = adamw_step(self.spec.adamw, by, self.steps + 1, grad_norm, divisor);
            for (site, [a, b]) in &mut self.parameters {
                if let Some(gradient) = &self.gradients[*site] {
                    a.step(&gradient.a, &step)?;
                    b.step(&gradient.b, &step)?;
                }
            }
            self.steps += 1;
        }
        self.rescale(skipped);
        self.sites = self.current_sites(self.sites.len());
        self.clear_gradients();
        let seconds = began.elapsed().as_secs_f64();
        Ok(StepReport { grad_norm, skipped, steps: self.steps, loss_scale: used_scale, seconds })
    }

    fn rescale(&mut self, overflowed: bool) {
        let scale = &mut self.loss_scale;
        if scale.factor == 1.0 && scale.good_steps == 0 && !overflowed {
            return;
        }
        if overflowed {
            *scale = LossScale { factor: (scale.factor / 2.0).max(1.0), good_steps: 0 };
        } else if scale.good_steps + 1 >= LOSS_SCALE_INTERVAL {
            *scale = LossScale { factor: (scale.factor * 2.0).min(LOSS_SCALE_MOST), good_steps: 0 };
        } else {
            scale.good_steps += 1;
        }
    }

    fn snapshot(&self, model: &Decoder) -> Result<TrainerSnapshot> {
        let mut tensors = BTreeMap::new();
        for (&site, [a, b]) in &self.parameters {
            let name = &model.sites()[site].name;
            for (part, of) in [("lora_A", a), ("lora_B", b)] {
                for (suffix, tensor) in [("", &of.value), (".m", &of.first), (".v", &of.second)] {
                    let turned = if part == "lora_B" { tensor.t()?.contiguous()? } else { tensor.clone() };
                    tensors.insert(format!("{name}.{part}{suffix}"), turned.to_device(&Device::Cpu)?);
                }
            }
        }
        Ok(TrainerSnapshot { tensors, steps: self.steps, loss_scale: self.loss_scale })
    }

    fn restore(&mut self, snapshot: &TrainerSnapshot, model: &Decoder) -> Result<()> {
        let mut parameters = self.parameters.clone();
        for (&site, [a, b]) in &mut parameters {
            let name = &model.sites()[site].name;
            for (part, of) in [("lora_A", a), ("lora_B", b)] {
                for (suffix, slot) in [("", &mut of.value), (".m", &mut of.first), (".v", &mut of.second)] {
                    let name = format!("{name}.{part}{suffix}");
                    let Some(tensor) = snapshot.tensors.get(&name) else {
                        candle_core::bail!("the snapshot has no {name}")
                    };
                    let turned = if part == "lora_B" { tensor.t()?.contiguous()? } else { tensor.clone() };
                    if turned.shape() != slot.shape() {
                        candle_core::bail!("{name} is {:?}, expected {:?}", turned.dims(), slot.dims());
                    }
                    *slot = turned.to_dtype(DType::F32)?.to_device(model.device())?;
                }
            }
        }
        self.parameters = parameters;
        self.steps = snapshot.steps;
        self.loss_scale = snapshot.loss_scale;
        self.sites = self.current_sites(self.sites.len());
        self.clear_gradients();
        Ok(())
    }

    fn weights(&self) -> Result<LoraWeights> {
        let scale = self.spec.lora.scale();
        let site = |(&site, [a, b]): (&usize, &[Parameter; 2])| {
            Ok(SiteWeights {
                site,
                a: a.value.to_device(&Device::Cpu)?,
                b: b.value.t()?.contiguous()?.to_device(&Device::Cpu)?,
                scale,
                magnitude: None,
            })
        };
        Ok(LoraWeights { sites: self.parameters.iter().map(site).collect::<Result<_>>()? })
    }
}

/// A as PEFT begins it: uniform in ±1/sqrt(in), which is Kaiming's bound with a = sqrt(5). Each site has its own
/// stream of the seed, so that its values do not depend on which others are trained.
fn initial_a(seed: u64, site: usize, rank: usize, inputs: usize) -> Result<Tensor> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(site as u64);
    let bound = 1.0 / (inputs as f64).sqrt();
    let mut draw = || {
        let unit = (random.next_u32() >> 8) as f64 / (1u32 << 24) as f64;
        ((2.0 * unit - 1.0) * bound) as f32
    };
    let values: Vec<f32> = (0..rank * inputs).map(|_| draw()).collect();
    Tensor::from_vec(values, (rank, inputs), &Device::Cpu)
}
