//! `gurukul smoke` and `gurukul eval` as their users meet them: against a server that runs, one in their own process
//! and one that is down, with files that cannot be used; and figures that are those of a computation by other means.

#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use gurukul::adapters::Registry;
use gurukul::engine::training::{
    AdamW, Checkpointing, LoraSpec, PassShape, TrainBatch, TrainSequence, TrainerSpec,
};
use gurukul::engine::{EngineConfig, EngineHandle, Event, GenerateRequest, ScoreRequest};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::text::chrf::corpus_score;
use gurukul::train::evaluation::{Pairs, Scorer, evaluate, prompt_of};
use serde_json::{Value, json};

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

/// A model that has learnt to tell stories in English, or `None` with a message.
fn stories() -> Option<PathBuf> {
    let path = "stories260K/hf";
    let found =
        std::env::var_os("GURUKUL_REAL_DIR").map(|dir| Path::new(&dir).join(path)).filter(|p| p.exists());
    if found.is_none() {
        println!("skipped: set GURUKUL_REAL_DIR to a folder that has {path}");
    }
    found
}

/// The binary in a folder, with nothing of this process's environment that it would read.
fn gurukul(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    command.current_dir(folder).args(arguments);
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", folder.join("hf")).env("HF_HUB_OFFLINE", "1").env("GURUKUL_KV_CACHE", "16MiB");
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    gurukul(folder, arguments).output().unwrap()
}

/// Its standard output, if it exited with this code.
fn stdout(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn assert_told(output: &Output, code: i32, parts: &[&str]) {
    stdout(output, code);
    let stderr = String::from_utf8_lossy(&output.stderr);
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is missing in: {stderr}");
    }
}

/// A running `gurukul serve`, killed when the test ends.
struct Served {
    child: Child,
    url: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn serve(folder: &Path, model: &Path) -> Served {
    let mut command = gurukul(folder, &["serve", "--port", "0", "--model", model.to_str().unwrap()]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    let url = loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended: {seen}")).unwrap();
        if let Some((_, rest)) = line.split_once("listening on ") {
            break rest.split_whitespace().next().unwrap().to_owned();
        }
        seen += &line;
    };
    // Somebody has to read on, or the pipe fills.
    std::thread::spawn(move || lines.for_each(drop));
    Served { child, url }
}

const STORY: &str = r#"[{"id": "story", "language": "English", "language_code": "en",
    "prompt": "Once upon a time, there was a", "category": "stories"}]"#;

// ---- smoke

#[test]
fn smoke_judges_a_server_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let served = serve(dir.path(), &llama());
    let smoke = |arguments: &[&str]| run(dir.path(), &[&["smoke", "--url", &served.url], arguments].concat());

    // Random weights translate nothing.
    let output = smoke(&["--max-new-tokens", "8", "--out", "report.md"]);
    assert_told(&output, 1, &["0 of 10 passed, 10 must", "--min-pass"]);
    let table = stdout(&output, 1);
    assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), 11, "{table}");
    assert!(table.contains("বাংলায় অনুবাদ করুন: My mother likes fruit juice."), "{table}");
    let report = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(report.starts_with("# Smoke test") && report.contains("model llama"), "{report}");
    let rows = table.lines().filter(|line| line.starts_with('|'));
    assert!(rows.into_iter().all(|row| report.contains(row)), "{report}");

    stdout(&smoke(&["--max-new-tokens", "8", "--min-pass", "0", "--api-key", "unused"]), 0);
    assert_told(&smoke(&["--adapter", "nobody"]), 2, &["prompt hi-river ", "404", "nobody"]);
    assert_told(
        &smoke(&["--out", "nowhere/report.md", "--max-new-tokens", "2"]),
        1,
        &["--out nowhere/report.md"],
    );
}

