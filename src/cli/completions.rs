//! `gurukul completions SHELL`: a script on stdout that teaches a shell the command line. It follows from the
//! description of the command line and knows nothing else; no settings are read.

use clap_complete::Shell;

/// For which shell.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// The shell that the script is for
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &Args, mut command: clap::Command) -> anyhow::Result<()> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    super::print(&String::from_utf8(script)?)
}
