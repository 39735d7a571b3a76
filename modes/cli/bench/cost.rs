//! `ambidex bench cost`: what each capture costs in processor time, memory, packets and kernel objects.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use lab::bench::Variant;
use lab::bench::case::Case;
use lab::bench::cost::{self, CostSpec, table};
use lab::bench::interrupt::{self, Interrupted};
use lab::topology::{Mode, Overlay, Programs};

use super::{INTERRUPTED, build, once};
use crate::cli::output::print;
use crate::cli::{Failure, block_on};
use crate::options::require_overlay;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Columns.
    Table,
    /// The content of cost.json.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct CostArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Directory for cost.json
    #[arg(long, value_name = "DIR", default_value = "out/cost")]
    out: PathBuf,
    /// Variants, separated by commas: none, relay, node-hybrid, node-tunnel, inpod by default
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "VARIANTS",
        default_value = "none,relay,node-hybrid,node-tunnel,inpod"
    )]
    variants: Vec<Variant>,
    /// Cases under which the cost is taken, separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "CASES",
        default_value = "cross-node/bulk1,cross-node/rr64,cross-node/newconn"
    )]
    cases: Vec<Case>,
    /// Numbers of pods of one node with which memory is read, ascending
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NUMBERS",
        default_value = "0,1,50,200"
    )]
    pods: Vec<u8>,
    /// Connections between two pods that are held open
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    idle_connections: u32,
    /// Tunnels between as many pairs of pods
    #[arg(long, value_name = "NUMBER", default_value_t = 2000)]
    idle_tunnels: u32,
    /// Seconds that a case takes
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Seconds in which memory may be given back
    #[arg(long, value_name = "SECONDS", default_value_t = 12)]
    settle: u64,
    /// Overlay of the node capture
    #[arg(long, value_enum, default_value_t = Overlay::Auto)]
    overlay: Overlay,
}

pub(super) fn run(args: CostArgs) -> Result<(), Failure> {
    let spec = CostSpec {
        variants: once(args.variants, Vec::new()),
        pods: args.pods,
        idle_connections: args.idle_connections,
        idle_tunnels: args.idle_tunnels,
        cases: once(args.cases, Vec::new()),
        seconds: args.seconds,
        settle: Duration::from_secs(args.settle),
        overlay: args.overlay,
        programs: Programs::of_this_process()?,
        out: args.out,
        build: build(),
    };
    if spec.variants.iter().any(Variant::is_node) {
        block_on(require_overlay(Mode::Node, spec.overlay))??;
    }
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build, its numbers say nothing");
    }
    interrupt::listen(|| eprintln!("interrupted: removing the lab"))?;
    let file = spec.out.join(cost::COST);
    match cost::run(&spec, &|line| eprintln!("{line}")) {
        Ok(report) => {
            match args.output {
                Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
                Format::Table => {
                    print(&format!("{}\n\n", table::all(&report)))?;
                    print(&format!("everything: {}\n", file.display()))?;
                }
            }
            Ok(())
        }
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("what was found until then: {}", file.display());
            Err(Failure::Code(INTERRUPTED))
        }
        Err(error) => Err(error.into()),
    }
}
