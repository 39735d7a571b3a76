//! Closing a pod: when its capture stays broken, nothing of it may pass in the clear, so its TCP is stopped where that is
//! still possible, until a probe has shown that the capture works again.
//!
//! Stopped is everything but tunnels, which are encrypted whoever opens them, and the probe. On the node that is a rule for
//! each direction in front of all others; in the pod's namespace, for a pod that is captured there, two more, because
//! pods of one bridge do not pass the node's rules. One of the two places is enough for the pod to be closed. They are plans
//! as all others: journalled, mended while the pod is closed, and undone with the pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use host_net::engine;
use host_net::plan::{ChainRule, Family, Place, Plan, Position, Step, Table};
use ipnet::IpNet;
use serde::Serialize;
use shared_proxy::capture::HBONE_PORT;
use shared_proxy::probe;

use super::node::has_ipv6;
use super::{Agent, Pod, removal};
use crate::options::Capture;

/// A closed pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Closed {
    /// What could not be put back.
    pub findings: Vec<String>,
    /// Where its traffic is stopped; empty when it could not be stopped anywhere, which is tried again.
    pub stopped_in: Vec<String>,
}

/// The closed pods, by UID.
#[derive(Debug, Default)]
pub(super) struct Closings(Mutex<BTreeMap<String, Closed>>);

impl Closings {
    pub(super) fn get(&self, uid: &str) -> Option<Closed> {
        self.lock().get(uid).cloned()
    }

