//! `ambidex man`: manual pages, one for the program and one for each of its commands.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command};
use clap_mangen::Man;

use super::Failure;
use super::output::print;

/// Name of the manual in the middle of each page's first line.
const MANUAL: &str = "Ambidex";

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory for the pages of all commands, made if it is not there (default: the program's own page is printed)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: ManArgs) -> Result<(), Failure> {
    // `ambidex help` says what the page says.
    let mut program = super::command().disable_help_subcommand(true);
    program.build();
    match args.out {
        None => print(&page(&program)?)?,
        Some(directory) => {
            fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
            write_pages(&program, &directory)?;
        }
    }
    Ok(())
}

/// Writes the page of a command and those of its own commands, `ambidex-get-pods.1` and so on.
fn write_pages(command: &Command, directory: &Path) -> anyhow::Result<()> {
    let path = directory.join(Man::new(command.clone()).get_filename());
    fs::write(&path, page(command)?).with_context(|| path.display().to_string())?;
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .try_for_each(|command| write_pages(command, directory))
}

fn page(command: &Command) -> anyhow::Result<String> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let version = env!("CARGO_PKG_VERSION");
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    let page = String::from_utf8(page)?;
    let mut lines = Vec::new();
    for line in page.lines() {
        if line.starts_with(".TH ") {
            // An empty date in the library's own line makes a date of what is behind it.
            lines.push(format!(
                ".TH {name} 1 \"\" \"ambidex {version}\" \"{MANUAL}\""
            ));
        } else {
            lines.push(line.to_owned());
        }
    }
    // A break around an empty line is one too many for formatters that are strict.
    Ok(lines.join("\n").replace("\n.br\n\n.br\n", "\n.sp\n") + "\n")
}
