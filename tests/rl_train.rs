//! Whole jobs that learn from rewards, in this process over a fixture model: what they leave, what they refuse, and that
//! one that was stopped and goes on ends with the same bytes as one that was left alone.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gurukul::adapters::{AdapterError, Registry};
use gurukul::config::rl::{Loss, PromptConfig, RewardConfig, RlTrainConfig};
use gurukul::engine::{EngineConfig, EngineHandle};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::rl::learn::{Mode, PromptSource, RlContext, RlJob, RlProgress, RlReporter, check, run};
use gurukul::rl::{Episode, EpisodeLog, EpisodeMeta, EpisodeSource, log};
use gurukul::train::{Context, Ending, Stop, TrainError};
use tokio::sync::watch;

const TENSORS: &str = "adapter_model.safetensors";
/// Longer than any job here takes.
const LIMIT: Duration = Duration::from_secs(300);

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

struct Fixture {
    data: tempfile::TempDir,
    context: RlContext,
}

impl Fixture {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let context = context(data.path());
        Self { data, context }
    }

    fn tensors(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.data.path().join("adapters").join(name).join(TENSORS)).unwrap()
    }
}

fn context(data: &Path) -> RlContext {
    let tokenizer = Arc::new(Tokenizer::from_dir(&llama()).unwrap());
    let config = EngineConfig {
        model_dir: llama(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(16 << 20),
        max_batch: 8,
        max_queue: 64,
        prefill_chunk: 64,
        adapter_cache_bytes: 1 << 28,
        train_share: 0.5,
    };
    let engine = EngineHandle::start(config, tokenizer.clone()).unwrap();
    let training = Context {
        adapters: Arc::new(Registry::new(data.join("adapters"), engine.clone())),
        engine,
        tokenizer,
        model_id: "fixtures/llama".into(),
        jobs_dir: data.join("jobs"),
    };
    RlContext { training: Arc::new(training), log: EpisodeLog::open(&data.join("rl_runs"), 1 << 20).unwrap() }
}

fn config() -> RlTrainConfig {
    RlTrainConfig {
        steps: 4,
        prompts_per_step: 2,
        group_size: 4,
        updates_per_batch: 2,
        max_new_tokens: 12,
        max_seq_length: 64,
        learning_rate: 5e-3,
        kl_beta: 0.05,
        eval_steps: 2,
        save_steps: 1,
        ..RlTrainConfig::default()
    }
}

fn online(config: RlTrainConfig) -> RlJob {
    let prompt = |i: u32| PromptConfig {
        prompt: format!("say the word {i}"),
        language: None,
        reference: Some(format!(" the word {i}")),
    };
    RlJob {
        adapter_name: "learnt".into(),
        mode: Mode::Online,
        start_from: None,
        source_name: "prompts of the test".into(),
        prompts: PromptSource::List((0..10).map(prompt).collect()),
        run_id: None,
        config,
        rewards: RewardConfig::default(),
    }
}

fn offline(loss: Loss, config: RlTrainConfig) -> RlJob {
    RlJob {
        mode: Mode::Offline,
        prompts: PromptSource::List(Vec::new()),
        run_id: Some("first".into()),
        ..online(RlTrainConfig { loss, batch_size: 4, epochs: 2, ..config })
    }
}

#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    progress: Vec<RlProgress>,
    checkpoints: Vec<u64>,
}

struct Recorder {
    seen: Mutex<Seen>,
    stop: watch::Sender<Stop>,
    ask: Box<dyn Fn(u64) -> Stop + Send + Sync>,
}

impl RlReporter for Recorder {
    fn log(&self, line: String) {
        self.seen.lock().unwrap().lines.push(line);
    }

    fn warn(&self, line: String) {
        self.seen.lock().unwrap().lines.push(format!("warning: {line}"));
    }

    fn progress(&self, progress: &RlProgress) {
        self.seen.lock().unwrap().progress.push(progress.clone());
        match (self.ask)(progress.progress.step) {
            Stop::No => {}
            stop => drop(self.stop.send_replace(stop)),
        }
    }

