//! `gurukul bench generate|serve|train`: measures the engine alone or behind HTTP, and prints one JSON object. How
//! requests go over HTTP is in `client`, how figures are summed up in `figures`.

mod client;
mod figures;
mod load;
mod train;

use std::io::Write as _;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

use self::client::Server;
use self::figures::{PerRun, Percentiles, Round, Served, peak_resident_bytes, ratio};
use self::load::{AdapterChoice, Prompts, Workload};
use super::local;
use crate::adapters::Registry;
use crate::app::{self, App, CannotStart};
use crate::config::Settings;
use crate::engine::{AdapterHandle, EngineHandle};

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Subject {
    /// The engine alone: prefill and decode tokens/s, time to first token, time between tokens
    Generate(Workload),
    /// The server under clients that stream, beside the engine alone, and /health meanwhile
    Serve(ServeArgs),
    /// Training: tokens/s, step time by phase, peak memory beside the plan's, and beside clients if wanted
    Train(train::TrainArgs),
}

#[derive(Debug, Clone, clap::Args)]
struct ServeArgs {
    #[command(flatten)]
    workload: Workload,
    /// A server that runs already, instead of one in this process: http://127.0.0.1:8110
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// With --url: prompt tokens are drawn below this id, which must be in that server's vocabulary
    #[arg(long, default_value_t = 1000, requires = "url", value_name = "TOKENS")]
    vocab_size: usize,
}

/// Measures, then prints the figures to stdout.
///
/// # Errors
/// A workload that cannot be run, a model that does not load, a request that fails, a closed stdout.
pub(super) fn run(args: Args, settings: Settings) -> anyhow::Result<()> {
    let runtime = super::runtime()?;
    let report = match args.subject {
        Subject::Generate(workload) => {
            workload.check().context(CannotStart)?;
            let started = Instant::now();
            let loaded = runtime.block_on(app::load(&settings))?;
            let load_s = started.elapsed().as_secs_f64();
            let report = runtime.block_on(generate(&workload, &loaded.engine, &loaded.adapters));
            loaded.engine.shutdown();
            let mut report = report?;
            report.insert("load_s".into(), json!((load_s * 1000.0).round() / 1000.0));
            report
        }
        Subject::Train(args) => {
            args.check().context(CannotStart)?;
            let loaded = runtime.block_on(app::load(&settings))?;
            let report = runtime.block_on(train::train(&args, &loaded.engine));
            loaded.engine.shutdown();
            report?
        }
        Subject::Serve(ServeArgs { workload, url: Some(url), vocab_size }) => {
            workload.check().context(CannotStart)?;
            runtime.block_on(serve_elsewhere(&workload, &url, vocab_size))?
        }
        Subject::Serve(ServeArgs { workload, url: None, .. }) => {
            workload.check().context(CannotStart)?;
            let serve = async |app| serve_here(&workload, app).await;
            local::with_app(runtime, settings, serve)?
        }
    };
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &report)?;
    writeln!(out)?;
    Ok(())
}

/// One combination that is measured: so many clients, each with an adapter or all without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    clients: usize,
    adapters: usize,
}

/// Every concurrency without adapters, and again with them where some are named.
fn cells(workload: &Workload, adapters: usize) -> Vec<Cell> {
    let of = |adapters: usize| workload.concurrency.iter().map(move |&clients| Cell { clients, adapters });
    if adapters == 0 { of(0).collect() } else { of(0).chain(of(adapters)).collect() }
}

async fn generate(
    workload: &Workload,
    engine: &EngineHandle,
    registry: &Registry,
) -> anyhow::Result<Map<String, Value>> {
    #[derive(Serialize)]
    struct Figures {
        concurrency: usize,
        adapters: usize,
        prefill_tokens_per_s: Option<PerRun>,
        decode_tokens_per_s: Option<PerRun>,
        decode_ratio_to_base: Option<f64>,
        #[serde(flatten)]
        served: Served,
    }

    fits(workload, engine).context(CannotStart)?;
    let handles = acquire(&workload.adapters, registry).await.context(CannotStart)?;
    let mut prompts = Prompts::new(workload, engine.info().vocab_size, &engine.info().eos_token_ids);
    let cells = cells(workload, handles.len());
    let mut rounds: Vec<(Vec<Round>, Vec<Round>)> = vec![Default::default(); cells.len()];
    for run in 0..=workload.runs {
        // Cells alternate, so that a machine that slows down slows all of them.
        for (cell, (first, whole)) in cells.iter().zip(&mut rounds) {
            let with = &handles[..cell.adapters];
            let one = load::round(engine, prompts.draw(cell.clients), 1, with).await?;
            let all = load::round(engine, prompts.draw(cell.clients), workload.new_tokens, with).await?;
            // The first run warms up: pages, thread pools, adapters.
            if run > 0 {
                first.push(one);
                whole.push(all);
            }
        }
    }
    let mut results: Vec<Figures> = Vec::new();
    for (cell, (first, whole)) in cells.iter().zip(&rounds) {
        let prompt_tokens = (cell.clients * workload.prompt_tokens) as f64;
        let decoded = (cell.clients * (workload.new_tokens - 1)) as f64;
        let decode_tokens_per_s = PerRun::new(
            // What the whole took longer than one token each: decoding alone, however prefill overlapped.
            first.iter().zip(whole).map(|(f, w)| decoded / (w.wall_s - f.wall_s)).filter(|rate| *rate > 0.0),
        );
        let base = results.iter().find(|r| r.concurrency == cell.clients && cell.adapters > 0);
        let decode_ratio_to_base =
            base.and_then(|base| ratio(decode_tokens_per_s.as_ref(), base.decode_tokens_per_s.as_ref()));
        results.push(Figures {
            concurrency: cell.clients,
            adapters: cell.adapters,
            prefill_tokens_per_s: PerRun::new(first.iter().map(|f| prompt_tokens / f.wall_s)),
            decode_tokens_per_s,
            decode_ratio_to_base,
            served: Served::new(whole),
        });
    }
    let mut report = head("generate", workload);
    report.insert("model".into(), describe(engine));
    report.insert("results".into(), serde_json::to_value(results)?);
    report.insert("peak_resident_bytes".into(), json!(peak_resident_bytes()));
    Ok(report)
}

