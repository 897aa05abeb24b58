//! Makes the demo model of `assets/demo` from the phrasebook of `assets/phrasebook`: the phrasebook's two parts,
//! the tokenizer, the weights. Every weight is trained, by the same passes, loss, optimizer and batches as an
//! adapter's. The same seed gives the same model; a run that was stopped goes on where it saved last.
//!
//! ```sh
//! cargo run --release --example pretrain_demo -- --out target/demo
//! ```
#![expect(clippy::print_stdout, reason = "progress is what it prints")]

#[path = "phrasebook.rs"]
mod phrasebook;
mod records;
mod tokenizer;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use candle_core::DType;
use clap::Parser;
use gurukul::config::adapter::{AdapterConfig, Scheduler, Template};
use gurukul::data::SourceConfig;
use gurukul::engine::training::{AdamW, StepParameters, TrainBatch, TrainSequence};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::train::TrainJob;
use gurukul::train::dataset::{Dataset, pack};
use gurukul::train::full::FullTrainer;
use gurukul::train::schedule::Schedule;
use serde_json::json;

use phrasebook::{Entry, LANGUAGES};

/// Passes that a step's examples are shared among, each on a thread of its own: whatever the machine, so that the
/// same seed gives the same sums.
const PASSES: usize = 2;
/// Tokens of one pass over held-out sentences.
const SCORED_TOKENS: usize = 1024;
/// Optimizer steps between two saved states.
const SAVE_STEPS: u64 = 200;

/// Trains the demo model
#[derive(Parser)]
struct Arguments {
    /// Folder of the run: states and the finished model
    #[arg(long, default_value = "target/demo")]
    out: PathBuf,
    /// Write the phrasebook's train.jsonl and heldout.jsonl again and stop
    #[arg(long)]
    phrasebook_only: bool,
    /// Rounds over all pairs, each in other forms
    #[arg(long, default_value_t = 10)]
    rounds: u64,
    /// Cycles over as many rounds each, the learning rate of each half that of the one before
    #[arg(long, default_value_t = 2)]
    cycles: u32,
    /// Examples of an optimizer step
    #[arg(long, default_value_t = 48)]
    batch: usize,
    /// Largest learning rate
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// Tokens of the vocabulary
    #[arg(long, default_value_t = 8192)]
    vocabulary: usize,
    /// Seed of weights, forms and order
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[expect(unsafe_code, reason = "the environment is changed before there is a second thread")]
fn main() -> Result<()> {
    // The passes of a step run side by side, so that the threads of a kernel would only wait for each other.
    // SAFETY: nothing else runs yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(Arguments::parse()))
}

async fn run(arguments: Arguments) -> Result<()> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let phrases = assets.join("phrasebook");
    for (name, text) in phrasebook::parts(&phrases, &smoke_sentences()?)? {
        fs::write(phrases.join(name), text)?;
    }
    if arguments.phrasebook_only {
        return Ok(());
    }
    let train: Vec<Entry> = phrasebook::read_rows(&phrases.join("train.jsonl"))?;
    let held_out: Vec<Entry> = phrasebook::read_rows(&phrases.join("heldout.jsonl"))?;
    fs::create_dir_all(&arguments.out)?;
    let model = arguments.out.join("model");
    if !model.join("model.safetensors").exists() {
        begin(&arguments, &model, &train)?;
    }
    let tokenizer = Arc::new(Tokenizer::from_dir(&model)?);
    fs::write(arguments.out.join("heldout.jsonl"), records::rows(&held_out, 1, arguments.seed + 1))?;
    teach(&arguments, &model, tokenizer, &train).await
}

/// English sentences of the smoke prompts: they belong to neither part.
fn smoke_sentences() -> Result<BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_prompts/prompts_10.json");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(BTreeSet::new()) };
    let prompts: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    let sentence =
        |prompt: &serde_json::Value| Some(prompt["prompt"].as_str()?.split_once(": ")?.1.to_owned());
    Ok(prompts.iter().filter_map(sentence).collect())
}

