//! `gurukul man`: the manual as roff, the main page on stdout or a page for each sub-command in a folder. It follows
//! from the description of the command line and knows nothing else; no settings are read.

use std::path::PathBuf;

use anyhow::Context as _;

/// Where the manual goes.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Folder for gurukul.1 and a page for each sub-command; without it the main page goes to stdout
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args, command: clap::Command) -> anyhow::Result<()> {
    let Some(folder) = &args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return super::print(&String::from_utf8(page)?);
    };
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(command, folder))
        .with_context(|| format!("--out {}", folder.display()))
}
