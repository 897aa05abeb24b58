//! `config.json` as checkpoints carry it: typed look-ups that know both spellings (transformers 4 and 5) and say
//! which field is missing or wrong. What the fields mean to a family is not known here.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use crate::nn::Activation;
use crate::nn::rope::RopeScaling;

/// A parsed `config.json`.
pub struct ModelConfig {
    fields: Map<String, Value>,
}

/// Rotary embedding of one kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

impl ModelConfig {
    /// Parses the text of `config.json`.
    ///
    /// # Errors
    /// Text that is no JSON object.
    pub fn parse(text: &str) -> Result<Self> {
        match serde_json::from_str(text).context("config.json is not valid JSON")? {
            Value::Object(fields) => Ok(Self { fields }),
            _ => bail!("config.json must hold an object"),
        }
    }

    /// `model_type`.
    pub fn model_type(&self) -> Result<&str> {
        self.get("model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| anyhow!("config.json: field \"model_type\" is missing; it names the family"))
    }

    /// The field, unless absent or null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|v| !v.is_null())
    }

    /// A non-negative integer under the first of `names` that is there.
    pub fn size(&self, names: &[&str]) -> Result<usize> {
        self.optional_size(names)?.ok_or_else(|| missing(names))
    }

    /// As [`ModelConfig::size`], `None` where absent.
    pub fn optional_size(&self, names: &[&str]) -> Result<Option<usize>> {
        self.first(names, |v| v.as_u64().map(|n| n as usize), "a non-negative integer")
    }

    /// A number under the first of `names` that is there.
    pub fn number(&self, names: &[&str]) -> Result<f64> {
        self.first(names, Value::as_f64, "a number")?.ok_or_else(|| missing(names))
    }

    /// A number, or `default` where absent.
    pub fn number_or(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self.first(&[name], Value::as_f64, "a number")?.unwrap_or(default))
    }

    /// A boolean, or `default` where absent.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.first(&[name], Value::as_bool, "true or false")?.unwrap_or(default))
    }

    /// The activation under the first of `names` that is there.
    pub fn activation(&self, names: &[&str]) -> Result<Activation> {
        let name = self
            .first(names, |v| v.as_str().map(str::to_owned), "a string")?
            .ok_or_else(|| missing(names))?;
        match name.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            _ => bail!(
                "config.json: activation {name:?} is not supported; supported: silu, swish, gelu_new, \
                 gelu_pytorch_tanh"
            ),
        }
    }

    /// The window of every layer: from `layer_types` where it stands, else from `otherwise`.
    pub fn windows(&self, layers: usize, otherwise: impl Fn(usize) -> bool) -> Result<Vec<Option<usize>>> {
        let window = self.optional_size(&["sliding_window"])?;
        let sliding: Vec<bool> = match self.get("layer_types") {
            None => (0..layers).map(otherwise).collect(),
            Some(Value::Array(types)) if types.len() == layers => types
                .iter()
                .map(|t| match t.as_str() {
                    Some("sliding_attention") => Ok(true),
                    Some("full_attention") => Ok(false),
                    _ => bail!(
                        "config.json: layer type {t} is not supported; supported: full_attention, \
                         sliding_attention"
                    ),
                })
                .collect::<Result<_>>()?,
            Some(_) => {
                bail!("config.json: \"layer_types\" must list one type for each of the {layers} layers")
            }
        };
        sliding
            .into_iter()
            .map(|sliding| match (sliding, window) {
                (false, _) => Ok(None),
                (true, Some(0)) => bail!("config.json: \"sliding_window\" must be at least 1"),
                (true, Some(window)) => Ok(Some(window)),
                (true, None) => Err(missing(&["sliding_window"])),
            })
            .collect()
    }

    /// Rotary embedding: `rope_parameters` (transformers 5; `kind` picks the entry where there is one for each
    /// kind of layer), else `theta_name` and `rope_scaling` (transformers 4).
    pub fn rope(&self, kind: &str, theta_name: &str, default_theta: f64) -> Result<RopeSpec> {
        let nested = self.get("rope_parameters").and_then(Value::as_object);
        let parameters = nested.map(|p| p.get(kind).and_then(Value::as_object).unwrap_or(p));
        let theta = match parameters.and_then(|p| p.get("rope_theta")) {
            Some(theta) => theta.as_f64().ok_or_else(|| wrong("rope_theta", "a number"))?,
            None => self.number_or(theta_name, default_theta)?,
        };
        if !(theta.is_finite() && theta > 0.0) {
            bail!("config.json: {theta_name} must be above 0");
        }
        let scaling = match parameters.or_else(|| self.get("rope_scaling").and_then(Value::as_object)) {
            None => RopeScaling::None,
            Some(fields) => scaling(fields)?,
        };
        if self.number_or("partial_rotary_factor", 1.0)? != 1.0 {
            bail!("config.json: partial_rotary_factor other than 1 is not supported");
        }
        Ok(RopeSpec { theta, scaling })
    }

    /// Refuses a field that would change the numbers in a way that is not implemented.
    pub fn refuse(&self, name: &str, neutral: &Value) -> Result<()> {
        match self.get(name) {
            Some(value) if value != neutral => bail!("config.json: {name} = {value} is not supported"),
            _ => Ok(()),
        }
    }

    fn first<T>(&self, names: &[&str], read: impl Fn(&Value) -> Option<T>, kind: &str) -> Result<Option<T>> {
        for name in names {
            if let Some(value) = self.get(name) {
                return read(value).map(Some).ok_or_else(|| wrong(name, kind));
            }
        }
        Ok(None)
    }
}

