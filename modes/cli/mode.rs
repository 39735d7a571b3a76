//! `ambidex mode`: by which capture a pod is captured.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::output::print;
use super::plan::pod_subject;
use super::{Failure, block_on};
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
}

pub(crate) fn run(args: ModeArgs) -> Result<(), Failure> {
    let Command::Set(args) = args.command;
    let subject = pod_subject(&args.pod)?.query();
    let mut uri = format!("/v1/capture?{subject}&to={}", args.capture);
    if let Some(drain) = args.drain {
        uri.push_str(&format!("&drain={}", drain.as_secs()));
    }
    let switched: Switched = block_on(agent_client::post(&uri))??;
    print(&format!(
        "pod {} is captured by {} instead of {}; {} connection(s) go on for up to {} s; new ones waited {:.1} ms at most\n",
        switched.pod,
        switched.to,
        switched.from,
        switched.through,
        switched.seconds,
        Duration::from_micros(switched.held_us).as_secs_f64() * 1e3
    ))?;
    Ok(())
}
