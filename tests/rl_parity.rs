//! Losses and LoRA gradients of policies and preferences against PyTorch and TRL, on a batch that is kept as a fixture
//! (`rl_reference.py` makes it); and what samples against what learns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use gurukul::engine::training::{
    AdamW, Checkpointing, LoraSpec, LossScale, PassShape, StepParameters, TrainBatch, TrainSequence,
    TrainerSnapshot, TrainerSpec,
};
use gurukul::engine::{EngineConfig, EngineHandle, GenerateRequest, Sampling, Trainer};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::lora::LoraWeights;
use gurukul::nn::loss::{PolicyToken, TokenLoss};
use gurukul::nn::policy::dpo;
use gurukul::nn::quant::Quantization;
use serde_json::Value;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn engine(dir: &Path) -> EngineHandle {
    let config = EngineConfig {
        model_dir: dir.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(8 << 20),
        max_batch: 4,
        max_queue: 64,
        prefill_chunk: 64,
        adapter_cache_bytes: 64 << 20,
        train_share: 0.5,
    };
    EngineHandle::start(config, Arc::new(Tokenizer::from_dir(dir).unwrap())).unwrap()
}

fn spec(engine: &EngineHandle, rank: usize, alpha: f64, sites: Vec<usize>) -> TrainerSpec {
    TrainerSpec {
        lora: LoraSpec { rank, alpha, dropout: 0.0, rslora: false, sites, seed: 1 },
        adamw: AdamW::default(),
        pass: PassShape { sequences: 8, sequence_tokens: 64.min(engine.info().context_length) },
        checkpointing: Checkpointing::Keep,
    }
}

/// An adapter as a trainer's state, its moments 0.
fn state(weights: &LoraWeights, engine: &EngineHandle) -> TrainerSnapshot {
    let mut tensors = BTreeMap::new();
    for of in &weights.sites {
        let name = &engine.info().sites[of.site].name;
        for (part, tensor) in [("lora_A", &of.a), ("lora_B", &of.b)] {
            tensors.insert(format!("{name}.{part}"), tensor.clone());
            for moment in ["m", "v"] {
                tensors.insert(format!("{name}.{part}.{moment}"), tensor.zeros_like().unwrap());
            }
        }
    }
    TrainerSnapshot { tensors, steps: 0, loss_scale: LossScale { factor: 1.0, good_steps: 0 } }
}

/// A trainer that begins with the fixture's adapter.
async fn trainer(engine: &EngineHandle) -> Trainer {
    let weights =
        gurukul::adapters::read(&here("tests/fixtures/parity/llama"), "adapter", &engine.info().sites)
            .unwrap();
    let rank = weights.sites[0].a.dim(0).unwrap();
    let alpha = weights.sites[0].scale * rank as f64;
    let sites = weights.sites.iter().map(|of| of.site).collect();
    let trainer = engine.create_trainer(spec(engine, rank, alpha, sites)).await.unwrap();
    trainer.restore(state(&weights, engine)).await.unwrap();
    trainer
}

/// The gradient: the first moment after the first step, but for AdamW's factor.
async fn gradient(trainer: &Trainer) -> BTreeMap<String, Vec<f32>> {
    trainer.optim_step(StepParameters { learning_rate: 1e-9, max_grad_norm: 0.0 }).await.unwrap();
    let factor = 1.0 - AdamW::default().beta1;
    let snapshot = trainer.snapshot().await.unwrap();
    let moments =
        snapshot.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_suffix(".m")?, tensor)));
    let values =
        |tensor: &Tensor| (tensor / factor).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    moments.map(|(name, tensor)| (name.to_owned(), values(tensor))).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as f32).collect()
}

struct Fixture {
    batch: Value,
    gradients: std::collections::HashMap<String, Tensor>,
}

impl Fixture {
    fn read() -> Self {
        let folder = here("tests/fixtures/rl");
        let batch = std::fs::read_to_string(folder.join("batch.json")).unwrap();
        let gradients = candle_core::safetensors::load(folder.join("gradients.safetensors"), &Device::Cpu);
        Self { batch: serde_json::from_str(&batch).unwrap(), gradients: gradients.unwrap() }
    }