    fn checkpointed(&self, step: u64) {
        self.seen.lock().unwrap().checkpoints.push(step);
    }
}

async fn run_until(
    context: &RlContext,
    id: &str,
    job: &RlJob,
    ask: impl Fn(u64) -> Stop + Send + Sync + 'static,
) -> (Result<Ending, TrainError>, Seen) {
    let (stop, stopping) = watch::channel(Stop::No);
    let recorder = Recorder { seen: Mutex::default(), stop, ask: Box::new(ask) };
    let run = run(context, id, job, &recorder, stopping);
    let ending = tokio::time::timeout(LIMIT, run).await.expect("the job ends");
    (ending, recorder.seen.into_inner().unwrap())
}

async fn run_through(context: &RlContext, id: &str, job: &RlJob) -> Seen {
    let (ending, seen) = run_until(context, id, job, |_| Stop::No).await;
    assert!(matches!(ending, Ok(Ending::Completed { .. })), "{ending:?} {:#?}", seen.lines);
    seen
}

#[tokio::test]
async fn a_job_that_was_stopped_goes_on_to_the_same_bytes() {
    let whole = Fixture::new();
    let seen = run_through(&whole.context, "a", &online(config())).await;
    let steps: Vec<&RlProgress> = seen.progress.iter().filter(|p| p.figures.reward.is_some()).collect();
    assert!(steps.iter().any(|p| p.figures.ratio_error.is_some()), "something was learnt: {:#?}", seen.lines);
    for progress in &steps {
        let figures = &progress.figures;
        assert!(figures.ratio_error.is_none_or(|error| error < 1e-3), "{figures:?}");
        assert!(figures.reward.is_some_and(|reward| (0.0..=1.0).contains(&reward)), "{figures:?}");
        assert!(figures.entropy.is_none_or(|entropy| entropy > 0.0), "{figures:?}");
        assert!(figures.kl.is_none_or(|kl| kl >= 0.0), "{figures:?}");
        assert!(!figures.rewards.is_empty() && figures.no_signal_share.is_some());
    }
    let last = seen.progress.last().unwrap();
    assert_eq!((last.progress.step, last.progress.samples), (4, 32));
    assert!(last.figures.eval_reward.is_some());
    assert_eq!(seen.checkpoints, [0, 1, 2, 3, 4]);

    let parts = Fixture::new();
    let paused = |step: u64| if step == 2 { Stop::Pause } else { Stop::No };
    let (ending, _) = run_until(&parts.context, "a", &online(config()), paused).await;
    assert!(matches!(ending, Ok(Ending::Paused { step: 2 })), "{ending:?}");
    // Another process goes on.
    drop(parts.context);
    let again = context(parts.data.path());
    let seen = run_through(&again, "a", &online(config())).await;
    assert!(seen.lines.iter().any(|line| line == "going on after step 2"), "{:#?}", seen.lines);
    assert_eq!(
        std::fs::read(parts.data.path().join("adapters/learnt").join(TENSORS)).unwrap(),
        whole.tensors("learnt")
    );
}

#[tokio::test]
async fn the_adapter_is_served_from_the_first_step_and_not_after_a_cancel() {
    let f = Fixture::new();
    let registry = f.context.training.adapters.clone();
    let generations = Arc::new(Mutex::new(Vec::new()));
    let (for_ask, told) = (registry.clone(), generations.clone());
    let ask = move |step: u64| {
        let (registry, told) = (for_ask.clone(), told.clone());
        // A client that names it meanwhile.
        tokio::spawn(async move {
            let handle = registry.acquire("learnt").await;
            told.lock().unwrap().push(handle.map(|handle| handle.generation));
        });
        if step == 3 { Stop::Cancel } else { Stop::No }
    };
    let (ending, seen) = run_until(&f.context, "a", &online(config()), ask).await;
    assert!(matches!(ending, Ok(Ending::Cancelled { step: 3 })), "{ending:?}");
    let served: Vec<u64> =
        generations.lock().unwrap().iter().filter_map(|g| g.as_ref().ok().copied()).collect();
    assert!(!served.is_empty() && served.iter().all(|generation| *generation >= 1), "{served:?}");
    let gone = registry.acquire("learnt").await;
    assert!(matches!(gone, Err(AdapterError::NotFound { .. })), "{gone:?}");
    assert!(seen.checkpoints.contains(&3), "what was learnt stays");
    // Resumed, it ends with files of a generation that no earlier one had.
    run_through(&f.context, "a", &online(config())).await;
    let generation = registry.acquire("learnt").await.unwrap().generation;
    assert!(served.iter().all(|earlier| *earlier < generation), "{served:?} {generation}");
}

