//! CHECK: whether a pod is captured, asked of the kernel and not of the agent's memory.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use anyhow::anyhow;
use host_net::netns::Netns;
use http::StatusCode;
use shared_proxy::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};

use super::admission::has_address;
use super::api::Subject;
use super::events::{failed, known};
use super::{Agent, EnrolError, Pod, PodState};
use crate::cni::PodEvent;
use crate::options::Capture;

/// The state of a socket that listens (proc(5), /proc/net/tcp).
const LISTENING: &str = "0A";

/// Fails with everything that is not as it should be: namespace and addresses, every object of the plans in its order,
/// and the proxy's listeners.
pub(super) async fn check(agent: &Agent, event: &PodEvent) -> Result<(), EnrolError> {
    let failed = failed(event);
    let Some(pod) = known(agent, event) else {
        if agent.mode_of(&event.pod_name).is_none() {
            return Ok(());
        }
        return Err(failed(anyhow!("this agent has not enrolled it")));
    };
    if pod.state != PodState::Captured {
        return Err(failed(anyhow!("it is {}", pod.state)));
    }
    agent.ready().map_err(&failed)?;
    let mut findings = place(&pod, event).await.map_err(&failed)?;
    for different in agent
        .diff(&Subject::Pod(pod.uid.clone()))
        .await
        .map_err(&failed)?
    {
        findings.extend(different.findings);
    }
    let ports = agent.silent_ports(&pod).map_err(|e| failed(e.into()))?;
    findings.extend(
        ports
            .iter()
            .map(|port| format!("the proxy does not listen on port {port}")),
    );
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
    /// Ports of the capture on which nobody listens for this pod: in its own namespace, or in the proxy's.
    fn silent_ports(&self, pod: &Pod) -> io::Result<Vec<u16>> {
        let netns = match pod.mode {
            Capture::Inpod => pod.open_netns()?,
            Capture::Node => match self.node_setup() {
                Some(setup) => setup.proxy,
                None => return Err(io::Error::other("the node capture is not set up")),
            },
        };
        let mut wanted = vec![OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT];
        if self.config.dns_capture {
            wanted.push(DNS_PORT);
        }
        let heard = listened_on(&netns)?;
        wanted.retain(|port| !heard.contains(port));
        Ok(wanted)
    }

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

/// TCP ports that are listened on in a namespace.
fn listened_on(netns: &Netns) -> io::Result<BTreeSet<u16>> {
    let tables = netns.run(|| {
        ["tcp", "tcp6"].map(|table| {
            let path = format!("/proc/thread-self/net/{table}");
            // Where there is no IPv6 there is no table of it.
            std::fs::read_to_string(path).unwrap_or_default()
        })
    })?;
    Ok(tables.iter().flat_map(|table| listening(table)).collect())
}

/// Local ports of the sockets in state LISTEN, from a table of the kernel.
fn listening(table: &str) -> Vec<u16> {
    let port = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next()?;
        let state = fields.nth(1)?;
        let (_, port) = local.rsplit_once(':')?;
        (state == LISTENING).then(|| u16::from_str_radix(port, 16).ok())?
    };
    table.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n   \
            1: 0100007F:3AA0 0100007F:CAFE 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1\n";
        assert_eq!(listening(table), [15001]);
        assert_eq!(listening(""), [0_u16; 0]);
    }
}
