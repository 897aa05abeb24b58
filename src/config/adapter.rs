//! How adapters are trained: `adapter_config.yaml` with a request's overrides, as typed and as resolved. Reads one
//! file of the configs folder; knows no model, so whether modules exist is checked elsewhere.

use std::fmt;
use std::ops::{Bound, RangeBounds};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::range::within;
use super::{named, yaml};
pub use crate::data::Template;

/// The settings file inside the configs folder that is read when none is named.
pub const FILE_NAME: &str = "adapter_config.yaml";

/// What `target_modules` may say instead of names.
pub const ALL_LINEAR: &str = "all-linear";

/// What jobs that were stored without the setting keep, too.
fn two() -> usize {
    2
}

/// Every setting of a training job, resolved and in its range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    /// Scale: alpha / r, or alpha / sqrt(r).
    pub lora_alpha: f64,
    /// Share of inputs left out.
    pub lora_dropout: f64,
    /// Scale by sqrt(r).
    pub use_rslora: bool,
    /// Last parts of module names, or `all-linear` alone.
    pub target_modules: Vec<String>,
    /// Seed of everything that is random.
    pub seed: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How it moves.
    pub lr_scheduler: Scheduler,
    /// Share of all steps that warm up.
    pub warmup_ratio: f64,
    /// AdamW's decay.
    pub weight_decay: f64,
    /// AdamW.
    pub adam_beta1: f64,
    /// AdamW.
    pub adam_beta2: f64,
    /// AdamW.
    pub adam_epsilon: f64,
    /// Largest norm of the gradient; 0 does not clip.
    pub max_grad_norm: f64,
    /// Examples of one micro-batch.
    pub batch_size: usize,
    /// Micro-batches of one step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data.
    pub epochs: u64,
    /// End after this many steps, whatever the data.
    pub max_steps: Option<u64>,
    /// Examples taken from the source; of the request, else of the file.
    pub max_samples: usize,
    /// Longer examples are cut at the end.
    pub max_seq_length: usize,
    /// `auto`, `recompute` or `keep`.
    pub checkpointing: Checkpointing,
    /// How a record becomes a text.
    pub template: Template,
    /// Learn the answer only, where a template has a prompt and an answer.
    pub completion_only: bool,
    /// Examples that are drawn from at random.
    pub shuffle_buffer: usize,
    /// Share of the examples that is held out.
    pub eval_share: f64,
    /// Steps between evaluations; 0 evaluates at the end alone.
    pub eval_steps: u64,
    /// Evaluations without a better loss after which training ends; 0 goes on.
    pub early_stopping_patience: u64,
    /// Steps between checkpoints; 0 writes one at the end alone.
    pub save_steps: u64,
    /// Checkpoints that are kept, the newest, besides the best.
    #[serde(default = "two")]
    pub keep_last: usize,
    /// Steps between lines in the job's log.
    pub logging_steps: u64,
}

/// Learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Half a cosine to 0.
    Cosine,
    /// A line to 0.
    Linear,
    /// As it is.
    Constant,
}

/// Memory against time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// As many layers are kept as fit.
    Auto,
    /// None.
    Recompute,
    /// All.
    Keep,
}

/// A field that cannot be used, and what would do instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {message}")]
pub struct FieldError {
    /// The field, with the file or `overrides` it stands in where that helps: `learning_rate`, `source`.
    pub field: String,
    /// What is wrong and the remedy, to be read after the field's name.
    pub message: String,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            use_rslora: false,
            target_modules: vec![ALL_LINEAR.into()],
            seed: 42,
            learning_rate: 2e-4,
            lr_scheduler: Scheduler::Cosine,
            warmup_ratio: 0.03,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            batch_size: 8,
            gradient_accumulation_steps: 2,
            epochs: 1,
            max_steps: None,
            max_samples: 2000,
            max_seq_length: 256,
            checkpointing: Checkpointing::Auto,
            template: Template::Auto,
            completion_only: true,
            shuffle_buffer: 1000,
            eval_share: 0.05,
            eval_steps: 50,
            early_stopping_patience: 0,
            save_steps: 50,
            keep_last: two(),
            logging_steps: 10,
        }
    }
}

