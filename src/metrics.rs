//! Every metric, named and described in one place; what the engine and running jobs tell is in `engine` and `jobs`.
//! Imports nothing of ours: callers hand over plain numbers.

mod engine;
mod jobs;

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

pub use engine::{
    EngineSnapshot, MemoryPart, engine, learning_step, optimizer_step, step, token_gap, tokens,
    training_piece,
};
pub use jobs::{RunningJob, running_jobs};

const HTTP_REQUESTS: &str = "gurukul_http_requests_total";
const HTTP_IN_FLIGHT: &str = "gurukul_http_requests_in_flight";
const HTTP_DURATION: &str = "gurukul_http_request_duration_seconds";
const CONNECTIONS: &str = "gurukul_http_connections";
const CONNECTIONS_ENDED: &str = "gurukul_http_connections_ended_total";
const KEY_REQUESTS: &str = "gurukul_http_key_requests_total";
const QUEUE_TIME: &str = "gurukul_generation_queue_seconds";
const FIRST_TOKEN_TIME: &str = "gurukul_generation_time_to_first_token_seconds";
const TOKEN_GAP: &str = "gurukul_generation_time_between_tokens_seconds";
const TOTAL_TIME: &str = "gurukul_generation_duration_seconds";
const RUNNING: &str = "gurukul_engine_requests_running";
const WAITING: &str = "gurukul_engine_requests_waiting";
const QUEUE_LIMIT: &str = "gurukul_engine_queue_limit";
const KV_RESERVED: &str = "gurukul_engine_kv_cache_reserved_tokens";
const KV_CAPACITY: &str = "gurukul_engine_kv_cache_capacity_tokens";
const STEPS: &str = "gurukul_engine_steps_total";
const STEP_TIME: &str = "gurukul_engine_step_seconds";
const BATCH: &str = "gurukul_engine_batch_sequences";
const BUSY: &str = "gurukul_engine_busy_seconds_total";
const PROMPT_TOKENS: &str = "gurukul_engine_prompt_tokens_total";
const GENERATED_TOKENS: &str = "gurukul_engine_generated_tokens_total";
const FINISHED: &str = "gurukul_engine_requests_finished_total";
const CANCELLED: &str = "gurukul_engine_requests_cancelled_total";
const ADAPTERS: &str = "gurukul_engine_adapters_resident";
const ADAPTER_BYTES: &str = "gurukul_engine_adapter_bytes";
const TRAIN_PIECE: &str = "gurukul_engine_training_piece_seconds";
const OPTIMIZER_TIME: &str = "gurukul_engine_optimizer_step_seconds";
const TRAIN_BUSY: &str = "gurukul_engine_training_seconds_total";
const TRAIN_TOKENS: &str = "gurukul_engine_training_tokens_total";
const TRAIN_STEPS: &str = "gurukul_engine_training_steps_total";
const TRAINERS: &str = "gurukul_engine_trainers";
const TRAIN_SHARE: &str = "gurukul_engine_training_share";
const LEARNING_STEP: &str = "gurukul_training_step_seconds";
const MEMORY_PLANNED: &str = "gurukul_memory_planned_bytes";
const MEMORY_USED: &str = "gurukul_memory_used_bytes";
const ADAPTER_PROMPT: &str = "gurukul_adapter_prompt_tokens_total";
const ADAPTER_GENERATED: &str = "gurukul_adapter_generated_tokens_total";
const JOBS: &str = "gurukul_jobs";
const TRAINING_RATE: &str = "gurukul_training_tokens_per_second";
const TRAINING_STEP: &str = "gurukul_training_step";
const TRAINING_STEPS: &str = "gurukul_training_steps_planned";
const TRAINING_LOSS: &str = "gurukul_training_loss";
const EPISODES: &str = "gurukul_rl_episodes_total";
const EPISODE_REWARD: &str = "gurukul_rl_reward";
const EPISODE_REWARD_FAILED: &str = "gurukul_rl_reward_failures_total";
const REWARD_TIME: &str = "gurukul_rl_reward_seconds";
const EPISODES_SYNCED: &str = "gurukul_rl_log_episodes_total";
const LOG_SYNC: &str = "gurukul_rl_log_sync_seconds";
const UPLOADS: &str = "gurukul_uploads";
const UPLOADS_PENDING: &str = "gurukul_uploads_pending";
const UPLOAD_RETRIES: &str = "gurukul_upload_retries_total";
const UPLOAD_OLDEST: &str = "gurukul_upload_oldest_pending_seconds";
const UPTIME: &str = "gurukul_uptime_seconds";
const RESIDENT_SET: &str = "process_resident_memory_bytes";
const START_TIME: &str = "process_start_time_seconds";
const BUILD: &str = "gurukul_build_info";

