//! The load: how many clients ask for what, with which prompts, and a round of it on the engine itself.

use std::time::Instant;

use anyhow::{bail, ensure};
use futures::future::try_join_all;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use super::figures::{ClientTimes, Round};
use crate::adapters::check_name;
use crate::engine::{AdapterHandle, EngineHandle, Event, GenerateRequest, Generation};

/// Clients and what each of them asks for.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Workload {
    /// Clients at once; several counts are measured in turn
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_name = "CLIENTS")]
    pub(super) concurrency: Vec<usize>,
    /// Tokens of each prompt, drawn at random
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    pub(super) prompt_tokens: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    pub(super) new_tokens: usize,
    /// Measurements of which the median is told; one more warms up
    #[arg(long, default_value_t = 3)]
    pub(super) runs: usize,
    /// Measure again with adapters, client by client in turn: how many, or their names
    #[arg(long, default_value = "0", value_parser = parse_adapters, value_name = "COUNT|NAMES")]
    pub(super) adapters: AdapterChoice,
    /// Seed of the prompts
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

/// `--adapters`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AdapterChoice {
    /// The base model alone.
    None,
    /// The first so many that fit the model.
    First(usize),
    /// These.
    Names(Vec<String>),
}

fn parse_adapters(text: &str) -> Result<AdapterChoice, String> {
    match text.parse::<usize>() {
        Ok(0) => Ok(AdapterChoice::None),
        Ok(count) => Ok(AdapterChoice::First(count)),
        Err(_) => {
            let names: Vec<String> = text.split(',').map(str::to_owned).collect();
            names.iter().try_for_each(|name| check_name(name)).map_err(|e| e.to_string())?;
            Ok(AdapterChoice::Names(names))
        }
    }
}

impl Workload {
    /// Refuses what cannot be measured, before a model is loaded.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.concurrency.contains(&0), "--concurrency must hold counts of at least 1");
        ensure!(self.prompt_tokens > 0, "--prompt-tokens must be at least 1");
        ensure!(self.new_tokens > 1, "--new-tokens must be at least 2: decoding begins with the second");
        ensure!(self.runs > 0, "--runs must be at least 1");
        Ok(())
    }
}

/// Random prompts: never the same twice, the same sequence for the same seed.
pub(super) struct Prompts {
    random: ChaCha8Rng,
    vocab_size: usize,
    without: Vec<u32>,
    tokens: usize,
}

impl Prompts {
    pub(super) fn new(workload: &Workload, vocab_size: usize, without: &[u32]) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(workload.seed),
            vocab_size,
            without: without.to_vec(),
            tokens: workload.prompt_tokens,
        }
    }

    /// One prompt a client.
    pub(super) fn draw(&mut self, clients: usize) -> Vec<Vec<u32>> {
        (0..clients).map(|_| (0..self.tokens).map(|_| self.token()).collect()).collect()
    }

    fn token(&mut self) -> u32 {
        // A multiplication instead of a remainder: each id is as likely as any other, to within 2^-32.
        let drawn = (u64::from(self.random.next_u32()) * self.vocab_size as u64) >> 32;
        let token = drawn as u32;
        // An end token inside a prompt would be no prompt that a user sends.
        if self.without.contains(&token) && self.vocab_size > self.without.len() {
            self.token()
        } else {
            token
        }
    }
}

/// All prompts at once on the engine; client i has adapter i modulo their number, or none.
pub(super) async fn round(
    engine: &EngineHandle,
    prompts: Vec<Vec<u32>>,
    new_tokens: usize,
    adapters: &[AdapterHandle],
) -> anyhow::Result<Round> {
    let started = Instant::now();
    let mut running = Vec::with_capacity(prompts.len());
    for (client, prompt) in prompts.into_iter().enumerate() {
        let adapter = adapters.get(client % adapters.len().max(1)).cloned();
        let request =
            GenerateRequest { ignore_eos: true, adapter, ..GenerateRequest::greedy(prompt, new_tokens) };
        running.push(follow(engine.generate(request)?, Instant::now()));
    }
    let clients = try_join_all(running).await?;
    Ok(Round { wall_s: started.elapsed().as_secs_f64(), clients })
}

async fn follow(mut generation: Generation, sent: Instant) -> anyhow::Result<ClientTimes> {
    let mut times = ClientTimes::default();
    let mut last = sent;
    while let Some(event) = generation.events.recv().await {
        let now = Instant::now();
        match event {
            Event::Token { .. } => {
                let waited_ms = now.duration_since(last).as_secs_f64() * 1000.0;
                if times.tokens == 0 {
                    times.first_token_ms = waited_ms
                } else {
                    times.gaps_ms.push(waited_ms)
                }
                times.tokens += 1;
                last = now;
            }
            Event::Finished { .. } => {
                times.total_ms = now.duration_since(sent).as_secs_f64() * 1000.0;
                return Ok(times);
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine stopped in the middle of an answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            concurrency: vec![1],
            prompt_tokens: 500,
            new_tokens: 2,
            runs: 1,
            adapters: AdapterChoice::None,
            seed: 7,
        }
    }

    #[test]
    fn prompts_follow_their_seed() {
        let draw = |seed| Prompts::new(&Workload { seed, ..workload() }, 100, &[2]).draw(3);
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let drawn = draw(7);
        assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [500; 3]);
        assert_ne!(drawn[0], drawn[1]);
        assert!(drawn.iter().flatten().all(|&t| t < 100 && t != 2));
        assert!(drawn.iter().flatten().any(|&t| t == 99) && drawn.iter().flatten().any(|&t| t == 0));
    }

    #[test]
    fn a_vocabulary_of_end_tokens_alone_still_ends() {
        assert_eq!(Prompts::new(&workload(), 1, &[0]).draw(1)[0][0], 0);
    }

    #[test]
    fn impossible_loads_name_their_flag() {
        for (bad, flag) in [
            (Workload { concurrency: vec![1, 0], ..workload() }, "--concurrency"),
            (Workload { prompt_tokens: 0, ..workload() }, "--prompt-tokens"),
            (Workload { new_tokens: 1, ..workload() }, "--new-tokens"),
            (Workload { runs: 0, ..workload() }, "--runs"),
        ] {
            assert!(bad.check().unwrap_err().to_string().starts_with(flag));
        }
        workload().check().unwrap();
    }

    #[test]
    fn adapters_are_a_count_or_names() {
        assert_eq!(parse_adapters("0"), Ok(AdapterChoice::None));
        assert_eq!(parse_adapters("3"), Ok(AdapterChoice::First(3)));
        assert_eq!(parse_adapters("a,b"), Ok(AdapterChoice::Names(vec!["a".into(), "b".into()])));
        for bad in ["", "a,", "../x", "A"] {
            assert!(parse_adapters(bad).is_err(), "{bad:?}");
        }
    }
}
