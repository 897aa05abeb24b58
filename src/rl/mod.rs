//! Episodes: answers that were collected, rewarded and logged, and what is learnt from them. `reward` says what an
//! answer earns, `episode` is the stored line, `log` keeps the lines,
//! `outbox` sends them elsewhere, to the places in `sink`. Nothing here knows HTTP or touches a tensor.

mod advantages;
pub mod collect;
pub mod episode;
mod episodes;
pub mod given;
mod grpo;
pub mod learn;
pub mod log;
mod offline;
pub mod outbox;
pub mod plan;
mod prompts;
pub mod reward;
mod rollout;
mod sink;
mod start;

pub use collect::{CollectError, Collector};
pub use episode::{Episode, EpisodeMeta, EpisodeSource, SCHEMA, SamplingMeta, check_run_id};
pub use log::{Appended, EpisodeLog, LogError};
pub use plan::{CollectJob, Wanted};
pub use reward::{Reward, RewardError, Rewarder, Sample};
