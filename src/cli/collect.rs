//! `gurukul collect`: prompts answered, rewarded and logged in this process, without a server. The log is the data
//! folder's, so the folder must not be in use by a server, which has `POST /rl/collect`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use super::episodes::summary::Summary;
use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::config::adapter::FieldError;
use crate::config::rl::{PromptConfig, SinksConfig};
use crate::config::rl_sinks::Destination;
use crate::jobs::{Promise, PromiseState};
use crate::rl::collect::{Begin, Ending};
use crate::rl::episode::lines;
use crate::rl::outbox::{Content, Outbox};
use crate::rl::{CollectJob, Collector, Episode, Wanted};
use crate::train::Stop;

/// How long to wait for an upload before it is left to the next start.
const UPLOAD_WAIT: Duration = Duration::from_secs(60);

/// What is collected, and how.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Episodes in all; one a prompt when left away
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    episodes: Option<i64>,
    /// A prompt to answer; may be given several times. Without one, those of configs/rl_config.yaml
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// File of prompts: one a line, or as .jsonl objects with prompt and maybe language and reference
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Adapter in the data folder's adapters/
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Language of the answers; of the settings' prompts, those in it alone
    #[arg(long, value_name = "LANGUAGE")]
    language: Option<String>,
    /// What the episodes come from
    #[arg(long, value_name = "NAME")]
    env_name: Option<String>,
    /// The run, which is the name of the log; a new one when left away
    #[arg(long, value_name = "NAME")]
    run_id: Option<String>,
    /// Also write the episodes to this file, as in the log
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Keep token ids and log-probabilities, which learning from the log needs
    #[arg(long)]
    logprobs: bool,
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    max_new_tokens: Option<i64>,
    /// 0 takes the most likely token each time
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Choose among the tokens that together have this probability; 1 among all
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    top_p: Option<f64>,
    /// Choose among the k most likely tokens; 0 among all
    #[arg(long, allow_negative_numbers = true, value_name = "K")]
    top_k: Option<i64>,
    /// Above 1: less likely to repeat what prompt and answer hold
    #[arg(long, allow_negative_numbers = true, value_name = "FACTOR")]
    repetition_penalty: Option<f64>,
    /// Seed that those of the episodes follow from; another one each time when left away
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<i64>,
    /// Text that ends an answer; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Upload the episodes to this sink of configs/rl_config.yaml; without a name to the one it has for that
    #[arg(long, value_name = "SINK", num_args = 0..=1, default_missing_value = "")]
    upload: Option<String>,
    /// Upload the episodes to this bucket
    #[arg(long, value_name = "BUCKET", conflicts_with = "upload")]
    s3_bucket: Option<String>,
    /// What they are called there, with placeholders as {run_id} and {date}
    #[arg(long, value_name = "KEY", requires = "s3_bucket")]
    s3_key: Option<String>,
}

impl Args {
    fn wanted(&self) -> anyhow::Result<Wanted> {
        let prompts = match &self.prompts {
            Some(file) => Some(read_prompts(file).with_context(|| format!("--prompts {}", file.display()))?),
            None if self.prompt.is_empty() => None,
            None => Some(self.prompt.iter().cloned().map(PromptConfig::new).collect()),
        };
        Ok(Wanted {
            prompts,
            episodes: self.episodes,
            run_id: self.run_id.clone(),
            env_name: self.env_name.clone(),
            adapter: self.adapter.clone(),
            language: self.language.clone(),
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            stop: self.stop.clone(),
            logprobs: self.logprobs,
            upload: None,
        })
    }

    /// Where the episodes are to be uploaded to.
    fn destination(&self, sinks: &SinksConfig) -> anyhow::Result<Option<Destination>> {
        if let Some(bucket) = &self.s3_bucket {
            let to = sinks.s3_destination(bucket, self.s3_key.as_deref());
            return to.map(Some).map_err(|error| anyhow!("{error}"));
        }
        let Some(name) = &self.upload else { return Ok(None) };
        let to = sinks.destination(Some(name.as_str()).filter(|name| !name.is_empty()));
        to.map(Some).map_err(|error| anyhow!("--upload: the {error}"))
    }
}

