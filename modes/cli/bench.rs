//! `ambidex bench`: the main job.

use std::path::PathBuf;

use clap::Args;
use lab::bench::case::Case;
use lab::bench::{BenchSpec, Variant};
use lab::topology::{Mode, Overlay, Programs};

use super::{Failure, block_on};
use crate::options::require_overlay;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Three rounds of three seconds, and on one node only the bulk stream
    #[arg(long)]
    quick: bool,
    /// Directory for results.json
    #[arg(long, value_name = "DIR", default_value = "out/bench")]
    out: PathBuf,
    /// Variants, separated by commas: none, node-hybrid, node-tunnel, inpod
    #[arg(long, value_delimiter = ',', value_name = "VARIANTS")]
    variants: Vec<Variant>,
    /// Cases, separated by commas, such as cross-node/bulk or same-node/newconn
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
}

pub(crate) fn run(args: BenchArgs) -> Result<(), Failure> {
    let (rounds, seconds, cases) = if args.quick {
        (3, 3, Case::quick())
    } else {
        (6, 5, Case::all())
    };
    let spec = BenchSpec {
        variants: if args.variants.is_empty() {
            Variant::ALL.to_vec()
        } else {
            args.variants
        },
        cases: if args.cases.is_empty() {
            cases
        } else {
            args.cases
        },
        rounds: args.rounds.unwrap_or(rounds),
        seconds: args.seconds.unwrap_or(seconds),
        overlay: args.overlay,
        programs: Programs::of_this_process()?,
        out: args.out,
    };
    let captured_by_node =
        |variant: &Variant| matches!(variant, Variant::NodeHybrid | Variant::NodeTunnel);
    if spec.variants.iter().any(captured_by_node) {
        block_on(require_overlay(Mode::Node, spec.overlay))??;
    }
    let report = lab::bench::run(&spec, &|line| eprintln!("{line}"))?;
    for proof in &report.proofs {
        print!("{proof}");
    }
    println!();
    println!("{}", report.table());
    println!();
    let overlay = report.overlay.as_deref().unwrap_or("none");
    println!(
        "overlay: {overlay}; {} rounds of {} s, interleaved; medians; {:.0} s in all",
        report.rounds, report.seconds_per_sample, report.seconds_taken
    );
    println!(
        "every sample: {}",
        spec.out.join(lab::bench::report::RESULTS).display()
    );
    Ok(())
}
