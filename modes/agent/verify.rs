//! Proof of capture, for an operator and for the agent itself: that a pod's namespace is the one that was enrolled, that
//! every kernel object of its plans is there and in order, that the proxy listens, that it knows the pod, and that a
//! connection from inside the pod really comes through.
//!
//! Nothing here changes anything, and nothing is taken from memory that the kernel or the proxy can be asked for.

pub(super) mod live;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use futures_util::StreamExt;
use futures_util::stream;
use host_net::netns::Netns;
use host_net::plan::Family;
use host_net::sockets::Listeners;
use inpod_redirect::extent::{BYPASS_INBOUND, VIRTUAL_INTERFACES};
use inpod_redirect::zds::messages::WorkloadState;
use serde::{Deserialize, Serialize};
use shared_proxy::capture::{
    DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, SAME_NODE_HBONE_PORT,
};

use super::admission::has_address;
use super::api::Subject;
use super::{Agent, Pod, PodState};
use crate::options::{Capture, SameNode};

/// Pods that are looked at at the same time.
const AT_ONCE: usize = 8;

/// How a pod's namespace is called in findings.
pub(super) const POD_PLACE: &str = "the pod's namespace";
/// How the proxy's own is.
const PROXY_PLACE: &str = "the proxy's namespace";

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aspect {
    /// The pod's network namespace is the one that was enrolled and has its addresses.
    Namespace,
    /// Every object of the plans is there, as it should be and where it should be.
    Objects,
    /// The proxy's ports are listened on.
    Listeners,
    /// A proxy is connected, and knows the pod.
    Proxy,
    /// The pod is not closed. Looked at only where it is.
    Open,
    /// A connection from inside the pod reaches the proxy, and through a tunnel the pod.
    Probe,
}

impl fmt::Display for Aspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Aspect::Namespace => "the network namespace is the enrolled one",
            Aspect::Objects => "kernel objects are in place",
            Aspect::Listeners => "the proxy listens",
            Aspect::Proxy => "the proxy knows of it",
            Aspect::Open => "its traffic is not stopped",
            Aspect::Probe => "a connection comes through",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What.
    pub aspect: Aspect,
    /// What is wrong; empty when nothing is.
    pub findings: Vec<String>,
}

/// What was found of a pod or of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// `node`, or `namespace/name`.
    pub subject: String,
    /// UID of the pod.
    pub uid: Option<String>,
    /// How the pod is captured.
    pub mode: Option<Capture>,
    /// How far its capture is: of one that drains, only what its open connections need is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<PodState>,
    /// What of the pod is not captured, or is beside it, because it says so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl Verified {
    /// Whether nothing is wrong.
    pub fn is_effective(&self) -> bool {
        self.checks.iter().all(|check| check.findings.is_empty())
    }

    /// Whether it is a pod that leaves the mesh, and whose connections go on.
    pub fn drains(&self) -> bool {
        self.state == Some(PodState::Draining)
    }
}

/// What the proxy says of its pods, asked once for all of them.
type Told = Result<Vec<WorkloadState>, String>;

impl Agent {
    /// Looks at a pod, at the node, or at both and all pods.
    pub(super) async fn verify(&self, subject: Option<&Subject>) -> anyhow::Result<Vec<Verified>> {
        Ok(match subject {
            Some(Subject::Pod(name)) => {
                let pod = self.pods.find(name)?;
                vec![self.verify_pod(&pod, &self.proxy_tells().await).await]
            }
            Some(Subject::Node) => vec![self.verify_node().await],
            None => {
                let told = self.proxy_tells().await;
                let pods = stream::iter(self.pods.all())
                    .map(|pod| {
                        let told = &told;
                        async move { self.verify_pod(&pod, told).await }
                    })
                    .buffered(AT_ONCE)
                    .collect::<Vec<_>>();
                let node = self.verify_node().await;
                std::iter::once(node).chain(pods.await).collect()
            }
        })
    }

    async fn verify_node(&self) -> Verified {
        let mut checks = vec![Check {
            aspect: Aspect::Proxy,
            findings: self
                .ready()
                .err()
                .map(|error| format!("{error:#}"))
                .into_iter()
                .collect(),
        }];
        checks.push(self.objects(&Subject::Node).await);
        if self.config.mode.uses_node() {
            checks.push(Check {
                aspect: Aspect::Listeners,
                findings: self.node_listeners(),
            });
        }
        Verified {
            subject: "node".to_owned(),
            uid: None,
            mode: None,
            state: None,
            notes: Vec::new(),
            checks,
        }
    }

