//! CHECK: whether a pod is captured, asked of the kernel and not of the agent's memory.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::anyhow;
use host_net::netns::Netns;
use http::StatusCode;

use super::admission::has_address;
use super::events::{failed, known};
use super::{Agent, EnrolError, Pod, PodState};
use crate::cni::PodEvent;

/// Fails with everything that is not as it should be: what [`super::verify`] looks at, and namespace and addresses as the
/// runtime names them.
pub(super) async fn check(agent: &Agent, event: &PodEvent) -> Result<(), EnrolError> {
    let failed = failed(event);
    let Some(pod) = known(agent, event) else {
        if agent.wanted(event).await?.is_none() {
            return Ok(());
        }
        return Err(failed(anyhow!("this agent has not enrolled it")));
    };
    if pod.state != PodState::Captured {
        return Err(failed(anyhow!("it is {}", pod.state)));
    }
    agent.ready().map_err(&failed)?;
    let mut findings = place(&pod, event).await.map_err(&failed)?;
    let verified = agent.verify_pod(&pod, &agent.proxy_tells().await).await;
    findings.extend(verified.checks.into_iter().flat_map(|check| check.findings));
    if findings.is_empty() {
        return Ok(());
    }
    Err(failed(anyhow!(
        "its capture is not effective: {}",
        findings.join("; ")
    )))
}

/// What is wrong with the pod's namespace and addresses, compared with what the runtime says of them.
async fn place(pod: &Pod, event: &PodEvent) -> anyhow::Result<Vec<String>> {
    let mut findings = Vec::new();
    let netns = Netns::open(&event.netns)?;
    if netns.id() != pod.netns_id {
        findings.push(format!(
            "{} is {}, but it is captured in {}",
            event.netns,
            netns.id(),
            pod.netns_id
        ));
    }
    let said = event.ips.iter().map(|ip| ip.address.addr());
    let said: BTreeSet<IpAddr> = said.collect();
    for address in &said {
        if !pod.addresses.contains(address) {
            findings.push(format!("{address} is not an address that is captured"));
        }
        if !has_address(&netns, *address).await? {
            findings.push(format!("{address} is not on any of its interfaces"));
        }
    }
    Ok(findings)
}

impl Agent {
    /// Status of an answer that says that no pod can be added: whether those that are captured suffer too.
    pub(super) fn status_without_add(&self) -> StatusCode {
        let captured = |pod: &Pod| pod.state == PodState::Captured;
        if !self.status().proxy_ready && self.pods.all().iter().any(captured) {
            StatusCode::BAD_GATEWAY
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        }
    }
}
