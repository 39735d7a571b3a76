//! Building: namespaces, links, rules, pods, then the daemons.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use host_net::iptables::Iptables;
use host_net::netns::Netns;
use host_net::plan::Family;
use host_net::sysctl;
use nix::sys::signal::Signal;

use super::process::{self, Process};
use super::{Daemon, Lab, Progress, cgroup, congestion};
use crate::topology::network::Attachment;
use crate::topology::{Cni, Kind, Mode, Node, Pod, ipv6};

/// Bound of one call of `ip`. User-Mode Linux needs a second for some.
const TOOL_LIMIT: Duration = Duration::from_secs(30);
/// Whether what a bridge switches meets the rules of iptables and ip6tables. Absent where the kernel has no br_netfilter.
const BRIDGE_NETFILTER: [&str; 2] = [
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
];
/// How long a killed pause process may take to go.
pub(super) const GONE_WITHIN: Duration = Duration::from_secs(5);

impl Lab {
    /// Everything, from a record only to a complete lab.
    pub(super) fn build(&self, progress: Progress<'_>) -> Result<()> {
        let topology = self.topology();
        let lab = &topology.lab;
        progress(&format!(
            "lab {lab}: {} network namespaces",
            topology.netns_names().len()
        ));
        for name in topology.netns_names() {
            congestion::create_netns(&name)?;
        }
        for (netns, batch) in topology.ip_batches() {
            ip_batch(&netns, &batch)?;
        }
        for target in topology.target_names() {
            let forwards = matches!(topology.target(&target), Some((Kind::Node, _, _)));
            self.write_sysctl(
                &target,
                "net/ipv4/ip_forward",
                if forwards { "1" } else { "0" },
            )?;
        }
        if self.spec().cni == Cni::Bridge {
            // As kubeadm's checks want it: without it, answers between pods of a node miss the DNAT of services.
            for node in &topology.nodes {
                for key in BRIDGE_NETFILTER {
                    if sysctl::read(&self.netns(&node.name)?, key).is_ok() {
                        self.write_sysctl(&node.name, key, "1")?;
                    }
                }
            }
        }
        progress(&format!("lab {lab}: service and masquerade rules"));
        for node in &topology.nodes {
            let netns = self.netns(&node.name)?;
            let iptables = Iptables::choose(&netns, [Family::V4])?;
            let restored = iptables.restore(&netns, Family::V4, &topology.kube_rules(node));
            restored.with_context(|| format!("rules of {}", node.name))?;
            if topology.families.have_v6() {
                self.write_sysctl(&node.name, "net/ipv6/conf/all/forwarding", "1")?;
                let ip6tables = Iptables::choose(&netns, [Family::V6])?;
                let rules = ipv6::rules(&topology.kube_rules(node));
                let restored = ip6tables.restore(&netns, Family::V6, &rules);
                restored.with_context(|| format!("IPv6 rules of {}", node.name))?;
            }
        }
        for (_, pod) in topology.pods() {
            self.start_pause(pod, progress)?;
        }
        self.write_state(&topology.local_xds().to_yaml()?)?;
        if self.spec().mode != Mode::None {
            self.start_daemons_and_pods(progress)?;
        }
        self.change_record(|record| record.complete = true)?;
        progress(&format!("lab {lab}: stands ({})", self.dir().display()));
        Ok(())
    }

    fn start_daemons_and_pods(&self, progress: Progress<'_>) -> Result<()> {
        let topology = self.topology();
        if self.spec().control_plane {
            progress(&format!("lab {}: control plane", topology.lab));
            self.start_control()?;
        }
        for node in &topology.nodes {
            progress(&format!(
                "lab {}: agent and proxy of {}",
                topology.lab, node.name
            ));
            // The agent first: it makes the socket that the proxy looks for.
            self.start(node.index, Daemon::Agent)?;
            self.start(node.index, Daemon::Proxy)?;
        }
        for node in &topology.nodes {
            self.wait_ready(node.index, progress)?;
        }
        let added = |pod: &Pod| pod.capture.is_some() && !self.spec().leaves_pods;
        for (_, pod) in topology.pods().filter(|(_, pod)| added(pod)) {
            progress(&format!(
                "lab {}: pod {}/{}",
                topology.lab, pod.namespace, pod.name
            ));
            self.add_pod(&pod.name)?;
        }
        Ok(())
    }