    /// The sequences of a case, each token of an answer with this weight.
    fn sequences(&self, case: &Value, weight: impl Fn(usize) -> f32) -> Vec<TrainSequence> {
        let prompt = self.batch["prompt"].as_u64().unwrap() as usize;
        let all = self.batch["sequences"].as_array().unwrap();
        let sequence = |(at, tokens): (usize, &Value)| {
            let tokens: Vec<u32> = numbers(tokens).iter().map(|&token| token as u32).collect();
            let answer = tokens.len() - prompt;
            let mut policy = vec![PolicyToken::default(); tokens.len()];
            if case["old"].is_array() {
                let (old, reference) = (numbers(&case["old"][at]), numbers(&case["reference"][at]));
                let advantage = numbers(&self.batch["advantages"])[at];
                for (i, token) in policy[prompt..].iter_mut().enumerate() {
                    *token = PolicyToken { old: old[i], advantage, reference: reference[i] };
                }
            }
            let weights = [vec![0.0; prompt], vec![weight(answer); answer]].concat();
            TrainSequence { tokens, weights, policy }
        };
        all.iter().enumerate().map(sequence).collect()
    }

    fn assert_gradient(&self, name: &str, ours: &BTreeMap<String, Vec<f32>>) {
        let theirs: Vec<_> = self
            .gradients
            .iter()
            .filter_map(|(key, t)| Some((key.strip_prefix(&format!("{name}/"))?, t)))
            .collect();
        assert_eq!(theirs.len(), ours.len(), "{name}: the same modules");
        let mut worst = 0f32;
        for (key, tensor) in theirs {
            let theirs = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // The fixture names modules from the decoder's own root.
            let ours = &ours[&format!("model.{key}")];
            let apart = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert_eq!(ours.len(), theirs.len(), "{name} {key}");
            worst = worst.max(apart);
        }
        assert!(worst < 1e-4, "{name}: the gradient is {worst} away");
    }
}

