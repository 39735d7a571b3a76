//! `ambidex dump`: the network state of a namespace, in a form in which equal states are equal texts.

use std::path::PathBuf;

use clap::Args;
use host_net::netns::Netns;

use super::output::print;
use super::{Failure, block_on};

#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// Namespace to look into, as a path such as /run/netns/NAME or /proc/PID/ns/net; by default this one
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Print JSON instead of one line per object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: DumpArgs) -> Result<(), Failure> {
    let netns = match args.netns {
        Some(path) => Netns::open(path)?,
        None => Netns::current()?,
    };
    let dump = block_on(host_net::dump::dump(&netns))??;
    print(&if args.json {
        format!("{}\n", serde_json::to_string_pretty(&dump)?)
    } else {
        dump.to_string()
    })?;
    Ok(())
}
