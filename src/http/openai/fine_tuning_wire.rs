//! Wire types of `/v1/fine_tuning/jobs`: requests as OpenAI's clients send them, answers as they read them. No
//! behaviour but the reading of `auto`.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::openapi::Schema;
use utoipa::openapi::schema::{Object, OneOfBuilder, Type};
use utoipa::{IntoParams, ToSchema};

/// A number, or `auto`: as the training settings have it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(untagged)]
pub(in crate::http) enum Auto<T> {
    /// This one.
    Number(T),
    /// `"auto"`
    #[default]
    #[serde(serialize_with = "auto")]
    Auto,
}

fn auto<S: serde::Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("auto")
}

impl<T: Copy> Auto<T> {
    /// The number, if there is one.
    pub(super) fn number(self) -> Option<T> {
        match self {
            Self::Number(number) => Some(number),
            Self::Auto => None,
        }
    }
}

impl<'de, T: Number> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AutoVisitor<T>(PhantomData<T>);

        impl<T: Number> Visitor<'_> for AutoVisitor<T> {
            type Value = Auto<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} or \"auto\"", T::NAME)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Auto<T>, E> {
                if text == "auto" {
                    return Ok(Auto::Auto);
                }
                Err(E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Auto<T>, E> {
                let wrong = || E::invalid_value(serde::de::Unexpected::Unsigned(number), &self);
                T::of_integer(number).map(Auto::Number).ok_or_else(wrong)
            }

            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Auto<T>, E> {
                let wrong = || E::invalid_type(serde::de::Unexpected::Float(number), &self);
                T::of_float(number).map(Auto::Number).ok_or_else(wrong)
            }
        }

        deserializer.deserialize_any(AutoVisitor(PhantomData))
    }
}

/// Schema of a field that is a number or `auto`. A generic type cannot have one by itself.
fn auto_schema(number: Type) -> Schema {
    let text = Object::builder().schema_type(Type::String).enum_values(Some(["auto"])).build();
    OneOfBuilder::new().item(text).item(Object::with_type(number)).into()
}

fn integer_or_auto() -> Schema {
    auto_schema(Type::Integer)
}

fn number_or_auto() -> Schema {
    auto_schema(Type::Number)
}

/// The two numbers that [`Auto`] can hold.
pub(in crate::http) trait Number: Copy {
    /// For messages.
    const NAME: &'static str;
    /// From an integer.
    fn of_integer(number: u64) -> Option<Self>;
    /// From a fraction.
    fn of_float(number: f64) -> Option<Self>;
}

impl Number for u64 {
    const NAME: &'static str = "an integer that is not negative";

    fn of_integer(number: u64) -> Option<Self> {
        Some(number)
    }

    fn of_float(_: f64) -> Option<Self> {
        None
    }
}

impl Number for f64 {
    const NAME: &'static str = "a number";

    fn of_integer(number: u64) -> Option<Self> {
        Some(number as f64)
    }

    fn of_float(number: f64) -> Option<Self> {
        Some(number)
    }
}

/// How to train. What is absent or `auto` is as in `adapter_config.yaml`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::http) struct Hyperparameters {
    /// Passes over the data.
    #[schema(schema_with = integer_or_auto)]
    pub(super) n_epochs: Auto<u64>,
    /// Examples of one step.
    #[schema(schema_with = integer_or_auto)]
    pub(super) batch_size: Auto<u64>,
    /// Factor to the learning rate of `adapter_config.yaml`.
    #[schema(schema_with = number_or_auto)]
    pub(super) learning_rate_multiplier: Auto<f64>,
}

/// Supervised training, with its hyperparameters.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Supervised {
    /// How to train.
    pub(super) hyperparameters: Option<Hyperparameters>,
}

/// The method of training.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Method {
    /// `supervised`; there is no other here.
    #[schema(example = "supervised")]
    pub(super) r#type: String,
    /// For `supervised`.
    pub(super) supervised: Option<Supervised>,
    /// Not supported.
    #[serde(default, skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub(super) dpo: Option<Value>,
    /// Not supported.
    #[serde(default, skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub(super) reinforcement: Option<Value>,
}

/// An adapter to train, as OpenAI's clients ask for it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct FineTuningRequest {
    /// The served model.
    pub(super) model: String,
    /// An uploaded file.
    #[schema(example = "file-0123456789abcdef0123456789abcdef")]
    pub(super) training_file: String,
    /// Not supported: a share of the training file is held out (`eval_share` in `adapter_config.yaml`).
    pub(super) validation_file: Option<String>,
    /// Goes into the adapter's name.
    #[schema(max_length = 64)]
    pub(super) suffix: Option<String>,
    /// Seed of everything that is random.
    pub(super) seed: Option<u64>,
    /// The older place of `method.supervised.hyperparameters`.
    pub(super) hyperparameters: Option<Hyperparameters>,
    /// The method of training.
    pub(super) method: Option<Method>,
    /// Not supported.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) integrations: Option<Value>,
    /// Comes back with the job; at most 16 texts.
    pub(super) metadata: Option<BTreeMap<String, String>>,
}

