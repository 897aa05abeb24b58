//! `gurukul bench train`: optimizer steps on random tokens, alone or beside clients that generate meanwhile.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::figures::{
    PerRun, Percentiles, Round, Served, forget_peak, of_status, peak_resident_bytes, ratio,
};
use super::load::{self, AdapterChoice, Prompts, Workload};
use crate::engine::EngineHandle;
use crate::engine::Trainer;
use crate::engine::training::{
    AdamW, Checkpointing, LoraSpec, PassShape, Phases, StepParameters, TrainBatch, TrainSequence, TrainerSpec,
};

/// What to train, and what beside it.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct TrainArgs {
    /// Sequences of one optimizer step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of each sequence, drawn at random
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Rank of the adapter
    #[arg(long, default_value_t = 8)]
    r: usize,
    /// Linear layers to train, by the last part of their names, or all-linear
    #[arg(long, default_value = "all-linear", value_delimiter = ',', value_name = "NAMES")]
    targets: Vec<String>,
    /// Keep what the way back needs, or compute layers again: auto, recompute or keep
    #[arg(long, default_value = "auto", value_parser = parse_checkpointing)]
    checkpointing: Checkpointing,
    /// Steps of which the median is told; one more warms up
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Clients that generate during as many more steps; 0 measures training alone
    #[arg(long, default_value_t = 0)]
    clients: usize,
    /// Seed of weights, tokens and prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn parse_checkpointing(text: &str) -> Result<Checkpointing, String> {
    match text {
        "auto" => Ok(Checkpointing::Auto),
        "recompute" => Ok(Checkpointing::Recompute),
        "keep" => Ok(Checkpointing::Keep),
        _ => Err("use auto, recompute or keep".into()),
    }
}

impl TrainArgs {
    /// Refuses what cannot be measured, before a model is loaded.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.batch > 0 && self.steps > 0, "--batch and --steps must be at least 1");
        ensure!(self.seq > 1, "--seq must be at least 2");
        Ok(())
    }

    fn sites(&self, engine: &EngineHandle) -> anyhow::Result<Vec<usize>> {
        let sites = &engine.info().sites;
        let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
        if self.targets == ["all-linear"] {
            return Ok((0..sites.len()).collect());
        }
        let names: BTreeSet<String> = sites.iter().map(|site| last(&site.name)).collect();
        for target in &self.targets {
            ensure!(names.contains(target), "--targets: no layer is called {target}; there are {names:?}");
        }
        let wanted = sites.iter().enumerate().filter(|(_, site)| self.targets.contains(&last(&site.name)));
        Ok(wanted.map(|(number, _)| number).collect())
    }

    fn workload(&self) -> Workload {
        Workload {
            concurrency: vec![self.clients.max(1)],
            prompt_tokens: 32,
            new_tokens: 64,
            runs: self.steps,
            adapters: AdapterChoice::None,
            seed: self.seed,
        }
    }
}

/// One optimizer step.
struct Step {
    seconds: f64,
    phases: Phases,
    loss: f64,
}

/// Measures, as one JSON object.
pub(super) async fn train(args: &TrainArgs, engine: &EngineHandle) -> anyhow::Result<Map<String, Value>> {
    let spec = TrainerSpec {
        lora: LoraSpec {
            rank: args.r,
            alpha: 2.0 * args.r as f64,
            dropout: 0.0,
            rslora: false,
            sites: args.sites(engine)?,
            seed: args.seed,
        },
        adamw: AdamW::default(),
        pass: PassShape { sequences: args.batch, sequence_tokens: args.seq },
        checkpointing: args.checkpointing,
    };
    let trained: usize = spec
        .lora
        .sites
        .iter()
        .map(|&s| &engine.info().sites[s])
        .map(|s| args.r * (s.in_features + s.out_features))
        .sum();
    let peak_of_loading = peak_resident_bytes();
    forget_peak();
    let resident_before = resident_bytes();
    let trainer = engine.create_trainer(spec).await?;
    let workload = args.workload();
    let mut tokens = Prompts::new(
        &Workload { prompt_tokens: args.seq, ..workload.clone() },
        engine.info().vocab_size,
        &[],
    );
    let mut steps = Vec::new();
    for number in 0..=args.steps {
        let step = step(&trainer, tokens.draw(args.batch), number as u64).await?;
        // The first warms up: pages, thread pools.
        if number > 0 {
            steps.push(step);
        }
    }
    // What a checkpoint takes of the engine's time: the copy; writing it is another thread's.
    let began = Instant::now();
    drop(trainer.snapshot().await?);
    let snapshot_s = began.elapsed().as_secs_f64();
    let of_step = (args.batch * args.seq) as f64;
    let rate = |steps: &[Step]| PerRun::new(steps.iter().map(|s| of_step / s.seconds));
    let phase = |of: fn(&Phases) -> f64| PerRun::new(steps.iter().map(|s| of(&s.phases)));
    let alone = rate(&steps);
    let mut report = Map::new();
    for (key, value) in [
        ("bench", json!("train")),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        ("cores", json!(std::thread::available_parallelism().map_or(0, usize::from))),
        ("model", super::describe(engine)),
        ("batch", json!(args.batch)),
        ("seq", json!(args.seq)),
        ("r", json!(args.r)),
        ("trained_parameters", json!(trained)),
        ("plan", json!(trainer.plan())),
        ("tokens_per_s", json!(alone)),
        ("step_s", json!(PerRun::new(steps.iter().map(|s| s.seconds)))),
        (
            "phases_s",
            json!({
                "forward": phase(|p| p.forward),
                "loss": phase(|p| p.loss),
                "backward": phase(|p| p.backward),
                "optimizer": phase(|p| p.optimizer),
            }),
        ),
        ("snapshot_s", json!(snapshot_s)),
        ("loss", json!(steps.iter().map(|s| s.loss).collect::<Vec<_>>())),
        ("peak_resident_bytes_of_loading", json!(peak_of_loading)),
        ("resident_bytes_before_training", json!(resident_before)),
        ("peak_resident_bytes", json!(peak_resident_bytes())),
    ] {
        report.insert(key.into(), value);
    }
    report.insert(
        "planned_peak_bytes".into(),
        json!(resident_before.map(|r| r + trainer.plan().training_bytes)),
    );
    if args.clients > 0 {
        let beside = beside(args, &workload, engine, &trainer, &mut tokens).await?;
        let share = ratio(rate(&beside.steps).as_ref(), alone.as_ref());
        report.insert(
            "beside_clients".into(),
            json!({
                "clients": args.clients,
                "serving_alone": Served::new(&beside.alone),
                "serving": Served::new(&beside.rounds),
                "gap_p95_ratio": gap_ratio(&beside.rounds, &beside.alone),
                "train_tokens_per_s": rate(&beside.steps),
                "train_ratio_to_alone": share,
                "longest_piece_s": engine.stats().longest_train_piece_s,
            }),
        );
    }
    Ok(report)
}

