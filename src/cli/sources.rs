//! `gurukul sources`: which sources of training data there are, what one gives, and whether it can be trained from.
//! Reads as a training job would, and keeps nothing. No model is loaded.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use futures::StreamExt as _;
use serde_json::Value;

use super::print;
use super::train::located;
use crate::app::CannotStart;
use crate::config::Settings;
use crate::config::connectors::Connectors;
use crate::data::{Cursor, RecordStream, SourceConfig, Survey, Template};
use crate::train::template::decide;

/// Files that `check` looks at.
const MAX_FILES: usize = 20;

/// What to do with the sources.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
    /// File with the sources; configs/mcp_connectors.yml when left away
    #[arg(long, value_name = "FILE", global = true)]
    connectors: Option<PathBuf>,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Action {
    /// Name, kind and place of each source
    List,
    /// The first records of a source, as JSON lines
    Peek {
        /// Of the source
        name: String,
        /// Records that are shown
        #[arg(short = 'n', long = "records", value_name = "COUNT", default_value_t = 5)]
        records: usize,
    },
    /// Read a source for some seconds, and say what is found and what is wrong
    Check {
        /// Of the source
        name: String,
        /// Time that is spent reading
        #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
        seconds: f64,
    },
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds from 0 to 3600".into()),
    }
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let connectors = load(args, settings).context(CannotStart)?;
    let source = |name: &str| {
        let source = connectors.source(name).map_err(|e| anyhow!("source {e}")).context(CannotStart)?;
        anyhow::Ok(source.clone())
    };
    match &args.action {
        Action::List => print(&list(&connectors)),
        Action::Peek { name, records } => {
            let source = source(name)?;
            super::runtime()?.block_on(peek(name, &source, *records))
        }
        Action::Check { name, seconds } => {
            let source = source(name)?;
            super::runtime()?.block_on(check(name, &source, Duration::from_secs_f64(*seconds)))
        }
    }
}

fn load(args: &Args, settings: &Settings) -> anyhow::Result<Connectors> {
    let (folder, file) = located(args.connectors.as_deref(), &settings.configs_dir, "--connectors")?;
    Connectors::load(&folder, file.as_deref()).map_err(|e| anyhow!("--connectors: {e}"))
}

/// A table; a line when there is nothing to put into it.
fn list(connectors: &Connectors) -> String {
    let width =
        |texts: &mut dyn Iterator<Item = &str>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
    let names = width(&mut connectors.names());
    let kinds = width(&mut connectors.iter().map(|(_, source)| source.kind()));
    let line = |(name, source): (&str, &SourceConfig)| {
        format!("{name:names$}  {:kinds$}  {}\n", source.kind(), source.description())
    };
    let lines: String = connectors.iter().map(line).collect();
    if lines.is_empty() { "no sources; name some in the connectors file\n".into() } else { lines }
}

async fn peek(name: &str, source: &SourceConfig, records: usize) -> anyhow::Result<()> {
    let mut stream = source.open_whole(name);
    for _ in 0..records {
        let Some(record) = stream.next().await.transpose()? else { break };
        print(&format!("{}\n", Value::Object(record.fields)))?;
    }
    Ok(())
}

/// Prints what is found as it is found; what is wrong is the error.
async fn check(name: &str, source: &SourceConfig, limit: Duration) -> anyhow::Result<()> {
    print(&format!("source {name} ({}): {}\n", source.kind(), source.description()))?;
    print(&parts(&source.survey(name, MAX_FILES).await?))?;

    let begun = Instant::now();
    let mut stream = source.open(name, Cursor::default());
    let mut first = None;
    let mut bytes = 0;
    let mut template = Err(String::new());
    let mut ended = false;
    while first.is_none() || begun.elapsed() < limit {
        // The first record may take as long as the source's patience lasts.
        let item = match first {
            None => stream.next().await,
            Some(_) => match tokio::time::timeout(limit.saturating_sub(begun.elapsed()), stream.next()).await
            {
                Ok(item) => item,
                Err(_) => break,
            },
        };
        for note in stream.take_notes() {
            print(&format!("{note}\n"))?;
        }
        let Some(record) = item.transpose()? else {
            ended = true;
            break;
        };
        if first.is_none() {
            first = Some(begun.elapsed());
            print(&format!(
                "first record after {:.3} s, from {}\n",
                begun.elapsed().as_secs_f64(),
                record.place
            ))?;
        }
        if template.is_err() {
            template = of_source(source).map_or_else(|| decide(source, &record), Ok);
        }
        bytes += record.bytes();
    }
    let took = begun.elapsed();
    print(&figures(&stream, bytes, took, ended))?;
    if first.is_none() {
        return Err(anyhow!(
            "source {name} gives no records; correct where it lies, its format or its filter"
        ));
    }
    let template = template.map_err(|why| anyhow!("no record says which template to use: it {why}"))?;
    print(&format!("template {}\n", template.name()))?;
    stream.finish()?;
    print("can be trained from\n")
}

/// The template that the source names itself.
fn of_source(source: &SourceConfig) -> Option<Template> {
    source.template.filter(|template| *template != Template::Auto)
}

fn parts(survey: &Survey) -> String {
    let mut text = String::new();
    for part in &survey.parts {
        text += &format!("  {}", part.name);
        if let Some(bytes) = part.bytes {
            text += &format!(", {bytes} bytes");
        }
        if let Some(rows) = part.rows {
            text += &format!(", {rows} rows");
        }
        if let Some(version) = &part.version {
            text += &format!(", version {version}");
        }
        text.push('\n');
    }
    if survey.more {
        text += "  and more\n";
    }
    text
}

fn figures(stream: &RecordStream, bytes: usize, took: Duration, ended: bool) -> String {
    let seconds = took.as_secs_f64().max(1e-9);
    let rows = stream.rows();
    let records = stream.cursor().counts.records;
    let end = if ended { ", and that is all" } else { "" };
    let mut text = format!(
        "{records} records in {seconds:.1} s: {:.0} records/s, {:.1} MB/s of text{end}\n",
        records as f64 / seconds,
        bytes as f64 / 1e6 / seconds,
    );
    text += &format!("{} of {} rows cannot be used\n", rows.bad, rows.rows);
    if rows.filtered > 0 {
        text += &format!("{} rows are kept out by the filter\n", rows.filtered);
    }
    for reason in &rows.reasons {
        text += &format!("  {reason}\n");
    }
    text
}
