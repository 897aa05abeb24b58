//! `adapter_config.json` as PEFT writes it: which modules an adapter changes, with what rank and scale, and what
//! in it cannot be served. Knows no tensor and no path.

use regex::Regex;
use serde_json::{Map, Value};

use super::peft::PeftError;

/// Features of PEFT that change the numbers and that the engine does not compute, with the words that complete
/// "`field` is set, and ...". A field counts as set unless it is null, false or empty.
const REFUSED: [(&str, &str); 12] = [
    ("modules_to_save", "whole retrained modules are not supported; train the adapter again without it"),
    ("lora_bias", "a bias on lora_B is not supported; train the adapter again without it"),
    (
        "trainable_token_indices",
        "trained embedding rows are not supported; train the adapter again without it",
    ),
    ("target_parameters", "adapters on bare parameters are not supported; name modules in `target_modules`"),
    ("layer_replication", "replicated layers are not supported"),
    ("alora_invocation_tokens", "activated LoRA (aLoRA) is not supported"),
    ("use_qalora", "QA-LoRA is not supported"),
    ("use_bdlora", "block-diagonal LoRA (BD-LoRA) is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("kasa_config", "KaSA is not supported"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("megatron_config", "Megatron's parallel layers are not supported"),
];

/// Fields that are read here, or that matter only while training.
const KNOWN: [&str; 30] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "init_lora_weights",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
];

/// Initialisations under which PEFT also rewrites the base weights when it loads the adapter: A and B alone do
/// not say what was trained. PEFT resets the field when the adapter is saved in its converted form.
const BASE_REWRITING_INITS: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// What `adapter_config.json` says, checked.
///
/// `fan_in_fan_out` is not among the fields: it tells PEFT that the base layer stores its weight transposed
/// (GPT-2's Conv1D), but A stays `[r, in_features]` and B `[out_features, r]` in the file all the same.
#[derive(Debug, Clone)]
pub(super) struct LoraConfig {
    pub(super) r: usize,
    pub(super) lora_alpha: f64,
    pub(super) use_rslora: bool,
    pub(super) use_dora: bool,
    pub(super) base_model: Option<String>,
    pub(super) targets: Targets,
    /// Fields that are set and that this version has not heard of.
    pub(super) unknown: Vec<String>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
    exclude: Option<Selection>,
    layers: Option<Layers>,
}

/// `target_modules`.
#[derive(Debug, Clone)]
pub(super) enum Targets {
    /// `"all-linear"`: every linear layer but the output head.
    AllLinear,
    /// A regular expression or a list of names.
    Named(Selection),
}

/// A regular expression over the whole name, or names that match as a suffix at a dot.
#[derive(Debug, Clone)]
pub(super) enum Selection {
    Pattern(String, Regex),
    Suffixes(Vec<String>),
}

#[derive(Debug, Clone)]
struct Layers {
    indices: Vec<u64>,
    /// Tried in turn; each captures `idx`.
    patterns: Vec<Regex>,
}

