//! How episodes become an adapter: the section `train` of `rl_config.yaml`, and what a request puts before it. Knows
//! no model, so whether modules exist is checked elsewhere.

use std::ops::Bound;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::adapter::{AdapterConfig, Checkpointing, FieldError, Scheduler, TargetModules};
use super::range::within;

/// Fields of sampling that a policy gradient fixes, and what they are fixed to.
const FIXED: [(&str, &str); 5] = [
    ("top_k", "off (0)"),
    ("top_p", "off (1)"),
    ("min_p", "off (0)"),
    ("repetition_penalty", "off (1)"),
    ("lora_dropout", "0"),
];

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// The policy gradient, corrected for the policy that sampled.
    ImportanceSampling,
    /// The same, as far as the policy has not moved too far (PPO).
    PpoClip,
    /// Cross-entropy over the best episodes.
    Rft,
    /// Pairs of a better and a worse answer.
    Dpo,
}

impl Loss {
    /// As settings and requests name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ImportanceSampling => "importance_sampling",
            Self::PpoClip => "ppo_clip",
            Self::Rft => "rft",
            Self::Dpo => "dpo",
        }
    }

    /// Whether it needs advantages and the log-probabilities of the policy that sampled.
    pub fn is_policy_gradient(self) -> bool {
        matches!(self, Self::ImportanceSampling | Self::PpoClip)
    }
}

