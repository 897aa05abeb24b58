//! A running request to a whole answer, for callers that want no part of it before the end.

use super::EngineError;
use super::command::{Event, FinishReason, Generation, PositionLogprobs, Usage};

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Every token generated, the end token included.
    pub tokens: Vec<AnswerToken>,
    /// Why it ended.
    pub reason: FinishReason,
    /// Counts and times.
    pub usage: Usage,
}

/// One generated token.
#[derive(Debug)]
pub struct AnswerToken {
    /// Its id.
    pub id: u32,
    /// Present when asked for.
    pub logprobs: Option<PositionLogprobs>,
}

impl Generation {
    /// Waits for the end of the answer. Dropping the future cancels the request.
    ///
    /// # Errors
    /// The request failed, or the engine has stopped.
    pub async fn answer(mut self) -> Result<Answer, EngineError> {
        let mut text = String::new();
        let mut tokens = Vec::new();
        while let Some(event) = self.events.recv().await {
            match event {
                Event::Token { token, text: piece, logprobs } => {
                    text.push_str(&piece);
                    tokens.push(AnswerToken { id: token, logprobs });
                }
                Event::Finished { text: rest, reason, usage } => {
                    text.push_str(&rest);
                    return Ok(Answer { text, tokens, reason, usage });
                }
                Event::Failed(error) => return Err(error),
            }
        }
        Err(EngineError::Stopped)
    }
}

impl FinishReason {
    /// The word for it in all the interfaces: `stop` or `length`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}
