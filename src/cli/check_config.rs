//! `gurukul check-config`: the resolved settings on stdout, then the files for training, then what the model's
//! folder holds. Loads no weights, opens no port and no source.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::config::adapter::{self, AdapterConfig};
use crate::config::connectors::{self, Connectors};
use crate::config::rl::{self, RlConfig};
use crate::model::load;
use crate::model::tokenizer::Tokenizer;
use crate::rl::Rewarder;

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let training = describe_training(settings).context(CannotStart)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "# Settings in force, as a configs/server.yaml; the comments say where each comes from.")?;
    write!(out, "{}", settings.to_yaml())?;
    writeln!(out, "\n{}", settings.security.describe())?;
    writeln!(out, "\n{training}")?;
    if settings.model.is_none() {
        writeln!(out, "\n# No model is named: the demo model that this program carries is served.")?;
        return Ok(());
    }
    let folder = super::runtime()?.block_on(app::model_folder(settings))?;
    let summary = describe(&folder).with_context(|| format!("{}", folder.display())).context(CannotStart)?;
    writeln!(out, "\n# The model's folder\nfolder: {}\n{summary}", folder.display())?;
    Ok(())
}

/// That the files for training can be used, and the sources that they name, as comments.
fn describe_training(settings: &Settings) -> anyhow::Result<String> {
    let folder = &settings.configs_dir;
    let of = |name: &str| format!("{}", folder.join(name).display());
    AdapterConfig::load(folder, None, &serde_json::Map::new()).with_context(|| of(adapter::FILE_NAME))?;
    let connectors = Connectors::load(folder, None).with_context(|| of(connectors::FILE_NAME))?;
    let mut text =
        format!("# {}: can be used\n# {}: can be used; ", of(adapter::FILE_NAME), of(connectors::FILE_NAME));
    let mut sources = connectors.iter().peekable();
    text += if sources.peek().is_some() { "its sources:" } else { "it has no sources" };
    for (name, source) in sources {
        text += &format!("\n#   {name} ({}): {}", source.kind(), source.description());
    }
    let rl = RlConfig::load(folder, None).with_context(|| of(rl::FILE_NAME))?;
    Rewarder::new(&rl.rewards).with_context(|| of(rl::FILE_NAME))?;
    let parts = rl.rewards.weights().into_iter().filter(|(_, weight)| *weight > 0.0);
    let parts: Vec<String> = parts.map(|(part, weight)| format!("{part} {weight}")).collect();
    let sinks = rl.sinks.names().filter_map(|name| Some(format!("{name} ({})", rl.sinks.sink(name)?.kind())));
    let sinks: Vec<String> = sinks.collect();
    let sinks = if sinks.is_empty() { "none".to_owned() } else { sinks.join(", ") };
    text += &format!(
        "\n# {}: can be used; {} prompts; rewards: {}; sinks: {sinks}",
        of(rl::FILE_NAME),
        rl.prompts.len(),
        parts.join(", ")
    );
    Ok(text)
}

/// Family, size and tokenizer of a model folder, as YAML.
fn describe(folder: &Path) -> anyhow::Result<String> {
    let model = load::inspect(folder)?;
    let tokenizer = Tokenizer::from_dir(folder)?;
    Ok(format!(
        "family: {}\nparameters: {}\nlayers: {}\ncontext_tokens: {}\nvocabulary: {}\nchat_template: {}\n\
         eos_token_ids: {:?}",
        model.spec.family,
        model.parameters,
        model.spec.layers,
        model.spec.max_positions,
        tokenizer.vocab_size(),
        tokenizer.chat_template().is_some(),
        model.eos_token_ids,
    ))
}