/// Upper bounds of the latency histograms, in seconds: a token of a small model takes milliseconds, a long
/// answer of a large one minutes.
const LATENCY_BUCKETS_S: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Upper bounds of the histogram of rewards.
const REWARD_BUCKETS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Upper bounds of the histogram of sequences in a step.
const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Adapters that have figures of their own; those beyond share one label. The recorder never forgets a label.
const MOST_ADAPTERS: usize = 64;

/// Why the server ends connections by itself.
const ENDED: [&str; 7] = [
    "idle",
    "head_timeout",
    "answer_not_read",
    "not_closed",
    "made_room",
    "handshake_failed",
    "handshake_timeout",
];

/// The key of requests that have none that is known, and why those are refused.
const NO_KEY: &str = "none";
const REFUSED: [&str; 2] = ["no_key", "unknown_key"];

/// How often samples move from the recorder's buffers into the histograms when nobody reads them.
const UPKEEP: Duration = Duration::from_secs(5);

/// Makes the process's recorder and returns what renders it. Called again, it returns the same one: metrics are
/// of the process.
///
/// # Errors
/// Another recorder than ours was installed before.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    static HANDLE: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    let made = HANDLE.get_or_init(|| {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &LATENCY_BUCKETS_S)
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Full(EPISODE_REWARD.into()), &REWARD_BUCKETS)
            })
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Full(BATCH.into()), &BATCH_BUCKETS))
            .map_err(|error| error.to_string())?;
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
        describe();
        begin_at_zero();
        Ok(handle)
    });
    made.clone().map_err(|reason| anyhow::anyhow!("metrics cannot be recorded: {reason}"))
}

/// Keeps the recorder's buffers small for as long as it is polled. Never ends; spawn it once.
pub async fn upkeep(handle: PrometheusHandle) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        handle.run_upkeep();
    }
}

fn describe() {
    describe_counter!(HTTP_REQUESTS, "Answers by route, method and status");
    describe_gauge!(HTTP_IN_FLIGHT, "Requests whose answer is not sent completely");
    describe_histogram!(HTTP_DURATION, Unit::Seconds, "From a request's arrival to the end of its answer");
    describe_gauge!(CONNECTIONS, "Connections that are open");
    describe_counter!(CONNECTIONS_ENDED, "Connections that the server ended by itself, by why");
    describe_counter!(KEY_REQUESTS, "Requests by the name of their API key and whether they were let in");
    describe_histogram!(QUEUE_TIME, Unit::Seconds, "From submission to the first step");
    describe_histogram!(FIRST_TOKEN_TIME, Unit::Seconds, "From submission to the first token");
    describe_histogram!(TOKEN_GAP, Unit::Seconds, "Between a token of an answer and the next");
    describe_histogram!(TOTAL_TIME, Unit::Seconds, "From submission to the end of the answer");
    describe_gauge!(RUNNING, "Requests that have slots");
    describe_gauge!(WAITING, "Requests that wait for a slot");
    describe_gauge!(QUEUE_LIMIT, "Requests that may wait");
    describe_gauge!(KV_RESERVED, "Tokens reserved in the KV cache");
    describe_gauge!(KV_CAPACITY, "Tokens that fit the KV cache");
    describe_counter!(STEPS, "Steps of the engine");
    describe_histogram!(STEP_TIME, Unit::Seconds, "Steps of the engine");
    describe_histogram!(BATCH, "Sequences in a step");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens worked through");
    describe_counter!(GENERATED_TOKENS, "Tokens generated");
    describe_counter!(FINISHED, "Requests ended by any reason but cancellation");
    describe_counter!(CANCELLED, "Requests whose client left");
    describe_gauge!(ADAPTERS, "Adapters on the device");
    describe_gauge!(ADAPTER_BYTES, Unit::Bytes, "Bytes of the adapters on the device");
    describe_histogram!(TRAIN_PIECE, Unit::Seconds, "Pieces of training between two steps of serving");
    describe_histogram!(OPTIMIZER_TIME, Unit::Seconds, "Optimizer steps, inside the engine");
    describe_histogram!(
        LEARNING_STEP,
        Unit::Seconds,
        "Whole steps of training jobs, waiting for their turns included"
    );
    describe_gauge!(MEMORY_PLANNED, Unit::Bytes, "Bytes that were planned for each part of the engine");
    describe_gauge!(MEMORY_USED, Unit::Bytes, "Bytes of what was planned that hold something now");
    describe_counter!(ADAPTER_PROMPT, "Prompt tokens of ended requests, by adapter");
    describe_counter!(ADAPTER_GENERATED, "Tokens generated for ended requests, by adapter");
    describe_counter!(TRAIN_TOKENS, "Tokens of finished training passes");
    describe_counter!(TRAIN_STEPS, "Optimizer steps");
    describe_gauge!(TRAINERS, "Trainers that hold memory");
    describe_gauge!(TRAIN_SHARE, "Share of the time that training gets while requests run");
    describe_gauge!(JOBS, "Jobs that are remembered, by state");
    describe_counter!(EPISODES, "Episodes collected, by where their output is from");
    describe_histogram!(EPISODE_REWARD, "Rewards of collected episodes");
    describe_counter!(EPISODE_REWARD_FAILED, "Episodes without a reward because it could not be had");
    describe_histogram!(
        REWARD_TIME,
        Unit::Seconds,
        "Rewarding a group of episodes, a service's answers included"
    );
    describe_counter!(EPISODES_SYNCED, "Episodes that the log has on disk");
    describe_histogram!(
        LOG_SYNC,
        Unit::Seconds,
        "Writing episodes to the log, fsync included; one for a group"
    );
    describe_gauge!(UPLOADS, "Promised uploads that are remembered, by state");
    describe_gauge!(UPLOADS_PENDING, "Promised uploads that are not through, by sink");
    describe_counter!(UPLOAD_RETRIES, "Attempts to upload that will be repeated");
    describe_gauge!(UPLOAD_OLDEST, Unit::Seconds, "Age of the oldest upload that is not through");
    describe_gauge!(UPTIME, Unit::Seconds, "Time since the start");
    describe_gauge!(RESIDENT_SET, Unit::Bytes, "Bytes of the process in main memory");
    describe_gauge!(START_TIME, Unit::Seconds, "Start of the process, seconds since 1970");
    describe_gauge!(BUILD, "1, with version, commit, features and device as labels");
}

