//! `gurukul eval`: a model, with an adapter or without, on prompts whose completions are known: the loss of the
//! completions, and how like them the greedy answers are. Rows are read in `rows`, figures summed up in `figures`.

mod figures;
mod rows;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail, ensure};
use futures::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use self::figures::{Tally, by_language, table};
use self::rows::Row;
use crate::app::{self, CannotStart, Loaded};
use crate::config::Settings;
use crate::engine::training::TrainSequence;
use crate::engine::{AdapterHandle, EngineHandle, Event, GenerateRequest};
use crate::text::Language;
use crate::train::evaluation::{Pairs, Scorer, evaluate, prompt_of};

/// What is measured, and on what.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Rows as JSON lines: {"prompt", "completion", "language"?}, or {"en": ..., "hi": ..., ...} by language codes
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Adapter in the data folder's adapters/
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 100, value_name = "TOKENS")]
    max_new_tokens: usize,
    /// Rows of these languages alone
    #[arg(long, value_delimiter = ',', value_name = "CODES")]
    languages: Vec<Language>,
    /// The first so many rows alone; a sentence in ten languages is ten rows
    #[arg(long, value_name = "ROWS")]
    limit: Option<usize>,
    /// Write the figures there too, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Measures, shows the table and writes the figures.
///
/// # Errors
/// [`CannotStart`]: rows that cannot be used, an adapter or a model that cannot be had. Without it: what fails while
/// measuring.
pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let rows = args.rows().context(CannotStart)?;
    let runtime = super::runtime()?;
    let loaded = runtime.block_on(app::load(settings))?;
    let measured = runtime.block_on(measure(args, &rows, &loaded));
    loaded.engine.shutdown();
    let (tallies, total) = measured?;
    super::print(&table(&tallies, &total))?;
    if let Some(out) = &args.out {
        let report = report(args, &loaded.model_id, &tallies, &total);
        super::write_report(out, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    Ok(())
}

impl Args {
    /// The rows; what cannot be is refused before a model is loaded.
    fn rows(&self) -> anyhow::Result<Vec<Row>> {
        ensure!(self.max_new_tokens > 0, "--max-new-tokens must be at least 1");
        ensure!(self.limit != Some(0), "--limit must be at least 1");
        rows::read(&self.data, &self.languages, self.limit)
    }
}

/// Figures by language, and of all rows.
async fn measure(
    args: &Args,
    rows: &[Row],
    loaded: &Loaded,
) -> anyhow::Result<(Vec<(Option<Language>, Tally)>, Tally)> {
    let engine = &loaded.engine;
    let adapter = match &args.adapter {
        Some(name) => Some(loaded.adapters.acquire(name).await.context("--adapter").context(CannotStart)?),
        None => None,
    };
    let samples = samples(args, rows, loaded).context(CannotStart)?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} answers");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(rows.len() as u64).with_style(style);

    // As many at once as the engine runs. In order, so that the sums are the same each time.
    let answers = samples.iter().map(|sample| {
        let most = args.max_new_tokens.min(engine.info().context_length - prompt_of(sample).len());
        answer(engine, prompt_of(sample).to_vec(), most, adapter.clone())
    });
    let mut answers = futures::stream::iter(answers).buffered(engine.info().max_batch);
    let mut tallies = by_language(rows);
    for row in rows {
        let answer = answers.next().await.context("an answer a row is a bug otherwise")?;
        let answer = answer.with_context(|| row.place(&args.data))?;
        tally_of(&mut tallies, row).add_answer(row, &answer);
        bar.inc(1);
    }
    drop(answers);
    bar.finish_and_clear();

    let mut total = Tally::default();
    for (language, tally) in &mut tallies {
        let of_language = rows.iter().zip(&samples).filter(|(row, _)| row.language == *language);
        let samples: Vec<TrainSequence> = of_language.map(|(_, sample)| sample.clone()).collect();
        let scorer = Scorer::Served { engine, adapter: adapter.as_ref() };
        let sums = evaluate(scorer, &samples, || false).await.context("the loss could not be measured")?;
        tally.sums = sums.context("nobody asked it to stop")?;
        total.add(tally);
    }
    Ok((tallies, total))
}

fn tally_of<'t>(tallies: &'t mut [(Option<Language>, Tally)], row: &Row) -> &'t mut Tally {
    let found = tallies.iter_mut().find(|(language, _)| *language == row.language);
    &mut found.expect("every row's language has a tally; otherwise it is a bug").1
}

/// The tokens of each row, as training makes them; all must fit the model.
fn samples(args: &Args, rows: &[Row], loaded: &Loaded) -> anyhow::Result<Vec<TrainSequence>> {
    let info = loaded.engine.info();
    let pairs = Pairs::new(Arc::clone(&loaded.tokenizer), &info.eos_token_ids);
    let sample = |row: &Row| {
        let place = || row.place(&args.data);
        let sample = pairs.sample(&row.prompt, &row.completion).map_err(|e| anyhow!("{}: {e}", place()))?;
        let (tokens, limit) = (sample.tokens.len(), info.context_length);
        ensure!(
            tokens <= limit,
            "{}: prompt and completion have {tokens} tokens together, more than the {limit} that fit; shorten them",
            place()
        );
        Ok(sample)
    };
    rows.iter().map(sample).collect()
}

/// One greedy answer, whole.
async fn answer(
    engine: &EngineHandle,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    adapter: Option<AdapterHandle>,
) -> anyhow::Result<String> {
    let request = GenerateRequest { adapter, ..GenerateRequest::greedy(prompt, max_new_tokens) };
    let mut generation = engine.generate(request)?;
    let mut answer = String::new();
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token { text, .. } => answer.push_str(&text),
            Event::Finished { text, .. } => return Ok(answer + &text),
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine stopped in the middle of an answer")
}

fn report(args: &Args, model: &str, tallies: &[(Option<Language>, Tally)], total: &Tally) -> Value {
    let named = |(language, tally): &(Option<Language>, Tally)| {
        (language.map_or("none", Language::code).to_owned(), tally.figures())
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "adapter": args.adapter,
        "data": args.data.display().to_string(),
        "max_new_tokens": args.max_new_tokens,
        "total": total.figures(),
        "languages": tallies.iter().map(named).collect::<serde_json::Map<_, _>>(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Ok(CommandLine::try_parse_from(["eval", "--data", "rows.jsonl"].iter().chain(line))?.args)
    }

    #[test]
    fn flags_are_checked_before_anything_is_read() {
        let args = parse(&["--languages", "hi,bengali"]).unwrap();
        assert_eq!(args.languages, [Language::Hindi, Language::Bengali]);
        assert!(parse(&["--languages", "hi,xx"]).unwrap_err().to_string().contains("xx"));
        for (line, part) in [(["--max-new-tokens", "0"], "--max-new-tokens"), (["--limit", "0"], "--limit")] {
            let error = parse(&line).unwrap().rows().unwrap_err();
            assert!(error.to_string().starts_with(part), "{error}");
        }
        let error = parse(&[]).unwrap().rows().unwrap_err();
        assert!(format!("{error:#}").contains("rows.jsonl"), "{error:#}");
    }
}
