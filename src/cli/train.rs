//! `gurukul train`: one training job in this process, without a server. The job is kept in the data folder as a
//! server's would be, so that it goes on after Ctrl-C or a crash with `--resume`.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::adapters;
use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::config::adapter::AdapterConfig;
use crate::config::connectors::Connectors;
use crate::jobs::FolderLock;
use crate::train::{self, Context, Ending, Progress, Reporter, Stop, TrainJob};

/// What is taught, and under which name.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Settings of the training; configs/adapter_config.yaml when left away
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Source of the records, by its name in the connectors file
    #[arg(long, value_name = "NAME", required_unless_present = "resume")]
    source: Option<String>,
    /// Name of the adapter; the source's when left away
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// File with the sources; configs/mcp_connectors.yml when left away
    #[arg(long, value_name = "FILE")]
    connectors: Option<PathBuf>,
    /// Examples taken from the source
    #[arg(long, value_name = "COUNT")]
    max_samples: Option<usize>,
    /// A setting of the training, before the file's; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with a job that was stopped
    #[arg(
        long,
        value_name = "JOB",
        conflicts_with_all = ["config", "source", "adapter", "connectors", "max_samples", "set"]
    )]
    resume: Option<String>,
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let jobs_dir = settings.data_dir.join("jobs");
    let (id, job) = match &args.resume {
        Some(id) => (id.clone(), kept(&jobs_dir, id).context(CannotStart)?),
        None => (uuid::Uuid::now_v7().simple().to_string(), args.job(settings).context(CannotStart)?),
    };
    let _folder = FolderLock::take(&settings.data_dir)
        .context(
            "gurukul train has the data folder for itself; a running server has POST /adapter/train-lite",
        )
        .context(CannotStart)?;
    let runtime = super::runtime()?;
    let loaded = runtime.block_on(app::load(settings))?;
    let context = Context {
        engine: loaded.engine.clone(),
        tokenizer: loaded.tokenizer.clone(),
        adapters: loaded.adapters.clone(),
        model_id: loaded.model_id.clone(),
        jobs_dir,
    };
    let outcome = runtime.block_on(teach(&context, &id, &job, args.resume.is_none()));
    drop(loaded);
    let engine = context.engine.clone();
    drop(context);
    engine.shutdown();
    outcome
}

async fn teach(context: &Context, id: &str, job: &TrainJob, new: bool) -> anyhow::Result<()> {
    train::job::check(context, job).await.context(CannotStart)?;
    if new {
        keep(&context.jobs_dir, id, job).context(CannotStart)?;
    }
    let terminal = Terminal::new();
    terminal.line(format!("job {id}: adapter {} from source {}", job.adapter_name, job.source_name));
    let (stop, stopping) = watch::channel(Stop::No);
    let signal = app::stop_signal()?;
    let running = train::job::run(context, id, job, &terminal, stopping);
    let mut running = std::pin::pin!(running);
    let ending = tokio::select! {
        ending = &mut running => ending,
        again = signal => {
            terminal.line("stopping: writing a checkpoint; once more to stop without one".into());
            // The job holds the receiver for as long as it runs.
            let _ = stop.send(Stop::Pause);
            tokio::select! {
                ending = &mut running => ending,
                () = again => bail!("stopped in the middle; go on with gurukul train --resume {id}"),
            }
        }
    };
    terminal.bar.finish_and_clear();
    match ending.with_context(|| format!("job {id}"))? {
        Ending::Completed { progress, generation } => {
            let eval =
                progress.eval_loss.map_or(String::new(), |loss| format!(", evaluation loss {loss:.4}"));
            let line = format!(
                "adapter {} generation {generation}: {} steps, loss {:.4}{eval}\n",
                job.adapter_name, progress.step, progress.loss
            );
            io::stdout().lock().write_all(line.as_bytes())?;
        }
        Ending::Cancelled { step } | Ending::Paused { step } => {
            terminal.line(format!("stopped after step {step}; go on with gurukul train --resume {id}"));
        }
    }
    Ok(())
}