/// What the clients of one cell saw, and what `/health` took meanwhile.
#[derive(Serialize)]
struct ServeFigures {
    concurrency: usize,
    adapters: usize,
    #[serde(flatten)]
    served: Served,
    engine_tokens_per_s: Option<PerRun>,
    ratio_to_engine: Option<f64>,
    ratio_to_base: Option<f64>,
    health_ms: Option<Percentiles>,
}

#[derive(Default)]
struct CellRounds {
    http: Vec<Round>,
    engine: Vec<Round>,
    health_ms: Vec<f64>,
}

async fn serve_here(workload: &Workload, app: App) -> anyhow::Result<Map<String, Value>> {
    let (engine, registry) = (app.engine(), app.adapters());
    fits(workload, &engine).context(CannotStart)?;
    let url = app.url().to_owned();
    let info = engine.info();
    let prompts = Prompts::new(workload, info.vocab_size, &info.eos_token_ids);
    let measured = async {
        let handles = acquire(&workload.adapters, &registry).await.context(CannotStart)?;
        measure(workload, Server::new(&url)?, prompts, Some((&engine, &handles))).await
    };
    let results = local::serve_meanwhile(app, measured).await?;
    let mut report = head("serve", workload);
    report.insert("model".into(), describe(&engine));
    report.insert("results".into(), serde_json::to_value(results)?);
    report.insert("peak_resident_bytes".into(), json!(peak_resident_bytes()));
    Ok(report)
}

async fn serve_elsewhere(
    workload: &Workload,
    url: &str,
    vocab_size: usize,
) -> anyhow::Result<Map<String, Value>> {
    let prompts = Prompts::new(workload, vocab_size, &[]);
    let results = measure(workload, Server::new(url)?, prompts, None).await?;
    let mut report = head("serve", workload);
    report.insert("url".into(), json!(url));
    report.insert("results".into(), serde_json::to_value(results)?);
    Ok(report)
}

async fn measure(
    workload: &Workload,
    server: Server,
    mut prompts: Prompts,
    alone: Option<(&EngineHandle, &[AdapterHandle])>,
) -> anyhow::Result<Vec<ServeFigures>> {
    let base = server.base_model().await?;
    let names = match &workload.adapters {
        AdapterChoice::None => Vec::new(),
        AdapterChoice::Names(names) => names.clone(),
        AdapterChoice::First(count) => first(*count, server.adapters().await?)?,
    };
    let cells = cells(workload, names.len());
    let mut rounds: Vec<CellRounds> = cells.iter().map(|_| CellRounds::default()).collect();
    for run in 0..=workload.runs {
        for (cell, rounds) in cells.iter().zip(&mut rounds) {
            let models = if cell.adapters == 0 { std::slice::from_ref(&base) } else { names.as_slice() };
            if let Some((engine, handles)) = alone {
                let with = &handles[..cell.adapters];
                let round =
                    load::round(engine, prompts.draw(cell.clients), workload.new_tokens, with).await?;
                if run > 0 {
                    rounds.engine.push(round);
                }
            }
            let drawn = prompts.draw(cell.clients);
            let (round, health_ms) = server.round(drawn, workload.new_tokens, models).await?;
            if run > 0 {
                rounds.http.push(round);
                rounds.health_ms.extend(health_ms);
            }
        }
    }
    let mut results: Vec<ServeFigures> = Vec::new();
    for (cell, rounds) in cells.iter().zip(rounds) {
        let served = Served::new(&rounds.http);
        let engine_tokens_per_s = PerRun::new(rounds.engine.iter().map(Round::tokens_per_s));
        let base = results.iter().find(|r| r.concurrency == cell.clients && cell.adapters > 0);
        results.push(ServeFigures {
            concurrency: cell.clients,
            adapters: cell.adapters,
            ratio_to_engine: ratio(served.tokens_per_s.as_ref(), engine_tokens_per_s.as_ref()),
            ratio_to_base: base
                .and_then(|base| ratio(served.tokens_per_s.as_ref(), base.served.tokens_per_s.as_ref())),
            engine_tokens_per_s,
            health_ms: Percentiles::new(rounds.health_ms),
            served,
        });
    }
    Ok(results)
}

