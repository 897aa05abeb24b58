//! One request while it is in the engine: its tokens, its sampler, its text, and where its events go. No tensor.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::EngineError;
use super::command::{AdapterHandle, Event, FinishReason, GenerateRequest, ScoreRequest, Usage};
use super::detokenize::Detokenizer;
use super::sampler::{Sampler, logprobs};
use crate::metrics;
use crate::model::tokenizer::Tokenizer;

/// A request with its state.
pub(super) struct Sequence {
    /// Prompt and answer so far.
    pub(super) tokens: Vec<u32>,
    /// Held as long as the request lives: it pins the adapter.
    pub(super) adapter: Option<AdapterHandle>,
    pub(super) work: Work,
    /// Of whoever asked.
    pub(super) span: tracing::Span,
}

/// What the request is after.
pub(super) enum Work {
    Answer(Box<Answer>),
    Score { from: usize, logprobs: Vec<f32>, reply: oneshot::Sender<Result<Vec<f32>, EngineError>> },
}

/// An answer that is being generated.
pub(super) struct Answer {
    prompt_tokens: usize,
    max_new_tokens: usize,
    stop_token_ids: Vec<u32>,
    top_logprobs: Option<usize>,
    sampler: Sampler,
    text: Detokenizer,
    events: mpsc::UnboundedSender<Event>,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    latest_token: Option<Instant>,
}

/// Whether a sequence goes on after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It got one more token to work on.
    Extended,
    /// It has prompt left.
    Continues,
    /// Its last event is sent.
    Ended,
}

impl Sequence {
    /// `model_stop` are the model's own end tokens.
    pub(super) fn generate(
        request: GenerateRequest,
        events: mpsc::UnboundedSender<Event>,
        submitted: Instant,
        tokenizer: Arc<Tokenizer>,
        model_stop: &[u32],
        vocab_size: usize,
    ) -> Self {
        let mut stop_token_ids = request.stop_token_ids;
        if !request.ignore_eos {
            stop_token_ids.extend(model_stop);
        }
        let answer = Answer {
            prompt_tokens: request.prompt.len(),
            max_new_tokens: request.max_new_tokens,
            stop_token_ids,
            top_logprobs: request.top_logprobs,
            sampler: Sampler::new(request.sampling, &request.prompt, vocab_size),
            text: Detokenizer::new(tokenizer, request.stop),
            events,
            submitted,
            started: None,
            first_token: None,
            latest_token: None,
        };
        let work = Work::Answer(Box::new(answer));
        Self { tokens: request.prompt, adapter: request.adapter, work, span: tracing::Span::current() }
    }

    pub(super) fn score(
        request: ScoreRequest,
        reply: oneshot::Sender<Result<Vec<f32>, EngineError>>,
    ) -> Self {
        let ScoreRequest { tokens, from, adapter } = request;
        let logprobs = Vec::with_capacity(tokens.len() - from);
        Self { tokens, adapter, work: Work::Score { from, logprobs, reply }, span: tracing::Span::current() }
    }

    /// Tokens that it may have in the end.
    pub(super) fn most_tokens(&self) -> usize {
        match &self.work {
            // The last token is never fed back.
            Work::Answer(a) => self.tokens.len() + a.max_new_tokens - 1,
            Work::Score { .. } => self.tokens.len(),
        }
    }

