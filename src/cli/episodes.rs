//! `gurukul episodes stats` and `gurukul episodes export`: what the log of the data folder holds. Loads no model and
//! takes no lock, so it runs beside a server.

pub(super) mod summary;

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::json;

use self::summary::Summary;
use crate::app::CannotStart;
use crate::config::Settings;
use crate::rl::Episode;
use crate::rl::episode::lines;
use crate::rl::log::{FOLDER, episodes, runs};
use crate::text::Language;

/// What shall be done with the episodes.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Show counts, mean rewards with their parts, and how rewards are spread
    Stats {
        #[command(flatten)]
        filter: Filter,
    },
    /// Write episodes out
    Export {
        #[command(flatten)]
        filter: Filter,
        /// Lines as in the log, or pairs of prompt and completion to train on
        #[arg(long, value_enum, default_value_t = Format::Jsonl)]
        format: Format,
        /// File to write; stdout when left away
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// As in the log.
    Jsonl,
    /// `{"prompt", "completion"}`.
    Pairs,
}

/// Which episodes.
#[derive(Debug, Clone, Default, clap::Args)]
struct Filter {
    /// Of this run; may be given several times. All runs when left away
    #[arg(long, value_name = "NAME")]
    run_id: Vec<String>,
    /// In this language, by code or name
    #[arg(long, value_name = "LANGUAGE")]
    language: Option<Language>,
    /// From this environment
    #[arg(long, value_name = "NAME")]
    env_name: Option<String>,
    /// With at least this reward; leaves out those without one
    #[arg(long, value_name = "REWARD", allow_negative_numbers = true)]
    min_reward: Option<f64>,
    /// With at most this reward; leaves out those without one
    #[arg(long, value_name = "REWARD", allow_negative_numbers = true)]
    max_reward: Option<f64>,
}

impl Filter {
    fn takes(&self, episode: &Episode) -> bool {
        let meta = &episode.meta;
        self.language.is_none_or(|wanted| meta.language.as_deref() == Some(wanted.code()))
            && self.env_name.as_ref().is_none_or(|wanted| episode.env_name == *wanted)
            && self.min_reward.is_none_or(|least| episode.reward.is_some_and(|reward| reward >= least))
            && self.max_reward.is_none_or(|most| episode.reward.is_some_and(|reward| reward <= most))
    }

    /// The episodes that are taken, run by run. Lines that are none are told on stderr and passed over.
    fn each(&self, dir: &Path, mut take: impl FnMut(Episode) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let known = runs(dir).with_context(|| format!("{}", dir.display()))?;
        if let Some(unknown) = self.run_id.iter().find(|run| !known.contains(run)) {
            let known = if known.is_empty() { "none yet".to_owned() } else { known.join(", ") };
            return Err(anyhow::anyhow!(
                "--run-id {unknown}: no such run in {}; there are: {known}",
                dir.display()
            )
            .context(CannotStart));
        }
        for run in known.iter().filter(|run| self.run_id.is_empty() || self.run_id.contains(run)) {
            for episode in episodes(dir, run).with_context(|| format!("run {run}"))? {
                match episode {
                    Ok(episode) if self.takes(&episode) => take(episode)?,
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "passed over what is no episode"),
                }
            }
        }
        Ok(())
    }
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let dir = settings.data_dir.join(FOLDER);
    match &args.command {
        Command::Stats { filter } => stats(filter, &dir),
        Command::Export { filter, format, out } => {
            let write = |file: &mut dyn io::Write| export(filter, *format, &dir, file);
            match out {
                Some(path) => super::stream_report(path, write),
                None => match write(&mut io::BufWriter::new(io::stdout().lock())) {
                    // Whoever reads no further (`| head`) is no failure.
                    Err(error) if is_closed(&error) => Ok(()),
                    outcome => outcome,
                },
            }
        }
    }
}

fn is_closed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn stats(filter: &Filter, dir: &Path) -> anyhow::Result<()> {
    let (mut by_run, mut by_language) = (Summary::default(), Summary::default());
    filter.each(dir, |episode| {
        by_run.add(episode.run_id.clone(), &episode);
        by_language.add(episode.meta.language.clone().unwrap_or_else(|| "none".into()), &episode);
        Ok(())
    })?;
    if by_run.total().episodes() == 0 {
        bail!("no such episodes in {}", dir.display());
    }
    super::print(&format!(
        "{}\n{}\n{}",
        by_run.table("run"),
        by_language.table("language"),
        by_run.total().histogram()
    ))
}

fn export(filter: &Filter, format: Format, dir: &Path, file: &mut dyn io::Write) -> anyhow::Result<()> {
    filter.each(dir, |episode| {
        match format {
            Format::Jsonl => file.write_all(&lines(std::slice::from_ref(&episode)))?,
            Format::Pairs => {
                let pair = json!({ "prompt": episode.prompt, "completion": episode.output });
                writeln!(file, "{pair}")?;
            }
        }
        Ok(())
    })?;
    Ok(file.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::collect::new_episode;
    use crate::rl::episode::{EpisodeMeta, EpisodeSource};

    fn log() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let line = |run: &str, language: Option<&str>, reward: Option<f64>| {
            let meta = EpisodeMeta {
                language: language.map(str::to_owned),
                ..EpisodeMeta::new(EpisodeSource::Given)
            };
            let mut episode = new_episode("id".into(), "env", "प्र", "उ।", meta);
            (episode.run_id, episode.reward) = (run.to_owned(), reward);
            serde_json::to_string(&episode).unwrap() + "\n"
        };
        let first = line("a", Some("hi"), Some(0.2)) + &line("a", Some("ta"), Some(0.9)) + "no episode\n";
        std::fs::write(dir.path().join("a.jsonl"), first).unwrap();
        std::fs::write(dir.path().join("b.jsonl"), line("b", Some("hi"), None) + "{\"torn").unwrap();
        dir
    }

    fn exported(filter: &Filter, format: Format) -> Vec<serde_json::Value> {
        let mut text = Vec::new();
        export(filter, format, log().path(), &mut text).unwrap();
        String::from_utf8(text).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn episodes_are_filtered() {
        let all = Filter::default();
        assert_eq!(exported(&all, Format::Jsonl).len(), 3);
        for (filter, count) in [
            (Filter { run_id: vec!["a".into()], ..all.clone() }, 2),
            (Filter { language: Some(Language::Hindi), ..all.clone() }, 2),
            (Filter { min_reward: Some(0.5), ..all.clone() }, 1),
            (Filter { max_reward: Some(0.5), ..all.clone() }, 1),
            (Filter { env_name: Some("other".into()), ..all.clone() }, 0),
        ] {
            assert_eq!(exported(&filter, Format::Jsonl).len(), count, "{filter:?}");
        }
        let pair = &exported(&Filter { min_reward: Some(0.5), ..all }, Format::Pairs)[0];
        assert_eq!(*pair, json!({ "prompt": "प्र", "completion": "उ।" }));
    }

    #[test]
    fn a_run_that_is_not_there_is_named() {
        let filter = Filter { run_id: vec!["c".into()], ..Filter::default() };
        let error = filter.each(log().path(), |_| Ok(())).unwrap_err();
        assert!(error.is::<CannotStart>() && format!("{error:#}").contains("there are: a, b"), "{error:#}");
        assert!(stats(&Filter::default(), Path::new("/nowhere")).is_err());
    }
}
