//! The prompts that a policy learns on: from a list or a source to tokens, and some of them held out. Touches no
//! engine.

use futures::StreamExt as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use crate::config::rl::{PromptConfig, RlTrainConfig};
use crate::data::{Cursor, Record, SourceConfig};
use crate::model::tokenizer::{AddSpecial, Tokenizer};
use crate::text::{Language, target_of_prompt};
use crate::train::TrainError;

/// Streams of the seed: that of the split, and those of epochs after it.
const SPLIT: u64 = 0;

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptSource {
    /// Those that a request or the settings have.
    List(Vec<PromptConfig>),
    /// Records of a source, with a field for the prompt, and where they have them `reference` (or `completion`) and
    /// `language`.
    Source {
        /// Its name in the connectors file.
        name: String,
        /// The source.
        source: Box<SourceConfig>,
    },
}

/// A prompt, ready to be answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompt {
    pub(super) text: String,
    pub(super) tokens: Vec<u32>,
    pub(super) language: Option<Language>,
    pub(super) reference: Option<String>,
}

/// Prompts to learn on, and prompts to measure with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompts {
    pub(super) train: Vec<Prompt>,
    pub(super) held_out: Vec<Prompt>,
}

impl PromptSource {
    /// The prompts themselves, at most `most`.
    ///
    /// # Errors
    /// What the source reports; records without a prompt, if they are too many.
    pub(super) async fn read(&self, most: usize) -> Result<Vec<PromptConfig>, TrainError> {
        let (name, source) = match self {
            Self::List(prompts) => return Ok(prompts.iter().take(most).cloned().collect()),
            Self::Source { name, source } => (name, source),
        };
        let mut stream = source.open(name, Cursor::default());
        let mut prompts = Vec::new();
        while prompts.len() < most {
            let Some(record) = stream.next().await else { break };
            let record = record?;
            match prompt_of(source, &record) {
                Ok(prompt) => prompts.push(prompt),
                Err(reason) => stream.refuse(format!("{}: {reason}", record.place))?,
            }
        }
        stream.finish()?;
        Ok(prompts)
    }
}

fn prompt_of(source: &SourceConfig, record: &Record) -> Result<PromptConfig, String> {
    let named = |field: &str| source.fields.get(field).map(String::as_str);
    let text = |paths: &[Option<&str>]| {
        let mut found = paths.iter().flatten().filter_map(|path| record.at(path)?.as_str());
        found.find(|text| !text.trim().is_empty()).map(str::to_owned)
    };
    let prompt = text(&[named("prompt").or(Some("prompt")), named("source")])
        .ok_or("has no text in the field prompt; name it under fields in the source")?;
    let language = text(&[Some("language")]).or_else(|| source.target_language.clone());
    if let Some(language) = &language {
        language
            .parse::<Language>()
            .map_err(|unknown| format!("has a language that is not known: {unknown}"))?;
    }
    let reference = text(&[
        Some("reference"),
        named("completion").or(Some("completion")),
        named("target").or(Some("target")),
    ]);
    Ok(PromptConfig { prompt, language, reference })
}

impl Prompts {
    /// Prompts as tokens, in an order that the seed gives; gives also how many are too long to be answered.
    ///
    /// # Errors
    /// None is left.
    pub(super) fn new(
        all: &[PromptConfig],
        config: &RlTrainConfig,
        tokenizer: &Tokenizer,
    ) -> Result<(Self, usize), TrainError> {
        let (prompts, too_long) = tokens_of(all, config, tokenizer)?;
        if prompts.is_empty() {
            return Err(TrainError::Failed(format!(
                "there is no prompt to learn on: of {} none has 1 to {} tokens; raise max_seq_length ({}) or lower \
                 max_new_tokens ({})",
                all.len(),
                config.max_seq_length - config.max_new_tokens,
                config.max_seq_length,
                config.max_new_tokens
            )));
        }
        let wanted = (prompts.len() as f64 * config.eval_share).round() as usize;
        let wanted = if config.eval_share > 0.0 { wanted.max(1) } else { 0 };
        let wanted = wanted.min(config.max_eval_prompts).min(prompts.len() - 1);
        let order = order(prompts.len(), config.seed, SPLIT);
        let pick = |places: &[usize]| places.iter().map(|&at| prompts[at].clone()).collect();
        Ok((Self { held_out: pick(&order[..wanted]), train: pick(&order[wanted..]) }, too_long))
    }

    /// Prompts to measure with alone; gives also how many are too long.
    ///
    /// # Errors
    /// A prompt that has no tokens at all.
    pub(super) fn to_measure(
        all: &[PromptConfig],
        config: &RlTrainConfig,
        tokenizer: &Tokenizer,
    ) -> Result<(Self, usize), TrainError> {
        let (mut held_out, too_long) = tokens_of(all, config, tokenizer)?;
        held_out.truncate(config.max_eval_prompts);
        Ok((Self { train: Vec::new(), held_out }, too_long))
    }

