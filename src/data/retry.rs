//! Trying again: what went wrong with an attempt, and how long to wait before the next. Knows no protocol.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

use super::object::Patience;

/// Longest wait that a server can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// What went wrong with one attempt.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may mend it.
    Passing {
        /// In words.
        reason: String,
        /// What the server asked for.
        wait: Option<Duration>,
    },
    /// Nothing will.
    Final(String),
}

impl Failure {
    pub(super) fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), wait: None }
    }

    /// The bytes are not those of before.
    pub(super) fn changed() -> Self {
        Self::Final("the data was changed while it was read; start anew".into())
    }

    /// After so much of the whole.
    pub(super) fn at(self, place: &str) -> Self {
        match self {
            Self::Passing { reason, wait } => Self::Passing { reason: format!("{reason} {place}"), wait },
            Self::Final(reason) => Self::Final(reason),
        }
    }

    /// With the seconds of a `Retry-After`, as far as they are bearable.
    pub(super) fn after(reason: impl Into<String>, retry_after: Option<&str>) -> Self {
        let seconds = retry_after.and_then(|text| text.trim().parse().ok());
        let wait = seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        Self::Passing { reason: reason.into(), wait }
    }
}

/// Attempts in a row that brought nothing.
pub(super) struct Retries {
    delays: ExponentialBackoff,
    failures: u32,
}

impl Retries {
    pub(super) fn new(patience: Patience) -> Self {
        // With some jitter, so that many clients do not come back at once.
        let delays = ExponentialBuilder::new()
            .with_min_delay(patience.backoff)
            .with_max_times(patience.retries as usize)
            .with_jitter()
            .build();
        Self { delays, failures: 0 }
    }

    /// Waits before the next attempt, as long as the server asks for, else twice as long as before. `shown` names in
    /// the log what is tried.
    ///
    /// # Errors
    /// The failure is for good, or patience has ended: the words for the user.
    pub(super) async fn wait(&mut self, failure: Failure, shown: &str) -> Result<(), String> {
        self.failures += 1;
        let (reason, wait) = match failure {
            Failure::Final(reason) => return Err(reason),
            Failure::Passing { reason, wait } => (reason, wait),
        };
        let Some(delay) = self.delays.next() else {
            let attempts = if self.failures == 1 { "attempt" } else { "attempts" };
            return Err(format!("{reason} (after {} {attempts})", self.failures));
        };
        let wait = wait.unwrap_or(delay);
        tracing::warn!(source = shown, reason, wait_s = wait.as_secs_f64(), "trying again");
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retries(retries: u32) -> Retries {
        Retries::new(Patience { retries, backoff: Duration::from_millis(1), ..Patience::default() })
    }

    #[tokio::test]
    async fn attempts_end_with_patience_or_a_failure_for_good() {
        for (allowed, expected) in [(0, "busy (after 1 attempt)"), (2, "busy (after 3 attempts)")] {
            let mut retries = retries(allowed);
            for _ in 0..allowed {
                assert_eq!(retries.wait(Failure::passing("busy"), "x").await, Ok(()));
            }
            assert_eq!(retries.wait(Failure::passing("busy"), "x").await, Err(expected.into()));
        }
        assert_eq!(retries(5).wait(Failure::Final("no".into()), "x").await, Err("no".into()));
    }

    #[test]
    fn a_server_says_when_to_come_back() {
        for (header, expected) in [
            (Some("2"), Some(2)),
            (Some(" 7 "), Some(7)),
            (Some("99999"), Some(60)),
            (Some("soon"), None),
            (None, None),
        ] {
            let Failure::Passing { wait, .. } = Failure::after("busy", header) else { panic!("it passes") };
            assert_eq!(wait, expected.map(Duration::from_secs), "{header:?}");
        }
    }
}