    /// Creates a pod anew after [`Lab::destroy_pod`]: another namespace, another UID, the same name and address. It is
    /// not captured before [`Lab::add_pod`].
    ///
    /// # Errors
    /// When it still exists, or something cannot be made.
    pub fn create_pod(&self, pod: &str) -> Result<()> {
        let topology = self.topology();
        let (node, pod) = topology
            .pod(pod)
            .with_context(|| format!("no pod {pod:?}"))?;
        congestion::create_netns(&pod.netns)?;
        self.change_record(|record| *record.generations.entry(pod.name.clone()).or_default() += 1)?;
        let attachment = attachment(node, pod);
        ip_batch(&node.netns, &attachment.node_side())?;
        ip_batch(&pod.netns, &attachment.pod_side())?;
        self.write_sysctl(&pod.name, "net/ipv4/ip_forward", "0")?;
        let topology = self.topology();
        let (_, pod) = topology
            .pod(&pod.name)
            .with_context(|| format!("no pod {:?}", pod.name))?;
        self.start_pause(pod, &|_| {})
    }

    /// Removes a pod as a node does when its object is deleted: the plugin's DEL if it is captured, then its processes
    /// and its namespace.
    ///
    /// # Errors
    /// At the first step that fails.
    pub fn destroy_pod(&self, pod: &str) -> Result<()> {
        let topology = self.topology();
        let (node, pod) = topology
            .pod(pod)
            .with_context(|| format!("no pod {pod:?}"))?;
        if pod.capture.is_some() {
            self.del_pod(&pod.name)?;
        }
        let id = self.netns(&pod.name)?.id();
        for process in process::in_namespaces(&[id]) {
            process.signal(Signal::SIGKILL)?;
            process.wait_gone(GONE_WITHIN);
        }
        self.change_record(|record| {
            record.processes.remove(&pause_name(pod));
        })?;
        // Deleting the veth here and not with the namespace, which the kernel removes at leisure: the name is free at once.
        ip_batch(&node.netns, &format!("link delete {}\n", pod.veth))?;
        Netns::delete_named(&pod.netns).context("delete network namespace")?;
        cgroup::remove_pod(&topology.lab, pod)
    }

    /// A process that does nothing but hold the pod's namespace and be found in its control group, as the pause
    /// container on a cluster.
    fn start_pause(&self, pod: &Pod, progress: Progress<'_>) -> Result<()> {
        let process = self.spawn_pause(pod)?;
        self.change_record(|record| {
            record.processes.insert(pause_name(pod), process);
        })?;
        if !cgroup::enter(&self.topology().lab, pod, process)? {
            progress(&format!(
                "{}: no control group hierarchy to write to; its process cannot be found by UID",
                pod.name
            ));
        }
        Ok(())
    }

    /// The process itself, which nothing knows yet.
    pub(super) fn spawn_pause(&self, pod: &Pod) -> Result<Process> {
        let netns = self.netns(&pod.name)?;
        let mut command = Command::new("sleep");
        command.arg("infinity");
        let child = process::spawn_detached(&netns, &command, Path::new("/dev/null"))?;
        let process = i32::try_from(child.id()).ok().and_then(Process::of_pid);
        process.with_context(|| format!("the pause process of {} ended at once", pod.name))
    }

    pub(super) fn write_sysctl(&self, target: &str, key: &str, value: &str) -> Result<()> {
        sysctl::write(&self.netns(target)?, key, value).with_context(|| target.to_owned())
    }
}

/// Name of a pod's pause process in the record.
pub(super) fn pause_name(pod: &Pod) -> String {
    format!("pause {}", pod.name)
}

pub(super) fn attachment<'a>(node: &Node, pod: &'a Pod) -> Attachment<'a> {
    Attachment {
        veth: &pod.veth,
        netns: &pod.netns,
        ip: pod.ip,
        gateway: node.pod_gateway,
        cni: node.cni,
        families: node.families,
    }
}

/// One call of `ip` for many changes in a namespace.
pub(super) fn ip_batch(netns: &str, batch: &str) -> Result<()> {
    let here = Netns::current()?;
    let mut command = Command::new("ip");
    command.args(["-netns", netns, "-batch", "-"]);
    let done = process::run_captured(&here, &mut command, batch, TOOL_LIMIT)?;
    done.success(&format!("ip -netns {netns} -batch\n{batch}"))?;
    Ok(())
}
