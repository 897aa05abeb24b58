//! The task: sentences to be written in Devanagari, asked for in a form that the demo model was never taught. It
//! answers in any script, in several at once, or not at all; what it should do instead is told by rewards alone:
//! Hindi, closed by a danda, and like the reference. One job from the base model to the finished adapter, with the
//! held-out reward on its way.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use gurukul::adapters::Registry;
use gurukul::config::rl::{Loss, PromptConfig, RewardConfig, RlTrainConfig};
use gurukul::engine::{EngineConfig, EngineHandle};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::rl::EpisodeLog;
use gurukul::rl::learn::{Mode, PromptSource, RlContext, RlJob, RlProgress, RlReporter, run};
use gurukul::train::{Context, Ending, Stop};
use serde_json::Value;

/// What the rewards of a job were.
#[derive(Debug, Clone, Default)]
pub(crate) struct Curve {
    /// Step and mean reward of the answers that it sampled.
    pub(crate) sampled: Vec<(u64, f64)>,
    /// Step and mean reward of the held-out prompts' greedy answers.
    pub(crate) held_out: Vec<(u64, f64)>,
    /// How far the farthest importance ratio was from 1, over the first updates of all steps.
    pub(crate) ratio_error: f64,
}

impl Curve {
    /// From the first to the last evaluation.
    pub(crate) fn lift(&self) -> f64 {
        let of = |point: Option<&(u64, f64)>| point.map_or(f64::NAN, |(_, reward)| *reward);
        of(self.held_out.last()) - of(self.held_out.first())
    }
}

/// Settings of the full example.
pub(crate) fn settings() -> RlTrainConfig {
    RlTrainConfig {
        loss: Loss::PpoClip,
        steps: 60,
        prompts_per_step: 8,
        group_size: 8,
        updates_per_batch: 2,
        max_new_tokens: 32,
        max_seq_length: 96,
        max_in_flight: 32,
        learning_rate: 2e-3,
        eval_share: 0.2,
        max_eval_prompts: 48,
        eval_steps: 10,
        save_steps: 0,
        seed: 7,
        ..RlTrainConfig::default()
    }
}

/// Hindi, a danda at the end and nowhere else, and likeness to the reference, in equal shares.
fn rewards() -> RewardConfig {
    let mut rewards = RewardConfig::default();
    for weight in [
        &mut rewards.length.weight,
        &mut rewards.quality.weight,
        &mut rewards.diversity.weight,
        &mut rewards.exact_match.weight,
    ] {
        *weight = 0.0;
    }
    (rewards.language.weight, rewards.chrf.weight, rewards.regex.weight) = (1.0, 1.0, 1.0);
    rewards.regex.pattern = r"^[^।]+।\s*$".into();
    rewards
}

/// Statements of the phrasebook's training part.
fn prompts(assets: &Path) -> Result<Vec<PromptConfig>> {
    let text = std::fs::read_to_string(assets.join("phrasebook/train.jsonl"))?;
    let mut prompts = Vec::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line)?;
        let (Some(english), Some(hindi)) = (row["en"].as_str(), row["hi"].as_str()) else { continue };
        if hindi.ends_with('।') && english.len() < 40 {
            prompts.push(PromptConfig {
                prompt: format!("लिखो: {english}"),
                language: Some("hi".into()),
                reference: Some(hindi.to_owned()),
            });
        }
    }
    // Spread over the phrasebook's subjects.
    Ok(prompts.into_iter().step_by(4).take(240).collect())
}

/// Runs the job in an empty folder. `tell` gets each line of its log.
pub(crate) async fn lift(
    assets: &Path,
    folder: &Path,
    config: RlTrainConfig,
    tell: impl Fn(&str) + Send + Sync + 'static,
) -> Result<Curve> {
    let model = assets.join("demo");
    let tokenizer = Arc::new(Tokenizer::from_dir(&model)?);
    let engine = EngineHandle::start(
        EngineConfig {
            model_dir: model,
            device: DeviceChoice::Cpu,
            dtype: DtypeChoice::F32,
            quantize: Quantization::None,
            kv_cache_bytes: Some(64 << 20),
            max_batch: 32,
            max_queue: 64,
            prefill_chunk: 256,
            adapter_cache_bytes: 64 << 20,
            train_share: 0.5,
        },
        tokenizer.clone(),
    )?;
    let context = RlContext {
        training: Arc::new(Context {
            adapters: Arc::new(Registry::new(folder.join("adapters"), engine.clone())),
            engine,
            tokenizer,
            model_id: "demo".into(),
            jobs_dir: folder.join("jobs"),
        }),
        log: EpisodeLog::open(&folder.join("rl_runs"), 64 << 20)?,
    };
    let job = RlJob {
        adapter_name: "devanagari".into(),
        mode: Mode::Online,
        start_from: None,
        source_name: "phrasebook".into(),
        prompts: PromptSource::List(prompts(assets)?),
        run_id: None,
        config,
        rewards: rewards(),
    };
    let teller = Teller { curve: Mutex::default(), tell: Box::new(tell) };
    let (_go_on, stop) = tokio::sync::watch::channel(Stop::No);
    let ending = run(&context, "lift", &job, &teller, stop).await?;
    anyhow::ensure!(matches!(ending, Ending::Completed { .. }), "the job ended otherwise: {ending:?}");
    teller.curve.into_inner().ok().context("the curve is whole")
}

struct Teller {
    curve: Mutex<Curve>,
    tell: Box<dyn Fn(&str) + Send + Sync>,
}

impl RlReporter for Teller {
    fn log(&self, line: String) {
        (self.tell)(&line);
    }

    fn warn(&self, line: String) {
        (self.tell)(&format!("warning: {line}"));
    }

    fn progress(&self, progress: &RlProgress) {
        let Ok(mut curve) = self.curve.lock() else { return };
        let (step, figures) = (progress.progress.step, &progress.figures);
        let new = |points: &[(u64, f64)]| points.last().is_none_or(|(last, _)| *last < step);
        if let Some(reward) = figures.reward.filter(|_| new(&curve.sampled)) {
            curve.sampled.push((step, reward));
        }
        if let Some(error) = figures.ratio_error {
            curve.ratio_error = curve.ratio_error.max(error);
        }
        let latest = curve.held_out.last().map(|(_, reward)| *reward);
        if let Some(reward) =
            figures.eval_reward.filter(|reward| latest != Some(*reward) && new(&curve.held_out))
        {
            curve.held_out.push((step, reward));
        }
    }

    fn checkpointed(&self, _step: u64) {}
}

/// The repository's assets.
pub(crate) fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets")
}
