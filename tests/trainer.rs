//! The engine's trainers: ten steps against PEFT and torch on every family, and what must never change a number:
//! how a pass is cut, what is kept, what else the engine does, and where it was interrupted.

#[path = "support/parity.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod parity;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use gurukul::engine::training::{
    AdamW, Checkpointing, LoraSpec, LossScale, PassShape, StepParameters, TrainBatch, TrainSequence,
    TrainerSnapshot, TrainerSpec,
};
use gurukul::engine::{EngineConfig, EngineError, EngineHandle, Event, GenerateRequest, Trainer};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;

fn engine(dir: &Path, quantize: Quantization) -> EngineHandle {
    let config = EngineConfig {
        model_dir: dir.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize,
        kv_cache_bytes: Some(8 << 20),
        max_batch: 4,
        max_queue: 16,
        prefill_chunk: 64,
        adapter_cache_bytes: 64 << 20,
        train_share: 0.5,
    };
    let tokenizer = Arc::new(Tokenizer::from_dir(dir).expect("the fixture has a tokenizer"));
    EngineHandle::start(config, tokenizer).unwrap_or_else(|e| panic!("{}: {e:#}", dir.display()))
}

fn llama() -> PathBuf {
    parity::root().join("llama")
}

fn spec(engine: &EngineHandle) -> TrainerSpec {
    TrainerSpec {
        lora: LoraSpec {
            rank: 4,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            sites: (0..engine.info().sites.len()).collect(),
            seed: 1,
        },
        adamw: AdamW::default(),
        pass: PassShape { sequences: 8, sequence_tokens: 32 },
        checkpointing: Checkpointing::Keep,
    }
}

const STEP: StepParameters = StepParameters { learning_rate: 1e-3, max_grad_norm: 0.0 };

/// Sequences of different lengths with every third token unsupervised.
fn sequences(count: usize, seed: u32) -> Vec<TrainSequence> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..count)
        .map(|i| {
            let tokens: Vec<u32> = (0..8 + 5 * (i % 4)).map(|_| 4 + next() % 500).collect();
            let weights = (0..tokens.len()).map(|t| if t % 3 == 0 { 0.0 } else { 1.0 }).collect();
            TrainSequence::new(tokens, weights)
        })
        .collect()
}

fn batch(sequences: &[TrainSequence], pass: u64) -> TrainBatch {
    TrainBatch::cross_entropy(sequences.to_vec(), pass)
}

/// Steps over one batch each; every tensor of the last snapshot.
async fn trained(trainer: &Trainer, steps: std::ops::Range<u64>) -> BTreeMap<String, Vec<f32>> {
    for step in steps {
        trainer.forward_backward(batch(&sequences(6, step as u32 + 1), step)).await.expect("a pass");
        trainer.optim_step(STEP).await.expect("a step");
    }
    values(&trainer.snapshot().await.expect("a snapshot"))
}

fn values(snapshot: &TrainerSnapshot) -> BTreeMap<String, Vec<f32>> {
    let flat = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1()).expect("f32 values");
    snapshot.tensors.iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect()
}

fn worst(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, part: &str) -> f32 {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let pairs =
        a.iter().filter(|(name, _)| name.ends_with(part)).zip(b.iter().filter(|(n, _)| n.ends_with(part)));
    pairs.flat_map(|((_, a), (_, b))| a.iter().zip(b).map(|(a, b)| (a - b).abs())).fold(0.0, f32::max)
}

/// PEFT's tensors as a snapshot with moments of 0.
fn peft_state(dir: &Path, engine: &EngineHandle) -> TrainerSnapshot {
    let stored = parity::tensors(&dir.join("adapter_model.safetensors"));
    let mut tensors = BTreeMap::new();
    for site in engine.info().sites.iter() {
        for part in ["lora_A", "lora_B"] {
            let suffix = format!("{}.{part}.weight", site.name);
            let Some((_, tensor)) = stored.iter().find(|(name, _)| name.ends_with(&suffix)) else { continue };
            tensors.insert(format!("{}.{part}", site.name), tensor.clone());
            for moment in ["m", "v"] {
                let zeros = tensor.zeros_like().expect("zeros");
                tensors.insert(format!("{}.{part}.{moment}", site.name), zeros);
            }
        }
    }
    TrainerSnapshot { tensors, steps: 0, loss_scale: LossScale { factor: 1.0, good_steps: 0 } }
}

