//! What training minimises: a loss a token, as a function of the token's log-probability.

/// A loss a token. Each gives its value and its derivative by ln p, which is all that the chunked kernel needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenLoss {
    /// -ln p.
    CrossEntropy,
}

impl TokenLoss {
    /// The loss at this log-probability, and its derivative by it.
    pub fn at(self, logprob: f32) -> (f32, f32) {
        match self {
            Self::CrossEntropy => (-logprob, -1.0),
        }
    }
}
