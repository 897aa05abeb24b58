//! `gurukul smoke`: asks a server for translations into ten languages, one after the other, and judges what it
//! answers by `generated_text`. What is asked is in `prompts`, how it is judged and shown in `report`.

mod prompts;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use reqwest::StatusCode;
use reqwest::header::RETRY_AFTER;
use serde_json::{Value, json};

use self::prompts::Prompt;
use self::report::{Judged, failed, judge, markdown, table};
use super::local;
use crate::adapters::check_name;
use crate::app::CannotStart;
use crate::config::Settings;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for one answer: a large model on a slow machine takes minutes.
const ANSWER: Duration = Duration::from_secs(600);
/// How often a server that is full is asked again.
const ATTEMPTS: usize = 5;
/// Longest pause before that, whatever the server says.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whom to ask, and what counts as good.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// A server that runs already, instead of one in this process with --model: http://127.0.0.1:8110
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Prompts as test_prompts/prompts_10.json has them; those ten when left away
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Adapter to answer with
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Write the report there too, as Markdown
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Exit with 1 if fewer pass; all must when left away
    #[arg(long, value_name = "COUNT")]
    min_pass: Option<usize>,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 100, value_name = "TOKENS")]
    max_new_tokens: usize,
    /// Key that the server asks for
    #[arg(long, value_name = "KEY", env = "GURUKUL_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

/// Asks, shows the table and writes the report.
///
/// # Errors
/// [`CannotStart`]: prompts that cannot be used, a server that is not there or refuses, a model that does not load.
/// Without it: fewer than `--min-pass` passed.
pub(super) fn run(args: &Args, settings: Settings) -> anyhow::Result<()> {
    let prompts = prompts::load(args.prompts.as_deref()).context(CannotStart)?;
    let least = args.least(prompts.len()).context(CannotStart)?;
    let runtime = super::runtime()?;
    let (about, judged) = match &args.url {
        Some(url) => {
            let server = Server::new(url, args.api_key.as_deref()).context(CannotStart)?;
            runtime.block_on(server.ask_all(args, &prompts))?
        }
        None => local::with_app(runtime, settings, async |app| {
            let server = Server::new(app.url(), args.api_key.as_deref())?;
            local::serve_meanwhile(app, server.ask_all(args, &prompts)).await
        })?,
    };
    let passed = judged.iter().filter(|judged| judged.fault.is_none()).count();
    let verdict = format!("{passed} of {} passed, {least} must", judged.len());
    super::print(&format!("{}\n{verdict}\n", table(&judged)))?;
    if let Some(out) = &args.out {
        super::write_report(out, &markdown(&about, &verdict, &judged))?;
    }
    ensure!(passed >= least, "smoke test: {verdict} (--min-pass)");
    Ok(())
}

impl Args {
    /// How many must pass; what cannot be is refused before anything runs.
    fn least(&self, prompts: usize) -> anyhow::Result<usize> {
        if let Some(name) = &self.adapter {
            check_name(name).context("--adapter")?;
        }
        ensure!(self.max_new_tokens > 0, "--max-new-tokens must be at least 1");
        let least = self.min_pass.unwrap_or(prompts);
        ensure!(least <= prompts, "--min-pass {least} is more than the {prompts} prompts that there are");
        Ok(least)
    }
}

/// The server that is asked.
struct Server {
    http: reqwest::Client,
    url: String,
    api_key: Option<String>,
}

/// What a request came to.
enum Answer {
    Text(String),
    /// The server failed at this one; others may do better.
    Failed(String),
}

