//! `ambidex enrol` and `unenrol`: a running pod comes into the mesh or leaves it, and its connections do not notice.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use inpod_redirect::extent::Extent;

use super::output::print;
use super::plan::pod_subject;
use super::{Failure, block_on};
use crate::agent::Pod;
use crate::agent::draining::LettingGo;
use crate::agent::running::Enrolled;
use crate::agent_client;
use crate::cni::PodEvent;
use crate::options::duration;

/// Time between two looks whether a pod has drained.
const LOOKS_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(crate) struct EnrolArgs {
    /// Pod: namespace/name
    pod: String,
    /// Path of its network namespace, as the agent sees it: /run/netns/NAME, /proc/PID/ns/net
    #[arg(long, value_name = "PATH")]
    netns: PathBuf,
    /// Its UID (default: the one that it had when it was captured before, else NAMESPACE.NAME)
    #[arg(long, default_value = "", hide_default_value = true)]
    uid: String,
    /// Its service account (default: as before, else `default`)
    #[arg(long, default_value = "", hide_default_value = true)]
    service_account: String,
    /// Whether its DNS queries are captured (default: as the agent has it)
    #[arg(long, value_name = "BOOL")]
    dns_capture: Option<bool>,
    /// Let alone what comes in, but for tunnels: for gateways, captured in their pods
    #[arg(long)]
    bypass_inbound_capture: bool,
    /// Interfaces in the pod behind which it has guests (containers, virtual machines) that are captured with it
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    virtual_interfaces: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct UnenrolArgs {
    /// Pod: namespace/name, or its UID
    pod: String,
    /// How long its connections through the proxy may go on (default: the agent's --drain); 0s: they are reset
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    drain: Option<Duration>,
    /// Return when nothing of its capture is left
    #[arg(long)]
    wait: bool,
}

pub(crate) fn run_enrol(args: EnrolArgs) -> Result<(), Failure> {
    pod_subject(&args.pod)?;
    let (namespace, name) = args.pod.split_once('/').with_context(|| {
        format!(
            "{:?} is not the name of a pod: want NAMESPACE/NAME",
            args.pod
        )
    })?;
    let event = PodEvent {
        netns: args.netns.display().to_string(),
        pod_name: name.to_owned(),
        pod_namespace: namespace.to_owned(),
        ips: Vec::new(),
        pod_uid: args.uid,
        service_account: args.service_account,
        container_id: String::new(),
        network: String::new(),
        if_name: String::new(),
        dns_capture: args.dns_capture,
        extent: Extent {
            bypass_inbound: args.bypass_inbound_capture,
            virtual_interfaces: args.virtual_interfaces,
        },
    };
    let enrolled: Enrolled = block_on(agent_client::send("/v1/enrol", &event))??;
    print(&format!(
        "captured pod {}; {} open connection(s) kept outside the mesh\n",
        enrolled.pod, enrolled.outside
    ))?;
    if enrolled.cut > 0 {
        print(&format!(
            "{} open connection(s) by IPv6 are cut: it is not captured here, and dropped\n",
            enrolled.cut
        ))?;
    }
    Ok(())
}

pub(crate) fn run_unenrol(args: UnenrolArgs) -> Result<(), Failure> {
    let mut uri = format!("/v1/unenrol?{}", pod_subject(&args.pod)?.query());
    if let Some(drain) = args.drain {
        uri.push_str(&format!("&drain={}", drain.as_secs()));
    }
    block_on(async {
        let letting_go: LettingGo = agent_client::post(&uri).await?;
        print(&format!(
            "pod {} captures nothing new; {} connection(s) through the proxy go on for up to {} s\n",
            letting_go.pod, letting_go.through, letting_go.seconds
        ))?;
        while args.wait && is_known(&letting_go.pod).await? {
            tokio::time::sleep(LOOKS_EVERY).await;
        }
        anyhow::Ok(())
    })??;
    Ok(())
}

async fn is_known(name: &str) -> anyhow::Result<bool> {
    let pods: Vec<Pod> = agent_client::get("/v1/pods").await?;
    Ok(pods.iter().any(|pod| pod.qualified_name() == name))
}
