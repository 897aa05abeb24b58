//! Every metric, named and described in one place. Imports nothing of ours: callers hand over plain numbers.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

const HTTP_REQUESTS: &str = "gurukul_http_requests_total";
const HTTP_IN_FLIGHT: &str = "gurukul_http_requests_in_flight";
const HTTP_DURATION: &str = "gurukul_http_request_duration_seconds";
const CONNECTIONS: &str = "gurukul_http_connections";
const CONNECTIONS_ENDED: &str = "gurukul_http_connections_ended_total";
const KEY_REQUESTS: &str = "gurukul_http_key_requests_total";
const QUEUE_TIME: &str = "gurukul_generation_queue_seconds";
const FIRST_TOKEN_TIME: &str = "gurukul_generation_time_to_first_token_seconds";
const TOTAL_TIME: &str = "gurukul_generation_duration_seconds";
const RUNNING: &str = "gurukul_engine_requests_running";
const WAITING: &str = "gurukul_engine_requests_waiting";
const QUEUE_LIMIT: &str = "gurukul_engine_queue_limit";
const KV_RESERVED: &str = "gurukul_engine_kv_cache_reserved_tokens";
const KV_CAPACITY: &str = "gurukul_engine_kv_cache_capacity_tokens";
const STEPS: &str = "gurukul_engine_steps_total";
const BUSY: &str = "gurukul_engine_busy_seconds";
const PROMPT_TOKENS: &str = "gurukul_engine_prompt_tokens_total";
const GENERATED_TOKENS: &str = "gurukul_engine_generated_tokens_total";
const FINISHED: &str = "gurukul_engine_requests_finished_total";
const CANCELLED: &str = "gurukul_engine_requests_cancelled_total";
const ADAPTERS: &str = "gurukul_engine_adapters_resident";
const ADAPTER_BYTES: &str = "gurukul_engine_adapter_bytes";
const TRAIN_PIECE: &str = "gurukul_engine_training_piece_seconds";
const TRAIN_BUSY: &str = "gurukul_engine_training_seconds";
const TRAIN_TOKENS: &str = "gurukul_engine_training_tokens_total";
const TRAIN_STEPS: &str = "gurukul_engine_training_steps_total";
const TRAINERS: &str = "gurukul_engine_trainers";
const TRAIN_SHARE: &str = "gurukul_engine_training_share";
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
const UPLOAD_RETRIES: &str = "gurukul_upload_retries_total";
const UPLOAD_OLDEST: &str = "gurukul_upload_oldest_pending_seconds";
const UPTIME: &str = "gurukul_uptime_seconds";
const RESIDENT_SET: &str = "process_resident_memory_bytes";
const BUILD: &str = "gurukul_build_info";

/// Upper bounds of the latency histograms, in seconds: a token of a small model takes milliseconds, a long
/// answer of a large one minutes.
const LATENCY_BUCKETS_S: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Upper bounds of the histogram of rewards.
const REWARD_BUCKETS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

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
            .map_err(|error| error.to_string())?;
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
        describe();
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
    describe_histogram!(TOTAL_TIME, Unit::Seconds, "From submission to the end of the answer");
    describe_gauge!(RUNNING, "Requests that have slots");
    describe_gauge!(WAITING, "Requests that wait for a slot");
    describe_gauge!(QUEUE_LIMIT, "Requests that may wait");
    describe_gauge!(KV_RESERVED, "Tokens reserved in the KV cache");
    describe_gauge!(KV_CAPACITY, "Tokens that fit the KV cache");
    describe_counter!(STEPS, "Steps of the engine");
    describe_gauge!(BUSY, Unit::Seconds, "Time inside steps since the start");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens worked through");
    describe_counter!(GENERATED_TOKENS, "Tokens generated");
    describe_counter!(FINISHED, "Requests ended by any reason but cancellation");
    describe_counter!(CANCELLED, "Requests whose client left");
    describe_gauge!(ADAPTERS, "Adapters on the device");
    describe_gauge!(ADAPTER_BYTES, Unit::Bytes, "Bytes of the adapters on the device");
    describe_histogram!(TRAIN_PIECE, Unit::Seconds, "Pieces of training between two steps of serving");
    describe_gauge!(TRAIN_BUSY, Unit::Seconds, "Time inside training since the start");
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
    describe_counter!(UPLOAD_RETRIES, "Attempts to upload that will be repeated");
    describe_gauge!(UPLOAD_OLDEST, Unit::Seconds, "Age of the oldest upload that is not through");
    describe_gauge!(UPTIME, Unit::Seconds, "Time since the start");
    describe_gauge!(RESIDENT_SET, Unit::Bytes, "Bytes of the process in main memory");
    describe_gauge!(BUILD, "1, with the version as label");
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

/// The engine did one piece of training.
pub fn training_piece(seconds: f64) {
    histogram!(TRAIN_PIECE).record(seconds);
}