impl Args {
    /// The job that the flags and the files describe.
    fn job(&self, settings: &Settings) -> anyhow::Result<TrainJob> {
        let source_name = self.source.clone().context("--source is missing")?;
        let adapter_name = match &self.adapter {
            Some(name) => name.clone(),
            None => source_name.to_lowercase(),
        };
        adapters::check_name(&adapter_name).context("--adapter")?;
        let (folder, file) = located(self.connectors.as_deref(), &settings.configs_dir, "--connectors")?;
        let connectors =
            Connectors::load(&folder, file.as_deref()).map_err(|e| anyhow!("--connectors: {e}"))?;
        let source = connectors.source(&source_name).map_err(|e| anyhow!("--source: {e}"))?.clone();
        let (folder, file) = located(self.config.as_deref(), &settings.configs_dir, "--config")?;
        let config = AdapterConfig::load(&folder, file.as_deref(), &self.overrides()?)
            .map_err(|e| anyhow!("training settings: {e}"))?;
        Ok(TrainJob { adapter_name, source_name, source, config })
    }

    /// `--set` and `--max-samples`, values as in the settings file.
    fn overrides(&self) -> anyhow::Result<Map<String, Value>> {
        let mut overrides = given(&self.set)?;
        if let Some(samples) = self.max_samples {
            overrides.insert("max_samples".into(), samples.into());
        }
        Ok(overrides)
    }
}

/// What `--set key=value` says, each time that it stands there.
pub(super) fn given(set: &[String]) -> anyhow::Result<Map<String, Value>> {
    let mut overrides = Map::new();
    for setting in set {
        let (key, value) = setting
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .with_context(|| format!("--set {setting}: write --set key=value"))?;
        let value: Value = serde_yaml::from_str(value).with_context(|| format!("--set {setting}"))?;
        overrides.insert(key.to_owned(), value);
    }
    Ok(overrides)
}

/// Folder and name of a file that a command line may name anywhere; without it the configs folder.
pub(super) fn located(
    file: Option<&Path>,
    configs_dir: &Path,
    flag: &str,
) -> anyhow::Result<(PathBuf, Option<String>)> {
    let Some(file) = file else { return Ok((configs_dir.to_owned(), None)) };
    let whole = file.canonicalize().with_context(|| format!("{flag} {}", file.display()))?;
    let name = whole.file_name().and_then(|name| name.to_str());
    let (Some(folder), Some(name)) = (whole.parent(), name) else {
        bail!("{flag} {} is not a file", file.display());
    };
    Ok((folder.to_owned(), Some(name.to_owned())))
}

const JOB: &str = "job.json";

/// Keeps a job beside its checkpoints.
fn keep(jobs_dir: &Path, id: &str, job: &TrainJob) -> anyhow::Result<()> {
    let (folder, made) = (jobs_dir.join(id), jobs_dir.join(format!(".writing-{id}")));
    let text = serde_json::to_string_pretty(job)?;
    adapters::make_folder(&made, &folder, |folder| adapters::write_file(&folder.join(JOB), text.as_bytes()))
        .with_context(|| format!("the job cannot be kept in {}", folder.display()))
}

/// The job that `--resume` names.
fn kept(jobs_dir: &Path, id: &str) -> anyhow::Result<TrainJob> {
    // It becomes a path.
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        bail!("--resume {id:?} is no job's id");
    }
    let path = jobs_dir.join(id).join(JOB);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("--resume {id}: no such job, {} cannot be read", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("--resume {id}: {}", path.display()))
}

/// Log lines and a bar on stderr; the bar only where somebody watches.
struct Terminal {
    bar: ProgressBar,
}

