//! Checkpoints as they lie on disk, and the decoder that runs them.

pub mod chat_template;
pub mod load;
pub mod tokenizer;
