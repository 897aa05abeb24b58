//! Episodes: answers that were collected, rewarded and logged, and what is learnt from them. `reward` says what an
//! answer earns, `episode` is the stored line, `log` keeps the lines,
//! `outbox` sends them elsewhere, to the places in `sink`. Nothing here knows HTTP or touches a tensor.

pub mod collect;
pub mod episode;
pub mod given;
pub mod log;
pub mod outbox;
pub mod plan;
pub mod reward;
mod sink;

pub use collect::{CollectError, Collector};
pub use episode::{Episode, EpisodeMeta, EpisodeSource, SCHEMA, SamplingMeta, check_run_id};
pub use log::{Appended, EpisodeLog, LogError};
pub use plan::{CollectJob, Wanted};
pub use reward::{Reward, RewardError, Rewarder, Sample};