/// Counters that nothing has touched yet are shown as 0: a rate over them then sees their first increase.
fn begin_at_zero() {
    gauge!(CONNECTIONS).set(0.0);
    for reason in ENDED {
        counter!(CONNECTIONS_ENDED, "reason" => reason).increment(0);
    }
    for outcome in REFUSED {
        counter!(KEY_REQUESTS, "key" => NO_KEY, "outcome" => outcome).increment(0);
    }
    gauge!(HTTP_IN_FLIGHT).set(0.0);
    counter!(UPLOAD_RETRIES).increment(0);
    counter!(EPISODE_REWARD_FAILED).increment(0);
    counter!(EPISODES_SYNCED).increment(0);
}

/// A request that is being answered: counted as in flight until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    _private: (),
}

impl InFlight {
    /// Counts a request in.
    pub fn enter() -> Self {
        gauge!(HTTP_IN_FLIGHT).increment(1.0);
        Self { _private: () }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!(HTTP_IN_FLIGHT).decrement(1.0);
    }
}

/// An answer went out completely, or its client left, after `seconds`. `route` is the route's pattern, not the
/// path that a client asked for: a label must not grow with what clients think up.
pub fn http_answered(route: &str, method: &'static str, status: u16, seconds: f64) {
    let route = route.to_owned();
    let status = status.to_string();
    counter!(HTTP_REQUESTS, "route" => route.clone(), "method" => method, "status" => status).increment(1);
    histogram!(HTTP_DURATION, "route" => route).record(seconds);
}

/// Shows how many connections are open.
pub fn connections(open: usize) {
    gauge!(CONNECTIONS).set(open as f64);
}

/// The server ended a connection by itself.
pub fn connection_ended(reason: &'static str) {
    counter!(CONNECTIONS_ENDED, "reason" => reason).increment(1);
}

/// A request was let in or refused. `key` is the name of its API key, which comes from settings.
pub fn key_request(key: &str, outcome: &'static str) {
    counter!(KEY_REQUESTS, "key" => key.to_owned(), "outcome" => outcome).increment(1);
}

/// A generation ended; times in seconds since its submission.
pub fn answer_finished(queue_s: f64, first_token_s: f64, total_s: f64) {
    histogram!(QUEUE_TIME).record(queue_s);
    histogram!(FIRST_TOKEN_TIME).record(first_token_s);
    histogram!(TOTAL_TIME).record(total_s);
}

/// An episode was collected: `source` is `generated` or `given`; without a reward where that could not be had.
pub fn episode_collected(source: &'static str, reward: Option<f64>) {
    counter!(EPISODES, "source" => source).increment(1);
    match reward {
        Some(reward) => histogram!(EPISODE_REWARD).record(reward),
        None => counter!(EPISODE_REWARD_FAILED).increment(1),
    }
}

/// A group of episodes was rewarded.
pub fn group_rewarded(seconds: f64) {
    histogram!(REWARD_TIME).record(seconds);
}

/// The log wrote a group of episodes to the disk.
pub fn episodes_synced(episodes: usize, seconds: f64) {
    counter!(EPISODES_SYNCED).increment(episodes as u64);
    histogram!(LOG_SYNC).record(seconds);
}