/// Configuration, tokenizer and first weights.
fn begin(arguments: &Arguments, model: &Path, train: &[Entry]) -> Result<()> {
    fs::create_dir_all(model)?;
    let mut texts: Vec<String> = train.iter().map(|entry| entry.english().to_owned()).collect();
    for (code, name) in LANGUAGES {
        texts.extend(train.iter().map(|entry| format!(" {}", entry.texts[code])));
        // Each form counts as much as some sentences, so that its words become tokens.
        for form in records::native_forms(code) {
            texts.extend(std::iter::repeat_n(form.replace("{s}", name), 20));
        }
        texts.extend(std::iter::repeat_n(format!("Translate to {name}. Output only {name}:"), 20));
    }
    let document = tokenizer::train(&texts, arguments.vocabulary);
    let size = document["model"]["vocab"].as_object().context("the tokenizer has a vocabulary")?.len();
    fs::write(model.join("tokenizer.json"), serde_json::to_string(&document)?)?;
    for (name, value) in configuration(size) {
        fs::write(model.join(name), serde_json::to_string_pretty(&value)? + "\n")?;
    }
    FullTrainer::initialise(model, arguments.seed)
}

/// The small files of a model folder.
fn configuration(vocabulary: usize) -> [(&'static str, serde_json::Value); 3] {
    // A user's words, a space, the answer: the same tokens as a bare prompt and what follows it.
    let template = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + \
                    message['content'] + eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}";
    [
        (
            "config.json",
            json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": vocabulary,
                "hidden_size": 256,
                "intermediate_size": 704,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 64,
                "hidden_act": "silu",
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "attention_bias": false,
                "mlp_bias": false,
                "tie_word_embeddings": true,
                "initializer_range": 0.02,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "torch_dtype": "float16",
            }),
        ),
        ("generation_config.json", json!({"bos_token_id": 0, "eos_token_id": 1})),
        (
            "tokenizer_config.json",
            json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer::BOS,
                "eos_token": tokenizer::EOS,
                "add_bos_token": true,
                "clean_up_tokenization_spaces": false,
                "model_max_length": 512,
                "chat_template": template,
            }),
        ),
    ]
}

fn job(arguments: &Arguments, rows: &Path) -> TrainJob {
    TrainJob {
        adapter_name: "demo".into(),
        source_name: "phrasebook".into(),
        source: SourceConfig::local(rows.to_string_lossy()),
        config: AdapterConfig {
            seed: arguments.seed,
            epochs: 1,
            max_samples: usize::MAX >> 12,
            shuffle_buffer: 1 << 17,
            eval_share: 0.0,
            template: Template::PromptCompletion,
            ..AdapterConfig::default()
        },
    }
}

/// Trains, saves every so often, and writes the finished weights in f16. The learning rate restarts with each cycle
/// (Loshchilov and Hutter 2017).
async fn teach(
    arguments: &Arguments,
    model: &Path,
    tokenizer: Arc<Tokenizer>,
    train: &[Entry],
) -> Result<()> {
    let adamw = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05 };
    let mut trainer = FullTrainer::open(model, adamw)?;
    let held_out = held_out(arguments, tokenizer.clone()).await?;
    println!("{} parameters", trainer.parameter_count());
    let begun = (0..arguments.cycles).rev().find(|&number| state(arguments, number).is_dir());
    for number in begun.unwrap_or(0)..arguments.cycles {
        cycle(arguments, number, &mut trainer, tokenizer.clone(), train, &held_out).await?;
    }
    println!("loss of held-out sentences {:.4}", score(&trainer, &held_out)?);
    let finished = arguments.out.join("finished");
    fs::create_dir_all(&finished)?;
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model.join(name), finished.join(name))?;
    }
    trainer.export(&finished, DType::F16)?;
    println!("the model is in {}", finished.display());
    Ok(())
}

/// Where a cycle that has begun keeps its state.
fn state(arguments: &Arguments, number: u32) -> PathBuf {
    arguments.out.join(format!("state-{number}"))
}

