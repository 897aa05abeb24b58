//! `http`: what a service says. `POST {"prompt", "output", "language", "reference", "finished"}` to the address of the
//! settings, `{"reward": r}` back, r from 0 to 1; other fields of the answer are passed over. Connections that fail,
//! time-outs, 408, 429 and 5xx are tried again after a growing wait with jitter. A service that fails in the end, or
//! says anything but such a number, is an error, and never 0.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use reqwest::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::{RewardError, Sample};
use crate::config::adapter::FieldError;
use crate::config::rl_reward::HttpConfig;

/// Waits between attempts; each is about twice the one before.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// The longest of them.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Bytes of an answer that are read.
const MAX_ANSWER: usize = 64 << 10;

/// The service, as it is asked.
pub(super) struct Service {
    client: reqwest::Client,
    url: String,
    token: Option<String>,
    retries: usize,
    turns: Semaphore,
}

#[derive(Serialize)]
struct Question<'a> {
    prompt: &'a str,
    output: &'a str,
    language: Option<&'static str>,
    reference: Option<&'a str>,
    finished: bool,
}

#[derive(Deserialize)]
struct Answer {
    reward: serde_json::Value,
}

/// A failed attempt.
struct Failure {
    reason: String,
    /// Another attempt may go better.
    again: bool,
}

impl Service {
    pub(super) fn new(config: &HttpConfig) -> Result<Self, FieldError> {
        let error =
            |field: &str, message: String| FieldError { field: format!("rewards.http.{field}"), message };
        let token = match config.token_env.as_str() {
            "" => None,
            variable => Some(std::env::var(variable).map_err(|_| {
                error("token_env", format!("names {variable}, which is not set in the environment; set it"))
            })?),
        };
        // Fails when somebody installed a provider before, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("gurukul/", env!("CARGO_PKG_VERSION")))
            .timeout(Duration::from_secs_f64(config.timeout_s))
            // A token goes to the address of the settings alone.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|failure| error("url", format!("cannot be asked: {failure}")))?;
        Ok(Self {
            client,
            url: config.url.clone(),
            token,
            retries: config.retries,
            turns: Semaphore::new(config.max_concurrent),
        })
    }

    /// The reward of one answer.
    pub(super) async fn of(&self, sample: &Sample<'_>) -> Result<f64, RewardError> {
        let Ok(_turn) = self.turns.acquire().await else {
            return Err(RewardError::Service("the server is stopping".into()));
        };
        let waits = ExponentialBuilder::default()
            .with_min_delay(FIRST_WAIT)
            .with_max_delay(LONGEST_WAIT)
            .with_max_times(self.retries)
            .with_jitter();
        let attempt = || self.attempt(sample);
        let outcome = attempt.retry(waits).when(|failure: &Failure| failure.again).await;
        outcome.map_err(|failure| RewardError::Service(failure.reason))
    }

    async fn attempt(&self, sample: &Sample<'_>) -> Result<f64, Failure> {
        let question = Question {
            prompt: sample.prompt,
            output: sample.output,
            language: sample.language.map(crate::text::Language::code),
            reference: sample.reference,
            finished: sample.finished,
        };
        let mut request = self.client.post(&self.url).json(&question);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let lost = |error: reqwest::Error| Failure { reason: words(&error.without_url()), again: true };
        let mut response = request.send().await.map_err(lost)?;
        let status = response.status();
        if status != StatusCode::OK {
            let again = status.is_server_error()
                || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
            return Err(Failure { reason: format!("it answered {status}"), again });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(Failure {
                    reason: format!("its answer has more than {MAX_ANSWER} bytes"),
                    again: false,
                });
            }
        }
        read(&body).map_err(|reason| Failure { reason, again: false })
    }
}

/// The number in an answer.
fn read(body: &[u8]) -> Result<f64, String> {
    let answer: Answer = serde_json::from_slice(body)
        .map_err(|error| format!("its answer is no {{\"reward\": number}}: {error}"))?;
    match answer.reward.as_f64() {
        Some(reward) if (0.0..=1.0).contains(&reward) => Ok(reward),
        _ => Err(format!("its reward is {}; it must be a number from 0 to 1", answer.reward)),
    }
}