#[test]
fn smoke_starts_a_server_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let model = llama();
    let arguments = ["smoke", "--model", model.to_str().unwrap(), "--max-new-tokens", "4", "--min-pass", "0"];
    let output = run(dir.path(), &arguments);
    assert!(stdout(&output, 0).contains("0 of 10 passed, 0 must"));
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    // Without a model it is the demo model, which knows the answers.
    assert!(stdout(&run(dir.path(), &["smoke"]), 0).contains("10 of 10 passed, 10 must"));
}

#[test]
fn smoke_passes_what_is_good() {
    let Some(model) = stories() else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("prompts.json"), STORY).unwrap();
    let served = serve(dir.path(), &model);
    let own = ["smoke", "--model", model.to_str().unwrap(), "--prompts", "prompts.json"];
    let running = ["smoke", "--url", &served.url, "--prompts", "prompts.json"];
    for arguments in [&own[..], &running] {
        let table = stdout(&run(dir.path(), arguments), 0);
        assert!(table.contains("1 of 1 passed, 1 must") && table.contains("| yes |"), "{table}");
        assert!(table.contains("| en | 100% | - |"), "{table}");
    }
}

#[test]
fn smoke_names_what_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("story.json", STORY);
    write("missing.json", &STORY.replace("\"prompt\"", "\"category2\""));
    write("twice.json", &format!("{},{}", STORY.trim_end_matches(']'), &STORY[1..]));
    write("klingon.json", &STORY.replace("English", "Klingon"));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let down = format!("http://{free}");
    for (arguments, parts) in [
        (&["--url", &down][..], &["no server answers at http://127.0.0.1:", "gurukul serve"][..]),
        (&["--url", "localhost"], &["--url localhost"]),
        (&["--prompts", "nowhere.json"], &["--prompts nowhere.json"]),
        (&["--prompts", "missing.json"], &["missing.json", "entry 1 (id story): prompt is missing"]),
        (&["--prompts", "twice.json"], &["twice.json", "entry 2", "id story"]),
        (&["--prompts", "klingon.json"], &["klingon.json", "entry 1", "language", "Klingon"]),
        (&["--prompts", "story.json", "--min-pass", "2"], &["--min-pass 2"]),
        (&["--min-pass", "x"], &["--min-pass"]),
        (&["--adapter", "../up"], &["--adapter"]),
    ] {
        assert_told(&run(dir.path(), &[&["smoke"], arguments].concat()), 2, parts);
    }
}

// ---- eval

