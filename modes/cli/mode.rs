//! `ambidex mode`: by which capture a pod is captured.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;

use super::output::{Format, OutputArgs, plain_table, print};
use super::plan::pod_subject;
use super::{Failure, block_on};
use crate::agent::ledger::{Class, Ledger, Line, Outcome};
use crate::agent::switching::Switched;
use crate::agent_client;
use crate::options::{Capture, duration};

#[derive(Debug, Args)]
pub(crate) struct ModeArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Give a running pod the other capture; its connections go on, new ones wait for some milliseconds
    Set(SetArgs),
    /// What became of a pod's connections at each change of its capture
    Ledger(LedgerArgs),
}

#[derive(Debug, Args)]
struct SetArgs {
    /// Pod: namespace/name, or its UID
    pod: String,
    /// How it is to be captured
    capture: Capture,
    /// How long connections may go on that came by the capture that it had (default: the agent's --drain)
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    drain: Option<Duration>,
    /// Name each connection, too
    #[arg(long)]
    connections: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct LedgerArgs {
    /// Pod: namespace/name, or its UID; also one that is gone
    pod: String,
    /// Name each connection of its last change, too
    #[arg(long)]
    connections: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ModeArgs) -> Result<(), Failure> {
    match args.command {
        Command::Set(args) => set(args),
        Command::Ledger(args) => ledger(args),
    }
}

fn set(args: SetArgs) -> Result<(), Failure> {
    let subject = pod_subject(&args.pod)?.query();
    let mut uri = format!("/v1/capture?{subject}&to={}", args.capture);
    if let Some(drain) = args.drain {
        uri.push_str(&format!("&drain={}", drain.as_secs()));
    }
    if args.connections {
        uri.push_str("&connections");
    }
    let switched: Switched = block_on(agent_client::post(&uri))??;
    if matches!(args.output.output, Format::Table | Format::Wide) {
        print(&format!(
            "pod {} is captured by {} instead of {}; {} connection(s) go on for up to {} s; new ones waited {:.1} ms at most\n",
            switched.pod,
            switched.to,
            switched.from,
            switched.through,
            switched.seconds,
            millis(switched.held_us)
        ))?;
        print_ledgers(args.output, std::slice::from_ref(&switched.ledger))?;
    } else {
        args.output.print(&switched, |_| plain_table(&[]))?;
    }
    Ok(())
}

fn ledger(args: LedgerArgs) -> Result<(), Failure> {
    let mut uri = format!("/v1/ledger?{}", pod_subject(&args.pod)?.query());
    if args.connections {
        uri.push_str("&connections");
    }
    let ledgers: Vec<Ledger> = block_on(agent_client::get(&uri))??;
    print_ledgers(args.output, &ledgers)?;
    Ok(())
}

fn print_ledgers(output: OutputArgs, ledgers: &[Ledger]) -> anyhow::Result<()> {
    output.print(&ledgers, |wide| table(ledgers, wide))?;
    let named: Vec<&Line> = ledgers.iter().flat_map(|it| &it.connections).collect();
    if !named.is_empty() && matches!(output.output, Format::Table | Format::Wide) {
        print("\n")?;
        output.print(&named, |_| lines(&named))?;
    }
    Ok(())
}

fn table(ledgers: &[Ledger], wide: bool) -> Table {
    let mut header = vec![
        "FROM", "TO", "RESULT", "KEPT", "OPEN", "DRAINED", "RESET", "DELAYED", "OUTSIDE",
    ];
    if wide {
        header.extend([
            "NODE",
            "CUT",
            "NEW",
            "MEDIAN MS",
            "LONGEST MS",
            "HELD MS",
            "POD",
            "WHY",
        ]);
    }
    let mut table = plain_table(&header);
    for it in ledgers {
        let result = match it.result {
            Outcome::Done => "done",
            Outcome::Failed => "failed",
        };
        let mut row = vec![it.from.to_string(), it.to.to_string(), result.to_owned()];
        let delayed = usize::try_from(it.delayed.count).unwrap_or(usize::MAX);
        let counts = [it.kept, it.open, it.drained, it.reset, delayed, it.outside];
        row.extend(counts.map(|count| count.to_string()));
        if wide {
            row.extend([it.node, it.cut, it.new].map(|count| count.to_string()));
            let times = [it.delayed.median_us, it.delayed.longest_us, it.held_us];
            row.extend(times.map(|time| format!("{:.1}", millis(time))));
            row.extend([it.pod.clone(), it.reason.clone()]);
        }
        table.add_row(row);
    }
    table
}

fn lines(named: &[&Line]) -> Table {
    let mut table = plain_table(&["CLASS", "LOCAL", "PEER", "BY", "ENDED"]);
    for line in named {
        let class = match line.class {
            Class::Kept => "kept",
            Class::Delayed => "delayed",
            Class::New => "new",
            Class::Outside => "outside",
            Class::Node => "node",
            Class::Cut => "cut",
            Class::Proxy => "proxy",
        };
        table.add_row(vec![
            class.to_owned(),
            line.local.to_string(),
            line.peer.to_string(),
            line.by.to_string(),
            if line.ended { "yes" } else { "" }.to_owned(),
        ]);
    }
    table
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1e3
}