/// An error with its causes.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Json;
    use axum::http::HeaderMap;
    use axum::response::IntoResponse as _;
    use axum::routing::post;
    use serde_json::{Value, json};

    use super::*;

    /// What the service saw: requests, and the most of them at once.
    #[derive(Default)]
    struct Seen {
        requests: AtomicUsize,
        at_once: AtomicUsize,
        most: AtomicUsize,
    }

    /// A service whose answer depends on the output: a number of failures before it, or a text as the whole body.
    async fn service() -> (String, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let state = seen.clone();
        let answer = move |headers: HeaderMap, Json(question): Json<Value>| {
            let state = state.clone();
            async move {
                let number = state.requests.fetch_add(1, Ordering::SeqCst);
                let now = state.at_once.fetch_add(1, Ordering::SeqCst) + 1;
                state.most.fetch_max(now, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                state.at_once.fetch_sub(1, Ordering::SeqCst);
                let output = question["output"].as_str().unwrap_or_default().to_owned();
                let keys: Vec<&String> = question.as_object().unwrap().keys().collect();
                assert_eq!(keys, ["prompt", "output", "language", "reference", "finished"]);
                assert!(!headers.contains_key("authorization"));
                match output.parse::<usize>() {
                    Ok(failures) if number < failures => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                    Ok(_) => Json(json!({ "reward": 0.25, "why": "because" })).into_response(),
                    Err(_) if output == "forbidden" => StatusCode::FORBIDDEN.into_response(),
                    Err(_) => output.into_response(),
                }
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/reward", listener.local_addr().unwrap());
        let router = axum::Router::new().route("/reward", post(answer));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (url, seen)
    }

    fn sample(output: &str) -> Sample<'_> {
        Sample { prompt: "p", output, language: None, reference: None, finished: true }
    }

    async fn ask(url: &str, retries: usize, output: &str) -> Result<f64, String> {
        let config = HttpConfig { url: url.into(), retries, timeout_s: 5.0, ..HttpConfig::default() };
        let service = Service::new(&config).unwrap();
        service.of(&sample(output)).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_service_that_recovers_is_asked_again() {
        let (url, seen) = service().await;
        assert_eq!(ask(&url, 2, "2").await, Ok(0.25));
        assert_eq!(seen.requests.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_service_that_fails_is_an_error_and_no_zero() {
        let (url, _) = service().await;
        assert!(ask(&url, 1, "100").await.unwrap_err().contains("503"));
        for (body, part) in [
            (r#"{"reward": 1.5}"#, "is 1.5"),
            (r#"{"reward": -0.1}"#, "from 0 to 1"),
            (r#"{"reward": NaN}"#, "is no {\"reward\""),
            (r#"{"reward": null}"#, "is null"),
            (r#"{"reward": "0.5"}"#, "is \"0.5\""),
            (r#"{"rewards": 0.5}"#, "missing field"),
            ("good", "is no {\"reward\""),
            (&"x".repeat(MAX_ANSWER + 1), "more than"),
        ] {
            let error = ask(&url, 3, body).await.unwrap_err();
            assert!(error.contains(part) && error.starts_with("the reward service failed"), "{error}");
        }
    }

    #[tokio::test]
    async fn what_another_attempt_cannot_mend_is_not_tried_again() {
        let (url, seen) = service().await;
        assert!(ask(&url, 5, "forbidden").await.unwrap_err().contains("403"));
        assert_eq!(seen.requests.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_service_that_is_not_there_or_says_nothing_is_an_error() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", silent.local_addr().unwrap());
        let config = HttpConfig { url: url.clone(), retries: 0, timeout_s: 0.1, ..HttpConfig::default() };
        let error = Service::new(&config).unwrap().of(&sample("a")).await.unwrap_err().to_string();
        assert!(error.contains("the reward service failed"), "{error}");
        drop(silent);
        assert!(ask(&url, 0, "a").await.is_err());
    }

    #[tokio::test]
    async fn no_more_requests_at_once_than_the_settings_allow() {
        let (url, seen) = service().await;
        let config = HttpConfig { url, max_concurrent: 2, ..HttpConfig::default() };
        let service = Service::new(&config).unwrap();
        let sample = sample("0");
        let asked = futures::future::join_all((0..12).map(|_| service.of(&sample))).await;
        assert!(asked.iter().all(|reward| *reward == Ok(0.25)));
        assert!(seen.most.load(Ordering::SeqCst) <= 2);
    }

    #[test]
    fn a_token_that_is_missing_is_named() {
        let config = HttpConfig { token_env: "GURUKUL_TEST_NO_SUCH_TOKEN".into(), ..HttpConfig::default() };
        let Err(error) = Service::new(&config) else { panic!("must be refused") };
        assert_eq!(error.field, "rewards.http.token_env");
    }
}
