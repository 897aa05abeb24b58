//! Reinforcement learning: episodes and what becomes of them.

pub mod outbox;
mod sink;
