//! `ambidex get`: what the agent and the proxies of this node know.

mod conns;
mod mesh;
#[cfg(test)]
mod tests;

use clap::{Args, Subcommand};
use inpod_redirect::extent::Extent;
use serde_json::Value;

use super::output::{Format, OutputArgs, plain_table};
use super::{Failure, block_on};
use crate::agent::api::ShownPod;
use crate::run_dir::RunDir;
use crate::{agent_client, proxy_client};

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
    /// Workloads of the mesh that the proxy knows
    #[command(visible_alias = "workload")]
    Workloads(OutputArgs),
    /// Services of the mesh that the proxy knows, and how many of their endpoints are healthy
    #[command(visible_alias = "service")]
    Services(OutputArgs),
    /// Authorization policies that the proxy applies
    #[command(visible_alias = "policy")]
    Policies(OutputArgs),
    /// Certificates that the proxy holds for the pods of this node
    #[command(visible_alias = "certificates")]
    Certs(OutputArgs),
    /// Open connections with both of their halves, and those that are half-open
    #[command(visible_alias = "connections")]
    Conns(conns::ConnsArgs),
}

pub(crate) fn run(args: GetArgs) -> Result<(), Failure> {
    match args.what {
        What::Pods(output) => pods(output),
        What::Workloads(output) => {
            let workloads = section("workloads")?;
            output.print(&workloads, |wide| mesh::workloads(&workloads, wide))?;
            Ok(())
        }
        What::Services(output) => {
            let (services, workloads) = (section("services")?, section("workloads")?);
            output.print(&services, |wide| {
                mesh::services(&services, &workloads, wide)
            })?;
            Ok(())
        }
        What::Policies(output) => {
            let policies = section("policies")?;
            output.print(&policies, |wide| mesh::policies(&policies, wide))?;
            Ok(())
        }
        What::Certs(output) => {
            let certificates = section("certificates")?;
            let now = mesh::seconds_since_1970();
            output.print(&certificates, |wide| {
                mesh::certificates(&certificates, now, wide)
            })?;
            Ok(())
        }
        What::Conns(args) => conns::run(args),
    }
}

/// A list in the configuration dump of the newest proxy.
fn section(name: &str) -> anyhow::Result<Vec<Value>> {
    block_on(async {
        let proxy = proxy_client::newest(&RunDir::from_env()).await?;
        proxy.get(&format!("/config_dump?section={name}")).await
    })?
}

/// What is captured of a pod.
fn reach(extent: &Extent) -> String {
    let ways = match extent.bypass_inbound {
        true => "outbound",
        false => "both ways",
    };
    let guests = extent.virtual_interfaces.iter();
    std::iter::once(ways.to_owned())
        .chain(guests.map(|interface| format!("guests of {interface}")))
        .collect::<Vec<_>>()
        .join(", ")
}

fn pods(output: OutputArgs) -> Result<(), Failure> {
    let page = match output.output {
        // Looking into every pod is for those who see what was found.
        Format::Table => "/v1/pods",
        Format::Wide | Format::Json | Format::Yaml => "/v1/pods?connections",
    };
    let pods: Vec<ShownPod> = block_on(agent_client::get(page))??;
    output.print(&pods, |wide| {
        let mut header = vec!["NAMESPACE", "NAME", "MODE", "STATE", "IP"];
        if wide {
            header.extend(["OUTSIDE", "CAPTURED", "SERVICE ACCOUNT", "UID", "NETNS"]);
        }
        let mut table = plain_table(&header);
        for ShownPod {
            pod,
            closed,
            outside,
        } in &pods
        {
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
                match closed {
                    Some(_) => "closed".to_owned(),
                    None => pod.state.to_string(),
                },
                addresses,
            ];
            if wide {
                row.extend([
                    outside.map_or_else(|| "-".to_owned(), |count| count.to_string()),
                    reach(&pod.extent),
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
