//! The command line: flags to resolved settings, log lines to stderr, one file a sub-command, errors to exit
//! codes (2: usage, settings, model, start-up; 1: a failure while running). The work itself is elsewhere.

mod bench;
mod check_config;
mod collect;
mod completions;
mod episodes;
mod eval;
mod generate;
mod health;
mod local;
mod logging;
mod man;
mod merge;
mod plan;
mod row;
mod serve;
mod smoke;
mod sources;
mod train;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};

use crate::adapters::sync_folder;
use crate::app::CannotStart;
use crate::config::{ServerFlags, Settings};

const AFTER_HELP: &str = "\
Every setting can be given three ways: as a flag (--max-batch 4), as a variable (GURUKUL_MAX_BATCH=4), as a key \
of configs/server.yaml (max_batch: 4). The first that says something counts. `gurukul check-config` shows what is \
in force. RUST_LOG chooses the log level.

Models come from a folder or from a hub (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE):
  gurukul serve --model ./my-model
  gurukul serve --model Qwen/Qwen2.5-0.5B-Instruct";

/// Serves a small language model over HTTP, each request with the adapter that it names.
#[derive(clap::Parser)]
#[command(name = "gurukul", version, after_help = AFTER_HELP)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: ServerFlags,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Answer over HTTP (the default)
    Serve,
    /// Answer one prompt on the terminal
    Generate(generate::Args),
    /// Train an adapter, without a server
    Train(train::Args),
    /// Answer prompts, reward the answers and log them as episodes, without a server
    Collect(Box<collect::Args>),
    /// Look at the logged episodes
    Episodes(episodes::Args),
    /// Write the model with an adapter's change in its weights, as a folder that transformers loads
    Merge(merge::Args),
    /// Ask a server whether it is ready: exit code 0 or 1
    Health(health::Args),
    /// Ask a server ten questions in ten languages and judge the answers
    Smoke(smoke::Args),
    /// Measure a model on prompts with known completions: loss, chrF, exact matches
    Eval(eval::Args),
    /// Look at the sources of training data: list them, peek into one, check one
    Sources(sources::Args),
    /// Tell what a model and a training job would take of a machine's memory
    Plan(plan::Args),
    /// Show the settings in force and what the model folder holds
    CheckConfig,
    /// Measure, and print the figures as JSON
    Bench(bench::Args),
    /// Print a script that completes this command line in a shell
    Completions(completions::Args),
    /// Print the manual page, or write a page for each sub-command into a folder
    Man(man::Args),
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let line = CommandLine::parse();
    match run(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when stderr is closed.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::from(if error.is::<CannotStart>() { 2 } else { 1 })
        }
    }
}

fn run(line: CommandLine) -> anyhow::Result<()> {
    let command = line.command.unwrap_or(Command::Serve);
    // These two describe the command line, whatever state the settings are in.
    match &command {
        Command::Completions(args) => return completions::run(args, CommandLine::command()),
        Command::Man(args) => return man::run(args, CommandLine::command()),
        _ => {}
    }
    let settings = Settings::resolve(&line.flags).map_err(|e| e.context(CannotStart))?;
    // Flushed when it is dropped, after all work.
    let _logging = logging::start(settings.log)?;
    match command {
        Command::Serve => serve::run(&settings),
        Command::Generate(args) => generate::run(&args, &settings),
        Command::Train(args) => train::run(&args, &settings),
        Command::Collect(args) => collect::run(&args, &settings),
        Command::Episodes(args) => episodes::run(&args, &settings),
        Command::Merge(args) => merge::run(&args, &settings),
        Command::Health(args) => health::run(&args, &settings),
        Command::Smoke(args) => smoke::run(&args, settings),
        Command::Eval(args) => eval::run(&args, &settings),
        Command::Sources(args) => sources::run(&args, &settings),
        Command::Plan(args) => plan::run(&args, &settings),
        Command::CheckConfig => check_config::run(&settings),
        Command::Bench(args) => bench::run(args, settings),
        Command::Completions(_) | Command::Man(_) => unreachable!("done before any setting was read"),
    }
}

/// The runtime of a sub-command. Two workers: connections need little, and the compute threads want the cores.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| anyhow::Error::new(e).context("no thread for the runtime").context(CannotStart))
}

/// Writes a report where `--out` says, whole or not at all.
fn write_report(path: &Path, text: &str) -> anyhow::Result<()> {
    stream_report(path, |file| Ok(file.write_all(text.as_bytes())?))
}

/// Has a report written where `--out` says, whole or not at all.
fn stream_report(
    path: &Path,
    write: impl FnOnce(&mut dyn io::Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let name = path.file_name().with_context(|| format!("--out {} is no file", path.display()))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = folder.join(format!(".writing-{}-{}", uuid::Uuid::new_v4().simple(), name.display()));
    let make = || {
        let mut file = io::BufWriter::new(File::create(&made)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&made, path)?;
        Ok(sync_folder(folder)?)
    };
    make()
        .inspect_err(|_: &anyhow::Error| drop(std::fs::remove_file(&made)))
        .with_context(|| format!("--out {}", path.display()))
}

/// Lines to stdout. Whoever reads no further (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