/// What the engine knows of itself at one moment. Counts are since its start.
#[derive(Debug, Clone)]
pub struct EngineSnapshot {
    /// Requests that have slots.
    pub running: usize,
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// Requests that may wait.
    pub queue_limit: usize,
    /// Tokens reserved in the KV cache.
    pub kv_tokens_reserved: usize,
    /// Tokens that fit the KV cache.
    pub kv_tokens_capacity: usize,
    /// Steps.
    pub steps: u64,
    /// Seconds inside steps.
    pub busy_s: f64,
    /// Prompt tokens worked through.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests ended by any reason but cancellation.
    pub finished: u64,
    /// Requests whose client left.
    pub cancelled: u64,
    /// Adapters on the device.
    pub adapters: usize,
    /// Their bytes.
    pub adapter_bytes: u64,
    /// Seconds inside training.
    pub training_s: f64,
    /// Tokens of finished training passes.
    pub training_tokens: u64,
    /// Optimizer steps.
    pub training_steps: u64,
    /// Trainers that hold memory.
    pub trainers: usize,
    /// Share of the time that training gets while requests run.
    pub training_share: f64,
}

/// Shows a snapshot of the engine.
pub fn engine(snapshot: &EngineSnapshot) {
    gauge!(RUNNING).set(snapshot.running as f64);
    gauge!(WAITING).set(snapshot.waiting as f64);
    gauge!(QUEUE_LIMIT).set(snapshot.queue_limit as f64);
    gauge!(KV_RESERVED).set(snapshot.kv_tokens_reserved as f64);
    gauge!(KV_CAPACITY).set(snapshot.kv_tokens_capacity as f64);
    counter!(STEPS).absolute(snapshot.steps);
    gauge!(BUSY).set(snapshot.busy_s);
    counter!(PROMPT_TOKENS).absolute(snapshot.prompt_tokens);
    counter!(GENERATED_TOKENS).absolute(snapshot.generated_tokens);
    counter!(FINISHED).absolute(snapshot.finished);
    counter!(CANCELLED).absolute(snapshot.cancelled);
    gauge!(ADAPTERS).set(snapshot.adapters as f64);
    gauge!(ADAPTER_BYTES).set(snapshot.adapter_bytes as f64);
    gauge!(TRAIN_BUSY).set(snapshot.training_s);
    counter!(TRAIN_TOKENS).absolute(snapshot.training_tokens);
    counter!(TRAIN_STEPS).absolute(snapshot.training_steps);
    gauge!(TRAINERS).set(snapshot.trainers as f64);
    gauge!(TRAIN_SHARE).set(snapshot.training_share);
}

/// Shows how many jobs are in each state.
pub fn jobs(by_state: [(&'static str, u64); 5]) {
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

/// A job that runs; what is not known yet is not shown.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningJob {
    /// Name of the adapter that it makes.
    pub adapter: String,
    /// Tokens a second over its latest steps.
    pub tokens_per_s: Option<f64>,
    /// Steps taken.
    pub step: Option<f64>,
    /// Steps in all.
    pub total_steps: Option<f64>,
    /// Mean loss a supervised token in the latest step.
    pub loss: Option<f64>,
}

/// Prometheus text about the jobs that run. It does not go through the recorder, which never forgets a label: every
/// adapter that was ever trained would stay.
pub fn running_jobs(jobs: &[RunningJob]) -> String {
    let mut text = String::new();
    let mut show = |name: &str, help: &str, figure: fn(&RunningJob) -> Option<f64>| {
        let known: Vec<_> = jobs.iter().filter_map(|job| Some((job, figure(job)?))).collect();
        if known.is_empty() {
            return;
        }
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for (job, value) in known {
            // The rule of adapters' names leaves nothing to escape.
            text.push_str(&format!("{name}{{adapter=\"{}\"}} {value}\n", job.adapter));
        }
        text.push('\n');
    };
    show(TRAINING_RATE, "Tokens a second over the latest steps of a running job", |job| job.tokens_per_s);
    show(TRAINING_STEP, "Steps that a running job has taken", |job| job.step);
    show(TRAINING_STEPS, "Steps that a running job will take", |job| job.total_steps);
    show(TRAINING_LOSS, "Mean loss a supervised token in the latest step of a running job", |job| job.loss);
    text
}

/// Shows the process.
pub fn process(uptime_s: f64, resident_set_bytes: Option<u64>) {
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(UPTIME).set(uptime_s);
    if let Some(bytes) = resident_set_bytes {
        gauge!(RESIDENT_SET).set(bytes as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_jobs_are_shown_while_they_run() {
        let running = RunningJob {
            adapter: "hindi-v2".into(),
            tokens_per_s: Some(119.5),
            step: Some(7.0),
            total_steps: Some(100.0),
            loss: None,
        };
        let text =
            running_jobs(&[running.clone(), RunningJob { adapter: "b".into(), step: None, ..running }]);
        assert!(text.contains("# TYPE gurukul_training_tokens_per_second gauge\n"), "{text}");
        assert!(
            text.contains("\ngurukul_training_tokens_per_second{adapter=\"hindi-v2\"} 119.5\n"),
            "{text}"
        );
        assert!(text.contains("\ngurukul_training_step{adapter=\"hindi-v2\"} 7\n"), "{text}");
        assert!(!text.contains("step{adapter=\"b\"}") && !text.contains("loss"), "{text}");
        assert_eq!(running_jobs(&[]), "");
    }

    #[test]
    fn what_is_recorded_is_rendered() {
        let handle = install().expect("no other recorder is installed");
        http_answered("/metrics-test", "GET", 200, 0.003);
        answer_finished(0.001, 0.02, 0.4);
        process(1.5, Some(4096));
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
        assert!(install().expect("is the same").render().contains(line));
    }
}
