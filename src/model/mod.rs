//! Checkpoints as they lie on disk, and the decoder that runs them.

pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod families;
pub mod load;
pub mod spec;
#[cfg(test)]
mod tests;
pub mod tokenizer;