    /// The prompts of a step, `count` of them: all in a new order in each epoch.
    pub(super) fn of_step(&self, step: u64, count: usize, seed: u64) -> Vec<&Prompt> {
        let (all, first) = (self.train.len() as u64, step * count as u64);
        let mut latest: Option<(u64, Vec<usize>)> = None;
        (first..first + count as u64)
            .map(|number| {
                let (epoch, place) = (number / all, (number % all) as usize);
                let order = match latest.take() {
                    Some((of, order)) if of == epoch => order,
                    _ => order(self.train.len(), seed, epoch + SPLIT + 1),
                };
                let prompt = &self.train[order[place]];
                latest = Some((epoch, order));
                prompt
            })
            .collect()
    }
}

/// Prompts as tokens; those without any and those too long to be answered are counted.
fn tokens_of(
    all: &[PromptConfig],
    config: &RlTrainConfig,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Prompt>, usize), TrainError> {
    let room = config.max_seq_length - config.max_new_tokens;
    let mut prompts = Vec::with_capacity(all.len());
    for prompt in all {
        let tokens = tokenizer.encode(&prompt.prompt, AddSpecial::Yes);
        let tokens =
            tokens.map_err(|error| TrainError::Failed(format!("a prompt cannot be used: {error}")))?;
        let language = match &prompt.language {
            Some(language) => language.parse().ok(),
            None => target_of_prompt(&prompt.prompt),
        };
        if (1..=room).contains(&tokens.len()) {
            let (text, reference) = (prompt.prompt.clone(), prompt.reference.clone());
            prompts.push(Prompt { text, tokens, language, reference });
        }
    }
    let too_long = all.len() - prompts.len();
    Ok((prompts, too_long))
}

/// 0 to below `count` in an order that follows from a seed and a stream of it (Fisher and Yates).
pub(super) fn order(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn prompts(count: usize, config: &RlTrainConfig) -> Result<(Prompts, usize), TrainError> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama");
        let prompt =
            |i| PromptConfig { prompt: format!("Translate to Hindi: {i}"), language: None, reference: None };
        let all: Vec<PromptConfig> = (0..count).map(prompt).collect();
        Prompts::new(&all, config, &Tokenizer::from_dir(&model).unwrap())
    }

    #[test]
    fn held_out_prompts_are_never_learnt_from() {
        let config = RlTrainConfig { eval_share: 0.3, ..RlTrainConfig::default() };
        let (of_20, too_long) = prompts(20, &config).unwrap();
        assert_eq!((of_20.train.len(), of_20.held_out.len(), too_long), (14, 6, 0));
        assert!(of_20.held_out.iter().all(|prompt| !of_20.train.contains(prompt)));
        assert_eq!(of_20.train[0].language, Some(Language::Hindi), "as the prompt asks for");
        assert_eq!(prompts(20, &config).unwrap().0, of_20);
        // One is always left to learn from.
        assert_eq!(prompts(1, &config).unwrap().0.held_out.len(), 0);
    }

    #[test]
    fn an_epoch_takes_each_prompt_once_in_an_order_of_its_own() {
        let (prompts, _) =
            prompts(12, &RlTrainConfig { eval_share: 0.0, ..RlTrainConfig::default() }).unwrap();
        let texts = |step: u64| -> Vec<&str> {
            prompts.of_step(step, 4, 9).into_iter().map(|prompt| prompt.text.as_str()).collect()
        };
        let epoch = |first: u64| [texts(first), texts(first + 1), texts(first + 2)].concat();
        let (one, two) = (epoch(0), epoch(3));
        for epoch in [&one, &two] {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), 12);
        }
        assert_ne!(one, two);
        assert_eq!(prompts.of_step(0, 30, 9).len(), 30, "more than there are");
    }

    #[test]
    fn prompts_that_leave_no_room_are_counted() {
        let config = RlTrainConfig { max_seq_length: 66, max_new_tokens: 64, ..RlTrainConfig::default() };
        let error = prompts(3, &config).unwrap_err().to_string();
        assert!(error.contains("of 3 none has 1 to 2 tokens"), "{error}");
    }

    #[test]
    fn records_are_prompts_with_what_they_bring() {
        let record = |fields: serde_json::Value| Record {
            fields: fields.as_object().unwrap().clone(),
            place: crate::data::Place { object: "x".into(), row: crate::data::Row::Line(1) },
        };
        let source = SourceConfig::local("x");
        let of = |fields| prompt_of(&source, &record(fields));
        let full = of(serde_json::json!({"prompt": "a", "completion": "b", "language": "ta"})).unwrap();
        assert_eq!((full.reference.as_deref(), full.language.as_deref()), (Some("b"), Some("ta")));
        assert_eq!(of(serde_json::json!({"prompt": "a"})).unwrap().reference, None);
        assert!(of(serde_json::json!({"text": "a"})).unwrap_err().contains("under fields"));
        assert!(
            of(serde_json::json!({"prompt": "a", "language": "Klingon"})).unwrap_err().contains("not known")
        );
    }
}
