//! Settings in two stages: as typed (flags, environment, `configs/server.yaml`), then resolved and checked once.
//! Everything after start-up takes resolved settings. This module opens no model and no socket.

pub mod adapter;
pub mod connectors;
pub mod duration;
mod named;
pub mod origin;
mod range;
pub mod rl;
pub mod rl_reward;
pub mod rl_sinks;
pub mod rl_train;
pub mod server;
pub mod size;
pub mod size_or;
mod yaml;

pub use duration::TimeSpan;
pub use server::{EngineSettings, LogFormat, ServerFlags, Settings};
pub use size::ByteSize;
