//! The HTTP surface over a real engine and a fixture model: each endpoint, what it gives, and what it refuses.

mod support;

#[path = "http/bad_input.rs"]
mod bad_input;
#[path = "http/fine_tuning.rs"]
mod fine_tuning;
#[path = "http/generate_lite.rs"]
mod generate_lite;
#[path = "http/malformed.rs"]
mod malformed;
#[path = "http/openai.rs"]
mod openai;
#[path = "http/paths.rs"]
mod paths;
#[path = "http/rl_collect.rs"]
mod rl_collect;
#[path = "http/rl_train.rs"]
mod rl_train;
#[path = "http/rl_uploads.rs"]
mod rl_uploads;
#[path = "http/server.rs"]
mod server;
#[path = "http/training.rs"]
mod training;
#[path = "http/training_run.rs"]
mod training_run;
#[path = "http/uploads.rs"]
mod uploads;