/// Step `step` of a fixture's batches: padding cut off, labels as weights.
fn fixture_batch(file: &Path, step: usize) -> TrainBatch {
    let tensors = parity::tensors(file);
    let row = |name: &str| -> Vec<Vec<i64>> {
        let t = tensors[name].get(step).and_then(|t| t.to_dtype(DType::I64)?.to_vec2());
        t.expect("a matrix of integers")
    };
    let (ids, mask, labels) = (row("input_ids"), row("attention_mask"), row("labels"));
    let sequences = ids.iter().zip(&mask).zip(&labels).map(|((ids, mask), labels)| {
        let length = mask.iter().filter(|&&m| m == 1).count();
        let weights = labels[..length].iter().map(|&l| if l == -100 { 0.0 } else { 1.0 });
        TrainSequence::new(ids[..length].iter().map(|&t| t as u32).collect(), weights.collect())
    });
    TrainBatch::cross_entropy(sequences.collect(), step as u64)
}

#[tokio::test]
async fn parity_ten_steps_of_every_family() {
    for dir in parity::families() {
        let (name, train) = (parity::name(&dir), dir.join("train"));
        let trace = parity::json(&train.join("trace.json"));
        let number = |key: &str, i: usize| trace[key][i].as_f64().expect("a number");
        let engine = engine(&dir, Quantization::None);
        let config = parity::json(&train.join("adapter_init/adapter_config.json"));
        let mut spec = spec(&engine);
        spec.lora.rank = config["r"].as_u64().expect("a rank") as usize;
        spec.lora.alpha = config["lora_alpha"].as_f64().expect("alpha");
        let start = peft_state(&train.join("adapter_init"), &engine);
        assert!(!start.tensors.is_empty(), "{name}: the adapter's names are those of the sites");
        let sites = engine.info().sites.iter().enumerate();
        let trained = sites.filter(|(_, site)| start.tensors.contains_key(&format!("{}.lora_A", site.name)));
        spec.lora.sites = trained.map(|(number, _)| number).collect();
        let trainer = engine.create_trainer(spec).await.expect("a trainer");
        trainer.restore(start).await.expect("PEFT's tensors fit");
        let drift = trace["loss_max_abs_diff_f32_f64"].as_f64().expect("a number");
        for step in 0..10 {
            let pass = trainer
                .forward_backward(fixture_batch(&train.join("batches.safetensors"), step))
                .await
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let loss = pass.loss_sum / pass.weight_sum;
            let apart = (loss - number("loss_f64", step)).abs();
            assert!(apart < (20.0 * drift).max(2e-5), "{name}, step {step}: loss {loss} is {apart} away");
            let step_report = trainer.optim_step(STEP).await.expect("a step");
            let norm = number("grad_norm_f64", step);
            let apart = (step_report.grad_norm - norm).abs() / norm;
            assert!(apart < 2e-4, "{name}, step {step}: gradient norm is {apart} away");
        }
        let ours = values(&trainer.snapshot().await.expect("a snapshot"));
        let theirs = values(&peft_state(&train.join("adapter_final"), &engine));
        // Adam divides by the gradient's own size, so an entry whose gradient is all rounding may go anywhere; the
        // trace says how far torch's own f32 and f64 runs are apart.
        let allowed = trace["final_adapter_max_abs_diff_f32_f64"].as_f64().expect("a number") as f32;
        let mut all: Vec<f32> = Vec::new();
        for (key, ours) in ours.iter().filter(|(key, _)| key.ends_with("lora_A") || key.ends_with("lora_B")) {
            all.extend(ours.iter().zip(&theirs[key]).map(|(a, b)| (a - b).abs()));
        }
        all.sort_by(f32::total_cmp);
        let most = all[all.len() * 999 / 1000];
        assert!(most < 2e-5, "{name}: a thousandth of the adapter is {most} away");
        let worst = all[all.len() - 1];
        assert!(worst < (10.0 * allowed).max(1e-4), "{name}: {worst} away, torch's own runs {allowed}");
    }
}

#[tokio::test]
async fn what_is_kept_changes_no_bit() {
    let engine = engine(&llama(), Quantization::None);
    let mut all = Vec::new();
    for checkpointing in [Checkpointing::Keep, Checkpointing::Recompute] {
        let mut spec = spec(&engine);
        spec.lora.dropout = 0.1;
        spec.checkpointing = checkpointing;
        let trainer = engine.create_trainer(spec).await.expect("a trainer");
        let layers = engine.info().layers;
        assert_eq!(trainer.plan().kept_layers, if checkpointing == Checkpointing::Keep { layers } else { 0 });
        all.push(trained(&trainer, 0..3).await);
    }
    assert_eq!(all[0], all[1]);
    assert!(all[0].values().flatten().all(|v| v.is_finite()));
}

