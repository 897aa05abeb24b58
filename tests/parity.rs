//! Numbers against references that this project did not write: transformers and PEFT, on every family found under
//! `$GURUKUL_PARITY_DIR` (default: the copy in `tests/fixtures/parity`).

#![expect(clippy::print_stdout, reason = "a skipped test says so, and figures are shown with --nocapture")]

#[path = "support/parity.rs"]
mod parity;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use gurukul::engine::{
    AdapterHandle, EngineConfig, EngineHandle, Event, GenerateRequest, LoadAdapter, ScoreRequest,
};
use gurukul::model::decoder::{Batch, Decoder};
use gurukul::model::load::{DeviceChoice, DtypeChoice, load};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::kv_cache::{KvCache, PAGE_TOKENS, SequenceSpan};
use gurukul::nn::lora::{Adapter, LoraBatch};
use gurukul::nn::quant::Quantization;

fn decoder(dir: &Path) -> Decoder {
    let loaded = load(dir, &Device::Cpu, DtypeChoice::F32, Quantization::None);
    loaded.unwrap_or_else(|e| panic!("{}: {e:#}", dir.display())).0
}

/// Logits of every position of every row, `[rows * length, vocab]`, all rows in one batch.
fn all_logits(model: &Decoder, rows: &[Vec<u32>], adapter: Option<Arc<Adapter>>) -> Tensor {
    let length = rows[0].len();
    let pages = length.div_ceil(PAGE_TOKENS);
    let mut cache = KvCache::new(model.kv_shape(), rows.len() * pages, model.activations(), model.device())
        .expect("a cache");
    let spans = (0..rows.len())
        .map(|i| SequenceSpan {
            rows: i * length..(i + 1) * length,
            start: 0,
            pages: (i * pages..(i + 1) * pages).map(|p| p as u32).collect(),
        })
        .collect();
    let tokens: Vec<u32> = rows.concat();
    let outputs = (0..tokens.len() as u32).collect();
    let mut lora = LoraBatch::default();
    if let Some(adapter) = adapter {
        lora.push(0..tokens.len(), adapter);
    }
    model.forward(&Batch { tokens, spans, lora, outputs }, &mut cache).expect("logits")
}

fn worst_difference(ours: &Tensor, theirs: &Tensor) -> f32 {
    let theirs = theirs.reshape(ours.shape()).expect("the same number of logits");
    (ours - theirs).and_then(|d| d.abs()?.max_all()?.to_scalar()).expect("a difference")
}

#[test]
fn parity_logits_of_every_family_in_both_spellings() {
    for dir in parity::families() {
        let answers = parity::tensors(&dir.join("logits.safetensors"));
        let rows = parity::id_rows(&answers["input_ids"]);
        for config in ["config.json", "config_v5.json"] {
            let copy = parity::with_config(&dir, config);
            let worst = worst_difference(&all_logits(&decoder(copy.path()), &rows, None), &answers["logits"]);
            assert!(worst < 1e-4, "{} ({config}): {worst}", parity::name(&dir));
        }
    }
}

#[test]
fn parity_logits_with_adapters_that_peft_made() {
    let mut checked = 0;
    for dir in parity::families() {
        let model = decoder(&dir);
        let mut cases = vec![(dir.clone(), "adapter".to_owned(), dir.join("logits_adapter.safetensors"))];
        for entry in std::fs::read_dir(dir.join("variants")).into_iter().flatten() {
            let path = entry.expect("a readable entry").path();
            cases.push((dir.join("variants"), parity::name(&path), path.join("logits.safetensors")));
        }
        for (root, name, answers) in cases {
            let answers = parity::tensors(&answers);
            let weights = gurukul::adapters::read(&root, &name, model.sites())
                .unwrap_or_else(|e| panic!("{}/{name}: {e}", root.display()));
            let adapter = Adapter::bind(&weights, model.sites(), |s| model.site_weight(s), model.device());
            let rows = parity::id_rows(&answers["input_ids"]);
            let ours = all_logits(&model, &rows, Some(Arc::new(adapter.expect("it fits"))));
            let worst = worst_difference(&ours, &answers["logits"]);
            assert!(worst < 1e-4, "{}/{name}: {worst}", root.display());
            checked += 1;
        }
    }
    assert!(checked >= parity::families().len());
}

