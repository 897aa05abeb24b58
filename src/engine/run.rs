//! The engine thread: take commands, schedule, run the decoder, hand out tokens; again. Everything on the device
//! is made and dropped here.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use anyhow::{Context, Result};

use super::adapters::Adapters;
use super::command::{Command, Envelope};
use super::memory::{check_weights, free_bytes, plan_pages};
use super::scheduler::{Limits, Scheduler, SequenceId, Slice};
use super::sequence::{Progress, Sequence};
use super::trainer::{Piece, Trainers};
use super::training::{TrainerSpec, TrainingPlan};
use super::training_plan::{Circumstances, plan};
use super::{EngineConfig, EngineError, EngineStats, LoadAdapter, ModelInfo};
use crate::metrics;
use crate::model::decoder::{Batch, Decoder};
use crate::model::load::{device_name, inspect, load};
use crate::model::tokenizer::Tokenizer;
use crate::nn::kv_cache::{KvCache, PAGE_TOKENS, SequenceSpan};
use crate::nn::lora::{Adapter, LoraBatch};

/// Prompt tokens that a step takes when nobody waits for a token, as a multiple of the usual chunk.
const ALONE: usize = 4;

/// Runs until the last sender of `inbox` is gone and every request has ended.
pub(super) fn thread(
    config: EngineConfig,
    tokenizer: Arc<Tokenizer>,
    inbox: mpsc::Receiver<Envelope>,
    ready: mpsc::Sender<Result<ModelInfo>>,
    in_flight: Arc<AtomicUsize>,
    stats: Arc<Mutex<EngineStats>>,
) {
    let mut engine = match Engine::build(&config, tokenizer, in_flight, stats) {
        Ok((engine, info)) => {
            // If nobody waits for the answer, the inbox is closed too, and the loop ends at once.
            let _ = ready.send(Ok(info));
            engine
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    loop {
        if engine.scheduler.is_idle() && !engine.trainers.has_work() {
            match inbox.recv() {
                Ok(envelope) => engine.take(envelope),
                Err(mpsc::RecvError) => break,
            }
        }
        // A closed inbox shows at the next `recv`; what was accepted is served first.
        while let Ok(envelope) = inbox.try_recv() {
            engine.take(envelope);
        }
        engine.drop_abandoned();
        engine.turn();
    }
}

struct Engine {
    model: Decoder,
    cache: KvCache,
    adapters: Adapters,
    scheduler: Scheduler,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: SequenceId,
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: Vec<u32>,
    in_flight: Arc<AtomicUsize>,
    stats: Arc<Mutex<EngineStats>>,
    cache_bytes: u64,
    trainers: Trainers,
    train_share: f64,
    /// Seconds that training may take before the next step of serving.
    train_credit: f64,
}

impl Engine {
    fn build(
        config: &EngineConfig,
        tokenizer: Arc<Tokenizer>,
        in_flight: Arc<AtomicUsize>,
        stats: Arc<Mutex<EngineStats>>,
    ) -> Result<(Self, ModelInfo)> {
        let device = config.device.open()?;
        let cannot_load = || format!("cannot load the model in {}", config.model_dir.display());
        let folder = inspect(&config.model_dir).with_context(cannot_load)?;
        check_weights(&folder, config, &device)?;
        let (model, eos_token_ids) =
            load(&config.model_dir, &device, config.dtype, config.quantize).with_context(cannot_load)?;
        let spec = model.spec();
        anyhow::ensure!(
            tokenizer.vocab_size() <= spec.vocab_size,
            "tokenizer.json knows {} tokens, but the model's embedding has {} rows; they are not of one model",
            tokenizer.vocab_size(),
            spec.vocab_size
        );
        let pages = plan_pages(config, &model)?;
        let cache = KvCache::new(model.kv_shape(), pages, model.activations(), &device)?;
        let info = ModelInfo {
            family: spec.family.to_owned(),
            context_length: spec.max_positions.min(pages * PAGE_TOKENS),
            vocab_size: spec.vocab_size,
            hidden_size: spec.hidden_size,
            layers: spec.layers,
            parameters: model.parameters(),
            weight_bytes: model.weight_bytes(),
            kv_cache_bytes: pages as u64 * model.kv_shape().page_bytes(model.activations()),
            kv_cache_tokens: pages * PAGE_TOKENS,
            dtype: model.weights_dtype().as_str(),
            quantization: config.quantize.name(),
            device: device_name(&device),
            eos_token_ids: eos_token_ids.clone(),
            sites: Arc::new(model.sites().to_vec()),
            max_batch: config.max_batch,
            max_queue: config.max_queue,
            train_share: config.train_share,
            adapter_cache_bytes: config.adapter_cache_bytes,
        };
        let limits = Limits {
            max_batch: config.max_batch,
            prefill_chunk: config.prefill_chunk,
            prefill_alone: ALONE * config.prefill_chunk,
        };
        let engine = Self {
            model,
            cache,
            adapters: Adapters::new(config.adapter_cache_bytes),
            scheduler: Scheduler::new(limits, pages),
            sequences: HashMap::new(),
            next_id: 0,
            tokenizer,
            eos_token_ids,
            in_flight,
            stats,
            cache_bytes: info.kv_cache_bytes,
            trainers: Trainers::default(),
            train_share: config.train_share,
            train_credit: 0.0,
        };
        Ok((engine, info))
    }

    /// Does what is asked as part of what it is asked for.
    fn take(&mut self, Envelope { command, span }: Envelope) {
        let _entered = span.enter();
        self.obey(command);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(request, events, submitted) => {
                let (tokenizer, vocab_size) = (self.tokenizer.clone(), self.model.spec().vocab_size);
                let model_stop = &self.eos_token_ids;
                self.admit(Sequence::generate(
                    *request, events, submitted, tokenizer, model_stop, vocab_size,
                ));
            }
            Command::Score(request, reply) => self.admit(Sequence::score(request, reply)),
            Command::Cut => self.cut(),
            Command::LoadAdapter(adapter, reply) => {
                let loaded = self.adapters.load(adapter, &self.model);
                // Whoever asked may have gone; the adapter is then resident and unpinned.
                let _ = reply.send(loaded);
                self.publish(|stats, engine| stats.adapters = engine.adapters.list());
            }
            Command::UnloadAdapter(key, reply) => {
                self.adapters.unload(key);
                let _ = reply.send(());
                self.publish(|stats, engine| stats.adapters = engine.adapters.list());
            }
            Command::PlanTraining(spec, reply) => {
                let _ = reply.send(self.plan_training(&spec));
            }
            Command::CreateTrainer(id, spec, reply) => {
                let plan = self.plan_training(&spec);
                let created = plan.and_then(|plan| self.trainers.create(id, *spec, plan, &self.model));
                self.publish_trainers();
                let _ = reply.send(created);
            }
            Command::Pass(id, batch, kind, reply) => {
                self.trainers.submit(id, *batch, kind, reply, &self.model);
            }
            Command::OptimStep(id, parameters, reply) => {
                let began = Instant::now();
                let stepped = self.trainers.between_passes(id, |trainer| trainer.step(parameters));
                let _ = reply.send(stepped);
                let seconds = began.elapsed().as_secs_f64();
                metrics::optimizer_step(seconds);
                self.publish(|stats, _| {
                    stats.train_s += seconds;
                    stats.train_steps += 1;
                });
            }
            Command::DiscardGradient(id, reply) => {
                let _ = reply.send(self.trainers.between_passes(id, |trainer| trainer.discard()));
            }
            Command::Snapshot(id, reply) => {
                let model = &self.model;
                let _ = reply.send(self.trainers.between_passes(id, |trainer| trainer.snapshot(model)));
            }
            Command::Restore(id, snapshot, reply) => {
                let model = &self.model;
                let _ =
                    reply.send(self.trainers.between_passes(id, |trainer| trainer.restore(&snapshot, model)));
            }
            Command::TrainedWeights(id, reply) => {
                let _ = reply.send(self.trainers.between_passes(id, |trainer| trainer.weights()));
            }
            Command::Publish(id, name, generation, reply) => {
                let weights = self.trainers.between_passes(id, |trainer| trainer.weights());
                let published = weights.and_then(|weights| {
                    self.adapters.load(LoadAdapter { name, generation, weights }, &self.model)
                });
                let _ = reply.send(published);
                self.publish(|stats, engine| stats.adapters = engine.adapters.list());
            }
            Command::DropTrainer(id) => {
                self.trainers.forget(id);
                self.publish_trainers();
            }
        }
    }

    fn admit(&mut self, sequence: Sequence) {
        self.next_id += 1;
        self.scheduler.submit(self.next_id, sequence.tokens.len(), sequence.most_tokens());
        self.sequences.insert(self.next_id, sequence);
    }

    /// Forgets a request and gives its place back.
    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.scheduler.remove(id);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.sequences.remove(&id).inspect(Sequence::count_tokens)
    }

    fn cut(&mut self) {
        let all: Vec<SequenceId> = self.sequences.keys().copied().collect();
        for &id in &all {
            if let Some(sequence) = self.remove(id) {
                sequence.fail(EngineError::Stopped);
            }
        }
        self.publish(|stats, _| stats.finished += all.len() as u64);
    }

    /// Requests whose client has gone free their slot before they cost another step.
    fn drop_abandoned(&mut self) {
        let gone: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| s.is_abandoned()).map(|(&id, _)| id).collect();
        for &id in &gone {
            self.remove(id);
        }
        if !gone.is_empty() {
            self.publish(|stats, _| stats.cancelled += gone.len() as u64);
        }
    }

    /// A step of serving if somebody waits for one, and as much training as its share allows after it.
    fn turn(&mut self) {
        if !self.scheduler.is_idle() {
            let began = Instant::now();
            self.step();
            if self.trainers.has_work() {
                let share = self.train_share;
                self.train_credit += began.elapsed().as_secs_f64() * share / (1.0 - share);
            }
        }
        if self.scheduler.is_idle() {
            // Nobody to share with: one piece, and a look at the inbox.
            self.train_credit = 0.0;
            self.train();
        }
        while self.train_credit > 0.0 && self.trainers.has_work() {
            self.train_credit -= self.train();
        }
        if !self.trainers.has_work() {
            self.train_credit = 0.0;
        }
    }

    /// One piece of training; gives the seconds that it took.
    fn train(&mut self) -> f64 {
        if !self.trainers.has_work() {
            return 0.0;
        }
        let began = Instant::now();
        // As for a step: a panic is a bug that must cost its own pass alone.
        let done = catch_unwind(AssertUnwindSafe(|| self.trainers.advance(&self.model)));
        let piece = done.unwrap_or_else(|_| {
            let text = "a training pass panicked; the log has the place";
            self.trainers.give_up(&EngineError::Device(text.into()));
            Piece::default()
        });
        let seconds = began.elapsed().as_secs_f64();
        metrics::training_piece(seconds);
        self.publish(|stats, _| {
            stats.train_s += seconds;
            stats.train_pieces += 1;
            stats.longest_train_piece_s = stats.longest_train_piece_s.max(seconds);
            stats.train_tokens += piece.tokens as u64;
        });
        seconds
    }

    fn plan_training(&self, spec: &TrainerSpec) -> Result<TrainingPlan, EngineError> {
        let on = self.model.device();
        let kernels = on.is_cpu();
        // The cache and what other trainers were promised may not have been touched yet.
        let promised = self.trainers.planned_bytes() + if kernels { self.cache_bytes } else { 0 };
        let threads = kernels.then(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        let resident_bytes = self.model.weight_bytes() + self.cache_bytes;
        let free = free_bytes(on).map(|free| free.saturating_sub(promised));
        let about = Circumstances::of(threads, self.model.weights_dtype(), resident_bytes, free);
        plan(self.model.spec(), self.model.sites(), spec, about)
    }

    /// Schedule, run, postprocess.
    fn step(&mut self) {
        let begun = Instant::now();
        let mut slices = self.scheduler.schedule();
        if slices.is_empty() {
            return self.publish(|_, _| ());
        }
        // Rows of one adapter side by side, so that each is one span. The order changes no row's result.
        slices.sort_by_key(|s| self.sequences[&s.id].adapter.as_ref().map_or(0, |key| key.serial()));
        // A panic is a bug, but one that must cost the requests of this step alone.
        let result = catch_unwind(AssertUnwindSafe(|| self.run(&slices, begun))).unwrap_or_else(|_| {
            Err(candle_core::Error::Msg("a step panicked; the log has the place".into()))
        });
        let ended = match result {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, requests = slices.len(), "a step failed; its requests end with an error");
                slices.iter().map(|s| (s.id, Some(EngineError::Device(error.to_string())))).collect()
            }
        };
        for (id, error) in &ended {
            if let (Some(sequence), Some(error)) = (self.remove(*id), error) {
                sequence.span.in_scope(|| tracing::warn!(%error, "the request ends with an error"));
                sequence.fail(error.clone());
            }
        }
        let prompt_tokens: usize =
            slices.iter().filter(|s| s.count > 1 || s.start == 0).map(|s| s.count).sum();
        let seconds = begun.elapsed().as_secs_f64();
        metrics::step(slices.len(), seconds);
        self.publish(|stats, _| {
            stats.steps += 1;
            stats.prompt_tokens += prompt_tokens as u64;
            stats.finished += ended.len() as u64;
            stats.busy_s += seconds;
        });
    }

    /// Gives the sequences that ended; those that failed with the reason.
    fn run(
        &mut self,
        slices: &[Slice],
        begun: Instant,
    ) -> candle_core::Result<Vec<(SequenceId, Option<EngineError>)>> {
        let mut batch = Batch { tokens: vec![], spans: vec![], lora: LoraBatch::default(), outputs: vec![] };
        let mut ended = Vec::new();
        let mut taken = Vec::new();
        for slice in slices {
            let sequence = self.sequences.get_mut(&slice.id).expect("scheduled sequences are known");
            sequence.mark_started(begun);
            let adapter: Option<Arc<Adapter>> = match &sequence.adapter {
                None => None,
                Some(key) => match self.adapters.get(key) {
                    Some(adapter) => Some(adapter),
                    None => {
                        let message = format!("adapter {} is not resident; this is a bug", key.name);
                        ended.push((slice.id, Some(EngineError::AdapterInvalid(message))));
                        continue;
                    }
                },
            };
            let first = batch.tokens.len();
            let rows = first..first + slice.count;
            batch.tokens.extend(&sequence.tokens[slice.start..slice.start + slice.count]);
            let pages = self.scheduler.pages(slice.id).to_vec();
            batch.spans.push(SequenceSpan { rows: rows.clone(), start: slice.start, pages });
            if let Some(adapter) = adapter {
                batch.lora.push(rows, adapter);
            }
            let wanted = sequence.wanted(slice.start, slice.count);
            batch.outputs.extend(wanted.clone().map(|offset| (first + offset) as u32));
            taken.push((*slice, wanted));
        }
        let mut logits = self.logits(&batch)?.into_iter();
        let now = Instant::now();
        let mut generated = 0;
        for (slice, wanted) in taken {
            let mut rows: Vec<Vec<f32>> = logits.by_ref().take(wanted.len()).collect();
            let sequence = self.sequences.get_mut(&slice.id).expect("scheduled sequences are known");
            match sequence.take(slice.start + wanted.start, &mut rows, now) {
                Progress::Continues => {}
                Progress::Extended => {
                    generated += 1;
                    self.scheduler.extend(slice.id);
                }
                Progress::Ended => {
                    generated += 1;
                    ended.push((slice.id, None));
                }
            }
        }
        self.publish(|stats, _| stats.generated_tokens += generated);
        Ok(ended)
    }

    fn logits(&mut self, batch: &Batch) -> candle_core::Result<Vec<Vec<f32>>> {
        if batch.tokens.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.model.forward(batch, &mut self.cache)?;
        // candle cannot turn a matrix without rows into vectors.
        if batch.outputs.is_empty() { Ok(Vec::new()) } else { logits.to_vec2() }
    }

    fn publish_trainers(&self) {
        self.publish(|stats, engine| {
            stats.trainers = engine.trainers.count();
            stats.train_planned_bytes = engine.trainers.planned_bytes();
        });
    }

    fn publish(&self, change: impl FnOnce(&mut EngineStats, &Self)) {
        let mut stats = self.stats.lock().expect("no holder of the stats lock panics");
        stats.running = self.scheduler.running();
        stats.kv_tokens_reserved = self.scheduler.reserved_tokens();
        change(&mut stats, self);
    }
}
