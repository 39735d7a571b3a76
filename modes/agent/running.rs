//! Pods that were running before they are enrolled: by an operator, or because their namespace was replaced.

use std::time::Duration;

use host_net::netlink::Netlink;
use host_net::netns::Netns;
use http::StatusCode;
use inpod_redirect::zds::Delays;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::admission::{has_address, pod_of};
use super::ledger::{Ledger, Way};
use super::{Agent, EnrolError, NotFound, Pod, PodState};
use crate::cni::{PodEvent, PodIp};
use crate::unix_http::{Answer, Caller};

/// A running pod that is captured by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// `namespace/name`.
    pub pod: String,
    /// Connections that were open before, and are kept outside the mesh.
    pub outside: usize,
    /// Connections by IPv6 that were open before, and are cut where IPv6 is not captured but dropped.
    pub cut: usize,
}

/// Answers `POST /v1/enrol`, whose body is an event of the plugin: name, namespace and network namespace of the pod; what
/// else it does not say is found out.
pub(super) async fn enrol(agent: &Agent, body: &[u8], caller: &Caller) -> Answer {
    let enrolled = match serde_json::from_slice(body) {
        Ok(event) => agent.enrol_running(event, caller).await,
        Err(error) => Err(EnrolError::Invalid(format!("not a pod: {error}"))),
    };
    match enrolled {
        Ok(enrolled) => Answer::json(&enrolled),
        Err(error) => error.answer(),
    }
}

/// Answers `POST /v1/unenrol?pod=P` and `?pod=P&drain=SECONDS`.
pub(super) async fn unenrol(agent: &Agent, query: &str) -> Answer {
    let mut wanted = None;
    let mut within = agent.config.drain;
    for part in query.split('&') {
        match (part.split_once('='), part) {
            (Some(("pod", pod)), _) => wanted = Some(pod),
            (Some(("drain", seconds)), _) if seconds.parse::<u32>().is_ok() => {
                within = Duration::from_secs(seconds.parse().unwrap_or_default());
            }
            _ => wanted = None,
        }
    }
    let Some(wanted) = wanted else {
        return Answer::text(
            StatusCode::BAD_REQUEST,
            "say ?pod=NAMESPACE/NAME, and &drain=SECONDS for another time than the agent's own\n",
        );
    };
    let pod = match agent.pods.find(wanted) {
        Ok(pod) => pod,
        Err(error @ NotFound::Unknown(_)) => {
            return Answer::text(StatusCode::NOT_FOUND, format!("{error}\n"));
        }
        Err(error) => return Answer::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match agent.let_go(&pod.uid, within).await {
        Ok(letting_go) => Answer::json(&letting_go),
        Err(error) => Answer::text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("pod {}: {error:#}\n", pod.qualified_name()),
        ),
    }
}

impl Agent {
    /// Captures a pod that is running; its open connections stay as they are, and are counted.
    async fn enrol_running(
        &self,
        mut event: PodEvent,
        caller: &Caller,
    ) -> Result<Enrolled, EnrolError> {
        let netns = Netns::open(&event.netns).map_err(|e| EnrolError::Invalid(e.to_string()))?;
        self.complete(&mut event, &netns).await?;
        let pod = pod_of(self, &event).await?.ok_or_else(|| {
            EnrolError::Invalid(format!(
                "this agent captures no pod named {:?}",
                event.pod_name
            ))
        })?;
        self.enrol_live(pod, caller).await
    }