/// One layer of settings as typed, in the file or as a request's `overrides`: what is left out or null comes from
/// the layer below.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterOverrides {
    /// Rank of the adapter, 1 to 1024. Default 8.
    pub r: Option<usize>,
    /// Scale of the adapter: alpha / r. Default 16.
    pub lora_alpha: Option<f64>,
    /// Share of inputs left out, 0 to below 1. Default 0.05.
    pub lora_dropout: Option<f64>,
    /// Scale by alpha / sqrt(r) instead. Default false.
    pub use_rslora: Option<bool>,
    /// Last parts of module names, or `all-linear`. Default `all-linear`.
    #[schema(value_type = Option<Vec<String>>)]
    pub target_modules: Option<TargetModules>,
    /// `none`: biases are not trained.
    pub bias: Option<String>,
    /// Seed of everything that is random. Default 42.
    pub seed: Option<u64>,
    /// Peak learning rate. Default 0.0002.
    pub learning_rate: Option<f64>,
    /// How the learning rate moves after the warm-up. Default `cosine`.
    pub lr_scheduler: Option<Scheduler>,
    /// Share of all steps that warm up, 0 to 1. Default 0.03.
    pub warmup_ratio: Option<f64>,
    /// AdamW's decay. Default 0.01.
    pub weight_decay: Option<f64>,
    /// AdamW, 0 to below 1. Default 0.9.
    pub adam_beta1: Option<f64>,
    /// AdamW, 0 to below 1. Default 0.999.
    pub adam_beta2: Option<f64>,
    /// AdamW. Default 1e-8.
    pub adam_epsilon: Option<f64>,
    /// Largest norm of the gradient; 0 does not clip. Default 1.
    pub max_grad_norm: Option<f64>,
    /// Examples of one micro-batch, 1 to 1024. Default 8.
    pub batch_size: Option<usize>,
    /// Micro-batches of one step, 1 to 65536. Default 2.
    pub gradient_accumulation_steps: Option<usize>,
    /// Passes over the data. Default 1.
    pub epochs: Option<u64>,
    /// Take exactly this many steps, however often that goes through the data. Default: as the epochs give.
    pub max_steps: Option<u64>,
    /// Examples taken from the source, 1 to 10000000. Default 2000.
    pub max_samples: Option<usize>,
    /// Tokens after which an example is cut, 2 to 1000000. Default 256.
    pub max_seq_length: Option<usize>,
    /// Memory against time. Default `auto`.
    pub checkpointing: Option<Checkpointing>,
    /// How a record becomes a text. Default `auto`.
    pub template: Option<Template>,
    /// Learn the answer only. Default true.
    pub completion_only: Option<bool>,
    /// Examples that are drawn from at random, 1 to 1000000. Default 1000.
    pub shuffle_buffer: Option<usize>,
    /// Share of the examples that is held out, 0 to 0.5. Default 0.05.
    pub eval_share: Option<f64>,
    /// Steps between evaluations; 0 evaluates at the end alone. Default 50.
    pub eval_steps: Option<u64>,
    /// Evaluations without a better loss after which training ends; 0 goes on. Default 0.
    pub early_stopping_patience: Option<u64>,
    /// Steps between checkpoints; 0 writes one at the end alone. Default 50.
    pub save_steps: Option<u64>,
    /// Checkpoints that are kept, the newest, besides the best; 1 to 1000. Default 2.
    pub keep_last: Option<usize>,
    /// Steps between lines in the job's log. Default 10.
    pub logging_steps: Option<u64>,
}

/// Names of modules: a list, or one text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TargetModules(pub Vec<String>);

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> serde::de::Visitor<'de> for Names {
            type Value = Vec<String>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("all-linear or a list of module names")
            }
            fn visit_str<E>(self, name: &str) -> Result<Vec<String>, E> {
                Ok(vec![name.to_owned()])
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                Ok(names)
            }
        }
        deserializer.deserialize_any(Names).map(Self)
    }
}

impl AdapterConfig {
    /// The settings of one job: `overrides` before the file before the defaults. `config_path` names a file inside
    /// the configs folder; without it [`FILE_NAME`] is read, if it is there.
    ///
    /// # Errors
    /// A file that is not there, lies outside or is no such file; an unknown field, a value of another type or out
    /// of its range: the field, where it stands, and the range.
    pub fn load(
        configs_dir: &Path,
        config_path: Option<&str>,
        overrides: &Map<String, Value>,
    ) -> Result<Self, FieldError> {
        let name = config_path.unwrap_or(FILE_NAME);
        let text = named::read(configs_dir, "config_path", name)?;
        let file: AdapterOverrides = match (text, config_path) {
            // A file whose lines are all comments is the YAML value null.
            (Some(text), _) => yaml::read::<Option<AdapterOverrides>>(&text)
                .map_err(|error| named::unusable("config_path", name, &error))?
                .unwrap_or_default(),
            (None, None) => AdapterOverrides::default(),
            (None, Some(_)) => return Err(named::missing("config_path", name)),
        };
        let overrides =
            serde_path_to_error::deserialize(Value::Object(overrides.clone())).map_err(|error| {
                let field = match error.path().to_string().as_str() {
                    "." => "overrides".to_owned(),
                    path => format!("overrides.{path}"),
                };
                FieldError { field, message: format!("cannot be used: {}", error.into_inner()) }
            })?;
        resolve(&overrides, &file, name)
    }
}