fn scaling(fields: &Map<String, Value>) -> Result<RopeScaling> {
    let number = |name: &str| {
        fields
            .get(name)
            .and_then(Value::as_f64)
            .ok_or_else(|| wrong(&format!("rope_scaling.{name}"), "a number"))
    };
    if fields.get("partial_rotary_factor").and_then(Value::as_f64).is_some_and(|f| f != 1.0) {
        bail!("config.json: partial_rotary_factor other than 1 is not supported");
    }
    let kind =
        fields.get("rope_type").or_else(|| fields.get("type")).and_then(Value::as_str).unwrap_or("default");
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        },
        other => {
            bail!("config.json: rope scaling {other:?} is not supported; supported: default, linear, llama3")
        }
    })
}

fn missing(names: &[&str]) -> anyhow::Error {
    match names {
        [name] => anyhow!("config.json: field \"{name}\" is missing"),
        _ => anyhow!(
            "config.json: field \"{}\" is missing (also accepted: {})",
            names[0],
            names[1..].join(", ")
        ),
    }
}

fn wrong(name: &str, kind: &str) -> anyhow::Error {
    anyhow!("config.json: field \"{name}\" must be {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> ModelConfig {
        ModelConfig::parse(text).expect("valid JSON")
    }

    #[test]
    fn errors_name_the_field() {
        let c = config(r#"{"hidden_size": "big", "rope_scaling": {"type": "yarn", "factor": 4}}"#);
        let text = |r: Result<usize>| r.expect_err("refused").to_string();
        assert_eq!(
            text(c.size(&["n_layer", "num_hidden_layers"])),
            "config.json: field \"n_layer\" is missing (also accepted: num_hidden_layers)"
        );
        assert!(text(c.size(&["hidden_size"])).contains("\"hidden_size\" must be a non-negative integer"));
        let rope = c.rope("full_attention", "rope_theta", 1e4).expect_err("refused").to_string();
        assert!(rope.contains("\"yarn\"") && rope.contains("llama3"), "{rope}");
        assert!(ModelConfig::parse("[1]").is_err());
        assert!(config("{}").model_type().is_err());
    }

    #[test]
    fn both_spellings_of_rope_are_one() {
        let four = config(
            r#"{"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 64}}"#,
        );
        let five = config(
            r#"{"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 64}}"#,
        );
        let read = |c: &ModelConfig| c.rope("full_attention", "rope_theta", 1e4).expect("supported");
        assert_eq!(read(&four), read(&five));
    }
}
