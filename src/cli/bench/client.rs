//! The benchmark's HTTP clients: streamed completions of token ids, and `/health` beside them. Knows the wire
//! format and no engine.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use futures::future::try_join_all;
use serde::Deserialize;
use serde_json::{Value, json};

use super::figures::{ClientTimes, Round};

/// How long after one answer of `/health` the next is asked for.
const HEALTH_PAUSE: Duration = Duration::from_millis(20);

/// A server under load.
pub(super) struct Server {
    http: reqwest::Client,
    url: String,
}

/// One part of a streamed completion, as far as a benchmark reads it.
#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: usize,
}

impl Server {
    /// Clients of the server at this address, `http://host:port`.
    pub(super) fn new(url: &str) -> anyhow::Result<Self> {
        // Fails when somebody installed a provider before, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http =
            reqwest::Client::builder().no_proxy().build().context("the HTTP client cannot be built")?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned() })
    }

    /// The name under which the model without an adapter is served: the first in `/v1/models`.
    pub(super) async fn base_model(&self) -> anyhow::Result<String> {
        let models = self.get("/v1/models").await?;
        let name = models["data"][0]["id"].as_str().context("/v1/models names no model")?;
        Ok(name.to_owned())
    }

    /// The adapters that can be used.
    pub(super) async fn adapters(&self) -> anyhow::Result<Vec<String>> {
        let list = self.get("/adapter/list").await?;
        let adapters = list["adapters"].as_array().context("/adapter/list holds no list `adapters`")?;
        let usable = adapters.iter().filter(|a| a["error"].is_null());
        Ok(usable.filter_map(|a| a["name"].as_str().map(str::to_owned)).collect())
    }

    /// All prompts at once, client i with `models[i % len]`; and what `/health` took meanwhile, ms.
    pub(super) async fn round(
        &self,
        prompts: Vec<Vec<u32>>,
        new_tokens: usize,
        models: &[String],
    ) -> anyhow::Result<(Round, Vec<f64>)> {
        let started = Instant::now();
        let clients = prompts.iter().enumerate().map(|(client, prompt)| {
            self.complete(json!({
                "model": models[client % models.len()],
                "prompt": prompt,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": true,
                "stream": true,
                "stream_options": {"include_usage": true},
            }))
        });
        let mut health_ms = Vec::new();
        let clients = tokio::select! {
            clients = try_join_all(clients) => clients?,
            error = self.watch_health(&mut health_ms) => return Err(error),
        };
        Ok((Round { wall_s: started.elapsed().as_secs_f64(), clients }, health_ms))
    }

    /// Asks for `/health` again and again; ends only when that fails.
    async fn watch_health(&self, times_ms: &mut Vec<f64>) -> anyhow::Error {
        loop {
            let asked = Instant::now();
            if let Err(error) = self.get("/health").await {
                return error;
            }
            times_ms.push(asked.elapsed().as_secs_f64() * 1000.0);
            tokio::time::sleep(HEALTH_PAUSE).await;
        }
    }

    async fn complete(&self, request: Value) -> anyhow::Result<ClientTimes> {
        let sent = Instant::now();
        let url = format!("{}/v1/completions", self.url);
        let answer = self.http.post(&url).json(&request).send().await.with_context(|| url.clone())?;
        let status = answer.status();
        if !status.is_success() {
            bail!("{url} answered {status}: {}", answer.text().await.unwrap_or_default());
        }
        let mut times = ClientTimes::default();
        let mut lines = Lines::default();
        let mut last = None;
        let mut usage = None;
        let mut bytes = answer.bytes_stream();
        while let Some(chunk) = bytes.next().await {
            lines.push(&chunk.with_context(|| url.clone())?);
            let now = Instant::now();
            while let Some(line) = lines.next() {
                let Some(data) = data_of(&line) else { continue };
                if data == "[DONE]" {
                    times.total_ms = now.duration_since(sent).as_secs_f64() * 1000.0;
                    times.tokens = usage.context("the stream ended without usage")?;
                    // Tokens without text of their own (special ones) still ended with the stream.
                    if last.is_none() {
                        times.first_token_ms = times.total_ms;
                    }
                    return Ok(times);
                }
                let part: Part =
                    serde_json::from_str(data).with_context(|| format!("in the stream: {data}"))?;
                if let Some(error) = part.error {
                    bail!("{url} failed in the middle of the stream: {error}");
                }
                if let Some(told) = part.usage {
                    usage = Some(told.completion_tokens);
                }
                if part.choices.iter().any(|choice| !choice.text.is_empty()) {
                    let waited_ms = now.duration_since(last.unwrap_or(sent)).as_secs_f64() * 1000.0;
                    match last {
                        None => times.first_token_ms = waited_ms,
                        Some(_) => times.gaps_ms.push(waited_ms),
                    }
                    last = Some(now);
                }
            }
        }
        bail!("{url} ended the stream without [DONE]")
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.url);
        let answer = self.http.get(&url).send().await.with_context(|| url.clone())?;
        let answer = answer.error_for_status()?;
        answer.json().await.with_context(|| format!("{url} answered no JSON"))
    }
}