impl LoraConfig {
    /// Reads the text of `adapter_config.json`.
    pub(super) fn parse(json: &[u8]) -> Result<Self, PeftError> {
        let fields: Map<String, Value> =
            serde_json::from_slice(json).map_err(|e| PeftError::ConfigSyntax(e.to_string()))?;
        let fields = Fields(&fields);

        match fields.text("peft_type")? {
            Some("LORA") => {}
            Some(other) => {
                return Err(bad("peft_type", format!("is {other:?}, but only \"LORA\" is supported")));
            }
            None => return Err(bad("peft_type", "is missing; it must be \"LORA\"")),
        }
        for (field, reason) in REFUSED {
            if fields.is_set(field) {
                return Err(PeftError::Unsupported { field, reason });
            }
        }
        match fields.text("bias")? {
            None | Some("none") => {}
            Some(other) => {
                return Err(bad(
                    "bias",
                    format!("is {other:?}, but trained biases are not supported; it must be \"none\""),
                ));
            }
        }
        if let Some(Value::String(init)) = fields.get("init_lora_weights")
            && BASE_REWRITING_INITS.iter().any(|prefix| init.to_lowercase().starts_with(prefix))
        {
            return Err(bad(
                "init_lora_weights",
                format!(
                    "is {init:?}, under which the base weights were changed as well; convert the adapter with \
                     PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
                ),
            ));
        }

        let r = match fields.get("r") {
            Some(value) => rank("r", value)?,
            None => return Err(bad("r", "is missing; it must be the adapter's rank")),
        };
        let lora_alpha = match fields.get("lora_alpha") {
            Some(value) => number("lora_alpha", value)?,
            None => return Err(bad("lora_alpha", "is missing; it must be a number")),
        };
        let targets = match fields.selection("target_modules")? {
            Some(Selection::Pattern(text, _)) if text.eq_ignore_ascii_case("all-linear") => {
                Targets::AllLinear
            }
            Some(selection) => Targets::Named(selection),
            None => {
                let problem = "is missing or empty; it must be a list of module names, a regular expression or \
                               \"all-linear\"";
                return Err(bad("target_modules", problem));
            }
        };
        Ok(Self {
            r,
            lora_alpha,
            use_rslora: fields.flag("use_rslora")?,
            use_dora: fields.flag("use_dora")?,
            base_model: fields.text("base_model_name_or_path")?.filter(|s| !s.is_empty()).map(str::to_owned),
            rank_pattern: fields.patterns("rank_pattern", rank)?,
            alpha_pattern: fields.patterns("alpha_pattern", number)?,
            exclude: fields.selection("exclude_modules")?,
            layers: fields.layers(&targets)?,
            targets,
            unknown: fields.unknown(),
        })
    }

    /// Rank of one module: the first matching `rank_pattern`, else `r`.
    pub(super) fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern.iter().find(|(p, _)| p.is_match(module)).map_or(self.r, |(_, r)| *r)
    }

    /// What B·A of one module is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).
    pub(super) fn scale_of(&self, module: &str) -> f64 {
        let alpha = self
            .alpha_pattern
            .iter()
            .find(|(p, _)| p.is_match(module))
            .map_or(self.lora_alpha, |(_, alpha)| *alpha);
        let r = self.rank_of(module) as f64;
        if self.use_rslora { alpha / r.sqrt() } else { alpha / r }
    }

    /// Whether PEFT would put an adapter on the module of this full name, by the rules of its
    /// `check_target_module_exists`.
    pub(super) fn targets_module(&self, module: &str) -> bool {
        if self.exclude.as_ref().is_some_and(|exclude| exclude.matches(module)) {
            return false;
        }
        match &self.targets {
            Targets::AllLinear => true,
            Targets::Named(selection) => {
                selection.matches(module) && self.layers.as_ref().is_none_or(|layers| layers.hold(module))
            }
        }
    }

    /// `target_modules` for people: the names in order, or the one expression.
    pub(super) fn target_names(&self) -> Vec<String> {
        match &self.targets {
            Targets::AllLinear => vec!["all-linear".into()],
            Targets::Named(Selection::Pattern(text, _)) => vec![text.clone()],
            Targets::Named(Selection::Suffixes(names)) => {
                let mut names = names.clone();
                names.sort();
                names
            }
        }
    }
}

impl Selection {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Pattern(_, regex) => regex.is_match(module),
            Self::Suffixes(names) => names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
            }),
        }
    }
}

impl Layers {
    fn hold(&self, module: &str) -> bool {
        let index = self.patterns.iter().find_map(|p| p.captures(module)).and_then(|c| c["idx"].parse().ok());
        index.is_some_and(|index: u64| self.indices.contains(&index))
    }
}

