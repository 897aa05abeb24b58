//! Settings in two stages: as typed (flags, environment, `configs/server.yaml`), then resolved and checked once.
//! Everything after start-up takes resolved settings. This module opens no model and no socket.

pub mod adapter;
pub mod connectors;
mod named;
pub mod origin;
pub mod server;
pub mod size;
mod yaml;

pub use server::{EngineSettings, LogFormat, ServerFlags, Settings};
pub use size::ByteSize;
