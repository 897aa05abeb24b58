//! `gurukul check-config`: the resolved settings on stdout, then what the model's folder holds. Loads no
//! weights and opens no port.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::app::{self, CannotStart};
use crate::config::Settings;
use crate::model::load;
use crate::model::tokenizer::Tokenizer;

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "# Settings in force, as a configs/server.yaml; the comments say where each comes from.")?;
    write!(out, "{}", settings.to_yaml())?;
    if settings.model.is_none() {
        writeln!(out, "\n# No model is named: gurukul serve would stop here. Use --model.")?;
        return Ok(());
    }
    let folder = super::runtime()?.block_on(app::model_folder(settings))?;
    let summary = describe(&folder).with_context(|| format!("{}", folder.display())).context(CannotStart)?;
    writeln!(out, "\n# The model's folder\nfolder: {}\n{summary}", folder.display())?;
    Ok(())
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
