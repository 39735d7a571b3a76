//! `ambidex bench`: the main job.

mod cost;
mod document;
mod geneve;
mod plan;
mod self_check;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use lab::bench::case::Case;
use lab::bench::external::ExternalProxy;
use lab::bench::interrupt::{self, Interrupted};
use lab::bench::report::{self, Ended, Report};
use lab::bench::{BenchSpec, Variant, table};
use lab::topology::{Mode, Overlay, Programs};

use plan::Plan;

use super::{Failure, block_on};
use crate::options::require_overlay;

/// Exit code of a program that SIGINT ended, as a shell gives it.
pub(super) const INTERRUPTED: u8 = 130;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    #[command(flatten)]
    run: RunArgs,
}

/// Other instruments than the side-by-side run.
#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// The same benchmark over real geneve, in a User-Mode Linux machine on one processor
    Geneve(geneve::GeneveArgs),
    /// What each variant costs: processor time per process, memory per pod and tunnel, packets, kernel objects
    Cost(cost::CostArgs),
    /// Generate the tables of a document from results files, such as docs/results --write docs/performance.md
    Report(document::DocumentArgs),
    /// Print a results file again; exit code 1 if it must not be believed
    Show {
        /// results.json
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The main cases in three rounds of three seconds: three minutes
    #[arg(long, group = "plan")]
    quick: bool,
    /// The main cases on both paths with the relay, six rounds of five seconds: less than 20 minutes
    #[arg(long, group = "plan")]
    full: bool,
    /// All variants and cases in ten rounds: hours, so combine it with --resume
    #[arg(long, group = "plan")]
    all: bool,
    /// Measure one variant (inpod) against itself: exit code 0 if there is no difference, else 3
    #[arg(long, group = "plan", conflicts_with = "resume")]
    self_check: bool,
    /// Delay requests in one of two labs of the same variant, such as by 1ms: exit code 0 if that is detected, else 1
    #[arg(long, value_name = "TIME", group = "plan", conflicts_with = "resume", value_parser = self_check::time)]
    inject_delay: Option<Duration>,
    /// Directory for results.json
    #[arg(long, value_name = "DIR", default_value = "out/bench")]
    out: PathBuf,
    /// Variants, separated by commas: none, relay, node-hybrid, node-tunnel, node-direct, inpod
    #[arg(long, value_delimiter = ',', value_name = "VARIANTS")]
    variants: Vec<Variant>,
    /// Measure somebody else's proxy that speaks ZDS, too, with in-pod capture; KEY=VALUE go into its environment
    #[arg(long = "proxy", value_name = "NAME=PATH[,KEY=VALUE...]")]
    proxies: Vec<ExternalProxy>,
    /// Cases, separated by commas, such as cross-node/bulk1 or same-node/newconn
    #[arg(long, value_delimiter = ',', value_name = "CASES")]
    cases: Vec<Case>,
    /// Rounds; in each one every variant is measured once in every case
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds that one sample takes
    #[arg(long)]
    seconds: Option<u64>,
    /// Overlay of the node capture
    #[arg(long, value_enum, default_value_t = Overlay::Auto)]
    overlay: Overlay,
    /// Go on where the results.json in the directory ends, if there is one
    #[arg(long)]
    resume: bool,
    /// Print every statement of the proofs
    #[arg(short, long)]
    verbose: bool,
}

pub(crate) fn run(args: BenchArgs) -> Result<(), Failure> {
    match args.command {
        None => measure(args.run),
        Some(BenchCommand::Geneve(args)) => geneve::run(args),
        Some(BenchCommand::Cost(args)) => cost::run(args),
        Some(BenchCommand::Report(args)) => document::run(&args),
        Some(BenchCommand::Show { file }) => show(&file),
    }
}

/// A file may have been cut or edited since it was written, so its verdict is made anew.
fn show(file: &Path) -> Result<(), Failure> {
    let mut report = Report::load(file)?;
    if report.ended == Ended::Finished {
        report.ended = lab::bench::run::verdict(&report);
    }
    print(&report, false);
    believed(&report)
}

fn measure(args: RunArgs) -> Result<(), Failure> {
    let plan = match &args {
        args if args.quick => Plan::quick(),
        args if args.full => Plan::full(),
        args if args.all => Plan::all(),
        args if args.self_check => Plan::self_check(),
        args if args.inject_delay.is_some() => Plan::injected_delay(),
        _ => Plan::default(),
    };
    let mut variants = once(args.variants, plan.variants);
    let proxies = args.proxies.into_iter().map(Arc::new);
    variants.extend(proxies.map(Variant::External));
    let spec = BenchSpec {
        variants: once(variants, Vec::new()),
        cases: once(args.cases, plan.cases),
        rounds: args.rounds.unwrap_or(plan.rounds),
        seconds: args.seconds.unwrap_or(plan.seconds),
        overlay: args.overlay,
        programs: Programs::of_this_process()?,
        out: args.out,
        build: build(),
        resume: args.resume,
    };
    if spec.variants.iter().any(|variant| variant.is_node()) {
        block_on(require_overlay(Mode::Node, spec.overlay))??;
    }
    if cfg!(debug_assertions) {
        eprintln!(
            "warning: this is a debug build, its numbers say nothing (`make bench` builds a release)"
        );
    }
    interrupt::listen(|| eprintln!("interrupted: removing the labs"))?;
    if args.self_check || args.inject_delay.is_some() {
        return self_check::run(&spec, args.inject_delay);
    }
    let results = spec.out.join(report::RESULTS);
    let report = match lab::bench::run(&spec, &|line| eprintln!("{line}")) {
        Ok(report) => report,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("what was measured until then: {}", results.display());
            return Err(Failure::Code(INTERRUPTED));
        }
        Err(error) => return Err(error.into()),
    };
    print(&report, args.verbose);
    println!("every sample: {}", results.display());
    believed(&report)
}

fn print(report: &Report, verbose: bool) {
    if verbose {
        for proof in &report.proofs {
            print!("{proof}");
        }
    } else {
        println!("{}", table::proofs(&report.proofs));
    }
    println!();
    println!("{}", table::results(report));
    println!();
    println!("{}", table::equality(report));
    println!();
    println!("{}", table::conditions(report));
}

/// Fails for a report that must not be believed, which has been printed.
fn believed(report: &Report) -> Result<(), Failure> {
    match table::verdict(report) {
        None => Ok(()),
        Some(verdict) => {
            eprintln!("{verdict}");
            Err(Failure::Code(1))
        }
    }
}

/// What was asked for without repetitions, or `all` when nothing was.
fn once<T: PartialEq>(asked: Vec<T>, all: Vec<T>) -> Vec<T> {
    let mut chosen = Vec::new();
    for item in if asked.is_empty() { all } else { asked } {
        if !chosen.contains(&item) {
            chosen.push(item);
        }
    }
    chosen
}

/// Version, profile and features of this program.
pub(super) fn build() -> String {
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    // With both features, aws-lc is used.
    let tls = if cfg!(feature = "tls-aws-lc") {
        "tls-aws-lc"
    } else {
        "tls-ring"
    };
    format!("{} {profile} {tls}", env!("CARGO_PKG_VERSION"))
}
