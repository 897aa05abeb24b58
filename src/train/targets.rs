//! From a job's settings to what the engine trains: names of modules to numbers of sites, and the trainer's
//! specification. Pure; asks no engine.

use std::collections::BTreeSet;

use crate::config::adapter::{self, AdapterConfig, FieldError};
use crate::engine::training::{AdamW, Checkpointing, LoraSpec, PassShape, TrainerSpec};
use crate::nn::lora::Site;

/// Every linear layer that the model has.
const ALL: &str = "all-linear";

/// What the engine is asked for. `context_tokens` is the model's longest sequence.
///
/// # Errors
/// The field that does not fit the model, with what would.
pub fn trainer_spec(
    config: &AdapterConfig,
    sites: &[Site],
    context_tokens: usize,
) -> Result<TrainerSpec, FieldError> {
    if config.r == 0 {
        return Err(field("r", "is 0, but a rank must be at least 1; 8 is usual"));
    }
    if config.batch_size == 0 {
        return Err(field("batch_size", "must be at least 1"));
    }
    if config.gradient_accumulation_steps == 0 {
        return Err(field("gradient_accumulation_steps", "must be at least 1"));
    }
    if !(2..=context_tokens).contains(&config.max_seq_length) {
        return Err(field(
            "max_seq_length",
            format!("is {}, but this model takes 2 to {context_tokens} tokens", config.max_seq_length),
        ));
    }
    Ok(TrainerSpec {
        lora: LoraSpec {
            rank: config.r,
            alpha: config.lora_alpha,
            dropout: config.lora_dropout,
            rslora: config.use_rslora,
            sites: sites_of(&config.target_modules, sites)?,
            seed: config.seed,
        },
        adamw: AdamW {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            eps: config.adam_epsilon,
            weight_decay: config.weight_decay,
        },
        pass: PassShape { sequences: config.batch_size, sequence_tokens: config.max_seq_length },
        checkpointing: match config.checkpointing {
            adapter::Checkpointing::Auto => Checkpointing::Auto,
            adapter::Checkpointing::Recompute => Checkpointing::Recompute,
            adapter::Checkpointing::Keep => Checkpointing::Keep,
        },
    })
}

/// Numbers of the sites that the names mean, ascending. A name is one or more last parts of a site's name.
fn sites_of(names: &[String], sites: &[Site]) -> Result<Vec<usize>, FieldError> {
    if names.is_empty() {
        return Err(field("target_modules", format!("is empty; {}", there_are(sites))));
    }
    if names.iter().any(|name| name.eq_ignore_ascii_case(ALL)) {
        return match names {
            [_] => Ok((0..sites.len()).collect()),
            _ => Err(field("target_modules", format!("holds {ALL:?} beside other names; it goes alone"))),
        };
    }
    let mut found = BTreeSet::new();
    for name in names {
        let mut known = false;
        for (number, site) in sites.iter().enumerate() {
            let head = site.name.strip_suffix(name.as_str());
            if !name.is_empty() && head.is_some_and(|head| head.is_empty() || head.ends_with('.')) {
                known = true;
                found.insert(number);
            }
        }
        if !known {
            let reason = format!("names {name:?}, which this model does not have; {}", there_are(sites));
            return Err(field("target_modules", reason));
        }
    }
    Ok(found.into_iter().collect())
}

fn there_are(sites: &[Site]) -> String {
    let last = |site: &'_ Site| site.name.rsplit('.').next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = sites.iter().map(last).collect();
    format!("it has {}, or {ALL:?} for all", names.into_iter().collect::<Vec<_>>().join(", "))
}

fn field(field: &str, message: impl Into<String>) -> FieldError {
    FieldError { field: field.to_owned(), message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Vec<Site> {
        let names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_attn"];
        names.map(|n| Site { name: n.into(), in_features: 2, out_features: 2 }).to_vec()
    }

    fn found(names: &[&str]) -> Result<Vec<usize>, FieldError> {
        sites_of(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), &sites())
    }

    #[test]
    fn names_are_last_parts() {
        assert_eq!(found(&["all-linear"]).unwrap(), [0, 1, 2, 3]);
        assert_eq!(found(&["c_attn"]).unwrap(), [0, 3]);
        assert_eq!(found(&["c_proj", "c_attn", "c_proj"]).unwrap(), [0, 1, 2, 3]);
        assert_eq!(found(&["mlp.c_proj"]).unwrap(), [2]);
        assert_eq!(found(&["h.1.attn.c_attn"]).unwrap(), [3]);
        // Named twice is trained once.
        assert_eq!(found(&["attn.c_proj", "h.0.attn.c_proj"]).unwrap(), [1]);
    }

    #[test]
    fn what_the_model_lacks_is_told_with_what_it_has() {
        for names in [&["q_proj"][..], &["proj"], &["c_attn", "nothing"], &[""], &[]] {
            let error = found(names).unwrap_err();
            assert_eq!(error.field, "target_modules");
            assert!(
                error.message.contains("c_attn, c_proj") && error.message.contains("all-linear"),
                "{error}"
            );
        }
        assert!(found(&["all-linear", "c_attn"]).unwrap_err().message.contains("alone"));
    }

    #[test]
    fn fields_are_checked_against_the_model() {
        let good = AdapterConfig::default();
        let spec = trainer_spec(&good, &sites(), 512).unwrap();
        assert_eq!((spec.lora.rank, spec.lora.sites.len()), (good.r, 4));
        assert_eq!(spec.pass, PassShape { sequences: good.batch_size, sequence_tokens: good.max_seq_length });
        for (field, change) in [
            ("r", (|c| c.r = 0) as fn(&mut AdapterConfig)),
            ("batch_size", |c| c.batch_size = 0),
            ("gradient_accumulation_steps", |c| c.gradient_accumulation_steps = 0),
            ("max_seq_length", |c| c.max_seq_length = 513),
            ("max_seq_length", |c| c.max_seq_length = 1),
        ] {
            let mut config = good.clone();
            change(&mut config);
            assert_eq!(trainer_spec(&config, &sites(), 512).unwrap_err().field, field);
        }
    }
}