#[tokio::test]
async fn packing_and_accumulating_give_what_one_batch_gives() {
    let engine = engine(&llama(), Quantization::None);
    let all = sequences(8, 5);
    let mut states = Vec::new();
    for parts in [1, 2, 4, 8] {
        let trainer = engine.create_trainer(spec(&engine)).await.expect("a trainer");
        let (mut loss, mut weight) = (0.0, 0.0);
        for (i, part) in all.chunks(8 / parts).enumerate() {
            let pass = trainer.forward_backward(batch(part, i as u64)).await.expect("a pass");
            loss += pass.loss_sum;
            weight += pass.weight_sum;
        }
        let step = trainer.optim_step(STEP).await.expect("a step");
        states.push((loss / weight, step.grad_norm, values(&trainer.snapshot().await.expect("a snapshot"))));
    }
    for (loss, norm, values) in &states[1..] {
        assert!((loss - states[0].0).abs() < 1e-6, "{loss} and {}", states[0].0);
        assert!((norm - states[0].1).abs() / norm < 1e-5);
        // The first moment is the gradient, but for a factor.
        assert!(worst(values, &states[0].2, ".m") < 1e-6, "{}", worst(values, &states[0].2, ".m"));
    }
}

#[tokio::test]
async fn a_restored_trainer_goes_on_with_the_same_bits() {
    let engine = engine(&llama(), Quantization::None);
    let mut spec = spec(&engine);
    spec.lora.dropout = 0.1;
    let whole = engine.create_trainer(spec.clone()).await.expect("a trainer");
    let expected = trained(&whole, 0..6).await;
    let first = engine.create_trainer(spec.clone()).await.expect("a trainer");
    trained(&first, 0..3).await;
    let snapshot = first.snapshot().await.expect("a snapshot");
    drop(first);
    let second = engine.create_trainer(spec).await.expect("a trainer");
    second.restore(snapshot).await.expect("it fits");
    assert_eq!(trained(&second, 3..6).await, expected);
}

async fn answer(
    engine: &EngineHandle,
    prompt: &[u32],
    adapter: Option<gurukul::engine::AdapterHandle>,
) -> Vec<u32> {
    let request =
        GenerateRequest { adapter, ignore_eos: true, ..GenerateRequest::greedy(prompt.to_vec(), 24) };
    let mut generation = engine.generate(request).expect("it is accepted");
    let mut tokens = Vec::new();
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { .. } => break,
            Event::Failed(error) => panic!("{error}"),
        }
    }
    tokens
}

#[tokio::test]
async fn serving_and_training_do_not_change_each_other() {
    let engine = engine(&llama(), Quantization::None);
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| (4..10 + 3 * i).collect()).collect();
    let quiet = engine.create_trainer(spec(&engine)).await.expect("a trainer");
    let expected = trained(&quiet, 0..5).await;
    let adapter = quiet.publish("first", 1).await.expect("it is served");
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(answer(&engine, prompt, None).await);
        alone.push(answer(&engine, prompt, Some(adapter.clone())).await);
    }
    assert_ne!(alone[0], alone[1], "the adapter changes answers");

    let busy = engine.create_trainer(spec(&engine)).await.expect("a trainer");
    let training = tokio::spawn(async move { trained(&busy, 0..5).await });
    let mut rounds = 0;
    while !training.is_finished() || rounds == 0 {
        let asked = prompts.iter().flat_map(|p| [(p, None), (p, Some(adapter.clone()))]);
        let answers = futures::future::join_all(asked.map(|(p, a)| answer(&engine, p, a))).await;
        assert_eq!(answers, alone);
        rounds += 1;
    }
    assert_eq!(training.await.expect("it ran"), expected);
    let stats = engine.stats();
    assert!(stats.train_pieces > 0 && stats.train_s > 0.0 && stats.train_steps == 10, "{stats:?}");
}

#[tokio::test]
async fn two_trainers_take_turns_and_do_not_mix() {
    let engine = engine(&llama(), Quantization::None);
    let mut other = spec(&engine);
    other.lora.rank = 2;
    other.lora.sites = vec![0, 3];
    let alone = (
        trained(&engine.create_trainer(spec(&engine)).await.expect("a trainer"), 0..3).await,
        trained(&engine.create_trainer(other.clone()).await.expect("a trainer"), 0..3).await,
    );
    let (one, two) = (
        engine.create_trainer(spec(&engine)).await.expect("a trainer"),
        engine.create_trainer(other).await.expect("a trainer"),
    );
    assert_eq!(tokio::join!(trained(&one, 0..3), trained(&two, 0..3)), alone);
}

