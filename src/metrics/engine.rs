//! What the engine tells of itself: as it goes, and when somebody asks.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Mutex;

use metrics::{counter, gauge, histogram};

use super::*;

/// One step over `sequences` sequences.
pub fn step(sequences: usize, seconds: f64) {
    histogram!(BATCH).record(sequences as f64);
    histogram!(STEP_TIME).record(seconds);
}

/// A token of an answer came `seconds` after the one before it.
pub fn token_gap(seconds: f64) {
    histogram!(TOKEN_GAP).record(seconds);
}

/// A request ended; `adapter` is `None` for the base model.
pub fn tokens(adapter: Option<&str>, prompt: usize, generated: usize) {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut seen = SEEN.lock().expect("no holder of this lock panics");
    let label = adapter_label(&mut seen, adapter);
    drop(seen);
    counter!(ADAPTER_PROMPT, "adapter" => label.clone()).increment(prompt as u64);
    counter!(ADAPTER_GENERATED, "adapter" => label).increment(generated as u64);
}

/// No adapter's name has a parenthesis.
fn adapter_label(seen: &mut BTreeSet<String>, adapter: Option<&str>) -> Cow<'static, str> {
    match adapter {
        None => "(base)".into(),
        Some(name) if seen.contains(name) => name.to_owned().into(),
        Some(_) if seen.len() == MOST_ADAPTERS => "(other)".into(),
        Some(name) => {
            seen.insert(name.to_owned());
            name.to_owned().into()
        }
    }
}

/// The engine took an optimizer step.
pub fn optimizer_step(seconds: f64) {
    histogram!(OPTIMIZER_TIME).record(seconds);
}

/// A training job took a whole step.
pub fn learning_step(seconds: f64) {
    histogram!(LEARNING_STEP).record(seconds);
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
    /// Planned bytes and, where it is known, used bytes of each part.
    pub memory: [MemoryPart; 4],
    /// Share of the time that training gets while requests run.
    pub training_share: f64,
}

/// Memory of one part of the engine.
#[derive(Debug, Clone, Copy)]
pub struct MemoryPart {
    /// `weights`, `kv_cache`, `adapters` or `training`.
    pub part: &'static str,
    /// Planned.
    pub planned_bytes: u64,
    /// What of it holds something now.
    pub used_bytes: Option<u64>,
}

/// Shows a snapshot of the engine; the text is what the recorder cannot say, whose counters are whole numbers.
pub fn engine(snapshot: &EngineSnapshot) -> String {
    gauge!(RUNNING).set(snapshot.running as f64);
    gauge!(WAITING).set(snapshot.waiting as f64);
    gauge!(QUEUE_LIMIT).set(snapshot.queue_limit as f64);
    gauge!(KV_RESERVED).set(snapshot.kv_tokens_reserved as f64);
    gauge!(KV_CAPACITY).set(snapshot.kv_tokens_capacity as f64);
    for MemoryPart { part, planned_bytes, used_bytes } in snapshot.memory {
        gauge!(MEMORY_PLANNED, "part" => part).set(planned_bytes as f64);
        if let Some(bytes) = used_bytes {
            gauge!(MEMORY_USED, "part" => part).set(bytes as f64);
        }
    }
    counter!(STEPS).absolute(snapshot.steps);
    counter!(PROMPT_TOKENS).absolute(snapshot.prompt_tokens);
    counter!(GENERATED_TOKENS).absolute(snapshot.generated_tokens);
    counter!(FINISHED).absolute(snapshot.finished);
    counter!(CANCELLED).absolute(snapshot.cancelled);
    gauge!(ADAPTERS).set(snapshot.adapters as f64);
    gauge!(ADAPTER_BYTES).set(snapshot.adapter_bytes as f64);
    counter!(TRAIN_TOKENS).absolute(snapshot.training_tokens);
    counter!(TRAIN_STEPS).absolute(snapshot.training_steps);
    gauge!(TRAINERS).set(snapshot.trainers as f64);
    gauge!(TRAIN_SHARE).set(snapshot.training_share);
    seconds(BUSY, "Time inside steps", snapshot.busy_s)
        + &seconds(TRAIN_BUSY, "Time inside training", snapshot.training_s)
}

fn seconds(name: &str, help: &str, value: f64) -> String {
    format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_beyond_the_bound_share_a_label() {
        let mut seen = BTreeSet::new();
        assert_eq!(adapter_label(&mut seen, None), "(base)");
        for number in 0..MOST_ADAPTERS {
            let name = format!("a{number}");
            assert_eq!(adapter_label(&mut seen, Some(&name)), name);
        }
        assert_eq!(adapter_label(&mut seen, Some("one-more")), "(other)");
        assert_eq!(adapter_label(&mut seen, Some("a0")), "a0");
        assert_eq!(adapter_label(&mut seen, None), "(base)");
        assert_eq!(seen.len(), MOST_ADAPTERS);
    }
}
