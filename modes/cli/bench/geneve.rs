//! `ambidex bench geneve`: the benchmark in a User-Mode Linux machine, which has geneve.

use std::path::PathBuf;

use clap::Args;
use lab::bench::case::Case;
use lab::bench::geneve::{self, GeneveSpec};
use lab::bench::interrupt::{self, Interrupted};
use lab::bench::{Variant, report};
use lab::topology::Programs;

use super::{INTERRUPTED, once};
use crate::cli::Failure;

#[derive(Debug, Args)]
pub(crate) struct GeneveArgs {
    /// Directory for results.json
    #[arg(long, value_name = "DIR", default_value = "out/bench-geneve")]
    out: PathBuf,
    /// Variants, separated by commas: none, node-hybrid, node-tunnel, inpod by default
    #[arg(long, value_delimiter = ',', value_name = "VARIANTS")]
    variants: Vec<Variant>,
    /// Cases, separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "CASES",
        default_value = "cross-node/bulk1,cross-node/rr1,cross-node/newconn"
    )]
    cases: Vec<Case>,
    /// Rounds; in each one every variant is measured once in every case
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds that one sample takes
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

pub(super) fn run(args: GeneveArgs) -> Result<(), Failure> {
    let spec = GeneveSpec {
        variants: once(args.variants, Variant::DEFAULT.to_vec()),
        cases: once(args.cases, Vec::new()),
        rounds: args.rounds,
        seconds: args.seconds,
        programs: Programs::of_this_process()?,
        out: args.out,
    };
    interrupt::listen(|| eprintln!("interrupted: ending the machine"))?;
    let results = spec.out.join(report::RESULTS);
    match geneve::run(&spec, &|line| eprintln!("{line}")) {
        Ok(report) => {
            print!("{}\n{report}", report.printed);
            println!("every sample: {}", results.display());
            Ok(())
        }
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("what was measured until then: {}", results.display());
            Err(Failure::Code(INTERRUPTED))
        }
        Err(error) => Err(error.into()),
    }
}
