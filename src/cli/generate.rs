//! `gurukul generate "prompt"`: one answer, streamed to stdout. No HTTP is involved.

use std::io::{self, Read as _, Write as _};

use anyhow::{Context as _, bail};

use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::engine::{Event, GenerateRequest, Sampling};
use crate::model::chat_template::{GenerationPrompt, Message};
use crate::model::tokenizer::{AddSpecial, Tokenizer};

/// The prompt, and how it is answered.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// The prompt; - reads it from stdin
    prompt: String,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 100, value_name = "TOKENS")]
    max_new_tokens: usize,
    /// 0 takes the most likely token each time
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true)]
    temperature: f32,
    /// Choose among the k most likely tokens; 0 among all
    #[arg(long, default_value_t = 50, value_name = "K")]
    top_k: usize,
    /// Choose among the tokens that together have this probability; 1 among all
    #[arg(long, default_value_t = 0.9, allow_negative_numbers = true, value_name = "SHARE")]
    top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "SHARE")]
    min_p: f32,
    /// Above 1: less likely to repeat what prompt and answer hold
    #[arg(long, default_value_t = 1.1, allow_negative_numbers = true, value_name = "FACTOR")]
    repetition_penalty: f32,
    /// Seed of the random choices; another one each time when left away
    #[arg(long)]
    seed: Option<u64>,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Adapter in the data folder's adapters/
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Apply the model's chat template: the prompt is what the user says
    #[arg(long)]
    chat: bool,
}

impl Args {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0),
            stream: 0,
        }
    }

    /// The prompt's text; what cannot be is refused before a model is loaded.
    fn prompt(&self) -> anyhow::Result<String> {
        // The engine's fields have the names of the flags, but for the marks between the words.
        self.sampling()
            .validate()
            .map_err(|e| anyhow::anyhow!("--{}", e.to_string().replacen('_', "-", 1)))?;
        if self.max_new_tokens == 0 {
            bail!("--max-new-tokens must be at least 1");
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("--stop must not be empty");
        }
        let text = if self.prompt == "-" {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("the prompt on stdin cannot be read")?;
            text
        } else {
            self.prompt.clone()
        };
        if text.is_empty() {
            bail!("the prompt is empty");
        }
        Ok(text)
    }
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let text = args.prompt().context(CannotStart)?;
    let runtime = super::runtime()?;
    let loaded = runtime.block_on(app::load(settings))?;
    let outcome = runtime.block_on(answer(args, text, &loaded));
    loaded.engine.shutdown();
    outcome
}

async fn answer(args: &Args, text: String, loaded: &app::Loaded) -> anyhow::Result<()> {
    let adapter = match &args.adapter {
        Some(name) => Some(loaded.adapters.acquire(name).await.context("--adapter").context(CannotStart)?),
        None => None,
    };
    let request = GenerateRequest {
        sampling: args.sampling(),
        stop: args.stop.clone(),
        adapter,
        ..GenerateRequest::greedy(
            tokens(args, text, &loaded.tokenizer).context(CannotStart)?,
            args.max_new_tokens,
        )
    };
    let mut generation = loaded.engine.generate(request).context(CannotStart)?;
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token { text, .. } => {
                if print(&text)? == Reader::Gone {
                    return Ok(());
                }
            }
            Event::Finished { text, .. } => {
                print(&text)?;
                print("\n")?;
                return Ok(());
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine stopped in the middle of the answer")
}

fn tokens(args: &Args, text: String, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
    if !args.chat {
        return Ok(tokenizer.encode(&text, AddSpecial::Yes)?);
    }
    let template = tokenizer.chat_template().context("the model has no chat template; leave --chat away")?;
    let message = Message { role: "user".into(), content: text };
    let text = template.render(&[message], GenerationPrompt::Add)?;
    // The template writes the special tokens itself.
    Ok(tokenizer.encode(&text, AddSpecial::No)?)
}

/// Whether somebody still reads stdout.
#[derive(PartialEq, Eq)]
enum Reader {
    There,
    /// `gurukul generate ... | head`: no failure.
    Gone,
}

fn print(text: &str) -> io::Result<Reader> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error),
    }
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

    fn args(line: &[&str]) -> Args {
        CommandLine::try_parse_from(["generate"].iter().chain(line)).unwrap().args
    }

    #[test]
    fn bad_values_name_their_flag() {
        for (line, flag) in [
            (["x", "--temperature", "-1"], "--temperature"),
            (["x", "--top-p", "2"], "--top-p"),
            (["x", "--min-p", "1"], "--min-p"),
            (["x", "--repetition-penalty", "0"], "--repetition-penalty"),
            (["x", "--max-new-tokens", "0"], "--max-new-tokens"),
            (["x", "--stop", ""], "--stop"),
            (["", "--seed", "1"], "the prompt is empty"),
        ] {
            let message = args(&line).prompt().unwrap_err().to_string();
            assert!(message.starts_with(flag), "{message}");
        }
        assert_eq!(args(&["hello"]).prompt().unwrap(), "hello");
    }

    #[test]
    fn a_seed_is_kept_and_none_is_another_each_time() {
        assert_eq!(args(&["x", "--seed", "7"]).sampling().seed, 7);
        assert_ne!(args(&["x"]).sampling().seed, args(&["x"]).sampling().seed);
    }
}