#[tokio::test]
async fn losses_fall_through_quantized_bases() {
    for quantize in [Quantization::None, Quantization::Q8_0, Quantization::Q4_0] {
        let engine = engine(&llama(), quantize);
        let trainer = engine.create_trainer(spec(&engine)).await.expect("a trainer");
        let mut losses = Vec::new();
        for step in 0..30 {
            let pass = trainer.forward_backward(batch(&sequences(2, 9), step)).await.expect("a pass");
            losses.push(pass.loss_sum / pass.weight_sum);
            let by = StepParameters { learning_rate: 1e-2, max_grad_norm: 1.0 };
            trainer.optim_step(by).await.expect("a step");
        }
        assert!(losses[29] < losses[0] - 1.0, "{quantize:?}: {losses:?}");
        // What a pass says of a token is what scoring says with the adapter as it then was.
        let one = &sequences(2, 9)[..1];
        let seen = trainer.evaluate(batch(one, 99)).await.expect("a pass").logprobs[0].clone();
        let adapter = trainer.publish("trained", 1).await.expect("it is served");
        let tokens = one[0].tokens.clone();
        let request = gurukul::engine::ScoreRequest { tokens, from: 1, adapter: Some(adapter) };
        let scored = engine.score(request).await.expect("scores");
        for (i, weight) in one[0].weights.iter().enumerate().skip(1).filter(|(_, w)| **w != 0.0) {
            let apart = (seen[i] - scored[i - 1]).abs();
            assert!(apart < 1e-3, "{quantize:?}: {apart} at {i}, weight {weight}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_trained_is_refused_with_the_reason() {
    let engine = engine(&llama(), Quantization::None);
    let refused = async |change: &dyn Fn(&mut TrainerSpec)| {
        let mut spec = spec(&engine);
        change(&mut spec);
        engine.create_trainer(spec).await.err().expect("it is refused").to_string()
    };
    assert!(refused(&|s| s.lora.rank = 0).await.starts_with("r "));
    assert!(refused(&|s| s.lora.sites.clear()).await.contains("target_modules"));
    assert!(refused(&|s| s.lora.sites = vec![9999]).await.contains("target_modules"));
    assert!(refused(&|s| s.lora.dropout = 1.0).await.contains("lora_dropout"));
    assert!(refused(&|s| s.pass.sequence_tokens = 1 << 20).await.contains("max_seq_length"));
    let huge = refused(&|s| s.lora.rank = 1 << 32).await;
    assert!(huge.contains("bytes") && huge.contains("free"), "{huge}");

    let trainer = engine.create_trainer(spec(&engine)).await.expect("a trainer");
    let without = |change: &dyn Fn(&mut TrainSequence)| {
        let mut all = sequences(1, 1);
        change(&mut all[0]);
        batch(&all, 0)
    };
    for (bad, word) in [
        (without(&|s| s.weights.fill(0.0)), "weights"),
        (without(&|s| s.tokens[0] = 1 << 20), "vocabulary"),
        (without(&|s| s.weights.truncate(1)), "weights"),
        (batch(&sequences(200, 1), 0), "plan"),
        (batch(&[], 0), "weights"),
    ] {
        let error = trainer.forward_backward(bad).await.expect_err("it is refused").to_string();
        assert!(error.contains(word), "{error}");
    }
    let error = trainer.optim_step(STEP).await.expect_err("there is no gradient");
    assert!(matches!(error, EngineError::InvalidParameter { .. }), "{error}");
    // A gradient that is not finite changes nothing and is said to.
    let mut poisoned = sequences(1, 1);
    poisoned[0].weights[1] = f32::INFINITY;
    let before = values(&trainer.snapshot().await.expect("a snapshot"));
    trainer.forward_backward(batch(&poisoned, 0)).await.expect("a pass");
    let step = trainer.optim_step(STEP).await.expect("a step");
    assert!(step.skipped && step.steps == 0 && !step.grad_norm.is_finite(), "{step:?}");
    assert_eq!(values(&trainer.snapshot().await.expect("a snapshot")), before);
}

#[tokio::test]
async fn who_stops_waiting_leaves_nothing_behind() {
    let engine = engine(&llama(), Quantization::None);
    let expected = trained(&engine.create_trainer(spec(&engine)).await.expect("a trainer"), 0..2).await;
    let trainer = engine.create_trainer(spec(&engine)).await.expect("a trainer");
    drop(
        tokio::time::timeout(
            std::time::Duration::from_micros(1),
            trainer.forward_backward(batch(&sequences(8, 77), 7)),
        )
        .await,
    );
    // The abandoned pass either never ran or was thrown away; a step can only follow another pass.
    while engine.stats().train_pieces == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(trained(&trainer, 0..2).await, expected);
}