fn engine(dir: &Path, prefill_chunk: usize, max_batch: usize, quantize: Quantization) -> EngineHandle {
    let config = EngineConfig {
        model_dir: dir.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize,
        kv_cache_bytes: Some(16 << 20),
        max_batch,
        max_queue: 64,
        prefill_chunk,
        adapter_cache_bytes: 1 << 28,
        train_share: 0.5,
    };
    let tokenizer = Arc::new(Tokenizer::from_dir(dir).expect("a tokenizer"));
    EngineHandle::start(config, tokenizer).unwrap_or_else(|e| panic!("{}: {e:#}", dir.display()))
}

async fn load_adapter(engine: &EngineHandle, root: &Path, name: &str) -> AdapterHandle {
    let weights = gurukul::adapters::read(root, name, &engine.info().sites).expect("PEFT's adapter is read");
    let adapter = LoadAdapter { name: name.to_owned(), generation: 1, weights };
    engine.load_adapter(adapter).await.expect("it fits")
}

fn greedy(prompt: Vec<u32>, new: usize, adapter: Option<AdapterHandle>) -> GenerateRequest {
    GenerateRequest { ignore_eos: true, adapter, ..GenerateRequest::greedy(prompt, new) }
}

/// All requests at once; the ids of each, in order.
async fn generate(engine: &EngineHandle, requests: Vec<GenerateRequest>) -> Vec<Vec<u32>> {
    let running: Vec<_> = requests.into_iter().map(|r| engine.generate(r).expect("admitted")).collect();
    let mut all = Vec::new();
    for mut generation in running {
        let mut ids = Vec::new();
        while let Some(event) = generation.events.recv().await {
            match event {
                Event::Token { token, .. } => ids.push(token),
                Event::Finished { .. } => break,
                Event::Failed(error) => panic!("{error}"),
            }
        }
        all.push(ids);
    }
    all
}

/// Ragged prompts, with and without the adapter, one by one and all together, whole and in chunks of three tokens:
/// always transformers' ids.
#[tokio::test]
async fn parity_greedy_ids_however_requests_are_batched() {
    for dir in parity::families() {
        let answers = parity::json(&dir.join("greedy.json"));
        for (prefill_chunk, max_batch) in [(64, 1), (64, 6), (3, 6), (1, 4)] {
            let engine = engine(&dir, prefill_chunk, max_batch, Quantization::None);
            let adapter = load_adapter(&engine, &dir, "adapter").await;
            let (mut requests, mut expected) = (Vec::new(), Vec::new());
            for case in answers.as_array().expect("cases") {
                for (key, adapter) in [("new", None), ("new_adapter", Some(adapter.clone()))] {
                    let ids = parity::ids(&case[key]);
                    requests.push(greedy(parity::ids(&case["prompt"]), ids.len(), adapter));
                    expected.push(ids);
                }
            }
            let found = generate(&engine, requests).await;
            assert_eq!(found, expected, "{} chunk {prefill_chunk} batch {max_batch}", parity::name(&dir));
            tokio::task::spawn_blocking(move || engine.shutdown()).await.expect("it stops");
        }
    }
}

/// A seed gives one answer, whoever else is being served.
#[tokio::test]
async fn parity_of_a_seeded_answer_alone_and_in_company() {
    let dir = parity::root().join("llama");
    let engine = engine(&dir, 5, 8, Quantization::None);
    let adapter = load_adapter(&engine, &dir, "adapter").await;
    let request = |i: u32| {
        let prompt = (0..5 + 7 * i).map(|t| 4 + (t * 37 + i * 11) % 500).collect();
        let mut request = greedy(prompt, 30, (i % 2 == 1).then(|| adapter.clone()));
        request.sampling.temperature = 0.9;
        request.sampling.top_p = 0.95;
        request.sampling.repetition_penalty = 1.1;
        request.sampling.seed = 1000 + i as u64;
        request
    };
    let mut alone = Vec::new();
    for i in 0..8 {
        alone.extend(generate(&engine, vec![request(i)]).await);
    }
    let together = generate(&engine, (0..8).map(request).collect()).await;
    assert_eq!(alone, together);
    assert_ne!(alone[0], alone[2]);
}

