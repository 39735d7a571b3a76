//! `ambidex get`: what the agent of this node knows.

use clap::{Args, Subcommand};

use super::output::{OutputArgs, plain_table};
use super::{Failure, block_on};
use crate::agent::Pod;
use crate::agent_client;

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Pods that this node captures, and how
    #[command(visible_alias = "pod")]
    Pods(OutputArgs),
}

pub(crate) fn run(args: GetArgs) -> Result<(), Failure> {
    let What::Pods(output) = args.what;
    let pods: Vec<Pod> = block_on(agent_client::get("/v1/pods"))??;
    output.print(&pods, |wide| {
        let mut header = vec!["NAMESPACE", "NAME", "MODE", "STATE", "IP"];
        if wide {
            header.extend(["SERVICE ACCOUNT", "UID", "NETNS"]);
        }
        let mut table = plain_table(&header);
        for pod in &pods {
            let addresses = pod
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(",");
            let mut row = vec![
                pod.namespace.clone(),
                pod.name.clone(),
                pod.mode.to_string(),
                pod.state.to_string(),
                addresses,
            ];
            if wide {
                row.extend([
                    pod.service_account.clone(),
                    pod.uid.clone(),
                    pod.netns.display().to_string(),
                ]);
            }
            table.add_row(row);
        }
        table
    })?;
    Ok(())
}