/// Prompts of a file.
fn read_prompts(file: &Path) -> anyhow::Result<Vec<PromptConfig>> {
    let text = std::fs::read_to_string(file)?;
    let is_json = file.extension().is_some_and(|extension| extension == "jsonl");
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts: anyhow::Result<Vec<PromptConfig>> = lines
        .map(|(at, line)| match is_json {
            true => serde_json::from_str(line).with_context(|| format!("line {}", at + 1)),
            false => Ok(PromptConfig::new(line.to_owned())),
        })
        .collect();
    let prompts = prompts?;
    if prompts.is_empty() {
        bail!("it holds no prompt");
    }
    Ok(prompts)
}

/// An error about a field, in the words of the command line.
fn of_flag(FieldError { field, message }: FieldError) -> anyhow::Error {
    anyhow!("--{} {message}", field.replace('_', "-"))
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let config = Arc::new(app::rl_config(settings)?);
    let resolve = || -> anyhow::Result<(CollectJob, Option<Destination>)> {
        let job = CollectJob::resolve(args.wanted()?, &config).map_err(of_flag)?;
        Ok((job, args.destination(&config.sinks)?))
    };
    let (job, to) = resolve().context(CannotStart)?;
    let runtime = super::runtime()?;
    // Holds the folder's lock.
    let jobs = runtime
        .block_on(app::open_jobs(settings))
        .context("gurukul collect has the data folder for itself; a running server has POST /rl/collect")
        .context(CannotStart)?;
    let uploads = match &to {
        Some(_) => Some(runtime.block_on(app::outbox(settings, &jobs, config.sinks.clone()))?),
        None => None,
    };
    let loaded = runtime.block_on(app::load(settings))?;
    let collector = app::collector(settings, config, &loaded)?;
    let outcome = runtime.block_on(async {
        let collected = collect(args, &collector, &job).await?;
        if let (Some(uploads), Some(to)) = (&uploads, &to) {
            upload(uploads, to, &job.run_id, &collected.episodes).await?;
        }
        match collected.ending {
            Ending::Completed => Ok(()),
            Ending::Cancelled { .. } | Ending::Paused => bail!(
                "stopped before all of the {} episodes were collected; those above are in the log",
                job.episodes
            ),
        }
    });
    drop(collector);
    loaded.engine.shutdown();
    runtime.block_on(jobs.close());
    outcome
}

/// Promises the upload, and waits a while for it and for those that were promised before.
async fn upload(
    uploads: &Outbox,
    to: &Destination,
    run_id: &str,
    episodes: &[Episode],
) -> anyhow::Result<()> {
    if episodes.is_empty() {
        return Ok(());
    }
    let id = uploads.promise(to, run_id, Content::Lines(lines(episodes))).await?;
    uploads.start();
    uploads.settle(UPLOAD_WAIT).await?;
    let promise = uploads.get(&id).await?;
    uploads.shutdown(Duration::ZERO).await;
    let state = match promise.state {
        PromiseState::Done => "done".to_owned(),
        PromiseState::Failed => bail!("the upload to {} was refused: {}", to.name, reason(&promise)),
        PromiseState::Pending => format!(
            "not through yet ({}); it goes on when gurukul serve, or collect with an upload, runs next",
            reason(&promise)
        ),
    };
    super::print(&format!("upload {} to {}: {state}\n", promise.key, to.name))
}

fn reason(promise: &Promise) -> &str {
    promise.error.as_deref().unwrap_or("no attempt has ended")
}

/// What came of it.
struct Collected {
    ending: Ending,
    /// Kept where they are wanted again.
    episodes: Vec<Episode>,
}

