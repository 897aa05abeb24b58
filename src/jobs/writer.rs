//! The task that puts what running jobs say into the store: senders never wait, and what comes together is one
//! transaction.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::history::Entry;
use super::store::Store;

/// How long the first entry waits for others: commits are some milliseconds each, steps may be shorter.
const GATHER: Duration = Duration::from_millis(50);
/// Entries of one transaction.
const BATCH: usize = 500;
/// Entries that are kept while the store refuses them; the oldest go first.
const KEPT: usize = 20_000;
/// How long to wait after the store refused.
const RETRY: Duration = Duration::from_secs(1);

/// What the writer is told.
pub(super) enum Message {
    /// Something to put down.
    Entry(Entry),
    /// Answer once everything before this is in the store, or was refused by it.
    Flush(oneshot::Sender<()>),
}

/// Runs until every sender is gone and everything is written; `written` learns whose entries are in the store.
pub(super) async fn run(
    store: Arc<Store>,
    mut inbox: mpsc::UnboundedReceiver<Message>,
    written: impl Fn(&str) + Send,
) {
    let mut writer = Writer { store, waiting: VecDeque::new(), dropped: 0 };
    let mut refused = false;
    loop {
        if writer.waiting.is_empty() {
            match inbox.recv().await {
                Some(Message::Entry(entry)) => writer.keep(entry),
                Some(Message::Flush(done)) => {
                    // Nobody waits any more where this fails; so below.
                    let _ = done.send(());
                    continue;
                }
                None => return,
            }
        }
        let end = Instant::now() + if refused { RETRY } else { GATHER };
        let mut flush = None;
        let mut is_open = true;
        while writer.waiting.len() < BATCH || refused {
            match tokio::time::timeout_at(end, inbox.recv()).await {
                Ok(Some(Message::Entry(entry))) => writer.keep(entry),
                Ok(Some(Message::Flush(done))) => {
                    flush = Some(done);
                    break;
                }
                Ok(None) => {
                    is_open = false;
                    break;
                }
                Err(_) => break,
            }
        }
        refused = !writer.write(&written).await;
        if let Some(done) = flush {
            let _ = done.send(());
        }
        if !is_open {
            return;
        }
    }
}

struct Writer {
    store: Arc<Store>,
    waiting: VecDeque<Entry>,
    dropped: u64,
}

impl Writer {
    fn keep(&mut self, entry: Entry) {
        if self.waiting.len() == KEPT {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(entry);
    }

    /// Writes all that waits; false when the store refuses, which keeps the rest for the next time.
    async fn write(&mut self, written: &impl Fn(&str)) -> bool {
        while !self.waiting.is_empty() {
            let batch: Vec<Entry> = self.waiting.iter().take(BATCH).cloned().collect();
            if let Err(error) = self.store.put(&batch).await {
                tracing::error!(%error, waiting = self.waiting.len(), "what jobs report cannot be stored now");
                return false;
            }
            self.waiting.drain(..batch.len());
            let mut jobs: Vec<&str> = batch.iter().map(Entry::job).collect();
            jobs.sort_unstable();
            jobs.dedup();
            jobs.into_iter().for_each(written);
        }
        if self.dropped > 0 {
            tracing::warn!(entries = self.dropped, "lost what jobs reported while the store refused it");
            self.dropped = 0;
        }
        true
    }
}
