//! Answers as event streams: merges the events of one or several running requests, keeps the connection alive
//! between them, and ends with `[DONE]`. The stream owns the requests: when the client goes, the connection drops the
//! stream, that drops the requests, and the engine frees their slots. What an event looks like is each API's
//! own affair ([`Frames`]).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event as Frame, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, BoxStream, SelectAll, Stream, StreamExt};
use serde::Serialize;

use super::error::ApiError;
use super::generation::observe;
use crate::engine::{EngineError, Event, FinishReason, Generation, PositionLogprobs, Usage};

/// A comment goes out after this long without an event, so that proxies do not take the silence of a waiting
/// request for a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How one API words its stream.
pub(super) trait Frames: Send + 'static {
    /// Before any token.
    fn open(&mut self) -> Vec<Frame>;
    /// One more token of choice `choice`. `text` is what became certain with it.
    fn token(
        &mut self,
        choice: usize,
        token: u32,
        text: String,
        logprobs: Option<PositionLogprobs>,
    ) -> Result<Vec<Frame>, ApiError>;
    /// The end of choice `choice`. `text` is what had been held back.
    fn finished(&mut self, choice: usize, text: String, reason: FinishReason, usage: Usage) -> Vec<Frame>;
    /// After the last choice has ended, before `[DONE]`.
    fn close(&mut self) -> Vec<Frame>;
}

/// An unnamed event of JSON.
pub(super) fn data(value: &impl Serialize) -> Frame {
    Frame::default().json_data(value).expect("a wire type that is no valid JSON is a bug")
}

/// A named event of JSON.
pub(super) fn named(name: &'static str, value: &impl Serialize) -> Frame {
    data(value).event(name)
}

/// Streams the answers of `generations`; the index in the list is the index of the choice.
pub(super) fn respond(generations: Vec<Generation>, mut frames: impl Frames) -> Response {
    let ready = frames.open().into();
    let running = Running {
        open: generations.len(),
        events: stream::select_all(generations.into_iter().enumerate().map(numbered)),
        ready,
        frames,
    };
    stream_of(running.into_stream())
}

/// Answers with a stream of events.
pub(super) fn stream_of(frames: impl Stream<Item = Frame> + Send + 'static) -> Response {
    let frames = frames.map(Ok::<_, Infallible>);
    let mut response = Sse::new(frames).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // nginx holds a response back to fill its buffers unless it is told not to.
    let unbuffered = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response.headers_mut().insert(unbuffered.0, unbuffered.1);
    response
}

/// The events of one request, the last one included. An engine thread that dies closes the channel without a
/// last event; a client still has to learn that the answer is cut.
fn numbered((choice, generation): (usize, Generation)) -> BoxStream<'static, (usize, Event)> {
    stream::unfold(Some(generation), move |generation| async move {
        let mut generation = generation?;
        let event = generation.events.recv().await.unwrap_or(Event::Failed(EngineError::Stopped));
        let rest = matches!(event, Event::Token { .. }).then_some(generation);
        Some(((choice, event), rest))
    })
    .boxed()
}

struct Running<F> {
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    /// Choices that have not ended.
    open: usize,
    /// Frames that wait to be sent.
    ready: VecDeque<Frame>,
    frames: F,
}

impl<F: Frames> Running<F> {
    fn into_stream(self) -> impl Stream<Item = Frame> + Send + 'static {
        stream::unfold(self, |mut running| async move {
            loop {
                if let Some(frame) = running.ready.pop_front() {
                    return Some((frame, running));
                }
                // Ends once every choice has ended, or with the first failure, which empties `events`.
                let (choice, event) = running.events.next().await?;
                running.take(choice, event);
            }
        })
    }

    fn take(&mut self, choice: usize, event: Event) {
        match event {
            Event::Token { token, text, logprobs } => {
                match self.frames.token(choice, token, text, logprobs) {
                    Ok(frames) => self.ready.extend(frames),
                    Err(error) => self.fail(&error),
                }
            }
            Event::Finished { text, reason, usage } => {
                observe(&usage);
                self.ready.extend(self.frames.finished(choice, text, reason, usage));
                self.open -= 1;
                if self.open == 0 {
                    self.ready.extend(self.frames.close());
                    self.ready.push_back(Frame::default().data("[DONE]"));
                }
            }
            Event::Failed(error) => self.fail(&error.into()),
        }
    }

    /// The status is long sent: the envelope goes into the stream, and nothing after it. The other choices are
    /// cancelled.
    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(named("error", &error.body()));
        self.events = SelectAll::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    /// Writes what it is told as plain text.
    struct Plain;

    impl Frames for Plain {
        fn open(&mut self) -> Vec<Frame> {
            vec![Frame::default().data("open")]
        }

        fn token(
            &mut self,
            choice: usize,
            token: u32,
            text: String,
            _: Option<PositionLogprobs>,
        ) -> Result<Vec<Frame>, ApiError> {
            Ok(vec![Frame::default().data(format!("{choice}:{token}:{text}"))])
        }

        fn finished(&mut self, choice: usize, text: String, reason: FinishReason, _: Usage) -> Vec<Frame> {
            vec![Frame::default().data(format!("{choice}:{text}:{reason:?}"))]
        }

        fn close(&mut self) -> Vec<Frame> {
            vec![Frame::default().data("close")]
        }
    }

    fn generation() -> (mpsc::UnboundedSender<Event>, Generation) {
        let (sender, events) = mpsc::unbounded_channel();
        (sender, Generation { events })
    }

    fn token(token: u32, text: &str) -> Event {
        Event::Token { token, text: text.into(), logprobs: None }
    }

    fn finished() -> Event {
        let usage = Usage {
            prompt_tokens: 1,
            completion_tokens: 1,
            queue_ms: 0.0,
            first_token_ms: 1.0,
            total_ms: 2.0,
        };
        Event::Finished { text: "rest".into(), reason: FinishReason::Length, usage }
    }

    async fn body(response: Response) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("the body ends");
        String::from_utf8(bytes.to_vec()).expect("is text")
    }

    #[tokio::test]
    async fn a_stream_ends_with_done_after_its_last_choice() {
        let (first, one) = generation();
        let (second, two) = generation();
        let response = respond(vec![one, two], Plain);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        first.send(token(7, "a")).expect("is open");
        first.send(finished()).expect("is open");
        let reader = tokio::spawn(body(response));
        second.send(token(8, "b")).expect("is open");
        second.send(finished()).expect("is open");
        let text = reader.await.expect("does not panic");
        assert!(text.starts_with("data: open\n\n"), "{text}");
        assert!(text.contains("data: 0:7:a\n\n") && text.contains("data: 1:8:b\n\n"), "{text}");
        assert!(text.ends_with("data: close\n\ndata: [DONE]\n\n"), "{text}");
        assert_eq!(text.matches("rest:Length").count(), 2);
    }

    #[tokio::test]
    async fn a_failure_ends_the_stream_without_done() {
        let (first, one) = generation();
        let (second, two) = generation();
        let response = respond(vec![one, two], Plain);
        second.send(token(8, "b")).expect("is open");
        drop(first);
        let text = body(response).await;
        assert!(text.contains("event: error\n") && text.contains("shutting_down"), "{text}");
        assert!(!text.contains("[DONE]"), "{text}");
        assert!(second.is_closed(), "the other choice is cancelled");
    }

    #[tokio::test]
    async fn dropping_the_response_drops_the_requests() {
        let (sender, one) = generation();
        let response = respond(vec![one], Plain);
        sender.send(token(7, "a")).expect("is open");
        drop(response);
        assert!(sender.is_closed());
    }
}
