//! `ambidex completions`: what a shell offers for an unfinished command line.

use clap::{Args, ValueEnum};
use clap_complete::Shell;

use super::Failure;
use super::output::print;

/// Shells that a script can be written for and that are tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KnownShell {
    /// `source <(ambidex completions bash)`.
    Bash,
    /// A file `_ambidex` in a directory of `$fpath`.
    Zsh,
    /// `ambidex completions fish | source`.
    Fish,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: KnownShell,
}

pub(crate) fn run(args: CompletionsArgs) -> Result<(), Failure> {
    let shell = match args.shell {
        KnownShell::Bash => Shell::Bash,
        KnownShell::Zsh => Shell::Zsh,
        KnownShell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "ambidex", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(())
}