/// The folder with real checkpoints and text, or `None` with a message.
fn real(path: &str) -> Option<PathBuf> {
    let found =
        std::env::var_os("GURUKUL_REAL_DIR").map(|dir| Path::new(&dir).join(path)).filter(|p| p.exists());
    if found.is_none() {
        println!("skipped: set GURUKUL_REAL_DIR to a folder that has {path}");
    }
    found
}

/// A trained checkpoint gives the ids that llama2.c documents and transformers gives.
#[tokio::test]
async fn parity_golden_story() {
    let Some(dir) = real("stories260K/hf") else { return };
    let engine = engine(&dir, 16, 2, Quantization::None);
    for file in ["golden_greedy.json", "golden_greedy_prompt.json"] {
        let golden = parity::json(&dir.join("..").join(file));
        let (prompt, ids) = (parity::ids(&golden["prompt_ids"]), parity::ids(&golden["ids"]));
        let new = ids.len() - prompt.len();
        let found = generate(&engine, vec![greedy(prompt.clone(), new, None)]).await;
        assert_eq!([prompt, found[0].clone()].concat(), ids, "{file}");
    }
}

/// Perplexity over real sentences: 8 bits cost less than one per cent.
#[tokio::test]
async fn parity_perplexity_of_eight_bits_on_real_text() {
    let (Some(dir), Some(text)) = (real("stories260K/hf"), real("flores200/eng_Latn.dev")) else { return };
    let text = std::fs::read_to_string(text).expect("text");
    let tokenizer = Tokenizer::from_dir(&dir).expect("a tokenizer");
    let mut perplexities = Vec::new();
    for quantize in [Quantization::None, Quantization::Q8_0] {
        let engine = engine(&dir, 64, 8, quantize);
        let (mut sum, mut count) = (0f64, 0);
        for line in text.lines().take(200) {
            let tokens = tokenizer.encode(line, gurukul::model::tokenizer::AddSpecial::Yes).expect("encodes");
            let scores = engine.score(ScoreRequest { tokens, from: 1, adapter: None }).await.expect("scored");
            sum += scores.iter().map(|&s| s as f64).sum::<f64>();
            count += scores.len();
        }
        perplexities.push((-sum / count as f64).exp());
    }
    let ratio = perplexities[1] / perplexities[0];
    println!("perplexity f32 {:.3}, q8_0 {:.3}, ratio {ratio:.5}", perplexities[0], perplexities[1]);
    assert!((ratio - 1.0).abs() < 0.01, "{perplexities:?}");
}

/// `Score` gives the log-softmax of transformers' logits.
#[tokio::test]
async fn parity_scores_are_those_of_the_logits() {
    let dir = parity::root().join("llama");
    let answers = parity::tensors(&dir.join("logits.safetensors"));
    let rows = parity::id_rows(&answers["input_ids"]);
    let logits = answers["logits"].to_vec3::<f32>().expect("logits");
    let engine = engine(&dir, 7, 2, Quantization::None);
    for (row, logits) in rows.iter().zip(logits) {
        let scores =
            engine.score(ScoreRequest { tokens: row.clone(), from: 1, adapter: None }).await.expect("scored");
        assert_eq!(scores.len(), row.len() - 1);
        // Chunks are 7 tokens: one that scores nothing, one in the middle of which scoring begins.
        for from in [2, row.len() / 2, row.len() - 1] {
            let request = ScoreRequest { tokens: row.clone(), from, adapter: None };
            assert_eq!(engine.score(request).await.expect("scored"), scores[from - 1..], "from {from}");
        }
        for from in [0, row.len()] {
            let request = ScoreRequest { tokens: row.clone(), from, adapter: None };
            assert!(engine.score(request).await.unwrap_err().to_string().starts_with("from must be"));
        }
        for (at, score) in scores.iter().enumerate() {
            let total = logits[at].iter().map(|&l| (l as f64).exp()).sum::<f64>().ln();
            let expected = logits[at][row[at + 1] as usize] as f64 - total;
            assert!((*score as f64 - expected).abs() < 1e-4, "position {at}: {score} for {expected}");
        }
    }
}