macro_rules! settings {
    ($($(#[$of:meta])* $field:ident: $type:ty = $default:expr,)*) => {
        /// The section `train`, resolved.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct RlTrainConfig {
            $($(#[$of])* pub $field: $type,)*
        }

        impl Default for RlTrainConfig {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

settings! {
    /// What is minimised.
    loss: Loss = Loss::PpoClip,
    /// `ppo_clip`: how far the ratio may fall below 1.
    clip_low: f64 = 0.2,
    /// `ppo_clip`: how far it may rise above 1.
    clip_high: f64 = 0.28,
    /// Weight of the KL penalty to the base model; 0 is none.
    kl_beta: f64 = 0.0,
    /// Dr. GRPO's advantages and lengths: no division by the spread of a group, nor by the length of an answer.
    unbiased: bool = false,
    /// `online`: rounds of sampling and learning.
    steps: u64 = 50,
    /// `online`: prompts of a step.
    prompts_per_step: usize = 8,
    /// `online`: answers to each prompt, at least 2.
    group_size: usize = 8,
    /// `online`: gradient steps over the answers of a step.
    updates_per_batch: u64 = 1,
    /// Upper bound on the tokens of an answer.
    max_new_tokens: usize = 64,
    /// What answers are sampled with, above 0.
    temperature: f64 = 1.0,
    /// Answers that are generated at once; 0 is half of the server's batch.
    max_in_flight: usize = 0,
    /// Prompts taken from a source at most.
    max_prompts: usize = 1000,
    /// `online`: share of the prompts that is held out.
    eval_share: f64 = 0.1,
    /// Held-out prompts at most.
    max_eval_prompts: usize = 64,
    /// Steps between evaluations; 0 evaluates at the start and at the end alone.
    eval_steps: u64 = 10,
    /// `offline`: passes over the episodes.
    epochs: u64 = 1,
    /// `offline`: episodes of a step; pairs for `dpo`.
    batch_size: usize = 16,
    /// `offline`: episodes that are read at most.
    max_episodes: usize = 100_000,
    /// `rft`: the least reward that is kept, beside the share.
    #[serde(skip_serializing_if = "Option::is_none")]
    rft_threshold: Option<f64> = None,
    /// `rft`: share of the episodes that is kept, the best first.
    rft_top_share: f64 = 0.25,
    /// `dpo`: how strongly preferences count against the reference.
    dpo_beta: f64 = 0.1,
    /// `dpo`: the least difference of rewards that makes a pair.
    dpo_margin: f64 = 0.1,
    /// Rank.
    r: usize = 8,
    /// Scale: alpha / r, or alpha / sqrt(r).
    lora_alpha: f64 = 16.0,
    /// Scale by sqrt(r).
    use_rslora: bool = false,
    /// Last parts of module names, or `all-linear` alone.
    #[serde(deserialize_with = "names")]
    target_modules: Vec<String> = vec![super::adapter::ALL_LINEAR.into()],
    /// Seed of everything that is random.
    seed: u64 = 42,
    /// Peak learning rate.
    learning_rate: f64 = 1e-4,
    /// How it moves.
    lr_scheduler: Scheduler = Scheduler::Constant,
    /// Share of all steps that warm up.
    warmup_ratio: f64 = 0.0,
    /// AdamW's decay.
    weight_decay: f64 = 0.0,
    /// AdamW.
    adam_beta1: f64 = 0.9,
    /// AdamW.
    adam_beta2: f64 = 0.999,
    /// AdamW.
    adam_epsilon: f64 = 1e-8,
    /// Largest norm of the gradient; 0 does not clip.
    max_grad_norm: f64 = 1.0,
    /// Tokens of a prompt and its answer together.
    max_seq_length: usize = 256,
    /// `auto`, `recompute` or `keep`.
    checkpointing: Checkpointing = Checkpointing::Auto,
    /// Steps between checkpoints; 0 writes one at the start and at the end alone.
    save_steps: u64 = 10,
    /// Checkpoints that are kept, the newest.
    keep_last: usize = 2,
    /// Steps between lines in the job's log.
    logging_steps: u64 = 1,
    /// `online`: a run that the episodes are logged to as well; empty logs none.
    log_run_id: String = String::new(),
}

fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(TargetModules::deserialize(deserializer)?.0)
}

impl RlTrainConfig {
    /// With a request's fields before those of the file.
    ///
    /// # Errors
    /// A field that is unknown, of another type or out of its range: `overrides.NAME`, and what would do.
    pub fn with(&self, overrides: &Map<String, Value>) -> Result<Self, FieldError> {
        let error = |name: &str, message: String| FieldError { field: format!("overrides.{name}"), message };
        for (name, to) in FIXED {
            if overrides.contains_key(name) {
                let message = format!(
                    "cannot be set: it is {to}, so that the policy that samples is the one that learns; take it out"
                );
                return Err(error(name, message));
            }
        }
        let Ok(Value::Object(mut all)) = serde_json::to_value(self) else {
            return Err(FieldError { field: "train".into(), message: "holds what is no JSON".into() });
        };
        // Null is left out, as in the file.
        all.extend(overrides.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())));
        let config: Self = serde_path_to_error::deserialize(Value::Object(all)).map_err(|bad| {
            let path = bad.path().to_string();
            match path.as_str() {
                "." => FieldError {
                    field: "overrides".into(),
                    message: format!("cannot be used: {}", bad.into_inner()),
                },
                name => error(name, format!("cannot be used: {}", bad.into_inner())),
            }
        })?;
        config.check().map_err(|mut bad| {
            let name = bad.field.trim_start_matches("train.");
            if overrides.contains_key(name) {
                bad.field = format!("overrides.{name}");
            }
            bad
        })?;
        Ok(config)
    }

    /// Checks every range.
    ///
    /// # Errors
    /// The field, as `train.NAME`, and what would do.
    pub(super) fn check(&self) -> Result<(), FieldError> {
        let above_0 = |high: f64| (Bound::Excluded(0.0), Bound::Included(high));
        let count = 0..=1_000_000_000;
        macro_rules! within {
            ($($field:ident in $range:expr,)*) => {
                $(within(concat!("train.", stringify!($field)), self.$field, $range)?;)*
            };
        }
        within! {
            clip_low in 0.0..1.0,
            clip_high in 0.0..=100.0,
            kl_beta in 0.0..=100.0,
            steps in 1..=1_000_000_000,
            prompts_per_step in 1..=1024,
            group_size in 2..=1024,
            updates_per_batch in 1..=100,
            max_new_tokens in 1..=1_000_000,
            temperature in above_0(10.0),
            max_in_flight in 0..=4096,
            max_prompts in 1..=1_000_000,
            eval_share in 0.0..=0.5,
            max_eval_prompts in 1..=10_000,
            eval_steps in count.clone(),
            epochs in 1..=100_000,
            batch_size in 1..=1024,
            max_episodes in 1..=10_000_000,
            rft_top_share in above_0(1.0),
            dpo_beta in above_0(100.0),
            dpo_margin in above_0(1e9),
            r in 1..=1024,
            lora_alpha in above_0(1e6),
            learning_rate in above_0(1e10),
            warmup_ratio in 0.0..=1.0,
            weight_decay in 0.0..=100.0,
            adam_beta1 in 0.0..1.0,
            adam_beta2 in 0.0..1.0,
            adam_epsilon in above_0(1.0),
            max_grad_norm in 0.0..=1e9,
            max_seq_length in 2..=1_000_000,
            save_steps in count.clone(),
            keep_last in 1..=1000,
            logging_steps in 1..=1_000_000_000,
        }
        if let Some(threshold) = self.rft_threshold {
            within("train.rft_threshold", threshold, -1e9..=1e9)?;
        }
        let bad = |field: &str, message: String| Err(FieldError { field: format!("train.{field}"), message });
        if self.max_new_tokens >= self.max_seq_length {
            return bad(
                "max_new_tokens",
                format!(
                    "is {}, which leaves no room for a prompt in max_seq_length ({}); lower it or raise that",
                    self.max_new_tokens, self.max_seq_length
                ),
            );
        }
        if self.target_modules.is_empty() || self.target_modules.iter().any(|name| name.trim().is_empty()) {
            return bad("target_modules", "must name modules, or say all-linear".into());
        }
        Ok(())
    }

    /// What training an adapter of this kind takes: the settings of the same names. `sequences` are those of a pass.
    pub fn adapter(&self, sequences: usize) -> AdapterConfig {
        AdapterConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: 0.0,
            use_rslora: self.use_rslora,
            target_modules: self.target_modules.clone(),
            seed: self.seed,
            learning_rate: self.learning_rate,
            lr_scheduler: self.lr_scheduler,
            warmup_ratio: self.warmup_ratio,
            weight_decay: self.weight_decay,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            max_grad_norm: self.max_grad_norm,
            batch_size: sequences,
            gradient_accumulation_steps: 1,
            max_seq_length: self.max_seq_length,
            checkpointing: self.checkpointing,
            save_steps: self.save_steps,
            keep_last: self.keep_last,
            logging_steps: self.logging_steps,
            ..AdapterConfig::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(overrides: Value) -> Result<RlTrainConfig, FieldError> {
        let Value::Object(overrides) = overrides else { panic!("is an object") };
        RlTrainConfig::default().with(&overrides)
    }

    #[test]
    fn the_defaults_are_in_their_ranges() {
        RlTrainConfig::default().check().unwrap();
        assert_eq!(with(serde_json::json!({})).unwrap(), RlTrainConfig::default());
    }

    #[test]
    fn a_request_goes_before_the_file() {
        let config = with(serde_json::json!({
            "steps": 3, "loss": "importance_sampling", "target_modules": "q_proj", "rft_threshold": 0.5, "r": null
        }));
        let config = config.unwrap();
        assert_eq!((config.steps, config.loss, config.r), (3, Loss::ImportanceSampling, 8));
        assert_eq!((config.target_modules, config.rft_threshold), (vec!["q_proj".to_owned()], Some(0.5)));
    }

    #[test]
    fn what_cannot_be_used_is_named_with_the_remedy() {
        for (overrides, field, words) in [
            (serde_json::json!({"stepz": 3}), "overrides.stepz", "stepz"),
            (serde_json::json!({"steps": "many"}), "overrides.steps", "many"),
            (serde_json::json!({"steps": 0}), "overrides.steps", "from 1"),
            (serde_json::json!({"group_size": 1}), "overrides.group_size", "from 2"),
            (serde_json::json!({"temperature": 0.0}), "overrides.temperature", "above 0"),
            (serde_json::json!({"clip_low": 1.0}), "overrides.clip_low", "below 1"),
            (serde_json::json!({"loss": "reinforce"}), "overrides.loss", "ppo_clip"),
            (serde_json::json!({"top_k": 50}), "overrides.top_k", "take it out"),
            (serde_json::json!({"repetition_penalty": 1.1}), "overrides.repetition_penalty", "take it out"),
            (serde_json::json!({"lora_dropout": 0.1}), "overrides.lora_dropout", "take it out"),
            (serde_json::json!({"max_new_tokens": 256}), "overrides.max_new_tokens", "max_seq_length"),
            (serde_json::json!({"max_seq_length": 64}), "train.max_new_tokens", "max_seq_length"),
            (serde_json::json!({"target_modules": []}), "overrides.target_modules", "all-linear"),
            (serde_json::json!({"rft_top_share": 0}), "overrides.rft_top_share", "above 0"),
        ] {
            let error = with(overrides.clone()).expect_err("is refused");
            assert_eq!(error.field, field, "{overrides}");
            assert!(error.message.contains(words), "{overrides}: {error}");
        }
    }
}
