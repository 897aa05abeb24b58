//! The task that delivers what was promised: a lane for each sink, so that one that is down holds up nobody else,
//! some deliveries at once in each, and longer and longer waits where they do not succeed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Shared, facts, now_ms};
use crate::config::rl_sinks::SinkConfig;
use crate::jobs::{JobsError, Promise};
use crate::metrics;
use crate::rl::sink::{Parcel, Refusal, Sink};

/// How long to wait before the store is asked again after it failed.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Failures in a row after which a whole lane waits, and not the single upload alone.
const LANE_FAILURES: u32 = 4;
/// Doublings of a wait that are counted.
const MAX_DOUBLINGS: u32 = 16;

/// One sink's deliveries.
#[derive(Default)]
struct Lane {
    /// The sink, with what it is opened from. It is kept open: clients have connections and credentials.
    open: Option<Opening>,
    /// Ids of what is on its way.
    under_way: HashSet<String>,
    /// Attempts since the last that succeeded.
    failures: u32,
    /// Nothing begins before this.
    held_until: Option<Instant>,
}

/// A sink that is opened by the first delivery that needs it.
#[derive(Clone)]
struct Opening {
    config: SinkConfig,
    sink: Arc<OnceCell<Sink>>,
}

/// How a delivery ended.
struct Ended {
    sink: String,
    id: String,
    /// The sink answered, whatever it said.
    was_answered: bool,
}