async fn collect(args: &Args, collector: &Collector, job: &CollectJob) -> anyhow::Result<Collected> {
    collector.check(job).await.context(CannotStart)?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec}, {eta} left{msg}");
    let bar =
        ProgressBar::new(job.episodes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut summary = Summary::default();
    let keeps = args.out.is_some() || args.upload.is_some() || args.s3_bucket.is_some();
    let mut kept: Vec<Episode> = Vec::new();
    let mut logged = |done, group: &[Episode]| {
        group.iter().for_each(|episode| summary.add(language(episode), episode));
        if keeps {
            kept.extend_from_slice(group);
        }
        bar.set_position(done);
        bar.set_message(
            summary.total().mean_reward().map_or(String::new(), |mean| format!(", reward {mean:.3}")),
        );
    };
    let id = uuid::Uuid::now_v7().to_string();
    let (stop, stopping) = watch::channel(Stop::No);
    let signal = app::stop_signal()?;
    let ending = tokio::select! {
        ending = collector.run(&id, job, Begin::Anew, &mut logged, stopping) => ending,
        _ = signal => Ok(Ending::Paused),
    };
    drop(stop);
    bar.finish_and_clear();
    let path = collector.log().dir().join(format!("{}.jsonl", job.run_id));
    let ending = ending.with_context(|| format!("run {}", job.run_id))?;
    let (total, table) = (summary.total().episodes(), summary.table("language"));
    super::print(&format!("run {}: {total} episodes in {}\n\n{table}", job.run_id, path.display()))?;
    if let Some(out) = &args.out {
        super::stream_report(out, |file| Ok(file.write_all(&lines(&kept))?))?;
    }
    Ok(Collected { ending, episodes: kept })
}

fn language(episode: &Episode) -> String {
    episode.meta.language.clone().unwrap_or_else(|| "none".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::rl::RlConfig;

    #[derive(clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: Args,
    }

    fn job(line: &[&str]) -> Result<CollectJob, String> {
        let parsed =
            CommandLine::try_parse_from(["collect"].iter().chain(line)).map_err(|e| e.to_string())?;
        let wanted = parsed.args.wanted().map_err(|e| format!("{e:#}"))?;
        CollectJob::resolve(wanted, &RlConfig::default()).map_err(|e| of_flag(e).to_string())
    }

    #[test]
    fn bad_values_name_their_flag() {
        for (line, flag) in [
            (&["--episodes", "0"][..], "--episodes"),
            (&["--run-id", "../x"], "--run-id"),
            (&["--env-name", "A"], "--env-name"),
            (&["--temperature", "-1"], "--temperature"),
            (&["--max-new-tokens", "0"], "--max-new-tokens"),
            (&["--language", "xx"], "--language"),
            (&["--prompt", " "], "--prompts[0]"),
            (&["--prompts", "/nowhere/prompts.txt"], "--prompts /nowhere"),
        ] {
            let message = job(line).unwrap_err();
            assert!(message.starts_with(flag), "{line:?}: {message}");
        }
        assert!(job(&["--prompt", "a", "--prompts", "b"]).unwrap_err().contains("--prompt"));
    }

    #[test]
    fn prompts_come_from_text_and_from_json() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("prompts.txt");
        std::fs::write(&text, "first\n\n second \n").unwrap();
        let prompts = job(&["--prompts", text.to_str().unwrap()]).unwrap().prompts;
        assert_eq!(prompts.iter().map(|p| p.prompt.as_str()).collect::<Vec<_>>(), ["first", " second "]);
        let json = dir.path().join("prompts.jsonl");
        std::fs::write(&json, "{\"prompt\": \"a\", \"language\": \"Tamil\", \"reference\": \"b\"}\n")
            .unwrap();
        let prompts = job(&["--prompts", json.to_str().unwrap()]).unwrap().prompts;
        assert_eq!(
            (prompts[0].language.as_deref(), prompts[0].reference.as_deref()),
            (Some("ta"), Some("b"))
        );
        std::fs::write(&json, "{\"prompt\": \"a\"}\n{\"text\": \"a\"}\n").unwrap();
        assert!(job(&["--prompts", json.to_str().unwrap()]).unwrap_err().contains("line 2"));
        std::fs::write(&text, "\n").unwrap();
        assert!(job(&["--prompts", text.to_str().unwrap()]).unwrap_err().contains("no prompt"));
    }
}
