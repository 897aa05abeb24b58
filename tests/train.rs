//! Whole training jobs in this process over a fixture model: what they leave, how they end, and that a job that
//! was stopped and goes on ends with the same bytes as one that was left alone. Local files, no network.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gurukul::adapters::Registry;
use gurukul::config::adapter::{AdapterConfig, Scheduler};
use gurukul::data::SourceConfig;
use gurukul::engine::{EngineConfig, EngineHandle, GenerateRequest};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::train::{Context, Ending, Progress, Reporter, Stop, TrainError, TrainJob, job};
use tokio::sync::watch;

const TENSORS: &str = "adapter_model.safetensors";
/// Longer than any job here takes.
const LIMIT: Duration = Duration::from_secs(300);

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

/// A data folder with a source, and an engine over it.
struct Fixture {
    data: tempfile::TempDir,
    context: Context,
}

impl Fixture {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let context = context(data.path());
        Self { data, context }
    }

    /// A job over `rows` rows that say the same few things over and over.
    fn job(&self, rows: usize, config: AdapterConfig) -> TrainJob {
        let rows: String = (0..rows)
            .map(|i| format!("{{\"prompt\": \"say {}\", \"completion\": \" the word {}\"}}\n", i % 5, i % 5))
            .collect();
        self.job_over(&rows, config)
    }

    fn job_over(&self, rows: &str, config: AdapterConfig) -> TrainJob {
        let path = self.data.path().join("rows.jsonl");
        std::fs::write(&path, rows).unwrap();
        TrainJob {
            adapter_name: "taught".into(),
            source_name: "rows".into(),
            source: SourceConfig::local(path.to_str().unwrap()),
            config,
        }
    }

    fn adapter(&self) -> PathBuf {
        self.data.path().join("adapters/taught")
    }

    async fn run(&self, id: &str, job: &TrainJob) -> (Result<Ending, TrainError>, Seen) {
        run_until(&self.context, id, job, |_| Stop::No).await
    }
}

/// Runs a job, asking it to stop as `ask` says of each step that it reports.
async fn run_until(
    context: &Context,
    id: &str,
    job: &TrainJob,
    ask: impl Fn(u64) -> Stop + Send + Sync + 'static,
) -> (Result<Ending, TrainError>, Seen) {
    let (stop, stopping) = watch::channel(Stop::No);
    let recorder = Recorder { seen: Mutex::default(), stop, ask: Box::new(ask) };
    let run = job::run(context, id, job, &recorder, stopping);
    let ending = tokio::time::timeout(LIMIT, run).await.expect("the job ends");
    (ending, recorder.seen.into_inner().unwrap())
}

fn context(data: &Path) -> Context {
    let tokenizer = Arc::new(Tokenizer::from_dir(&llama()).unwrap());
    let config = EngineConfig {
        model_dir: llama(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(16 << 20),
        max_batch: 4,
        max_queue: 64,
        prefill_chunk: 64,
        adapter_cache_bytes: 1 << 28,
        train_share: 0.5,
    };
    let engine = EngineHandle::start(config, tokenizer.clone()).unwrap();
    Context {
        adapters: Arc::new(Registry::new(data.join("adapters"), engine.clone())),
        engine,
        tokenizer,
        model_id: "fixtures/llama".into(),
        jobs_dir: data.join("jobs"),
    }
}

#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    progress: Vec<Progress>,
    checkpoints: Vec<u64>,
}

struct Recorder {
    seen: Mutex<Seen>,
    stop: watch::Sender<Stop>,
    ask: Box<dyn Fn(u64) -> Stop + Send + Sync>,
}

impl Reporter for Recorder {
    fn log(&self, line: String) {
        self.seen.lock().unwrap().lines.push(line);
    }

    fn progress(&self, progress: &Progress) {
        self.seen.lock().unwrap().progress.push(progress.clone());
        let ask = (self.ask)(progress.step);
        if ask != Stop::No {
            self.stop.send_replace(ask);
        }
    }

    fn checkpointed(&self, step: u64) {
        self.seen.lock().unwrap().checkpoints.push(step);
    }
}