    /// Looks at one pod; `told` is what the proxy says of all of them.
    pub(super) async fn verify_pod(&self, pod: &Pod, told: &Told) -> Verified {
        let mut checks = Vec::new();
        let mut note = |aspect, findings| checks.push(Check { aspect, findings });
        let netns = pod.open_netns();
        note(Aspect::Namespace, namespace_findings(pod, &netns).await);
        let objects = self.objects(&Subject::Pod(pod.uid.clone())).await;
        note(objects.aspect, objects.findings);
        // Of a pod that drains nothing is to be taken any more: nobody has to listen, and no probe would be answered.
        let drains = pod.state == PodState::Draining;
        let taken = netns.as_ref().ok().filter(|_| !drains);
        if let Some(netns) = taken {
            let listeners = match pod.mode {
                Capture::Inpod => {
                    let families = self.captured_families(pod);
                    missing_listeners(netns, &self.pod_ports(pod), &families, POD_PLACE)
                }
                Capture::Node => self.node_listeners(),
            };
            note(Aspect::Listeners, listeners);
        }
        note(Aspect::Proxy, proxy_findings(pod, told));
        if let Some(closed) = self.closings.finding(&pod.uid) {
            note(Aspect::Open, vec![closed]);
        }
        if let Some(netns) = taken {
            let families = self.captured_families(pod);
            let trouble = live::probe(pod, netns, &families).await.err();
            note(
                Aspect::Probe,
                trouble.iter().map(ToString::to_string).collect(),
            );
        }
        Verified {
            subject: pod.qualified_name(),
            uid: Some(pod.uid.clone()),
            mode: Some(pod.mode),
            state: Some(pod.state),
            notes: notes(pod),
            checks,
        }
    }

    async fn objects(&self, subject: &Subject) -> Check {
        let findings = match self.diff(subject).await {
            Ok(places) => places
                .into_iter()
                .flat_map(|placed| {
                    let place = placed.place;
                    let named = move |finding| format!("{place}: {finding}");
                    placed.findings.into_iter().map(named)
                })
                .collect(),
            Err(error) => vec![format!("{error:#}")],
        };
        Check {
            aspect: Aspect::Objects,
            findings,
        }
    }

    /// Ports of the proxy in the namespace of a pod that is captured there: that for DNS by the pod's own word, where it has
    /// one.
    pub(super) fn pod_ports(&self, pod: &Pod) -> Vec<u16> {
        ports(pod.dns_capture.unwrap_or(self.config.dns_capture))
    }

    /// Ports of the proxy in its own namespace that nobody listens on.
    pub(super) fn node_listeners(&self) -> Vec<String> {
        let Some(setup) = self.node_setup() else {
            return vec!["no proxy has connected since the agent started".to_owned()];
        };
        let mut wanted = ports(self.config.dns_capture);
        if self.config.variant.same_node == SameNode::Hbone {
            wanted.push(SAME_NODE_HBONE_PORT);
        }
        let families: &[Family] = match setup.host_facts.ends6 {
            Some(_) => &[Family::V4, Family::V6],
            None => &[Family::V4],
        };
        missing_listeners(&setup.proxy, &wanted, families, PROXY_PLACE)
    }

    /// The families in which a pod's connections are to reach the proxy, IPv4 first.
    pub(super) fn captured_families(&self, pod: &Pod) -> Vec<Family> {
        let by_ipv6 = pod.addresses.iter().any(IpAddr::is_ipv6) && self.captures_ipv6(pod);
        // Pods of agents that were told no address are taken for what most are.
        let by_ipv4 = pod.ipv4().next().is_some() || !by_ipv6;
        let families = [(by_ipv4, Family::V4), (by_ipv6, Family::V6)];
        let captured = families.into_iter().filter(|(captured, _)| *captured);
        captured.map(|(_, family)| family).collect()
    }

    /// What the proxy says of its pods.
    pub(super) async fn proxy_tells(&self) -> Told {
        self.zds.state().await.map_err(|error| error.to_string())
    }
}

/// How a pod's capture is another one than that of most pods.
fn notes(pod: &Pod) -> Vec<String> {
    let mut notes = Vec::new();
    if pod.extent.bypass_inbound {
        notes.push(format!(
            "what comes in is not captured, but for tunnels: {BYPASS_INBOUND}"
        ));
    }
    let interfaces = pod.extent.virtual_interfaces.join(", ");
    match pod.mode {
        _ if interfaces.is_empty() => {}
        Capture::Inpod => notes.push(format!(
            "TCP of guests behind {interfaces} is captured as the pod's own: {VIRTUAL_INTERFACES}"
        )),
        // By the address that the pod gives them.
        Capture::Node => notes.push(format!(
            "TCP of guests behind {interfaces} is captured if it leaves the pod with the pod's address, as masqueraded: {VIRTUAL_INTERFACES}"
        )),
    }
    notes
}

