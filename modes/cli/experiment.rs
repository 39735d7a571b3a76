//! `ambidex experiment`: scripted migrations in a lab under load.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use lab::bench::interrupt::{self, Interrupted};
use lab::experiment::{self, Experiment, Order, report, result};
use lab::topology::{Mode, Overlay, Programs};

use super::output::{OutputArgs, plain_table, print};
use super::{Failure, bench, block_on};
use crate::options::require_overlay;

/// Scenarios that come with the program.
const READY: [(&str, &str); 5] = [
    (
        "agent-restart",
        include_str!("../../scenarios/agent-restart.yaml"),
    ),
    (
        "proxy-restart",
        include_str!("../../scenarios/proxy-restart.yaml"),
    ),
    (
        "rolling-pods",
        include_str!("../../scenarios/rolling-pods.yaml"),
    ),
    ("small", include_str!("../../scenarios/small.yaml")),
    (
        "switch-1000",
        include_str!("../../scenarios/switch-1000.yaml"),
    ),
];

#[derive(Debug, Args)]
pub(crate) struct ExperimentArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run an experiment in a lab of its own and write result.json and report.md
    Run(RunArgs),
    /// List the scenarios that come with the program
    List(ListArgs),
    /// Print a scenario that comes with the program, as a file to begin with
    Show {
        /// Its name
        name: String,
    },
    /// Say whether a file describes an experiment
    Validate {
        /// The file, or the name of a scenario that comes with the program
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The file, or the name of a scenario that comes with the program
    file: PathBuf,
    /// Exit code 1 when something that has to be so is not so
    #[arg(long)]
    check: bool,
    /// Directory for result.json and report.md
    #[arg(long, value_name = "DIR", default_value = "out/experiment")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ExperimentArgs) -> Result<(), Failure> {
    match args.command {
        Command::Run(args) => perform(args),
        Command::List(args) => list(&args),
        Command::Show { name } => {
            let (_, text) = ready(Path::new(&name)).ok_or_else(|| unknown(&name))?;
            Ok(print(text)?)
        }
        Command::Validate { file } => {
            let experiment = load(&file)?;
            let steps = experiment.steps.len();
            let name = experiment.metadata.name;
            Ok(print(&format!(
                "{name}: an experiment of {steps} step(s)\n"
            ))?)
        }
    }
}

fn perform(args: RunArgs) -> Result<(), Failure> {
    let experiment = load(&args.file)?;
    block_on(require_overlay(Mode::Mixed, Overlay::Auto))??;
    interrupt::listen(|| eprintln!("interrupted: removing the lab"))?;
    let order = Order {
        experiment,
        programs: Programs::of_this_process()?,
        out: args.out,
        build: bench::build(),
    };
    let outcome = match experiment::run(&order, &|line| eprintln!("{line}")) {
        Ok(outcome) => outcome,
        Err(error) if error.is::<Interrupted>() => return Err(Failure::Code(bench::INTERRUPTED)),
        Err(error) => return Err(error.into()),
    };
    print(&report::markdown(&outcome))?;
    let written = order.out.join(result::RESULT);
    eprintln!("everything: {}", written.display());
    let failed = outcome.assertions.iter().filter(|one| !one.holds);
    let failed: Vec<&str> = failed.map(|one| one.assertion.as_str()).collect();
    if failed.is_empty() {
        return Ok(());
    }
    eprintln!("does not hold: {}", failed.join(", "));
    if args.check {
        return Err(Failure::Code(1));
    }
    Ok(())
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let mut all = Vec::new();
    for (name, text) in READY {
        all.push(Experiment::parse(text).with_context(|| name.to_owned())?);
    }
    args.output.print(&all, |_| {
        let mut table = plain_table(&["NAME", "CONNECTIONS", "NEW/S", "STEPS", "DESCRIPTION"]);
        for one in &all {
            table.add_row([
                one.metadata.name.clone(),
                one.load.long_lived.connections.to_string(),
                one.load.new.per_second.to_string(),
                one.steps.len().to_string(),
                one.metadata.description.trim().to_owned(),
            ]);
        }
        table
    })?;
    Ok(())
}

/// A file, or a scenario that comes with the program where there is no such file.
fn load(file: &Path) -> anyhow::Result<Experiment> {
    match ready(file) {
        Some((name, text)) if !file.exists() => {
            Experiment::parse(text).with_context(|| name.to_owned())
        }
        None if !file.exists() => Err(unknown(&file.display().to_string())),
        _ => Experiment::load(file),
    }
}

fn ready(name: &Path) -> Option<(&'static str, &'static str)> {
    READY
        .into_iter()
        .find(|(known, _)| Path::new(known) == name)
}

fn unknown(name: &str) -> anyhow::Error {
    let known = READY.map(|(name, _)| name).join(", ");
    anyhow!("{name}: no such file, and no scenario of this name: there are {known}")
}