fn config() -> AdapterConfig {
    AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        learning_rate: 5e-3,
        lr_scheduler: Scheduler::Linear,
        batch_size: 2,
        gradient_accumulation_steps: 2,
        epochs: 2,
        max_seq_length: 64,
        shuffle_buffer: 16,
        eval_share: 0.1,
        eval_steps: 4,
        save_steps: 3,
        logging_steps: 2,
        ..AdapterConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_comes_to_its_end_and_is_served() {
    let f = Fixture::new();
    let job = f.job(40, config());
    let plan = job::check(&f.context, &job).await.unwrap();
    assert!(plan.training_bytes > 0 && plan.tokens_per_pass >= 64);
    let (ending, seen) = f.run("one", &job).await;
    let Ok(Ending::Completed { progress, generation }) = ending else { panic!("{ending:?}") };
    assert_eq!(generation, 1);
    assert_eq!(progress.step, progress.total_steps);
    assert!(progress.loss.is_finite() && progress.eval_loss.unwrap().is_finite());
    assert!(progress.tokens > 0 && progress.samples >= 70, "{progress:?}");

    let first = &seen.progress[0];
    assert_eq!(first.step, 1);
    assert!(progress.loss < first.loss * 0.9, "{} after {}", progress.loss, first.loss);
    assert_eq!(seen.checkpoints.last(), Some(&progress.step));
    assert!(seen.checkpoints.starts_with(&[3, 6]), "{:?}", seen.checkpoints);
    for part in ["plan: ", "source rows: ", "evaluation loss", "checkpoint in", "step 2/", "adapter taught"] {
        assert!(seen.lines.iter().any(|line| line.contains(part)), "{part:?}: {:#?}", seen.lines);
    }

    // It was served from the trainer's weights; the files say the same.
    let info = f.context.adapters.get("taught").await.unwrap();
    assert!(info.resident && info.error.is_none(), "{info:?}");
    assert_eq!((info.generation, info.training_job.as_deref()), (Some(1), Some("one")));
    assert_eq!(info.metrics.unwrap()["step"], progress.step);
    let handle = f.context.adapters.acquire("taught").await.unwrap();
    assert_eq!(handle.generation, 1, "not loaded again");
    let published = answer(&f.context.engine, Some(handle)).await;
    let again = context(f.data.path());
    let handle = again.adapters.acquire("taught").await.unwrap();
    assert_eq!(handle.generation, 1, "a restart changes nothing");
    assert_eq!(answer(&again.engine, Some(handle)).await, published);
    assert_ne!(answer(&again.engine, None).await, published);

    // Once more under the same name: the next generation.
    let (ending, _) = f.run("two", &job).await;
    assert!(matches!(ending, Ok(Ending::Completed { generation: 2, .. })), "{ending:?}");
}

async fn answer(engine: &EngineHandle, adapter: Option<gurukul::engine::AdapterHandle>) -> Vec<u32> {
    let request =
        GenerateRequest { ignore_eos: true, adapter, ..GenerateRequest::greedy(vec![5, 17, 42, 99, 7], 24) };
    let mut generation = engine.generate(request).unwrap();
    let mut tokens = Vec::new();
    while let Some(event) = generation.events.recv().await {
        match event {
            gurukul::engine::Event::Token { token, .. } => tokens.push(token),
            gurukul::engine::Event::Finished { .. } => return tokens,
            gurukul::engine::Event::Failed(error) => panic!("{error}"),
        }
    }
    panic!("the engine stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_goes_on_ends_with_the_same_bytes() {
    let alone = Fixture::new();
    let (ending, _) = alone.run("job", &alone.job(40, config())).await;
    let Ok(Ending::Completed { progress, .. }) = ending else { panic!("{ending:?}") };
    let expected = std::fs::read(alone.adapter().join(TENSORS)).unwrap();

    // Paused after every step that is reported, each time in a new process as far as the job can tell.
    let f = Fixture::new();
    let job = f.job(40, config());
    let (mut pauses, mut paused) = (0, 0);
    let last = loop {
        let restarted = context(f.data.path());
        let ask = move |step| if step > paused { Stop::Pause } else { Stop::No };
        match run_until(&restarted, "job", &job, ask).await.0.unwrap() {
            Ending::Paused { step } => {
                assert_eq!(step, paused + 1);
                (pauses, paused) = (pauses + 1, step);
            }
            Ending::Completed { progress, .. } => break progress,
            other => panic!("{other:?}"),
        }
    };
    assert!(pauses >= 10, "{pauses}");
    assert_eq!((last.step, last.tokens, last.samples), (progress.step, progress.tokens, progress.samples));
    assert_eq!(last.loss.to_bits(), progress.loss.to_bits());
    assert_eq!(std::fs::read(f.adapter().join(TENSORS)).unwrap(), expected);

    // Killed: what was in memory is gone, the checkpoints are there.
    let f = Fixture::new();
    let job = f.job(40, config());
    for (attempt, steps) in [5_usize, 4, 7].into_iter().enumerate() {
        let (_stop, stopping) = watch::channel(Stop::No);
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let reporter = Steps(tell);
        let killed = context(f.data.path());
        let run = job::run(&killed, "job", &job, &reporter, stopping);
        tokio::select! {
            ending = run => panic!("attempt {attempt}: {ending:?}"),
            () = async { for _ in 0..steps { told.recv().await.unwrap(); } } => {}
        }
    }
    let (ending, _) = f.run("job", &job).await;
    assert!(matches!(ending, Ok(Ending::Completed { .. })), "{ending:?}");
    assert_eq!(std::fs::read(f.adapter().join(TENSORS)).unwrap(), expected);
}

/// Most moments lie in the middle of a step: its passes are given up and made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_paused_at_any_moment_ends_with_the_same_bytes() {
    let rows: String = (0..64)
        .map(|i| {
            let word = format!(" the word {}", i % 7).repeat(12);
            format!("{{\"prompt\": \"say {}\", \"completion\": \"{word}\"}}\n", i % 7)
        })
        .collect();
    let long = AdapterConfig { batch_size: 8, gradient_accumulation_steps: 2, epochs: 3, ..config() };
    let alone = Fixture::new();
    let (ending, _) = alone.run("job", &alone.job_over(&rows, long.clone())).await;
    assert!(matches!(ending, Ok(Ending::Completed { .. })), "{ending:?}");
    let expected = std::fs::read(alone.adapter().join(TENSORS)).unwrap();

    let f = Fixture::new();
    let job = f.job_over(&rows, long);
    let (mut in_a_step, mut pauses) = (0, 0_u64);
    loop {
        let (stop, stopping) = watch::channel(Stop::No);
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let reporter = Steps(tell);
        let run = job::run(&f.context, "job", &job, &reporter, stopping);
        let ask = async {
            // A step further each time, and then a little into the next.
            told.recv().await;
            tokio::time::sleep(Duration::from_millis(pauses % 9)).await;
            stop.send_replace(Stop::Pause);
            std::future::pending::<()>().await
        };
        let ending = tokio::select! {
            ending = run => ending.unwrap(),
            () = ask => unreachable!("it waits for ever"),
        };
        let Ending::Paused { step } = ending else { break };
        pauses += 1;
        assert!(pauses < 100, "it does not come forward");
        let pending = f.context.jobs_dir.join(format!("job/checkpoint-{step}/pending.json"));
        in_a_step += usize::from(std::fs::read_to_string(pending).unwrap() != "[]");
    }
    assert!(in_a_step > 0, "{pauses} pauses, none of them in a step");
    assert_eq!(std::fs::read(f.adapter().join(TENSORS)).unwrap(), expected);
}

/// Tells of every report.
struct Steps(tokio::sync::mpsc::UnboundedSender<u64>);

impl Reporter for Steps {
    fn log(&self, _: String) {}

    fn progress(&self, progress: &Progress) {
        let _ = self.0.send(progress.step);
    }

    fn checkpointed(&self, _: u64) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_leaves_an_adapter_in_its_checkpoint() {
    let f = Fixture::new();
    let job = f.job(40, config());
    let (ending, seen) =
        run_until(&f.context, "job", &job, |step| if step == 5 { Stop::Cancel } else { Stop::No }).await;
    assert_eq!(ending.unwrap(), Ending::Cancelled { step: 5 });
    assert_eq!(seen.checkpoints, [3, 5]);
    assert!(!f.adapter().exists(), "nothing is published");
    let checkpoint = f.context.jobs_dir.join("job/checkpoint-5");
    let weights = gurukul::adapters::read_folder(&checkpoint, &f.context.engine.info().sites).unwrap();
    assert_eq!(weights.sites.len(), f.context.engine.info().sites.len());
    // The memory is free again, and the job can still be taken up.
    let (ending, seen) = f.run("job", &job).await;
    assert!(matches!(ending, Ok(Ending::Completed { .. })), "{ending:?}");
    assert!(seen.lines.iter().any(|line| line.contains("going on after step 5")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_asked_to_stop_before_it_began_is_kept() {
    let f = Fixture::new();
    let job = f.job(40, config());
    let (stop, stopping) = watch::channel(Stop::Pause);
    let (tell, _told) = tokio::sync::mpsc::unbounded_channel();
    let ending = job::run(&f.context, "job", &job, &Steps(tell), stopping).await.unwrap();
    assert_eq!(ending, Ending::Paused { step: 0 });
    drop(stop);
    let alone = Fixture::new();
    // Not written again: other data than it began with would be refused.
    for (fixture, job) in [(&f, job), (&alone, alone.job(40, config()))] {
        let ending = fixture.run("job", &job).await.0;
        assert!(matches!(ending, Ok(Ending::Completed { .. })), "{ending:?}");
    }
    let bytes = |f: &Fixture| std::fs::read(f.adapter().join(TENSORS)).unwrap();
    assert_eq!(bytes(&f), bytes(&alone));
}

#[tokio::test(flavor = "multi_thread")]
async fn training_that_diverges_fails_and_says_so() {
    let f = Fixture::new();
    let job =
        f.job(200, AdapterConfig { learning_rate: 1e9, warmup_ratio: 0.0, eval_share: 0.0, ..config() });
    let (ending, _) = f.run("job", &job).await;
    let Err(TrainError::Failed(reason)) = ending else { panic!("{ending:?}") };
    assert!(reason.contains("diverged") && reason.contains("lower learning_rate"), "{reason}");
    assert!(!f.adapter().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn data_without_anything_to_learn_fails() {
    let f = Fixture::new();
    let long = "word ".repeat(200);
    let masked = format!("{{\"prompt\": \"{long}\", \"completion\": \" x\"}}\n").repeat(10);
    for (rows, part) in [(masked.as_str(), "supervised"), ("", "empty"), ("{\"other\": 1}\n", "rows")] {
        let (ending, _) = f.run("job", &f.job_over(rows, config())).await;
        let error = ending.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!f.adapter().exists());
        let _ = std::fs::remove_dir_all(f.context.jobs_dir.join("job"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_model_is_refused() {
    let f = Fixture::new();
    for (change, field) in [
        ((|c| c.r = 0) as fn(&mut AdapterConfig), "r "),
        (|c| c.target_modules = vec!["c_attn".into()], "target_modules"),
        (|c| c.max_seq_length = 100_000, "max_seq_length"),
    ] {
        let mut config = config();
        change(&mut config);
        let job = f.job(10, config);
        let error = job::check(&f.context, &job).await.unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
        assert_eq!(f.run("job", &job).await.0.unwrap_err().to_string(), error);
    }
    let job = TrainJob { adapter_name: "../up".into(), ..f.job(10, config()) };
    assert!(matches!(job::check(&f.context, &job).await, Err(TrainError::Adapter(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn early_stopping_publishes_the_best() {
    let f = Fixture::new();
    // A rate at which it soon gets worse again.
    let job = f.job(
        60,
        AdapterConfig {
            learning_rate: 0.2,
            lr_scheduler: Scheduler::Constant,
            warmup_ratio: 0.0,
            epochs: 50,
            eval_steps: 1,
            save_steps: 0,
            early_stopping_patience: 3,
            ..config()
        },
    );
    let (ending, seen) = f.run("job", &job).await;
    let Ok(Ending::Completed { progress, .. }) = ending else { panic!("{ending:?}") };
    let early = seen.lines.iter().any(|line| line.contains("ending early"));
    assert!(early && progress.step < 50 * 13, "{progress:?}");
    let metrics = f.context.adapters.get("taught").await.unwrap().metrics.unwrap();
    let best = metrics["best_step"].as_u64().unwrap();
    assert_eq!(best, progress.step - 3);
    let kept = f.context.jobs_dir.join(format!("job/checkpoint-{best}"));
    let read = |folder: &Path| std::fs::read(folder.join(TENSORS)).unwrap();
    assert_eq!(read(&f.adapter()), read(&kept), "the best, not the last");
    let last = f.context.jobs_dir.join(format!("job/checkpoint-{}", progress.step));
    assert_ne!(read(&f.adapter()), read(&last));
}
