//! Token by token to text, never sending half a code point or half a grapheme cluster, and holding back what
//! may be the beginning of a stop text.

use std::sync::Arc;

use crate::model::tokenizer::Tokenizer;

/// The text side of one running request.
pub struct Detokenizer {
    _tokenizer: Arc<Tokenizer>,
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
    /// For an answer that ends at the first of `stop`.
    pub fn new(tokenizer: Arc<Tokenizer>, _stop: Vec<String>) -> Self {
        Self { _tokenizer: tokenizer }
    }

    /// Takes the next token.
    pub fn push(&mut self, _token: u32) -> Piece {
        Piece { text: String::new(), stopped: false }
    }

    /// The rest, once no token follows. Also `stopped` when the rest holds a stop text.
    pub fn finish(&mut self) -> Piece {
        Piece { text: String::new(), stopped: false }
    }
}