    /// As [`Agent::enrol`], of a pod that is running.
    pub(super) async fn enrol_live(
        &self,
        pod: Pod,
        caller: &Caller,
    ) -> Result<Enrolled, EnrolError> {
        let pod = Pod { live: true, ..pod };
        let had = self.pods.get(&pod.uid);
        let repeated = had.is_some_and(|had| {
            had.state == PodState::Captured && (had.mode, had.netns_id) == (pod.mode, pod.netns_id)
        });
        let ledger = (!repeated).then(|| {
            let begun = Ledger::begun(&pod, Way::None, pod.mode.into());
            (begun, self.earlier(&pod))
        });
        self.enrol(pod.clone(), caller).await?;
        if let Some((ledger, earlier)) = ledger {
            let lines = self.lines(&pod, None, Some(pod.mode), &earlier, &Delays::default());
            self.ledgers.add(Ledger {
                over: true,
                ..ledger.with(lines.unwrap_or_default())
            });
        }
        let counted = self.connections_of(&pod).unwrap_or_default();
        let (outside, cut) = (counted.outside, counted.cut);
        let name = pod.qualified_name();
        tracing::info!(
            pod = name,
            outside,
            cut,
            "pod was running; its open connections are kept outside the mesh"
        );
        Ok(Enrolled {
            pod: name,
            outside,
            cut,
        })
    }

    /// Adds to an event what an operator need not say.
    pub(super) async fn complete(
        &self,
        event: &mut PodEvent,
        netns: &Netns,
    ) -> Result<(), EnrolError> {
        let known = self.pods.all().into_iter().find(|pod| {
            pod.name == event.pod_name
                && pod.namespace == event.pod_namespace
                && pod.netns_id == netns.id()
                && (event.pod_uid.is_empty() || pod.uid == event.pod_uid)
        });
        let fill = |value: &mut String, with: &str| {
            if value.is_empty() {
                value.push_str(with);
            }
        };
        if let Some(known) = &known {
            fill(&mut event.pod_uid, &known.uid);
            fill(&mut event.service_account, &known.service_account);
            fill(&mut event.container_id, &known.container_id);
            fill(&mut event.network, &known.network);
            fill(&mut event.if_name, &known.if_name);
        }
        let unique = format!("{}.{}", event.pod_namespace, event.pod_name);
        fill(&mut event.pod_uid, &unique);
        if event.ips.is_empty() {
            let failed = |error: anyhow::Error| EnrolError::Failed {
                pod: format!("{}/{}", event.pod_namespace, event.pod_name),
                error,
            };
            let netlink = Netlink::connect(netns).await;
            let netlink = netlink.map_err(|e| failed(e.into()))?;
            let found = netlink.addresses().await.map_err(|e| failed(e.into()))?;
            let pods_own = |net: &IpNet| match net {
                IpNet::V4(net) => !net.addr().is_loopback() && !net.addr().is_link_local(),
                IpNet::V6(net) => !net.addr().is_loopback() && !net.addr().is_unicast_link_local(),
            };
            // What the pod has for its guests, nobody else knows.
            let found = found
                .into_iter()
                .filter(|(device, _)| !event.extent.virtual_interfaces.contains(device));
            let found = found.map(|(_, net)| net).filter(pods_own);
            event.ips = found
                .map(|address| PodIp {
                    interface: None,
                    address,
                    gateway: None,
                })
                .collect();
        }
        Ok(())
    }

    /// Enrols a pod anew whose path names another namespace by now, if that is its own: if it has the pod's address.
    /// Returns whether it was; a stranger's namespace is not touched.
    pub(super) async fn follow(&self, pod: &Pod) -> bool {
        let Ok(netns) = Netns::open(&pod.netns) else {
            return false;
        };
        let Some(address) = pod.addresses.first().copied() else {
            return false;
        };
        if netns.id() == pod.netns_id
            || pod.state != PodState::Captured
            || netns.id() == self.host.id()
            || !has_address(&netns, address).await.unwrap_or(false)
        {
            return false;
        }
        tracing::warn!(
            pod = pod.qualified_name(),
            before = %pod.netns_id,
            after = %netns.id(),
            "the namespace of a pod was replaced; it is captured in the one that is there"
        );
        let moved = Pod {
            netns_id: netns.id(),
            state: PodState::Pending,
            ..pod.clone()
        };
        match self.enrol_live(moved, &Caller::own()).await {
            Ok(_) => true,
            Err(error) => {
                tracing::error!(%error, "a pod is not captured in its other namespace");
                false
            }
        }
    }
}