/// Cuts a byte stream into lines; what is not yet a whole line waits.
#[derive(Default)]
struct Lines {
    held: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// The next whole line, without its end.
    fn next(&mut self) -> Option<String> {
        let end = self.held.iter().position(|b| *b == b'\n')?;
        let line: Vec<u8> = self.held.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned())
    }
}

/// What a line of a server-sent event carries, if it is a `data:` line.
fn data_of(line: &str) -> Option<&str> {
    line.strip_prefix("data:").map(|data| data.strip_prefix(' ').unwrap_or(data))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn lines_are_cut_wherever_the_chunks_end() {
        let stream = "data: {\"a\":\"ह\"}\n\n: ping\r\ndata:[DONE]\n";
        for size in 1..stream.len() {
            let mut lines = Lines::default();
            let mut seen = Vec::new();
            for chunk in stream.as_bytes().chunks(size) {
                lines.push(chunk);
                while let Some(line) = lines.next() {
                    seen.push(line);
                }
            }
            assert_eq!(seen, ["data: {\"a\":\"ह\"}", "", ": ping", "data:[DONE]"]);
        }
        assert_eq!(data_of("data: x"), Some("x"));
        assert_eq!(data_of("data:x"), Some("x"));
        assert_eq!(data_of(": ping"), None);
    }

    /// Answers one connection with these bytes.
    async fn answering(answer: String) -> Server {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = connection.read(&mut request).await.unwrap();
            connection.write_all(answer.as_bytes()).await.unwrap();
        });
        Server::new(&url).unwrap()
    }

    fn stream(parts: &[&str]) -> String {
        let body: String = parts.iter().map(|part| format!("data: {part}\n\n")).collect();
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}")
    }

    #[tokio::test]
    async fn a_stream_is_timed_and_counted() {
        let parts = [
            r#"{"choices":[{"text":""}]}"#,
            r#"{"choices":[{"text":"one"}]}"#,
            r#"{"choices":[{"text":" two"}],"usage":null}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6}}"#,
            "[DONE]",
        ];
        let times = answering(stream(&parts)).await.complete(json!({})).await.unwrap();
        assert_eq!((times.tokens, times.gaps_ms.len()), (5, 1));
        assert!(times.first_token_ms > 0.0 && times.total_ms >= times.first_token_ms);
    }

    #[tokio::test]
    async fn an_answer_of_special_tokens_has_its_end_for_its_first() {
        let parts = [r#"{"choices":[],"usage":{"completion_tokens":3}}"#, "[DONE]"];
        let times = answering(stream(&parts)).await.complete(json!({})).await.unwrap();
        assert_eq!((times.tokens, times.first_token_ms), (3, times.total_ms));
    }

    #[tokio::test]
    async fn streams_that_fail_are_no_measurement() {
        let cases = [
            (stream(&[r#"{"choices":[{"text":"x"}]}"#]), "without [DONE]"),
            (stream(&[r#"{"choices":[{"text":"x"}]}"#, "[DONE]"]), "without usage"),
            (stream(&[r#"{"error":{"message":"out of memory"}}"#]), "out of memory"),
            (stream(&["{"]), "in the stream"),
            ("HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull".into(), "429"),
        ];
        for (answer, message) in cases {
            let error = answering(answer).await.complete(json!({})).await.unwrap_err();
            assert!(format!("{error:#}").contains(message), "{error:#}");
        }
    }
}