/// Refuses what the engine would refuse in the middle of a measurement.
fn fits(workload: &Workload, engine: &EngineHandle) -> anyhow::Result<()> {
    let info = engine.info();
    let room = info.max_batch + info.max_queue;
    let most = workload.concurrency.iter().copied().max().unwrap_or(0);
    ensure!(
        most <= room,
        "--concurrency {most} is more than --max-batch and --max-queue take together ({room})"
    );
    let tokens = workload.prompt_tokens + workload.new_tokens;
    let limit = info.context_length;
    ensure!(
        tokens <= limit,
        "--prompt-tokens and --new-tokens make {tokens} together, more than the context of {limit} tokens"
    );
    Ok(())
}

async fn acquire(choice: &AdapterChoice, registry: &Registry) -> anyhow::Result<Vec<AdapterHandle>> {
    let names = match choice {
        AdapterChoice::None => return Ok(Vec::new()),
        AdapterChoice::Names(names) => names.clone(),
        AdapterChoice::First(count) => {
            let usable = registry.list().await?.into_iter().filter(|a| a.error.is_none());
            first(*count, usable.map(|a| a.name).collect())?
        }
    };
    let mut handles = Vec::with_capacity(names.len());
    for name in names {
        handles.push(registry.acquire(&name).await.with_context(|| format!("--adapters: {name}"))?);
    }
    Ok(handles)
}

fn first(count: usize, mut names: Vec<String>) -> anyhow::Result<Vec<String>> {
    ensure!(
        names.len() >= count,
        "--adapters {count}: the data folder holds {} that fit the model",
        names.len()
    );
    names.truncate(count);
    Ok(names)
}

fn head(bench: &str, workload: &Workload) -> Map<String, Value> {
    let mut head = Map::new();
    head.insert("bench".into(), json!(bench));
    head.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
    head.insert("prompt_tokens".into(), json!(workload.prompt_tokens));
    head.insert("new_tokens".into(), json!(workload.new_tokens));
    head.insert("runs".into(), json!(workload.runs));
    head.insert("seed".into(), json!(workload.seed));
    head.insert("cores".into(), json!(std::thread::available_parallelism().map_or(0, usize::from)));
    head
}

fn describe(engine: &EngineHandle) -> Value {
    let info = engine.info();
    json!({
        "family": info.family,
        "parameters": info.parameters,
        "weight_bytes": info.weight_bytes,
        "kv_cache_bytes": info.kv_cache_bytes,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "device": info.device,
        "max_batch": info.max_batch,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Ok(CommandLine::try_parse_from(["bench"].iter().chain(line))?.args)
    }

    #[test]
    fn flags_have_their_defaults() {
        let Subject::Generate(workload) = parse(&["generate"]).unwrap().subject else { panic!("generate") };
        assert_eq!(workload.concurrency, [1, 8]);
        assert_eq!((workload.prompt_tokens, workload.new_tokens, workload.runs), (128, 64, 3));
        assert_eq!(workload.adapters, AdapterChoice::None);
        let line = ["serve", "--url", "http://127.0.0.1:1", "--adapters", "4", "--concurrency", "2,4"];
        let Subject::Serve(serve) = parse(&line).unwrap().subject else { panic!("serve") };
        assert_eq!(serve.workload.concurrency, [2, 4]);
        assert_eq!(serve.workload.adapters, AdapterChoice::First(4));
        let line = ["generate", "--adapters", "hindi,tamil-2"];
        let Subject::Generate(workload) = parse(&line).unwrap().subject else { panic!("generate") };
        assert_eq!(workload.adapters, AdapterChoice::Names(vec!["hindi".into(), "tamil-2".into()]));
    }

    #[test]
    fn bad_flags_are_refused() {
        for line in [
            &["generate", "--adapters", "../etc"][..],
            &["generate", "--concurrency", "x"],
            &["serve", "--vocab-size", "10"],
            &[],
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn cells_come_without_adapters_first() {
        let Subject::Generate(workload) = parse(&["generate"]).unwrap().subject else { panic!("generate") };
        let cell = |clients, adapters| Cell { clients, adapters };
        assert_eq!(cells(&workload, 0), [cell(1, 0), cell(8, 0)]);
        assert_eq!(cells(&workload, 4), [cell(1, 0), cell(8, 0), cell(1, 4), cell(8, 4)]);
    }

    #[test]
    fn too_few_adapters_are_told() {
        let names = || vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(first(1, names()).unwrap(), ["a"]);
        assert!(first(3, names()).unwrap_err().to_string().contains("--adapters 3: the data folder holds 2"));
    }
}