/// One cycle, from where it was left if it had begun.
async fn cycle(
    arguments: &Arguments,
    number: u32,
    trainer: &mut FullTrainer,
    tokenizer: Arc<Tokenizer>,
    train: &[Entry],
    held_out: &[TrainBatch],
) -> Result<()> {
    let rows = arguments.out.join("train.jsonl");
    // Each cycle asks in other forms than the one before.
    fs::write(&rows, records::rows(train, arguments.rounds, arguments.seed + 1000 * u64::from(number)))?;
    let (job, eos) = (job(arguments, &rows), [1]);
    let state_now = state(arguments, number);
    let mut data = match trainer.restore(&state_now)?.filter(|beside| !beside.is_empty()) {
        None => Dataset::open(&job, tokenizer, &eos).await?,
        Some(saved) => Dataset::restore(&job, tokenizer, &eos, &mut saved.as_slice())?,
    };
    let total = data.planned_examples().examples.div_ceil(arguments.batch as u64);
    let peak = arguments.learning_rate * 0.5_f64.powi(number as i32);
    let schedule = Schedule { kind: Scheduler::Cosine, peak, warmup_ratio: 0.03 };
    let mut done = data.counters().examples.div_ceil(arguments.batch as u64);
    println!("cycle {number}: {total} steps, {done} done");
    let (mut began, mut tokens, mut sums) = (Instant::now(), 0, (0.0, 0.0));
    loop {
        let batch = data.next_batch(arguments.batch).await?;
        if batch.is_empty() {
            break;
        }
        let shares: Vec<TrainBatch> = shared(batch).into_iter().map(pass).collect();
        for report in trainer.forward_backward(&shares)? {
            tokens += report.tokens;
            sums = (sums.0 + report.loss_sum, sums.1 + report.weight_sum);
        }
        let learning_rate = schedule.at(done, total);
        let step = trainer.optim_step(StepParameters { learning_rate, max_grad_norm: 1.0 })?;
        done += 1;
        if done % 20 == 0 {
            let rate = tokens as f64 / began.elapsed().as_secs_f64();
            let loss = sums.0 / sums.1;
            println!(
                "step {done} of {total}: loss {loss:.4}, gradient {:.3}, {rate:.0} tokens/s",
                step.grad_norm
            );
            (began, tokens, sums) = (Instant::now(), 0, (0.0, 0.0));
        }
        if done % SAVE_STEPS == 0 {
            println!("step {done}: loss of held-out sentences {:.4}", score(trainer, held_out)?);
            let mut beside = Vec::new();
            data.save(&mut beside)?;
            trainer.save(&state_now, &beside)?;
        }
    }
    // What the next cycle begins with; after the last one, what a run with more cycles would.
    trainer.save(&state(arguments, number + 1), &[])
}

/// A step's examples in [`PASSES`] parts of about as many tokens each.
fn shared(mut batch: Vec<TrainSequence>) -> Vec<Vec<TrainSequence>> {
    batch.sort_by_key(|sequence| std::cmp::Reverse(sequence.tokens.len()));
    let mut shares = vec![(0, Vec::new()); PASSES];
    for sequence in batch {
        let least = shares.iter_mut().min_by_key(|(tokens, _)| *tokens).expect("there is a pass");
        least.0 += sequence.tokens.len();
        least.1.push(sequence);
    }
    shares.into_iter().map(|(_, share)| share).filter(|share| !share.is_empty()).collect()
}

fn pass(sequences: Vec<TrainSequence>) -> TrainBatch {
    TrainBatch::cross_entropy(sequences, 0)
}

/// Held-out sentences in passes.
async fn held_out(arguments: &Arguments, tokenizer: Arc<Tokenizer>) -> Result<Vec<TrainBatch>> {
    let mut job = job(arguments, &arguments.out.join("heldout.jsonl"));
    job.config.epochs = 1;
    let mut data = Dataset::open(&job, tokenizer, &[1]).await?;
    let all = data.next_batch(usize::MAX >> 12).await?;
    Ok(pack(all, SCORED_TOKENS, usize::MAX).into_iter().map(pass).collect())
}

/// Mean loss a supervised token.
fn score(trainer: &FullTrainer, passes: &[TrainBatch]) -> Result<f64> {
    let (mut loss, mut weight) = (0.0, 0.0);
    for pass in passes {
        let report = trainer.evaluate(pass)?;
        (loss, weight) = (loss + report.loss_sum, weight + report.weight_sum);
    }
    Ok(loss / weight)
}
