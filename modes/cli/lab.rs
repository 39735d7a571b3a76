//! `ambidex lab`: a two-node lab of network namespaces, left standing.

mod relay;

use clap::{Args, Subcommand};
use lab::standing;
use lab::topology::{Families, LabSpec, Programs};
use lab::traffic::{self, TrafficCommand};

use super::output::{Format, OutputArgs};
use super::{Failure, block_on};
use relay::RelayArgs;

use crate::options::{CaptureArgs, require_overlay};

#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    verb: Verb,
}

/// Which lab.
#[derive(Debug, Args)]
struct NameArgs {
    /// Name of the lab
    #[arg(long, default_value = "lab", env = "AMBIDEX_LAB")]
    name: String,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build a lab: two nodes with pods, a service, an outside host, and real agents, proxies and plugin calls
    Up(UpArgs),
    /// Remove a lab, whole or in pieces
    Down(DownArgs),
    /// Show what stands and whether it works
    Status(StatusArgs),
    /// Run a command in node1, proxy1, pod1-2, plain1 or out
    Exec(ExecArgs),
    /// Run the benchmark's bound in place of the node proxy: plain connections, spliced
    #[command(hide = true)]
    Relay(RelayArgs),
    /// Be the load of one pod in an experiment, as a JSON plan and standard input say
    #[command(hide = true)]
    Load {
        /// The plan
        plan: String,
    },
    /// Serve or check traffic in the current namespace, as a JSON command says
    #[command(hide = true)]
    Traffic {
        /// The command
        command: String,
    },
}

#[derive(Debug, Args)]
struct UpArgs {
    #[command(flatten)]
    name: NameArgs,
    #[command(flatten)]
    capture: CaptureArgs,
    /// Run a control plane on the outside host, which proxies get the mesh and certificates from
    #[arg(long)]
    control_plane: bool,
    /// Which addresses pods have
    #[arg(long, value_enum, default_value_t = Families::V4)]
    ip_families: Families,
    /// Captured pods on each node
    #[arg(long, default_value_t = 2)]
    pods_per_node: u8,
    /// Agents leave damage as it is: for looking at what a missing rule, route, member or listener does
    #[arg(long)]
    no_mend: bool,
}

#[derive(Debug, Args)]
struct DownArgs {
    /// Name of the lab
    #[arg(long, default_value = "lab")]
    name: String,
    /// Remove every lab on this machine
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    name: NameArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ExecArgs {
    #[command(flatten)]
    name: NameArgs,
    /// Where: node1, proxy1, pod1-2, plain1, out
    target: String,
    /// Command with its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn progress(line: &str) {
    eprintln!("{line}");
}

pub(crate) fn run(args: LabArgs) -> Result<(), Failure> {
    match args.verb {
        Verb::Up(args) => up(&args),
        Verb::Down(args) => down(&args),
        Verb::Status(args) => status(&args),
        Verb::Exec(args) => match standing::exec(&args.name.name, &args.target, &args.command)? {
            0 => Ok(()),
            code => Err(Failure::Code(u8::try_from(code).unwrap_or(1))),
        },
        Verb::Relay(args) => relay::run(args),
        Verb::Load { plan } => Ok(lab::experiment::engine::run(&plan)?),
        Verb::Traffic { command } => match traffic::run(&TrafficCommand::from_json(&command)?)? {
            0 => Ok(()),
            code => Err(Failure::Code(u8::try_from(code).unwrap_or(1))),
        },
    }
}

fn up(args: &UpArgs) -> Result<(), Failure> {
    let variant = args.capture.variant;
    block_on(require_overlay(args.capture.mode, variant.overlay))??;
    let spec = LabSpec {
        node_flow: variant.node_flow,
        inpod_rules: variant.inpod_rules,
        overlay: variant.overlay,
        same_node: variant.same_node,
        cni: variant.cni,
        families: args.ip_families,
        pods_per_node: args.pods_per_node,
        control_plane: args.control_plane,
        mends: !args.no_mend,
        ..LabSpec::new(
            &args.name.name,
            args.capture.mode,
            Programs::of_this_process()?,
        )
    };
    let lab = standing::up(&spec, &progress)?;
    let name = lab.name();
    eprintln!("lab {name} stands; look into it: ambidex lab exec --name {name} node1 -- ip rule");
    Ok(())
}

fn down(args: &DownArgs) -> Result<(), Failure> {
    let names = if args.all {
        standing::list()?
    } else {
        vec![args.name.clone()]
    };
    for name in names {
        standing::down(&name)?;
        eprintln!("lab {name} is removed");
    }
    Ok(())
}

fn status(args: &StatusArgs) -> Result<(), Failure> {
    let status = standing::status(&args.name.name)?;
    match args.output.output {
        Format::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Format::Yaml => print!("{}", serde_saphyr::to_string(&status)?),
        Format::Table | Format::Wide => print!("{status}"),
    }
    match status.first_broken() {
        None => Ok(()),
        Some(broken) => Err(anyhow::anyhow!("{broken}").into()),
    }
}