/// A value, and where it stands.
struct Said<T> {
    value: T,
    place: String,
}

impl<T> Said<T> {
    fn error(&self, message: String) -> FieldError {
        FieldError { field: self.place.clone(), message }
    }
}

impl<T: Copy + PartialOrd + fmt::Display> Said<T> {
    /// The value, when it lies in the range.
    fn within(&self, range: impl RangeBounds<T>) -> Result<T, FieldError> {
        within(&self.place, self.value, range)
    }
}

fn resolve(
    overrides: &AdapterOverrides,
    file: &AdapterOverrides,
    file_name: &str,
) -> Result<AdapterConfig, FieldError> {
    let defaults = AdapterConfig::default();
    macro_rules! said {
        ($field:ident, $default:expr) => {{
            let (value, place) = match (&overrides.$field, &file.$field) {
                (Some(value), _) => (value.clone(), concat!("overrides.", stringify!($field)).to_owned()),
                (None, Some(value)) => (value.clone(), format!("{} in {file_name}", stringify!($field))),
                (None, None) => ($default, stringify!($field).to_owned()),
            };
            Said { value, place }
        }};
        ($field:ident) => {
            said!($field, defaults.$field.clone())
        };
    }
    let bias = said!(bias, "none".into());
    if bias.value != "none" {
        return Err(bias.error(format!("is {}; biases are not trained, so use none", bias.value)));
    }
    let above_0 = |high: f64| (Bound::Excluded(0.0), Bound::Included(high));
    let max_steps = match overrides.max_steps.or(file.max_steps) {
        Some(steps) => Some(said!(max_steps, steps).within(1..=1_000_000_000)?),
        None => None,
    };
    let count = 0..=1_000_000_000;
    Ok(AdapterConfig {
        r: said!(r).within(1..=1024)?,
        lora_alpha: said!(lora_alpha).within(above_0(1e6))?,
        lora_dropout: said!(lora_dropout).within(0.0..1.0)?,
        use_rslora: said!(use_rslora).value,
        target_modules: target_modules(said!(target_modules, TargetModules(defaults.target_modules)))?,
        seed: said!(seed).value,
        learning_rate: said!(learning_rate).within(above_0(1e10))?,
        lr_scheduler: said!(lr_scheduler).value,
        warmup_ratio: said!(warmup_ratio).within(0.0..=1.0)?,
        weight_decay: said!(weight_decay).within(0.0..=100.0)?,
        adam_beta1: said!(adam_beta1).within(0.0..1.0)?,
        adam_beta2: said!(adam_beta2).within(0.0..1.0)?,
        adam_epsilon: said!(adam_epsilon).within(above_0(1.0))?,
        max_grad_norm: said!(max_grad_norm).within(0.0..=1e9)?,
        batch_size: said!(batch_size).within(1..=1024)?,
        gradient_accumulation_steps: said!(gradient_accumulation_steps).within(1..=65_536)?,
        epochs: said!(epochs).within(1..=100_000)?,
        max_steps,
        max_samples: said!(max_samples).within(1..=10_000_000)?,
        max_seq_length: said!(max_seq_length).within(2..=1_000_000)?,
        checkpointing: said!(checkpointing).value,
        template: said!(template).value,
        completion_only: said!(completion_only).value,
        shuffle_buffer: said!(shuffle_buffer).within(1..=1_000_000)?,
        eval_share: said!(eval_share).within(0.0..=0.5)?,
        eval_steps: said!(eval_steps).within(count.clone())?,
        early_stopping_patience: said!(early_stopping_patience).within(count.clone())?,
        save_steps: said!(save_steps).within(count.clone())?,
        keep_last: said!(keep_last).within(1..=1000)?,
        logging_steps: said!(logging_steps).within(1..=1_000_000_000)?,
    })
}

fn target_modules(said: Said<TargetModules>) -> Result<Vec<String>, FieldError> {
    let names = &said.value.0;
    let use_this = "use all-linear, or a list of names such as [q_proj, v_proj]";
    if names.is_empty() {
        return Err(said.error(format!("is empty; {use_this}")));
    }
    let is_name = |name: &String| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        begins && name.len() <= 200 && name.chars().all(fits)
    };
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        return Err(said.error(format!("has '{name}', which names no module; {use_this}")));
    }
    if names.len() > 1 && names.iter().any(|name| name == ALL_LINEAR) {
        return Err(said.error(format!("has {ALL_LINEAR} and other names; give either")));
    }
    let mut unique = Vec::with_capacity(names.len());
    for name in names {
        if !unique.contains(name) {
            unique.push(name.clone());
        }
    }
    Ok(unique)
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;