#[tokio::test]
async fn an_adapter_can_be_gone_on_from() {
    let f = Fixture::new();
    run_through(&f.context, "a", &online(RlTrainConfig { steps: 2, ..config() })).await;
    let further = RlJob {
        adapter_name: "further".into(),
        start_from: Some("learnt".into()),
        // Another scale is taken into B.
        ..online(RlTrainConfig { steps: 1, learning_rate: 1e-12, lora_alpha: 32.0, ..config() })
    };
    check(&f.context, &further).await.unwrap();
    run_through(&f.context, "b", &further).await;
    let sites = &f.context.training.engine.info().sites;
    let read = |name: &str| gurukul::adapters::read(&f.data.path().join("adapters"), name, sites).unwrap();
    for (a, b) in read("learnt").sites.iter().zip(&read("further").sites) {
        let change = |of: &gurukul::nn::lora::SiteWeights| (of.b.matmul(&of.a).unwrap() * of.scale).unwrap();
        let apart =
            (change(a) - change(b)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart < 1e-5, "{apart}");
    }
    let missing = RlJob { start_from: Some("nobody".into()), ..online(config()) };
    let error = check(&f.context, &missing).await.unwrap_err();
    assert!(matches!(error, TrainError::Adapter(AdapterError::NotFound { .. })), "{error}");
}

#[tokio::test]
async fn what_online_training_logs_is_learnt_from_offline_by_every_loss() {
    let f = Fixture::new();
    run_through(&f.context, "a", &online(RlTrainConfig { log_run_id: "first".into(), ..config() })).await;
    let logged: Vec<Episode> =
        log::episodes(f.context.log.dir(), "first").unwrap().map(|e| e.unwrap()).collect();
    assert_eq!(logged.len(), 32);
    assert!(
        logged.iter().all(|e| e.reward.is_some() && e.meta.logprobs.is_some() && e.meta.adapter.is_some())
    );
    for loss in [Loss::ImportanceSampling, Loss::PpoClip, Loss::Rft, Loss::Dpo] {
        let job = RlJob {
            adapter_name: loss.name().replace('_', "-"),
            ..offline(loss, RlTrainConfig { dpo_margin: 0.01, save_steps: 1, ..config() })
        };
        check(&f.context, &job).await.unwrap_or_else(|e| panic!("{loss:?}: {e}"));
        let seen = run_through(&f.context, loss.name(), &job).await;
        let (first, last) = (&seen.progress[0], seen.progress.last().unwrap());
        assert!(last.progress.step >= 2 && last.progress.loss.is_finite(), "{loss:?}: {last:?}");
        assert_eq!(first.figures.ratio_error.is_some(), loss.is_policy_gradient(), "{loss:?}");
        assert_eq!(first.figures.preference_accuracy.is_some(), loss == Loss::Dpo, "{loss:?}");
        if loss == Loss::Dpo {
            // A new adapter is the base model, so that no preference is met yet.
            assert!((first.progress.loss - std::f64::consts::LN_2).abs() < 1e-4, "{first:?}");
            assert!(last.progress.loss < first.progress.loss, "{last:?}");
        }
        // The same again, interrupted.
        let paused = |step: u64| if step == 1 { Stop::Pause } else { Stop::No };
        let again = RlJob { adapter_name: format!("{}-2", job.adapter_name), ..job.clone() };
        let id = format!("{}-2", loss.name());
        let (ending, _) = run_until(&f.context, &id, &again, paused).await;
        assert!(matches!(ending, Ok(Ending::Paused { step: 1 })), "{ending:?}");
        run_through(&f.context, &id, &again).await;
        assert_eq!(f.tensors(&again.adapter_name), f.tensors(&job.adapter_name), "{loss:?}");
    }
}