/// Delivers until the outbox stops, then waits for what is under way.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut lanes: HashMap<String, Lane> = HashMap::new();
    let mut deliveries: JoinSet<Ended> = JoinSet::new();
    let mut stopping = shared.stopping.subscribe();
    while !*stopping.borrow() {
        let wait = match begin(&shared, &mut lanes, &mut deliveries).await {
            Ok(wait) => wait,
            Err(error) => {
                tracing::error!(%error, "promised uploads cannot be read now");
                Some(STORE_RETRY)
            }
        };
        tokio::select! {
            () = shared.work_waits.notified() => {}
            Some(ended) = deliveries.join_next() => note(&shared, &mut lanes, ended),
            _ = stopping.changed() => {}
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
    while let Some(ended) = deliveries.join_next().await {
        note(&shared, &mut lanes, ended);
    }
}

/// Begins what is due and has room. Returns when the next is due, if it is known.
async fn begin(
    shared: &Arc<Shared>,
    lanes: &mut HashMap<String, Lane>,
    deliveries: &mut JoinSet<Ended>,
) -> Result<Option<Duration>, JobsError> {
    let mut wait: Option<Duration> = None;
    let mut sooner = |other: Duration| wait = Some(wait.map_or(other, |wait| wait.min(other)));
    let sinks = shared.promises.waiting_sinks().await?;
    for sink in sinks {
        let lane = lanes.entry(sink.clone()).or_default();
        let free = shared.patience.at_once.saturating_sub(lane.under_way.len());
        if free == 0 {
            continue;
        }
        if let Some(held) = lane.held_until.map(|until| until.saturating_duration_since(Instant::now()))
            && !held.is_zero()
        {
            sooner(held);
            continue;
        }
        let limit = u32::try_from(shared.patience.at_once * 2).unwrap_or(u32::MAX);
        let promises = shared.promises.next(&sink, limit).await?;
        let others: Vec<Promise> =
            promises.into_iter().filter(|promise| !lane.under_way.contains(&promise.id)).take(free).collect();
        for promise in others {
            let early_ms = promise.next_ms - now_ms();
            if early_ms > 0 {
                sooner(Duration::from_millis(early_ms.unsigned_abs()));
                break;
            }
            lane.under_way.insert(promise.id.clone());
            let to = lane.open(shared, &promise);
            deliveries.spawn(deliver(shared.clone(), to, promise));
        }
    }
    Ok(wait)
}

impl Lane {
    /// The sink of a promise.
    fn open(&mut self, shared: &Shared, promise: &Promise) -> Result<Opening, Refusal> {
        let config = match &promise.target {
            Some(target) => serde_json::from_value(target.clone()).map_err(|error| {
                Refusal::Final(format!("its sink was stored by a version that is not understood: {error}"))
            })?,
            None => shared.sinks.sink(&promise.sink).cloned().ok_or_else(|| {
                Refusal::Final(format!(
                    "rl_config.yaml has no sink {} any more; put it back and start again",
                    promise.sink
                ))
            })?,
        };
        match &self.open {
            Some(open) if open.config == config => Ok(open.clone()),
            _ => Ok(self.open.insert(Opening { config, sink: Arc::default() }).clone()),
        }
    }
}

/// One attempt, recorded.
async fn deliver(shared: Arc<Shared>, to: Result<Opening, Refusal>, promise: Promise) -> Ended {
    let parcel = Parcel {
        id: promise.id.clone(),
        key: promise.key.clone(),
        facts: facts(&promise.run, promise.created_ms, &promise.sha256, &promise.sink),
        bytes: promise.bytes,
        file: shared.sealed(&promise.sha256),
        may_be_there: promise.attempts > 0 || promise.created_ms < shared.opened_ms,
    };
    let put = async {
        let Opening { config, sink } = to?;
        sink.get_or_try_init(|| Sink::open(&config)).await?.put(&parcel).await
    };
    let outcome = put.await;
    let (upload, sink) = (promise.id.as_str(), promise.sink.as_str());
    let was_answered = !matches!(outcome, Err(Refusal::Passing { .. }));
    let recorded = match outcome {
        Ok(()) => shared.promises.delivered(upload).await,
        Err(Refusal::Final(reason)) => {
            tracing::error!(
                upload,
                sink,
                reason,
                "an upload was refused; it is kept, and tried again when asked"
            );
            shared.promises.refused(upload, &reason).await
        }
        Err(Refusal::Passing { reason, wait }) => {
            metrics::upload_retried();
            let wait = wait.unwrap_or_default().max(shared.backoff(promise.attempts));
            tracing::debug!(
                upload,
                sink,
                reason,
                wait_s = wait.as_secs_f64(),
                "an upload will be tried again"
            );
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            shared.promises.deferred(upload, &reason, wait_ms).await
        }
    };
    let mut was_recorded = true;
    if let Err(error) = recorded {
        // It stays pending, and delivering it again does no harm.
        tracing::error!(upload, %error, "how an upload went cannot be stored now");
        was_recorded = false;
    } else if was_answered {
        shared.clear(&promise.sha256).await;
    }
    shared.changed.send_replace(());
    Ended { sink: promise.sink, id: promise.id, was_answered: was_answered && was_recorded }
}

/// Takes notice of a delivery's end.
fn note(shared: &Shared, lanes: &mut HashMap<String, Lane>, ended: Result<Ended, tokio::task::JoinError>) {
    let ended = match ended {
        Ok(ended) => ended,
        // The id is not known; the lane has one place less until the next start.
        Err(error) => return tracing::error!(%error, "a delivery that panics is a bug"),
    };
    let Some(lane) = lanes.get_mut(&ended.sink) else { return };
    lane.under_way.remove(&ended.id);
    if ended.was_answered {
        (lane.failures, lane.held_until) = (0, None);
        return;
    }
    lane.failures = lane.failures.saturating_add(1);
    if lane.failures >= LANE_FAILURES {
        let wait = shared.backoff(lane.failures - LANE_FAILURES);
        lane.held_until = Some(Instant::now() + wait);
        if lane.failures == LANE_FAILURES {
            tracing::warn!(sink = ended.sink, "a sink takes nothing now; uploads wait, collecting goes on");
        }
    }
}

impl Shared {
    /// The wait after an attempt that came after `failures` others.
    fn backoff(&self, failures: u32) -> Duration {
        let waits = ExponentialBuilder::new()
            .with_min_delay(self.patience.first)
            .with_max_delay(self.patience.longest)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times();
        let doublings = failures.min(MAX_DOUBLINGS) as usize;
        waits.build().nth(doublings).unwrap_or(self.patience.longest)
    }

    /// Removes a sealed file that nobody needs any more.
    async fn clear(&self, sha256: &str) {
        let _seals = self.seals.write().await;
        match self.promises.needs(sha256).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => return tracing::warn!(sha256, %error, "a sealed upload stays until the next start"),
        }
        if let Err(error) = tokio::fs::remove_file(self.sealed(sha256)).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(sha256, %error, "a sealed upload cannot be removed; it goes at the next start");
        }
    }
}