#[tokio::test]
async fn parity_policies_with_pytorch_and_trl() {
    let fixture = Fixture::read();
    let engine = engine(&here("tests/fixtures/parity/llama"));
    let cases = fixture.batch["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 7);
    for (name, case) in cases.iter().filter(|(name, _)| *name != "dpo") {
        let number = |key: &str| case[key].as_f64().unwrap_or(0.0) as f32;
        let kl = number("kl");
        let loss = match case["loss"].as_str().unwrap() {
            "importance_sampling" => TokenLoss::ImportanceSampling { kl },
            _ => TokenLoss::PpoClip { low: number("low"), high: number("high"), kl },
        };
        let longest = fixture.batch["longest"].as_f64().unwrap() as f32;
        let unbiased = case["unbiased"] == true;
        let sequences =
            fixture.sequences(case, |answer| 1.0 / if unbiased { longest } else { answer as f32 });
        let temperature = case["temperature"].as_f64().unwrap_or(1.0);
        let trainer = trainer(&engine).await;
        // In two passes, as a batch that is larger than the plan would be.
        let (mut value, mut figures) = (0.0, gurukul::nn::policy::PolicyFigures::default());
        for (pass, part) in sequences.chunks(3).enumerate() {
            let normalizer = Some(part.len() as f64);
            let batch =
                TrainBatch { sequences: part.to_vec(), loss, temperature, normalizer, pass: pass as u64 };
            let report = trainer.forward_backward(batch).await.unwrap();
            value += report.loss_sum / sequences.len() as f64;
            figures.add(&report.policy.expect("a policy's loss has figures"));
        }
        let apart = (value - case["value"].as_f64().unwrap()).abs();
        assert!(apart < 1e-4, "{name}: the loss {value} is {apart} away");
        let entropy = figures.mean(figures.entropy_sum);
        assert!((entropy - case["entropy"].as_f64().unwrap()).abs() < 1e-4, "{name}: entropy {entropy}");
        assert!(
            figures.ratio_min < 0.7 && figures.ratio_max > 1.4,
            "{name}: the fixture has ratios far from 1"
        );
        assert_eq!(figures.clipped > 0, name.starts_with("ppo"), "{name}");
        assert_eq!(figures.kl_sum > 0.0, kl > 0.0, "{name}");
        fixture.assert_gradient(name, &gradient(&trainer).await);
    }
}

#[tokio::test]
async fn parity_preferences_with_pytorch() {
    let fixture = Fixture::read();
    let engine = engine(&here("tests/fixtures/parity/llama"));
    let case = &fixture.batch["cases"]["dpo"];
    let mut sequences = fixture.sequences(case, |_| 1.0);
    let trainer = trainer(&engine).await;
    let sums = |logprobs: Vec<Vec<f32>>| -> Vec<f64> {
        logprobs.iter().map(|of| of.iter().map(|&l| f64::from(l)).sum()).collect()
    };
    let policy =
        sums(trainer.evaluate(TrainBatch::cross_entropy(sequences.clone(), 0)).await.unwrap().logprobs);
    let base =
        sums(trainer.evaluate_base(TrainBatch::cross_entropy(sequences.clone(), 0)).await.unwrap().logprobs);
    let mut value = 0.0;
    for pair in [0, 2] {
        let of = |at: usize| (policy[at], base[at]);
        let (loss, weight) = dpo(case["beta"].as_f64().unwrap(), of(pair), of(pair + 1));
        value += loss / 2.0;
        for (at, sign) in [(pair, 1.0), (pair + 1, -1.0)] {
            sequences[at].weights.iter_mut().for_each(|w| *w *= sign * weight as f32);
        }
    }
    let apart = (value - case["value"].as_f64().unwrap()).abs();
    assert!(apart < 1e-4, "the loss {value} is {apart} away");
    let batch = TrainBatch { normalizer: Some(2.0), ..TrainBatch::cross_entropy(sequences, 0) };
    trainer.forward_backward(batch).await.unwrap();
    fixture.assert_gradient("dpo", &gradient(&trainer).await);
}

/// What samples gives each token the log-probability that what learns gives it, at any temperature, with an adapter.
async fn ratios_are_1(dir: &Path, prompts: &[Vec<u32>]) {
    let engine = engine(dir);
    let sites = (0..engine.info().sites.len()).collect();
    let trainer = engine.create_trainer(spec(&engine, 4, 8.0, sites)).await.unwrap();
    // A step, so that B is not 0.
    let tokens: Vec<u32> = (4..24).collect();
    let weights = vec![1.0; tokens.len()];
    let first = TrainBatch::cross_entropy(vec![TrainSequence::new(tokens, weights)], 0);
    trainer.forward_backward(first).await.unwrap();
    trainer.optim_step(StepParameters { learning_rate: 1e-2, max_grad_norm: 0.0 }).await.unwrap();
    let adapter = trainer.publish("policy", 1).await.unwrap();
    for temperature in [0.6f32, 1.0, 1.7] {
        let mut sequences = Vec::new();
        for prompt in prompts {
            let request = GenerateRequest {
                sampling: Sampling { temperature, seed: 5, ..Sampling::default() },
                top_logprobs: Some(0),
                adapter: Some(adapter.clone()),
                ..GenerateRequest::greedy(prompt.clone(), 24)
            };
            let answer = engine.generate(request).unwrap().answer().await.unwrap();
            let sampled = answer.tokens.iter().map(|token| token.logprobs.as_ref().unwrap().sampled);
            let policy = sampled.map(|old| PolicyToken { old, advantage: 1.0, reference: 0.0 });
            let answered: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
            sequences.push(TrainSequence {
                tokens: [prompt.as_slice(), &answered].concat(),
                weights: [vec![0.0; prompt.len()], vec![1.0; answered.len()]].concat(),
                policy: [vec![PolicyToken::default(); prompt.len()], policy.collect()].concat(),
            });
        }
        let loss = TokenLoss::ImportanceSampling { kl: 0.0 };
        let batch =
            TrainBatch { sequences, loss, temperature: f64::from(temperature), normalizer: None, pass: 1 };
        let figures = trainer.evaluate(batch).await.unwrap().policy.unwrap();
        assert!(figures.tokens >= 3 && figures.ratio_error() < 1e-3, "{temperature}: {figures:?}");
    }
}

#[tokio::test]
async fn what_samples_agrees_with_what_learns() {
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| (4..10 + 3 * i).collect()).collect();
    ratios_are_1(&here("tests/fixtures/parity/llama"), &prompts).await;
}

#[tokio::test]
async fn what_samples_agrees_with_what_learns_on_the_demo_model() {
    let demo = here("assets/demo");
    let tokenizer = Tokenizer::from_dir(&demo).unwrap();
    let encode = |text: &str| tokenizer.encode(text, gurukul::model::tokenizer::AddSpecial::Yes).unwrap();
    let texts = ["Translate to Nepali: Where is the river?", "தமிழில் மொழிபெயர்க்கவும்: I have ten apples."];
    ratios_are_1(&demo, &texts.map(encode)).await;
}