/// Why a job failed.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FineTuningError {
    /// For a program.
    pub(super) code: &'static str,
    /// For a person.
    pub(super) message: String,
    /// The field that is to blame.
    pub(super) param: Option<String>,
}

/// A training job, as OpenAI's API shows it.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FineTuningJob {
    /// To ask for its state with.
    pub(super) id: String,
    /// `fine_tuning.job`
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created_at: u64,
    /// Why it failed.
    pub(super) error: Option<FineTuningError>,
    /// Of a job that succeeded: the adapter, to be given as `model`.
    pub(super) fine_tuned_model: Option<String>,
    /// Seconds since 1970, of a job that succeeded.
    pub(super) finished_at: Option<u64>,
    /// How it trains.
    pub(super) hyperparameters: Hyperparameters,
    /// How it trains.
    pub(super) method: Method,
    /// The base model.
    pub(super) model: String,
    /// `gurukul`
    pub(super) organization_id: &'static str,
    /// Empty: figures are in the events.
    pub(super) result_files: [String; 0],
    /// Of everything that is random.
    pub(super) seed: u64,
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    pub(super) status: &'static str,
    /// Tokens trained on.
    pub(super) trained_tokens: Option<u64>,
    /// The uploaded file, or the source of a job that was not asked for here.
    pub(super) training_file: String,
    /// Null.
    pub(super) validation_file: Option<String>,
    /// Seconds since 1970, while it runs.
    pub(super) estimated_finish: Option<u64>,
    /// Empty.
    pub(super) integrations: [String; 0],
    /// As given.
    pub(super) metadata: Option<BTreeMap<String, String>>,
    /// As given.
    pub(super) user_provided_suffix: Option<String>,
}

/// A page of a list.
#[derive(Debug, Serialize)]
pub(in crate::http) struct Page<T> {
    /// `list`
    pub(super) object: &'static str,
    /// Newest first.
    pub(super) data: Vec<T>,
    /// Whether there are older ones.
    pub(super) has_more: bool,
}

/// Jobs, newest first.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the fields are read by the derive alone")]
pub(in crate::http) struct FineTuningJobList {
    /// `list`
    object: String,
    /// Newest first.
    data: Vec<FineTuningJob>,
    /// Whether there are older ones.
    has_more: bool,
}

/// Something that happened in a job.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FineTuningEvent {
    /// Goes into `after` for the next page.
    pub(super) id: String,
    /// `fine_tuning.job.event`
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created_at: u64,
    /// `info`, `warn` or `error`.
    #[schema(value_type = String)]
    pub(super) level: crate::jobs::Level,
    /// For a person.
    pub(super) message: String,
    /// `message` or `metrics`.
    pub(super) r#type: &'static str,
    /// Of `metrics`: the figures of a step.
    #[schema(value_type = Option<Object>)]
    pub(super) data: Option<Value>,
}

/// Events, newest first.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the fields are read by the derive alone")]
pub(in crate::http) struct FineTuningEventList {
    /// `list`
    object: String,
    /// Newest first.
    data: Vec<FineTuningEvent>,
    /// Whether there are older ones.
    has_more: bool,
}

/// A model that a job left.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FineTuningCheckpoint {
    /// Its id.
    pub(super) id: String,
    /// `fine_tuning.job.checkpoint`
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created_at: u64,
    /// The adapter, to be given as `model`.
    pub(super) fine_tuned_model_checkpoint: String,
    /// The job.
    pub(super) fine_tuning_job_id: String,
    /// Steps taken.
    pub(super) step_number: u64,
    /// Figures at that step.
    pub(super) metrics: CheckpointMetrics,
}

/// Figures of a checkpoint, in OpenAI's words.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct CheckpointMetrics {
    /// The step.
    pub(super) step: u64,
    /// Mean loss a supervised token.
    pub(super) train_loss: Option<f64>,
    /// The same over the held-out examples.
    pub(super) full_valid_loss: Option<f64>,
}

/// Checkpoints, newest first.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the fields are read by the derive alone")]
pub(in crate::http) struct FineTuningCheckpointList {
    /// `list`
    object: String,
    /// Newest first.
    data: Vec<FineTuningCheckpoint>,
    /// False.
    has_more: bool,
}

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct PageQuery {
    /// Older than the entry of this id.
    #[param(value_type = String, required = false)]
    pub(super) after: Option<String>,
    /// Entries at most, 1 to 100. Default 20.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 100)]
    pub(super) limit: Option<i64>,
}