/// What is wrong with a pod's namespace.
pub(super) async fn namespace_findings(pod: &Pod, netns: &std::io::Result<Netns>) -> Vec<String> {
    let netns = match netns {
        Ok(netns) => netns,
        Err(error) => return vec![error.to_string()],
    };
    let mut findings = Vec::new();
    for address in pod.addresses.iter().copied() {
        match has_address(netns, address).await {
            Ok(true) => {}
            Ok(false) => findings.push(format!(
                "no interface of {} has the pod's address {address}",
                pod.netns.display()
            )),
            Err(error) => findings.push(error.to_string()),
        }
    }
    findings
}

/// What is wrong with the proxy's idea of a pod.
pub(super) fn proxy_findings(pod: &Pod, told: &Told) -> Vec<String> {
    if !matches!(pod.state, PodState::Captured | PodState::Draining) {
        return vec![format!("the pod is {}", pod.state)];
    }
    let found = match told {
        Ok(workloads) => workloads.iter().find(|workload| workload.uid == pod.uid),
        Err(error) => return vec![error.clone()],
    };
    match found {
        None if pod.state == PodState::Draining => Vec::new(),
        Some(_) if pod.state == PodState::Draining => {
            vec!["the proxy has not been told that the pod drains".to_owned()]
        }
        Some(workload) if workload.up => Vec::new(),
        Some(workload) => vec![format!("the proxy does not serve it: {}", workload.error)],
        None => vec!["the proxy has not been told of it".to_owned()],
    }
}

fn ports(dns: bool) -> Vec<u16> {
    let mut ports = vec![OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT];
    ports.extend(dns.then_some(DNS_PORT));
    ports
}

fn missing_listeners(
    netns: &Netns,
    wanted: &[u16],
    families: &[Family],
    place: &str,
) -> Vec<String> {
    match Listeners::of(netns).and_then(|listeners| listeners.now()) {
        Ok(listening) => lacking(&listening, wanted, families, place),
        Err(error) => vec![format!("asking who listens in {place}: {error}")],
    }
}

/// The wanted ports that are not listened on at every address of each of these families. DNS is answered where queries are redirected to: in a pod that
/// is its loopback.
pub(super) fn lacking(
    listening: &BTreeSet<SocketAddr>,
    wanted: &[u16],
    families: &[Family],
    place: &str,
) -> Vec<String> {
    let is_there = |port: u16, family: Family| {
        listening.iter().any(|at| {
            let local = port == DNS_PORT && at.ip().is_loopback();
            at.port() == port
                && at.is_ipv4() == family.is_v4()
                && (at.ip().is_unspecified() || local)
        })
    };
    let lacks = |port: &u16| {
        let missing = families.iter().filter(|family| !is_there(*port, **family));
        let missing: Vec<&Family> = missing.collect();
        let how = match missing[..] {
            [] => return None,
            [one] if families.len() > 1 => match one {
                Family::V4 => " by IPv4",
                Family::V6 => " by IPv6",
            },
            _ => "",
        };
        Some(format!("nobody listens on port {port}{how} in {place}"))
    };
    wanted.iter().filter_map(lacks).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_listener_of_one_family_is_none_of_the_other() {
        let listening = [
            "0.0.0.0:15001",
            "[::]:15001",
            "0.0.0.0:15006",
            "[::]:15008",
            "127.0.0.1:15053",
            "127.0.0.1:15088",
        ];
        let listening = listening.map(|at| at.parse().unwrap()).into();
        let lacking = |families: &[Family]| {
            let wanted = [15001, 15006, 15008, DNS_PORT, 15088];
            lacking(&listening, &wanted, families, "P").join("; ")
        };
        assert_eq!(
            lacking(&[Family::V4, Family::V6]),
            "nobody listens on port 15006 by IPv6 in P; nobody listens on port 15008 by IPv4 in P; \
             nobody listens on port 15053 by IPv6 in P; nobody listens on port 15088 in P"
        );
        assert_eq!(
            lacking(&[Family::V4]),
            "nobody listens on port 15008 in P; nobody listens on port 15088 in P"
        );
    }
}