async fn step(trainer: &Trainer, tokens: Vec<Vec<u32>>, number: u64) -> anyhow::Result<Step> {
    let began = Instant::now();
    let mut phases = Phases::default();
    let (mut loss, mut weight) = (0.0, 0.0);
    let per_pass = trainer.plan().sequences_per_pass;
    for (part, some) in tokens.chunks(per_pass).enumerate() {
        let sequences =
            some.iter().map(|tokens| TrainSequence::new(tokens.clone(), vec![1.0; tokens.len()])).collect();
        let pass = number * 1000 + part as u64;
        let batch = TrainBatch::cross_entropy(sequences, pass);
        let report = trainer.forward_backward(batch).await?;
        loss += report.loss_sum;
        weight += report.weight_sum;
        phases.forward += report.phases.forward;
        phases.loss += report.phases.loss;
        phases.backward += report.phases.backward;
    }
    let taken = trainer.optim_step(StepParameters { learning_rate: 1e-3, max_grad_norm: 0.0 }).await?;
    phases.optimizer = taken.seconds;
    Ok(Step { seconds: began.elapsed().as_secs_f64(), phases, loss: loss / weight })
}

/// Clients alone, then clients and training at once.
struct Beside {
    alone: Vec<Round>,
    rounds: Vec<Round>,
    steps: Vec<Step>,
}

async fn beside(
    args: &TrainArgs,
    workload: &Workload,
    engine: &EngineHandle,
    trainer: &Trainer,
    tokens: &mut Prompts,
) -> anyhow::Result<Beside> {
    let mut prompts = Prompts::new(workload, engine.info().vocab_size, &engine.info().eos_token_ids);
    let mut alone = Vec::new();
    for _ in 0..workload.runs {
        alone.push(load::round(engine, prompts.draw(args.clients), workload.new_tokens, &[]).await?);
    }
    let training = async {
        let mut steps = Vec::new();
        for number in 0..args.steps {
            steps.push(step(trainer, tokens.draw(args.batch), 1_000 + number as u64).await?);
        }
        anyhow::Ok(steps)
    };
    // Serving goes on for as long as training does; its last round is cut off and not counted.
    let mut rounds = Vec::new();
    let steps = {
        let mut training = std::pin::pin!(training);
        loop {
            let round = load::round(engine, prompts.draw(args.clients), workload.new_tokens, &[]);
            tokio::select! {
                steps = &mut training => break steps?,
                round = round => rounds.push(round?),
            }
        }
    };
    Ok(Beside { alone, rounds, steps })
}

fn gap_ratio(beside: &[Round], alone: &[Round]) -> Option<f64> {
    let p95 = |rounds: &[Round]| {
        let gaps = rounds.iter().flat_map(|r| &r.clients).flat_map(|c| c.gaps_ms.iter().copied());
        Percentiles::new(gaps).map(|p| p.p95)
    };
    Some(p95(beside)? / p95(alone)?)
}

/// Memory that this process holds now, as Linux counts it.
fn resident_bytes() -> Option<u64> {
    of_status(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}
