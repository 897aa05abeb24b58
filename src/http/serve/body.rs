//! A request's body on its way in, with a clock that runs while the server waits for the client and stands while the
//! client waits for the server.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::BoxError;
use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::time::Sleep;

/// How long a body may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BodyPatience {
    /// Without a byte of it.
    pub idle: Duration,
    /// In all, however short it is.
    pub least: Duration,
    /// Beyond that, bytes a second that must come on the average.
    pub bytes_per_s: u64,
}

impl Default for BodyPatience {
    fn default() -> Self {
        Self { idle: Duration::from_secs(15), least: Duration::from_secs(30), bytes_per_s: 16 << 10 }
    }
}

impl BodyPatience {
    /// Time that waiting for `bytes` may have taken.
    fn allowed(&self, bytes: u64) -> Duration {
        self.least + Duration::from_millis(bytes.saturating_mul(1000) / self.bytes_per_s.max(1))
    }
}

/// The body came too slowly; the request is answered with 408.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the body did not arrive in time: nothing came for {idle_s} s, or too little in all; send it faster")]
pub(in crate::http) struct TooSlow {
    idle_s: u64,
}

/// A body with its clock.
pub(super) struct TimedBody<B> {
    body: B,
    patience: BodyPatience,
    received_bytes: u64,
    /// Time that the server has waited before the wait that is on.
    waited: Duration,
    waiting_since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> TimedBody<B> {
    pub(super) fn new(body: B, patience: BodyPatience) -> Self {
        Self { body, patience, received_bytes: 0, waited: Duration::ZERO, waiting_since: None, timer: None }
    }

    /// Starts the wait if none is on, and says whether it has been too long.
    fn poll_timer(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.waiting_since.is_none() {
            let now = Instant::now();
            self.waiting_since = Some(now);
            let left = self.patience.allowed(self.received_bytes).saturating_sub(self.waited);
            let deadline = (now + left.min(self.patience.idle)).into();
            match &mut self.timer {
                Some(timer) => timer.as_mut().reset(deadline),
                None => self.timer = Some(Box::pin(tokio::time::sleep_until(deadline))),
            }
        }
        let timer = self.timer.as_mut().expect("a wait without its timer is a bug");
        timer.as_mut().poll(context)
    }
}

impl<B> HttpBody for TimedBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) else {
            let idle_s = self.patience.idle.as_secs();
            return self.poll_timer(context).map(|()| Some(Err(TooSlow { idle_s }.into())));
        };
        if let Some(since) = self.waiting_since.take() {
            self.waited += since.elapsed();
        }
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            self.received_bytes += bytes.len() as u64;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use futures::StreamExt;

    use super::*;

    const PATIENCE: BodyPatience = BodyPatience {
        idle: Duration::from_millis(200),
        least: Duration::from_millis(400),
        bytes_per_s: 1000,
    };

    /// The bytes of a body whose parts come with these pauses before them, or that it was too slow.
    async fn read(parts: &'static [(u64, usize)], pause_ms: u64) -> Result<usize, String> {
        let parts = futures::stream::iter(parts).then(|&(wait_ms, bytes)| async move {
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            Ok::<_, std::io::Error>(vec![b'x'; bytes])
        });
        let body = TimedBody::new(Body::from_stream(parts), PATIENCE);
        let mut body = Body::new(body).into_data_stream();
        let mut all = 0;
        while let Some(part) = body.next().await {
            all += part.map_err(|error| error.to_string())?.len();
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
        Ok(all)
    }

    #[tokio::test]
    async fn silence_and_a_trickle_end_a_body() {
        assert_eq!(read(&[(50, 10), (50, 10)], 0).await, Ok(20));
        assert!(read(&[(50, 10), (2000, 10)], 0).await.is_err_and(|e| e.contains("in time")));
        let trickle = &[(100, 1); 20];
        assert!(read(trickle, 0).await.is_err_and(|e| e.contains("in time")));
        // What comes fast enough may be as long as it is.
        assert_eq!(read(&[(100, 200); 20], 0).await, Ok(4000));
    }

    #[tokio::test]
    async fn a_server_that_is_slow_itself_blames_nobody() {
        assert_eq!(read(&[(1, 1); 5], 150).await, Ok(5));
    }
}