    /// Whoever asked has gone.
    pub(super) fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Answer(answer) => answer.events.is_closed(),
            Work::Score { reply, .. } => reply.is_closed(),
        }
    }

    /// Which of the `count` rows from position `start` need logits, by offset.
    pub(super) fn wanted(&self, start: usize, count: usize) -> std::ops::Range<usize> {
        let end = start + count;
        match self.work {
            Work::Answer(_) if end == self.tokens.len() => count - 1..count,
            Work::Answer(_) => 0..0,
            Work::Score { from, .. } => {
                // The last row predicts a token that is not there.
                let last = count - usize::from(end == self.tokens.len());
                (from - 1).saturating_sub(start).min(last)..last
            }
        }
    }

    /// Notes that the first step works on it.
    pub(super) fn mark_started(&mut self, now: Instant) {
        if let Work::Answer(answer) = &mut self.work {
            answer.started.get_or_insert(now);
        }
    }

    /// Takes the logits of the rows from `start` on that it wanted.
    pub(super) fn take(&mut self, start: usize, rows: &mut [Vec<f32>], now: Instant) -> Progress {
        match &mut self.work {
            Work::Answer(answer) => match rows {
                [] => Progress::Continues,
                [row, ..] => answer.next(row, &mut self.tokens, now),
            },
            Work::Score { from, logprobs: scores, reply } => {
                for (i, row) in rows.iter().enumerate() {
                    scores.push(logprobs(row, self.tokens[start + i + 1], 0, 1.0).chosen);
                }
                if scores.len() + *from < self.tokens.len() {
                    return Progress::Continues;
                }
                let (reply, scores) =
                    (std::mem::replace(reply, oneshot::channel().0), std::mem::take(scores));
                // An asker that has gone needs no answer.
                let _ = reply.send(Ok(scores));
                Progress::Ended
            }
        }
    }

    /// Puts what it was given and what it gave into the metrics, at its end. Scores are no answers.
    pub(super) fn count_tokens(&self) {
        if let Work::Answer(answer) = &self.work {
            let adapter = self.adapter.as_ref().map(|key| key.name.as_str());
            metrics::tokens(adapter, answer.prompt_tokens, self.tokens.len() - answer.prompt_tokens);
        }
    }

    /// Tells whoever asked that the request failed.
    pub(super) fn fail(self, error: EngineError) {
        // An asker that has gone needs no answer.
        match self.work {
            Work::Answer(answer) => drop(answer.events.send(Event::Failed(error))),
            Work::Score { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

impl Answer {
    fn next(&mut self, row: &mut [f32], tokens: &mut Vec<u32>, now: Instant) -> Progress {
        let unchanged = self.top_logprobs.map(|_| row.to_vec());
        let Some(token) = self.sampler.next(row) else {
            let reason = "the model's output is not finite; the weights or the adapter are damaged";
            self.send(Event::Failed(EngineError::Device(reason.into())));
            return Progress::Ended;
        };
        let top = self.top_logprobs.unwrap_or(0);
        let position = unchanged.map(|row| logprobs(&row, token, top, self.sampler.temperature()));
        self.first_token.get_or_insert(now);
        if let Some(before) = self.latest_token.replace(now) {
            metrics::token_gap(now.duration_since(before).as_secs_f64());
        }
        tokens.push(token);
        let new = tokens.len() - self.prompt_tokens;
        if self.stop_token_ids.contains(&token) {
            let rest = self.text.finish();
            self.send(Event::Token { token, text: String::new(), logprobs: position });
            return self.end(rest.text, FinishReason::Stop, new, now);
        }
        let piece = self.text.push(token);
        self.send(Event::Token { token, text: piece.text, logprobs: position });
        if piece.stopped {
            return self.end(String::new(), FinishReason::Stop, new, now);
        }
        if new == self.max_new_tokens {
            let rest = self.text.finish();
            let reason = if rest.stopped { FinishReason::Stop } else { FinishReason::Length };
            return self.end(rest.text, reason, new, now);
        }
        Progress::Extended
    }

    fn end(&self, text: String, reason: FinishReason, completion_tokens: usize, now: Instant) -> Progress {
        let ms = |at: Option<Instant>| at.unwrap_or(now).duration_since(self.submitted).as_secs_f64() * 1e3;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            queue_ms: ms(self.started),
            first_token_ms: ms(self.first_token),
            total_ms: ms(Some(now)),
        };
        self.send(Event::Finished { text, reason, usage });
        Progress::Ended
    }

    /// A receiver that has gone is noticed before the next step.
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }
}