/// The fields with the error messages that name them.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn is_set(&self, field: &str) -> bool {
        self.get(field).is_some_and(|value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        })
    }

    fn text(&self, field: &'static str) -> Result<Option<&'a str>, PeftError> {
        self.get(field).map(|v| v.as_str().ok_or_else(|| bad(field, "must be a string"))).transpose()
    }

    fn flag(&self, field: &'static str) -> Result<bool, PeftError> {
        self.get(field).map_or(Ok(false), |v| v.as_bool().ok_or_else(|| bad(field, "must be true or false")))
    }

    /// One string as it is, or a list of strings; an empty one counts as absent.
    fn selection(&self, field: &'static str) -> Result<Option<Selection>, PeftError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => {
                Ok(Some(Selection::Pattern(text.clone(), compile(field, &format!(r"\A(?:{text})\z"))?)))
            }
            Some(value) => {
                let names = strings(field, value)?;
                Ok((!names.is_empty()).then_some(Selection::Suffixes(names)))
            }
        }
    }

    fn patterns<T>(
        &self,
        field: &'static str,
        read: fn(&'static str, &Value) -> Result<T, PeftError>,
    ) -> Result<Vec<(Regex, T)>, PeftError> {
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Object(entries)) => entries
                .iter()
                .map(|(key, value)| {
                    Ok((compile(field, &format!(r"\A(?:.*\.)?(?:{key})\z"))?, read(field, value)?))
                })
                .collect(),
            Some(_) => Err(bad(field, "must be an object from module names to numbers")),
        }
    }

    fn layers(&self, targets: &Targets) -> Result<Option<Layers>, PeftError> {
        const INDICES: &str = "layers_to_transform";
        const PATTERN: &str = "layers_pattern";
        let patterns = match self.get(PATTERN) {
            None => Vec::new(),
            Some(Value::String(text)) if text.is_empty() => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(value) => strings(PATTERN, value)?,
        };
        let indices = match self.get(INDICES) {
            None => None,
            Some(Value::Array(items)) => Some(
                items
                    .iter()
                    .map(|v| v.as_u64().ok_or_else(|| bad(INDICES, "must hold layer numbers")))
                    .collect::<Result<Vec<_>, _>>()?,
            ),
            Some(value) => {
                let index =
                    value.as_u64().ok_or_else(|| bad(INDICES, "must be a layer number or a list of them"))?;
                Some(vec![index])
            }
        };
        let Some(indices) = indices else {
            return if patterns.is_empty() {
                Ok(None)
            } else {
                Err(bad(PATTERN, "is set without `layers_to_transform`"))
            };
        };
        if !matches!(targets, Targets::Named(Selection::Suffixes(_))) {
            return Err(bad(INDICES, "goes only with a list of names in `target_modules`"));
        }
        if indices.is_empty() {
            return Ok(None);
        }
        let patterns = if patterns.is_empty() {
            // The first number that follows two names is the layer's; later ones would be experts.
            vec![compile(PATTERN, r"\A.*?\.[^.]*\.(?P<idx>\d+)\.")?]
        } else {
            patterns
                .iter()
                .map(|p| compile(PATTERN, &format!(r"\A(?:.*?\.)?(?:{p})\.(?P<idx>\d+)\.")))
                .collect::<Result<_, _>>()?
        };
        Ok(Some(Layers { indices, patterns }))
    }

    fn unknown(&self) -> Vec<String> {
        let known = |key: &str| KNOWN.contains(&key) || REFUSED.iter().any(|(field, _)| *field == key);
        self.0.keys().filter(|key| self.is_set(key) && !known(key)).cloned().collect()
    }
}

fn bad(field: &'static str, problem: impl Into<String>) -> PeftError {
    PeftError::ConfigField { field, problem: problem.into() }
}

fn rank(field: &'static str, value: &Value) -> Result<usize, PeftError> {
    match value.as_u64() {
        Some(r @ 1..=65_536) => Ok(r as usize),
        _ => Err(bad(field, format!("holds {value}, but a rank must be a whole number from 1 to 65536"))),
    }
}

fn number(field: &'static str, value: &Value) -> Result<f64, PeftError> {
    value
        .as_f64()
        .filter(|x| x.is_finite())
        .ok_or_else(|| bad(field, format!("holds {value}, but it must be a finite number")))
}

fn strings(field: &'static str, value: &Value) -> Result<Vec<String>, PeftError> {
    let items = value.as_array().ok_or_else(|| bad(field, "must be a string or a list of strings"))?;
    items
        .iter()
        .map(|v| match v.as_str() {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(bad(field, "must hold names that are not empty")),
        })
        .collect()
}

fn compile(field: &'static str, pattern: &str) -> Result<Regex, PeftError> {
    Regex::new(pattern).map_err(|e| {
        let reason = match e {
            regex::Error::CompiledTooBig(_) => "it is too large".to_owned(),
            other => other.to_string().lines().last().unwrap_or_default().trim().to_owned(),
        };
        bad(
            field,
            format!(
                "holds a regular expression that cannot be used ({reason}); look-around is not supported"
            ),
        )
    })
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