impl Terminal {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar }
    }

    fn line(&self, line: String) {
        self.bar.suspend(|| {
            // Nobody is left to tell when stderr is closed.
            let _ = writeln!(io::stderr(), "{line}");
        });
    }
}

impl Reporter for Terminal {
    fn log(&self, line: String) {
        self.line(line);
    }

    fn progress(&self, progress: &Progress) {
        let eta = std::time::Duration::from_secs(progress.eta_s.clamp(0.0, 1e9) as u64);
        self.bar.set_length(progress.total_steps);
        self.bar.set_position(progress.step);
        self.bar.set_message(format!(
            "loss {:.4}, {:.0} tokens/s, {} left",
            progress.loss,
            progress.tokens_per_s,
            humantime::format_duration(eta)
        ));
    }

    fn checkpointed(&self, _: u64) {}
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

    fn parse(line: &[&str]) -> Result<Args, String> {
        let parsed = CommandLine::try_parse_from(["train"].iter().chain(line));
        parsed.map(|line| line.args).map_err(|e| e.to_string())
    }

    #[test]
    fn settings_are_written_as_in_the_file() {
        let args = parse(&[
            "--source",
            "s",
            "--set",
            "r=4",
            "--set",
            "learning_rate=1e-3",
            "--set",
            "lr_scheduler=linear",
            "--set",
            "target_modules=[q_proj, v_proj]",
            "--set",
            "max_steps=null",
            "--max-samples",
            "7",
        ]);
        let overrides = args.unwrap().overrides().unwrap();
        let expected = serde_json::json!({
            "r": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "linear",
            "target_modules": ["q_proj", "v_proj"],
            "max_steps": null,
            "max_samples": 7,
        });
        assert_eq!(Value::Object(overrides), expected);
        for bad in ["r", "=4", "r=[", "r={"] {
            let error = parse(&["--source", "s", "--set", bad]).unwrap().overrides().unwrap_err();
            assert!(error.to_string().contains("--set"), "{error}");
        }
    }

    #[test]
    fn a_job_goes_on_as_it_was() {
        assert!(parse(&["--resume", "x"]).is_ok());
        assert!(parse(&["--resume", "x", "--set", "r=1"]).is_err(), "its settings are fixed");
        assert!(parse(&[]).unwrap_err().contains("--source"));
    }

    #[test]
    fn a_kept_job_is_read_back_and_ids_are_no_paths() {
        let dir = tempfile::tempdir().unwrap();
        let job = TrainJob {
            adapter_name: "a".into(),
            source_name: "s".into(),
            source: crate::data::SourceConfig::local("data/*.jsonl"),
            config: AdapterConfig { learning_rate: 3e-4, ..AdapterConfig::default() },
        };
        keep(dir.path(), "id-1", &job).unwrap();
        assert_eq!(kept(dir.path(), "id-1").unwrap(), job);
        assert!(keep(dir.path(), "id-1", &job).is_err(), "an id is used once");
        for id in ["", "..", "../id-1", "id-1/.", "/etc", "other"] {
            let error = kept(dir.path(), id).unwrap_err().to_string();
            assert!(error.contains("--resume"), "{error}");
        }
        std::fs::write(dir.path().join("id-1").join(JOB), "{}").unwrap();
        assert!(kept(dir.path(), "id-1").is_err());
    }

    #[test]
    fn a_command_line_names_files_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mine.yaml");
        std::fs::write(&file, "r: 2\n").unwrap();
        let (folder, name) = located(Some(&file), Path::new("configs"), "--config").unwrap();
        assert_eq!(AdapterConfig::load(&folder, name.as_deref(), &Map::new()).unwrap().r, 2);
        let none = located(None, Path::new("configs"), "--config").unwrap();
        assert_eq!(none, (PathBuf::from("configs"), None));
        let missing = located(Some(Path::new("nowhere.yaml")), Path::new("configs"), "--config");
        assert!(missing.unwrap_err().to_string().contains("--config nowhere.yaml"));
    }
}
