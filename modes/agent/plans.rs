//! What a pod's capture consists of: the plans of its redirect, and what the proxy is told.

use std::net::IpAddr;

use anyhow::anyhow;
use host_net::engine;
use host_net::netlink::Netlink;
use host_net::plan::{Phase, Place, Plan};
use inpod_redirect::plan::Style;
use inpod_redirect::zds::{self, Add, WorkloadInfo};
use ipnet::IpNet;

use super::datapath::{Unfit, refuse_bridge};
use super::node::{MAIN_TABLE, NO_IPV6, has_ipv6};
use super::{Agent, Pod, PodState};
use crate::options::{Capture, InpodRules};

impl Agent {
    /// Which rules capture inside pods.
    pub(super) fn style(&self) -> Style {
        match self.config.variant.inpod_rules {
            InpodRules::Redirect => Style::Redirect,
            InpodRules::Tproxy => Style::Tproxy,
            InpodRules::Nftables => Style::Nftables,
        }
    }

    /// The plans of a pod in its state with their places, in the order of making.
    pub(super) async fn pod_plans(&self, pod: &Pod) -> anyhow::Result<Vec<(Place, Plan)>> {
        let phase = match pod.state {
            PodState::Draining => Phase::Draining,
            PodState::Pending | PodState::Captured | PodState::Leaving => Phase::Active,
        };
        let leaving = pod.leaving.map(|it| (it.capture, Phase::Draining));
        let phases: Vec<_> = [(pod.mode, phase)].into_iter().chain(leaving).collect();
        self.plans_in(pod, &phases).await
    }

    /// The plans of a pod that has several captures, each in its phase. What two of them have in one place under one name
    /// is one plan.
    pub(super) async fn plans_in(
        &self,
        pod: &Pod,
        phases: &[(Capture, Phase)],
    ) -> anyhow::Result<Vec<(Place, Plan)>> {
        let mut all: Vec<(Place, Plan)> = Vec::new();
        for (capture, phase) in phases {
            for (place, plan) in self.plans_by(pod, *capture, *phase).await? {
                match all.iter_mut().find(|(_, other)| other.name == plan.name) {
                    Some((_, other)) => {
                        let more = plan.steps.into_iter();
                        let more = more.filter(|step| !other.steps.contains(step));
                        let more: Vec<_> = more.collect();
                        other.steps.extend(more);
                    }
                    None => all.push((place, plan)),
                }
            }
        }
        Ok(all)
    }

    /// Reads what a change to these plans will want to know of the rules, before somebody has to wait for it.
    pub(super) async fn read_ahead(&self, plans: &[(Place, Plan)]) {
        for (place, plan) in plans {
            if let Err(error) = engine::read_ahead(place, plan).await {
                // The change reads for itself, and says what is wrong.
                tracing::debug!(%error, "rules are not read ahead");
            }
        }
    }

    async fn plans_by(
        &self,
        pod: &Pod,
        capture: Capture,
        phase: Phase,
    ) -> anyhow::Result<Vec<(Place, Plan)>> {
        match capture {
            Capture::Node => {
                if pod.extent.bypass_inbound {
                    return Err(Unfit::OneDirection.into());
                }
                let setup = self
                    .node_setup()
                    .ok_or_else(|| anyhow!("the node capture is not set up: no proxy yet"))?;
                let netlink = Netlink::connect(&self.host).await?;
                let facts = node_redirect::plan::PodFacts {
                    uid: pod.uid.clone(),
                    addresses: pod.addresses.clone(),
                    veth: pod_veth(&netlink, &pod.addresses).await?,
                    host_ip: setup.host_facts.host_ip,
                    ends6: setup.host_facts.ends6,
                    main_has_default_route: setup.host_facts.main_has_default_route,
                    // The plugin's pods have no process yet, and so no connection.
                    live: pod.live,
                    dns_exempt: self.config.dns_capture && pod.dns_capture == Some(false),
                    ipv6: setup.host_facts.ipv6,
                };
                if facts.captured().next().is_none() {
                    return Err(anyhow!(
                        "the pod has only IPv6 addresses, and the node capture has no IPv6 here: {NO_IPV6}"
                    ));
                }
                let on_node = (self.host_place(), node_redirect::plan::pod(&facts, phase));
                if !facts.dns_exempt {
                    return Ok(vec![on_node]);
                }
                let proxy = Place {
                    label: "proxy".to_owned(),
                    netns: setup.proxy.clone(),
                };
                let in_proxy = node_redirect::plan::proxy_pod(&facts, phase);
                Ok(vec![(proxy, in_proxy), on_node])
            }
            Capture::Inpod => {
                let netns = pod.open_netns()?;
                let facts = inpod_redirect::plan::PodFacts {
                    uid: pod.uid.clone(),
                    addresses: pod.addresses.clone(),
                    ipv6: has_ipv6(&netns),
                    dns: pod.dns_capture.unwrap_or(self.config.dns_capture),
                    live: pod.live && !pod.settled,
                    style: self.style(),
                    extent: pod.extent.clone(),
                };
                let place = Place {
                    label: format!("pod {}", pod.qualified_name()),
                    netns,
                };
                let on_node = inpod_redirect::plan::host_pod(&facts, phase);
                let in_pod = inpod_redirect::plan::pod(&facts, phase);
                Ok(vec![(self.host_place(), on_node), (place, in_pod)])
            }
        }
    }
}

/// What the proxy is told about a pod.
pub(super) fn announcement(pod: &Pod) -> anyhow::Result<Add> {
    let (mode, netns) = match pod.mode {
        Capture::Node => (zds::Mode::Node, None),
        Capture::Inpod => (zds::Mode::Inpod, Some(pod.open_netns()?)),
    };
    Ok(Add {
        uid: pod.uid.as_str().into(),
        info: WorkloadInfo {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
        },
        mode,
        addresses: pod.addresses.clone(),
        guests: pod.extent.has_guests(),
        netns,
    })
}

/// The device through which the node reaches a pod: the node's end of its veth. The tables of the node capture are not
/// asked, because a captured pod's address leads into the tunnel there.
async fn pod_veth(netlink: &Netlink, addresses: &[IpAddr]) -> anyhow::Result<String> {
    let mut missing = None;
    for address in addresses.iter().copied() {
        let destination = IpNet::from(address);
        let device = match netlink.device_to(MAIN_TABLE, destination).await? {
            Some(name) => netlink.link(&name).await?,
            None => None,
        };
        if let Some(device) = device {
            // A host route to a bridge does not lead there what the bridge itself hands on.
            refuse_bridge("the pod", address, &device)?;
            return Ok(device.name);
        }
        missing = missing.or(Some(destination));
    }
    Err(match missing {
        Some(route) => anyhow!(
            "the node has no host route {route} in its main table: node capture needs a routed CNI; use --mode inpod"
        ),
        None => anyhow!("the pod has no address"),
    })
}