#[tokio::test]
async fn a_run_without_log_probabilities_is_refused_with_the_remedy() {
    let f = Fixture::new();
    let episode = |number: u32| Episode {
        schema: 1,
        episode_id: number.to_string(),
        run_id: String::new(),
        episode_index: 0,
        timestamp: "2026-01-01T00:00:00.000Z".into(),
        env_name: "test".into(),
        prompt: "say a word".into(),
        output: format!(" word {number}"),
        reward: Some(f64::from(number % 2)),
        latency_s: None,
        meta: EpisodeMeta::new(EpisodeSource::Given),
    };
    f.context.log.append("first", (0..4).map(episode).collect()).await.unwrap();
    for loss in [Loss::ImportanceSampling, Loss::PpoClip] {
        let error = check(&f.context, &offline(loss, config())).await.unwrap_err().to_string();
        assert!(error.starts_with("run_id") && error.contains("4 without log-probabilities"), "{error}");
        assert!(error.contains("collect with logprobs"), "{error}");
    }
    // Their texts are enough for the other two.
    for loss in [Loss::Rft, Loss::Dpo] {
        check(&f.context, &offline(loss, config())).await.unwrap_or_else(|e| panic!("{loss:?}: {e}"));
    }
    let unheard = RlJob { run_id: Some("unheard".into()), ..offline(Loss::Rft, config()) };
    let error = check(&f.context, &unheard).await.unwrap_err().to_string();
    assert!(error.contains("no episode"), "{error}");
    let high = RlTrainConfig { rft_threshold: Some(2.0), ..config() };
    let error = check(&f.context, &offline(Loss::Rft, high)).await.unwrap_err().to_string();
    assert!(error.contains("rft_threshold"), "{error}");
}

#[tokio::test]
async fn groups_without_a_signal_are_counted_and_change_nothing() {
    let f = Fixture::new();
    // No answer is the reference, so that all earn the same.
    let mut job = online(RlTrainConfig { steps: 5, save_steps: 0, ..config() });
    for weight in [
        &mut job.rewards.length.weight,
        &mut job.rewards.quality.weight,
        &mut job.rewards.diversity.weight,
        &mut job.rewards.language.weight,
        &mut job.rewards.chrf.weight,
    ] {
        *weight = 0.0;
    }
    job.rewards.exact_match.weight = 1.0;
    let seen = run_through(&f.context, "a", &job).await;
    assert_eq!(seen.progress.last().unwrap().figures.no_signal_share, Some(1.0));
    assert!(seen.lines.iter().any(|line| line.contains("raise temperature")), "{:#?}", seen.lines);
    let sites = &f.context.training.engine.info().sites;
    let weights = gurukul::adapters::read(&f.data.path().join("adapters"), "learnt", sites).unwrap();
    for of in &weights.sites {
        assert_eq!(of.b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }
}

#[tokio::test]
async fn answers_that_get_no_reward_fail_the_job_with_the_reason() {
    let f = Fixture::new();
    let mut job = online(config());
    let PromptSource::List(prompts) = &mut job.prompts else { panic!("is a list") };
    prompts.iter_mut().for_each(|prompt| prompt.reference = None);
    job.rewards.length.weight = 0.0;
    job.rewards.quality.weight = 0.0;
    job.rewards.diversity.weight = 0.0;
    let (ending, _) = run_until(&f.context, "a", &job, |_| Stop::No).await;
    let error = ending.unwrap_err().to_string();
    assert!(error.contains("8 of 8 answers have no reward"), "{error}");
    let none = online(RlTrainConfig { max_seq_length: 13, ..config() });
    let (ending, _) = run_until(&f.context, "b", &none, |_| Stop::No).await;
    let error = ending.unwrap_err().to_string();
    assert!(error.contains("raise max_seq_length"), "{error}");
}