fn engine(model: &Path) -> (EngineHandle, Arc<Tokenizer>) {
    let config = EngineConfig {
        model_dir: model.to_owned(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(16 << 20),
        max_batch: 4,
        max_queue: 16,
        prefill_chunk: 16,
        adapter_cache_bytes: 64 << 20,
        train_share: 0.5,
    };
    let tokenizer = Arc::new(Tokenizer::from_dir(model).unwrap());
    (EngineHandle::start(config, tokenizer.clone()).unwrap(), tokenizer)
}

async fn greedy(engine: &EngineHandle, prompt: &[u32], most: usize) -> String {
    let mut generation = engine.generate(GenerateRequest::greedy(prompt.to_vec(), most)).unwrap();
    let mut answer = String::new();
    loop {
        match generation.events.recv().await.expect("the answer has an end") {
            Event::Token { text, .. } => answer.push_str(&text),
            Event::Finished { text, .. } => return answer + &text,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

/// By a trainer that has learnt nothing yet: the base model's loss.
async fn by_a_trainer(engine: &EngineHandle, samples: &[TrainSequence]) -> (f64, f64) {
    let spec = TrainerSpec {
        lora: LoraSpec {
            rank: 2,
            alpha: 4.0,
            dropout: 0.3,
            rslora: false,
            sites: (0..engine.info().sites.len()).collect(),
            seed: 1,
        },
        adamw: AdamW::default(),
        pass: PassShape { sequences: 4, sequence_tokens: 64 },
        checkpointing: Checkpointing::Auto,
    };
    let trainer = engine.create_trainer(spec).await.unwrap();
    let batch = TrainBatch::cross_entropy(samples.to_vec(), 0);
    let pass = trainer.evaluate(batch).await.unwrap();
    // The shared function in small passes comes to the same.
    let small = Scorer::Trainer { trainer: &trainer, tokens_per_pass: 40 };
    let sums = evaluate(small, samples, || false).await.unwrap().unwrap();
    assert!((sums.loss_sum - pass.loss_sum).abs() < 1e-4 && sums.weight_sum == pass.weight_sum, "{sums:?}");
    assert_eq!(evaluate(small, samples, || true).await.unwrap(), None, "asked to stop");
    (pass.loss_sum, pass.weight_sum)
}

fn figures(folder: &Path, arguments: &[&str]) -> Value {
    let model = llama();
    let common =
        ["eval", "--model", model.to_str().unwrap(), "--out", "figures.json", "--max-new-tokens", "12"];
    stdout(&run(folder, &[&common, arguments].concat()), 0);
    serde_json::from_str(&std::fs::read_to_string(folder.join("figures.json")).unwrap()).unwrap()
}

fn near(figure: &Value, expected: f64) {
    let figure = figure.as_f64().unwrap_or_else(|| panic!("{figure} is no number"));
    assert!((figure - expected).abs() < 1e-4 * expected.abs().max(1.0), "{figure}, not {expected}");
}

#[tokio::test]
async fn eval_gives_the_figures_of_a_computation_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, tokenizer) = engine(&llama());
    let pairs = Pairs::new(tokenizer, &engine.info().eos_token_ids);
    let prompts = ["hello world", "Translate to Hindi: Good morning.", "say the word"];
    let asked = pairs.sample(prompts[0], "x").unwrap();
    // The first row's completion is what the model answers.
    let own = greedy(&engine, prompt_of(&asked), 12).await;
    let completions = [own.as_str(), " सुप्रभात।", " the word"];
    let rows = [
        json!({"prompt": prompts[0], "completion": completions[0]}),
        // The space that parts an answer from its prompt is not written there.
        json!({"en": "Good morning.", "hi": completions[1].trim_start()}),
        json!({"prompt": prompts[2], "completion": completions[2], "language": "en"}),
    ];
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(dir.path().join("rows.jsonl"), text).unwrap();

    let samples: Vec<TrainSequence> =
        prompts.iter().zip(completions).map(|(p, c)| pairs.sample(p, c).unwrap()).collect();
    let mut answers = Vec::new();
    for sample in &samples {
        answers.push(greedy(&engine, prompt_of(sample), 12).await);
    }
    let (loss_sum, weight_sum) = by_a_trainer(&engine, &samples).await;
    let found = figures(dir.path(), &["--data", "rows.jsonl"]);
    let total = &found["total"];
    near(&total["loss"], loss_sum / weight_sum);
    near(&total["perplexity"], (loss_sum / weight_sum).exp());
    near(&total["completion_tokens"], weight_sum);
    near(&total["tokens"], samples.iter().map(|s| s.tokens.len()).sum::<usize>() as f64);
    near(&total["chrf"], corpus_score(answers.iter().map(String::as_str).zip(completions)));
    near(&total["exact_match"], 1.0 / 3.0);
    assert_eq!(
        (&total["rows"], &found["model"], &found["adapter"]),
        (&json!(3), &json!("llama"), &Value::Null)
    );
    let of = |language: &str| &found["languages"][language];
    let (hindi, weight) = by_a_trainer(&engine, &samples[1..2]).await;
    near(&of("hi")["loss"], hindi / weight);
    assert_eq!(of("none")["exact_match"], json!(1.0));
    assert_eq!(of("none")["language_correct"], Value::Null);

    // By adapter, without a trainer: the log-probabilities of serving.
    let adapters = dir.path().join("adapters");
    std::fs::create_dir_all(adapters.join("mine")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(llama().join("adapter").join(file), adapters.join("mine").join(file)).unwrap();
    }
    let adapter = Registry::new(adapters, engine.clone()).acquire("mine").await.unwrap();
    let from = prompt_of(&samples[1]).len();
    let request = ScoreRequest { tokens: samples[1].tokens.clone(), from, adapter: Some(adapter) };
    let logprobs = engine.score(request).await.unwrap();
    let expected = -logprobs.iter().map(|&p| f64::from(p)).sum::<f64>() / logprobs.len() as f64;
    let found = figures(dir.path(), &["--data", "rows.jsonl", "--adapter", "mine", "--languages", "hi"]);
    near(&found["total"]["loss"], expected);
    assert!((expected - hindi / weight).abs() > 1e-3, "the adapter changes something");
    assert_eq!((&found["total"]["rows"], &found["adapter"]), (&json!(1), &json!("mine")));
    assert_eq!(figures(dir.path(), &["--data", "rows.jsonl", "--limit", "2"])["total"]["rows"], json!(2));
}

#[test]
fn eval_names_what_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("good.jsonl", "{\"prompt\": \"p\", \"completion\": \" c\"}\n");
    write("bad.jsonl", "{\"prompt\": \"p\", \"completion\": \" c\"}\n{\"prompt\": \"p\"}\n");
    write("long.jsonl", &format!("{{\"prompt\": \"p\", \"completion\": \"{}\"}}\n", "word ".repeat(600)));
    let model = llama();
    for (arguments, parts) in [
        (&["--data", "bad.jsonl"][..], &["bad.jsonl", "line 2", "completion is missing"][..]),
        (&["--data", "nowhere.jsonl"], &["--data nowhere.jsonl"]),
        (&["--data", "long.jsonl"], &["long.jsonl, line 1", "tokens", "fit"]),
        (&["--data", "good.jsonl", "--languages", "hi"], &["--languages"]),
        (&["--data", "good.jsonl", "--languages", "xx"], &["--languages", "xx"]),
        (&["--data", "good.jsonl", "--adapter", "nobody"], &["--adapter", "nobody"]),
        (&[], &["--data"]),
    ] {
        let common = ["eval", "--model", model.to_str().unwrap()];
        assert_told(&run(dir.path(), &[&common, arguments].concat()), 2, parts);
    }
}

#[test]
fn eval_finds_a_trained_model_at_ease_with_its_own_words() {
    let Some(model) = stories() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = model.to_str().unwrap();
    let prompt = "Once upon a time, there was a little girl named Lily.";
    let line = ["generate", prompt, "--model", model, "--temperature", "0", "--repetition-penalty", "1"];
    let answer = stdout(&run(dir.path(), &[&line[..], &["--max-new-tokens", "20"]].concat()), 0);
    let completion = answer.trim_end_matches('\n');
    let backwards: Vec<&str> = completion.split(' ').rev().collect();
    let rows = [
        json!({"prompt": prompt, "completion": completion, "language": "en"}),
        json!({"prompt": prompt, "completion": backwards.join(" ")}),
    ];
    std::fs::write(dir.path().join("rows.jsonl"), format!("{}\n{}\n", rows[0], rows[1])).unwrap();
    let line =
        ["eval", "--model", model, "--data", "rows.jsonl", "--max-new-tokens", "20", "--out", "f.json"];
    let table = stdout(&run(dir.path(), &line), 0);
    assert!(table.contains("english"), "{table}");
    let figures: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("f.json")).unwrap()).unwrap();
    let (own, other) = (&figures["languages"]["en"], &figures["languages"]["none"]);
    assert_eq!((&own["exact_match"], &own["language_correct"]), (&json!(1.0), &json!(1.0)));
    near(&own["chrf"], 100.0);
    assert_eq!((&other["exact_match"], &figures["total"]["exact_match"]), (&json!(0.0), &json!(0.5)));
    let loss = |of: &Value| of["loss"].as_f64().unwrap();
    assert!(loss(own) + 1.0 < loss(other), "{figures}");
}