impl Server {
    fn new(url: &str, api_key: Option<&str>) -> anyhow::Result<Self> {
        let parsed = reqwest::Url::parse(url).with_context(|| format!("--url {url}"))?;
        if !matches!(parsed.scheme(), "http" | "https") {
            bail!("--url {url}: write http://host:port");
        }
        // Fails when somebody installed a provider before, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT).timeout(ANSWER);
        let http = http.build().context("the HTTP client cannot be built")?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned(), api_key: api_key.map(str::to_owned) })
    }

    /// What the server says of itself, and every prompt's answer judged.
    async fn ask_all(&self, args: &Args, prompts: &[Prompt]) -> anyhow::Result<(String, Vec<Judged>)> {
        let (status, health) = self.send(self.http.get(format!("{}/health", self.url))).await?;
        let model = health["model"]["id"].as_str().map(str::to_owned);
        let model = model.with_context(|| {
            format!("{}/health answered {status} without the model's name; is it a gurukul server?", self.url)
        });
        let mut about = format!("model {}", model.context(CannotStart)?);
        if let Some(adapter) = &args.adapter {
            about += &format!(", adapter {adapter}");
        }
        let mut judged = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let asked = Instant::now();
            let answer = self.ask(args, prompt).await?;
            let latency_s = asked.elapsed().as_secs_f64();
            judged.push(match answer {
                Answer::Text(text) => judge(prompt, text, latency_s),
                Answer::Failed(reason) => failed(prompt, reason, latency_s),
            });
        }
        Ok((about, judged))
    }

    async fn ask(&self, args: &Args, prompt: &Prompt) -> anyhow::Result<Answer> {
        let mut body = json!({
            "prompt": prompt.prompt,
            "language": prompt.language.code(),
            "max_new_tokens": args.max_new_tokens,
            "do_sample": false,
        });
        if let Some(adapter) = &args.adapter {
            body["adapter"] = json!(adapter);
        }
        let url = format!("{}/generate-lite", self.url);
        let (mut status, mut answer) = (StatusCode::TOO_MANY_REQUESTS, Value::Null);
        for _ in 0..ATTEMPTS {
            (status, answer) = self.send(self.http.post(&url).json(&body)).await?;
            if status != StatusCode::TOO_MANY_REQUESTS {
                break;
            }
        }
        if status.is_success() {
            let text = answer["generated_text"]
                .as_str()
                .with_context(|| format!("{url} answered without generated_text; is it a gurukul server?"));
            return Ok(Answer::Text(text.context(CannotStart)?.to_owned()));
        }
        let message = answer["error"]["message"].as_str().unwrap_or("no reason is given");
        let reason = format!("the server answered {status}: {message}");
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Ok(Answer::Failed(reason));
        }
        // The others would be refused as well: no such adapter, no key.
        Err(anyhow!("prompt {} to {url}: {reason}", prompt.id).context(CannotStart))
    }

    /// Status and JSON of an answer, null where it is none. A server that is full is given the time it asks for.
    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<(StatusCode, Value)> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let down = || {
            format!("no server answers at {}; start one with gurukul serve, or leave --url away", self.url)
        };
        let answer = request.send().await.with_context(down).context(CannotStart)?;
        let status = answer.status();
        let pause = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let text = answer.text().await.with_context(down).context(CannotStart)?;
        if status == StatusCode::TOO_MANY_REQUESTS {
            tokio::time::sleep(Duration::from_secs(pause.unwrap_or(1)).min(LONGEST_PAUSE)).await;
        }
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
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
        CommandLine::try_parse_from(["smoke"].iter().chain(line)).unwrap().args
    }

    #[test]
    fn all_must_pass_unless_told_otherwise() {
        assert_eq!(args(&[]).least(10).unwrap(), 10);
        assert_eq!(args(&["--min-pass", "0"]).least(10).unwrap(), 0);
        for (line, part) in [
            (&["--min-pass", "11"][..], "--min-pass 11"),
            (&["--adapter", "../etc"], "--adapter"),
            (&["--max-new-tokens", "0"], "--max-new-tokens"),
        ] {
            let error = args(line).least(10).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }

    #[test]
    fn addresses_are_checked_before_they_are_used() {
        for url in ["", "localhost:8110", "ftp://x", "http://"] {
            let error = Server::new(url, None).err().unwrap();
            assert!(format!("{error:#}").contains("--url"), "{error:#}");
        }
        assert_eq!(Server::new("http://127.0.0.1:1/", None).unwrap().url, "http://127.0.0.1:1");
    }
}