/// Shows how many jobs are in each state.
pub fn jobs_by_state(by_state: [(&'static str, u64); 5]) {
    for (state, jobs) in by_state {
        gauge!(JOBS, "state" => state).set(jobs as f64);
    }
}

/// Shows how many promised uploads are in each state, and the age of the oldest that is not through.
pub fn uploads(by_state: [(&'static str, u64); 3], oldest_pending_s: f64) {
    for (state, uploads) in by_state {
        gauge!(UPLOADS, "state" => state).set(uploads as f64);
    }
    gauge!(UPLOAD_OLDEST).set(oldest_pending_s);
}

/// An attempt to upload did not succeed and will be repeated.
pub fn upload_retried() {
    counter!(UPLOAD_RETRIES).increment(1);
}

/// Shows promised uploads that are not through, by sink. A sink that has none any more is shown with 0.
pub fn uploads_pending(by_sink: &[(String, u64)]) {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut seen = SEEN.lock().expect("no holder of this lock panics");
    // Sinks come from the settings, so there are few.
    seen.extend(by_sink.iter().map(|(sink, _)| sink.clone()));
    for sink in seen.iter() {
        let pending = by_sink.iter().find(|(name, _)| name == sink).map_or(0, |(_, pending)| *pending);
        gauge!(UPLOADS_PENDING, "sink" => sink.clone()).set(pending as f64);
    }
}

/// What does not change while the process runs.
#[derive(Debug, Clone)]
pub struct Build<'a> {
    /// `cpu` or `cuda:N`.
    pub device: &'a str,
    /// Start, seconds since 1970.
    pub started_unix_s: f64,
}

/// Shows the process.
pub fn process(build: &Build<'_>, uptime_s: f64, resident_set_bytes: Option<u64>) {
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        // Known where whoever builds sets the variable.
        ("commit", option_env!("GURUKUL_COMMIT").unwrap_or("unknown").to_owned()),
        ("features", features()),
        ("device", build.device.to_owned()),
    ];
    gauge!(BUILD, &labels).set(1.0);
    gauge!(START_TIME).set(build.started_unix_s);
    gauge!(UPTIME).set(uptime_s);
    if let Some(bytes) = resident_set_bytes {
        gauge!(RESIDENT_SET).set(bytes as f64);
    }
}

/// The features that this binary was built with, separated by commas.
fn features() -> String {
    let features = [("cuda", cfg!(feature = "cuda")), ("otlp", cfg!(feature = "otlp"))];
    let on: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    on.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_rendered() {
        let handle = install().expect("no other recorder is installed");
        http_answered("/metrics-test", "GET", 200, 0.003);
        answer_finished(0.001, 0.02, 0.4);
        process(&Build { device: "cpu", started_unix_s: 1.7e9 }, 1.5, Some(4096));
        key_request("team", "rate");
        connection_ended("idle");
        connections(3);
        uploads_pending(&[("archive".into(), 3)]);
        uploads_pending(&[]);
        let text = handle.render();
        let line = "gurukul_http_requests_total{route=\"/metrics-test\",method=\"GET\",status=\"200\"} 1";
        assert!(text.contains(line), "{text}");
        let bucket = "gurukul_http_request_duration_seconds_bucket{route=\"/metrics-test\",le=\"0.005\"} 1";
        assert!(text.contains(bucket), "{text}");
        assert!(
            text.contains("gurukul_generation_time_to_first_token_seconds_bucket{le=\"0.025\"}"),
            "{text}"
        );
        assert!(text.contains("# TYPE gurukul_http_request_duration_seconds histogram"), "{text}");
        assert!(text.contains("gurukul_uptime_seconds 1.5"), "{text}");
        assert!(text.contains("process_start_time_seconds 1700000000"), "{text}");
        let key = |key, outcome, count: u64| {
            format!("gurukul_http_key_requests_total{{key=\"{key}\",outcome=\"{outcome}\"}} {count}")
        };
        assert!(
            text.contains(&key(NO_KEY, "unknown_key", 0)) && text.contains(&key("team", "rate", 1)),
            "{text}"
        );
        assert!(text.contains("gurukul_http_connections_ended_total{reason=\"idle\"} 1"), "{text}");
        assert!(text.contains("gurukul_http_connections_ended_total{reason=\"head_timeout\"} 0"), "{text}");
        assert!(text.contains("gurukul_http_connections 3"), "{text}");
        assert!(text.contains("gurukul_uploads_pending{sink=\"archive\"} 0"), "{text}");
        let build = text.lines().find(|line| line.starts_with("gurukul_build_info{")).expect("is there");
        assert!(build.contains("commit=\"") && build.contains("device=\"cpu\""), "{build}");
        assert!(install().expect("is the same").render().contains(line));
    }
}