    /// In words, for a closed pod.
    pub(super) fn finding(&self, uid: &str) -> Option<String> {
        let closed = self.get(uid)?;
        let why = closed.findings.join("; ");
        Some(match &closed.stopped_in[..] {
            [] => format!("the pod is to be closed and its traffic could not be stopped: {why}"),
            places => format!(
                "the pod is closed: its TCP is stopped in {} until its capture works again: {why}",
                places.join(" and in ")
            ),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Closed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All TCP but tunnels and the probe.
const STOPPED: &str = "-p tcp -m multiport ! --ports";

/// The rules on the node, for each of a pod's addresses.
fn on_node(uid: &str, addresses: &[IpAddr]) -> Plan {
    let of_address = |address: &IpAddr| {
        let (family, probe) = match address {
            IpAddr::V4(_) => (Family::V4, probe::ADDRESS.ip()),
            IpAddr::V6(_) => (Family::V6, probe::ADDRESS6.ip()),
        };
        let (address, probe) = (IpNet::from(*address), IpNet::from(probe));
        let out = format!("-s {address} ! -d {probe} {STOPPED} {HBONE_PORT} -j DROP");
        let back = format!("! -s {probe} -d {address} {STOPPED} {HBONE_PORT} -j DROP");
        [out, back].map(|rule| stops(family, "FORWARD", rule))
    };
    Plan {
        name: removal::closing_on_node(uid),
        steps: addresses.iter().flat_map(of_address).collect(),
    }
}

/// The rules in the pod's namespace. What the capture has redirected goes to the loopback address when it gets here.
fn in_pod(uid: &str, families: &[Family]) -> Plan {
    let of_family = |family: &Family| {
        let loopback = match family {
            Family::V4 => "127.0.0.0/8",
            Family::V6 => "::1/128",
        };
        let out = format!("! -d {loopback} ! -o lo {STOPPED} {HBONE_PORT} -j DROP");
        let back = format!("! -i lo {STOPPED} {HBONE_PORT} -j DROP");
        [("OUTPUT", out), ("INPUT", back)].map(|(chain, rule)| stops(*family, chain, rule))
    };
    Plan {
        name: removal::closing_in_pod(uid),
        steps: families.iter().flat_map(of_family).collect(),
    }
}

fn stops(family: Family, chain: &str, rule: String) -> Step {
    Step::ChainRule(ChainRule {
        family,
        table: Table::Filter,
        chain: chain.to_owned(),
        rule,
        position: Position::First,
    })
}

impl Agent {
    /// The plans that close a pod, with their places. IPv6 that is not captured is dropped already, and closed all the same
    /// where there is IPv6: what stands for that may be what is broken.
    fn closing_plans(&self, pod: &Pod) -> Vec<(Place, Plan)> {
        let mut plans = Vec::new();
        if pod.mode == Capture::Inpod
            && let Ok(netns) = pod.open_netns()
        {
            let label = format!("pod {}", pod.qualified_name());
            let families: &[Family] = match has_ipv6(&netns) {
                true => &[Family::V4, Family::V6],
                false => &[Family::V4],
            };
            plans.push((Place { label, netns }, in_pod(&pod.uid, families)));
        }
        let mut addresses = pod.addresses.clone();
        if !has_ipv6(&self.host) {
            addresses.retain(IpAddr::is_ipv4);
        }
        if !addresses.is_empty() {
            plans.push((self.host_place(), on_node(&pod.uid, &addresses)));
        }
        plans
    }

    /// Closes a pod because of `findings`, or makes sure that it is still closed.
    pub(super) async fn close(&self, pod: &Pod, findings: Vec<String>) {
        let _alone = self.busy.lock(&pod.uid).await;
        if self.pods.get(&pod.uid).as_ref() != Some(pod) {
            // It was unenrolled or enrolled anew meanwhile.
            return;
        }
        let mut stopped_in = Vec::new();
        for (place, plan) in self.closing_plans(pod) {
            match self.converge(&place, &plan).await {
                Ok(()) => stopped_in.push(place.label),
                Err(error) => {
                    tracing::error!(
                        pod = pod.qualified_name(),
                        place = place.label,
                        error = format!("{error:#}"),
                        "a pod's traffic cannot be stopped here"
                    );
                }
            }
        }
        let closed = Closed {
            findings,
            stopped_in,
        };
        let before = self.closings.lock().insert(pod.uid.clone(), closed.clone());
        if before.is_some_and(|before| before.stopped_in == closed.stopped_in) {
            return;
        }
        tracing::error!(
            pod = pod.qualified_name(),
            uid = pod.uid,
            findings = closed.findings.join("; "),
            stopped_in = closed.stopped_in.join(", "),
            "pod is closed: its capture cannot be put back; `ambidex verify {}` says what is wrong, and it opens by itself \
             when that is mended",
            pod.qualified_name()
        );
    }

    /// Opens a pod whose capture was proven.
    pub(super) async fn reopen(&self, pod: &Pod) {
        let _alone = self.busy.lock(&pod.uid).await;
        let mut left = Vec::new();
        for (place, plan) in self.closing_plans(pod) {
            let errors = engine::undo(&plan.name, Some(&place.netns), &self.journal).await;
            left.extend(errors.iter().map(ToString::to_string));
        }
        if !left.is_empty() {
            // Tried again in the next round.
            tracing::error!(
                pod = pod.qualified_name(),
                error = left.join("; "),
                "a closed pod cannot be opened"
            );
            return;
        }
        self.closings.lock().remove(&pod.uid);
        tracing::info!(
            pod = pod.qualified_name(),
            uid = pod.uid,
            "pod is open again: its capture works"
        );
    }

    /// Forgets a pod that is gone, and what closed it with it.
    pub(super) fn forget_closed(&self, uid: &str) {
        self.closings.lock().remove(uid);
    }

    /// What an earlier agent closed stays closed until this one has proven that it need not be.
    pub(super) fn restore_closed(&self) -> anyhow::Result<()> {
        for name in self.journal.list()? {
            let Some(uid) = removal::pod_that_is_closed_by(&name) else {
                continue;
            };
            if let Some(record) = self.journal.load(&name)? {
                let mut closed = self.closings.lock();
                let entry = closed.entry(uid.to_owned()).or_insert_with(|| Closed {
                    findings: vec!["an earlier agent closed it".to_owned()],
                    stopped_in: Vec::new(),
                });
                entry.stopped_in.push(record.place_label);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn tunnels_and_the_probe_pass_a_closed_pod() {
        let addresses = ["10.0.0.1", "fd00::1"].map(|address| address.parse().unwrap());
        let plan = on_node("u", &addresses);
        let commands = host_net::commands::as_commands(&plan).join("\n");
        for part in [
            "-s 10.0.0.1/32 ! -d 169.254.7.126/32 -p tcp -m multiport ! --ports 15008 -j DROP",
            "! -s 169.254.7.126/32 -d 10.0.0.1/32 -p tcp -m multiport ! --ports 15008 -j DROP",
            "-s fd00::1/128 ! -d PROBE -p tcp -m multiport ! --ports 15008 -j DROP",
            "! -s PROBE -d fd00::1/128 -p tcp -m multiport ! --ports 15008 -j DROP",
        ] {
            let part = part.replace("PROBE", &format!("{}/128", probe::ADDRESS6.ip()));
            assert!(commands.contains(&part), "{part}: {commands}");
        }
        assert_eq!(removal::pod_of_record(&plan.name), Some("u"));
        assert_eq!(
            removal::pod_of_record(&in_pod("u", &[Family::V4]).name),
            Some("u")
        );
    }
}
