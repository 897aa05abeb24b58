//! What a connection is doing, and how long it may: pure bookkeeping with times given from outside, and a slow tick
//! that looks at it. It must not know sockets or HTTP's frames.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::Version;
use tokio::sync::Notify;

use crate::metrics;

/// Longest time between two looks at a connection.
const TICK: Duration = Duration::from_secs(1);
/// How long a connection that was asked to end may take to do so.
const CLOSING: Duration = Duration::from_secs(1);

/// How long a client may let the server wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patience {
    /// For the head of a request, from its first byte; for the first one, from the connection's beginning.
    pub head: Duration,
    /// For the next request, from the end of the last answer.
    pub idle: Duration,
    /// For reading an answer: since a byte of it was last taken.
    pub read: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(10), idle: Duration::from_secs(75), read: Duration::from_secs(30) }
    }
}

impl Patience {
    fn tick(&self) -> Duration {
        (self.head.min(self.idle).min(self.read) / 4).clamp(Duration::from_millis(5), TICK)
    }
}

/// What becomes of a connection, with the reason as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No request is lost by asking it to end.
    Close(&'static str),
    /// It ends now.
    Cut(&'static str),
}

/// One connection's state.
pub(super) struct Activity {
    state: Mutex<State>,
    evicted: Notify,
}

#[derive(Debug)]
struct State {
    /// Requests whose answer has not gone out.
    requests: usize,
    /// A request was there.
    served: bool,
    /// Since when nothing is wanted of the server.
    quiet_since: Instant,
    /// When the first byte came that belongs to no request yet.
    head_since: Option<Instant>,
    /// Since when the socket takes nothing.
    blocked_since: Option<Instant>,
    /// When the socket last took something.
    wrote_at: Instant,
    /// Answers of which a part was taken, by request: HTTP asks for the next part when the client has read.
    taken: HashMap<u64, Taken>,
    next_request: u64,
    /// It was asked to end.
    closing_since: Option<Instant>,
    /// It is to go for another.
    evicted: bool,
}

#[derive(Debug, Clone, Copy)]
struct Taken {
    at: Instant,
    /// Other requests share the socket, so that what it takes says nothing of this answer.
    shared: bool,
}

impl State {
    fn new(now: Instant) -> Self {
        Self {
            requests: 0,
            served: false,
            quiet_since: now,
            head_since: None,
            blocked_since: None,
            wrote_at: now,
            taken: HashMap::new(),
            next_request: 0,
            closing_since: None,
            evicted: false,
        }
    }

    fn verdict(&self, now: Instant, patience: &Patience) -> Option<Verdict> {
        let over = |since: Instant, limit: Duration| now.saturating_duration_since(since) >= limit;
        let stalled = |taken: &Taken| {
            over(if taken.shared { taken.at } else { taken.at.max(self.wrote_at) }, patience.read)
        };
        if self.blocked_since.is_some_and(|since| over(since, patience.read))
            || self.taken.values().any(stalled)
        {
            return Some(Verdict::Cut("answer_not_read"));
        }
        if self.requests > 0 {
            return None;
        }
        if let Some(since) = self.closing_since {
            // The end of an answer may still be on its way.
            let since = since.max(self.quiet_since).max(self.wrote_at);
            return over(since, CLOSING).then_some(Verdict::Cut("not_closed"));
        }
        if self.evicted {
            return Some(Verdict::Close("made_room"));
        }
        let head = match self.served {
            true => self.head_since,
            false => Some(self.quiet_since),
        };
        if head.is_some_and(|since| over(since, patience.head)) {
            return Some(Verdict::Cut("head_timeout"));
        }
        over(self.quiet_since.max(self.wrote_at), patience.idle).then_some(Verdict::Close("idle"))
    }
}

impl Activity {
    fn new() -> Self {
        Self { state: Mutex::new(State::new(Instant::now())), evicted: Notify::new() }
    }

    /// Whoever panicked with the lock left plain numbers behind.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The TLS handshake is through: only now can a request begin.
    pub(super) fn shaken(&self) {
        let mut state = self.state();
        (state.quiet_since, state.head_since) = (Instant::now(), None);
    }

    /// Bytes came.
    pub(super) fn read(&self) {
        let mut state = self.state();
        if state.requests == 0 && state.head_since.is_none() {
            state.head_since = Some(Instant::now());
        }
    }

    /// The socket took bytes.
    pub(super) fn wrote(&self) {
        let mut state = self.state();
        (state.blocked_since, state.wrote_at) = (None, Instant::now());
    }

    /// The socket takes nothing for now.
    pub(super) fn blocked(&self) {
        self.state().blocked_since.get_or_insert_with(Instant::now);
    }

    /// A request is there; it is under way until what is returned is dropped.
    pub(super) fn enter_request(self: &Arc<Self>, version: Version) -> UnderWay {
        let mut state = self.state();
        state.requests += 1;
        state.served = true;
        state.head_since = None;
        state.next_request += 1;
        UnderWay { activity: self.clone(), id: state.next_request, shared: version >= Version::HTTP_2 }
    }

    /// Ends when the connection is to go for another.
    pub(super) async fn evicted(&self) {
        while !self.state().evicted {
            self.evicted.notified().await;
        }
    }

    /// Ends when the connection has to, with how.
    pub(super) async fn verdict(&self, patience: &Patience) -> Verdict {
        loop {
            let verdict = {
                let mut state = self.state();
                let verdict = state.verdict(Instant::now(), patience);
                if matches!(verdict, Some(Verdict::Close(_))) {
                    state.closing_since = Some(Instant::now());
                }
                verdict
            };
            if let Some(verdict) = verdict {
                return verdict;
            }
            tokio::select! {
                () = tokio::time::sleep(patience.tick()) => {}
                () = self.evicted.notified() => {}
            }
        }
    }
}

/// A request under way.
pub(super) struct UnderWay {
    activity: Arc<Activity>,
    id: u64,
    shared: bool,
}

impl UnderWay {
    /// A part of the answer was taken: until the next is asked for, the client reads.
    pub(super) fn taken(&self) {
        let taken = Taken { at: Instant::now(), shared: self.shared };
        self.activity.state().taken.insert(self.id, taken);
    }

    /// The next part was asked for and is not there yet: the client waits for the server.
    pub(super) fn awaited(&self) {
        self.activity.state().taken.remove(&self.id);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.taken.remove(&self.id);
        state.requests -= 1;
        if state.requests == 0 {
            (state.quiet_since, state.head_since) = (Instant::now(), None);
        }
    }
}

/// All connections that are open.
#[derive(Clone, Default)]
pub(super) struct Connections {
    open: Arc<Mutex<HashMap<u64, Arc<Activity>>>>,
}

impl Connections {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Activity>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another connection; it is among them until the entry is dropped.
    pub(super) fn enter(&self) -> (Arc<Activity>, Entry) {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let activity = Arc::new(Activity::new());
        let mut open = self.open();
        open.insert(id, activity.clone());
        metrics::connections(open.len());
        drop(open);
        (activity, Entry { connections: self.clone(), id })
    }

    /// Has the connection go that has no request and was quiet longest, if there is one.
    pub(super) fn evict_quietest(&self) {
        let open = self.open();
        let quiet = open.values().filter_map(|activity| {
            let state = activity.state();
            (state.requests == 0 && !state.evicted).then_some((state.quiet_since, activity))
        });
        if let Some((_, activity)) = quiet.min_by_key(|(since, _)| *since) {
            activity.state().evicted = true;
            activity.evicted.notify_one();
        }
    }
}

/// A place among the open connections.
pub(super) struct Entry {
    connections: Connections,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.connections.open();
        open.remove(&self.id);
        metrics::connections(open.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        head: Duration::from_secs(10),
        idle: Duration::from_secs(75),
        read: Duration::from_secs(30),
    };

    fn after(seconds: u64, from: Instant) -> Instant {
        from + Duration::from_secs(seconds)
    }

    #[test]
    fn a_head_has_its_time_and_an_idle_connection_another() {
        let start = Instant::now();
        let mut state = State::new(start);
        assert_eq!(state.verdict(after(9, start), &PATIENCE), None);
        assert_eq!(state.verdict(after(10, start), &PATIENCE), Some(Verdict::Cut("head_timeout")));
        state.served = true;
        assert_eq!(state.verdict(after(74, start), &PATIENCE), None);
        assert_eq!(state.verdict(after(75, start), &PATIENCE), Some(Verdict::Close("idle")));
        state.head_since = Some(after(20, start));
        assert_eq!(state.verdict(after(29, start), &PATIENCE), None);
        assert_eq!(state.verdict(after(30, start), &PATIENCE), Some(Verdict::Cut("head_timeout")));
        // A request under way may take as long as it takes.
        state.requests = 1;
        assert_eq!(state.verdict(after(10_000, start), &PATIENCE), None);
    }

    #[test]
    fn an_answer_must_be_read_but_may_be_waited_for() {
        let start = Instant::now();
        let mut state = State { requests: 1, served: true, ..State::new(start) };
        state.blocked_since = Some(start);
        assert_eq!(state.verdict(after(29, start), &PATIENCE), None);
        assert_eq!(state.verdict(after(30, start), &PATIENCE), Some(Verdict::Cut("answer_not_read")));
        state.blocked_since = None;
        // On a socket of its own, bytes that go out are bytes that are read.
        state.taken.insert(1, Taken { at: start, shared: false });
        state.wrote_at = after(25, start);
        assert_eq!(state.verdict(after(54, start), &PATIENCE), None);
        assert_eq!(state.verdict(after(55, start), &PATIENCE), Some(Verdict::Cut("answer_not_read")));
        // On a shared one they may be another answer's.
        state.taken.insert(1, Taken { at: start, shared: true });
        assert_eq!(state.verdict(after(30, start), &PATIENCE), Some(Verdict::Cut("answer_not_read")));
        state.taken.clear();
        assert_eq!(state.verdict(after(10_000, start), &PATIENCE), None);
    }

    #[test]
    fn who_is_asked_to_end_ends() {
        let start = Instant::now();
        let mut state = State { served: true, evicted: true, ..State::new(start) };
        assert_eq!(state.verdict(start, &PATIENCE), Some(Verdict::Close("made_room")));
        state.closing_since = Some(start);
        assert_eq!(state.verdict(start, &PATIENCE), None);
        assert_eq!(state.verdict(after(1, start), &PATIENCE), Some(Verdict::Cut("not_closed")));
        state.requests = 1;
        assert_eq!(
            state.verdict(after(1, start), &PATIENCE),
            None,
            "a request that came meanwhile is answered"
        );
    }

    #[tokio::test]
    async fn the_quietest_connection_makes_room() {
        let connections = Connections::default();
        let (first, _first_entry) = connections.enter();
        let (second, second_entry) = connections.enter();
        let busy = first.enter_request(Version::HTTP_11);
        connections.evict_quietest();
        assert!(!first.state().evicted, "it has a request");
        tokio::time::timeout(Duration::from_secs(1), second.evicted()).await.expect("it is told");
        drop(second_entry);
        connections.evict_quietest();
        assert!(!first.state().evicted);
        drop(busy);
        connections.evict_quietest();
        assert_eq!(first.verdict(&PATIENCE).await, Verdict::Close("made_room"));
    }
}
