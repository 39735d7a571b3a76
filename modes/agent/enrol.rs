//! Enrolling and unenrolling one pod.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow};
use host_net::engine;
use host_net::netlink::Netlink;
use host_net::plan::{Family, Phase, Place, Plan};
use inpod_redirect::zds::{self, Add, WorkloadInfo};

use ipnet::IpNet;

use super::api::Undone;
use super::node::{MAIN_TABLE, has_ipv6};
use super::{Agent, Pod, PodState};
use crate::options::Capture;

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no proxy that could serve it.
    #[error(
        "pod {0} cannot be enrolled yet: no proxy is ready on this node; it does not start uncaptured"
    )]
    NoProxy(String),
    /// Something failed; what had been made was taken away again.
    #[error("pod {pod}: {error:#}")]
    Failed {
        /// `namespace/name`.
        pod: String,
        /// Cause.
        error: anyhow::Error,
    },
}

/// One lock per pod, so that two events about the same pod never interleave.
#[derive(Debug, Default)]
pub(super) struct Busy(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Busy {
    async fn lock(&self, uid: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self
                .0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(uid.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

impl Agent {
    /// Enrols a pod: announcement and acknowledgement first, redirect last. On an error everything is taken back.
    pub(super) async fn enrol(&self, pod: Pod) -> Result<(), EnrolError> {
        let _alone = self.busy.lock(&pod.uid).await;
        if self.ready().is_err() {
            return Err(EnrolError::NoProxy(pod.qualified_name()));
        }
        let name = pod.qualified_name();
        if let Some(known) = self
            .pods
            .get(&pod.uid)
            .filter(|known| known.netns_id != pod.netns_id)
        {
            tracing::info!(pod = name, "the pod has another network namespace now");
            self.take_away(&known)
                .await
                .map_err(|error| EnrolError::Failed {
                    pod: name.clone(),
                    error,
                })?;
        }
        if let Err(error) = self.put_in_place(pod.clone()).await {
            if let Err(left) = self.take_away(&pod).await {
                tracing::error!(
                    pod = name,
                    error = format!("{left:#}"),
                    "a failed enrolment left something behind"
                );
            }
            tracing::error!(pod = name, error = format!("{error:#}"), "enrolment failed");
            return Err(EnrolError::Failed { pod: name, error });
        }
        tracing::info!(pod = name, mode = %pod.mode, "pod is captured");
        Ok(())
    }

    async fn put_in_place(&self, mut pod: Pod) -> anyhow::Result<()> {
        self.pods.put(pod.clone())?;
        self.announce(&pod).await?;
        self.make_redirect(&pod).await?;
        pod.state = PodState::Captured;
        self.pods.put(pod)?;
        Ok(())
    }

    /// Unenrols a pod: redirect first, then its listeners, whose connections drain.
    pub(super) async fn unenrol(&self, pod: &Pod) -> anyhow::Result<()> {
        let _alone = self.busy.lock(&pod.uid).await;
        self.take_away(pod).await?;
        tracing::info!(pod = pod.qualified_name(), "pod is no longer captured");
        Ok(())
    }

    async fn take_away(&self, pod: &Pod) -> anyhow::Result<()> {
        let undone = self.undo_pod_plans(pod).await?;
        self.zds
            .del(&pod.uid, self.del_drain())
            .await
            .context("the proxy did not confirm the removal")?;
        if !undone.errors.is_empty() {
            return Err(anyhow!(undone.errors.join("; ")));
        }
        self.pods.remove(&pod.uid)?;
        Ok(())
    }

    async fn announce(&self, pod: &Pod) -> anyhow::Result<()> {
        self.zds
            .add(announcement(pod)?)
            .await
            .context("the proxy did not take it")
    }

    /// Makes the pods of an earlier agent known again. A pod whose namespace is gone was deleted meanwhile.
    pub(super) async fn restore_pods(&self) {
        for pod in self.pods.all() {
            let outcome = match pod.open_netns() {
                Ok(_) => announcement(&pod).and_then(|add| Ok(self.zds.register(add)?)),
                Err(error) => {
                    tracing::info!(pod = pod.qualified_name(), %error, "the pod was deleted while no agent ran");
                    self.take_away(&pod).await
                }
            };
            if let Err(error) = outcome {
                tracing::error!(
                    pod = pod.qualified_name(),
                    error = format!("{error:#}"),
                    "pod not restored"
                );
            }
        }
    }

    /// Puts the redirects of the pods captured in this mode in place again: an earlier agent may have been killed half-way
    /// through a change. A pod that was never acknowledged stays as it is: its sandbox was refused.
    pub(super) async fn converge_pods(&self, mode: Capture) {
        for pod in self.pods.all() {
            if pod.mode != mode || pod.state != PodState::Captured {
                continue;
            }
            let _alone = self.busy.lock(&pod.uid).await;
            if let Err(error) = self.make_redirect(&pod).await {
                tracing::error!(
                    pod = pod.qualified_name(),
                    error = format!("{error:#}"),
                    "redirect not restored"
                );
            }
        }
    }

    async fn make_redirect(&self, pod: &Pod) -> anyhow::Result<()> {
        for (place, plan) in self.pod_plans(pod).await? {
            self.converge(&place, &plan).await?;
        }
        Ok(())
    }

    /// The plans of a pod with their places, in the order of making.
    pub(super) async fn pod_plans(&self, pod: &Pod) -> anyhow::Result<Vec<(Place, Plan)>> {
        let address = pod
            .ipv4()
            .next()
            .ok_or_else(|| anyhow!("the pod has no IPv4 address"))?;
        match pod.mode {
            Capture::Node => {
                let setup = self
                    .node_setup()
                    .ok_or_else(|| anyhow!("the node capture is not set up: no proxy yet"))?;
                let netlink = Netlink::connect(&self.host).await?;
                let facts = node_redirect::plan::PodFacts {
                    uid: pod.uid.clone(),
                    ip: address,
                    veth: pod_veth(&netlink, address).await?,
                    host_ip: setup.host_facts.host_ip,
                    main_has_default_route: setup.host_facts.main_has_default_route,
                    // The plugin's pods have no process yet, and so no connection.
                    live: false,
                    ipv6: setup.host_facts.ipv6,
                };
                Ok(vec![(
                    self.host_place(),
                    node_redirect::plan::pod(&facts, self.flow(), Phase::Active),
                )])
            }
            Capture::Inpod => {
                let netns = pod.open_netns()?;
                let facts = inpod_redirect::plan::PodFacts {
                    uid: pod.uid.clone(),
                    ip: address,
                    ipv6: has_ipv6(&netns),
                };
                let place = Place {
                    label: format!("pod {}", pod.qualified_name()),
                    netns,
                };
                Ok(vec![
                    (self.host_place(), inpod_redirect::plan::host_pod(&facts)),
                    (place, inpod_redirect::plan::pod(&facts, Phase::Active)),
                ])
            }
        }
    }

    /// Takes away what the journal knows of a pod: in its namespace first, then on the host.
    async fn undo_pod_plans(&self, pod: &Pod) -> anyhow::Result<Undone> {
        let mut undone = Undone::default();
        for name in [format!("pod-{}", pod.uid), format!("host-pod-{}", pod.uid)] {
            let Some(record) = self.journal.load(&name)? else {
                continue;
            };
            let netns = if record.netns == self.host.id() {
                Some(self.host.clone())
            } else {
                pod.open_netns().ok()
            };
            let errors = engine::undo(&name, netns.as_ref(), &self.journal).await;
            undone.errors.extend(errors.iter().map(ToString::to_string));
            undone.plans.push(name);
        }
        Ok(undone)
    }
}

fn announcement(pod: &Pod) -> anyhow::Result<Add> {
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
        netns,
    })
}

/// The device through which the node reaches a pod: the node's end of its veth. The tables of the node capture are not
/// asked, because a captured pod's address leads into the tunnel there.
async fn pod_veth(netlink: &Netlink, address: Ipv4Addr) -> anyhow::Result<String> {
    let destination = IpNet::from(IpAddr::V4(address));
    netlink
        .routes(Family::V4)
        .await?
        .into_iter()
        .find(|route| route.table == MAIN_TABLE && route.dst == destination)
        .and_then(|route| route.route.map(|route| route.dev))
        .ok_or_else(|| {
            anyhow!("the node has no host route {address}/32 in its main table: node capture needs a routed CNI; use --mode inpod")
        })
}
