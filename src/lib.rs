//! Gurukul serves a small language model over HTTP and teaches it at the same time.
//!
//! The map, from the outside in (`ARCHITECTURE.md` has the picture):
//!
//! - [`cli`] and [`config`]: the command line, settings as typed and as resolved;
//! - [`app`]: builds everything once and shuts it down in order;
//! - [`http`]: the one route table and one file a resource;
//! - [`adapters`]: LoRA adapters as PEFT directories on disk;
//! - [`engine`]: the thread that owns the device; scheduling, sampling, streaming;
//! - [`model`]: checkpoints, tokenizers, families, the one decoder;
//! - [`nn`]: tensors only: layers, kernels, the KV cache;
//! - [`data`]: streams of records from where they lie, and model files from a hub;
//! - [`train`]: the recipe that turns records into an adapter;
//! - [`rl`]: episodes: collected, rewarded, logged, and learnt from;
//! - [`jobs`]: long work that outlives a request and a crash;
//! - [`text`]: pure functions on text: scripts, languages, cleaning, likeness;
//! - [`metrics`]: every metric, named in one place.
//!
//! Imports run downward only; `tests/tidy.rs` holds that.

pub mod adapters;
pub mod app;
pub mod cli;
pub mod config;
pub mod data;
pub mod engine;
pub mod http;
pub mod jobs;
pub mod metrics;
pub mod model;
pub mod nn;
pub mod rl;
pub mod text;
pub mod train;
