//! Token by token to text, never sending half a code point or half a grapheme cluster, and holding back what
//! may be the beginning of a stop text. Runs on the engine thread between steps: a token costs the same wherever
//! in an answer it stands.

use std::sync::Arc;

use unicode_segmentation::GraphemeCursor;

use crate::model::tokenizer::{TextStream, Tokenizer, TokenizerError};

/// The text side of one running request.
///
/// All pieces together are the full decode of the tokens (special tokens left out), up to the stop text that is
/// complete first; of two that end together the longer one counts. With tokens that spell bytes (`<0xE0>`) a run
/// of them is held until it ends: whether it is text or U+FFFD depends on its last byte.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stream: TextStream,
    stops: Vec<StopMatch>,
    /// Text that is decoded and not sent. It begins where a cluster does.
    held: String,
    /// Where the other clusters in `held` begin. A new character never moves a boundary before the last one.
    boundaries: Vec<usize>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// A stop text was found.
    Stopped,
    /// The rest was sent.
    Finished,
}

/// What became certain with one more token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Whole grapheme clusters; often empty.
    pub text: String,
    /// A stop text was found: `text` ends before it, and nothing follows.
    pub stopped: bool,
}

impl Detokenizer {
    /// For an answer that ends at the first of `stop`. An empty stop text is none.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Self {
        let stream = tokenizer.text_stream();
        let stops = stop.into_iter().filter(|text| !text.is_empty()).map(StopMatch::new).collect();
        Self { tokenizer, stream, stops, held: String::new(), boundaries: Vec::new(), state: State::Running }
    }

    /// Takes the next token. Behind a stop text, and once finished, nothing comes any more.
    pub fn push(&mut self, token: u32) -> Piece {
        if self.state != State::Running {
            return self.nothing();
        }
        let text = self.stream.push(&self.tokenizer, token);
        if self.hold(&or_nothing(text)) {
            return self.stop();
        }
        // The last cluster may still grow, and what may be the beginning of a stop text may become one.
        let suspect = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let certain = self.held.len() - suspect;
        let sent = self.boundaries.partition_point(|&boundary| boundary <= certain);
        let Some(end) = sent.checked_sub(1).map(|last| self.boundaries[last]) else { return self.nothing() };
        self.boundaries.drain(..sent);
        self.boundaries.iter_mut().for_each(|boundary| *boundary -= end);
        let rest = self.held.split_off(end);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The rest, once no token follows. Also `stopped` when the rest holds a stop text.
    pub fn finish(&mut self) -> Piece {
        if self.state != State::Running {
            return self.nothing();
        }
        let text = self.stream.finish();
        if self.hold(&or_nothing(text)) {
            return self.stop();
        }
        self.state = State::Finished;
        Piece { text: std::mem::take(&mut self.held), stopped: false }
    }

    fn nothing(&self) -> Piece {
        Piece { text: String::new(), stopped: self.state == State::Stopped }
    }

    /// What precedes the stop text that `hold` left at the end of `held`.
    fn stop(&mut self) -> Piece {
        self.state = State::Stopped;
        Piece { text: std::mem::take(&mut self.held), stopped: true }
    }

    /// Appends text to what is held. True when a stop text is complete: `held` then ends before it.
    fn hold(&mut self, text: &str) -> bool {
        let mut at = self.held.len();
        self.held.push_str(text);
        for c in text.chars() {
            let end = at + c.len_utf8();
            let longest =
                self.stops.iter_mut().filter_map(|stop| stop.advance(&self.held.as_bytes()[at..end])).max();
            if let Some(len) = longest {
                self.held.truncate(end - len);
                return true;
            }
            if at > 0 && self.is_boundary(at) {
                self.boundaries.push(at);
            }
            at = end;
        }
        false
    }

    /// Whether a cluster begins at this byte of `held`, given the characters up to the one there. The text
    /// before `held` ended where a cluster did, so it has no say.
    fn is_boundary(&self, at: usize) -> bool {
        let boundary = GraphemeCursor::new(at, self.held.len(), true).is_boundary(&self.held, 0);
        boundary.expect("the whole text is given, so no more of it is asked for")
    }
}

/// The text, or none with a word in the log where the library fails: the request goes on.
fn or_nothing(text: Result<String, TokenizerError>) -> String {
    text.unwrap_or_else(|error| {
        tracing::warn!(%error, "a token is left out of an answer");
        String::new()
    })
}

/// Looks for one stop text byte by byte (Knuth, Morris and Pratt 1977), so that no byte is compared again.
struct StopMatch {
    text: Vec<u8>,
    /// For each beginning of `text`, the length of the longest proper beginning that also ends it.
    borders: Vec<usize>,
    /// Bytes at the end of the answer so far that are the beginning of `text`.
    matched: usize,
}

impl StopMatch {
    fn new(text: String) -> Self {
        let text = text.into_bytes();
        let mut borders = vec![0; text.len()];
        let mut border = 0;
        for at in 1..text.len() {
            while border > 0 && text[at] != text[border] {
                border = borders[border - 1];
            }
            border += usize::from(text[at] == text[border]);
            borders[at] = border;
        }
        Self { text, borders, matched: 0 }
    }

    /// Takes the bytes of one character; the length of the stop text when it is complete with them.
    fn advance(&mut self, bytes: &[u8]) -> Option<usize> {
        for &byte in bytes {
            while self.matched > 0 && self.text[self.matched] != byte {
                self.matched = self.borders[self.matched - 1];
            }
            self.matched += usize::from(self.text[self.matched] == byte);
        }
        (self.matched == self.text.len()).then_some(self.text.len())
    }
}

#[cfg(test)]
mod tests;
