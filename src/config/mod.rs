//! Settings in two stages: as typed (flags, environment, `configs/server.yaml`), then resolved and checked once.
//! Everything after start-up takes resolved settings. This module opens no model and no socket.

pub mod adapter;
pub mod connectors;
pub mod duration;
pub mod keys;
mod named;
pub mod origin;
mod range;
pub mod rl;
pub mod rl_reward;
pub mod rl_sinks;
pub mod rl_train;
pub mod security;
pub mod server;
mod server_values;
pub mod size;
pub mod size_or;
mod tls;
mod yaml;

pub use duration::TimeSpan;
pub use security::{CorsOrigins, Security};
pub use server::{EngineSettings, LogFormat, ServerFlags, Settings};
pub use size::ByteSize;
pub use tls::TlsFiles;
